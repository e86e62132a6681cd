"""Tiny models of every architecture that transformers can build from a shrunk default config."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

import llmkern
from llmkern.quantization import quantize_

MAX_PARAMETERS = 32_000_000

# Sizes by the names that configs give them; the first name that fits wins, and what is not named keeps its default.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "entity_vocab_size", "src_vocab_size", "tgt_vocab_size"), 99),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "projection_dim", "emb_dim"), 64
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth", "e_layers", "d_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 96
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 16),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
}
# Each is tried in turn: some configs insist on sizes that others derive.
DROPPED: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim", "d_kv"),
    ("num_key_value_heads", "num_kv_heads"),
    ("head_dim", "d_kv", "num_key_value_heads", "num_kv_heads"),
    ("image_size", "patch_size"),
    ("hidden_size", "num_attention_heads", "head_dim", "num_key_value_heads", "embed_dim", "num_heads", "depth"),
)
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)


def architectures() -> list[str]:
    """Model types of which transformers has both a config and a model."""
    return [name for name in transformers.CONFIG_MAPPING if _has_model(name)]


def tiny(name: str) -> nn.Module | None:
    """A tiny model of this type in evaluation mode; None where none of the shrunk configs makes one."""
    for dropped in DROPPED:
        try:
            config = _shrunk(transformers.CONFIG_MAPPING[name], set(dropped))
            cls = _model_class(type(config))
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if size > MAX_PARAMETERS:
                continue
            torch.manual_seed(0)
            return cls(config).eval()
        except Exception:  # whatever a config or a model says of sizes that it was not made for
            continue
    return None


def forward_arguments(model: Any) -> dict[str, torch.Tensor] | None:
    """Tokens for a model that takes them; None for one that wants something else."""
    if getattr(model, "main_input_name", "") != "input_ids":
        return None
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **decoder}


def _has_model(name: str) -> bool:
    try:
        return _model_class(transformers.CONFIG_MAPPING[name]) is not None
    except (ValueError, ImportError):
        return False


def _model_class(config_class: Any) -> Any:
    for name in MAPPINGS:
        mapping = getattr(transformers, name)
        if config_class in mapping:
            try:
                found = mapping[config_class]
            except ValueError:  # named there, and not to be had
                continue
            return found[0] if isinstance(found, (tuple, list)) else found
    return None


def _shrunk(config_class: Any, dropped: set[str]) -> Any:
    return config_class(**dict(_sizes(config_class(), dropped)))


def _sizes(config: Any, dropped: set[str]) -> Iterator[tuple[str, Any]]:
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            yield key, _shrunk(type(value), dropped).to_dict()
        elif key in SIZES and key not in dropped and type(value) is int and value > 0:
            yield key, min(SIZES[key], value)


def round_trip(name: str, scheme: str = "int8") -> str:
    """Quantize, save and load a tiny model of this type: "bit for bit", "is not built", "is not quantized", or what
    went wrong."""
    model = tiny(name)
    if model is None:
        return "is not built"
    try:
        quantize_(model, scheme)
    except ValueError as error:
        return f"is not quantized: {error}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            loaded = llmkern.load(folder)
        except (RuntimeError, ValueError) as error:
            return f"fails: {error}"
    wanted, got = model.state_dict(), loaded.state_dict()
    for key in wanted.keys() | got.keys():
        if key not in wanted or key not in got:
            return f"fails: {key} is in one of the two"
        if wanted[key].dtype != got[key].dtype or not torch.equal(wanted[key], got[key]):
            return f"fails: {key} differs"
    arguments = forward_arguments(model)
    return "bit for bit" if arguments is None or _same_outputs(model, loaded, arguments) else "fails: outputs differ"


def _same_outputs(model: Any, loaded: Any, arguments: dict[str, torch.Tensor]) -> bool:
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            wanted = model(**arguments)
    except Exception:  # it wants other arguments
        return True
    with torch.no_grad():
        torch.manual_seed(0)
        got = loaded(**arguments)
    tensors = [[v.nan_to_num() for v in out.to_tuple() if isinstance(v, torch.Tensor)] for out in (wanted, got)]
    # Loaded experts may lie transposed, of untouched models too: other kernels then round in another order.
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*tensors, strict=True))


if __name__ == "__main__":  # all of them, one line each, or the slice i/n of them: python architectures.py 0/3
    import sys

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    part, parts = map(int, (sys.argv[1:] or ["0/1"])[0].split("/"))
    for architecture in architectures()[part::parts]:
        print(f"{architecture:32} {round_trip(architecture).splitlines()[0]}", flush=True)
