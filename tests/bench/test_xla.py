"""XLA's operators, the baseline of `llmkern bench ops --device tpu`: each keeps the rule, or says what it cannot do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("jax")

from llmkern.bench import tpu
from llmkern.bench.accuracy import Judge
from llmkern.bench.peer import Unsupported, peers_named
from llmkern.bench.sweep import Point, points
from llmkern.bench.xla import BASELINES
from llmkern.jax import interpreted
from llmkern.why import sizes

SIZES = {
    "rows": 5,
    "M": 5,
    "N": 24,
    "hidden": 64,
    "K": 64,
    "B": 2,
    "Hq": 4,
    "Hkv": 2,
    "Sq": 9,
    "Skv": 9,
    "S": 9,
    "D": 32,
}
TORCH = peers_named("torch").values()


def small(op: str, **options: object) -> Point:
    sizes_of = {name: SIZES[name] for name in sizes(op)}
    point = points(op, torch.device("cpu"), dtypes=[torch.float32], shape=sizes_of)[0]
    changed = dataclasses.replace(point.sweep, options={**point.sweep.options, **options})
    return dataclasses.replace(point, sweep=changed)


def baseline_of(point: Point) -> tpu.Contender:
    with interpreted():
        ours, xla = tpu.contenders(point, point.inputs().call, TORCH)
    assert (ours.provider, xla.provider) == ("llmkern", "xla")
    return xla


def test_every_op_has_one_but_for_packed_weights() -> None:
    assert set(tpu.TWINS) - set(BASELINES) == {"quantized_linear"}


@pytest.mark.parametrize("op", BASELINES)
def test_is_right(op: str) -> None:
    point = small(op)
    Judge(point).check(baseline_of(point).judged, None)


@pytest.mark.parametrize(
    ("op", "options", "sentence"),
    [
        ("attention", {"softcap": 30.0}, "without a softcap"),
        ("attention", {"sinks": True}, "without sinks only"),
        ("attention_decode", {"softcap": 30.0}, "without a softcap"),
        ("rope", {"interleaved": True}, "halves with an angle for each dimension only"),
    ],
)
def test_says_what_it_cannot_do(op: str, options: dict[str, object], sentence: str) -> None:
    point = small(op, **options)
    with pytest.raises(Unsupported, match=sentence):
        baseline_of(point).judged(point.inputs())()


def test_is_left_out_without_pytorch_among_the_peers() -> None:
    point = small("gelu")
    with interpreted():
        assert [found.provider for found in tpu.contenders(point, point.inputs().call, [])] == ["llmkern"]
