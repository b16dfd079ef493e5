// Attention of one new token to the keys and values of a cache.
#pragma once
#include <cstdint>

#include "linear.h"

namespace qat {

struct Attend {
  const void *query, *key, *value;  // [B, H, 1, D], [B, G, L, D], [B, G, L, D]; D is contiguous
  const bool* mask;                 // [B, L], true where a key is seen; or null for all
  void* out;                        // [B, 1, H, D]
  Float type;
  int64_t heads, groups, length, width;            // H, G, L, D; head h reads group h / (H / G)
  int64_t query_strides[2], key_strides[3], value_strides[3];  // in elements: batch, head; batch, head, position
  int64_t mask_stride;
  float scale;
};

// Heads [begin, end) of all B * H; scores has room for L numbers. Softmax and sums are in float32.
void attend_portable(const Attend&, int64_t begin, int64_t end, float* scores);
void attend_avx512(const Attend&, int64_t begin, int64_t end, float* scores);

}  // namespace qat
