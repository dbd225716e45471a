/* Vectors of W floats for one instruction set: LEVEL 0 is plain C, 1 AVX2, 2 AVX-512; NAME(f) is f_<set>.
 *
 * Everything works on 2 W elements at a time: `even` holds elements 0, 2, 4, ... and `odd` elements 1, 3, 5,
 * ... A byte of two 4-bit codes then falls apart by one shift, and two bf16 numbers join to one 32-bit word
 * by one shift and one or.
 */

#define vf NAME(vf)
#define vi NAME(vi)
#define vl NAME(vl)
#define vf_any NAME(vf_any)
#define vi_any NAME(vi_any)
#define table NAME(table)

typedef float vf LANES(4 * W);
typedef int vi LANES(4 * W);
typedef int64_t vl LANES(4 * W);
typedef vf vf_any ANYWHERE;
typedef vi vi_any ANYWHERE;

#if LEVEL == 2
#define FIRST_OF_PAIRS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define SECOND_OF_PAIRS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define LOW_PAIRS 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_PAIRS 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define COUNTING 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif LEVEL == 1
#define FIRST_OF_PAIRS 0, 2, 4, 6, 8, 10, 12, 14
#define SECOND_OF_PAIRS 1, 3, 5, 7, 9, 11, 13, 15
#define LOW_PAIRS 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_PAIRS 4, 12, 5, 13, 6, 14, 7, 15
#define COUNTING 0, 1, 2, 3, 4, 5, 6, 7
#else
#define FIRST_OF_PAIRS 0, 2, 4, 6
#define SECOND_OF_PAIRS 1, 3, 5, 7
#define LOW_PAIRS 0, 4, 1, 5
#define HIGH_PAIRS 2, 6, 3, 7
#define COUNTING 0, 1, 2, 3
#endif

INLINE vf NAME(splat)(float x) { return x - (vf){0}; }

/* a * b + c: fused where the CPU fuses. Exact results never go through it. */
INLINE vf NAME(fma)(vf a, vf b, vf c) {
#if LEVEL == 2
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LEVEL == 1
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* A table of 16 numbers, and its entries at index & 15. */
typedef struct { vf part[16 / W]; } table;

INLINE table NAME(load_table)(const void *numbers) {
    table t;
    memcpy(&t, numbers, sizeof t);
    return t;
}

INLINE vf NAME(lookup)(const table *t, vi index) {
#if LEVEL == 2
    return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)t->part[0]);
#elif LEVEL == 1
    __m256 low = _mm256_permutevar8x32_ps((__m256)t->part[0], (__m256i)index);
    __m256 high = _mm256_permutevar8x32_ps((__m256)t->part[1], (__m256i)index);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28)); /* bit 3 chooses */
#else
    vf out;
    for (int i = 0; i < W; i++) out[i] = ((const float *)t)[index[i] & 15];
    return out;
#endif
}

INLINE vf NAME(gather)(const float *numbers, vi index) {
#if LEVEL == 2
    return (vf)_mm512_i32gather_ps((__m512i)index, numbers, 4);
#else
    vf out;
    for (int i = 0; i < W; i++) out[i] = numbers[index[i]];
    return out;
#endif
}

/* W bytes as integers; W 16-bit words as signed integers; the low bytes of integers. */
INLINE vi NAME(load_bytes)(const uint8_t *from) {
#if LEVEL == 2
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif LEVEL == 1
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return (vi){from[0], from[1], from[2], from[3]};
#endif
}

INLINE vi NAME(load_words)(const void *from) {
#if LEVEL == 2
    return (vi)_mm512_cvtepi16_epi32(_mm256_loadu_si256(from));
#elif LEVEL == 1
    return (vi)_mm256_cvtepi16_epi32(_mm_loadu_si128(from));
#else
    int16_t words[4];
    memcpy(words, from, sizeof words);
    return (vi){words[0], words[1], words[2], words[3]};
#endif
}

INLINE void NAME(store_words)(uint16_t *to, vi ints) {
#if LEVEL == 2
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)ints));
#else
    for (int i = 0; i < W; i++) to[i] = ints[i];
#endif
}

INLINE void NAME(store_bytes)(uint8_t *to, vi ints) {
#if LEVEL == 2
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)ints));
#else
    for (int i = 0; i < W; i++) to[i] = ints[i];
#endif
}

/* code / 127, correctly rounded for every code: the first product is exact, the second small. */
INLINE vf NAME(by_127)(vf code) { return code * (129 / 16384.0f) + code * (float)(1 / (127 * 16384.0)); }

INLINE float NAME(sum)(vf v) {
#if LEVEL == 2
    return _mm512_reduce_add_ps((__m512)v);
#elif LEVEL == 1
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

/* 16-bit patterns to floats, and floats to patterns rounded to nearest, ties to even. */
INLINE vf NAME(widen)(vi bits, int dtype) {
    if (dtype == BF16) return (vf)(bits << 16);
    vi sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
    vi value = (vi)((vf)rest * 0x1p112f);
    return (vf)(sign | value | ((rest >= 0x0f800000) & 0x7f800000)); /* infinity and NaN stay what they are */
}

INLINE vi NAME(narrow)(vf value, int dtype) {
    vi bits = (vi)value, magnitude = bits & 0x7fffffff;
    if (dtype == BF16) return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
    vi normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    vi subnormal = (vi)((vf)magnitude + 0.5f) - 0x3f000000; /* the sum rounds to multiples of 2^-24 */
    vi small = magnitude < (113 << 23), large = magnitude >= 0x477ff000;
    vi half = (small & subnormal) | (~small & normal);
    half = (large & 0x7c00) | (~large & half);
    return half | ((bits >> 16) & 0x8000);
}

INLINE vf NAME(load)(const void *from, long i, int dtype) {
    if (dtype == FP32) return *(const vf_any *)((const float *)from + i);
    return NAME(widen)(NAME(load_words)((const uint16_t *)from + i) & 0xffff, dtype);
}

/* The first `count` < W numbers from i on, then zeros: nothing behind them is read. */
INLINE vf NAME(load_part)(const void *from, long i, long count, int dtype) {
    float part[W] = {0};
    long size = dtype == FP32 ? 4 : 2;
    memcpy(part, (const char *)from + i * size, count * size);
    return NAME(load)(part, 0, dtype);
}

INLINE void NAME(store)(void *to, long i, int dtype, vf value) {
    if (dtype == FP32) *(vf_any *)((float *)to + i) = value;
    else NAME(store_words)((uint16_t *)to + i, NAME(narrow)(value, dtype));
}

INLINE void NAME(load_pair)(const void *from, long i, int dtype, vf *even, vf *odd) {
    vf a = NAME(load)(from, i, dtype), b = NAME(load)(from, i + W, dtype);
    *even = SHUFFLE(a, b, FIRST_OF_PAIRS);
    *odd = SHUFFLE(a, b, SECOND_OF_PAIRS);
}

INLINE void NAME(store_pair)(void *to, long i, int dtype, vf even, vf odd) {
    if (dtype == FP32) {
        *(vf_any *)((float *)to + i) = SHUFFLE(even, odd, LOW_PAIRS);
        *(vf_any *)((float *)to + i + W) = SHUFFLE(even, odd, HIGH_PAIRS);
    } else {
        *(vi_any *)((uint16_t *)to + i) = NAME(narrow)(even, dtype) | NAME(narrow)(odd, dtype) << 16;
    }
}
