"""The loss of a causal language model whose logits are its output head's: computed without them where it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern.ops._linear_loss import LinearCrossEntropy
from llmkern.swap.derive import wrapped_functions
from llmkern.swap.edit import Edit
from llmkern.swap.loss import CHANGED, ChangedLogits, on_shell, why_not, wrap
from llmkern.swap.match import Match

SWITCHES = ("loss",)
_OP = "linear_cross_entropy"
_EDIT = Edit(op=_OP, wrap=wrap)


def find(module: nn.Module) -> Match | None:
    cls: Any = type(module)
    names = {name for function in wrapped_functions(cls.forward) for name in function.__code__.co_names}
    if "loss_function" not in names or not hasattr(cls, "get_output_embeddings"):
        return None
    head = module.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return None
    reason = why_not(module, head) or _why_changed(module, head)
    return Match("loss", _OP, reason, edit=None if reason else _EDIT, sample=_sample)


class _Output:
    """Output of the stand-in base model: hidden states, and None for every other attribute."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else ()

    def __getattr__(self, name: str) -> None:
        return None


class _Base(nn.Module):
    """Stand-in for the base model, and for any part of it that is called instead."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.output = _Output(hidden)

    def forward(self, *_: Any, **__: Any) -> _Output:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return self


class _Asked(Exception):
    """The loss function was called with what the head returned."""


def _why_changed(model: Any, head: Any) -> str:
    """Run the model without its base model; return why its loss function gets something else than its head returns,
    or "" if it gets that.
    """
    hidden = torch.zeros(1, 2, head.in_features, dtype=getattr(model, "dtype", None), device=head.weight.device)

    def asked(passing: Any, logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        raise _Asked if logits is passing.seen and vocab_size == head.out_features else ChangedLogits

    shell, _ = on_shell(model, head, asked)
    vars(shell)["_modules"] = {**vars(shell)["_modules"], model.base_model_prefix: _Base(hidden)}
    ids = torch.zeros(1, 2, dtype=torch.int64, device=hidden.device)
    with torch.no_grad():
        try:
            type(model).forward(shell, input_ids=ids, labels=ids)
        except ChangedLogits:
            return CHANGED
        except _Asked:
            return ""
        except Exception as error:  # whatever foreign code raises on a base model that is none
            return f"its forward cannot be run without its base model: {type(error).__name__}"
    return "its forward does not call its loss function"


def _sample(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    numbers = (-100, 0.0, 0.0, 0.0, "sum", False, False)
    rows = torch.zeros(2, 8, dtype=dtype, device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    return LinearCrossEntropy(rows, rows, None, None, labels, None, None, *numbers)._asdict()
