// activate_backward on the CPU: the gradients of activations, gated or not.
// threads  a thread per block of pieces of rows.
// order    Each element is computed in fp32 by itself.
#include "llmkern/activate_backward.h"

#include "activation.h"
#include "isa.h"
#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kPiece = 4096;              // elements; a tensor seen as one long row is shared among threads too
constexpr int64_t kElementsPerThread = 8192;  // below this, waking a thread costs more than it saves

template <Activation kActivation, class T>
void row_piece(const ActivateBackwardParams& p, int64_t r, int64_t begin, int64_t count) {
  const T* const dy = static_cast<const T*>(p.dy) + p.dy_rows.offset(r) + begin;
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(r) + begin;
  T* const dx = static_cast<T*>(p.dx) + r * p.hidden + begin;
  if (!p.up) {
    for_registers(count, [=](int64_t i, int n) {
      store_at_most(dx + i, load_at_most(dy + i, n) * activate_with_slope<kActivation>(load_at_most(x + i, n)).slope,
                    n);
    });
    return;
  }
  const T* const up = static_cast<const T*>(p.up) + p.up_rows.offset(r) + begin;
  T* const dup = static_cast<T*>(p.dup) + r * p.hidden + begin;
  for_registers(count, [=](int64_t i, int n) {
    const Activated at = activate_with_slope<kActivation>(load_at_most(x + i, n));
    const F32 d = load_at_most(dy + i, n);
    store_at_most(dx + i, d * load_at_most(up + i, n) * at.slope, n);
    store_at_most(dup + i, d * at.value, n);
  });
}

}  // namespace

void activate_backward(const ActivateBackwardParams& p, const Threads& threads) {
  const int64_t length = p.hidden < kPiece ? p.hidden : kPiece;
  const int64_t per_row = p.hidden > kPiece ? (p.hidden + kPiece - 1) / kPiece : 1;
  with_type(p.dtype, [&]<class T>() {
    with_activation(p.activation, [&]<Activation kActivation>() {
      threads.parallel_for(p.x_rows.count * per_row, kElementsPerThread / (length + 1) + 1,
                           [&](int64_t begin, int64_t end) {
                             for (int64_t i = begin; i < end; ++i) {
                               const int64_t from = i % per_row * length, left = p.hidden - from;
                               row_piece<kActivation, T>(p, i / per_row, from, left < length ? left : length);
                             }
                           });
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(activate_backward, ActivateBackwardParams)
