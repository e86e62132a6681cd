// Threads: how a CPU launcher spreads its work without knowing whose threads they are.  The binding passes torch's
// pool, so torch.set_num_threads counts.
#pragma once

#include <cstdint>

namespace llmkern {

struct Threads {
  using Body = void (*)(int64_t begin, int64_t end, void* context);

  // Call body over disjoint ranges that cover [begin, end); fewer than about `grain` are not worth another thread.
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

  // f(begin, end) over [0, n).  A lambda's instantiation is local to its object file, as code for one ISA must be.
  template <class F>
  void parallel_for(int64_t n, int64_t grain, const F& f) const {
    const Body body = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
    run(0, n, grain, body, const_cast<F*>(&f));
  }
};

}  // namespace llmkern
