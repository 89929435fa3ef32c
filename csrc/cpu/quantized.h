// Products with grouped weights (kernels.h, Format). Rows of x become int8 codes with a scale for each group of inputs;
// the integer sum of a group is exact, so that its order is nobody's business; groups add in fp32 in ascending order.
#pragma once

#include <limits>
#include <utility>

#include "linear.h"

namespace penstock::PENSTOCK_ISA {

constexpr int MAX_GROUP = 128;  // inputs; 32 and 64 are the others
constexpr float SIXTEENTH = 0.0625f;  // zeros count in sixteenths of a step

// Sixteen int32 lanes. to_whole rounds to the nearest, ties to even; codes are in [-127, 127].
#if defined(__AVX512VNNI__)
struct I {
    __m512i v;
};
INLINE I none() { return {_mm512_setzero_si512()}; }
INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE int32_t sum_of(I a) { return _mm512_reduce_add_epi32(a.v); }
INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE I to_whole(F a) { return {_mm512_cvtps_epi32(a.v)}; }
INLINE void store_codes(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
#elif defined(__AVX2__)
struct I {
    __m256i lo, hi;
};
INLINE I none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE I operator+(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
INLINE int32_t sum_of(__m256i a) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
INLINE int32_t sum_of(I a) { return sum_of(_mm256_add_epi32(a.lo, a.hi)); }
// ``next`` is not read before ``done`` is there: compilers that mix the work of several rows run out of registers.
INLINE void in_turn(__m256i& done, __m256i& next) {
    __m256i a = done, b = next;
    asm("" : "+x"(a), "+x"(b));
    done = a;
    next = b;
}
INLINE F to_float(I a) {
#if defined(__AVX512F__)
    return {_mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(a.lo), a.hi, 1))};
#else
    return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
#endif
}
INLINE I to_whole(F a) {
#if defined(__AVX512F__)
    __m512i all = _mm512_cvtps_epi32(a.v);
    return {_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1)};
#else
    return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
#endif
}
INLINE void store_codes(int8_t* p, I a) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
#else
struct I {
    int32_t v[LANES];
};
INLINE I none() { return {}; }
INLINE I operator+(I a, I b) {
    for (int i = 0; i < LANES; i++) a.v[i] += b.v[i];
    return a;
}
INLINE int32_t sum_of(I a) {
    int32_t sum = 0;
    for (int32_t lane : a.v) sum += lane;
    return sum;
}
INLINE I to_whole(F a) {
    F rounded = round(a);
    I out;
    for (int i = 0; i < LANES; i++) out.v[i] = (int32_t)rounded.v[i];
    return out;
}
INLINE void store_codes(int8_t* p, I a) {
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)a.v[i];
}
INLINE F to_float(I a) {
    float lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = (float)a.v[i];
    return load(lanes);
}
#endif

INLINE F load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
#elif defined(__AVX2__)
    auto eight = [](const uint8_t* at) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at))); };
    return {eight(p), eight(p + 8)};
#else
    float lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = (float)p[i];
    return load(lanes);
#endif
}

