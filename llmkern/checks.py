"""Argument checks shared by the public functions: one line that names the argument, what was got, what is accepted.

Wrong dtypes raise `TypeError`; wrong shapes, devices and values raise `ValueError`.  Nothing here reads tensor
contents, so nothing synchronises with the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "FLOATING",
    "PLAIN_TENSORS",
    "broadcasts",
    "check_choice",
    "check_finite",
    "check_flag",
    "check_floating",
    "check_has_hidden",
    "check_is_number",
    "check_is_tensor",
    "check_non_negative",
    "check_parameter",
    "check_same_device",
    "check_same_dtype",
    "check_shape",
    "given",
    "row_count",
]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
"""The types whose meaning is in their contents alone; any other subclass may mean more, or intercept what is done."""
_NUMBERS = (int, float, np.number, torch.SymInt, torch.SymFloat)


def shape_text(shape: Sequence[int]) -> str:
    """`[2, 3]` for a shape or a list of sizes."""
    return "[" + ", ".join([str(size) for size in shape]) + "]"


def broadcasts(got: int, size: int) -> bool:
    """Return True if a dimension of `got` entries broadcasts to one of `size`."""
    # Not `got in (1, size)`: torch.compile takes that for false where `size` is dynamic.
    return got == 1 or got == size


def row_count(x: Tensor) -> int:
    """Rows of x [..., hidden].  Not by `shape.numel()`, which settles sizes that a trace leaves open."""
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Return the optional arguments that are not None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def check_is_tensor(op: str, name: str, value: object) -> None:
    """`value` is a tensor."""
    if not isinstance(value, Tensor):
        got = "None" if value is None else f"a {type(value).__name__}"
        raise TypeError(f"{op}: {name} is {got}, expected a Tensor")


def check_floating(op: str, **tensors: Tensor) -> None:
    """Each is a tensor of fp32, bf16, fp16 or fp64."""
    for name, tensor in tensors.items():
        check_is_tensor(op, name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected float32, bfloat16, float16 or float64")


def check_dtype(op: str, name: str, tensor: Tensor, *accepted: torch.dtype) -> None:
    """Raise TypeError unless `tensor` is a tensor of one of the accepted dtypes."""
    check_is_tensor(op, name, tensor)
    if tensor.dtype not in accepted:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {' or '.join([str(d) for d in accepted])}")


def check_same_device(op: str, lead_name: str, lead: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless each given tensor is on the device of `lead`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != lead.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {lead.device} (the device of {lead_name})")


def check_same_dtype(op: str, lead_name: str, lead: Tensor, **tensors: Tensor | None) -> None:
    """Each given tensor has the dtype of `lead`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != lead.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {lead.dtype} (the dtype of {lead_name})")


def check_shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[int], why: str = "") -> None:
    """The tensor, where given, has exactly this shape; `why` says where the expectation comes from."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        reason = f" ({why})" if why else ""
        raise ValueError(f"{op}: {name} has shape {shape_text(tensor.shape)}, expected {shape_text(expected)}{reason}")


def check_has_hidden(op: str, name: str, tensor: Tensor) -> None:
    """The tensor has a last dimension."""
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} has no dimensions, expected [..., hidden]")


def check_parameter(op: str, lead_name: str, lead: Tensor, **parameters: Tensor | None) -> None:
    """Each given parameter is floating, on `lead`'s device, of shape [hidden] with hidden = lead's last dimension."""
    check_has_hidden(op, lead_name, lead)
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        check_floating(op, **{name: parameter})
        check_shape(op, name, parameter, (lead.shape[-1],), f"the last dimension of {lead_name}")
        check_same_device(op, lead_name, lead, **{name: parameter})


def check_is_number(op: str, name: str, value: object) -> None:
    """`value` is a number: Python's, numpy's, or one that torch.compile traces."""
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{op}: {name} is {value!r}, expected a number")


def check_flag(op: str, **flags: object) -> None:
    """Each is True or False, and not something that is merely true or false in Python's eyes."""
    for name, value in flags.items():
        if not isinstance(value, (bool, torch.SymBool)):
            raise TypeError(f"{op}: {name} is {value!r}, expected True or False")


def check_non_negative(op: str, name: str, value: float) -> None:
    """`value` is a finite number, 0 or larger."""
    check_is_number(op, name, value)
    if not 0 <= value < math.inf:  # False for NaN; math.isfinite does not trace
        raise ValueError(f"{op}: {name} is {value}, expected a finite number that is not negative")


def check_finite(op: str, name: str, value: float) -> None:
    """`value` is a finite number."""
    check_is_number(op, name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} is {value}, expected a finite number")


def check_choice(op: str, name: str, value: object, choices: Sequence[object]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, expected {' or '.join([repr(c) for c in choices])}")
