// attention.h on AVX512.
#include <algorithm>
#include <limits>

#include "attention.h"
#include "simd.h"

namespace qat {
namespace {

// e^x for x <= 0: 2^n times a polynomial in the rest, |rest| <= ln(2) / 2; relative error below 2e-7.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // NaN stays: the second one is returned for it
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

template <Float TYPE>
void heads(const Attend& a, int64_t begin, int64_t end, float* scores) {
  const float infinity = std::numeric_limits<float>::infinity();
  alignas(64) float query[1024];
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / a.heads, h = at % a.heads, g = h / (a.heads / a.groups);
    const int64_t key = b * a.key_strides[0] + g * a.key_strides[1];
    const int64_t value = b * a.value_strides[0] + g * a.value_strides[1];
    const bool* mask = a.mask ? a.mask + b * a.mask_stride : nullptr;
    for (int64_t d = 0; d < a.width; d += 16)
      _mm512_store_ps(query + d, _mm512_mul_ps(load_floats(a.query, TYPE, b * a.query_strides[0] + h * a.query_strides[1] + d,
                                                           first(a.width - d)), _mm512_set1_ps(a.scale)));
    int64_t from = 0, to = a.length;  // keys outside of [from, to) are not seen
    while (mask && from < to && !mask[from]) ++from;
    while (mask && to > from && !mask[to - 1]) --to;
    float greatest = -infinity;
    for (int64_t l = from; l < to; ++l) {
      __m512 sum = _mm512_setzero_ps();
      if (!mask || mask[l]) {
        for (int64_t d = 0; d < a.width; d += 16)
          sum = _mm512_fmadd_ps(load_floats(a.key, TYPE, key + l * a.key_strides[2] + d, first(a.width - d)),
                                _mm512_load_ps(query + d), sum);
        scores[l] = _mm512_reduce_add_ps(sum);
      } else {
        scores[l] = -infinity;
      }
      greatest = scores[l] > greatest ? scores[l] : greatest;
    }
    __m512 total = _mm512_setzero_ps();
    for (int64_t l = from; l < to; l += 16) {
      const __mmask16 inside = first(to - l);
      const __m512 score = _mm512_mask_loadu_ps(_mm512_set1_ps(-infinity), inside, scores + l);
      const __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-infinity), _CMP_NEQ_UQ);
      const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(score, _mm512_set1_ps(greatest))));
      _mm512_mask_storeu_ps(scores + l, inside, weight);
      total = _mm512_add_ps(total, weight);
    }
    const float all = _mm512_reduce_add_ps(total);
    const __m512 sum = _mm512_set1_ps(all == 0 ? 1 : all);  // no key seen: zeros, as torch has it
    for (int64_t d = 0; d < a.width; d += 64) {
      __m512 out[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t l = from; l < to; ++l) {
        if (scores[l] == 0) continue;  // a value that is not seen may be anything
        const __m512 weight = _mm512_set1_ps(scores[l]);
        for (int j = 0; j < 4; ++j)
          out[j] = _mm512_fmadd_ps(weight, load_floats(a.value, TYPE, value + l * a.value_strides[2] + d + 16 * j,
                                                       first(a.width - d - 16 * j)), out[j]);
      }
      for (int j = 0; j < 4; ++j)
        store_floats(a.out, TYPE, at * a.width + d + 16 * j, first(a.width - d - 16 * j), _mm512_div_ps(out[j], sum));
    }
  }
}

}  // namespace

void attend_avx512(const Attend& a, int64_t begin, int64_t end, float* scores) {
  switch (a.type) {
    case Float::f32: return heads<Float::f32>(a, begin, end, scores);
    case Float::bf16: return heads<Float::bf16>(a, begin, end, scores);
    case Float::f16: return heads<Float::f16>(a, begin, end, scores);
  }
}

}  // namespace qat