// Four neighbouring codes of a row, for every output.
INLINE int32_t quad_at(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return quad;
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// Codes of four outputs and eight inputs from input k on: a quad and the next one.
template <int BITS>
INLINE void eight_inputs(const uint8_t* w, int k, int lane, int32x4_t& first, int32x4_t& second) {
    if constexpr (BITS == 8) {
        first = vreinterpretq_s32_u8(vld1q_u8(w + k * PANEL + lane * 4));
        second = vreinterpretq_s32_u8(vld1q_u8(w + (k + 4) * PANEL + lane * 4));
    } else {
        uint8x16_t both = vld1q_u8(w + k / 2 * PANEL + lane * 4);
        first = vreinterpretq_s32_u8(vandq_u8(both, vdupq_n_u8(15)));
        second = vreinterpretq_s32_u8(vshrq_n_u8(both, 4));
    }
}

// Pairs of rows: an instruction multiplies two rows and two outputs, eight inputs of each, which are quads interleaved. Of R
// rows, four outputs and 32 inputs these are 4 R products and 8 to interleave, where dot products are 8 R.
template <int BITS, int R>
INLINE void pair_dots(const uint8_t* w, const int8_t* x, int64_t stride, int group, I* sums) {
    static_assert(R % 2 == 0);
    each<2>([&](auto half) {
        int32x4_t squares[R / 2][4];  // [row][output] of two rows and two outputs
        for (auto& pair : squares) {
            for (auto& square : pair) square = vdupq_n_s32(0);
        }
        for (int k = 0; k < group; k += 8) {
            int8x16_t codes[4];
            for (int i = 0; i < 2; i++) {
                int32x4_t first, second;
                eight_inputs<BITS>(w, k, half * 8 + i * 4, first, second);
                codes[2 * i] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
                codes[2 * i + 1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
            }
            for (int r = 0; r < R; r += 2) {
                int8x16_t rows = vcombine_s8(vld1_s8(x + r * stride + k), vld1_s8(x + (r + 1) * stride + k));
                for (int i = 0; i < 4; i++) squares[r / 2][i] = vmmlaq_s32(squares[r / 2][i], rows, codes[i]);
            }
        }
        for (int r = 0; r < R; r += 2) {
            for (int i = 0; i < 4; i += 2) {
                int64x2_t left = vreinterpretq_s64_s32(squares[r / 2][i]), right = vreinterpretq_s64_s32(squares[r / 2][i + 1]);
                vst1q_s32(sums[r].v + half * 8 + i * 2, vreinterpretq_s32_s64(vzip1q_s64(left, right)));
                vst1q_s32(sums[r + 1].v + half * 8 + i * 2, vreinterpretq_s32_s64(vzip2q_s64(left, right)));
            }
        }
    });
}
#endif

// sums[r] = the products of one group: R rows of codes, ``stride`` apart, and a panel's codes. ``totals`` are the rows' sums
// of codes, one every ``step``.
template <int BITS, int R>
INLINE void dots(const uint8_t* w, const int8_t* x, int64_t stride, int group, const int32_t* totals, int64_t step, I* sums) {
    (void)totals, (void)step;
#if defined(__AVX512VNNI__)
    // The instruction wants one side unsigned: 8-bit codes are moved up by 128, and what that adds is taken away first.
    each<R>([&](auto r) { sums[r] = {BITS == 8 ? _mm512_set1_epi32(-128 * totals[r * step]) : _mm512_setzero_si512()}; });
    if constexpr (BITS == 8) {
        for (int k = 0; k < group; k += 4) {
            __m512i codes = _mm512_xor_si512(_mm512_loadu_si512(w + k * PANEL), _mm512_set1_epi8((char)0x80));
            each<R>([&](auto r) {
                sums[r].v = _mm512_dpbusd_epi32(sums[r].v, codes, _mm512_set1_epi32(quad_at(x + r * stride + k)));
            });
        }
    } else {
        const __m512i low = _mm512_set1_epi8(15);
        for (int k = 0; k < group; k += 8) {
            __m512i both = _mm512_loadu_si512(w + k / 2 * PANEL);
            __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            each<R>([&](auto r) {
                const int8_t* at = x + r * stride + k;
                sums[r].v = _mm512_dpbusd_epi32(sums[r].v, first, _mm512_set1_epi32(quad_at(at)));
                sums[r].v = _mm512_dpbusd_epi32(sums[r].v, second, _mm512_set1_epi32(quad_at(at + 4)));
            });
        }
    }
#elif defined(__AVX2__)
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (BITS == 8) {
        each<R>([&](auto r) { sums[r] = none(); });
        // |w|, which may be 128, times x with w's sign: two products are below 2^15, since no x is -128.
        for (int k = 0; k < group; k += 4) {
            __m256i w0 = _mm256_loadu_si256((const __m256i*)(w + k * PANEL)), w1 = _mm256_loadu_si256((const __m256i*)(w + k * PANEL) + 1);
            __m256i size0 = _mm256_abs_epi8(w0), size1 = _mm256_abs_epi8(w1);
            each<R>([&](auto r) {
                __m256i quad = _mm256_set1_epi32(quad_at(x + r * stride + k));
                if constexpr (r > 0) in_turn(sums[r - 1].hi, quad);
                __m256i pairs0 = _mm256_maddubs_epi16(size0, _mm256_sign_epi8(quad, w0));
                __m256i pairs1 = _mm256_maddubs_epi16(size1, _mm256_sign_epi8(quad, w1));
                sums[r].lo = _mm256_add_epi32(sums[r].lo, _mm256_madd_epi16(pairs0, ones));
                sums[r].hi = _mm256_add_epi32(sums[r].hi, _mm256_madd_epi16(pairs1, ones));
            });
        }
    } else {
        const __m256i low = _mm256_set1_epi8(15);
        // Sixteen products of a code below 16 and one below 128 are below 2^15: a piece of 32 inputs adds up in int16.
        auto half = [&](auto side) ALWAYS_INLINE {
            for (int from = 0; from < group; from += 32) {
                __m256i pairs[R];
                each<R>([&](auto r) { pairs[r] = _mm256_setzero_si256(); });
                for (int k = from; k < from + 32; k += 8) {
                    __m256i both = _mm256_loadu_si256((const __m256i*)(w + k / 2 * PANEL) + side);
                    __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                    each<R>([&](auto r) {
                        const int8_t* at = x + r * stride + k;
                        __m256i quad = _mm256_set1_epi32(quad_at(at)), next = _mm256_set1_epi32(quad_at(at + 4));
                        if constexpr (r > 0) in_turn(pairs[r - 1], quad);
                        pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(first, quad));
                        pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(second, next));
                    });
                }
                each<R>([&](auto r) {
                    __m256i &sum = side ? sums[r].hi : sums[r].lo, all = _mm256_madd_epi16(pairs[r], ones);
                    sum = from ? _mm256_add_epi32(sum, all) : all;
                });
            }
        };
        half(std::integral_constant<int, 0>());
        half(std::integral_constant<int, 1>());
    }
#else
#if defined(__ARM_FEATURE_MATMUL_INT8)
    if constexpr (R % 2 == 0) return pair_dots<BITS, R>(w, x, stride, group, sums);
#endif
    for (int r = 0; r < R; r++) sums[r] = none();
    for (int k = 0; k < group; k += 4) {
        int8_t quads[PANEL * 4];
        if constexpr (BITS == 8) {
            std::memcpy(quads, w + k * PANEL, sizeof quads);
        } else {
            const uint8_t* both = w + k / 8 * 4 * PANEL;
            for (int i = 0; i < PANEL * 4; i++) quads[i] = (int8_t)(k % 8 ? both[i] >> 4 : both[i] & 15);
        }
        for (int r = 0; r < R; r++) {
            const int8_t* at = x + r * stride + k;
#if defined(__ARM_FEATURE_DOTPROD)
            int8x16_t quad = vreinterpretq_s8_s32(vdupq_n_s32(quad_at(at)));
            for (int n = 0; n < PANEL; n += 4) {
                int32_t* four = sums[r].v + n;
                vst1q_s32(four, vdotq_s32(vld1q_s32(four), vld1q_s8(quads + n * 4), quad));
            }
#else
            for (int n = 0; n < PANEL; n++) {
                int32_t sum = sums[r].v[n];
                for (int i = 0; i < 4; i++) sum += quads[n * 4 + i] * at[i];
                sums[r].v[n] = sum;
            }
#endif
        }
    }
#endif
}

