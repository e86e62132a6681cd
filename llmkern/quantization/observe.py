"""Observe one forward per batch: each layer's inputs, the readers of each norm's output, and weights read elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Observed", "observe"]

MAX_ROWS = 256
"""Rows of a layer's inputs that are kept to measure its output error."""


@dataclass
class Observed:
    """rows: a sample of each layer's inputs, [rows, in].  amax: the largest magnitude of each input channel, fp32.

    products: XᵀX of all inputs X of the layers that it was asked for, [in, in] fp32, and how many inputs; one where
        layers share inputs.
    groups: a norm, and the layers that use its output where nothing else does.
    read_elsewhere: modules whose weight was read while none that holds it was running.
    """

    rows: dict[nn.Module, Tensor] = field(default_factory=dict)
    amax: dict[nn.Module, Tensor] = field(default_factory=dict)
    products: dict[nn.Module, tuple[Tensor, int]] = field(default_factory=dict)
    groups: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    read_elsewhere: set[nn.Module] = field(default_factory=set)


def observe(
    model: nn.Module,
    layers: Iterable[nn.Module],
    batches: list[dict[str, Any]],
    products_of: Collection[nn.Module] = (),
    others: list[dict[str, Any]] | None = None,
) -> Observed:
    """Run the batches through the model in evaluation mode, without gradients; the model is as before afterwards.

    products_of: the layers whose products are wanted.
    others: batches that are run too, in so far as the model takes them, and count for everything but the products.
    """
    others = others or []
    watch = _Watch(list(layers), max(1, MAX_ROWS // max(1, len(batches) + len(others))), products_of)
    device = next(model.parameters()).device

    def run(batch: dict[str, Any]) -> None:
        kwargs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch)
        positional = (kwargs.pop(""),) if "" in kwargs else ()
        with watch:
            outputs = model(*positional, **kwargs)
        watch.end_of_forward(outputs)

    with _evaluating(model), watch.hooked(model), torch.no_grad():
        for batch in batches:
            run(batch)
        watch.multiplies = False
        with contextlib.suppress(Exception):  # whatever the model says of inputs that nobody but us chose
            for batch in others:
                run(batch)
    return watch.observed()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _looks_like_a_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and next(module.children(), None) is None


# What takes no more of a tensor than its dtype, device or shape.
_BY_FORM = frozenset({Tensor.to, Tensor.type_as, torch.empty_like, torch.zeros_like, torch.ones_like})


class _Watch(TorchFunctionMode):
    """Track the outputs of norms, and weights, by identity; any torch function that makes a tensor from one is a
    reader.
    """

    def __init__(self, layers: list[nn.Module], rows_per_call: int, products_of: Collection[nn.Module]) -> None:
        super().__init__()
        self.multiplies = True
        self._products_of = set(products_of)
        self._products: dict[nn.Module, tuple[Tensor, int]] = {}
        self._shares: dict[nn.Module, nn.Module] = {}  # a layer, and the one that has had the same inputs each time
        self._first: tuple[Tensor, nn.Module] | None = None
        self._layers, self._rows_per_call = set(layers), rows_per_call
        self._rows: dict[nn.Module, list[Tensor]] = {}
        self._amax: dict[nn.Module, Tensor] = {}
        self._users: dict[nn.Module, dict[nn.Module, None]] = {}
        self._used_elsewhere: set[nn.Module] = set()
        self._norm_of: dict[nn.Module, nn.Module | None] = {}
        # Output tensors are kept until the forward ends, so that none of their identities is given out again.
        self._outputs: dict[int, tuple[Tensor, nn.Module]] = {}
        self._inside = 0
        self._holders: dict[int, list[nn.Module]] = {}
        self._running: list[nn.Module] = []
        self._read_elsewhere: set[nn.Module] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _BY_FORM and any(isinstance(v, Tensor) for v in tree_leaves(result)):
            for value in tree_leaves((args, kwargs)):
                holders = self._holders.get(id(value), ())
                if holders and not any(module in self._running for module in holders):
                    self._read_elsewhere.update(holders)
        if not self._inside and self._outputs and any(isinstance(v, Tensor) for v in tree_leaves(result)):
            self._mark_used(tree_leaves((args, kwargs)))
        return result

    def _mark_used(self, values: list[Any]) -> None:
        for value in values:
            if id(value) in self._outputs:
                self._used_elsewhere.add(self._outputs[id(value)][1])

    @contextlib.contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and (module in self._layers or isinstance(module, nn.Embedding)):
                self._holders.setdefault(id(weight), []).append(module)
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave))
            if module in self._layers:
                handles.append(module.register_forward_pre_hook(self._before_layer, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after_layer, prepend=True))
            elif _looks_like_a_norm(module):
                handles.append(module.register_forward_hook(self._after_norm))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _after_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._users.setdefault(module, {})
            self._outputs[id(output)] = (output, module)

    def _before_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside += 1
        x = args[0] if args else kwargs["input"]
        norm = self._outputs[id(x)][1] if id(x) in self._outputs else None
        if norm is not None:
            self._users[norm][module] = None
        # A layer with two sources can only be smoothed into neither.
        if self._norm_of.setdefault(module, norm) is not norm:
            self._used_elsewhere.update(n for n in (norm, self._norm_of[module]) if n is not None)
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return
        if self.multiplies and module in self._products_of:
            self._add_product(module, x, rows)
        amax = rows.abs().amax(0).float()
        self._amax[module] = torch.maximum(self._amax[module], amax) if module in self._amax else amax
        kept = self._rows.setdefault(module, [])
        if sum(part.shape[0] for part in kept) < MAX_ROWS:
            step = max(1, rows.shape[0] // self._rows_per_call)
            kept.append(rows[::step][: self._rows_per_call].clone())

    def _add_product(self, module: nn.Module, x: Tensor, rows: Tensor) -> None:
        """Add XᵀX, only once for layers that are given the same tensor in a row."""
        before = self._first
        same = before[1] if before is not None and before[0] is x else module
        if same is module:
            self._first = (x, module)
        if self._shares.setdefault(module, same) is not same:  # not so every time: it has its own from now on
            self._shares[module] = same = module
        if same is module:
            part = rows.float().T @ rows.float()
            known = self._products.get(module)
            count = rows.shape[0]
            self._products[module] = (part, count) if known is None else (known[0].add_(part), known[1] + count)

    def _after_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1

    def end_of_forward(self, outputs: Any) -> None:
        """Count the model's outputs as used by its caller."""
        self._mark_used(tree_leaves(outputs if not hasattr(outputs, "to_tuple") else outputs.to_tuple()))
        self._outputs.clear()
        self._first = None

    def observed(self) -> Observed:
        groups = {
            norm: list(users) for norm, users in self._users.items() if users and norm not in self._used_elsewhere
        }
        rows = {m: torch.cat(parts) for m, parts in self._rows.items()}
        products = {m: self._products[same] for m, same in self._shares.items() if same in self._products}
        return Observed(rows, self._amax, products, groups, self._read_elsewhere)
