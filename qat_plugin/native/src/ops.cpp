// The operators that PyTorch sees.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "dispatch.h"
#include "linear.h"

namespace qat {
namespace {

using at::Tensor;

const Isa& isa() {
  static const Isa& chosen = []() -> const Isa& {
#ifdef QAT_X86
    if (has_vnni() && __builtin_cpu_supports("avx512bf16") && allowed(avx512_bf16()->name)) return *avx512_bf16();
    if (has_vnni() && allowed(avx512()->name)) return *avx512();
#endif
    return portable();
  }();
  return chosen;
}

Weight weight_of(const Tensor& data, const Tensor& scale, int64_t n, int64_t k, int64_t bits) {
  TORCH_CHECK(bits == 4 || bits == 8, "qat_plugin: ", bits, "-bit weights");
  TORCH_CHECK(data.is_contiguous() && data.scalar_type() == at::kByte && scale.is_contiguous() &&
                  scale.scalar_type() == at::kBFloat16 && scale.dim() == 3 && scale.size(2) == kBlock,
              "qat_plugin: packed weight is not uint8, or its scales are not bf16 [blocks, groups, 64]");
  Weight w{};
  w.data = data.const_data_ptr<uint8_t>();
  w.scale = reinterpret_cast<const uint16_t*>(scale.const_data_ptr<at::BFloat16>());
  w.n = n, w.k = k, w.bits = static_cast<int32_t>(bits), w.zero = bits == 8 ? 128 : 8;
  w.padded_k = (k + 7) / 8 * 8, w.groups = scale.size(1);
  w.group = w.padded_k / w.groups;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  TORCH_CHECK(scale.size(0) == blocks && data.numel() == blocks * kBlock * w.padded_k * bits / 8 &&
                  w.group * w.groups == w.padded_k && w.group % 8 == 0 && (w.groups == 1 || w.padded_k == k),
              "qat_plugin: packed weight of ", data.numel(), " bytes and ", scale.numel(), " scales is not [", n, ", ", k, "]");
  return w;
}

// A buffer of this thread that grows and stays.
void* buffer(int which, size_t bytes) {
  struct Held {
    void* at = nullptr;
    size_t size = 0;
    ~Held() { std::free(at); }
  };
  static thread_local Held held[2];
  Held& h = held[which];
  if (h.size < bytes) {
    std::free(h.at);
    h.size = (bytes + (1 << 16)) / 64 * 64;
    h.at = std::aligned_alloc(64, h.size);
    if (!h.at) {
      h.size = 0;
      TORCH_CHECK(false, "qat_plugin: out of memory for ", bytes, " bytes of workspace");
    }
  }
  return h.at;
}

Tensor linear(const Tensor& x_, const Tensor& data, const Tensor& scale, const std::optional<Tensor>& bias_,
              const std::optional<Tensor>& fixed_scale, int64_t n, int64_t k, int64_t bits, bool integer) {
  TORCH_CHECK(x_.dim() >= 1 && x_.size(-1) == k, "qat_plugin: input has shape ", x_.sizes(), ", the layer takes ", k, " features");
  const Tensor x = x_.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = n;
  Tensor y = at::empty(shape, x.options());
  Job job{};
  job.weight = weight_of(data, scale, n, k, bits);
  const Weight& w = job.weight;
  const int64_t m = job.m = k ? x.numel() / k : 0;
  if (y.numel() == 0) return y;
  job.integer = integer;
  job.out.type = type_of(x.scalar_type());
  job.out.y = y.mutable_data_ptr();
  const Tensor bias = bias_ ? bias_->to(at::kFloat).contiguous() : Tensor();
  TORCH_CHECK(!bias_ || bias.numel() == n, "qat_plugin: bias has ", bias.numel(), " elements, the layer ", n, " channels");
  job.out.bias = bias_ ? bias.const_data_ptr<float>() : nullptr;
  const float* fixed = fixed_scale ? fixed_scale->const_data_ptr<float>() : nullptr;
  TORCH_CHECK(!fixed_scale || fixed_scale->scalar_type() == at::kFloat, "qat_plugin: the activation scale is not float32");

  const Isa& cpu = isa();
  const void* input = x.const_data_ptr();
  // Few rows of 8-bit weights are widened as they are multiplied; many rows of a float32 model meet float32 numbers,
  // because three bf16 products cost more than one of float32.
  job.few = bits == 8 && m <= 4;
  const bool wide = !integer && (job.few || (job.out.type == Float::f32 && (bits == 8 || m > 16)));
  const int planes = job.out.type == Float::f32 ? 3 : job.out.type == Float::f16 ? 2 : 1;
  const size_t rows = static_cast<size_t>(m) * w.padded_k;
  const bool direct = !integer && !wide && planes == 1 && w.padded_k == k;  // bf16 rows are used where they lie
  char* held = static_cast<char*>(
      buffer(0, integer ? rows + 64 + m * (4 + 4 * w.groups) : wide ? 4 * rows : direct ? 0 : 2 * planes * rows));
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, k));
  if (integer) {
    job.rows = {reinterpret_cast<int8_t*>(held), reinterpret_cast<float*>(held + (rows + 63) / 64 * 64), nullptr};
    job.rows.start = reinterpret_cast<int32_t*>(job.rows.scale + m);
    at::parallel_for(0, m, grain, [&](int64_t a, int64_t b) { cpu.quantize_rows(input, job.out.type, fixed, w, job.rows, a, b); });
  } else if (wide) {
    job.floats = reinterpret_cast<float*>(held);
    at::parallel_for(0, m, grain, [&](int64_t a, int64_t b) {
      cpu.widen_rows(input, job.out.type, w, reinterpret_cast<float*>(held), a, b);
    });
  } else {
    job.planes = {direct ? static_cast<uint16_t*>(const_cast<void*>(input)) : reinterpret_cast<uint16_t*>(held), planes};
    if (!direct)
      at::parallel_for(0, m, grain, [&](int64_t a, int64_t b) { cpu.split_rows(input, job.out.type, w, job.planes, m, a, b); });
  }

  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const int64_t chunk = m <= 192 ? m : 128, chunks = (m + chunk - 1) / chunk;
  const int64_t work = std::max<int64_t>(1, w.padded_k * kBlock * std::min<int64_t>(m, chunk));  // products of a task
  at::parallel_for(0, blocks * chunks, std::max<int64_t>(1, (1 << 17) / work), [&](int64_t a, int64_t b) {
    void* scratch = buffer(1, static_cast<size_t>(scratch_bytes(job, std::min(m, chunk))));
    for (int64_t task = a; task < b; ++task) {
      const int64_t first = task % chunks * chunk;
      cpu.block(job, task / chunks, first, std::min(m, first + chunk), scratch);
    }
  });
  return y;
}

