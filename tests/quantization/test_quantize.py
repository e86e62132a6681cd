from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import llmkern
from llmkern.nn import Int8Embedding, Int8Linear
from llmkern.quantization import Int8, dequantize_, quantize, quantize_
from llmkern.quantization.observe import observe
from llmkern.quantization.smooth import plan_folds
from llmkern.testing.compare import assert_same_bits


def reported(model: nn.Module, *args, **options):
    """The report of `quantize_(model, …)`, which returns the model."""
    assert quantize_(model, *args, **options) is model
    return llmkern.report(model).quantization


def rows_of(report) -> dict:
    return {row.path: row for row in report}


def relative(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return ((wanted - got).norm() / wanted.norm()).item()


def stack(*, loud: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    with torch.no_grad():
        model[0].bias.normal_()
        for parameter in (model[0].weight, model[0].bias):
            parameter[5] *= loud
        model[1].weight[:, 5] /= loud
    return model


def test_swaps_what_it_says(tiny_llama, ids) -> None:
    wanted = tiny_llama(ids).logits
    report = reported(tiny_llama)
    for path, row in rows_of(report).items():
        assert isinstance(tiny_llama.get_submodule(path), (Int8Linear, Int8Embedding)) == (row.action != "left")
    assert len(report.quantized) == 16
    assert relative(wanted, tiny_llama(ids).logits) < 0.02
    assert report.measured_on == "4×128 random tokens"
    assert report.bytes_after < report.bytes_before
    assert "16 of 16 layers int8" in str(report)
    assert report.to_dict()["rows"][0]["path"] == "model.embed_tokens"


def test_smoothing_helps_and_leaves_the_floating_point_model_as_it_was(tiny_llama, ids) -> None:
    wanted = tiny_llama(ids).logits
    rough, smooth = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    before = [
        row.output_error for row in reported(rough, Int8(max_error=1.0, smooth=False), skip=("lm_head",)).quantized
    ]
    after = [row.output_error for row in reported(smooth, Int8(max_error=1.0), skip=("lm_head",)).quantized]
    assert max(after) < 0.5 * max(before)
    assert relative(wanted, smooth(ids).logits) < 0.5 * relative(wanted, rough(ids).logits)


def test_folding_is_exact_to_the_bit(tiny_llama, ids) -> None:
    wanted = tiny_llama(ids).logits
    layers = [m for name, m in tiny_llama.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    folds = plan_folds(observe(tiny_llama, layers, [{"input_ids": ids}]))
    assert len(folds) == 4
    for fold in folds:
        fold.apply()
        for layer in fold.layers:
            layer.weight.data *= fold.s
    assert any(not torch.equal(fold.s, torch.ones_like(fold.s)) for fold in folds)
    torch.testing.assert_close(tiny_llama(ids).logits, wanted, rtol=1e-5, atol=1e-6)


def test_a_norm_whose_output_is_used_elsewhere_is_not_folded() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x):
            h = self.norm(x)
            return self.linear(h) + h

    class Returned(PostNorm):
        def forward(self, x):
            h = self.norm(x)
            return self.linear(h), h

    for model in (PostNorm(), Returned()):
        batches = [{"": torch.randn(4, 32)}]
        assert plan_folds(observe(model, [model.linear], batches)) == []
    assert len(plan_folds(observe(stack(), [stack()[1]], [{"": torch.randn(4, 32)}]))) == 0
    plain = stack()
    assert len(plan_folds(observe(plain, [plain[1]], [{"": torch.randn(4, 32)}]))) == 1


def test_gemma_s_offset_is_found_by_trying() -> None:
    class OnePlus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32) * 0.1)

        def forward(self, x):
            return nn.functional.rms_norm(x, (32,)) * (1 + self.weight)

    model = nn.Sequential(OnePlus(), nn.Linear(32, 8))
    x = torch.randn(16, 32)
    x[:, 4] *= 40
    wanted = model(x)
    (fold,) = plan_folds(observe(model, [model[1]], [{"": x}]))
    fold.apply()
    model[1].weight.data *= fold.s
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_calibration_chooses_by_measured_error() -> None:
    model = stack(loud=20.0)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    wanted = model(x)
    report = reported(model, scheme=Int8(smooth=False), calib=[x[:32], x[32:]])
    first, second = report.rows
    assert first.action == "int8 weight-only"
    assert first.output_error > Int8().max_error
    assert "W8A8 error is beyond 2.5%" in first.reason
    assert second.action == "int8 w8a8"
    assert report.measured_on == "2 calibration inputs"
    assert relative(wanted, model(x)) < 0.03


