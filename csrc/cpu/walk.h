// Attention of some queries of one request and KV head. Queries meet their keys in absolute segments of SEGMENT
// positions, each with its own maximum; segments merge along a binary tree over their absolute index. Lanes run over
// keys for scores (K is stored with its keys side by side) and over the head's width for values, so that all sums are
// sequential and nothing is added across lanes but the sum of weights. A query's arithmetic knows nothing of its group.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "functions.h"
#include "kernels.h"
#include "vec.h"

namespace penstock::PENSTOCK_ISA {

constexpr int ROWS = 6;  // of one block of sums: twelve of AVX2's sixteen registers
// Queries of one item: so many share the widening of a segment's K and V. Rows of a block that reads what was widened
// before, and panels widened together.
#if defined(__AVX512F__)
constexpr int QUERIES = 96, TALL_ROWS = 12, PANELS = 2;
#else
constexpr int QUERIES = 48, TALL_ROWS = ROWS, PANELS = 1;
#endif
constexpr int64_t WIDE = PANELS * LANES;
inline int64_t padded(int64_t width) { return (width + WIDE - 1) / WIDE * WIDE; }
constexpr int64_t GROUPS = SEGMENT / LANES;

// The numbers of a segment's keys.
struct Numbers {
    alignas(64) float of[SEGMENT];
    constexpr Numbers() : of() {
        for (int64_t i = 0; i < SEGMENT; i++) of[i] = (float)i;
    }
};
constexpr Numbers NUMBERS;

// Rows of one request that are computed together, and the query heads of a KV head, counted from its first.
struct Item {
    int64_t request, row, rows, head, heads;
    int64_t first, last;  // segments that some row sees
};

// One query: keys first .. last, and where its result goes. With a slope it stands at the last.
struct Query {
    int64_t first, last;
    int64_t out;  // in elements, like its place in q
    float sink, slope;
    bool has_sink;
};

// Softmax over some keys, for each query: greatest score, sum of e^(score - top), values so weighted.
struct Partial {
    float top[QUERIES], weight[QUERIES];
    float* value;  // [QUERIES][padded width]
    int level;
    int64_t index;
    bool seen[QUERIES];
};

// sums[q][n] += rows[q][i] * panels[n][i][lanes] for i = from .. to - 1, in this order.
template <int Q, int N, class S>
INLINE void accumulate(
    const float* rows, int64_t row_stride, const S* const* panels, int64_t stride, int64_t from, int64_t to, F (&sums)[Q][N]) {
    for (int64_t i = from; i < to; i++) {
        F y[N];
        for (int n = 0; n < N; n++) y[n] = load(panels[n] + i * stride);
        for (int q = 0; q < Q; q++) {
            F x = splat(rows[q * row_stride + i]);
            for (int n = 0; n < N; n++) sums[q][n] = fma(x, y[n], sums[q][n]);
        }
    }
}

// Calls work<Q>(first) for blocks of at most ROWS queries, as equal as can be.
template <class Work>
INLINE void in_blocks(int count, const Work& work, int from = 0) {
    int blocks = (count - from + ROWS - 1) / ROWS;
    for (int first = from, size; blocks > 0; first += size, blocks--) {
        size = (count - first + blocks - 1) / blocks;
        switch (size) {
            case 1: work.template operator()<1>(first); break;
            case 2: work.template operator()<2>(first); break;
            case 3: work.template operator()<3>(first); break;
            case 4: work.template operator()<4>(first); break;
            case 5: work.template operator()<5>(first); break;
            default: work.template operator()<ROWS>(first);
        }
    }
}

// The same of TALL_ROWS queries, as long as there are so many.
template <class Work>
INLINE void in_tall_blocks(int count, const Work& work) {
    int first = 0;
    for (; TALL_ROWS > ROWS && first + TALL_ROWS <= count; first += TALL_ROWS) work.template operator()<TALL_ROWS>(first);
    in_blocks(count, work, first);
}

// Panels of a block of Q queries: enough sums to hide the latency of an fma, and no more than there are registers.
template <int Q>
constexpr int AT_ONCE = Q == 1 ? 4 : Q <= 3 ? 2 : 1;

// The sums of a segment, over K and V as they are stored or widened. Nothing here knows where they are.
struct Sums {
    // Of a thread, for all its walks.
    struct Memory {
        Vector<float> q, panel;  // [QUERIES][padded]; [SEGMENT or width][WIDE]
        Vector<Partial> stack;
        Vector<Vector<float>> values;
        alignas(64) float scores[QUERIES][SEGMENT];
        alignas(64) float k_scales[SEGMENT], v_scales[SEGMENT];
    };
    static Memory& memory() {
        static thread_local Memory memory{};
        return memory;
    }

