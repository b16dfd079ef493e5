// quantize.h in a plain loop, for any processor.
#include <cmath>

#include "numbers.h"
#include "quantize.h"

namespace qat {

void to_bytes_portable(const void* x, Float type, float scale, uint8_t* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float level = std::nearbyint(load(x, type, i) / scale);
    out[i] = static_cast<uint8_t>((level > -127.0f ? level < 127.0f ? level : 127.0f : -127.0f) + 128.0f);
  }
}

}  // namespace qat
