"""What an untouched forward reads counts at once when it changes after optimize_: it takes effect, or the call runs
untouched with a reason."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from layer_models import (
    APART,
    DECODER,
    DECODERS,
    PROMPT,
    SIZES,
    STEPS,
    TOGETHER,
    TOKENS,
    WINDOW,
    Sequence,
    built,
    needs_kernels,
    optimized,
    recorded,
)
from torch import Tensor, nn

import llmkern

pytestmark = [pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")]


def activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.ReLU()


def activation_of_no_module(layer: Any) -> None:
    del layer.mlp.act_fn
    layer.mlp.act_fn = F.relu


def hooked_activation(layer: Any) -> None:
    layer.mlp.act_fn.register_forward_hook(lambda _, args, out: out + 1)


def scaling(layer: Any) -> None:
    layer.self_attn.scaling = 2.0


def attention_in_training(layer: Any) -> None:
    layer.self_attn.train()


def config(layer: Any) -> None:
    layer.self_attn.config = copy.copy(layer.self_attn.config)
    layer.self_attn.config._attn_implementation = "eager"


CHANGES = {
    activation: "mlp.act_fn is a ReLU, not a plain SiLUActivation",
    activation_of_no_module: "mlp.act_fn is a NoneType, not a plain SiLUActivation",
    hooked_activation: "mlp.act_fn has hooks, or a forward of its own",
    scaling: "self_attn.scaling is 2.0, and was 0.3535533905932738 when it was swapped",
    attention_in_training: "self_attn.training is True, and was False when it was swapped",
    config: "self_attn.config._attn_implementation is 'eager', and was 'sdpa' when it was swapped",
}
changes = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@needs_kernels
@changes
@pytest.mark.parametrize("index", range(2))
@torch.no_grad()
def test_a_change_between_two_tokens(change, index) -> None:
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    untouched, model = sequence.models
    for tokens in (PROMPT, STEPS[0]):
        assert sequence.give(tokens) == TOGETHER
    for each in sequence.models:
        change(each.model.layers[index])
    reason = CHANGES[change]
    for tokens in STEPS[1:]:
        assert sequence.give(tokens) == APART[:1]
    again = Sequence(untouched, model)
    for tokens in (PROMPT, *STEPS):
        assert again.give(tokens) == APART[:1]
    assert reason in recorded(lambda: model(TOKENS)).reasons


@needs_kernels
@torch.no_grad()
def test_optimize_again_takes_up_what_has_changed() -> None:
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    for model in sequence.models:
        for layer in model.model.layers:
            scaling(layer)
            layer.mlp.act_fn = nn.GELU(approximate="tanh")
    assert sequence.give(PROMPT) == []
    llmkern.optimize_(sequence.models[1])
    assert sequence.give(STEPS[0]) == APART
    assert Sequence(*sequence.models).give(PROMPT) == TOGETHER


@needs_kernels
@torch.no_grad()
def test_copies_with_attributes_of_their_own() -> None:
    """GELUTanh keeps a functools.partial, which a copy has one of its own of; and so have the layers of a model."""
    sequence = Sequence(built(DECODERS["gemma"]), copy.deepcopy(optimized(DECODERS["gemma"])))
    assert sequence.give(PROMPT) == TOGETHER
    for model in sequence.models:
        model.model.layers[1].mlp.act_fn.act = functools.partial(F.gelu, approximate="none")
    for tokens in STEPS:
        assert sequence.give(tokens) == APART[:1]


@needs_kernels
@torch.no_grad()
def test_dropout_of_an_attention_that_alone_is_in_training() -> None:
    def make() -> nn.Module:
        return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, attention_dropout=0.5))

    sequence = Sequence(built(make), optimized(make))
    logits = []
    for tokens in (PROMPT, *STEPS):
        assert sequence.give(tokens) == TOGETHER
    for model in sequence.models:
        model.model.layers[1].self_attn.train()
        torch.manual_seed(2)
        logits.append(model(TOKENS).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert (sequence.models[0].eval()(TOKENS).logits - logits[0]).abs().max() > 0.01


@needs_kernels
@torch.no_grad()
def test_an_mlp_in_training_is_still_the_same_without_dropout() -> None:
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    assert sequence.give(PROMPT) == TOGETHER
    for model in sequence.models:
        model.model.layers[1].mlp.train()
    assert sequence.give(STEPS[0]) == TOGETHER
    again = Sequence(*sequence.models)
    assert again.give(PROMPT) == TOGETHER


@needs_kernels
@pytest.mark.parametrize("path", ["resid_attn_dropout", "resid_mlp_dropout"])
@torch.no_grad()
def test_a_dropout_of_the_layer_that_alone_is_in_training(path) -> None:
    def make() -> nn.Module:
        return hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER, resid_pdrop=0.5))

    sequence = Sequence(built(make), optimized(make))
    assert sequence.give(PROMPT) == TOGETHER
    logits = []
    for model in sequence.models:
        model.model.layers[1].get_submodule(path).train()
        torch.manual_seed(2)
        logits.append(model(STEPS[2], past_key_values=sequence.caches[len(logits)]).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert f"{path}.training is True, and was False when it was swapped" in recorded(lambda: model(TOKENS)).reasons


@needs_kernels
@torch.no_grad()
def test_masks_of_the_layers_that_differ_since() -> None:
    sequence = Sequence(built(DECODERS["qwen3"]), optimized(DECODERS["qwen3"]))
    assert sequence.give(PROMPT) == TOGETHER
    for model in sequence.models:
        model.model.layers[1].attention_type = "of another kind"  # by which transformers 4 chose the mask
    assert sequence.give(STEPS[0]) == APART
    again = Sequence(*sequence.models)
    assert again.give(PROMPT) == TOGETHER * 2  # each with those of its kind
    for model in sequence.models:
        del model.model.layers[1].attention_type
    assert again.give(STEPS[2]) == TOGETHER


@needs_kernels
@torch.no_grad()
def test_kinds_of_layers_that_the_config_names_otherwise_since() -> None:
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
    sequence = Sequence(
        *[make(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, **window))) for make in (built, optimized)]
    )
    for tokens in (PROMPT, STEPS[0]):
        assert sequence.give(tokens) == TOGETHER
    for model in sequence.models:
        model.config.layer_types[1] = "full_attention"
    assert [sequence.give(tokens) for tokens in STEPS[1:]] == [APART, TOGETHER * 2]


def other_activation(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn = nn.Tanh()


def activation_within(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn.act = torch.tanh


def encoder_scaling(layer: Any) -> None:
    layer.attention.self.scaling = 2.0


def output_in_training(layer: Any) -> None:
    layer.output.train()


def negative(x: Tensor) -> Tensor:
    return -x


def own_method(layer: Any) -> None:
    layer.feed_forward_chunk = negative


def norm_eps(layer: Any) -> None:
    layer.output.LayerNorm.eps = layer.attention.output.LayerNorm.eps = 0.5


BERT = {
    other_activation: "intermediate.intermediate_act_fn is a Tanh, not a plain GELUActivation",
    activation_within: "intermediate.intermediate_act_fn.act is tanh, and was gelu when it was swapped",
    encoder_scaling: "attention.self.scaling is 2.0, and was 0.3535533905932738 when it was swapped",
    output_in_training: "output.dropout.training is True, and was False when it was swapped",
    own_method: "feed_forward_chunk is negative, and was not set when it was swapped",
    norm_eps: "",  # served
}


@needs_kernels
@pytest.mark.parametrize("change", BERT, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_change_of_an_encoder(change) -> None:
    config = {**SIZES, "num_attention_heads": 4, "hidden_dropout_prob": 0.5}
    models = [built(lambda: hf.BertModel(hf.BertConfig(**config))) for _ in range(2)]
    before = models[0](TOKENS)[0]
    llmkern.optimize_(models[1])
    out = []
    for model in models:
        change(model.encoder.layer[1])
        torch.manual_seed(2)
        out.append(model(TOKENS)[0])
    assert (out[0] - before).abs().max() > 0.01
    torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-4)
    assert (BERT[change] in recorded(lambda: models[1](TOKENS)).reasons) == bool(BERT[change])


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.act, self.dropout, self.gain = F.silu, nn.Dropout(0.5), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.dropout(self.down(self.act(self.gate(x)) * self.up(x)))


class Config(hf.PretrainedConfig):
    attribute_map = {"moved": "shift"}

    @property
    def doubled(self) -> float:
        return 2 * self.base


class Configured(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config(shift=0.0, base=0.5)

    def forward(self, x: Tensor) -> Tensor:
        factor = getattr(self.config, "factor", 1.0) * self.config.doubled
        return factor * super().forward(x) + self.config.moved


def configured(**attributes: float) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.config.update(attributes)

    change.__name__ = f"{[*attributes]} of config"
    return change


def encoder_of_torch() -> nn.Module:
    return nn.TransformerEncoderLayer(12, 4, 20, batch_first=True)


class Attention(nn.MultiheadAttention):
    """Called as the tests call everything."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x, x, x, need_weights=False)[0]


