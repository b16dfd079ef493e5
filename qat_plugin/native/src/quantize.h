// Activations to unsigned bytes: u = clamp(round-half-even(x / scale), -127, 127) + 128, as numerics.py rounds.
#pragma once
#include <cstdint>

#include "linear.h"

namespace qat {

// Numbers [begin, end) of x; a NaN becomes the byte of -127.
void to_bytes_portable(const void* x, Float type, float scale, uint8_t* out, int64_t begin, int64_t end);
void to_bytes_avx512(const void* x, Float type, float scale, uint8_t* out, int64_t begin, int64_t end);

}  // namespace qat
