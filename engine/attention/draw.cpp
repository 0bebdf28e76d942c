// Draws tokens from rows of logits: temperature, min-p, top-k, top-p, then the noise of
// engine/noise.py. Of a row's tokens only those get a logarithm whose hash may make them the best.
#include "native.h"

#include <algorithm>

namespace {

constexpr int64_t kChunk = 64;         // tokens looked at together
constexpr float kLeastNoise = -4.0f;   // of a 32-bit draw it is -3.1; -inf where float32 ends
constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr double kWorkOfThread = 1 << 17;  // tokens below which a further thread does not pay

struct Draw {  // as in engine/native_draws.py
    uint64_t seed;  // of the choice
    int64_t position, row, top_k;  // top_k 0: all
    float temperature, log_min_p, top_p, unused;
};

struct Key {
    uint32_t first, second;
};

struct Entry {
    float value;
    int32_t token;
    bool operator<(const Entry &other) const {  // is better
        return value > other.value || (value == other.value && token < other.token);
    }
};

uint64_t splitmix(uint64_t state) {
    state += 0x9E3779B97F4A7C15ull;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
    return state ^ (state >> 31);
}

Key key_of(const Draw &draw) {
    uint64_t mixed = splitmix(splitmix(draw.seed) ^ splitmix(uint64_t(draw.position) + 1));
    return {uint32_t(mixed), uint32_t(mixed >> 32)};
}

inline uint32_t mixed(uint32_t x) {
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= x >> 15;
    x *= 0x735A2D97u;
    return x ^ (x >> 15);
}

inline uint32_t hashed(Key key, uint32_t token) {
    return mixed(mixed(token * 0x9E3779B1u + key.first) + key.second);
}

inline float noise(uint32_t x) {
    float v = (float(x) + 0.5f) * 0x1p-32f;
    return std::max(kLeastNoise, -std::log(-std::log1p(-v)));
}

// At least `noise(x)`. E >= v, and the bits of a float are a line below its logarithm.
inline float most_noise(uint32_t x) {
    float wide = float(x);
    int32_t bits;
    std::memcpy(&bits, &wide, 4);
    return (159.0f - float(bits) * 0x1p-23f) * 0.693147181f + 1e-3f;
}

// One row, scaled by its temperature, without what min-p drops.
class Row {
  public:
    Row(const float *logits, int64_t vocab, const Draw &draw) : vocab_(vocab), draw_(draw) {
        values_.resize(size_t(vocab));
        maxima_.resize(size_t((vocab + kChunk - 1) / kChunk));
        scale(logits);
        if (draw.log_min_p > kNever) drop_below(most() + draw.log_min_p);
    }

    int64_t drawn() {
        bool some = draw_.top_k > 0 && draw_.top_k < vocab_;
        return some || draw_.top_p < 1.0f ? of_kept() : of_all();
    }

  private:
    int64_t end(size_t chunk) const { return std::min(vocab_, int64_t(chunk + 1) * kChunk); }
    float most() const { return *std::max_element(maxima_.begin(), maxima_.end()); }

    void scale(const float *logits) {
        float temperature = draw_.temperature;
        for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
            float best = kNever;
            for (int64_t i = int64_t(chunk) * kChunk; i < end(chunk); ++i) {
                float value = logits[i] / temperature;
                values_[size_t(i)] = value;
                best = value > best ? value : best;
            }
            maxima_[chunk] = best;
        }
    }

    void drop_below(float least) {
        for (float &value : values_) value = value < least ? kNever : value;
    }

