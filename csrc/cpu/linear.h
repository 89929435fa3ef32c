// Products with packed weights. Lanes run over outputs and K is sequential within a segment, so that the bits of an
// output depend on (dtype, N, K, segments) and on its own row alone, whatever the number of rows and their grouping.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "functions.h"
#include "kernels.h"
#include "pool.h"
#include "vec.h"

namespace penstock::PENSTOCK_ISA {

constexpr int BLOCK = 32;  // rows and outputs computed together
constexpr int64_t DEEPEST = 256;  // inputs of one piece: BLOCK rows of it stay in the first-level cache
constexpr int64_t ROWS_BYTES = 1 << 19;  // of x that stay in the second-level cache while weights stream past

// BLOCK rows of x: number k of a row stands at first + row * stride + k * step, 32 neighbours side by side.
template <class T>
struct Rows {
    const T* first;
    int64_t stride, step;
    INLINE const T* at(int64_t row, int64_t k) const { return first + row * stride + k * step; }
};

// One panel and how many outputs it has; none has no weights.
template <class T>
struct PanelOf {
    const T* weight = nullptr;
    int width = 0;
    static INLINE PanelOf of(const Linear& a, int64_t index) {
        int64_t first = index * PANEL;
        if (first >= a.outputs) return {};
        return {(const T*)a.weight + first * a.inputs, (int)std::min<int64_t>(PANEL, a.outputs - first)};
    }
};

// Two panels whose outputs are computed together. A kind of panel says what its rows of x are.
template <class Panel>
struct Pair {
    Panel panels[2];
};

constexpr int64_t AHEAD = 1024;  // bytes

// Asks early for weights of one row's products: the processor looks ahead by itself, but not past the end of a page.
template <int64_t bytes = 64>
INLINE void fetch_ahead(const void* weights) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char*)weights + AHEAD + line);
}

// The weights of input k in a panel: k's own for fp32.
INLINE F column(PanelOf<float> p, int64_t k, int64_t) { return load_upto(p.weight + k * p.width, p.width); }
template <class T>
INLINE F last_column(PanelOf<T> p, int64_t inputs) {
    return load_upto(p.weight + (inputs - 1) * p.width, p.width);
}
template <class T>
INLINE void pair_of_columns(PanelOf<T> p, int64_t pair, F& first, F& second) {
    const T* at = p.weight + pair * 2 * p.width;
    p.width == PANEL ? split(at, first, second) : split_some(at, p.width, first, second);
}

#if defined(__AVX512F__)
constexpr int TALL = 8;  // rows whose sums fit in the registers
#else
constexpr int TALL = 2;
#endif

// Adds inputs [k0, k1) to sums [R][2]: one fused multiply-add each.
template <int R>
INLINE void accumulate(const float* x, int64_t inputs, const PanelOf<float>* p, int64_t k0, int64_t k1, F (*sums)[2]) {
    for (int64_t k = k0; k < k1; k++) {
        F w0 = column(p[0], k, inputs), w1 = p[1].width ? column(p[1], k, inputs) : splat(0);
        for (int r = 0; r < R; r++) {
            F value = splat(x[r * inputs + k]);
            sums[r][0] = fma(value, w0, sums[r][0]);
            sums[r][1] = fma(value, w1, sums[r][1]);
        }
    }
}

template <int R, class T>
INLINE void accumulate(const T* x, int64_t inputs, const PanelOf<T>* p, int64_t k0, int64_t k1, F (*sums)[2]) {
    auto add = [&](int64_t k, F w0, F w1) ALWAYS_INLINE {
        for (int r = 0; r < R; r++) {
            F one = splat(value(x + r * inputs + k));
            sums[r][0] = fma(one, w0, sums[r][0]);
            sums[r][1] = fma(one, w1, sums[r][1]);
        }
    };
    F a0, a1, b0, b1;
    b0 = b1 = splat(0);
    auto pair = [&](int64_t index) ALWAYS_INLINE {
        for (int i = 0; R == 1 && i < 2; i++) fetch_ahead(p[i].weight + index * 2 * PANEL);
        pair_of_columns(p[0], index, a0, a1);
        if (p[1].width) pair_of_columns(p[1], index, b0, b1);
    };
    int64_t k = k0;
    if (k % 2 && k < k1) {
        pair(k / 2);
        add(k++, a1, b1);
    }
    for (; k + 1 < k1; k += 2) {
        pair(k / 2);
        add(k, a0, b0);
        add(k + 1, a1, b1);
    }
    if (k < k1) {
        if (k + 1 == inputs) {
            add(k, last_column(p[0], inputs), p[1].width ? last_column(p[1], inputs) : splat(0));
        } else {
            pair(k / 2);
            add(k, a0, b0);
        }
    }
}

