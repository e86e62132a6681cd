// rope on the CPU: out[d] = x[d] · cos[d] + x[pair(d)] · (± sin[d]) in fp32.
// threads  a thread per block of positions, of all heads of q and k: they share its angles, which are widened to fp32
//          once, one for each dimension, with the sign that they are added with.
// pairs    half: two registers, half a head apart.  Interleaved: the neighbours in one register.
#include "llmkern/rope.h"

#include "isa.h"
#include "vec.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kElementsPerThread = 8192;  // below this, waking a thread costs more than it saves

struct Angles {
  alignas(64) float cos[kRopeMostDims];
  alignas(64) float sin[kRopeMostDims];
};

void widen(const RopeParams& p, const RopeAngles& from, int64_t b, int64_t t, float* to) {
  with_type(p.angles_dtype, [&]<class A>() {
    const A* values = static_cast<const A*>(from.values) + b * from.batch_stride + t * from.position_stride;
    for_registers(p.width, [=](int64_t i, int n) { store_at_most(to + i, load_at_most(values + i, n), n); });
  });
  if (p.width == p.rotary_dim) return;
  if (p.interleaved)  // from the last on, which is not read again
    for (int64_t i = p.width - 1; i >= 0; --i) to[2 * i] = to[2 * i + 1] = to[i];
  else
    std::memcpy(to + p.width, to, p.width * sizeof(float));
}

void prepare(const RopeParams& p, int64_t b, int64_t t, Angles& angles) {
  widen(p, p.cos, b, t, angles.cos);
  widen(p, p.sin, b, t, angles.sin);
  if (p.interleaved)
    for (int64_t i = 0; i < p.rotary_dim; i += 2) angles.sin[i] = -angles.sin[i];
  else
    for (int64_t i = 0; i < p.rotary_dim / 2; ++i) angles.sin[i] = -angles.sin[i];
}

inline F32 swap_neighbours(F32 v) {
#if LLMKERN_ISA_LEVEL == 2
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif LLMKERN_ISA_LEVEL == 1
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}

template <bool kInterleaved, class T>
void head(const RopeParams& p, const Angles& angles, const T* x, T* out) {
  if constexpr (kInterleaved) {
    for_registers(p.rotary_dim, [&](int64_t i, int n) {
      const F32 v = load_at_most(x + i, n);
      store_at_most(out + i, v * load(angles.cos + i) + swap_neighbours(v) * load(angles.sin + i), n);
    });
  } else {
    const int64_t half = p.rotary_dim / 2;
    const float *cos_b = angles.cos + half, *sin_b = angles.sin + half;
    for_registers(half, [&](int64_t i, int n) {
      const F32 a = load_at_most(x + i, n), b = load_at_most(x + half + i, n);
      store_at_most(out + i, a * load_at_most(angles.cos + i, n) + b * load_at_most(angles.sin + i, n), n);
      store_at_most(out + half + i, b * load_at_most(cos_b + i, n) + a * load_at_most(sin_b + i, n), n);
    });
  }
  if (x != out) std::memcpy(out + p.rotary_dim, x + p.rotary_dim, (p.dim - p.rotary_dim) * sizeof(T));
}

template <bool kInterleaved, class T>
void positions(const RopeParams& p, int64_t begin, int64_t end) {
  Angles angles;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / p.length, t = i % p.length;
    prepare(p, b, t, angles);
    const RopeHeads* const both[] = {&p.q, &p.k};
    for (const RopeHeads* heads : both)
      for (int64_t h = 0; h < heads->heads; ++h)
        head<kInterleaved>(p, angles, static_cast<const T*>(heads->x) + heads->x_strides.offset(b, h, t),
                           static_cast<T*>(heads->out) + heads->out_strides.offset(b, h, t));
  }
}

}  // namespace

void rope(const RopeParams& p, const Threads& threads) {
  const int64_t grain = kElementsPerThread / ((p.q.heads + p.k.heads) * p.dim + 1) + 1;
  with_type(p.dtype, [&]<class T>() {
    threads.parallel_for(p.batch * p.length, grain, [&](int64_t begin, int64_t end) {
      p.interleaved ? positions<true, T>(p, begin, end) : positions<false, T>(p, begin, end);
    });
  });
}

}  // namespace llmkern::LLMKERN_ISA

LLMKERN_CPU_LAUNCHER(rope, RopeParams)
