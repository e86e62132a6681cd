"""What a kernel's speed hangs on, counted by the SIMT machine on one call of each: bank conflicts, sectors, bytes.

python tests/simt/budgets.py            prints it for every call, place by place
python tests/simt/budgets.py attention  for the calls whose names have this
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from machine import Operators
from planted import build_operators
from torch import Tensor

from llmkern.table import render
from llmkern.testing.case import Call, Make, cases
from llmkern.testing.cases.attention import random_call

BF16 = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Budget:
    """An op's call, and what its kernels may need of it.

    sm_count: of the GPU, of compute capability 8.0, by which launchers choose tiles.
    reads: how often a tensor's bytes are read, where that is not once.
    written: bytes written, over those of the results.
    mma, ldmatrix: instructions of warps; of mma as many as the products of whole 16 x 8 x 16 (codes: x 32) have.
    wavefronts, sectors: by kernel and instruction, how much more than the fewest its worst place needs; 1.0 where it
        is not listed.
    """

    op: str
    call: Callable[[], Call]
    sm_count: int = 1
    reads: dict[str, float] = dataclasses.field(default_factory=dict)
    written: float = 1.0
    mma: int = 0
    ldmatrix: int = 0
    wavefronts: dict[str, float] = dataclasses.field(default_factory=dict)
    sectors: dict[str, float] = dataclasses.field(default_factory=dict)


def _rows(op: str, rows: int, hidden: int) -> Call:
    make = Make(BF16, "cpu", seed=0)
    x, weight = make.randn(rows, hidden), make.randn(hidden)
    norm = {"eps": 1e-6}
    rms = norm | {"bias": None, "weight_offset": 0.0}
    return {
        "rms_norm": {"x": x, "weight": weight, **rms},
        "layer_norm": {"x": x, "weight": weight, "bias": make.randn(hidden), **norm},
        "add_rms_norm": {"x": x, "residual": make.randn(rows, hidden), "weight": weight, **rms},
        "rms_norm_quant": {"x": x, "weight": weight, **rms},
        "quantize_int8": {"x": x},
        "swiglu": {"gate": x, "up": make.randn(rows, hidden)},
        "swiglu_quant": {"gate": x, "up": make.randn(rows, hidden)},
        "gelu": {"x": x, "approximate": "tanh"},
        "swiglu_backward": {"dy": x, "gate": make.randn(rows, hidden), "up": make.randn(rows, hidden)},
        "layer_norm_backward": {"dy": x, "x": make.randn(rows, hidden), "weight": weight, "bias": weight + 1, **norm},
    }[op]


def _attention(queries: int, keys: int, dim: int, **options: Any) -> Call:
    return random_call(Make(BF16, "cpu", seed=0), queries, keys, dim=dim, heads=(2, 1), return_lse=True, **options)


def _case(op: str, name: str, dtype: torch.dtype = BF16, **keywords: Any) -> Call:
    own = next(c for c in cases(op) if name in c.name and c.dtype == dtype)
    return own.build.func(Make(dtype, "cpu", seed=0), *own.build.args, **(own.build.keywords | keywords))


def _rope() -> Call:
    make = Make(BF16, "cpu", seed=0)
    angles = {name: make.randn(1, 8, 64) for name in ("cos", "sin")}
    q, k = make.randn(1, 4, 8, 128), make.randn(1, 2, 8, 128)
    return {"q": q, "k": k, **angles, "rotary_dim": 128, "interleaved": False}


def _decode(name: str) -> Call:
    return _case("attention_decode", name, slots=512, lengths=(512,), heads=(4, 1), queries=1, dim=128)


def _int8(m: int, n: int, k: int) -> Call:
    return _case("int8_matmul", "130", rows=(m,), n=n, k=k)


def _weight_only(m: int, n: int, k: int) -> Call:
    return _case("int8_linear", "silu-w8a16", rows=(m,), n=n, k=k)


# What is read by every row, or every head, comes from L1 but for the first time; teams of a decoding block merge in
# shared memory once, at its end.  Of int8_matmul's epilogue each row reads the columns' scales anew, by 16 bytes of 32
# lanes that are 32 bytes apart.
_MERGE = {"reads": {"q": 8, "seq_lens": 768}, "written": 5.07}
_EPILOGUE = {"wavefronts": {"int8_matmul ld.shared": 2.0}, "sectors": {"int8_matmul ld.global": 2.0}}
_MERGE_SECTORS = {"attention_decode st.global.v4": 2.0}
BUDGETS = {
    "rms_norm": Budget("rms_norm", lambda: _rows("rms_norm", 64, 1024), reads={"weight": 64}),
    "rms_norm-long": Budget("rms_norm", lambda: _rows("rms_norm", 64, 8192), reads={"weight": 64}),
    "layer_norm": Budget("layer_norm", lambda: _rows("layer_norm", 64, 1024), reads={"weight": 64, "bias": 64}),
    "add_rms_norm": Budget("add_rms_norm", lambda: _rows("add_rms_norm", 64, 4096), reads={"weight": 64}),
    "rms_norm_quant": Budget("rms_norm_quant", lambda: _rows("rms_norm_quant", 64, 4096), reads={"weight": 128}),
    "quantize_int8": Budget("quantize_int8", lambda: _rows("quantize_int8", 64, 4096)),
    "swiglu": Budget("swiglu", lambda: _rows("swiglu", 16, 4096)),
    "swiglu_quant": Budget("swiglu_quant", lambda: _rows("swiglu_quant", 16, 4096), reads={"up": 2}),
    "gelu": Budget("gelu", lambda: _rows("gelu", 16, 4096)),
    "swiglu_backward": Budget("swiglu_backward", lambda: _rows("swiglu_backward", 16, 4096)),
    "layer_norm_backward": Budget(
        "layer_norm_backward",
        lambda: _rows("layer_norm_backward", 64, 1024),
        reads={"weight": 128},
        written=1.13,  # the blocks' sums for the parameters' gradients
        sectors={"norm_backward st.global.v4": 2.0},
    ),
    "rope": Budget("rope", _rope, reads={"cos": 6, "sin": 6}),
    "attention-64": Budget(
        "attention", lambda: _attention(128, 256, 64), mma=4096, ldmatrix=1088, reads={"k": 2, "v": 2}
    ),
    "attention-128": Budget(
        "attention", lambda: _attention(128, 256, 128), mma=8192, ldmatrix=2560, reads={"k": 2, "v": 2}
    ),
    "attention-256": Budget(
        "attention", lambda: _attention(64, 128, 256), mma=4096, ldmatrix=2272, reads={"k": 2, "v": 2}
    ),
    "decode": Budget(
        "attention_decode",
        lambda: _decode("24-slots"),
        mma=1024,
        ldmatrix=512,
        wavefronts={"attention_decode ld.shared": 2.0, "attention_decode st.shared": 2.0},
        sectors=_MERGE_SECTORS | {"attention_decode ld.global": 2.0},
        **_MERGE,
    ),
    "decode-int8": Budget(
        "attention_decode",
        lambda: _decode("int8"),
        mma=1024,
        ldmatrix=256,
        wavefronts={"attention_decode ld.shared": 2.0, "attention_decode st.shared": 4.0},
        sectors=_MERGE_SECTORS,
        **_MERGE,
    ),
    "int8-wide": Budget(
        "int8_matmul",
        lambda: _int8(128, 256, 512),
        mma=4096,
        ldmatrix=1024,
        reads={"a_scale": 32, "w_scale": 16},
        **_EPILOGUE,
    ),
    "int8-large": Budget(
        "int8_matmul",
        lambda: _int8(128, 128, 512),
        mma=2048,
        ldmatrix=512,
        reads={"a_scale": 16, "w_scale": 16},
        **_EPILOGUE,
    ),
    "int8-halves": Budget(
        "int8_linear",
        lambda: _weight_only(128, 128, 512),
        mma=4096,
        ldmatrix=256,
        reads={"w_scale": 32, "bias": 32},
        **_EPILOGUE,
    ),
    "int8-small": Budget(
        "int8_matmul",
        lambda: _int8(64, 64, 512),
        sm_count=1000,
        mma=512,
        ldmatrix=256,
        reads={"a_scale": 8, "w_scale": 16},
        **_EPILOGUE,
    ),
    "int8-decode": Budget(
        "int8_matmul",
        lambda: _int8(1, 64, 4096),
        mma=512,
        reads={"a_q": 32, "a_scale": 64},  # a's only row is that of all eight groups of lanes
        wavefronts={"int8_decode st.shared": 4.0},
    ),
}


@dataclasses.dataclass
class Counted:
    """A call's counters, by place; how often each tensor is read, and what is written over the results' bytes."""

    places: list[dict[str, Any]]
    reads: dict[str, float]
    written: float


def worst(counted: Counted, of: str) -> dict[str, float]:
    """By kernel and instruction, where it is more than the fewest."""
    found: dict[str, float] = {}
    for c in counted.places:
        if (times := ratio(c, of)) > 1.0:
            name = f"{c['kernel']} {c['instruction']}"
            found[name] = max(times, found.get(name, 1.0))
    return found


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def ratio(counts: dict[str, Any], of: str) -> float:
    return counts[of] / counts[f"fewest_{of}"] if counts[f"fewest_{of}"] else 1.0


def count(operators: Operators, name: str) -> Counted:
    budget = BUDGETS[name]
    call = budget.call()
    operators.set(count=True, sm_count=budget.sm_count, capability=(8, 0))
    results = operators.op(budget.op, call)
    moved = operators.bytes()
    reads = {
        name: moved.get(name, (0, 0))[0] / size(t) for name, t in call.items() if isinstance(t, Tensor) and t.numel()
    }
    made = [results] if isinstance(results, Tensor) else list(results)
    return Counted(operators.counters(), reads, moved["an output"][1] / sum(map(size, made)))


def table(name: str, counted: Counted) -> str:
    rows = []
    for c in sorted(counted.places, key=lambda c: (c["kernel"], c["place"], c["instruction"])):
        conflicts = f"{ratio(c, 'wavefronts'):.2f}" if c["wavefronts"] else ""
        sectors = f"{ratio(c, 'sectors'):.2f}" if c["sectors"] else ""
        rows.append(
            (
                c["kernel"],
                c["instruction"],
                c["place"],
                c["count"],
                conflicts,
                sectors,
                c["read"] or "",
                c["written"] or "",
            )
        )
    read = ", ".join(f"{name} {times:.2f} times" for name, times in counted.reads.items())
    title = f"{name}: reads {read}; writes {counted.written:.2f} times the results"
    headers = ("kernel", "instruction", "place", "warps'", "wavefronts", "sectors", "bytes read", "written")
    return render(title, headers, rows)


if __name__ == "__main__":
    library = build_operators()
    for wanted in BUDGETS:
        if not sys.argv[1:] or any(word in wanted for word in sys.argv[1:]):
            print(table(wanted, count(library, wanted)), end="\n\n")