Tensor dequantize(const Tensor& data, const Tensor& scale, int64_t n, int64_t k, int64_t bits, at::ScalarType dtype) {
  Tensor y = at::empty({n, k}, data.options().dtype(dtype));
  const Weight w = weight_of(data, scale, n, k, bits);
  if (y.numel() == 0) return y;
  const Float type = type_of(y.scalar_type());
  void* out = y.mutable_data_ptr();
  at::parallel_for(0, (n + kBlock - 1) / kBlock, 1, [&](int64_t a, int64_t b) {
    for (int64_t block = a; block < b; ++block) isa().dequantize(w, block, out, type);
  });
  return y;
}

std::string instruction_set() { return isa().name; }

}  // namespace
}  // namespace qat

TORCH_LIBRARY(qat_plugin_native, m) {
  m.def("instruction_set() -> str", qat::instruction_set);
  m.def("linear(Tensor x, Tensor data, Tensor scale, Tensor? bias, Tensor? fixed_scale, int n, int k, int bits, bool integer) -> Tensor");
  m.def("dequantize(Tensor data, Tensor scale, int n, int k, int bits, ScalarType dtype) -> Tensor");
}
TORCH_LIBRARY_IMPL(qat_plugin_native, CPU, m) {
  m.impl("linear", qat::linear);
  m.impl("dequantize", qat::dequantize);
}
