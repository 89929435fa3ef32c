// What a kernel is given, and the table of kernels that each instruction set fills in. Pointers are to contiguous
// memory; nothing is aligned beyond its element. Names and roundings are those of penstock/kernels/ops.py.
#pragma once

#include <cstdint>

namespace penstock {

enum class Dtype { f32, bf16, fp16 };
enum class Activation { none, silu, gelu, gelu_tanh, swiglu_clamped };

// Outputs in one panel of packed weights. Of a matrix [N, K] a panel holds 16 rows (the last one what is left), so
// that lanes run over N and K is sequential: fp32 as [K][16]; two-byte types as [K / 2][16][2], and for odd K a last
// [16]. A panel takes the same memory as its rows did.
constexpr int PANEL = 16;

// How the numbers of a packed weight are written: each for itself, in its own dtype, or as small integers that share a
// scale, ``group`` inputs of an output at a time (ops.py, "Grouped weights"). Panels of the latter hold, group by group:
// codes, 16 fp16 scales, and with 4 bits 16 zeros in sixteenths of a step. Codes stand in quads of inputs, [group / 4][16][4]
// int8; with 4 bits two quads share their bytes, the first in the low halves. The last panel is filled up to 16 outputs.
struct Format {
    int bits = 0, group = 0;  // 0 bits: plain
    constexpr int64_t group_bytes() const { return PANEL * (bits == 8 ? group + 2 : group / 2 + 3); }
    constexpr int64_t panel_bytes(int64_t inputs) const { return inputs / group * group_bytes(); }
};

// A matrix [N, K] of small integers before it is packed.
struct Grouped {
    const void* codes;     // [N, K], int8; uint8 below 16 with 4 bits
    const uint16_t* scales;  // [N, K / group], fp16
    const uint8_t* zeros;    // the same, with 4 bits
    int64_t outputs, inputs;
    Format format;
};

// Groups of plain numbers, one after the other, to become such integers.
struct Plain {
    const void* weight;
    int64_t groups;
    Format format;
    void* codes;
    uint16_t* scales;  // [groups], fp16
    uint8_t* zeros;    // the same, with 4 bits
};

// Rows of a packed table.
struct Embed {
    const void* table;  // [V, D]
    const int64_t* ids;  // [T]
    void* out;           // [T, D]
    int64_t rows, outputs, inputs;
    Format format;
    float factor;  // of every number, rounded again
};

struct Linear {
    const void* x;       // [T, K]
    const void* weight;  // [N, K], packed
    const void* bias;    // [N] or null
    void* out;           // [T, N], or [T, N / 2] if gated
    int64_t rows, outputs, inputs;
    int segments;  // equal parts of K that add along a binary tree
    Activation activation;
    bool gated;  // the first half of the outputs are gates of the second
    bool wide;   // out is fp32
    Format format;
};

struct Norm {
    const void* x;   // [T, D]
    void* residual;  // null, or [T, D]: x is added to it, and the sum is normed
    const void *weight, *bias;  // null weight: nothing is normed; bias may be null
    bool wide_weight;           // weight and bias are fp32
    bool centred;               // LayerNorm: the mean is taken away first
    void* out;
    int64_t rows, width;
    float eps, factor;  // factor: of x before it is added, rounded
};

struct Heads {
    const void* qkv;  // [T, (N + 2 H) d]
    const void *q_weight, *k_weight;  // null, or [d] or [N d] and [H d]
    bool wide_weight, whole_row;      // whole_row: all heads of a row are normed together
    const float* rope;                // [positions, 2 half], cosines then sines; null rotates nothing
    int64_t half;
    const int64_t *positions, *slots;  // [T]
    void* q_out;                       // [T, N, d]
    void *k_pool, *v_pool;             // [blocks, H, d, B]; [blocks, H, B, d]
    void *k_scales, *v_scales;         // null, or [blocks, H, B] in bf16: then K and V are int8
    int64_t rows, heads, kv_heads, width, block_size;
    float eps;
};

struct Attention {
    const void* q;  // [T, N, d]
    const void *k_pool, *v_pool, *k_scales, *v_scales;  // as in Heads
    void* out;              // [T, N d]
    const int32_t* tables;  // [R, columns]
    int64_t columns, block_size;
    const int64_t* starts;    // [R + 1]
    const int64_t* contexts;  // [R]
    int64_t requests, heads, kv_heads, width;
    int64_t window;  // 0: all
    bool whole;      // a row sees all of its request, later positions too
    float scale, softcap;  // softcap 0: none
    const float *sinks, *slopes;  // [N] or null; slopes not with ``whole``
};

// The experts of each row and their weights.
struct Route {
    const float* logits;  // [T, E]
    int64_t* chosen;      // [T, A], the largest logits in descending order
    float* weights;       // [T, A]
    int64_t rows, experts, active;
    bool normalize;  // weights are divided by the sum of the chosen, not of all
};

struct Experts {
    const void* x;                       // [T, D]
    const int64_t* chosen;               // [T, A]
    const float* weights;                // [T, A]
    const void *gate_up, *gate_up_bias;  // [E, 2 F, D], packed; [E, 2 F] or null
    const void *down, *down_bias;        // [E, D, F], packed; [E, D] or null
    const void *shared, *gates;          // null, or [T, D] and [T]: what every row uses, as far as its gate lets it
    void* out;                           // [T, D]
    int64_t rows, active, experts, width, inner;
    Activation activation;
    Format gate_up_format, down_format;
};

// How a row's token is drawn. What is off: min_gap = -inf, top_p = inf, top_k = size; temperature 0 is greedy. ``ruled``: not
// 0 if rules may have made logits -inf.
struct DrawLimits {
    double temperature, min_gap, top_p, top_k, ruled;
};
// Where it stands, for its noise: words of the seed, sample and position.
struct DrawSite {
    int64_t low, middle, high, sample, position;
};
constexpr int64_t UNDECIDED = -5;
struct Draws {
    const float* logits;  // [R, size]
    const DrawLimits* limits;
    const DrawSite* sites;
    int64_t* tokens;  // [R], or UNDECIDED
    int64_t rows, size;
};

struct Table {
    const char* name;
    void (*pack)(void* weight, int64_t outputs, int64_t inputs, Dtype);  // in place
    void (*quantize)(const Plain&, Dtype);
    void (*pack_grouped)(const Grouped&, uint8_t* out);
    void (*embed)(const Embed&, Dtype);
    void (*linear)(const Linear&, Dtype);
    void (*norm)(const Norm&, Dtype);
    void (*heads)(const Heads&, Dtype);
    void (*attention)(const Attention&, Dtype);
    void (*route)(const Route&);
    void (*experts)(const Experts&, Dtype);
    void (*draw)(const Draws&);
};

// Sums in any order: not in the product, but in what `penstock bench determinism` builds to show what the order costs.
#if defined(PENSTOCK_ANY_ORDER)
constexpr bool IN_ORDER = false;
constexpr int64_t SEGMENT = PENSTOCK_ANY_ORDER;
#else
constexpr bool IN_ORDER = true;
constexpr int64_t SEGMENT = 128;  // keys of one attention segment (ops.py)
#endif

}  // namespace penstock
