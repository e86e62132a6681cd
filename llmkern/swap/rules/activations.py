"""GELU in the forms that llmkern has, in modules without parameters: NewGELU's five operators become one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llmkern import ops
from llmkern.swap.derive import untouched
from llmkern.swap.guard import UNSEEN, guarded, noted
from llmkern.swap.match import PROBE_SCALE, Match, agrees, is_stateless, probe, stand_in, why_elsewhere

SWITCHES = ("mlp",)


def find(module: nn.Module) -> Match | None:
    if module._modules or module._parameters or not is_stateless(module):
        return None
    # Exact and tanh differ by 5e-4 around |x| = 2.3: several times what the probe allows.
    near = torch.linspace(-6, 6, 1025)
    shell = stand_in(module)
    seen = [(x, probe(shell, x)) for x in (near, near * PROBE_SCALE)]
    for approximate in ("none", "tanh"):
        if all(agrees(out, F.gelu(x, approximate=approximate)) for x, out in seen):
            parts = noted(shell)
            if parts is None:
                return Match("activation", "", UNSEEN)
            if reason := why_elsewhere(shell, near):
                return Match("activation", "", reason)
            cls = guarded(type(module), _forward, ("_llmkern_approximate", approximate), op="gelu", parts=parts)
            return Match("activation", "gelu", cls=cls, sample=partial(_sample, approximate))
    return None


def _sample(approximate: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {"x": torch.zeros(1, 1, 64, dtype=dtype, device=device), "approximate": approximate}


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs:
        return untouched(self, "gelu", "the activation is called with more than its input, or by keyword", args, kwargs)
    return ops.gelu(args[0], self._llmkern_approximate)
