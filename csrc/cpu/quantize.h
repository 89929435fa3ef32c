// Plain weights to small integers, with the bits of penstock/quant/grouped.py. Lanes run over groups, so that a group's
// sums have the order written there on every instruction set.
#pragma once

#include "quantized.h"

namespace penstock::PENSTOCK_ISA {

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

// Of sixteen groups: their scales as stored, whole zeros, and the squared error that they leave.
struct Tried {
    F scale, zero, error;
};
INLINE Tried better(Tried next, Tried best) {
    return {less(next.error, best.error, next.scale, best.scale), less(next.error, best.error, next.zero, best.zero),
            less(next.error, best.error, next.error, best.error)};
}

INLINE F four_code(F w, F factor, F zero) { return clamp(round(w * factor + zero), 0, 15); }

// The scale that fits best the codes made with this one, and what it leaves.
INLINE Tried fitted(int group, const F* w, F scale, F zero) {
    F codes[MAX_GROUP], factor = inverse(halved(scale));
    for (int k = 0; k < group; k++) codes[k] = four_code(w[k], factor, zero) - zero;
    F square = tree_sum(group, [&](int k) { return codes[k] * codes[k]; });
    F slope = tree_sum(group, [&](int k) { return w[k] * codes[k]; }) / square;
    scale = halved(less(splat(0), square, slope, scale));
    factor = inverse(scale);
    F error = tree_sum(group, [&](int k) {
        F wrong = (four_code(w[k], factor, zero) - zero) * scale - w[k];
        return wrong * wrong;
    });
    return {scale, zero, error};
}

INLINE Tried best_four(int group, const F* w) {
    F low = splat(0), high = splat(0);
    for (int k = 0; k < group; k++) low = min(low, w[k]), high = max(high, w[k]);
    F middle = (low + high) * splat(0.5f), range = high - low;
    Tried best{};
    for (int step = 0; step < 8; step++) {
        F scale = range * splat((float)((25 - step) / 24.0 / 15));
        F zero = clamp(round(splat(7.5f) - middle * inverse(scale)), 0, 15);
        Tried next = fitted(group, w, scale, zero);
        best = step ? better(next, best) : next;
    }
    for (int refit = 0; refit < 2; refit++) best = better(fitted(group, w, best.scale, best.zero), best);
    return best;
}

INLINE F best_eight(int group, const F* w) {
    F most = splat(0);
    for (int k = 0; k < group; k++) most = max(most, absolute(w[k]));
    Tried best{};
    for (int steps = 127; steps > 119; steps--) {
        F scale = halved(most / splat((float)steps)), factor = inverse(scale);
        F error = tree_sum(group, [&](int k) {
            F wrong = clamp(round(w[k] * factor), -127, 127) * scale - w[k];
            return wrong * wrong;
        });
        best = steps < 127 ? better({scale, scale, error}, best) : Tried{scale, scale, error};
    }
    return best.scale;
}

// Number k of each of at most sixteen groups side by side.
template <class T>
INLINE void side_by_side(const T* from, int groups, int group, F* w) {
    float row[MAX_GROUP];
    auto* lanes = (float*)w;
    for (int lane = 0; lane < groups; lane++) {
        for (int k = 0; k < group; k += LANES) store(row + k, load(from + lane * group + k));
        for (int k = 0; k < group; k++) lanes[k * LANES + lane] = row[k];
    }
}

template <class T>
__attribute__((noinline)) void four_bits(const T* from, int groups, int group, uint8_t* codes, fp16* scales, uint8_t* zeros) {
    F w[MAX_GROUP] = {};
    float column[LANES];
    side_by_side(from, groups, group, w);
    Tried best = best_four(group, w);
    F factor = inverse(best.scale);
    for (int k = 0; k < group; k++) {
        store(column, four_code(w[k], factor, best.zero));
        for (int lane = 0; lane < groups; lane++) codes[lane * group + k] = (uint8_t)column[lane];
    }
    store_some(scales, best.scale, groups);
    store(column, best.zero * splat(16));
    for (int lane = 0; lane < groups; lane++) zeros[lane] = (uint8_t)column[lane];
}

template <class T>
__attribute__((noinline)) void eight_bits(const T* from, int groups, int group, int8_t* codes, fp16* scales) {
    F w[MAX_GROUP] = {};
    float factors[LANES];
    side_by_side(from, groups, group, w);
    F scale = best_eight(group, w);
    store_some(scales, scale, groups);
    store(factors, inverse(scale));
    for (int lane = 0; lane < groups; lane++) {
        F factor = splat(factors[lane]);
        for (int k = lane * group; k < (lane + 1) * group; k += LANES) {
            store_codes(codes + k, to_whole(clamp(load(from + k) * factor, -127, 127)));
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
