// Python's way to the kernels: addresses and sizes go in, nothing comes out. Every call gives up the interpreter's lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels.h"
#include "pool.h"
#include "tables.h"
#include "tape.h"

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
    if (name == "avx512_vnni") return avx512 && __builtin_cpu_supports("avx512vnni");
    if (name == "avx512_bf16") return runs("avx512_vnni") && __builtin_cpu_supports("avx512bf16");
    if (name == "amx") {
#if defined(__linux__)
        constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
        if (!runs("avx512_bf16") || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return false;
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl(2)
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
        return false;
#endif
    }
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long DOT_PRODUCTS = 1ul << 20;  // HWCAP_ASIMDDP
    constexpr unsigned long INT8_MATRICES = 1ul << 13;  // HWCAP2_I8MM
    if (name == "dotprod") return getauxval(AT_HWCAP) & DOT_PRODUCTS;
    if (name == "i8mm") return runs("dotprod") && getauxval(AT_HWCAP2) & INT8_MATRICES;
#elif defined(__aarch64__) && defined(__APPLE__)
    auto has = [](const char* feature) {
        int64_t found = 0;
        size_t size = sizeof found;
        return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found;
    };
    if (name == "dotprod") return has("hw.optional.arm.FEAT_DotProd");
    if (name == "i8mm") return runs("dotprod") && has("hw.optional.arm.FEAT_I8MM");
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

void run(const Call<Embed>& call) { kernels().embed(call.args, call.dtype); }
void run(const Call<Linear>& call) { kernels().linear(call.args, call.dtype); }
void run(const Call<Norm>& call) { kernels().norm(call.args, call.dtype); }
void run(const Call<Heads>& call) { kernels().heads(call.args, call.dtype); }
void run(const Call<Attention>& call) { kernels().attention(call.args, call.dtype); }
void run(const Call<Route>& call) { kernels().route(call.args); }
void run(const Call<Experts>& call) { kernels().experts(call.args, call.dtype); }

thread_local Tape* tape = nullptr;  // what this thread runs is noted on it
void forget(Tape* gone) {
    if (tape == gone) tape = nullptr;
}
// Interrupted between its start and its end, a tape goes without having been stopped.
struct PythonTape : Tape {
    ~PythonTape() { forget(this); }
};

// A function for Python: it makes a call of what it is given, runs it, and notes it if a tape is running.
template <class Args, class... Given>
auto runs_and_notes(Call<Args> (*make)(Given...)) {
    return [make](Given... given) {
        Call<Args> call = make(given...);
        run(call);
        if (tape) tape->note(call);
    };
}

Call<Embed> embed(Address table, Address ids, Address out, int64_t rows, int64_t outputs, int64_t inputs, int bits, int group,
                  float factor, int dtype) {
    return {{at(table), at<int64_t>(ids), at(out), rows, outputs, inputs, {bits, group}, factor}, (Dtype)dtype};
}
Call<Linear> linear(Address x, Address weight, Address bias, Address out, int64_t rows, int64_t outputs, int64_t inputs,
                    int segments, int activation, bool gated, bool wide, int bits, int group, int dtype) {
    return {{at(x), at(weight), at(bias), at(out), rows, outputs, inputs, segments, (Activation)activation, gated, wide,
             {bits, group}},
            (Dtype)dtype};
}
Call<Norm> norm(Address x, Address residual, Address weight, Address bias, bool wide_weight, bool centred, Address out,
                int64_t rows, int64_t width, float eps, float factor, int dtype) {
    return {{at(x), at(residual), at(weight), at(bias), wide_weight, centred, at(out), rows, width, eps, factor}, (Dtype)dtype};
}
Call<Heads> heads(Address qkv, Address q_weight, Address k_weight, bool wide_weight, bool whole_row, Address rope, int64_t half,
                  Address positions, Address slots, Address q, Address k_pool, Address v_pool, Address k_scales,
                  Address v_scales, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t block_size, float eps,
                  int dtype) {
    return {{at(qkv), at(q_weight), at(k_weight), wide_weight, whole_row, at<float>(rope), half, at<int64_t>(positions),
             at<int64_t>(slots), at(q), at(k_pool), at(v_pool), at(k_scales), at(v_scales), rows, heads, kv_heads, width,
             block_size, eps},
            (Dtype)dtype};
}
Call<Attention> attention(Address q, Address k_pool, Address v_pool, Address k_scales, Address v_scales, Address out,
                          Address tables, int64_t columns, int64_t block_size, Address starts, Address contexts,
                          int64_t requests, int64_t heads, int64_t kv_heads, int64_t width, int64_t window, bool whole,
                          float scale, float softcap, Address sinks, Address slopes, int dtype) {
    return {{at(q), at(k_pool), at(v_pool), at(k_scales), at(v_scales), at(out), at<int32_t>(tables), columns, block_size,
             at<int64_t>(starts), at<int64_t>(contexts), requests, heads, kv_heads, width, window, whole, scale, softcap,
             at<float>(sinks), at<float>(slopes)},
            (Dtype)dtype};
}
Call<Route> route(Address logits, Address chosen, Address weights, int64_t rows, int64_t experts, int64_t active, bool normalize) {
    return {{at<float>(logits), at<int64_t>(chosen), at<float>(weights), rows, experts, active, normalize}, Dtype::f32};
}
Call<Experts> experts(Address x, Address chosen, Address weights, Address gate_up, Address gate_up_bias, Address down,
                      Address down_bias, Address shared, Address gates, Address out, int64_t rows, int64_t active,
                      int64_t experts, int64_t width, int64_t inner, int activation, int gate_up_bits, int gate_up_group,
                      int down_bits, int down_group, int dtype) {
    return {{at(x), at<int64_t>(chosen), at<float>(weights), at(gate_up), at(gate_up_bias), at(down), at(down_bias), at(shared),
             at(gates), at(out), rows, active, experts, width, inner, (Activation)activation, {gate_up_bits, gate_up_group},
             {down_bits, down_group}},
            (Dtype)dtype};
}

// ``groups``: slots, tables and columns of each KV group.
Step step(int64_t rows, int64_t requests, Address ids, Address positions, Address starts, Address contexts,
          const std::vector<std::tuple<Address, Address, int64_t>>& groups) {
    Step made{rows, requests, at<int64_t>(ids), at<int64_t>(positions), at<int64_t>(starts), at<int64_t>(contexts), {}, {}, {}};
    for (auto& [slots, tables, columns] : groups) {
        made.slots.push_back(at<int64_t>(slots));
        made.tables.push_back(at<int32_t>(tables));
        made.columns.push_back(columns);
    }
    return made;
}

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
    m.def("panel_bytes", [](int64_t inputs, int bits, int group) { return Format{bits, group}.panel_bytes(inputs); });
    m.def("quantize", [](Address weight, Address codes, Address scales, Address zeros, int64_t groups, int bits, int group, int dtype) {
        kernels().quantize({at(weight), groups, {bits, group}, at(codes), at<uint16_t>(scales), at<uint8_t>(zeros)}, (Dtype)dtype);
    }, Free());
    m.def("pack_grouped", [](Address codes, Address scales, Address zeros, Address out, int64_t outputs, int64_t inputs, int bits,
                             int group) {
        kernels().pack_grouped({at(codes), at<uint16_t>(scales), at<uint8_t>(zeros), outputs, inputs, {bits, group}}, at<uint8_t>(out));
    }, Free());
    m.def("embed", runs_and_notes(embed), Free());
    m.def("linear", runs_and_notes(linear), Free());
    m.def("norm", runs_and_notes(norm), Free());
    m.def("heads", runs_and_notes(heads), Free());
    m.def("attention", runs_and_notes(attention), Free());
    m.def("route", runs_and_notes(route), Free());
    m.def("experts", runs_and_notes(experts), Free());

    m.def("draw", [](Address logits, Address limits, Address sites, Address tokens, int64_t rows, int64_t size) {
        kernels().draw({at<float>(logits), at<DrawLimits>(limits), at<DrawSite>(sites), at<int64_t>(tokens), rows, size});
    }, Free());

    nb::class_<Step>(m, "Step");
    m.def("step", &step);
    nb::class_<PythonTape>(m, "Tape")
        .def(nb::init<>())
        .def("start", [](PythonTape& self) { tape = &self; })
        .def("stop", [](PythonTape& self) { forget(&self); })
        .def("lay_out", [](PythonTape& self, const Step& then, int64_t limit, const std::vector<Address>& results) {
            std::vector<const void*> pointers;
            for (Address result : results) pointers.push_back(at(result));
            return self.lay_out(then, limit, pointers);
        })
        .def("bind", [](PythonTape& self, Address memory) { self.bind(at<uint8_t>(memory)); })
        .def("replay", [](const PythonTape& self, const Step& now) { self.replay(now, [](const auto& call) { run(call); }); }, Free());
}