// Rows whose sums fit in the registers.
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_MATMUL_INT8)
template <int BITS>
constexpr int GROUPED_TALL = 8;
#elif defined(__AVX2__)
template <int BITS>
constexpr int GROUPED_TALL = BITS == 8 ? 4 : 6;
#else
template <int BITS>
constexpr int GROUPED_TALL = 4;
#endif

struct CodeUnit {
    int16_t quads[8][4];  // of four inputs the two even ones, then the odd ones
};
struct GroupHead {
    int32_t minus;  // the sum of products of neighbours, negative
    float scale, offset;
};
// The codes again, 32 inputs of neighbouring rows side by side, and what belongs to groups; ``pitch`` from one to the next of
// a row. Null if no product wants them.
struct Units {
    CodeUnit* codes;
    GroupHead* heads;
    int64_t pitch;
};

// Rows of x as codes; neighbours are ``stride`` codes, and ``groups`` of the others, apart. Of each group: its scale, the sum of
// its codes, and minus the product of both.
struct CodeRows {
    const int8_t* codes;
    const float *scales, *offsets;
    const int32_t* totals;
    int64_t stride, groups;
    Units units;
};

template <int BITS>
struct GroupedPanel {
    const uint8_t* weight = nullptr;
    int width = 0, group = 0;
    static INLINE GroupedPanel of(const Linear& a, int64_t index) {
        if (index * PANEL >= a.outputs) return {};
        return {(const uint8_t*)a.weight + index * a.format.panel_bytes(a.inputs), PANEL, a.format.group};
    }
};

