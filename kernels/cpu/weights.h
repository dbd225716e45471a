/* Quantized weights for one instruction set: dequantize, quantize, products with few rows of x. */

/* absmax of `count` blocks from `block` on, as floats: two roundings under double quantization. */
static void NAME(scales)(const weight *w, long block, long count, float *out) {
    if (!w->nested_absmax) {
        memcpy(out, (const float *)w->absmax + block, count * sizeof(float));
        return;
    }
    const uint8_t *codes = (const uint8_t *)w->absmax + block;
    long i = 0;
    for (; i + W <= count; i += W) {
        long at = (block + i) % 256;
        const float *group = w->nested_absmax + (block + i) / 256;
        vf value = NAME(gather)(w->nested_codebook, NAME(load_bytes)(codes + i)), scale = NAME(splat)(*group);
        if (at + W > 256) scale = NAME(gather)(group, ((vi){COUNTING} + (int)at) >> 8); /* two groups */
        *(vf_any *)(out + i) = value * scale + w->offset[0];
    }
    for (; i < count; i++)
        out[i] = w->nested_codebook[codes[i]] * w->nested_absmax[(block + i) / 256] + w->offset[0];
}

/* The values of 2 W codes from element i on, before the scale. */
INLINE void NAME(decode)(const weight *w, int kind, const table *t, long i, vf *even, vf *odd) {
    if (kind == TABLE4) {
        vi bytes = NAME(load_bytes)(w->packed + i / 2);
        *even = NAME(lookup)(t, bytes >> 4);
        *odd = NAME(lookup)(t, bytes);
        return;
    }
    vi words = NAME(load_words)(w->packed + i), first = words << 24 >> 24, second = words >> 8;
    if (kind == TABLE8) {
        *even = NAME(gather)(w->codebook, first & 255);
        *odd = NAME(gather)(w->codebook, second & 255);
    } else {
        *even = __builtin_convertvector(first, vf);
        *odd = __builtin_convertvector(second, vf);
        if (kind == LINEAR8) *even = NAME(by_127)(*even), *odd = NAME(by_127)(*odd);
    }
}

/* ---- dequantize: out[r, c] = element first + r * stride + c ---- */

INLINE void NAME(dequantize_run)(const weight *w, int kind, int dtype, void *out, long to, long element,
                                 long count) {
    float scale[SEGMENT / 32 + 1];
    table t;
    if (kind == TABLE4) t = NAME(load_table)(w->codebook);
    vf even, odd;
    long block = element >> w->log_block, whole = count / (2 * W) * (2 * W);
    NAME(scales)(w, block, ((element + count - 1) >> w->log_block) - block + 1, scale);
    for (long i = 0; i < whole; i += 2 * W) {
        float s = scale[((element + i) >> w->log_block) - block];
        NAME(decode)(w, kind, &t, element + i, &even, &odd);
        NAME(store_pair)(out, to + i, dtype, even * s, odd * s);
    }
    if (whole < count) { /* the last elements of the matrix, through a copy */
        uint8_t codes[2 * W] = {0};
        float values[2 * W];
        weight tail = *w;
        long rest = count - whole, from = element + whole, size = dtype == FP32 ? 4 : 2;
        if (kind == TABLE4) memcpy(codes, w->packed + from / 2, (rest + 1) / 2);
        else memcpy(codes, w->packed + from, rest);
        tail.packed = codes;
        NAME(decode)(&tail, kind, &t, 0, &even, &odd);
        float s = scale[(from >> w->log_block) - block];
        NAME(store_pair)(values, 0, dtype, even * s, odd * s);
        memcpy((char *)out + (to + whole) * size, values, rest * size);
    }
}

static void NAME(dequantize)(const weight *w, void *out, int dtype, long first, long stride, long rows,
                             long columns, int threads) {
    long parts = (columns + SEGMENT - 1) / SEGMENT;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < rows * parts; part++) {
        long row = part / parts, column = part % parts * SEGMENT;
        long count = columns - column < SEGMENT ? columns - column : SEGMENT;
        long to = row * columns + column, from = first + row * stride + column;
        #define RUN(KIND) \
            if (dtype == FP32) NAME(dequantize_run)(w, KIND, FP32, out, to, from, count); \
            else if (dtype == BF16) NAME(dequantize_run)(w, KIND, BF16, out, to, from, count); \
            else NAME(dequantize_run)(w, KIND, FP16, out, to, from, count)
        if (w->kind == TABLE4) { RUN(TABLE4); }
        else if (w->kind == LINEAR8) { RUN(LINEAR8); }
        else { RUN(TABLE8); }
        #undef RUN
    }
}

/* ---- quantize: a midpoint belongs to the lower code; without midpoints, round(127 w / absmax) ---- */

