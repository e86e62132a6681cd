"""Source files of the native library's kernels: for each backend and op the one under csrc/ to read first."""

from __future__ import annotations

__all__ = ["kernel_file"]

_NORMS = ("rms_norm", "layer_norm")
_STEMS = {
    **{f"{add}{norm}{quant}": "norm" for add in ("", "add_") for norm in _NORMS for quant in ("", "_quant")},
    **{f"{norm}_backward": "norm_backward" for norm in _NORMS},
    **dict.fromkeys(("gelu", "swiglu", "swiglu_quant"), "activate"),
    **dict.fromkeys(("gelu_backward", "swiglu_backward"), "activate_backward"),
    **dict.fromkeys(("cross_entropy_backward", "cross_entropy_in_place_backward"), "cross_entropy"),
    **dict.fromkeys(("linear_cross_entropy", "linear_cross_entropy_backward"), "cross_entropy"),
    "linear_kl_div": "linear_jsd",
    "int8_linear": "int8_matmul",  # behind quantize_int8
    "layers_": "layers/run",
}
# On the CPU products have a folder of their own, and one kernel for all weights that are not packed in blocks.
_PRODUCTS = {
    **{op: f"products/{op}" for op in ("attention", "attention_decode", "attention_varlen", "linear")},
    **dict.fromkeys(("int8_linear", "int8_matmul"), "products/linear"),
    "quantized_linear": "products/packed_linear",
}
IN_PYTHON = frozenset({("linear_jsd", "cpu"), ("linear_kl_div", "cpu")})
"""Ops and backends whose kernel is PyTorch's operators on chunks, in the backend's own file."""
_SUFFIXES = {"cpu": ".cpp", "cuda": ".cu"}


def kernel_file(op: str, backend: str) -> str:
    """The file of the kernel, seen from the root of the repository; backend is "cpu" or "cuda"."""
    stem = (_PRODUCTS if backend == "cpu" else {}).get(op) or _STEMS.get(op, op)
    if (op, backend) in IN_PYTHON:
        return f"llmkern/backends/{backend}/{stem}.py"
    return f"csrc/{backend}/{stem}{_SUFFIXES[backend]}"
