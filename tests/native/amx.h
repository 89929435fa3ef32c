// AMX on a processor without it: the tile instructions in plain C++, from Intel's description of them. What hardware refuses
// ends the program. For tests only (make emulate); included by avx512.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tiles {
    int rows[8] = {}, row_bytes[8] = {};
    uint8_t bytes[8][16][64] = {};
};
inline Tiles& tiles() {
    static thread_local Tiles own;
    return own;
}
inline void must(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "AMX: %s\n", what);
    abort();
}
template <class T>
T& element(uint8_t (&row)[64], int index) {
    return *(T*)(row + index * (int)sizeof(T));
}

inline void tile_loadconfig(const void* config) {
    uint8_t raw[64];
    std::memcpy(raw, config, sizeof raw);
    must(raw[0] == 1 && raw[1] == 0, "palette");
    tiles() = {};
    for (int i = 0; i < 8; i++) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, raw + 16 + 2 * i, 2);
        must(row_bytes <= 64 && raw[48 + i] <= 16 && (row_bytes == 0) == (raw[48 + i] == 0), "size of a tile");
        tiles().rows[i] = raw[48 + i], tiles().row_bytes[i] = row_bytes;
    }
}
inline void tile_release() { tiles() = {}; }
inline void tile_zero(int tile) {
    must(tiles().rows[tile], "a tile that is not configured");
    std::memset(tiles().bytes[tile], 0, sizeof tiles().bytes[tile]);
}
inline void tile_loadd(int tile, const void* from, int64_t stride) {
    tile_zero(tile);
    for (int row = 0; row < tiles().rows[tile]; row++) {
        std::memcpy(tiles().bytes[tile][row], (const char*)from + row * stride, (size_t)tiles().row_bytes[tile]);
    }
}
inline void tile_stored(int tile, void* to, int64_t stride) {
    must(tiles().rows[tile], "a tile that is not configured");
    for (int row = 0; row < tiles().rows[tile]; row++) {
        std::memcpy((char*)to + row * stride, tiles().bytes[tile][row], (size_t)tiles().row_bytes[tile]);
    }
}
inline void check_product(int sums, int left, int right) {
    Tiles& t = tiles();
    must(t.rows[sums] && t.rows[left] && t.rows[right], "a tile that is not configured");
    must(sums != left && sums != right && left != right, "one tile twice");
    must(t.rows[sums] == t.rows[left] && t.row_bytes[sums] == t.row_bytes[right], "sums are not as large as their factors");
    must(t.row_bytes[left] == 4 * t.rows[right], "factors do not fit");
}
inline void tile_dpbssd(int sums, int left, int right) {
    check_product(sums, left, right);
    Tiles& t = tiles();
    for (int m = 0; m < t.rows[sums]; m++) {
        for (int k = 0; k < t.rows[right]; k++) {
            for (int n = 0; n < t.row_bytes[sums] / 4; n++) {
                for (int i = 0; i < 4; i++) {
                    int x = (int8_t)t.bytes[left][m][4 * k + i], w = (int8_t)t.bytes[right][k][4 * n + i];
                    element<int32_t>(t.bytes[sums][m], n) += x * w;
                }
            }
        }
    }
}
inline float widened(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
}
// Even and odd products each from zero, then both together to the sum.
inline void tile_dpbf16ps(int sums, int left, int right) {
    check_product(sums, left, right);
    Tiles& t = tiles();
    for (int m = 0; m < t.rows[sums]; m++) {
        for (int n = 0; n < t.row_bytes[sums] / 4; n++) {
            float both[2] = {};
            for (int k = 0; k < t.rows[right]; k++) {
                for (int i = 0; i < 2; i++) {
                    float x = widened(element<uint16_t>(t.bytes[left][m], 2 * k + i));
                    float w = widened(element<uint16_t>(t.bytes[right][k], 2 * n + i));
                    both[i] = std::fma(x, w, both[i]);
                }
            }
            element<float>(t.bytes[sums][m], n) += both[0] + both[1];
        }
    }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbssd emulated::tile_dpbssd
#define _tile_dpbf16ps emulated::tile_dpbf16ps

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
