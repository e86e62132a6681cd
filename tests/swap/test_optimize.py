"""optimize_, restore_ and patched on modules of any origin: what they change, what they refuse, how they undo."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import warnings

import pytest
import torch
from torch import nn

import llmkern
from llmkern import config, dispatch, registry
from llmkern.swap import derive


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-5)
        self.odd = nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.final = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.final(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def test_report(model: Model) -> None:
    with pytest.warns(UserWarning, match="llmkern leaves 3 modules as they are: it is neither"):
        report = llmkern.report(llmkern.optimize_(model)).swap
    assert [(r.path, r.kind, r.action) for r in report.rows] == [
        ("blocks.0.norm", "norm", "swapped"),
        ("blocks.0.odd", "norm", "left"),
        ("blocks.1.norm", "norm", "swapped"),
        ("blocks.1.odd", "norm", "left"),
        ("blocks.2.norm", "norm", "swapped"),
        ("blocks.2.odd", "norm", "left"),
        ("final", "norm", "swapped"),
    ]
    printed = str(report)
    assert "4 swapped, 3 left alone" in printed
    assert "blocks.*.norm" in printed
    assert "×3" in printed
    assert report.to_dict()["rows"][1]["reason"] == report.rows[1].reason != ""


def test_the_backend_in_the_report_is_the_one_that_serves(model: Model) -> None:
    report = llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap
    with torch.no_grad():
        served = {row.site: row.backend for row in llmkern.explain(model, X)}
    assert served == {row.path: row.backend for row in report.swapped}


def test_restore_and_idempotence(model: Model) -> None:
    before, expected = classes(model), model(X)
    llmkern.restore_(model)  # never optimized: nothing to do
    first = llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap
    swapped = classes(model)
    assert swapped != before
    assert llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap == first
    assert classes(model) == swapped
    assert llmkern.is_optimized(model)
    assert llmkern.report(model).swap == first
    assert llmkern.restore_(model) is model
    assert not llmkern.is_optimized(model)
    assert llmkern.report(model).swap is None
    assert classes(model) == before
    assert torch.equal(model(X), expected)


def test_a_second_call_adds_what_the_first_left_out(model: Model) -> None:
    llmkern.optimize_(model, filter_fn=lambda _, path: path == "final", on_unsupported="ignore")
    report = llmkern.report(
        llmkern.optimize_(model, filter_fn=lambda _, path: path != "final", on_unsupported="ignore")
    ).swap
    assert {row.path for row in report.swapped} == {"blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "final"}
    report = llmkern.report(llmkern.optimize_(model, norms=False, on_unsupported="ignore")).swap
    assert len(report.swapped) == 4  # still: a switch says what to swap, not what to restore
    assert all(row.reason == "switched off by norms=False" for row in report.left)


def test_switches_do_not_unswap_torchs_attention() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    first = llmkern.report(llmkern.optimize_(model)).swap
    assert {row.op for row in first.swapped} == {"attention", "layer_norm"}
    assert llmkern.report(llmkern.optimize_(model, attention=False)).swap.swapped == first.swapped


def test_plain_torch_models_need_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*filter(lambda n: n.split(".")[0] == "transformers", sys.modules), "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 3, 16)
    expected = model(x)
    assert llmkern.report(llmkern.optimize_(model)).swap.swapped
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(llmkern.restore_(model)(x), expected)
    small = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    assert llmkern.report(llmkern.quantize_(small)).quantization.quantized
    llmkern.dequantize_(small)
    assert "transformers" in str(llmkern.info())


def test_other_instances_keep_their_class(model: Model) -> None:
    other = Model()
    llmkern.optimize_(model, on_unsupported="ignore")
    assert classes(other) == classes(Model())
    assert type(nn.RMSNorm(8)).forward is nn.RMSNorm.forward


def test_copies(model: Model) -> None:
    plain = classes(model)
    llmkern.optimize_(model, on_unsupported="ignore")
    expected = model(X)
    deep = copy.deepcopy(model)
    assert classes(deep) == classes(model)
    assert torch.equal(deep(X), expected)
    assert classes(llmkern.restore_(deep)) == plain
    assert classes(model) != plain
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(model, protocol))
        assert classes(loaded) == plain
        assert list(vars(loaded.final)) == list(vars(Model().final))


def test_names_and_isinstance_stay_and_a_module_prints_what_serves_it(model: Model) -> None:
    before = repr(model)
    llmkern.optimize_(model, on_unsupported="ignore")
    backend = {row.path: row.backend for row in llmkern.report(model).swap.swapped}["final"]
    served = (
        f"(final): LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True, llmkern: layer_norm on {backend})"
    )
    assert served in repr(model)
    assert "(odd): GroupNorm(2, 8, eps=1e-05, affine=True, bias=True)" in repr(model)
    assert re.sub(", llmkern: [^)]*", "", repr(model)) == before
    assert "bias=True, llmkern)" in repr(copy.deepcopy(model).final)  # its report comes with the next optimize_
    assert isinstance(model.final, nn.LayerNorm)
    assert repr(llmkern.restore_(model)) == before


@pytest.mark.parametrize(
    ("bad", "options", "error", "text"),
    [
        ("model", {}, TypeError, "model is a str, expected a torch.nn.Module"),
        (None, {"filter_fn": 3}, TypeError, "filter_fn is a int, expected a function"),
        (None, {"on_unsupported": "panic"}, ValueError, "on_unsupported is 'panic', expected 'warn', 'error'"),
        (None, {"on_unsupported": "error"}, RuntimeError, "blocks.0.odd: it is neither"),
    ],
)
def test_bad_input_changes_nothing(model: Model, bad, options: dict, error: type, text: str) -> None:
    before = classes(model)
    with pytest.raises(error, match=text.replace(".", r"\.")):
        llmkern.optimize_(bad or model, **options)
    assert classes(model) == before


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=r"blocks\.0\.norm\.weight is on the meta device; load the weights first"):
        llmkern.optimize_(model)


def test_a_failure_half_way_rolls_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before, states = classes(model), [list(vars(m).items()) for m in model.modules()]
    real, calls = derive.set_class, []

    def fails_at_third(module: nn.Module, cls: type) -> None:
        calls.append(cls)
        if len(calls) == 3:
            raise OSError("planted")
        real(module, cls)

    monkeypatch.setattr(derive, "set_class", fails_at_third)
    with pytest.raises(OSError, match="planted"):
        llmkern.optimize_(model, on_unsupported="ignore")
    assert classes(model) == before
    for module, state in zip(model.modules(), states, strict=True):
        assert [(k, v) for k, v in vars(module).items()] == state


def test_patched_ends_with_its_block(model: Model) -> None:
    before = classes(model)
    with llmkern.patched(model, on_unsupported="ignore") as report:
        assert report.swapped
        assert classes(model) != before
    assert classes(model) == before
    with pytest.raises(ValueError, match="weight has shape"), llmkern.patched(model, on_unsupported="ignore"):
        model(torch.randn(4, 9))
    assert classes(model) == before


def test_a_forward_replaced_on_the_instance_is_left(model: Model) -> None:
    model.final.forward = lambda x: x * 2
    report = llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap
    row = next(row for row in report.rows if row.path == "final")
    assert (row.action, row.reason) == ("left", "its forward was replaced on the instance")
    assert torch.equal(model.final(X), X * 2)


def test_a_class_derived_from_a_swapped_one_is_restored_with_it(model: Model) -> None:
    cls = type(model.final)
    llmkern.optimize_(model, on_unsupported="ignore")
    model.final.__class__ = type("Sharded", (type(model.final),), {"mark": 1})
    llmkern.restore_(model)
    assert type(model.final).__mro__[:2] == (type(model.final), cls)
    assert (type(model.final).__name__, model.final.mark) == ("Sharded", 1)


def test_a_derived_class_that_means_the_swapped_one_blocks_restore(model: Model) -> None:
    llmkern.optimize_(model, on_unsupported="ignore")
    swapped = type(model.final)

    class Sharded(swapped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model.final.__class__ = Sharded
    model.final(X)
    with pytest.raises(RuntimeError, match="final has become a Sharded since; undo that first"):
        llmkern.restore_(model)
    assert derive.is_swapped(model.blocks[0].norm)


def test_accelerate_hooks_call_the_swapped_forward(model: Model) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubles(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2

    hooks.add_hook_to_module(model.final, Doubles())
    expected = model.final(X)
    old = model.final._old_forward
    llmkern.optimize_(model, on_unsupported="ignore")
    assert "final" in {row.site for row in llmkern.explain(model, X)}
    torch.testing.assert_close(model.final(X), expected)
    llmkern.restore_(model)
    assert model.final._old_forward == old
    assert torch.equal(model.final(X), expected)


def test_strict_refuses_a_swap_that_would_only_fall_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = classes(model.double())
    monkeypatch.setattr(config.settings, "strict", True)
    with pytest.raises(dispatch.Refused, match="no kernel backend can serve this call"):
        llmkern.optimize_(model, on_unsupported="ignore")
    assert classes(model) == before


def test_a_backend_from_outside_serves_an_optimized_model(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    spec = registry.OPS["rms_norm"]
    monkeypatch.setattr(spec, "implementations", spec.implementations)
    monkeypatch.setattr(spec, "usable", {})
    monkeypatch.setattr(spec, "served", {})
    monkeypatch.setattr(spec, "recent", ())
    calls = []
    mine = llmkern.register("mine")
    reference = dispatch.implementation("rms_norm", "reference").fn

    @llmkern.implements("rms_norm", mine, refuse=lambda x, **_: "too short" if x.shape[0] < 4 else None)
    def rms_norm(**call):
        calls.append(call["eps"])
        return reference(**call)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llmkern.optimize_(model)
        model(X)
        assert calls == [1e-5] * 3
        rows = llmkern.explain(model, X[:2]).rows
    assert all(("mine", "too short") in row.refused for row in rows if row.op == "rms_norm")


def test_explain_says_what_the_chosen_one_copies(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    spec = registry.OPS["rms_norm"]
    for name, value in (("implementations", spec.implementations), ("usable", {}), ("served", {})):
        monkeypatch.setattr(spec, name, value)
    asked = []

    def copies(x, **_):
        asked.append(x)
        return "x begins 2 bytes past a multiple of 16, so the kernel computes with a copy"

    llmkern.implements("rms_norm", llmkern.register("mine"), copies=copies)(
        dispatch.implementation("rms_norm", "reference").fn
    )
    llmkern.optimize_(model, on_unsupported="ignore")
    with torch.no_grad():
        model(X)
        assert asked == [], "only who explains pays for it"
        row = next(row for row in llmkern.explain(model, X).rows if row.op == "rms_norm")
    assert row.backend == "mine"
    assert row.refused[-1] == ("mine", copies(X))


def test_explain_names_site_shapes_backend_and_refusals(model: Model) -> None:
    llmkern.optimize_(model, on_unsupported="ignore")
    explained = llmkern.explain(model, X)
    assert [row.site for row in explained] == ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "final"]
    row = explained.rows[-1]
    assert (row.op, row.dtype) == ("layer_norm", "float32")
    assert row.shapes == {"x": (4, 8), "weight": (8,), "bias": (8,)}
    assert row.milliseconds is not None
    assert row.milliseconds > 0
    refused = dict(row.refused)
    assert refused["cuda"] == "runs on cuda, not on cpu"
    assert row.backend == "cpu" or "library" in refused["cpu"]  # gradients by kernels of its own
    assert "blocks.*.norm" in str(explained)
    with llmkern.use_backend("reference"):
        assert {row.backend for row in llmkern.explain(model, X)} == {"reference"}


def test_explain_leaves_no_hooks_behind_when_the_model_fails(model: Model) -> None:
    llmkern.optimize_(model, on_unsupported="ignore")
    with pytest.raises(ValueError, match="rms_norm: weight has shape"):
        llmkern.explain(model, torch.randn(4, 9))
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert dispatch._state.recorder is None


def test_the_default_device_is_not_where_modules_are_probed(model: Model) -> None:
    usual = llmkern.report(llmkern.optimize_(copy.deepcopy(model), on_unsupported="ignore")).swap
    with torch.device("meta"):
        assert llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap.rows == usual.rows
