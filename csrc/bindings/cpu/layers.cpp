// layers_: layers of a model, each a program, in one call.
//
// At batch 1 the arguments of thirty layers take a third of a millisecond from Python to here, as each of their tensors
// has left the caches while the weights of the others passed through.  So they may come once, to layers_plan, and a
// tensor of one byte stands for them from then on.  A plan keeps the tensors themselves: whatever is written to them
// counts.
#include "llmkern/layers.h"

#include <mutex>
#include <unordered_map>

#include "../common.h"
#include "packed.h"
#include "threads.h"

namespace llmkern {
namespace {

using layers::Array;
using Optional = std::optional<Tensor>;
using Programs = std::vector<std::shared_ptr<const layers::Program>>;

constexpr const char* kOp = "layers_";

layers::Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return layers::Element::f32;
    case ScalarType::BFloat16:
      return layers::Element::bf16;
    case ScalarType::Half:
      return layers::Element::f16;
    case ScalarType::Char:
      return layers::Element::s8;
    case ScalarType::Byte:
      return layers::Element::u8;
    case ScalarType::Bool:
      return layers::Element::boolean;
    default:
      return layers::Element::other;
  }
}

// Objects that tensors of one byte stand for, by address: no other tensor is taken for one.
template <class T>
class Behind {
 public:
  Tensor add(std::shared_ptr<const T> object) {
    void* const address = const_cast<T*>(object.get());
    {
      const std::lock_guard lock(mutex_);
      objects_[address] = std::move(object);
    }
    constexpr int64_t one = 1;
    return torch::stable::from_blob(address, {&one, 1}, {&one, 1},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
                                    [](void* data) { instance().remove(data); });
  }

  std::shared_ptr<const T> find(const Tensor& t) {
    if (t.scalar_type() != ScalarType::Byte) return nullptr;
    const std::lock_guard lock(mutex_);
    const auto found = objects_.find(const_cast<void*>(t.const_data_ptr()));
    return found == objects_.end() ? nullptr : found->second;
  }

  static Behind& instance() {
    static Behind& all = *new Behind;  // tensors may outlive static objects
    return all;
  }

 private:
  void remove(void* address) {
    std::shared_ptr<const T> last;  // whose tensors may be freed here, which is not to happen under the lock
    const std::lock_guard lock(mutex_);
    if (const auto found = objects_.find(address); found != objects_.end()) {
      last = std::move(found->second);
      objects_.erase(found);
    }
  }

  std::mutex mutex_;
  std::unordered_map<void*, std::shared_ptr<const T>> objects_;
};

// A packed weight and its tensors.
struct Packed {
  Tensor codes, scale;
  Optional zero, offset, super_scale, super_offset;
  std::string code;
  int64_t n, k;
  PackedWeight weight;
};

Tensor layers_packed(Tensor codes, Tensor scale, Optional zero, Optional offset, Optional super_scale,
                     Optional super_offset, std::string code, int64_t n) {
  const PackedTensors tensors{codes, scale, zero, offset, super_scale, super_offset, code, n};
  STD_TORCH_CHECK(kernels_take(tensors), "layers_packed: the kernels have no such types");
  const PackedWeight weight = packed_weight("layers_packed", tensors);
  const int64_t k = tensors.k();
  return Behind<Packed>::instance().add(
      std::make_shared<const Packed>(codes, scale, zero, offset, super_scale, super_offset, code, n, k, weight));
}

Array array_of(const Tensor& t) {
  Array a{.data = const_cast<void*>(t.const_data_ptr()), .type = element_of(t.scalar_type()), .on_cpu = t.is_cpu()};
  const auto sizes = t.sizes(), strides = t.strides();
  a.dims = static_cast<int>(sizes.size());
  for (int d = 0; d < a.dims && d < Array::kMostDims; ++d) a.size[d] = sizes[d], a.stride[d] = strides[d];
  if (const auto packed = Behind<Packed>::instance().find(t)) {  // which the tensor keeps
    a.packed = &packed->weight;
    a.dims = 2, a.size[0] = packed->n, a.size[1] = packed->k, a.stride[0] = packed->k, a.stride[1] = 1;
  }
  return a;
}

std::vector<Array> arrays_of(const std::vector<Optional>& tensors) {
  std::vector<Array> arrays;
  arrays.reserve(tensors.size());
  for (const Optional& t : tensors) arrays.push_back(t ? array_of(*t) : Array{});
  return arrays;
}

// One program for all layers, or one for each: of these, as many as the parameters are for.
Programs programs_of(const std::vector<std::string>& texts, size_t parameters) {
  STD_TORCH_CHECK(!texts.empty(), kOp, ": programs has 0 elements, expected one, or one for each layer");
  Programs programs;
  for (const std::string& text : texts) programs.push_back(layers::parsed(text));
  if (programs.size() != 1) return programs;
  const size_t each = layers::tensors_of(*programs[0]), count = each ? parameters / each : 1;
  STD_TORCH_CHECK(each == 0 ? parameters == 0 : parameters > 0 && parameters % each == 0, kOp, ": parameters has ",
                  parameters, " elements, expected ", each, " for each layer");
  programs.resize(count, programs[0]);
  return programs;
}

