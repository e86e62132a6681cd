"""Prune a model to smaller matrices by importance on sample inputs: `prune_`; stock transformers reads the result.

MLP channels and heads are scored as Wanda scores weights (Sun et al. 2023, arXiv:2306.11695), |weight| times the norm
of what it is multiplied with, over what is removed together; layers by how little they turn their input (ShortGPT, Men
et al. 2024, arXiv:2403.03853).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmkern.quantization.inputs import calibration_batches, random_tokens
from llmkern.quantization.undo import plainly
from llmkern.swap.derive import is_swapped
from llmkern.table import render

__all__ = ["PruneReport", "PruneRow", "prune_"]

Model = TypeVar("Model", bound=nn.Module)
MULTIPLE = 32
"""MLP channels stay a multiple of this where they were one: what kernels and blocks of quantization like."""


@dataclass(frozen=True)
class PruneRow:
    """One removal, at one path.  what: "MLP channels", "key-value heads" or "layer".

    removed, of: how many of how many.  share: what the removed ones were of the importance of all there.
    """

    path: str
    what: str
    removed: int
    of: int
    share: float


@dataclass(frozen=True)
class PruneReport:
    """The rows of one `prune_` call.  parameters_before, parameters_after: of the model."""

    rows: tuple[PruneRow, ...]
    measured_on: str
    parameters_before: int
    parameters_after: int

    def __iter__(self) -> Iterator[PruneRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        before, after = self.parameters_before, self.parameters_after
        title = f"{before:,} → {after:,} parameters ({after / before:.1%}); importance measured on {self.measured_on}"
        cells = [(r.path, r.what, f"{r.removed} of {r.of}", f"{r.share:.2%}") for r in self.rows]
        return render(title, ("module", "what", "removed", "of the importance"), cells)


def prune_(
    model: Model, *, mlp: float = 0.0, heads: float = 0.0, layers: float = 0.0, calib: Any = None, tokenizer: Any = None
) -> PruneReport:
    """Remove the least important parts of a decoder, in place; returns the report.

    model: a transformers language model whose layers have a gated MLP (gate_proj, up_proj, down_proj) and, for heads,
        attention with q_proj, k_proj, v_proj, o_proj, in floating point.
    mlp: share of the MLP channels of each layer.  heads: share of the key-value heads of each layer, each with the
        query heads that read it; fewer are removed where transformers' configs, whose heads divide the hidden size,
        have no such number.  layers: share of the layers.  From 0 to below 1; what is left is at least one, and the
        same size in every layer.
    calib, tokenizer: as of `quantize_`; without them random tokens.
    The config has the new sizes, so that `save_pretrained` gives a checkpoint that stock transformers loads.
    Prune before `optimize_` and `quantize_`.  Nothing is trained afterwards: look at the perplexity.
    Raises TypeError and ValueError for bad arguments and models of other kinds; the model is then as it was.
    """
    with plainly():
        return _prune(model, {"mlp": mlp, "heads": heads, "layers": layers}, calib, tokenizer)


def _prune(model: Any, shares: dict[str, float], calib: Any, tokenizer: Any) -> PruneReport:
    for name, share in shares.items():
        if not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(f"prune_: {name} is {share!r}, expected a share from 0 to below 1")
    if not any(shares.values()):
        raise ValueError("prune_: nothing is to be removed, expected mlp, heads or layers above 0")
    path, stack = _decoder(model)
    if any(is_swapped(module) for module in model.modules()):
        raise ValueError("prune_: model is optimized, expected one before optimize_ (restore_ takes that back)")
    _check(path, stack, shares)
    batches = random_tokens(model) if calib is None else calibration_batches(model, calib, tokenizer)
    seen = _observe(model, stack, batches)
    measured_on = f"{len(batches)} {'batches of random tokens' if calib is None else 'calibration inputs'}"
    before = sum(parameter.numel() for parameter in model.parameters())
    kept, rows = _kept_layers(path, stack, seen, shares["layers"])
    edits: list[tuple[nn.Linear, int, Tensor]] = []
    for i in kept:
        rows += _mlp_edits(f"{path}.{i}.mlp", stack[i].mlp, seen, shares["mlp"], edits)
        rows += _head_edits(f"{path}.{i}.self_attn", stack[i].self_attn, seen, shares["heads"], edits)
    for linear, dim, index in edits:
        _select(linear, dim, index)
    _shorten(model, path, stack, kept)
    _describe(model, stack)
    return PruneReport(tuple(rows), measured_on, before, sum(parameter.numel() for parameter in model.parameters()))


def _decoder(model: Any) -> tuple[str, Any]:
    """Return the path and the list of the decoder's layers."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, nn.ModuleList) and len(module) and all(hasattr(child, "mlp") for child in module):
            return path, module
    raise TypeError(f"prune_: model is a {type(model).__name__}, expected a language model with a list of layers")


_MLP, _ATTENTION = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


def _check(path: str, stack: Any, shares: dict[str, float]) -> None:
    for part, names, share in (("mlp", _MLP, "mlp"), ("self_attn", _ATTENTION, "heads")):
        for i, layer in enumerate(stack):
            for name in names if shares[share] else ():
                found = getattr(getattr(layer, part, None), name, None)
                if type(found) is not nn.Linear:
                    raise ValueError(
                        f"prune_: {path}.{i}.{part}.{name} is a {type(found).__name__}, expected nn.Linear (prune "
                        "before optimize_ and quantize_)"
                    )


@dataclass
class _Seen:
    """squares: sum of the squared inputs of each linear layer, by channel.  turn: 1 − cosine of what goes into each
    layer and what comes out, summed over tokens."""

    squares: dict[nn.Module, Tensor]
    turn: dict[nn.Module, float]


