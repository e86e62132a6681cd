"""State shared by layers that are computed as a whole, and the checks of each call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern import dispatch
from llmkern.checks import PLAIN_TENSORS
from llmkern.integrations.transformers.attention import INTERFACE, WEIGHTS
from llmkern.programs.program import Program
from llmkern.swap.edit import edits_of
from llmkern.swap.guard import Path
from llmkern.swap.surroundings import why_hooks_for_all, why_untouched

__all__ = [
    "ALIASES",
    "BIAS",
    "MAKES_BIAS",
    "OP",
    "NotServed",
    "Outdated",
    "WholeLayer",
    "arguments_of",
    "at",
    "check_guard",
    "encoder_of",
    "inputs_of",
    "none_is_causal",
    "run_parts",
    "tokens_of",
    "why_not_fused",
    "with_bias",
]

OP = "layers_"
BIAS, MAKES_BIAS = "position_bias", "compute_bias"
"""The argument that is a bias of the scores, and the method that makes it, in T5 and the models after it."""


# What arguments of layers are called elsewhere.
ALIASES = {
    "mask": "attention_mask",
    "past_key_value": "past_key_values",
    "layer_past": "past_key_values",
    "tgt_key_padding_mask": "src_key_padding_mask",
}


class NotServed(Exception):
    """The call is left to the layer's parts; the message is the reason."""


class Outdated(NotServed):
    """Parameters have changed in place to what the op does not take (`weight.data = …`)."""


@dataclass(frozen=True)
class WholeLayer:
    """A layer that is computed as a whole.

    program: what it computes, its steps fused.
    positional: names of its forward's arguments after the hidden states.
    known: names of arguments that say no more than the program's inputs do.
    returned: what its forward returns in a tuple behind the hidden states: names of arguments that it hands on, "" for
        None; None where it returns the hidden states themselves.
    index: paths of the modules that know the layer's place in the cache; none where nothing joins a cache.
    cached: heads, columns of a head of keys, and of values, of what joins the cache.
    kept: the same of an encoder's keys and values, which stay in the cache; (1, 0, 0) for none.
    turned: columns of a head that cosines and sines turn, 0 for none.
    but_half, wide_angles: as of `Reading` (llmkern/swap/layer_program.py).
    zeros: as of `Reading` (llmkern/swap/layer_program.py).
    makes_bias: path of the module that makes the bias of its scores where it is given none; None where nothing does.
    needs_mask: without a mask its attention is not what the program says.
    causal: paths of the attentions that are causal without a mask, where their function says so of None.
    packed: linear layers of which the program takes some rows, and how many rows they have.
    lookup: path of the table whose rows, by the tokens' positions, are its sines and cosines; () where they are given.
    """

    program: Program
    positional: tuple[str, ...]
    known: frozenset[str]
    returned: tuple[str, ...] | None = None
    index: tuple[Path, ...] = ()
    cached: tuple[int, int, int] = (0, 0, 0)
    kept: tuple[int, int, int] = (1, 0, 0)
    turned: int = 0
    but_half: bool = False
    wide_angles: bool = False
    zeros: tuple[tuple[str, int], ...] = ()
    makes_bias: Path | None = None
    needs_mask: bool = False
    causal: tuple[Path, ...] = ()
    packed: tuple[tuple[str, int], ...] = ()
    lookup: Path = ()

    @property
    def keeps(self) -> bool:
        """Return True if it attends to an encoder's tokens, whose keys and values stay in its cache."""
        return self.kept[1] > 0

    def place(self, layer: Any) -> int:
        """Return the layer's place in the cache; raises `NotServed` if its modules name several."""
        places = {at(layer, path).layer_idx for path in self.index}
        if len(places) > 1:
            raise NotServed(f"its attentions have the places {sorted(places)} in the cache, expected one")
        return int(places.pop()) if places else 0

    def hands_on(self, arguments: dict[str, Any], hidden: Tensor, encoded: int) -> tuple[Any, ...] | None:
        """Return what the forward returns behind the hidden states, or None; raises `NotServed` if it makes something.

        encoded: tokens of an encoder.
        """
        found = []
        for name in self.returned or ():
            argument, heads = arguments.get(name), dict(self.zeros).get(name)
            if name and argument is None:
                if heads is None:
                    raise NotServed(f"it returns {name}, which it is not given")
                argument = hidden.new_zeros((1, heads, hidden.shape[1], encoded))
            found.append(argument)
        return None if self.returned is None else tuple(found)


