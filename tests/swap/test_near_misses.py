"""Layers that a few small values do not tell from the real one: each is refused, with the sentence why."""

from __future__ import annotations

import copy
import inspect
import linecache
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from layer_models import DECODERS, built, needs_kernels, recorded
from torch import Tensor
from transformers.models.bert import modeling_bert as bert
from transformers.models.llama import modeling_llama as llama

import llmkern

_CODE = {"attention": llama.LlamaAttention, "layer": llama.LlamaDecoderLayer, "mlp": llama.LlamaMLP}
_CODE |= {"norm": llama.LlamaRMSNorm}

ROTATED = "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)\n"
ASKED = "attention_interface: Callable"
ANSWERED = "attn_output = self.o_proj(attn_output)\n"
SUM = "hidden_states = residual + hidden_states\n"
MLP = "hidden_states = self.mlp(hidden_states)\n"

SAID = "the program says it, or its call is checked for it"

# name: (whose forward, where in it a line is added before, the line, what the reason must say)
LINES: dict[str, tuple[str, str, str, str]] = {
    "scale by position": (
        *("attention", ROTATED),
        "query_states = query_states * (1 + torch.log(1 + torch.floor(kwargs['position_ids'] / 8)))[:, None, :, None]",
        "between its parts its forward computes floor",
    ),
    "scale by far positions": (
        *("attention", ROTATED),
        "query_states = torch.where(kwargs['position_ids'][:, None, :, None].gt(5000), 2 * query_states, query_states)",
        "between its parts its forward computes gt",
    ),
    "scale from a table by position": (
        *("attention", ROTATED),
        "query_states = query_states * torch.ones(2**21)[kwargs['position_ids']][:, None, :, None]",
        "between its parts its forward computes index",
    ),
    "branch by length": (
        *("attention", ROTATED),
        "query_states = query_states * 2 if query_states.shape[2] > 100 else query_states",
        "forward goes by `query_states.shape[2] > 100`",
    ),
    "branch by a length with a name": (
        *("attention", ROTATED),
        "long = query_states.shape[2] > 100\n    query_states = 2 * query_states if long else query_states",
        "forward goes by `query_states.shape[2] > 100`",
    ),
    "scale by length": (
        *("attention", ROTATED),
        "query_states = query_states * (1 + query_states.shape[2] // 100)",
        "forward goes by `query_states.shape[2] // 100`",
    ),
    "largest of two lengths": (
        *("attention", ROTATED),
        "query_states = query_states * max(1, query_states.shape[2] / 100)",
        "forward goes by `max(1, query_states.shape[2] / 100)`",
    ),
    "branch by the past": (
        *("attention", ASKED),
        "if past_key_values is not None and past_key_values.get_seq_length() > 50: key_states = key_states * 2",
        "forward goes by `past_key_values.get_seq_length() > 50`",
    ),
    "scale where there is a past": (
        *("attention", ASKED),
        "if past_key_values is not None: key_states = key_states * 2",
        "after a past, at positions from a million on its forward computes something else",
    ),
    "branch by dtype": (
        *("attention", ROTATED),
        "if query_states.dtype == torch.float16: query_states = query_states.clamp(-100, 100)",
        SAID,
    ),
    "rounds to fp32": (
        *("attention", ROTATED),
        "query_states = query_states.float()",
        "between its parts its forward computes _to_copy",
    ),
    "rounds to half precision": (
        *("attention", ROTATED),
        "query_states = query_states.bfloat16().to(query_states.dtype)",
        "on small values its forward computes something else than",
    ),
    "another constant": (
        *("attention", ANSWERED),
        "attn_output = attn_output * 1.0000001",
        SAID,
    ),
    "something small is added": (
        *("layer", MLP),
        "hidden_states = hidden_states + 1e-9",
        "between its parts its forward computes add",
    ),
    "limit": (
        *("layer", MLP),
        "hidden_states = hidden_states.clamp(-1e9, 1e9)",
        SAID,
    ),
    "not a number is not": (
        *("layer", MLP),
        "hidden_states = hidden_states.nan_to_num()",
        "between its parts its forward computes nan_to_num",
    ),
    "dropout": (
        *("layer", MLP),
        "hidden_states = nn.functional.dropout(hidden_states, 1e-9, training=True)",
        "between its parts its forward computes",
    ),
    "branch by contents": (
        *("layer", MLP),
        "if hidden_states.abs().max() > 1e6: hidden_states = hidden_states / 2",
        "between its parts its forward computes abs",
    ),
    "branch by batch": (
        *("layer", MLP),
        "if len(hidden_states) == 7: hidden_states = hidden_states / 2",
        "forward goes by `len(hidden_states) == 7`",
    ),
    "branch by the number of dimensions": (
        *("layer", MLP),
        "assert hidden_states.dim() < 4",
        SAID,
    ),
    "branch by device": (
        *("layer", MLP),
        "if hidden_states.is_cuda: hidden_states = hidden_states / 2",
        "forward goes by `hidden_states.is_cuda`",
    ),
    "in place": ("layer", SUM, "residual.add_(0 * residual)", "between its parts its forward computes"),
    "helper that goes by length": (
        *("layer", MLP),
        "hidden_states = shortened(hidden_states)",
        "shortened goes by `x.shape[1] > 1000`",
    ),
    "mlp by length": (
        *("mlp", "down_proj ="),
        "if x.shape[1] > 100: x = x / 2",
        "forward goes by `x.shape[1] > 100`",
    ),
    "norm by dtype": (
        *("norm", "input_dtype ="),
        "if hidden_states.dtype == torch.bfloat16: hidden_states = 2 * hidden_states",
        "forward goes by `hidden_states.dtype == torch.bfloat16`",
    ),
}


