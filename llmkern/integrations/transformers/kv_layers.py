"""The layers of `KVCache`, whose steps never copy the past.

transformers' DynamicCache concatenates: each token copies every key and value before it.  Here each layer holds
buffers with room to spare, [B, Hkv, capacity, D], writes new tokens behind the last one, and doubles the capacity
when it is full, so that a token is copied about once however long the sequence grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llmkern import ops
from llmkern.checks import check_shape
from llmkern.transforms import is_transformed

__all__ = ["Int8KVLayer", "Int8SlidingKVLayer", "KVLayer", "SlidingKVLayer"]

_LEAST_CAPACITY = 64
_TOKENS = 2  # the dimension of the tokens in keys, values and scales


class KVLayer(DynamicLayer):
    """Keys and values of one layer with full attention.

    For a kernel that reads and writes the buffers itself: the slots `begin` to `end` of `k_buffer`
    [B, Hkv, capacity, D] and `v_buffer` [B, Hkv, capacity, Dv] hold the tokens in order.  `reserve(n)` makes room
    and may replace the buffers; write the slots end … end + n; then `advance(n)`.  There are buffers from the first
    update on, or after `lazy_initialization` with states of no tokens (the cache's `early_initialization`).
    """

    # A layer usually owns its buffers and writes to them in place.  It does not where others may hold the same
    # tensors: autograd has saved them, or somebody has assigned `keys` or `values`.  The buffers are then exactly the
    # keys and values, and are replaced instead of written, by the methods of transformers' layer.

    _PLAIN: type[DynamicLayer] = DynamicLayer
    _buffers: tuple[Tensor, ...]

    def __init__(self, **kwargs: Any) -> None:
        self._share(())
        super().__init__(**kwargs)

    @property
    def k_buffer(self) -> Tensor:
        return self._buffers[0]

    @property
    def v_buffer(self) -> Tensor:
        return self._buffers[1]

    @property
    def capacity(self) -> int:
        """Number of slots of the buffers, 0 before there are any."""
        return self._buffers[0].shape[_TOKENS] if self._buffers else 0

    @property
    def length(self) -> int:
        """Tokens in the buffers: of a sliding layer, those that the next one may see."""
        return self.end - self.begin

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, length, D], None before there are any."""
        return self._decode(self.begin)[0] if self._buffers else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign(0, value)

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, length, Dv], None before there are any."""
        return self._decode(self.begin)[1] if self._buffers else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign(1, value)

    def get_seq_length(self) -> int:
        """Tokens that the layer has seen."""
        return self.length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Take dtype, device, batch and heads from the states, and none of their tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        states = (key_states, key_states if value_states is None else value_states)
        self._own(self._encode(*[s.new_empty((*s.shape[:_TOKENS], 0, s.shape[-1])) for s in states]), 0, 0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states [B, Hkv, n, D]; returns all keys and values that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._must_concatenate(key_states, value_states):
            self._share(self._held())
            return super().update(key_states, value_states, *args, **kwargs)
        return self._decode(self._append(key_states, value_states))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens; buffers that are too small are replaced by larger ones.

        Raises RuntimeError before there are buffers.
        """
        if not self._buffers:
            raise RuntimeError("reserve: the layer has no buffers yet; update or initialize it first")
        if not self._owned or self.end + tokens > self.capacity or _only_for_inference(self._buffers[0]):
            capacity = 1 << max(self.length + tokens, _LEAST_CAPACITY - 1).bit_length()
            self._move(self._buffers[0].shape[0], capacity, lambda held, place: place.copy_(held))

    def advance(self, tokens: int) -> None:
        """Declare that the slots of the next `tokens` tokens have been written."""
        self.end += tokens

    def reset(self) -> None:
        """Forget everything, batch size and dtype included."""
        self._share(())
        self.is_initialized = False

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens; `tokens` means what it means in transformers' layer of the installed version."""
        if not self._owned:
            return super().crop(tokens)
        # That layer itself says what is left, of stand-ins with as many tokens and hardly any data.
        plain: Any = object.__new__(self._PLAIN)
        stand_in = torch.empty(1, 1, self.length, 1)
        vars(plain).update({**vars(self), "keys": stand_in, "values": stand_in})
        plain.crop(tokens)
        self._forget(self.get_seq_length() - plain.get_seq_length(), plain.keys.shape[_TOKENS])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make sequence i what sequence `beam_idx[i]` was."""
        if self._owned:
            self._gather(beam_idx)
        else:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times in a row."""
        if self._owned:
            self._gather(torch.arange(self.k_buffer.shape[0]).repeat_interleave(repeats))
        else:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these sequences; anything that indexes a dimension."""
        if self._owned:
            self._gather(torch.arange(self.k_buffer.shape[0])[torch.as_tensor(indices).cpu()])
        else:
            super().batch_select_indices(indices)

    def offload(self) -> None:
        self._buffers = tuple([buffer.to("cpu", non_blocking=True) for buffer in self._buffers])

    def prefetch(self) -> None:
        if self.is_initialized:
            self._buffers = tuple([buffer.to(self.device, non_blocking=True) for buffer in self._buffers])

    def __getstate__(self) -> dict[str, Any]:
        """Leave spare capacity out of copies and pickles."""
        state = dict(vars(self))
        if self._owned:
            state |= {"_buffers": tuple([held.clone() for held in self._held()]), "begin": 0, "end": self.length}
        return state

    def _own(self, buffers: tuple[Tensor, ...], begin: int, end: int) -> None:
        self._buffers, self.begin, self.end, self._owned = buffers, begin, end, True

    def _share(self, buffers: tuple[Tensor, ...]) -> None:
        end = buffers[0].shape[_TOKENS] if buffers else 0
        self._buffers, self.begin, self.end, self._owned = buffers, 0, end, False

    def _held(self) -> tuple[Tensor, ...]:
        """Return the part of the buffers that holds tokens."""
        if not self._owned:
            return self._buffers
        return tuple([buffer.narrow(_TOKENS, self.begin, self.length) for buffer in self._buffers])

    def _assign(self, index: int, value: Tensor | None) -> None:
        if value is None:
            self._share(())
            return
        held = list(self._held()) or [value[:, :, :0], value[:, :, :0]]
        held[index] = value
        self._share(tuple(held))

    def _must_concatenate(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Return True if the update has to concatenate: autograd may save what earlier updates returned, and other
        forms of states need torch.cat's rules and errors.
        """
        k, v = self._buffers
        other_form = key_states.shape[:_TOKENS] != k.shape[:_TOKENS] or key_states.dtype != k.dtype
        follows = torch.is_grad_enabled() or (not torch.compiler.is_compiling() and is_transformed())
        return follows or other_form or value_states.dtype != v.dtype

    def _append(self, key_states: Tensor, value_states: Tensor) -> int:
        """Write the states behind the last token; returns the first slot that the new tokens may see."""
        new = key_states.shape[_TOKENS]
        self.reserve(new)
        for buffer, states in zip(self._buffers, self._encode(key_states, value_states), strict=True):
            buffer.narrow(_TOKENS, self.end, new).copy_(states)
        first = self._first_seen()
        self.advance(new)
        return first

    def _first_seen(self) -> int:
        """Return the slot of the oldest token that the next one may see."""
        return self.begin

    def _forget(self, newest: int, left: int) -> None:
        self.end -= newest
        self.begin = self.end - left

    def _encode(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, ...]:
        """Encode these states as the buffers hold them."""
        return key_states, value_states

    def _decode(self, first: int) -> tuple[Tensor, Tensor]:
        """Return keys and values from the slot `first` on."""
        k, v = self._buffers
        if not self._owned:
            return k, v
        return k.narrow(_TOKENS, first, self.end - first), v.narrow(_TOKENS, first, self.end - first)

    def _gather(self, sequences: Tensor) -> None:
        index = sequences.to(self._buffers[0].device)
        self._move(index.numel(), self.capacity, lambda held, place: torch.index_select(held, 0, index, out=place))

    def _move(self, batch: int, capacity: int, fill: Callable[[Tensor, Tensor], Any]) -> None:
        """New buffers of these sizes; `fill` is given what each old one holds and the place for it in the new one."""
        moved = []
        for held in self._held():
            buffer = held.new_empty((batch, held.shape[1], capacity, *held.shape[_TOKENS + 1 :]))
            fill(held, buffer.narrow(_TOKENS, 0, self.length))
            moved.append(buffer)
        self._own(tuple(moved), 0, self.length)


