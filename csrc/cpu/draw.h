// The draw: of each row of logits one token, as penstock/sampling says it. Its rules are stated in exact numbers; here most
// decisions are made with rough ones, and a row in which the difference could count is left undecided.
#pragma once

#include <algorithm>
#include <cmath>

#include "functions.h"
#include "kernels.h"
#include "pool.h"

namespace penstock::PENSTOCK_ISA {

// Philox4x32-10 (Salmon et al. 2011) for ``count`` counters that differ in their first word: words of counter i at out[lane][i].
constexpr int QUADS = 64;
struct Noise {
    uint32_t lane[4][QUADS];
};
INLINE void philox(uint32_t first, int count, const DrawSite& site, Noise& out) {
    uint32_t c0[QUADS], c1[QUADS], c2[QUADS], c3[QUADS];
    for (int i = 0; i < count; i++) {
        c0[i] = first + (uint32_t)i, c1[i] = (uint32_t)site.position, c2[i] = (uint32_t)site.sample, c3[i] = (uint32_t)site.high;
    }
    uint32_t k0 = (uint32_t)site.low, k1 = (uint32_t)site.middle;
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        for (int i = 0; i < count; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c1[i] = (uint32_t)p1, c3[i] = (uint32_t)p0;
        }
    }
    std::memcpy(out.lane[0], c0, sizeof c0), std::memcpy(out.lane[1], c1, sizeof c1);
    std::memcpy(out.lane[2], c2, sizeof c2), std::memcpy(out.lane[3], c3, sizeof c3);
}

inline double uniform(int64_t token, const DrawSite& site) {
    Noise noise;
    philox((uint32_t)(token / 4), 1, site, noise);
    return ((double)noise.lane[token % 4][0] + 0.5) * 0x1p-32;
}

// A token that may be drawn.
struct Candidate {
    int64_t token;
    double gap;  // its scaled logit less the row's largest
};

INLINE float largest(F a) {
    float lanes[LANES];
    store(lanes, a);
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] = std::max(lanes[i], lanes[i + width]);
    }
    return lanes[0];
}

class Draw {
public:
    Draw(const float* logits, int64_t size, const DrawLimits& limits, const DrawSite& site)
        : logits_(logits), size_(size), limits_(limits), site_(site) {}

    int64_t token() {
        F sums = splat(0);  // in which NaN stays NaN, and infinity infinite
        for (int64_t block = 0; block * BLOCK_OF_ROW < size_; block++) {
            const float* at = logits_ + block * BLOCK_OF_ROW;
            int64_t count = std::min(BLOCK_OF_ROW, size_ - block * BLOCK_OF_ROW);
            float padded[BLOCK_OF_ROW];
            for (int64_t i = 0; count < BLOCK_OF_ROW && i < BLOCK_OF_ROW; i++) padded[i] = at[std::min(i, count - 1)];
            if (count < BLOCK_OF_ROW) at = padded;
            F a = load(at), b = load(at + LANES), c = load(at + 2 * LANES), d = load(at + 3 * LANES);
            sums = sums + ((a + b) + (c + d));
            maxima_.push_back(largest(max(max(a, b), max(c, d))));
            largest_ = std::max(largest_, maxima_.back());
        }
        float lanes[LANES];
        store(lanes, sums);
        for (float lane : lanes) {
            if (std::isnan(lane) || (limits_.ruled == 0 && std::isinf(lane))) return UNDECIDED;
        }
        if (!std::isfinite(largest_)) return UNDECIDED;
        if (limits_.temperature == 0) return first_of_largest();
        if (limits_.temperature < 1e-6) return UNDECIDED;  // where fp32 may overflow
        bool ordered = limits_.top_k < size_ || limits_.top_p <= 1;
        if (ordered ? !take_first() : limits_.min_gap > -INFINITY ? !take_down_to(limits_.min_gap) : !take_finalists()) return UNDECIDED;
        return winner();
    }

private:
    static constexpr int64_t BLOCK_OF_ROW = 64;
    static constexpr size_t MOST = 1 << 14;  // candidates; more are left to the sampler
    static constexpr double MARGIN = 1e-9;  // library logarithms are off by far less
    static constexpr double DOUBT = 1e-9;  // and so are sums of library exponentials, as a share
    static constexpr double ROUGH = 1e-5;  // of those of fp32 ones

