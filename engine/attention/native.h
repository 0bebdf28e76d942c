// What the CPU kernels share: numbers, vectors, attention of one token, a norm.
#pragma once
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
        if (at + count < end) {  // the next block is elsewhere in memory, perhaps in another page
            const char *next = reinterpret_cast<const char *>(
                base + table[(at + count) / layer.block_size] * layer.block_stride +
                kv_head * layer.head_stride);
            for (int64_t line = 0; line < layer.block_size * layer.dim * int64_t(sizeof(T));
                 line += 64)
                __builtin_prefetch(next + line);
        }
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

#ifdef BATON_DOT_BF16

inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// Unscaled scores of `N` heads, `room` apart; D, the head size, is a multiple of 32.
template <int N, int D>
void score(const Layer &layer, const bf16 *query, const bf16 *keys, const int64_t *table,
           int64_t begin, int64_t end, int64_t kv_head, float *scores, int64_t room) {
    __m512i own[N][D / 32];
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < D / 32; ++c) own[n][c] = _mm512_loadu_si512(query + n * D + 32 * c);
    wide parts[N][LANES] = {};
    walk(layer, keys, table, begin, end, kv_head, [&](const bf16 *key, int64_t at) {
        __m512 sums[N];
        for (int n = 0; n < N; ++n) sums[n] = _mm512_setzero_ps();
        for (int c = 0; c < D / 32; ++c) {
            const __m512i column = _mm512_loadu_si512(key + 32 * c);
            for (int n = 0; n < N; ++n) sums[n] = dot(sums[n], own[n][c], column);
        }
        for (int n = 0; n < N; ++n) parts[n][at % LANES] = (wide)sums[n];
        if (at % LANES == LANES - 1)
            for (int n = 0; n < N; ++n) store(scores + n * room + at - LANES + 1, sums_of(parts[n]));
    });
    const int64_t count = end - begin;
    if (count % LANES)
        for (int n = 0; n < N; ++n) store(scores + n * room + count / LANES * LANES, sums_of(parts[n]));
}

// Sums of values by the weights of `N` heads, `room` apart: two tokens at a time, 32 columns each.
template <int N, int D>
void mix_pairs(const Layer &layer, const bf16 *values, const int64_t *table, int64_t begin,
               int64_t end, int64_t kv_head, const uint16_t *weights, int64_t room, float *out) {
    constexpr int C = D / 32;
    __m512 low[N][C], high[N][C];
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) low[n][c] = high[n][c] = _mm512_setzero_ps();
    const bf16 *before = nullptr;
    const auto add = [&](const bf16 *first, const bf16 *second, int64_t at) {
        __m512i pair[N];
        for (int n = 0; n < N; ++n) {
            int32_t both;
            std::memcpy(&both, weights + n * room + at, 4);
            pair[n] = _mm512_set1_epi32(both);
        }
        for (int c = 0; c < C; ++c) {
            const __m512i a = _mm512_loadu_si512(first + 32 * c);
            const __m512i b = _mm512_loadu_si512(second + 32 * c);
            const __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
            for (int n = 0; n < N; ++n) {
                low[n][c] = dot(low[n][c], even, pair[n]);
                high[n][c] = dot(high[n][c], odd, pair[n]);
            }
        }
    };
    walk(layer, values, table, begin, end, kv_head, [&](const bf16 *value, int64_t at) {
        if (at % 2) add(before, value, at - 1);
        before = value;
    });
    if ((end - begin) % 2) add(before, before, end - begin - 1);  // the second weight is 0
    // `low` has columns 0 to 3 of each eight, `high` the others.
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) {
            float *to = out + n * D + 32 * c;
            _mm512_storeu_ps(to, _mm512_permutex2var_ps(low[n][c], front, high[n][c]));
            _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(low[n][c], back, high[n][c]));
        }
}

// `decode_one` for `N` of the heads that share a KV head, from head `first` on.
template <int N, int D>
void decode_pairs(const Layer &layer, const bf16 *query, bf16 *out, const bf16 *keys,
                  const bf16 *values, const int64_t *table, int64_t begin, int64_t end,
                  int64_t kv_head, int64_t first, std::vector<float> &space) {
    const int64_t count = end - begin, room = (count + LANES - 1) / LANES * LANES;
    if (int64_t(space.size()) < N * (D + 2 * room)) space.resize(size_t(N * (D + 2 * room)));
    float *sums = space.data(), *scores = sums + N * D;
    uint16_t *weights = reinterpret_cast<uint16_t *>(scores + N * room);
    score<N, D>(layer, query + first * D, keys, table, begin, end, kv_head, scores, room);
    for (int n = 0; n < N; ++n) {
        float *mine = scores + n * room;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) mine[i] *= layer.scaling;
        softmax(mine, count);
        for (int64_t i = 0; i < count; ++i) weights[n * room + i] = rounded(mine[i]);
        if (count % 2) weights[n * room + count] = 0;
    }
    mix_pairs<N, D>(layer, values, table, begin, end, kv_head, weights, room, sums);
    for (int64_t i = 0; i < N * D; ++i) from_float(sums[i], &out[first * D + i]);
}

#endif

// One token's heads that share a KV head, against keys [begin, end) of its table. D: dim, or 0.
template <typename T, int D>
void decode_one(const Layer &layer, const T *query, T *out, const T *keys, const T *values,
                const int64_t *table, int64_t begin, int64_t end, int64_t kv_head,
                std::vector<float> &space) {
    const int64_t dim = D ? D : layer.dim, sharing = layer.heads / layer.kv_heads;
#ifdef BATON_DOT_BF16
    if constexpr (sizeof(T) == 2 && D > 0 && D % 32 == 0 && D <= 128) {
        int64_t head = kv_head * sharing;
        const int64_t last = head + sharing;
        for (; head + 4 <= last && D <= 64; head += 4)
            decode_pairs<4, D>(layer, query, out, keys, values, table, begin, end, kv_head, head,
                               space);
        for (; head + 2 <= last; head += 2)
            decode_pairs<2, D>(layer, query, out, keys, values, table, begin, end, kv_head, head,
                               space);
        for (; head < last; ++head)
            decode_pairs<1, D>(layer, query, out, keys, values, table, begin, end, kv_head, head,
                               space);
        return;
    }
#endif
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

// `decode_one`, for common head sizes with the size known to the compiler.
template <typename T, typename... More>
void decode_by_dim(const Layer &layer, More &&...more) {
    switch (layer.dim) {
    case 32: return decode_one<T, 32>(layer, more...);
    case 64: return decode_one<T, 64>(layer, more...);
    case 80: return decode_one<T, 80>(layer, more...);
    case 96: return decode_one<T, 96>(layer, more...);
    case 128: return decode_one<T, 128>(layer, more...);
    case 256: return decode_one<T, 256>(layer, more...);
    default: return decode_one<T, 0>(layer, more...);
    }
}

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
