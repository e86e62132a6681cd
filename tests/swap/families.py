"""Every family of models whose layers have a program, or the sentence why not; `python tests/swap/families.py` writes
families.md, to be read beside transformers' modelling files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import nn

from llmkern.programs.passes import fused
from llmkern.programs.program import Program
from llmkern.swap.layer_program import NoProgram, layer_program
from llmkern.swap.observe import settled

TEXT = Path(__file__).with_suffix(".md")

_SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_BOTH = {"vocab_size": 67, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
_BOTH |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_BOTH |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"image_size": 16, "patch_size": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


class Family(NamedTuple):
    """A family: a tiny model, and where in it the layers are that differ."""

    model: str
    config: str
    options: dict[str, Any]
    layers: tuple[str, ...]

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(hf, self.config)(**self.options)
            model: nn.Module = getattr(hf, self.model)(config).eval()
        return model


def _decoder(name: str, *layers: str, config: str = "", **options: Any) -> Family:
    return Family(f"{name}Model", config or f"{name}Config", {**_GROUPED, **options}, layers or ("layers.0",))


FAMILIES: dict[str, Family] = {
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", sliding_window=4),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=16),
    "phi3": _decoder("Phi3"),
    "smollm3": _decoder("SmolLM3", "layers.0", "layers.1", no_rope_layers=[1, 0]),
    "gemma": _decoder("Gemma", head_dim=16),
    "gemma2": _decoder("Gemma2", "layers.0", "layers.1", head_dim=16, sliding_window=4, attn_implementation="eager"),
    "gemma3": _decoder("Gemma3Text", "layers.0", head_dim=16, sliding_window=4),
    "olmo": _decoder("Olmo", clip_qkv=8.0),
    "olmo2": _decoder("Olmo2"),
    "olmo3": _decoder("Olmo3", sliding_window=4),
    "granite": _decoder(
        "Granite", attention_multiplier=0.2, residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0
    ),
    "cohere": _decoder("Cohere"),
    "cohere2": _decoder("Cohere2", "layers.0", "layers.3", num_hidden_layers=4, sliding_window=4),
    "glm": _decoder("Glm", head_dim=8),
    "glm4": _decoder("Glm4", head_dim=8),
    "starcoder2": _decoder("Starcoder2"),
    "stablelm": _decoder("StableLm", use_parallel_residual=False),
    "stablelm-parallel": _decoder("StableLm", use_parallel_residual=True),
    "phi": _decoder("Phi"),
    "persimmon": _decoder("Persimmon"),
    "nemotron": _decoder("Nemotron"),
    "gpt2": Family("GPT2Model", "GPT2Config", {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4}, ("h.0",)),
    "opt": _decoder("OPT", "decoder.layers.0", ffn_dim=48, word_embed_proj_dim=32),
    "gpt-neox": _decoder("GPTNeoX", "layers.0", rotary_pct=0.5),
    "gpt-j": Family(
        "GPTJModel",
        "GPTJConfig",
        {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        ("h.0",),
    ),
    "falcon": _decoder("Falcon", "h.0", new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "falcon-7b": _decoder("Falcon", "h.0", multi_query=True, new_decoder_architecture=False, alibi=False),
    "falcon-alibi": _decoder("Falcon", "h.0", multi_query=False, alibi=True, parallel_attn=False),
    "bloom": Family(
        "BloomModel", "BloomConfig", {"vocab_size": 67, "hidden_size": 32, "n_layer": 2, "n_head": 4}, ("h.0",)
    ),
    "mpt": Family(
        "MptModel", "MptConfig", {"vocab_size": 67, "d_model": 32, "n_layers": 2, "n_heads": 4}, ("blocks.0",)
    ),
    "gpt-oss": _decoder("GptOss", head_dim=16, sliding_window=4, num_local_experts=4, num_experts_per_tok=2),
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": _decoder("Qwen3Moe", head_dim=16, **_EXPERTS),
    "qwen3-moe-normalized": _decoder("Qwen3Moe", head_dim=16, norm_topk_prob=True, **_EXPERTS),
    "glm4-moe": _decoder(
        "Glm4Moe",
        "layers.0",
        "layers.1",
        head_dim=16,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
    ),
    "deepseek-v3": _decoder(
        "DeepseekV3",
        num_key_value_heads=4,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
    ),
    "bert": Family("BertModel", "BertConfig", _SIZES, ("encoder.layer.0",)),
    "roberta": Family("RobertaModel", "RobertaConfig", _SIZES, ("encoder.layer.0",)),
    "electra": Family("ElectraModel", "ElectraConfig", _SIZES, ("encoder.layer.0",)),
    "distilbert": Family(
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 67, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        ("transformer.layer.0",),
    ),
    "deberta-v2": Family("DebertaV2Model", "DebertaV2Config", _SIZES, ("encoder.layer.0",)),
    "modernbert": Family(
        "ModernBertModel",
        "ModernBertConfig",
        {**_SIZES, "local_attention": 4, "pad_token_id": 0},
        ("layers.0", "layers.1"),
    ),
    "vit": Family("ViTModel", "ViTConfig", _VISION, ("layers.0",)),
    "clip": Family("CLIPVisionModel", "CLIPVisionConfig", _VISION, ("encoder.layers.0",)),
    "siglip": Family("SiglipVisionModel", "SiglipVisionConfig", _VISION, ("encoder.layers.0",)),
    "dinov2": Family("Dinov2Model", "Dinov2Config", _VISION, ("encoder.layer.0",)),
    "wav2vec2": Family(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {**_SIZES, "conv_dim": [32], "conv_stride": [2], "conv_kernel": [3], "num_feat_extract_layers": 1},
        ("encoder.layers.0",),
    ),
    "whisper": Family(
        "WhisperModel",
        "WhisperConfig",
        {**_BOTH, "num_mel_bins": 8, "max_source_positions": 16},
        ("encoder.layers.0", "decoder.layers.0"),
    ),
    "bart": Family("BartModel", "BartConfig", _BOTH, ("encoder.layers.0", "decoder.layers.0")),
    "marian": Family("MarianModel", "MarianConfig", _BOTH, ("encoder.layers.0", "decoder.layers.0")),
    "t5": Family(
        "T5Model",
        "T5Config",
        {
            "vocab_size": 67,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
        ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
    ),
}


def _torch_layers() -> Iterator[tuple[str, nn.Module]]:
    sizes: dict[str, Any] = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "batch_first": True}
    yield "torch.nn.TransformerEncoderLayer", nn.TransformerEncoderLayer(**sizes).eval()
    yield "torch.nn.TransformerEncoderLayer norm_first", nn.TransformerEncoderLayer(**sizes, norm_first=True).eval()
    yield "torch.nn.TransformerDecoderLayer", nn.TransformerDecoderLayer(**sizes).eval()


def layers() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names of layers, and what makes each."""
    for name, family in FAMILIES.items():
        for path in family.layers:
            yield f"{name} {path}", lambda family=family, path=path: family.build().get_submodule(path)
    for name, layer in _torch_layers():
        yield name, lambda layer=layer: layer


def program_of(layer: nn.Module) -> Program | str:
    """The layer's program, or the sentence why there is none."""
    with settled():
        try:
            return layer_program(layer).program
        except NoProgram as error:
            return str(error)


def text() -> str:
    """All programs, fused."""
    lines = [
        "# Layers as programs",
        "",
        "Written by `python tests/swap/families.py`; to be read beside the modelling files.",
        "",
    ]
    for name, make in layers():
        program = program_of(make())
        written = f"```\n{fused(program)}\n```" if isinstance(program, Program) else f"No program: {program}."
        lines += [f"## {name}", "", written, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    TEXT.write_text(text())