    int64_t of_all() const {
        Key key = key_of(draw_);
        float best = kNever;
        int64_t token = 0;
        float most_of[kChunk];
        for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
            int64_t first = int64_t(chunk) * kChunk, count = end(chunk) - first;
            float most = kNever;
            for (int64_t i = 0; i < count; ++i) {
                float bound = values_[size_t(first + i)] + most_noise(hashed(key, uint32_t(first + i)));
                most_of[i] = bound;
                most = bound > most ? bound : most;
            }
            if (!(most > best)) continue;
            for (int64_t i = 0; i < count; ++i) {
                if (!(most_of[i] > best)) continue;
                float value = values_[size_t(first + i)] + noise(hashed(key, uint32_t(first + i)));
                if (value > best) {
                    best = value;
                    token = first + i;
                }
            }
        }
        return token;
    }

    // The best `wanted` tokens, or somewhat fewer, best first, ties by id; whether these are all.
    bool best_first(int64_t wanted, std::vector<Entry> &found) const {
        float least = kNever;
        if (wanted <= int64_t(maxima_.size())) {  // so many chunks have a token as good as this
            std::vector<float> ordered = maxima_;
            std::nth_element(ordered.begin(), ordered.begin() + (wanted - 1), ordered.end(),
                             std::greater<float>());
            least = ordered[size_t(wanted - 1)];
        }
        found.clear();
        for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
            if (maxima_[chunk] < least) continue;
            for (int64_t i = int64_t(chunk) * kChunk; i < end(chunk); ++i) {
                float value = values_[size_t(i)];
                if (value >= least && value > kNever) found.push_back({value, int32_t(i)});
            }
        }
        bool all = least == kNever;
        if (int64_t(found.size()) > wanted) {
            std::nth_element(found.begin(), found.begin() + wanted, found.end());
            found.resize(size_t(wanted));
            all = false;
        }
        std::sort(found.begin(), found.end());
        return all;
    }

    double mass(float most) const {
        constexpr int64_t kLanes = 16;
        double total = 0.0;
        for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
            int64_t i = int64_t(chunk) * kChunk;
            float sums[kLanes] = {};
            for (; i + kLanes <= end(chunk); i += kLanes) {
                for (int64_t lane = 0; lane < kLanes; ++lane) {
                    sums[lane] += exp_negative(values_[size_t(i + lane)] - most);
                }
            }
            for (; i < end(chunk); ++i) sums[0] += exp_negative(values_[size_t(i)] - most);
            for (float sum : sums) total += double(sum);
        }
        return total;
    }

    // How many of `found`, which come after the mass `before`, make up top-p; whether all of it.
    size_t nucleus(const std::vector<Entry> &found, float most, double before, double enough,
                   bool &reached) const {
        for (size_t rank = 0; rank < found.size(); ++rank) {
            if (before >= enough && before > 0.0) {  // the best token always stays
                reached = true;
                return rank;
            }
            before += double(exp_negative(found[rank].value - most));
        }
        reached = before >= enough;
        return found.size();
    }

    int64_t of_kept() {
        std::vector<Entry> found;
        bool reached = false;
        if (draw_.top_k > 0 && draw_.top_k < vocab_) {
            best_first(draw_.top_k, found);
            if (draw_.top_p < 1.0f && !found.empty()) {
                double total = 0.0;
                float most = found[0].value;
                for (const Entry &entry : found) total += double(exp_negative(entry.value - most));
                found.resize(nucleus(found, most, 0.0, draw_.top_p * total, reached));
            }
            return of_these(found);
        }
        float most = this->most();
        double enough = draw_.top_p * mass(most);
        for (int64_t wanted = 128; wanted <= 1024; wanted *= 8) {
            bool all = best_first(wanted, found);
            size_t kept = nucleus(found, most, 0.0, enough, reached);
            if (!reached && !all) continue;
            found.resize(kept);
            return of_these(found);
        }
        drop_but_nucleus(most, enough);
        return of_all();
    }

    // For flat rows, whose nucleus is large: sums by value, and only where these reach it a sort.
    void drop_but_nucleus(float most, double enough) {
        constexpr int32_t kBins = 1024;
        auto bin_of = [most](float value) {
            return int32_t(std::min(float(kBins - 1), (most - value) * 32.0f));
        };
        std::vector<double> sums(kBins, 0.0);
        for (float value : values_) sums[size_t(bin_of(value))] += double(exp_negative(value - most));
        double before = 0.0;
        int32_t edge = 0;
        while (edge < kBins - 1 && before + sums[size_t(edge)] < enough) {
            before += sums[size_t(edge++)];
        }
        std::vector<Entry> found;
        for (int64_t i = 0; i < vocab_; ++i) {
            float &value = values_[size_t(i)];
            int32_t bin = bin_of(value);
            if (bin == edge) found.push_back({value, int32_t(i)});
            if (bin >= edge) value = kNever;
        }
        std::sort(found.begin(), found.end());
        bool reached = false;
        found.resize(nucleus(found, most, before, enough, reached));
        for (const Entry &entry : found) values_[size_t(entry.token)] = entry.value;
    }

    int64_t of_these(const std::vector<Entry> &kept) const {
        Key key = key_of(draw_);
        float best = kNever;
        int64_t token = kept.empty() ? 0 : kept[0].token;
        for (const Entry &entry : kept) {
            float value = entry.value + noise(hashed(key, uint32_t(entry.token)));
            if (value > best || (value == best && entry.token < token)) {
                best = value;
                token = entry.token;
            }
        }
        return token;
    }

    int64_t vocab_;
    const Draw &draw_;
    std::vector<float> values_, maxima_;
};

}  // namespace

// One token for each of `count` draws from rows of float32 logits, `stride` values apart.
extern "C" void baton_draw(const float *logits, int64_t stride, int64_t vocab, const Draw *draws,
                           int64_t count, int64_t *tokens, int threads) {
    double work = double(count) * double(vocab) / kWorkOfThread;
    int team = std::max(1, int(std::min({double(threads), double(count), work})));
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
    for (int64_t i = 0; i < count; ++i) {
        tokens[i] = Row(logits + draws[i].row * stride, vocab, draws[i]).drawn();
    }
}
