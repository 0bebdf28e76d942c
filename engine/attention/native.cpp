// Paged attention on the CPU, reading the cache where it lies, and a norm.
//
// Compiled when a worker starts (native_build.py), called through ctypes. The cache is
// [blocks, kv_heads, layers, 2, block_size, dim]; `keys` and `values` point at block 0 of one
// layer; blocks are `block_stride` elements apart, heads `head_stride`, tokens dim. Query and
// output are [tokens, heads, dim] with given strides, dim contiguous. All sums are in float32.
// What a sequence gets does not depend on what else is in the step.
#include "native.h"

namespace {

template <typename T>
void decode_all(const Layer &layer, const T *query, T *out, const T *keys, const T *values,
                int64_t batch, const int64_t *rows, const int64_t *tables, int64_t table_stride,
                const int64_t *begins, const int64_t *ends, int threads) {
    const int64_t items = batch * layer.kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> space;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t i = item / layer.kv_heads;
            decode_by_dim<T>(layer, query + rows[i] * layer.query_stride,
                             out + rows[i] * layer.out_stride, keys, values,
                             tables + i * table_stride, begins[i], ends[i], item % layer.kv_heads,
                             space);
        }
    }
}

#ifdef BATON_DOT_BF16

constexpr int64_t QUERIES = 32, KEYS = 512;  // of one tile
constexpr int64_t PANEL = 64;                // keys that are packed together

// C[8, 16 * W] (+)= A[8, 2 * pairs] B[pairs, columns, 2]; A's rows and B's pairs as uint32.
template <int W>
inline void multiply_tile(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb,
                          int64_t pairs, float *c, int64_t ldc, bool add) {
    __m512 sum[8][W];
    for (int r = 0; r < 8; ++r)
        for (int w = 0; w < W; ++w)
            sum[r][w] = add ? _mm512_loadu_ps(c + r * ldc + 16 * w) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
        __m512i column[W];
        for (int w = 0; w < W; ++w) column[w] = _mm512_loadu_si512(b + p * ldb + 16 * w);
        for (int r = 0; r < 8; ++r) {
            const __m512i both = _mm512_set1_epi32(int(a[r * lda + p]));
            for (int w = 0; w < W; ++w) sum[r][w] = dot(sum[r][w], both, column[w]);
        }
    }
    for (int r = 0; r < 8; ++r)
        for (int w = 0; w < W; ++w) _mm512_storeu_ps(c + r * ldc + 16 * w, sum[r][w]);
}

// `rows` is a multiple of 8, `columns` of 16.
void multiply(const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb, int64_t rows,
              int64_t columns, int64_t pairs, float *c, int64_t ldc, bool add) {
    for (int64_t n = 0; n < columns;) {
        const bool wide = columns - n >= 32;
        for (int64_t r = 0; r < rows; r += 8)
            if (wide)
                multiply_tile<2>(a + r * lda, lda, b + n, ldb, pairs, c + r * ldc + n, ldc, add);
            else
                multiply_tile<1>(a + r * lda, lda, b + n, ldb, pairs, c + r * ldc + n, ldc, add);
        n += wide ? 32 : 16;
    }
}

