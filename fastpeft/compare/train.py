"""One run: a method on a fresh copy of the base model, trained from one seed, judged, saved and timed."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import fastpeft
from fastpeft.batches import Orders
from fastpeft.compare import timing
from fastpeft.compare.arguments import Arguments
from fastpeft.compare.checkpoint import Base
from fastpeft.compare.encoding import Encoded, collator
from fastpeft.compare.errors import BadInput
from fastpeft.compare.judging import SCORE, Judge
from fastpeft.compare.machine import mixed_precision
from fastpeft.compare.memory import PeakMemory
from fastpeft.compare.methods import Method, run_name
from fastpeft.compare.placement import apply, loaded, loading, run_config, save, trainable
from fastpeft.compare.tasks import CLASSIFY, LM
from fastpeft.run_kinds import owner_of

HALF_WAY = 100  # steps, from which on a run is judged half-way too: a shorter one, judging would take as long
LOSS_POINTS = 20
WARM_UP = 0.1

#: Of a run's folder.
WEIGHTS_FOLDER = "weights"
POINT = ("loss", "eval_loss", "eval_quality")


class Setting(NamedTuple):
    """What the runs of a comparison have in common."""

    base: Base
    encoded: Encoded
    arguments: Arguments

    def rate(self, method: Method) -> float:
        """A method's learning rate."""
        return self.arguments.lr or method.place.learning_rate


def train_run(
    method: Method,
    seed: int,
    setting: Setting,
    folder: Path,
    notify: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, Any]:
    """Train a method from `seed`, save its weights to a folder in `folder`, return the run's record.

    Raises:
        BadInput: the device's memory, or the machine's, is too small.
    """
    set_seed(seed)
    base, encoded, arguments = setting
    settings = _settings(arguments, setting.rate(method), seed, folder / "trainer")
    memory, judge = PeakMemory(settings.device), Judge(encoded)
    with enough_memory():
        model: Any = copy.deepcopy(base.model)
        if arguments.task == CLASSIFY:
            model.score.weight.data.normal_(std=model.config.initializer_range)
        model = fastpeft.patch(apply(method, model, arguments.task), backend=arguments.backend)
        trainer = _trainer(model, setting, judge, settings, notify)
        outcome = trainer.train()
    peak = memory.bytes()
    judged = [entry for entry in trainer.state.log_history if "eval_quality" in entry]
    if not timing.fused_calls(model):
        raise RuntimeError(f"nothing fused was called while {method.name} trained:\n{fastpeft.report(model)}")
    seconds = outcome.metrics["train_runtime"] - sum(entry["eval_runtime"] for entry in judged)
    history = trainer.state.log_history
    return _recorded(method, seed, setting, folder, trainer, judge, history, seconds, peak)


