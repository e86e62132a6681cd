from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmkern.bench.ops._linear import linear_sweeps
from llmkern.bench.sweep import Work, tensor_bytes

SWEEPS = linear_sweeps()


def work(call: Mapping[str, Any], out: Tensor) -> Work:
    (m, k), n = call["a_q"].shape, call["w_q"].shape[0]
    return Work(tensor_bytes([*call.values(), out]), 2 * m * n * k, "int8")
