// Products of many rows of codes, on AVX2 and with VNNI: a panel's codes are laid out once as the innermost loop wants them. What
// adds up are integers: no bit differs from what fewer rows get.
#pragma once

#include "linear.h"

namespace penstock::PENSTOCK_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool CODE_UNITS = true;

// The codes at even and at odd inputs of 32 bytes, as int16.
INLINE __m256i even_codes(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
INLINE __m256i odd_codes(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

// What many rows are multiplied by, of the codes of one group of one row.
template <int COUNT>
INLINE void store_units(const I* codes, Units to) {
    __m256i sums = _mm256_setzero_si256();  // each product of neighbours counts twice
    for (int i = 0; i < COUNT; i++) {
        __m256i words = _mm256_packs_epi32(_mm256_shuffle_epi32(codes[i].lo, 0xd8), _mm256_shuffle_epi32(codes[i].hi, 0xd8));
        words = _mm256_permute4x64_epi64(words, 0xd8);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_shuffle_epi32(words, 0xb1)));
        _mm256_storeu_si256((__m256i*)(to.codes + i / 2 * to.pitch) + i % 2, words);
    }
    to.heads->minus = -sum_of(sums) / 2;
}

// What both widths of codes share: panels, groups and rows in their order. ``Own`` lays groups of a panel out (widen), and adds
// them to the sums of four rows, or fewer (some_rows).
template <int BITS, class Own>
struct ByPanels {
    static constexpr int ROWS = MOST_ROWS;
    static constexpr int64_t DEEP = 128, MOST = DEEP / 32;  // inputs; groups
    static constexpr int TALL = 4;  // rows whose sums, and some inputs of a panel, fit in the registers

    template <class Do>
    static INLINE void of_some(int rows, const Do& each_row) {
        if (rows == TALL) return each<TALL>(each_row);
        each<TALL - 1>([&](auto r) {
            if (r < rows) each_row(r);
        });
    }

    template <int GROUP>
    INLINE void by_groups(int rows, const Pair<GroupedPanel<BITS>>& pair, int64_t k0, int64_t k1, bool fresh, float* out) {
        auto* own = static_cast<Own*>(this);
        int64_t first = k0 / GROUP, groups = (k1 - k0) / GROUP;
        for (int i = 0; i < 2 && pair.panels[i].weight; i++) {
            own->template widen<GROUP>(pair.panels[i].weight + first * Format{BITS, GROUP}.group_bytes(), groups);
            for (int row = 0; row < rows; row += TALL) {
                int some = std::min(TALL, rows - row);
                own->template some_rows<GROUP>(row, some, first, groups, fresh, out + row * BLOCK + i * PANEL);
            }
        }
    }

    void part(int rows, int64_t, const Pair<GroupedPanel<BITS>>& pair, int64_t k0, int64_t k1, bool fresh, float* out) {
        int group = pair.panels[0].group;
        if (group == 32) return by_groups<32>(rows, pair, k0, k1, fresh, out);
        if (group == 64) return by_groups<64>(rows, pair, k0, k1, fresh, out);
        by_groups<MAX_GROUP>(rows, pair, k0, k1, fresh, out);
    }
};

// 8-bit codes, where no instruction adds products of bytes to int32. With
//   x0 w0 + x1 w1 = (x0 + w1) (x1 + w0) - x0 x1 - w0 w1        (Winograd, "A new algorithm for inner product", 1968)
// half of the multiplications become additions. |w| times x with w's sign takes four instructions for 32 products too, but
// three of them are for the two ports that multiply; here it is one, and the others suit all four ports. What is taken away is
// known of each row and of each output before they meet.
template <>
struct Widened<CodeRows, GroupedPanel<8>> : ByPanels<8, Widened<CodeRows, GroupedPanel<8>>> {
    Units x;
    alignas(64) __m256i w[DEEP / 4][4];  // of four inputs and eight outputs the even, the odd; of the other eight outputs
    alignas(64) __m256i minus[MOST][2];  // the sum of w0 w1, negative
    alignas(64) F scales[MOST];

