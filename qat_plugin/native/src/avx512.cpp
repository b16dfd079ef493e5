// linear.h on AVX512-VNNI; built a second time with AVX512-BF16 for its float products.
#include <algorithm>

#include "linear.h"
#include "numbers.h"
#include "simd.h"
#include "tiles_avx512.h"

namespace qat {
namespace {

constexpr int64_t kPanel = 512;  // inputs of a panel, unless a group is longer

// ---------------------------------------------------------------------------------------------------- activations

void quantize_rows(const void* x, Float type, const float* fixed, const Weight& w, const QuantizedRows& out,
                   int64_t begin, int64_t end) {
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  for (int64_t m = begin; m < end; ++m) {
    __m512 greatest = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t i = 0; i < w.k; i += 16) {
      const __m512 v = _mm512_abs_ps(load_floats(x, type, m * w.k + i, first(w.k - i)));
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      greatest = _mm512_max_ps(greatest, v);
    }
    float scale = fixed ? *fixed : _mm512_reduce_max_ps(greatest) / 127.0f;
    if (scale == 0) scale = 1;
    const __m512 divisor = _mm512_set1_ps(scale);
    int8_t* q = out.q + m * w.padded_k;
    for (int64_t i = 0; i < w.padded_k; i += 16) {
      // clamped before rounding: the same integers, and no overflow where a fixed scale clips
      __m512 v = _mm512_div_ps(load_floats(x, type, m * w.k + i, first(w.k - i)), divisor);
      v = _mm512_max_ps(_mm512_min_ps(v, _mm512_set1_ps(127)), _mm512_set1_ps(-127));
      __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
      if (w.bits == 4) bytes = _mm_shuffle_epi8(bytes, order);
      _mm_mask_storeu_epi8(q + i, first(w.padded_k - i), bytes);
    }
    out.scale[m] = nan || scale > 3.4028235e38f ? __builtin_nanf("") : scale;
    const int64_t size = w.padded_k / w.groups;
    for (int64_t g = 0; g < w.groups; ++g) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = 0; i < size; i += 64) {
        const __mmask64 mask = size - i >= 64 ? ~0ull : (1ull << (size - i)) - 1;
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(mask, q + g * size + i));
      }
      out.start[m * w.groups + g] = -w.zero * _mm512_reduce_add_epi32(sum);
    }
  }
}

void split_rows(const void* x, Float type, const Weight& w, const Planes& out, int64_t m, int64_t begin, int64_t end) {
  const __m512 infinity = _mm512_set1_ps(__builtin_inff());
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = 0; i < w.padded_k; i += 16) {
      __m512 rest = load_floats(x, type, row * w.k + i, first(w.k - i));
      for (int32_t p = 0; p < out.planes; ++p) {
        const __m256i part = narrow(rest);
        _mm256_mask_storeu_epi16(out.rows + (p * m + row) * w.padded_k + i, first(w.padded_k - i), part);
        const __m512 held = widen(part);
        const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(held), infinity, _CMP_LT_OQ);
        rest = _mm512_maskz_sub_ps(finite, rest, held);
      }
    }
}

void widen_rows(const void* x, Float type, const Weight& w, float* out, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m)
    for (int64_t i = 0; i < w.padded_k; i += 16)
      _mm512_mask_storeu_ps(out + m * w.padded_k + i, first(w.padded_k - i),
                            load_floats(x, type, m * w.k + i, first(w.k - i)));
}

// --------------------------------------------------------------------------------------------------------- panels

// 8-bit weights as bf16 integers [inputs / 2][64][2]; eight bits are exact in bf16.
void wide_panel(const uint8_t* w, uint8_t* panel, int64_t inputs) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80)), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t i = 0; i < inputs; i += 4, w += 256, panel += 512)
    UNROLL for (int j = 0; j < 4; ++j) {
      const __m512i v = _mm512_xor_si512(load(w + 64 * j), flip);
      __m512i number[4];
      UNROLL for (int s = 0; s < 4; ++s)
        number[s] = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * s), 24)));
      UNROLL for (int s = 0; s < 2; ++s)
        _mm512_storeu_si512(panel + 256 * s + 64 * j, _mm512_or_si512(_mm512_srli_epi32(number[2 * s], 16),
                                                                      _mm512_and_si512(number[2 * s + 1], high)));
    }
}

