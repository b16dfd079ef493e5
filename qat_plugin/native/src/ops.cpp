// The operators that PyTorch sees.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "dispatch.h"
#include "linear.h"
#include "quantize.h"

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
                  (scale.scalar_type() == at::kBFloat16 || scale.scalar_type() == at::kHalf) && scale.dim() == 3 &&
                  scale.size(2) == kBlock,
              "qat_plugin: packed weight is not uint8, or its scales are not bf16 or fp16 [blocks, groups, 64]");
  Weight w{};
  w.data = data.const_data_ptr<uint8_t>();
  w.scale = static_cast<const uint16_t*>(scale.const_data_ptr());
  w.half = scale.scalar_type() == at::kHalf;
  w.n = n, w.k = k, w.bits = static_cast<int32_t>(bits), w.zero = bits == 8 ? 128 : 8;
  w.padded_k = (k + 7) / 8 * 8, w.groups = scale.size(1);
  w.group = w.padded_k / w.groups;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  TORCH_CHECK(scale.size(0) == blocks && data.numel() == blocks * kBlock * w.padded_k * bits / 8 &&
                  w.group * w.groups == w.padded_k && w.group % 8 == 0 && (w.groups == 1 || w.padded_k == k),
              "qat_plugin: packed weight of ", data.numel(), " bytes and ", scale.numel(), " scales is not [", n, ", ", k, "]");
  return w;
}

