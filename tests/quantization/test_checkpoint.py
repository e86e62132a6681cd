from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmkern.nn import Int8Linear
from llmkern.quantization import Int8, load_, quantize_
from llmkern.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")


def empty_model(folder: Path):
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()


@pytest.fixture
def saved(tiny_llama, tmp_path: Path) -> Path:
    # Between the errors of the layers, so that both schemes are there.
    quantize_(tiny_llama, Int8(max_error=0.010))
    schemes = {m.scheme for m in tiny_llama.modules() if isinstance(m, Int8Linear)}
    assert schemes == {"auto", "w8a16"}
    tiny_llama.save_pretrained(tmp_path)
    return tmp_path


def test_saved_and_loaded_is_the_same_model_to_the_bit(tiny_llama, saved: Path, ids) -> None:
    model = load_(empty_model(saved), saved)
    assert_same_bits(model(ids).logits, tiny_llama(ids).logits)
    for (path, a), (_, b) in zip(tiny_llama.named_modules(), model.named_modules(), strict=True):
        assert type(a) is type(b), path
        assert getattr(a, "scheme", "") == getattr(b, "scheme", ""), path
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(saved / "again")
    assert (saved / "again/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_stock_transformers_loads_it(tiny_llama, saved: Path, ids) -> None:
    pytest.importorskip("compressed_tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    wanted = tiny_llama(ids).logits
    assert (model(ids).logits - wanted).norm() < 0.02 * wanted.norm()


def test_a_conv1d_model_comes_back(tmp_path: Path, ids) -> None:
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    quantize_(model)
    with pytest.warns(
        UserWarning, match="only llmkern.load reads this checkpoint: transformer.h.0.attn.c_attn and 3 others"
    ):
        model.save_pretrained(tmp_path)
    assert_same_bits(load_(empty_model(tmp_path), tmp_path)(ids).logits, model(ids).logits)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def without_quantization(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def edit(change):
    def edited(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edited


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "exception", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors does not exist"),
        (truncate, ValueError, "is corrupt"),
        (no_config, ValueError, "config.json does not describe a quantized model"),
        (without_quantization, ValueError, "config.json does not describe a quantized model"),
        (edit(lambda t: t.pop(f"{UP}.weight")), ValueError, f"lacks {UP}.weight"),
        (edit(lambda t: t[f"{UP}.weight_scale"].fill_(float("nan"))), ValueError, f"{UP}.weight_scale has NaN"),
        (edit(lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:3]})), ValueError, "expected"),
        (
            edit(lambda t: t.update({"more.weight_scale": torch.ones(2, 1)})),
            ValueError,
            "has an unexpected more.weight_scale",
        ),
        (edit(lambda t: t.update({"more": torch.ones(2)})), ValueError, "has an unexpected more"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_changes_nothing(saved, unchanged, damage, exception, message) -> None:
    model = empty_model(saved)
    check = unchanged(model)
    damage(saved)
    with pytest.raises(exception, match=f"^load_: .*{message}"):
        load_(model, saved)
    check()
