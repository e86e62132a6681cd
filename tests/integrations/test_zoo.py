"""Every architecture of the zoo, optimized: the same numbers, the same tokens, nobody else touched, an exact undo."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from state import assert_same, outermost, snapshot
from torch import Tensor, nn
from zoo import PADDINGS, ZOO, Entry

import llmkern
from llmkern import dispatch
from llmkern.testing.compare import assert_as_accurate
from llmkern.testing.float64 import Float64

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

DTYPES = (torch.float32, torch.bfloat16)
NEW_TOKENS = 12
every_entry = pytest.mark.parametrize("entry", ZOO, ids=str)
every_generator = pytest.mark.parametrize("entry", [e for e in ZOO if e.generates], ids=str)
every_hf_entry = pytest.mark.parametrize("entry", [e for e in ZOO if e.kind != "plain"], ids=str)


@torch.no_grad()
def run(entry: Entry, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The output at the positions that count."""
    return entry.at_kept_positions(entry.output(model(**inputs)), inputs)


class Calls(set):
    """Names of the ops that were called, those handed to the untouched implementation included."""

    def served(self, op: str, *rest: Any) -> None:
        self.add(op)

    def fell_back(self, op: str, *rest: Any) -> None:
        self.add(op)


def called_ops(entry: Entry, model: nn.Module, inputs: dict[str, Any]) -> set[str]:
    calls = Calls()
    with dispatch.recording(calls):
        run(entry, model, inputs)
    return set(calls)


@functools.cache
def untouched(entry: Entry, dtype: torch.dtype, padding: str) -> tuple[Tensor, Tensor]:
    """The untouched model's output in `dtype`, and in float64."""
    model, inputs = entry.build(dtype=dtype), entry.cast(entry.inputs(padding=padding), dtype)
    baseline = run(entry, model, inputs)
    with Float64():
        return baseline, run(entry, model, inputs)


@every_entry
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("padding", PADDINGS)
def test_as_accurate_as_the_untouched_model(entry: Entry, dtype: torch.dtype, padding: str) -> None:
    if padding not in entry.paddings:
        pytest.skip(f"{entry.kind} inputs have no padding")
    baseline, exact = untouched(entry, dtype, padding)
    model = entry.build(dtype=dtype)
    report = llmkern.report(llmkern.optimize_(model)).swap
    assert report.swapped
    out = run(entry, model, entry.cast(entry.inputs(padding=padding), dtype))
    assert out.dtype == baseline.dtype
    assert_as_accurate(out, baseline=baseline, exact=exact)


@functools.cache
def untouched_tokens(entry: Entry, batch: int, padding: str, cache: str) -> Tensor:
    return generate(entry, entry.build(), batch, padding, cache)


def generate(entry: Entry, model: nn.Module, batch: int, padding: str, cache: str) -> Tensor:
    return model.generate(
        **entry.prompt(batch, padding),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        cache_implementation=cache,
    )


@every_generator
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("batch", "padding"), [(2, "left"), (1, "none")])
def test_greedy_decoding_gives_the_same_tokens(entry: Entry, cache: str, batch: int, padding: str) -> None:
    model = entry.build()
    llmkern.optimize_(model)
    tokens = generate(entry, model, batch, padding, cache)
    assert tokens.shape[1] >= NEW_TOKENS
    assert torch.equal(tokens, untouched_tokens(entry, batch, padding, cache))


@every_entry
def test_other_instances_are_untouched(entry: Entry) -> None:
    config, inputs = entry.config(), entry.inputs(padding=entry.paddings[-1])
    model, sharing, separate = entry.build(config=config), entry.build(config=config), entry.build()
    expected = run(entry, sharing, inputs)
    states = snapshot(sharing), snapshot(separate)
    llmkern.optimize_(model)
    run(entry, model, inputs)
    for other, state in zip((sharing, separate), states, strict=True):
        assert_same(state, other)
        assert torch.equal(run(entry, other, inputs), expected)
        assert not called_ops(entry, other, inputs)
    # One made afterwards: from the object that was given to the optimized model, and from what it shows as its own.
    for given in (config, getattr(model, "config", None)):
        later = entry.build(config=given)
        assert not called_ops(entry, later, inputs)
        assert torch.equal(run(entry, later, inputs), expected)
    llmkern.restore_(model)
    for other, state in zip((sharing, separate), states, strict=True):
        assert_same(state, other)


