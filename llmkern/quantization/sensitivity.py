"""Estimate what the rounding of one layer's weight costs: the KL divergence of a language model's predictions.

To second order it is ½ E[(g · δ)²]: δ is the change of the layer's output at a token, g the gradient there of the
log-likelihood of tokens that are drawn from the model's own predictions (the Fisher information; as in Optimal Brain
Surgeon, Hassibi & Stork 1992).  One backward pass gives g for all layers.  Changes at different tokens count as
independent, and so do layers: of SmolLM2-135M in int4, one kind of layer at a time, the divergences add up to 0.143
where all together it is 0.153.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["divergences"]

MOST_TOKENS = 1024
"""Batches are run until so many tokens have been seen."""


def divergences(
    model: nn.Module, batches: Sequence[dict[str, Any]], changes: Mapping[nn.Module, Callable[[], Tensor]]
) -> dict[nn.Module, float]:
    """Return the mean KL divergence at a token, in nats, that each layer's change of weight causes by itself.

    batches: keyword arguments of a forward that returns logits [batch, tokens, vocabulary].
    changes: by linear layer, a function that makes Ŵ − W, [out, in] fp32; called once for each batch.
    A layer that no gradient reaches is missing; the result is empty for models without such logits.  The model is as
    before afterwards.
    """
    found: dict[nn.Module, float] = {}
    tokens = 0
    with _frozen(model), _watched(model, changes, found), torch.enable_grad():
        for batch in batches:
            if tokens >= MOST_TOKENS:
                break
            device = next(model.parameters()).device
            kwargs = tree_map(partial(_to, device=device), batch)
            positional = (kwargs.pop(""),) if "" in kwargs else ()
            logits = getattr(model(*positional, **kwargs), "logits", None)
            if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.requires_grad:
                return {}
            likelihood = logits.flatten(0, 1).float().log_softmax(-1)
            drawn = torch.multinomial(
                likelihood.detach().exp().cpu(), 1, generator=torch.Generator().manual_seed(tokens)
            )
            likelihood.gather(-1, drawn.to(device)).sum().backward()
            tokens += len(drawn)
    return {layer: total / tokens for layer, total in found.items()}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block parameters take no gradients, and the model is in evaluation mode."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    for parameter in asking:
        parameter.requires_grad = False
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad = True
        for module in training:
            module.training = True


@contextlib.contextmanager
def _watched(
    model: nn.Module, changes: Mapping[nn.Module, Callable[[], Tensor]], found: dict[nn.Module, float]
) -> Iterator[None]:
    """Within the block a backward pass adds to `found`; embeddings are where gradients end."""

    def embedded(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.is_leaf:
            output.requires_grad_()

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, module, (args[0] if args else kwargs["input"]).detach()))

    def add(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
        change = changes[layer]().to(x.device)
        moved = gradient.flatten(0, -2).float() @ change  # g · δ is g · ΔW · x
        found[layer] = found.get(layer, 0.0) + float((moved * x.flatten(0, -2)).sum(-1).square().sum()) / 2

    handles = [module.register_forward_hook(embedded) for module in model.modules() if isinstance(module, nn.Embedding)]
    handles += [layer.register_forward_hook(called, with_kwargs=True) for layer in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
