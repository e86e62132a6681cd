"""Attention for transformers' AttentionInterface, and the mask function that goes with it.

Whatever the op cannot do is handed to the implementation that the untouched model uses, with the reason on record
(`llmkern.explain`; an error under LLMKERN_STRICT=1): dropout, returned attention weights, a paged cache, and any
argument that a future transformers may add.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from llmkern import dispatch, ops
from llmkern.swap.derive import mentioned_globals, original_class, rebind
from llmkern.swap.surroundings import why_untouched

__all__ = [
    "HARMLESS",
    "INTERFACE",
    "NAME",
    "WEIGHTS",
    "attention_forward",
    "collected_outputs",
    "collects_weights",
    "interface",
    "mask_functions",
    "register_once",
    "registered_places",
    "skipping_mask",
    "why_collected",
    "why_registered",
]

NAME = "llmkern"
"""The name under which `register_once` makes the attention known to transformers."""

# What a model passes along with every call and attention has no use for, or has used already to build the mask.
HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The global by which transformers' attention modules look their function up."""

_MASKS = "ALL_MASK_ATTENTION_FUNCTIONS"  # the same for functions that make masks

WEIGHTS = "the attention weights are asked for (output_attentions), and a fused kernel has none"

_collector: Any = None  # transformers 5's context variable of outputs being collected


@functools.cache
def register_once() -> None:
    """Make `NAME` known to transformers: one entry in two registries, which nothing uses unless it is asked for."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    global _collector
    with contextlib.suppress(ImportError):  # transformers 4 passes output_attentions to every module instead
        from transformers.utils.output_capturing import _active_collector as _collector
    AttentionInterface.register(NAME, attention_forward)
    # Boolean masks with broadcast strides, and none at all where `causal` says it: what the op takes.
    AttentionMaskInterface.register(NAME, sdpa_mask)


class _Interface:
    """An interface of transformers in which one name stands for another function."""

    def __init__(self, theirs: Any, name: str, function: Callable[..., Any]) -> None:
        self.theirs, self.name, self.function = theirs, name, function

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        found: Callable[..., Any] = self.function if name == self.name else self.theirs.get_interface(name, default)
        return found

    def __getitem__(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = self.function if name == self.name else self.theirs[name]
        return found

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.theirs, attribute)


def interface(forward: Callable[..., Any], name: str, none_may_be_causal: bool) -> Any:
    """The AttentionInterface for a module with this forward: `name` stands for `attention_forward`.

    none_may_be_causal: whether no mask stands for a causal one where the module says that it is causal, as under sdpa.
        Under eager attention it means that every key is seen.
    """
    function = partial(attention_forward, none_may_be_causal=none_may_be_causal)
    return _Interface(mentioned_globals(forward)[INTERFACE], name, function)


def mask_functions(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """Return transformers' mask functions, by the names of the globals that the module's forward mentions."""
    found = mentioned_globals(type(module).forward)
    return {name: each for name, each in found.items() if callable(each) and _MASKS in mentioned_globals(each)}


@functools.cache
def skipping_mask(function: Callable[..., Any], causal: bool) -> Callable[..., Any]:
    """Return one of these functions, with sdpa's masks for a model under eager attention.

    causal: whether a causal mask may be left out: where attentions know that they are causal.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    theirs = mentioned_globals(function)[_MASKS]

    def make(*args: Any, **kwargs: Any) -> Any:
        registered = theirs["eager"]
        if registered is not eager_mask:  # the program's own
            return registered(*args, **kwargs)
        if not causal:
            kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, **kwargs)

    made: Callable[..., Any] = rebind(function, _MASKS, _Interface(theirs, "eager", make))
    return made


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    none_may_be_causal: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: q [B, Hq, Sq, D], k/v [B, Hkv, Skv, D] → ([B, Sq, Hq, D], weights or None).

    none_may_be_causal: as of `interface`; all other arguments are those of transformers.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # As in transformers: a mask says everything, and a single query sees all the keys that it is given.
    causal = causal and attention_mask is None and query.shape[2] > 1 and none_may_be_causal
    reason = _beyond_the_op(module, query, key, value, attention_mask, dropout, causal, sliding_window, softcap, kwargs)
    if reason is not None:  # with all arguments as they came: a paged cache has not even seen the new keys yet
        arguments = {
            "dropout": dropout,
            "scaling": scaling,
            "is_causal": is_causal,
            "sliding_window": sliding_window,
            "softcap": softcap,
            "s_aux": s_aux,
            "position_bias": position_bias,
        }
        given = {k: v for k, v in arguments.items() if v is not None}
        return _untouched(module, query, key, value, attention_mask, causal, reason, given | kwargs)
    if torch.is_autocast_enabled(query.device.type):
        # What autocast does for scaled_dot_product_attention.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[2]:
        attention_mask = attention_mask[..., : key.shape[2]]  # transformers 4 prepares one mask for a longer cache
    if causal and key.shape[2] > query.shape[2]:
        # Prefill into a static cache: without a mask the first query sits at the first key, and the slots after
        # the last query are empty.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        attention_mask = _biased(position_bias, attention_mask)
    out = ops.attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        causal=causal,
        sm_scale=scaling,
        window=sliding_window if causal else None,
        softcap=softcap,
        sinks=s_aux if s_aux is None else s_aux.to(query.dtype),
    )
    return out.transpose(1, 2), None