    // Weights of fewer rows come from memory, which is read fastest in long runs.
    static bool worth(int rows) { return rows > BLOCK; }

    void take(CodeRows rows, int, const Linear&, int64_t, int64_t) { x = rows.units; }

    template <int GROUP>
    INLINE void widen(const uint8_t* panel, int64_t groups) {
        const __m256i none = _mm256_setzero_si256();
        for (int64_t g = 0; g < groups; g++, panel += Format{8, GROUP}.group_bytes()) {
            __m256i sums[2] = {none, none};
            for (int quad = 0; quad < GROUP / 4; quad++) {
                for (int half = 0; half < 2; half++) {
                    __m256i bytes = _mm256_loadu_si256((const __m256i*)panel + quad * 2 + half);
                    __m256i even = even_codes(bytes), odd = odd_codes(bytes);
                    __m256i* to = w[g * GROUP / 4 + quad] + half * 2;
                    to[0] = even, to[1] = odd;
                    sums[half] = _mm256_sub_epi32(sums[half], _mm256_madd_epi16(even, odd));
                }
            }
            for (int half = 0; half < 2; half++) minus[g][half] = sums[half];
            scales[g] = load((const fp16*)(panel + GROUP * PANEL));
        }
    }

    // Adds the products of four rows and 32 inputs: written out, since compilers keep other things in the sixteen registers
    // than the eight sums, four vectors of the panel and four of what is under way.
    INLINE static void add_unit(const CodeUnit* rows, const __m256i* panel, I* sums) {
        I a = sums[0], b = sums[1], c = sums[2], d = sums[3];
        const CodeUnit* end = rows + 1;
#define ROW(at, lo, hi) \
    "vpbroadcastd " at "(%[x]), %%ymm12\n vpbroadcastd 4+" at "(%[x]), %%ymm13\n" \
    "vpaddw %%ymm12, %%ymm9, %%ymm14\n vpaddw %%ymm13, %%ymm8, %%ymm15\n" \
    "vpaddw %%ymm12, %%ymm11, %%ymm12\n vpaddw %%ymm13, %%ymm10, %%ymm13\n" \
    "vpmaddwd %%ymm14, %%ymm15, %%ymm14\n vpmaddwd %%ymm12, %%ymm13, %%ymm12\n" \
    "vpaddd %%ymm14, %[" lo "], %[" lo "]\n vpaddd %%ymm12, %[" hi "], %[" hi "]\n"
        asm("1:\n"
            "vmovdqa (%[w]), %%ymm8\n vmovdqa 32(%[w]), %%ymm9\n vmovdqa 64(%[w]), %%ymm10\n vmovdqa 96(%[w]), %%ymm11\n"
            ROW("0", "a0", "a1") ROW("64", "b0", "b1") ROW("128", "c0", "c1") ROW("192", "d0", "d1")
            "add $8, %[x]\n sub $-128, %[w]\n cmp %[end], %[x]\n jne 1b\n"
            : [a0] "+x"(a.lo), [a1] "+x"(a.hi), [b0] "+x"(b.lo), [b1] "+x"(b.hi), [c0] "+x"(c.lo), [c1] "+x"(c.hi),
              [d0] "+x"(d.lo), [d1] "+x"(d.hi), [x] "+r"(rows), [w] "+r"(panel)
            : [end] "r"(end)
            : "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15", "memory", "cc");
#undef ROW
        sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
    }

    // Adds ``groups`` groups, of the rows' from ``first`` on, to the sums of four rows, or fewer, and the panel.
    template <int GROUP>
    INLINE void some_rows(int row, int rows, int64_t first, int64_t groups, bool fresh, float* out) {
        constexpr int UNITS = GROUP / 32;
        for (int r = 0; fresh && r < rows; r++) store(out + r * BLOCK, splat(0));
        const CodeUnit* codes = x.codes + first * UNITS * x.pitch + row;
        const GroupHead* heads = x.heads + first * x.pitch + row;
        for (int64_t g = 0; g < groups; g++, heads += x.pitch) {
            I sums[TALL];
            each<TALL>([&](auto r) {
                __m256i own = _mm256_set1_epi32(heads[r].minus);
                sums[r] = {_mm256_add_epi32(own, minus[g][0]), _mm256_add_epi32(own, minus[g][1])};
            });
            for (int unit = 0; unit < UNITS; unit++, codes += x.pitch) add_unit(codes, w[(g * UNITS + unit) * 8], sums);
            auto end = [&](auto r) {
                store(out + r * BLOCK, fma(to_float(sums[r]), splat(heads[r].scale) * scales[g], load(out + r * BLOCK)));
            };
            of_some(rows, end);
        }
    }
};

