"""The models that llmkern must work on, each with a tiny configuration and random weights.

Small, but with everything that an architecture can trip over: grouped key/value heads, head sizes that are not
hidden / heads, windows shorter than the sequence, soft caps small enough to bend, biases and norm weights that are
not their defaults, and weights large enough that greedy decoding does not repeat one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 101
SEQUENCE = 12
WINDOW = 4
PADDED = 5  # positions that are padding in the last row of a padded batch
PADDINGS = ("none", "left", "right")

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_DECODER = {**_SIZES, "num_key_value_heads": 2}
_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_ENCODER_DECODER = {
    **_SPECIAL,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_DROPOUTS = (
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "seq_classif_dropout",
)


@dataclass(frozen=True, repr=False)
class Entry:
    """One architecture.

    kind: what its inputs are: "decoder" and "encoder" take token ids, "encoder-decoder" both sides, "speech" mel
        frames and decoder ids, "vision" pixels, "plain" the embeddings of a torch.nn.TransformerEncoder.
    config: makes a new configuration; a plain model has none.
    make: takes the configuration, makes the model.
    kinds: the module kinds that a swap report must speak of.
    spread: standard deviation of the weights.  seed: of the weights.
    """

    name: str
    kind: str
    make: Callable[[Any], nn.Module]
    config: Callable[[], Any] = lambda: None
    kinds: tuple[str, ...] = ("norm", "attention")
    spread: float = 0.25
    seed: int = 0

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "encoder-decoder", "speech")

    @property
    def paddings(self) -> tuple[str, ...]:
        return ("none",) if self.kind in ("vision", "speech") else PADDINGS

    def build(self, *, config: Any = None, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in eval mode, with the same weights each time.  `dropout` goes to every dropout there is."""
        config = config if config is not None else self.config()
        for name in _DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.make(config)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = dropout
        _randomise(model, self.seed, self.spread)
        _cast(model, dtype)
        if self.generates:
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
        return model.eval()

    def inputs(self, batch: int = 2, padding: str = "none", *, seed: int = 1) -> dict[str, Tensor]:
        """Keyword arguments of a forward.  With padding, the last row has PADDED positions of it on that side."""
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, VOCABULARY, (batch, SEQUENCE), generator=draw)
        mask = torch.ones(batch, SEQUENCE, dtype=torch.long)
        if padding != "none":
            padded = slice(0, PADDED) if padding == "left" else slice(SEQUENCE - PADDED, SEQUENCE)
            mask[-1, padded] = 0
            tokens[-1, padded] = 0
        decoder = torch.randint(3, VOCABULARY, (batch, 7), generator=draw)
        if self.kind == "vision":
            return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw)}
        if self.kind == "speech":
            return {"input_features": torch.randn(batch, 8, 32, generator=draw), "decoder_input_ids": decoder}
        if self.kind == "plain":
            source = {"src": torch.randn(batch, SEQUENCE, 32, generator=draw)}
            return source if padding == "none" else {**source, "src_key_padding_mask": mask == 0}
        given = {"input_ids": tokens} if padding == "none" else {"input_ids": tokens, "attention_mask": mask}
        return {**given, "decoder_input_ids": decoder} if self.kind == "encoder-decoder" else given

    def cast(self, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs with floating ones in `dtype`."""
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def prompt(self, batch: int, padding: str) -> dict[str, Tensor]:
        """Keyword arguments of `generate`."""
        inputs = self.inputs(batch, padding if self.kind != "speech" else "none")
        inputs.pop("decoder_input_ids", None)
        return inputs

    def output(self, result: Any) -> Tensor:
        """The logits, or what a plain encoder returns."""
        return result if isinstance(result, Tensor) else result.logits

    def at_kept_positions(self, output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The rows of `output` that are not padding (all of them where the output is not along the padded side)."""
        if self.kind == "plain" and "src_key_padding_mask" in inputs:
            return output[~inputs["src_key_padding_mask"]]
        if self.kind in ("decoder", "encoder") and "attention_mask" in inputs:
            return output[inputs["attention_mask"].bool()]
        return output

    def __repr__(self) -> str:
        return self.name


def _randomise(model: nn.Module, seed: int, spread: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:  # tied weights
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=draw)
            with torch.no_grad():
                if parameter.dim() < 2:
                    parameter.add_(0.3 * noise)  # norm weights and biases: around their defaults
                else:
                    parameter.copy_(spread * noise)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As `from_pretrained(dtype=)` does: what a checkpoint holds, so not the rotary frequencies."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)


def _plain(norm_first: bool, activation: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        32, 4, dim_feedforward=48, batch_first=True, norm_first=norm_first, activation=activation
    )
    final = nn.LayerNorm(32) if norm_first else None
    return nn.TransformerEncoder(layer, 2, norm=final, enable_nested_tensor=not norm_first)


_GATED = ("norm", "attention", "mlp")

ZOO = [
    Entry("llama", "decoder", hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_DECODER, head_dim=16), (*_GATED, "rope")),
    Entry(
        "mistral",
        "decoder",
        hf.MistralForCausalLM,
        lambda: hf.MistralConfig(**_DECODER, head_dim=16, sliding_window=WINDOW),
        (*_GATED, "rope"),
    ),
    Entry(
        "qwen2",
        "decoder",
        hf.Qwen2ForCausalLM,
        lambda: hf.Qwen2Config(**_DECODER, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        (*_GATED, "rope"),
    ),
    Entry("qwen3", "decoder", hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**_DECODER, head_dim=16), (*_GATED, "rope")),
    Entry(
        "gemma2",
        "decoder",
        hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(
            **_DECODER,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=10.0,
            attn_implementation="eager",  # transformers 4 would take sdpa, which leaves out the soft cap
        ),
        (*_GATED, "rope"),
    ),
    Entry(
        "gemma3",
        "decoder",
        hf.Gemma3ForCausalLM,
        lambda: hf.Gemma3TextConfig(
            **_DECODER,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=False,  # tied, and scaled as Gemma's are, they make decoding repeat its input
        ),
        (*_GATED, "rope"),
    ),
    Entry("phi3", "decoder", hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**_DECODER), (*_GATED, "rope")),
    Entry(
        "gpt2",
        "decoder",
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(**_SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ),
    Entry(
        "gpt_neox",
        "decoder",
        hf.GPTNeoXForCausalLM,
        lambda: hf.GPTNeoXConfig(**_SIZES, rotary_pct=0.5),
        ("norm", "attention", "rope"),
    ),
    Entry(
        "opt",
        "decoder",
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            **{k: v for k, v in _SIZES.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=16
        ),
    ),
    Entry("bert", "encoder", hf.BertForMaskedLM, lambda: hf.BertConfig(**_SIZES)),
    Entry("roberta", "encoder", hf.RobertaForMaskedLM, lambda: hf.RobertaConfig(**_SIZES)),
    Entry(
        "distilbert",
        "encoder",
        hf.DistilBertForMaskedLM,
        lambda: hf.DistilBertConfig(**_SPECIAL, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    ),
    Entry(
        "t5",
        "encoder-decoder",
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            **_SPECIAL,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=1,
        ),
        _GATED,
        spread=0.12,  # T5 does not scale q·k
    ),
    Entry(
        "marian",
        "encoder-decoder",
        hf.MarianMTModel,
        lambda: hf.MarianConfig(**_ENCODER_DECODER, max_position_embeddings=64),
    ),
    Entry(
        "whisper",
        "speech",
        hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            **_ENCODER_DECODER,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=64,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
    ),
    Entry(
        "vit",
        "vision",
        hf.ViTForImageClassification,
        lambda: hf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            num_labels=10,
        ),
    ),
    Entry(
        "mixtral",
        "decoder",
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2),
        # transformers 4 has a gated MLP for each expert, 5 one module for all of them, which the layer computes.
        ("norm", "attention", *(("mlp",) if hf.__version__.startswith("4.") else ()), "rope"),
        seed=53,  # no token is near a tie between experts: rounding may decide those either way
    ),
    Entry(
        "gpt_oss",
        "decoder",
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(
            **_DECODER, head_dim=16, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
        ),
        ("norm", "attention", *(("experts",) if hf.__version__.startswith("4.") else ()), "rope"),
        seed=13,
    ),
    Entry("torch_postnorm", "plain", lambda config: _plain(False, "relu")),
    Entry("torch_prenorm", "plain", lambda config: _plain(True, "gelu")),
]
