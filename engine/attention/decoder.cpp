// One token of each of some sequences through a whole decoder of Llama's kind, in one call; and
// what lies between the linear layers and attention when a step has many tokens.
//
// It computes what transformers' modules compute, rounding where they round, without their dozens
// of small calls a layer. Linear weights are read where oneDNN has packed them:
// [out / N][in / V][N][V], V = 2 for bfloat16 and 1 for float32, N = 64 or 32, the last N filled
// with zeros.
// A row's result is the same to the bit whatever the other rows are.
#include "native.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <sched.h>
#include <system_error>
#include <thread>

namespace {

constexpr int64_t BLOCK = 64;  // columns computed together

typedef std::chrono::steady_clock Clock;
constexpr int64_t SPINS = 256;                         // before the processor is offered to others
constexpr auto LINGER = std::chrono::microseconds(500);  // awake after a step: the next may follow

inline void rest() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// Threads that help with chunks of work. Whoever is free takes the next chunk, so one that the
// system has put aside delays nothing but the chunk it is at; its caller never waits for it to come.
class Team {
  public:
    explicit Team(int helpers) {
        try {
            for (int i = 0; i < helpers; ++i) threads_.emplace_back([this, i] { help(i + 1); });
        } catch (const std::system_error &) {  // no more threads for us: fewer help
        }
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> hold(lock_);
            ending_ = true;
        }
        wake_.notify_all();
        for (auto &thread : threads_) thread.join();
    }
    // Helpers stay awake from `begin` to `end`.
    void begin() {
        if (threads_.empty()) return;
        {
            std::lock_guard<std::mutex> hold(lock_);
            awake_.store(true, std::memory_order_relaxed);
        }
        wake_.notify_all();
    }
    void end() { awake_.store(false, std::memory_order_relaxed); }

    // each(chunk, worker) for chunks [0, count), by any of the workers; returns when all is done.
    template <typename Each> void run(int64_t count, Each each) {
        if (threads_.empty() || count < 2) {
            for (int64_t i = 0; i < count; ++i) each(i, 0);
            return;
        }
        call_ = [](void *work, int64_t chunk, int worker) {
            (*static_cast<Each *>(work))(chunk, worker);
        };
        work_ = &each;
        done_.store(0, std::memory_order_relaxed);
        // Stage, number of chunks and next chunk in one word: a claim is of this stage or none.
        ticket_.store(++stage_ << 32 | uint64_t(count) << 16, std::memory_order_release);
        while (take(0)) {
        }
        for (int64_t spins = 0; done_.load(std::memory_order_acquire) < count; ++spins)
            spins < SPINS ? rest() : void(sched_yield());
    }

  private:
    bool take(int worker) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while ((ticket & 0xffff) < (ticket >> 16 & 0xffff))
            if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
                call_(work_, int64_t(ticket & 0xffff), worker);  // theirs until it is done
                done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        return false;
    }
    void help(int worker) {
        for (;;) {
            {
                std::unique_lock<std::mutex> hold(lock_);
                wake_.wait(hold, [this] { return ending_ || awake_.load(); });
                if (ending_) return;
            }
            auto last = Clock::now();  // when there was something to do
            for (int64_t spins = 0;; ++spins) {
                if (take(worker)) spins = -1;
                else if (spins < SPINS) rest();
                else sched_yield();
                if (spins % (spins < SPINS ? SPINS : 16)) continue;
                const auto now = Clock::now();
                if (awake_.load(std::memory_order_relaxed)) last = now;
                else if (now - last > LINGER) break;
            }
        }
    }

    std::vector<std::thread> threads_;
    std::mutex lock_;
    std::condition_variable wake_;
    bool ending_ = false;
    std::atomic<bool> awake_{false};
    std::atomic<uint64_t> ticket_{0};
    std::atomic<int64_t> done_{0};
    uint64_t stage_ = 0;
    void (*call_)(void *, int64_t, int) = nullptr;
    void *work_ = nullptr;
};

template <typename T> struct Linear {
    const T *weight = nullptr, *bias = nullptr;  // packed; [out] or none
    int64_t in = 0, out = 0;
    int64_t together = BLOCK;  // N
    int64_t blocks() const { return (out + BLOCK - 1) / BLOCK; }
};

