/* Products of few rows of bf16 with AVX-512 BF16: 64 columns of W at a time, as 32 even and 32 odd ones.
 *
 * The table is rounded to bf16 (8-bit codes are exact) and meets no scale: the sum over 64 columns, which are
 * of one block, meets its absmax in fp32. A vector holds the table twice, since a look-up of 16-bit numbers
 * takes 5 bits of its index: a byte of two codes is the index of its low one as it is.
 */

INLINE __m512i load_table_bf16(const weight *w) {
    uint16_t twice[32];
    vi_avx512 entries = narrow_avx512(*(const vf_any_avx512 *)w->codebook, BF16);
    for (int i = 0; i < 32; i++) twice[i] = entries[i % 16];
    return _mm512_loadu_si512(twice);
}

INLINE __m512i ints_to_bf16(__m512i words) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(words)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(words, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

INLINE void decode_bf16(const weight *w, int kind, __m512i table, long i, __m512i *even, __m512i *odd) {
    if (kind == TABLE4) {
        __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(w->packed + i / 2)));
        *even = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
        *odd = _mm512_permutexvar_epi16(bytes, table);
    } else {
        __m512i words = _mm512_loadu_si512(w->packed + i);
        *even = ints_to_bf16(_mm512_srai_epi16(_mm512_slli_epi16(words, 8), 8));
        *odd = ints_to_bf16(_mm512_srai_epi16(words, 8));
    }
}

/* The even and the odd columns of x (n,). */
static void split_bf16(const uint16_t *x, long n, uint16_t *even, uint16_t *odd) {
    for (long i = 0; i < n; i += 32) {
        __m512i words = _mm512_loadu_si512(x + i);
        _mm256_storeu_si256((__m256i *)(even + i / 2), _mm512_cvtepi32_epi16(words));
        _mm256_storeu_si256((__m256i *)(odd + i / 2), _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
    }
}

/* y[m, n] for `rows` rows of x and `height` rows of W, which share what is loaded of x. */
INLINE void dot_bf16(const weight *w, int kind, const uint16_t *even, const uint16_t *odd, int rows, int height,
                     long n, const float *scale, float *y) {
    __m512i table = kind == TABLE4 ? load_table_bf16(w) : _mm512_setzero_si512(), a, b;
    vf_avx512 total[4] = {{0}};
    long N = w->rows, K = w->columns, half = K / 2, blocks = K >> w->log_block;
    for (long k = 0; k < K; k += 64)
        for (int h = 0; h < height; h++) {
            decode_bf16(w, kind, table, (n + h) * K + k, &a, &b);
            vf_avx512 s = splat_avx512(scale[h * blocks + (k >> w->log_block)]);
            for (int m = 0; m < rows; m++) {
                __m512bh x = (__m512bh)_mm512_loadu_si512(even + m * half + k / 2);
                __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)a, x);
                x = (__m512bh)_mm512_loadu_si512(odd + m * half + k / 2);
                sum = _mm512_dpbf16_ps(sum, (__m512bh)b, x);
                total[h * rows + m] = fma_avx512((vf_avx512)sum, s, total[h * rows + m]);
            }
        }
    for (int h = 0; h < height; h++)
        for (int m = 0; m < rows; m++)
            y[m * N + n + h] = sum_avx512(total[h * rows + m]) / (kind == INTEGER8 ? 127 : 1);
}

static void matmul_bf16(const weight *w, const uint16_t *x, long M, float *y, int threads) {
    long N = w->rows, K = w->columns, blocks = K >> w->log_block;
    uint16_t *even = malloc(M * K * sizeof(uint16_t)), *odd = even + M * K / 2;
    split_bf16(x, M * K, even, odd);
    #pragma omp parallel num_threads(threads)
    {
        float *scale = malloc(4 * blocks * sizeof(float));
        #pragma omp for schedule(static)
        for (long n = 0; n < N; n += 4) {
            long height = N - n < 4 ? N - n : 4;
            scales_avx512(w, n * blocks, height * blocks, scale);
            for (long m = 0; m < M; m += 4) {
                const uint16_t *e = even + m * K / 2, *o = odd + m * K / 2;
                #define DOT(R, HEIGHT, H) \
                    if (w->kind == TABLE4) \
                        dot_bf16(w, TABLE4, e, o, R, HEIGHT, n + H, scale + H * blocks, y + m * N); \
                    else dot_bf16(w, INTEGER8, e, o, R, HEIGHT, n + H, scale + H * blocks, y + m * N)
                #define EACH(R) for (long h = 0; h < height; h++) { DOT(R, 1, h); }
                if (M - m >= 4) { EACH(4) }
                else if (M - m == 3) { EACH(3) }
                else if (height < 4) { if (M - m == 2) { EACH(2) } else { EACH(1) } }
                else if (M - m == 2) { DOT(2, 2, 0); DOT(2, 2, 2); }
                else { DOT(1, 4, 0); }
                #undef DOT
                #undef EACH
            }
        }
        free(scale);
    }
    free(even);
}
