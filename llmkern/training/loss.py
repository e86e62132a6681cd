"""Fused loss of a causal language model: the output head runs on a chunk of rows at a time.

The model's own forward runs on a shell of the model: the same parameters and modules, but a head that hands the hidden
states through, and a loss function that takes them, and the head's weight, to `linear_cross_entropy`.  So whatever else
a model's forward does stays what it is, and a model that does something to its logits is found out.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern import dispatch, ops
from llmkern.checks import PLAIN_TENSORS
from llmkern.nn import Int8Linear
from llmkern.swap.derive import original_class

__all__ = ["fuse_loss_", "unfuse_loss_"]

Model = TypeVar("Model", bound=nn.Module)

_OP = "linear_cross_entropy"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuse_loss_(model: Model) -> Model:
    """Have `model(..., labels=...)` compute its loss without its logits wherever gradients are computed.

    model: a causal language model of transformers, optimized before or not.  The instance gets a forward of its own;
        `unfuse_loss_` takes it away.  Trainer, accelerate and plain loops call it as before, `num_items_in_batch`
        included; without labels or without gradients nothing changes.
    The result's `logits` are computed when they are read; its `loss` is the mean over the labels, 0 where all are
    ignored.  Under autocast, gradient checkpointing, and adapters on other layers than the head it works the same.  A
    call that it cannot serve (a head with hooks or adapters, logits that the model changes after its head, another
    loss, return_dict=False) runs untouched, with the reason in `explain`.
    Returns the model.  Raises TypeError for what is not a model with an output head and a loss function.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or not callable(get_head):
        raise TypeError(f"fuse_loss_: model is a {type(model).__name__}, expected a causal language model")
    if get_head() is None or not hasattr(type(model), "loss_function"):
        raise TypeError(f"fuse_loss_: {type(model).__name__} has no output head with a loss, expected a causal LM")
    if not _is_fused(model):
        if "forward" in vars(model):
            raise TypeError("fuse_loss_: the model's forward was replaced on the instance, expected the class's own")
        vars(model)["forward"] = types.MethodType(_named(type(model).forward), model)
    return model


def unfuse_loss_(model: Model) -> Model:
    """Undo `fuse_loss_`; a model without it is left as it is.  Returns the model."""
    if _is_fused(model):
        del vars(model)["forward"]
    return model


def _is_fused(model: nn.Module) -> bool:
    return hasattr(getattr(vars(model).get("forward"), "__func__", None), "_llmkern_fused")


@functools.cache
def _named(original: Any) -> Any:
    """Return the forward with the signature that a trainer reads."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, args, kwargs)

    forward._llmkern_fused = True  # type: ignore[attr-defined]
    return forward


class _ChangedLogits(Exception):
    """The loss function was given something other than what the head returned."""


class _Passing(nn.Module):
    """Output head that passes the hidden states through."""

    seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return hidden


def _forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    run = type(model).forward  # at each call: `optimize_` and `restore_` change the class
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return run(model, *args, **kwargs)
    labels = inspect.signature(run).bind_partial(model, *args, **kwargs).arguments.get("labels")
    if labels is None:
        return run(model, *args, **kwargs)
    head = model.get_output_embeddings()
    reason = _why_not(model, head, kwargs)
    if reason is None:
        passing = _Passing()
        shell = object.__new__(type(model))
        vars(shell).update(vars(model))
        vars(shell)["_loss_function"] = functools.partial(_loss, head, passing)
        name = next(name for name, child in model._modules.items() if child is head)
        vars(shell)["_modules"] = {**model._modules, name: passing}
        try:
            out = run(shell, *args, **kwargs)
        except _ChangedLogits:
            reason = "the model changes its logits after its head"
        else:
            return _with_lazy_logits(out, head, passing.seen)
    dispatch.record_fallback(_OP, type(model).__name__, reason, {"labels": labels})
    return run(model, *args, **kwargs)


def _why_not(model: Any, head: Any, kwargs: dict[str, Any]) -> str | None:
    """Return the reason why the loss of this call is left to the model, or None."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if original_class(head) not in (nn.Linear, Int8Linear):
        return f"the output head is a {type(head).__name__}, not a plain linear layer"
    if head not in model._modules.values():
        return "the output head is not the model's own child"
    if any(vars(head).get(hooks) for hooks in _HOOKS) or "forward" in vars(head):
        return "the output head has hooks or a forward of its own"
    if isinstance(head, nn.Linear) and not isinstance(head, Int8Linear) and type(head.weight) not in PLAIN_TENSORS:
        return f"the output head's weight is a {type(head.weight).__name__}"
    if model.loss_function is not ForCausalLMLoss:
        return "the model has a loss function of its own"
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
        raise _ChangedLogits
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    is_int8 = isinstance(head, Int8Linear)
    return ops.linear_cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        head.codes if is_int8 else head.weight,
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
