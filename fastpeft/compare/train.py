"""One run: a method on a fresh copy of the base model, trained from one seed, judged, saved and timed."""

from __future__ import annotations

import copy
import math
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import fastpeft
from fastpeft.compare import timing
from fastpeft.compare.arguments import Arguments
from fastpeft.compare.checkpoint import Base
from fastpeft.compare.data import Data, Part
from fastpeft.compare.memory import PeakMemory
from fastpeft.compare.methods import METHODS, PREFIX_TOKENS, trainable

EVALUATIONS = 3  # spread evenly over a run, the last at its end
LOSS_POINTS = 20
WARM_UP = 0.1

POINT = ("loss", "eval_loss", "eval_accuracy")

Examples = list[dict[str, Any]]


class Encoded(NamedTuple):
    """The two parts as token ids, and how many texts were cut to fit the model."""

    train: Examples
    eval: Examples
    cut: int


def encode(data: Data, base: Base) -> Encoded:
    """Tokens of every text, cut at the model's positions less a prefix's, the same for every method."""
    longest = base.model.config.n_positions - PREFIX_TOKENS
    train, cut_train = _encode(data.train, base, longest)
    evaluation, cut_eval = _encode(data.eval, base, longest)
    # By length, so that a batch pads little; the order in which rows are judged changes nothing.
    evaluation.sort(key=lambda example: len(example["input_ids"]))
    return Encoded(train, evaluation, cut_train + cut_eval)


def _encode(part: Part, base: Base, longest: int) -> tuple[Examples, int]:
    ids = base.tokenizer(part.texts, verbose=False)["input_ids"]
    cut = sum(len(text) > longest for text in ids)
    rows = zip(ids, part.labels, strict=True)
    return [{"input_ids": text[:longest], "labels": label} for text, label in rows], cut


def train_run(
    name: str,
    seed: int,
    base: Base,
    encoded: Encoded,
    arguments: Arguments,
    folder: Path,
    notify: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, Any]:
    """Train method `name` from `seed`, save its weights to `folder / "weights"`, return the run's record."""
    method = METHODS[name]
    set_seed(seed)
    model: Any = copy.deepcopy(base.model)
    model.score.weight.data.normal_(std=model.config.initializer_range)
    base_parameters = sum(p.numel() for p in model.parameters())
    model = fastpeft.patch(method.apply(model, arguments), backend=arguments.backend)
    trained = sum(p.numel() for p in trainable(model))

    learning_rate = arguments.lr or method.learning_rate
    trainer = _trainer(model, base, encoded, arguments, learning_rate, seed, folder / "trainer", notify)
    memory = PeakMemory(trainer.args.device)
    outcome = trainer.train()
    peak = memory.bytes()
    evaluations = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    if not timing.fused_calls(model):
        raise RuntimeError(f"nothing fused was called while {name} trained:\n{fastpeft.report(model)}")
    sites = _sites(model)

    # Accelerate may have put autocast into the model's forward; the timed steps bring their own.
    model = fastpeft.unpatch(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    if trainer.is_world_process_zero():
        method.save(model, folder / "weights")
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    batches = _typical_batches(encoded.train, base, arguments, trainer.args.device)
    autocast: Callable[[], AbstractContextManager[Any]] = trainer.accelerator.autocast
    seconds = timing.step_seconds(model, batches, arguments.backend, autocast)
    trainer.accelerator.free_memory()
    return {
        "method": name,
        "seed": seed,
        "accuracy": evaluations[-1]["eval_accuracy"],
        "trainable_parameters": trained,
        "trainable_share": trained / base_parameters,
        "formula": f"{method.formula(base.model.config, arguments)} = {trained:,}",
        "learning_rate": learning_rate,
        "steps": trainer.state.global_step,
        **{f"step_seconds_{side}": median for side, median in seconds.medians.items()},
        "step_seconds_samples": seconds.steps,
        "unpacked_because": seconds.unpacked,
        "peak_memory_bytes": peak,
        "train_seconds": outcome.metrics["train_runtime"] - sum(e["eval_runtime"] for e in evaluations),
        "curve": _curve(trainer.state.log_history),
        "sites": sites,
    }


class _Pace(TrainerCallback):
    """Says when to log and to judge - evenly, and at the end -, and tells how far training is."""

    def __init__(self, notify: Callable[[int, int], None]) -> None:
        self.notify = notify

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_log = _due(state.global_step, state.max_steps, LOSS_POINTS)
        control.should_evaluate = _due(state.global_step, state.max_steps, EVALUATIONS)
        self.notify(state.global_step, state.max_steps)


def _due(step: int, steps: int, times: int) -> bool:
    """Whether a thing done `times` times, evenly over `steps` and lastly at their end, is due at `step`."""
    return step * times // steps > (step - 1) * times // steps


def _trainer(
    model: nn.Module,
    base: Base,
    encoded: Encoded,
    arguments: Arguments,
    learning_rate: float,
    seed: int,
    folder: Path,
    notify: Callable[[int, int], None],
) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=4 * arguments.batch_size,
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps or -1,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARM_UP,
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",
        seed=seed,
        data_seed=seed,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=encoded.train,
        eval_dataset=encoded.eval,
        data_collator=DataCollatorWithPadding(base.tokenizer),
        compute_metrics=lambda judged: {"accuracy": float(np.mean(judged.predictions == judged.label_ids))},
        preprocess_logits_for_metrics=_verdicts,
        callbacks=[_Pace(notify)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _verdicts(logits: Any, labels: Tensor) -> Tensor:
    """Classes instead of logits, the first of what a model returns."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _typical_batches(
    examples: Examples, base: Base, arguments: Arguments, device: torch.device
) -> list[dict[str, Tensor]]:
    """Training batches of short, middling and long texts: at even quantiles of their length."""
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    size = min(arguments.batch_size, len(ordered))
    starts = [
        math.floor((len(ordered) - size) * (i + 1) / (timing.BATCHES + 1)) for i in range(timing.BATCHES)
    ]
    collate = DataCollatorWithPadding(base.tokenizer)
    batches = [collate(ordered[start : start + size]) for start in starts]
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def _sites(model: nn.Module) -> list[dict[str, Any]]:
    """The report of fused sites, like sites counted together."""
    found = Counter((row.kind, row.path, row.reason) for row in fastpeft.report(model))
    return [
        {"kind": kind, "path": path, "reason": reason, "count": count}
        for (kind, path, reason), count in found.items()
    ]


def _curve(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of training by step: `loss` averaged since the point before, `eval_accuracy` and `eval_loss`."""
    points: dict[int, dict[str, Any]] = {}
    for entry in history:
        # JSON has no NaN: a loss that isn't a number becomes null.
        wanted = {key: entry[key] if math.isfinite(entry[key]) else None for key in POINT if key in entry}
        if wanted:
            points.setdefault(entry["step"], {"step": entry["step"]}).update(wanted)
    return list(points.values())
