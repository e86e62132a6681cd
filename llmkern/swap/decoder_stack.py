"""All layers of a decoder in one call of the native library.

At batch 1 the Python around a layer takes about as long as the layer.  So the loop in which a decoder's forward calls
its layers, and of which the source says that nothing else happens in it (llmkern/swap/layer_loop.py), runs over one
element instead, an `Element`.  It computes all layers at once where a guard says that they are what they were, and
calls them one after the other where they are not, or where the call is none for the op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmkern import dispatch
from llmkern.dispatch import implementation
from llmkern.integrations.transformers.attention import WEIGHTS, collected_outputs, collects_weights
from llmkern.nn.int8_linear import Int8Linear
from llmkern.ops.int8_linear import resolve_scheme
from llmkern.registry import static_reason
from llmkern.swap.decoder_forward import (
    OP,
    DecoderParts,
    cache_classes,
    check_call,
    check_updates,
    layer_parameters,
    numbers,
    reserved,
)
from llmkern.swap.edit import Edit
from llmkern.swap.guard import Guard, Path, are_inert, places
from llmkern.swap.layer_loop import LayerLoop
from llmkern.swap.snapshot import Snapshot
from llmkern.swap.whole_layer import NotServed, at, check_guard, layer_mask, scheme_argument, why_not_fused

__all__ = ["FORGETTING", "forget", "one_element"]

_OP = "decoder_layers_"
_KIND = "attention_type"  # a layer's attribute in transformers, by which the decoder chooses its mask
_ELEMENTS = "_llmkern_layers"  # what the loop runs over

_stacks: WeakKeyDictionary[nn.Module, _Stack] = WeakKeyDictionary()


def forget(decoder: nn.Module) -> None:
    """Let go of what is known of its layers, and with it of weights that may be replaced."""
    _stacks.pop(decoder, None)


def forgetting(name: str) -> tuple[str, Callable[..., Any]]:
    """For a swapped class: the method of that name, before which stacks with the module let go of its weights.

    PyTorch may exchange parameters (set_swap_module_params_on_conversion), but only those that nobody else holds.
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.__future__.get_swap_module_params_on_conversion():
            _forget_all_with(self)
        return getattr(self._llmkern_original, name)(self, *args, **kwargs)

    return name, method


def _forget_all_with(module: nn.Module) -> None:
    for decoder, stack in list(_stacks.items()):
        if decoder is module or any(layer is module for layer in stack.layers):
            forget(decoder)


FORGETTING = tuple(map(forgetting, ("_apply", "load_state_dict")))


@functools.cache
def one_element(loop: LayerLoop) -> Edit:
    """The edit of a decoder that calls its layers in this loop."""

    def elements(self: Any) -> Any:
        layers = getattr(self, loop.layers)
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return layers
        element = _element(self, layers, loop)
        return layers if element is None else [element]

    return Edit(renames=((loop.layers, _ELEMENTS),), members=((_ELEMENTS, property(elements)), *FORGETTING))


def _element(decoder: Any, holder: Any, loop: LayerLoop) -> Element | None:
    """The one element for the loop to run over; None where it gives layers different arguments or leaves one out."""
    if type(holder) is not nn.ModuleList:
        return None
    layers, config = tuple(holder._modules.values()), decoder.config
    if loop.counted and config.num_hidden_layers != len(layers):
        return None
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return None
    stack = _stacks.get(decoder)
    if stack is not None and (stack.layers != layers or not stack.holds()):
        forget(decoder)
        stack = None
    if stack is None and (not layers or len({getattr(layer, _KIND, None) for layer in layers}) > 1):
        return None
    return Element(decoder, layers, stack)


class Element:
    """The layers of a decoder, called as one of them is."""

    def __init__(self, decoder: Any, layers: tuple[Any, ...], stack: _Stack | None) -> None:
        self.decoder, self.layers, self.stack = decoder, layers, stack

    @property
    def attention_type(self) -> Any:
        """The kind of all layers, by which transformers 4 chooses their mask."""
        return self.layers[0].attention_type

    def __call__(self, hidden: Tensor, **kwargs: Any) -> Any:
        reason = why_not_fused(self.layers[0], hidden)
        if reason is None:
            try:
                return self._known(hidden, kwargs.get("past_key_values")).computed(hidden, kwargs)
            except NotServed as unserved:
                reason = str(unserved)
        dispatch.record_parts(_OP, "one layer after the other", reason, {"hidden": hidden})
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        return hidden

    def _known(self, hidden: Tensor, cache: Any) -> _Stack:
        if self.stack is None or self.stack.dtype is not hidden.dtype:
            forget(self.decoder)
            # Not for every token: what cannot be served now will hardly be for the next one.
            if hidden.shape[1] == 1 and cache is not None and cache.get_seq_length():
                raise NotServed("nothing is known of the layers yet")
            self.stack = _stacks[self.decoder] = _Stack(self.layers, hidden)
        return self.stack


