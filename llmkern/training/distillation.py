"""Distillation: a student learns to predict what its teacher predicts (Hinton et al. 2015, arXiv:1503.02531).

The loop is transformers' Trainer: its optimizer, schedule, progress bar, checkpoints and resumption.  What is ours is
the loss: `linear_kl_div` and `linear_cross_entropy` take both models' hidden states and output heads, so that neither
model's logits are ever in memory all at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from llmkern import ops
from llmkern.extras import need

__all__ = ["Distillation", "blocks", "distill"]


@dataclass(frozen=True)
class Distillation:
    """Result of a run.  losses: (step, loss) of each step, including those before a resumption."""

    folder: str
    steps: int
    seconds: float
    losses: tuple[tuple[int, float], ...]
    picture: str | None

    def __str__(self) -> str:
        first, last = self.losses[0][1], self.losses[-1][1]
        return f"{self.steps} steps in {self.seconds:.0f} s, loss {first:.4f} to {last:.4f}: {self.folder}"


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Tensor | Dataset[Any],
    folder: str,
    *,
    steps: int,
    length: int = 512,
    batch_size: int = 4,
    accumulate: int = 1,
    learning_rate: float = 1e-4,
    warmup: float = 0.05,
    temperature: float = 1.0,
    reverse: bool = False,
    hard: float = 0.0,
    save_every: int = 50,
    resume: bool = False,
    seed: int = 0,
    show_progress: bool = True,
    **arguments: Any,
) -> Distillation:
    """Train `student` in place to predict as `teacher` does on `data`, and save it to `folder`.

    student, teacher: causal language models of transformers with one vocabulary; the teacher is frozen while it runs.
        Optimized or not; an int8 teacher is served as it is, a student needs floating-point weights.
    data: token ids [N], which are cut into blocks of `length`; or a dataset of dicts with input_ids and labels, whose
        labels of -100 do not count.
    hard: the share of the text's own cross-entropy in the loss, 0 to 1; the rest is `linear_kl_div` with `temperature`
        and `reverse`.
    steps: of the optimizer (AdamW, cosine schedule after `warmup`, a share of them), each over batch_size · accumulate
        blocks.
    save_every: steps between checkpoints in `folder`.  resume: go on from the last one, to the same weights as without
        the interruption.
    arguments: further ones of transformers.TrainingArguments.
    Returns the losses; `folder` has the student, and loss.png where matplotlib is installed.
    Raises ValueError for models whose vocabularies differ or whose logits are more than their output head's, and for
    numbers out of range; ModuleNotFoundError without transformers and accelerate.
    """
    need("distillation", "train", "transformers", "accelerate")
    from transformers import TrainingArguments, default_data_collator

    if not 0 <= hard <= 1:
        raise ValueError(f"distill: hard is {hard}, expected 0 to 1")
    for name, value in (("steps", steps), ("batch_size", batch_size), ("save_every", save_every), ("length", length)):
        if value < 1:
            raise ValueError(f"distill: {name} is {value}, expected at least 1")
    samples = blocks(data, length) if isinstance(data, Tensor) else data
    _check(student, teacher, samples)
    given = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(warmup * steps),
        logging_steps=1,
        save_steps=save_every,
        save_total_limit=2,
        seed=seed,
        report_to=[],
        disable_tqdm=not show_progress,
        remove_unused_columns=False,
        use_cpu=next(student.parameters()).device.type == "cpu",
        **arguments,
    )
    trainable = [p for p in teacher.parameters() if p.requires_grad]
    training = teacher.training
    teacher.requires_grad_(False).eval()
    started = time.monotonic()
    try:
        trainer = _trainer()(
            teacher,
            {"temperature": temperature, "reverse": reverse},
            hard,
            model=student,
            args=given,
            train_dataset=samples,
            data_collator=default_data_collator,
        )
        trainer.train(resume_from_checkpoint=resume and any(Path(folder).glob("checkpoint-*")))
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        teacher.train(training)
    trainer.save_model(folder)
    losses = tuple((row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row)
    return Distillation(folder, steps, time.monotonic() - started, losses, _draw(losses, Path(folder) / "loss.png"))


def blocks(ids: Tensor, length: int) -> Dataset[Any]:
    """Cut token ids [N] into samples of `length` tokens; drop a shorter remainder.

    Raises ValueError where there is not one whole block.
    """
    count = ids.numel() // length
    if ids.dim() != 1 or count == 0:
        raise ValueError(f"distill: data has shape {list(ids.shape)}, expected [N] with at least {length} tokens")
    return _Blocks(ids[: count * length].view(count, length))


class _Blocks(Dataset[Any]):
    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def _trainer() -> Any:
    """Return the Trainer with our loss; defined in a function because importing transformers takes seconds."""
    from transformers import PrinterCallback, ProgressCallback, Trainer

    class Bar(ProgressCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            """Print nothing: the losses are returned."""

    class Distiller(Trainer):
        loss_is_scaled_for_ga = True

        def __init__(self, teacher: nn.Module, divergence: dict[str, Any], hard: float, **options: Any) -> None:
            super().__init__(**options)
            for callback in (PrinterCallback, ProgressCallback):
                self.remove_callback(callback)
            if not self.args.disable_tqdm:
                self.add_callback(Bar)
            self.model_accepts_loss_kwargs = True  # the labels of all batches of a step are counted
            self._teacher, self._divergence, self._hard = teacher, divergence, hard

        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            labels = inputs["labels"][:, 1:]
            count: Any = num_items_in_batch
            hidden, (weight, bias) = _hidden(model, inputs)[:, :-1], _head(model)
            loss = hidden.new_zeros((), dtype=torch.float32)
            if self._hard < 1:
                with torch.no_grad():
                    teacher_hidden = _hidden(self._teacher, inputs)[:, :-1]
                    teacher_weight, teacher_bias = _head(self._teacher)
                loss = loss + (1 - self._hard) * ops.linear_kl_div(
                    hidden,
                    weight,
                    teacher_hidden,
                    teacher_weight,
                    bias=bias,
                    teacher_bias=teacher_bias,
                    labels=labels,
                    num_items=count,
                    **self._divergence,
                )
            if self._hard > 0:
                loss = loss + self._hard * ops.linear_cross_entropy(hidden, weight, labels, bias, num_items=count)
            return (loss, {}) if return_outputs else loss

    return Distiller


def _hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the model's input to its output head."""
    named = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    hidden: Tensor = model.base_model(**named, use_cache=False).last_hidden_state
    return hidden


