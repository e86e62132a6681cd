// Torch's thread pool for launchers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "llmkern/threads.h"

namespace llmkern {

inline constexpr Threads kTorchThreads{
    [](int64_t begin, int64_t end, int64_t grain, Threads::Body body, void* context) {
      TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
    }};

}  // namespace llmkern
