// Loads, stores and conversions of sixteen numbers.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "linear.h"

namespace qat {
namespace {

inline __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

inline __m256i narrow(__m512 v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i b = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

inline __m512 load_floats(const void* x, Float type, int64_t at, __mmask16 mask) {
  if (type == Float::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + at);
  const __m256i v = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + at);
  return type == Float::bf16 ? widen(v) : _mm512_cvtph_ps(v);
}

inline void store_floats(void* y, Float type, int64_t at, __mmask16 mask, __m512 v) {
  if (type == Float::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + at, mask, v);
    return;
  }
  const __m256i half = type == Float::bf16 ? narrow(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, mask, half);
}

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

}  // namespace
}  // namespace qat
