"""Faults planted into copies of csrc/cuda, one at a time, and whether the SIMT machine finds them.

The faults of faults.py are all in one copy, each behind a branch that the settings take: this one library, with
all of them off, is what the other tests run too.

    python tests/simt/planted.py            runs them, and writes tests/simt/faults.md and the table of CONTRIBUTING.md
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults import CUDA, FAULTS, Fault
from machine import COPIES, ROOT, TORCH_LIBRARIES, Operators, build, torch_flags
from torch import Tensor

from llmkern.testing.case import Call, Make, cases
from llmkern.testing.cases.attention import random_call
from llmkern.testing.judge import reference

SEEDS = range(3)


def copy_of_the_kernels(folder: Path) -> list[Path]:
    """csrc/cuda with every fault behind its branch: `simt::planted(n)`, n from 1 on in the order of FAULTS."""
    sources = []
    for path in sorted(CUDA.rglob("*.cu*")):
        file, text = path.relative_to(CUDA), path.read_text()
        here: dict[tuple[int, int], list[int]] = {}
        for number, fault in enumerate(FAULTS, 1):
            if fault.file == str(file) and (at := fault.at) is not None:
                here.setdefault(at, []).append(number)
        for (begin, end), numbers in sorted(here.items(), reverse=True):
            piece = text[begin:end]
            statement = piece.endswith(";")
            branch = piece if statement else f"({piece})"
            for number in numbers:
                instead = FAULTS[number - 1].instead or ""
                if statement:  # in braces, between an if and an else too
                    branch = f"{{ if (simt::planted({number})) {{ {instead} }} else {{ {branch} }} }}"
                else:
                    branch = f"(simt::planted({number}) ? ({instead}) : {branch})"
            text = text[:begin] + branch + text[end:]
        target = folder / "cuda" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:  # else ninja compiles it again
            target.write_text(text)
        sources += [target] if path.suffix == ".cu" else []
    return sources


def build_operators() -> Operators:
    """The kernels, with every fault off, and their bindings."""
    folder = ROOT / "build" / "simt" / "planted"
    kernels = copy_of_the_kernels(folder)
    sources = [*kernels, *sorted((ROOT / "csrc" / "bindings").glob("*.cpp"))]
    return Operators(build("operators", sources, torch_flags(), TORCH_LIBRARIES, first=[folder / "cuda"]))


# ---- calls that reach them


def _attention(queries: int, keys: int, dim: int, **options: Any) -> Call:
    make = Make(torch.bfloat16, "cpu", seed=0)
    return random_call(make, queries, keys, dim=dim, heads=(2, 1), return_lse=True, **options)


def _backward(dim: int, queries: int, keys: int, *, lse: bool = True, **options: Any) -> Call:
    make = Make(torch.bfloat16, "cpu", seed=0)
    call = random_call(make, queries, keys, dim=dim, heads=(2, 1), **options)
    out, log_sums = reference("attention", call | {"return_lse": True})
    call.pop("return_lse")
    return call | {
        "dout": make.randn(*out.shape),
        "dlse": log_sums.new_empty(0),
        "out": out,
        "lse": log_sums if lse else log_sums.new_empty(0),
        "mask_grad": call["attn_mask"] is not None,
    }


def _decode(name: str, **keywords: Any) -> Call:
    own = next(c for c in cases("attention_decode") if c.name == name and c.dtype == torch.bfloat16)
    return own.build.func(Make(torch.bfloat16, "cpu", seed=0), *own.build.args, **(own.build.keywords | keywords))


def _int8(m: int, n: int, k: int) -> Call:
    own = next(c for c in cases("int8_matmul") if "s32" in c.name)
    return own.build.func(Make(own.dtype, "cpu", seed=0), **(own.build.keywords | {"rows": (m,), "n": n, "k": k}))


def _weight_only(m: int, n: int, k: int) -> Call:
    own = next(c for c in cases("int8_linear") if c.name.startswith("silu-w8a16") and c.dtype == torch.bfloat16)
    return own.build.func(Make(own.dtype, "cpu", seed=0), **(own.build.keywords | {"rows": (m,), "n": n, "k": k}))


def _int8_tail() -> Call:
    """Rows of 67 codes, 80 apart: what follows them is no zero."""
    call = _int8(20, 33, 67)

    def apart(t: Tensor) -> Tensor:
        return torch.ones(t.shape[0], 80, dtype=t.dtype)[:, :67].copy_(t)

    return {n: apart(t) if isinstance(t, Tensor) and t.dtype == torch.int8 else t for n, t in call.items()}


def equal_keys(logit: float, count: int) -> Call:
    """One query whose keys all have about this logit, whose product with log2(e) is rounded by as much as any."""
    units = torch.linspace(1.0, 1.1, 64)
    product = torch.tensor(logit, dtype=torch.bfloat16).double() * (units * 1.44269504).double()
    unit = units[(product.float().double() - product).abs().argmax()].item()
    q, k = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, count, 64, dtype=torch.bfloat16)
    q[..., 0], k[..., 0] = 1.0, logit
    call = _decode("24-slots", slots=count, lengths=(count,), heads=(1, 1), queries=1, dim=64, return_lse=True)
    return call | {"q": q, "k_cache": k, "v_cache": torch.ones_like(k), "sm_scale": unit}


def _decode_strides() -> Call:
    """Values that lie otherwise than keys."""
    call = _decode("24-slots", slots=300, lengths=(300, 290), heads=(4, 1), dim=64)
    v = call["v_cache"]
    return call | {"v_cache": torch.zeros(*v.shape[:2], v.shape[2] + 3, v.shape[3]).to(v)[:, :, :-3].copy_(v)}


def _rows(op: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Call:
    own = next(c for c in cases(op) if "3x7" in c.name and c.dtype == dtype)

    def change(build: functools.partial) -> functools.partial:
        keywords = {name: change(v) if isinstance(v, functools.partial) else v for name, v in build.keywords.items()}
        return functools.partial(
            build.func, *build.args, **(keywords | ({"shape": shape} if "shape" in keywords else {}))
        )

    return change(own.build)(Make(dtype, "cpu", seed=0))


def _norm_backward() -> Call:
    make = Make(torch.bfloat16, "cpu", seed=0)
    call = {"dy": make.randn(9, 300), "x": make.randn(9, 300), "weight": make.randn(300), "bias": make.randn(300)}
    return call | {"eps": 1e-6}


# Name: op, its call, and the SMs of the GPU, by which launchers choose tiles and splits.
CALLS: dict[str, tuple[str, Callable[[], Call], int]] = {
    "attention-64": ("attention", lambda: _attention(150, 203, 64), 1),
    "attention-40": ("attention", lambda: _attention(70, 90, 40), 1),
    "attention-128": ("attention", lambda: _attention(150, 203, 128), 1),
    "attention-128-small": ("attention", lambda: _attention(70, 203, 128), 1000),
    "attention-256": ("attention", lambda: _attention(70, 75, 256), 1),
    "attention-nothing": ("attention", lambda: _attention(150, 20, 64, causal=True), 1),
    "attention-causal": ("attention", lambda: _attention(70, 139, 64, causal=True), 1),
    "decode": ("attention_decode", lambda: _decode("24-slots", slots=300, lengths=(300, 290), heads=(4, 1), dim=64), 4),
    "decode-256": (
        "attention_decode", lambda: _decode("24-slots", slots=200, lengths=(200,), heads=(2, 1), dim=256), 4
    ),
    "decode-int8": (
        "attention_decode", lambda: _decode("int8", slots=600, lengths=(600, 590), heads=(4, 1), dim=64), 1
    ),
    "decode-one-team": (
        "attention_decode",
        lambda: _decode("24-slots", slots=400, lengths=(400, 390), heads=(32, 1), queries=1, dim=64),
        1,
    ),
    "decode-int8-one-team": (
        "attention_decode", lambda: _decode("int8", slots=700, lengths=(700,), heads=(32, 1), dim=64), 1
    ),
    "decode-splits": ("attention_decode", lambda: _decode("24-slots", slots=520, lengths=(520, 300), dim=64), 132),
    "decode-equal": ("attention_decode", lambda: equal_keys(50.0, 4096), 1),
    "decode-strides": ("attention_decode", _decode_strides, 4),
    "decode-empty": (
        "attention_decode", lambda: _decode("nan-past-the-end", slots=70, lengths=(0, 66), heads=(4, 1), dim=64), 4
    ),
    "decode-lengths": (
        "attention_decode", lambda: _decode("nan-past-the-end", slots=70, lengths=(3, 66), heads=(4, 1), dim=64), 4
    ),
    "backward-64": ("attention_backward", lambda: _backward(64, 65, 161), 4),
    "backward-128": ("attention_backward", lambda: _backward(128, 50, 140), 4),
    "backward-256": ("attention_backward", lambda: _backward(256, 33, 75), 4),
    "backward-no-lse": ("attention_backward", lambda: _backward(64, 65, 161, lse=False), 4),
    "backward-mask": (
        "attention_backward",
        lambda: _backward(64, 65, 70, attn_mask=Make(torch.bfloat16, "cpu", seed=1).randn(1, 1, 65, 70)),
        4,
    ),
    "int8-small": ("int8_matmul", lambda: _int8(70, 66, 336), 1000),
    "int8-large": ("int8_matmul", lambda: _int8(130, 66, 336), 1),
    "int8-tail": ("int8_matmul", _int8_tail, 1),
    "int8-wide": ("int8_matmul", lambda: _int8(120, 246, 336), 1),
    "int8-halves": ("int8_linear", lambda: _weight_only(120, 126, 208), 1),
    "int8-halves-small": ("int8_linear", lambda: _weight_only(70, 66, 208), 1000),
    "int8-decode": ("int8_matmul", lambda: _int8(5, 33, 1300), 1),
    "int8-decode-long": ("int8_matmul", lambda: _int8(5, 33, 2816), 1),
    "layer_norm": ("layer_norm", lambda: _rows("layer_norm", 3, 2504), 4),
    "rms_norm_quant": ("add_rms_norm_quant", lambda: _rows("add_rms_norm_quant", 3, 2504), 4),
    "quantize_int8": ("quantize_int8", lambda: _rows("quantize_int8", 3, 300), 4),
    "warp-rows": ("layer_norm", lambda: _rows("layer_norm", 19, 64), 4),
    "norm_backward": ("layer_norm_backward", _norm_backward, 4),
    "rope": ("rope", lambda: next(c for c in cases("rope") if c.dtype == torch.bfloat16).make(), 4),
}  # fmt: skip


@functools.cache
def _call(name: str) -> Call:
    return CALLS[name][1]()


def outcome(operators: Operators, name: str, fault: int, seed: int, copies: str) -> tuple[str, list[Tensor]]:
    """The machine's sentence, if any, and the results."""
    op, _, sm_count = CALLS[name]
    operators.set(seed=seed, copies=copies, sm_count=sm_count, fault=fault)
    error, results = operators.attempt(op, _call(name))
    return error, [results] if isinstance(results, Tensor) else list(results)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@dataclasses.dataclass
