// What the kernels of this folder share; they are compiled as one. They are the ops of passes/ops on a CPU, in float32, for the
// shapes that torch's own kernels are slow at. Shapes and meaning are those of the PyTorch references. Every output is summed by one
// thread in one order, whatever the batch. The compiler is given VECTOR_WIDTH and LINEAR_TOKENS (see vector_isa.py).
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

// a * b + c. Left to the compiler, whether a product and a sum are rounded once or twice depends on the code around them (GCC avoids
// chains of fused operations on some processors), and so would a token's bits on the size of its batch.
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

// Add the upper half to the lower half until one number is left.
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

// The largest of numbers, of which NaN may or may not be one; size is a multiple of WIDTH.
inline float largest(const float* values, long size) {
    Vector peaks = load(values);
    for (long i = WIDTH; i < size; i += WIDTH) {
        const Vector next = load(values + i);
        peaks = next > peaks ? next : peaks;
    }
    float peak = peaks[0];
    for (long i = 1; i < WIDTH; ++i) peak = std::max(peak, peaks[i]);
    return peak;
}

// e^x of numbers up to 0, to the last bit or two (Cephes' expf): 2^n e^r, where n is an integer and r is small. NaN stays NaN.
inline Vector exponential(Vector x) {
    typedef int Integers __attribute__((vector_size(WIDTH * sizeof(int))));
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, and ends up in its last bits
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

inline void fetch(const float* from, long size) {
    for (long i = 0; i < size; i += CACHE_LINE) __builtin_prefetch(from + i, 0, 2);
}

// The first token that a query at this position sees.
inline long oldest_seen(long position, long window) {
    return window < 0 ? position / -window * -window : window ? std::max(0L, position - window + 1) : 0;
}

}  // namespace
