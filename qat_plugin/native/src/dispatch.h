// What the operators ask of the machine and of PyTorch's types.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <cstring>

#include "linear.h"

namespace qat {

inline Float type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Float::f32;
    case at::kBFloat16: return Float::bf16;
    case at::kHalf: return Float::f16;
    default: TORCH_CHECK(false, "qat_plugin: tensors are ", type, "; fp32, bf16 or fp16 are needed");
  }
}

// Whether an instruction set may be used: QAT_PLUGIN_ISA names one, for tests.
inline bool allowed(const char* name) {
  const char* wanted = std::getenv("QAT_PLUGIN_ISA");
  return !wanted || std::strcmp(wanted, name) == 0;
}

inline bool has_vnni() {
#ifdef QAT_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Whether the AVX512 forms run, with bf16 products or without.
inline bool vectorized() {
  static const bool answer = has_vnni() && (allowed("avx512-vnni-bf16") || allowed("avx512-vnni"));
  return answer;
}

}  // namespace qat
