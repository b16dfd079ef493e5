// fake_quantize.h on AVX512: sixteen groups at a time, so that their scales are one vector and their weights, read twice,
// come from the cache the second time.
#include <immintrin.h>

#include <algorithm>

#include "fake_quantize.h"

namespace qat {
namespace {

constexpr int64_t kTogether = 16;

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }
inline __m512 vector(float v) { return _mm512_set1_ps(v); }

template <Float T>
inline __m512 get(const void* x, int64_t at, __mmask16 lanes) {
  if constexpr (T == Float::f32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + at);
  const __m256i v = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + at);
  if constexpr (T == Float::f16) return _mm512_cvtph_ps(v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// By integers where the type is bf16: VCVTNEPS2BF16 takes subnormal numbers for zero.
template <Float T>
inline void put(void* y, int64_t at, __mmask16 lanes, __m512 v) {
  if constexpr (T == Float::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + at, lanes, v);
  } else {
    __m256i half;
    if constexpr (T == Float::f16) {
      half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m512i b = _mm512_castps_si512(v);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
      const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
      const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      half = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, lanes, half);
  }
}

inline void put_bits(uint8_t* inside, int64_t at, int64_t count, __mmask16 bits) {
  inside[at / 8] = static_cast<uint8_t>(bits);
  if (count > 8) inside[at / 8 + 1] = static_cast<uint8_t>(bits >> 8);
}
inline __mmask16 get_bits(const uint8_t* inside, int64_t at, int64_t count) {
  return static_cast<__mmask16>(inside[at / 8] | (count > 8 ? inside[at / 8 + 1] << 8 : 0));
}

// VMINPS and VMAXPS drop a NaN in their first operand and pass one in their second.
inline __m512 clamp(__m512 v, float least, float greatest) {
  return _mm512_min_ps(vector(greatest), _mm512_max_ps(vector(least), v));
}

template <Float T>
Range range(const void* x, int64_t at, int64_t count) {
  __m512 low = vector(HUGE_VALF), high = vector(-HUGE_VALF);
  __mmask16 nan = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first(count - i);
    const __m512 v = get<T>(x, at + i, lanes);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    low = _mm512_mask_min_ps(low, lanes, low, v);
    high = _mm512_mask_max_ps(high, lanes, high, v);
  }
  if (nan) return {NAN, NAN};
  return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
}

template <Float T>
bool piece(const Groups& job, int64_t at, int64_t count, Step step, uint8_t* inside) {
  const __m512 divisor = vector(nonzero(step.scale)), scale = vector(step.scale), zero = vector(step.zero);
  __mmask16 clipped = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first(count - i);
    const __m512 position = _mm512_div_ps(get<T>(job.x, at + i, lanes), divisor);
    const __m512 nearest = _mm512_roundscale_ps(_mm512_add_ps(position, vector(0.5f)), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512 level = _mm512_add_ps(nearest, zero), kept = clamp(level, job.grid.least, job.grid.greatest);
    put<T>(job.out, at + i, lanes, _mm512_mul_ps(_mm512_sub_ps(kept, zero), scale));
    if (inside) {
      const __mmask16 bits = _mm512_mask_cmp_ps_mask(lanes, level, kept, _CMP_EQ_OQ);
      clipped |= bits ^ lanes;
      put_bits(inside, i, count - i, bits);
    }
  }
  return clipped != 0;
}

template <Float T>
bool groups(const Groups& job, int64_t begin, int64_t end) {
  bool clipped = false;
  const int64_t bytes = mask_bytes(job.group), together = std::clamp<int64_t>(4096 / job.group, 1, kTogether);
  Range ranges[kTogether];
  Step steps[kTogether];
  for (; begin < end; begin += together) {
    const int64_t count = std::min(together, end - begin);
    if (job.scale) {
      for (int64_t g = 0; g < count; ++g) steps[g] = step_of(job, begin + g);
    } else {
      for (int64_t g = 0; g < count; ++g) ranges[g] = range<T>(job.x, (begin + g) * job.group, job.group);
      for (int64_t g = 0; g < count; ++g) steps[g] = step_of(job.grid, ranges[g]);
    }
    for (int64_t g = begin; g < begin + count; ++g)
      clipped |= piece<T>(job, g * job.group, job.group, steps[g - begin], job.inside ? job.inside + g * bytes : nullptr);
  }
  return clipped;
}

template <Float T>
bool rows(const Rows& job, int64_t begin, int64_t end) {
  __mmask16 clipped = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * job.k;
    float scale;
    if (job.scale) {
      scale = *job.scale;
    } else {
      const auto [low, high] = range<T>(job.x, at, job.k);
      scale = nonzero(std::fabs(high > -low ? high : low) / 127.0f);
    }
    const __m512 step = vector(scale), bound = vector(scale * 127.5f);
    for (int64_t i = 0; i < job.k; i += 16) {
      const __mmask16 lanes = first(job.k - i);
      const __m512 x = get<T>(job.x, at + i, lanes);
      const __m512 nearest = _mm512_roundscale_ps(_mm512_div_ps(x, step), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      put<T>(job.out, at + i, lanes, _mm512_mul_ps(clamp(nearest, -127.0f, 127.0f), step));
      if (job.inside) {
        const __mmask16 bits = _mm512_mask_cmp_ps_mask(lanes, _mm512_abs_ps(x), bound, _CMP_LE_OQ);
        clipped |= bits ^ lanes;
        put_bits(job.inside + row * mask_bytes(job.k), i, job.k - i, bits);
      }
    }
  }
  return clipped != 0;
}

template <Float T>
void keep(const void* grad, void* out, int64_t group, const uint8_t* inside, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g, inside += mask_bytes(group)) {
    for (int64_t i = 0; i < group; i += 16) {
      const __mmask16 lanes = first(group - i), outside = lanes & ~get_bits(inside, i, group - i);
      if (out == grad && !outside) continue;
      const __m512 v = get<T>(grad, g * group + i, lanes);
      put<T>(out, g * group + i, lanes, _mm512_mask_mul_ps(v, outside, v, _mm512_setzero_ps()));
    }
  }
}

#define BY_TYPE(type, call)                        \
  (type) == Float::f32    ? call<Float::f32>       \
  : (type) == Float::bf16 ? call<Float::bf16>      \
                          : call<Float::f16>

bool any_groups(const Groups& job, int64_t begin, int64_t end) { return (BY_TYPE(job.type, groups))(job, begin, end); }
Range any_range(const Groups& job, int64_t at, int64_t count) { return (BY_TYPE(job.type, range))(job.x, at, count); }
bool any_piece(const Groups& job, int64_t at, int64_t count, Step step, uint8_t* inside) {
  return (BY_TYPE(job.type, piece))(job, at, count, step, inside);
}
bool any_rows(const Rows& job, int64_t begin, int64_t end) { return (BY_TYPE(job.type, rows))(job, begin, end); }
void any_keep(const void* grad, void* out, Float type, int64_t group, const uint8_t* inside, int64_t begin, int64_t end) {
  (BY_TYPE(type, keep))(grad, out, group, inside + begin * mask_bytes(group), begin, end);
}

}  // namespace

const FakeQuantizeIsa& fake_quantize_avx512() {
  static const FakeQuantizeIsa isa{any_groups, any_range, any_piece, any_rows, any_keep};
  return isa;
}

}  // namespace qat
