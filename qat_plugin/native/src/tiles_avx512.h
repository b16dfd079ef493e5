// Up to 6 rows by 64 output channels of products, in registers.
//
// A tile is up to 6 rows by 64 channels of accumulators. With groups, each group's sum is scaled into a second set of
// accumulators, so that a tile has 3 rows. 4-bit weights are taken apart in registers for each tile: that beats taking
// them apart once into a panel at every number of rows (measured on Zen 4, 1 to 128 rows). 8-bit weights become numbers
// in a panel, unless there are few rows.
#pragma once
#include <cstring>

#include "linear.h"
#include "numbers.h"
#include "simd.h"

namespace qat {
namespace {

#define UNROLL _Pragma("GCC unroll 8")
inline __m512 load_scale(const uint16_t* p, bool half) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return half ? _mm512_cvtph_ps(v) : widen(v);
}

// Products are written as instructions: GCC copies the accumulators of the intrinsics from register to register.

// Sum of four products of unsigned by signed bytes, added to 32-bit integers.
inline __m512i dot(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
}

// Sum of pairs of bf16 products, in float32.
inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
#endif
}

inline __m512i broadcast4(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }

// bf16 of -8..7, twice: VPERMW reads five bits of an index, the fifth is another integer's.
inline __m512i nibble_table() {
  alignas(64) uint16_t t[32];
  for (int i = 0; i < 32; ++i) t[i] = to_bf16(static_cast<float>(i % 16 - 8));
  return _mm512_load_si512(t);
}

// What one tile reads and where its sums go.
struct Tile {
  const uint8_t* weights;  // of the block (or panel), at the first input of the range
  const uint16_t* scale;   // of the block, at the first group of the range; [64] apart
  const void* rows;        // activations at the first input of the range
  int64_t stride;          // of a row, in elements
  const int32_t* start;    // integers: at the first group of the range
  int64_t groups, all_groups, size;  // groups in the range, of the layer; inputs of a group
  float* sums;             // [rows][64]
  bool fresh;              // the range is the first one
  bool half;               // scales are fp16, not bf16
};

template <int MR>
inline void finish(const Tile& t, __m512 (&total)[MR][4]) {
  for (int r = 0; r < MR; ++r)
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(t.sums + r * kBlock + 16 * j, total[r][j]);
}
template <int MR>
inline void begin_with(const Tile& t, __m512 (&total)[MR][4]) {
  for (int r = 0; r < MR; ++r)
    for (int j = 0; j < 4; ++j)
      total[r][j] = t.fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(t.sums + r * kBlock + 16 * j);
}

// Integer sums of one range of inputs.
template <int MR, int BITS>
__attribute__((always_inline)) inline void integers(__m512i (&acc)[MR][4], const uint8_t*& w, const int8_t* a, int64_t stride, int64_t size) {
  if constexpr (BITS == 8) {
    for (int64_t i = 0; i < size; i += 4, w += 256) {
      __m512i v[4];
      UNROLL for (int j = 0; j < 4; ++j) v[j] = load(w + 64 * j);
      UNROLL for (int r = 0; r < MR; ++r) {
        const __m512i x = broadcast4(a + r * stride + i);
        UNROLL for (int j = 0; j < 4; ++j) acc[r][j] = dot(acc[r][j], v[j], x);
      }
    }
  } else {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < size; i += 8, w += 256) {
      __m512i x[MR], z[MR];
      UNROLL for (int r = 0; r < MR; ++r) x[r] = broadcast4(a + r * stride + i), z[r] = broadcast4(a + r * stride + i + 4);
      UNROLL for (int j = 0; j < 4; ++j) {
        const __m512i v = load(w + 64 * j);
        const __m512i low = _mm512_and_si512(v, mask), high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
        UNROLL for (int r = 0; r < MR; ++r) acc[r][j] = dot(acc[r][j], low, x[r]);
        UNROLL for (int r = 0; r < MR; ++r) acc[r][j] = dot(acc[r][j], high, z[r]);
      }
    }
  }
}

// What a tile with groups multiplies: rows of Row, sums of Sum.
template <int BITS>
struct Integers {
  using Row = int8_t;
  using Sum = __m512i;
  static Sum begin(const Tile& t, int r, int64_t g) { return _mm512_set1_epi32(t.start[r * t.all_groups + g]); }
  static __m512 number(Sum sum) { return _mm512_cvtepi32_ps(sum); }
  template <int MR>
  __attribute__((always_inline)) static inline void multiply(Sum (&acc)[MR][4], const uint8_t*& w, const Row* a, int64_t stride, int64_t size) {
    integers<MR, BITS>(acc, w, a, stride, size);
  }
};

// Up to 3 rows: each group's sums are scaled into the totals.
template <int MR, class Product>
void grouped_tile(const Tile& t) {
  const uint8_t* w = t.weights;
  const auto* a = static_cast<const typename Product::Row*>(t.rows);
  __m512 total[MR][4];
  begin_with(t, total);
  for (int64_t g = 0; g < t.groups; ++g, a += t.size) {
    typename Product::Sum acc[MR][4];
    UNROLL for (int r = 0; r < MR; ++r)
      UNROLL for (int j = 0; j < 4; ++j) acc[r][j] = Product::begin(t, r, g);
    Product::template multiply<MR>(acc, w, a, t.stride, t.size);
    UNROLL for (int j = 0; j < 4; ++j) {
      const __m512 scale = load_scale(t.scale + g * kBlock + 16 * j, t.half);
      UNROLL for (int r = 0; r < MR; ++r) total[r][j] = _mm512_fmadd_ps(Product::number(acc[r][j]), scale, total[r][j]);
    }
  }
  finish(t, total);
}