    // Scores of Q queries and the keys of N groups.
    template <int Q, int N, class E>
    INLINE void score(int first, int64_t group, const E* const* panels, int64_t stride) {
        F sums[Q][N];
        for (int q = 0; q < Q; q++) {
            for (int n = 0; n < N; n++) sums[q][n] = splat(0);
        }
        accumulate<Q, N>(m_.q.data() + first * padded_, padded_, panels, stride, 0, width_, sums);
        for (int q = 0; q < Q; q++) {
            for (int n = 0; n < N; n++) store(m_.scores[first + q] + (group + n) * LANES, sums[q][n]);
        }
    }

    void score_panels(int64_t group) {
        const float* panels[PANELS];
        for (int n = 0; n < PANELS; n++) panels[n] = m_.panel.data() + n * LANES;
        in_tall_blocks(count_, [&]<int Q>(int q) ALWAYS_INLINE { score<Q, PANELS>(q, group, panels, WIDE); });
    }

    void add_panels(Partial& p, int64_t at) {
        const float* panel = m_.panel.data();
        in_tall_blocks(count_, [&]<int Q>(int q) ALWAYS_INLINE {
            add<Q, PANELS>(p, q, at, WIDE, [&](int64_t group) { return panel + group * LANES * WIDE; });
        });
    }

    // In ascending order of keys: those before the ones that all of Q queries see, these together, the rest.
    template <int Q, int N, class Groups>
    INLINE void add(Partial& p, int first, int64_t at, int64_t stride, const Groups& groups) {
        int64_t begin = 0, end = SEGMENT;
        for (int q = first; q < first + Q; q++) {
            begin = std::max(begin, begin_[q]);
            end = std::min(end, end_[q]);
        }
        end = std::max(begin, end);
        for (int q = first; q < first + Q; q++) add_keys<1, N>(p, q, at, begin_[q], std::min(begin, end_[q]), stride, groups);
        add_keys<Q, N>(p, first, at, begin, end, stride, groups);
        for (int q = first; q < first + Q; q++) add_keys<1, N>(p, q, at, std::max(end, begin_[q]), end_[q], stride, groups);
    }

    template <int Q, int N, class Groups>
    INLINE void add_keys(Partial& p, int first, int64_t at, int64_t from, int64_t to, int64_t stride, const Groups& groups) {
        if (from >= to) return;
        float* value = p.value + first * padded_ + at;
        F sums[Q][N];
        for (int q = 0; q < Q; q++) {
            for (int n = 0; n < N; n++) sums[q][n] = load(value + q * padded_ + n * LANES);
        }
        for (int64_t group = from / LANES; group * LANES < to; group++) {
            int64_t base = group * LANES;
            const auto* panel = groups(group);
            decltype(panel) panels[N];
            for (int n = 0; n < N; n++) panels[n] = panel + n * LANES;
            accumulate<Q, N>(m_.scores[first] + base, SEGMENT, panels, stride, std::max<int64_t>(from - base, 0),
                             std::min<int64_t>(to - base, LANES), sums);
        }
        for (int q = 0; q < Q; q++) {
            for (int n = 0; n < N; n++) store(value + q * padded_ + n * LANES, sums[q][n]);
        }
    }

    explicit Sums(int64_t width) : width_(width), padded_(padded(width)), m_(memory()) {}

    int64_t width_, padded_;
    Memory& m_;
    int count_ = 0;
    int64_t begin_[QUERIES], end_[QUERIES];  // keys of the segment that a query sees
};

// S: storage type of K and V.
template <class S>
class Walk : Sums {
public:
    Walk(const Attention& a, const Item& item, int64_t kv_head)
        : Sums(a.width), a_(a), item_(item), kv_head_(kv_head) {
        m_.q.resize((size_t)(QUERIES * padded_));
        m_.panel.resize((size_t)(std::max(SEGMENT, a.width) * WIDE));
        int64_t group = a.heads / a.kv_heads;
        for (int64_t row = item.row; row < item.row + item.rows; row++) {
            int64_t position = a.contexts[item.request] - (a.starts[item.request + 1] - row);
            int64_t first = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
            int64_t last = a.whole ? a.contexts[item.request] - 1 : position;
            for (int64_t j = item.head; j < item.head + item.heads; j++, count_++) {
                int64_t head = kv_head * group + j, at = (row * a.heads + head) * a.width;
                float sink = a.sinks ? a.sinks[head] : 0, slope = a.slopes ? a.slopes[head] : 0;
                queries_[count_] = {first, last, at, sink, slope, a.sinks != nullptr};
            }
        }
        direct_ = count_ <= ROWS && width_ % LANES == 0;
        scattered_ = a.block_size < LANES;
        k_stride_ = scattered_ ? LANES : a.block_size;
    }

