/* Attention of one new token: rotate q and k, append k and v to the cache, softmax(q K^T / sqrt(hd)) V.
 *
 * In fp32; what is stored is rounded once. A thread takes one text and one key-value head at a time, whose
 * query heads share what is read. hd is a multiple of 16.
 */

/* e^x for x <= 0: 2^n times the Taylor series of the rest, |rest| <= log(2) / 2; 0 below -87. */
INLINE vf NAME(exp)(vf x) {
    const float high = 0x1.62e4p-1f, low = M_LN2 - 0x1.62e4p-1; /* log(2); n * high is exact */
    static const float series[] = {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1, 1};
    vf magic = NAME(splat)(0x1.8p23f), shifted = NAME(fma)(x, NAME(splat)(M_LOG2E), magic);
    vf n = shifted - magic, rest = NAME(fma)(n, NAME(splat)(-high), x), y = NAME(splat)(1 / 5040.0f);
    rest = NAME(fma)(n, NAME(splat)(-low), rest);
    for (int i = 0; i < 7; i++) y = NAME(fma)(y, rest, NAME(splat)(series[i]));
    vi power = ((vi)shifted - (vi)magic + 127) << 23, tiny = x < -87;
    return (vf)((vi)(y * (vf)power) & ~tiny);
}

INLINE void NAME(read)(const void *from, long at, long count, int dtype, float *out) {
    for (long i = 0; i < count; i += W) *(vf_any *)(out + i) = NAME(load)(from, at + i, dtype);
}

/* Numbers at..at + hd of x as floats, rotated where there are tables: x cos + (its halves swapped) sin. */
INLINE void NAME(rotated)(const attend *a, int dtype, const void *x, long at, long b, float *twice,
                          float *out) {
    long hd = a->hd;
    NAME(read)(x, at, hd, dtype, out);
    memcpy(twice, out, hd * sizeof(float)), memcpy(twice + hd, out, hd * sizeof(float));
    for (long i = 0; i < hd && a->cos; i += W) {
        vf cos = NAME(load)(a->cos, b * a->table_stride + i, dtype);
        vf sin = NAME(load)(a->sin, b * a->table_stride + i, dtype);
        *(vf_any *)(out + i) = *(vf_any *)(twice + i) * cos + *(vf_any *)(twice + hd / 2 + i) * sin;
    }
}

/* score (width,) -> numbers whose share of their sum is the softmax; returns the sum. */
INLINE float NAME(exponentials)(float *score, long width) {
    vf most = NAME(splat)(-INFINITY), total = {0};
    for (long t = 0; t < width; t += W) {
        vf s = *(vf_any *)(score + t);
        vi above = s > most;
        most = (vf)((above & (vi)s) | (~above & (vi)most));
    }
    float largest = most[0];
    for (int i = 1; i < W; i++) largest = most[i] > largest ? most[i] : largest;
    for (long t = 0; t < width; t += W) {
        vf p = NAME(exp)(*(vf_any *)(score + t) - largest);
        *(vf_any *)(score + t) = p;
        total += p;
    }
    return NAME(sum)(total);
}

INLINE void NAME(attend_head)(const attend *a, int dtype, long b, long kv, float *scratch) {
    long hd = a->hd, G = a->H / a->KV, S = a->length + 1, width = (S + W - 1) / W * W;
    long head = b * a->KV + kv, cached = head * a->capacity * hd, size = dtype == FP32 ? 4 : 2;
    float *row = scratch, *q = row + 2 * hd, *total = q + G * hd, *score = total + G * hd;
    const uint8_t *mask = a->mask ? a->mask + b * a->mask_stride : NULL;
    NAME(rotated)(a, dtype, a->k, head * hd, b, row, q);
    for (long i = 0; i < hd; i += W)
        NAME(store)(a->keys, cached + a->length * hd + i, dtype, *(vf_any *)(q + i));
    memcpy((char *)a->values + (cached + a->length * hd) * size, (char *)a->v + head * hd * size, hd * size);
    for (long g = 0; g < G; g++) NAME(rotated)(a, dtype, a->q, (head * G + g) * hd, b, row, q + g * hd);

    for (long i = 0; i < G * width; i++) score[i] = -INFINITY;
    for (long t = 0; t < S; t++) {
        if (mask && !mask[t]) continue;
        NAME(read)(a->keys, cached + t * hd, hd, dtype, row);
        for (long g = 0; g < G; g++) {
            vf s = {0};
            for (long i = 0; i < hd; i += W)
                s = NAME(fma)(*(vf_any *)(row + i), *(vf_any *)(q + g * hd + i), s);
            score[g * width + t] = NAME(sum)(s) * a->scale;
        }
    }
    float sums[G];
    for (long g = 0; g < G; g++) sums[g] = NAME(exponentials)(score + g * width, width);
    memset(total, 0, G * hd * sizeof(float));
    for (long t = 0; t < S; t++) {
        if (mask && !mask[t]) continue;
        NAME(read)(a->values, cached + t * hd, hd, dtype, row);
        for (long g = 0; g < G; g++)
            for (long i = 0; i < hd; i += W) {
                vf_any *sum = (vf_any *)(total + g * hd + i);
                *sum = NAME(fma)(*(vf_any *)(row + i), NAME(splat)(score[g * width + t]), *sum);
            }
    }
    for (long g = 0; g < G; g++)
        for (long i = 0; i < hd; i += W)
            NAME(store)(a->out, (head * G + g) * hd + i, dtype, *(vf_any *)(total + g * hd + i) / sums[g]);
}

static void NAME(attend)(const attend *a, int dtype, int threads) {
    long G = a->H / a->KV, S = a->length + 1;
    #pragma omp parallel num_threads(threads) if (a->B * a->H * S * a->hd > SMALL)
    {
        float *scratch = malloc((2 * a->hd + G * (2 * a->hd + S + W)) * sizeof(float));
        #pragma omp for schedule(static)
        for (long i = 0; i < a->B * a->KV; i++) {
            if (dtype == FP32) NAME(attend_head)(a, FP32, i / a->KV, i % a->KV, scratch);
            else if (dtype == BF16) NAME(attend_head)(a, BF16, i / a->KV, i % a->KV, scratch);
            else NAME(attend_head)(a, FP16, i / a->KV, i % a->KV, scratch);
        }
        free(scratch);
    }
}