def why_not_fused(module: Any, hidden: Tensor) -> str | None:
    """Return why this call cannot use the fused layer op, or None; does not look at the layer's parts."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "the model is being compiled, exported or traced"
    if torch.is_grad_enabled():
        return "gradients are enabled, and the op for a whole layer has none: use torch.no_grad()"
    if module.training:
        return "the layer is in training mode"
    if type(hidden) not in PLAIN_TENSORS or hidden.device.type != "cpu" or hidden.dim() != 3 or hidden.is_nested:
        return f"the hidden states are a {type(hidden).__name__} on {hidden.device.type}, not [B, S, H] on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtypes"
    return why_hooks_for_all() or why_untouched()


def run_parts(module: Any, reason: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run the layer's own forward, whose parts are dispatched one by one, and record the reason."""
    tensors = {str(n): v for n, v in (*enumerate(args), *kwargs.items()) if isinstance(v, Tensor)}
    dispatch.record_parts(OP, "its parts", reason, tensors)
    return module._llmkern_original.forward(module, *args, **kwargs)


def check_guard(module: Any) -> None:
    """Raise `NotServed` if a guarded condition is broken, or if calling a part would do more than compute."""
    reason = module._llmkern_guard.broken(module)
    if reason is not None:
        raise NotServed(reason)


def at(module: Any, path: Path) -> Any:
    """Return the child module at the path."""
    for name in path:
        module = module._modules[name]
    return module


def none_is_causal(layer: Any, whole: WholeLayer) -> bool:
    """Return True if an absent mask means a causal one; under eager attention it lets every key be seen, unless the
    decoder leaves such masks out (llmkern/swap/rules/attention.py)."""
    for path in whole.causal:
        rebinds = [rebind for edit in edits_of(at(layer, path)) for rebind in edit.rebinds]
        asked = [instead for name, instead in rebinds if name == INTERFACE]
        if not asked or not asked[0].function.keywords["none_may_be_causal"]:
            return False
    return True


