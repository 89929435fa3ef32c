// Attention over the paged cache. A query meets its keys in absolute segments of SEGMENT positions, each with its own
// maximum; segments merge along a binary tree over their absolute index. Queries are computed in small groups that
// share the reading of K and V; a query's own arithmetic knows nothing of its group.
#pragma once

#include <algorithm>
#include <limits>

#include "functions.h"
#include "kernels.h"
#include "pool.h"
#include "vec.h"

namespace penstock::PENSTOCK_ISA {

constexpr int QUERIES = 16;  // of one item: their scores and sums stay in the first-level cache
constexpr int64_t AHEAD = 8;  // keys fetched before they are needed

// One query: keys first .. last, and where its result goes.
struct Query {
    int64_t first, last;
    const float* q;  // [padded width]
    int64_t out;     // in elements
    float sink;
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

template <class T>
struct Keys {
    const T *k[SEGMENT], *v[SEGMENT];
};

// Scores of four queries and four keys, [4][4].
template <class T>
INLINE void scores_4x4(const float* const* q, const T* const* k, int64_t width, float* out) {
    F sums[16];
    for (auto& s : sums) s = splat(0);
    for (int64_t i = 0; i < width; i += LANES) {
        F x[4], y[4];
        for (int j = 0; j < 4; j++) y[j] = load_upto(k[j] + i, width - i);
        for (int j = 0; j < 4; j++) x[j] = load(q[j] + i);
        for (int a = 0; a < 4; a++) {
            for (int b = 0; b < 4; b++) sums[a * 4 + b] = fma(x[a], y[b], sums[a * 4 + b]);
        }
    }
    sum16(sums, out);
}

// The same for two queries and eight keys, [2][8].
template <class T>
INLINE void scores_2x8(const float* const* q, const T* const* k, int64_t width, float* out) {
    F sums[16];
    for (auto& s : sums) s = splat(0);
    for (int64_t i = 0; i < width; i += LANES) {
        F a = load(q[0] + i), b = load(q[1] + i);
        for (int j = 0; j < 8; j++) {
            F y = load_upto(k[j] + i, width - i);
            sums[j] = fma(a, y, sums[j]);
            sums[8 + j] = fma(b, y, sums[8 + j]);
        }
    }
    sum16(sums, out);
}

// value[q] += weight[q][key] v[key] for keys from .. to - 1 of Q queries and N vectors of the width.
template <int Q, int N, class T>
INLINE void add_values(
    float* const* weights, const T* const* v, int64_t from, int64_t to, int64_t at, int64_t width, float* const* values) {
    F sums[Q][N];
    for (int q = 0; q < Q; q++) {
        for (int n = 0; n < N; n++) sums[q][n] = load(values[q] + at + n * LANES);
    }
    for (int64_t key = from; key < to; key++) {
        for (int n = 0; n < N; n++) {
            F y = load_upto(v[key] + at + n * LANES, width - at - n * LANES);
            for (int q = 0; q < Q; q++) sums[q][n] = fma(splat(weights[q][key]), y, sums[q][n]);
        }
    }
    for (int q = 0; q < Q; q++) {
        for (int n = 0; n < N; n++) store(values[q] + at + n * LANES, sums[q][n]);
    }
}

template <int Q, class T>
INLINE void add_values(
    float* const* weights, const T* const* v, int64_t from, int64_t to, int64_t width, float* const* values) {
    if (from >= to) return;
    int64_t at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES) add_values<Q, 4>(weights, v, from, to, at, width, values);
    for (; at < width; at += LANES) add_values<Q, 1>(weights, v, from, to, at, width, values);
}

template <class T>
class Walk {
public:
    Walk(const Attention& a, int64_t request, int64_t kv_head, int64_t padded)
        : a_(a), request_(request), kv_head_(kv_head), padded_(padded) {}

    // Queries of one request and KV head; they need not see the same keys.
    void run(const Query* queries, int count) {
        queries_ = queries;
        count_ = count;
        int64_t first = queries[0].first, last = queries[0].last;
        for (int q = 1; q < count; q++) {
            first = std::min(first, queries[q].first);
            last = std::max(last, queries[q].last);
        }
        depth_ = 0;
        for (int64_t segment = first / SEGMENT; segment <= last / SEGMENT; segment++) {
            compute(push(), segment, first, last);
            settle();
        }
        while (depth_ > 1) merge_last();
        finish();
    }

private:
    Partial& push() {
        if (depth_ == (int)stack_.size()) {
            stack_.emplace_back();
            memory_.emplace_back((size_t)(QUERIES * padded_));
        }
        if ((int64_t)memory_[(size_t)depth_].size() < QUERIES * padded_) memory_[(size_t)depth_].resize((size_t)(QUERIES * padded_));
        Partial& p = stack_[(size_t)depth_];
        p.value = memory_[(size_t)depth_].data();
        depth_++;
        return p;
    }

