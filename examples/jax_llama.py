"""A Llama decoder in JAX over llmkern.jax, from a transformers checkpoint: floating point, or llmkern's int8.

    python examples/jax_llama.py FOLDER --prompt "Why is the sky blue?" --tokens 16  # on a TPU, else interpreted
    python examples/jax_llama.py FOLDER --chip v5e  # compile for a chip that is not here

FOLDER is what transformers' `save_pretrained` writes, also of a model that `llmkern.quantize_` has quantized.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from safetensors.flax import load_file
from transformers import AutoTokenizer

from llmkern import jax as ops

Weights = dict[str, Any]


def load(folder: Path) -> tuple[dict[str, Any], Weights]:
    """(config, weights); those of all layers are stacked, so that one traced layer serves them all."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    outside = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    layers = range(config["num_hidden_layers"])
    packed = {name.split(".", 3)[3].removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")}
    for name in [f"model.layers.{i}.{each}" for i in layers for each in packed]:  # in all layers, packed or not
        tensors[name] = dense(tensors, name)
    names = [name.removeprefix("model.layers.0.") for name in tensors if name.startswith("model.layers.0.")]
    stacked = {name: jnp.stack([tensors.pop(f"model.layers.{i}.{name}") for i in layers]) for name in names}
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    weight_only = {layer for group in groups if not group["input_activations"] for layer in group["targets"]}
    for name in [name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")]:
        stacked[f"{name}.weight_only"] = jnp.array([f"model.layers.{i}.{name}" in weight_only for i in layers])
    return config, outside | {"layers": stacked, "lm_head.weight_only": jnp.array("lm_head" in weight_only)}


def dense(tensors: Weights, name: str) -> Array:
    """The floating-point weight of int8 codes, one scale a row, or packed four to a word, one scale for 32 columns."""
    scale = tensors.pop(f"{name}_scale", None)
    if scale is None:
        return tensors.pop(name)
    if (codes := tensors.pop(name, None)) is None:
        words, shape = tensors.pop(f"{name}_packed"), map(int, tensors.pop(f"{name}_shape"))
        codes = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*shape).astype(jnp.float32) - 128
    weight = codes.reshape(*scale.shape, -1) * scale[..., None].astype(jnp.float32)
    return weight.reshape(codes.shape).astype(tensors["model.norm.weight"].dtype)


def linear(weights: Weights, name: str, x: Array) -> Array:
    weight, scale = weights[f"{name}.weight"], weights.get(f"{name}.weight_scale")
    if scale is None:
        return ops.linear(x, weight)
    w8a16, w8a8 = (partial(ops.int8_linear, x, weight, scale, scheme=scheme) for scheme in ("w8a16", "w8a8"))
    return jax.lax.cond(weights[f"{name}.weight_only"], w8a16, w8a8)


def new_cache(config: dict[str, Any], batch: int, slots: int, dtype: Any) -> tuple[Array, Array]:
    """Keys and values [layers, B, Hkv, slots, D]."""
    shape = (config["num_hidden_layers"], batch, config["num_key_value_heads"], slots, config["head_dim"])
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def forward(
    config: dict[str, Any], weights: Weights, tokens: Array, cache: tuple[Array, Array], past: Array, prefill: bool
) -> tuple[Array, tuple[Array, Array]]:
    """(logits [B, S, vocabulary], cache) of tokens [B, S] at positions past, past + 1 …; prefill: past is 0."""
    eps, (batch, length), dim = config["rms_norm_eps"], tokens.shape, cache[0].shape[-1]
    steps = config["rope_parameters"]["rope_theta"] ** (-jnp.arange(0, dim, 2) / dim)
    cos, sin = (f(jnp.tile((past + jnp.arange(length))[:, None] * steps, 2)) for f in (jnp.cos, jnp.sin))  # [S, D]
    ends = jnp.full((batch,), past + length, jnp.int32)

    def heads(x: Array) -> Array:
        return x.reshape(batch, length, -1, dim).transpose(0, 2, 1, 3)

    def layer(carry: tuple[Array, Array], inputs: tuple[Weights, Array, Array]) -> Any:
        (update, residual), (w, k_cache, v_cache) = carry, inputs
        x, residual = ops.add_rms_norm(update, residual, w["input_layernorm.weight"], eps)
        q, k, v = (heads(linear(w, f"self_attn.{name}_proj", x)) for name in "qkv")
        q, k = ops.rope(q, k, cos, sin)
        put = partial(jax.lax.dynamic_update_slice, start_indices=(0, 0, past, 0))
        k_cache, v_cache = put(k_cache, k), put(v_cache, v)
        out = ops.attention(q, k, v, causal=True) if prefill else ops.attention_decode(q, k_cache, v_cache, ends)
        update = linear(w, "self_attn.o_proj", out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
        x, residual = ops.add_rms_norm(update, residual, w["post_attention_layernorm.weight"], eps)
        update = linear(w, "mlp.down_proj", ops.swiglu(linear(w, "mlp.gate_proj", x), linear(w, "mlp.up_proj", x)))
        return (update, residual), (k_cache, v_cache)

    rows, scale = weights["model.embed_tokens.weight"][tokens], weights.get("model.embed_tokens.weight_scale")
    hidden = (rows if scale is None else rows * scale[tokens]).astype(weights["model.norm.weight"].dtype)
    (update, residual), cache = jax.lax.scan(layer, (hidden, jnp.zeros_like(hidden)), (weights["layers"], *cache))
    x = ops.rms_norm(update + residual, weights["model.norm.weight"], eps)
    return linear({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights, "lm_head", x), cache


def generate(config: dict[str, Any], weights: Weights, prompt: list[int], count: int) -> tuple[list[int], Array]:
    """(`count` greedy tokens, the prompt's logits); each step is jitted whole and updates the cache in place."""
    prefill, step = (jax.jit(partial(forward, config, prefill=whole), donate_argnums=2) for whole in (True, False))
    cache = new_cache(config, 1, len(prompt) + count, weights["model.norm.weight"].dtype)
    prompt_logits, cache = prefill(weights, jnp.array([prompt]), cache, jnp.int32(0))
    found = [int(prompt_logits[0, -1].argmax())]
    for past in range(len(prompt), len(prompt) + count - 1):
        logits, cache = step(weights, jnp.array([found[-1:]]), cache, jnp.int32(past))
        found.append(int(logits[0, -1].argmax()))
    return found, prompt_logits


def compile_for(chip: str, config: dict[str, Any], weights: Weights, length: int, slots: int) -> None:
    """Compile both for `chip` with libtpu, and print the memory that they take."""
    from llmkern.testing.tpu_offline import compiled

    cache = jax.eval_shape(lambda: new_cache(config, 1, slots, weights["model.norm.weight"].dtype))
    past = jax.ShapeDtypeStruct((), jnp.int32)
    for name, tokens, prefill in (("prefill", length, True), ("decode", 1, False)):
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        step = partial(forward, config, prefill=prefill)
        print(f"{name} of {tokens} tokens, compiled for {chip}: {compiled(chip, step, weights, ids, cache, past)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A Llama decoder in JAX over llmkern.jax.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--chip", help="compile for this chip instead of running")
    chosen = parser.parse_args()
    config, weights = load(chosen.folder)
    if chosen.chip:
        return compile_for(chosen.chip, config, weights, length=128, slots=2048)
    tokenizer = AutoTokenizer.from_pretrained(chosen.folder)
    prompt = tokenizer(chosen.prompt)["input_ids"]
    if not (there := jax.default_backend() == "tpu"):
        print("JAX finds no TPU here: the kernels run in Pallas's interpreter, slowly")
    with nullcontext() if there else ops.interpreted():
        found, _ = generate(config, weights, prompt, chosen.tokens)
    print(chosen.prompt + tokenizer.decode(found))


if __name__ == "__main__":
    main()
