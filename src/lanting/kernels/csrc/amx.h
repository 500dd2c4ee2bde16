// Products by AMX: tiles of 16 rows of 64 bytes, two by two, 32 rows of activations meeting 32 of a weight.
//
// Rows lie in panels as (columns / 64 bytes, 32, 64 bytes) and a weight's tile as everywhere (4 bytes of 32 rows, one
// beside the other), which is what these instructions read. They are so fast that the caches decide: each number must be
// used often before it leaves one. Several tiles of a weight stay in L2 while all panels pass by, so that panels come
// from the last cache once for 256 rows of a weight; of those, PART bytes of a panel stay in L1 while that part of every
// tile passes by. Sums wait in L2 meanwhile. What comes next is asked for in small pieces between the products.
#pragma once
#include "dense.h"

namespace {

#if defined(LT_AMX)
constexpr int64_t PART = 512;          // bytes of a row that are in L1
constexpr int64_t MOST_BYTES = 4096;   // bytes of a weight's row that are in L2
constexpr int64_t MOST_TILES = 8;      // tiles of a weight that are in L2; where rows are longer, half as many,
                                       // because sums of all panels wait beside them

// The shapes of all eight tiles, for as long as it lives: each thread says so itself.
struct Shapes {
  Shapes() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, none[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Shapes() { _tile_release(); }
};

// What was written so far is in memory before tiles are loaded: GCC's intrinsics do not say that they read it.
inline void written() { asm volatile("" ::: "memory"); }

// sums (32, 32), rows `to` bytes apart, = or += A times W (chunks * 16, 2, 16, 4 bytes); of A's chunks of 64 bytes those
// of a row are `step` apart, and rows begin `row` apart. `both`: all 32 rows of A, not only 16.
template <bool brain>
__attribute__((always_inline)) inline void multiply_tiles(const void* from_a, int64_t row, int64_t step, const void* from_w,
                                                          int64_t chunks, void* sums, int64_t to, bool fresh, bool both) {
  const char *a = static_cast<const char*>(from_a), *w = static_cast<const char*>(from_w);
  char *first = static_cast<char*>(sums), *second = first + 16 * to;
  written();
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, first, to);
    _tile_loadd(1, first + 64, to);
    if (both) {
      _tile_loadd(2, second, to);
      _tile_loadd(3, second + 64, to);
    }
  }
  for (int64_t c = 0; c < chunks; c++, a += step, w += 2048) {
    _tile_loadd(4, w, 128);
    _tile_loadd(6, a, row);
    _tile_loadd(5, w + 64, 128);
    if constexpr (brain) {
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 6, 5);
    } else {
      _tile_dpbssd(0, 6, 4);
      _tile_dpbssd(1, 6, 5);
    }
    if (!both) continue;
    _tile_loadd(7, a + 16 * row, row);
    if constexpr (brain) {
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    } else {
      _tile_dpbssd(2, 7, 4);
      _tile_dpbssd(3, 7, 5);
    }
  }
  _tile_stored(0, first, to);
  _tile_stored(1, first + 64, to);
  if (!both) return;
  _tile_stored(2, second, to);
  _tile_stored(3, second + 64, to);
}

// `finish` for up to 16 columns, those of `there`.
inline void finish_some(const Result& r, int64_t at, const float* gate, __mmask16 there, __m512 x) {
  if (r.mode == GELU) x = (__m512)(r.to.type == BFLOAT16 ? vec::gelu_of<true>((vec::Vector)x) : vec::gelu_of<false>((vec::Vector)x));
  if (r.to.type == BFLOAT16) {
    uint16_t* to = static_cast<uint16_t*>(r.to.data) + at;
    if (gate) {
      __m512i old = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, to)), 16);
      x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, gate), x, _mm512_castsi512_ps(old));
    }
    _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(x));
  } else {
    float* to = static_cast<float*>(r.to.data) + at;
    if (gate) x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, gate), x, _mm512_maskz_loadu_ps(there, to));
    _mm512_mask_storeu_ps(to, there, x);
  }
}

// Asks for bytes that will be needed, some at each call.
struct Ahead {
  const uint8_t* data = nullptr;
  int64_t rows = 0, bytes = 0, stride = 0;  // `bytes` of each row
  int64_t each = 0, row = 0, at = 0;        // of a row at a time; how far it is

  void spread(int64_t calls) { each = (rows * ((bytes + 63) / 64) + calls - 1) / calls; }

  void ask() {
    for (int64_t left = each; left > 0 && row < rows; left--) {
      __builtin_prefetch(data + row * stride + at, 0, 2);
      at += 64;
      if (at >= bytes) at = 0, row++;
    }
  }
};

