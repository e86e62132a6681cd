// The losses of logits, and their gradients.
#include "llmkern/cross_entropy.h"

#include "../common.h"

namespace llmkern {
namespace {

using Optional = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;

struct Call {
  const char* op;
  const Tensor &logits, &labels;
  const Optional& weight;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

// Return true if the kernels take the call; raise on shapes that they do not expect.
bool served(const Call& call) {
  const Tensor &logits = call.logits, &labels = call.labels;
  const Optional& weight = call.weight;
  STD_TORCH_CHECK(
      logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0) && on_device(logits, labels), call.op,
      ": expected logits [N, V] and labels [N] on one device");
  STD_TORCH_CHECK(!weight || (weight->dim() == 1 && weight->size(0) == logits.size(1) && on_device(logits, *weight)),
                  call.op, ": weight must have one number for each of V words");
  return dtype_of(logits).has_value() && labels.scalar_type() == ScalarType::Long &&
         (!weight || weight->scalar_type() == ScalarType::Float);
}

void check_row_numbers(const char* op, const char* name, const Tensor& t, const Tensor& logits) {
  STD_TORCH_CHECK(
      t.dim() == 1 && t.size(0) == logits.size(0) && t.scalar_type() == ScalarType::Float && on_device(logits, t), op,
      ": ", name, " must be float32 of shape [N]");
}

Tensor packed(const Tensor& t) {
  return torch::stable::contiguous(t);
}

// The operands as the kernel reads them, and params without loss, lse and gradient.
struct Operands {
  Tensor logits, labels;
  Optional weight;

  explicit Operands(const Call& call)
      : logits(call.logits.stride(1) == 1 || call.logits.size(1) <= 1 ? call.logits : packed(call.logits)),
        labels(packed(call.labels)),
        weight(call.weight ? Optional(packed(*call.weight)) : std::nullopt) {}

  CrossEntropyParams params(const Call& call) const {
    return {
        .logits = logits.const_data_ptr(),
        .labels = static_cast<const int64_t*>(labels.const_data_ptr()),
        .weight = weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr,
        .scale = nullptr,
        .loss = nullptr,
        .lse = nullptr,
        .dlogits = nullptr,
        .rows = logits.size(0),
        .vocab = logits.size(1),
        .logits_stride = logits.stride(0),
        .dlogits_stride = logits.size(1),
        .ignore_index = call.ignore_index,
        .dtype = *dtype_of(logits),
        .label_smoothing = static_cast<float>(call.label_smoothing),
        .z_loss = static_cast<float>(call.z_loss),
        .softcap = static_cast<float>(call.softcap),
        .lse_is_known = false,
    };
  }
};

Two cross_entropy(const Tensor& logits, const Tensor& labels, const Optional& weight, int64_t ignore_index,
                  double label_smoothing, double z_loss, double softcap, std::string reduction) {
  const Call call{"cross_entropy", logits, labels, weight, ignore_index, label_smoothing, z_loss, softcap};
  if (!served(call))
    return call_reference<Two>(call.op, logits, labels, weight, ignore_index, label_smoothing, z_loss, softcap,
                               reduction);
  const Operands operands(call);
  Tensor loss = new_tensor(logits, {logits.size(0)}, ScalarType::Float);
  Tensor lse = new_tensor(logits, {logits.size(0)}, ScalarType::Float);
  CrossEntropyParams p = operands.params(call);
  p.loss = static_cast<float*>(loss.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  launch_cross_entropy(p, Place(logits));
  return {reduction == "sum" ? torch::stable::sum(loss) : loss, lse};
}

Tensor cross_entropy_backward(const Tensor& logits, const Tensor& dloss, const Tensor& labels, const Optional& weight,
                              const Tensor& lse, int64_t ignore_index, double label_smoothing, double z_loss,
                              double softcap) {
  const Call call{"cross_entropy_backward", logits, labels, weight, ignore_index, label_smoothing, z_loss, softcap};
  if (!served(call))
    return call_reference<Tensor>(call.op, logits, dloss, labels, weight, lse, ignore_index, label_smoothing, z_loss,
                                  softcap);
  check_row_numbers(call.op, "dloss", dloss, logits);
  check_row_numbers(call.op, "lse", lse, logits);
  const Operands operands(call);
  const Tensor scale = packed(dloss), sums = packed(lse);
  Tensor dlogits = new_tensor(logits, logits.sizes(), logits.scalar_type());
  CrossEntropyParams p = operands.params(call);
  p.scale = static_cast<const float*>(scale.const_data_ptr());
  p.lse = const_cast<float*>(static_cast<const float*>(sums.const_data_ptr()));  // it is only read
  p.lse_is_known = true;
  p.dlogits = dlogits.mutable_data_ptr();
  launch_cross_entropy(p, Place(logits));
  return dlogits;
}

Tensor cross_entropy_in_place_backward(Tensor logits, const Tensor& labels, const Optional& weight, const Tensor& scale,
                                       int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  const Call call{
      "cross_entropy_in_place_backward", logits, labels, weight, ignore_index, label_smoothing, z_loss, softcap};
  if (!served(call) || (logits.stride(1) != 1 && logits.size(1) > 1))
    return call_reference<Tensor>(call.op, logits, labels, weight, scale, ignore_index, label_smoothing, z_loss,
                                  softcap);
  check_row_numbers(call.op, "scale", scale, logits);
  const Operands operands(call);
  const Tensor factors = packed(scale);
  Tensor loss = new_tensor(logits, {logits.size(0)}, ScalarType::Float);
  CrossEntropyParams p = operands.params(call);
  p.scale = static_cast<const float*>(factors.const_data_ptr());
  p.loss = static_cast<float*>(loss.mutable_data_ptr());
  p.dlogits = logits.mutable_data_ptr();
  p.dlogits_stride = p.logits_stride;
  launch_cross_entropy(p, Place(logits));
  return loss;
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("cross_entropy", TORCH_BOX(&llmkern::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&llmkern::cross_entropy_backward));
  m.impl("cross_entropy_in_place_backward", TORCH_BOX(&llmkern::cross_entropy_in_place_backward));
}
