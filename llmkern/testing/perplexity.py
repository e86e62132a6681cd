"""Perplexity of a causal language model on a text, and how far its distributions are from another's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Divergence", "divergence", "perplexity"]

CHUNK = 16
"""Tokens of a forward that reads a cache: few, so that nearly all keys that are seen come from the cache."""


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    context: int = 512,
    cache: Callable[[], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean negative log-likelihood over consecutive windows that do not overlap.

    token_ids: [tokens], any integer dtype.  Each window of `context` tokens is one forward without a cache; every
    token but a window's first is predicted from those before it in the window.  A last window that is not full is
    left out (it would have shorter contexts), unless it is the only one.  Likelihoods are computed in fp32 and
    summed in fp64.  `progress(done, total)` is called after each window with the tokens read.
    cache: makes an empty cache for a window, which is then read in forwards of 16 tokens.
    Raises TypeError for other dtypes, ValueError for other shapes, fewer than 2 tokens or a context below 2.
    """
    windows = _windows("perplexity", token_ids, context)
    device = next(model.parameters()).device
    total = 0.0
    with torch.inference_mode():
        for i, window in enumerate(windows):
            ids = window.to(device, torch.long)
            logits = _logits(model, ids[None], cache)[0, :-1]
            total += float(F.cross_entropy(logits.float(), ids[1:], reduction="none").double().sum())
            if progress is not None:
                progress((i + 1) * windows.shape[1], windows.numel())
    return math.exp(total / (windows.numel() - len(windows)))


@dataclass(frozen=True)
class Divergence:
    """Difference of a model's next-token distributions from a reference's, over the tokens of a text.

    mean, p999: of KL(reference ‖ model) in nats, the mean and the 99.9th percentile.
    same_top: share of tokens whose most likely successor is the same.
    perplexity: of the model.
    """

    mean: float
    p999: float
    same_top: float
    perplexity: float


def divergence(
    model: nn.Module,
    reference: nn.Module,
    token_ids: Tensor,
    *,
    context: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Compare the distributions of two models, in the windows that `perplexity` reads; in fp32, sums in fp64.

    Raises as `perplexity` does.
    """
    windows = _windows("divergence", token_ids, context)
    kl: list[Tensor] = []
    same, likelihood = 0, 0.0
    with torch.inference_mode():
        for i, window in enumerate(windows):
            ids = window.to(next(model.parameters()).device, torch.long)
            got, wanted = (
                _logits(each, ids[None], None)[0, :-1].float().log_softmax(-1) for each in (model, reference)
            )
            kl.append(F.kl_div(got, wanted, reduction="none", log_target=True).double().sum(-1).clamp(min=0).cpu())
            same += int((got.argmax(-1) == wanted.argmax(-1)).sum())
            likelihood += float(got.gather(-1, ids[1:, None]).double().sum())
            if progress is not None:
                progress((i + 1) * windows.shape[1], windows.numel())
    every = torch.cat(kl)
    count = len(every)
    return Divergence(float(every.mean()), float(every.quantile(0.999)), same / count, math.exp(-likelihood / count))


def _windows(what: str, token_ids: Tensor, context: int) -> Tensor:
    if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise TypeError(f"{what}: token_ids is {token_ids.dtype}, expected an integer dtype")
    if token_ids.dim() != 1 or token_ids.numel() < 2:
        raise ValueError(f"{what}: token_ids has shape {list(token_ids.shape)}, expected [tokens], at least 2")
    if context < 2:
        raise ValueError(f"{what}: context is {context}, expected at least 2")
    context = min(context, token_ids.numel())
    return token_ids[: token_ids.numel() // context * context].view(-1, context)


def _logits(model: nn.Module, ids: Tensor, cache: Callable[[], Any] | None) -> Tensor:
    if cache is None:
        return model(input_ids=ids, use_cache=False).logits
    made = cache()
    parts = [model(input_ids=part, past_key_values=made, use_cache=True).logits for part in ids.split(CHUNK, 1)]
    return torch.cat(parts, 1)
