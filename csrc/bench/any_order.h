// One row's products with the sums of K in any order, for `penstock bench determinism` alone: several chains of sums for an
// output, kept in registers, no segments, and K shared out among the threads where outputs are few. Included by linear.h.
#pragma once

#include <atomic>

namespace penstock::PENSTOCK_ISA {

constexpr int64_t SPLIT_ITEMS = 32;   // for each thread
constexpr int64_t SPLIT_DEPTH = 512;  // inputs worth an item

// Inputs [k0, k1) of one row and two whole panels, to out [BLOCK].
template <class T>
INLINE void row_sums(const T* x, const PanelOf<T>* p, int64_t k0, int64_t k1, float* out) {
    constexpr int CHAINS = sizeof(F) == 64 && sizeof(T) == 4 ? 4 : 2;
    F sums[CHAINS][2];
    for (auto& chain : sums) chain[0] = chain[1] = splat(0);
    for (int64_t k = k0; k < k1; k += CHAINS) {
        for (int i = 0; sizeof(T) == 2 && i < 2; i++) fetch_ahead(p[i].weight + k * PANEL);
        if constexpr (sizeof(T) == 4) {
            for (int c = 0; c < CHAINS; c++) {
                F value = splat(x[k + c]);
                for (int i = 0; i < 2; i++) sums[c][i] = fma(value, load(p[i].weight + (k + c) * PANEL), sums[c][i]);
            }
        } else {
            F first = splat(value(x + k)), second = splat(value(x + k + 1));
            for (int i = 0; i < 2; i++) {
                F a, b;
                split(p[i].weight + k * PANEL, a, b);
                sums[0][i] = fma(first, a, sums[0][i]);
                sums[1][i] = fma(second, b, sums[1][i]);
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        for (int c = 1; c < CHAINS; c++) sums[0][i] = sums[0][i] + sums[c][i];
        store(out + i * PANEL, sums[0][i]);
    }
}

#if defined(__AVX512BF16__)
INLINE void row_sums(const bf16* x, const PanelOf<bf16>* p, int64_t k0, int64_t k1, float* out) {
    __m512 sums[4][2];
    for (auto& chain : sums) chain[0] = chain[1] = _mm512_setzero_ps();
    for (int64_t k = k0; k < k1; k += 8) {
        for (int i = 0; i < 2; i++) fetch_ahead<256>(p[i].weight + k * PANEL);
        for (int c = 0; c < 4; c++) {
            uint32_t both;
            std::memcpy(&both, x + k + 2 * c, 4);
            __m512bh value = (__m512bh)_mm512_set1_epi32((int)both);
            for (int i = 0; i < 2; i++) {
                __m512bh w = (__m512bh)_mm512_loadu_si512(p[i].weight + (k + 2 * c) * PANEL);
                sums[c][i] = _mm512_dpbf16_ps(sums[c][i], value, w);
            }
        }
    }
    for (int i = 0; i < 2; i++) store(out + i * PANEL, {(sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i])});
}
#endif

// Whether row_sums takes this product, and how many inputs it takes at a time.
template <class T>
int64_t row_step(const Linear& a, PanelOf<T>) {
    return a.outputs % BLOCK == 0 && a.inputs % 32 == 0 ? 32 : 0;
}

// One row of T. ``x``: what row_sums reads.
template <class T, class Panel, class X>
bool one_row(const Linear& a, const X& x) {
    int64_t step = row_step(a, Panel()), groups = a.outputs / BLOCK;
    if (a.rows != 1 || !step || (a.gated && a.outputs / 2 % PANEL)) return false;
    int64_t cuts = std::max<int64_t>(1, std::min(SPLIT_ITEMS * threads() / groups, a.inputs / SPLIT_DEPTH));
    int64_t depth = (a.inputs + cuts * step - 1) / (cuts * step) * step, outputs = groups * BLOCK;
    static thread_local Vector<float> memory;
    static thread_local Vector<std::atomic<int>> done;
    if ((int64_t)memory.size() < cuts * outputs) memory.resize((size_t)(cuts * outputs));
    if ((int64_t)done.size() < groups) done = Vector<std::atomic<int>>((size_t)groups);
    for (auto& count : done) count.store(0, std::memory_order_relaxed);
    float* sums = memory.data();
    auto* counts = done.data();
    int64_t at_once = std::max<int64_t>(1, groups * cuts / (SPLIT_ITEMS * threads())), lots = (groups + at_once - 1) / at_once;
    parallel(lots * cuts, [&](int64_t item, int) {
        int64_t cut = item % cuts, first = item / cuts * at_once;
        for (int64_t group = first; group < std::min(groups, first + at_once); group++) {
            int64_t left = a.gated ? group : 2 * group, right = a.gated ? groups + group : left + 1;
            Panel panels[2] = {Panel::of(a, left), Panel::of(a, right)};
            row_sums(x, panels, cut * depth, std::min(a.inputs, (cut + 1) * depth), sums + (group * cuts + cut) * BLOCK);
            // Who ends last adds up.
            if (counts[group].fetch_add(1, std::memory_order_acq_rel) != cuts - 1) continue;
            float* own = sums + group * cuts * BLOCK;
            for (int64_t other = 1; other < cuts; other++) {
                for (int j = 0; j < BLOCK; j += LANES) store(own + j, load(own + j) + load(own + other * BLOCK + j));
            }
            a.gated ? gated_outputs<T>(a, 0, 1, group, 0, own) : plain_outputs<T>(a, 0, 1, group, own);
        }
    });
    return true;
}

}  // namespace penstock::PENSTOCK_ISA