#if defined(__AVX512BF16__)
// Two products and two roundings at a time: the pair's second, then its first.
INLINE __m512i pairs_at(PanelOf<bf16> p, int64_t pair) {
    const bf16* at = p.weight + pair * 2 * p.width;
    if (p.width == PANEL) return _mm512_loadu_si512(at);
    return _mm512_maskz_loadu_epi32((__mmask16)((1u << p.width) - 1), at);
}
INLINE __m512i last_at(PanelOf<bf16> p, int64_t inputs) {
    bf16 buffer[PANEL] = {};
    std::memcpy(buffer, p.weight + (inputs - 1) * p.width, (size_t)p.width * 2);
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)buffer));
}

template <int R>
INLINE void accumulate(const bf16* x, int64_t inputs, const PanelOf<bf16>* p, int64_t k0, int64_t k1, F (*sums)[2]) {
    bool two = p[1].width != 0;
    auto add = [&](int64_t k, uint32_t kept, __m512i w0, __m512i w1) ALWAYS_INLINE {
        for (int r = 0; r < R; r++) {
            uint32_t both = 0;
            const bf16* at = x + r * inputs + (k & ~1ll);
            std::memcpy(&both, at, kept == 0xffff ? 2 : 4);
            __m512bh value = (__m512bh)_mm512_set1_epi32((int)(both & kept));
            sums[r][0].v = _mm512_dpbf16_ps(sums[r][0].v, value, (__m512bh)w0);
            sums[r][1].v = _mm512_dpbf16_ps(sums[r][1].v, value, (__m512bh)w1);
        }
    };
    const __m512i none = _mm512_setzero_si512();
    int64_t k = k0;
    if (k % 2 && k < k1) {
        add(k, 0xffff0000, pairs_at(p[0], k / 2), two ? pairs_at(p[1], k / 2) : none);
        k++;
    }
    for (; k + 1 < k1; k += 2) add(k, 0xffffffff, pairs_at(p[0], k / 2), two ? pairs_at(p[1], k / 2) : none);
    if (k < k1) {
        if (k + 1 == inputs) {
            add(k, 0xffff, last_at(p[0], inputs), two ? last_at(p[1], inputs) : none);
        } else {
            add(k, 0xffff, pairs_at(p[0], k / 2), two ? pairs_at(p[1], k / 2) : none);
        }
    }
}
#endif

template <int R, class T>
inline void some_rows(const T* x, int64_t inputs, const PanelOf<T>* p, int64_t k0, int64_t k1, bool fresh, float* out) {
    F sums[R][2];
    for (int r = 0; r < R; r++) {
        sums[r][0] = fresh ? splat(0) : load(out + r * BLOCK);
        sums[r][1] = fresh ? splat(0) : load(out + r * BLOCK + PANEL);
    }
    accumulate<R>(x, inputs, p, k0, k1, sums);
    for (int r = 0; r < R; r++) {
        store(out + r * BLOCK, sums[r][0]);
        store(out + r * BLOCK + PANEL, sums[r][1]);
    }
}

// Copies of rows, and of panels, that many rows are worth: none, unless an instruction set has a use for them.
template <class X, class Panel>
struct Widened {
    static constexpr int ROWS = BLOCK;  // computed together
    static constexpr int64_t DEEP = 0;  // inputs of one piece
    static bool worth(int) { return false; }
    void take(X, int, const Linear&, int64_t, int64_t) {}
    void part(int, int64_t, const Pair<Panel>&, int64_t, int64_t, bool, float*) {}
};