def _beyond_the_op(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Return why the op cannot serve this call, or None."""
    if dropout > 0.0 and module.training:
        return f"attention dropout is {dropout} in training"
    # transformers 5 collects through hooks on the module, so that without one there is nothing to ask.
    if kwargs.get("output_attentions") or (module._forward_hooks and collects_weights()):
        return WEIGHTS
    named = module.config._attn_implementation  # type: ignore[union-attr]
    if softcap is not None and named == "sdpa":
        return "the untouched model leaves out softcap under sdpa; load it with attn_implementation='eager'"
    autocast = torch.is_autocast_enabled(query.device.type)
    if not (autocast or query.dtype == key.dtype == value.dtype) or query.shape[0] != key.shape[0]:
        return "queries, keys and values differ in dtype or batch size"
    for name, argument in () if HARMLESS.issuperset(kwargs) else kwargs.items():
        # A False may mean something; that of output_attentions does not.
        if argument is not None and name not in HARMLESS and name != "output_attentions":
            return f"the model passes {name}, which llmkern does not know"
    windowed = sliding_window is not None and named != "eager"  # where the mask alone says it
    if attention_mask is None and not causal and windowed and query.shape[2] > 1:
        return "a window without a mask is only defined for causal attention"
    if reason := why_untouched() or why_registered(original_class(module).forward, _named(module)):
        return reason
    if named == "eager" and query.requires_grad and not torch.compiler.is_compiling():
        call: dict[str, Any] = {"q": query, "k": key, "v": value, "attn_mask": attention_mask, "key_padding_mask": None}
        call |= {"sinks": None, "causal": causal, "sm_scale": 1.0, "window": [-1, -1], "softcap": softcap or 0.0}
        if not dispatch.select("attention", call | {"return_lse": False}).backend.kernels:
            return "gradients through eager attention can be differentiated again, through PyTorch's fused kernel not"
        if attention_mask is not None and _blind(attention_mask):
            return "under eager attention a query that sees no key gets the mean of all values, which a loss may read"
    return None


_BLIND = WeakTensorKeyDictionary()  # masks, which the layers of a model share, by whether a query sees no key


def _blind(mask: Tensor) -> bool:
    """Return True if a query of this mask, True where it may look, sees no key.  Waits for the device once a mask."""
    if mask.dtype != torch.bool:
        return False
    if mask not in _BLIND:
        _BLIND[mask] = not bool(mask.any(-1).all())
    return _BLIND[mask]


def _named(module: nn.Module) -> Any:
    """Return the attention that the untouched model uses: eager if it was given ours by name."""
    name = module.config._attn_implementation  # type: ignore[union-attr]
    return "eager" if name == NAME else name


def why_registered(forward: Callable[..., Any], name: str) -> str | None:
    """Return a sentence if the function that a module with this forward looks up under that name is not transformers'
    own; None if it is.
    """
    local, everywhere = _registries(forward)
    function = local.get(name) or everywhere.get(name)
    if function is None or function is _own_functions().get(name):
        return None
    return f"the attention function registered as {name!r} is not the one of transformers"


def registered_places(attention: Any) -> tuple[tuple[dict[str, Any], str, str], ...]:
    """Return the registry entries where that function is, or would be, stored: for a guard
    (llmkern/swap/surroundings.py).
    """
    name = attention.config._attn_implementation
    shown = f"the attention function registered as {name!r}"
    return tuple([(registry, name, shown) for registry in _registries(original_class(attention).forward)])


@functools.cache
def _registries(forward: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names and functions: those of the module's file alone, and those for all."""
    interface = mentioned_globals(forward)[INTERFACE]
    return interface._local_mapping, type(interface)._global_mapping


@functools.cache
def _own_functions() -> dict[str, Callable[..., Any]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return {"sdpa": sdpa_attention_forward}


def collects_weights() -> bool:
    """Return True if transformers 5 is collecting what attention modules return: models need not pass that on."""
    return any("attentions" in name for name in collected_outputs())


def why_collected() -> str | None:
    """Return a sentence if what transformers 5 is collecting comes from within layers, or None."""
    if collects_weights():
        return WEIGHTS
    within = [name for name in collected_outputs() if "hidden_states" not in name]
    return f"the model collects {within[0]}" if within else None


def collected_outputs() -> Collection[str]:
    """Return the names of what transformers 5 is collecting from modules' outputs."""
    return (None if _collector is None else _collector.get()) or ()


def _biased(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """Combine a relative position bias and the model's mask into one additive mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask


def _untouched(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    reason: str,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Make the call as the model without llmkern would."""
    # sdpa has no weights to return; eager attention does.
    name = "eager" if reason == WEIGHTS else _named(module)
    dispatch.record_fallback("attention", f"transformers {name}", reason, {"q": query, "k": key})
    interface = mentioned_globals(original_class(module).forward)
    eager = interface.get("eager_attention_forward")
    if name == "eager" and eager is not None and name not in interface[INTERFACE]:
        return eager(module, query, key, value, _additive(mask, causal, query, key), **arguments)
    function: Callable[..., Any] = interface[INTERFACE][name]
    return function(module, query, key, value, mask, **arguments)


def _additive(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """Return the mask that eager attention adds to the scores: 0 and the most negative number."""
    if mask is None:
        if not causal:
            return None
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=query.dtype, device=query.device), torch.finfo(query.dtype).min)