    void compute(Partial& p, int64_t segment, int64_t first, int64_t last) {
        int64_t base = segment * SEGMENT;
        int64_t from = std::max(first - base, (int64_t)0), to = std::min(last - base + 1, SEGMENT);
        p.level = 0;
        p.index = segment;
        locate(base, from, to);
        score(from, to);
        for (int q = 0; q < count_; q++) {
            begin_[q] = std::max(queries_[q].first - base, (int64_t)0);
            end_[q] = std::min(queries_[q].last - base + 1, SEGMENT);
            p.seen[q] = begin_[q] < end_[q];
            if (p.seen[q]) weigh(p, q);
        }
        std::memset(p.value, 0, sizeof(float) * (size_t)(count_ * padded_));
        int q = 0;
        for (; q + 4 <= count_; q += 4) values<4>(p, q);
        for (; q + 2 <= count_; q += 2) values<2>(p, q);
        for (; q < count_; q++) values<1>(p, q);
    }

    // Where the segment's keys from .. to - 1 are.
    void locate(int64_t base, int64_t from, int64_t to) {
        const int32_t* table = a_.tables + request_ * a_.columns;
        int64_t stride = a_.kv_heads * a_.width;
        for (int64_t i = from; i < to;) {
            int64_t position = base + i, inside = position % a_.block_size;
            int64_t slot = table[position / a_.block_size] * a_.block_size + inside;
            int64_t n = std::min(to - i, a_.block_size - inside);
            int64_t at = slot * stride + kv_head_ * a_.width;
            for (int64_t j = 0; j < n; j++, i++, at += stride) {
                keys_.k[i] = (const T*)a_.k_pool + at;
                keys_.v[i] = (const T*)a_.v_pool + at;
            }
        }
    }

    // Scores of all queries and keys from .. to - 1, whether seen or not: rows of the own request's memory.
    void score(int64_t from, int64_t to) {
        float out[16];
        const float* q[4];
        const T* k[8];
        int first = 0;
        auto keys_at = [&](int64_t i, int64_t n) {
            for (int64_t j = 0; j < n; j++) {
                k[j] = keys_.k[std::min(i + j, to - 1)];
                if (first) continue;  // the first queries have fetched them
                int64_t later = std::min(i + j + AHEAD, to - 1);
                for (int64_t line = 0; line < a_.width * (int64_t)sizeof(T); line += 64) {
                    __builtin_prefetch((const char*)keys_.k[later] + line);
                    __builtin_prefetch((const char*)keys_.v[std::min(i + j, to - 1)] + line, 0, 2);
                }
            }
        };
        for (; first + 2 < count_; first += 4) {
            for (int j = 0; j < 4; j++) q[j] = queries_[std::min(first + j, count_ - 1)].q;
            for (int64_t i = from; i < to; i += 4) {
                keys_at(i, 4);
                scores_4x4(q, k, a_.width, out);
                put<4, 4>(first, i, to, out);
            }
        }
        if (first < count_) {
            for (int j = 0; j < 2; j++) q[j] = queries_[std::min(first + j, count_ - 1)].q;
            for (int64_t i = from; i < to; i += 8) {
                keys_at(i, 8);
                scores_2x8(q, k, a_.width, out);
                put<2, 8>(first, i, to, out);
            }
        }
    }

    template <int Q, int K>
    INLINE void put(int first, int64_t key, int64_t to, const float* out) {
        for (int j = 0; j < Q && first + j < count_; j++) {
            float* at = scores_[first + j] + key;
            if (key + K <= to) {
                std::memcpy(at, out + j * K, K * sizeof(float));
            } else {
                std::memcpy(at, out + j * K, (size_t)(to - key) * sizeof(float));
            }
        }
    }

    // Scores to weights. A key's lane is its position modulo SEGMENT; lanes of keys that are not seen add zeros.
    void weigh(Partial& p, int q) {
        float* s = scores_[q];
        int64_t begin = begin_[q], end = end_[q];
        const float none = -std::numeric_limits<float>::infinity();
        int64_t low = begin / LANES * LANES, high = (end + LANES - 1) / LANES * LANES;
        for (int64_t i = low; i < begin; i++) s[i] = none;
        for (int64_t i = end; i < high; i++) s[i] = none;
        F top = splat(none), scale = splat(a_.scale), cap = splat(a_.softcap);
        for (int64_t i = low; i < high; i += LANES) {
            F x = load(s + i) * scale;
            if (a_.softcap != 0) {
                x = cap * tanh(x / cap);
                store(s + i, x);
                for (int64_t j = i; j < i + LANES; j++) {
                    if (j < begin || j >= end) s[j] = none;
                }
                x = load(s + i);
            }
            store(s + i, x);
            top = max(x, top);
        }
        p.top[q] = greatest(top);
        F total = splat(0), most = splat(p.top[q]);
        for (int64_t i = low; i < high; i += LANES) {
            F w = exp(load(s + i) - most);
            store(s + i, w);
            total = total + w;
        }
        p.weight[q] = sum(total);
    }