#if defined(__AVX2__)
// Sums of so many rows and panels fit in the registers, if the numbers of x come from memory as fp32.
#if defined(__AVX512F__)
constexpr int WIDE_ROWS = 12, WIDE_PANELS = 2;
#else
constexpr int WIDE_ROWS = 6, WIDE_PANELS = 1;
#endif
#if defined(__AVX512BF16__)
template <class T>
concept Widens = !std::is_same_v<T, bf16>;  // which are multiplied as they are
#else
template <class T>
concept Widens = true;
#endif

template <Widens T>
struct Widened<Rows<T>, PanelOf<T>> {
    static constexpr int ROWS = BLOCK;
    static constexpr int64_t DEEP = 128, STRIDE = DEEP + 16;
    alignas(64) float wide[BLOCK * STRIDE];

    static bool worth(int rows) { return rows >= (WIDE_PANELS == 1 ? 8 : 4); }

    void take(Rows<T> x, int rows, const Linear& a, int64_t k0, int64_t k1) {
        for (int row = 0; row < rows; row++) {
            for (int64_t k = k0; k < k1; k += LANES) {
                store(wide + row * STRIDE + k - k0, load_upto(x.first + row * a.inputs + k, std::min<int64_t>(LANES, k1 - k)));
            }
        }
        int padded = WIDE_PANELS == 1 ? rows : (rows + 3) / 4 * 4;
        std::memset(wide + rows * STRIDE, 0, sizeof(float) * (size_t)((padded - rows) * STRIDE));
    }

    // Adds inputs [k0, k1), all of them or both of each pair, to sums [R][WIDE_PANELS], as accumulate does.
    template <int R>
    static INLINE void accumulate(
        const float* x, int64_t inputs, const PanelOf<T>* p, int64_t k0, int64_t k1, F (*sums)[WIDE_PANELS]) {
        F first[WIDE_PANELS], second[WIDE_PANELS];
        each<WIDE_PANELS>([&](auto i) { first[i] = second[i] = splat(0); });
        auto of_each_panel = [&](const auto& work) ALWAYS_INLINE {
            work(std::integral_constant<int, 0>());
            if constexpr (WIDE_PANELS == 2) {
                if (p[1].width) work(std::integral_constant<int, 1>());
            }
        };
        auto fetch = [&](int64_t k) ALWAYS_INLINE {  // 1.3 times the speed with weights of two bytes, on a Cascade Lake
            for (int i = 0; WIDE_PANELS == 2 && i < 2; i++) fetch_ahead(p[i].weight + k * PANEL);
        };
        auto add = [&](const float* at, const F* w) ALWAYS_INLINE {
            each<R>([&](auto r) ALWAYS_INLINE {
                F one = splat(at[r * STRIDE]);
                each<WIDE_PANELS>([&](auto i) ALWAYS_INLINE { sums[r][i] = fma(one, w[i], sums[r][i]); });
            });
        };
        if constexpr (sizeof(T) == 4) {
            for (int64_t k = k0; k < k1; k++) {
                fetch(k);
                of_each_panel([&](auto i) ALWAYS_INLINE { first[i] = column(p[i], k, inputs); });
                add(x + k - k0, first);
            }
        } else {
            for (int64_t k = k0; k + 1 < k1; k += 2) {
                auto both = [&](auto i) ALWAYS_INLINE { pair_of_columns(p[i], k / 2, first[i], second[i]); };
                fetch(k);
                of_each_panel(both);
                add(x + k - k0, first);
                if constexpr (WIDE_PANELS == 1) {  // read again: registers are short, and the first-level cache has it
                    const T* again = p->weight;
                    asm volatile("" : "+r"(again));
                    pair_of_columns(PanelOf<T>{again, p->width}, k / 2, first[0], second[0]);
                }
                add(x + k - k0 + 1, second);
            }
            if ((k1 - k0) % 2) {
                of_each_panel([&](auto i) ALWAYS_INLINE { first[i] = last_column(p[i], inputs); });
                add(x + k1 - 1 - k0, first);
            }
        }
    }