// All panels of a block and some tiles of a weight.
template <bool brain> struct Meeting {
  static constexpr int64_t size = brain ? 2 : 1;
  const Codes& a;
  const Weight& w;
  const Result& r;
  int64_t bytes, depth;                  // of a row of `a`; those at once
  int64_t first, tiles, next;            // rows of the weight: this one's, the next one's
  int64_t panels_begin, panels_end;

  void run() const {
    Shapes shapes;
    int64_t panels = panels_end - panels_begin;
    char* laid = static_cast<char*>(lt::scratch(0, depth * TILE * tiles));
    char* sums = static_cast<char*>(lt::scratch(3, (bytes > depth ? panels : 1) * tiles * PANEL * TILE * 4));
    for (int64_t begin = 0; begin < bytes; begin += depth) {
      int64_t end = smaller(bytes, begin + depth), parts = (end - begin + PART - 1) / PART;
      for (int64_t t = 0; t < tiles; t++) lay(first + t * TILE, begin / size, end / size, laid + t * depth * TILE);
      Ahead weight = end < bytes ? coming(first, end) : coming(next, 0);
      weight.spread(panels * parts * tiles);
      for (int64_t p = panels_begin; p < panels_end; p++)
        panel(p, begin, end, laid, sums + (bytes > depth ? (p - panels_begin) * tiles * PANEL * TILE * 4 : 0), weight);
    }
  }

  static void lay(const Weight& w, int64_t first, int64_t begin, int64_t end, char* to) {
    if constexpr (brain) lay_tile(w, first, begin, end, reinterpret_cast<uint16_t*>(to));
    else expand_tile(w, first, begin, end, reinterpret_cast<int8_t*>(to));
  }
  void lay(int64_t from, int64_t begin, int64_t end, char* to) const { lay(w, from, begin, end, to); }

  // The packed weight from row `from` and column `begin` / size on.
  Ahead coming(int64_t from, int64_t begin) const {
    if (from >= w.rows) return {};
    int64_t row = w.row_bytes, at = row * begin / bytes, end = row * smaller(bytes, begin + depth) / bytes;
    return {w.data + from * row + at, smaller(tiles * TILE, w.rows - from), end - at, row};
  }

  void panel(int64_t p, int64_t begin, int64_t end, const char* laid, char* sums, Ahead& weight) const {
    int64_t rows = panel_begin(a.rows, p + 1) - panel_begin(a.rows, p);
    const uint8_t* x = reinterpret_cast<const uint8_t*>(a.data) + p * PANEL * bytes;
    for (int64_t k = begin; k < end; k += PART) {
      int64_t part = smaller(PART, end - k);
      for (int64_t t = 0; t < tiles; t++) {
        char* to = sums + t * PANEL * TILE * 4;
        multiply_tiles<brain>(x + k * PANEL, 64, 64 * PANEL, laid + (t * depth + k - begin) * TILE, part / 64, to, TILE * 4, k == 0,
                              rows > 16);
        weight.ask();
        if (k + part == bytes) finish_tile(p, rows, first + t * TILE, to);
      }
    }
  }

  void finish_tile(int64_t p, int64_t rows, int64_t column, const char* sums) const {
    int64_t from = panel_begin(a.rows, p), count = w.rows - column;
    for (int side = 0; side < 2; side++) {
      int64_t j = column + side * 16, left = count - side * 16;
      if (left <= 0) return;
      __mmask16 there = left >= 16 ? 0xffff : (1 << left) - 1;
      __m512 bias = r.bias ? _mm512_maskz_loadu_ps(there, r.bias + j) : _mm512_setzero_ps(), scale = bias;
      if constexpr (!brain) scale = _mm512_div_ps(_mm512_maskz_loadu_ps(there, w.bound + j), _mm512_set1_ps(127));
      int64_t in_item = from % r.to.period, to = offset(r.to, from) + j;  // divisions take longer than all the rest
      for (int64_t i = 0; i < rows; i++, in_item++, to += r.to.stride) {
        if (in_item == r.to.period) in_item = 0, to = offset(r.to, from + i) + j;
        const char* at = sums + (i * TILE + side * 16) * 4;
        __m512 x;
        if constexpr (brain) {
          x = _mm512_add_ps(_mm512_load_ps(at), bias);
        } else {
          x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(at)), _mm512_set1_ps(a.scale[from + i]));
          x = _mm512_fmadd_ps(x, scale, bias);
        }
        finish_some(r, to, r.mode == ADD ? vector_of(r.gate, from + i) + j : nullptr, there, x);
      }
    }
  }
};

template <bool brain> void product_of_tiles(const Codes& a, const Weight& w, const Result& r) {
  int64_t bytes = padded(a.columns) * (brain ? 2 : 1), panels = panel_count(a.rows), tiles = (w.rows + TILE - 1) / TILE;
  int64_t depths = (bytes + MOST_BYTES - 1) / MOST_BYTES, depth = ((bytes + depths - 1) / depths + PART - 1) / PART * PART;
  depth = smaller(depth, bytes);
  int64_t share = smaller(depths > 1 ? MOST_TILES / 2 : MOST_TILES, tiles / (2 * lt::threads())), block = panels_together(panels, bytes * PANEL);
  if (share < 1) share = 1;
  for (int64_t begin = 0; begin < panels; begin += block)
    lt::parallel((tiles + share - 1) / share, [&](int64_t i) {
      int64_t first = i * share, each = share * TILE;
      Meeting<brain>{a, w, r, bytes, depth, first * TILE, smaller(share, tiles - first), first * TILE + each * lt::threads(),
                     begin, smaller(panels, begin + block)}
          .run();
    });
}

void product(const Codes& a, const Weight& w, const Result& r) { product_of_tiles<false>(a, w, r); }
void dense(const Codes& a, const Weight& w, const Result& r) { product_of_tiles<true>(a, w, r); }
#endif

}  // namespace