// How a group's products join the sums of a row: the scales, and with 4 bits what their zeros take away.
template <int BITS>
struct Scales {
    F scale, zero;
    explicit INLINE Scales(const uint8_t* end)
        : scale(load((const fp16*)end)), zero(BITS == 4 ? load_bytes(end + 2 * PANEL) * (scale * splat(SIXTEENTH)) : splat(0)) {}
    INLINE void add(I products, float own, float offset, float* out) const {
        F sum = fma(to_float(products), splat(own) * scale, load(out));
        if constexpr (BITS == 4) sum = fma(splat(offset), zero, sum);
        store(out, sum);
    }
};

// Adds groups [g0, g1) of GROUP inputs to the sums of R rows and one panel, fp32 [R][BLOCK].
template <int BITS, int R, int GROUP>
inline void some_groups(CodeRows x, int64_t row, const uint8_t* panel, int64_t g0, int64_t g1, bool fresh, float* out) {
    constexpr Format format{BITS, GROUP};
    if (fresh) each<R>([&](auto r) { store(out + r * BLOCK, splat(0)); });
    const uint8_t* w = panel + g0 * format.group_bytes();
    for (int64_t g = g0; g < g1; g++, w += format.group_bytes()) {
        if (row == 0) fetch_ahead<format.group_bytes()>(w);
        I products[R];
        const int32_t* totals = x.totals + row * x.groups + g;
        dots<BITS, R>(w, x.codes + row * x.stride + g * GROUP, x.stride, GROUP, totals, x.groups, products);
        Scales<BITS> scales(w + GROUP * PANEL * BITS / 8);
        each<R>([&](auto r) {
            int64_t at = (row + r) * x.groups + g;
            scales.add(products[r], x.scales[at], x.offsets[at], out + r * BLOCK);
        });
        asm volatile("" ::: "memory");  // the registers are the next group's: these sums stay in the first-level cache
    }
}

#if defined(__AMX_INT8__)
constexpr int TILE_ROWS = 16, TILE_DEPTH = 64;

template <int BITS>
constexpr bool TILED<GroupedPanel<BITS>> = true;

// Tiles 0-1 are products of 16 rows each, 2-3 the codes of these rows, 4 a panel's: [inputs / 4][16][4], as they are stored.
template <int BITS>
INLINE void configure(GroupedPanel<BITS>, const Linear& a, int rows) {
    if (rows < TILE_ROWS) return;
    int depth = std::min(a.format.group, TILE_DEPTH);
    TileConfig config;
    for (int tile = 0; tile < 4; tile++) {
        config.rows[tile] = TILE_ROWS;
        config.row_bytes[tile] = (uint16_t)(tile < 2 ? 64 : depth);
    }
    config.rows[4] = (uint8_t)(depth / 4);
    config.row_bytes[4] = 64;
    configure(config);
}

