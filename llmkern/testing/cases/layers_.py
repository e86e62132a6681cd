from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkern.programs.program import Program, parse
from llmkern.testing.case import Call, Case, Make, each_dtype
from llmkern.testing.cases._families import FAMILIES
from llmkern.testing.cases._layer import left_padding, linear
from llmkern.testing.cases._programs import call_of

_OP = "layers_"
_ALL = ("q", "k", "v", "o", "gate", "up", "down")
Sizes = dict[str, tuple[int, ...]]
"""By the places that a program mentions: rows and columns of a linear layer's weight, or what a vector has."""


def llama(
    dim: int,
    *,
    scale: float = 0.0,
    offset: float = 0.0,
    head_norms: bool = False,
    rotary: int = 0,
    interleaved: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    gate: str = "swiglu",
    places: Sequence[str] = _ALL,
    cached: bool = True,
) -> str:
    """A layer of the Llama family as text; places: of its linear layers."""
    q, k, v, o, gate_proj, up, down = places
    shift = f", offset={offset}" if offset else ""
    norms = [
        f"q = rms_norm(q, q_norm, eps=1e-05{shift}, dim={dim})",
        f"k = rms_norm(k, k_norm, eps=1e-05{shift}, dim={dim})",
    ]
    turns = (f", rotary={rotary}" if rotary else "") + (", interleaved" if interleaved else "")
    limits = (f", window={window}" if window else "") + (f", softcap={softcap}" if softcap else "")
    steps = [
        f"x = rms_norm(hidden, input_norm, eps=1e-05{shift})",
        f"q, k, v = linear(x, {q}, {k}, {v})",
        *(norms if head_norms else []),
        f"q, k = rope(q, k, cos, sin, dim={dim}{turns})",
        *(["k, v = append(k, v)"] if cached else []),
        f"a = attention(q, k, v, mask, dim={dim}, scale={scale or dim**-0.5}, causal{limits})",
        f"h = linear(a, {o}, residual=hidden)",
        f"y = rms_norm(h, post_norm, eps=1e-05{shift})",
        f"g = linear(y, {gate_proj}, {up}, activation={gate})",
        f"hidden = linear(g, {down}, residual=h)",
    ]
    return text("hidden, cos, sin, mask", steps)


def bert(dim: int, *, scale: float = 0.0, activation: str = "gelu", places: Sequence[str] = ("q", "k", "v")) -> str:
    """A layer of the BERT family as text."""
    steps = [
        f"q, k, v = linear(hidden, {', '.join(places)})",
        f"a = attention(q, k, v, mask, dim={dim}, scale={scale or dim**-0.5})",
        "s = linear(a, o, residual=hidden)",
        "h = layer_norm(s, attention_norm, eps=1e-06)",
        f"u = linear(h, up, activation={activation})",
        "t = linear(u, down, residual=h)",
        "hidden = layer_norm(t, output_norm, eps=1e-06)",
    ]
    return text("hidden, mask", steps)


def text(inputs: str, steps: Sequence[str], result: str = "hidden") -> str:
    """The program of these steps in its one form."""
    return str(parse("\n".join([f"layer({inputs})", *steps, f"return {result}"])))


def parameters(
    make: Make, program: Program, sizes: Sizes, *, int8: bool | Sequence[str] = False, biases: Sequence[str] = ()
) -> list[Tensor | None]:
    """A layer's tensors.  int8: all weights, or those of the places named."""
    found: list[Tensor | None] = []
    for kind, path in program.parameters():
        size = sizes[path]
        if kind == "linear":
            quantized = int8 if isinstance(int8, bool) else path in int8
            found += linear(make, path, *size, int8=quantized, bias=path in biases).values()
        else:
            found.append(make.randn(*size, scale=0.3, offset=1.0))
            if kind == "norm":
                found.append(make.randn(*size, scale=0.3) if path in biases else None)
    return found


