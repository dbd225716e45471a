/* Products of up to 16 rows of bf16 on AMX tiles: 16 rows of W times all rows of x, 32 columns at a time.
 *
 * Operands and scales as in bf16.h: a tile row of W holds 32 even or 32 odd columns. x lies as AMX wants it:
 * pairs of columns that follow each other in the tile, 16 rows of x side by side.
 */

static void matmul_amx(const weight *w, const uint16_t *x, long M, float *y, int threads) {
    static const struct { uint8_t palette, start, reserved[14]; uint16_t width[16]; uint8_t rows[16]; }
        shape = {1, 0, {0}, {64, 64, 64, 64, 64}, {16, 16, 16, 16, 16}};
    long N = w->rows, K = w->columns, blocks = K >> w->log_block, size = 1L << w->log_block;
    float divisor = w->kind == TABLE4 ? 1 : 127;
    uint16_t *even = malloc(M * K * sizeof(uint16_t)), *odd = even + M * K / 2;
    uint32_t *pairs = calloc(8 * K, sizeof(uint32_t)); /* (K / 64, even or odd, 16 pairs, 16 rows of x) */
    split_bf16(x, M * K, even, odd);
    #pragma omp parallel num_threads(threads)
    {
        float *scale = malloc(16 * blocks * sizeof(float));
        uint16_t rows[2][16][32] __attribute__((aligned(64))) = {0};
        float sums[16][16] __attribute__((aligned(64)));
        __m512i table = w->kind == TABLE4 ? load_table_bf16(w) : _mm512_setzero_si512(), a, b;
        _tile_loadconfig(&shape);
        #pragma omp for schedule(static)
        for (long k = 0; k < K; k += 64)
            for (long m = 0; m < M; m++)
                for (long pair = 0; pair < 16; pair++) {
                    memcpy(pairs + 8 * k + 16 * pair + m, even + m * K / 2 + k / 2 + 2 * pair, 4);
                    memcpy(pairs + 8 * k + 256 + 16 * pair + m, odd + m * K / 2 + k / 2 + 2 * pair, 4);
                }
        #pragma omp for schedule(static)
        for (long n = 0; n < N; n += 16) {
            vf_avx512 total[16] = {{0}};
            long height = N - n < 16 ? N - n : 16;
            for (long r = 0; r < height; r++) scales_avx512(w, (n + r) * blocks, blocks, scale + r * blocks);
            for (long block = 0; block < blocks; block++) {
                _tile_zero(0);
                for (long k = block * size; k < (block + 1) * size; k += 64) {
                    for (long r = 0; r < height; r++) {
                        if (w->kind == TABLE4) decode_bf16(w, TABLE4, table, (n + r) * K + k, &a, &b);
                        else decode_bf16(w, INTEGER8, table, (n + r) * K + k, &a, &b);
                        _mm512_store_si512(rows[0][r], a);
                        _mm512_store_si512(rows[1][r], b);
                    }
                    _tile_loadd(1, rows[0], 64);
                    _tile_loadd(2, pairs + 8 * k, 64);
                    _tile_dpbf16ps(0, 1, 2);
                    _tile_loadd(3, rows[1], 64);
                    _tile_loadd(4, pairs + 8 * k + 256, 64);
                    _tile_dpbf16ps(0, 3, 4);
                }
                _tile_stored(0, sums, 64);
                for (long r = 0; r < height; r++) {
                    vf_avx512 absmax = splat_avx512(scale[r * blocks + block]);
                    total[r] = fma_avx512(*(vf_avx512 *)sums[r], absmax, total[r]);
                }
            }
            for (long m = 0; m < M; m++)
                for (long r = 0; r < height; r++) y[m * N + n + r] = total[r][m] / divisor;
        }
        free(scale);
        _tile_release();
    }
    free(pairs);
    free(even);
}

/* The processor has tiles of bf16, and Linux lets this process use them, which it must be asked for. */
static int amx_allowed(void) {
    unsigned a, b, c, d;
    int has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    return has && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