// As some_groups, of 16 or 32 rows: the integers come from tiles, which change no bits.
template <int BITS, int R, int GROUP>
inline void tile_groups(CodeRows x, int64_t row, const uint8_t* panel, int64_t g0, int64_t g1, bool fresh, float* out) {
    constexpr Format format{BITS, GROUP};
    constexpr int DEPTH = std::min(GROUP, TILE_DEPTH);
    alignas(64) int32_t products[R][PANEL];
    alignas(64) uint8_t bytes[GROUP * PANEL];
    for (int r = 0; fresh && r < R; r++) store(out + r * BLOCK, splat(0));
    const uint8_t* w = panel + g0 * format.group_bytes();
    for (int64_t g = g0; g < g1; g++, w += format.group_bytes()) {
        const uint8_t* codes = w;
        if constexpr (BITS == 4) {
            const __m512i low = _mm512_set1_epi8(15);
            for (int k = 0; k < GROUP; k += 8) {
                __m512i both = _mm512_loadu_si512(w + k / 2 * PANEL);
                _mm512_storeu_si512(bytes + k * PANEL, _mm512_and_si512(both, low));
                _mm512_storeu_si512(bytes + (k + 4) * PANEL, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
            }
            codes = bytes;
            asm volatile("" ::: "memory");  // as in configure
        }
        const int8_t* at = x.codes + row * x.stride + g * GROUP;
        _tile_zero(0);
        if constexpr (R > TILE_ROWS) _tile_zero(1);
        for (int k = 0; k < GROUP; k += DEPTH) {
            _tile_loadd(4, codes + k * PANEL, 64);
            _tile_loadd(2, at + k, x.stride);
            _tile_dpbssd(0, 2, 4);
            if constexpr (R > TILE_ROWS) {
                _tile_loadd(3, at + TILE_ROWS * x.stride + k, x.stride);
                _tile_dpbssd(1, 3, 4);
            }
        }
        _tile_stored(0, products[0], 64);
        if constexpr (R > TILE_ROWS) _tile_stored(1, products[TILE_ROWS], 64);
        Scales<BITS> scales(w + GROUP * PANEL * BITS / 8);
        for (int r = 0; r < R; r++) {
            int64_t place = (row + r) * x.groups + g;
            scales.add({_mm512_loadu_si512(products[r])}, x.scales[place], x.offsets[place], out + r * BLOCK);
        }
    }
}
#endif

#if defined(PENSTOCK_ANY_ORDER)
template <int BITS>
int64_t row_step(const Linear& a, GroupedPanel<BITS>) {
    return a.outputs % BLOCK == 0 && a.format.group == 32 && a.inputs % 64 == 0 ? 64 : 0;
}
// Two chains of sums, one for every other group.
template <int BITS>
INLINE void row_sums(CodeRows x, const GroupedPanel<BITS>* p, int64_t k0, int64_t k1, float* out) {
    constexpr int GROUP = 32;
    constexpr Format format{BITS, GROUP};
    for (int i = 0; i < 2; i++) {
        F sums[2] = {splat(0), splat(0)};
        const uint8_t* w = p[i].weight + k0 / GROUP * format.group_bytes();
        for (int64_t g = k0 / GROUP; g < k1 / GROUP; g += 2) {
            each<2>([&](auto odd) {
                fetch_ahead<format.group_bytes()>(w);
                I products[1];
                dots<BITS, 1>(w, x.codes + (g + odd) * GROUP, x.stride, GROUP, x.totals + g + odd, x.groups, products);
                const uint8_t* end = w + GROUP * PANEL * BITS / 8;
                F scale = load((const fp16*)end);
                sums[odd] = fma(to_float(products[0]), splat(x.scales[g + odd]) * scale, sums[odd]);
                if constexpr (BITS == 4) {
                    F zero = load_bytes(end + 2 * PANEL) * (scale * splat(SIXTEENTH));
                    sums[odd] = fma(splat(x.offsets[g + odd]), zero, sums[odd]);
                }
                w += format.group_bytes();
            });
        }
        store(out + i * PANEL, sums[0] + sums[1]);
    }
}
#endif

template <int BITS, int GROUP>
INLINE void part_by_groups(
    CodeRows x, int rows, const Pair<GroupedPanel<BITS>>& pair, int64_t k0, int64_t k1, bool fresh, float* out) {
    for (int i = 0; i < 2; i++) {
        const uint8_t* panel = pair.panels[i].weight;
        if (!panel) return;
        int row = 0;
        auto take = [&]<int R>() ALWAYS_INLINE {
            for (; row + R <= rows; row += R) {
                some_groups<BITS, R, GROUP>(x, row, panel, k0 / GROUP, k1 / GROUP, fresh, out + row * BLOCK + i * PANEL);
            }
        };
#if defined(__AMX_INT8__)
        auto tiles = [&]<int R>() {
            for (; row + R <= rows; row += R) {
                tile_groups<BITS, R, GROUP>(x, row, panel, k0 / GROUP, k1 / GROUP, fresh, out + row * BLOCK + i * PANEL);
            }
        };
        tiles.template operator()<BLOCK>();
        tiles.template operator()<TILE_ROWS>();
#endif
        take.template operator()<GROUPED_TALL<BITS>>();
        take.template operator()<2>();
        take.template operator()<1>();
    }
}

template <int BITS>
INLINE void part(
    CodeRows x, int rows, int64_t, const Pair<GroupedPanel<BITS>>& pair, int64_t k0, int64_t k1, bool fresh, bool, float* out) {
    switch (pair.panels[0].group) {
        case 32:
            return part_by_groups<BITS, 32>(x, rows, pair, k0, k1, fresh, out);
        case 64:
            return part_by_groups<BITS, 64>(x, rows, pair, k0, k1, fresh, out);
        default:
            return part_by_groups<BITS, MAX_GROUP>(x, rows, pair, k0, k1, fresh, out);
    }
}

}  // namespace penstock::PENSTOCK_ISA