def train_together(
    method: Method,
    seeds: list[int],
    setting: Setting,
    folders: list[Path],
    notify: Callable[[int, int], None] = lambda step, steps: None,
) -> list[dict[str, Any]]:
    """`train_run` from several seeds side by side: judged at the end alone, each with its share of the time.

    Raises:
        BadInput: as `train_run`, or the runs can't be trained together here.
    """
    base, encoded, arguments = setting
    config, rate = run_config(method, base.model.config, arguments.task), setting.rate(method)
    runs = [fastpeft.Run(f"seed-{seed}", config, seed=seed) for seed in seeds]
    settings = _settings(arguments, rate, seeds[0], folders[0] / "trainer")
    settings.data_seed = None  # each run's order is of its own seed
    try:
        sweep = fastpeft.Sweep(
            copy.deepcopy(base.model), runs, settings, encoded.train, collator(arguments.task, base)
        )
    except ValueError as error:
        raise BadInput(f"--together: {error}") from None
    if arguments.task == CLASSIFY:
        named = sweep.model.named_parameters()
        heads = {owner_of(name): p for name, p in named if ".score." in f".{name}" and p.requires_grad}
        for run, seed in zip(runs, seeds, strict=True):
            set_seed(seed)
            heads[run.name].data.normal_(std=base.model.config.initializer_range)
    fastpeft.patch(sweep.model, backend=arguments.backend)
    sweep.trainer.remove_callback(PrinterCallback)
    sweep.trainer.add_callback(_Pace(notify, judges=False))
    began = time.perf_counter()
    with enough_memory():
        results = sweep.train()
    seconds = (time.perf_counter() - began) / len(runs)
    sweep.trainer.accelerator.free_memory()
    records = []
    for result, seed, folder in zip(results, seeds, folders, strict=True):
        model = loaded(copy.deepcopy(base.model), result.folder)
        judge = Judge(encoded)
        fastpeft.patch(model, backend=arguments.backend)
        trainer = _trainer(model, setting, judge, _settings(arguments, rate, seed, folder / "judge"), notify)
        judged = {"step": sweep.trainer.state.global_step, **trainer.evaluate()}
        history = [*({"step": step, "loss": loss} for step, loss in result.curve), judged]
        stopped = result.stopped is not None
        found = _recorded(method, seed, setting, folder, trainer, judge, history, seconds, None, stopped)
        records.append(found)
    shutil.rmtree(folders[0] / "trainer", ignore_errors=True)
    return records


def _recorded(
    method: Method,
    seed: int,
    setting: Setting,
    folder: Path,
    trainer: Any,
    judge: Judge,
    history: list[dict[str, Any]],
    train_seconds: float,
    peak: int | None,
    stopped: bool = False,
) -> dict[str, Any]:
    """The record of a trained run, whose model is saved and timed."""
    base, arguments = setting.base, setting.arguments
    judged = [entry for entry in history if "eval_quality" in entry][-1]
    # Trainer leaves losses that are no numbers out of its means; what a model of such weights is judged by shows it.
    diverged = stopped or not all(math.isfinite(judged[key]) for key in ("eval_loss", "eval_quality"))
    sites = _sites(trainer.model)
    trained = sum(p.numel() for p in trainable(trainer.model))
    # Accelerate may have put autocast into the model's forward; the timed steps bring their own.
    model = fastpeft.unpatch(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    if trainer.is_world_process_zero():
        save(method, model, folder / WEIGHTS_FOLDER)
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    batches = typical_batches(setting, trainer.args.device)
    autocast: Callable[[], AbstractContextManager[Any]] = trainer.accelerator.autocast
    seconds = timing.step_seconds(model, batches, arguments.backend, autocast)
    trainer.accelerator.free_memory()
    return {
        "method": method.name,
        "seed": seed,
        "trains": method.place.trains,
        "load": loading(method, arguments.task, f"runs/{run_name(method, seed)}/{WEIGHTS_FOLDER}"),
        "diverged": diverged,
        "quality": None if diverged else judged["eval_quality"],
        "scores": None if diverged else judge.scores,
        "trainable_parameters": trained,
        "trainable_share": trained / sum(p.numel() for p in base.model.parameters()),
        "formula": f"{method.formula(base.model.config, arguments.task)} = {trained:,}",
        "learning_rate": setting.rate(method),
        "steps": history[-1]["step"],
        **{f"step_seconds_{side}": median for side, median in seconds.medians.items()},
        "step_seconds_samples": seconds.steps,
        "unpacked_because": seconds.unpacked,
        "peak_memory_bytes": peak,
        "train_seconds": train_seconds,
        "curve": _curve(history),
        "sites": sites,
    }


def judged_untrained(setting: Setting, folder: Path) -> list[float]:
    """The scores of the base model as it is."""
    judge = Judge(setting.encoded)
    model = copy.deepcopy(setting.base.model)
    with enough_memory():
        settings = _settings(setting.arguments, 1.0, 0, folder)
        _trainer(model, setting, judge, settings, lambda *_: None).evaluate()
    shutil.rmtree(folder, ignore_errors=True)
    return judge.scores


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Memory that doesn't suffice, on a GPU or not, is the user's to mend."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(
            error
        ):
            raise
        raise BadInput(
            "memory doesn't suffice: halve --batch-size (--accumulate 2 keeps what a step learns from), lower "
            "--max-length, or train less (r, bottleneck, tokens); the same --out needs a new name then"
        ) from None


