// activate on the CPU: all activations of activation.h, gated or not, quantized to int8 or not.
// threads  a thread per block of pieces of rows; quantized rows are not cut.
// order    Each element is computed in fp32 by itself.
#include "llmkern/activate.h"

#include "activation.h"
#include "int8.h"
#include "isa.h"
#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kPiece = 4096;              // elements; a tensor seen as one long row is shared among threads too
constexpr int64_t kElementsPerThread = 8192;  // below this, waking a thread costs more than it saves

template <Activation kActivation, class T>
void row_piece(const ActivateParams& p, int64_t r, int64_t begin, int64_t count) {
  const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(r) + begin;
  const T* up = p.up ? static_cast<const T*>(p.up) + p.up_rows.offset(r) + begin : nullptr;
  const auto value = [=](int64_t i, int n) {
    const F32 y = activate<kActivation>(load_at_most(x + i, n));
    return up ? y * load_at_most(up + i, n) : y;
  };
  if (p.scale) {
    p.scale[r] = quantize_computed(value, count, p.codes + r * p.hidden);
    return;
  }
  T* out = static_cast<T*>(p.out) + p.out_rows.offset(r) + begin;
  for_registers(count, [=](int64_t i, int n) { store_at_most(out + i, value(i, n), n); });
}

}  // namespace

void activate(const ActivateParams& p, const Threads& threads) {
  const bool whole = p.scale || p.hidden <= kPiece;
  const int64_t length = whole ? p.hidden : kPiece, per_row = whole ? 1 : (p.hidden + kPiece - 1) / kPiece;
  with_type(p.dtype, [&]<class T>() {
    with_any_activation(p.activation, [&]<Activation kActivation>() {
      const auto pieces = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t from = i % per_row * length;
          const int64_t left = p.hidden - from;
          row_piece<kActivation, T>(p, i / per_row, from, left < length ? left : length);
        }
      };
      threads.parallel_for(p.x_rows.count * per_row, kElementsPerThread / (length + 1) + 1, pieces);
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(activate, ActivateParams)
