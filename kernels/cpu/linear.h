/* Products of few rows of bf16 with a dense matrix: y[m, n] = sum over k of x[m, k] W[n, k] + bias[n].
 *
 * Sums are in fp32, of PANEL rows of W at a time; y is rounded once. A sum takes its terms in the same order
 * however many rows x has, so that the rows of a batch do not change each other.
 */

/* sums[m][h] for `rows` rows of x (rows, width) in fp32 and `height` rows of W from n on. */
INLINE void NAME(tile)(const uint16_t *w, long n, long K, const float *x, long width, int rows, int height,
                       float *sums) {
    vf total[8] = {{0}};
    long k = 0;
    #define STEP(LOADED) \
        for (int h = 0; h < height; h++) { \
            vf a = LOADED; \
            for (int m = 0; m < rows; m++) { \
                vf *sum = total + h * rows + m; \
                *sum = NAME(fma)(a, *(const vf_any *)(x + m * width + k), *sum); \
            } \
        }
    for (; k + W <= K; k += W) STEP(NAME(load)(w, (n + h) * K + k, BF16))
    if (k < K) STEP(NAME(load_part)(w, (n + h) * K + k, K - k, BF16))
    #undef STEP
    for (int h = 0; h < height; h++)
        for (int m = 0; m < rows; m++) sums[m * PANEL + h] = NAME(sum)(total[h * rows + m]);
}

/* y of a panel: its sums and the bias, rounded. */
INLINE void NAME(finish)(const product *p, long n, long height, const float *sums) {
    float bias[PANEL] = {0};
    uint16_t line[PANEL];
    for (long i = 0; i < height && p->bias; i++) bias[i] = NAME(widen)((vi){p->bias[n + i]}, BF16)[0];
    for (long m = 0; m < p->M; m++) {
        for (long i = 0; i < PANEL; i += W)
            NAME(store)(line, i, BF16, *(const vf_any *)(sums + m * PANEL + i) + *(const vf_any *)(bias + i));
        memcpy(p->y + m * p->N + n, line, height * sizeof *line);
    }
}

static void NAME(linear)(const product *p, int threads) {
    long M = p->M, N = p->N, K = p->K, width = (K + W - 1) / W * W;
    float *x = malloc(M * width * sizeof(float));
    for (long m = 0; m < M; m++) {
        long k = 0;
        for (; k + W <= K; k += W) *(vf_any *)(x + m * width + k) = NAME(load)(p->x, m * K + k, BF16);
        if (k < K) *(vf_any *)(x + m * width + k) = NAME(load_part)(p->x, m * K + k, K - k, BF16);
    }
    #pragma omp parallel for schedule(static) num_threads(threads) if (N * K > SMALL)
    for (long n = 0; n < N; n += PANEL) {
        float sums[MOST_ROWS * PANEL] = {0};
        long height = N - n < PANEL ? N - n : PANEL;
        #define TILE(R, H) NAME(tile)(p->w, n + h, K, x + m * width, width, R, H, sums + m * PANEL + h)
        for (long m = 0, h; m < M; m += 2) {
            int two = m + 1 < M;
            for (h = 0; h + 4 <= height; h += 4) { if (two) TILE(2, 4); else TILE(1, 4); }
            for (; h < height; h++) { if (two) TILE(2, 1); else TILE(1, 1); }
        }
        #undef TILE
        NAME(finish)(p, n, height, sums);
    }
    free(x);
}
