// Paged attention on the CPU, reading the cache where it lies, and a norm.
//
// Compiled when a worker starts (native_build.py), called through ctypes. The cache is
// [blocks, kv_heads, layers, 2, block_size, dim]; `keys` and `values` point at block 0 of one
// layer; blocks are `block_stride` elements apart, heads `head_stride`, tokens dim. Query and
// output are [tokens, heads, dim] with given strides, dim contiguous. All sums are in float32.
// What a sequence gets does not depend on what else is in the step.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#define BATON_DOT_BF16 1
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}
inline void from_float(float x, float *out) { *out = x; }
inline uint16_t rounded(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    uint32_t up = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    uint32_t nan = (wide >> 16) | 0x40u;
    return uint16_t((wide & 0x7fffffffu) > 0x7f800000u ? nan : up);
}
inline void from_float(float x, bf16 *out) { out->bits = rounded(x); }

// e^x for x <= 0, relative error below 2e-7; 0 below -87.
inline float exp_negative(float x) {
    float kept = x < -87.0f ? -87.0f : x;
    float n = std::nearbyint(kept * 1.44269504088896341f);
    float r = kept - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    float result = p * scale;
    return x < -87.0f ? 0.0f : result;
}

struct Layer {
    int64_t heads, kv_heads, dim, block_size, block_stride, head_stride, query_stride, out_stride;
    float scaling;
};

// The vectors below are wide on every CPU; the compiler splits them where registers are smaller.
typedef float wide __attribute__((vector_size(64)));
typedef uint32_t wide_bits __attribute__((vector_size(64)));
typedef uint16_t narrow_bits __attribute__((vector_size(32)));
constexpr int64_t LANES = 16;

inline wide load(const float *from) {
    wide x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline wide load(const bf16 *from) {
    narrow_bits x;
    std::memcpy(&x, from, sizeof x);
    return (wide)(__builtin_convertvector(x, wide_bits) << 16);
}
inline void store(float *to, wide x) { std::memcpy(to, &x, sizeof x); }

inline wide pairs_added(wide a, wide b) {
    const wide_bits even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

// The sum of each vector's lanes, in the vectors' order; overwrites them.
inline wide sums_of(wide x[LANES]) {
    for (int64_t n = LANES; n > 1; n /= 2)
        for (int64_t i = 0; i < n / 2; ++i) x[i] = pairs_added(x[2 * i], x[2 * i + 1]);
    return x[0];
}

// Weights of keys from their scores, in place.
void softmax(float *scores, int64_t count) {
    float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; ++i) top = scores[i] > top ? scores[i] : top;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) {
        scores[i] = exp_negative(scores[i] - top);
        total += scores[i];
    }
    const float share = 1.0f / total;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) scores[i] *= share;
}

// The tokens of a sequence in the cache, block after block: `each(pointer, index from begin)`.
template <typename T, typename Each>
inline void walk(const Layer &layer, const T *base, const int64_t *table, int64_t begin,
                 int64_t end, int64_t kv_head, Each each) {
    for (int64_t at = begin; at < end;) {
        const int64_t offset = at % layer.block_size, left = layer.block_size - offset;
        const int64_t count = left < end - at ? left : end - at;
        const T *row = base + table[at / layer.block_size] * layer.block_stride +
                       kv_head * layer.head_stride + offset * layer.dim;
        for (int64_t t = 0; t < count; ++t, row += layer.dim) each(row, at - begin + t);
        at += count;
    }
}

// Sums of values by the weights of `N` heads, the columns [16 * first, 16 * (first + C)).
template <typename T, int N, int C>
void mix(const Layer &layer, const T *values, const int64_t *table, int64_t begin, int64_t end,
         int64_t kv_head, int64_t first, const float *weights, int64_t room, float *out) {
    wide sums[N][C] = {};
    walk(layer, values, table, begin, end, kv_head, [&](const T *value, int64_t at) {
        wide column[C];
        for (int c = 0; c < C; ++c) column[c] = load(value + LANES * (first + c));
        for (int n = 0; n < N; ++n)
            for (int c = 0; c < C; ++c) sums[n][c] += weights[n * room + at] * column[c];
    });
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) store(out + n * layer.dim + LANES * (first + c), sums[n][c]);
}

