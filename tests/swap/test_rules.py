"""What is recognised, and what only looks like it: structure and results decide, never the name of a class."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern


class Scale(nn.Module):
    """An RMSNorm by another name, with an eps by another name."""

    def __init__(self, hidden: int, tiny: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)
        self.tiny, self.offset = tiny, offset

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.tiny)
        return (normed * (self.offset + self.weight.float())).to(x.dtype)


class Gains(nn.Module):
    """A LayerNorm with other names for everything, and its eps written into the code."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.beta, self.gamma = nn.Parameter(torch.randn(hidden)), nn.Parameter(torch.randn(hidden))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x if residual is None else x + residual
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * self.gamma + (
            self.beta
        )


class ClampedNorm(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.5, 0.5)


class EpsOutside(Scale):
    """A norm in name: eps is added to the root, not under it."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.tiny) * self.weight


class GatedMLP(nn.Module):
    def __init__(self, activation, *, hidden: int = 12, inner: int = 20, packed: bool = False, up_first: bool = False):
        super().__init__()
        self.packed, self.up_first, self.activation = packed, up_first, activation
        if packed:
            self.into = nn.Linear(hidden, 2 * inner)
        else:
            self.a, self.b = nn.Linear(hidden, inner), nn.Linear(hidden, inner)
        self.out = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.into(x).chunk(2, -1) if self.packed else (self.a(x), self.b(x))
        if self.up_first:
            gate, up = up, gate
        return self.out(self.activation(gate) * up)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def only_row(module: nn.Module) -> llmkern.SwapRow:
    (row,) = llmkern.report(llmkern.optimize_(nn.ModuleDict({"m": module}), on_unsupported="ignore")).swap
    return row


def same_before_and_after(module: nn.Module, x: Tensor) -> bool:
    expected = module(x)
    row = only_row(module)
    assert row.action == "swapped", row
    return torch.allclose(module(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden", [1, 2, 3, 40])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_an_rms_norm_is_one_whatever_it_is_called(hidden: int, offset: float) -> None:
    module = Scale(hidden, offset=offset)
    assert same_before_and_after(module, torch.randn(5, hidden))
    assert only_row(Scale(hidden, offset=offset)).op == "rms_norm"


def test_eps_is_read_where_the_module_keeps_it() -> None:
    module = Scale(16, tiny=1e-2)
    llmkern.optimize_(nn.ModuleDict({"m": module}))
    x = torch.randn(2, 16) * 0.01
    module.tiny = 1e-4  # changed afterwards, as with any attribute
    torch.testing.assert_close(module(x), Scale.forward(module, x))


def test_parameters_of_any_name_and_calls_of_any_form() -> None:
    module, x = Gains(12), torch.randn(3, 12)
    expected = module(x), module(x, x * 2), module(residual=None, x=x)
    row = only_row(module)
    assert (row.action, row.op) == ("swapped", "layer_norm")
    for got, want in zip((module(x), module(x, x * 2), module(residual=None, x=x)), expected, strict=True):
        torch.testing.assert_close(got, want)
    served = [r.backend for call in ((x,), (x, x)) for r in llmkern.explain(module, *call)]
    assert served[0] != served[1] == "Gains"


def test_a_norm_without_parameters_and_with_its_eps_in_the_code() -> None:
    class PlainNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalized_shape = (12,)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x.float(), self.normalized_shape, eps=1e-5).to(x.dtype)

    assert same_before_and_after(PlainNorm(), torch.randn(3, 12))


def test_scripted_modules_are_passed_by() -> None:
    model = nn.ModuleDict({"scripted": torch.jit.script(nn.LayerNorm(8)), "plain": nn.LayerNorm(8)})
    assert [row.path for row in llmkern.report(llmkern.optimize_(model)).swap.swapped] == ["plain"]


@pytest.mark.parametrize(
    ("module", "op"),
    [
        (nn.LayerNorm(24), "layer_norm"),
        (nn.LayerNorm(24, bias=False), "layer_norm"),
        (nn.LayerNorm(24, elementwise_affine=False), "layer_norm"),
        (nn.RMSNorm(24), "rms_norm"),
        (nn.RMSNorm(24, eps=1e-3, elementwise_affine=False), "rms_norm"),
    ],
    ids=str,
)
def test_torch_norms(module: nn.Module, op: str) -> None:
    assert same_before_and_after(module, torch.randn(3, 24))
    assert only_row(module).op == op


@pytest.mark.parametrize(
    "module",
    [nn.GroupNorm(1, 8), nn.GroupNorm(2, 8), nn.LayerNorm((2, 8)), nn.BatchNorm1d(8), ClampedNorm(8), EpsOutside(8)],
    ids=lambda m: type(m).__name__,
)
def test_what_computes_something_else_is_left_with_a_reason(module: nn.Module) -> None:
    state = {k: v.clone() for k, v in module.state_dict().items()}
    before = type(module)
    rows = llmkern.report(llmkern.optimize_(nn.ModuleDict({"m": module}), on_unsupported="ignore")).swap.rows
    assert all(row.action == "left" and row.reason for row in rows)
    assert type(module) is before
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])


def test_mixed_dtypes_keep_the_promoted_result() -> None:
    module = Scale(8)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    expected = module(x)
    llmkern.optimize_(nn.ModuleDict({"m": module}))
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, tanh_gelu], ids=["silu", "gelu", "gelu_tanh"])
def test_gated_mlps(activation, packed: bool, up_first: bool) -> None:
    module = GatedMLP(activation, packed=packed, up_first=up_first)
    assert same_before_and_after(module, torch.randn(2, 3, 12))


def test_a_gate_of_another_activation_is_left_with_a_reason() -> None:
    row = only_row(GatedMLP(F.relu))
    assert row.action == "left"
    assert "none of silu, gelu, gelu_tanh" in row.reason


def test_queries_keys_and_values_are_no_gated_mlp() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))

    assert only_row(Attention()).kind == "attention"


def test_an_mlp_that_drops_out_trains_as_before() -> None:
    class Dropping(GatedMLP):
        def __init__(self) -> None:
            super().__init__(F.silu)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.dropout(self.activation(self.a(x)) * self.b(x)))

    module, x = Dropping(), torch.randn(4, 12)
    torch.manual_seed(3)
    expected = module(x)
    assert only_row(module).action == "swapped"
    torch.manual_seed(3)
    assert torch.equal(module(x), expected)
    assert torch.allclose(module.eval()(x), Dropping.forward(module, x), atol=1e-6)


@pytest.mark.parametrize(
    ("module", "swapped"), [(nn.GELU(), True), (nn.GELU("tanh"), True), (nn.SiLU(), False), (nn.Dropout(0.5), False)]
)
def test_activation_modules(module: nn.Module, swapped: bool) -> None:
    rows = llmkern.report(llmkern.optimize_(nn.ModuleDict({"m": module}))).swap.rows
    assert bool(rows) is swapped


class Recorder(nn.Module):
    """A GELU that remembers: running it to find out what it is would leave a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return F.gelu(x)