    template <int Q>
    void values(Partial& p, int first) {
        float *weights[Q], *sums[Q];
        int64_t begin = 0, end = SEGMENT;
        for (int q = 0; q < Q; q++) {
            weights[q] = scores_[first + q];
            sums[q] = p.value + (first + q) * padded_;
            begin = std::max(begin, begin_[first + q]);
            end = std::min(end, end_[first + q]);
        }
        end = std::max(begin, end);
        // In ascending order of keys: those before the ones that all queries see, these together, the rest.
        for (int q = 0; q < Q; q++) {
            int64_t until = std::min(begin, end_[first + q]);
            add_values<1>(weights + q, keys_.v, begin_[first + q], until, a_.width, sums + q);
        }
        add_values<Q>(weights, keys_.v, begin, end, a_.width, sums);
        for (int q = 0; q < Q; q++) {
            int64_t since = std::max(end, begin_[first + q]);
            add_values<1>(weights + q, keys_.v, since, end_[first + q], a_.width, sums + q);
        }
    }

    // Merges what the new leaf completes. A right node without its left one takes its place a level up.
    void settle() {
        for (;;) {
            Partial& node = stack_[(size_t)depth_ - 1];
            if (node.index % 2 == 0) return;
            bool pair = depth_ > 1 && stack_[(size_t)depth_ - 2].level == node.level &&
                        stack_[(size_t)depth_ - 2].index == node.index - 1;
            if (pair) {
                merge_last();
            }
            Partial& up = stack_[(size_t)depth_ - 1];
            up.level++;
            up.index /= 2;
        }
    }

    // The last two of the stack become one; queries that see nothing of one side take the other as it is.
    void merge_last() {
        Partial &a = stack_[(size_t)depth_ - 2], &b = stack_[(size_t)depth_ - 1];
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
            float top = a.top[q] > b.top[q] ? a.top[q] : b.top[q], shrink[LANES] = {a.top[q] - top, b.top[q] - top};
            store(shrink, exp(load(shrink)));
            F sa = splat(shrink[0]), sb = splat(shrink[1]);
            a.top[q] = top;
            a.weight[q] = a.weight[q] * shrink[0] + b.weight[q] * shrink[1];
            for (int64_t i = 0; i < padded_; i += LANES) store(x + i, load(x + i) * sa + load(y + i) * sb);
        }
        depth_--;
    }

    void finish() {
        Partial& p = stack_[0];
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
            for (int64_t i = 0; i < a_.width; i += LANES) {
                F y = query.has_sink ? load(x + i) * s / w : load(x + i) / w;
                store_upto((T*)a_.out + query.out + i, y, a_.width - i);
            }
        }
    }

    const Attention& a_;
    int64_t request_, kv_head_, padded_;
    const Query* queries_ = nullptr;
    int count_ = 0, depth_ = 0;
    Keys<T> keys_;
    int64_t begin_[QUERIES], end_[QUERIES];
    alignas(64) float scores_[QUERIES][SEGMENT];
    static thread_local Vector<Partial> stack_;
    static thread_local Vector<Vector<float>> memory_;
};
template <class T>
thread_local Vector<Partial> Walk<T>::stack_;
template <class T>
thread_local Vector<Vector<float>> Walk<T>::memory_;

template <class T>
void attention_of(const Attention& a) {
    int64_t g = a.heads / a.kv_heads, padded = (a.width + LANES - 1) / LANES * LANES;
    int64_t tall = std::max<int64_t>(1, QUERIES / g);      // rows of an item
    int64_t wide = std::min<int64_t>(g, QUERIES);          // query heads taken together
    struct Item {
        int64_t request, row, rows;
    };
    Vector<Item> items;
    for (int64_t r = 0; r < a.requests; r++) {
        for (int64_t row = a.starts[r]; row < a.starts[r + 1]; row += tall) {
            items.push_back({r, row, std::min(tall, a.starts[r + 1] - row)});
        }
    }
    parallel((int64_t)items.size() * a.kv_heads, [&](int64_t number, int) {
        const Item& item = items[(size_t)(number / a.kv_heads)];
        int64_t kv_head = number % a.kv_heads;
        static thread_local Vector<float> q;
        q.resize((size_t)(QUERIES * padded));
        Query queries[QUERIES];
        Walk<T> walk(a, item.request, kv_head, padded);
        for (int64_t part = 0; part < g; part += wide) {
            int count = 0;
            for (int64_t row = item.row; row < item.row + item.rows; row++) {
                int64_t position = a.contexts[item.request] - (a.starts[item.request + 1] - row);
                int64_t first = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
                int64_t last = a.whole ? a.contexts[item.request] - 1 : position;
                for (int64_t j = part; j < std::min(part + wide, g); j++, count++) {
                    int64_t head = kv_head * g + j, at = (row * a.heads + head) * a.width;
                    float* x = q.data() + count * padded;
                    for (int64_t i = 0; i < padded; i += LANES) store(x + i, load_upto((const T*)a.q + at + i, a.width - i));
                    queries[count] = {first, last, x, at, a.sinks ? a.sinks[head] : 0, a.sinks != nullptr};
                }
            }
            walk.run(queries, count);
        }
    });
}

}  // namespace penstock::PENSTOCK_ISA