def set_to(path: str, value: Any) -> Callable[[nn.Module], None]:
    *above, name = path.split(".")

    def change(module: nn.Module) -> None:
        setattr(module.get_submodule(".".join(above)), name, copy.deepcopy(value))

    change.__name__ = f"{path} = {getattr(value, '__name__', type(value).__name__)}"
    return change


ALONE = [
    (nn.GELU, set_to("approximate", "tanh")),
    (lambda: nn.LayerNorm(12), set_to("eps", 0.5)),
    (lambda: nn.LayerNorm(12, bias=False), set_to("bias", nn.Parameter(torch.arange(12.0)))),
    (lambda: nn.LayerNorm(12, elementwise_affine=False), set_to("weight", nn.Parameter(torch.arange(12.0)))),
    (lambda: nn.LayerNorm((4, 12), elementwise_affine=False), set_to("normalized_shape", (12,))),
    (lambda: nn.LayerNorm(12, elementwise_affine=False), set_to("normalized_shape", (4, 12))),
    (lambda: nn.RMSNorm(12), set_to("eps", 0.5)),
    *[(Gated, set_to("act", function)) for function in (F.relu, nn.ReLU())],
    (Gated, set_to("gain", 2.0)),
    (Gated, set_to("dropout", nn.Tanh())),
    *[(Configured, configured(**{name: 2.0})) for name in ("shift", "factor", "base")],
    (Gated, set_to("dropout.training", True)),
    (lambda: Attention(12, 4, batch_first=True), set_to("add_zero_attn", True)),
    (lambda: Attention(12, 4, batch_first=True), set_to("num_heads", 2)),
    (encoder_of_torch, set_to("activation_relu_or_gelu", 2)),
    (encoder_of_torch, set_to("norm_first", True)),
]


