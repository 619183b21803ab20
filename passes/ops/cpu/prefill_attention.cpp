namespace {

constexpr int BLOCK_ROWS = 6;  // rows of a product whose sums are kept in registers
// Rows that share the loads of a tile of keys: pairs of a query token and a head of the group.
constexpr long TILE_ROWS = 96;
constexpr long TILE_KEYS = 64;

// c[BLOCK_ROWS, PARTS * WIDTH] += a[BLOCK_ROWS, depth] b[depth, columns].
template <int PARTS>
inline void multiply_block(const float* a, const float* b, long columns, long depth, float* c) {
    Vector sums[BLOCK_ROWS][PARTS];
    for (int row = 0; row < BLOCK_ROWS; ++row)
        for (int part = 0; part < PARTS; ++part)
            sums[row][part] = load(c + row * columns + part * WIDTH);
    for (long i = 0; i < depth; ++i) {
        Vector loaded[PARTS];
        for (int part = 0; part < PARTS; ++part)
            loaded[part] = load(b + i * columns + part * WIDTH);
        for (int row = 0; row < BLOCK_ROWS; ++row)
            for (int part = 0; part < PARTS; ++part)
                sums[row][part] = fmadd(splat(a[row * depth + i]), loaded[part], sums[row][part]);
    }
    for (int row = 0; row < BLOCK_ROWS; ++row)
        for (int part = 0; part < PARTS; ++part)
            store(c + row * columns + part * WIDTH, sums[row][part]);
}

// c[rows, columns] += a[rows, depth] b[depth, columns]. rows is a multiple of BLOCK_ROWS, columns
// of WIDTH.
inline void multiply_add(const float* a, const float* b, float* c, long rows, long depth,
                         long columns) {
    for (long row = 0; row < rows; row += BLOCK_ROWS) {
        const float* from = a + row * depth;
        float* to = c + row * columns;
        long column = 0;
        for (; column + 2 * WIDTH <= columns; column += 2 * WIDTH)
            multiply_block<2>(from, b + column, columns, depth, to + column);
        if (column < columns) multiply_block<1>(from, b + column, columns, depth, to + column);
    }
}

// The running maximum and sum of a row's softmax (online softmax, arXiv:1805.02867).
struct Softmax {
    float m, l;

    // Replace a tile of scores by exp(score - m) with the new maximum. Return the factor by which
    // the row's sums so far must be multiplied.
    float update(float* scores) {
        const float m_new = std::max(m, maximum(scores, TILE_KEYS)), alpha = std::exp(m - m_new);
        Vector sums = {};
        for (long i = 0; i < TILE_KEYS; i += WIDTH) {
            const Vector p = exponential(load(scores + i) - m_new);
            sums += p;
            store(scores + i, p);
        }
        m = m_new;
        l = l * alpha + sum(sums);
        return alpha;
    }
};

}  // namespace

