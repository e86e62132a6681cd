"""A quantized model of any architecture is saved, checked by reading it, and loaded bit for bit."""

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern.quantization import Int8, load_, quantize_
from llmkern.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")

from architectures import round_trip, tiny  # noqa: E402  (imports transformers)

# One of each way in which a checkpoint differs from the model's state: merged experts, renamed layers, tied weights of
# encoder and decoder, Conv1D, derived weights, submodels with names of their own.
SAMPLE = (
    "mixtral",
    "qwen3_moe",
    "gpt_neox",
    "bart",
    "marian",
    "dinov2",
    "gpt2",
    "t5",
    "llava",
    "bert",
    "clip",
    "olmo",
    "xlnet",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_round_trip(name: str) -> None:
    assert round_trip(name) == "bit for bit"


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox", "bart"])
@torch.no_grad()
def test_stock_transformers_reads_it(name: str, tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    model = quantize_(tiny(name))
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    arguments = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path)
    wanted = model(**arguments).logits
    assert (stock(**arguments).logits - wanted).norm() < 0.03 * wanted.norm()


def test_what_cannot_be_read_back_is_said_when_it_is_saved(monkeypatch, tmp_path) -> None:
    from llmkern.quantization import saving

    monkeypatch.setattr(saving, "_merges", lambda model: False)  # and so the experts go where stock loses them
    model = quantize_(tiny("llama"))
    model.lm_head = torch.nn.Linear(64, 7)
    with pytest.raises(RuntimeError, match=r"save_pretrained: .* cannot be read back .*lm_head.*dequantize_"):
        model.save_pretrained(tmp_path)


def test_from_pretrained_quantizes(tmp_path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "plain")
    config = llmkern.Int8Config(max_error=0.0, skip=["lm_head"])
    loaded = type(model).from_pretrained(tmp_path / "plain", quantization_config=config)
    quantize_(model, Int8(max_error=0.0), skip=["lm_head"])
    assert_same_bits(list(loaded.state_dict().values()), list(model.state_dict().values()))
    assert llmkern.report(loaded).quantization == llmkern.report(model).quantization
    assert loaded.config.quantization_config == model.config.quantization_config
    assert loaded.config.quantization_config["llmkern"] == {"scheme": "int8", "max_error": 0.0, "smooth": True}
    loaded.save_pretrained(tmp_path / "int8")
    again = llmkern.load(tmp_path / "int8")
    assert again.config.quantization_config == model.config.quantization_config
    assert_same_bits(list(again.state_dict().values()), list(model.state_dict().values()))
    assert len(llmkern.report(again).quantization.quantized) == len(llmkern.report(model).quantization.quantized)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "int8/model.safetensors").read_bytes()


def test_another_program_s_int8_checkpoint_keeps_its_codes(tmp_path) -> None:
    """compressed-tensors names targets by class or pattern, and stores scales in the model's dtype."""
    import json

    from safetensors.torch import load_file, save_file

    model = quantize_(tiny("llama"), skip=["lm_head", "embed_tokens"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    description = config["quantization_config"]
    group = description["config_groups"]["group_0"]
    description["config_groups"] = {"group_0": {**group, "targets": ["Linear"]}}
    description["ignore"] = ["re:lm_.*"]
    del description["llmkern"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v.bfloat16() if "scale" in k else v for k, v in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    loaded = llmkern.load(tmp_path)
    assert type(loaded.lm_head) is torch.nn.Linear
    assert_same_bits(loaded.model.layers[0].mlp.up_proj.codes, model.model.layers[0].mlp.up_proj.codes)


def test_load_refuses_what_it_does_not_read(tmp_path) -> None:
    import json

    with pytest.raises(FileNotFoundError, match="^load: .*nowhere is no folder"):
        llmkern.load(tmp_path / "nowhere")
    model = quantize_(tiny("llama"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="^load: .* is no quantized model that llmkern reads: .*weights have num_bits 4, expected 8"
    ):
        llmkern.load(tmp_path)
    with pytest.raises(TypeError, match="load_: model is a Linear, expected a transformers model"):
        load_(torch.nn.Linear(2, 2), tmp_path)
