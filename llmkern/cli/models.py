"""MODEL on the command line: a local folder or GGUF file, a Hugging Face name, or one of the demo models."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmkern.cli.arguments import device_named, dtype_named
from llmkern.cli.output import say, working
from llmkern.swap import optimize_

if TYPE_CHECKING:
    from llmkern.quantization import QuantReport

__all__ = ["Loaded", "load", "load_prepared", "prepare", "quantize", "token_ids"]

HELP = "A local folder or .gguf file, a Hugging Face name, demo:smollm2, demo:smollm2-offgrid or demo:minilm."
DEVICE_HELP = "cpu or cuda; auto takes a GPU where there is one."
DTYPE_HELP = "float32, bfloat16 or float16; auto takes the checkpoint's own."
CALIBRATION_ARTICLES = 8
MORE_ARTICLES = 32  # for groups of few bits, whose errors are made up for by what inputs have in common
CALIBRATION_TOKENS = 512
DEMOS = ("demo:smollm2", "demo:smollm2-offgrid", "demo:minilm")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode; `tokenizer` is None where the checkpoint has none."""

    name: str
    model: nn.Module
    tokenizer: Any

    @property
    def is_language_model(self) -> bool:
        """Predicts the next token from those before it, so that it has a perplexity."""
        config: Any = self.model.config
        return self.model.can_generate() and not config.is_encoder_decoder  # type: ignore[operator]


def load(name: str, *, dtype: str = "auto", device: str = "auto", packed: bool = False) -> Loaded:
    """Load MODEL; ValueError with one line where it is missing, corrupt or of a kind that is not supported.

    packed: whether a .gguf file's blocks are kept; else it is a floating-point model.
    """
    wanted = None if dtype == "auto" else dtype_named(dtype)
    place = device_named(device)
    _quiet()
    with working(f"loading {name}"):
        loaded = _load_demo(name, wanted) if name.startswith("demo:") else _load(name, wanted, packed)
        loaded.model.eval().to(place)
        _own_memory(loaded.model)
    return loaded


def prepare(loaded: Loaded, scheme: str | None, *, optimize: bool) -> None:
    """Quantize and optimize a model as the options `--quantize` and `--optimize` say."""
    if scheme is not None:
        quantize(loaded.model, loaded, scheme)
    if optimize:
        optimize_(loaded.model, on_unsupported="ignore")


def load_prepared(name: str, scheme: str | None, *, optimize: bool, dtype: str, device: str) -> tuple[nn.Module, Any]:
    """A model and its tokenizer as a command's options say; for processes that a command starts."""
    loaded = load(name, dtype=dtype, device=device, packed=scheme is None)
    prepare(loaded, scheme, optimize=optimize)
    return loaded.model, loaded.tokenizer


def _own_memory(model: nn.Module) -> None:
    """Copy the weights out of the checkpoint's file, which one small view would keep mapped as a whole.

    Else replacing weights frees nothing, and the first forward waits for the disk.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _quiet() -> None:
    """The libraries' own progress and advice would be between the lines of ours."""
    for name in ("torchao", "torch.utils._pytree"):  # CUDA files that do not load, deprecations of torchao's own
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers = _transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|huggingface_hub")


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError(
            "models are loaded by transformers, which is not installed: pip install transformers"
        ) from None
    return transformers


def _load_demo(name: str, dtype: torch.dtype | None) -> Loaded:
    from llmkern.testing.off_grid import rescale_
    from llmkern.testing.real_models import load_minilm, load_smollm2

    if name == "demo:smollm2":
        return Loaded(name, *load_smollm2(dtype or torch.float32))
    if name == "demo:smollm2-offgrid":
        original, words = load_smollm2(torch.float32)
        return Loaded(name, rescale_(original).to(dtype or torch.float32), words)  # type: ignore[arg-type]
    if name == "demo:minilm":
        model, tokenizer = load_minilm()
        return Loaded(name, model.to(dtype or torch.float32), tokenizer)  # type: ignore[arg-type]
    raise ValueError(f"MODEL is {name!r}, expected {' or '.join(DEMOS)}, a local folder or a Hugging Face name")


