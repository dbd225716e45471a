/* y = x / sqrt(mean(x^2) + eps) * weight, row by row; in fp32, rounded once. */

INLINE void NAME(rms_norm_row)(const void *x, const void *weight, void *y, long at, long D, float eps,
                               int dtype) {
    vf total = {0};
    float part[W];
    long i = 0, size = dtype == FP32 ? 4 : 2;
    for (; i + W <= D; i += W) {
        vf a = NAME(load)(x, at + i, dtype);
        total = NAME(fma)(a, a, total);
    }
    vf last = NAME(load_part)(x, at + i, D - i, dtype);
    float scale = 1 / sqrtf(NAME(sum)(NAME(fma)(last, last, total)) / D + eps);
    for (i = 0; i + W <= D; i += W)
        NAME(store)(y, at + i, dtype, NAME(load)(x, at + i, dtype) * scale * NAME(load)(weight, i, dtype));
    NAME(store)(part, 0, dtype, last * scale * NAME(load_part)(weight, i, D - i, dtype));
    memcpy((char *)y + (at + i) * size, part, (D - i) * size);
}

static void NAME(rms_norm)(const void *x, const void *weight, void *y, long rows, long D, float eps, int dtype,
                           int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (rows * D > SMALL)
    for (long row = 0; row < rows; row++) {
        if (dtype == FP32) NAME(rms_norm_row)(x, weight, y, row * D, D, eps, FP32);
        else if (dtype == BF16) NAME(rms_norm_row)(x, weight, y, row * D, D, eps, BF16);
        else NAME(rms_norm_row)(x, weight, y, row * D, D, eps, FP16);
    }
}
