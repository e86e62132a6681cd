"""`llmkern generate`: an answer, streamed, and how fast it came."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor

from llmkern.cli.arguments import SCHEMES, check_scheme
from llmkern.cli.memory import peak, reset_peak
from llmkern.cli.models import DEVICE_HELP, DTYPE_HELP, HELP, Loaded, load, prepare
from llmkern.cli.output import print_json, save, say, working

__all__ = ["Generation", "generate"]

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Generation:
    """One answer.  ttft_ms: from the call to the first token; tokens_per_second: of those after the first."""

    model: str
    variant: str
    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    ttft_ms: float
    tokens_per_second: float | None
    peak_memory_bytes: int

    def __str__(self) -> str:
        speed = "-" if self.tokens_per_second is None else f"{self.tokens_per_second:.1f} tokens/s"
        return (
            f"{self.variant}: first token after {self.ttft_ms:.0f} ms, {speed}, {self.tokens} tokens, "
            f"peak memory {self.peak_memory_bytes / 2**20:.0f} MiB"
        )


class _Timed:
    """A streamer of transformers: notes when each token came, and hands the new text to `show`."""

    def __init__(self, tokenizer: Any, show: Any) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer, self._show, self._prompt_seen = tokenizer, show, False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # the prompt comes first
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.ids += value.flatten().tolist()
        self._reveal(final=False)

    def end(self) -> None:
        self._reveal(final=True)

    def _reveal(self, *, final: bool) -> None:
        text = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        # The bytes of one character may be spread over tokens; until the last has come they decode to U+FFFD.
        if final or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text[len(self.text) :])
            self.text = text


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=HELP)],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to answer; chat models get their chat template.")],
    scheme: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option("--quantize", metavar="SCHEME", help=f"Quantize the weights after loading: {SCHEMES}."),
    ] = None,
    optimize: Annotated[bool, typer.Option(help="Swap kernels in; --no-optimize runs the model untouched.")] = True,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer.")] = 128,
    dtype: Annotated[str, typer.Option(metavar="NAME", help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help=DEVICE_HELP)] = "auto",
    save_to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--save", metavar="FILE", help="Write the result, with this environment, as JSON."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of streaming.")] = False,
) -> None:
    """Answer a prompt, streamed to the terminal (greedy), then print time to first token, tokens/s and peak memory.

    The clock starts after loading and a few tokens of warm-up.

    \b
    llmkern generate demo:smollm2 --prompt "Why is the sky blue?"
    llmkern generate demo:smollm2 --prompt "Why is the sky blue?" --quantize int8 --max-new-tokens 64
    llmkern generate ./my-checkpoint --prompt "Once upon a time" --no-optimize --json
    """
    check_scheme(scheme)
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}, expected at least 1")
    loaded = load(model, dtype=dtype, device=device, packed=scheme is None)
    _check_generates(loaded)
    prepare(loaded, scheme, optimize=optimize)
    variant = " + ".join([part for part in (optimize and "optimized", scheme) if part]) or "untouched"
    found = _run(loaded, variant, prompt, max_new_tokens, show=(lambda text: None) if as_json else _write)
    if save_to is not None:
        flags = f"{'' if optimize else ' --no-optimize'}{f' --quantize {scheme}' if scheme else ''}"
        save(save_to, f"llmkern generate {model}{flags} --max-new-tokens {max_new_tokens}", asdict(found))
    if as_json:
        print_json(asdict(found))
    else:
        print()
        sys.stdout.flush()
        say(str(found))


def _check_generates(loaded: Loaded) -> None:
    if not loaded.model.can_generate():  # type: ignore[operator]
        raise ValueError(f"MODEL {loaded.name} is a {type(loaded.model).__name__}, which does not generate text")
    if loaded.tokenizer is None:
        raise ValueError(f"MODEL {loaded.name} has no tokenizer, so it cannot read a prompt")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _encode(loaded: Loaded, prompt: str) -> dict[str, Tensor]:
    tokenizer: Any = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    device = next(loaded.model.parameters()).device
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def _run(loaded: Loaded, variant: str, prompt: str, max_new_tokens: int, *, show: Any) -> Generation:
    model: Any = loaded.model
    inputs = _encode(loaded, prompt)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("--prompt is empty, expected some text")
    options = {"do_sample": False, "pad_token_id": loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id or 0}
    with working("warming up"):
        model.generate(**inputs, **options, max_new_tokens=WARM_UP_TOKENS)
    streamer = _Timed(loaded.tokenizer, show)
    device = inputs["input_ids"].device
    reset_peak(device)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(**inputs, **options, max_new_tokens=max_new_tokens, streamer=streamer)
    times = streamer.times
    return Generation(
        model=loaded.name,
        variant=variant,
        prompt=prompt,
        text=streamer.text,
        prompt_tokens=inputs["input_ids"].shape[1],
        tokens=len(times),
        ttft_ms=(times[0] - start) * 1e3,
        tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
        peak_memory_bytes=peak(device),
    )
