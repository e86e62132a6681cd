"""Fused loss of a causal language model: the output head runs on a chunk of rows at a time.

The model's own forward runs on a shell of the model: the same parameters and modules, but a head that hands the hidden
states through, and a loss function that takes them, and the head's weight, to `linear_cross_entropy`.  So whatever else
a model's forward does stays what it is, and a model that does something to its logits is found out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern import dispatch, ops
from llmkern.checks import PLAIN_TENSORS
from llmkern.nn import Int8Linear, PackedLinear
from llmkern.swap.derive import original_class

__all__ = ["CHANGED", "ChangedLogits", "on_shell", "why_not", "wrap"]

CHANGED = "the model changes its logits after its head"
_OP = "linear_cross_entropy"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class ChangedLogits(Exception):
    """The loss function was given something other than what the head returned."""


class _Passing(nn.Module):
    """Output head that passes the hidden states through."""

    seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return hidden


@functools.cache
def wrap(original: Callable[..., Any], edited: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a forward that computes the loss without the logits where gradients are computed.

    original: the class's own forward.  edited: what other edits have made of it, None where there are none.
    Without labels or gradients, and in compiled graphs, it is only passed through.
    """

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (edited or original_class(self).forward)(self, *args, **kwargs)

    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return run(self, *args, **kwargs)
        labels = signature.bind_partial(self, *args, **kwargs).arguments.get("labels")
        if labels is None:
            return run(self, *args, **kwargs)
        head = self.get_output_embeddings()
        reason = self._llmkern_guard.broken(self) or why_not(self, head) or _why_not_call(self, kwargs)
        if reason is None:
            shell, passing = on_shell(self, head, functools.partial(_loss, head))
            try:
                out = run(shell, *args, **kwargs)
            except ChangedLogits:
                reason = CHANGED
            else:
                return _with_lazy_logits(out, head, passing.seen)
        dispatch.record_fallback(_OP, type(self).__name__, reason, {"labels": labels})
        return run(self, *args, **kwargs)

    return forward


def on_shell(model: Any, head: nn.Module, loss: Callable[..., Tensor]) -> tuple[Any, _Passing]:
    """Return a shell of the model, with another head and loss function, and its head.

    loss: takes the head of the shell, then what loss functions of transformers take.
    """
    passing = _Passing()
    shell = object.__new__(type(model))
    vars(shell).update(vars(model))
    vars(shell)["_loss_function"] = functools.partial(loss, passing)
    name = next(name for name, child in model._modules.items() if child is head)
    vars(shell)["_modules"] = {**model._modules, name: passing}
    return shell, passing


def why_not(model: Any, head: Any) -> str | None:
    """Return the reason why the model's loss is left to it, or None."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if original_class(head) not in (nn.Linear, Int8Linear, PackedLinear):
        return f"the output head is a {type(head).__name__}, not a plain linear layer"
    if not any(child is head for child in model._modules.values()):
        return "the output head is not the model's own child"
    if any(vars(head).get(hooks) for hooks in _HOOKS) or "forward" in vars(head):
        return "the output head has hooks or a forward of its own"
    if not isinstance(head, (Int8Linear, PackedLinear)) and type(head.weight) not in PLAIN_TENSORS:
        return f"the output head's weight is a {type(head.weight).__name__}"
    if _loss_function(model) is not ForCausalLMLoss:
        return "the model has a loss function of its own"
    return None


def _loss_function(model: Any) -> Any:
    """Return `model.loss_function`, without transformers' warning for classes that it falls back to the causal one for:
    whoever only generates has no loss.
    """
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if type(model).loss_function is not PreTrainedModel.loss_function or hasattr(model, "_loss_function"):
        return model.loss_function
    return LOSS_MAPPING.get(str(getattr(model, "loss_type", None)), ForCausalLMLoss)


def _why_not_call(model: Any, kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("return_dict", getattr(model.config, "return_dict", True)) is False:
        return "the outputs are asked for as a tuple, in which logits cannot wait"
    return None


def _loss(
    head: Any,
    passing: _Passing,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Compute transformers' ForCausalLMLoss; `logits` are the head's inputs, not its outputs."""
    if logits is not passing.seen or vocab_size != head.out_features:
        raise ChangedLogits
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    is_int8 = isinstance(head, Int8Linear)
    if is_int8:
        weight = head.codes
    else:  # the op has no packed weights: theirs is unpacked for the call, which is less than the logits are
        weight = head.dequantized_weight(logits.dtype) if isinstance(head, PackedLinear) else head.weight
    return ops.linear_cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        weight,
        shift_labels.reshape(-1).to(logits.device),
        head.bias,
        weight_scale=head.weight_scale if is_int8 else None,
        ignore_index=ignore_index,
        num_items=num_items_in_batch,
    )


def _with_lazy_logits(out: Any, head: nn.Module, hidden: Tensor | None) -> Any:
    """Let the result compute its logits when something reads them."""
    vars(out)["_llmkern_logits"] = (type(out), head, hidden)
    cls: Any = type(out)
    out.__class__ = _lazy(cls)
    return out


@functools.cache
def _lazy(cls: Any) -> Any:
    """Return a subclass of transformers' output class that turns into that class, logits included, once more than the
    loss is read.
    """

    def settled(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "__getitem__" and args[0] in ("loss", 0):  # the first of its values
                return self.loss
            _settle(self)
            return getattr(cls, name)(self, *args, **kwargs)

        return method

    def get(self: Any, name: str) -> Any:
        if name == "logits":
            _settle(self)
        return cls.__getattribute__(self, name)

    names = ("__getitem__", "get", "items", "values", "to_tuple", "__reduce__", "__copy__", "__repr__", "__eq__")
    methods = {name: settled(name) for name in names if hasattr(cls, name)}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__getattribute__": get, **methods})


def _settle(out: Any) -> None:
    waiting = vars(out).pop("_llmkern_logits", None)
    if waiting is None:
        return
    out.__class__, head, hidden = waiting
    out["logits"] = head(hidden)
