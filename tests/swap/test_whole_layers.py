"""Decoder and encoder layers as one op: who is served, what is left to the parts, and why."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES
from layer_models import (
    DECODER,
    DECODERS,
    PADDED,
    SIZES,
    TOKENS,
    WINDOW,
    Record,
    built,
    decoders,
    layers_alone,
    needs_kernels,
    optimized,
    recorded,
)
from torch import Tensor, nn

import llmkern
from llmkern import dispatch
from llmkern.testing.compare import assert_as_accurate
from llmkern.testing.float64 import Float64

pytestmark = [pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning"), needs_kernels]

ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES, num_attention_heads=4)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**SIZES, num_attention_heads=4, hidden_act="relu")),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=67, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    ),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    # Norms after the sums, four norms, attention and MLP side by side; a window and a soft cap.
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**DECODER)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**DECODER, head_dim=16, sliding_window=WINDOW, attn_implementation="eager")
    ),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**DECODER)),
}


@pytest.fixture(autouse=True)
def one_by_one(request: pytest.FixtureRequest) -> Iterator[None]:
    """Layers are computed together in test_decoder_stack*.py, and where a test says so."""
    with contextlib.nullcontext() if "together" in request.node.name else layers_alone():
        yield


encoders = pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)


@pytest.mark.parametrize("make", (DECODERS | OTHERS).values(), ids=DECODERS | OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_decoder_is_as_accurate_as_untouched(make, dtype) -> None:
    reference, model = built(make, dtype), built(make, dtype)
    report = llmkern.report(llmkern.optimize_(model)).swap
    assert [row.backend for row in report if row.kind == "layer"] == ["cpu", "cpu"]
    for inputs in ({"input_ids": TOKENS}, {"input_ids": TOKENS, "attention_mask": PADDED}):
        for use_cache in (False, True):
            with Float64():
                exact = reference(**inputs, use_cache=use_cache).logits
            baseline, kept = reference(**inputs, use_cache=use_cache).logits, PADDED.bool()
            out = model(**inputs, use_cache=use_cache).logits
            assert_as_accurate(out[kept], baseline=baseline[kept], exact=exact[kept])
        record = recorded(lambda given=inputs: model(**given))
        assert record.ops.count("layers_") == 2
        assert not record.reasons


@encoders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_encoder_is_as_accurate_as_untouched(make, dtype) -> None:
    reference, model = built(make, dtype), built(make, dtype)
    report = llmkern.report(llmkern.optimize_(model)).swap
    assert [row.backend for row in report if row.kind == "layer"] == ["cpu", "cpu"]
    for mask in (None, PADDED.flip(1)):
        inputs = {"input_ids": TOKENS, "attention_mask": mask}
        with Float64():
            exact = reference(**inputs).last_hidden_state
        baseline, out = reference(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        kept = PADDED.flip(1).bool()
        assert_as_accurate(out[kept], baseline=baseline[kept], exact=exact[kept])
        record = recorded(lambda given=inputs: model(**given))
        assert record.ops.count("layers_") == 2
        assert not record.reasons


def prompts(padded: bool) -> dict[str, Tensor]:
    return {"input_ids": TOKENS, "attention_mask": PADDED if padded else torch.ones_like(PADDED)}


@decoders
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate_gives_the_tokens_of_the_untouched_model(make, padded, options) -> None:
    if "prompt_lookup_num_tokens" in options:
        inputs = {name: value[:1] for name, value in prompts(False).items()}
    else:
        inputs = prompts(padded)
    model, options = built(make), {"do_sample": False, "max_new_tokens": 14, "min_new_tokens": 14} | options
    expected = model.generate(**inputs, **options)
    llmkern.optimize_(model)
    record = recorded(lambda: model.generate(**inputs, **options, past_key_values=llmkern.KVCache(model.config)))
    assert record.ops.count("layers_") >= 2 * 4
    assert not record.reasons
    assert torch.equal(model.generate(**inputs, **options, past_key_values=llmkern.KVCache(model.config)), expected)
    assert torch.equal(model.generate(**inputs, **options), expected)


@decoders
@torch.no_grad()
def test_chunks_crops_and_single_tokens_continue_a_cache(make) -> None:
    """A prompt in two pieces, a step, a step taken back, and three tokens at once: the logits of one whole forward."""
    model = built(make)
    tokens = torch.randint(3, 67, (1, 16), generator=torch.Generator().manual_seed(2))
    expected = model(tokens).logits
    llmkern.optimize_(model)
    cache, end = llmkern.KVCache(model.config), 0
    for size in (5, 6, 1, 1, 3):
        out = model(tokens[:, end : end + size], past_key_values=cache).logits
        torch.testing.assert_close(out, expected[:, end : end + size], rtol=1e-4, atol=1e-4)
        end += size
    assert cache.get_seq_length() == 16


@decoders
@torch.no_grad()
def test_int8_weights_and_an_int8_cache(make) -> None:
    """The whole layers compute what their parts do, and the cache holds the codes that its own update makes."""
    model = built(make)
    llmkern.quantize_(model)
    model.model.layers[0].mlp.down_proj.scheme = "w8a16"  # as quantize_ leaves a layer that W8A8 would hurt
    parts = copy.deepcopy(model)
    llmkern.optimize_(model)
    llmkern.optimize_(parts, filter_fn=lambda module, path: not hasattr(module, "mlp"))
    assert not [
        row
        for row in llmkern.report(llmkern.optimize_(parts, attention=False)).swap
        if row.kind == "layer" and not row.reason
    ]
    for count in (2, 10):
        ours, theirs = (llmkern.KVCache(model.config, dtype="int8") for _ in range(2))
        for tokens in (TOKENS[:, :count], TOKENS[:, :1], TOKENS[:, 1:2]):
            record = Record()
            with dispatch.recording(record):
                out = model(tokens, past_key_values=ours).logits
            assert record.ops.count("layers_") == 2
            expected = parts(tokens, past_key_values=theirs).logits
            assert (out - expected).norm() <= 0.03 * expected.norm()
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            gap = mine.keys - other.keys
            assert gap.norm() <= 0.03 * other.keys.norm()


def with_hook(model: nn.Module) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def with_pre_hook(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: None)


def with_another_linear(model: nn.Module) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.model.layers[0].mlp.up_proj.__class__ = Scaled


def with_another_norm(model: nn.Module) -> None:
    model.model.layers[0].input_layernorm = nn.LayerNorm(32)


def with_columns(model: nn.Module) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.repeat_interleave(2, 1)[:, ::2])


def nothing(model: nn.Module) -> None:
    pass


def static(model: Any) -> dict[str, Any]:
    return {"past_key_values": hf.StaticCache(config=model.config, max_cache_len=32)}


def filled(model: Any) -> dict[str, Any]:
    cache = hf.DynamicCache(config=model.config)
    model(TOKENS[:, :4], past_key_values=cache)
    return {"past_key_values": cache}


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (with_hook, {}, "mlp has hooks"),
        (with_pre_hook, {}, "self_attn.q_proj has hooks"),
        (with_another_linear, {}, "up_proj is a Scaled, not a plain linear layer"),
        (with_another_norm, {}, "input_layernorm is a LayerNorm, not a plain LlamaRMSNorm"),
        (with_columns, {}, "up_proj: weight has strides (64, 2)"),
        (nothing, {"output_attentions": True}, "attention weights are asked for"),
        (nothing, static, "the cache is a StaticCache, not a"),
        (nothing, filled, "the cache is a DynamicCache with tokens in it"),
    ],
)
@torch.no_grad()
def test_what_the_op_cannot_serve_goes_through_the_parts(change, options, reason) -> None:
    reference, model = built(DECODERS["llama"]), built(DECODERS["llama"])
    llmkern.optimize_(model)
    change(reference), change(model)
    given = [options(m) if callable(options) else options for m in (reference, model)]
    expected = reference(TOKENS, **given[0]).logits
    record = Record()
    with dispatch.recording(record):
        out = model(TOKENS, **given[1]).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert any(reason in said for said in record.reasons), record.reasons
    assert record.ops.count("layers_") == (1 if change is not nothing else 0)
    assert "attention" in record.ops or "output_attentions" in given[1]


def test_gradients_and_training_go_through_the_parts() -> None:
    model = built(DECODERS["llama"])
    llmkern.optimize_(model)
    record = recorded(lambda: model(TOKENS, labels=TOKENS).loss.backward())
    assert "layers_" not in record.ops
    assert "gradients are enabled" in record.reasons[0]
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        record = recorded(lambda: model.train()(TOKENS))
        assert "training mode" in record.reasons[0]
        with torch.autocast("cpu", torch.bfloat16):
            record = recorded(lambda: model.eval()(TOKENS))
    assert "autocast" in record.reasons[0]


@torch.no_grad()
def test_hidden_states_are_collected_from_whole_layers() -> None:
    reference, model = built(DECODERS["llama"]), built(DECODERS["llama"])
    llmkern.optimize_(model)
    expected = reference(TOKENS, output_hidden_states=True).hidden_states
    record = Record()
    with dispatch.recording(record):
        found = model(TOKENS, output_hidden_states=True).hidden_states
    assert record.ops.count("layers_") == 2
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_are_those_of_the_moment() -> None:
    """Loaded, converted and replaced parameters count at the next call."""
    model, other = built(DECODERS["llama"]), built(DECODERS["llama"])
    llmkern.optimize_(model)
    model(TOKENS)
    for parameter in other.parameters():
        parameter.mul_(0.9)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits, rtol=1e-4, atol=1e-4)
    for each in (model, other):
        each.model.layers[0].mlp.up_proj.weight = nn.Parameter(each.model.layers[0].mlp.up_proj.weight * 2)
    torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits, rtol=1e-4, atol=1e-4)
    record = recorded(lambda: model.to(torch.bfloat16)(TOKENS))
    assert record.ops.count("layers_") == 2


@pytest.mark.parametrize("switch", ["attention", "norms", "mlp", "rope"])
def test_a_switch_off_leaves_the_layers_to_their_parts(switch) -> None:
    report = llmkern.report(llmkern.optimize_(built(DECODERS["llama"]), **{switch: False})).swap
    assert {row.reason for row in report if row.kind == "layer"} == {f"switched off by {switch}=False"}


def test_a_part_left_out_leaves_its_layer_to_the_parts() -> None:
    report = llmkern.report(
        llmkern.optimize_(built(DECODERS["llama"]), filter_fn=lambda _, path: path != "model.layers.1.mlp")
    ).swap
    layers = {row.path: row.reason for row in report if row.kind == "layer"}
    assert layers == {"model.layers.0": "", "model.layers.1": "a part of it is left alone: model.layers.1.mlp"}


@torch.no_grad()
def test_large_linears_are_swapped_where_their_layer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkern.swap.rules.linear.MIN_BYTES", 0)
    model = built(DECODERS["llama"])
    expected = model(TOKENS).logits
    report = llmkern.report(
        llmkern.optimize_(model, filter_fn=lambda _, path: path != "model.layers.1.input_layernorm")
    ).swap
    swapped = {row.path for row in report.swapped if row.kind == "linear"}
    assert swapped == {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"} | {"lm_head"}
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_become_whole_over_linears_swapped_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkern.swap.rules.linear.MIN_BYTES", 0)
    for options in ({"attention": False}, {"filter_fn": lambda module, path: isinstance(module, nn.Linear)}):
        model = built(DECODERS["llama"])
        assert any(
            row.path.endswith(".q_proj") for row in llmkern.report(llmkern.optimize_(model, **options)).swap.swapped
        )
        llmkern.optimize_(model)
        assert recorded(lambda given=model: given(TOKENS)).ops.count("layers_") == 2
        assert type(llmkern.restore_(model).model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_linear_that_is_not_wanted_leaves_its_layer_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkern.swap.rules.linear.MIN_BYTES", 0)
    for options in ({"linear": False}, {"filter_fn": lambda module, path: not isinstance(module, nn.Linear)}):
        report = llmkern.report(llmkern.optimize_(built(DECODERS["llama"]), **options)).swap
        assert [row.reason for row in report if row.kind == "layer"] == ["", ""]
        assert [row.path for row in report if row.kind == "linear"] == ["lm_head"]


@torch.no_grad()
def test_hooks_for_every_module_see_the_parts() -> None:
    """What each module returns is what it returns in the untouched model."""
    seen: list[dict[str, Tensor]] = []
    for model in (built(DECODERS["llama"]), optimized(DECODERS["llama"])):
        outputs: dict[str, Tensor] = {}
        paths = {module: path for path, module in model.model.layers.named_modules()}

        def note(module: nn.Module, _: Any, out: Any, paths: Any = paths, outputs: Any = outputs) -> None:
            if module in paths:
                outputs[paths[module]] = out[0] if isinstance(out, tuple) else out

        handle = nn.modules.module.register_module_forward_hook(note)
        try:
            model(TOKENS)
        finally:
            handle.remove()
        seen.append(outputs)
    expected, found = seen
    assert expected.keys() == found.keys()
    for path, out in found.items():
        torch.testing.assert_close(out, expected[path], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_shown_is_the_program_that_runs() -> None:
    model = optimized(DECODERS["llama"])
    rows = [row for row in llmkern.explain(model, TOKENS) if row.op == "layers_"]
    assert [(row.site, row.backend) for row in rows] == [("model.layers.0", "cpu"), ("model.layers.1", "cpu")]
    assert {row.source for row in rows} == {"csrc/cpu/layers/run.cpp"}
    (program,) = {row.about for row in rows}
    assert program in str(llmkern.explain(model, TOKENS))
    assert "v, mask, dim=8, scale=0.3535533905932738, causal)" in program
    report = llmkern.report(model).swap
    shown = {(row.program, row.source) for row in report if row.kind == "layer"}
    assert shown == {(program, "csrc/cpu/layers/run.cpp")}
    assert str(report).count(program) == 1
    for line in program.split("\n"):
        assert line in str(model)


@pytest.mark.parametrize("quantize", [False, True])
@torch.no_grad()
def test_another_dtype_is_left_to_the_parts(quantize: bool) -> None:
    reference, model = built(DECODERS["llama"], torch.float64), built(DECODERS["llama"], torch.float64)
    if quantize:
        llmkern.quantize_(reference), llmkern.quantize_(model)
    llmkern.optimize_(model)
    assert "takes float32, bfloat16, float16, not float64" in recorded(lambda: model(TOKENS)).reasons
    # transformers' norms round to fp32 in between.
    torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [DECODERS["llama"], ENCODERS["bert"]], ids=["decoder", "encoder"])
@torch.no_grad()
def test_a_backend_without_whole_layers_serves_their_parts(make) -> None:
    expected, model = built(make)(TOKENS), optimized(make)
    record, out = Record(), []
    with dispatch.recording(record), llmkern.use_backend("torch"):
        out.append(model(TOKENS))
    torch.testing.assert_close(out[0][0], expected[0], rtol=1e-4, atol=1e-4)
    assert all("the forced backend 'torch' cannot serve this call" in reason for reason in record.reasons)
    assert len(record.reasons) == 2
    assert record.ops.count("attention") == 2


@decoders
@torch.no_grad()
def test_a_row_that_is_not_finite_spoils_itself_alone(make) -> None:
    """Of few rows with int8 weights, which are computed in another way where one of them holds NaN."""
    model = built(make)
    llmkern.quantize_(model)
    for module in model.modules():
        if isinstance(module, llmkern.nn.Int8Linear):
            module.scheme = "w8a16"
    llmkern.optimize_(model)
    hidden = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(3))
    steps, outs = [hidden, hidden.clone()], []
    steps[1][1, 0, 7] = torch.nan
    for step in steps:
        cache = llmkern.KVCache(model.config)
        model(TOKENS[[0, 1, 0]], past_key_values=cache)
        outs.append(model(inputs_embeds=step, past_key_values=cache).logits)
    assert torch.equal(outs[1][[0, 2]], outs[0][[0, 2]])
    assert outs[1][1].isnan().all()


# Families whose layers nothing here was written for: as many calls of the op as there are runs of layers of one kind.
READ = {"granite": 1, "cohere2": 2, "olmo3": 1, "starcoder2": 1, "persimmon": 1, "gemma3": 1, "stablelm-parallel": 1}
READ |= {"gpt2": 1, "gpt-neox": 1, "opt": 1, "phi": 1, "electra": 1, "modernbert": 2}
# Whose loop looks at what a layer returns.
READ |= {"falcon-7b": 2, "falcon-alibi": 2, "falcon": 2, "bloom": 2, "gpt-j": 2}
READ |= {"glm4": 1, "nemotron": 1, "qwen3-moe": 1, "gpt-oss": 2, "glm4-moe": 1}


@pytest.mark.parametrize("name", READ)
@torch.no_grad()
def test_a_family_that_is_read_runs_together(name: str) -> None:
    model = FAMILIES[name].build()
    untouched = copy.deepcopy(model)
    llmkern.optimize_(model, on_unsupported="ignore")
    for inputs in ({}, {"attention_mask": PADDED.flip(1)}):
        record, out = Record(), []
        with dispatch.recording(record):
            out.append(model(TOKENS, **inputs)[0])
        kept = PADDED.flip(1).bool()
        torch.testing.assert_close(out[0][kept], untouched(TOKENS, **inputs)[0][kept], rtol=1e-4, atol=1e-5)
        assert record.ops.count("layers_") == READ[name]
        assert not record.reasons


@pytest.mark.parametrize("name", ["falcon", "bloom", "gpt-j", "nemotron", "glm4", "glm4-moe"])
@torch.no_grad()
def test_a_family_that_is_read_continues_a_cache(name: str) -> None:
    model = FAMILIES[name].build()
    expected = copy.deepcopy(model)(TOKENS)[0]
    llmkern.optimize_(model, on_unsupported="ignore")
    for cache in (llmkern.KVCache(model.config), hf.DynamicCache(config=model.config)):
        pieces = TOKENS.split([5, *[1] * (TOKENS.shape[1] - 5)], 1)
        outs: list[Tensor] = []
        record = Record()
        with dispatch.recording(record):
            outs += [model(piece, past_key_values=cache)[0] for piece in pieces]
        torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-4, atol=1e-4)
        assert "layers_" in record.ops
        assert not record.reasons or type(cache) is hf.DynamicCache


@pytest.mark.parametrize("name", ["bloom", "gpt-j"])
@torch.no_grad()
def test_weights_that_are_asked_for_come_from_the_parts(name: str) -> None:
    model = FAMILIES[name].build()
    untouched = copy.deepcopy(model)
    llmkern.optimize_(model, on_unsupported="ignore")
    out, expected = [m(TOKENS, output_attentions=True) for m in (model, untouched)]
    torch.testing.assert_close(out.attentions, expected.attentions, rtol=1e-4, atol=1e-5)
    assert "layers_" in recorded(lambda: model(TOKENS)).ops


@torch.no_grad()
def test_a_table_of_angles_is_that_of_the_moment() -> None:
    model = FAMILIES["gpt-j"].build()
    untouched = copy.deepcopy(model)
    llmkern.optimize_(model, on_unsupported="ignore")
    model(TOKENS)
    for each in (model, untouched):
        each.h[0].attn.embed_positions = each.h[0].attn.embed_positions.flip(0)
    torch.testing.assert_close(model(TOKENS)[0], untouched(TOKENS)[0], rtol=1e-4, atol=1e-5)
    assert recorded(lambda: model(TOKENS)).ops.count("layers_") == 2


MIXED = {"*o_proj": "int8-block", "h.*.attn.c_proj": "int8-block", "down_proj": "int8-block", "*": "int8"}


@pytest.mark.parametrize("scheme", ["int8-block", "int4", MIXED], ids=["int8-block", "int4", "mixed"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
@torch.no_grad()
def test_packed_weights_run_together(name: str, scheme: str) -> None:
    sizes = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    gpt2 = {"vocab_size": 67, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": None}
    makes = {
        "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**sizes)),
        "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**gpt2)),
    }
    model = built((makes | {"phi3": lambda: hf.Phi3Model(hf.Phi3Config(**sizes))})[name])
    llmkern.quantize_(model, scheme)
    parts = copy.deepcopy(model)
    llmkern.optimize_(model)
    out: list[Tensor] = []
    assert recorded(lambda: out.append(model(TOKENS)[0])).ops.count("layers_") == 1
    torch.testing.assert_close(out[0], parts(TOKENS)[0], rtol=1e-3, atol=1e-3)
