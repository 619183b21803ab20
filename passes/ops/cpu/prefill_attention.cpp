namespace {

constexpr int BLOCK_ROWS = 6;  // of a product, whose sums stay in registers
constexpr long TILE_ROWS = 96;  // queries that share the reading of keys: some tokens, all heads of a group
constexpr long TILE_KEYS = 64;

// c[BLOCK_ROWS, PARTS vectors] += a[BLOCK_ROWS, depth] b[depth, columns].
template <int PARTS>
inline void multiply_block(const float* a, const float* b, long columns, long depth, float* c) {
    Vector sums[BLOCK_ROWS][PARTS];
    for (int row = 0; row < BLOCK_ROWS; ++row)
        for (int part = 0; part < PARTS; ++part) sums[row][part] = load(c + row * columns + part * WIDTH);
    for (long i = 0; i < depth; ++i) {
        Vector loaded[PARTS];
        for (int part = 0; part < PARTS; ++part) loaded[part] = load(b + i * columns + part * WIDTH);
        for (int row = 0; row < BLOCK_ROWS; ++row)
            for (int part = 0; part < PARTS; ++part) sums[row][part] = fmadd(splat(a[row * depth + i]), loaded[part], sums[row][part]);
    }
    for (int row = 0; row < BLOCK_ROWS; ++row)
        for (int part = 0; part < PARTS; ++part) store(c + row * columns + part * WIDTH, sums[row][part]);
}

// c[rows, columns] += a[rows, depth] b[depth, columns]; rows is a multiple of BLOCK_ROWS, columns one of WIDTH.
inline void multiply_add(const float* a, const float* b, float* c, long rows, long depth, long columns) {
    for (long row = 0; row < rows; row += BLOCK_ROWS) {
        long column = 0;
        for (; column + 2 * WIDTH <= columns; column += 2 * WIDTH)
            multiply_block<2>(a + row * depth, b + column, columns, depth, c + row * columns + column);
        if (column < columns) multiply_block<1>(a + row * depth, b + column, columns, depth, c + row * columns + column);
    }
}

// The softmax of a row whose keys come a tile at a time: a running peak keeps the sums in range (online softmax, arXiv:1805.02867).
struct Softmax {
    float peak, total;

    // Scores to weights; returns what the row's sums so far must be multiplied by.
    float weigh(float* scores) {
        const float higher = std::max(peak, largest(scores, TILE_KEYS)), shrink = std::exp(peak - higher);
        Vector sums = {};
        for (long i = 0; i < TILE_KEYS; i += WIDTH) {
            const Vector likely = exponential(load(scores + i) - higher);
            sums += likely;
            store(scores + i, likely);
        }
        peak = higher;
        total = total * shrink + sum(sums);
        return shrink;
    }
};

}  // namespace

// `out` holds zeros. Tiles of keys begin at multiples of TILE_KEYS, whichever queries share them.
extern "C" void prefill_attention(
    const float* q, long q_stride_t, long q_stride_h, const float* k_cache, const float* v_cache, const int* block_table,
    long table_stride, const int* query_start, const int* seq_lens, const float* sinks, const float* slopes, float* out,
    long S, long H, long G, long D, long E, long page, float scale, long window, float softcap) {
    struct Tile { long s, begin, end; };  // of a sequence's tokens
    const long group = H / G, tokens = std::max(1L, TILE_ROWS / group), wide = (E + WIDTH - 1) / WIDTH * WIDTH;
    const long rows = (tokens * group + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    std::vector<Tile> tiles;
    for (long s = 0; s < S; ++s)
        for (long begin = query_start[s]; seq_lens[s] && begin < query_start[s + 1]; begin += tokens)
            tiles.push_back({s, begin, std::min(begin + tokens, long(query_start[s + 1]))});
#pragma omp parallel
    {
        std::vector<float> queries(rows * D), keys(D * TILE_KEYS), values(TILE_KEYS * wide), weights(rows * TILE_KEYS), outs(rows * wide);
        std::vector<Softmax> softmax(rows);
#pragma omp for schedule(dynamic)
        for (long item = long(tiles.size()) * G - 1; item >= 0; --item) {  // a sequence's last tokens see most, so they go first
            const Tile tile = tiles[item / G];
            const long g = item % G, live = (tile.end - tile.begin) * group;
            const long first = seq_lens[tile.s] - (query_start[tile.s + 1] - tile.begin), last = first + tile.end - tile.begin - 1;
            const long oldest = oldest_seen(first, window);
            const int* table = block_table + tile.s * table_stride;
            std::fill(queries.begin(), queries.end(), 0.0f);
            std::fill(outs.begin(), outs.end(), 0.0f);
            for (long row = 0; row < live; ++row) {
                const long h = g * group + row % group;
                const float* query = q + (tile.begin + row / group) * q_stride_t + h * q_stride_h;
                for (long d = 0; d < D; ++d) queries[row * D + d] = query[d] * scale;
                softmax[row] = sinks ? Softmax{sinks[h], 1} : Softmax{-INFINITY, 0};
            }
            // Keys are laid out feature by feature, and those that no query sees stay zeros, whatever the cache holds.
            const auto gather = [&](long base) {
                const long begin = std::max(base, oldest), end = std::min(base + TILE_KEYS, last + 1);
                if (end - begin < TILE_KEYS) {
                    std::fill(keys.begin(), keys.end(), 0.0f);
                    std::fill(values.begin(), values.end(), 0.0f);
                }
                for (long token = begin; token < end; ++token) {
                    const long place = (table[token / page] * page + token % page) * G + g;
                    for (long d = 0; d < D; ++d) keys[d * TILE_KEYS + token - base] = k_cache[place * D + d];
                    std::copy_n(v_cache + place * E, E, values.data() + (token - base) * wide);
                }
            };
            const auto weigh = [&](long base, long row) {
                const long position = first + row / group;
                const long begin = std::max(0L, oldest_seen(position, window) - base), end = std::min(TILE_KEYS, position + 1 - base);
                float* scores = weights.data() + row * TILE_KEYS;
                if (begin >= end) return void(std::fill_n(scores, TILE_KEYS, 0.0f));
                if (softcap > 0)
                    for (long i = begin; i < end; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
                if (slopes)
                    for (long i = begin; i < end; ++i) scores[i] += slopes[g * group + row % group] * (base + i - position);
                std::fill(scores, scores + begin, -INFINITY);
                std::fill(scores + end, scores + TILE_KEYS, -INFINITY);
                const float shrink = softmax[row].weigh(scores);
                if (shrink != 1)
                    for (long e = 0; e < wide; ++e) outs[row * wide + e] *= shrink;
            };
            for (long base = oldest / TILE_KEYS * TILE_KEYS; base <= last; base += TILE_KEYS) {
                gather(base);
                std::fill(weights.begin(), weights.end(), 0.0f);
                multiply_add(queries.data(), keys.data(), weights.data(), rows, D, TILE_KEYS);
                for (long row = 0; row < live; ++row) weigh(base, row);
                multiply_add(weights.data(), values.data(), outs.data(), rows, TILE_KEYS, wide);
            }
            for (long row = 0; row < live; ++row) {
                float* to = out + ((tile.begin + row / group) * H + g * group + row % group) * E;
                for (long e = 0; e < E; ++e) to[e] = outs[row * wide + e] / softmax[row].total;
            }
        }
    }
}
