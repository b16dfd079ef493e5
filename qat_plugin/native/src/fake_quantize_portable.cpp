// fake_quantize.h in plain loops, for any processor.
#include <algorithm>

#include "fake_quantize.h"

namespace qat {
namespace {

// Keeps NaN, as torch.clamp does.
inline float clamp(float v, float least, float greatest) { return v < least ? least : v > greatest ? greatest : v; }

// The bits of eight numbers at a time; `inside(i)` says one.
template <typename Inside>
bool put_bits(uint8_t* mask, int64_t count, Inside inside) {
  bool clipped = false;
  for (int64_t i = 0; i < count; i += 8) {
    uint8_t bits = 0;
    for (int64_t j = i; j < std::min(i + 8, count); ++j) bits |= static_cast<uint8_t>(inside(j) << (j - i));
    clipped |= bits != (1u << std::min<int64_t>(8, count - i)) - 1;
    mask[i / 8] = bits;
  }
  return clipped;
}

Range range_of(const void* x, Float type, int64_t at, int64_t count) {
  Range r{HUGE_VALF, -HUGE_VALF};
  bool nan = false;
  for (int64_t i = at; i < at + count; ++i) {
    const float v = load(x, type, i);
    nan |= v != v;
    r.low = v < r.low ? v : r.low;
    r.high = v > r.high ? v : r.high;
  }
  return nan ? Range{NAN, NAN} : r;
}

Range range(const Groups& job, int64_t at, int64_t count) { return range_of(job.x, job.type, at, count); }

bool piece(const Groups& job, int64_t at, int64_t count, Step step, uint8_t* inside) {
  const Grid& grid = job.grid;
  const float divisor = nonzero(step.scale);
  const auto level = [&](int64_t i) { return std::floor(load(job.x, job.type, at + i) / divisor + 0.5f) + step.zero; };
  for (int64_t i = 0; i < count; ++i)
    store(job.out, job.type, at + i, (clamp(level(i), grid.least, grid.greatest) - step.zero) * step.scale);
  return inside && put_bits(inside, count, [&](int64_t i) {
    const float l = level(i);
    return l >= grid.least && l <= grid.greatest;
  });
}

bool groups(const Groups& job, int64_t begin, int64_t end) {
  bool clipped = false;
  for (int64_t g = begin; g < end; ++g) {
    const int64_t at = g * job.group;
    const Step step = job.scale ? step_of(job, g) : step_of(job.grid, range(job, at, job.group));
    clipped |= piece(job, at, job.group, step, job.inside ? job.inside + g * mask_bytes(job.group) : nullptr);
  }
  return clipped;
}

bool rows(const Rows& job, int64_t begin, int64_t end) {
  bool clipped = false;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * job.k;
    float scale = job.scale ? *job.scale : 0.0f;
    if (!job.scale) {
      const auto [low, high] = range_of(job.x, job.type, at, job.k);
      scale = nonzero(std::fabs(high > -low ? high : low) / 127.0f);
    }
    for (int64_t i = at; i < at + job.k; ++i)
      store(job.out, job.type, i, clamp(std::nearbyint(load(job.x, job.type, i) / scale), -127.0f, 127.0f) * scale);
    const float bound = scale * 127.5f;
    if (job.inside)
      clipped |= put_bits(job.inside + row * mask_bytes(job.k), job.k,
                          [&](int64_t i) { return std::fabs(load(job.x, job.type, at + i)) <= bound; });
  }
  return clipped;
}

void keep(const void* grad, void* out, Float type, int64_t group, const uint8_t* inside, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g)
    for (int64_t i = 0; i < group; ++i) {
      const bool kept = inside[g * mask_bytes(group) + i / 8] >> (i % 8) & 1;
      if (out == grad && kept) continue;
      const float v = load(grad, type, g * group + i);
      store(out, type, g * group + i, kept ? v : v * 0.0f);
    }
}

}  // namespace

const FakeQuantizeIsa& fake_quantize_portable() {
  static const FakeQuantizeIsa isa{groups, range, piece, rows, keep};
  return isa;
}

}  // namespace qat