// The sums of M rows in the 16 * W columns that lie together at `b`.
template <int M, int W>
inline void tile(const float *a, int64_t lda, const float *b, int64_t in, float *out) {
    wide sum[M][W] = {};
    for (int64_t k = 0; k < in; ++k) {
        wide column[W];
        for (int w = 0; w < W; ++w) column[w] = load(b + LANES * (k * W + w));
        for (int m = 0; m < M; ++m)
            for (int w = 0; w < W; ++w) sum[m][w] += a[m * lda + k] * column[w];
    }
    for (int m = 0; m < M; ++m)
        for (int w = 0; w < W; ++w) store(out + m * BLOCK + LANES * w, sum[m][w]);
}

template <int M, int W>
inline void tile(const bf16 *a, int64_t lda, const bf16 *b, int64_t in, float *out) {
#ifdef BATON_DOT_BF16
    __m512 sum[M][W];
    for (int m = 0; m < M; ++m)
        for (int w = 0; w < W; ++w) sum[m][w] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += 2) {
        __m512i column[W];
        for (int w = 0; w < W; ++w) column[w] = _mm512_loadu_si512(b + LANES * (k * W + 2 * w));
        for (int m = 0; m < M; ++m) {
            int32_t both;
            std::memcpy(&both, a + m * lda + k, 4);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
            for (int w = 0; w < W; ++w)
                sum[m][w] = _mm512_dpbf16_ps(sum[m][w], pair, (__m512bh)column[w]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int w = 0; w < W; ++w) _mm512_storeu_ps(out + m * BLOCK + LANES * w, sum[m][w]);
#else
    wide sum[M][W] = {};
    for (int64_t k = 0; k < in; k += 2) {
        wide even[W], odd[W];
        for (int w = 0; w < W; ++w) {
            wide_bits both;
            std::memcpy(&both, b + LANES * (k * W + 2 * w), sizeof both);
            even[w] = (wide)(both << 16);
            odd[w] = (wide)(both & 0xffff0000u);
        }
        for (int m = 0; m < M; ++m) {
            const float first = to_float(a[m * lda + k]), second = to_float(a[m * lda + k + 1]);
            for (int w = 0; w < W; ++w) sum[m][w] += first * even[w] + second * odd[w];
        }
    }
    for (int m = 0; m < M; ++m)
        for (int w = 0; w < W; ++w) store(out + m * BLOCK + LANES * w, sum[m][w]);
#endif
}

template <int W, typename T>
void multiply_columns(const T *a, int64_t rows, const T *b, int64_t in, float *out) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) tile<4, W>(a + r * in, in, b, in, out + r * BLOCK);
    for (; r + 2 <= rows; r += 2) tile<2, W>(a + r * in, in, b, in, out + r * BLOCK);
    for (; r < rows; ++r) tile<1, W>(a + r * in, in, b, in, out + r * BLOCK);
}

// out[rows, 64] = a[rows, in] times one block of columns.
template <typename T>
void multiply_block(const T *a, int64_t rows, const Linear<T> &linear, int64_t block, float *out) {
    const T *b = linear.weight + block * BLOCK * linear.in;
    if (linear.together == BLOCK) {
        multiply_columns<4>(a, rows, b, linear.in, out);
        return;
    }
    multiply_columns<2>(a, rows, b, linear.in, out);
    if (block * BLOCK + BLOCK / 2 < linear.out)
        multiply_columns<2>(a, rows, b + BLOCK / 2 * linear.in, linear.in, out + BLOCK / 2);
}

template <typename T> inline float rounded_to(float x) {
    T y;
    from_float(x, &y);
    return to_float(y);
}

inline float silu(float x) {
    const float e = exp_negative(x < 0.0f ? x : -x);
    return x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// A head's norm, if it has one, and rotary embedding, in place. Cosines and sines: [dim / 2].
template <typename T>
void turn(T *head, const T *norm, int64_t dim, float epsilon, const T *cos, const T *sin) {
    const int64_t half = dim / 2;
    if (norm) rms_norm(head, norm, head, 1, dim, epsilon);
#pragma omp simd
    for (int64_t d = 0; d < half; ++d) {
        const float low = to_float(head[d]), high = to_float(head[d + half]);
        const float c = to_float(cos[d]), s = to_float(sin[d]);
        from_float(rounded_to<T>(low * c) + rounded_to<T>(-high * s), &head[d]);
        from_float(rounded_to<T>(high * c) + rounded_to<T>(low * s), &head[d + half]);
    }
}

// x += y, out = norm(x), row by row; without y only the norm.
template <typename T>
void add_norm(T *x, const T *y, const T *weight, T *out, int64_t rows, int64_t dim, float epsilon,
              int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t r = 0; r < rows; ++r) {
        T *row = x + r * dim;
        if (y)
#pragma omp simd
            for (int64_t d = 0; d < dim; ++d)
                from_float(to_float(row[d]) + to_float(y[r * dim + d]), &row[d]);
        rms_norm(row, weight, out + r * dim, 1, dim, epsilon);
    }
}