@every_entry
def test_restore_is_exact(entry: Entry) -> None:
    model, inputs = entry.build(), entry.inputs(padding=entry.paddings[-1])
    expected, state = run(entry, model, inputs), snapshot(model)
    report = llmkern.report(llmkern.optimize_(model)).swap
    # Without padding: torch.nn.TransformerEncoder takes padded batches down a path of its own.
    assert {row.op for row in outermost(report.swapped) if row.op} <= called_ops(entry, model, entry.inputs())
    assert llmkern.restore_(model) is model
    assert_same(state, model)
    assert torch.equal(run(entry, model, inputs), expected)
    assert not called_ops(entry, model, inputs)
    llmkern.restore_(model)  # nothing left to undo
    assert_same(state, model)


@every_entry
def test_optimizing_twice_is_optimizing_once(entry: Entry) -> None:
    model = entry.build()
    state = snapshot(model)
    first = llmkern.report(llmkern.optimize_(model)).swap
    once = snapshot(model)
    second = llmkern.report(llmkern.optimize_(model)).swap
    assert_same(once, model)
    assert second.rows == first.rows
    llmkern.restore_(model)
    assert_same(state, model)


@every_entry
def test_patched_ends_with_the_block(entry: Entry) -> None:
    model, inputs = entry.build(), entry.inputs()
    state = snapshot(model)
    with llmkern.patched(model) as report:
        assert report.swapped
        assert called_ops(entry, model, inputs)
    assert_same(state, model)
    with pytest.raises(KeyError, match="body"), llmkern.patched(model):
        raise KeyError("body")
    assert_same(state, model)


@every_entry
def test_a_copy_is_optimized_and_independent(entry: Entry) -> None:
    model, inputs = entry.build(), entry.inputs()
    expected = run(entry, model, inputs)
    llmkern.optimize_(model)
    optimized, ops = run(entry, model, inputs), called_ops(entry, model, inputs)
    copied = copy.deepcopy(model)
    assert called_ops(entry, copied, inputs) == ops
    assert torch.equal(run(entry, copied, inputs), optimized)
    llmkern.restore_(copied)
    assert torch.equal(run(entry, copied, inputs), expected)
    assert not called_ops(entry, copied, inputs)
    assert called_ops(entry, model, inputs) == ops


@every_entry
def test_the_report_speaks_of_every_module(entry: Entry) -> None:
    model = entry.build()
    report = llmkern.report(llmkern.optimize_(model)).swap
    for row in report.rows:
        if row.kind == "cache" and row.action == "swapped":
            assert row.backend == "KVCache"
        elif row.action == "swapped":
            assert row.op in dispatch.ops()
            assert row.backend in {b.name for b in dispatch.backends()}
            assert row.reason == ""
        else:
            assert row.action == "left"
            assert row.reason
            assert row.backend == ""
    kinds = {row.kind for row in report.rows} - {"activation", "cache", "layer", "loss"}
    assert kinds == set(entry.kinds)  # and nothing is taken for another
    assert ("cache" in {row.kind for row in report.rows}) == hasattr(model, "generate")
    assert ("loss" in {row.kind for row in report.rows}) == (entry.kind == "decoder")
    paths = {row.path for row in report.rows}
    for path, module in model.named_modules():
        name = type(module).__name__
        if "Norm" in name or name in ("GatedMLP", "LlamaMLP", "MistralMLP", "Qwen2MLP", "Gemma2MLP", "Phi3MLP"):
            assert path in paths, f"nothing is said of {path}, a {name}"
    assert f"{len(report.swapped)} swapped, {len(report.left)} left" in str(report)
    assert report.to_dict()["rows"][0].keys() >= {"path", "kind", "op", "action", "backend", "reason"}