def test_probing_leaves_no_trace() -> None:
    recorder = Recorder()
    model = nn.ModuleDict({"r": recorder, "n": Scale(8), "m": GatedMLP(F.silu), "d": nn.Dropout(0.1)})
    calls = []
    for module in model.values():
        module.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    llmkern.optimize_(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert recorder.seen == []
    assert calls == []


class AttentionBlock(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **options)

    def forward(self, *args, **kwargs) -> Tensor:
        return self.attention(*args, need_weights=False, **kwargs)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("mask", [None, "bool", "float", "per-head", "causal"])
@torch.no_grad()
def test_multihead_attention(batch_first: bool, bias: bool, padding: torch.dtype | None, mask: str | None) -> None:
    torch.manual_seed(0)
    model = AttentionBlock(batch_first=batch_first, bias=bias).eval()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    options: dict = {}
    if padding is not None:
        padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        options["key_padding_mask"] = (
            padded if padding is torch.bool else torch.zeros(2, 5).masked_fill(padded, float("-inf"))
        )
    forbidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if mask == "bool":
        options["attn_mask"] = forbidden
    elif mask == "float":
        options["attn_mask"] = torch.randn(5, 5).masked_fill(forbidden, float("-inf"))
    elif mask == "per-head":
        options["attn_mask"] = forbidden.expand(8, 5, 5)
    elif mask == "causal":
        options |= {"attn_mask": forbidden, "is_causal": True}
    inputs = [t if batch_first else t.transpose(0, 1) for t in (x, memory)]
    for q, kv in ((inputs[0], inputs[0]), (inputs[0], inputs[1])):
        expected = model(q, kv, kv, **options)
        with llmkern.patched(model) as report:
            assert [row.op for row in report.swapped] == ["attention"]
            torch.testing.assert_close(model(q, kv, kv, **options), expected, rtol=1e-5, atol=1e-6)


def test_multihead_attention_returns_weights_as_before() -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected = attention(x, x, x)
    model = nn.ModuleDict({"a": attention})
    llmkern.optimize_(model)
    for got, want in zip(attention(x, x, x), expected, strict=True):
        assert torch.equal(got, want)


@torch.no_grad()
def test_a_norm_that_asks_for_autocast_is_left_to_itself_there() -> None:
    from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

    untouched = nn.Sequential(NemotronLayerNorm1P(24))
    nn.init.normal_(untouched[0].weight)
    model = llmkern.optimize_(copy.deepcopy(untouched))
    x = torch.randn(3, 24)
    assert [row.op for row in llmkern.report(model).swap.swapped] == ["layer_norm"]
    torch.testing.assert_close(model(x), untouched(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == untouched(x).dtype
        assert torch.equal(model(x), untouched(x))