// kCaches of each layer: none where there are no caches, or its program neither appends nor keeps.
std::vector<Array> caches_of(const std::vector<Tensor>& caches, const Programs& programs) {
  if (caches.empty()) return {};
  size_t appending = 0, kept = 0;
  for (const auto& program : programs) appending += appends(*program), kept += keeps(*program) ? 2 : 0;
  const size_t appended = caches.size() < kept ? 0 : caches.size() - kept, each = appending ? appended / appending : 0;
  const bool fit = appending ? each == 2 || each == 4 : kept > 0;
  STD_TORCH_CHECK(fit && caches.size() == each * appending + kept, kOp, ": caches has ", caches.size(),
                  " elements, expected none, or 2 or 4 for each of ", appending,
                  " layers that append, and 2 for each of ", kept / 2, " that keep");
  std::vector<Array> found(programs.size() * layers::kCaches);
  auto next = caches.begin();
  for (size_t i = 0; i < programs.size(); ++i) {
    Array* const of_layer = &found[i * layers::kCaches];
    for (size_t j = 0; appends(*programs[i]) && j < each; ++j) of_layer[j] = array_of(*next++);
    for (size_t j = 0; keeps(*programs[i]) && j < 2; ++j) of_layer[layers::kKeptCache + j] = array_of(*next++);
  }
  return found;
}

struct Plan {
  std::vector<std::string> texts;
  std::vector<Optional> parameters;
  Programs programs;
};

Tensor layers_plan(std::vector<std::string> texts, std::vector<Optional> parameters) {
  Programs programs = programs_of(texts, parameters.size());
  return Behind<Plan>::instance().add(
      std::make_shared<const Plan>(std::move(texts), std::move(parameters), std::move(programs)));
}

std::shared_ptr<const Plan> plan_of(const std::vector<Optional>& parameters) {
  return parameters.size() == 1 && parameters[0] ? Behind<Plan>::instance().find(*parameters[0]) : nullptr;
}

// torch's operator, whose results are kept until the layer is done.
struct Torch {
  const Tensor& like;
  std::vector<Tensor> results;

  static void* multiply(void* context, const layers::Product& p) {
    auto& self = *static_cast<Torch*>(context);
    const auto wrapped = [&](const void* data, int64_t rows, int64_t columns, int64_t stride, int64_t column_stride) {
      return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {stride, column_stride},
                                      self.like.device(), self.like.scalar_type());
    };
    Optional bias;
    if (p.bias)
      bias =
          torch::stable::from_blob(const_cast<void*>(p.bias), {p.n}, {1}, self.like.device(), self.like.scalar_type());
    std::array<StableIValue, 3> stack{
        torch::stable::detail::from(wrapped(p.x, p.rows, p.k, p.x_stride, 1)),
        torch::stable::detail::from(wrapped(p.weight, p.n, p.k, p.w_stride, p.w_column_stride)),
        torch::stable::detail::from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    self.results.push_back(torch::stable::detail::to<Tensor>(stack[0]));
    return self.results.back().mutable_data_ptr();
  }

  static void release(void* context) { static_cast<Torch*>(context)->results.clear(); }
};

Tensor layers_(const Tensor& hidden, const std::vector<std::string>& programs, const std::vector<Optional>& parameters,
               const std::vector<Optional>& inputs, const std::vector<Tensor>& caches, int64_t past,
               const std::string& schemes) {
  const std::shared_ptr<const Plan> plan = plan_of(parameters);
  STD_TORCH_CHECK(!plan || programs.empty() || programs == plan->texts, kOp,
                  ": programs are other ones than those of the plan");
  STD_TORCH_CHECK(hidden.dim() == 3 && hidden.is_cpu(), kOp, ": hidden must have shape [B, S, H], on the CPU");
  const Tensor rows = hidden.is_contiguous() ? hidden : torch::stable::contiguous(hidden);
  const Programs& parsed = plan ? plan->programs : programs_of(programs, parameters.size());
  try {
    if (!dtype_of(hidden)) throw layers::NotServed("layers_: hidden is not fp32, bf16 or fp16");
    const std::vector<Array> tensors = arrays_of(plan ? plan->parameters : parameters);
    const std::vector<Array> given = arrays_of(inputs), cached = caches_of(caches, parsed);
    Tensor out = torch::stable::new_empty(rows, rows.sizes());
    Torch torch{rows, {}};
    const layers::Call call{
        .hidden = array_of(rows),
        .out = out.mutable_data_ptr(),
        .programs = parsed,
        .parameters = tensors,
        .inputs = given,
        .caches = cached,
        .past = past,
        .schemes = schemes,
        .library = {Torch::multiply, Torch::release, &torch},
    };
    layers::run(call, {kTorchThreads, static_cast<int64_t>(torch::stable::get_num_threads())});
    return out;
  } catch (const layers::NotServed&) {
    return call_reference<Tensor>(kOp, hidden, plan ? plan->texts : programs, plan ? plan->parameters : parameters,
                                  inputs, caches, past, schemes);
  }
}

}  // namespace
}  // namespace llmkern

#ifndef LLMKERN_NAMESPACE
#define LLMKERN_NAMESPACE llmkern
#endif
#define LLMKERN_FRAGMENT(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
#define LLMKERN_COMPOSITES(ns, m) STABLE_TORCH_LIBRARY_IMPL(ns, CompositeExplicitAutograd, m)

LLMKERN_FRAGMENT(LLMKERN_NAMESPACE, m) {
  m.def("layers_plan(str[] programs, Tensor?[] parameters) -> Tensor");
  m.def(
      "layers_packed(Tensor codes, Tensor scale, Tensor? zero, Tensor? offset, Tensor? super_scale, Tensor? "
      "super_offset,"
      " str code, int n) -> Tensor");
}

LLMKERN_COMPOSITES(LLMKERN_NAMESPACE, m) {
  m.impl("layers_plan", TORCH_BOX(&llmkern::layers_plan));
  m.impl("layers_packed", TORCH_BOX(&llmkern::layers_packed));
}

LLMKERN_BINDINGS(m) {
  m.impl("layers_", TORCH_BOX(&llmkern::layers_));
}
