// Sixteen fp32 lanes on every instruction set. What is rounded, and in which order lanes are summed, is written here
// once; the compiler may fuse nothing by itself (-ffp-contract=off).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

namespace penstock {

// Storage types. Arithmetic is done in fp32 only.
struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

}  // namespace penstock

namespace penstock::PENSTOCK_ISA {

constexpr int LANES = 16;

// Of this instruction set alone: the linker keeps one copy of std::vector<float>, and it may be one that the processor
// does not have. Aligned, so that no vector of 64 bytes lies across two cache lines.
template <class T>
struct Allocator {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};
    Allocator() = default;
    template <class U>
    Allocator(const Allocator<U>&) {}
    T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), LINE); }
    void deallocate(T* memory, size_t) { ::operator delete(memory, LINE); }
    friend bool operator==(const Allocator&, const Allocator&) { return true; }
};
template <class T>
using Vector = std::vector<T, Allocator<T>>;

#if defined(__AVX512F__)

struct F {
    __m512 v;
};
INLINE F splat(float x) { return {_mm512_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a < b ? x : y, lane by lane; a NaN chooses y.
INLINE F less(F a, F b, F x, F y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// 2^n for whole n in [-126, 127].
INLINE F power_of_two(F n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
INLINE F load(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
INLINE F load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
INLINE F load(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
INLINE void store(bf16* p, F a) {
    __m512i x = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_set1_epi32(rounded, nan, 0x7fc0);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
}
INLINE void store(fp16* p, F a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)); }
// Sixteen pairs of neighbours: the first of each, and the second.
INLINE void split(const bf16* p, F& first, F& second) {
    __m512i x = _mm512_loadu_si512(p);
    first = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
    second = {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)))};
}
INLINE void split(const fp16* p, F& first, F& second) {
    __m512i x = _mm512_loadu_si512(p);
    first = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(x))};
    second = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)))};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct F {
    __m256 lo, hi;
};
INLINE F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
INLINE F round(F a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
INLINE F less(F a, F b, F x, F y) {
    return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
INLINE __m256 power_of_two_half(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE F power_of_two(F n) { return {power_of_two_half(n.lo), power_of_two_half(n.hi)}; }
INLINE __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
INLINE F load(const bf16* p) {
    return {widen(_mm_loadu_si128((const __m128i*)p)), widen(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
INLINE F load(const fp16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
INLINE F load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
INLINE __m256i narrow(__m256 a) {
    __m256i x = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
INLINE void store(bf16* p, F a) {
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow(a.lo), narrow(a.hi)), 0xd8);
    _mm256_storeu_si256((__m256i*)p, packed);
}
INLINE void store(fp16* p, F a) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void split(const bf16* p, F& first, F& second) {
    __m256i lo = _mm256_loadu_si256((const __m256i*)p), hi = _mm256_loadu_si256((const __m256i*)(p + 16));
    __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(hi, mask))};
}
INLINE __m256 low_halves(__m256i x) {
    __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0xd8);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
INLINE void split(const fp16* p, F& first, F& second) {
    __m256i lo = _mm256_loadu_si256((const __m256i*)p), hi = _mm256_loadu_si256((const __m256i*)(p + 16));
    first = {low_halves(lo), low_halves(hi)};
    second = {low_halves(_mm256_srli_epi32(lo, 16)), low_halves(_mm256_srli_epi32(hi, 16))};
}

#else  // any compiler, any processor: plain loops, which it may turn into vectors

struct F {
    float v[LANES];
};
#define EACH(expression)                                     \
    F r;                                                     \
    for (int i = 0; i < LANES; i++) r.v[i] = (expression);   \
    return r
INLINE F splat(float x) { EACH(x); }
INLINE F load(const float* p) { EACH(p[i]); }
INLINE void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
INLINE F operator+(F a, F b) { EACH(a.v[i] + b.v[i]); }
INLINE F operator-(F a, F b) { EACH(a.v[i] - b.v[i]); }
INLINE F operator*(F a, F b) { EACH(a.v[i] * b.v[i]); }
INLINE F operator/(F a, F b) { EACH(a.v[i] / b.v[i]); }
#if defined(__ARM_NEON)
INLINE F fma(F a, F b, F c) {
    F r;
    for (int i = 0; i < LANES; i += 4) {
        vst1q_f32(r.v + i, vfmaq_f32(vld1q_f32(c.v + i), vld1q_f32(a.v + i), vld1q_f32(b.v + i)));
    }
    return r;
}
#else
INLINE F fma(F a, F b, F c) { EACH(a.v[i] * b.v[i] + c.v[i]); }  // rounded twice: without hardware, fmaf is a call
#endif
INLINE F max(F a, F b) { EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE F min(F a, F b) { EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
INLINE F round(F a) {
    const float big = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
    EACH((a.v[i] + big) - big);
}
INLINE F less(F a, F b, F x, F y) { EACH(a.v[i] < b.v[i] ? x.v[i] : y.v[i]); }
INLINE F power_of_two(F n) {
    F r;
    for (int i = 0; i < LANES; i++) {
        uint32_t bits = (uint32_t)((int32_t)n.v[i] + 127) << 23;
        std::memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
INLINE float widen(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
INLINE float widen(fp16 x) {
    uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 0x3ff, bits;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        float f = (float)fraction * 5.9604644775390625e-8f;
        std::memcpy(&bits, &f, 4);
        bits |= sign;
    } else {
        bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
INLINE void narrow(float f, bf16& out) {
    uint32_t x;
    std::memcpy(&x, &f, 4);
    out.bits = f != f ? 0x7fc0 : (uint16_t)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}
INLINE void narrow(float f, fp16& out) {
    uint32_t x;
    std::memcpy(&x, &f, 4);
    uint32_t sign = (x >> 16) & 0x8000, size = x & 0x7fffffff;
    if (size > 0x7f800000) {
        out.bits = (uint16_t)(sign | 0x7e00);
    } else if (size >= 0x477ff000) {  // 65520 and more round to infinity
        out.bits = (uint16_t)(sign | 0x7c00);
    } else if (size < 0x38800000) {  // below 2^-14: whole multiples of 2^-24, which the addition rounds to
        float positive;
        std::memcpy(&positive, &size, 4);
        positive += 0.5f;
        uint32_t sum;
        std::memcpy(&sum, &positive, 4);
        out.bits = (uint16_t)(sign | (sum - 0x3f000000));
    } else {
        out.bits = (uint16_t)(sign | ((size + 0xfff + ((size >> 13) & 1) - 0x38000000) >> 13));
    }
}
INLINE F load(const bf16* p) { EACH(widen(p[i])); }
INLINE F load(const fp16* p) { EACH(widen(p[i])); }
INLINE F load(const int8_t* p) { EACH((float)p[i]); }
template <class T>
INLINE void store(T* p, F a) {
    for (int i = 0; i < LANES; i++) narrow(a.v[i], p[i]);
}
template <class T>
INLINE void split(const T* p, F& first, F& second) {
    for (int i = 0; i < LANES; i++) {
        first.v[i] = widen(p[2 * i]);
        second.v[i] = widen(p[2 * i + 1]);
    }
}
#undef EACH

#endif

// The first n < LANES elements, zeros after them.
template <class T>
INLINE F load_some(const T* p, int64_t n) {
    T buffer[LANES] = {};
    std::memcpy(buffer, p, (size_t)n * sizeof(T));
    return load(buffer);
}
template <class T>
INLINE void store_some(T* p, F a, int64_t n) {
    T buffer[LANES];
    store(buffer, a);
    std::memcpy(p, buffer, (size_t)n * sizeof(T));
}
template <class T>
INLINE F load_upto(const T* p, int64_t n) {
    return n >= LANES ? load(p) : load_some(p, n);
}
template <class T>
INLINE void store_upto(T* p, F a, int64_t n) {
    n >= LANES ? store(p, a) : store_some(p, a, n);
}
template <class T>
INLINE void split_some(const T* p, int64_t pairs, F& first, F& second) {
    T buffer[2 * LANES] = {};
    std::memcpy(buffer, p, (size_t)pairs * 2 * sizeof(T));
    split(buffer, first, second);
}
template <class T>
INLINE float value(const T* p) {
    float lanes[LANES];
    store(lanes, load_some(p, 1));
    return lanes[0];
}
INLINE float value(const float* p) { return *p; }
INLINE float value(const bf16* p) {
    uint32_t bits = (uint32_t)p->bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

#if defined(__AVX2__)
struct Halves {
    __m256 lo, hi;
};
INLINE Halves halves(F a) {
#if defined(__AVX512F__)
    alignas(64) float lanes[LANES];
    store(lanes, a);
    return {_mm256_load_ps(lanes), _mm256_load_ps(lanes + 8)};
#else
    return {a.lo, a.hi};
#endif
}
#endif

// The sixteen lanes, as a binary tree: lane i with lane i + 8, then i + 4, i + 2, i + 1.
INLINE float sum(F a) {
#if defined(__AVX2__)
    Halves both = halves(a);
    __m256 eight = _mm256_add_ps(both.lo, both.hi);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
    float lanes[LANES];
    store(lanes, a);
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}
INLINE float greatest(F a) {
#if defined(__AVX2__)
    Halves both = halves(a);
    __m256 eight = _mm256_max_ps(both.lo, both.hi);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#endif
    float lanes[LANES];
    store(lanes, a);
    float top = lanes[0];
    for (int i = 1; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

// Calls work(0), work(1), ... of constants: what they index is in registers from the start.
template <int N, class Work>
INLINE void each(const Work& work) {
    [&]<int... i>(std::integer_sequence<int, i...>) ALWAYS_INLINE { (work(std::integral_constant<int, i>()), ...); }
    (std::make_integer_sequence<int, N>());
}

}  // namespace penstock::PENSTOCK_ISA