def test_a_weight_that_int8_cannot_hold_stays_in_floating_point() -> None:
    model = stack()
    with torch.no_grad():
        model[1].bias[0] = -10.0  # GELU silences this channel,
        model[3].weight[:, 0] = 60 * model[3].weight.norm(dim=-1)  # whose weight makes one step a typical weight
    report = reported(model, calib=[torch.randn(64, 32, generator=torch.Generator().manual_seed(2))])
    assert report.rows[1].action == "left"
    assert "even weight-only its error is" in report.rows[1].reason
    assert type(model[3]) is nn.Linear


def test_texts_need_a_tokenizer(tiny_llama, unchanged) -> None:
    def tokenizer(text, **_):
        return {"input_ids": torch.tensor([[ord(c) % 128 for c in text]])}

    check = unchanged(tiny_llama)
    with pytest.raises(ValueError, match="calib has texts, for which tokenizer= is needed"):
        quantize_(tiny_llama, calib=["some text"])
    check()
    report = reported(tiny_llama, calib=["some text", "more of it"], tokenizer=tokenizer)
    assert report.measured_on == "2 calibration inputs and 4×128 random tokens"


def test_skip_names_parts_of_paths_and_filter_fn_chooses(tiny_llama) -> None:
    report = reported(
        tiny_llama,
        skip=("lm_head", "layers.0", "mlp.down_proj"),
        filter_fn=lambda module, path: "k_proj" not in path and module.out_features > 16,
    )
    left = {row.path: row.reason for row in report.left}
    assert left["model.layers.0.self_attn.q_proj"] == "skip names 'layers.0'"
    assert left["model.layers.1.mlp.down_proj"] == "skip names 'mlp.down_proj'"
    assert left["model.layers.1.self_attn.k_proj"] == "filter_fn returned False"
    assert [row.path.rsplit(".", 1)[1] for row in report.quantized] == ["q_proj", "o_proj", "gate_proj", "up_proj"]


def test_a_shared_layer_is_replaced_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, shared)})
    assert len(reported(model)) == 1
    assert type(model["a"]) is Int8Linear
    assert model["a"] is model["b"][0] is model["b"][1]


def test_conv1d(ids) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )
    model.eval()
    wanted = model(ids).logits
    report = reported(model, skip=("lm_head",))
    assert {row.kind for row in report.quantized} == {"Conv1D"}
    assert rows_of(report)["transformer.h.0.attn.c_attn"].smoothed
    quantized = model(ids).logits
    assert relative(wanted, quantized) < 0.02
    dequantize_(model)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert relative(quantized, model(ids).logits) < 0.02


def test_layers_that_are_not_plain_are_left_with_a_sentence(ids) -> None:
    replaced = nn.Linear(8, 8)
    replaced.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "replaced": replaced,
            "encoder": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            "plain": nn.Linear(8, 8),
        }
    ).eval()
    x = torch.randn(2, 3, 8)
    wanted = model["encoder"](x)
    left = {row.path: row.reason for row in reported(model).left}
    assert "ParametrizedLinear" in left["normed"]
    assert "forward was replaced on the instance" in left["replaced"]
    assert "reads its weight without calling it" in left["encoder.linear1"]
    assert type(model["plain"]) is Int8Linear
    with torch.inference_mode():
        torch.testing.assert_close(model["encoder"](x), wanted)


class ByHand(nn.Linear):  # as Falcon's
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class ScaledByAttribute(nn.Linear):
    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class CutWhenLong(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[:, :64] if x.shape[1] > 64 else x)


class HasMore(nn.Linear):
    def merge(self) -> None: ...


