// The operators of fake quantization that PyTorch sees, and their straight-through gradients.
//
// A gradient passes where the grid did not clip. Which numbers those are is a mask of one bit each, made in the forward
// pass and kept only when something was clipped. A tracer cannot wait for that answer: under one the mask is kept always.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <tuple>

#include "dispatch.h"
#include "fake_quantize.h"

namespace qat {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Pair = std::tuple<Tensor, Tensor>;
using Optional = std::optional<Tensor>;

enum Mask : int64_t { kNone, kWhole, kWhereClipped };  // the last: empty when nothing was clipped
constexpr int64_t kLong = 1 << 16;                     // a longer group is shared among threads
constexpr int64_t kGrain = 1 << 14;                    // numbers worth a thread

const FakeQuantizeIsa& isa() {
#ifdef QAT_X86
  if (vectorized()) return fake_quantize_avx512();
#endif
  return fake_quantize_portable();
}

Tensor empty_mask(const Tensor& x, int64_t groups, int64_t group, int64_t mask) {
  return at::empty({mask == kNone ? 0 : groups, mask_bytes(group)}, x.options().dtype(at::kByte));
}

// The mask as the caller wants it.
Pair result(Tensor out, Tensor inside, int64_t mask, bool clipped) {
  if (mask == kWhereClipped && !clipped) inside = at::empty({0, inside.size(1)}, inside.options());
  return {std::move(out), std::move(inside)};
}

bool long_group(const Groups& job, int64_t g) {
  const int64_t begin = g * job.group, grain = kLong / 4;
  Step step{};
  if (job.scale) {
    step = step_of(job, g);
  } else {
    const Range all = at::parallel_reduce(
        0, job.group, grain, Range{HUGE_VALF, -HUGE_VALF},
        [&](int64_t a, int64_t b, Range) { return isa().range(job, begin + a, b - a); },
        [](Range a, Range b) {
          if (a.low != a.low || b.low != b.low) return Range{NAN, NAN};
          return Range{std::min(a.low, b.low), std::max(a.high, b.high)};
        });
    step = step_of(job.grid, all);
  }
  std::atomic<bool> clipped{false};
  const int64_t pieces = (job.group + 15) / 16;  // of whole bytes of the mask
  at::parallel_for(0, pieces, grain / 16, [&](int64_t a, int64_t b) {
    const int64_t from = a * 16, count = std::min(b * 16, job.group) - from;
    uint8_t* inside = job.inside ? job.inside + g * mask_bytes(job.group) + from / 8 : nullptr;
    if (isa().piece(job, begin + from, count, step, inside)) clipped = true;
  });
  return clipped;
}

Pair fake_quantize_weight(const Tensor& weight_, const Optional& scale_, const Optional& zero_, int64_t group, int64_t bits,
                          bool symmetric, int64_t mask) {
  const Tensor weight = weight_.contiguous();
  const int64_t count = weight.numel(), groups = group > 0 ? count / group : 0;
  TORCH_CHECK(group > 0 && groups * group == count, "qat_plugin: ", count, " weights in groups of ", group);
  TORCH_CHECK(bits >= 2 && bits <= 8, "qat_plugin: ", bits, "-bit weights");
  const Tensor scale = scale_ ? scale_->contiguous() : Tensor(), zero = zero_ ? zero_->contiguous() : Tensor();
  TORCH_CHECK(!scale_ || (scale.scalar_type() == at::kFloat && scale.numel() == groups),
              "qat_plugin: the scales of ", groups, " groups are not as many float32 numbers");
  TORCH_CHECK(!zero_ || (scale_ && zero.scalar_type() == at::kByte && zero.numel() == groups),
              "qat_plugin: the zero points of ", groups, " groups are not as many uint8 numbers beside scales");
  Tensor out = at::empty(weight.sizes(), weight.options()), inside = empty_mask(weight, groups, group, mask);
  Groups job{};
  job.x = weight.const_data_ptr();
  job.out = out.mutable_data_ptr();
  job.type = type_of(weight.scalar_type());
  job.group = group;
  const float half = static_cast<float>(1 << (bits - 1));
  job.grid = {static_cast<int32_t>(bits), symmetric, symmetric ? (bits == 8 ? -127.0f : -half) : 0.0f,
              symmetric ? half - 1 : 2 * half - 1};
  job.scale = scale_ ? scale.const_data_ptr<float>() : nullptr;
  job.zero = zero_ ? zero.const_data_ptr<uint8_t>() : nullptr;
  job.inside = mask == kNone ? nullptr : inside.mutable_data_ptr<uint8_t>();
  std::atomic<bool> clipped{false};
  if (group > kLong) {
    for (int64_t g = 0; g < groups; ++g)
      if (long_group(job, g)) clipped = true;
  } else {
    at::parallel_for(0, groups, std::max<int64_t>(1, kGrain / group), [&](int64_t a, int64_t b) {
      if (isa().groups(job, a, b)) clipped = true;
    });
  }
  return result(std::move(out), std::move(inside), mask, clipped);
}

Pair fake_quantize_activation(const Tensor& x_, const Optional& scale_, int64_t mask) {
  const Tensor x = x_.contiguous();
  TORCH_CHECK(x.dim() >= 1, "qat_plugin: an activation of no dimension");
  TORCH_CHECK(!scale_ || (scale_->scalar_type() == at::kFloat && scale_->numel() == 1),
              "qat_plugin: the activation scale is not one float32 number");
  const int64_t k = x.size(-1), count = k ? x.numel() / k : 0;
  Tensor out = at::empty(x.sizes(), x.options()), inside = empty_mask(x, count, k, mask);
  Rows job{};
  job.x = x.const_data_ptr();
  job.out = out.mutable_data_ptr();
  job.type = type_of(x.scalar_type());
  job.k = k;
  job.scale = scale_ ? scale_->const_data_ptr<float>() : nullptr;
  job.inside = mask == kNone ? nullptr : inside.mutable_data_ptr<uint8_t>();
  std::atomic<bool> clipped{false};
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k)), [&](int64_t a, int64_t b) {
    if (isa().rows(job, a, b)) clipped = true;
  });
  return result(std::move(out), std::move(inside), mask, clipped);
}