INLINE float NAME(quantize_block)(const void *w, int dtype, long from, long count, int divide,
                                  const float *midpoints, const int *order, uint8_t *codes) {
    vi largest = {0};
    for (long i = 0; i < count; i += W) {
        vi magnitude = (vi)NAME(load)(w, from + i, dtype) & 0x7fffffff, above = magnitude > largest;
        largest = (above & magnitude) | (~above & largest); /* as integers, so that NaN is the largest */
    }
    int most = 0;
    for (int i = 0; i < W; i++) most = largest[i] > most ? largest[i] : most;
    if (most < 0x00800000) most = 0; /* below 2^-126: a block of zeros */
    float absmax;
    memcpy(&absmax, &most, 4);
    float divisor = most ? absmax : INFINITY, inverse = 1 / divisor;
    table below, names;
    if (midpoints) below = NAME(load_table)(midpoints), names = NAME(load_table)(order);
    for (long i = 0; i < count; i += W) {
        vf x = NAME(load)(w, from + i, dtype);
        x = divide ? x / divisor : x * inverse;
        if (!midpoints) {
            NAME(store_bytes)(codes + i, (vi)(x * 127 + 0x1.8p23f)); /* the sum rounds to integers */
            continue;
        }
        vi code = {0};
        for (int step = 8; step; step /= 2) code += (x > NAME(lookup)(&below, code + (step - 1))) & step;
        vl pairs = (vl)NAME(lookup)(&names, code); /* two codes, the first in the low 32 of 64 bits */
        pairs = pairs << 4 | pairs >> 32;
        for (int j = 0; j < W / 2; j++) codes[i / 2 + j] = pairs[j];
    }
    return absmax;
}

static void NAME(quantize)(const void *w, int dtype, long n, long block_size, const float *midpoints,
                           const int *order, uint8_t *packed, float *absmax, int threads) {
    long whole = n / block_size, rest = n % block_size;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long b = 0; b < whole; b++) {
        long at = b * block_size;
        #define BLOCK(DTYPE) absmax[b] = midpoints ? \
            NAME(quantize_block)(w, DTYPE, at, block_size, 0, midpoints, order, packed + at / 2) : \
            NAME(quantize_block)(w, DTYPE, at, block_size, 0, NULL, NULL, packed + at)
        if (dtype == FP32) BLOCK(FP32);
        else if (dtype == BF16) BLOCK(BF16);
        else BLOCK(FP16);
        #undef BLOCK
    }
    if (rest) { /* the short block, divided by absmax, padded with zeros */
        float block[4096] = {0};
        uint8_t codes[4096];
        long at = whole * block_size, size = dtype == FP32 ? 4 : 2, padded = (rest + W - 1) / W * W;
        memcpy(block, (const char *)w + at * size, rest * size);
        absmax[whole] = NAME(quantize_block)(block, dtype, 0, padded, 1, midpoints, order, codes);
        if (midpoints) memcpy(packed + at / 2, codes, (rest + 1) / 2);
        else memcpy(packed + at, codes, rest);
    }
}

/* ---- products with few rows: y[m, n] = sum over k of x[m, k] W[n, k], in fp32 ---- */

/* even and odd: x (rows, K / 2). 8-bit codes stay integers, and the sum is divided by 127. */
INLINE void NAME(dot)(const weight *w, int kind, const float *even, const float *odd, int rows, long n,
                      const float *scale, float *y, long N) {
    table t;
    if (kind == TABLE4) t = NAME(load_table)(w->codebook);
    vf total[4] = {{0}}, a, b;
    long K = w->columns, half = K / 2;
    for (long k = 0; k < K; k += 2 * W) {
        NAME(decode)(w, kind, &t, n * K + k, &a, &b);
        vf s = NAME(splat)(scale[k >> w->log_block]);
        for (int m = 0; m < rows; m++) {
            vf sum = a * *(const vf_any *)(even + m * half + k / 2);
            sum = NAME(fma)(b, *(const vf_any *)(odd + m * half + k / 2), sum);
            total[m] = NAME(fma)(sum, s, total[m]);
        }
    }
    for (int m = 0; m < rows; m++) y[m * N + n] = NAME(sum)(total[m]) / (kind == INTEGER8 ? 127 : 1);
}

static void NAME(matmul)(const weight *w, const void *x, int dtype, long M, float *y, int threads) {
    long N = w->rows, K = w->columns, blocks = K >> w->log_block;
    float *even = malloc(M * K * sizeof(float)), *odd = even + M * K / 2;
    for (long i = 0; i < M * K; i += 2 * W) {
        vf a, b;
        NAME(load_pair)(x, i, dtype, &a, &b);
        *(vf_any *)(even + i / 2) = a;
        *(vf_any *)(odd + i / 2) = b;
    }
    #pragma omp parallel num_threads(threads)
    {
        float *scale = malloc(blocks * sizeof(float));
        #pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            NAME(scales)(w, n * blocks, blocks, scale);
            for (long m = 0; m < M; m += 4) {
                const float *e = even + m * K / 2, *o = odd + m * K / 2;
                #define ROWS(R) \
                    if (w->kind == TABLE4) NAME(dot)(w, TABLE4, e, o, R, n, scale, y + m * N, N); \
                    else NAME(dot)(w, INTEGER8, e, o, R, n, scale, y + m * N, N)
                if (M - m >= 4) { ROWS(4); }
                else if (M - m == 3) { ROWS(3); }
                else if (M - m == 2) { ROWS(2); }
                else { ROWS(1); }
                #undef ROWS
            }
        }
        free(scale);
    }
    free(even);
}
