// Plain weights to small integers, with the bits of penstock/quant/grouped.py. With 4 bits lanes run over groups, so that
// a group's sums have the order written there on every instruction set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "quantized.h"

namespace penstock::PENSTOCK_ISA {

// Denormal numbers count, as they do in torch; the team's threads take them for zeros.
class WithDenormals {
public:
#if defined(__x86_64__)
    WithDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
    ~WithDenormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__)
    WithDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ & ~(1ull << 24)));
    }
    ~WithDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

private:
    uint64_t before_;
#endif
};

// As fp16 holds them.
INLINE F halved(F a) {
    fp16 lanes[LANES];
    store(lanes, a);
    return load(lanes);
}

INLINE F inverse(F scale) { return less(splat(0), scale, splat(1) / scale, splat(0)); }
INLINE F clamp(F a, float low, float high) { return min(max(a, splat(low)), splat(high)); }

// get(from) + ... + get(from + N - 1), neighbours first.
template <int N, class Get>
INLINE F tree(const Get& get, int from) {
    if constexpr (N == 1) {
        return get(from);
    } else {
        return tree<N / 2>(get, from) + tree<N / 2>(get, from + N / 2);
    }
}
template <class Get>
INLINE F tree_sum(int group, const Get& get) {
    F parts[MAX_GROUP / 8];
    for (int i = 0; i < group / 8; i++) parts[i] = tree<8>(get, i * 8);
    for (int left = group / 8; left > 1; left /= 2) {
        for (int i = 0; i < left / 2; i++) parts[i] = parts[2 * i] + parts[2 * i + 1];
    }
    return parts[0];
}

struct FourBits {
    F scale, zero;
};

INLINE FourBits stored(F scale, F lowest) {
    scale = halved(scale);
    return {scale, clamp(round(splat(-16) * lowest * inverse(scale)), 0, 255)};
}

// The codes of sixteen groups, [group].
INLINE void four_codes(int group, const F* w, FourBits by, F* codes) {
    F factor = inverse(by.scale), offset = by.zero * splat(SIXTEENTH);
    for (int k = 0; k < group; k++) codes[k] = clamp(round(w[k] * factor + offset), 0, 15);
}

INLINE FourBits best_four(int group, const F* w) {
    F low = splat(0), high = splat(0), codes[MAX_GROUP], away[MAX_GROUP];
    for (int k = 0; k < group; k++) low = min(low, w[k]), high = max(high, w[k]);
    F middle = (low + high) * splat(0.5f), span = high - low, share = splat(1.0f / (float)group);
    F mean = tree_sum(group, [&](int k) { return w[k]; }) * share;
    for (int k = 0; k < group; k++) away[k] = w[k] - mean;
    FourBits best{};
    F least{};
    for (int step = 0; step < 12; step++) {
        double shrink = 1 - step / 32.0;
        F scale = span * splat((float)(shrink / 15));
        four_codes(group, w, stored(scale, middle - span * splat((float)(shrink / 2))), codes);
        F middle_code = tree_sum(group, [&](int k) { return codes[k]; }) * share;
        F variance = tree_sum(group, [&](int k) {
            F spread = codes[k] - middle_code;
            return spread * spread;
        });
        F slope = tree_sum(group, [&](int k) { return (codes[k] - middle_code) * away[k]; }) / variance;
        slope = less(splat(0), variance, less(splat(0), slope, slope, scale), scale);
        FourBits tried = stored(slope, mean - slope * middle_code);
        four_codes(group, w, tried, codes);
        F offset = tried.zero * splat(SIXTEENTH);
        F error = tree_sum(group, [&](int k) {
            F wrong = (codes[k] - offset) * tried.scale - w[k];
            return wrong * wrong;
        });
        if (step == 0) {
            best = tried, least = error;
            continue;
        }
        best = {less(error, least, tried.scale, best.scale), less(error, least, tried.zero, best.zero)};
        least = less(error, least, error, least);
    }
    return best;
}

// At most sixteen groups, one after the other.
template <class T>
__attribute__((noinline)) void four_bits(const T* from, int groups, int group, uint8_t* codes, fp16* scales, uint8_t* zeros) {
    F w[MAX_GROUP] = {}, coded[MAX_GROUP];
    float row[MAX_GROUP], column[LANES];
    auto* lanes = (float*)w;
    for (int lane = 0; lane < groups; lane++) {
        for (int k = 0; k < group; k += LANES) store(row + k, load(from + lane * group + k));
        for (int k = 0; k < group; k++) lanes[k * LANES + lane] = row[k];
    }
    FourBits best = best_four(group, w);
    four_codes(group, w, best, coded);
    for (int k = 0; k < group; k++) {
        store(column, coded[k]);
        for (int lane = 0; lane < groups; lane++) codes[lane * group + k] = (uint8_t)column[lane];
    }
    store_some(scales, best.scale, groups);
    store(column, best.zero);
    for (int lane = 0; lane < groups; lane++) zeros[lane] = (uint8_t)column[lane];
}

template <class T>
__attribute__((noinline)) void eight_bits(const T* from, int groups, int group, int8_t* codes, fp16* scales) {
    float most[LANES] = {}, factors[LANES];
    F v[MAX_GROUP / LANES];
    for (int lane = 0; lane < groups; lane++) {
        for (int i = 0; i < group / LANES; i++) v[i] = load(from + lane * group + i * LANES);
        int32_t bits = greatest_bits(v, group / LANES);
        std::memcpy(most + lane, &bits, 4);
    }
    F scale = halved(load(most) / splat(127));
    store_some(scales, scale, groups);
    store(factors, inverse(scale));
    for (int lane = 0; lane < groups; lane++) {
        F factor = splat(factors[lane]);
        for (int k = lane * group; k < (lane + 1) * group; k += LANES) {
            store_codes(codes + k, clamp(load(from + k) * factor, -127, 127));
        }
    }
}

template <class T>
void quantize_of(const Plain& a) {
    constexpr int64_t at_once = 16 * LANES;
    int group = a.format.group;
    parallel((a.groups + at_once - 1) / at_once, [&](int64_t item, int) {
        WithDenormals guard;
        for (int64_t g = item * at_once; g < std::min(a.groups, (item + 1) * at_once); g += LANES) {
            int count = (int)std::min<int64_t>(LANES, a.groups - g);
            auto* from = (const T*)a.weight + g * group;
            auto* scales = (fp16*)a.scales + g;
            if (a.format.bits == 8) {
                eight_bits(from, count, group, (int8_t*)a.codes + g * group, scales);
            } else {
                four_bits(from, count, group, (uint8_t*)a.codes + g * group, scales, a.zeros + g);
            }
        }
    });
}

}  // namespace penstock::PENSTOCK_ISA
