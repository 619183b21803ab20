// The ops of passes/ops on a CPU, in float32, for the shapes that torch's own kernels are slow at. Shapes and meaning are those of
// the PyTorch references. Every output is summed by one thread in one order, whatever the batch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr long WIDTH = 16;
constexpr long AHEAD = 12;  // rows of a weight that are fetched before their turn
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

inline Vector load(const float* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

inline float sum(Vector vector) {
    float total = 0;
    for (long lane = 0; lane < WIDTH; ++lane) total += vector[lane];
    return total;
}

inline float dot(const float* a, const float* b, long size) {
    Vector sums = {};
    long i = 0;
    for (; i + WIDTH <= size; i += WIDTH) sums += load(a + i) * load(b + i);
    float total = sum(sums);
    for (; i < size; ++i) total += a[i] * b[i];
    return total;
}

// A tile of ROWS features for TOKENS tokens: each weight is loaded once, each input ROWS times.
template <int ROWS, int TOKENS, bool FETCH>
inline void tile(const float* x, long x_stride, const float* weight, long K, float* out, long N) {
    Vector sums[ROWS][TOKENS] = {};
    long k = 0;
    for (; k + WIDTH <= K; k += WIDTH)
        for (int row = 0; row < ROWS; ++row) {
            const Vector loaded = load(weight + row * K + k);
            if (FETCH) __builtin_prefetch(weight + (row + AHEAD) * K + k);
            for (int token = 0; token < TOKENS; ++token) sums[row][token] += loaded * load(x + token * x_stride + k);
        }
    for (int token = 0; token < TOKENS; ++token)
        for (int row = 0; row < ROWS; ++row) {
            float total = sum(sums[row][token]);
            for (long rest = k; rest < K; ++rest) total += weight[row * K + rest] * x[token * x_stride + rest];
            out[token * N + row] = total;
        }
}

template <int ROWS>
inline void rows(const float* x, long x_stride, const float* weight, long T, long K, float* out, long N) {
    long token = 0;
    if (T >= 4) {
        tile<ROWS, 4, true>(x, x_stride, weight, K, out, N);
        for (token = 4; token + 4 <= T; token += 4)
            tile<ROWS, 4, false>(x + token * x_stride, x_stride, weight, K, out + token * N, N);
    }
    for (; token < T; ++token) tile<ROWS, 1, true>(x + token * x_stride, x_stride, weight, K, out + token * N, N);
}

}  // namespace

extern "C" void small_linear(
    const float* x, long x_stride, const float* weight, const float* residual, long residual_stride, float* out,
    long T, long N, long K) {
    constexpr long ROWS = 4;
#pragma omp parallel for schedule(static)
    for (long n = 0; n < N; n += ROWS) {
        if (n + ROWS <= N)
            rows<ROWS>(x, x_stride, weight + n * K, T, K, out + n, N);
        else
            for (long row = n; row < N; ++row) rows<1>(x, x_stride, weight + row * K, T, K, out + row, N);
        if (residual)
            for (long t = 0; t < T; ++t)
                for (long row = n; row < std::min(n + ROWS, N); ++row) out[t * N + row] += residual[t * residual_stride + row];
    }
}

extern "C" void decode_attention(
    const float* q, long q_stride_s, long q_stride_h, const float* k_cache, const float* v_cache, const int* block_table,
    long table_stride, const int* seq_lens, const float* sinks, float* out,
    long S, long H, long G, long D, long E, long page, float scale, long window, float softcap) {
    const long group = H / G;
#pragma omp parallel
    {
        std::vector<float> weights;
#pragma omp for collapse(2) schedule(dynamic)
        for (long s = 0; s < S; ++s)
            for (long g = 0; g < G; ++g) {
                const long length = seq_lens[s], oldest = window ? std::max(0L, length - window) : 0, seen = length - oldest;
                const int* table = block_table + s * table_stride;
                float* outs = out + (s * H + g * group) * E;
                std::fill(outs, outs + group * E, 0.0f);
                if (length == 0) continue;
                weights.resize(group * seen);
                for (long i = 0; i < seen; ++i) {
                    const long token = oldest + i;
                    const float* key = k_cache + ((table[token / page] * page + token % page) * G + g) * D;
                    for (long h = 0; h < group; ++h) {
                        float score = dot(q + s * q_stride_s + (g * group + h) * q_stride_h, key, D) * scale;
                        if (softcap > 0) score = softcap * std::tanh(score / softcap);
                        weights[h * seen + i] = score;
                    }
                }
                for (long h = 0; h < group; ++h) {
                    float* row = weights.data() + h * seen;
                    float peak = *std::max_element(row, row + seen), total = 0;
                    if (sinks) peak = std::max(peak, sinks[g * group + h]);
                    for (long i = 0; i < seen; ++i) total += row[i] = std::exp(row[i] - peak);
                    if (sinks) total += std::exp(sinks[g * group + h] - peak);
                    for (long i = 0; i < seen; ++i) row[i] /= total;
                }
                for (long i = 0; i < seen; ++i) {
                    const long token = oldest + i;
                    const float* value = v_cache + ((table[token / page] * page + token % page) * G + g) * E;
                    for (long h = 0; h < group; ++h) {
                        const float weight = weights[h * seen + i];
                        for (long e = 0; e < E; ++e) outs[h * E + e] += weight * value[e];
                    }
                }
            }
    }
}
