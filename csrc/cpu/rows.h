// Norms, rotary embedding and the write to the KV cache: each row by itself.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "pool.h"
#include "vec.h"

namespace penstock::PENSTOCK_ISA {

constexpr int64_t SMALL = 1 << 14;  // numbers worth a thread

// 1 / sqrt(mean of squares + eps).
INLINE float inverse_rms(const float* x, int64_t width, float eps) {
    F sums[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int64_t i = 0; i < width; i += LANES) {
        F v = load_upto(x + i, width - i);
        F& s = sums[i / LANES % 4];
        s = fma(v, v, s);
    }
    float squares = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return 1.0f / std::sqrt(squares / (float)width + eps);
}

template <class T>
INLINE F weights_at(const void* weight, bool wide, int64_t i, int64_t n) {
    return wide ? load_upto((const float*)weight + i, n) : load_upto((const T*)weight + i, n);
}

template <class T>
INLINE void rms_norm(float* x, const void* weight, bool wide, int64_t width, float eps) {
    F factor = splat(inverse_rms(x, width, eps));
    for (int64_t i = 0; i < width; i += LANES) {
        F y = load_upto(x + i, width - i) * factor * weights_at<T>(weight, wide, i, width - i);
        store_upto(x + i, y, width - i);
    }
}

INLINE void centre(float* x, int64_t width) {
    F total = splat(0);
    for (int64_t i = 0; i < width; i += LANES) total = total + load_upto(x + i, width - i);
    F mean = splat(sum(total) / (float)width);
    for (int64_t i = 0; i < width; i += LANES) store_upto(x + i, load_upto(x + i, width - i) - mean, width - i);
}

// Calls work(row, scratch) for each row; ``width`` numbers a row.
template <class Work>
void each_row(int64_t rows, int64_t width, const Work& work) {
    int64_t at_once = std::max<int64_t>(1, std::min(SMALL / std::max<int64_t>(1, width), (rows + 7) / 8));
    parallel((rows + at_once - 1) / at_once, [&](int64_t item, int) {
        static thread_local Vector<float> scratch;
        scratch.resize((size_t)width);
        for (int64_t row = item * at_once; row < std::min(rows, (item + 1) * at_once); row++) work(row, scratch.data());
    });
}

template <class T>
void norm_of(const Norm& a) {
    each_row(a.rows, a.width, [&](int64_t row, float* numbers) {
        const T* x = (const T*)a.x + row * a.width;
        T* out = (T*)a.out + row * a.width;
        T* residual = a.residual ? (T*)a.residual + row * a.width : nullptr;
        for (int64_t i = 0; i < a.width; i += LANES) {
            int64_t n = a.width - i;
            F v = load_upto(x + i, n);
            if (residual) {
                store_upto(residual + i, load_upto(residual + i, n) + v, n);
                v = load_upto(residual + i, n);  // as stored
            }
            store_upto(numbers + i, v, n);
        }
        if (a.centred) centre(numbers, a.width);
        rms_norm<T>(numbers, a.weight, a.wide_weight, a.width, a.eps);
        for (int64_t i = 0; a.bias && i < a.width; i += LANES) {
            int64_t n = a.width - i;
            store_upto(numbers + i, load_upto(numbers + i, n) + weights_at<T>(a.bias, a.wide_weight, i, n), n);
        }
        for (int64_t i = 0; i < a.width; i += LANES) store_upto(out + i, load_upto(numbers + i, a.width - i), a.width - i);
    });
}

INLINE void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t n = half - i;
        F a = load_upto(x + i, n), b = load_upto(x + half + i, n);
        F c = load_upto(cosines + i, n), s = load_upto(sines + i, n);
        store_upto(x + i, a * c - b * s, n);
        store_upto(x + half + i, b * c + a * s, n);
    }
}

template <class T>
void heads_of(const Heads& a) {
    int64_t turned = a.heads + a.kv_heads, all = turned + a.kv_heads;
    each_row(a.rows, all * a.width, [&](int64_t row, float* numbers) {
        const T* qkv = (const T*)a.qkv + row * all * a.width;
        int64_t size = turned * a.width, slot = a.slots[row];
        for (int64_t i = 0; i < size; i += LANES) store_upto(numbers + i, load_upto(qkv + i, size - i), size - i);
        float* keys = numbers + a.heads * a.width;
        if (a.q_weight && a.whole_row) {
            rms_norm<T>(numbers, a.q_weight, a.wide_weight, a.heads * a.width, a.eps);
            rms_norm<T>(keys, a.k_weight, a.wide_weight, a.kv_heads * a.width, a.eps);
        }
        const float* angles = a.rope ? a.rope + a.positions[row] * 2 * a.half : nullptr;
        for (int64_t head = 0; head < turned; head++) {
            float* x = numbers + head * a.width;
            if (a.q_weight && !a.whole_row) {
                rms_norm<T>(x, head < a.heads ? a.q_weight : a.k_weight, a.wide_weight, a.width, a.eps);
            }
            if (a.rope) rotate(x, angles, angles + a.half, a.half);
        }
        auto write = [](const float* from, T* to, int64_t count) {
            for (int64_t i = 0; i < count; i += LANES) store_upto(to + i, load_upto(from + i, count - i), count - i);
        };
        write(numbers, (T*)a.q_out + row * a.heads * a.width, a.heads * a.width);
        if (slot < 0) return;
        int64_t kv_size = a.kv_heads * a.width;
        write(keys, (T*)a.k_pool + slot * kv_size, kv_size);
        std::memcpy((T*)a.v_pool + slot * kv_size, qkv + size, (size_t)kv_size * sizeof(T));
    });
}

}  // namespace penstock::PENSTOCK_ISA