// See prefill_attention.py. `out` [T, H, E] holds zeros. Without sinks or slopes, their pointers
// are null. Tiles of keys begin at multiples of TILE_KEYS, so that a query's sums do not depend on
// the queries that share its tile.
extern "C" void prefill_attention(
    const float* q, long q_stride_t, long q_stride_h, const float* k_cache, const float* v_cache,
    const int* block_table, long table_stride, const int* query_start, const int* seq_lens,
    const float* sinks, const float* slopes, float* out, long S, long H, long G, long D, long E,
    long page_size, float scale, long window, float softcap) {
    struct Tile { long s, begin, end; };  // a sequence and a range of its query tokens
    const long group = H / G, tokens = std::max(1L, TILE_ROWS / group);
    const long wide = (E + WIDTH - 1) / WIDTH * WIDTH;
    const long rows = (tokens * group + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    std::vector<Tile> tiles;
    for (long s = 0; s < S; ++s)
        for (long begin = query_start[s], end = query_start[s + 1]; begin < end; begin += tokens)
            if (seq_lens[s]) tiles.push_back({s, begin, std::min(begin + tokens, end)});
#pragma omp parallel
    {
        std::vector<float> queries(rows * D), keys(D * TILE_KEYS), values(TILE_KEYS * wide);
        std::vector<float> weights(rows * TILE_KEYS), outs(rows * wide);
        std::vector<Softmax> softmax(rows);
        // The last tokens of a sequence attend to the most keys, so they are processed first.
#pragma omp for schedule(dynamic)
        for (long item = long(tiles.size()) * G - 1; item >= 0; --item) {
            const Tile tile = tiles[item / G];
            const long g = item % G, live = (tile.end - tile.begin) * group;
            const long first = seq_lens[tile.s] - (query_start[tile.s + 1] - tile.begin);
            const long last = first + tile.end - tile.begin - 1;
            const long oldest = first_visible_token(first, window);
            const int* table = block_table + tile.s * table_stride;
            std::fill(queries.begin(), queries.end(), 0.0f);
            std::fill(outs.begin(), outs.end(), 0.0f);
            for (long row = 0; row < live; ++row) {
                const long h = g * group + row % group;
                const float* query = q + (tile.begin + row / group) * q_stride_t + h * q_stride_h;
                for (long d = 0; d < D; ++d) queries[row * D + d] = query[d] * scale;
                softmax[row] = sinks ? Softmax{sinks[h], 1} : Softmax{-INFINITY, 0};
            }

            // Load the keys (transposed) and values of a tile. Those outside of all queries' view
            // are zeros, whatever the cache holds there.
            const auto gather = [&](long base) {
                const long begin = std::max(base, oldest);
                const long end = std::min(base + TILE_KEYS, last + 1);
                if (end - begin < TILE_KEYS) {
                    std::fill(keys.begin(), keys.end(), 0.0f);
                    std::fill(values.begin(), values.end(), 0.0f);
                }
                for (long token = begin; token < end; ++token) {
                    const long page = table[token / page_size];
                    const long slot = (page * page_size + token % page_size) * G + g;
                    for (long d = 0; d < D; ++d)
                        keys[d * TILE_KEYS + token - base] = k_cache[slot * D + d];
                    std::copy_n(v_cache + slot * E, E, values.data() + (token - base) * wide);
                }
            };
            // Modify and mask the scores of a row and turn them into weights.
            const auto weigh = [&](long base, long row) {
                const long position = first + row / group;
                const long begin = std::max(0L, first_visible_token(position, window) - base);
                const long end = std::min(TILE_KEYS, position + 1 - base);
                float* scores = weights.data() + row * TILE_KEYS;
                if (begin >= end) return void(std::fill_n(scores, TILE_KEYS, 0.0f));
                if (softcap > 0)
                    for (long i = begin; i < end; ++i)
                        scores[i] = softcap * std::tanh(scores[i] / softcap);
                if (slopes)
                    for (long i = begin; i < end; ++i)
                        scores[i] += slopes[g * group + row % group] * (base + i - position);
                std::fill(scores, scores + begin, -INFINITY);
                std::fill(scores + end, scores + TILE_KEYS, -INFINITY);
                const float alpha = softmax[row].update(scores);
                if (alpha != 1)
                    for (long e = 0; e < wide; ++e) outs[row * wide + e] *= alpha;
            };
            for (long base = oldest / TILE_KEYS * TILE_KEYS; base <= last; base += TILE_KEYS) {
                gather(base);
                std::fill(weights.begin(), weights.end(), 0.0f);
                multiply_add(queries.data(), keys.data(), weights.data(), rows, D, TILE_KEYS);
                for (long row = 0; row < live; ++row) weigh(base, row);
                multiply_add(weights.data(), values.data(), outs.data(), rows, TILE_KEYS, wide);
            }
            for (long row = 0; row < live; ++row) {
                const long h = g * group + row % group;
                float* to = out + ((tile.begin + row / group) * H + h) * E;
                for (long e = 0; e < E; ++e) to[e] = outs[row * wide + e] / softmax[row].l;
            }
        }
    }
}
