from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.triton._configs import config
from llmkern.backends.triton._declare import DTYPES, serves
from llmkern.backends.triton._launch import Kernel, as_rows, launch, target_of

INT8_MATMUL_KERNEL = Kernel("int8_matmul", "int8_matmul_kernel")


def refuse_parameters(**floating: Tensor | None) -> str | None:
    """Return the sentence for fp64 operands of the epilogue, which is computed in fp32; or None."""
    for name, tensor in floating.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; float32, bfloat16 and float16 are taken"
    return None


def _refuse(bias: Tensor | None, residual: Tensor | None, **_: object) -> str | None:
    return refuse_parameters(bias=bias, residual=residual)


def shape_class(a: Tensor, rows: int) -> str:
    """The class of configurations for `rows` rows of `a`: rows decide how w, the larger operand, is reused."""
    kind = {torch.int8: "s8", torch.float32: "fp32"}.get(a.dtype, "half")
    size = "16" if rows <= 16 else "64" if rows <= 64 else "many"
    return f"{kind}-{size}"


@serves("int8_matmul", dtypes=(torch.int8,), refuse=_refuse)
def int8_matmul(
    a_q: Tensor,
    w_q: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """a_q may also be floating: then w_q is converted to its dtype, tile by tile."""
    n, k = w_q.shape
    out = a_q.new_empty((*a_q.shape[:-1], n), dtype=out_dtype)
    elements = out.numel()
    if elements == 0:
        return out
    rows = elements // n
    a, stride = as_rows(a_q)
    residuals, residual_stride = as_rows(residual) if residual is not None else (None, 0)
    chosen = config("int8_matmul", shape_class(a, rows), target_of(a))
    launch(
        INT8_MATMUL_KERNEL,
        (-(-rows // chosen["BLOCK_M"]) * -(-n // chosen["BLOCK_N"]), 1, 1),
        a,
        w_q,
        a_scale if a_scale is None else a_scale.contiguous(),
        w_scale if w_scale is None else w_scale.contiguous(),
        bias if bias is None else bias.contiguous(),
        residuals,
        out,
        rows,
        n,
        k,
        stride,
        *w_q.stride(),
        residual_stride,
        ACTIVATION=activation,
        **chosen,
    )
    return out