@pytest.mark.parametrize(("make", "change"), ALONE, ids=lambda x: x.__name__)
@torch.no_grad()
def test_a_change_of_a_module_alone(make, change) -> None:
    torch.manual_seed(0)
    untouched = make().eval()
    for parameter in untouched.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 4, 12)
    before = untouched(x)
    model = copy.deepcopy(untouched)
    llmkern.optimize_(nn.ModuleDict({"m": model}), on_unsupported="ignore")
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    out = []
    for each in (untouched, model):
        change(each)
        torch.manual_seed(1)
        out.append(each(x))
    assert (out[0] - before).abs().max() > 1e-4
    torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [set_to("gain", 2.0), set_to("act", F.relu), configured(factor=2.0)])
@torch.no_grad()
def test_a_compiled_module_sees_the_change_too(change) -> None:
    x, untouched = torch.randn(2, 4, 12), Configured().eval()
    model = copy.deepcopy(untouched)
    llmkern.optimize_(nn.ModuleDict({"m": model}))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), untouched(x), rtol=1e-4, atol=1e-5)
        change(untouched)
        change(model)


FUSED = [
    *[set_to("activation", torch.tanh), set_to("training", True)],
    *[set_to(f"{path}.training", True) for path in ("self_attn", "dropout", "dropout1", "dropout2")],
]


@pytest.mark.parametrize("change", FUSED, ids=lambda change: change.__name__)
def test_what_torchs_fused_path_leaves_out(change) -> None:
    x, untouched = torch.randn(2, 4, 12), encoder_of_torch().eval()
    model = copy.deepcopy(untouched)
    llmkern.optimize_(nn.ModuleDict({"m": model}))
    for grad in (False, True):  # with gradients there is no fused path
        out = []
        for each in (untouched, model):
            change(each)
            torch.manual_seed(1)
            with torch.set_grad_enabled(grad):
                out.append(each(x))
        if not grad or change in FUSED[:2]:  # random numbers depend on how a tensor lies in memory
            torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-5)


def test_what_may_change_unseen_is_not_swapped() -> None:
    class Listed(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.config.gains[0] * super().forward(x)

    module = Listed()
    module.config = hf.PretrainedConfig(gains=[1.0])
    (row,) = [
        row
        for row in llmkern.report(llmkern.optimize_(nn.ModuleDict({"m": module}), on_unsupported="ignore")).swap
        if row.kind == "mlp"
    ]
    assert (row.action, row.reason) == ("left", "its forward reads an attribute that may change unseen")
