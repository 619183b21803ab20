// The ops of passes/ops on a CPU, in float32, for the shapes that torch's own kernels are slow at. Shapes and meaning are those of
// the PyTorch references. Every output is summed by one thread in one order, whatever the batch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr long WIDTH = 16;
constexpr long AHEAD = 12;  // rows of a weight that are fetched into the second cache before their turn
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

// out[E] += the sum of weights[count] * values[count, E].
inline void add_weighted(const float* weights, long count, const float* values, long stride, float* out, long E) {
    constexpr long CHUNK = 4 * WIDTH;
    long e = 0;
    for (; e + CHUNK <= E; e += CHUNK) {
        Vector sums[4];
        for (long part = 0; part < 4; ++part) sums[part] = load(out + e + part * WIDTH);
        for (long i = 0; i < count; ++i)
            for (long part = 0; part < 4; ++part) sums[part] += weights[i] * load(values + i * stride + e + part * WIDTH);
        for (long part = 0; part < 4; ++part) store(out + e + part * WIDTH, sums[part]);
    }
    for (long i = 0; i < count; ++i)
        for (long rest = e; rest < E; ++rest) out[rest] += weights[i] * values[i * stride + rest];
}

// A tile of ROWS features for TOKENS tokens: each weight is loaded once, each input ROWS times.
template <int ROWS, int TOKENS>
inline void tile(const float* x, long x_stride, const float* weight, bool fetch, long K, float* out, long N) {
    Vector sums[ROWS][TOKENS] = {};
    long k = 0;
    for (; k + WIDTH <= K; k += WIDTH)
        for (int row = 0; row < ROWS; ++row) {
            const Vector loaded = load(weight + row * K + k);
            if (fetch) __builtin_prefetch(weight + (row + AHEAD) * K + k, 0, 2);
            for (int token = 0; token < TOKENS; ++token) sums[row][token] += loaded * load(x + token * x_stride + k);
        }
    for (int token = 0; token < TOKENS; ++token)
        for (int row = 0; row < ROWS; ++row) {
            float total = sum(sums[row][token]);
            for (long rest = k; rest < K; ++rest) total += weight[row * K + rest] * x[token * x_stride + rest];
            out[token * N + row] = total;
        }
}

// Some features for all tokens, as many at a time as registers hold; the first tile fetches.
template <int ROWS>
inline void rows(const float* x, long x_stride, const float* weight, long T, long K, float* out, long N) {
    long token = 0;
    for (; token + 8 <= T; token += 8) tile<ROWS, 8>(x + token * x_stride, x_stride, weight, token == 0, K, out + token * N, N);
    if (token + 4 <= T) {
        tile<ROWS, 4>(x + token * x_stride, x_stride, weight, token == 0, K, out + token * N, N);
        token += 4;
    }
    for (; token < T; ++token) tile<ROWS, 1>(x + token * x_stride, x_stride, weight, token == 0, K, out + token * N, N);
}

}  // namespace

extern "C" void small_linear(
    const float* x, long x_stride, const float* weight, const float* norm, float eps, const float* residual, long residual_stride,
    bool gated, float* out, long T, long N, long K) {
    constexpr long ROWS = 2;
    std::vector<float> normed;
    if (norm) {
        normed.resize(T * K);
        for (long t = 0; t < T; ++t) {
            const float* token = x + t * x_stride;
            const float factor = 1 / std::sqrt(dot(token, token, K) / K + eps);
            for (long k = 0; k < K; ++k) normed[t * K + k] = norm[k] * (token[k] * factor);
        }
        x = normed.data(), x_stride = K;
    }
#pragma omp parallel
    {
        std::vector<float> gates(T * ROWS), ups(T * ROWS);
#pragma omp for schedule(static)
        for (long n = 0; n < N; n += ROWS) {
            const long count = std::min(ROWS, N - n);
            const auto features = [&](long first, float* to, long stride) {
                if (count == ROWS)
                    rows<ROWS>(x, x_stride, weight + first * K, T, K, to, stride);
                else
                    rows<1>(x, x_stride, weight + first * K, T, K, to, stride);
            };
            if (gated) {
                features(n, gates.data(), count);
                features(N + n, ups.data(), count);
                for (long i = 0; i < T * count; ++i) ups[i] *= gates[i] / (1 + std::exp(-gates[i]));
                for (long t = 0; t < T; ++t) std::copy_n(ups.data() + t * count, count, out + t * N + n);
            } else {
                features(n, out + n, N);
            }
            if (residual)
                for (long t = 0; t < T; ++t)
                    for (long row = n; row < n + count; ++row) out[t * N + row] += residual[t * residual_stride + row];
        }
    }
}

