// Norms, rotary embedding and the write to the KV cache: each row by itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "functions.h"
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
INLINE F as_stored(F v) {
    T numbers[LANES];
    store(numbers, v);
    return load(numbers);
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
                if (a.factor != 1) v = as_stored<T>(v * splat(a.factor));
                store_upto(residual + i, load_upto(residual + i, n) + v, n);
                v = load_upto(residual + i, n);  // as stored
            }
            store_upto(numbers + i, v, n);
        }
        if (!a.weight) return;
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

// A head's numbers to codes in [-127, 127], ``step`` apart, and their scale: x = scale * code. The scale is rounded
// before the codes are made with it. Without a finite greatest number it is NaN; below the normal numbers all is 0.
INLINE void quantize(const float* x, int64_t width, int8_t* codes, int64_t step, bf16* scale) {
    F top = splat(0), poison = splat(0);
    for (int64_t i = 0; i < width; i += LANES) {
        F v = load_upto(x + i, width - i);
        top = max(absolute(v), top);
        poison = fma(v, splat(0), poison);  // NaN of infinity and NaN
    }
    store_some(scale, splat(greatest(top) / 127.0f) + splat(sum(poison)), 1);
    float size = value(scale);
    if (!(size >= std::numeric_limits<float>::min())) {
        if (size == size) store_some(scale, splat(0), 1);
        for (int64_t i = 0; i < width; i++) codes[i * step] = 0;
        return;
    }
    F inverse = splat(1.0f / size);
    for (int64_t i = 0; i < width; i += LANES) {
        float numbers[LANES];
        store(numbers, round(load_upto(x + i, width - i) * inverse));
        for (int64_t j = 0; j < LANES && i + j < width; j++) codes[(i + j) * step] = (int8_t)numbers[j];
    }
}

// K and V of one row to their places, keys in fp32. A block holds K as [H, d, B] and V as [H, B, d].
template <class T>
INLINE void write_kv(const Heads& a, const float* keys, const T* values, float* scratch, int64_t slot) {
    int64_t block = slot / a.block_size, inside = slot % a.block_size;
    for (int64_t head = 0; head < a.kv_heads; head++, keys += a.width, values += a.width) {
        int64_t from = (block * a.kv_heads + head) * a.block_size, k_at = from * a.width + inside, v_at = (from + inside) * a.width;
        if (a.k_scales) {
            for (int64_t i = 0; i < a.width; i += LANES) {
                store_upto(scratch + i, load_upto(values + i, a.width - i), a.width - i);
            }
            quantize(keys, a.width, (int8_t*)a.k_pool + k_at, a.block_size, (bf16*)a.k_scales + from + inside);
            quantize(scratch, a.width, (int8_t*)a.v_pool + v_at, 1, (bf16*)a.v_scales + from + inside);
            continue;
        }
        T* k = (T*)a.k_pool + k_at;
        for (int64_t i = 0; i < a.width; i += LANES) {
            T stored[LANES];
            store(stored, load_upto(keys + i, a.width - i));
            for (int64_t j = 0; j < LANES && i + j < a.width; j++) k[(i + j) * a.block_size] = stored[j];
        }
        std::memcpy((T*)a.v_pool + v_at, values, (size_t)a.width * sizeof(T));
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
        T* q = (T*)a.q_out + row * a.heads * a.width;
        int64_t count = a.heads * a.width;
        for (int64_t i = 0; i < count; i += LANES) store_upto(q + i, load_upto(numbers + i, count - i), count - i);
        if (slot >= 0) write_kv(a, keys, qkv + size, numbers, slot);  // q is out: its place is free
    });
}

}  // namespace penstock::PENSTOCK_ISA