void keep_inside_(const Tensor& grad, const Tensor& inside, void* out) {
  const int64_t groups = inside.size(0), group = groups ? grad.numel() / groups : 0;
  TORCH_CHECK(groups * group == grad.numel() && (!groups || inside.size(1) == mask_bytes(group)) && inside.is_contiguous(),
              "qat_plugin: the mask ", inside.sizes(), " is not one of a gradient ", grad.sizes());
  if (!group) return;
  const void* from = grad.const_data_ptr();
  const uint8_t* bits = inside.const_data_ptr<uint8_t>();
  const Float type = type_of(grad.scalar_type());
  at::parallel_for(0, groups, std::max<int64_t>(1, kGrain / group),
                   [&](int64_t a, int64_t b) { isa().keep(from, out, type, group, bits, a, b); });
}

Tensor keep_inside(const Tensor& grad_, const Tensor& inside) {
  const Tensor grad = grad_.contiguous();
  Tensor out = at::empty(grad.sizes(), grad.options());
  keep_inside_(grad, inside, out.mutable_data_ptr());
  return out;
}

// ------------------------------------------------------------------------------------------------------ gradients

bool traced(const Tensor& x) {
  return x.key_set().has(c10::DispatchKey::Python) || c10::impl::TorchDispatchModeTLS::any_modes_set();
}

int64_t mask_for(const Tensor& x) { return traced(x) ? kWhole : kWhereClipped; }

Tensor call_keep_inside(const Tensor& grad, const Tensor& inside) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat_plugin_native::keep_inside", "")
                             .typed<Tensor(const Tensor&, const Tensor&)>();
  return op.call(grad, inside);
}

// Whether nothing else can read a tensor's memory. Transposing twice, as the gradient of a linear layer's weight is, makes
// a view that holds its base.
bool alone(const Tensor& x) {
  const bool view = x.is_view();
  return x.use_count() == 1 && x.storage().use_count() == (view ? 2 : 1) && (!view || x._base().use_count() == 1);
}

// A gradient that is ours alone is written where it lies: then only the clipped ones cost anything.
Tensor kept(const Tensor& grad, const Tensor& inside) {
  const bool ours = !at::GradMode::is_enabled() && !traced(grad) && grad.device().is_cpu() && grad.is_contiguous() && alone(grad);
  if (!ours) return call_keep_inside(grad, inside);
  keep_inside_(grad, inside, grad.mutable_data_ptr());
  return grad;
}

