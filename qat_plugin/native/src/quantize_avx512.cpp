// quantize.h on AVX512: sixteen numbers at a time.
#include <immintrin.h>

#include <algorithm>

#include "quantize.h"

namespace qat {
namespace {

template <Float T>
inline __m512 get(const void* x, int64_t at, __mmask16 lanes) {
  if constexpr (T == Float::f32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + at);
  const __m256i v = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + at);
  if constexpr (T == Float::f16) return _mm512_cvtph_ps(v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

template <Float T>
void convert(const void* x, float scale, uint8_t* out, int64_t begin, int64_t end) {
  const __m512 divisor = _mm512_set1_ps(scale), most = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
  const __m512i zero = _mm512_set1_epi32(128);
  for (int64_t i = begin; i < end; i += 16) {
    const int64_t left = end - i;
    const __mmask16 lanes = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    // VMAXPS gives its second operand for a NaN
    const __m512 level = _mm512_min_ps(_mm512_max_ps(_mm512_div_ps(get<T>(x, i, lanes), divisor), least), most);
    const __m512i u = _mm512_add_epi32(_mm512_cvtps_epi32(level), zero);  // rounds half to even
    _mm_mask_storeu_epi8(out + i, lanes, _mm512_cvtepi32_epi8(u));
  }
}

}  // namespace

void to_bytes_avx512(const void* x, Float type, float scale, uint8_t* out, int64_t begin, int64_t end) {
  switch (type) {
    case Float::f32: return convert<Float::f32>(x, scale, out, begin, end);
    case Float::bf16: return convert<Float::bf16>(x, scale, out, begin, end);
    case Float::f16: return convert<Float::f16>(x, scale, out, begin, end);
  }
}

}  // namespace qat
