namespace {

// out[E] += weights[count] values[count, E]; `stride` is that of the rows of values.
inline void add_weighted(const float* weights, long count, const float* values, long stride,
                         float* out, long E) {
    constexpr long CHUNK = 4 * WIDTH;
    long e = 0;
    for (; e + CHUNK <= E; e += CHUNK) {
        Vector sums[4];
        for (long part = 0; part < 4; ++part) sums[part] = load(out + e + part * WIDTH);
        for (long i = 0; i < count; ++i)
            for (long part = 0; part < 4; ++part) {
                const Vector value = load(values + i * stride + e + part * WIDTH);
                sums[part] = fmadd(splat(weights[i]), value, sums[part]);
            }
        for (long part = 0; part < 4; ++part) store(out + e + part * WIDTH, sums[part]);
    }
    for (long i = 0; i < count; ++i)
        for (long rest = e; rest < E; ++rest)
            out[rest] = fmadd(weights[i], values[i * stride + rest], out[rest]);
}

}  // namespace

// See decode_attention.py. `out` [S, H, E] holds zeros. Without sinks or slopes, their pointers are
// null. A thread computes all scores of a sequence and key/value head, their softmax, and the
// weighted values.
extern "C" void decode_attention(
    const float* q, long q_stride_s, long q_stride_h, const float* k_cache, const float* v_cache,
    const int* block_table, long table_stride, const int* seq_lens, const float* sinks,
    const float* slopes, float* out, long S, long H, long G, long D, long E, long page_size,
    float scale, long window, float softcap) {
    const long group = H / G;
#pragma omp parallel
    {
        std::vector<float> weights;
#pragma omp for collapse(2) schedule(dynamic)
        for (long s = 0; s < S; ++s)
            for (long g = 0; g < G; ++g) {
                const long length = seq_lens[s];
                const long oldest = length ? first_visible_token(length - 1, window) : 0;
                const long visible = length - oldest;
                const int* table = block_table + s * table_stride;
                float* outs = out + (s * H + g * group) * E;
                if (length == 0) continue;
                const long padded = (visible + WIDTH - 1) / WIDTH * WIDTH;
                weights.assign(group * padded, -INFINITY);
                const auto slot_of = [&](long token) {
                    return (table[token / page_size] * page_size + token % page_size) * G + g;
                };
                // Call visit(first token relative to `oldest`, number of tokens, slot of the first)
                // for the visible tokens of each page.
                const auto for_each_page = [&](auto visit) {
                    for (long begin = oldest, end; begin < length; begin = end) {
                        end = std::min(length, (begin / page_size + 1) * page_size);
                        visit(begin - oldest, end - begin, slot_of(begin));
                    }
                };

                // Scores. The keys of the next page and the values of this one are prefetched.
                for_each_page([&](long first, long count, long slot) {
                    const long next = slot_of(std::min(oldest + first + count, length - 1));
                    for (long i = 0; i < count; ++i) {
                        prefetch(k_cache + (next + i * G) * D, D);
                        prefetch(v_cache + (slot + i * G) * E, E);
                        for (long h = 0; h < group; ++h) {
                            const float* query = q + s * q_stride_s + (g * group + h) * q_stride_h;
                            float score = dot(query, k_cache + (slot + i * G) * D, D) * scale;
                            if (softcap > 0) score = softcap * std::tanh(score / softcap);
                            if (slopes) score += slopes[g * group + h] * (first + i - visible + 1);
                            weights[h * padded + first + i] = score;
                        }
                    }
                });

                // Softmax of each head.
                for (long h = 0; h < group; ++h) {
                    float* row = weights.data() + h * padded;
                    float m = maximum(row, padded);
                    if (sinks) m = std::max(m, sinks[g * group + h]);
                    Vector sums = {};
                    for (long i = 0; i < padded; i += WIDTH) {
                        const Vector p = exponential(load(row + i) - m);
                        sums += p;
                        store(row + i, p);
                    }
                    float l = sum(sums);
                    if (sinks) l += std::exp(sinks[g * group + h] - m);
                    for (long i = 0; i < padded; ++i) row[i] /= l;
                }

                // Weighted values.
                for_each_page([&](long first, long count, long slot) {
                    for (long h = 0; h < group; ++h)
                        add_weighted(weights.data() + h * padded + first, count, v_cache + slot * E,
                                     G * E, outs + h * E, E);
                });
            }
    }
}
