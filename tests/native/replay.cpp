// Repeats recorded calls (record.py) with the kernels of one instruction set and compares what they write, byte for byte: for
// processors that are emulated, and for valgrind. Every buffer ends where its memory ends and begins 8 bytes after an
// aligned address. NaN is NaN; other differences are counted.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace penstock::PENSTOCK_ISA {
extern const Table table;
}
using namespace penstock;

namespace {

constexpr int64_t SHIFT = 8;
const Table& kernels = penstock::PENSTOCK_ISA::table;

struct Buffer {
    char* memory = nullptr;
    int64_t size = 0, dtype = 0;
    std::vector<char> expected;
};

struct Call {
    std::string name;
    std::vector<int64_t> numbers;  // an argument's number, or where its buffer is
    std::vector<double> reals;
    std::vector<Buffer> buffers;
    size_t next = 0;

    int64_t number() { return numbers[next++]; }
    float real() { return (float)reals[next++]; }
    template <class T = void>
    T* at() {
        return (T*)(uintptr_t)numbers[next++];
    }
};

void take(FILE* file, void* to, size_t size) {
    if (size && fread(to, 1, size, file) != size) {
        fprintf(stderr, "the record ends in the middle of a call\n");
        exit(2);
    }
}
int64_t take_number(FILE* file) {
    int64_t n;
    take(file, &n, 8);
    return n;
}

bool read(FILE* file, Call& call) {
    char name[17] = {};
    if (fread(name, 1, 16, file) != 16) return false;
    call.name = name;
    for (int64_t left = take_number(file); left; left--) {
        int64_t kind = take_number(file), number = 0;
        double real = 0;
        if (kind == 2) {
            take(file, &real, 8);
        } else {
            number = take_number(file);
        }
        if (kind == 0) {
            int64_t size = number;
            Buffer buffer{nullptr, size, take_number(file), {}};
            bool written = take_number(file) != 0;
            number = 0;
            if (size >= 0) {
                buffer.memory = (char*)malloc((size_t)(size + SHIFT));
                take(file, buffer.memory + SHIFT, (size_t)size);
                if (written) {
                    buffer.expected.resize((size_t)size);
                    take(file, buffer.expected.data(), (size_t)size);
                }
                number = (int64_t)(uintptr_t)(buffer.memory + SHIFT);
                call.buffers.push_back(std::move(buffer));
            }
        }
        call.numbers.push_back(number);
        call.reals.push_back(real);
    }
    return true;
}

// Braced lists are evaluated from left to right, as the arguments were recorded.
void run(Call& c) {
    auto n = [&] { return c.number(); };
    auto p = [&] { return c.at<>(); };
    Dtype dtype = (Dtype)c.numbers.back();
    if (c.name == "pack") {
        struct { void* w; int64_t outputs, inputs; } a{p(), n(), n()};
        kernels.pack(a.w, a.outputs, a.inputs, dtype);
    } else if (c.name == "quantize") {
        struct { void *weight, *codes, *scales, *zeros; int64_t groups, bits, group; } a{p(), p(), p(), p(), n(), n(), n()};
        kernels.quantize({a.weight, a.groups, {(int)a.bits, (int)a.group}, a.codes, (uint16_t*)a.scales, (uint8_t*)a.zeros}, dtype);
    } else if (c.name == "embed") {
        Embed a{p(), c.at<int64_t>(), p(), n(), n(), n(), {(int)n(), (int)n()}, c.real()};
        kernels.embed(a, dtype);
    } else if (c.name == "draw") {
        Draws a{c.at<float>(), c.at<DrawLimits>(), c.at<DrawSite>(), c.at<int64_t>(), n(), n()};
        kernels.draw(a);
    } else if (c.name == "pack_grouped") {
        struct { void *codes, *scales, *zeros, *out; int64_t outputs, inputs, bits, group; } a{p(), p(), p(), p(), n(), n(), n(), n()};
        kernels.pack_grouped({a.codes, (uint16_t*)a.scales, (uint8_t*)a.zeros, a.outputs, a.inputs, {(int)a.bits, (int)a.group}},
                             (uint8_t*)a.out);
    } else if (c.name == "linear") {
        Linear a{p(), p(), p(), p(), n(), n(), n(), (int)n(), (Activation)n(), n() != 0, n() != 0, {(int)n(), (int)n()}};
        kernels.linear(a, dtype);
    } else if (c.name == "norm") {
        struct { void *x, *residual, *weight, *bias; bool wide, centred; void* out; int64_t rows, width; float eps, factor; } a{
            p(), p(), p(), p(), n() != 0, n() != 0, p(), n(), n(), c.real(), c.real()};
        kernels.norm({a.x, a.residual, a.weight, a.bias, a.wide, a.centred, a.out, a.rows, a.width, a.eps, a.factor}, dtype);
    } else if (c.name == "route") {
        Route a{c.at<float>(), c.at<int64_t>(), c.at<float>(), n(), n(), n(), n() != 0};
        kernels.route(a);
    } else if (c.name == "experts") {
        Experts a{p(), c.at<int64_t>(), c.at<float>(), p(), p(), p(), p(), p(), p(), p(), n(), n(), n(), n(), n(), (Activation)n(),
                  {(int)n(), (int)n()}, {(int)n(), (int)n()}};
        kernels.experts(a, dtype);
    } else if (c.name == "heads") {
        Heads a{p(), p(), p(), n() != 0, n() != 0, c.at<float>(), n(), c.at<int64_t>(), c.at<int64_t>(), p(), p(), p(), p(), p(),
                n(), n(), n(), n(), n(), c.real()};
        kernels.heads(a, dtype);
    } else {
        Attention a{p(), p(), p(), p(), p(), p(), c.at<int32_t>(), n(), n(), c.at<int64_t>(), c.at<int64_t>(), n(), n(), n(), n(), n(),
                    n() != 0, c.real(), c.real(), c.at<float>(), c.at<float>()};
        kernels.attention(a, dtype);
    }
}

float widened(const char* p, int64_t dtype) {
    uint32_t bits = 0;
    std::memcpy(&bits, p, dtype == 0 ? 4 : 2);
    if (dtype == 2) {
        int exponent = bits >> 10 & 31, fraction = bits & 1023;
        float size = exponent ? std::ldexp((float)(fraction + 1024), exponent - 25) : std::ldexp((float)fraction, -24);
        if (exponent == 31) size = fraction ? NAN : INFINITY;
        return bits & 0x8000 ? -size : size;
    }
    if (dtype == 1) bits <<= 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Elements that differ, and by how much of the buffer's greatest number.
int64_t differing(const Buffer& b, float& most) {
    const char* ours = b.memory + SHIFT;
    if (std::memcmp(ours, b.expected.data(), b.expected.size()) == 0) return 0;
    int64_t each = b.dtype == 3 ? 1 : b.dtype == 0 ? 4 : 2, count = 0;
    float greatest = 0, apart = 0;
    for (int64_t i = 0; i < b.size; i += each) {
        bool same = std::memcmp(ours + i, b.expected.data() + i, (size_t)each) == 0;
        if (b.dtype == 3) {
            count += !same;
            continue;
        }
        float x = widened(ours + i, b.dtype), y = widened(b.expected.data() + i, b.dtype);
        if (std::isfinite(y)) greatest = std::max(greatest, std::fabs(y));
        if (same || (x != x && y != y)) continue;
        count++;
        apart = std::isfinite(x) && std::isfinite(y) ? std::max(apart, std::fabs(x - y)) : INFINITY;
    }
    most = std::max(most, apart / greatest);
    return count;
}

}  // namespace

int main(int count, char** arguments) {
    FILE* file = count > 1 ? fopen(arguments[1], "rb") : nullptr;
    if (!file) return fprintf(stderr, "usage: replay RECORD [SHARE]: every SHARE-th call\n"), 2;
    int64_t share = count > 2 ? atoll(arguments[2]) : 1;
    struct Tally { int64_t calls, wrong, elements; float most; };
    std::map<std::string, Tally> tallies;
    int64_t wrong = 0;
    for (int64_t number = 0;; number++) {
        Call call;
        if (!read(file, call)) break;
        if (number % share == 0) {
            run(call);
            Tally& tally = tallies[call.name];
            tally.calls++;
            int64_t elements = 0;
            for (const Buffer& buffer : call.buffers) {
                if (!buffer.expected.empty()) elements += differing(buffer, tally.most);
            }
            tally.elements += elements;
            tally.wrong += elements != 0;
            wrong += elements != 0;
            if (elements && tally.wrong <= 3) {
                printf("  call %lld, %s:", (long long)number, call.name.c_str());
                for (int64_t n : call.numbers) printf(" %lld", (long long)(n > (1ll << 40) ? -1 : n));
                printf(": %lld elements differ\n", (long long)elements);
            }
        }
        for (Buffer& buffer : call.buffers) free(buffer.memory);
    }
    for (auto& [name, tally] : tallies) {
        printf("%-14s %6lld calls, %lld differ", name.c_str(), (long long)tally.calls, (long long)tally.wrong);
        if (tally.wrong) printf(" in %lld elements, at most %.2g of the greatest", (long long)tally.elements, tally.most);
        printf("\n");
    }
    printf("%s: %s\n", kernels.name, wrong ? "NOT the same" : "the same, bit for bit");
    return wrong ? 1 : 0;
}