// gate = silu(gate) * up.
template <typename T> void gate_up(T *gate, const T *up, int64_t count, int threads) {
#pragma omp parallel for simd num_threads(threads) if (threads > 1 && count > 4096)
    for (int64_t i = 0; i < count; ++i)
        from_float(rounded_to<T>(silu(to_float(gate[i]))) * to_float(up[i]), &gate[i]);
}

struct Decoder {
    virtual ~Decoder() = default;
    virtual void set_linear(int64_t layer, int which, const void *weight, const void *bias,
                            int64_t in, int64_t out, int64_t together) = 0;
    virtual void set_layer(int64_t layer, const void *norms[4], void *keys, void *values,
                           int64_t window) = 0;
    virtual void step(int64_t batch, const int64_t *tokens, const int64_t *positions,
                      const int64_t *rows, const int64_t *tables, int64_t table_stride,
                      const int64_t *ends, float *logits) = 0;
    virtual void turn_all(int64_t layer, void *queries, void *keys, const void *values,
                          const int64_t *positions, const int64_t *rows, int64_t tokens) = 0;
    virtual void add_norm_of(int64_t layer, bool mlp, void *x, const void *y, void *out,
                             int64_t tokens) = 0;
    virtual void gate_all(void *gate, const void *up, int64_t tokens) = 0;
    double attention_s = 0, linear_s = 0;  // spent so far
};

struct Sizes {
    int64_t layers, hidden, heads, kv_heads, dim, mlp, vocab, max_batch;
    int64_t block_size, block_stride, head_stride;
    float epsilon, scaling;
    int threads;
};

enum Which { Q, K, V, O, GATE, UP, DOWN, LINEARS };