// 4-bit codes: sixteen products of a code below 16 and one below 128 are below 2^15, so that 32 inputs add up in int16 by two
// instructions for 32 products. What would be most of the work, taking codes out of their bytes, is done once for all rows.
template <>
struct Widened<CodeRows, GroupedPanel<4>> : ByPanels<4, Widened<CodeRows, GroupedPanel<4>>> {
    CodeRows x;
    alignas(64) __m256i w[DEEP / 8][4];  // of eight inputs and eight outputs the first four, the others; of the other outputs
    alignas(64) F scales[MOST], zeros[MOST];

    static bool worth(int rows) { return rows >= 8; }

    void take(CodeRows rows, int, const Linear&, int64_t, int64_t) { x = rows; }

    template <int GROUP>
    INLINE void widen(const uint8_t* panel, int64_t groups) {
        const __m256i low = _mm256_set1_epi8(15);
        for (int64_t g = 0; g < groups; g++, panel += Format{4, GROUP}.group_bytes()) {
            for (int k = 0; k < GROUP / 8; k++) {
                __m256i* to = w[g * GROUP / 8 + k];
                for (int half = 0; half < 2; half++) {
                    __m256i both = _mm256_loadu_si256((const __m256i*)panel + k * 2 + half);
                    to[half * 2] = _mm256_and_si256(both, low);
                    to[half * 2 + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                }
            }
            Scales<4> own(panel + GROUP * PANEL / 2);
            scales[g] = own.scale, zeros[g] = own.zero;
        }
    }

    // The products of four rows and 32 inputs, written out as above; int16, in pairs.
    INLINE static void some_inputs(const int8_t* const* rows, int64_t k, const __m256i* panel, I* pairs) {
        I a = none(), b = none(), c = none(), d = none();
        const __m256i* end = panel + 16;
#define ROW(at, lo, hi) \
    "vpbroadcastd (%[" at "],%[k]), %%ymm12\n vpbroadcastd 4(%[" at "],%[k]), %%ymm13\n" \
    "vpmaddubsw %%ymm12, %%ymm8, %%ymm14\n vpmaddubsw %%ymm13, %%ymm9, %%ymm15\n" \
    "vpmaddubsw %%ymm12, %%ymm10, %%ymm12\n vpmaddubsw %%ymm13, %%ymm11, %%ymm13\n" \
    "vpaddw %%ymm14, %[" lo "], %[" lo "]\n vpaddw %%ymm12, %[" hi "], %[" hi "]\n" \
    "vpaddw %%ymm15, %[" lo "], %[" lo "]\n vpaddw %%ymm13, %[" hi "], %[" hi "]\n"
        asm("1:\n"
            "vmovdqa (%[w]), %%ymm8\n vmovdqa 32(%[w]), %%ymm9\n vmovdqa 64(%[w]), %%ymm10\n vmovdqa 96(%[w]), %%ymm11\n"
            ROW("x0", "a0", "a1") ROW("x1", "b0", "b1") ROW("x2", "c0", "c1") ROW("x3", "d0", "d1")
            "add $8, %[k]\n sub $-128, %[w]\n cmp %[end], %[w]\n jne 1b\n"
            : [a0] "+x"(a.lo), [a1] "+x"(a.hi), [b0] "+x"(b.lo), [b1] "+x"(b.hi), [c0] "+x"(c.lo), [c1] "+x"(c.hi),
              [d0] "+x"(d.lo), [d1] "+x"(d.hi), [k] "+r"(k), [w] "+r"(panel)
            : [x0] "r"(rows[0]), [x1] "r"(rows[1]), [x2] "r"(rows[2]), [x3] "r"(rows[3]), [end] "r"(end)
            : "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15", "memory", "cc");
#undef ROW
        pairs[0] = a, pairs[1] = b, pairs[2] = c, pairs[3] = d;
    }

    // Adds ``groups`` groups, the rows' from ``first`` on, to the sums of four rows, or fewer, and the panel.
    template <int GROUP>
    INLINE void some_rows(int row, int rows, int64_t first, int64_t groups, bool fresh, float* out) {
        const __m256i ones = _mm256_set1_epi16(1);
        for (int r = 0; fresh && r < rows; r++) store(out + r * BLOCK, splat(0));
        const int8_t* codes[TALL];
        each<TALL>([&](auto r) { codes[r] = x.codes + (row + std::min<int>(r, rows - 1)) * x.stride; });
        const GroupHead* heads = x.units.heads + first * x.units.pitch + row;
        for (int64_t g = 0; g < groups; g++, heads += x.units.pitch) {
            I sums[TALL];
            for (int unit = 0; unit < GROUP / 32; unit++) {
                I pairs[TALL];
                some_inputs(codes, (first + g) * GROUP + unit * 32, w[(g * GROUP + unit * 32) / 8], pairs);
                each<TALL>([&](auto r) {
                    I some = {_mm256_madd_epi16(pairs[r].lo, ones), _mm256_madd_epi16(pairs[r].hi, ones)};
                    sums[r] = unit ? sums[r] + some : some;
                });
            }
            auto end = [&](auto r) {
                F sum = fma(to_float(sums[r]), splat(heads[r].scale) * scales[g], load(out + r * BLOCK));
                store(out + r * BLOCK, fma(splat(heads[r].offset), zeros[g], sum));
            };
            of_some(rows, end);
        }
    }
};

#elif defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
constexpr bool CODE_UNITS = false;

// Compilers copy the sums of a loop to and fro around the intrinsic.
INLINE void add_bytes(__m512i& sums, __m512i bytes, __m512i others) {
#if defined(EMULATE_VNNI)
    sums = _mm512_dpbusd_epi32(sums, bytes, others);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(others));
#endif
}

