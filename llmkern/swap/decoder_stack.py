"""All layers of a decoder in one call of the native library, where the model could not tell the difference.

At batch 1 the Python around a layer takes about as long as the layer.  So the decoder's forward announces that its
layers are about to be called (`announcing`), in a loop of which the source says that nothing else happens in it.  The
first layer then computes all of them, and the others return what they are given.  What that takes is looked up once
(`_Stack`) and compared at each call with what the modules hold, hooks, classes and tensors, by identity.  Whatever is
not as it was is looked up again, and whatever cannot be served is left to the layers themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from operator import getitem, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmkern.dispatch import implementation, unwatched
from llmkern.integrations.transformers.attention import collected_outputs
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
    running,
)
from llmkern.swap.guard import Guard, Path, are_inert, places
from llmkern.swap.layer_loop import LayerLoop, layer_loop
from llmkern.swap.whole_layer import Unserved, at, check_guard, layer_mask, scheme_argument

__all__ = ["FORGETTING", "announcing", "forget"]

_MASKS = "the layers have different masks"
_KIND = "attention_type"  # a layer's attribute in transformers, by which the decoder chooses its mask

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


def announcing(forward: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a decoder, which lets its layers be computed together where `original`, whose code it runs, calls
    them in a plain loop."""
    loop = layer_loop(original)
    if loop is None:
        return forward

    @functools.wraps(forward)
    def announced(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not unwatched():
            return forward(self, *args, **kwargs)
        before, run = running.run, _Run(self, loop)
        running.run = run
        try:
            out = forward(self, *args, **kwargs)
        finally:
            running.run = before
        run.check_all_called()
        return out

    return announced


class _Run:
    """One call of a decoder's forward (`llmkern.swap.decoder_forward.Run`)."""

    def __init__(self, decoder: Any, loop: LayerLoop) -> None:
        self.decoder, self.loop = decoder, loop
        self.asked = False
        self.left: Iterator[nn.Module] | None = None  # the layers that have been computed but not called yet
        self.result: Tensor | None = None
        self.given: tuple[Any, ...] = ()

    def served(self, layer: Any, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        given = (kwargs.get("attention_mask"), kwargs.get("position_embeddings"), kwargs.get("past_key_values"))
        if self.left is not None:
            expected = next(self.left, None)
            if expected is None:  # all have been called: this is another layer, or the loop once more
                return None
            if layer is not expected or hidden is not self.result or not all(map(is_, given, self.given)):
                raise self._otherwise()
            return hidden
        if self.asked:
            return None
        self.asked = True
        try:
            stack = self._stack(layer, hidden, given[2])
            self.result = stack.computed(hidden, args, kwargs)
        except Unserved:
            return None
        self.given, self.left = given, iter(stack.layers[1:])
        return self.result

    def check_all_called(self) -> None:
        """Raises RuntimeError where layers were computed that the decoder has not called, or not by our forward."""
        if self.left is not None and next(self.left, None) is not None:
            raise self._otherwise()

    def _otherwise(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self.decoder).__name__} calls its layers otherwise than its source says, after they were "
            "computed together; optimize_(model, kv_cache=None) keeps them apart"
        )

    def _stack(self, first: Any, hidden: Tensor, cache: Any) -> _Stack:
        holder = self.decoder._modules.get(self.loop.layers)
        if type(holder) is not nn.ModuleList:
            raise Unserved("the layers are in no plain ModuleList")
        layers = tuple(holder._modules.values())
        config: Any = self.decoder.config
        if len(set(getattr(config, "layer_types", None) or ())) > 1:
            raise Unserved(_MASKS)
        if layers[:1] != (first,) or (self.loop.counted and config.num_hidden_layers != len(layers)):
            raise Unserved("another layer is the first, or not all are to be called")
        stack, thorough = _stacks.get(self.decoder), hidden.shape[1] > 1
        if (
            stack is None
            or stack.layers != layers
            or stack.dtype is not hidden.dtype
            or not stack.guard.surroundings.hold()
            or stack.watch.has_changed(thorough)
        ):
            # Not for every token: what cannot be served now will hardly be for the next one.
            _stacks.pop(self.decoder, None)
            if not thorough and cache is not None and cache.get_seq_length():
                raise Unserved("nothing is known of the layers yet")
            stack = _stacks[self.decoder] = _Stack(layers, hidden)
        if stack.watch.inert and collected_outputs():
            raise Unserved("outputs are collected")
        return stack