@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_that_computes_nn_linear_s_product_is_quantized(bias) -> None:
    model = nn.Sequential(ByHand(32, 48, bias=bias), nn.GELU(), nn.Linear(48, 32))
    x = torch.randn(2, 5, 32)
    wanted = model(x)
    assert len(reported(model).quantized) == 2
    assert isinstance(model[0], Int8Linear)
    assert relative(wanted, model(x)) < 0.02


@pytest.mark.parametrize("cls", [Doubled, ScaledByAttribute, CutWhenLong, HasMore])
def test_a_subclass_that_may_compute_something_else_is_left(cls) -> None:
    model = nn.Sequential(cls(32, 48), nn.GELU(), nn.Linear(48, 32))
    rows = rows_of(reported(model))
    assert rows["0"].reason == f"a {cls.__name__} may do more than nn.Linear does"
    assert rows["2"].action != "left"


def test_hooks_and_training_flags_survive(tiny_llama, ids) -> None:
    seen = []
    tiny_llama.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    tiny_llama.model.layers[1].train()
    quantize_(tiny_llama)
    seen.clear()
    tiny_llama(ids)
    assert seen == [1]
    assert not tiny_llama.model.layers[0].mlp.up_proj.training
    assert tiny_llama.model.layers[1].mlp.up_proj.training


def test_lora_on_a_quantized_model_trains(tiny_llama, ids) -> None:
    peft = pytest.importorskip("peft")
    quantize_(tiny_llama)
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert len(gradients) == 6
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_layers_under_lora_are_quantized_and_adapters_left(tiny_llama, ids) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wanted = model(ids).logits
    report = reported(model)
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(q_proj.base_layer) is Int8Linear
    assert all("part of an adapter" in row.reason for row in report.left if "lora_" in row.path)
    assert relative(wanted, model(ids).logits) < 0.05
    model(input_ids=ids, labels=ids).loss.backward()
    assert q_proj.lora_A["default"].weight.grad.abs().sum() > 0


def test_dequantize_goes_back_to_the_classes_it_had(tiny_llama, ids) -> None:
    tiny_llama.bfloat16()
    classes = [(path, type(module)) for path, module in tiny_llama.named_modules()]
    config = tiny_llama.config.to_dict()
    quantize_(tiny_llama, Int8(max_error=0.0))
    assert "quantization_config" in tiny_llama.config.to_dict()
    quantized = tiny_llama(ids).logits
    assert dequantize_(tiny_llama) is tiny_llama
    assert [(path, type(module)) for path, module in tiny_llama.named_modules()] == classes
    assert {p.dtype for p in tiny_llama.parameters()} == {torch.bfloat16}
    assert tiny_llama.config.to_dict() == config
    assert relative(quantized, tiny_llama(ids).logits) < 0.02
    quantize_(tiny_llama)


def test_a_failure_half_way_takes_everything_back(tiny_llama, unchanged, monkeypatch) -> None:
    check, calls = unchanged(tiny_llama), []

    def fails(places, module):
        calls.append(module)
        if len(calls) == 9:
            raise MemoryError("planted")
        real(places, module)

    real = quantize.put
    monkeypatch.setattr(quantize, "put", fails)
    with pytest.raises(MemoryError, match="planted"):
        quantize_(tiny_llama)
    assert len(calls) == 9
    check()


def test_a_calibration_that_fails_changes_nothing(tiny_llama, unchanged) -> None:
    check = unchanged(tiny_llama)
    with pytest.raises(IndexError):
        quantize_(tiny_llama, calib=[torch.full((1, 4), 999)])
    check()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.modules())