class SlidingKVLayer(KVLayer, DynamicSlidingWindowLayer):
    """Keys and values of one layer with a sliding or chunked window: those that the next token may see.

    As in transformers, an update returns the window − 1 tokens before the new ones, and the new ones.  Older tokens
    stay in the buffers until these are replaced.
    """

    _PLAIN = DynamicSlidingWindowLayer

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        super().lazy_initialization(key_states, value_states)
        if hasattr(self, "_sliding_window_tensor"):  # transformers 5
            self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        past, new = self.sliding_window - 1, key_states.shape[_TOKENS]
        if torch.is_grad_enabled() or self._records() or self.cumulative_length or new <= past:
            return super().update(key_states, value_states, *args, **kwargs)
        # A prompt longer than the window: it sees all of itself, and its end is what stays.
        super().update(key_states[:, :, -past:], value_states[:, :, -past:], *args, **kwargs)
        self.cumulative_length = new
        return key_states, value_states

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        self.cumulative_length += tokens
        if not self._records():
            self.begin = self._first_seen()

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0

    def _forget(self, newest: int, left: int) -> None:
        super()._forget(newest, left)
        self.cumulative_length -= newest

    def _records(self) -> bool:
        """Return True if tokens are kept for a crop to go back to (transformers 5)."""
        return getattr(self, "record_past", False)

    def _first_seen(self) -> int:
        return max(self.begin, self.end - (self.sliding_window - 1))