def decoder(
    make: Make,
    queries: int,
    past: int = 0,
    *,
    layers: int = 1,
    batch: int = 1,
    hidden: int = 24,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    inner: int = 40,
    cached: bool = True,
    spare: int = 3,
    int8: bool | Sequence[str] = False,
    int8_cache: bool = False,
    biases: Sequence[str] = (),
    packed: bool = False,
    rotary: int = 0,
    mask: Tensor | None = None,
    schemes: str = "w8a8",
    **options: Any,
) -> Call:
    """packed: q, k and v are rows of one linear layer, gate and up of another."""
    q_size, kv_size = heads[0] * dim, heads[1] * dim
    sizes: Sizes = {
        "q": (q_size, hidden),
        "k": (kv_size, hidden),
        "v": (kv_size, hidden),
        "o": (hidden, q_size),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "qkv": (q_size + 2 * kv_size, hidden),
        "gate_up": (2 * inner, hidden),
        **dict.fromkeys(("input_norm", "post_norm"), (hidden,)),
        **dict.fromkeys(("q_norm", "k_norm"), (dim,)),
    }
    if packed:
        ends = (q_size, q_size + kv_size, q_size + 2 * kv_size)
        rows = [f"qkv[{begin}:{end}]" for begin, end in zip((0, *ends), ends, strict=False)]
        options["places"] = [*rows, "o", f"gate_up[0:{inner}]", f"gate_up[{inner}:{2 * inner}]", "down"]
    program = llama(dim, rotary=rotary, **options)
    found = [t for _ in range(layers) for t in parameters(make, parse(program), sizes, int8=int8, biases=biases)]
    angles = make.randn(batch if past % 2 else 1, queries, rotary or dim, dtype=torch.float32)
    caches: list[Tensor] = []
    for _ in range(layers if cached else 0):
        caches += cache_of(make, (batch, heads[1], past + queries + spare, dim), past + queries, int8_cache)
    return {
        "hidden": make.randn(batch, queries, hidden),
        "programs": [program],
        "parameters": found,
        "inputs": [angles.cos().to(make.dtype), angles.sin().to(make.dtype), mask],
        "caches": caches,
        "past": past,
        "schemes": schemes,
    }


def cache_of(make: Make, shape: tuple[int, int, int, int], end: int, int8: bool) -> list[Tensor]:
    """Keys and values, and the scales of codes; what lies beyond `end` is nobody's."""
    if int8:
        codes = [make.randint(-127, 128, *shape, dtype=torch.int8) for _ in range(2)]
        return [*codes, *[make.randn(*shape[:3], dtype=torch.float32, scale=2e-3, offset=1e-2).abs() for _ in range(2)]]
    numbers = [make.randn(*shape) for _ in range(2)]
    for cache in numbers:
        cache[:, :, end:] = 8.0
    return numbers


def _masked(make: Make, queries: int, past: int, lengths: tuple[int, ...], *, added: bool = False, **more: Any) -> Call:
    mask = left_padding(make, queries, past + queries, lengths)
    if added:
        mask = torch.where(mask, make.tensor(0.0), make.tensor(-math.inf))
    return decoder(make, queries, past, batch=len(lengths), mask=mask, **more)


def _strided_cache(make: Make) -> Call:
    """A cache kept as [B, capacity, Hkv, D], and rows of hidden that are not next to each other."""
    call = decoder(make, 2, 5, batch=2)
    caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in call["caches"]]
    return call | {"caches": caches, "hidden": call["hidden"].transpose(0, 1).contiguous().transpose(0, 1)}