// A buffer of this thread that grows, and stays while it is not large.
constexpr size_t kKept = size_t{32} << 20;
void* buffer(int which, size_t bytes) {
  struct Held {
    void* at = nullptr;
    size_t size = 0;
    ~Held() { std::free(at); }
  };
  static thread_local Held held[2];
  Held& h = held[which];
  if (h.size < bytes || (h.size > kKept && bytes <= kKept)) {
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

// Layers that take one input: their weights agree in bits, inputs and groups.
std::vector<Tensor> linears(const Tensor& x_, at::TensorList data, at::TensorList scale,
                            const c10::List<std::optional<Tensor>>& bias, const std::optional<Tensor>& fixed_scale,
                            at::IntArrayRef n, int64_t k, int64_t bits, bool integer) {
  TORCH_CHECK(x_.dim() >= 1 && x_.size(-1) == k, "qat_plugin: input has shape ", x_.sizes(), ", the layer takes ", k, " features");
  TORCH_CHECK(!data.empty() && data.size() == scale.size() && data.size() == bias.size() && data.size() == n.size(),
              "qat_plugin: ", data.size(), " weights, ", scale.size(), " scales, ", bias.size(), " biases, ", n.size(), " sizes");
  TORCH_CHECK(!fixed_scale || fixed_scale->scalar_type() == at::kFloat, "qat_plugin: the activation scale is not float32");
  const Tensor x = x_.contiguous();
  const Float type = type_of(x.scalar_type());
  const int64_t m = k ? x.numel() / k : 0;
  std::vector<Tensor> outputs, biases;
  std::vector<Job> jobs;
  for (size_t i = 0; i < data.size(); ++i) {
    auto shape = x.sizes().vec();
    shape.back() = n[i];
    outputs.push_back(at::empty(shape, x.options()));
    const std::optional<Tensor> given = bias.get(i);
    TORCH_CHECK(!given || given->numel() == n[i], "qat_plugin: bias has ", given ? given->numel() : 0, " elements, the layer ", n[i], " channels");
    biases.push_back(given ? given->to(at::kFloat).contiguous() : Tensor());
    Job job{};
    job.weight = weight_of(data[i], scale[i], n[i], k, bits);
    job.m = m, job.integer = integer;
    job.out = {outputs[i].mutable_data_ptr(), given ? biases[i].const_data_ptr<float>() : nullptr, type};
    // Few rows of 8-bit weights are widened as they are multiplied; many rows of a float32 model meet float32 numbers,
    // because three bf16 products cost more than one of float32.
    job.few = bits == 8 && m <= 4;
    jobs.push_back(job);
    TORCH_CHECK(job.weight.groups == jobs[0].weight.groups, "qat_plugin: layers of one input differ in their groups");
  }
  const Job& one = jobs[0];
  const Weight& w = one.weight;
  if (m == 0) {
    for (const Tensor& y : outputs) y.zero_();  // no rows, or no inputs to sum over
    return outputs;
  }

  const Isa& cpu = isa();
  const void* input = x.const_data_ptr();
  const bool wide = !integer && (one.few || (type == Float::f32 && (bits == 8 || m > 16)));
  const int planes = type == Float::f32 ? 3 : type == Float::f16 ? 2 : 1;
  const size_t rows = static_cast<size_t>(m) * w.padded_k;
  const bool direct = !integer && !wide && planes == 1 && w.padded_k == k;  // bf16 rows are used where they lie
  char* held = static_cast<char*>(
      buffer(0, integer ? rows + 64 + m * (4 + 4 * w.groups) : wide ? 4 * rows : direct ? 0 : 2 * planes * rows));
  const int64_t grain = std::max<int64_t>(1, 32768 / k);
  QuantizedRows quantized{};
  Planes split{};
  if (integer) {
    quantized = {reinterpret_cast<int8_t*>(held), reinterpret_cast<float*>(held + (rows + 63) / 64 * 64), nullptr};
    quantized.start = reinterpret_cast<int32_t*>(quantized.scale + m);
    const float* fixed = fixed_scale ? fixed_scale->const_data_ptr<float>() : nullptr;
    at::parallel_for(0, m, grain, [&](int64_t a, int64_t b) { cpu.quantize_rows(input, type, fixed, w, quantized, a, b); });
  } else if (wide) {
    at::parallel_for(0, m, grain, [&](int64_t a, int64_t b) {
      cpu.widen_rows(input, type, w, reinterpret_cast<float*>(held), a, b);
    });
  } else {
    split = {direct ? static_cast<uint16_t*>(const_cast<void*>(input)) : reinterpret_cast<uint16_t*>(held), planes};
    if (!direct)
      at::parallel_for(0, m, grain, [&](int64_t a, int64_t b) { cpu.split_rows(input, type, w, split, m, a, b); });
  }

  const int64_t chunk = m <= 192 ? m : 128, chunks = (m + chunk - 1) / chunk;
  std::vector<int64_t> ends;  // of each layer, in tasks: a task is a block of channels by a chunk of rows
  for (Job& job : jobs) {
    job.rows = quantized, job.planes = split, job.floats = wide ? reinterpret_cast<float*>(held) : nullptr;
    ends.push_back((ends.empty() ? 0 : ends.back()) + (job.weight.n + kBlock - 1) / kBlock * chunks);
  }
  const int64_t work = std::max<int64_t>(1, w.padded_k * kBlock * chunk);  // products of a task
  at::parallel_for(0, ends.back(), std::max<int64_t>(1, (1 << 17) / work), [&](int64_t a, int64_t b) {
    void* scratch = buffer(1, static_cast<size_t>(scratch_bytes(one, chunk)));
    size_t layer = 0;
    for (int64_t task = a; task < b; ++task) {
      while (task >= ends[layer]) ++layer;
      const int64_t at = task - (layer ? ends[layer - 1] : 0), begin = at % chunks * chunk;
      cpu.block(jobs[layer], at / chunks, begin, std::min(m, begin + chunk), scratch);
    }
  });
  return outputs;
}

Tensor linear(const Tensor& x, const Tensor& data, const Tensor& scale, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& fixed_scale, int64_t n, int64_t k, int64_t bits, bool integer) {
  return linears(x, data, scale, c10::List<std::optional<Tensor>>({bias}), fixed_scale, n, k, bits, integer)[0];
}

// A float layer for few rows: each weight is read once, at the speed of memory.
Tensor dense(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias_) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && x_.dim() >= 1 && x_.size(-1) == weight.size(1) &&
                  x_.scalar_type() == weight.scalar_type() && (!bias_ || bias_->numel() == weight.size(0)),
              "qat_plugin: dense: input ", x_.sizes(), " does not fit weight ", weight.sizes());
  const Tensor x = x_.contiguous(), bias = bias_ ? bias_->to(at::kFloat).contiguous() : Tensor();
  const int64_t n = weight.size(0), k = weight.size(1), m = k ? x.numel() / k : 0;
  auto shape = x.sizes().vec();
  shape.back() = n;
  Tensor y = at::empty(shape, x.options());
  if (m == 0) return y.zero_();
  const Dense job{x.const_data_ptr(), weight.const_data_ptr(), y.mutable_data_ptr(),
                  bias_ ? bias.const_data_ptr<float>() : nullptr, type_of(x.scalar_type()), m, n, k};
  at::parallel_for(0, n, std::max<int64_t>(16, (1 << 16) / std::max<int64_t>(1, k)),
                   [&](int64_t a, int64_t b) { isa().dense(job, a, b); });
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

// An activation of any shape as unsigned bytes with zero point 128, laid out in memory as it is.
Tensor to_bytes(const Tensor& x_, const Tensor& scale) {
  TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.numel() == 1, "qat_plugin: the activation scale is not one float32 number");
  const Tensor x = x_.is_non_overlapping_and_dense() ? x_ : x_.contiguous();
  Tensor out = at::empty_like(x, x.options().dtype(at::kByte));
  const Float type = type_of(x.scalar_type());
  const void* from = x.const_data_ptr();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const float step = *scale.const_data_ptr<float>();
  at::parallel_for(0, x.numel(), 1 << 15, [&](int64_t a, int64_t b) {
#ifdef QAT_X86
    if (vectorized()) return to_bytes_avx512(from, type, step, to, a, b);
#endif
    to_bytes_portable(from, type, step, to, a, b);
  });
  return out;
}

std::string instruction_set() { return isa().name; }

}  // namespace
}  // namespace qat

TORCH_LIBRARY(qat_plugin_native, m) {
  m.def("instruction_set() -> str", qat::instruction_set);
  m.def("linear(Tensor x, Tensor data, Tensor scale, Tensor? bias, Tensor? fixed_scale, int n, int k, int bits, bool integer) -> Tensor");
  m.def("linears(Tensor x, Tensor[] data, Tensor[] scale, Tensor?[] bias, Tensor? fixed_scale, int[] n, int k, int bits, bool integer) -> Tensor[]");
  m.def("dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("to_bytes(Tensor x, Tensor scale) -> Tensor");
  m.def("dequantize(Tensor data, Tensor scale, int n, int k, int bits, ScalarType dtype) -> Tensor");
}
TORCH_LIBRARY_IMPL(qat_plugin_native, CPU, m) {
  m.impl("linear", qat::linear);
  m.impl("linears", qat::linears);
  m.impl("dense", qat::dense);
  m.impl("to_bytes", qat::to_bytes);
  m.impl("dequantize", qat::dequantize);
}
