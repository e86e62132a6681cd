"""Run all layers of a decoder or an encoder in one native call.

At batch 1 the Python around a layer takes about as long as the layer.  So the loop in which a model's forward calls its
layers, if its source shows that the loop does nothing else (llmkern/swap/layer_loop.py), runs over one element instead,
an `Element`.  It computes all layers at once while a guard finds them unchanged, and calls them one after the other if
anything changed or the op refuses the call.  Where a decoder gives its layers
arguments by their kind, masks for one, there is an element for each run of layers of one kind.  Where layers hand
results on to the next ones, the loop runs over as many turns as there are layers, the first of which computes all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmkern import dispatch
from llmkern.integrations.transformers.attention import WEIGHTS, collected_outputs, collects_weights
from llmkern.nn.quantized_linear import QuantizedLinear
from llmkern.ops._layer_plan import plan_layers
from llmkern.ops.int8_linear import resolve_scheme
from llmkern.swap.bound import Bound, steps_of
from llmkern.swap.edit import Edit
from llmkern.swap.guard import Guard, Path, are_inert, places
from llmkern.swap.layer_caches import cached_by_all
from llmkern.swap.layer_call import INPUTS
from llmkern.swap.layer_forward import by_kernels
from llmkern.swap.layer_loop import LayerLoop
from llmkern.swap.snapshot import Snapshot
from llmkern.swap.whole_layer import (
    ALIASES,
    BIAS,
    OP,
    NotServed,
    Outdated,
    WholeLayer,
    arguments_of,
    at,
    check_guard,
    encoder_of,
    inputs_of,
    none_is_causal,
    why_not_fused,
    with_bias,
)

__all__ = ["FORGETTING", "forget", "one_element"]

_KIND = "attention_type"  # a layer's attribute in transformers, by which the decoder chooses its mask
_ELEMENTS = "_llmkern_layers"  # what the loop runs over

_stacks: WeakKeyDictionary[nn.Module, dict[int, _Stack]] = WeakKeyDictionary()  # by the place of the first layer


def forget(decoder: nn.Module) -> None:
    """Forget what was looked up about the layers, and with it references to weights that may be replaced."""
    _stacks.pop(decoder, None)


def forgetting(name: str) -> tuple[str, Callable[..., Any]]:
    """Return the method of that name for a swapped class; before it runs, stacks with the module release its weights.

    PyTorch may exchange parameters (set_swap_module_params_on_conversion), but only those that nobody else holds.
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.__future__.get_swap_module_params_on_conversion():
            _forget_all_with(self)
        return getattr(self._llmkern_original, name)(self, *args, **kwargs)

    return name, method


def _forget_all_with(module: nn.Module) -> None:
    for decoder, stacks in list(_stacks.items()):
        if decoder is module or any(layer is module for stack in stacks.values() for layer in stack.layers):
            forget(decoder)


FORGETTING = tuple(map(forgetting, ("_apply", "load_state_dict")))


@functools.cache
def one_element(loop: LayerLoop) -> Edit:
    """Return the edit of a model that calls its layers in this loop."""

    def elements(self: Any) -> Any:
        layers = getattr(self, loop.layers)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return layers
        return _elements(self, layers, loop) or layers

    return Edit(renames=((loop.layers, _ELEMENTS),), members=((_ELEMENTS, property(elements)), *FORGETTING))


def _elements(decoder: Any, holder: Any, loop: LayerLoop) -> list[Any]:
    """Return the elements that the loop runs over in place of the layers; none if it leaves a layer out."""
    if type(holder) is not nn.ModuleList:
        return []
    layers, config = tuple(holder._modules.values()), getattr(decoder, "config", None)
    if not layers or (loop.counted and config.num_hidden_layers != len(layers)):  # type: ignore[union-attr]
        return []
    stacks = _stacks.setdefault(decoder, {})
    types = getattr(config, "layer_types", None) or ()
    whole = stacks.get(0)
    if whole is not None and whole.layers == layers and len(set(types)) <= 1:  # its guard has the attribute
        element = _element(decoder, stacks, 0, layers, loop)
        return element.handing() if loop.results else [element]
    kinds = [(types[i] if i < len(types) else None, getattr(layer, _KIND, None)) for i, layer in enumerate(layers)]
    runs = [tuple([i for i, _ in run]) for _, run in itertools.groupby(enumerate(kinds), key=lambda each: each[1])]
    for first in stacks.keys() - {run[0] for run in runs}:
        stacks.pop(first, None)  # another thread may have been here
    elements = [_element(decoder, stacks, run[0], tuple([layers[i] for i in run]), loop) for run in runs]
    if loop.results:
        return elements[0].handing() if len(elements) == 1 else []
    if len(elements) == 1:
        return elements
    return [turn for element in elements for turn in element.turns()]


