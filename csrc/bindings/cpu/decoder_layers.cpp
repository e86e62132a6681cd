// decoder_layers_: a model's decoder layers one after the other, with the bits of as many calls of decoder_layer_.
//
// At batch 1 the arguments of thirty layers take a third of a millisecond from Python to here, as each of their tensors
// has left the caches while the weights of the others passed through.  So they come once, to decoder_plan, and a tensor
// of one byte stands for them from then on.  A plan keeps the tensors themselves: whatever is written to them counts.
#include <mutex>
#include <unordered_set>

#include "decoder_layer.h"

namespace llmkern {
namespace {

using decoder::Call;
using decoder::kCaches;
using decoder::kLinears;
using decoder::kNorms;
using decoder::kParameters;
using decoder::Shared;
using Optional = std::optional<Tensor>;

struct Plan {
  std::vector<Optional> parameters;
};

// Plans by address: no other tensor is taken for one.
class Plans {
 public:
  Tensor add(std::vector<Optional> parameters) {
    auto* plan = new Plan{std::move(parameters)};
    {
      const std::lock_guard lock(mutex_);
      plans_.insert(plan);
    }
    constexpr int64_t one = 1;
    return torch::stable::from_blob(plan, {&one, 1}, {&one, 1},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
                                    [](void* data) { instance().remove(static_cast<Plan*>(data)); });
  }

  const Plan* find(const Tensor& tensor) {
    const auto* plan = static_cast<const Plan*>(tensor.const_data_ptr());
    const std::lock_guard lock(mutex_);
    return plans_.contains(plan) ? plan : nullptr;
  }

  static Plans& instance() {
    static Plans& plans = *new Plans;  // tensors may outlive static objects
    return plans;
  }

 private:
  void remove(Plan* plan) {
    {
      const std::lock_guard lock(mutex_);
      plans_.erase(plan);
    }
    delete plan;
  }

  std::mutex mutex_;
  std::unordered_set<const Plan*> plans_;
};

Tensor decoder_plan(std::vector<Optional> parameters) {
  constexpr const char* kOp = "decoder_plan";
  STD_TORCH_CHECK(!parameters.empty() && parameters.size() % kParameters == 0, kOp, ": parameters has ",
                  parameters.size(), " elements, expected ", kParameters, " for each layer");
  for (size_t i = 0; i < parameters.size(); ++i) {
    const size_t which = i % kParameters;
    const bool norm = which < 2, weight = which >= kNorms && (which - kNorms) % 3 == 0;
    STD_TORCH_CHECK(parameters[i] || !(norm || weight), kOp, ": layer ", i / kParameters,
                    " lacks its parameter number ", which);
  }
  return Plans::instance().add(std::move(parameters));
}

Tensor decoder_layers_(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& caches,
                       int64_t past, const Optional& mask, const Tensor& plan, int64_t head_dim, double eps,
                       double norm_offset, bool interleaved, double sm_scale, int64_t window, double softcap,
                       const std::string& activation, const std::string& scheme) {
  constexpr const char* kOp = "decoder_layers_";
  const Plan* const planned = Plans::instance().find(plan);
  STD_TORCH_CHECK(planned, kOp, ": plan is not one that decoder_plan has made");
  const std::vector<Optional>& parameters = planned->parameters;
  const size_t count = parameters.size() / kParameters, held = caches.size() / count;
  STD_TORCH_CHECK(caches.size() == count * held && (held == 0 || held == 2 || held == 4), kOp, ": caches has ",
                  caches.size(), " elements, expected 0, 2 or 4 for each of ", count, " layers");
  const std::vector<std::string> schemes = parts_of(scheme, ';');
  STD_TORCH_CHECK(schemes.size() == 1 || schemes.size() == count, kOp, ": scheme is for ", schemes.size(),
                  " layers, expected 1 or ", count);
  const Shared shared(kOp, hidden, cos, sin, past, mask, head_dim, eps, norm_offset, interleaved, sm_scale, window,
                      softcap, activation);
  std::vector<std::array<Optional, kCaches>> cached(count);
  for (size_t i = 0; i < caches.size(); ++i) cached[i / held][i % held] = caches[i];
  std::vector<Call> calls;
  calls.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const std::span<const Optional, kParameters> of_layer(parameters.data() + i * kParameters, kParameters);
    calls.emplace_back(shared, cached[i], of_layer, Schemes(kOp, schemes[schemes.size() == 1 ? 0 : i], kLinears));
  }
  for (const Call& call : calls) {
    STD_TORCH_CHECK(kernels_take(call), kOp, ": the kernels do not take these types, or this activation");
    check(call);
  }
  Tensor out = torch::stable::new_empty(shared.hidden, shared.hidden.sizes());
  decoder::run(calls, out);
  return out;
}

}  // namespace
}  // namespace llmkern

// parameters: of each layer those of decoder_layer_ from input_norm to down_bias.  caches: none, or of each layer keys
// and values, or these and their scales.  scheme: that of a layer, for all of them, or for each with semicolons.
STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def("decoder_plan(Tensor?[] parameters) -> Tensor");
  m.def(
      "decoder_layers_(Tensor hidden, Tensor cos, Tensor sin, Tensor(a!)[] caches, int past, Tensor? mask, Tensor plan,"
      " int head_dim, float eps, float norm_offset, bool interleaved, float sm_scale, int window, float softcap,"
      " str activation, str scheme) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CPU, m) {
  m.impl("decoder_plan", TORCH_BOX(&llmkern::decoder_plan));
  m.impl("decoder_layers_", TORCH_BOX(&llmkern::decoder_layers_));
}
