namespace {

// out[E] += the sum of weights[count] * values[count, E].
inline void add_weighted(const float* weights, long count, const float* values, long stride, float* out, long E) {
    constexpr long CHUNK = 4 * WIDTH;
    long e = 0;
    for (; e + CHUNK <= E; e += CHUNK) {
        Vector sums[4];
        for (long part = 0; part < 4; ++part) sums[part] = load(out + e + part * WIDTH);
        for (long i = 0; i < count; ++i)
            for (long part = 0; part < 4; ++part)
                sums[part] = fmadd(splat(weights[i]), load(values + i * stride + e + part * WIDTH), sums[part]);
        for (long part = 0; part < 4; ++part) store(out + e + part * WIDTH, sums[part]);
    }
    for (long i = 0; i < count; ++i)
        for (long rest = e; rest < E; ++rest) out[rest] = fmadd(weights[i], values[i * stride + rest], out[rest]);
}

}  // namespace

// `out` holds zeros.
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
                const long oldest = length ? oldest_seen(length - 1, window) : 0, seen = length - oldest;
                const int* table = block_table + s * table_stride;
                float* outs = out + (s * H + g * group) * E;
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
