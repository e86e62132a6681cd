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
using Optional = std::optional<Tensor>;

constexpr size_t kNorms = 4, kParameters = kNorms + 7 * 3;  // of a layer, in the order of decoder_layer_'s arguments

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
  const std::optional<Activation> gate = activation_of(activation);
  const std::vector<std::string> schemes = parts_of(scheme, ';');
  STD_TORCH_CHECK(schemes.size() == 1 || schemes.size() == count, kOp, ": scheme is for ", schemes.size(),
                  " layers, expected 1 or ", count);
  const Tensor rows = hidden.is_contiguous() ? hidden : torch::stable::contiguous(hidden);
  const std::vector<Optional> cached(caches.begin(), caches.end());
  const Optional none;
  std::vector<Call> calls;
  calls.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Optional* const tensor = parameters.data() + i * kParameters;
    const auto cache = [&](size_t which) -> const Optional& { return which < held ? cached[i * held + which] : none; };
    const Schemes each(kOp, schemes[schemes.size() == 1 ? 0 : i], 7);
    const auto linear = [&](const char* name, size_t which) -> Linear {
      const Optional* const part = tensor + kNorms + 3 * which;
      return {name, *part[0], part[1], part[2], each.w8a8(which)};
    };
    calls.push_back({
        .op = kOp,
        .hidden = rows,
        .cos = cos,
        .sin = sin,
        .k_cache = cache(0),
        .v_cache = cache(1),
        .k_cache_scale = cache(2),
        .v_cache_scale = cache(3),
        .past = past,
        .mask = mask,
        .input_norm = *tensor[0],
        .post_norm = *tensor[1],
        .q_norm = tensor[2],
        .k_norm = tensor[3],
        .q = linear("q", 0),
        .k = linear("k", 1),
        .v = linear("v", 2),
        .o = linear("o", 3),
        .gate = linear("gate", 4),
        .up = linear("up", 5),
        .down = linear("down", 6),
        .head_dim = head_dim,
        .eps = static_cast<float>(eps),
        .norm_offset = static_cast<float>(norm_offset),
        .interleaved = interleaved,
        .sm_scale = static_cast<float>(sm_scale),
        .window = window,
        .softcap = static_cast<float>(softcap),
        .activation = gate.value_or(Activation::none),
    });
  }
  for (const Call& call : calls) {
    STD_TORCH_CHECK(gate && kernels_take(call), kOp, ": the kernels do not take these types, or this activation");
    check(call);
  }
  Tensor out = torch::stable::new_empty(rows, rows.sizes());
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