class _Stack:
    """Layers, and what the op is to be told of them.  `Unserved` where one is not like the others."""

    def __init__(self, layers: tuple[Any, ...], hidden: Tensor) -> None:
        self.layers, self.dtype = layers, hidden.dtype
        self.cls = type(layers[0])
        layer: DecoderParts | None = vars(self.cls).get("_llmkern_layer")  # not of a class from which it is derived
        if layer is None or any(type(each) is not self.cls for each in layers):
            raise Unserved("not every layer is swapped as a whole, or they differ")
        if reason := static_reason(implementation(OP, "cpu"), hidden.device, hidden.dtype, grad=False):
            raise Unserved(reason)
        self.layer = layer
        self.guard: Guard = self.cls._llmkern_guard
        self.operator = torch.ops.llmkern.decoder_layers_.default
        planned: list[Tensor | None] = []
        self.schemes: list[tuple[str | None, ...]] = []
        self.joined: dict[str, str] = {}  # the op's argument, by what "auto" means
        self.watch = _Watch()
        found_eps = set()
        for i, each in enumerate(layers):
            check_guard(each)
            parameters, schemes, eps = layer_parameters(each, layer, hidden)
            planned += parameters
            self.schemes.append(schemes)
            found_eps.add(eps)
            self._watch_layer(each)
            if each._modules[layer.attention].layer_idx != i:
                raise Unserved("the layers are not in the order of the cache")
        if len(found_eps) > 1:
            raise Unserved("the layers have different eps")
        if len({vars(each).get(_KIND) for each in layers}) > 1:
            raise Unserved(_MASKS)
        self.plan = torch.ops.llmkern.decoder_plan.default(planned)
        self.numbers = numbers(layer, found_eps.pop())

    def _watch_layer(self, layer: Any) -> None:
        parts = self.layer
        self.watch.module(layer)
        if layer.training:
            raise Unserved("a layer is in training mode")
        for name in ("training", _KIND):
            self.watch.same(vars(layer), name)
        self.watch.same(vars(layer._modules[parts.attention]), "layer_idx")
        for part in self.guard.parts:
            child = at(layer, part.path)
            if part.path:
                self._watch_child(layer, part.path)
            for held, name in places(child, part):
                self.watch.same(held, name)
        for path in dict.fromkeys([linear.path for linear in parts.linears]):
            self._watch_child(layer, path)
        for norm in parts.norms:
            if norm is not None and isinstance(norm.eps, str):
                self.watch.same(vars(at(layer, norm.path)), norm.eps)
        for linear in parts.linears:
            if linear.rows is not None:  # its rows are views, which do not follow `weight.data = …`
                held = at(layer, linear.path)
                for tensor in (*held._parameters.values(), held._buffers.get("weight_scale")):
                    if tensor is not None:
                        self.watch.storage(tensor)

    def _watch_child(self, layer: Any, path: Path) -> None:
        owner, child = at(layer, path[:-1]), at(layer, path)
        self.watch.same(owner._modules, path[-1])
        self.watch.module(child)
        for name in child._parameters:
            self.watch.same(child._parameters, name)
        if isinstance(child, Int8Linear):
            self.watch.same(child._buffers, "weight_scale")
            self.watch.same(vars(child), "_scheme")

    def computed(self, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        cos, sin = check_call(hidden, args, kwargs)
        past, caches, written = self._cached(kwargs.get("past_key_values"), hidden)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            mask = layer_mask(mask, hidden, past + hidden.shape[1])
        try:
            with torch._C._AutoDispatchBelowAutograd():
                out: Tensor = self.operator(
                    hidden, cos, sin, caches, past, mask, self.plan, *self.numbers, self._scheme(hidden)
                )
        except RuntimeError as error:
            # `weight.data = …` of another dtype, shape or layout: who computes a layer alone looks for that first.
            # The cache holds what it held, as what has been written to it does not count yet.
            self.watch.outdated = True
            raise Unserved(str(error)) from None
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
            raise Unserved("the cache is not a llmkern.KVCache with a layer for each")
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
            raise Unserved("the cache's layers hold different numbers of tokens, or some of them codes")
        return past, caches, written


class _Watch:
    """What must be as it was for a `_Stack` to hold."""

    def __init__(self) -> None:
        self.outdated = False
        self.modules: list[nn.Module] = []
        self.classes: list[type[nn.Module]] = []
        self.states: list[dict[str, Any]] = []
        self.lengths: list[int] = []
        self.handles = -1
        self.hooks: list[Any] = []
        self.inert: list[Any] = []
        self.places: tuple[list[Any], list[str], list[Any]] = [], [], []
        self.absent: list[tuple[dict[str, Any], str]] = []
        self.configs: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self.views: list[tuple[Tensor, tuple[Any, ...]]] = []

    def module(self, module: nn.Module) -> None:
        """Its class, and that it has no hooks but those that do nothing unless outputs are collected."""
        self.modules.append(module)
        self.classes.append(type(module))
        self.states.append(vars(module))
        if module._forward_pre_hooks or not are_inert(module._forward_hooks) or _has_own_call(vars(module)):
            raise Unserved(f"a {type(module).__name__} has hooks, or a forward of its own")
        (self.inert if module._forward_hooks else self.hooks).append(module._forward_hooks)
        self.hooks.append(module._forward_pre_hooks)

    def same(self, held: Any, name: str) -> None:
        """held[name] is the same object, or still absent; held.name where it is no dictionary, but a config that many
        share."""
        if not isinstance(held, dict):
            self.configs[id(held), name] = held, name, getattr(held, name, None)
            return
        if name not in held:
            self.absent.append((held, name))
            return
        for column, entry in zip(self.places, (held, name, held[name]), strict=True):
            column.append(entry)

    def storage(self, tensor: Tensor) -> None:
        """The tensor lies where it lay, as it did."""
        self.views.append((tensor, _place(tensor)))

    def has_changed(self, thorough: bool) -> bool:
        """Whether something is not as it was.  At every token thousands of objects would have to come from memory, so
        that hooks are looked at when torch has given out another handle of one, and attributes when there are more
        or fewer; thorough: in any case."""
        if self.outdated:
            return True
        handles, lengths = RemovableHandle.next_id, list(map(len, self.states))
        if thorough or handles != self.handles or lengths != self.lengths:
            if any(map(_has_own_call, self.states)) or any(self.hooks) or not all(map(are_inert, self.inert)):
                return True
            if any([name in held for held, name in self.absent]):
                return True
            self.handles, self.lengths = handles, lengths
        held, names, objects = self.places
        try:
            return (
                list(map(type, self.modules)) != self.classes
                or not all(map(is_, map(getitem, held, names), objects))
                or any([getattr(config, name, None) is not value for config, name, value in self.configs.values()])
                or any([_place(tensor) != place for tensor, place in self.views])
            )
        except KeyError:
            return True


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _has_own_call(state: dict[str, Any]) -> bool:
    """Whether a module with these attributes runs something else than its class's forward when it is called."""
    return "forward" in state or state.get("_compiled_call_impl") is not None