#include "widened.h"

namespace penstock::PENSTOCK_ISA {

// The greatest of sizes, as bits: those of infinity and NaN are above all others.
INLINE int32_t greatest_bits(const F* v, int count) {
#if defined(__AVX512F__)
    __m512i top = _mm512_setzero_si512(), size = _mm512_set1_epi32(0x7fffffff);
    for (int i = 0; i < count; i++) top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(v[i].v), size));
    return _mm512_reduce_max_epi32(top);
#elif defined(__AVX2__)
    __m256i top = _mm256_setzero_si256(), size = _mm256_set1_epi32(0x7fffffff);
    for (int i = 0; i < count; i++) {
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v[i].lo), size));
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v[i].hi), size));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
#else
    int32_t top = 0;
    for (int i = 0; i < count; i++) {
        int32_t bits[LANES];
        std::memcpy(bits, &v[i], sizeof bits);
        for (int lane = 0; lane < LANES; lane++) top = std::max(top, bits[lane] & 0x7fffffff);
    }
    return top;
#endif
}

constexpr float NOTHING = 7.8886090522e-31f;  // 2^-100: a group whose numbers are all smaller counts as zeros

// One group of a row: code = round(x 127 / max |x|). What is not finite makes the scale NaN.
template <int GROUP, class T>
INLINE void code_group(const T* x, int8_t* codes, float& scale, float& offset, int32_t& total, Units units) {
    constexpr int COUNT = GROUP / LANES;
    F v[COUNT];
    for (int i = 0; i < COUNT; i++) v[i] = load(x + i * LANES);
    int32_t bits = greatest_bits(v, COUNT);
    float most;
    std::memcpy(&most, &bits, 4);
    bool finite = bits < 0x7f800000;
    float factor = finite && most >= NOTHING ? 127.0f / most : 0.0f;
    scale = finite ? (factor != 0 ? most / 127.0f : 0.0f) : std::numeric_limits<float>::quiet_NaN();
    I whole[COUNT], sum = none();
    for (int i = 0; i < COUNT; i++) {
        whole[i] = finite ? to_whole(v[i] * splat(factor)) : none();
        store_codes(codes + i * LANES, whole[i]);
        sum = sum + whole[i];
    }
    total = sum_of(sum);
    offset = -(scale * (float)total);
    if (units.heads) *units.heads = {-128 * total, scale, offset};
    if constexpr (CODE_UNITS) {
        if (units.codes) store_units<COUNT>(whole, units);
    }
}