class Verdict:
    """How one fault was found: the number of runs with an error of the machine or with wrong bits, or else a counter
    of the machine."""

    runs: int = 0
    sentences: int = 0
    wrong: int = 0
    conflicts: bool = False  # right, but with more bank conflicts than without it

    @property
    def caught(self) -> bool:
        return self.conflicts or (self.runs > 0 and self.sentences + self.wrong == self.runs)


@functools.cache
def clean(operators: Operators, name: str) -> list[Tensor]:
    """A call's results without a fault; raises AssertionError at a false alarm under any seed and arrival of copies."""
    first: list[Tensor] | None = None
    for seed, copies in itertools.product(SEEDS, COPIES):
        error, results = outcome(operators, name, 0, seed, copies)
        assert error == "", f"a false alarm in {name}: {error}"
        assert first is None or same(results, first), f"{name} depends on the order"
        first = first or results
    assert first is not None
    return first


@functools.cache
def wavefronts(operators: Operators, name: str, fault: int) -> int:
    op, _, sm_count = CALLS[name]
    operators.set(sm_count=sm_count, fault=fault, count=True)
    operators.attempt(op, _call(name))
    return sum(counts["wavefronts"] for counts in operators.counters())


def judge(operators: Operators, number: int) -> Verdict:
    """One fault under every seed and arrival of copies, in the first of its calls that shows it."""
    verdict = Verdict()
    assert FAULTS[number - 1].at is not None, f"the kernel has changed: plant anew {FAULTS[number - 1]}"
    for name in FAULTS[number - 1].calls:
        verdict = Verdict()
        right = clean(operators, name)
        for seed, copies in itertools.product(SEEDS, COPIES):
            error, results = outcome(operators, name, number, seed, copies)
            verdict.runs += 1
            verdict.sentences += error != ""
            verdict.wrong += error == "" and not same(results, right)
        verdict.conflicts = not verdict.caught and wavefronts(operators, name, number) > wavefronts(operators, name, 0)
        if verdict.caught:
            break
    return verdict