template <typename T> class DecoderOf : public Decoder {
    struct OfLayer {
        Linear<T> linears[LINEARS];
        const T *norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be none
        T *keys, *values;
        int64_t window;
    };

  public:
    DecoderOf(const Sizes &sizes, const void *embedding, const void *norm, const void *cos,
              const void *sin)
        : s_(sizes), embedding_(static_cast<const T *>(embedding)),
          norm_(static_cast<const T *>(norm)), cos_(static_cast<const T *>(cos)),
          sin_(static_cast<const T *>(sin)), layers_(size_t(sizes.layers)),
          width_((sizes.heads + 2 * sizes.kv_heads) * sizes.dim),
          x_(size_t(sizes.max_batch * sizes.hidden)), a_(size_t(sizes.max_batch * sizes.hidden)),
          qkv_(size_t(sizes.max_batch * width_)),
          mixed_(size_t(sizes.max_batch * sizes.heads * sizes.dim)),
          h_(size_t(sizes.max_batch * sizes.mlp)), space_(size_t(sizes.threads)),
          sums_(size_t(sizes.threads)), team_(new Team(sizes.threads - 1)) {
        for (auto &sums : sums_) sums.resize(size_t(2 * sizes.max_batch * BLOCK));
    }

    // Layer -1: the head.
    void set_linear(int64_t layer, int which, const void *weight, const void *bias, int64_t in,
                    int64_t out, int64_t together) override {
        Linear<T> &linear = layer < 0 ? head_ : layers_[size_t(layer)].linears[which];
        linear = {static_cast<const T *>(weight), static_cast<const T *>(bias), in, out, together};
    }

    void set_layer(int64_t layer, const void *norms[4], void *keys, void *values,
                   int64_t window) override {
        OfLayer &l = layers_[size_t(layer)];
        l.norm = static_cast<const T *>(norms[0]);
        l.mlp_norm = static_cast<const T *>(norms[1]);
        l.q_norm = static_cast<const T *>(norms[2]);
        l.k_norm = static_cast<const T *>(norms[3]);
        l.keys = static_cast<T *>(keys);
        l.values = static_cast<T *>(values);
        l.window = window;
    }

    void step(int64_t batch, const int64_t *tokens, const int64_t *positions, const int64_t *rows,
              const int64_t *tables, int64_t table_stride, const int64_t *ends,
              float *logits) override {
        team_->begin();
        for (int64_t b = 0; b < batch; ++b)
            std::memcpy(&x_[size_t(b * s_.hidden)], embedding_ + tokens[b] * s_.hidden,
                        size_t(s_.hidden) * sizeof(T));
        for (const OfLayer &layer : layers_) {
            normalize(layer.norm, batch);
            const auto began = Clock::now();
            project(layer, batch);
            const auto projected = Clock::now();
            team_->run(batch * s_.kv_heads, [&](int64_t item, int worker) {
                const int64_t b = item / s_.kv_heads;
                attend(layer, b, item % s_.kv_heads, positions[b], rows[b],
                       tables + b * table_stride, ends[b], space_[size_t(worker)]);
            });
            const auto attended = Clock::now();
            add(layer.linears[O], mixed_.data(), batch);
            const auto added = Clock::now();
            normalize(layer.mlp_norm, batch);
            const auto normalized = Clock::now();
            gate(layer, batch);
            add(layer.linears[DOWN], h_.data(), batch);
            attention_s += seconds(projected, attended);
            linear_s += seconds(began, projected) + seconds(attended, added) +
                        seconds(normalized, Clock::now());
        }
        normalize(norm_, batch);
        const auto began = Clock::now();
        team_->run(head_.blocks(), [&](int64_t block, int worker) {
            float *sums = sums_[size_t(worker)].data();
            multiply_block(a_.data(), batch, head_, block, sums);
            const int64_t first = block * BLOCK, count = columns(head_, block);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t c = 0; c < count; ++c)
                    logits[b * s_.vocab + first + c] =
                        rounded_to<T>(sums[b * BLOCK + c] + bias(head_, first + c));
        });
        linear_s += seconds(began, Clock::now());
        team_->end();
    }

    // Queries [tokens, heads, dim] and keys normed and turned in place, keys and values stored.
    void turn_all(int64_t layer, void *queries, void *keys, const void *values,
                  const int64_t *positions, const int64_t *rows, int64_t tokens) override {
        const OfLayer &l = layers_[size_t(layer)];
        const int64_t dim = s_.dim, half = dim / 2;
#pragma omp parallel for num_threads(s_.threads) if (s_.threads > 1)
        for (int64_t t = 0; t < tokens; ++t) {
            T *query = static_cast<T *>(queries) + t * s_.heads * dim;
            T *key = static_cast<T *>(keys) + t * s_.kv_heads * dim;
            const T *value = static_cast<const T *>(values) + t * s_.kv_heads * dim;
            const T *cos = cos_ + positions[t] * half, *sin = sin_ + positions[t] * half;
            for (int64_t h = 0; h < s_.heads; ++h)
                turn(query + h * dim, l.q_norm, dim, s_.epsilon, cos, sin);
            for (int64_t h = 0; h < s_.kv_heads; ++h) {
                turn(key + h * dim, l.k_norm, dim, s_.epsilon, cos, sin);
                const int64_t place = rows[t] * dim + h * s_.head_stride;
                std::memcpy(l.keys + place, key + h * dim, size_t(dim) * sizeof(T));
                std::memcpy(l.values + place, value + h * dim, size_t(dim) * sizeof(T));
            }
        }
    }

    // x += y (or none), and the norm before a layer's attention or MLP; layer `layers`: the last.
    void add_norm_of(int64_t layer, bool mlp, void *x, const void *y, void *out,
                     int64_t tokens) override {
        const T *weight = norm_;
        if (layer < s_.layers)
            weight = mlp ? layers_[size_t(layer)].mlp_norm : layers_[size_t(layer)].norm;
        add_norm(static_cast<T *>(x), static_cast<const T *>(y), weight, static_cast<T *>(out),
                 tokens, s_.hidden, s_.epsilon, s_.threads);
    }

    void gate_all(void *gate, const void *up, int64_t tokens) override {
        gate_up(static_cast<T *>(gate), static_cast<const T *>(up), tokens * s_.mlp, s_.threads);
    }

  private:
    static double seconds(Clock::time_point from, Clock::time_point to) {
        return std::chrono::duration<double>(to - from).count();
    }
    static int64_t columns(const Linear<T> &linear, int64_t block) {
        const int64_t left = linear.out - block * BLOCK;
        return left < BLOCK ? left : BLOCK;
    }
    static float bias(const Linear<T> &linear, int64_t column) {
        return linear.bias ? to_float(linear.bias[column]) : 0.0f;
    }

    void normalize(const T *weight, int64_t batch) {
        const auto one = [&](int64_t b, int) {
            rms_norm(&x_[size_t(b * s_.hidden)], weight, &a_[size_t(b * s_.hidden)], 1, s_.hidden,
                     s_.epsilon);
        };
        if (batch * s_.hidden >= 8192) team_->run(batch, one);
        else
            for (int64_t b = 0; b < batch; ++b) one(b, 0);
    }

    void project(const OfLayer &layer, int64_t batch) {
        const int64_t q = layer.linears[Q].blocks(), k = layer.linears[K].blocks();
        const int64_t starts[3] = {0, s_.heads * s_.dim, (s_.heads + s_.kv_heads) * s_.dim};
        team_->run(q + k + layer.linears[V].blocks(), [&](int64_t chunk, int worker) {
            const int which = chunk < q ? Q : (chunk < q + k ? K : V);
            const int64_t block = chunk - (which == Q ? 0 : (which == K ? q : q + k));
            const Linear<T> &linear = layer.linears[which];
            float *sums = sums_[size_t(worker)].data();
            multiply_block(a_.data(), batch, linear, block, sums);
            const int64_t first = block * BLOCK, count = columns(linear, block);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t c = 0; c < count; ++c)
                    from_float(sums[b * BLOCK + c] + bias(linear, first + c),
                               &qkv_[size_t(b * width_ + starts[which] + first + c)]);
        });
    }

    // x += linear(a).
    void add(const Linear<T> &linear, const T *a, int64_t batch) {
        team_->run(linear.blocks(), [&](int64_t block, int worker) {
            float *sums = sums_[size_t(worker)].data();
            multiply_block(a, batch, linear, block, sums);
            const int64_t first = block * BLOCK, count = columns(linear, block);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t c = 0; c < count; ++c) {
                    T *x = &x_[size_t(b * s_.hidden + first + c)];
                    const float y = rounded_to<T>(sums[b * BLOCK + c] + bias(linear, first + c));
                    from_float(to_float(*x) + y, x);
                }
        });
    }

    void gate(const OfLayer &layer, int64_t batch) {
        const Linear<T> &gates = layer.linears[GATE], &ups = layer.linears[UP];
        team_->run(gates.blocks(), [&](int64_t block, int worker) {
            float *sums = sums_[size_t(worker)].data(), *others = sums + batch * BLOCK;
            multiply_block(a_.data(), batch, gates, block, sums);
            multiply_block(a_.data(), batch, ups, block, others);
            const int64_t first = block * BLOCK, count = columns(gates, block);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t c = 0; c < count; ++c) {
                    const float g = rounded_to<T>(sums[b * BLOCK + c] + bias(gates, first + c));
                    const float u = rounded_to<T>(others[b * BLOCK + c] + bias(ups, first + c));
                    from_float(rounded_to<T>(silu(g)) * u, &h_[size_t(b * s_.mlp + first + c)]);
                }
        });
    }

    // One token's heads that share a KV head: turned, its key and value stored, attended.
    void attend(const OfLayer &layer, int64_t b, int64_t kv_head, int64_t position, int64_t row,
                const int64_t *table, int64_t end, std::vector<float> &space) {
        const int64_t dim = s_.dim, sharing = s_.heads / s_.kv_heads;
        T *query = &qkv_[size_t(b * width_)];
        T *key = query + (s_.heads + kv_head) * dim, *value = key + s_.kv_heads * dim;
        for (int64_t g = 0; g < sharing; ++g)
            turn(query + (kv_head * sharing + g) * dim, layer.q_norm, dim, s_.epsilon,
                 cos_ + position * dim / 2, sin_ + position * dim / 2);
        turn(key, layer.k_norm, dim, s_.epsilon, cos_ + position * dim / 2,
             sin_ + position * dim / 2);
        const int64_t place = row * dim + kv_head * s_.head_stride;
        std::memcpy(layer.keys + place, key, size_t(dim) * sizeof(T));
        std::memcpy(layer.values + place, value, size_t(dim) * sizeof(T));
        const Layer shape{s_.heads,       s_.kv_heads, dim, s_.block_size, s_.block_stride,
                          s_.head_stride, 0,           0,   s_.scaling};
        const int64_t begin = layer.window && end > layer.window ? end - layer.window : 0;
        decode_by_dim<T>(shape, query, &mixed_[size_t(b * s_.heads * dim)], layer.keys,
                         layer.values, table, begin, end, kv_head, space);
    }

    const Sizes s_;
    const T *embedding_, *norm_, *cos_, *sin_;
    std::vector<OfLayer> layers_;
    Linear<T> head_;
    const int64_t width_;  // of a token's queries, keys and values
    std::vector<T> x_, a_, qkv_, mixed_, h_;
    std::vector<std::vector<float>> space_, sums_;  // of each worker
    std::unique_ptr<Team> team_;
};