    // T: dtype of queries and results.
    template <class T>
    void segments(int64_t first, int64_t last) {
        for (int q = 0; q < count_; q++) {
            const T* x = (const T*)a_.q + queries_[q].out;
            float* to = m_.q.data() + q * padded_;
            for (int64_t i = 0; i < width_; i += LANES) store(to + i, load_upto(x + i, width_ - i));
        }
        for (int64_t segment = first; segment <= last; segment++) {
            compute(push(0, segment), segment);
            settle();
        }
    }

    // What another walk made of an aligned range of segments.
    void join(const Partial& other) {
        Partial& p = push(other.level, other.index);
        float* value = p.value;
        p = other;
        p.value = value;
        std::memcpy(value, other.value, sizeof(float) * (size_t)(count_ * padded_));
        settle();
    }

    // The range so far, as the node of the tree that it is.
    void save(Partial& out, float* value, int level, int64_t index) {
        while (depth_ > 1) merge_last();
        out = m_.stack[0];
        out.value = value;
        out.level = level;
        out.index = index;
        std::memcpy(value, m_.stack[0].value, sizeof(float) * (size_t)(count_ * padded_));
    }

    template <class T>
    void finish() {
        while (depth_ > 1) merge_last();
        Partial& p = m_.stack[0];
        for (int q = 0; q < count_; q++) {
            const Query& query = queries_[q];
            float *x = p.value + q * padded_, weight = p.weight[q], shrink = 1;
            if (query.has_sink) {
                float top = p.top[q] > query.sink ? p.top[q] : query.sink, both[LANES] = {p.top[q] - top, query.sink - top};
                store(both, exp(load(both)));
                shrink = both[0];
                weight = weight * both[0] + both[1];
            }
            F s = splat(shrink), w = splat(weight);
            for (int64_t i = 0; i < width_; i += LANES) {
                F y = query.has_sink ? load(x + i) * s / w : load(x + i) / w;
                store_upto((T*)a_.out + query.out + i, y, width_ - i);
            }
        }
    }

private:
    static constexpr bool QUANTIZED = std::is_same_v<S, int8_t>;

    Partial& push(int level, int64_t index) {
        if (depth_ == (int)m_.stack.size()) {
            m_.stack.emplace_back();
            m_.values.emplace_back();
        }
        Vector<float>& value = m_.values[(size_t)depth_];
        if ((int64_t)value.size() < QUERIES * padded_) value.resize((size_t)(QUERIES * padded_));
        Partial& p = m_.stack[(size_t)depth_++];
        p.value = value.data();
        p.level = level;
        p.index = index;
        return p;
    }

    void compute(Partial& p, int64_t segment) {
        int64_t base = segment * SEGMENT, from = SEGMENT, to = 0;
        for (int q = 0; q < count_; q++) {
            begin_[q] = std::max(queries_[q].first - base, (int64_t)0);
            end_[q] = std::min(queries_[q].last - base + 1, SEGMENT);
            p.seen[q] = begin_[q] < end_[q];
            if (!p.seen[q]) continue;
            from = std::min(from, begin_[q]);
            to = std::max(to, end_[q]);
        }
        locate(base, from, to);
        direct_ ? score_directly(from, to) : score_widened(from, to);
        for (int q = 0; q < count_; q++) {
            if (p.seen[q]) weigh(p, q);
        }
        std::memset(p.value, 0, sizeof(float) * (size_t)(count_ * padded_));
        direct_ ? add_directly(p) : add_widened(p, from, to);
    }