template <typename T, int N>
void mix_all(const Layer &layer, const T *values, const int64_t *table, int64_t begin, int64_t end,
             int64_t kv_head, const float *weights, int64_t room, float *out) {
    const int64_t columns = layer.dim / LANES;
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4)
        mix<T, N, 4>(layer, values, table, begin, end, kv_head, c, weights, room, out);
    for (; c < columns; ++c)
        mix<T, N, 1>(layer, values, table, begin, end, kv_head, c, weights, room, out);
}

// One token's heads that share a KV head, against keys [begin, end) of its table. D: dim, or 0.
template <typename T, int D>
void decode_one(const Layer &layer, const T *query, T *out, const T *keys, const T *values,
                const int64_t *table, int64_t begin, int64_t end, int64_t kv_head,
                std::vector<float> &space) {
    const int64_t dim = D ? D : layer.dim, sharing = layer.heads / layer.kv_heads;
    const int64_t count = end - begin, room = (count + LANES - 1) / LANES * LANES;
    const bool even = dim % LANES == 0;
    space.resize(size_t(sharing * (2 * dim + room)));
    float *own = space.data(), *sums = own + sharing * dim, *scores = sums + sharing * dim;
    for (int64_t i = 0; i < sharing * dim; ++i)
        own[i] = to_float(query[kv_head * sharing * dim + i]) * layer.scaling;
    for (int64_t g = 0; g < sharing; ++g) {
        const float *mine = own + g * dim;
        float *score = scores + g * room;
        if (even) {
            wide parts[LANES];
            for (auto &part : parts) part = wide{};
            walk(layer, keys, table, begin, end, kv_head, [&](const T *key, int64_t at) {
                wide sum = load(mine) * load(key);
                for (int64_t d = LANES; d < dim; d += LANES) sum += load(mine + d) * load(key + d);
                parts[at % LANES] = sum;
                if (at % LANES == LANES - 1) store(score + at - LANES + 1, sums_of(parts));
            });
            if (count % LANES) store(score + count / LANES * LANES, sums_of(parts));
        } else {
            walk(layer, keys, table, begin, end, kv_head, [&](const T *key, int64_t at) {
                float dot = 0.0f;
                for (int64_t d = 0; d < dim; ++d) dot += mine[d] * to_float(key[d]);
                score[at] = dot;
            });
        }
        softmax(score, count);
    }
    if (even) {
        int64_t g = 0;
        for (; g + 2 <= sharing; g += 2)
            mix_all<T, 2>(layer, values, table, begin, end, kv_head, scores + g * room, room,
                          sums + g * dim);
        for (; g < sharing; ++g)
            mix_all<T, 1>(layer, values, table, begin, end, kv_head, scores + g * room, room,
                          sums + g * dim);
    } else {
        for (int64_t i = 0; i < sharing * dim; ++i) sums[i] = 0.0f;
        walk(layer, values, table, begin, end, kv_head, [&](const T *value, int64_t at) {
            for (int64_t g = 0; g < sharing; ++g)
                for (int64_t d = 0; d < dim; ++d)
                    sums[g * dim + d] += scores[g * room + at] * to_float(value[d]);
        });
    }
    for (int64_t i = 0; i < sharing * dim; ++i)
        from_float(sums[i], &out[kv_head * sharing * dim + i]);
}

template <typename T, int D>
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
            decode_one<T, D>(layer, query + rows[i] * layer.query_stride,
                             out + rows[i] * layer.out_stride, keys, values,
                             tables + i * table_stride, begins[i], ends[i], item % layer.kv_heads,
                             space);
        }
    }
}

template <typename T, typename... More>
void decode_by_dim(const Layer &layer, More... more) {
    switch (layer.dim) {
    case 32: return decode_all<T, 32>(layer, more...);
    case 64: return decode_all<T, 64>(layer, more...);
    case 80: return decode_all<T, 80>(layer, more...);
    case 96: return decode_all<T, 96>(layer, more...);
    case 128: return decode_all<T, 128>(layer, more...);
    case 256: return decode_all<T, 256>(layer, more...);
    default: return decode_all<T, 0>(layer, more...);
    }
}

#ifdef BATON_DOT_BF16

constexpr int64_t QUERIES = 32, KEYS = 512;  // of one tile

inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

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

struct Tile {
    std::vector<uint32_t> query, weights;
    std::vector<float> scores, sums;
    float top[QUERIES], total[QUERIES];
};

