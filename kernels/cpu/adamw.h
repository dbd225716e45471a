/* AdamW with moments in 8 bits for one instruction set: the formulas and the bits of adamw_8bit.py, where
 * every operation is rounded by itself. */

INLINE vf NAME(root)(vf x) {
#if LEVEL == 2
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif LEVEL == 1
    return (vf)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < W; i++) x[i] = sqrtf(x[i]);
    return x;
#endif
}

/* Codes of a block of MOMENTS numbers; returns absmax. */
INLINE float NAME(encode)(const float *x, const int *cells, uint8_t *codes) {
    vi largest = {0};
    for (int i = 0; i < MOMENTS; i += W) {
        vi magnitude = *(const vi_any *)(x + i) & 0x7fffffff, above = magnitude > largest;
        largest = (above & magnitude) | (~above & largest);
    }
    int most = 0;
    for (int i = 0; i < W; i++) most = largest[i] > most ? largest[i] : most;
    if (most < 0x00800000) most = 0;
    float absmax;
    memcpy(&absmax, &most, 4);
    float inverse = 1 / (most ? absmax : INFINITY);
    for (int i = 0; i < MOMENTS; i += W) {
        vi bits = (vi)(*(const vf_any *)(x + i) * inverse), sign = bits >> 31;
        vi cell = ((bits & 0x7fffffff) >> 16) - FIRST_CELL;
        cell &= ~(cell < 0);
        vi above = cell > CELLS - 1;
        cell = ((above & (CELLS - 1)) | (~above & cell)) - sign * CELLS;
        vi entry = (vi)NAME(gather)((const float *)cells, cell);
        NAME(store_bytes)(codes + i, (entry + ((bits ^ sign) & 0xffff)) >> 16);
    }
    return absmax;
}

INLINE void NAME(adamw_block)(int dtype, const adamw *a, void *p, const void *g, uint8_t *m_codes,
                              float *m_absmax, uint8_t *v_codes, float *v_absmax) {
    float m[MOMENTS], v[MOMENTS];
    for (int i = 0; i < MOMENTS; i += W) {
        vf grad = NAME(load)(g, i, dtype), x = NAME(load)(p, i, dtype);
        vf m_old = NAME(gather)(a->m_map, NAME(load_bytes)(m_codes + i)) * *m_absmax;
        vf v_old = NAME(gather)(a->v_map, NAME(load_bytes)(v_codes + i)) * *v_absmax;
        vf m_new = m_old * a->beta1 + grad * a->one_minus_beta1;
        vf v_new = v_old * a->beta2 + grad * grad * a->one_minus_beta2;
        x = x * a->keep - m_new / (NAME(root)(v_new) * a->root + a->eps) * a->step_size;
        *(vf_any *)(m + i) = m_new;
        *(vf_any *)(v + i) = v_new;
        if (dtype == FP32) *(vf_any *)((float *)p + i) = x;
        else {
            vi nan = ((vi)x & 0x7fffffff) > 0x7f800000, quiet = nan & (dtype == BF16 ? 0x7fc0 : 0x7e00);
            NAME(store_words)((uint16_t *)p + i, quiet | (~nan & NAME(narrow)(x, dtype)));
        }
    }
    *m_absmax = NAME(encode)(m, a->m_cells, m_codes);
    *v_absmax = NAME(encode)(v, a->v_cells, v_codes);
}

static void NAME(adamw_step)(const adamw *a, const int64_t *tensors, const int64_t *owner, long programs,
                             long blocks_each, int dtype, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long program = 0; program < programs; program++) {
        const int64_t *t = tensors + 8 * owner[program]; /* addresses, the size, the first program */
        long size = dtype == FP32 ? 4 : 2, n = t[6], first = (program - t[7]) * blocks_each;
        for (long block = first; block < first + blocks_each && block * MOMENTS < n; block++) {
            long at = block * MOMENTS, count = n - at < MOMENTS ? n - at : MOMENTS;
            char *p = (char *)t[0] + at * size, *g = (char *)t[1] + at * size;
            uint8_t *m = (uint8_t *)t[2] + at, *v = (uint8_t *)t[4] + at;
            float *m_absmax = (float *)t[3] + block, *v_absmax = (float *)t[5] + block;
            float p_copy[MOMENTS], g_copy[MOMENTS];
            uint8_t m_copy[MOMENTS], v_copy[MOMENTS];
            void *where[4] = {p, g, m, v};
            if (count < MOMENTS) { /* the last block, padded with zeros, which stay zeros */
                memset(p_copy, 0, sizeof p_copy), memset(g_copy, 0, sizeof g_copy);
                memset(m_copy, a->m_zero, sizeof m_copy), memset(v_copy, a->v_zero, sizeof v_copy);
                memcpy(p_copy, p, count * size), memcpy(g_copy, g, count * size);
                memcpy(m_copy, m, count), memcpy(v_copy, v, count);
                where[0] = p_copy, where[1] = g_copy, where[2] = m_copy, where[3] = v_copy;
            }
            #define BLOCK(DTYPE) \
                NAME(adamw_block)(DTYPE, a, where[0], where[1], where[2], m_absmax, where[3], v_absmax)
            if (dtype == FP32) BLOCK(FP32);
            else if (dtype == BF16) BLOCK(BF16);
            else BLOCK(FP16);
            #undef BLOCK
            if (count < MOMENTS) {
                memcpy(p, p_copy, count * size);
                memcpy(m, m_copy, count), memcpy(v, v_copy, count);
            }
        }
    }
}
