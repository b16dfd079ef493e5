// One linear layer on packed integers: what an instruction set must provide, and what it is given.
//
// Packed weights, blocks of 64 output channels, unsigned (u = q + 128 for 8 bits, q + 8 or the stored integer for 4):
//   8 bits  [N / 64][K / 4][64][4]   four inputs of a channel side by side, as VPDPBUSD takes them
//   4 bits  [N / 64][K / 8][64][4]   byte 0 = u0 | u2 << 4, 1 = u4 | u6 << 4, 2 = u1 | u3 << 4, 3 = u5 | u7 << 4, so that
//                                    a 16-bit shift by 4 s leaves the pair (2 s, 2 s + 1) for VDPBF16PS, and the low
//                                    and the high nibbles are (0, 4, 1, 5) and (2, 6, 3, 7) for VPDPBUSD
// Scales are bf16 or fp16 [N / 64][groups][64]; channels and inputs that only fill a block up have weight zero.
#pragma once
#include <cstdint>

namespace qat {

constexpr int64_t kBlock = 64;  // output channels of a block
enum class Float : int32_t { f32, bf16, f16 };

struct Weight {
  const uint8_t* data;
  const uint16_t* scale;  // bits
  int64_t n, k, padded_k, group, groups;  // group divides padded_k when groups > 1
  int32_t bits, zero;                     // zero: what u stands for 0, 128 or 8
  bool half;                              // scales are fp16, as in files made elsewhere
};

// INT8 rows: scale[m] = absmax / 127, q = round-half-even(x / scale).
struct QuantizedRows {
  int8_t* q;       // [m][padded_k]; for 4-bit weights in the order 0 4 1 5 2 6 3 7 of each eight
  float* scale;    // [m]; NaN where the row held a NaN
  int32_t* start;  // [m][groups]: -zero times the sum of the group's integers
};

// Float rows as sums of bf16 rows: one for bf16, two for fp16, three for fp32, each exact.
struct Planes {
  uint16_t* rows;  // [planes][m][padded_k]
  int32_t planes;
};

struct Output {
  void* y;  // [m][n]
  const float* bias;
  Float type;
};

struct Job {
  Weight weight;
  int64_t m;
  bool integer;         // INT8 activations
  QuantizedRows rows;   // when integer
  Planes planes;        // otherwise, unless there are
  const float* floats;  // float32 rows [m][padded_k]: for 8-bit weights and few rows, and for
  bool few;             // float32 models and many
  Output out;
};

// A float layer: x [m][k], weight [n][k], y [m][n], all of one type; sums in float32.
struct Dense {
  const void *x, *weight;
  void* y;
  const float* bias;
  Float type;
  int64_t m, n, k;
};

struct Isa {
  const char* name;
  // rows [begin, end) of x [m][k]; fixed_scale or null for one per row
  void (*quantize_rows)(const void* x, Float type, const float* fixed_scale, const Weight&, const QuantizedRows&,
                        int64_t begin, int64_t end);
  void (*split_rows)(const void* x, Float type, const Weight&, const Planes&, int64_t m, int64_t begin, int64_t end);
  void (*widen_rows)(const void* x, Float type, const Weight&, float* out, int64_t begin, int64_t end);
  // output channels of one block, rows [begin, end); scratch of scratch_bytes(job, end - begin)
  void (*block)(const Job&, int64_t block, int64_t begin, int64_t end, void* scratch);
  // numbers of one block, [64][k] of the layer's rows
  void (*dequantize)(const Weight&, int64_t block, void* y, Float type);
  void (*dense)(const Dense&, int64_t begin, int64_t end);  // output channels [begin, end)
};

int64_t scratch_bytes(const Job&, int64_t rows);
const Isa& portable();
const Isa* avx512();       // on x86 only
const Isa* avx512_bf16();  // the same with VDPBF16PS

}  // namespace qat