template <typename T>
void one_row(const void *x, const void *weight, int64_t in, int64_t out, int64_t together,
             float *y) {
    const Linear<T> linear{static_cast<const T *>(weight), nullptr, in, out, together};
    for (int64_t block = 0; block < linear.blocks(); ++block) {
        float sums[BLOCK];
        multiply_block(static_cast<const T *>(x), 1, linear, block, sums);
        const int64_t left = out - block * BLOCK;
        std::memcpy(y + block * BLOCK, sums, size_t(left < BLOCK ? left : BLOCK) * sizeof(float));
    }
}

}  // namespace

extern "C" {

// `kind`: 0 float32, 1 bfloat16. `sizes`: as in `Sizes`, without the last three. Cosines and sines
// are [positions, dim / 2]. Nothing is copied; free it with `baton_decoder_free`.
void *baton_decoder_new(int kind, const int64_t *sizes, float epsilon, float scaling, int threads,
                        const void *embedding, const void *norm, const void *cos, const void *sin) {
    const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3],  sizes[4], sizes[5], sizes[6],
                  sizes[7], sizes[8], sizes[9], sizes[10], epsilon,  scaling,  threads};
    Decoder *made = nullptr;
    if (kind == 0) made = new DecoderOf<float>(s, embedding, norm, cos, sin);
    else made = new DecoderOf<bf16>(s, embedding, norm, cos, sin);
    return made;
}

