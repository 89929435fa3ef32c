// Python's way to the kernels: addresses and sizes go in, nothing comes out. Every call gives up the interpreter's lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "pool.h"
#include "tables.h"

namespace nb = nanobind;
using namespace penstock;

#define DECLARE(isa)            \
    namespace penstock::isa {   \
    extern const Table table;   \
    }
TABLES(DECLARE)

namespace {

bool runs(const std::string& name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    unsigned a, b, c, d;
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
    if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    if (name == "avx512") return avx512;
    if (name == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (name == "amx") {
#if defined(__linux__)
        constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
        if (!runs("avx512_bf16") || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILE)) != (BF16 | TILE)) return false;
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl(2)
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
        return false;
#endif
    }
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long DOT_PRODUCTS = 1ul << 20;  // HWCAP_ASIMDDP
    if (name == "dotprod") return getauxval(AT_HWCAP) & DOT_PRODUCTS;
#endif
    return name == "portable" || name.ends_with("_emulated");  // the latter in builds for tests alone
}

// The tables this processor can run, best first.
std::vector<const Table*> usable() {
    std::vector<const Table*> found;
#define TRY(isa) \
    if (runs(#isa)) found.push_back(&penstock::isa::table);
    TABLES(TRY)
    return found;
}

const Table& best() {
    static const Table* table = usable().front();
    return *table;
}

const Table* chosen = nullptr;
const Table& kernels() { return chosen ? *chosen : best(); }

void choose(const std::string& name) {
    for (auto* table : usable()) {
        if (name == table->name) {
            chosen = table;
            return;
        }
    }
    throw std::invalid_argument(name);
}

template <class T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Address = uintptr_t;
using Free = nb::call_guard<nb::gil_scoped_release>;

}  // namespace

NB_MODULE(_native, m) {
    m.def("usable", [] {
        std::vector<std::string> names;
        for (auto* table : usable()) names.emplace_back(table->name);
        return names;
    });
    m.def("choose", &choose);
    m.def("chosen", [] { return std::string(kernels().name); });
    m.def("set_threads", &set_threads);
    m.def("threads", &threads);
    m.def("pack", [](Address weight, int64_t outputs, int64_t inputs, int dtype) {
        kernels().pack(at(weight), outputs, inputs, (Dtype)dtype);
    }, Free());
    m.def("embed", [](Address table, Address ids, Address out, int64_t rows, int64_t outputs, int64_t inputs, int dtype) {
        kernels().unpack_rows(at(table), at<int64_t>(ids), at(out), rows, outputs, inputs, (Dtype)dtype);
    }, Free());
    m.def("panel_bytes", [](int64_t inputs, int bits, int group) { return Format{bits, group}.panel_bytes(inputs); });
    m.def("pack_grouped", [](Address codes, Address scales, Address zeros, Address out, int64_t outputs, int64_t inputs, int bits,
                             int group) {
        kernels().pack_grouped({at(codes), at<uint16_t>(scales), at<uint8_t>(zeros), outputs, inputs, {bits, group}}, at<uint8_t>(out));
    }, Free());
    m.def("embed_grouped", [](Address table, Address ids, Address out, int64_t rows, int64_t outputs, int64_t inputs, int bits,
                              int group, int dtype) {
        kernels().unpack_grouped_rows({at(table), nullptr, nullptr, outputs, inputs, {bits, group}}, at<int64_t>(ids), at(out), rows,
                                      (Dtype)dtype);
    }, Free());
    m.def("linear", [](Address x, Address weight, Address bias, Address out, int64_t rows, int64_t outputs, int64_t inputs,
                       int segments, int activation, bool gated, bool wide, int bits, int group, int dtype) {
        kernels().linear({at(x), at(weight), at(bias), at(out), rows, outputs, inputs, segments, (Activation)activation, gated, wide,
                          {bits, group}},
                         (Dtype)dtype);
    }, Free());
    m.def("norm", [](Address x, Address residual, Address weight, Address bias, bool wide_weight, bool centred, Address out,
                     int64_t rows, int64_t width, float eps, int dtype) {
        kernels().norm({at(x), at(residual), at(weight), at(bias), wide_weight, centred, at(out), rows, width, eps}, (Dtype)dtype);
    }, Free());
    m.def("heads", [](Address qkv, Address q_weight, Address k_weight, bool wide_weight, bool whole_row, Address rope, int64_t half,
                      Address positions, Address slots, Address q, Address k_pool, Address v_pool, Address k_scales,
                      Address v_scales, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t block_size,
                      float eps, int dtype) {
        kernels().heads({at(qkv), at(q_weight), at(k_weight), wide_weight, whole_row, at<float>(rope), half, at<int64_t>(positions),
                         at<int64_t>(slots), at(q), at(k_pool), at(v_pool), at(k_scales), at(v_scales), rows, heads, kv_heads,
                         width, block_size, eps},
                        (Dtype)dtype);
    }, Free());
    m.def("attention", [](Address q, Address k_pool, Address v_pool, Address k_scales, Address v_scales, Address out, Address tables,
                          int64_t columns, int64_t block_size, Address starts, Address contexts, int64_t requests, int64_t heads,
                          int64_t kv_heads, int64_t width, int64_t window, bool whole, float scale, float softcap, Address sinks,
                          int dtype) {
        kernels().attention({at(q), at(k_pool), at(v_pool), at(k_scales), at(v_scales), at(out), at<int32_t>(tables), columns,
                             block_size, at<int64_t>(starts), at<int64_t>(contexts), requests, heads, kv_heads, width, window,
                             whole, scale, softcap, at<float>(sinks)},
                            (Dtype)dtype);
    }, Free());
}