def encoder(
    make: Make,
    batch: int,
    length: int,
    *,
    layers: int = 1,
    hidden: int = 24,
    heads: int = 4,
    dim: int = 6,
    inner: int = 40,
    int8: bool = False,
    bias: bool = True,
    packed: bool = False,
    mask: Tensor | None = None,
    schemes: str = "w8a8",
    **options: Any,
) -> Call:
    across = heads * dim
    sizes: Sizes = {
        **dict.fromkeys("qkv", (across, hidden)),
        "qkv": (3 * across, hidden),
        "o": (hidden, across),
        "up": (inner, hidden),
        "down": (hidden, inner),
        **dict.fromkeys(("attention_norm", "output_norm"), (hidden,)),
    }
    if packed:
        options["places"] = [f"qkv[{i * across}:{(i + 1) * across}]" for i in range(3)]
    program = bert(dim, **options)
    biases = tuple(sizes) if bias else ()
    return {
        "hidden": make.randn(batch, length, hidden),
        "programs": [program],
        "parameters": [
            t for _ in range(layers) for t in parameters(make, parse(program), sizes, int8=int8, biases=biases)
        ],
        "inputs": [mask],
        "caches": [],
        "past": 0,
        "schemes": schemes,
    }


def _padded(make: Make, lengths: tuple[int, ...], *, added: bool = False, **options: Any) -> Call:
    """Right-padded sequences; a mask as transformers makes it, bool or additive with the most negative number."""
    keys = max(lengths)
    mask = (make.tensor(range(keys), torch.int64) < make.tensor(lengths, torch.int64)[:, None])[:, None, None]
    if added:
        mask = torch.where(mask, make.tensor(0.0), make.tensor(torch.finfo(make.dtype).min))
    return encoder(make, len(lengths), keys, mask=mask, **options)


def _nothing_to_see(make: Make) -> Call:
    """A sequence whose every token is hidden: its attention is 0."""
    call = _padded(make, (6, 2))
    call["inputs"][0][1] = False
    return call


_SMALL = (torch.float32, torch.bfloat16)
_HALVES = (torch.bfloat16, torch.float16)
# Among many codes of activations some lie next to a tie, where fp32's last bit decides on a whole step.
_MANY_CODES = {"w8a8": _HALVES, "w8a16": (torch.float32, *_HALVES)}
_SEVEN = "w8a8,w8a16,w8a8,w8a8,w8a8,w8a16,w8a16"

