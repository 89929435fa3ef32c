// Capture and replay: the calls of one forward pass, noted while they ran, and run again for other rows without Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <type_traits>
#include <variant>
#include <vector>

#include "kernels.h"

namespace penstock {

template <class Args>
struct Call {
    Args args;
    Dtype dtype;
};
using AnyCall = std::variant<Call<Embed>, Call<Linear>, Call<Norm>, Call<Heads>, Call<Attention>, Call<Route>, Call<Experts>>;

// What changes from step to step. Of each KV group: slots, block tables and their columns.
struct Step {
    int64_t rows, requests;
    const int64_t *ids, *positions, *starts, *contexts;
    std::vector<const int64_t*> slots;
    std::vector<const int32_t*> tables;
    std::vector<int64_t> columns;
};

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Calls see(pointer, bytes of a row, whether it is read, whether it is written) for everything that is handed from call to call.
template <class See>
void passed_on(Embed& a, Dtype dtype, const See& see) {
    see(a.out, a.inputs * bytes_of(dtype), false, true);
}
template <class See>
void passed_on(Linear& a, Dtype dtype, const See& see) {
    see(a.x, a.inputs * bytes_of(dtype), true, false);
    see(a.out, (a.gated ? a.outputs / 2 : a.outputs) * (a.wide ? 4 : bytes_of(dtype)), false, true);
}
template <class See>
void passed_on(Norm& a, Dtype dtype, const See& see) {
    see(a.x, a.width * bytes_of(dtype), true, false);
    if (a.residual) see(a.residual, a.width * bytes_of(dtype), true, true);
    if (a.out) see(a.out, a.width * bytes_of(dtype), false, true);
}
template <class See>
void passed_on(Heads& a, Dtype dtype, const See& see) {
    see(a.qkv, (a.heads + 2 * a.kv_heads) * a.width * bytes_of(dtype), true, false);
    see(a.q_out, a.heads * a.width * bytes_of(dtype), false, true);
}
template <class See>
void passed_on(Attention& a, Dtype dtype, const See& see) {
    see(a.q, a.heads * a.width * bytes_of(dtype), true, false);
    see(a.out, a.heads * a.width * bytes_of(dtype), false, true);
}
template <class See>
void passed_on(Route& a, Dtype, const See& see) {
    see(a.logits, a.experts * 4, true, false);
    see(a.chosen, a.active * 8, false, true);
    see(a.weights, a.active * 4, false, true);
}
template <class See>
void passed_on(Experts& a, Dtype dtype, const See& see) {
    see(a.x, a.width * bytes_of(dtype), true, false);
    see(a.chosen, a.active * 8, true, false);
    see(a.weights, a.active * 4, true, false);
    if (a.shared) see(a.shared, a.width * bytes_of(dtype), true, false);
    if (a.shared) see(a.gates, bytes_of(dtype), true, false);
    see(a.out, a.width * bytes_of(dtype), false, true);
}

// What of a call is the step's. KV groups are told apart by the slots or tables that they had when the tape was made.
template <class Args>
void take_step(Args& a, const Step&, const Step& now) { a.rows = now.rows; }
inline void take_step(Embed& a, const Step&, const Step& now) { a.rows = now.rows, a.ids = now.ids; }
inline void take_step(Heads& a, const Step& then, const Step& now) {
    a.rows = now.rows, a.positions = now.positions;
    for (size_t g = 0; g < now.slots.size(); g++) {
        if (a.slots == then.slots[g]) {
            a.slots = now.slots[g];
            return;
        }
    }
}
inline void take_step(Attention& a, const Step& then, const Step& now) {
    a.requests = now.requests, a.starts = now.starts, a.contexts = now.contexts;
    for (size_t g = 0; g < now.tables.size(); g++) {
        if (a.tables == then.tables[g]) {
            a.tables = now.tables[g], a.columns = now.columns[g];
            return;
        }
    }
}

// Whether a call was made for this step and no other.
template <class Args>
bool is_of(const Args& a, const Step& step) { return a.rows == step.rows; }
inline bool is_of(const Embed& a, const Step& step) { return a.rows == step.rows && a.ids == step.ids; }
inline bool is_of(const Heads& a, const Step& step) {
    bool found = std::find(step.slots.begin(), step.slots.end(), a.slots) != step.slots.end();
    return found && a.rows == step.rows && a.positions == step.positions;
}
inline bool is_of(const Attention& a, const Step& step) {
    bool found = std::find(step.tables.begin(), step.tables.end(), a.tables) != step.tables.end();
    return found && a.requests == step.requests && a.starts == step.starts && a.contexts == step.contexts;
}

class Tape {
public:
    template <class Args>
    void note(const Call<Args>& call) {
        calls_.emplace_back(call);
    }