void baton_decoder_free(void *decoder) { delete static_cast<Decoder *>(decoder); }

// `which`: q, k, v, o, gate, up, down; layer -1 is the head. `bias` may be none.
void baton_decoder_linear(void *decoder, int64_t layer, int which, const void *weight,
                          const void *bias, int64_t in, int64_t out, int64_t together) {
    static_cast<Decoder *>(decoder)->set_linear(layer, which, weight, bias, in, out, together);
}

// Of a step with many tokens: see DecoderOf.
void baton_decoder_turn(void *decoder, int64_t layer, void *queries, void *keys, const void *values,
                        const int64_t *positions, const int64_t *rows, int64_t tokens) {
    static_cast<Decoder *>(decoder)->turn_all(layer, queries, keys, values, positions, rows,
                                              tokens);
}

void baton_decoder_norm(void *decoder, int64_t layer, int mlp, void *x, const void *y, void *out,
                        int64_t tokens) {
    static_cast<Decoder *>(decoder)->add_norm_of(layer, mlp != 0, x, y, out, tokens);
}

void baton_decoder_gate(void *decoder, void *gate, const void *up, int64_t tokens) {
    static_cast<Decoder *>(decoder)->gate_all(gate, up, tokens);
}

// Seconds spent in attention, rotary embedding included, and in linear layers, so far.
void baton_decoder_seconds(void *decoder, double *attention, double *linear) {
    *attention = static_cast<Decoder *>(decoder)->attention_s;
    *linear = static_cast<Decoder *>(decoder)->linear_s;
}

// One row through one linear layer without its bias: whether its weights lie as believed.
void baton_linear(int kind, const void *x, const void *weight, int64_t in, int64_t out,
                  int64_t together, float *y) {
    if (kind == 0) one_row<float>(x, weight, in, out, together, y);
    else one_row<bf16>(x, weight, in, out, together, y);
}

// Norms before attention and MLP, and of query and key heads (or none); window 0: none.
void baton_decoder_layer(void *decoder, int64_t layer, const void *norm, const void *mlp_norm,
                         const void *q_norm, const void *k_norm, void *keys, void *values,
                         int64_t window) {
    const void *norms[4] = {norm, mlp_norm, q_norm, k_norm};
    static_cast<Decoder *>(decoder)->set_layer(layer, norms, keys, values, window);
}

// `rows` are the tokens' rows in the cache, `ends` their sequences' lengths, this token included.
// `logits` is [batch, vocab].
void baton_decoder_step(void *decoder, int64_t batch, const int64_t *tokens,
                        const int64_t *positions, const int64_t *rows, const int64_t *tables,
                        int64_t table_stride, const int64_t *ends, float *logits) {
    static_cast<Decoder *>(decoder)->step(batch, tokens, positions, rows, tables, table_stride,
                                          ends, logits);
}

}  // extern "C"