struct CodeMemory {
    Vector<int8_t> codes;
    Vector<float> scales, offsets;
    Vector<int32_t> totals;
    Vector<CodeUnit> units;
    Vector<GroupHead> heads;
};

constexpr int64_t CODED_AT_ONCE = 1 << 14;  // numbers worth a thread

// Products whose rows of x follow one another.
template <class T>
void grouped_linears_of(const Linear* products, int64_t count) {
    static thread_local CodeMemory memory;  // the caller's; other threads read it
    const Linear& any = *products;
    const T* x = (const T*)any.x;
    int64_t rows = 0;
    for (int64_t i = 0; i < count; i++) rows += products[i].rows;
    int64_t group = any.format.group, groups = any.inputs / group, scales = rows * groups;
    int64_t stride = any.inputs + 64;  // rows a power of two apart would fall into few sets of the first-level cache
    if ((int64_t)memory.codes.size() < rows * stride) memory.codes.resize((size_t)(rows * stride));
    if ((int64_t)memory.scales.size() < scales) {
        memory.scales.resize((size_t)scales);
        memory.offsets.resize((size_t)scales);
        memory.totals.resize((size_t)scales);
    }
    int most = (int)std::min<int64_t>(rows, MOST_ROWS);
    bool eight = any.format.bits == 8;
    bool wide = eight ? Widened<CodeRows, GroupedPanel<8>>::worth(most) : Widened<CodeRows, GroupedPanel<4>>::worth(most);
    int64_t pitch = (rows + 3) | 1;  // odd, so that a row's units fall into different sets, and of whole fours
    int64_t units = CODE_UNITS && wide && eight ? any.inputs / 32 * pitch : 0;
    if ((int64_t)memory.units.size() < units) memory.units.resize((size_t)units);
    if (wide && (int64_t)memory.heads.size() < groups * pitch) memory.heads.resize((size_t)(groups * pitch));
    CodeMemory& m = memory;
    int64_t at_once = std::max<int64_t>(1, CODED_AT_ONCE / group);
    auto code = [&]<int GROUP>(int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            int8_t* codes = m.codes.data() + i / groups * stride + i % groups * GROUP;
            size_t n = (size_t)i;
            int64_t row = i / groups, g = i % groups;
            Units own{};
            if (wide) own = {units ? m.units.data() + g * (GROUP / 32) * pitch + row : nullptr, m.heads.data() + g * pitch + row, pitch};
            code_group<GROUP>(x + i * GROUP, codes, m.scales[n], m.offsets[n], m.totals[n], own);
        }
    };
    parallel((scales + at_once - 1) / at_once, [&](int64_t item, int) {
        int64_t first = item * at_once, last = std::min(scales, first + at_once);
        if (group == 32) return code.template operator()<32>(first, last);
        if (group == 64) return code.template operator()<64>(first, last);
        code.template operator()<MAX_GROUP>(first, last);
    });
    auto rows_at = [&](const Linear& a, int64_t row) {
        row += ((const T*)a.x - x) / a.inputs;
        int64_t at = row * groups;
        return CodeRows{
            m.codes.data() + row * stride, m.scales.data() + at, m.offsets.data() + at, m.totals.data() + at, stride, groups,
            {m.units.data() + row, m.heads.data() + row, pitch}};
    };