// Numbers of `inputs` inputs from `at` on, of channels [c, c + 16) of a block: float32, `stride` apart.
void numbers(const Weight& w, int64_t b, int64_t c, int64_t at, int64_t inputs, float* out, int64_t stride) {
  static constexpr int kShift4[8] = {0, 16, 4, 20, 8, 24, 12, 28};
  const uint8_t* words = w.data + b * kBlock * (w.padded_k * w.bits / 8) + 4 * c;
  const int64_t size = w.padded_k / w.groups, per_word = 32 / w.bits;
  const __m512i mask = _mm512_set1_epi32(w.bits == 8 ? 255 : 15), zero = _mm512_set1_epi32(w.zero);
  for (int64_t i = at; i < at + inputs; ++i, out += stride) {
    const int shift = w.bits == 8 ? 8 * static_cast<int>(i % 4) : kShift4[i % 8];
    const __m512i u = _mm512_and_si512(_mm512_srl_epi32(load(words + i / per_word * 256), _mm_cvtsi32_si128(shift)), mask);
    const __m512 scale = load_scale(w.scale + (b * w.groups + i / size) * kBlock + c, w.half);
    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(u, zero)), scale));
  }
}

// --------------------------------------------------------------------------------------------------------- blocks

// All rows [0, count) through tiles of at most `most` rows, as even as can be.
template <class Choose>
void rows_through(Tile t, int64_t count, int64_t most, int64_t element, Choose choose) {
  const int64_t tiles = (count + most - 1) / most;
  const char* rows = static_cast<const char*>(t.rows);
  float* sums = t.sums;
  const int32_t* start = t.start;
  int64_t at = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t next = count * (i + 1) / tiles;
    t.rows = rows + at * t.stride * element;
    t.sums = sums + at * kBlock;
    t.start = start ? start + at * t.all_groups : nullptr;
    choose(next - at)(t);
    at = next;
  }
}

void block(const Job& job, int64_t b, int64_t begin, int64_t end, void* scratch) {
  const Weight& w = job.weight;
  const int64_t count = end - begin, size = w.padded_k / w.groups, width = w.padded_k * w.bits / 8;  // bytes a channel
  const uint8_t* weights = w.data + b * kBlock * width;
  const uint16_t* scale = w.scale + b * w.groups * kBlock;
  float* sums = static_cast<float*>(scratch);
  const int64_t planes = job.integer || job.floats ? 1 : job.planes.planes;
  uint8_t* panel = reinterpret_cast<uint8_t*>(
      (reinterpret_cast<uintptr_t>(sums + planes * count * kBlock) + 63) / 64 * 64);
  Tile t{weights, scale, nullptr, w.padded_k, nullptr, w.groups, w.groups, size, sums, true, w.half};
  bool scaled = true;

  if (job.integer) {
    t.rows = job.rows.q + begin * w.padded_k;
    t.start = job.rows.start + begin * w.groups;
    if (w.bits == 8 && w.groups == 1) {
      rows_through(t, count, 6, 1, [](int64_t rows) { return pick<Channel>(rows); });
    } else {
      const Run* tiles = w.bits == 8 ? kGrouped<Integers<8>> : kGrouped<Integers<4>>;
      rows_through(t, count, 3, 1, [=](int64_t rows) { return tiles[rows - 1]; });
    }
  } else if (job.floats) {
    t.rows = job.floats + begin * w.padded_k;
    if (job.few) {
      rows_through(t, count, 3, 4, [](int64_t rows) { return kGrouped<Wide>[rows - 1]; });
    } else {
      for (int64_t i = 0; i < w.padded_k; i += kPanel / 2, t.fresh = false) {
        t.size = std::min(kPanel / 2, w.padded_k - i);
        for (int64_t c = 0; c < kBlock; c += 16) numbers(w, b, c, i, t.size, reinterpret_cast<float*>(panel) + c, kBlock);
        t.weights = panel, t.rows = job.floats + begin * w.padded_k + i;
        rows_through(t, count, 6, 4, [](int64_t rows) { return pick<Number>(rows); });
      }
    }
  } else {
    for (int64_t p = 0; p < planes; ++p) {
      // planes of one range of rows are one range of rows of this block when there is one plane or all rows are here
      if (p && begin == 0 && end == job.m) break;
      const bool together = begin == 0 && end == job.m;
      const int64_t total = together ? planes * count : count;
      const uint16_t* rows = job.planes.rows + (p * job.m + begin) * w.padded_k;
      t.rows = rows, t.weights = weights, t.scale = scale, t.groups = w.groups, t.size = size, t.fresh = true;
      t.sums = sums + p * count * kBlock;
      if (w.bits == 4) {
        rows_through(t, total, 3, 2, [](int64_t r) { return kGrouped<Halves<false>>[r - 1]; });
      } else if (w.groups == 1) {
        scaled = false;
        for (int64_t i = 0; i < w.padded_k; i += kPanel, t.fresh = false) {
          t.size = std::min(kPanel, w.padded_k - i);
          wide_panel(weights + i * kBlock, panel, t.size);
          t.weights = panel, t.rows = rows + i;
          rows_through(t, total, 6, 2, [](int64_t r) { return pick<Plain>(r); });
        }
      } else {
        const int64_t step = std::max<int64_t>(1, kPanel / size);
        for (int64_t g = 0; g < w.groups; g += step, t.fresh = false) {
          t.groups = std::min(step, w.groups - g);
          wide_panel(weights + g * size * kBlock, panel, t.groups * size);
          t.weights = panel, t.scale = scale + g * kBlock, t.rows = rows + g * size;
          rows_through(t, total, 3, 2, [](int64_t r) { return kGrouped<Halves<true>>[r - 1]; });
        }
      }
    }
  }

  const int64_t channels = std::min(kBlock, w.n - b * kBlock);
  for (int64_t m = 0; m < count; ++m)
    for (int64_t c = 0; c < channels; c += 16) {
      __m512 v = _mm512_loadu_ps(sums + m * kBlock + c);
      for (int64_t p = 1; p < planes; ++p) v = _mm512_add_ps(v, _mm512_loadu_ps(sums + (p * count + m) * kBlock + c));
      if (!scaled) v = _mm512_mul_ps(v, load_scale(scale + c, w.half));
      if (job.integer) v = _mm512_mul_ps(v, _mm512_set1_ps(job.rows.scale[begin + m]));
      const __mmask16 mask = first(channels - c);
      if (job.out.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, job.out.bias + b * kBlock + c));
      store_floats(job.out.y, job.out.type, (begin + m) * w.n + b * kBlock + c, mask, v);
    }
}