extern "C" void decode_attention(
    const float* q, long q_stride_s, long q_stride_h, const float* k_cache, const float* v_cache, const int* block_table,
    long table_stride, const int* seq_lens, const float* sinks, const float* slopes, float* out,
    long S, long H, long G, long D, long E, long page, float scale, long window, float softcap) {
    const long group = H / G;
#pragma omp parallel
    {
        std::vector<float> weights;
#pragma omp for collapse(2) schedule(dynamic)
        for (long s = 0; s < S; ++s)
            for (long g = 0; g < G; ++g) {
                const long length = seq_lens[s];
                const long oldest = window < 0 ? (length - 1) / -window * -window : window ? std::max(0L, length - window) : 0;
                const long seen = length - oldest;
                const int* table = block_table + s * table_stride;
                float* outs = out + (s * H + g * group) * E;
                std::fill(outs, outs + group * E, 0.0f);
                if (length == 0) continue;
                const long padded = (seen + WIDTH - 1) / WIDTH * WIDTH;
                weights.assign(group * padded, -INFINITY);
                const auto place_of = [&](long token) { return (table[token / page] * page + token % page) * G + g; };
                // Calls visit(first token since the oldest, how many, their place in the caches) for each page.
                const auto for_each_page = [&](auto visit) {
                    for (long begin = oldest, end; begin < length; begin = end) {
                        end = std::min(length, (begin / page + 1) * page);
                        visit(begin - oldest, end - begin, place_of(begin));
                    }
                };
                for_each_page([&](long first, long count, long place) {
                    const long next = place_of(std::min(oldest + first + count, length - 1));
                    for (long i = 0; i < count; ++i) {
                        fetch(k_cache + (next + i * G) * D, D);
                        fetch(v_cache + (place + i * G) * E, E);
                        for (long h = 0; h < group; ++h) {
                            const float* query = q + s * q_stride_s + (g * group + h) * q_stride_h;
                            float score = dot(query, k_cache + (place + i * G) * D, D) * scale;
                            if (softcap > 0) score = softcap * std::tanh(score / softcap);
                            if (slopes) score += slopes[g * group + h] * (first + i - seen + 1);
                            weights[h * padded + first + i] = score;
                        }
                    }
                });
                for (long h = 0; h < group; ++h) {
                    float* row = weights.data() + h * padded;
                    float peak = largest(row, padded);
                    if (sinks) peak = std::max(peak, sinks[g * group + h]);
                    Vector totals = {};
                    for (long i = 0; i < padded; i += WIDTH) {
                        const Vector likely = exponential(load(row + i) - peak);
                        totals += likely;
                        store(row + i, likely);
                    }
                    float total = sum(totals);
                    if (sinks) total += std::exp(sinks[g * group + h] - peak);
                    for (long i = 0; i < padded; ++i) row[i] /= total;
                }
                for_each_page([&](long first, long count, long place) {
                    for (long h = 0; h < group; ++h)
                        add_weighted(weights.data() + h * padded + first, count, v_cache + place * E, G * E, outs + h * E, E);
                });
            }
    }
}
