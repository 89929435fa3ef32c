// Attention over the paged cache: which rows are computed together, and by whom.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "pool.h"
#include "walk.h"

namespace penstock::PENSTOCK_ISA {

constexpr int64_t PIECES = 8;    // of work for each thread, where a long request is cut
constexpr int64_t SHORTEST = 2;  // segments worth a piece

// An aligned range of an item's segments: a node of its tree. ``root``: where its partial goes, or -1 if it is all.
struct Piece {
    const Item* item;
    int64_t first, last, index, root;
};

struct Pieces {
    Vector<Item> items;
    Vector<Piece> pieces;
    Vector<int64_t> cut;  // of each item that is cut, the first of its pieces; then the end
    int level = 0;        // a piece has 2^level segments
    int64_t roots = 0, queries = 0;  // partials, and the most queries of one
};

// Rows by QUERIES; what is left to threads that have nothing else is cut along the tree, which changes no bits.
inline Pieces pieces_of(const Attention& a) {
    Pieces all;
    int64_t group = a.heads / a.kv_heads, tall = std::max<int64_t>(1, QUERIES / group), total = 0;
    for (int64_t r = 0; r < a.requests; r++) {
        for (int64_t row = a.starts[r]; row < a.starts[r + 1]; row += tall) {
            int64_t rows = std::min(tall, a.starts[r + 1] - row), position = a.contexts[r] - (a.starts[r + 1] - row);
            int64_t first = a.window ? std::max<int64_t>(0, position - a.window + 1) / SEGMENT : 0;
            int64_t last = (a.whole ? a.contexts[r] - 1 : position + rows - 1) / SEGMENT;
            for (int64_t head = 0; head < group; head += QUERIES) {
                all.items.push_back({r, row, rows, head, std::min<int64_t>(QUERIES, group - head), first, last});
                total += last - first + 1;
            }
        }
    }
    int64_t longest = threads() == 1 ? total : std::max(SHORTEST, total * a.kv_heads / (PIECES * threads()));
    if (!IN_ORDER && (int64_t)all.items.size() * a.kv_heads >= PIECES / 2 * threads()) longest = total;  // nothing to merge
    while ((int64_t)1 << all.level < longest) all.level++;
    for (const Item& item : all.items) {
        int64_t from = item.first >> all.level, to = item.last >> all.level;
        if (from < to) {
            all.cut.push_back((int64_t)all.pieces.size());
            all.queries = std::max(all.queries, item.rows * item.heads);
        }
        for (int64_t index = from; index <= to; index++) {
            int64_t first = std::max(item.first, index << all.level), last = std::min(item.last, ((index + 1) << all.level) - 1);
            all.pieces.push_back({&item, first, last, index, from < to ? all.roots++ : -1});
        }
    }
    return all;
}

template <class T, class S>
void attention_of(const Attention& a) {
    Pieces all = pieces_of(a);
    int64_t heads = a.kv_heads, count = (int64_t)all.pieces.size();
    int64_t numbers = all.queries * padded(a.width);
    Vector<Partial> roots((size_t)(all.roots * heads));
    Vector<float> values((size_t)(all.roots * heads * numbers));
    parallel(count * heads, [&](int64_t number, int) {
        const Piece& piece = all.pieces[(size_t)(count - 1 - number / heads)];  // the longest first: the last rows of a chunk
        Walk<S> walk(a, *piece.item, number % heads);
        walk.template segments<T>(piece.first, piece.last);
        if (piece.root < 0) return walk.template finish<T>();
        int64_t at = piece.root * heads + number % heads;
        walk.save(roots[(size_t)at], values.data() + at * numbers, all.level, piece.index);
    }, true);
    parallel((int64_t)all.cut.size() * heads, [&](int64_t number, int) {
        const Piece* piece = &all.pieces[(size_t)all.cut[(size_t)(number / heads)]];
        const Item* item = piece->item;
        Walk<S> walk(a, *item, number % heads);
        for (; piece != all.pieces.data() + count && piece->item == item; piece++) {
            walk.join(roots[(size_t)(piece->root * heads + number % heads)]);
        }
        walk.template finish<T>();
    });
}

}  // namespace penstock::PENSTOCK_ISA
