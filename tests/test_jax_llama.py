"""examples/jax_llama.py against transformers: SmolLM2's logits by the accuracy rule, and its greedy tokens."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmkern.jax
from llmkern.testing.compare import errors
from llmkern.testing.float64 import Float64
from llmkern.testing.real_models import load_smollm2
from llmkern.testing.tpu_offline import missing

if importlib.util.find_spec("jax") is None:
    pytest.skip("JAX is not installed; pip install jax", allow_module_level=True)


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "jax_llama.py"
PROMPT = "The capital of France is"
TOKENS = 3


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("jax_llama", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["jax_llama"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["fp32", "int8"])
def checkpoint(request, tmp_path_factory):
    """(model, token ids of the prompt, folder of its checkpoint).

    int8 is weight-only: where activations are quantized, a code beside a tie goes either way in any two
    implementations, and thirty layers make 0.5 of a logit of it; W8A8 is judged as an op, codes and all.
    """
    model, tokenizer = load_smollm2()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    if request.param == "int8":
        llmkern.quantize_(model, llmkern.Int8(max_error=0))
    folder = tmp_path_factory.mktemp("smollm2") / request.param
    model.save_pretrained(folder)
    return model, ids, folder


def test_weights_in_blocks_are_read_as_what_they_stand_for(example, tmp_path) -> None:
    """Where one layer has them, so are those of the same name in other layers."""
    sizes = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    llmkern.quantize_(model, {"layers.1.mlp.down_proj": "int8-block", "mlp": "int8"})
    model.save_pretrained(tmp_path)
    _, weights = example.load(tmp_path)
    for name in ("mlp.down_proj", "mlp.up_proj"):
        read = weights["layers"]
        for i, layer in enumerate(model.model.layers):
            codes = torch.tensor(np.asarray(read[f"{name}.weight"][i]))
            scale = 1 if name == "mlp.down_proj" else torch.tensor(np.asarray(read[f"{name}.weight_scale"][i]))
            torch.testing.assert_close(codes * scale, layer.get_submodule(name).dequantized_weight())
    assert "mlp.down_proj.weight_scale" not in read


@pytest.mark.real_model
def test_logits_and_tokens_are_those_of_transformers(example, checkpoint) -> None:
    """The prefill's logits keep the rule; the greedy tokens, of prefill and steps of one token, are the same."""
    model, ids, folder = checkpoint
    config, weights = example.load(folder)
    with llmkern.jax.interpreted():
        found, logits = example.generate(config, weights, ids[0].tolist(), TOKENS)
    with torch.no_grad(), llmkern.use_backend("reference"):
        base = model(ids).logits
        with Float64():
            exact = model(ids).logits
    (error,) = errors(torch.from_dlpack(logits), base, exact)
    assert error.ok, (
        f"error {error.candidate:.3g}; transformers' is {error.baseline:.3g}, {error.allowed:.3g} is allowed"
    )
    expected = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    assert found == expected[0, ids.shape[1] :].tolist()


@pytest.mark.real_model
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_compiles_for_v5e(example, checkpoint, capsys) -> None:
    """Both programs, whole: three kinds of kernels at least, and the weights among the arguments."""
    _, _, folder = checkpoint
    config, weights = example.load(folder)
    example.compile_for("v5e", config, weights, length=128, slots=2048)
    said = capsys.readouterr().out
    print(said)
    prefill, decode = said.splitlines()
    assert prefill.startswith("prefill of 128 tokens, compiled for v5e:")
    assert decode.startswith("decode of 1 tokens, compiled for v5e:")


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 150