def test_random_tokens_are_run_beside_the_calibration(tiny_llama) -> None:
    """Tokens of a chat, which no prose has, are loud in channels of their own."""
    from llmkern.quantization.inputs import calibration_batches
    from llmkern.quantization.observe import observe
    from llmkern.quantization.quantize import _observe

    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[5, 7] = 100.0
    layer = tiny_llama.model.layers[0].self_attn.q_proj
    calib = [torch.randint(6, 128, (2, 16), generator=torch.Generator().manual_seed(3))]
    alone = observe(tiny_llama, [layer], calibration_batches(tiny_llama, calib, None), [layer])
    both, words, _ = _observe(tiny_llama, [layer], calib, None, [layer])
    assert words == "1 calibration inputs and 4×128 random tokens"
    assert both.amax[layer][7] > 2 * alone.amax[layer][7]
    assert len(both.rows[layer]) > len(alone.rows[layer])
    assert torch.equal(both.products[layer][0], alone.products[layer][0])


def test_bad_input(tiny_llama, unchanged) -> None:
    check = unchanged(tiny_llama)
    for exception, message, arguments in [
        (ValueError, "scheme is 'int3', expected 'int8', 'int8-block', 'int4'", {"scheme": "int3"}),
        (TypeError, "skip is 'lm_head', expected a sequence", {"skip": "lm_head"}),
        (TypeError, "filter_fn is a int, expected a function", {"filter_fn": 3}),
        (TypeError, "scheme is a float, expected 'int8', ", {"scheme": 8.0}),
        (TypeError, "calib is a str, expected a list", {"calib": "text"}),
        (TypeError, "calib has a int, expected texts", {"calib": [3]}),
        (ValueError, "calib is empty", {"calib": []}),
    ]:
        with pytest.raises(exception, match=f"quantize_: {message}"):
            quantize_(tiny_llama, **arguments)
    with pytest.raises(TypeError, match="model is a list, expected an nn.Module"):
        quantize_([])
    with pytest.raises(ValueError, match="model has no nn.Linear and no Conv1D"):
        quantize_(nn.ReLU())
    with pytest.raises(ValueError, match="weight is on the meta device"):
        quantize_(nn.Sequential(nn.Linear(2, 2, device="meta")))
    with pytest.raises(ValueError, match="model has no quantized layer in it"):
        dequantize_(tiny_llama)
    check()
    quantize_(tiny_llama)
    check = unchanged(tiny_llama)
    with pytest.raises(ValueError, match=r"quantized already \(model.embed_tokens is an Int8Embedding\)"):
        quantize_(tiny_llama)
    check()


def test_the_same_model_is_quantized_to_the_same_bits(tiny_llama) -> None:
    other = copy.deepcopy(tiny_llama)
    assert reported(tiny_llama) == reported(other)
    assert_same_bits(list(tiny_llama.state_dict().values()), list(other.state_dict().values()))


def test_works_under_optimize_and_restore_(tiny_llama, ids) -> None:
    quantize_(tiny_llama)
    quantized = tiny_llama(ids).logits
    llmkern.optimize_(tiny_llama, on_unsupported="ignore")
    assert relative(quantized, tiny_llama(ids).logits) < 1e-3
    llmkern.restore_(tiny_llama)
    assert_same_bits(tiny_llama(ids).logits, quantized)


def test_a_quantized_model_compiles_without_a_graph_break(tiny_llama, ids) -> None:
    quantize_(tiny_llama)
    torch._dynamo.reset()
    compiled = torch.compile(lambda i: tiny_llama(i, use_cache=False).logits, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_same_bits(compiled(ids), tiny_llama(ids).logits)


def test_one_row_at_a_time_in_bf16_stays_close(tiny_llama, ids) -> None:
    """Decoding takes the weight-only path of "auto", prefill W8A8; they are the same model."""
    tiny_llama.bfloat16()
    quantize_(tiny_llama)
    prefill = tiny_llama(ids).logits[:1]
    cache, steps = None, []
    for i in range(ids.shape[1]):
        out = tiny_llama(ids[:1, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert relative(prefill.float(), torch.cat(steps, 1).float()) < 0.03


def test_the_default_device_is_not_where_layers_are_measured(tiny_llama) -> None:
    for usual in (stack(), tiny_llama):
        model = copy.deepcopy(usual)
        report = reported(usual)
        with torch.device("meta"):
            assert reported(model).to_dict() == report.to_dict()
        for name, tensor in usual.state_dict().items():
            assert_same_bits(model.state_dict()[name], tensor.to(model.state_dict()[name].device))