    // Gives every value between calls its place in one piece of memory for ``limit`` rows, places being used
    // again after a value's last reader. Returns where the ``results`` are, then the size;
    // nothing if a call reads what no call has written in this width, or is not for this step.
    std::vector<int64_t> lay_out(Step then, int64_t limit, const std::vector<const void*>& results) {
        then_ = std::move(then);
        std::map<const void*, size_t> current;  // the value at an address
        bool known = true;
        for (auto& any : calls_) {
            std::visit([&](auto& call) {
                known &= is_of(call.args, then_);
            }, any);
        }
        each_value([&](size_t call, const void* address, int64_t width, bool read, bool written, auto&) {
            if (read) {
                auto found = current.find(address);
                if (found == current.end() || values_[found->second].size != width * limit) return void(known = false);
                values_[found->second].last = call;
            } else if (written) {
                current[address] = values_.size();
                values_.push_back({width * limit, call, call, 0});
            }
        });
        std::vector<int64_t> places;
        for (auto* result : results) {
            auto found = current.find(result);
            if (found == current.end()) return {};
            values_[found->second].last = calls_.size();
        }
        if (!known) return {};
        int64_t size = place_values();
        for (auto* result : results) places.push_back(values_[current[result]].offset);
        places.push_back(size);
        return places;
    }

    // Points the calls into that memory.
    void bind(uint8_t* memory) {
        std::map<const void*, size_t> current;
        size_t next = 0;
        each_value([&](size_t, const void* address, int64_t, bool read, bool, auto& pointer) {
            if (!read) current[address] = next++;
            pointer = (std::remove_reference_t<decltype(pointer)>)(memory + values_[current[address]].offset);
        });
    }

    template <class Run>
    void replay(const Step& now, const Run& run) const {
        for (auto& any : calls_) {
            std::visit([&](auto call) {
                take_step(call.args, then_, now);
                run(call);
            }, any);
        }
    }

private:
    struct Value {
        int64_t size;
        size_t first, last;  // calls
        int64_t offset;
    };

    template <class See>
    void each_value(const See& see) {
        for (size_t i = 0; i < calls_.size(); i++) {
            std::visit([&](auto& call) {
                passed_on(call.args, call.dtype, [&](auto& pointer, int64_t width, bool read, bool written) {
                    see(i, pointer, width, read, written, pointer);
                });
            }, calls_[i]);
        }
    }

    // Best fit among the places whose value has had its last reader.
    int64_t place_values() {
        struct Place {
            int64_t offset, size;
            size_t busy;  // until the end of this call
        };
        std::vector<Place> places;
        int64_t end = 0;
        for (auto& value : values_) {
            Place* best = nullptr;
            for (auto& place : places) {
                bool fits = place.busy < value.first && place.size >= value.size;
                if (fits && (!best || place.size < best->size)) best = &place;
            }
            if (!best) {
                places.push_back({end, (value.size + 63) / 64 * 64, 0});
                best = &places.back();
                end += best->size;
            }
            best->busy = value.last;
            value.offset = best->offset;
        }
        return end;
    }

    std::vector<AnyCall> calls_;
    std::vector<Value> values_;
    Step then_;
};

}  // namespace penstock
