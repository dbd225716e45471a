/* Quantized weights, 8-bit AdamW and the steps of generation on CPUs, called through ctypes (library.py).
 *
 * ops.h is written once, in the vectors of GCC's extension, and compiled for each instruction set;
 * `minift_level` says at run time which one the processor has. Built with -ffp-contract=off: an exact result
 * must not be fused.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES(n) __attribute__((vector_size(n)))
#define ANYWHERE __attribute__((aligned(1), may_alias)) /* in memory */
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

enum { FP32, BF16, FP16 };
enum { TABLE4, LINEAR8, TABLE8, INTEGER8 }; /* LINEAR8: code / 127; INTEGER8: the code itself */
enum { SEGMENT = 16384 }; /* elements that a thread dequantizes at a time */

typedef struct { /* Packed of packed.py */
    const uint8_t *packed;
    const void *absmax; /* floats, or codes where nested_absmax is there */
    const float *codebook, *nested_absmax, *offset, *nested_codebook;
    long rows, columns;
    int log_block, kind; /* blocks of 2^log_block elements */
} weight;

enum { MOMENTS = 256, FIRST_CELL = 103 * 128, CELLS = 24 * 128 + 1 }; /* as in adamw_8bit.py */
typedef struct {
    const float *m_map, *v_map; /* 256 numbers each */
    const int *m_cells, *v_cells;
    float beta1, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, root, eps;
    int m_zero, v_zero;
} adamw;

enum { MOST_ROWS = 16, PANEL = 16 }; /* of x, and of W at a time, in a product with a dense W */
enum { SMALL = 1 << 17 }; /* multiplications that one thread does sooner than two */
typedef struct {
    const uint16_t *w, *bias, *x; /* (N, K), (N,) or NULL, (M, K): all bf16 */
    uint16_t *y; /* (M, N) */
    long M, N, K;
} product;

typedef struct {
    const void *q, *k, *v, *cos, *sin; /* (B, H, hd), (B, KV, hd) twice, tables (B or 1, hd) or NULL */
    void *keys, *values, *out; /* (B, KV, capacity, hd) twice, with `length` tokens; (B, H, hd) */
    const uint8_t *mask; /* (B or 1, length + 1) or NULL */
    long B, H, KV, hd, capacity, length, table_stride, mask_stride; /* strides: 0 where there is one row */
    float scale;
} attend;

#define CAT2(a, b) a##_##b
#define CAT(a, b) CAT2(a, b)
#define NAME(f) CAT(f, SET)

#define SET plain
#define LEVEL 0
#define W 4
#include "ops.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SET avx2
#define LEVEL 1
#define W 8
#include "ops.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define SET avx512
#define LEVEL 2
#define W 16
#include "ops.h"
#pragma GCC pop_options

#if __GNUC__ >= 11
#define HAS_BF16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#include "bf16.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")
#include "amx.h"
#include "linear_amx.h"
#pragma GCC pop_options
#endif
#endif

/* The best instruction set of this processor: the index in LEVELS of library.py. */
int minift_level(void) {
#if defined(__x86_64__)
    int avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512dq");
#ifdef HAS_BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return amx_allowed() ? 4 : 3;
#endif
    if (avx512) return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

#if defined(__x86_64__)
#define DISPATCH(f, ...) do { \
    if (level >= 2) f##_avx512(__VA_ARGS__); \
    else if (level == 1) f##_avx2(__VA_ARGS__); \
    else f##_plain(__VA_ARGS__); } while (0)
#else
#define DISPATCH(f, ...) (void)level, f##_plain(__VA_ARGS__)
#endif

void minift_dequantize(const weight *w, void *out, int dtype, long first, long stride, long rows, long columns,
                       int level, int threads) {
    DISPATCH(dequantize, w, out, dtype, first, stride, rows, columns, threads);
}

void minift_quantize(const void *w, int dtype, long n, long block_size, const float *midpoints,
                     const int *order, uint8_t *packed, float *absmax, int level, int threads) {
    DISPATCH(quantize, w, dtype, n, block_size, midpoints, order, packed, absmax, threads);
}

void minift_matmul(const weight *w, const void *x, int dtype, long M, float *y, int level, int threads) {
#ifdef HAS_BF16
    if (level >= 3 && dtype == BF16 && w->log_block >= 6) {
        if (level == 4 && 3 < M && M <= 16) matmul_amx(w, x, M, y, threads);
        else matmul_bf16(w, x, M, y, threads);
        return;
    }
#endif
    DISPATCH(matmul, w, x, dtype, M, y, threads);
}

void minift_adamw(const adamw *a, const int64_t *tensors, const int64_t *owner, long programs,
                  long blocks_each, int dtype, int level, int threads) {
    DISPATCH(adamw_step, a, tensors, owner, programs, blocks_each, dtype, threads);
}

void minift_linear(const void *w, const void *bias, const void *x, void *y, long M, long N, long K, int level,
                   int threads) {
    product p = {w, bias, x, y, M, N, K};
#ifdef HAS_BF16
    if (level == 4) {
        linear_amx(&p, threads);
        return;
    }
#endif
    DISPATCH(linear, &p, threads);
}

void minift_rms_norm(const void *x, const void *weight, void *y, long rows, long D, float eps, int dtype,
                     int level, int threads) {
    DISPATCH(rms_norm, x, weight, y, rows, D, eps, dtype, threads);
}

void minift_attend(const void *q, const void *k, const void *v, const void *cos, const void *sin, void *keys,
                   void *values, void *out, const uint8_t *mask, long B, long H, long KV, long hd,
                   long capacity, long length, long table_stride, long mask_stride, float scale, int dtype,
                   int level, int threads) {
    attend a = {q, k, v, cos, sin, keys, values, out, mask, B, H, KV, hd, capacity, length, table_stride,
                mask_stride, scale};
    DISPATCH(attend, &a, dtype, threads);
}