def evaluations(steps: float) -> int:
    """How often a run of so many steps is judged, evenly, and at its end."""
    return 2 if steps >= HALF_WAY else 1


class _Pace(TrainerCallback):
    """Says when to log and to judge, and tells how far training is."""

    def __init__(self, notify: Callable[[int, int], None], judges: bool = True) -> None:
        self.notify, self.judges = notify, judges

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_log = _due(state.global_step, state.max_steps, LOSS_POINTS)
        times = evaluations(state.max_steps)
        control.should_evaluate = self.judges and _due(state.global_step, state.max_steps, times)
        self.notify(state.global_step, state.max_steps)


def _due(step: int, steps: int, times: int) -> bool:
    """Whether a thing done `times` times, evenly over `steps` and lastly at their end, is due at `step`."""
    return step * times // steps > (step - 1) * times // steps


class _InOrder(Trainer):
    """Judges the eval part in its own order, in which scores are kept; Trainer's own would be at random.

    A run's order of training is of its seed alone, as of one that trains beside others.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        return Orders(sampler, [self.args.seed], self.args.train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As Trainer's, without a sampler."""
        given: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        size, pin = self.args.eval_batch_size, self.args.dataloader_pin_memory
        loader: Any = DataLoader(given, batch_size=size, collate_fn=self.data_collator, pin_memory=pin)
        return self.accelerator.prepare(loader)


def _settings(arguments: Arguments, learning_rate: float, seed: int, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulate,
        # A language model's logits are the vocabulary's size a token, and no gradient frees them sooner.
        per_device_eval_batch_size=(4 if arguments.task == CLASSIFY else 1) * arguments.batch_size,
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
        bf16=mixed_precision() == "bf16",  # else Trainer does what accelerate was launched with
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _trainer(
    model: nn.Module,
    setting: Setting,
    judge: Judge,
    settings: TrainingArguments,
    notify: Callable[[int, int], None],
) -> Trainer:
    base, encoded, arguments = setting
    trainer = _InOrder(
        model=model,
        args=settings,
        train_dataset=encoded.train,
        eval_dataset=encoded.eval,
        data_collator=collator(arguments.task, base),
        compute_metrics=judge,
        preprocess_logits_for_metrics=SCORE[arguments.task],
        callbacks=[_Pace(notify)],
    )
    trainer.remove_callback(PrinterCallback)
    # A classifier takes the number of labels in all accumulated batches too, but doesn't divide by it.
    trainer.model_accepts_loss_kwargs = arguments.task == LM
    return trainer


def typical_batches(setting: Setting, device: torch.device) -> list[dict[str, Tensor]]:
    """Training batches of short, middling and long texts: at even quantiles of their length."""
    base, encoded, arguments = setting
    ordered = sorted(encoded.train, key=lambda example: len(example["input_ids"]))
    size = min(arguments.batch_size, len(ordered))
    starts = [
        math.floor((len(ordered) - size) * (i + 1) / (timing.BATCHES + 1)) for i in range(timing.BATCHES)
    ]
    collate = collator(arguments.task, base)
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
    """Points of training by step: `loss` averaged since the point before, `eval_quality` and `eval_loss`."""
    points: dict[int, dict[str, Any]] = {}
    for entry in history:
        # JSON has no NaN: a loss that isn't a number becomes null.
        wanted = {key: entry[key] if math.isfinite(entry[key]) else None for key in POINT if key in entry}
        if wanted:
            points.setdefault(entry["step"], {"step": entry["step"]}).update(wanted)
    return list(points.values())