_DECODERS = [
    *each_dtype(_OP, "first-token", partial(decoder, queries=1)),
    *each_dtype(_OP, "7-tokens", partial(decoder, queries=7)),
    *each_dtype(_OP, "no-cache", partial(decoder, queries=5, batch=2, cached=False)),
    *each_dtype(_OP, "decode", partial(decoder, queries=1, past=21)),
    *each_dtype(
        _OP,
        "decode-batch-3",
        partial(decoder, queries=1, past=9, batch=3, heads=(6, 2), dim=6, hidden=17, inner=33),
    ),
    *each_dtype(_OP, "odd-sizes", partial(decoder, queries=3, past=4, heads=(3, 1), dim=10, hidden=65, inner=63)),
    *each_dtype(_OP, "continued", partial(decoder, queries=6, past=5, batch=2)),
    *each_dtype(_OP, "40-tokens", partial(decoder, queries=40, past=3, hidden=32, inner=48)),
    *each_dtype(_OP, "smollm2", partial(decoder, queries=1, past=33, hidden=576, heads=(9, 3), dim=64, inner=1536)),
    *each_dtype(_OP, "3-layers", partial(decoder, queries=2, past=3, layers=3), dtypes=_SMALL),
    *each_dtype(_OP, "biases", partial(decoder, queries=2, past=3, biases=_ALL), dtypes=_SMALL),
    *each_dtype(_OP, "qwen2", partial(decoder, queries=1, past=3, biases=("q", "k", "v")), dtypes=_SMALL),
    *each_dtype(_OP, "qwen3", partial(decoder, queries=2, past=6, head_norms=True, batch=2), dtypes=_SMALL),
    *each_dtype(_OP, "gemma", partial(decoder, queries=2, past=6, offset=1.0, head_norms=True), dtypes=_SMALL),
    *each_dtype(_OP, "int8-cache-first-tokens", partial(decoder, queries=5, int8_cache=True), dtypes=_SMALL),
    *each_dtype(_OP, "phi3", partial(decoder, queries=2, past=4, packed=True, rotary=6), dtypes=_SMALL),
    *each_dtype(_OP, "interleaved", partial(decoder, queries=3, past=2, interleaved=True, rotary=4), dtypes=_SMALL),
    *each_dtype(_OP, "window", partial(decoder, queries=3, past=9, window=4), dtypes=_SMALL),
    *each_dtype(_OP, "window-decode", partial(decoder, queries=1, past=9, window=4), dtypes=_SMALL),
    *each_dtype(_OP, "softcap", partial(decoder, queries=2, past=4, softcap=1.5, scale=0.5), dtypes=_SMALL),
    *each_dtype(_OP, "gelu", partial(decoder, queries=2, past=4, gate="geglu"), dtypes=_SMALL),
    *each_dtype(_OP, "gelu-tanh", partial(decoder, queries=2, past=4, gate="geglu_tanh"), dtypes=_SMALL),
    *each_dtype(_OP, "left-padding", partial(_masked, queries=4, past=2, lengths=(6, 3)), dtypes=_SMALL),
    *each_dtype(_OP, "left-padding-decode", partial(_masked, queries=1, past=8, lengths=(9, 4)), dtypes=_SMALL),
    *each_dtype(_OP, "added-mask", partial(_masked, queries=3, past=4, lengths=(7, 5), added=True), dtypes=_SMALL),
    *each_dtype(_OP, "strided-cache", _strided_cache, dtypes=_SMALL),
    *[
        case
        for scheme in ("w8a8", "w8a16")
        for case in (
            *each_dtype(_OP, f"int8-{scheme}", partial(decoder, queries=1, past=5, int8=True, schemes=scheme)),
            *each_dtype(
                _OP,
                f"int8-{scheme}-biases",
                partial(decoder, queries=3, past=5, int8=True, schemes=scheme, biases=_ALL),
            ),
            *each_dtype(
                _OP,
                f"int8-{scheme}-70-tokens",
                partial(decoder, queries=70, past=5, int8=True, schemes=scheme),
                dtypes=_MANY_CODES[scheme],
            ),
        )
    ],
    *each_dtype(_OP, "int8-schemes", partial(decoder, queries=3, past=5, int8=True, schemes=_SEVEN), dtypes=_SMALL),
    *each_dtype(
        _OP,
        "int8-schemes-of-layers",
        partial(decoder, queries=3, past=5, int8=True, layers=2, schemes=f"w8a16;{_SEVEN}"),
        dtypes=_SMALL,
    ),
    *each_dtype(
        _OP, "int8-but-down", partial(decoder, queries=2, past=5, int8=_ALL[:-1], head_norms=True), dtypes=_SMALL
    ),
    *each_dtype(_OP, "int8-cache", partial(decoder, queries=1, past=12, int8_cache=True), dtypes=_SMALL),
    *each_dtype(
        _OP, "int8-cache-continued", partial(decoder, queries=6, past=7, batch=2, int8_cache=True), dtypes=_SMALL
    ),
    *each_dtype(
        _OP,
        "int8-cache-left-padding",
        partial(_masked, queries=1, past=8, lengths=(9, 4), int8_cache=True),
        dtypes=_SMALL,
    ),
    *each_dtype(_OP, "0-batch", partial(decoder, queries=1, past=2, batch=0), dtypes=(torch.float32,)),
]