    void part(int rows, int64_t inputs, const Pair<PanelOf<T>>& pair, int64_t k0, int64_t k1, bool fresh, float* out) {
        for (int panel = 0; panel < 2 && pair.panels[panel].width; panel += WIDE_PANELS) {
            int row = 0;
            auto take = [&]<int R>() {
                F sums[R][WIDE_PANELS];
                float* to = out + row * BLOCK + panel * PANEL;
                auto each_sum = [&](const auto& work) ALWAYS_INLINE {
                    each<R>([&](auto r) ALWAYS_INLINE {
                        each<WIDE_PANELS>([&](auto i) ALWAYS_INLINE { work(to + r * BLOCK + i * PANEL, sums[r][i]); });
                    });
                };
                each_sum([&](float* from, F& sum) ALWAYS_INLINE { sum = fresh ? splat(0) : load(from); });
                accumulate<R>(wide + row * STRIDE, inputs, pair.panels + panel, k0, k1, sums);
                each_sum([&](float* at, const F& sum) ALWAYS_INLINE { store(at, sum); });
                row += R;
            };
            if constexpr (WIDE_PANELS == 2) {  // fours, the last one filled up
                for (int left = (rows + 3) / 4, fours; left; left -= fours) {
                    fours = left == 4 ? 2 : std::min(left, WIDE_ROWS / 4);
                    if (fours == 3) take.template operator()<12>();
                    if (fours == 2) take.template operator()<8>();
                    if (fours == 1) take.template operator()<4>();
                }
            } else {
                int tiles = (rows + WIDE_ROWS - 1) / WIDE_ROWS;  // of four to six rows
                for (int tile = 0; tile < tiles; tile++) {
                    int height = rows / tiles + (tile < rows % tiles);
                    if (height == 6) take.template operator()<6>();
                    if (height == 5) take.template operator()<5>();
                    if (height == 4) take.template operator()<4>();
                }
            }
        }
    }
};
#endif

template <class T>
void part_by_rows(
    const T* x, int rows, int64_t inputs, const PanelOf<T>* p, int64_t k0, int64_t k1, bool fresh, float* out) {
    int row = 0;
    auto take = [&]<int R>() {
        for (; row + R <= rows; row += R) some_rows<R>(x + row * inputs, inputs, p, k0, k1, fresh, out + row * BLOCK);
    };
    take.template operator()<TALL>();
    take.template operator()<4>();
    take.template operator()<1>();
}

// Whether products with a kind of panel may use tiles, which are configured first and released at the end.
template <class Panel>
constexpr bool TILED = false;

#if defined(__AMX_BF16__)
template <>
constexpr bool TILED<PanelOf<bf16>> = true;

// Tiles 0-3 are sums [2][2], 4-5 rows of x, 6-7 panels. A tile product adds 32 inputs: their even and their odd
// products each from zero, then both together to the sum.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
INLINE void configure(const TileConfig& config) {
    asm volatile("" ::: "memory");  // compilers do not know that the instruction reads all of it
    _tile_loadconfig(&config);
}
INLINE void configure(PanelOf<bf16>, const Linear&, int rows) {
    int upper = std::min(rows, 16), lower = rows - upper;
    TileConfig config;
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64;
    config.rows[0] = config.rows[1] = config.rows[4] = (uint8_t)upper;
    config.rows[2] = config.rows[3] = config.rows[5] = (uint8_t)(lower ? lower : 1);
    config.rows[6] = config.rows[7] = 16;
    configure(config);
}

constexpr int64_t DEEP = 32;
constexpr int64_t AHEAD_K = 64;  // inputs whose weights are fetched before they are needed

// Panels of 32 inputs, zeros where there are none.
INLINE void copy_panel(PanelOf<bf16> p, int64_t inputs, int64_t k, int64_t depth, uint32_t (*out)[PANEL]) {
    std::memset(out, 0, sizeof(uint32_t) * 16 * PANEL);
    int64_t pairs = depth / 2;
    for (int64_t i = 0; i < pairs; i++) std::memcpy(out[i], p.weight + (k + 2 * i) * p.width, (size_t)p.width * 4);
    if (depth % 2) {
        for (int lane = 0; lane < p.width; lane++) out[pairs][lane] = p.weight[(inputs - 1) * p.width + lane].bits;
    }
}

template <bool lower, bool second>
INLINE void tile_products() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (second) _tile_dpbf16ps(1, 4, 7);
    if constexpr (lower) _tile_dpbf16ps(2, 5, 6);
    if constexpr (lower && second) _tile_dpbf16ps(3, 5, 7);
}

