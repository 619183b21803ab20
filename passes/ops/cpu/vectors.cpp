// What the kernels of this folder share; they are compiled as one. They are the ops of passes/ops on a CPU, in float32, for the
// shapes that torch's own kernels are slow at. Shapes and meaning are those of the PyTorch references. Every output is summed by one
// thread in one order, whatever the batch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr long WIDTH = 16;
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

inline Vector load(const float* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

inline void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof(vector)); }

// Halves onto halves.
inline float sum(Vector vector) {
    typedef float Half __attribute__((vector_size(8 * sizeof(float))));
    typedef float Quarter __attribute__((vector_size(4 * sizeof(float))));
    Half halves[2];
    std::memcpy(halves, &vector, sizeof(vector));
    const Half half = halves[0] + halves[1];
    Quarter quarters[2];
    std::memcpy(quarters, &half, sizeof(half));
    const Quarter quarter = quarters[0] + quarters[1];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

inline float dot(const float* a, const float* b, long size) {
    Vector sums = {};
    long i = 0;
    for (; i + WIDTH <= size; i += WIDTH) sums += load(a + i) * load(b + i);
    float total = sum(sums);
    for (; i < size; ++i) total += a[i] * b[i];
    return total;
}

inline float largest(const float* values, long size) {  // size is a multiple of WIDTH
    Vector peaks = load(values);
    for (long i = WIDTH; i < size; i += WIDTH) {
        const Vector next = load(values + i);
        peaks = next > peaks ? next : peaks;
    }
    float peak = peaks[0];
    for (long i = 1; i < WIDTH; ++i) peak = std::max(peak, peaks[i]);
    return peak;
}

// e^x of numbers up to 0, to the last bit or two (Cephes' expf): 2^n e^r, where n is an integer and r is small.
inline Vector exponential(Vector x) {
    typedef int Integers __attribute__((vector_size(WIDTH * sizeof(int))));
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, and ends up in its last bits
    const Vector least = Vector{} - 87.0f;
    x = x > least ? x : least;
    const Vector shifted = x * 1.44269504f + SHIFT, n = shifted - SHIFT;
    const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector series = r * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * r + 8.3334519073e-3f;
    series = series * r + 4.1665795894e-2f;
    series = series * r + 1.6666665459e-1f;
    series = series * r + 5.0000001201e-1f;
    series = series * (r * r) + r + 1.0f;
    Integers bits, exponents;
    std::memcpy(&bits, &series, sizeof(bits));
    std::memcpy(&exponents, &shifted, sizeof(exponents));
    bits += (exponents - 0x4B400000) << 23;
    std::memcpy(&series, &bits, sizeof(bits));
    return series;
}

inline void fetch(const float* from, long size) {
    for (long i = 0; i < size; i += WIDTH) __builtin_prefetch(from + i, 0, 2);
}

// The first token that a query at this position sees.
inline long oldest_seen(long position, long window) {
    return window < 0 ? position / -window * -window : window ? std::max(0L, position - window + 1) : 0;
}

}  // namespace