// e^x in 16 lanes, relative error below 2e-7; x <= 0.
inline __m512 exp_lanes(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                    5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// The lanes of 16 columns from `column` on that are in [low, high).
inline __mmask16 between(int64_t column, int64_t low, int64_t high) {
    const int64_t first = low - column, last = high - column;
    const uint32_t from = first <= 0 ? 0xffffu : (first < 16 ? 0xffffu << first : 0u);
    const uint32_t until = last >= 16 ? 0xffffu : (last > 0 ? (1u << last) - 1 : 0u);
    return __mmask16(from & until);
}

// Weights from the scores [low, high) of a row, as far as they are known: `top` and `total` go on
// from those seen before. Other weights are 0. Returns what sums so far are to be multiplied by.
inline float weigh(const float *scores, uint16_t *weights, int64_t width, int64_t low, int64_t high,
                   float scaling, float &top, float &total) {
    const int64_t first = low / 32 * 32, last = (high + 31) / 32 * 32;
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 most = lowest;
    for (int64_t j = first; j < last; j += 16)
        most = _mm512_max_ps(
            most, _mm512_mask_loadu_ps(lowest, between(j, low, high), scores + j));
    const float known = top, best = _mm512_reduce_max_ps(most) * scaling;
    top = best > known ? best : known;
    const __m512 factor = _mm512_set1_ps(scaling), offset = _mm512_set1_ps(-top);
    __m512 sum = _mm512_setzero_ps();
    std::memset(weights, 0, size_t(first) * 2);
    for (int64_t j = first; j < last; j += 32) {
        __m512 part[2];
        for (int64_t e = 0; e < 2; ++e) {
            const __m512 score = _mm512_loadu_ps(scores + j + 16 * e);
            part[e] = _mm512_maskz_mov_ps(between(j + 16 * e, low, high),
                                          exp_lanes(_mm512_fmadd_ps(score, factor, offset)));
            sum = _mm512_add_ps(sum, part[e]);
        }
        const __m512bh both = _mm512_cvtne2ps_pbh(part[1], part[0]);
        _mm512_storeu_si512(weights + j, (__m512i)both);
    }
    std::memset(weights + last, 0, size_t(width - last) * 2);
    const float shrink = exp_negative(known - top);
    total = total * shrink + _mm512_reduce_add_ps(sum);
    return shrink;
}

struct Tile {
    std::vector<uint32_t> query, weights;
    std::vector<float> scores, sums;
    float top[QUERIES], total[QUERIES];
};

// Queries [first, last) of one head; their positions follow `start`. Keys are packed from `origin`.
void prefill_tile(const Layer &layer, const bf16 *query, bf16 *out, const uint32_t *keys,
                  const uint32_t *values, int64_t origin, int64_t start,
                  int64_t first, int64_t last, int64_t window, int64_t head, Tile &t) {
    const int64_t dim = layer.dim, pairs = dim / 2, count = last - first;
    t.query.assign(size_t(QUERIES * pairs), 0);
    t.weights.resize(size_t(QUERIES * KEYS / 2));
    t.scores.resize(size_t(QUERIES * KEYS));
    t.sums.assign(size_t(QUERIES * dim), 0.0f);
    for (int64_t i = 0; i < count; ++i) {
        std::memcpy(&t.query[size_t(i * pairs)],
                    query + (first + i) * layer.query_stride + head * dim, size_t(dim) * 2);
        t.top[i] = -std::numeric_limits<float>::infinity();
        t.total[i] = 0.0f;
    }
    const int64_t rows = (count + 7) / 8 * 8, stop = start + last - origin;
    int64_t begin = window ? start + first - window + 1 - origin : 0;
    begin = begin > 0 ? begin / PANEL * PANEL : 0;
    for (int64_t k = begin; k < stop; k += KEYS) {
        const int64_t some = stop - k < KEYS ? stop - k : KEYS;
        const int64_t width = (some + PANEL - 1) / PANEL * PANEL;
        for (int64_t n = 0; n < width; n += PANEL)
            multiply(t.query.data(), pairs, keys + (k + n) * pairs, PANEL, rows, PANEL, pairs,
                     t.scores.data() + n, KEYS, false);
        for (int64_t i = 0; i < count; ++i) {
            uint16_t *weight = reinterpret_cast<uint16_t *>(&t.weights[size_t(i * KEYS / 2)]);
            const int64_t position = start + first + i - origin;
            int64_t low = window ? position - window + 1 - k : 0, high = position + 1 - k;
            low = low < 0 ? 0 : (low > width ? width : low);
            high = high > some ? some : high;
            if (low >= high) {
                std::memset(weight, 0, size_t(width) * 2);
                continue;
            }
            const float shrink = weigh(&t.scores[size_t(i * KEYS)], weight, width, low, high,
                                       layer.scaling, t.top[i], t.total[i]);
            if (shrink != 1.0f)
                for (int64_t d = 0; d < dim; ++d) t.sums[size_t(i * dim + d)] *= shrink;
        }
        multiply(t.weights.data(), KEYS / 2, values + k / 2 * dim, dim, rows, dim, width / 2,
                 t.sums.data(), dim, true);
    }
    for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < dim; ++d)
            from_float(t.sums[size_t(i * dim + d)] / t.total[i],
                       out + (first + i) * layer.out_stride + head * dim + d);
}

// Keys as [padded / 64, dim / 2, 64, 2], values as [padded / 2, dim, 2]: what `multiply` reads.
void pack(const Layer &layer, const bf16 *keys, const bf16 *values, const int64_t *table,
          int64_t origin, int64_t end, int64_t kv_head, uint32_t *packed_keys,
          uint32_t *packed_values, int64_t padded) {
    const int64_t dim = layer.dim, pairs = dim / 2;
    for (int64_t j = 0; j < padded; j += 2) {
        const uint16_t *key[2] = {nullptr, nullptr}, *value[2] = {nullptr, nullptr};
        for (int64_t e = 0; e < 2; ++e) {
            const int64_t at = origin + j + e;
            if (at >= end) continue;
            const int64_t place = table[at / layer.block_size] * layer.block_stride +
                                  kv_head * layer.head_stride + at % layer.block_size * dim;
            key[e] = &keys[place].bits;
            value[e] = &values[place].bits;
        }
        uint32_t *panel = packed_keys + j / PANEL * PANEL * pairs;
        for (int64_t e = 0; e < 2; ++e)
            for (int64_t p = 0; p < pairs; ++p) {
                uint32_t both = 0;
                if (key[e]) std::memcpy(&both, key[e] + 2 * p, 4);
                panel[p * PANEL + (j + e) % PANEL] = both;
            }
        uint32_t *row = packed_values + j / 2 * dim;
        for (int64_t d = 0; d < dim; ++d) {
            const uint32_t low = value[0] ? value[0][d] : 0, high = value[1] ? value[1][d] : 0;
            row[d] = low | high << 16;
        }
    }
}

