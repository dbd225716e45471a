/* linear.h on AMX tiles: PANEL rows of W times all rows of x, 32 columns at a time. Subnormal numbers are 0.
 *
 * x lies as AMX wants it: pairs of columns that follow each other in the tile, 16 rows of x side by side.
 */

static void linear_amx(const product *p, int threads) {
    static const struct { uint8_t palette, start, reserved[14]; uint16_t width[16]; uint8_t rows[16]; }
        shape = {1, 0, {0}, {64, 64, 64}, {16, 16, 16}};
    long M = p->M, N = p->N, K = p->K, steps = (K + 31) / 32;
    uint32_t *pairs = calloc(steps * 256, sizeof(uint32_t)); /* (steps, 16 pairs, 16 rows of x) */
    for (long m = 0; m < M; m++)
        for (long k = 0; k < K; k += 2)
            memcpy(pairs + k / 2 * 16 + m, p->x + m * K + k, (k + 1 < K ? 2 : 1) * sizeof(uint16_t));
    #pragma omp parallel num_threads(threads) if (N * K > SMALL)
    {
        uint16_t part[16][32] __attribute__((aligned(64)));
        float sums[16][16] __attribute__((aligned(64))), turned[16 * 16];
        _tile_loadconfig(&shape);
        #pragma omp for schedule(static)
        for (long n = 0; n < N; n += PANEL) {
            long height = N - n < PANEL ? N - n : PANEL;
            _tile_zero(0);
            for (long step = 0; step < steps; step++) {
                const uint16_t *w = p->w + n * K + 32 * step;
                long count = K - 32 * step < 32 ? K - 32 * step : 32;
                if (height == 16 && count == 32) _tile_loadd(1, w, K * sizeof(uint16_t));
                else { /* nothing behind the matrix is read */
                    memset(part, 0, sizeof part);
                    for (long r = 0; r < height; r++) memcpy(part[r], w + r * K, count * sizeof(uint16_t));
                    _tile_loadd(1, part, 64);
                }
                for (long i = 0; i < PANEL; i++) /* as much of the next panel, in the order of memory */
                    _mm_prefetch((const char *)(p->w + (n + PANEL) * K + 512 * step + 32 * i), _MM_HINT_T1);
                _tile_loadd(2, pairs + 256 * step, 64);
                _tile_dpbf16ps(0, 1, 2);
            }
            _tile_stored(0, sums, 64);
            for (long m = 0; m < M; m++)
                for (long r = 0; r < 16; r++) turned[16 * m + r] = sums[r][m];
            finish_avx512(p, n, height, turned);
        }
        _tile_release();
    }
    free(pairs);
}
