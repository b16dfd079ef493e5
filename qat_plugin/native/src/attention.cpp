// The plain form of attention.h.
#include <cmath>
#include <limits>

#include "attention.h"
#include "numbers.h"

namespace qat {

void attend_portable(const Attend& a, int64_t begin, int64_t end, float* scores) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / a.heads, h = at % a.heads, g = h / (a.heads / a.groups);
    const int64_t q = b * a.query_strides[0] + h * a.query_strides[1];
    float greatest = -std::numeric_limits<float>::infinity();
    for (int64_t l = 0; l < a.length; ++l) {
      const bool seen = !a.mask || a.mask[b * a.mask_stride + l];
      float dot = 0;
      for (int64_t d = 0; seen && d < a.width; ++d)
        dot += load(a.query, a.type, q + d) *
               load(a.key, a.type, b * a.key_strides[0] + g * a.key_strides[1] + l * a.key_strides[2] + d);
      scores[l] = seen ? dot * a.scale : -std::numeric_limits<float>::infinity();
      greatest = scores[l] > greatest ? scores[l] : greatest;
    }
    float total = 0;
    for (int64_t l = 0; l < a.length; ++l)
      total += scores[l] = scores[l] == -std::numeric_limits<float>::infinity() ? 0 : std::exp(scores[l] - greatest);
    for (int64_t d = 0; d < a.width; ++d) {
      float sum = 0;
      for (int64_t l = 0; l < a.length; ++l)
        if (scores[l] != 0)
          sum += scores[l] *
                 load(a.value, a.type, b * a.value_strides[0] + g * a.value_strides[1] + l * a.value_strides[2] + d);
      store(a.out, a.type, at * a.width + d, total == 0 ? 0 : sum / total);  // no key seen: zeros, as torch has it
    }
  }
}

}  // namespace qat