# ---- the table

KINDS = {
    "wait": "waits for copies",
    "barrier": "barriers",
    "__syncwarp": "`__syncwarp`",
    "swizzle": "swizzles",
    "stage": "stages",
    "predicate": "predicates",
    "exchange": "exchanges",
    "contraction": "contractions",
    "blocks": "shares of blocks",
}
PAGE, TABLE = ROOT / "CONTRIBUTING.md", ROOT / "tests" / "simt" / "faults.md"
BEGIN, END = "<!-- planted faults: generated -->\n", "<!-- /planted faults: generated -->"


def summary(verdicts: list[Verdict]) -> str:
    """By file and kind: caught of planted."""
    lines = ["| kernel | " + " | ".join(KINDS.values()) + " | missed |", "|---|" + "---|" * (len(KINDS) + 1)]
    for file in dict.fromkeys(fault.file for fault in FAULTS):
        cells, missed = [], 0
        for kind in KINDS:
            own = [v.caught for f, v in zip(FAULTS, verdicts, strict=True) if (f.file, f.kind) == (file, kind)]
            cells.append(f"{sum(own)} of {len(own)}" if own else "")
            missed += len(own) - sum(own)
        lines.append(f"| `{file}` | " + " | ".join(cells) + f" | {missed} |")
    caught = sum(v.caught for v in verdicts)
    lines.append("")
    lines.append(
        f"{caught} of {len(FAULTS)} faults are found, each under {len(SEEDS)} orders x {len(COPIES)} arrivals of "
        f"copies; {len(CALLS)} calls of the kernels as they are raise 0 false alarms."
    )
    return "\n".join(lines) + "\n"