variable_list straight_through(AutogradContext* ctx, const variable_list& grads, size_t inputs) {
  variable_list result(inputs);
  if (!grads[0].defined()) return result;
  const variable_list saved = ctx->get_saved_variables();
  result[0] = saved.empty() ? grads[0] : kept(grads[0], saved[0]);
  return result;
}

variable_list finish(AutogradContext* ctx, Pair pair, int64_t mask) {
  auto& [out, inside] = pair;
  ctx->set_materialize_grads(false);
  ctx->mark_non_differentiable({inside});
  if (mask == kWhole || (mask == kWhereClipped && inside.numel())) ctx->save_for_backward({inside});
  return {out, inside};
}

Pair call_weight(const Tensor& weight, const Optional& scale, const Optional& zero, int64_t group, int64_t bits, bool symmetric,
                 int64_t mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("qat_plugin_native::fake_quantize_weight", "")
          .typed<Pair(const Tensor&, const Optional&, const Optional&, int64_t, int64_t, bool, int64_t)>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(weight, scale, zero, group, bits, symmetric, mask);
}

Pair call_activation(const Tensor& x, const Optional& scale, int64_t mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat_plugin_native::fake_quantize_activation", "")
                             .typed<Pair(const Tensor&, const Optional&, int64_t)>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, scale, mask);
}

struct FakeQuantizeWeight : torch::autograd::Function<FakeQuantizeWeight> {
  static variable_list forward(AutogradContext* ctx, const Tensor& weight, const Optional& scale, const Optional& zero,
                               int64_t group, int64_t bits, bool symmetric, int64_t mask) {
    return finish(ctx, call_weight(weight, scale, zero, group, bits, symmetric, mask), mask);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return straight_through(ctx, grads, 7); }
};

struct FakeQuantizeActivation : torch::autograd::Function<FakeQuantizeActivation> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Optional& scale, int64_t mask) {
    return finish(ctx, call_activation(x, scale, mask), mask);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return straight_through(ctx, grads, 3); }
};

struct KeepInside : torch::autograd::Function<KeepInside> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& inside) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({inside});
    return call_keep_inside(grad, inside);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {call_keep_inside(grads[0], ctx->get_saved_variables()[0]), Tensor()};
  }
};

bool records(const Tensor& x) { return x.requires_grad() && at::GradMode::is_enabled(); }

Pair weight_with_gradient(const Tensor& weight, const Optional& scale, const Optional& zero, int64_t group, int64_t bits,
                          bool symmetric, int64_t mask) {
  if (!records(weight)) return call_weight(weight, scale, zero, group, bits, symmetric, mask);
  const variable_list found = FakeQuantizeWeight::apply(weight, scale, zero, group, bits, symmetric, mask_for(weight));
  return {found[0], found[1]};
}

Pair activation_with_gradient(const Tensor& x, const Optional& scale, int64_t mask) {
  if (!records(x)) return call_activation(x, scale, mask);
  const variable_list found = FakeQuantizeActivation::apply(x, scale, scale ? mask_for(x) : kNone);  // absmax / 127 cannot clip
  return {found[0], found[1]};
}

Tensor keep_inside_with_gradient(const Tensor& grad, const Tensor& inside) { return KeepInside::apply(grad, inside); }

}  // namespace
}  // namespace qat

TORCH_LIBRARY_FRAGMENT(qat_plugin_native, m) {
  m.def("fake_quantize_weight(Tensor weight, Tensor? scale, Tensor? zero_point, int group, int bits, bool symmetric, int mask) -> (Tensor, Tensor)");
  m.def("fake_quantize_activation(Tensor x, Tensor? scale, int mask) -> (Tensor, Tensor)");
  m.def("keep_inside(Tensor grad, Tensor inside) -> Tensor");
}
TORCH_LIBRARY_IMPL(qat_plugin_native, CPU, m) {
  m.impl("fake_quantize_weight", qat::fake_quantize_weight);
  m.impl("fake_quantize_activation", qat::fake_quantize_activation);
  m.impl("keep_inside", qat::keep_inside);
}
TORCH_LIBRARY_IMPL(qat_plugin_native, Autograd, m) {
  m.impl("fake_quantize_weight", qat::weight_with_gradient);
  m.impl("fake_quantize_activation", qat::activation_with_gradient);
  m.impl("keep_inside", qat::keep_inside_with_gradient);
}
