// Mixture of experts: which experts a row has, and the rows of each expert. What a row becomes depends on no other one.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "quantized.h"
#include "rows.h"

namespace penstock::PENSTOCK_ISA {

// NaN comes first, as in torch's sort.
INLINE bool comes_before(float a, float b) { return a > b || (a != a && b == b); }

// Softmax sums lanes over the ids of experts, or the chosen in their order.
inline void route_rows(const Route& a) {
    each_row(a.rows, a.experts, [&](int64_t row, float* odds) {
        const float* logits = a.logits + row * a.experts;
        int64_t *chosen = a.chosen + row * a.active, count = 0;
        for (int64_t e = 0; e < a.experts; e++) {  // of equal logits the first stays before
            if (count == a.active && !comes_before(logits[e], logits[chosen[count - 1]])) continue;
            int64_t at = count < a.active ? count++ : count - 1;
            for (; at > 0 && comes_before(logits[e], logits[chosen[at - 1]]); at--) chosen[at] = chosen[at - 1];
            chosen[at] = e;
        }
        F top = splat(logits[chosen[0]]), lanes = splat(0);
        for (int64_t i = 0; i < a.experts; i += LANES) {
            int64_t n = a.experts - i;
            store_upto(odds + i, exp(load_upto(logits + i, n) - top), n);
            lanes = lanes + load_upto(odds + i, n);
        }
        float total = 0;
        for (int64_t i = 0; i < a.active; i++) total += odds[chosen[i]];
        if (!a.normalize) total = sum(lanes);
        for (int64_t i = 0; i < a.active; i++) a.weights[row * a.active + i] = odds[chosen[i]] / total;
    });
}

constexpr int64_t ROUTED_AT_ONCE = 1024;  // rows: what they need between the products is kept for the next call

// Of slots, which are the active experts of each row, in the order of experts.
template <class T>
struct SlotMemory {
    Vector<int64_t> ends, places;  // of each expert its last slot's place + 1; of each slot its place
    Vector<T> x, inner;
    Vector<float> out;
    Vector<Linear> products;
    void fit(int64_t slots, int64_t width, int64_t inner_width) {
        auto grow = [](auto& vector, int64_t size) {
            if ((int64_t)vector.size() < size) vector.resize((size_t)size);
        };
        grow(places, slots);
        grow(x, slots * width);
        grow(inner, slots * inner_width);
        grow(out, slots * width);
    }
};

template <class T>
const uint8_t* matrix_of(const void* stack, int64_t index, int64_t outputs, int64_t inputs, Format format) {
    int64_t panels = (outputs + PANEL - 1) / PANEL, plain = outputs * inputs * (int64_t)sizeof(T);
    return (const uint8_t*)stack + index * (format.bits ? panels * format.panel_bytes(inputs) : plain);
}

template <class T>
void some_experts(const Experts& a, int64_t first, int64_t rows) {
    static thread_local SlotMemory<T> memory;  // the caller's; other threads use it
    SlotMemory<T>& m = memory;
    const int64_t* chosen = a.chosen + first * a.active;
    int64_t slots = rows * a.active, width = a.width, inner = a.inner;
    m.fit(slots, width, inner);
    m.ends.assign((size_t)a.experts + 1, 0);
    for (int64_t s = 0; s < slots; s++) {
        if (chosen[s] < 0 || chosen[s] >= a.experts) throw std::out_of_range("no such expert");
        m.ends[(size_t)chosen[s] + 1]++;
    }
    for (int64_t e = 0; e < a.experts; e++) m.ends[(size_t)e + 1] += m.ends[(size_t)e];
    for (int64_t s = 0; s < slots; s++) m.places[(size_t)s] = m.ends[(size_t)chosen[s]]++;
    each_row(rows, width, [&](int64_t row, float*) {
        const T* x = (const T*)a.x + (first + row) * width;
        for (int64_t s = row * a.active; s < (row + 1) * a.active; s++) {
            std::memcpy(m.x.data() + m.places[(size_t)s] * width, x, (size_t)width * sizeof(T));
        }
    });
    auto products = [&](const auto& product_of) {
        m.products.clear();
        for (int64_t e = 0, from = 0; e < a.experts; from = m.ends[(size_t)e++]) {
            if (from < m.ends[(size_t)e]) m.products.push_back(product_of(e, from, m.ends[(size_t)e] - from));
        }
        linears_of<T>(m.products.data(), (int64_t)m.products.size());
    };
    products([&](int64_t e, int64_t from, int64_t count) {
        const T* bias = a.gate_up_bias ? (const T*)a.gate_up_bias + e * 2 * inner : nullptr;
        return Linear{m.x.data() + from * width, matrix_of<T>(a.gate_up, e, 2 * inner, width, a.gate_up_format), bias,
                      m.inner.data() + from * inner, count, 2 * inner, width, 1, a.activation, true, false, a.gate_up_format};
    });
    products([&](int64_t e, int64_t from, int64_t count) {
        const T* bias = a.down_bias ? (const T*)a.down_bias + e * width : nullptr;
        return Linear{m.inner.data() + from * inner, matrix_of<T>(a.down, e, width, inner, a.down_format), bias,
                      m.out.data() + from * width, count, width, inner, 1, Activation::none, false, true, a.down_format};
    });
    each_row(rows, width, [&](int64_t row, float*) {
        const float* weights = a.weights + (first + row) * a.active;
        const int64_t* places = m.places.data() + row * a.active;
        int64_t at = (first + row) * width;
        F open = splat(1);
        if (a.shared) open = splat(1) + exp(splat(0) - splat(value((const T*)a.gates + first + row)));
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t n = width - i;
            auto weighted = [&](int64_t slot) {
                return splat(weights[slot]) * load_upto(m.out.data() + places[slot] * width + i, n);
            };
            F total = weighted(0);
            for (int64_t slot = 1; slot < a.active; slot++) total = total + weighted(slot);
            if (a.shared) total = as_stored<T>(total) + load_upto((const T*)a.shared + at + i, n) / open;
            store_upto((T*)a.out + at + i, total, n);
        }
    });
}

template <class T>
void experts_of(const Experts& a) {
    for (int64_t row = 0; row < a.rows; row += ROUTED_AT_ONCE) some_experts<T>(a, row, std::min(ROUTED_AT_ONCE, a.rows - row));
}

}  // namespace penstock::PENSTOCK_ISA