    double gap(int64_t token) const {
        return (double)logits_[token] / limits_.temperature - (double)largest_ / limits_.temperature;
    }

    int64_t first_of_largest() const {
        size_t block = 0;
        while (maxima_[block] < largest_) block++;
        int64_t token = (int64_t)block * BLOCK_OF_ROW;
        while (logits_[token] < largest_) token++;
        return token;
    }

    // All candidates with a gap of at least ``least``, by token.
    bool take_down_to(double least) {
        found_.clear();
        // Where a rounded logit is this low, so is the gap.
        double slack = (std::fabs((double)largest_) + 1e3 * limits_.temperature) * 1e-5;
        float floor = (float)std::max((double)largest_ + least * limits_.temperature - slack, -3.4e38);
        for (size_t block = 0; block < maxima_.size(); block++) {
            if (maxima_[block] < floor) continue;
            int64_t first = (int64_t)block * BLOCK_OF_ROW, last = std::min(first + BLOCK_OF_ROW, size_);
            for (int64_t token = first; token < last; token++) {
                if (!(logits_[token] >= floor) || !(gap(token) >= least)) continue;  // nor NaN
                if (found_.size() == MOST) return false;
                found_.push_back({token, gap(token)});
            }
        }
        return true;
    }

    // top_k and then top_p: the beginning of the order of tokens, largest first, ties by id.
    bool take_first() {
        bool endless = limits_.top_k >= size_, rough = endless && limits_.min_gap == -INFINITY;
        double mass = 0;
        if (rough) {
            mass = rough_mass();
            double least = -2, sum = 0;
            for (; sum < limits_.top_p * mass * (1 + ROUGH); least *= 1.25) {
                if (least < -64 || !take_down_to(least)) return false;
                sum = 0;
                for (auto& candidate : found_) sum += std::exp(candidate.gap);
            }
        } else if (endless) {
            if (!take_down_to(limits_.min_gap)) return false;
        } else {
            // The k-th of the blocks' maxima is not above the k-th logit.
            size_t k = std::min<size_t>((size_t)limits_.top_k, maxima_.size());
            Vector<float> order(maxima_);
            std::nth_element(order.begin(), order.begin() + (ptrdiff_t)k - 1, order.end(), std::greater<float>());
            double least = -INFINITY, slack = 1e-6 + 1e-12 * std::fabs((double)largest_) / limits_.temperature;
            if (k == (size_t)limits_.top_k) least = ((double)order[k - 1] - largest_) / limits_.temperature * (1 + 1e-6) - slack;
            if (!take_down_to(std::max(limits_.min_gap, least))) return false;
        }
        // Ties are those of the logits: two may have one gap.
        std::sort(found_.begin(), found_.end(), [&](const Candidate& a, const Candidate& b) {
            float x = logits_[a.token], y = logits_[b.token];
            return x != y ? x > y : a.token < b.token;
        });
        if (!endless && found_.size() > (size_t)limits_.top_k) found_.resize((size_t)limits_.top_k);
        return limits_.top_p > 1 || cut_at_p(mass, rough);
    }

    // Keeps the token that crosses p. Not if it may be another one.
    bool cut_at_p(double mass, bool rough) {
        Vector<double> weights;
        for (auto& candidate : found_) weights.push_back(std::exp(candidate.gap));
        if (!rough) {
            for (double weight : weights) mass += weight;
        }
        double doubt = mass * (rough ? ROUGH : DOUBT), before = -limits_.top_p * mass;
        size_t kept = 0;
        for (; kept < found_.size() && before < doubt; kept++) {
            if (kept && before > -doubt) return false;
            before += weights[kept];
        }
        found_.resize(kept);
        return true;
    }

