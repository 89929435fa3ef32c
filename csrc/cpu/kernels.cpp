// All kernels for one instruction set: this file is compiled once for each, with PENSTOCK_ISA as its name.
#include "kernels.h"

#include "attention.h"
#include "draw.h"
#include "linear.h"
#include "moe.h"
#include "quantize.h"
#include "quantized.h"
#include "rows.h"

namespace penstock::PENSTOCK_ISA {
namespace {

template <class Run>
void by_dtype(Dtype dtype, const Run& run) {
    switch (dtype) {
        case Dtype::f32:
            return run(float());
        case Dtype::bf16:
            return run(bf16());
        case Dtype::fp16:
            return run(fp16());
    }
}

void pack(void* weight, int64_t outputs, int64_t inputs, Dtype dtype) {
    by_dtype(dtype, [&](auto t) { pack_of((decltype(t)*)weight, outputs, inputs); });
}
void pack_grouped(const Grouped& a, uint8_t* out) { pack_groups_of(a, out); }
void embed(const Embed& a, Dtype dtype) {
    by_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        a.format.bits ? grouped_embed_of<T>(a) : embed_of<T>(a);
    });
}
void quantize(const Plain& a, Dtype dtype) {
    by_dtype(dtype, [&](auto t) { quantize_of<decltype(t)>(a); });
}
void linear(const Linear& given, Dtype dtype) {
    by_dtype(dtype, [&](auto t) {
        Linear a = given;
        if (!IN_ORDER) a.segments = 1;
        linears_of<decltype(t)>(&a, 1);
    });
}
void norm(const Norm& a, Dtype dtype) {
    by_dtype(dtype, [&](auto t) { norm_of<decltype(t)>(a); });
}
void heads(const Heads& a, Dtype dtype) {
    by_dtype(dtype, [&](auto t) { heads_of<decltype(t)>(a); });
}
void attention(const Attention& a, Dtype dtype) {
    by_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        a.k_scales ? attention_of<T, int8_t>(a) : attention_of<T, T>(a);
    });
}

void route(const Route& a) { route_rows(a); }
void experts(const Experts& a, Dtype dtype) {
    by_dtype(dtype, [&](auto t) { experts_of<decltype(t)>(a); });
}

void draw(const Draws& a) { draw_rows(a); }

}  // namespace

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)
extern const Table table;
const Table table{NAME(PENSTOCK_ISA), pack, quantize, pack_grouped, embed, linear, norm, heads, attention, route, experts, draw};

}  // namespace penstock::PENSTOCK_ISA
