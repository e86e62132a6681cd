"""What happens to a model between two tokens counts at once, however much of it was looked up before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_models import (
    APART,
    DECODERS,
    PROMPT,
    STEPS,
    TOGETHER,
    TOKENS,
    Sequence,
    built,
    give_class,
    named,
    needs_kernels,
    on_each_layer,
    optimized,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

import llmkern

pytestmark = [pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning"), needs_kernels]


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def plus_one(module: nn.Module, _: Any, out: Any) -> Any:
    return (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1


def in_place(layer: Any) -> None:
    layer.mlp.down_proj.weight.mul_(2)
    layer.self_attn.k_proj.bias.add_(1)
    layer.input_layernorm.weight.mul_(2)


def data(layer: Any) -> None:
    for module in (layer.self_attn.v_proj, layer.mlp.down_proj, layer.post_attention_layernorm):
        module.weight.data = 2 * module.weight


def layout(layer: Any) -> None:
    for module in (layer.self_attn.v_proj, layer.mlp.down_proj):
        module.weight.data = (2 * module.weight).t().contiguous().t()


def layout_of_a_norm(layer: Any) -> None:
    layer.input_layernorm.weight.data = (2 * layer.input_layernorm.weight).repeat_interleave(2)[::2]


def layout_of_a_bias(layer: Any) -> None:
    layer.mlp.up_proj.bias.data = (2 * layer.mlp.up_proj.bias).repeat_interleave(2)[::2]


def fewer_rows(layer: Any) -> None:
    for module in (layer.mlp.gate_proj, layer.mlp.up_proj):
        module.weight.data, module.bias.data = module.weight[:20], module.bias[:20]
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight[:, :20]


def loaded(layer: Any) -> None:
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()})


def loaded_as_they_are(layer: Any) -> None:
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()}, assign=True)


def weight(layer: Any) -> None:
    layer.mlp.up_proj.weight = nn.Parameter(2 * layer.mlp.up_proj.weight)


def norm_weight(layer: Any) -> None:
    layer.post_attention_layernorm.weight = nn.Parameter(2 * layer.post_attention_layernorm.weight)


def bias(layer: Any) -> None:
    layer.self_attn.o_proj.bias = nn.Parameter(2 * layer.self_attn.o_proj.bias)


def no_bias(layer: Any) -> None:
    layer.mlp.gate_proj.bias = None


def linear(layer: Any) -> None:
    layer.mlp.gate_proj = copy.deepcopy(layer.mlp.up_proj)


def mlp(layer: Any) -> None:
    layer.mlp = copy.deepcopy(layer.mlp)
    layer.mlp.down_proj.weight.mul_(2)


def class_of_a_linear(layer: Any) -> None:
    layer.self_attn.q_proj.__class__ = Scaled


def class_of_a_norm(layer: Any) -> None:
    own = type(layer.input_layernorm).forward
    give_class(layer.input_layernorm, lambda self, x: 2 * own(self, x))


def class_of_the_layer(layer: Any) -> None:
    own = type(layer).forward
    give_class(layer, lambda self, x, **kwargs: own(self, x + 1, **kwargs))


def eps(layer: Any) -> None:
    layer.input_layernorm.variance_epsilon = layer.post_attention_layernorm.variance_epsilon = 0.5


def eps_of_one_norm(layer: Any) -> None:
    layer.post_attention_layernorm.variance_epsilon = 0.5


def parametrization(layer: Any) -> None:
    for module in (layer.mlp.up_proj, layer.input_layernorm):
        parametrize.register_parametrization(module, "weight", Doubled())


def plain_tensor(module: Any) -> None:
    weight = module.weight
    del module.weight
    module.weight = 2 * weight


def part(path: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """`change` of a part of the layer, of the layer itself where path is ""."""

    def changed(layer: Any) -> None:
        change(layer.get_submodule(path))

    changed.__name__ = f"{change.__name__} of {path or 'layer'}"
    return changed


def hook(module: nn.Module) -> None:
    module.register_forward_hook(plus_one)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))


def own_forward(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda *args, **kwargs: plus_one(module, args, own(*args, **kwargs))


CALLED = ("", "mlp", "mlp.up_proj", "self_attn", "self_attn.o_proj", "post_attention_layernorm")
FOLLOWED = (in_place, data, loaded, fewer_rows, layout)  # the same tensors: nothing is looked up again
LOOKED_UP = (loaded_as_they_are, weight, norm_weight, bias, no_bias, linear, mlp)  # when there is a prompt again
LEFT = (  # to the layers themselves
    *(class_of_a_linear, class_of_a_norm, class_of_the_layer, eps, eps_of_one_norm, parametrization),
    *(layout_of_a_norm, layout_of_a_bias),
    *[part(path, plain_tensor) for path in ("self_attn.q_proj", "post_attention_layernorm")],
    *[part(path, hook) for path in CALLED],
    *[part(path, pre_hook) for path in CALLED if path != "self_attn"],  # whose arguments have names
    *[part(path, own_forward) for path in CALLED],
)


@on_each_layer
@named(*FOLLOWED, *LOOKED_UP, *LEFT)
@torch.no_grad()
def test_a_change_between_two_tokens(change, index) -> None:
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    untouched, model = sequence.models
    before = untouched(TOKENS).logits
    assert sequence.give(PROMPT) == TOGETHER
    assert sequence.give(STEPS[0]) == TOGETHER
    for each in sequence.models:
        change(each.model.layers[index])
    assert (untouched(TOKENS).logits - before).abs().max() > 0.01  # else nothing could be told from this test
    for tokens in STEPS[1:]:
        assert (sequence.give(tokens) == TOGETHER) == (
            change in FOLLOWED or (change in LOOKED_UP and len(tokens[0]) > 1)
        )
    again = Sequence(untouched, model)
    for tokens in (PROMPT, *STEPS):
        assert (again.give(tokens) == TOGETHER) == (change not in LEFT)


def training(layer: Any) -> None:
    layer.train()


def compiled(layer: Any) -> None:
    layer.compile(backend="eager")


def listener(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda *_: None)


@on_each_layer
@named(training, compiled, listener)
@torch.no_grad()
def test_a_change_that_leaves_the_layers_apart_and_the_logits_as_they_are(change, index) -> None:
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    assert sequence.give(PROMPT) == TOGETHER
    for each in sequence.models:
        change(each.model.layers[index])
    for tokens in STEPS:
        assert TOGETHER[0] not in sequence.give(tokens)
    again = Sequence(*sequence.models)
    for tokens in (PROMPT, *STEPS):
        assert TOGETHER[0] not in again.give(tokens)


@on_each_layer
@pytest.mark.parametrize("path", CALLED)
@torch.no_grad()
def test_a_hook_sees_what_it_would_in_the_untouched_model(path, index) -> None:
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    sequence.give(PROMPT)
    seen: list[list[Tensor]] = [[], []]
    handles = []
    for outputs, model in zip(seen, sequence.models, strict=True):

        def note(_: Any, args: Any, out: Any, outputs: list[Tensor] = outputs) -> None:
            outputs.append(out[0] if isinstance(out, tuple) else out)

        handles.append(model.model.layers[index].get_submodule(path).register_forward_hook(note))
    for tokens in STEPS:
        sequence.give(tokens)
    for handle in handles:
        handle.remove()
    assert len(seen[0]) == len(STEPS)
    for expected, found in zip(*seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    again = Sequence(*sequence.models)
    for tokens in (PROMPT, *STEPS):
        assert again.give(tokens) == TOGETHER


@torch.no_grad()
def test_a_hook_beside_those_that_collect_outputs() -> None:
    """transformers' own stay where they are once they are installed, and do nothing."""
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    for model in sequence.models:
        model(TOKENS, output_hidden_states=True)
    assert sequence.give(PROMPT) == TOGETHER
    assert sequence.give(STEPS[0]) == TOGETHER
    if not sequence.models[1].model.layers[1]._forward_hooks:
        pytest.skip("transformers 4 collects without hooks")
    for model in sequence.models:
        hook(model.model.layers[1])
    assert sequence.give(STEPS[1]) == APART


@torch.no_grad()
def test_a_hook_without_a_handle() -> None:
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    for tokens in (PROMPT, STEPS[0]):
        assert sequence.give(tokens) == TOGETHER
    for model in sequence.models:
        model.model.layers[0].mlp._forward_hooks[-1] = plus_one
    for tokens in STEPS[1:]:
        assert TOGETHER[0] not in sequence.give(tokens)


@torch.no_grad()
def test_layers_that_change_their_places_in_the_cache() -> None:
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    assert sequence.give(PROMPT) == TOGETHER
    for model in sequence.models:
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = 1 - i
    for tokens in STEPS:
        assert sequence.give(tokens) == APART


@torch.no_grad()
def test_the_same_change_of_all_layers() -> None:
    """They are read anew by `optimize_`; until then they go by their parts."""
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    sequence.give(PROMPT)
    for model in sequence.models:
        for layer in model.model.layers:
            eps(layer)
    assert sequence.give(STEPS[0]) == []
    llmkern.optimize_(sequence.models[1])
    again = Sequence(*sequence.models)
    for tokens in (PROMPT, *STEPS):
        assert again.give(tokens) == TOGETHER