// Queries [first, last) of one head; their positions follow `start`. Keys are packed from `origin`.
void prefill_tile(const Layer &layer, const bf16 *query, bf16 *out, const uint32_t *keys,
                  const uint32_t *values, int64_t padded, int64_t origin, int64_t start,
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
    begin = begin > 0 ? begin / 32 * 32 : 0;
    for (int64_t k = begin; k < stop; k += KEYS) {
        const int64_t some = stop - k < KEYS ? stop - k : KEYS, width = (some + 31) / 32 * 32;
        multiply(t.query.data(), pairs, keys + k, padded, rows, width, pairs, t.scores.data(),
                 KEYS, false);
        for (int64_t i = 0; i < count; ++i) {
            float *row = &t.scores[size_t(i * KEYS)];
            uint16_t *weight = reinterpret_cast<uint16_t *>(&t.weights[size_t(i * KEYS / 2)]);
            const int64_t position = start + first + i - origin;
            int64_t low = window ? position - window + 1 - k : 0, high = position + 1 - k;
            low = low < 0 ? 0 : (low > width ? width : low);
            high = high > some ? some : high;
            if (low >= high) {
                std::memset(weight, 0, size_t(width) * 2);
                continue;
            }
            float top = t.top[i], total = 0.0f;
#pragma omp simd reduction(max : top)
            for (int64_t j = low; j < high; ++j) {
                row[j] *= layer.scaling;
                top = row[j] > top ? row[j] : top;
            }
            const float shrink = exp_negative(t.top[i] - top);
#pragma omp simd reduction(+ : total)
            for (int64_t j = low; j < high; ++j) {
                row[j] = exp_negative(row[j] - top);
                total += row[j];
            }
            std::memset(weight, 0, size_t(low) * 2);
            for (int64_t j = low; j < high; ++j) weight[j] = rounded(row[j]);
            std::memset(weight + high, 0, size_t(width - high) * 2);
            if (shrink != 1.0f)
                for (int64_t d = 0; d < dim; ++d) t.sums[size_t(i * dim + d)] *= shrink;
            t.total[i] = t.total[i] * shrink + total;
            t.top[i] = top;
        }
        multiply(t.weights.data(), KEYS / 2, values + k / 2 * dim, dim, rows, dim, width / 2,
                 t.sums.data(), dim, true);
    }
    for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < dim; ++d)
            from_float(t.sums[size_t(i * dim + d)] / t.total[i],
                       out + (first + i) * layer.out_stride + head * dim + d);
}

// Keys as [dim / 2, padded, 2], values as [padded / 2, dim, 2]: what `multiply` reads.
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
        for (int64_t e = 0; e < 2; ++e)
            for (int64_t p = 0; p < pairs; ++p) {
                uint32_t both = 0;
                if (key[e]) std::memcpy(&both, key[e] + 2 * p, 4);
                packed_keys[p * padded + j + e] = both;
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
    const int64_t padded = (kv_len - origin + 31) / 32 * 32;
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
            prefill_tile(layer, query, out, all + 2 * h * size, all + (2 * h + 1) * size, padded,
                         origin, start, first, last, window, head, tile);
        }
    }
}

#endif

// out = weight * rounded(x / rms(x)), rounded again: as models that compute the norm in float32.
template <typename T>
void rms_norm(const T *x, const T *weight, T *out, int64_t rows, int64_t dim, float epsilon) {
    for (int64_t r = 0; r < rows; ++r) {
        const T *from = x + r * dim;
        T *to = out + r * dim;
        float square = 0.0f;
#pragma omp simd reduction(+ : square)
        for (int64_t d = 0; d < dim; ++d) square += to_float(from[d]) * to_float(from[d]);
        const float scale = 1.0f / std::sqrt(square / float(dim) + epsilon);
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) {
            T unit;
            from_float(to_float(from[d]) * scale, &unit);
            from_float(to_float(unit) * to_float(weight[d]), &to[d]);
        }
    }
}

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
        decode_by_dim<float>(layer, static_cast<const float *>(query), static_cast<float *>(out),
                             static_cast<const float *>(keys), static_cast<const float *>(values),
                             batch, rows, tables, table_stride, begins, ends, threads);
    else
        decode_by_dim<bf16>(layer, static_cast<const bf16 *>(query), static_cast<bf16 *>(out),
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