def arguments_of(wholes: Iterable[WholeLayer], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a layer's call by name, without the hidden states.

    Raises `NotServed` where they say more than the programs' inputs do."""
    for whole in wholes:
        if args:
            if len(args) > len(whole.positional):
                raise NotServed(f"the layer is called with {len(args)} arguments after the hidden states")
            kwargs = {**dict(zip(whole.positional, args, strict=False)), **kwargs}
            args = ()
        if whole.known.issuperset(kwargs):
            continue
        for name, argument in kwargs.items():
            if name == "output_attentions" and argument:
                raise NotServed(WEIGHTS)
            # Absent is not False: is_causal=False means something.
            if argument is not None and name not in whole.known and name != "output_attentions":
                if name in dict(whole.zeros) and type(argument) in PLAIN_TENSORS and not argument.any():
                    continue
                raise NotServed(f"the model passes {name}, which llmkern does not know")
    if ALIASES.keys().isdisjoint(kwargs):
        return kwargs
    return {ALIASES.get(name, name): argument for name, argument in kwargs.items()}


def with_bias(
    whole: WholeLayer, layer: Any, arguments: dict[str, Any], hidden: Tensor, past: int, seen: int
) -> dict[str, Any]:
    """Return the arguments with the bias of the scores, which the layer's own method makes where none is given.

    past: tokens in the cache.  seen: those that it says it has seen.
    Raises `NotServed` where there is none, or one of another kind.
    """
    if "bias" not in whole.program.inputs:
        return arguments
    keys, bias = past + hidden.shape[1], arguments.get(BIAS)
    if bias is None:
        if whole.makes_bias is None:
            raise NotServed("it is given no bias of the scores")
        make = getattr(at(layer, whole.makes_bias), MAKES_BIAS)
        bias = make(hidden.shape[1], keys, device=hidden.device, past_seen_tokens=seen)
    if type(bias) not in PLAIN_TENSORS or bias.dim() != 4 or bias.shape[-1] < keys or not bias.is_floating_point():
        raise NotServed("the bias of the scores is no 4-dimensional tensor with a number for every key")
    return {**arguments, BIAS: bias}


def encoder_of(heads: Sequence[str], arguments: dict[str, Any], hidden: Tensor) -> Tensor | None:
    """Return the encoder's hidden states of a call, contiguous; None if a program with this head takes none."""
    if "encoder" not in heads:
        return None
    rows = arguments.get("encoder_hidden_states")
    if rows is None:
        raise NotServed("there are no hidden states of an encoder, and so no attention to them")
    if type(rows) not in PLAIN_TENSORS or rows.dim() != 3 or rows.shape[0] != hidden.shape[0]:
        raise NotServed("the encoder's hidden states have another batch size, or are no 3-dimensional tensor")
    if rows.dtype is not hidden.dtype or rows.device != hidden.device:
        raise NotServed(f"the encoder's hidden states are {rows.dtype} on {rows.device}, and the decoder's are not")
    return rows.contiguous()


def tokens_of(encoder: Tensor | None, kept: int) -> int:
    """Return the number of an encoder's tokens.  kept: those whose keys and values a cache holds, or 0."""
    return kept or (0 if encoder is None else encoder.shape[1])


def inputs_of(
    layer: Any,
    whole: WholeLayer,
    heads: Sequence[str],
    arguments: dict[str, Any],
    hidden: Tensor,
    keys: int,
    causal: bool,
    encoder: Tensor | None = None,
    kept: int = 0,
) -> list[Tensor | None]:
    """Return the op's inputs for these names of a program's head; None for "".

    keys: of the past and of the hidden states.  causal: no mask stands for a causal one.  encoder: its hidden states.
    kept: how many of them the cache has the keys and values of; 0 for none.
    Raises `NotServed` where an argument is not what the op takes.
    """
    if whole.but_half and hidden.dtype is torch.float16:
        raise NotServed("its forward goes by dtypes, and computes something else in float16")
    found: list[Tensor | None] = []
    angles = _looked_up(layer, whole, arguments, hidden) if whole.lookup else arguments.get("position_embeddings")
    for name in heads:
        if not name:
            found.append(None)
        elif name in ("cos", "sin"):
            found.append(_angles(whole, angles, hidden)[name == "sin"])
        elif name == "mask":
            mask = arguments.get("attention_mask")
            if mask is None and (whole.needs_mask or not causal):
                raise NotServed("without a mask its attention is not what the program says")
            found.append(None if mask is None else _mask(mask, hidden, keys))
        elif name == "encoder":
            found.append(None if kept else encoder)
        elif name == "encoder_mask":
            mask = arguments.get("encoder_attention_mask")
            found.append(None if mask is None else _mask(mask, hidden, tokens_of(encoder, kept)))
        elif name == "bias":
            found.append(arguments.get(BIAS))
        elif name == "alibi":
            found.append(_alibi(arguments.get("alibi"), keys))
        else:
            raise NotServed(f"there is no way yet to give the op {name}")
    return found


def _looked_up(layer: Any, whole: WholeLayer, arguments: dict[str, Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines from the layer's table, in which sines come first."""
    *owner, name = whole.lookup
    positions: Any = arguments.get("position_ids")
    table = at(layer, tuple(owner))._buffers.get(name)
    if type(positions) not in PLAIN_TENSORS or type(table) not in PLAIN_TENSORS or positions.dim() != 2:
        raise NotServed(f"there are no positions to look up in {'.'.join(whole.lookup)}")
    sin, cos = table[positions].to(hidden.dtype).chunk(2, -1)
    return cos, sin


def _angles(whole: WholeLayer, angles: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    given = type(angles) is tuple and len(angles) == 2 and angles[0].dim() == 3
    dtypes = (hidden.dtype, torch.float32) if whole.wide_angles else (hidden.dtype,)
    if not given or angles[0].dtype not in dtypes:
        raise NotServed("there are no rotary embeddings in the dtype of the hidden states")
    width = angles[0].shape[-1]
    if width != whole.turned and 2 * width != whole.turned:
        raise NotServed(f"the rotary embeddings have {width} columns, and {whole.turned} of a head turn")
    return angles


def _alibi(bias: Any, keys: int) -> Tensor:
    """Return the ALiBi bias that is added to the scores of each key, [B*heads, 1, keys]."""
    if type(bias) not in PLAIN_TENSORS or bias.dim() != 3 or bias.shape[-1] != keys:
        raise NotServed("there is no ALiBi with a number for every key")
    return bias


def _mask(mask: Any, hidden: Tensor, keys: int) -> Tensor:
    """Return the model's mask in the form that the op takes."""
    plain = type(mask) in PLAIN_TENSORS and mask.dim() == 4
    if not plain or mask.dtype not in (torch.bool, hidden.dtype, torch.float32) or mask.shape[-1] < keys:
        raise NotServed("the attention mask is no 4-dimensional tensor of bools or of numbers for every key")
    return mask[..., :keys] if mask.shape[-1] > keys else mask  # transformers 4 prepares one for a longer cache
