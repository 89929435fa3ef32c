// AVX-512 with VNNI on a processor that has AVX2 alone: SIMDe's emulation, and from halves what its version in Debian 12 lacks.
// For tests only (make emulate); included before everything else.
#pragma once

#include <immintrin.h>

#include <cstring>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

namespace emulated {

template <class Whole, class Half>
struct Two {
    Half lo, hi;
    static Two of(Whole x) {
        Two two;
        std::memcpy(&two, &x, sizeof two);
        return two;
    }
    Whole whole() const {
        Whole x;
        std::memcpy(&x, this, sizeof x);
        return x;
    }
};
using Floats = Two<__m512, __m256>;
using Ints = Two<__m512i, __m256i>;

inline __m512 cvtph_ps(__m256i x) {
    return Floats{_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))}.whole();
}
template <int MODE>
inline __m256i cvtps_ph(__m512 x) {
    Floats two = Floats::of(x);
    return _mm256_set_m128i(_mm256_cvtps_ph(two.hi, MODE), _mm256_cvtps_ph(two.lo, MODE));
}
inline __m512i cvtps_epi32(__m512 x) {
    Floats two = Floats::of(x);
    return Ints{_mm256_cvtps_epi32(two.lo), _mm256_cvtps_epi32(two.hi)}.whole();
}
inline __m512 cvtepi32_ps(__m512i x) {
    Ints two = Ints::of(x);
    return Floats{_mm256_cvtepi32_ps(two.lo), _mm256_cvtepi32_ps(two.hi)}.whole();
}
inline __m512i cvtepu16_epi32(__m256i x) {
    return Ints{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))}.whole();
}
inline __m512i cvtepu8_epi32(__m128i x) {
    return Ints{_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))}.whole();
}
inline __m512i cvtepi8_epi32(__m128i x) {
    return Ints{_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))}.whole();
}
// The low bits of each lane.
template <class Narrow, class Out>
inline Out narrow(__m512i x) {
    int lanes[16];
    std::memcpy(lanes, &x, sizeof lanes);
    Narrow low[16];
    for (int i = 0; i < 16; i++) low[i] = (Narrow)lanes[i];
    Out out;
    std::memcpy(&out, low, sizeof out);
    return out;
}
inline int reduce_max_epi32(__m512i x) {
    int lanes[16], top;
    std::memcpy(lanes, &x, sizeof lanes);
    top = lanes[0];
    for (int lane : lanes) top = lane > top ? lane : top;
    return top;
}
inline int reduce_add_epi32(__m512i x) {
    unsigned lanes[16], sum = 0;
    std::memcpy(lanes, &x, sizeof lanes);
    for (unsigned lane : lanes) sum += lane;
    return (int)sum;
}
inline __m512i maskz_loadu_epi32(__mmask16 mask, const void* p) {
    int lanes[16] = {};
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) std::memcpy(lanes + i, (const char*)p + 4 * i, 4);
    }
    __m512i x;
    std::memcpy(&x, lanes, sizeof x);
    return x;
}

}  // namespace emulated

#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(x, mode) emulated::cvtps_ph<mode>(x)
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepi32_epi16(x) emulated::narrow<short, __m256i>(x)
#define _mm512_cvtepi32_epi8(x) emulated::narrow<signed char, __m128i>(x)
#define _mm512_reduce_max_epi32 emulated::reduce_max_epi32
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#define _mm512_maskz_loadu_epi32 emulated::maskz_loadu_epi32

#define __AVX512F__ 1
#if defined(EMULATE_VNNI)
#define __AVX512VNNI__ 1
#endif
#if defined(EMULATE_BF16)
#define __AVX512BF16__ 1
#endif
#if defined(EMULATE_AMX)
#include "amx.h"
#endif