def _head(model: Any) -> tuple[Tensor, Tensor | None]:
    """Return the output head's weight, in floating point, and its bias."""
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


def _check(student: nn.Module, teacher: nn.Module, samples: Any) -> None:
    """Raise ValueError if a model's logits are not its head's output, or if the two models have different
    vocabularies.
    """
    models = {"student": student, "teacher": teacher}
    words = []
    for name, model in models.items():
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(f"distill: {name} is a {type(model).__name__}, expected a causal language model")
        words.append(head.weight.shape[0])
    if words[0] != words[1]:
        raise ValueError(f"distill: student has {words[0]} words and teacher {words[1]}, expected one vocabulary")
    for name, model in models.items():
        device = next(model.parameters()).device
        few = {"input_ids": torch.as_tensor(samples[0]["input_ids"])[None, :8].to(device)}
        was = model.training
        model.eval()
        with torch.no_grad():
            logits, hidden = model(**few).logits.float(), _hidden(model, few)
            again = model.get_output_embeddings()(hidden).float()  # type: ignore[operator]
        model.train(was)
        if not torch.allclose(logits, again, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            raise ValueError(f"distill: {name} is a {type(model).__name__}, which changes its logits after its head")


def _draw(losses: tuple[tuple[int, float], ...], path: Path) -> str | None:
    """Plot the losses; returns None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot([step for step, _ in losses], [loss for _, loss in losses])
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return str(path)