@every_entry
@pytest.mark.parametrize(
    ("switch", "kinds"),
    [
        ("attention", {"attention"}),
        ("norms", {"norm"}),
        ("mlp", {"mlp", "activation", "experts"}),
        ("rope", {"rope"}),
    ],
)
def test_each_switch_leaves_its_kind_alone(entry: Entry, switch: str, kinds: set[str]) -> None:
    model, inputs = entry.build(), entry.inputs()
    everything = llmkern.report(llmkern.optimize_(model)).swap
    llmkern.restore_(model)
    without = llmkern.report(llmkern.optimize_(model, **{switch: False})).swap
    # A layer is swapped as a whole only where everything in it is.
    has_some = switch != "rope" or any(row.kind == "rope" for row in everything.swapped)
    gone = kinds | {"layer"} if has_some else kinds
    kept = [row for row in everything.swapped if row.kind not in gone]
    assert {(row.path, row.kind) for row in without.swapped} == {(row.path, row.kind) for row in kept}
    for row in without.left:
        assert row.reason
    assert {row.op for row in outermost(without.swapped) if row.op} <= called_ops(entry, model, inputs)
    remaining = {row.op for row in without.swapped if row.op}
    assert not called_ops(entry, model, inputs) & ({row.op for row in everything.swapped if row.op} - remaining)


@every_entry
def test_filter_fn_decides(entry: Entry) -> None:
    model, state_of = entry.build(), snapshot
    state = state_of(model)
    asked: dict[str, nn.Module] = {}

    def none(module: nn.Module, path: str) -> bool:
        asked[path] = module
        return False

    report = llmkern.report(llmkern.optimize_(model, filter_fn=none)).swap
    assert_same(state, model)
    assert not report.swapped
    assert all(model.get_submodule(path) is module for path, module in asked.items())
    chosen = next(
        row.path
        for row in llmkern.report(llmkern.optimize_(model, filter_fn=lambda module, path: "0" in path)).swap.swapped
    )
    assert "0" in chosen
    assert all(
        "0" in row.path
        for row in llmkern.report(llmkern.optimize_(model, filter_fn=lambda module, path: False)).swap.swapped
    )


@every_entry
def test_unsupported_modules_are_an_error_where_that_is_asked_for(entry: Entry) -> None:
    model = entry.build()
    state = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap
    assert not [w for w in caught if "llmkern" in str(w.message)]
    llmkern.restore_(model)
    # Nobody has asked for caches and losses, and for layers computed whole, which have their parts.
    unsupported = [row for row in report.left if row.kind not in ("cache", "layer", "loss")]
    if not unsupported:
        llmkern.optimize_(model, on_unsupported="error")
        return
    with pytest.raises(RuntimeError, match=unsupported[0].path):
        llmkern.optimize_(model, on_unsupported="error")
    assert_same(state, model)
    with pytest.warns(UserWarning, match="llmkern leaves"):
        llmkern.optimize_(model, on_unsupported="warn")


class Planted(Exception):
    pass


@every_entry
@pytest.mark.parametrize("where", ["while looking", "while swapping", "while reporting"])
def test_a_failure_half_way_changes_nothing(entry: Entry, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = entry.build(), entry.inputs()
    expected, state = run(entry, model, inputs), snapshot(model)
    countdown = 3

    def fail_later(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise Planted
            return original(*args, **kwargs)

        return wrapper

    filter_fn = None
    if where == "while looking":
        filter_fn = fail_later(lambda module, path: True)
    elif where == "while swapping":
        monkeypatch.setattr("llmkern.swap.derive.set_class", fail_later(llmkern.swap.derive.set_class))
    else:
        monkeypatch.setattr("llmkern.dispatch.select", fail_later(dispatch.select))
    with pytest.raises(Planted):
        llmkern.optimize_(model, filter_fn=filter_fn)
    monkeypatch.undo()
    assert_same(state, model)
    assert torch.equal(run(entry, model, inputs), expected)