    // The weights of all tokens together, within a share of ROUGH.
    double rough_mass() const {
        F scale = splat((float)(1 / limits_.temperature)), top = splat(largest_);
        double sums[LANES] = {};
        for (size_t block = 0; block < maxima_.size(); block++) {
            int64_t first = (int64_t)block * BLOCK_OF_ROW, count = std::min(BLOCK_OF_ROW, size_ - first);
            F sum = splat(0);
            for (int64_t i = 0; i < count; i += LANES) {
                float some[LANES];
                for (int64_t j = 0; j < LANES; j++) some[j] = i + j < count ? logits_[first + i + j] : -INFINITY;
                sum = sum + exp_of_negative((load(count - i < LANES ? some : logits_ + first + i) - top) * scale);
            }
            float lanes[LANES];
            store(lanes, sum);
            for (int lane = 0; lane < LANES; lane++) sums[lane] += lanes[lane];
        }
        double sum = 0;
        for (double lane : sums) sum += lane;
        return sum;
    }

    // Without limits any token may win. A token arrives after -ln u / weight, the first one is drawn, and 1 - u <= -ln u <=
    // (1 - u) / u: what cannot arrive before the earliest "late" is out (sampling/gumbel.py).
    bool take_finalists() {
        Vector<float> early;  // of found_
        float last = INFINITY, scale = (float)(1 / limits_.temperature);
        for (int64_t first = 0; first < size_; first += 4 * QUADS) {
            int count = (int)std::min<int64_t>(4 * QUADS, size_ - first);
            // 1 - u is never below 2^-33.
            float most = -INFINITY;
            for (int64_t b = first / BLOCK_OF_ROW; b < (first + count + BLOCK_OF_ROW - 1) / BLOCK_OF_ROW; b++) most = std::max(most, maxima_[(size_t)b]);
            if (1.1641532e-10f * std::exp(std::min(80.0f, (largest_ - most) * scale)) > last) continue;
            Noise noise;
            philox((uint32_t)(first / 4), QUADS, site_, noise);
            float c[4 * QUADS], arrivals[4 * QUADS];
            for (int i = 0; i < QUADS; i++) {
                for (int lane = 0; lane < 4; lane++) c[4 * i + lane] = (float)(~noise.lane[lane][i]) * 0x1p-32f + 0x1p-33f;
            }
            for (int i = 0; i < 4 * QUADS; i += LANES) {
                float some[LANES];
                for (int j = 0; i + LANES > count && j < LANES; j++) some[j] = i + j < count ? logits_[first + i + j] : -INFINITY;
                F gap = (splat(largest_) - load(i + LANES > count ? some : logits_ + first + i)) * splat(scale);
                store(arrivals + i, exp(min(gap, splat(80.0f))) * load(c + i));
            }
            F least = load(arrivals);
            for (int i = LANES; i < 4 * QUADS; i += LANES) least = min(least, load(arrivals + i));
            if (-largest(splat(0) - least) > last) continue;
            for (int i = 0; i < count; i++) {
                if (arrivals[i] > last) continue;
                float u = (float)noise.lane[i % 4][i / 4] * 0x1p-32f + 0x1p-33f;
                last = std::min(last, 1.001f * arrivals[i] / u);
                if (early.size() == MOST) return false;
                early.push_back(arrivals[i]);
                found_.push_back({first + i, 0});
            }
        }
        size_t kept = 0;
        for (size_t i = 0; i < early.size(); i++) {
            if (early[i] <= last) found_[kept++] = {found_[i].token, gap(found_[i].token)};
        }
        found_.resize(kept);
        return true;
    }

    // The candidate with the largest gap + noise, unless another one comes too near.
    int64_t winner() const {
        double best = -INFINITY, second = -INFINITY;
        int64_t token = UNDECIDED;
        for (auto& candidate : found_) {
            double score = candidate.gap - std::log(-std::log(uniform(candidate.token, site_)));
            if (score > best) {
                second = best, best = score, token = candidate.token;
            } else {
                second = std::max(second, score);
            }
        }
        return best - second > 2 * MARGIN ? token : UNDECIDED;
    }

    const float* logits_;
    int64_t size_;
    const DrawLimits& limits_;
    const DrawSite& site_;
    float largest_ = -INFINITY;
    Vector<float> maxima_;
    Vector<Candidate> found_;
};

inline void draw_rows(const Draws& a) {
    parallel(a.rows, [&](int64_t row, int) {
        WithDenormals guard;  // the sampler tells them apart
        a.tokens[row] = Draw(a.logits + row * a.size, a.size, a.limits[row], a.sites[row]).token();
    });
}

}  // namespace penstock::PENSTOCK_ISA