void dequantize(const Weight& w, int64_t b, void* y, Float type) {
  // 16 channels by 16 inputs at a time: numbers come by input, and go by channel
  const __m512i column = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
  const int64_t channels = std::min(kBlock, w.n - b * kBlock);
  alignas(64) float tile[16][16] = {};
  for (int64_t c = 0; c < channels; c += 16)
    for (int64_t i = 0; i < w.k; i += 16) {
      numbers(w, b, c, i, std::min<int64_t>(16, w.padded_k - i), &tile[0][0], 16);
      for (int64_t r = 0; r < 16 && c + r < channels; ++r) {
        const __m512 v = _mm512_i32gather_ps(column, &tile[0][r], 4);
        store_floats(y, type, (b * kBlock + c + r) * w.k + i, first(w.k - i), v);
      }
    }
}

// Products of one row of weights with one of the input, in four sums so that none waits for another.
template <Float TYPE>
inline float row_product(const void* x, int64_t xi, const void* w, int64_t wi, int64_t k) {
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  if constexpr (TYPE == Float::bf16) {
    const uint16_t *a = static_cast<const uint16_t*>(x) + xi, *b = static_cast<const uint16_t*>(w) + wi;
    for (; i + 128 <= k; i += 128)
      UNROLL for (int j = 0; j < 4; ++j) sum[j] = dot(sum[j], load(a + i + 32 * j), load(b + i + 32 * j));
  } else {
    for (; i + 64 <= k; i += 64)
      UNROLL for (int j = 0; j < 4; ++j)
        sum[j] = _mm512_fmadd_ps(load_floats(x, TYPE, xi + i + 16 * j, 0xffff), load_floats(w, TYPE, wi + i + 16 * j, 0xffff), sum[j]);
  }
  for (; i < k; i += 16) {
    const __mmask16 mask = first(k - i);
    sum[0] = _mm512_fmadd_ps(load_floats(x, TYPE, xi + i, mask), load_floats(w, TYPE, wi + i, mask), sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

template <Float TYPE>
void dense_rows(const Dense& d, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c)
    for (int64_t m = 0; m < d.m; ++m) {
      const float sum = row_product<TYPE>(d.x, m * d.k, d.weight, c * d.k, d.k);
      store(d.y, TYPE, m * d.n + c, d.bias ? sum + d.bias[c] : sum);
    }
}

void dense(const Dense& d, int64_t begin, int64_t end) {
  switch (d.type) {
    case Float::f32: return dense_rows<Float::f32>(d, begin, end);
    case Float::bf16: return dense_rows<Float::bf16>(d, begin, end);
    case Float::f16: return dense_rows<Float::f16>(d, begin, end);
  }
}

}  // namespace

#ifdef __AVX512BF16__
const Isa* avx512_bf16() {
  static const Isa isa{"avx512-vnni-bf16", quantize_rows, split_rows, widen_rows, block, dequantize, dense};
  return &isa;
}
#else
const Isa* avx512() {
  static const Isa isa{"avx512-vnni", quantize_rows, split_rows, widen_rows, block, dequantize, dense};
  return &isa;
}
#endif

}  // namespace qat