def _load(name: str, dtype: torch.dtype | None, packed: bool) -> Loaded:
    transformers = _transformers()
    path = Path(name).expanduser()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf"
    if looks_local and not path.exists():
        raise ValueError(f"MODEL {name} does not exist")
    source, options = (str(path), {}) if path.exists() else (name, {})
    if path.is_file():
        from llmkern.quantization.gguf_file import GgufFile

        GgufFile(path)  # refuses in one line what libraries would trust
        source, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"MODEL {name} has no config.json, expected the folder of a transformers checkpoint")
    if packed and "gguf_file" in options:
        from llmkern.quantization import load as load_packed

        return Loaded(name, load_packed(path, dtype=dtype), _tokenizer(transformers, source, options))
    # The loaders raise whatever their file formats raise; all of it means that this checkpoint cannot be used.
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        family = _class_of(transformers, config)
        model, found = family.from_pretrained(source, dtype=dtype or "auto", output_loading_info=True, **options)
    except Exception as error:
        raise ValueError(f"cannot load MODEL {name}: {_first_sentence(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"MODEL {name} lacks {len(missing)} weights, {missing[0]} among them: they would be random")
    return Loaded(name, model, _tokenizer(transformers, source, options))


def _tokenizer(transformers: Any, source: str, options: dict[str, str]) -> Any:
    """Load the checkpoint's tokenizer, or return None if it has none."""
    with contextlib.suppress(Exception):  # the library of tokenizers raises nothing more specific
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        # A folder without a tokenizer's files gives one to which every word is unknown.
        if set(tokenizer("a word", add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}:
            return tokenizer
    return None


def _class_of(transformers: Any, config: Any) -> Any:
    """The class that the checkpoint was saved from, or a causal language model, or the bare model."""
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def _first_sentence(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{type(error).__name__}: {line}"


def token_ids(loaded: Loaded, count: int) -> Tensor:
    """The first `count` tokens of real prose, [count]; fewer where the text is shorter.

    A checkpoint without a tokenizer gets the text's bytes, folded into its vocabulary.
    """
    from llmkern.testing.real_models import prose

    text = prose()
    if loaded.tokenizer is None:
        say(f"{loaded.name} has no tokenizer: the bytes of the text stand for tokens")
        vocabulary: int = loaded.model.config.vocab_size  # type: ignore[union-attr, assignment]
        return torch.tensor(list(text.encode()[:count])) % vocabulary
    # No tokenizer makes fewer than one token of this many characters of English.
    ids = loaded.tokenizer(text[: 16 * count], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:count])


def quantize(model: nn.Module, loaded: Loaded, scheme: str = "int8") -> QuantReport:
    """Quantize `model`, measured on the last articles of the prose, which the check does not read.

    Where the text or a tokenizer is missing, `quantize_` measures on inputs of its own.
    """
    from llmkern.quantization import quantize_
    from llmkern.report import report
    from llmkern.testing.real_models import prose

    count = CALIBRATION_ARTICLES if scheme.startswith("int8") else MORE_ARTICLES
    batches = None
    if loaded.tokenizer is not None:
        with contextlib.suppress(ModuleNotFoundError):
            batches = [_calibration(loaded, text) for text in prose().splitlines()[-count:]]
    with working(f"quantizing to {scheme}"):
        quantize_(model, scheme, calib=batches)
    found = report(model).quantization
    assert found is not None
    return found


def _calibration(loaded: Loaded, text: str) -> dict[str, Tensor]:
    """Return the arguments of one forward for calibration."""
    config: Any = loaded.model.config
    length = min(CALIBRATION_TOKENS, getattr(config, "max_position_embeddings", None) or CALIBRATION_TOKENS)
    # Positions of RoBERTa and its kin begin behind the padding index.
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"][: max(length - 2, 1)])[None]
    ids = ids.to(next(loaded.model.parameters()).device)
    decoder = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    return {"input_ids": ids, **decoder}
