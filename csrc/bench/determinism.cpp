// `penstock bench determinism`: the product's kernels, and the same sources with sums in any order, in one library with one
// team of threads. Built by the command, loaded by nothing else. ``build`` is a place in its list of builds.
#include "kernels.h"
#include "pool.h"

namespace penstock::in_order {
extern const Table table;
}
namespace penstock::any_order {
extern const Table table;
}
namespace penstock::any_order_fast_math {
extern const Table table;
}
using namespace penstock;

namespace {

const Table* const BUILDS[] = {&in_order::table, &any_order::table, &any_order_fast_math::table};

}  // namespace

#define FOR_PYTHON extern "C" __attribute__((visibility("default")))

FOR_PYTHON void use_threads(int count) { set_threads(count); }

FOR_PYTHON void linear(int build, const void* x, const void* weight, void* out, int64_t rows, int64_t outputs, int64_t inputs,
                       int segments, int activation, bool gated, int bits, int group, int dtype) {
    BUILDS[build]->linear({x, weight, nullptr, out, rows, outputs, inputs, segments, (Activation)activation, gated, false,
                           {bits, group}},
                          (Dtype)dtype);
}

FOR_PYTHON void attention(int build, const void* q, const void* k_pool, const void* v_pool, void* out, const int32_t* tables,
                          int64_t columns, int64_t block_size, const int64_t* starts, const int64_t* contexts, int64_t heads,
                          int64_t kv_heads, int64_t width, float scale, int dtype) {
    BUILDS[build]->attention({q, k_pool, v_pool, nullptr, nullptr, out, tables, columns, block_size, starts, contexts, 1, heads,
                              kv_heads, width, 0, false, scale, 0, nullptr},
                             (Dtype)dtype);
}