def shortened(x: Tensor) -> Tensor:
    return x[:, :1000] if x.shape[1] > 1000 else x


def with_line(cls: Any, where: str, line: str) -> Callable[..., Any]:
    """The class's forward with one more line, which has its source as a file would."""
    source = textwrap.dedent(inspect.getsource(cls.forward))
    begin, _, end = source.partition(f"    {where}")
    assert end, f"{where} is not in the source"
    text = f"{begin}    {line}\n    {where}{end}"
    name = f"<{line}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    made: dict[str, Any] = {**vars(sys.modules[cls.__module__]), "shortened": shortened}
    exec(compile(text, name, "exec"), made)
    return made["forward"]


def models(change: Callable[[Any], None]) -> tuple[Any, Any, llmkern.SwapReport]:
    """An untouched model with a change of each layer, an optimized copy, and the report."""
    untouched = built(DECODERS["llama"])
    for layer in untouched.model.layers:
        change(layer)
    model = copy.deepcopy(untouched)
    return untouched, model, llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap


@needs_kernels
@pytest.mark.parametrize("name", LINES)
@torch.no_grad()
def test_a_line_more_in_a_forward(name: str) -> None:
    whose, where, line, reason = LINES[name]
    forward = with_line(_CODE[whose], where, line)

    def change(layer: Any) -> None:
        owner = {"attention": layer.self_attn, "layer": layer, "mlp": layer.mlp, "norm": layer.input_layernorm}[whose]
        owner.__class__ = type(type(owner).__name__, (type(owner),), {"forward": forward})

    untouched, model, report = models(change)
    if reason is not SAID:
        assert "layers_" not in {row.op for row in report.swapped}
        assert reason in " ".join({row.reason for row in report.left})
    tokens = torch.randint(3, 67, (1, 120), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    expected = untouched(tokens).logits
    torch.manual_seed(0)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-3, atol=1e-3)


@needs_kernels
@torch.no_grad()
def test_another_formula_in_half_precision_is_not_left_out() -> None:
    forward = with_line(*[_CODE["attention"], *LINES["branch by dtype"][1:3]])

    def change(layer: Any) -> None:
        layer.self_attn.__class__ = type("Attention", (llama.LlamaAttention,), {"forward": forward})

    untouched, model, report = models(change)
    assert "layers_" in {row.op for row in report.swapped}
    tokens = torch.arange(3, 12)[None]
    for dtype, served in ((torch.float32, True), (torch.float16, False)):
        record = recorded(lambda dtype=dtype: model.to(dtype)(tokens))
        assert ("layers_" in record.ops) == served
        expected = untouched.to(dtype)(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=3e-2, atol=3e-2)
    assert any("in float16" in reason for reason in record.reasons)


@needs_kernels
@torch.no_grad()
def test_the_forward_as_it_is_passes() -> None:
    """That a copy with another line is refused is not because it is a copy."""

    def change(layer: Any) -> None:
        for owner, cls, where in ((layer.self_attn, _CODE["attention"], ASKED), (layer, _CODE["layer"], MLP)):
            owner.__class__ = type(cls.__name__, (cls,), {"forward": with_line(cls, where, "pass")})

    assert [row.op for row in models(change)[2].swapped].count("layers_") == 2


@needs_kernels
@torch.no_grad()
def test_a_hook_between_the_parts_is_called() -> None:
    def change(layer: Any) -> None:
        layer.self_attn.register_forward_hook(lambda _, args, out: (out[0] * 2, out[1]))

    untouched, model, _ = models(change)
    tokens = torch.arange(3, 12)[None]
    torch.testing.assert_close(model(tokens).logits, untouched(tokens).logits, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_a_forward_without_source() -> None:
    made: dict[str, Any] = dict(vars(llama))
    exec(textwrap.dedent(inspect.getsource(llama.LlamaDecoderLayer.forward)), made)

    def change(layer: Any) -> None:
        layer.__class__ = type("Layer", (type(layer),), {"forward": made["forward"]})

    reasons = {row.reason for row in models(change)[2].left}
    assert "forward has no source in which to look for branches" in reasons


@needs_kernels
@torch.no_grad()
def test_an_encoder_that_goes_by_length() -> None:
    class Halved(bert.BertOutput):
        def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            out = super().forward(hidden_states, input_tensor)
            return out / 2 if out.shape[1] > 100 else out

    from test_whole_layers import ENCODERS

    model = built(ENCODERS["bert"])
    for layer in model.encoder.layer:
        layer.output.__class__ = Halved
    report = llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap
    assert "layers_" not in {row.op for row in report.swapped}
    assert "forward goes by `out.shape[1] > 100`, which a probe cannot see through" in {r.reason for r in report.left}


SETTINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", [*SETTINGS, "default dtype"])
def test_the_report_does_not_depend_on_the_callers_setting(name: str) -> None:
    expected = llmkern.report(llmkern.optimize_(built(DECODERS["llama"]))).swap
    model = built(DECODERS["llama"])
    if name == "default dtype":
        torch.set_default_dtype(torch.float64)
        try:
            report = llmkern.report(llmkern.optimize_(model)).swap
            assert torch.get_default_dtype() is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with SETTINGS[name]():
            report = llmkern.report(llmkern.optimize_(model)).swap
    assert report.rows == expected.rows
    model.train()(torch.arange(3, 12)[None], labels=torch.arange(3, 12)[None]).loss.backward()


def test_a_model_whose_attention_is_given_a_tensor_by_keyword() -> None:
    """It has no truth value, by which to see whether the attention asks for something."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.YolosModel(hf.YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=4)).eval()
    untouched = copy.deepcopy(model)
    llmkern.optimize_(model)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(pixels)[0], untouched(pixels)[0], rtol=1e-4, atol=1e-4)
