"""One model variant in a process of its own: `python -m llmkern.bench.worker`, asked through its standard input.

A request is a line of JSON, {"do": …}; so is the answer: {"ok": …}, or {"error": …} after which the process goes on.
    load {"variant", "spec"}                  builds the runner
    accuracy {"ids", "reference", "write", "tokens"}   against what is kept in the file `reference`
    warm {}, run {"steps"}                    one repetition: {"first": seconds, "steps": [seconds, …]}
    reset {}, peak {}                         peak memory of what comes between them, bytes
    release {}                                what is left when the model is gone, bytes; the last request
Answers go through a copy of the standard output; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from llmkern.bench.peer import Unsupported, variants
from llmkern.bench.variants import Runner, Spec
from llmkern.cli.memory import peak, reset_peak, resident
from llmkern.memory import give_back
from llmkern.testing.perplexity import perplexity

__all__ = ["Worker", "main"]

CONTEXT = 512


class Worker:
    """Answers requests; each method is one kind of them."""

    def __init__(self) -> None:
        self.runner: Any  # a Runner, or a TrainingRunner
        self.spec: Spec

    def mode(self) -> Any:
        """Return the context in which requests are answered: no gradients, unless the variant trains."""
        return torch.inference_mode(not hasattr(self, "spec") or self.spec.kind != "training")

    def load(self, variant: str, spec: dict[str, Any]) -> dict[str, Any]:
        self.spec = Spec(**spec)
        torch.set_num_threads(self.spec.threads)
        with self.mode():
            self.runner = variants()[variant].build(self.spec)
        return {"process": os.getpid()}

    def accuracy(self, ids: list[int], reference: str, write: bool, tokens: int) -> dict[str, Any]:
        """ids: real text.  The first context's logits, or a batch's embeddings or gradients, stand beside the base's.

        {"unjudged": reason} for a peer that gives out no logits: its table says so.
        """
        text = torch.tensor(ids)
        first = text[:CONTEXT]
        if self.spec.kind == "encoder":
            out = self.runner.embed(self._batch(ids)).float().cpu()
        elif self.spec.kind == "training":
            out = self.runner.gradients(self._batch(ids)).cpu()
        else:
            try:
                out = self.runner.logits(first.to(self.spec.device)).float().cpu()
            except Unsupported as reason:
                return {"unjudged": f"not judged: {reason}"}
        if write:
            numpy.save(reference, out.numpy())
        expected = torch.from_numpy(numpy.load(reference))
        gap = (out - expected).abs()
        found: dict[str, Any] = {"max_abs": float(gap.max()), "rel": float((out - expected).norm() / expected.norm())}
        if self.spec.kind == "training":
            return {"rel": found["rel"]}
        if self.spec.kind == "encoder":
            return found | {"cosine": float((out * expected).sum(-1).mean())}
        found["top1"] = float((out.argmax(-1) == expected.argmax(-1)).double().mean())
        if tokens:
            model = _AsModule(self.runner, self.spec, first, out)
            found["perplexity"] = perplexity(model, text[:tokens], context=CONTEXT)
        return found

    def warm(self, ids: list[int]) -> dict[str, Any]:
        """Do all packing, compilation and allocation that happens at the first call."""
        return self.run(ids, min(4, self.spec.new_tokens))

    def run(self, ids: list[int], steps: int | None = None) -> dict[str, Any]:
        batch = self._batch(ids)
        if self.spec.kind == "encoder":
            return {"first": self._seconds(lambda: self.runner.embed(batch)), "steps": []}
        if self.spec.kind == "training":
            return {"first": self._seconds(lambda: self.runner.train(batch)), "steps": []}
        first = self._seconds(lambda: self.runner.prefill(batch))
        wanted = self.spec.new_tokens - 1 if steps is None else steps
        return {"first": first, "steps": [self._seconds(self.runner.decode) for _ in range(wanted)]}

    def reset(self) -> dict[str, Any]:
        reset_peak(self.spec.device)
        return {}

    def peak(self) -> dict[str, Any]:
        return {"bytes": peak(self.spec.device)}

    def release(self) -> dict[str, Any]:
        del self.runner
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # compiled code holds the model
        give_back()
        return {"bytes": resident(self.spec.device)}

    def _batch(self, ids: list[int]) -> Tensor:
        count = self.spec.batch * self.spec.prompt_len
        repeated = (ids * (count // len(ids) + 1))[:count]
        return torch.tensor(repeated).view(self.spec.batch, self.spec.prompt_len).to(self.spec.device)

    def _seconds(self, function: Callable[[], Any]) -> float:
        self._synchronize()
        start = time.perf_counter()
        function()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.spec.device.type == "cuda":
            torch.cuda.synchronize()


class _AsModule(nn.Module):
    """A runner as `perplexity` takes a model.  known, logits: a window whose logits are there already."""

    def __init__(self, runner: Runner, spec: Spec, known: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.runner, self.place = runner, nn.Parameter(torch.empty(0, device=spec.device), requires_grad=False)
        self.known, self.logits = known, logits

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        ids = input_ids[0]
        known = ids.shape == self.known.shape and bool((ids.cpu() == self.known).all())
        return SimpleNamespace(logits=(self.logits.to(ids.device) if known else self.runner.logits(ids))[None])


def main() -> None:
    """Answer until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with worker.mode():
                answer = {"ok": getattr(worker, request.pop("do"))(**request)}
        except Unsupported as error:
            answer = {"error": f"not supported: {error}"}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
