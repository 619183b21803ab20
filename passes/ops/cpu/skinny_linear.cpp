namespace {

// Rows of the weight that are prefetched into the second-level cache ahead of their use.
constexpr long PREFETCH_ROWS = 12;

// out[TOKENS, ROWS] = x[TOKENS, K] weight[ROWS, K]^T. Each weight is loaded once, each input ROWS
// times. N is the stride of `out`.
template <int ROWS, int TOKENS>
inline void tile(const float* x, long x_stride, const float* weight, bool prefetch_weight, long K,
                 float* out, long N) {
    Vector sums[ROWS][TOKENS] = {};
    long k = 0;
    for (; k + WIDTH <= K; k += WIDTH)
        for (int row = 0; row < ROWS; ++row) {
            const Vector loaded = load(weight + row * K + k);
            if (prefetch_weight)
                __builtin_prefetch(weight + (row + PREFETCH_ROWS) * K + k, 0, 2);
            for (int token = 0; token < TOKENS; ++token)
                sums[row][token] = fmadd(loaded, load(x + token * x_stride + k), sums[row][token]);
        }
    for (int token = 0; token < TOKENS; ++token)
        for (int row = 0; row < ROWS; ++row) {
            float total = sum(sums[row][token]);
            for (long rest = k; rest < K; ++rest)
                total = fmadd(weight[row * K + rest], x[token * x_stride + rest], total);
            out[token * N + row] = total;
        }
}

// ROWS features of all T tokens: tiles of TOKENS tokens, then smaller ones for the rest. Only the
// first tile prefetches.
template <int ROWS, int TOKENS>
inline void rows(const float* x, long x_stride, const float* weight, bool prefetch_weight, long T,
                 long K, float* out, long N) {
    long token = 0;
    for (; token + TOKENS <= T; token += TOKENS)
        tile<ROWS, TOKENS>(x + token * x_stride, x_stride, weight, prefetch_weight && token == 0,
                           K, out + token * N, N);
    if constexpr (TOKENS > 1)
        if (token < T)
            rows<ROWS, TOKENS / 2>(x + token * x_stride, x_stride, weight,
                                   prefetch_weight && token == 0, T - token, K, out + token * N, N);
}

}  // namespace

// See skinny_linear.py. Without a norm or a residual, their pointers are null.
extern "C" void skinny_linear(
    const float* x, long x_stride, const float* weight, const float* norm, float eps,
    const float* residual, long residual_stride, bool gated, float* out, long T, long N, long K) {
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
                const float* from = weight + first * K;
                if (count == ROWS)
                    rows<ROWS, LINEAR_TOKENS>(x, x_stride, from, true, T, K, to, stride);
                else
                    rows<1, LINEAR_TOKENS>(x, x_stride, from, true, T, K, to, stride);
            };
            if (gated) {
                features(n, gates.data(), count);
                features(N + n, ups.data(), count);
                for (long i = 0; i < T * count; ++i)
                    ups[i] *= gates[i] / (1 + std::exp(-gates[i]));
                for (long t = 0; t < T; ++t)
                    std::copy_n(ups.data() + t * count, count, out + t * N + n);
            } else {
                features(n, out + n, N);
            }
            if (residual)
                for (long t = 0; t < T; ++t)
                    for (long row = n; row < n + count; ++row)
                        out[t * N + row] += residual[t * residual_stride + row];
        }
    }
}