@torch.no_grad()
def _observe(model: Any, stack: Any, batches: list[dict[str, Any]]) -> _Seen:
    seen = _Seen({}, {})

    def inputs(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares = args[0].detach().float().flatten(0, -2).square().sum(0)
        seen.squares[module] = seen.squares.get(module, torch.zeros_like(squares)) + squares

    def layer(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        seen.turn[module] = seen.turn.get(module, 0.0) + float((1 - cosine).sum())

    handles = [each.register_forward_hook(layer, with_kwargs=True) for each in stack]
    for each in stack:
        for holder, name in (("mlp", "down_proj"), ("self_attn", "o_proj")):
            linear = getattr(getattr(each, holder, None), name, None)
            if isinstance(linear, nn.Linear):
                handles.append(linear.register_forward_pre_hook(inputs))
    training = model.training
    try:
        model.eval()
        for batch in batches:
            model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen


def _kept_layers(path: str, stack: Any, seen: _Seen, share: float) -> tuple[list[int], list[PruneRow]]:
    count = min(round(share * len(stack)), len(stack) - 1)
    order = sorted(range(len(stack)), key=lambda i: seen.turn[stack[i]])
    total = sum(seen.turn.values())
    rows = [
        PruneRow(f"{path}.{i}", "layer", 1, 1, seen.turn[stack[i]] / total if total else 0.0)
        for i in sorted(order[:count])
    ]
    return sorted(order[count:]), rows


def _mlp_edits(path: str, mlp: Any, seen: _Seen, share: float, edits: list[Any]) -> list[PruneRow]:
    if not share:
        return []
    down = mlp.down_proj
    size = down.in_features
    count = size - round(share * size)
    if size % MULTIPLE == 0:
        count = max(round(count / MULTIPLE), 1) * MULTIPLE
    score = seen.squares[down].sqrt() * down.weight.detach().float().norm(dim=0)
    index = score.topk(max(count, 1)).indices.sort().values
    edits += [(mlp.gate_proj, 0, index), (mlp.up_proj, 0, index), (down, 1, index)]
    return [_row(path, "MLP channels", score, index)]


def _head_edits(path: str, attention: Any, seen: _Seen, share: float, edits: list[Any]) -> list[PruneRow]:
    if not share:
        return []
    out, dim = attention.o_proj, attention.head_dim
    groups = attention.k_proj.out_features // dim
    width = out.in_features // groups  # of the query heads that read one key-value head
    score = (seen.squares[out].sqrt() * out.weight.detach().float().norm(dim=0)).view(groups, width).sum(1)
    index = score.topk(_heads_left(path, out, groups, width // dim, share)).indices.sort().values
    wide, narrow = (
        (index[:, None] * size + torch.arange(size, device=index.device)).flatten() for size in (width, dim)
    )
    edits += [(attention.q_proj, 0, wide), (attention.k_proj, 0, narrow), (attention.v_proj, 0, narrow), (out, 1, wide)]
    return [_row(path, "key-value heads", score, index)]


def _heads_left(path: str, out: nn.Linear, groups: int, readers: int, share: float) -> int:
    wanted, hidden = max(groups - round(share * groups), 1), out.out_features
    possible = [count for count in range(1, groups) if hidden % (count * readers) == 0]
    found = [count for count in possible if count >= wanted]
    if not found:
        names = ", ".join(str(count) for count in possible) or "none"
        raise ValueError(
            f"prune_: heads is {share:g}, which leaves {wanted} of {groups} key-value heads in {path}; numbers whose "
            f"query heads divide the hidden size {hidden} are possible: {names}"
        )
    return min(found)


def _row(path: str, what: str, score: Tensor, index: Tensor) -> PruneRow:
    total = float(score.sum())
    share = 1 - float(score[index].sum()) / total if total else 0.0
    return PruneRow(path, what, len(score) - len(index), len(score), max(share, 0.0))


def _select(linear: nn.Linear, dim: int, index: Tensor) -> None:
    weight = linear.weight
    linear.weight = nn.Parameter(weight.detach().index_select(dim, index.to(weight.device)), weight.requires_grad)
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(
            linear.bias.detach().index_select(0, index.to(weight.device)), linear.bias.requires_grad
        )
    linear.out_features, linear.in_features = linear.weight.shape


def _shorten(model: Any, path: str, stack: Any, kept: list[int]) -> None:
    config = model.config.get_text_config()
    if len(kept) == len(stack):
        return
    holder, _, name = path.rpartition(".")
    setattr(model.get_submodule(holder), name, nn.ModuleList([stack[i] for i in kept]))
    for number, i in enumerate(kept):
        for module in stack[i].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    config.num_hidden_layers = len(kept)


def _describe(model: Any, stack: Any) -> None:
    """Write the sizes into the config, and into the modules that keep copies of them."""
    config, first = model.config.get_text_config(), stack[0]
    if isinstance(getattr(first.mlp, "down_proj", None), nn.Linear):
        config.intermediate_size = first.mlp.down_proj.in_features
        for layer in stack:
            if hasattr(layer.mlp, "intermediate_size"):
                layer.mlp.intermediate_size = config.intermediate_size
    attention: Any = getattr(first, "self_attn", None)
    if isinstance(getattr(attention, "k_proj", None), nn.Linear) and hasattr(attention, "head_dim"):
        config.head_dim = attention.head_dim  # else it would be derived from the heads that were there
        config.num_attention_heads = attention.q_proj.out_features // attention.head_dim
        config.num_key_value_heads = attention.k_proj.out_features // attention.head_dim
