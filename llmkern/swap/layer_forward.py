"""Forward of a layer that is swapped as a whole: one op if possible, otherwise the layer's own forward.

All is looked up at the call: who keeps nothing lets weights go that are taken away between two calls (offloading).  A
decoder's or an encoder's layers are computed together where they can be (llmkern/swap/layer_stack.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern import dispatch
from llmkern.swap.bound import Bound
from llmkern.swap.layer_caches import cached_by_one
from llmkern.swap.whole_layer import (
    OP,
    NotServed,
    Outdated,
    WholeLayer,
    arguments_of,
    check_guard,
    encoder_of,
    inputs_of,
    none_is_causal,
    run_parts,
    tokens_of,
    why_not_fused,
    with_bias,
)

__all__ = ["by_kernels", "forward"]


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    hidden: Any = args[0] if args else None
    reason = why_not_fused(self, hidden) if isinstance(hidden, Tensor) else "it is called without hidden states first"
    if reason is None:
        try:
            return _whole(self, self._llmkern_layer, hidden, args[1:], kwargs)
        except NotServed as unserved:
            reason = str(unserved)
    return run_parts(self, reason, args, kwargs)


def _whole(self: Any, whole: WholeLayer, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    check_guard(self)
    arguments = arguments_of((whole,), args, kwargs)
    bound = Bound(whole.program, self, hidden.dtype, whole.packed)
    cache = arguments.get("past_key_values") if whole.index else None
    index, head = whole.place(self), whole.program.inputs
    encoder = encoder_of(head, arguments, hidden)
    held = cached_by_one(cache, index, whole, hidden, encoder)
    seen = held.past if cache is None else cache.get_seq_length(index)
    arguments = with_bias(whole, self, arguments, hidden, held.past, seen)
    handed = whole.hands_on(arguments, hidden, tokens_of(encoder, held.kept))
    keys = held.past + hidden.shape[1]
    causal = arguments.get("attention_mask") is not None or none_is_causal(self, whole)
    out = by_kernels(
        None,
        None,
        hidden=hidden,
        programs=[bound.text(hidden, head)],
        parameters=bound.parameters,
        inputs=inputs_of(self, whole, head[1:], arguments, hidden, keys, causal, encoder, held.kept),
        caches=held.buffers,
        past=held.past,
        schemes=bound.schemes(hidden),
    )
    held.written()
    return out if handed is None else (out, *handed)


def by_kernels(judged: dict[Any, Any] | None, form: Any, **call: Any) -> Tensor:
    """Call `layers_`, whose arguments are known to be valid.  Raises `NotServed` if no kernel takes the call,
    `Outdated` if the native library finds that parameters have changed.  judged, form: see `dispatch_to_kernels`.
    If it raises, the cache is unchanged: tokens that were already written to it do not count.

    A cache holds what it held where that is so: what has been written to it does not count yet."""
    try:
        out: Tensor = dispatch.dispatch_to_kernels(OP, call, judged, form)
    except dispatch.Refused as refused:
        raise NotServed(str(refused)) from None
    except RuntimeError as error:
        raise Outdated(str(error)) from None
    return out
