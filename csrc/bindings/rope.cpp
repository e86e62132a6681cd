#include "llmkern/rope.h"

#include "common.h"

namespace llmkern {
namespace {

using Two = std::tuple<Tensor, Tensor>;

Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

HeadStrides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2)};
}

RopeHeads heads(const Tensor& x, Tensor& out) {
  return {x.const_data_ptr(), out.mutable_data_ptr(), x.size(1), strides_of(x), strides_of(out)};
}

RopeAngles angles(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1)};
}

Two rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, int64_t rotary_dim, bool interleaved) {
  if (!kernel_types(q, std::optional(k), std::optional(cos), std::optional(sin)) || rotary_dim > kRopeMostDims)
    return call_reference<Two>("rope", q, k, cos, sin, rotary_dim, interleaved);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && cos.dim() == 3 && sin.dim() == 3,
                  "rope: expected q [B, Hq, S, D], k [B, Hkv, S, D], cos and sin [B or 1, S, W]");
  STD_TORCH_CHECK(
      k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3) && dtype_of(k) == dtype_of(q),
      "rope: k must have q's batch, length, head dimension and dtype");
  STD_TORCH_CHECK((cos.size(0) == 1 || cos.size(0) == q.size(0)) && cos.size(1) == q.size(2) && same_shape(cos, sin) &&
                      dtype_of(cos) == dtype_of(sin),
                  "rope: cos and sin must be [B or 1, S, W], of one dtype");
  const int64_t width = cos.size(2);
  STD_TORCH_CHECK((rotary_dim == width || rotary_dim == 2 * width) && rotary_dim % 2 == 0 && rotary_dim <= q.size(3),
                  "rope: rotary_dim is ", rotary_dim, ", expected ", width, " or ", 2 * width, ", even, at most ",
                  q.size(3));
  STD_TORCH_CHECK(on_device(q, k) && on_device(q, cos) && on_device(q, sin),
                  "rope: k, cos and sin must be on q's device");
  const Tensor queries = with_contiguous_rows(q), keys = with_contiguous_rows(k);
  const Tensor cosines = with_contiguous_rows(cos), sines = with_contiguous_rows(sin);
  Tensor q_out = new_tensor(q, q.sizes(), q.scalar_type()), k_out = new_tensor(k, k.sizes(), k.scalar_type());
  launch_rope(
      {
          .q = heads(queries, q_out),
          .k = heads(keys, k_out),
          .cos = angles(cosines),
          .sin = angles(sines),
          .batch = q.size(0),
          .length = q.size(2),
          .dim = q.size(3),
          .rotary_dim = rotary_dim,
          .width = width,
          .dtype = *dtype_of(q),
          .angles_dtype = *dtype_of(cos),
          .interleaved = interleaved,
      },
      Place(q));
  return {q_out, k_out};
}

}  // namespace
}  // namespace llmkern

LLMKERN_BINDINGS(m) {
  m.impl("rope", TORCH_BOX(&llmkern::rope));
}
