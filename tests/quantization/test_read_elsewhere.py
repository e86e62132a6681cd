"""Weights that are read by code that does not call the layer, and models that ask their parameters for a dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import llmkern
from llmkern.nn import Int8Embedding, Int8Linear
from llmkern.quantization import Int8, quantize_
from llmkern.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")
REASON = "its weight is read without the layer being called"


class Gate(nn.Module):
    """Multiplies a weight with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1, bias=False)

    def forward(self, z):
        return self.b(torch.relu(self.a(z))) + (z * self.scale.weight).sum(-1, keepdim=True)


class Rows(nn.Module):
    """Looks rows of a head's weight up, and multiplies with an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.out = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
        self.tied = nn.Linear(64, 50, bias=False)
        self.tied.weight = self.e.weight

    def forward(self, i):
        return nn.functional.linear(self.a(self.e(i)) * self.out.weight[i], self.e.weight.T.contiguous().T)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("make", "sample", "left"),
    [
        (Gate, lambda g: torch.randn(16, 64, generator=g), {"scale"}),
        (Rows, lambda g: torch.randint(50, (2, 4), generator=g), {"e", "tied", "out"}),
    ],
)
@torch.no_grad()
def test_a_weight_that_is_read_elsewhere_is_left_and_right_where_nobody_looked(make, sample, left) -> None:
    torch.manual_seed(0)
    reference, x = make().eval(), sample(torch.Generator().manual_seed(1))
    seen, unseen = copy.deepcopy(reference), copy.deepcopy(reference)
    report = llmkern.report(quantize_(seen, calib=[x])).quantization
    assert {row.path for row in report.left} == left
    assert all(REASON in row.reason or "its weight is shared with" in row.reason for row in report.left)
    assert relative(seen(x), reference(x)) < 0.05
    quantize_(unseen)
    assert all(isinstance(getattr(unseen, path), (Int8Linear, Int8Embedding)) for path in left)
    assert relative(unseen(x), reference(x)) < 0.05


@torch.no_grad()
def test_smoothing_does_not_change_a_weight_that_others_read() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a = nn.LayerNorm(64), nn.Linear(64, 64)

        def forward(self, z):
            return self.a(self.norm(z)) + z @ self.a.weight

    torch.manual_seed(0)
    reference, x = Both().eval(), torch.randn(16, 64)
    reference.norm.weight[3] = 50
    model = quantize_(copy.deepcopy(reference), calib=[x])
    assert torch.equal(model.norm.weight, reference.norm.weight)
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba"])
@torch.no_grad()
def test_mamba_s_mixer_reads_weights(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(vocab_size=99, hidden_size=64, num_hidden_layers=2, state_size=8)
    torch.manual_seed(0)
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    model = quantize_(copy.deepcopy(reference))
    left = {row.path.rpartition(".")[2] for row in llmkern.report(model).quantization.left if REASON in row.reason}
    assert "dt_proj" in left
    assert relative(model(ids).logits, reference(ids).logits) < 0.05


def olmo(**options):
    torch.manual_seed(0)
    config = transformers.OlmoConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, **options
    )
    return transformers.OlmoForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_without_a_floating_point_parameter_has_a_dtype(dtype: torch.dtype, tmp_path) -> None:
    """OLMo's norms have no weights."""
    model = quantize_(olmo(pad_token_id=0, eos_token_id=2).to(dtype))
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    assert model.dtype == next(model.parameters()).dtype == dtype
    masked = model(ids, attention_mask=torch.tensor([[0] * 3 + [1] * 6, [1] * 9])).logits
    assert masked.dtype == dtype
    static = {"cache_implementation": "static", "disable_compile": True}
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, **static), wanted)
    model.save_pretrained(tmp_path)
    loaded = llmkern.load(tmp_path)
    assert loaded.dtype == dtype
    assert_same_bits(list(loaded.state_dict().values()), list(model.state_dict().values()))


def test_a_weight_of_another_layout_is_left() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    model[1].weight = nn.Parameter(model[1].weight.to_sparse_csr(), requires_grad=False)
    x = torch.randn(3, 8)
    wanted = model(x)
    report = llmkern.report(quantize_(model)).quantization
    assert [(row.path, row.reason) for row in report.left] == [("1", "its weight is laid out as torch.sparse_csr")]
    assert relative(model(x), wanted) < 0.05


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_the_caller_change_nothing(mode, tmp_path) -> None:
    plain, within = quantize_(olmo(), Int8(smooth=False)), olmo()
    with mode():
        quantize_(within, Int8(smooth=False))
    assert llmkern.report(within).quantization == llmkern.report(plain).quantization
    for (name, a), b in zip(within.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        assert not a.is_inference()
