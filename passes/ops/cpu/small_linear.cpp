namespace {

constexpr long AHEAD = 12;  // rows of a weight that are fetched into the second cache before their turn

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
