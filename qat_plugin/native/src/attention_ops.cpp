// attention.h as an operator.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "attention.h"
#include "dispatch.h"

namespace qat {
namespace {

using at::Tensor;

Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double scale) {
  TORCH_CHECK(query.dim() == 4 && query.size(2) == 1 && key.dim() == 4 && key.sizes() == value.sizes(),
              "qat_plugin: attend takes query [B, H, 1, D], key and value [B, G, L, D], not ", query.sizes(), ", ",
              key.sizes(), ", ", value.sizes());
  const int64_t batch = query.size(0), heads = query.size(1), width = query.size(3), groups = key.size(1), length = key.size(2);
  TORCH_CHECK(key.size(0) == batch && key.size(3) == width && groups && heads % groups == 0 && width <= 1024,
              "qat_plugin: attend: query ", query.sizes(), " does not fit key ", key.sizes());
  TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
              "qat_plugin: attend: query is ", query.scalar_type(), ", key ", key.scalar_type(), ", value ", value.scalar_type());
  TORCH_CHECK(!mask || (mask->scalar_type() == at::kBool && mask->dim() == 4 && mask->size(1) == 1 && mask->size(2) == 1 &&
                        mask->size(3) == length && (mask->size(0) == batch || mask->size(0) == 1)),
              "qat_plugin: attend: the mask is not bool [B, 1, 1, ", length, "]");
  const auto dense = [](const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const Tensor q = dense(query), k = dense(key), v = dense(value);
  const Tensor seen = mask ? (mask->stride(3) == 1 ? *mask : mask->contiguous()) : Tensor();
  Tensor out = at::empty({batch, 1, heads, width}, query.options());
  Attend a{};
  a.query = q.const_data_ptr(), a.key = k.const_data_ptr(), a.value = v.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.mask = mask ? seen.const_data_ptr<bool>() : nullptr;
  a.mask_stride = mask && seen.size(0) > 1 ? seen.stride(0) : 0;
  a.type = type_of(query.scalar_type());
  a.heads = heads, a.groups = groups, a.length = length, a.width = width, a.scale = static_cast<float>(scale);
  for (int i = 0; i < 2; ++i) a.query_strides[i] = q.stride(i);
  for (int i = 0; i < 3; ++i) a.key_strides[i] = k.stride(i), a.value_strides[i] = v.stride(i);
#ifdef QAT_X86
  const auto run = vectorized() ? attend_avx512 : attend_portable;
#else
  const auto run = attend_portable;
#endif
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, length * width));
  at::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(static_cast<size_t>(length) + 16);
    run(a, begin, end, scores.data());
  });
  return out;
}

}  // namespace
}  // namespace qat

TORCH_LIBRARY_FRAGMENT(qat_plugin_native, m) {
  m.def("attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(qat_plugin_native, CPU, m) { m.impl("attend", qat::attend); }