_ENCODERS = [
    *each_dtype(_OP, "bert-1-token", partial(encoder, batch=1, length=1)),
    *each_dtype(_OP, "bert-2x7", partial(encoder, batch=2, length=7)),
    *each_dtype(_OP, "bert-odd-sizes", partial(encoder, batch=2, length=5, hidden=17, heads=3, dim=7, inner=33)),
    *each_dtype(_OP, "minilm", partial(encoder, batch=2, length=19, hidden=384, heads=12, dim=32, inner=1536)),
    *each_dtype(_OP, "bert-2x40", partial(encoder, batch=2, length=40)),
    *each_dtype(_OP, "bert-2-layers", partial(encoder, batch=2, length=4, layers=2), dtypes=_SMALL),
    *each_dtype(_OP, "bert-padded", partial(_padded, lengths=(6, 4, 1))),
    *each_dtype(_OP, "bert-padded-added", partial(_padded, lengths=(6, 4), added=True), dtypes=_SMALL),
    *each_dtype(_OP, "bert-nothing-to-see", _nothing_to_see, dtypes=_SMALL),
    *each_dtype(_OP, "bert-no-biases", partial(encoder, batch=2, length=7, bias=False), dtypes=_SMALL),
    *each_dtype(_OP, "bert-packed", partial(encoder, batch=2, length=7, packed=True), dtypes=_SMALL),
    *[
        case
        for activation in ("gelu_tanh", "silu", "relu")
        for case in each_dtype(
            _OP, f"bert-{activation}", partial(encoder, batch=2, length=5, activation=activation), dtypes=_SMALL
        )
    ],
    *[
        case
        for scheme in ("w8a8", "w8a16")
        for case in (
            *each_dtype(_OP, f"bert-int8-{scheme}", partial(encoder, batch=1, length=3, int8=True, schemes=scheme)),
            *each_dtype(
                _OP,
                f"bert-int8-{scheme}-2x40",
                partial(encoder, batch=2, length=40, int8=True, schemes=scheme),
                dtypes=_MANY_CODES[scheme],
            ),
            *each_dtype(_OP, f"bert-int8-{scheme}-padded", partial(_padded, lengths=(6, 4), int8=True, schemes=scheme)),
        )
    ],
    *each_dtype(
        _OP,
        "bert-int8-schemes",
        partial(encoder, batch=1, length=3, int8=True, schemes="w8a8,w8a8,w8a16,w8a8,w8a16,w8a8"),
        dtypes=_SMALL,
    ),
    *each_dtype(_OP, "bert-0-batch", partial(encoder, batch=0, length=3), dtypes=(torch.float32,)),
]

_TURNED = {"gpt2": ("c_attn", "c_proj", "c_fc", "c_out"), "gpt-oss": ("gate_up", "down")}


def family(make: Make, name: str, queries: int, past: int = 0, **options: Any) -> Call:
    return call_of(make, FAMILIES[name], queries, past, turned=_TURNED.get(name, ()), **options)


_FAMILIES = [
    *[
        case
        for name in FAMILIES
        for case in each_dtype(
            _OP, f"{name}-masked", partial(family, name=name, queries=3, past=2, masked=True), dtypes=_SMALL
        )
    ],
    *[
        Case(_OP, f"{name}-decode", torch.float32, partial(family, name=name, queries=1, past=7))
        for name in ("gemma2", "bloom", "mpt", "gpt2", "mixtral")
    ],
    *each_dtype(_OP, "gpt-neox-19-tokens", partial(family, name="gpt-neox", queries=19), dtypes=_SMALL),
    *each_dtype(_OP, "bart-kept", partial(family, name="bart", queries=1, past=4, kept=True, layers=2), dtypes=_SMALL),
    *each_dtype(_OP, "t5-kept", partial(family, name="t5", queries=2, past=4, kept=True, masked=True), dtypes=_SMALL),
    *each_dtype(_OP, "t5-no-cache", partial(family, name="t5", queries=4, cached=False), dtypes=(torch.float32,)),
    *each_dtype(_OP, "bloom-int8", partial(family, name="bloom", queries=2, past=3, int8=True), dtypes=_SMALL),
    *each_dtype(_OP, "persimmon-int8", partial(family, name="persimmon", queries=2, past=3, int8=True), dtypes=_SMALL),
    *each_dtype(_OP, "mixtral-19-tokens", partial(family, name="mixtral", queries=19), dtypes=(torch.float32,)),
    *each_dtype(_OP, "mixtral-int8", partial(family, name="mixtral", queries=2, past=3, int8=True), dtypes=_SMALL),
    *each_dtype(_OP, "dinov2-int8", partial(family, name="dinov2", queries=4, int8=True), dtypes=_SMALL),
]

CASES = [*_DECODERS, *_ENCODERS, *_FAMILIES]
