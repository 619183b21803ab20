// Helpers of the C++ kernels. All sources in this folder are compiled as one.
//
// The kernels are the ops of passes/ops for float32 on a CPU, for shapes at which torch's own
// kernels are slow. Shapes and semantics are those of the references in Python. Each output is
// summed by one thread in one order that does not depend on the batch. VECTOR_WIDTH and
// LINEAR_TOKENS are defined in vector_isa.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
#ifdef __FMA__
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr long WIDTH = VECTOR_WIDTH;
constexpr long CACHE_LINE = 16;  // floats

template <long SIZE>
struct Floats {
    typedef float type __attribute__((vector_size(SIZE * sizeof(float))));
};
typedef Floats<WIDTH>::type Vector;

inline Vector load(const float* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

inline void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof(vector)); }

inline Vector splat(float value) { return value - Vector{}; }

// a * b + c, rounded once where the processor supports it. Without the intrinsics, the compiler
// would decide that from the surrounding code (on some processors GCC avoids chains of fused
// operations), and the bits of a token would depend on the size of its batch.
inline Vector fmadd(Vector a, Vector b, Vector c) {
#if VECTOR_WIDTH == 16 && defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VECTOR_WIDTH == 8 && defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif VECTOR_WIDTH == 4 && defined(__FMA__)
    return (Vector)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif VECTOR_WIDTH == 4 && defined(__ARM_NEON)
    return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline float fmadd(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// The sum of all elements: the upper half is added to the lower until one number is left.
template <long SIZE = WIDTH>
inline float sum(typename Floats<SIZE>::type vector) {
    if constexpr (SIZE == 4) {
        return (vector[0] + vector[2]) + (vector[1] + vector[3]);
    } else {
        typename Floats<SIZE / 2>::type halves[2];
        std::memcpy(halves, &vector, sizeof(vector));
        return sum<SIZE / 2>(halves[0] + halves[1]);
    }
}

inline float dot(const float* a, const float* b, long size) {
    Vector sums = {};
    long i = 0;
    for (; i + WIDTH <= size; i += WIDTH) sums = fmadd(load(a + i), load(b + i), sums);
    float total = sum(sums);
    for (; i < size; ++i) total = fmadd(a[i], b[i], total);
    return total;
}

// The maximum of values[size]. NaN may or may not be ignored. size is a multiple of WIDTH.
inline float maximum(const float* values, long size) {
    Vector maxima = load(values);
    for (long i = WIDTH; i < size; i += WIDTH) {
        const Vector next = load(values + i);
        maxima = next > maxima ? next : maxima;
    }
    float result = maxima[0];
    for (long i = 1; i < WIDTH; ++i) result = std::max(result, maxima[i]);
    return result;
}

// e^x for x <= 0, to within two units in the last place (expf of Cephes): 2^n e^r with an integer
// n and a small r. NaN is propagated.
inline Vector exponential(Vector x) {
    typedef int Integers __attribute__((vector_size(WIDTH * sizeof(int))));
    // 1.5 * 2^23: a sum with it is rounded to an integer, which is in its last bits.
    constexpr float SHIFT = 12582912.0f;
    const Vector least = splat(-87.0f);
    x = x < least ? least : x;
    const Vector shifted = fmadd(x, splat(1.44269504f), splat(SHIFT)), n = shifted - SHIFT;
    const Vector r = fmadd(n, splat(2.12194440e-4f), fmadd(n, splat(-0.693359375f), x));
    Vector series = fmadd(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
    series = fmadd(series, r, splat(8.3334519073e-3f));
    series = fmadd(series, r, splat(4.1665795894e-2f));
    series = fmadd(series, r, splat(1.6666665459e-1f));
    series = fmadd(series, r, splat(5.0000001201e-1f));
    series = fmadd(series, r * r, r) + 1.0f;
    Integers bits, exponents;
    std::memcpy(&bits, &series, sizeof(bits));
    std::memcpy(&exponents, &shifted, sizeof(exponents));
    bits += (exponents - 0x4B400000) << 23;
    bits |= x != x;  // all bits set is a NaN
    std::memcpy(&series, &bits, sizeof(bits));
    return series;
}

inline void prefetch(const float* from, long size) {
    for (long i = 0; i < size; i += CACHE_LINE) __builtin_prefetch(from + i, 0, 2);
}

// The first token to which a query at `position` attends; `window` as in paged_attention.py.
inline long first_visible_token(long position, long window) {
    if (window < 0) return position / -window * -window;
    return window ? std::max(0L, position - window + 1) : 0;
}

}  // namespace
