// Conversions between float32 and the 16-bit types, rounded half to even.
#pragma once
#include <cstdint>
#include <cstring>

#include "linear.h"

namespace qat {

inline uint32_t bits_of(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}
inline float of_bits(uint32_t b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}
inline float from_bf16(uint16_t v) { return of_bits(static_cast<uint32_t>(v) << 16); }
inline uint16_t to_bf16(float v) {
  const uint32_t b = bits_of(v);
  if (v != v) return 0x7fc0;
  return static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return of_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return of_bits(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
  return of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline uint16_t to_f16(float v) {
  const uint32_t b = bits_of(v), sign = (b >> 16) & 0x8000, magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000)  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return static_cast<uint16_t>(sign | (bits_of(of_bits(magnitude) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

inline float load(const void* x, Float type, int64_t i) {
  if (type == Float::f32) return static_cast<const float*>(x)[i];
  const uint16_t v = static_cast<const uint16_t*>(x)[i];
  return type == Float::bf16 ? from_bf16(v) : from_f16(v);
}
inline void store(void* y, Float type, int64_t i, float v) {
  if (type == Float::f32) static_cast<float*>(y)[i] = v;
  else static_cast<uint16_t*>(y)[i] = type == Float::bf16 ? to_bf16(v) : to_f16(v);
}

}  // namespace qat
