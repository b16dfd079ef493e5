// The plain form of linear.h: any CPU, and the reference that the vectorized forms are tested against.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "linear.h"
#include "numbers.h"

namespace qat {
namespace {

// Position within eight inputs at which input i of them is stored in 4-bit activations.
constexpr int kPlace[8] = {0, 2, 4, 6, 1, 3, 5, 7};

inline int32_t stored(const Weight& w, int64_t block, int64_t channel, int64_t i) {
  if (w.bits == 8) return w.data[((block * (w.padded_k / 4) + i / 4) * kBlock + channel) * 4 + i % 4];
  const uint8_t* bytes = w.data + ((block * (w.padded_k / 8) + i / 8) * kBlock + channel) * 4;
  const int s = static_cast<int>(i % 8) / 2, high = static_cast<int>(i % 2);  // shift and 16-bit half
  const int byte = 2 * high + s / 2;
  return (bytes[byte] >> (4 * (s % 2))) & 15;
}

inline float scale_at(const Weight& w, int64_t i) { return w.half ? from_f16(w.scale[i]) : from_bf16(w.scale[i]); }

inline int64_t place(const Weight& w, int64_t i) { return w.bits == 8 ? i : i / 8 * 8 + kPlace[i % 8]; }

void quantize_rows(const void* x, Float type, const float* fixed, const Weight& w, const QuantizedRows& out,
                   int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    float absmax = 0;
    bool nan = false;
    for (int64_t i = 0; i < w.k; ++i) {
      const float v = std::fabs(load(x, type, m * w.k + i));
      nan |= v != v;
      absmax = v > absmax ? v : absmax;
    }
    float scale = fixed ? *fixed : absmax / 127.0f;
    if (scale == 0) scale = 1;
    int8_t* q = out.q + m * w.padded_k;
    std::memset(q, 0, w.padded_k);
    for (int64_t i = 0; i < w.k; ++i) {
      const float v = std::nearbyint(load(x, type, m * w.k + i) / scale);
      q[place(w, i)] = static_cast<int8_t>(v > 127 ? 127 : v < -127 ? -127 : v == v ? v : 0);
    }
    out.scale[m] = nan || std::isinf(scale) ? std::numeric_limits<float>::quiet_NaN() : scale;
    const int64_t size = w.padded_k / w.groups;
    for (int64_t g = 0; g < w.groups; ++g) {
      int32_t sum = 0;
      for (int64_t i = 0; i < size; ++i) sum += q[g * size + i];
      out.start[m * w.groups + g] = -w.zero * sum;
    }
  }
}

void split_rows(const void* x, Float type, const Weight& w, const Planes& out, int64_t m, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t i = 0; i < w.padded_k; ++i) {
      float rest = i < w.k ? load(x, type, row * w.k + i) : 0.0f;
      for (int32_t p = 0; p < out.planes; ++p) {
        const uint16_t part = to_bf16(rest);
        out.rows[(p * m + row) * w.padded_k + i] = part;
        const float held = from_bf16(part);
        rest = std::isfinite(held) ? rest - held : 0.0f;
      }
    }
  }
}

void widen_rows(const void* x, Float type, const Weight& w, float* out, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m)
    for (int64_t i = 0; i < w.padded_k; ++i)
      out[m * w.padded_k + i] = i < w.k ? load(x, type, m * w.k + i) : 0.0f;
}

void block(const Job& job, int64_t b, int64_t begin, int64_t end, void*) {
  const Weight& w = job.weight;
  const int64_t size = w.padded_k / w.groups, last = w.n - b * kBlock < kBlock ? w.n - b * kBlock : kBlock;
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t c = 0; c < last; ++c) {
      float total = 0;
      for (int64_t g = 0; g < w.groups; ++g) {
        const float scale = scale_at(w, (b * w.groups + g) * kBlock + c);
        if (job.integer) {
          int32_t sum = 0;
          for (int64_t i = g * size; i < (g + 1) * size; ++i)
            sum += (stored(w, b, c, i) - w.zero) * job.rows.q[m * w.padded_k + place(w, i)];
          total += static_cast<float>(sum) * scale;
          continue;
        }
        float sum = 0;
        for (int64_t i = g * size; i < (g + 1) * size; ++i) {
          float x = 0;
          if (job.floats) x = job.floats[m * w.padded_k + i];
          else
            for (int32_t p = 0; p < job.planes.planes; ++p)
              x += from_bf16(job.planes.rows[(p * job.m + m) * w.padded_k + i]);
          sum += static_cast<float>(stored(w, b, c, i) - w.zero) * x;
        }
        total += sum * scale;
      }
      if (job.integer) total *= job.rows.scale[m];
      if (job.out.bias) total += job.out.bias[b * kBlock + c];
      store(job.out.y, job.out.type, m * w.n + b * kBlock + c, total);
    }
  }
}

void dequantize(const Weight& w, int64_t b, void* y, Float type) {
  const int64_t size = w.padded_k / w.groups, last = w.n - b * kBlock < kBlock ? w.n - b * kBlock : kBlock;
  for (int64_t c = 0; c < last; ++c)
    for (int64_t i = 0; i < w.k; ++i) {
      const float scale = scale_at(w, (b * w.groups + i / size) * kBlock + c);
      store(y, type, (b * kBlock + c) * w.k + i, static_cast<float>(stored(w, b, c, i) - w.zero) * scale);
    }
}

void dense(const Dense& d, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c)
    for (int64_t m = 0; m < d.m; ++m) {
      float sum = 0;
      for (int64_t i = 0; i < d.k; ++i) sum += load(d.x, d.type, m * d.k + i) * load(d.weight, d.type, c * d.k + i);
      store(d.y, d.type, m * d.n + c, d.bias ? sum + d.bias[c] : sum);
    }
}

}  // namespace

const Isa& portable() {
  static const Isa isa{"portable", quantize_rows, split_rows, widen_rows, block, dequantize, dense};
  return isa;
}

int64_t scratch_bytes(const Job& job, int64_t rows) {
  const int64_t planes = job.integer || job.floats ? 1 : job.planes.planes;
  const int64_t group = job.weight.groups > 1 ? job.weight.group : 0, panel = group > 512 ? group : 512;
  return (planes * rows * 4 + 2 * panel) * kBlock + 4096;  // sums, and a panel of whole groups
}

}  // namespace qat