    // Where the segment's keys from .. to - 1 are: groups of LANES keys, K as [width][k_stride], V as [LANES][width].
    void locate(int64_t base, int64_t from, int64_t to) {
        const int32_t* table = a_.tables + item_.request * a_.columns;
        const S *k_pool = (const S*)a_.k_pool, *v_pool = (const S*)a_.v_pool;
        const bf16 *k_scales = (const bf16*)a_.k_scales, *v_scales = (const bf16*)a_.v_scales;
        static thread_local Vector<S> k_memory, v_memory;  // a segment of small blocks, as if they were large
        if (scattered_) {
            k_memory.assign((size_t)(SEGMENT * width_), S{});
            v_memory.assign((size_t)(SEGMENT * width_), S{});
        }
        for (int64_t group = from / LANES; group * LANES < to; group++) {
            if (scattered_) {
                k_[group] = k_memory.data() + group * LANES * width_;
                v_[group] = v_memory.data() + group * LANES * width_;
                continue;
            }
            int64_t position = base + group * LANES, inside = position % a_.block_size;
            int64_t block = table[position / a_.block_size] * a_.kv_heads + kv_head_, slot = block * a_.block_size + inside;
            k_[group] = k_pool + block * width_ * a_.block_size + inside;
            v_[group] = v_pool + slot * width_;
            if constexpr (QUANTIZED) {
                store(m_.k_scales + group * LANES, load(k_scales + slot));
                store(m_.v_scales + group * LANES, load(v_scales + slot));
            }
        }
        for (int64_t key = from; scattered_ && key < to; key++) {
            int64_t inside = (base + key) % a_.block_size, lane = key % LANES;
            int64_t block = table[(base + key) / a_.block_size] * a_.kv_heads + kv_head_, slot = block * a_.block_size + inside;
            S *k = k_memory.data() + (key - lane) * width_ + lane, *v = v_memory.data() + key * width_;
            for (int64_t i = 0; i < width_; i++) k[i * LANES] = k_pool[(block * width_ + i) * a_.block_size + inside];
            std::memcpy(v, v_pool + slot * width_, (size_t)width_ * sizeof(S));
            if constexpr (QUANTIZED) {
                m_.k_scales[key] = value(k_scales + slot);
                m_.v_scales[key] = value(v_scales + slot);
            }
        }
    }

    // Scores of all queries and keys from .. to - 1, whether seen or not: rows of the own request's memory.
    void score_widened(int64_t from, int64_t to) {
        float* panel = m_.panel.data();
        for (int64_t group = from / WIDE * PANELS; group * LANES < to; group += PANELS) {
            for (int64_t n = 0; n < PANELS; n++) {  // what stands for groups that nobody sees is not looked at
                if ((group + n + 1) * LANES <= from || (group + n) * LANES >= to) continue;
                const S* k = k_[group + n];
                for (int64_t i = 0; i < width_; i++) store(panel + i * WIDE + n * LANES, load(k + i * k_stride_));
            }
            score_panels(group);
        }
    }

    // V of some groups, and K of as many that follow: what a processor does not foresee at the ends of blocks.
    INLINE void fetch(int64_t group, int64_t count, int64_t end) {
        for (int64_t g = group; g < group + count; g++) {
            const char *v = (const char*)v_[g], *k = (const char*)k_[std::min(g + count, end - 1)];
            for (int64_t at = 0; at < LANES * width_ * (int64_t)sizeof(S); at += 64) {
                __builtin_prefetch(v + at, 0, 2);
                if (k_stride_ == LANES) __builtin_prefetch(k + at);
            }
        }
    }

    void score_directly(int64_t from, int64_t to) {
        in_blocks(count_, [&]<int Q>(int q) ALWAYS_INLINE {
            int64_t group = from / LANES, end = (to + LANES - 1) / LANES;
            for (; group + AT_ONCE<Q> <= end; group += AT_ONCE<Q>) {
                fetch(group, AT_ONCE<Q>, end);
                score<Q, AT_ONCE<Q>>(q, group, k_ + group, k_stride_);
            }
            for (; group < end; group++) score<Q, 1>(q, group, k_ + group, k_stride_);
        });
    }

    // Scores to weights. A key's lane is its position modulo SEGMENT; lanes of keys that are not seen add zeros.
    void weigh(Partial& p, int q) {
        float* s = m_.scores[q];
        int64_t begin = begin_[q], end = end_[q];
        const float none = -std::numeric_limits<float>::infinity();
        int64_t low = begin / LANES * LANES, high = (end + LANES - 1) / LANES * LANES;
        F scale = splat(a_.scale), cap = splat(a_.softcap);
        for (int64_t i = low; i < high; i += LANES) {
            F x = load(s + i);
            if constexpr (QUANTIZED) x = x * load(m_.k_scales + i);
            x = x * scale;
            if (a_.softcap != 0) x = cap * tanh(x / cap);
            store(s + i, x);
        }
        if (a_.slopes) lean(s, low, high, queries_[q].slope, p.index * SEGMENT - queries_[q].last);
        for (int64_t i = low; i < begin; i++) s[i] = none;
        for (int64_t i = end; i < high; i++) s[i] = none;
        F top = splat(none);
        for (int64_t i = low; i < high; i += LANES) top = max(load(s + i), top);
        p.top[q] = greatest(top);
        F total = splat(0), most = splat(p.top[q]);
        for (int64_t i = low; i < high; i += LANES) {
            F w = exp_of_negative(load(s + i) - most);
            total = total + w;
            if constexpr (QUANTIZED) w = w * load(m_.v_scales + i);
            store(s + i, w);
        }
        p.weight[q] = sum(total);
    }