// An instruction joins 64 products of bytes to sixteen int32, if one side is unsigned: for all rows once, 8-bit codes of a
// pair of panels are moved up by 128, and 4-bit codes come out of their bytes. What 128 adds is known of each row.
template <int BITS>
struct Widened<CodeRows, GroupedPanel<BITS>> {
    static constexpr int ROWS = MOST_ROWS, TALL = 6;  // rows whose sums with two panels fit in the registers, twice
    static constexpr int64_t DEEP = 256, MOST = DEEP / 32;  // inputs; groups
    CodeRows x;
    const uint8_t* next[2];  // what comes from memory while a piece is computed: so many lines of the next, a group's time
    int lines;
    alignas(64) __m512i w[DEEP / 4][2];
    alignas(64) F scales[MOST][2], zeros[MOST][2];

    // Weights of fewer rows come from memory: there it pays to take them as they are.
    static bool worth(int rows) { return rows >= (BITS == 8 ? 12 : 24); }

    void take(CodeRows rows, int, const Linear&, int64_t, int64_t) { x = rows; }

    INLINE void widen(const uint8_t* panel, int i, int64_t groups, int group) {
        const __m512i low = _mm512_set1_epi8(15), top = _mm512_set1_epi8((char)0x80);
        for (int64_t g = 0; g < groups; g++, panel += Format{BITS, group}.group_bytes()) {
            auto* to = w + g * group / 4;
            for (int quad = 0; quad < group / 4; quad += 8 / BITS) {
                __m512i codes = _mm512_loadu_si512(panel + quad * PANEL * BITS / 2);
                if constexpr (BITS == 8) {
                    to[quad][i] = _mm512_xor_si512(codes, top);
                } else {
                    to[quad][i] = _mm512_and_si512(codes, low);
                    to[quad + 1][i] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
                }
            }
            Scales<BITS> own(panel + group * PANEL * BITS / 8);
            scales[g][i] = own.scale, zeros[g][i] = own.zero;
        }
    }

