/* Products of up to 16 rows of bf16 on AMX tiles: 16 rows of W times all rows of x, 32 columns at a time.
 *
 * A tile row of W holds 32 table entries rounded to bf16 (8-bit codes are exact), without the scale; the sum
 * over a block meets its absmax in fp32. x lies as AMX wants it: pairs of neighbours, 16 rows side by side.
 */

static inline void decode_tile(const weight *w, long element, __m512i low, __m512i high, uint16_t *out) {
    __m512i first, second;
    if (w->kind == TABLE4) { /* the table, as bf16 in the low and in the high half of its words */
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->packed + element / 2)));
        first = _mm512_permutexvar_epi32(_mm512_srli_epi32(bytes, 4), low);
        second = _mm512_permutexvar_epi32(bytes, high);
    } else {
        __m256i pairs = _mm256_loadu_si256((const __m256i *)(w->packed + element));
        __m512i words = _mm512_cvtepi16_epi32(pairs);
        first = _mm512_srai_epi32(_mm512_slli_epi32(words, 24), 24);
        first = _mm512_srli_epi32((__m512i)_mm512_cvtepi32_ps(first), 16);
        second = (__m512i)_mm512_cvtepi32_ps(_mm512_srai_epi32(words, 8));
    }
    _mm512_store_si512(out, _mm512_or_si512(first, second));
}

static void matmul_amx(const weight *w, const uint16_t *x, long M, float *y, int threads) {
    long N = w->rows, K = w->columns, blocks = K >> w->log_block, size = 1L << w->log_block;
    uint32_t *pairs = malloc(8 * K * sizeof(uint32_t)); /* (K/2, 16) */
    float divisor = w->kind == TABLE4 ? 1 : 127;
    __m512i low = _mm512_setzero_si512(), high = low;
    if (w->kind == TABLE4) {
        low = (__m512i)narrow_avx512(*(const vf_any_avx512 *)w->codebook, BF16);
        high = _mm512_slli_epi32(low, 16);
    }
    #pragma omp parallel num_threads(threads)
    {
        static const struct { uint8_t palette, start, reserved[14]; uint16_t width[16]; uint8_t rows[16]; }
            shape = {1, 0, {0}, {64, 64, 64, 64, 64}, {16, 16, 16, 16, 16}};
        _tile_loadconfig(&shape);
        float *scale = malloc(16 * blocks * sizeof(float));
        uint16_t rows[2][16][32] __attribute__((aligned(64))) = {0};
        float sums[16][16] __attribute__((aligned(64)));
        #pragma omp for schedule(static)
        for (long k = 0; k < K / 2; k++)
            for (long m = 0; m < 16; m++)
                if (m < M) memcpy(pairs + 16 * k + m, x + m * K + 2 * k, 4);
                else pairs[16 * k + m] = 0;
        #pragma omp for schedule(static)
        for (long n = 0; n < N; n += 16) {
            vf_avx512 total[16] = {{0}};
            long height = N - n < 16 ? N - n : 16;
            for (long r = 0; r < height; r++) scales_avx512(w, (n + r) * blocks, blocks, scale + r * blocks);
            for (long b = 0; b < blocks; b++) {
                _tile_zero(0);
                for (long k = b * size; k < (b + 1) * size; k += 64) {
                    for (long r = 0; r < height; r++) {
                        decode_tile(w, (n + r) * K + k, low, high, rows[0][r]);
                        decode_tile(w, (n + r) * K + k + 32, low, high, rows[1][r]);
                    }
                    _tile_loadd(1, rows[0], 64);
                    _tile_loadd(2, pairs + 8 * k, 64);
                    _tile_dpbf16ps(0, 1, 2);
                    _tile_loadd(3, rows[1], 64);
                    _tile_loadd(4, pairs + 8 * (k + 32), 64);
                    _tile_dpbf16ps(0, 3, 4);
                }
                _tile_stored(0, sums, 64);
                for (long r = 0; r < height; r++) {
                    vf_avx512 absmax = splat_avx512(scale[r * blocks + b]);
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
}

/* The processor has tiles of bf16, and Linux lets this process use them, which it must be asked for. */
static int amx_allowed(void) {
    unsigned a, b, c, d;
    int has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    return has && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