template <bool lower, bool second>
void part_by_tiles(
    Rows<bf16> x, int rows, int64_t inputs, const PanelOf<bf16>* p, int64_t k0, int64_t k1, bool fresh, float* out) {
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, out, BLOCK * 4);
        if constexpr (second) _tile_loadd(1, out + PANEL, BLOCK * 4);
        if constexpr (lower) _tile_loadd(2, out + 16 * BLOCK, BLOCK * 4);
        if constexpr (lower && second) _tile_loadd(3, out + 16 * BLOCK + PANEL, BLOCK * 4);
    }
    int64_t k = k0;
    bool full = p[0].width == PANEL && (!second || p[1].width == PANEL);
    if (full) {
        for (; k + DEEP <= k1; k += DEEP) {
            _tile_loadd(4, x.at(0, k), x.stride * 2);
            _tile_loadd(6, p[0].weight + k * PANEL, 64);
            if constexpr (second) _tile_loadd(7, p[1].weight + k * PANEL, 64);
            if constexpr (lower) _tile_loadd(5, x.at(16, k), x.stride * 2);
            for (int64_t line = 0; line < DEEP * PANEL; line += 32) {
                _mm_prefetch((const char*)(p[0].weight + (k + AHEAD_K) * PANEL + line), _MM_HINT_T0);
                if constexpr (second) _mm_prefetch((const char*)(p[1].weight + (k + AHEAD_K) * PANEL + line), _MM_HINT_T0);
            }
            tile_products<lower, second>();
        }
    }
    alignas(64) bf16 some_x[BLOCK][DEEP];
    alignas(64) uint32_t some_weights[2][16][PANEL];
    for (; k < k1; k += DEEP) {
        int64_t depth = std::min(DEEP, k1 - k);
        std::memset(some_x, 0, sizeof some_x);
        for (int row = 0; row < rows; row++) std::memcpy(some_x[row], x.at(row, k), (size_t)depth * 2);
        for (int i = 0; i < (second ? 2 : 1); i++) copy_panel(p[i], inputs, k, depth, some_weights[i]);
        asm volatile("" ::: "memory");
        _tile_loadd(4, some_x[0], 64);
        _tile_loadd(6, some_weights[0], 64);
        if constexpr (second) _tile_loadd(7, some_weights[1], 64);
        if constexpr (lower) _tile_loadd(5, some_x[16], 64);
        tile_products<lower, second>();
    }
    _tile_stored(0, out, BLOCK * 4);
    if constexpr (second) _tile_stored(1, out + PANEL, BLOCK * 4);
    if constexpr (lower) _tile_stored(2, out + 16 * BLOCK, BLOCK * 4);
    if constexpr (lower && second) _tile_stored(3, out + 16 * BLOCK + PANEL, BLOCK * 4);
}
#endif

