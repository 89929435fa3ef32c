// Functions of fp32 lanes: the same code at every place of a vector, so that a number's bits do not depend on where it
// stands.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "vec.h"

namespace penstock::PENSTOCK_ISA {

// Denormal numbers count, as they do in torch; the team's threads take them for zeros.
class WithDenormals {
public:
#if defined(__x86_64__)
    WithDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
    ~WithDenormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__)
    WithDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ & ~(1ull << 24)));
    }
    ~WithDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

private:
    uint64_t before_;
#endif
};

// e^x to 1 unit in the last place or two: x = n ln 2 + r, a polynomial in r (minimax, Cephes expf), times 2^n in two
// steps, so that results near both ends of the range are reached.
INLINE F exp(F x) {
    F clamped = min(max(x, splat(-104.0f)), splat(89.0f));
    F n = round(clamped * splat(1.44269504088896341f));
    F r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    F p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    F half = round(n * splat(0.5f));
    F result = p * power_of_two(half) * power_of_two(n - half);
    // Clamping replaced a NaN; infinity and what overflows are already right.
    return less(splat(-104.0f), x, less(x, splat(89.0f), result, x * splat(3.4e38f)), less(x, splat(0.0f), splat(0.0f), x));
}

// The same of x <= 0, and 0 below -87, near the smallest normal number: a weight of softmax.
INLINE F exp_of_negative(F x) {
    F n = round(max(x, splat(-87.0f)) * splat(1.44269504088896341f));  // max takes its second operand for a NaN
    F clamped = max(splat(-87.0f), x);
    F r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    F p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    return less(x, splat(-87.0f), splat(0.0f), p * power_of_two(n));
}

INLINE F absolute(F x) { return max(x, splat(0.0f) - x); }

// Odd polynomial near 0, where 1 - 2 / (1 + e^2x) would cancel (Taylor: the next term is below 1e-9 of x at 0.25).
INLINE F tanh(F x) {
    F square = x * x;
    F p = splat(-0.00886323552990220f);
    p = fma(p, square, splat(0.0218694885361552f));
    p = fma(p, square, splat(-0.0539682539682540f));
    p = fma(p, square, splat(0.133333333333333f));
    p = fma(p, square, splat(-0.333333333333333f));
    F near = fma(p * square, x, x);
    F far = splat(1.0f) - splat(2.0f) / (splat(1.0f) + exp(x + x));
    return less(absolute(x), splat(0.25f), near, far);
}

// Abramowitz and Stegun 7.1.26: 1.5e-7 absolute.
INLINE F erf(F x) {
    F size = absolute(x);
    F t = splat(1.0f) / fma(splat(0.3275911f), size, splat(1.0f));
    F p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    F result = splat(1.0f) - p * t * exp(splat(0.0f) - size * size);
    return less(x, splat(0.0f), splat(0.0f) - result, result);
}

INLINE F activate(F x, Activation kind) {
    switch (kind) {
        case Activation::silu:
            return x / (splat(1.0f) + exp(splat(0.0f) - x));
        case Activation::gelu:
            return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.707106781186547524f)));
        case Activation::gelu_tanh: {
            F inner = splat(0.7978845608028654f) * fma(splat(0.044715f) * x * x, x, x);
            return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
        }
        default:
            return x;
    }
}

INLINE F gate(F g, F u, Activation kind) {
    if (kind == Activation::swiglu_clamped) {
        g = less(splat(7.0f), g, splat(7.0f), g);
        u = less(splat(7.0f), u, splat(7.0f), less(u, splat(-7.0f), splat(-7.0f), u));
        return (u + splat(1.0f)) * (g / (splat(1.0f) + exp(splat(-1.702f) * g)));
    }
    return activate(g, kind) * u;
}

}  // namespace penstock::PENSTOCK_ISA
