"""Ways to change what a model computes from outside of it: each counts at once, or the call goes the untouched way with
a sentence.  The table here is the one of CONTRIBUTING.md."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from layer_models import DECODER, PROMPT, STEPS, TOKENS, built, recorded
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama import modeling_llama as llama

import llmkern
from llmkern import ops

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning", "ignore:Full backward hook:UserWarning")

UNTOUCHED, AT_ONCE, REFUSED = "the call goes the untouched way", "counts at once", "is refused"


@functools.cache
def original() -> Any:
    return built(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)))


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a result one and a half times as large."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        if isinstance(out, Tensor):
            return out * 1.5
        if isinstance(out, tuple):
            return (out[0] * 1.5, *out[1:])
        key = "logits" if hasattr(out, "logits") else "last_hidden_state"
        out[key] = out[key] * 1.5
        return out

    return call


Open = Callable[[pytest.MonkeyPatch, Any], Any]


def class_forward(cls: Any) -> Open:
    def change(patch: pytest.MonkeyPatch, model: Any) -> None:
        patch.setattr(cls, "forward", scaled(cls.forward))

    return change


def base_forward(patch: pytest.MonkeyPatch, model: Any) -> None:
    """Replace the forward of a base class that the module's own forward calls."""

    class Base(llama.LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return llama.LlamaMLP.forward(self, x)

    for layer in model.model.layers:
        layer.mlp.__class__ = (
            type("MLP", (type(layer.mlp),), {}) if hasattr(type(layer.mlp), "_llmkern_guard") else Base
        )
    patch.setattr(llama.LlamaMLP, "forward", scaled(llama.LlamaMLP.forward))


def method_of_a_class(patch: pytest.MonkeyPatch, model: Any) -> None:
    cls = type(original().model.layers[0].mlp.act_fn)
    patch.setattr(cls, "forward", scaled(cls.forward))


def global_function(patch: pytest.MonkeyPatch, model: Any) -> None:
    rotate = llama.apply_rotary_pos_emb
    patch.setattr(llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(1.5 * q, k, cos, sin))


def attention_function(patch: pytest.MonkeyPatch, model: Any) -> None:
    own = AttentionInterface._global_mapping["sdpa"]
    patch.setitem(AttentionInterface._global_mapping, "sdpa", scaled(own))


def attention_function_of_the_file(patch: pytest.MonkeyPatch, model: Any) -> None:
    interface = llama.ALL_ATTENTION_FUNCTIONS
    patch.setitem(interface._local_mapping, "sdpa", scaled(interface["sdpa"]))


def mask_function(patch: pytest.MonkeyPatch, model: Any) -> None:
    def seen_by_all(*args: Any, **kwargs: Any) -> Tensor:
        mask = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
        return torch.ones_like(mask)

    patch.setitem(AttentionMaskInterface._global_mapping, "sdpa", seen_by_all)


def hook(name: str, path: str, function: Any) -> Open:
    def change(patch: pytest.MonkeyPatch, model: Any) -> None:
        for layer in model.model.layers:
            getattr(layer.get_submodule(path), name)(function)

    return change


class Registered(contextlib.ExitStack):
    """A hook for all modules."""

    def __init__(self, register: Callable[..., Any], function: Any) -> None:
        super().__init__()
        self.callback(register(function).remove)


def hook_for_all(name: str, function: Any) -> Open:
    def change(patch: pytest.MonkeyPatch, model: Any) -> Any:
        return Registered(getattr(nn_module, f"register_module_{name}"), function)

    return change


class Doubling(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func.overloadpacket is torch.ops.aten.silu else out


class FunctionDoubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is F.silu else out


class HalvedUpdate(llmkern.KVCache):
    def update(self, *args: Any, **kwargs: Any) -> Any:
        k, v = super().update(*args, **kwargs)
        return k, v / 2


def replaced_update(patch: pytest.MonkeyPatch, model: Any) -> None:
    update = hf.DynamicCache.update

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        k, v = update(self, *args, **kwargs)
        return k, v / 2

    patch.setattr(hf.DynamicCache, "update", halved)


def set_attribute(name: str, value: Any) -> Open:
    def change(patch: pytest.MonkeyPatch, model: Any) -> None:
        for layer in model.model.layers:
            setattr(layer.self_attn, name, value)

    return change


def older_state_dict(patch: pytest.MonkeyPatch, model: Any) -> None:
    held = getattr(model, "held", None) or model.state_dict()
    with torch.no_grad():
        held["model.layers.0.mlp.down_proj.weight"].mul_(2)


def loaded(patch: pytest.MonkeyPatch, model: Any) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def zeroed(module: Any, grad_in: Any, grad_out: Any = None) -> Any:
    return (grad_in[0] * 0,)


def is_activation(module: nn.Module) -> bool:
    return isinstance(module, type(original().model.layers[0].mlp.act_fn))


def doubled_output(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 2 if is_activation(module) else None


def doubled_input(module: nn.Module, args: Any) -> Any:
    return (args[0] * 2,) if is_activation(module) else None


def all_logits(model: Any) -> list[Tensor]:
    """Return the logits of a prompt and the steps after it: without a cache, and with one of the caller's."""
    with torch.no_grad():
        cache = llmkern.KVCache(model.config)
        found = [model(tokens, past_key_values=cache).logits for tokens in (PROMPT, *STEPS)]
        return [*found, model(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=True).logits]


def with_halved_updates(model: Any) -> list[Tensor]:
    cache = HalvedUpdate(model.config)
    with torch.no_grad():
        return [model(tokens, past_key_values=cache).logits for tokens in (PROMPT, *STEPS)]


def with_an_update_of_its_own(model: Any) -> list[Tensor]:
    cache = llmkern.KVCache(model.config)
    own = cache.layers[0].update

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        k, v = own(*args, **kwargs)
        return k, v / 2

    cache.layers[0].update = types.MethodType(halved, cache.layers[0])
    with torch.no_grad():
        return [model(tokens, past_key_values=cache).logits for tokens in (PROMPT, *STEPS)]


def gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def embedded(model: Any) -> Tensor:
    return model.get_input_embeddings()(TOKENS).detach()


def under(mode: Callable[[], Any]) -> Callable[[Any], list[Tensor]]:
    def outputs(model: Any) -> list[Tensor]:
        with mode(), torch.no_grad():
            return [model(TOKENS, use_cache=False).logits]

    return outputs


def jvp(model: Any) -> list[Tensor]:
    model.set_attn_implementation("eager")  # PyTorch's fused attention has no forward-mode AD
    x = embedded(model)
    with torch.no_grad():
        return list(torch.func.jvp(lambda z: model(inputs_embeds=z, use_cache=False).logits, (x,), (x.cos(),)))


def dual(model: Any) -> list[Tensor]:
    model.set_attn_implementation("eager")
    x = embedded(model)
    with torch.no_grad(), forward_ad.dual_level():
        out = model(inputs_embeds=forward_ad.make_dual(x, x.cos()), use_cache=False).logits
        return list(forward_ad.unpack_dual(out))


def vmap(model: Any) -> list[Tensor]:
    x = embedded(model)
    with torch.no_grad():
        return [torch.func.vmap(lambda z: model.model.layers[0].mlp(z) + model.model.norm(z))(x)]


def second_derivative(model: Any) -> list[Tensor]:
    x = embedded(model).requires_grad_()
    (first,) = torch.autograd.grad(
        model(inputs_embeds=x, use_cache=False).logits.logsumexp(-1).sum(), x, create_graph=True
    )
    return list(torch.autograd.grad(first.square().sum(), x))


def nothing(patch: pytest.MonkeyPatch, model: Any) -> None:
    pass


# door: (answer, changes that open it, what is compared)
Door = tuple[str, list[Open], Callable[[Any], list[Tensor]]]
CLASSES = (llama.LlamaMLP, llama.LlamaRMSNorm, llama.LlamaAttention, llama.LlamaDecoderLayer)
DOORS: dict[str, Door] = {
    "forward of a class replaced, on any class that the module's inherits from": (
        UNTOUCHED,
        [
            *map(class_forward, (*CLASSES, llama.LlamaModel, nn.Linear)),
            *(base_forward, method_of_a_class),
        ],
        all_logits,
    ),
    "forward of a class replaced that is swapped for its other methods": (
        AT_ONCE,
        [class_forward(llama.LlamaForCausalLM)],
        all_logits,
    ),
    "global function that the forward calls replaced": (UNTOUCHED, [global_function], all_logits),
    "attention function of the program's own under the model's name": (
        UNTOUCHED,
        [attention_function, attention_function_of_the_file],
        all_logits,
    ),
    "mask function of the program's own under the model's name": (AT_ONCE, [mask_function], all_logits),
    "forward hooks of a module": (
        UNTOUCHED,
        [
            hook("register_forward_hook", "mlp.act_fn", lambda module, args, out: out * 2),
            hook("register_forward_pre_hook", "mlp.act_fn", lambda module, args: (args[0] * 2,)),
        ],
        all_logits,
    ),
    "backward hooks of a module": (
        UNTOUCHED,
        [
            hook("register_full_backward_hook", "mlp.act_fn", zeroed),
            hook("register_full_backward_pre_hook", "mlp.act_fn", lambda module, grad: (grad[0] * 0,)),
        ],
        gradients,
    ),
    "hooks for all modules": (
        UNTOUCHED,
        [hook_for_all("forward_hook", doubled_output), hook_for_all("forward_pre_hook", doubled_input)],
        all_logits,
    ),
    "backward hooks for all modules": (
        UNTOUCHED,
        [
            hook_for_all("full_backward_hook", lambda m, i, o: (i[0] * 0,) if is_activation(m) else None),
            hook_for_all("full_backward_pre_hook", lambda m, o: (o[0] * 0,) if is_activation(m) else None),
        ],
        gradients,
    ),
    "attribute that a forward reads": (
        UNTOUCHED,
        [set_attribute("scaling", 0.1)],
        all_logits,
    ),
    "weights changed in place, by an older state_dict too": (AT_ONCE, [older_state_dict, loaded], all_logits),
    "cache whose update was overridden": (UNTOUCHED, [nothing], with_halved_updates),
    "update of one layer of a cache": (UNTOUCHED, [nothing], with_an_update_of_its_own),
    "update of a class of caches replaced": (UNTOUCHED, [replaced_update], all_logits),
    "dispatch mode": (UNTOUCHED, [nothing], under(Doubling)),
    "function mode": (UNTOUCHED, [nothing], under(FunctionDoubling)),
    "torch.func.jvp": (UNTOUCHED, [nothing], jvp),
    "forward-mode AD": (UNTOUCHED, [nothing], dual),
    "torch.func.vmap": (UNTOUCHED, [nothing], vmap),
}
CASES = [
    pytest.param(name, i, id=f"{name}-{i}") for name, (_, changes, _) in DOORS.items() for i, _ in enumerate(changes)
]


@contextlib.contextmanager
def opened(patch: pytest.MonkeyPatch, change: Open, *models: Any) -> Iterator[None]:
    with patch.context() as within, contextlib.ExitStack() as stack:
        for model in models:
            within_model = change(within, model) if model is models[0] or _is_of_the_model(change) else None
            if within_model is not None:
                stack.enter_context(within_model)
        yield


def _is_of_the_model(change: Open) -> bool:
    """Whether it changes the model, not the process."""
    return change.__qualname__.startswith(("hook.", "set_attribute", "older_state_dict", "loaded"))


@pytest.mark.parametrize(("name", "index"), CASES)
@pytest.mark.parametrize("when", ["before", "after", "after a call", "again"])
def test_a_door(name: str, index: int, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, changes, outputs = DOORS[name]
    change = changes[index]
    untouched, model = copy.deepcopy(original()), copy.deepcopy(original())
    llmkern.optimize_(copy.deepcopy(original()))  # another model, in the same process
    before = outputs(untouched)
    if when != "before":
        llmkern.optimize_(model)
    if when == "after a call":
        outputs(model)
    with opened(monkeypatch, change, untouched, model):
        if when in ("before", "again"):
            llmkern.optimize_(model, on_unsupported="ignore")
        expected, found = outputs(untouched), outputs(model)
        assert (
            change is nothing or max(float((a - b).abs().max()) for a, b in zip(expected, before, strict=True)) > 1e-3
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        if answer is UNTOUCHED and when == "after":
            assert recorded(lambda: outputs(model)).reasons
    if not _is_of_the_model(change):  # and when the door is closed again, all is as it was
        for ours, theirs in zip(outputs(model), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_second_derivative_of_eager_attention() -> None:
    config = hf.LlamaConfig(**DECODER, attn_implementation="eager")
    untouched = built(lambda: hf.LlamaForCausalLM(config))
    model = copy.deepcopy(untouched)
    llmkern.optimize_(model)
    for ours, theirs in zip(second_derivative(model), second_derivative(untouched), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.rms_norm(x, torch.ones(512), 1e-6),
        lambda x: ops.gelu(x.repeat(8, 1)),
        lambda x: ops.swiglu(x.repeat(8, 1), x.repeat(8, 1)),
        lambda x: ops.linear(x, torch.eye(512), None),
    ],
)
def test_an_op_of_a_dual_tensor_is_the_references(function: Callable[[Tensor], Tensor]) -> None:
    x, t = torch.randn(2, 4, 512, generator=torch.Generator().manual_seed(0))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, t))).tangent
    difference = (function((x + 1e-3 * t).double().float()) - function(x - 1e-3 * t)) / 2e-3
    torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=1e-2)
    with forward_ad.dual_level(), llmkern.use_backend("torch"), pytest.raises(RuntimeError, match="forward-mode AD"):
        function(forward_ad.make_dual(x, t))


@pytest.mark.parametrize("cls", [hf.LlamaModel, hf.Qwen3Model, hf.MistralModel])
@pytest.mark.parametrize("how", ["config", "keyword"])
@torch.no_grad()
def test_a_decoder_that_is_not_causal(cls: Any, how: str) -> None:
    untouched = built(lambda: cls(cls.config_class(**DECODER, head_dim=8)))
    keywords = {"is_causal": False} if how == "keyword" else {}
    if how == "config":
        untouched.config.is_causal = False
    model = copy.deepcopy(untouched)
    llmkern.optimize_(model)
    expected, causal = untouched(TOKENS, **keywords)[0], untouched(TOKENS, is_causal=True)[0]
    torch.testing.assert_close(model(TOKENS, **keywords)[0], expected, rtol=1e-4, atol=1e-4)
    assert (expected - causal).abs().max() > 0.01


STEERED = {
    "in place": "h.add_(0.7)",
    "steered": "h = h + 0.7",
    "stopped early": "break",
}


@pytest.mark.parametrize("line", STEERED.values(), ids=STEERED)
@torch.no_grad()
def test_a_forward_that_poses_as_another(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """functools.wraps names another source than that which runs."""
    own = llama.LlamaModel.forward
    made: dict[str, Any] = {"DynamicCache": hf.DynamicCache, "torch": torch, "Output": llama.BaseModelOutputWithPast}
    exec(
        f"""
def forward(self, input_ids=None, past_key_values=None, **_):
    h = self.embed_tokens(input_ids)
    cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
    angles = self.rotary_emb(h, torch.arange(h.shape[1])[None] + cache.get_seq_length())
    for i, layer in enumerate(self.layers):
        h = layer(h, attention_mask=None, position_embeddings=angles, past_key_values=cache)
        if i == 0:
            {line}
    return Output(last_hidden_state=self.norm(h), past_key_values=cache)
""",
        made,
    )
    monkeypatch.setattr(llama.LlamaModel, "forward", functools.wraps(own)(made["forward"]))
    untouched = copy.deepcopy(original())
    model = copy.deepcopy(untouched)
    llmkern.optimize_(model, on_unsupported="ignore")
    torch.testing.assert_close(model(TOKENS).logits, untouched(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_continuous_batching_gives_the_same_tokens() -> None:
    """Its paged cache sees new keys in the attention function: nothing may be cut to the keys before that."""
    small = hf.generation.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)  # else most of the memory
    options = hf.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    found = []
    for optimize in (False, True):
        model = copy.deepcopy(original())
        if optimize:
            llmkern.optimize_(model)
        results = model.generate_batch([[5, 6, 7], [8, 9, 10, 11]], options, small)
        found.append([result.generated_tokens for result in results.values()])
    assert found[1] == found[0]
    assert all(len(tokens) == 6 for tokens in found[0])


def test_weights_exchanged_on_conversion() -> None:
    model = copy.deepcopy(original())
    llmkern.optimize_(model)
    with torch.no_grad():
        model(TOKENS)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.bfloat16()
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        expected = copy.deepcopy(original()).bfloat16()(TOKENS).logits
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0.1, atol=0.3)


def test_the_table_of_the_documentation() -> None:
    """CONTRIBUTING.md has the same doors with the same answers."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    rows = dict(
        re.findall(r"^\| ([^|]+?) \| (counts at once|the call goes the untouched way|is refused) \|", text, re.M)
    )
    assert rows == {name: answer for name, (answer, _, _) in DOORS.items()}