    // Adds slope * (key's position - query's) to scores; ``ahead``: of the segment's first key. Distances are exact.
    static void lean(float* s, int64_t low, int64_t high, float slope, int64_t ahead) {
        F by = splat(slope), first = splat((float)ahead);
        for (int64_t i = low; i < high; i += LANES) store(s + i, load(s + i) + by * (load(NUMBERS.of + i) + first));
    }

    void add_widened(Partial& p, int64_t from, int64_t to) {
        float* panel = m_.panel.data();
        for (int64_t at = 0; at < width_; at += WIDE) {
            int64_t some = std::min(WIDE, width_ - at);
            for (int64_t group = from / LANES; group * LANES < to; group++) {
                const S* v = v_[group] + at;
                float* wide = panel + group * LANES * WIDE;
                int64_t first = std::max<int64_t>(0, from - group * LANES), last = std::min<int64_t>(LANES, to - group * LANES);
                for (int64_t lane = first; lane < last; lane++) {
                    if (some == WIDE) {
                        for (int64_t i = 0; i < WIDE; i += LANES) store(wide + lane * WIDE + i, load(v + lane * width_ + i));
                    } else {
                        for (int64_t i = 0; i < some; i += LANES) {
                            store(wide + lane * WIDE + i, load_upto(v + lane * width_ + i, some - i));
                        }
                    }
                }
            }
            add_panels(p, at);
        }
    }

    void add_directly(Partial& p) {
        in_blocks(count_, [&]<int Q>(int q) ALWAYS_INLINE {
            int64_t at = 0;
            auto of_group = [&](int64_t group) { return v_[group] + at; };
            for (; at + AT_ONCE<Q> * LANES <= width_; at += AT_ONCE<Q> * LANES) {
                add<Q, AT_ONCE<Q>>(p, q, at, width_, of_group);
            }
            for (; at < width_; at += LANES) add<Q, 1>(p, q, at, width_, of_group);
        });
    }

    // Merges what the new leaf completes. A right node without its left one takes its place a level up.
    void settle() {
        if (!IN_ORDER) return depth_ > 1 ? merge_last() : void();
        for (;;) {
            Partial& node = m_.stack[(size_t)depth_ - 1];
            if (node.index % 2 == 0) return;
            bool pair = depth_ > 1 && m_.stack[(size_t)depth_ - 2].level == node.level &&
                        m_.stack[(size_t)depth_ - 2].index == node.index - 1;
            if (pair) merge_last();
            Partial& up = m_.stack[(size_t)depth_ - 1];
            up.level++;
            up.index /= 2;
        }
    }

    // The last two of the stack become one; queries that see nothing of one side take the other as it is.
    void merge_last() {
        Partial &a = m_.stack[(size_t)depth_ - 2], &b = m_.stack[(size_t)depth_ - 1];
        float left[QUERIES], right[QUERIES];
        for (int q = 0; q < count_; q += LANES) {
            F x = load(a.top + q), y = load(b.top + q), top = max(x, y);
            store(left + q, exp(x - top));
            store(right + q, exp(y - top));
        }
        for (int q = 0; q < count_; q++) {
            if (!b.seen[q]) continue;
            float *x = a.value + q * padded_, *y = b.value + q * padded_;
            if (!a.seen[q]) {
                std::memcpy(x, y, sizeof(float) * (size_t)padded_);
                a.top[q] = b.top[q];
                a.weight[q] = b.weight[q];
                a.seen[q] = true;
                continue;
            }
            F sa = splat(left[q]), sb = splat(right[q]);
            a.top[q] = a.top[q] > b.top[q] ? a.top[q] : b.top[q];
            a.weight[q] = a.weight[q] * left[q] + b.weight[q] * right[q];
            for (int64_t i = 0; i < padded_; i += LANES) store(x + i, load(x + i) * sa + load(y + i) * sb);
        }
        depth_--;
    }

    const Attention& a_;
    const Item& item_;
    int64_t kv_head_, k_stride_;
    bool direct_, scattered_;
    int depth_ = 0;
    Query queries_[QUERIES];
    const S *k_[GROUPS], *v_[GROUPS];
};

}  // namespace penstock::PENSTOCK_ISA