// One group over all inputs, up to 6 rows: the totals are the sums themselves.
template <int MR>
void channel_tile(const Tile& t) {
  __m512i acc[MR][4];
  UNROLL for (int r = 0; r < MR; ++r)
    UNROLL for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_set1_epi32(t.start[r]);
  const uint8_t* w = t.weights;
  integers<MR, 8>(acc, w, static_cast<const int8_t*>(t.rows), t.stride, t.size);
  UNROLL for (int j = 0; j < 4; ++j) {
    const __m512 scale = load_scale(t.scale + 16 * j, t.half);
    UNROLL for (int r = 0; r < MR; ++r)
      _mm512_storeu_ps(t.sums + r * kBlock + 16 * j, _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][j]), scale));
  }
}

// bf16 rows by a panel of bf16 pairs, or by 4-bit weights taken apart in registers.
template <int MR, bool PANEL>
__attribute__((always_inline)) inline void floats(__m512 (&acc)[MR][4], const uint8_t*& w, const uint16_t* a, int64_t stride, int64_t size) {
  if constexpr (PANEL) {
    for (int64_t i = 0; i < size; i += 2, w += 256) {
      __m512i v[4];
      UNROLL for (int j = 0; j < 4; ++j) v[j] = load(w + 64 * j);
      UNROLL for (int r = 0; r < MR; ++r) {
        const __m512i x = broadcast4(a + r * stride + i);
        UNROLL for (int j = 0; j < 4; ++j) acc[r][j] = dot(acc[r][j], v[j], x);
      }
    }
  } else {
    const __m512i table = nibble_table();
    for (int64_t i = 0; i < size; i += 8, w += 256) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const __m512i v = load(w + 64 * j);
        UNROLL for (int s = 0; s < 4; ++s) {
          const __m512i pair = _mm512_permutexvar_epi16(s ? _mm512_srli_epi16(v, 4 * s) : v, table);
          UNROLL for (int r = 0; r < MR; ++r) acc[r][j] = dot(acc[r][j], pair, broadcast4(a + r * stride + i + 2 * s));
        }
      }
    }
  }
}

struct FloatSums {
  using Sum = __m512;
  static Sum begin(const Tile&, int, int64_t) { return _mm512_setzero_ps(); }
  static __m512 number(Sum sum) { return sum; }
};
template <bool PANEL>
struct Halves : FloatSums {
  using Row = uint16_t;
  template <int MR>
  __attribute__((always_inline)) static inline void multiply(Sum (&acc)[MR][4], const uint8_t*& w, const Row* a, int64_t stride, int64_t size) {
    floats<MR, PANEL>(acc, w, a, stride, size);
  }
};

// A panel of integers whose one scale comes last, up to 6 rows.
template <int MR>
void plain_tile(const Tile& t) {
  __m512 total[MR][4];
  begin_with(t, total);
  const uint8_t* w = t.weights;
  floats<MR, true>(total, w, static_cast<const uint16_t*>(t.rows), t.stride, t.size);
  finish(t, total);
}

// float32 rows by 8-bit weights taken apart in registers.
struct Wide : FloatSums {
  using Row = float;
  template <int MR>
  __attribute__((always_inline)) static inline void multiply(Sum (&acc)[MR][4], const uint8_t*& w, const Row* a, int64_t stride, int64_t size) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t i = 0; i < size; i += 4, w += 256) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const __m512i v = _mm512_xor_si512(load(w + 64 * j), flip);
        UNROLL for (int s = 0; s < 4; ++s) {
          const __m512 number = _mm512_cvtepi32_ps(_mm512_srai_epi32(s < 3 ? _mm512_slli_epi32(v, 24 - 8 * s) : v, 24));
          UNROLL for (int r = 0; r < MR; ++r)
            acc[r][j] = _mm512_fmadd_ps(number, _mm512_set1_ps(a[r * stride + i + s]), acc[r][j]);
        }
      }
    }
  }
};

// float32 rows by a panel of float32 numbers [inputs][64], up to 6 rows.
template <int MR>
void number_tile(const Tile& t) {
  __m512 total[MR][4];
  begin_with(t, total);
  const float* w = reinterpret_cast<const float*>(t.weights);
  const float* a = static_cast<const float*>(t.rows);
  for (int64_t i = 0; i < t.size; ++i, w += kBlock) {
    __m512 v[4];
    UNROLL for (int j = 0; j < 4; ++j) v[j] = _mm512_loadu_ps(w + 16 * j);
    UNROLL for (int r = 0; r < MR; ++r) {
      const __m512 x = _mm512_set1_ps(a[r * t.stride + i]);
      UNROLL for (int j = 0; j < 4; ++j) total[r][j] = _mm512_fmadd_ps(v[j], x, total[r][j]);
    }
  }
  finish(t, total);
}

using Run = void (*)(const Tile&);
template <template <int> class Of>
constexpr Run pick(int64_t rows) {
  constexpr Run table[] = {Of<1>::run, Of<2>::run, Of<3>::run, Of<4>::run, Of<5>::run, Of<6>::run};
  return table[rows - 1];
}
template <int MR> struct Channel { static constexpr Run run = channel_tile<MR>; };
template <int MR> struct Plain { static constexpr Run run = plain_tile<MR>; };
template <int MR> struct Number { static constexpr Run run = number_tile<MR>; };
template <class Product>
constexpr Run kGrouped[] = {grouped_tile<1, Product>, grouped_tile<2, Product>, grouped_tile<3, Product>};

}  // namespace
}  // namespace qat