// Adds inputs [k0, k1) to the sums of up to BLOCK rows and two panels, fp32 [rows][BLOCK]; fresh sums are zero.
template <class T>
INLINE void part(
    Rows<T> x, int rows, int64_t inputs, const Pair<PanelOf<T>>& p, int64_t k0, int64_t k1, bool fresh, bool, float* out) {
    part_by_rows(x.first, rows, inputs, p.panels, k0, k1, fresh, out);
}
#if defined(__AMX_BF16__)
INLINE void part(
    Rows<bf16> x, int rows, int64_t inputs, const Pair<PanelOf<bf16>>& p, int64_t k0, int64_t k1, bool fresh, bool tiles, float* out) {
    if (!tiles) return part_by_rows(x.first, rows, inputs, p.panels, k0, k1, fresh, out);
    bool lower = rows > 16, second = p.panels[1].width != 0;
    auto compute = lower ? (second ? part_by_tiles<true, true> : part_by_tiles<true, false>)
                         : (second ? part_by_tiles<false, true> : part_by_tiles<false, false>);
    compute(x, rows, inputs, p.panels, k0, k1, fresh, out);
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int MOST_ROWS = 128;
#elif defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
constexpr int MOST_ROWS = 96;
#else
constexpr int MOST_ROWS = BLOCK;
#endif
constexpr int SIZE = MOST_ROWS * BLOCK;  // of the sums of one pair

// All of K for some pairs: sums [count][segments][MOST_ROWS][BLOCK], of which the first segment's are the result. Inputs are
// taken in pieces of ``deep``, so that a piece of x is in the first-level cache for all pairs.
template <class X, class Panel>
__attribute__((noinline)) void whole(X x, int rows, const Linear& a, const Pair<Panel>* pairs, int count, int64_t deep, float* sums) {
    int64_t segment = a.inputs / a.segments;
    // Pairs of inputs cross neither segments nor pieces: where segments would cut them, a segment is one piece.
    bool tiles = a.segments == 1 || segment % 2 == 0;
    if (!tiles) deep = segment;
    Widened<X, Panel> wide;
    bool widened = tiles && wide.worth(rows);
    if (widened) deep = std::min(deep, wide.DEEP);
    for (int s = 0; s < a.segments; s++) {
        for (int64_t k = 0; k < segment; k += deep) {
            int64_t k0 = s * segment + k, k1 = s * segment + std::min(k + deep, segment);
            if (widened) wide.take(x, rows, a, k0, k1);
            for (int i = 0; i < count; i++) {
                float* out = sums + (i * a.segments + s) * SIZE;
                if (widened) {
                    wide.part(rows, a.inputs, pairs[i], k0, k1, k == 0, out);
                } else {
                    part(x, rows, a.inputs, pairs[i], k0, k1, k == 0, tiles, out);
                }
            }
        }
    }
    for (int i = 0; i < count; i++) {
        for (int step = 1; step < a.segments; step *= 2) {
            for (int s = 0; s < a.segments; s += 2 * step) {
                float *left = sums + (i * a.segments + s) * SIZE, *right = left + step * SIZE;
                for (int j = 0; j < rows * BLOCK; j += LANES) store(left + j, load(left + j) + load(right + j));
            }
        }
    }
}

// What is computed of one row before it is stored; ``bias`` may be null.
template <class T>
INLINE F biased(const float* sums, const T* bias, int64_t n) {
    return bias ? load(sums) + load_upto(bias, n) : load(sums);
}

// Rounds, unless the output is wide.
template <class T>
INLINE void put(const Linear& a, int64_t at, F y, int64_t count) {
    a.wide ? store_upto((float*)a.out + at, y, count) : store_upto((T*)a.out + at, y, count);
}

template <class T>
void plain_outputs(const Linear& a, int64_t row, int rows, int64_t group, const float* sums) {
    for (int i = 0; i < 2; i++) {
        int64_t first = (2 * group + i) * PANEL, count = std::min<int64_t>(PANEL, a.outputs - first);
        if (count <= 0) return;
        const T* bias = a.bias ? (const T*)a.bias + first : nullptr;
        for (int r = 0; r < rows; r++) {
            F y = activate(biased(sums + r * BLOCK + i * PANEL, bias, count), a.activation);
            put<T>(a, (row + r) * a.outputs + first, y, count);
        }
    }
}

// Sixteen gates and what they let through. ``shift``: where in its panel the first of the latter stands; if it is not
// at the beginning, they go on in the next panel, in the sums after these.
template <class T>
void gated_outputs(const Linear& a, int64_t row, int rows, int64_t group, int64_t shift, const float* sums) {
    int64_t half = a.outputs / 2, first = group * PANEL, count = std::min<int64_t>(PANEL, half - first);
    const T* bias = (const T*)a.bias;
    for (int r = 0; r < rows; r++) {
        const float *gates = sums + r * BLOCK, *ups = gates + PANEL;
        float both[2 * PANEL];
        if (shift) {
            std::memcpy(both, ups, PANEL * 4);
            std::memcpy(both + PANEL, gates + a.segments * SIZE, PANEL * 4);
            ups = both + shift;
        }
        F g = biased(gates, bias ? bias + first : nullptr, count), u = biased(ups, bias ? bias + half + first : nullptr, count);
        put<T>(a, (row + r) * half + first, gate(g, u, a.activation), count);
    }
}

constexpr int TOGETHER = 2;  // groups of outputs that are summed before any is stored

// Outputs of groups first .. first + count - 1 and up to MOST_ROWS rows.
template <class T, class Panel, class X>
void some_outputs(const Linear& a, X x, int64_t row, int rows, int64_t first, int count, int64_t deep, float* sums) {
    int64_t half = a.outputs / 2, shift = a.gated ? half % PANEL : 0;
    int each = shift ? 2 : 1, total = 0;
    Pair<Panel> pairs[2 * TOGETHER];
    auto panel = [&](int64_t index) { return Panel::of(a, index); };
    for (int64_t group = first; group < first + count; group++) {
        int64_t up = half / PANEL + group;
        pairs[total++] = a.gated ? Pair<Panel>{panel(group), panel(up)} : Pair<Panel>{panel(2 * group), panel(2 * group + 1)};
        if (shift) pairs[total++] = {panel(up + 1), {}};
    }
    if (shift && !pairs[total - 1].panels[0].width) total--;  // the last outputs end in the panel before
    whole(x, rows, a, pairs, total, deep, sums);
    for (int i = 0; i < count; i++) {
        const float* own = sums + i * each * a.segments * SIZE;
        a.gated ? gated_outputs<T>(a, row, rows, first + i, shift, own) : plain_outputs<T>(a, row, rows, first + i, own);
    }
}

#if defined(__AMX_BF16__)
// x as [T / BLOCK][K / DEEP][BLOCK][DEEP].
template <class T>
void lay(const Linear& a, Vector<T>& out) {
    int64_t blocks = (a.rows + BLOCK - 1) / BLOCK;
    if ((int64_t)out.size() < blocks * BLOCK * a.inputs) out.resize((size_t)(blocks * BLOCK * a.inputs));
    T* to = out.data();
    parallel(blocks, [&](int64_t block, int) {
        for (int64_t row = block * BLOCK; row < std::min(a.rows, (block + 1) * BLOCK); row++) {
            const T* from = (const T*)a.x + row * a.inputs;
            T* at = to + block * BLOCK * a.inputs + row % BLOCK * DEEP;
            for (int64_t k = 0; k < a.inputs; k += DEEP) std::memcpy(at + k * BLOCK, from + k, DEEP * sizeof(T));
        }
    });
}
#endif

// All outputs of products that differ in their weights and rows alone, shared out among the threads. ``rows_at(a, row)`` are
// the rows of a product's x from ``row`` on, ``row_bytes`` one of them.
template <class T, class Panel, class RowsAt>
void all_outputs(const Linear* products, int64_t count, int64_t row_bytes, const RowsAt& rows_at) {
    int64_t outputs = products->gated ? products->outputs / 2 : products->outputs;
    int64_t group_size = products->gated ? PANEL : 2 * PANEL, groups = (outputs + group_size - 1) / group_size;
    constexpr int ROWS = Widened<decltype(rows_at(*products, 0)), Panel>::ROWS;
    int64_t tall = std::max<int64_t>(ROWS, ROWS_BYTES / row_bytes / ROWS * ROWS), stacks = 0;
    auto stacks_of = [&](const Linear& a) { return (a.rows + tall - 1) / tall; };
    for (int64_t i = 0; i < count; i++) stacks += stacks_of(products[i]);
    // Enough items to share them out evenly, and few enough not to count.
    int64_t at_once = std::max<int64_t>(1, groups * stacks / (threads() * (products->rows > BLOCK ? 16 : 32)));
    int64_t lots = (groups + at_once - 1) / at_once;
    parallel(stacks * lots, [&](int64_t item, int) {
        int64_t stack = item / lots;
        const Linear* product = products;
        for (; stack >= stacks_of(*product); product++) stack -= stacks_of(*product);
        const Linear& a = *product;
        static thread_local Vector<float> memory;
        memory.resize((size_t)(2 * TOGETHER * a.segments * SIZE));
        // Few rows leave the weights to be read from memory, and long runs of it are read fastest.
        int64_t deep = a.rows > BLOCK ? DEEPEST : a.inputs;
        int64_t first_row = stack * tall, last_row = std::min(first_row + tall, a.rows);
        int64_t first = item % lots * at_once, last = std::min(first + at_once, groups);
        for (int64_t row = first_row; row < last_row; row += ROWS) {
            int rows = (int)std::min<int64_t>(ROWS, last_row - row);
            if constexpr (TILED<Panel>) {
                if (row == first_row || rows < BLOCK) configure(Panel(), a, rows);
            }
            for (int64_t group = first; group < last; group += TOGETHER) {
                int few = (int)std::min<int64_t>(TOGETHER, last - group);
                some_outputs<T, Panel>(a, rows_at(a, row), row, rows, group, few, deep, memory.data());
            }
        }
#if defined(__AMX_BF16__)
        if constexpr (TILED<Panel>) _tile_release();
#endif
    });
}

#if defined(PENSTOCK_ANY_ORDER)
}  // namespace penstock::PENSTOCK_ISA
#include "../bench/any_order.h"
namespace penstock::PENSTOCK_ISA {
#endif

template <class T>
void plain_linears_of(const Linear* products, int64_t count) {
#if defined(PENSTOCK_ANY_ORDER)
    if (count == 1 && one_row<T, PanelOf<T>>(*products, (const T*)products->x)) return;
#endif
    int64_t row_bytes = products->inputs * (int64_t)sizeof(T);
#if defined(__AMX_BF16__)
    // Rows a power of two apart fall into few sets of the first-level cache: many rows are laid side by side first.
    static thread_local Vector<T> tiles;
    static thread_local Vector<Linear> others;
    others.clear();
    for (int64_t i = 0; i < count; i++) {
        const Linear& a = products[i];
        if (!std::is_same_v<T, bf16> || a.rows <= BLOCK || a.inputs / a.segments % DEEP) {
            others.push_back(a);
            continue;
        }
        lay(a, tiles);
        const T* laid = tiles.data();
        all_outputs<T, PanelOf<T>>(
            &a, 1, row_bytes, [&](const Linear&, int64_t row) { return Rows<T>{laid + row * a.inputs, DEEP, BLOCK}; });
    }
    products = others.data(), count = (int64_t)others.size();
    if (!count) return;
#endif
    all_outputs<T, PanelOf<T>>(products, count, row_bytes, [](const Linear& a, int64_t row) {
        return Rows<T>{(const T*)a.x + row * a.inputs, a.inputs, 1};
    });
}

inline int64_t packed_at(int64_t lane, int64_t k, int width, int64_t inputs, bool pairs) {
    if (!pairs || k == (inputs & ~1ll)) return k * width + lane;
    return (k / 2 * width + lane) * 2 + k % 2;
}

template <class T>
void pack_of(T* weight, int64_t outputs, int64_t inputs) {
    constexpr bool pairs = sizeof(T) == 2;
    int64_t panels = (outputs + PANEL - 1) / PANEL;
    parallel(panels, [&](int64_t index, int) {
        T* panel = weight + index * PANEL * inputs;
        int width = (int)std::min<int64_t>(PANEL, outputs - index * PANEL);
        Vector<T> rows(panel, panel + width * inputs);
        for (int lane = 0; lane < width; lane++) {
            for (int64_t k = 0; k < inputs; k++) {
                panel[packed_at(lane, k, width, inputs, pairs)] = rows[(size_t)(lane * inputs + k)];
            }
        }
    });
}

template <class T>
INLINE void scale_row(T* row, int64_t width, float factor) {
    for (int64_t i = 0; factor != 1 && i < width; i += LANES) {
        store_upto(row + i, load_upto(row + i, width - i) * splat(factor), width - i);
    }
}

inline int64_t id_of(const Embed& a, int64_t row) {
    if (a.ids[row] < 0 || a.ids[row] >= a.outputs) throw std::out_of_range("no such row of the table");
    return a.ids[row];
}

template <class T>
void embed_of(const Embed& a) {
    constexpr bool pairs = sizeof(T) == 2;
    parallel(a.rows, [&](int64_t row, int) {
        int64_t id = id_of(a, row), first = id / PANEL * PANEL;
        int width = (int)std::min<int64_t>(PANEL, a.outputs - first);
        const T* panel = (const T*)a.table + first * a.inputs;
        T* out = (T*)a.out + row * a.inputs;
        for (int64_t k = 0; k < a.inputs; k++) out[k] = panel[packed_at(id - first, k, width, a.inputs, pairs)];
        scale_row(out, a.inputs, a.factor);
    });
}

}  // namespace penstock::PENSTOCK_ISA