def _element(decoder: Any, stacks: dict[int, _Stack], first: int, layers: tuple[Any, ...], loop: LayerLoop) -> Element:
    stack = stacks.get(first)
    if stack is not None and (stack.layers != layers or not stack.holds()):
        stacks.pop(first, None)
        stack = None
    return Element(decoder, first, layers, stack, loop)


class Element:
    """Consecutive layers of a decoder that are given the same arguments, called as if they were one layer."""

    def __init__(
        self, decoder: Any, first: int, layers: tuple[Any, ...], stack: _Stack | None, loop: LayerLoop
    ) -> None:
        self.decoder, self.first, self.layers, self.stack, self.loop = decoder, first, layers, stack, loop
        self.served = False  # whether the first of several turns has computed all layers

    @property
    def attention_type(self) -> Any:
        """Return the attention type shared by all layers, by which the decoder chooses their mask."""
        return self.layers[0].attention_type

    def turns(self) -> list[Any]:
        """Return one element per layer, for a decoder that chooses arguments by the layer's index; the last one
        computes all of them.
        """
        return [_Turn(self, layer) for layer in self.layers[:-1]] + [self]

    def handing(self) -> list[Any]:
        """Return one element per layer, for a loop in which layers hand results on; the first one computes all."""
        return [_Handing(self, number) for number in range(len(self.layers))]

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.together(hidden, args, kwargs)
        if out is not None:
            return out
        for layer in self.layers:
            hidden = layer(hidden, *args, **kwargs)
        return hidden

    def together(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the hidden states after the last layer, or None if the layers have to be called."""
        reason = why_not_fused(self.layers[0], hidden)
        if reason is None:
            try:
                return self._known(hidden, (*args, *kwargs.values())).computed(hidden, args, kwargs)
            except NotServed as unserved:
                reason = str(unserved)
        dispatch.record_parts(OP, "one layer after the other", reason, {"hidden": hidden})
        return None

    def _known(self, hidden: Tensor, arguments: tuple[Any, ...]) -> _Stack:
        if self.stack is None or self.stack.dtype is not hidden.dtype:
            # Not for every token: what cannot be served now will hardly be for the next one.
            if hidden.shape[1] == 1 and any(map(_is_filled, arguments)):
                raise NotServed("nothing is known of the layers yet")
            self.stack = _Stack(self.layers, self.first, hidden, self.loop)
            _stacks.setdefault(self.decoder, {})[self.first] = self.stack
        return self.stack


class _Turn:
    """Placeholder for a layer that a later element computes with its own; it returns its input."""

    def __init__(self, element: Element, layer: Any) -> None:
        self.element, self.layer = element, layer

    @property
    def attention_type(self) -> Any:
        return self.layer.attention_type

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class _Handing:
    """A layer that hands results on to the next one, which is no more than all of them do when computed together."""

    def __init__(self, element: Element, number: int) -> None:
        self.element, self.number = element, number

    @property
    def attention_type(self) -> Any:
        return self.element.layers[self.number].attention_type

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        element = self.element
        if self.number == 0:
            out = element.together(hidden, args, kwargs)
            element.served = out is not None
            hidden = hidden if out is None else out
        if element.served:
            return (hidden, *[None] * (element.loop.results - 1))
        return element.layers[self.number](hidden, *args, **kwargs)


def _is_filled(cache: Any) -> bool:
    return hasattr(cache, "get_seq_length") and bool(cache.get_seq_length())


def _hands_on(whole: WholeLayer, loop: LayerLoop) -> bool:
    """Check that a layer returns what the loop takes, and hands on arguments as they are."""
    if (whole.returned is None) != (loop.results == 0) or len(whole.returned or ()) + 1 != max(loop.results, 1):
        return False
    for result, place in loop.handed:
        name, returned = _argument(whole, place), (whole.returned or ())[result - 1]
        if returned != name and (returned or name in whole.known):  # None, which it was before
            return False
    return True


def _argument(whole: WholeLayer, place: int | str) -> str:
    """Return the name of an argument that a loop gives by its number or name."""
    name = dict(enumerate(whole.positional)).get(place, "") if isinstance(place, int) else place
    return ALIASES.get(name, name)


class _Stack:
    """Layers and the op's arguments for them.  Raises `NotServed` if one of them has to be called."""

    def __init__(self, layers: tuple[Any, ...], first: int, hidden: Tensor, loop: LayerLoop) -> None:
        self.layers, self.first, self.dtype = layers, first, hidden.dtype
        self.wholes: list[WholeLayer] = []
        for layer in layers:
            whole = vars(type(layer)).get("_llmkern_layer")  # not of a class from which it is derived
            if whole is None or whole.lookup:
                raise NotServed("not every layer is swapped as a whole")
            if not _hands_on(whole, loop):
                raise NotServed("the layers do not return what the loop hands on")
            self.wholes.append(whole)
        self.different = tuple(dict.fromkeys(self.wholes))
        self.shares_bias = len(layers) == 1 or BIAS in [_argument(self.wholes[0], place) for _, place in loop.handed]
        self.classes: tuple[Any, ...] = tuple(dict.fromkeys(map(type, layers)))
        self.guards: tuple[Guard, ...] = tuple([cls._llmkern_guard for cls in self.classes])
        if not self._are_called():
            raise NotServed("the __call__ of the layers was replaced")
        read = {name for whole in self.different for name in whole.program.inputs}
        self.head = tuple([name for name in INPUTS if name in read])
        self.outdated = False
        self.snapshot = Snapshot()
        self.collecting: list[dict[int, Any]] = []  # hooks that do nothing unless outputs are collected
        self.bound = []
        for i, (layer, whole) in enumerate(zip(layers, self.wholes, strict=True), first):
            check_guard(layer)
            self.bound.append(Bound(whole.program, layer, hidden.dtype, whole.packed))
            self._keep_layer(layer, whole)
            if whole.index and whole.place(layer) != i:
                raise NotServed("the layers are not in the order of the cache")
        self.causal = all(map(none_is_causal, layers, self.wholes))
        self.plans: dict[str, tuple[Tensor, str]] = {}  # by what "auto" means
        self.judged: dict[Any, Any] = {}  # who serves calls of a form

    def holds(self) -> bool:
        """Check that nothing has changed since the layers were looked up."""
        known = not self.outdated and self._are_called()
        return known and all([guard.surroundings.hold() for guard in self.guards]) and self.snapshot.holds()

    def _are_called(self) -> bool:
        return all([cls.__call__ is nn.Module.__call__ for cls in self.classes])

    def _keep_layer(self, layer: Any, whole: WholeLayer) -> None:
        self._keep_module(layer)
        if layer.training:
            raise NotServed("a layer is in training mode")
        for name in ("training", _KIND):
            self.snapshot.entry(vars(layer), name)
        for place in whole.index:
            self.snapshot.entry(vars(at(layer, place)), "layer_idx")
        kept: set[Path] = set()
        for part in type(layer)._llmkern_guard.parts:
            child = at(layer, part.path)
            if part.path and part.path not in kept:
                kept.add(part.path)
                self._keep_child(layer, part.path)
            for held, name in places(child, part):
                if isinstance(held, dict):
                    self.snapshot.entry(held, name)
                else:
                    self.snapshot.attribute(held, name)
        packed = dict(whole.packed)
        for kind, path in whole.program.parameters():
            steps = steps_of(path)
            if kind == "tensor":
                owner = at(layer, steps[:-1])
                for store in (owner._parameters, owner._buffers):
                    self.snapshot.entry(store, steps[-1])
                continue
            if steps[-1] in at(layer, steps[:-1])._parameters:  # of packed experts
                steps = steps[:-1]
            elif steps in kept:
                continue
            self._keep_child(layer, steps)
            held = at(layer, steps)
            if path in packed or hasattr(held, "nf"):  # so many rows as the program takes apart; or views (Conv1D)
                for tensor in (*held._parameters.values(), *held._buffers.values()):
                    if tensor is not None:
                        self.snapshot.storage(tensor)

    def _keep_child(self, layer: Any, path: Path) -> None:
        owner, child = at(layer, path[:-1]), at(layer, path)
        self.snapshot.entry(owner._modules, path[-1])
        self._keep_module(child)
        if child._parameters:
            self.snapshot.entries(child._parameters)
            self.snapshot.dtypes(child._parameters.values())
        if isinstance(child, QuantizedLinear):
            for name in child._buffers:
                self.snapshot.entry(child._buffers, name)
            self.snapshot.entry(vars(child), "_scheme")

    def _keep_module(self, module: nn.Module) -> None:
        hooks = module._forward_hooks
        own = any(vars(module).get(name) is not None for name in ("forward", "_compiled_call_impl"))
        if module._forward_pre_hooks or not are_inert(hooks) or own:
            raise NotServed(f"a {type(module).__name__} has hooks, or a forward of its own")
        self.snapshot.module(module)
        self.snapshot.empty(module._forward_pre_hooks)
        if hooks:
            self.snapshot.entries(hooks)
            self.collecting.append(hooks)
        else:
            self.snapshot.empty(hooks)

    def computed(self, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Return the hidden states after the last layer; raises `NotServed` if the op cannot take the call."""
        if self.collecting and collected_outputs():
            raise NotServed(WEIGHTS if collects_weights() else "outputs of the layers are collected")
        arguments = arguments_of(self.different, args, kwargs)
        cache = arguments.get("past_key_values") if any([whole.index for whole in self.different]) else None
        encoder = encoder_of(self.head, arguments, hidden)
        held = cached_by_all(cache, self.first, self.wholes, hidden, encoder)
        if "bias" in self.head and not self.shares_bias and arguments.get(BIAS) is None:
            raise NotServed("every layer makes a bias of the scores of its own")
        seen = held.past if cache is None else cache.get_seq_length(self.first)
        arguments = with_bias(self.wholes[0], self.layers[0], arguments, hidden, held.past, seen)
        keys = held.past + hidden.shape[1]
        inputs: list[Tensor | None] = [None] * (len(self.head) - 1)
        for whole in self.different:
            of_this = [name if name in whole.program.inputs else "" for name in self.head[1:]]
            found = inputs_of(None, whole, of_this, arguments, hidden, keys, self.causal, encoder, held.kept)
            inputs = [mine if other is None else other for mine, other in zip(inputs, found, strict=True)]
        plan, schemes = self._planned(hidden)
        forms = [
            None if tensor is None else (tensor.dtype, tensor.stride(-1)) for tensor in (*inputs, *held.buffers[:1])
        ]
        try:
            if hidden.shape[1] > 1 and not self.snapshot.dtypes_hold():
                raise Outdated("a parameter has another dtype than it had when the layers were looked up")
            out = by_kernels(
                self.judged,
                (schemes, len(held.buffers), *forms),
                hidden=hidden,
                programs=[],
                parameters=[plan],
                inputs=inputs,
                caches=held.buffers,
                past=held.past,
                schemes=schemes,
            )
        except Outdated:
            self.outdated = True
            raise
        held.written()
        return out

    def _planned(self, hidden: Tensor) -> tuple[Tensor, str]:
        """Return the plan, and the schemes of the int8 weights, for rows of this shape and dtype."""
        auto = resolve_scheme("auto", hidden)
        if auto not in self.plans:
            texts = [bound.text(hidden, self.head) for bound in self.bound]
            parameters = [tensor for bound in self.bound for tensor in bound.parameters]
            schemes = [bound.schemes(hidden) for bound in self.bound]
            self.plans[auto] = (
                plan_layers(texts[:1] if len(set(texts)) == 1 else texts, parameters),
                schemes[0] if len(set(schemes)) == 1 else ";".join(schemes),
            )
        return self.plans[auto]