    template <int R>
    __attribute__((noinline)) void some_rows(int row, int64_t first, int64_t groups, int group, bool fresh, float* out) {
        auto of_each = [&](const auto& work) ALWAYS_INLINE {
            each<R>([&](auto r) ALWAYS_INLINE { each<2>([&](auto i) ALWAYS_INLINE { work(r, i); }); });
        };
        F sums[R][2];
        of_each([&](auto r, auto i) ALWAYS_INLINE { sums[r][i] = fresh ? splat(0) : load(out + r * BLOCK + i * PANEL); });
        const int64_t stride = x.stride;
        const int8_t* codes = x.codes + row * stride + first * group;
        const GroupHead* heads = x.units.heads + first * x.units.pitch + row;
        const auto* panels = w;
        for (int64_t g = 0; g < groups; g++, heads += x.units.pitch) {
            __m512i products[R][2];
            each<R>([&](auto r) ALWAYS_INLINE {
                products[r][0] = products[r][1] = BITS == 8 ? _mm512_set1_epi32(heads[r].minus) : _mm512_setzero_si512();
            });
            for (const int8_t* end = codes + group; codes != end; codes += 4, panels++) {
                __m512i w0 = (*panels)[0], w1 = (*panels)[1];
                each<R>([&](auto r) ALWAYS_INLINE {
                    __m512i quad = _mm512_set1_epi32(quad_at(codes + r * stride));
                    add_bytes(products[r][0], w0, quad);
                    add_bytes(products[r][1], w1, quad);
                });
            }
            asm volatile("" ::: "memory");  // what is needed from here on is not loaded before: registers are short
            each<R>([&](auto r) ALWAYS_INLINE {
                F own = splat(heads[r].scale);
                each<2>([&](auto i) ALWAYS_INLINE {
                    sums[r][i] = fma(to_float(I{products[r][i]}), own * scales[g][i], sums[r][i]);
                    if constexpr (BITS == 4) sums[r][i] = fma(splat(heads[r].offset), zeros[g][i], sums[r][i]);
                });
            });
            for (int line = 0; line < lines; line++) {
                for (auto& at : next) __builtin_prefetch(at), at += 64;
            }
            asm volatile("" ::: "memory");
        }
        of_each([&](auto r, auto i) ALWAYS_INLINE { store(out + r * BLOCK + i * PANEL, sums[r][i]); });
    }

    void part(int rows, int64_t, const Pair<GroupedPanel<BITS>>& pair, int64_t k0, int64_t k1, bool fresh, float* out) {
        int group = pair.panels[0].group;
        int64_t first = k0 / group, groups = (k1 - k0) / group;
        for (int i = 0; i < 2; i++) {
            const uint8_t* panel = pair.panels[pair.panels[i].weight ? i : 0].weight;  // nobody reads what the first gives twice
            widen(panel + first * Format{BITS, group}.group_bytes(), i, groups, group);
            next[i] = panel + (first + groups) * Format{BITS, group}.group_bytes();
        }
        int tiles = (rows + TALL - 1) / TALL;  // of four to six rows
        int64_t all = (groups * Format{BITS, group}.group_bytes() + 63) / 64, turns = tiles * groups;
        lines = (int)((all + turns - 1) / turns);
        for (int tile = 0, row = 0, height; tile < tiles; tile++, row += height) {
            height = rows / tiles + (tile < rows % tiles);
            float* to = out + row * BLOCK;
            if (height == 6) some_rows<6>(row, first, groups, group, fresh, to);
            if (height == 5) some_rows<5>(row, first, groups, group, fresh, to);
            if (height == 4) some_rows<4>(row, first, groups, group, fresh, to);
        }
    }
};

#else
constexpr bool CODE_UNITS = false;
#endif

}  // namespace penstock::PENSTOCK_ISA