class Int8KVLayer(KVLayer):
    """A KVLayer of codes (s8) and one fp32 scale per head and token; the buffers are k, v, k_scale and v_scale.

    A key is its codes times its scale, to half a step of 1/127 of its largest value.  Kernels that read codes take the
    buffers; for all others each update computes every key and value that is seen, in the dtype of the first states:
    that reads 1 byte and writes a whole number for each, more than DynamicCache's copying writes.
    The first states of an empty layer are returned as they were given.
    Raises RuntimeError for states that need a gradient, ValueError for another batch size, heads or head dim than
    before, AttributeError where somebody assigns keys or values.
    """

    @property
    def k_scale_buffer(self) -> Tensor:
        """fp32 [B, Hkv, capacity]."""
        return self._buffers[2]

    @property
    def v_scale_buffer(self) -> Tensor:
        """fp32 [B, Hkv, capacity]."""
        return self._buffers[3]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("KVCache: int8 codes carry no gradient; use torch.no_grad(), or a cache without dtype")
        empty = not self.length
        seen = super().update(key_states, value_states, *args, **kwargs)
        return (key_states, value_states) if empty else seen

    def _assign(self, index: int, value: Tensor | None) -> None:
        if value is not None:
            raise AttributeError("keys and values of an int8 KVCache are codes, which only update() writes")
        self._share(())

    def _must_concatenate(self, key_states: Tensor, value_states: Tensor) -> bool:
        for name, states, codes in (("key", key_states, self.k_buffer), ("value", value_states, self.v_buffer)):
            fixed = (*codes.shape[:_TOKENS], states.shape[_TOKENS], codes.shape[-1])
            check_shape("KVCache", f"{name}_states", states, fixed)
        return False

    def _encode(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, ...]:
        (k, k_scale), (v, v_scale) = ops.quantize_int8(key_states), ops.quantize_int8(value_states)
        return k, v, k_scale.squeeze(-1), v_scale.squeeze(-1)

    def _decode(self, first: int) -> tuple[Tensor, Tensor]:
        k, v, k_scale, v_scale = [b.narrow(_TOKENS, first, self.end - first) for b in self._buffers]
        return (k * k_scale[..., None]).to(self.dtype), (v * v_scale[..., None]).to(self.dtype)


class Int8SlidingKVLayer(Int8KVLayer, SlidingKVLayer):
    """A SlidingKVLayer of int8 codes, as `Int8KVLayer`."""


def _only_for_inference(buffer: Tensor) -> bool:
    """Return True if it was made in inference mode and we are outside of it: it then cannot be written (nor traced)."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return buffer.is_inference()
