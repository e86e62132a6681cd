// cross_entropy on the CPU.
// threads  a thread per block of rows.
// passes   Each row is read from memory once, then from the cache:
//            1. the largest score   2. Σ e^(score − largest), and what label smoothing sums   3. the gradient, which
//            may take the logits' place
// order    All arithmetic is in fp32, in an order that does not depend on the number of threads.
#include "llmkern/cross_entropy.h"

#include "isa.h"
#include "math.h"
#include "sums.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 8192;  // below this, waking a thread costs more than it saves
constexpr float kInfinity = __builtin_inff();

struct Scores {
  float label;              // the label's own
  float lse, weighted_sum;  // Σ w·s, where label smoothing needs it
};

template <bool kCapped>
inline F32 capped(F32 logit, F32 cap) {
  if constexpr (kCapped) return tanh(logit / cap) * cap;
  return logit;
}

template <class T>
void fill(T* to, int64_t count, float value) {
  for_registers(count, [=](int64_t i, int n) { store_at_most(to + i, broadcast(value), n); });
}

template <bool kCapped, class T>
Scores scores_of(const CrossEntropyParams& p, const T* logits, int64_t label, bool smooth) {
  const F32 cap = broadcast(p.softcap);
  Scores found{.label = capped<kCapped>(load_first(logits + label, 1), cap)[0], .lse = 0.0f, .weighted_sum = 0.0f};
  F32 top[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  int side = 0;
  for_registers(p.vocab, [&](int64_t i, int n) {
    const F32 logit = load_at_most(logits + i, n);
    const F32 here = n == kLanes ? logit : lane_numbers() < n ? logit : broadcast(-kInfinity);
    top[side] = here > top[side] ? here : top[side];  // a NaN is left out, and comes back in the sum
    side ^= 1;
  });
  top[0] = top[1] > top[0] ? top[1] : top[0];
  float largest = -kInfinity;
  for (int l = 0; l < kLanes; ++l) largest = top[0][l] > largest ? top[0][l] : largest;
  largest = capped<kCapped>(broadcast(largest), cap)[0];  // a cap keeps the order
  const float shift_of_row = largest == -kInfinity ? 0.0f : largest;
  const F32 shift = broadcast(shift_of_row);
  const auto power = [&](int64_t i, int n) {
    return exp_or_0(capped<kCapped>(load_at_most(logits + i, n), cap) - shift);
  };
  float total;
  if (smooth) {
    const auto sums = sums_of<2>(p.vocab, [&](int64_t i, int n) -> std::array<F32, 2> {
      const F32 score = capped<kCapped>(load_at_most(logits + i, n), cap);
      return {exp_or_0(score - shift), p.weight ? score * load_at_most(p.weight + i, n) : score};
    });
    total = sums[0], found.weighted_sum = sums[1];
  } else {
    total = sums_of<1>(p.vocab, [&](int64_t i, int n) -> std::array<F32, 1> { return {power(i, n)}; })[0];
  }
  found.lse = shift_of_row + __builtin_logf(total);
  return found;
}

template <bool kCapped, class T>
void row(const CrossEntropyParams& p, int64_t r, float weight_sum) {
  const T* const logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
  T* const dlogits = p.dlogits ? static_cast<T*>(p.dlogits) + r * p.dlogits_stride : nullptr;
  const int64_t label = p.labels[r];
  if (label == p.ignore_index || label < 0 || label >= p.vocab) {
    const float value = label == p.ignore_index ? 0.0f : __builtin_nanf("");
    if (dlogits) fill(dlogits, p.vocab, value);
    if (p.loss) p.loss[r] = value;
    if (p.lse && !p.lse_is_known) p.lse[r] = value;
    return;
  }
  const float smoothing = p.label_smoothing / static_cast<float>(p.vocab);
  const float target = (1.0f - p.label_smoothing) * (p.weight ? p.weight[label] : 1.0f);
  Scores scores;
  if (p.lse_is_known)
    scores.lse = p.lse[r];
  else
    scores = scores_of<kCapped>(p, logits, label, p.label_smoothing > 0.0f);
  if (p.lse && !p.lse_is_known) p.lse[r] = scores.lse;
  if (p.loss) {
    float loss = target * (scores.lse - scores.label) + p.z_loss * scores.lse * scores.lse;
    if (p.label_smoothing > 0.0f) loss += smoothing * (weight_sum * scores.lse - scores.weighted_sum);
    p.loss[r] = loss;
  }
  if (!dlogits) return;
  const float of_weights = target + smoothing * weight_sum + 2.0f * p.z_loss * scores.lse;
  const F32 scale = broadcast(p.scale[r]), all = broadcast(of_weights), each = broadcast(smoothing);
  const F32 cap = broadcast(p.softcap), lse = broadcast(scores.lse);
  const auto gradient = [&](F32 logit, F32 weight, F32 of_label) {
    if constexpr (kCapped) {
      const F32 t = tanh(logit / cap);
      return (all * exp_or_0(t * cap - lse) - each * weight - of_label) * (1.0f - t * t) * scale;
    }
    return (all * exp_or_0(logit - lse) - each * weight - of_label) * scale;
  };
  const F32 label_logit = broadcast(load_first(logits + label, 1)[0]);
  for_registers(p.vocab, [&](int64_t i, int n) {
    const F32 weight = p.weight ? load_at_most(p.weight + i, n) : broadcast(1.0f);
    store_at_most(dlogits + i, gradient(load_at_most(logits + i, n), weight, F32{}), n);
  });
  const F32 label_weight = broadcast(p.weight ? p.weight[label] : 1.0f);
  store_first(dlogits + label, gradient(label_logit, label_weight, broadcast(target)), 1);
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p, const Threads& threads) {
  float weight_sum = static_cast<float>(p.vocab);
  if (p.weight)
    weight_sum =
        sums_of<1>(p.vocab, [&](int64_t i, int n) -> std::array<F32, 1> { return {load_at_most(p.weight + i, n)}; })[0];
  with_type(p.dtype, [&]<class T>() {
    threads.parallel_for(p.rows, kElementsPerThread / (p.vocab + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        p.softcap > 0.0f ? row<true, T>(p, r, weight_sum) : row<false, T>(p, r, weight_sum);
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(cross_entropy, CrossEntropyParams)