#if defined(PENSTOCK_ANY_ORDER)
    if (count == 1) {
        const Linear& a = *products;
        if (a.format.bits == 8 ? one_row<T, GroupedPanel<8>>(a, rows_at(a, 0)) : one_row<T, GroupedPanel<4>>(a, rows_at(a, 0))) return;
    }
#endif
    using At = decltype(rows_at);
    auto compute = any.format.bits == 8 ? all_outputs<T, GroupedPanel<8>, At> : all_outputs<T, GroupedPanel<4>, At>;
    compute(products, count, any.inputs * (units ? 2 : 1), rows_at);
}

template <class T>
void linears_of(const Linear* products, int64_t count) {
    products->format.bits ? grouped_linears_of<T>(products, count) : plain_linears_of<T>(products, count);
}

// Where the code of a lane and input of a group stands, and by how much it is shifted.
struct CodePlace {
    int64_t byte;
    int shift;
};
inline CodePlace code_place(Format format, int lane, int k) {
    if (format.bits == 8) return {(k / 4 * PANEL + lane) * 4 + k % 4, 0};
    return {(k / 8 * PANEL + lane) * 4 + k % 4, k % 8 / 4 * 4};
}

inline void pack_groups_of(const Grouped& a, uint8_t* out) {
    int64_t panels = (a.outputs + PANEL - 1) / PANEL, groups = a.inputs / a.format.group, bytes = a.format.group_bytes();
    int64_t codes = a.format.group * PANEL * a.format.bits / 8;
    parallel(panels, [&](int64_t index, int) {
        std::memset(out + index * groups * bytes, 0, (size_t)(groups * bytes));
        for (int64_t g = 0; g < groups; g++) {
            uint8_t* to = out + (index * groups + g) * bytes;
            for (int lane = 0; lane < std::min<int64_t>(PANEL, a.outputs - index * PANEL); lane++) {
                int64_t at = (index * PANEL + lane) * groups + g;
                const auto* from = (const int8_t*)a.codes + at * a.format.group;
                for (int k = 0; k < a.format.group; k += a.format.bits == 8 ? 4 : 8) {
                    int32_t quad = quad_at(from + k);
                    if (a.format.bits == 4) quad |= quad_at(from + k + 4) << 4;
                    std::memcpy(to + code_place(a.format, lane, k).byte, &quad, 4);
                }
                std::memcpy(to + codes + lane * 2, a.scales + at, 2);
                if (a.format.bits == 4) to[codes + 2 * PANEL + lane] = a.zeros[at];
            }
        }
    });
}

// Rows of a packed table, as stored: code times scale, rounded once.
template <class T>
void grouped_embed_of(const Embed& a) {
    int64_t groups = a.inputs / a.format.group, bytes = a.format.group_bytes();
    int64_t codes = a.format.group * PANEL * a.format.bits / 8;
    parallel(a.rows, [&](int64_t row, int) {
        int64_t id = id_of(a, row);
        int lane = (int)(id % PANEL);
        const uint8_t* panel = (const uint8_t*)a.table + id / PANEL * groups * bytes;
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t* from = panel + g * bytes;
            float numbers[MAX_GROUP], scale = value((const fp16*)(from + codes) + lane);
            for (int k = 0; k < a.format.group; k++) {
                CodePlace place = code_place(a.format, lane, k);
                int code = a.format.bits == 8 ? (int8_t)from[place.byte] : 16 * (from[place.byte] >> place.shift & 15);
                if (a.format.bits == 4) code -= from[codes + 2 * PANEL + lane];
                numbers[k] = (float)code;
            }
            F factor = splat(a.format.bits == 8 ? scale : scale * SIXTEENTH);
            for (int k = 0; k < a.format.group; k += LANES) {
                store((T*)a.out + row * a.inputs + g * a.format.group + k, load(numbers + k) * factor);
            }
        }
        scale_row((T*)a.out + row * a.inputs, a.inputs, a.factor);
    });
}

}  // namespace penstock::PENSTOCK_ISA
