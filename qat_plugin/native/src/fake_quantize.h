// Fake quantization: what an instruction set must provide, and the arithmetic that all of them share.
//
// Everything equals qat_plugin/numerics.py bit for bit: true divisions, floor(x + 1/2), scales rounded by the same trick.
// Compile without fast-math and without contraction.
#pragma once
#include <cmath>
#include <cstdint>

#include "linear.h"
#include "numbers.h"

namespace qat {

struct Grid {
  int32_t bits;
  bool symmetric;
  float least, greatest;  // integers
};

// Weights, `group` of them to a scale; out of the same type.
struct Groups {
  const void* x;
  void* out;
  Float type;
  int64_t group;
  Grid grid;
  const float* scale;   // null: from each group's range
  const uint8_t* zero;  // of fixed scales, null when symmetric
  uint8_t* inside;      // null, or [groups][mask_bytes(group)]: bit i says that weight i was not clipped
};

// Activations as INT8, a scale to each row.
struct Rows {
  const void* x;
  void* out;
  Float type;
  int64_t k;
  const float* scale;  // null: absmax / 127 of the row
  uint8_t* inside;     // null, or [rows][mask_bytes(k)]
};

struct Range {
  float low, high;  // both NaN when any number is
};
struct Step {
  float scale, zero;
};

inline int64_t mask_bytes(int64_t group) { return (group + 7) / 8; }

// The nearest number that bf16 and fp16 both hold; `drop` of float32's 24 bits go.
inline float round_scale(float scale, float limit, int drop) {
  scale = scale < -limit ? -limit : scale > limit ? limit : scale;
  const uint32_t b = bits_of(scale);
  const float fine = of_bits((b + ((1u << (drop - 1)) - 1) + ((b >> drop) & 1)) >> drop << drop);
  const float coarse = ((scale * 0x1p24f + 0x1.8p23f) - 0x1.8p23f) * 0x1p-24f;  // fp16's subnormals
  return (std::fabs(scale) >= 0x1p-17f ? fine : coarse) + 0.0f;  // NaN stays NaN by the second
}

inline float nonzero(float scale) { return scale == 0.0f ? 1.0f : scale; }

// Scale and zero point of a group from its range. A NaN passes every comparison below as "no".
inline Step step_of(const Grid& grid, Range range) {
  const auto [low, high] = range;
  if (grid.symmetric) {
    const float largest = high > -low ? high : low;
    const float scale = grid.bits == 8 ? std::fabs(largest) / 127.0f : largest / grid.least;
    return {round_scale(scale, 65280.0f, 16), 0.0f};
  }
  const float below = low > 0.0f ? 0.0f : low, above = high < 0.0f ? 0.0f : high;
  const float scale = round_scale((above - below) / grid.greatest, 4064.0f, 17);
  const float zero = std::floor(-below / nonzero(scale) + 0.5f);
  return {scale, zero < 0.0f ? 0.0f : zero > grid.greatest ? grid.greatest : zero};
}

inline Step step_of(const Groups& job, int64_t g) {
  return {job.scale[g], job.zero ? static_cast<float>(job.zero[g]) : 0.0f};
}

struct FakeQuantizeIsa {
  // groups [begin, end), scales included; whether any number was clipped
  bool (*groups)(const Groups&, int64_t begin, int64_t end);
  // a piece of one long group: its range, and its numbers once the step is known (`at` is a multiple of 16)
  Range (*range)(const Groups&, int64_t at, int64_t count);
  bool (*piece)(const Groups&, int64_t at, int64_t count, Step, uint8_t* inside);
  // the same for rows [begin, end) of activations
  bool (*rows)(const Rows&, int64_t begin, int64_t end);
  // gradients times 1 or 0, groups [begin, end); out may be grad
  void (*keep)(const void* grad, void* out, Float type, int64_t group, const uint8_t* inside, int64_t begin, int64_t end);
};

const FakeQuantizeIsa& fake_quantize_portable();
const FakeQuantizeIsa& fake_quantize_avx512();

}  // namespace qat