void prefill(const Layer &layer, const bf16 *query, bf16 *out, const bf16 *keys,
             const bf16 *values, int64_t length, const int64_t *table, int64_t kv_len,
             int64_t window, int threads) {
    const int64_t start = kv_len - length, sharing = layer.heads / layer.kv_heads;
    int64_t origin = window ? start - window + 1 : 0;
    origin = origin > 0 ? origin / 2 * 2 : 0;
    const int64_t padded = (kv_len - origin + PANEL - 1) / PANEL * PANEL;
    const int64_t tiles = (length + QUERIES - 1) / QUERIES, size = padded * layer.dim / 2;
    std::vector<uint32_t> packed(size_t(2 * layer.kv_heads * size));
    uint32_t *all = packed.data();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Tile tile;
#pragma omp for schedule(dynamic)
        for (int64_t h = 0; h < layer.kv_heads; ++h)
            pack(layer, keys, values, table, origin, kv_len, h, all + 2 * h * size,
                 all + (2 * h + 1) * size, padded);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < layer.heads * tiles; ++item) {
            const int64_t head = item / tiles, first = (tiles - 1 - item % tiles) * QUERIES;
            const int64_t h = head / sharing;
            const int64_t last = first + QUERIES < length ? first + QUERIES : length;
            prefill_tile(layer, query, out, all + 2 * h * size, all + (2 * h + 1) * size,
                         origin, start, first, last, window, head, tile);
        }
    }
}

#endif

}  // namespace

extern "C" {

// Whether `baton_prefill` can serve this head size.
int baton_can_prefill(int64_t dim) {
#ifdef BATON_DOT_BF16
    return dim % 16 == 0;
#else
    (void)dim;
    return 0;
#endif
}

// `kind`: 0 float32, 1 bfloat16. [rows, dim], contiguous.
void baton_rms_norm(int kind, const void *x, const void *weight, void *out, int64_t rows,
                    int64_t dim, float epsilon) {
    if (kind == 0)
        rms_norm(static_cast<const float *>(x), static_cast<const float *>(weight),
                 static_cast<float *>(out), rows, dim, epsilon);
    else
        rms_norm(static_cast<const bf16 *>(x), static_cast<const bf16 *>(weight),
                 static_cast<bf16 *>(out), rows, dim, epsilon);
}

// `kind`: 0 float32, 1 bfloat16. One token of each of `batch` sequences, at `rows`.
void baton_decode(int kind, const void *query, void *out, const void *keys, const void *values,
                  int64_t batch, const int64_t *rows, const int64_t *tables, int64_t table_stride,
                  const int64_t *begins, const int64_t *ends, int64_t heads, int64_t kv_heads,
                  int64_t dim, int64_t block_size, int64_t block_stride, int64_t head_stride,
                  int64_t query_stride, int64_t out_stride, float scaling, int threads) {
    const Layer layer{heads,       kv_heads,     dim,        block_size, block_stride,
                      head_stride, query_stride, out_stride, scaling};
    if (kind == 0)
        decode_all<float>(layer, static_cast<const float *>(query), static_cast<float *>(out),
                             static_cast<const float *>(keys), static_cast<const float *>(values),
                             batch, rows, tables, table_stride, begins, ends, threads);
    else
        decode_all<bf16>(layer, static_cast<const bf16 *>(query), static_cast<bf16 *>(out),
                            static_cast<const bf16 *>(keys), static_cast<const bf16 *>(values),
                            batch, rows, tables, table_stride, begins, ends, threads);
}

// bfloat16 only. `length` queries of one sequence that has `kv_len` tokens; window 0: none.
void baton_prefill(const void *query, void *out, const void *keys, const void *values,
                   int64_t length, const int64_t *table, int64_t kv_len, int64_t window,
                   int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size,
                   int64_t block_stride, int64_t head_stride, int64_t query_stride,
                   int64_t out_stride, float scaling, int threads) {
#ifdef BATON_DOT_BF16
    const Layer layer{heads,       kv_heads,     dim,        block_size, block_stride,
                      head_stride, query_stride, out_stride, scaling};
    prefill(layer, static_cast<const bf16 *>(query), static_cast<bf16 *>(out),
            static_cast<const bf16 *>(keys), static_cast<const bf16 *>(values), length, table,
            kv_len, window, threads);
#else
    (void)query, (void)out, (void)keys, (void)values, (void)length, (void)table, (void)kv_len;
    (void)window, (void)heads, (void)kv_heads, (void)dim, (void)block_size, (void)block_stride;
    (void)head_stride, (void)query_stride, (void)out_stride, (void)scaling, (void)threads;
#endif
}

// Keys and values of `tokens` new tokens into their rows of the cache (KvCache.write); sizes and
// strides in bytes.
void baton_write(const char *key, const char *value, char *keys, char *values, const int64_t *rows,
                 int64_t tokens, int64_t kv_heads, int64_t row, int64_t key_token, int64_t key_head,
                 int64_t value_token, int64_t value_head, int64_t head_stride) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t place = rows[t] * row + h * head_stride;
            std::memcpy(keys + place, key + t * key_token + h * key_head, size_t(row));
            std::memcpy(values + place, value + t * value_token + h * value_head, size_t(row));
        }
}

}  // extern "C"