class _Stack:
    """Layers, and what the op is to be told of them.  `NotServed` where one is not like the others."""

    def __init__(self, layers: tuple[Any, ...], hidden: Tensor) -> None:
        self.layers, self.dtype = layers, hidden.dtype
        self.cls = type(layers[0])
        layer: DecoderParts | None = vars(self.cls).get("_llmkern_layer")  # not of a class from which it is derived
        if layer is None or any(type(each) is not self.cls for each in layers):
            raise NotServed("not every layer is swapped as a whole, or they differ")
        if not self._is_called():
            raise NotServed("the __call__ of the layers was replaced")
        self.serving = implementation(OP, "cpu")
        if reason := static_reason(self.serving, hidden.device, hidden.dtype, grad=False):
            raise NotServed(reason)
        self.layer = layer
        self.guard: Guard = self.cls._llmkern_guard
        self.operator = torch.ops.llmkern.decoder_layers_.default
        planned: list[Tensor | None] = []
        self.schemes: list[tuple[str | None, ...]] = []
        self.joined: dict[str, str] = {}  # the op's argument, by what "auto" means
        self.outdated = False
        self.snapshot = Snapshot()
        self.collecting: list[dict[int, Any]] = []  # hooks that do nothing unless outputs are collected
        found_eps = set()
        for i, each in enumerate(layers):
            check_guard(each)
            parameters, schemes, eps = layer_parameters(each, layer, hidden)
            planned += parameters
            self.schemes.append(schemes)
            found_eps.add(eps)
            self._keep_layer(each)
            if each._modules[layer.attention].layer_idx != i:
                raise NotServed("the layers are not in the order of the cache")
        if len(found_eps) > 1:
            raise NotServed("the layers have different eps")
        self.plan = torch.ops.llmkern.decoder_plan.default(planned)
        self.numbers = numbers(layer, found_eps.pop())

    def holds(self) -> bool:
        """Whether all is as it was when the layers were looked up."""
        known = not self.outdated and self._is_called()
        return known and self.guard.surroundings.hold() and self.snapshot.holds()

    def _is_called(self) -> bool:
        return self.cls.__call__ is nn.Module.__call__

    def _keep_layer(self, layer: Any) -> None:
        self._keep_module(layer)
        if layer.training:
            raise NotServed("a layer is in training mode")
        for name in ("training", _KIND):
            self.snapshot.entry(vars(layer), name)
        self.snapshot.entry(vars(layer._modules[self.layer.attention]), "layer_idx")
        for part in self.guard.parts:
            child = at(layer, part.path)
            if part.path:
                self._keep_child(layer, part.path)
            for held, name in places(child, part):
                if isinstance(held, dict):
                    self.snapshot.entry(held, name)
                else:
                    self.snapshot.attribute(held, name)
        for path in dict.fromkeys([linear.path for linear in self.layer.linears]):
            self._keep_child(layer, path)
        for norm in self.layer.norms:
            if norm is not None and isinstance(norm.eps, str):
                self.snapshot.entry(vars(at(layer, norm.path)), norm.eps)
        for linear in self.layer.linears:
            if linear.rows is not None:  # its rows are views, which do not follow `weight.data = …`
                held = at(layer, linear.path)
                for tensor in (*held._parameters.values(), held._buffers.get("weight_scale")):
                    if tensor is not None:
                        self.snapshot.storage(tensor)

    def _keep_child(self, layer: Any, path: Path) -> None:
        owner, child = at(layer, path[:-1]), at(layer, path)
        self.snapshot.entry(owner._modules, path[-1])
        self._keep_module(child)
        if child._parameters:
            self.snapshot.entries(child._parameters)
        if isinstance(child, Int8Linear):
            self.snapshot.entry(child._buffers, "weight_scale")
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

    def computed(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states after the last layer; `NotServed` where the call is none for the op."""
        if reason := dispatch.why_not_direct(self.serving):
            raise NotServed(reason)
        if self.collecting and collected_outputs():
            raise NotServed(WEIGHTS if collects_weights() else "outputs of the layers are collected")
        cos, sin = check_call(hidden, (), kwargs)
        past, caches, written = self._cached(kwargs.get("past_key_values"), hidden)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            mask = layer_mask(mask, hidden, past + hidden.shape[1])
        arguments = (hidden, cos, sin, caches, past, mask, self.plan, *self.numbers, self._scheme(hidden))
        try:
            out = dispatch.direct(_OP, self.serving, self.operator, arguments, {"hidden": hidden, "mask": mask})
        except RuntimeError as error:
            # `weight.data = …` of another dtype, shape or layout: who computes a layer alone looks for that first.
            # The cache holds what it held, as what has been written to it does not count yet.
            self.outdated = True
            raise NotServed(str(error)) from None
        for advance in written:
            advance()
        return out

    def _scheme(self, hidden: Tensor) -> str:
        auto = resolve_scheme("auto", hidden)
        if auto not in self.joined:
            each = [scheme_argument(schemes, hidden) for schemes in self.schemes]
            self.joined[auto] = each[0] if each.count(each[0]) == len(each) else ";".join(each)
        return self.joined[auto]

    def _cached(self, cache: Any, hidden: Tensor) -> tuple[int, list[Tensor], list[Callable[[], Any]]]:
        """Tokens in the cache, the buffers of all layers, and what to do when the op has written them."""
        if cache is None:
            return 0, [], []
        _, kv_cache, kv_layers = cache_classes()
        held = cache.layers[: len(self.layers)] if type(cache) is kv_cache else ()
        if len(held) != len(self.layers) or not all([type(each) in kv_layers for each in held]):
            raise NotServed("the cache is not a llmkern.KVCache with a layer for each")
        check_updates(cache)
        caches: list[Tensor] = []
        written = []
        forms = set()
        for each in held:
            past, buffers, advance = reserved(each, self.layer, hidden)
            caches += buffers
            written.append(advance)
            forms.add((past, len(buffers)))
        if len(forms) > 1:
            raise NotServed("the cache's layers hold different numbers of tokens, or some of them codes")
        return past, caches, written