def row(fault: Fault, verdict: Verdict) -> str:
    """The fault's line of faults.md."""
    how = "**missed**"
    if verdict.caught:
        how = "a sentence" if verdict.sentences == verdict.runs else "wrong bits"
        if 0 < verdict.sentences < verdict.runs:
            how = "a sentence or wrong bits"
        if verdict.conflicts:
            how = "bank conflicts"
    texts = (fault.context.replace("@", ""), fault.piece, fault.instead or "nothing")
    where, piece, instead = (" ".join(text.replace("|", "\\|").split()) for text in texts)
    return f"| {fault.file} | {fault.kind} | `{where}` | `{piece}` → `{instead}` | {how} |"


def details(verdicts: list[Verdict]) -> str:
    lines = ["<!-- Generated by tests/simt/planted.py -->", "# Planted faults", ""]
    lines += ["Each alone, in a copy of the kernels; found by a sentence of the machine, wrong bits, or counters."]
    lines += ["", "| file | kind | where | what becomes what | found by |", "|---|---|---|---|---|"]
    lines += [row(fault, verdict) for fault, verdict in zip(FAULTS, verdicts, strict=True)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    library = build_operators()
    found = [judge(library, number) for number in range(1, len(FAULTS) + 1)]
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + summary(found) + END + rest.split(END)[1])
    TABLE.write_text(details(found))
    missed = [str(fault) for fault, verdict in zip(FAULTS, found, strict=True) if not verdict.caught]
    sys.exit("\n".join(["missed:", *missed]) if missed else 0)
