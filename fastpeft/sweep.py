"""Runs side by side on one frozen base: each step reads the base once for all of them.

The loop, its batches, schedules, logs and checkpoints are transformers' `Trainer`'s; what is here keeps runs apart:
whose rows, loss, gradient's norm, learning rate and seed is whose, and that a run which diverges goes alone.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from fastpeft.batches import Orders, join, losses_of, targets_of
from fastpeft.copies import unwrapped
from fastpeft.heads import IGNORED
from fastpeft.mixing import adapter_rows
from fastpeft.patching import patch
from fastpeft.run_kinds import KINDS, owner_of
from fastpeft.runs import Run, checked, factors_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    name: str
    loss: float | None  # the curve's last; None where it diverged before it had one
    curve: list[tuple[int, float]]  # steps, and the loss averaged since the one before
    folder: Path  # of the adapter, for PeftModel.from_pretrained, or of its kind for load_adapters
    stopped: str | None  # why and when it diverged; it is saved as it was before


class Sweep:
    """Several runs on one base, trained side by side; each comes out as `Trainer` would train it alone.

    A step takes a batch of every run through the base at once, each row with its run's adapter (`adapter_rows`). A run
    has a loss, a norm to which its gradient is clipped, a learning rate, a schedule of it and an order of examples of
    its own, grouped by length too of its seed alone. A run whose loss or gradient isn't finite stops before that step
    and leaves the others as they were. What is drawn while training, dropout's masks, is drawn from the arguments' seed
    for all.

    The loss is the sum over the labels by their number in the whole step, as Trainer counts them: of GPT-2, first
    tokens too, which nobody predicts. A classifier's is the mean of the whole step, where Trainer adds up the means of
    accumulated batches.

    Args:
        model: a GPT2LMHeadModel or GPT2ForSequenceClassification, neither wrapped nor patched. Its weights freeze, and
            the adapters go into it as by peft's `get_peft_model`, or by `add_adapters`; `sweep.model` is the patched
            PeftModel, or this model.
        runs: what to train, all of LoRA or all of bottleneck adapters. Their LoraConfigs may differ in rank, targets,
            scaling and dropout; a classifier's runs have heads of their own where `task_type` is SEQ_CLS. Their
            AdapterConfigs may differ in all, and a classifier's runs have heads of their own.
        arguments: as Trainer takes them. Batch size, accumulation, clipping and steps are each run's.
        dataset: examples as `collate_fn` takes them, the same for all runs, with a length.
        collate_fn: makes a batch of a run's examples: `input_ids`, `labels`, and an `attention_mask` where it pads.

    Raises:
        TypeError, ValueError: a model, runs or arguments that can't be trained so; nothing is changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        runs: Sequence[Run],
        arguments: TrainingArguments,
        dataset: Any,
        collate_fn: Callable[[list[Any]], dict[str, Tensor]] | None = None,
    ) -> None:
        filled = checked(model, list(runs), arguments, dataset)
        wrapped: Any = None
        for run in filled:
            set_seed(run.seed)
            wrapped = KINDS[type(run.config)].add(model, wrapped, run)
        self.model = patch(wrapped)
        self.trainer = _SideBySide(
            self.model, filled, arguments, dataset, collate_fn or default_data_collator
        )

    def train(self, resume_from_checkpoint: str | bool | None = None) -> list[Result]:
        """Train the runs and save each one's adapter in a folder of its name in `output_dir`.

        Args:
            resume_from_checkpoint: as Trainer's: True goes on from the last checkpoint in `output_dir`.

        Returns:
            A result a run, in the runs' order.

        Raises:
            ValueError: no checkpoint, or one of other runs, or of these in another order.
        """
        trainer = self.trainer
        with trainer.rows:
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        folder = Path(str(trainer.args.output_dir))
        trainer.write(folder)
        history: list[Any] = trainer.state.log_history
        stopped = _stopped(history)
        results = []
        for run in trainer.runs:
            key = f"loss_{run.name}"
            curve = [(entry["step"], entry[key]) for entry in history if key in entry]
            loss = curve[-1][1] if curve else None
            results.append(Result(run.name, loss, curve, folder / run.name, stopped.get(run.name)))
        return results


class _SideBySide(Trainer):
    """Trainer, of a batch that is one of each run's in turn."""

    model: Any

    def __init__(
        self, model: Any, runs: list[Run], arguments: TrainingArguments, dataset: Any, collate_fn: Any
    ) -> None:
        arguments = copy.copy(arguments)
        if not arguments.max_grad_norm > 0:
            arguments.max_grad_norm = math.inf  # the norms are looked at anyway
        arguments.logging_nan_inf_filter = False
        super().__init__(model, arguments, collate_fn, dataset, callbacks=[_Watch(self)])
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the counts of all accumulated batches
        # Whether Trainer counts first labels too, which nobody predicts.
        _, count = super().get_batch_samples(iter([{"labels": torch.zeros(1, 2)}]), 1, arguments.device)
        self._counts_first = int(count) == 2  # type: ignore[arg-type]
        self.runs: list[Any] = runs  # all of whose fields are filled
        self._kind = KINDS[type(self.runs[0].config)]
        self.live = [run.name for run in runs]
        self.rows = ExitStack()  # holds the context in which the rows of a batch are the runs'
        self._given: tuple[str, ...] = ()
        self._recent: dict[str, list[float]] = {name: [] for name in self.live}  # losses since the last log
        self._parameters: dict[str, list[nn.Parameter]] = {name: [] for name in self.live}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                owner = owner_of(name)
                assert owner, name  # `checked` has seen to it
                self._parameters[owner].append(parameter)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of batches that hold a run's examples after another's."""
        args, sampler = self.args, self._get_train_sampler(self.train_dataset)
        loader: Any = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=len(self.runs) * args.train_batch_size,
            sampler=Orders(sampler, [run.seed for run in self.runs], args.train_batch_size),
            collate_fn=self._collated,
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def _collated(self, examples: list[Any]) -> dict[str, Tensor]:
        """Each run's batch, as it is alone, one below the other."""
        size = len(examples) // len(self.runs)
        starts = range(0, len(examples), size)
        batches = [self.data_collator(examples[start : start + size]) for start in starts]
        return join(batches, size, self.model.config.pad_token_id or 0)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's, of groups of parameters that are one run's, with its learning rate."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decaying = set(self.get_decay_parameter_names(self.model))
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            groups = []
            for run in self.runs:
                for decays in True, False:
                    own = [
                        p for n, p in trained.items() if owner_of(n) == run.name and (n in decaying) == decays
                    ]
                    decay = self.args.weight_decay if decays else 0.0
                    groups.append({"params": own, "lr": run.learning_rate, "weight_decay": decay})
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Each run's own: some schedules end at a rate, which is another share of each run's."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            factors = {run.name: factors_of(run, self.args, num_training_steps) for run in self.runs}
            owners = {id(p): name for name, own in self._parameters.items() for p in own}
            self.lr_scheduler = LambdaLR(
                optimizer, [factors[owners[id(group["params"][0])]] for group in optimizer.param_groups]
            )
            self._created_lr_scheduler = True  # for Trainer to make another where it trains again
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of a step without the rows of runs that have stopped, and the number of each run's labels."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(self.live) < len(self.runs):
            kept = torch.tensor([run.name in self.live for run in self.runs], device=device)
            batches = [
                {k: v.unflatten(0, (len(kept), -1))[kept].flatten(0, 1) for k, v in each.items()}
                for each in batches
            ]
        self._losses: Any = 0.0
        found = [each["labels"] for each in batches]
        counted = found if self._counts_first else map(targets_of, found)
        return batches, sum((labels != IGNORED).view(len(self.live), -1).sum(1) for labels in counted)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the runs' losses, each summed over its labels and divided by their number in the whole step."""
        size = len(inputs["input_ids"]) // len(self.live)
        self._give(tuple(name for name in self.live for _ in range(size)))
        with self.accelerator.autocast():
            losses = losses_of(unwrapped(self.model), **inputs)
        of_runs = losses.view(len(self.live), -1).sum(1) / num_items_in_batch
        self._losses = self._losses + of_runs.detach()
        return of_runs.sum()

    def _give(self, names: tuple[str, ...]) -> None:
        """Have the rows of the batches that come use these adapters."""
        if names != self._given:
            self.rows.close()
            self._given = names
            self.rows.enter_context(adapter_rows(self.model, names))

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip each run's gradient to its norm; a run whose loss or gradient isn't finite takes no further step."""
        parameters = [self._parameters[name] for name in self.live]
        norms = torch.stack([nn.utils.clip_grad_norm_(own, self.args.max_grad_norm) for own in parameters])
        found = torch.stack((self._losses, norms.to(self._losses))).tolist()  # the one wait for the device
        for name, loss, norm in zip(list(self.live), *found, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                self._recent[name].append(loss)
            else:
                self._stop(name, f"its {'gradient' if math.isfinite(loss) else 'loss'} is not finite")
        return norms.max()

    def _stop(self, name: str, reason: str) -> None:
        """Leave a run as it is before this step."""
        reason = f"stopped at step {self.state.global_step + 1}: {reason}"
        logger.warning("run %s %s", name, reason)
        for parameter in self._parameters[name]:
            parameter.grad = None
        entry: dict[str, Any] = {"step": self.state.global_step, "stopped": {name: reason}}
        if recent := self._recent.pop(name):
            entry[f"loss_{name}"] = fmean(recent)
        self.state.log_history.append(entry)  # where a checkpoint keeps it
        self.live.remove(name)
        if not self.live:
            self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Of the losses each run's own, and their mean."""
        if "loss" in logs:
            if not self.live:
                return
            means = {f"loss_{name}": fmean(self._recent[name]) for name in self.live}
            self._recent = {name: [] for name in self.live}
            logs = {"loss": fmean(means.values()), **means}
        super().log(logs, start_time)

    def begin(self) -> None:
        """Take up what the state says: a fresh one is told the runs, one of a checkpoint has them and who stopped."""
        history: list[Any] = self.state.log_history
        if not history:
            history.append({"step": 0, "runs": self._told(), "order": [run.name for run in self.runs]})
        stopped = _stopped(history)
        self.live = [run.name for run in self.runs if run.name not in stopped]
        self._recent = {name: [] for name in self.live}
        self._given = ()

    def write(self, folder: Path) -> None:
        """Save each run's adapter in a folder of its name."""
        self._kind.save(self.model, folder, [run.name for run in self.runs])

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainer's own would save a base with bottleneck adapters whole."""
        folder = Path(output_dir or str(self.args.output_dir))
        self.write(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _told(self) -> dict[str, Any]:
        """The runs as JSON."""
        told = {}
        for run in self.runs:
            config = self._kind.described(run.config)
            told[run.name] = {"learning_rate": run.learning_rate, "seed": run.seed, "config": config}
        found: dict[str, Any] = json.loads(json.dumps(told, default=lambda value: sorted(value)))
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trainer's own would load the first adapter to train and the others not to."""
        folder = Path(resume_from_checkpoint)
        history: list[Any] = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).log_history
        first: dict[str, Any] = next((entry for entry in history if "runs" in entry), {"runs": {}})
        if first["runs"] != self._told():
            raise ValueError(f"{folder} is of other runs: {_differing(first['runs'], self._told())}")
        if first.get("order") != [run.name for run in self.runs]:  # that of the optimiser's state
            order = ", ".join(first.get("order", ["unknown"]))
            raise ValueError(f"{folder} is of these runs in another order, give them in that one: {order}")
        for run in self.runs:
            self._kind.load(self.model, folder, run.name)


class _Watch(TrainerCallback):
    """Tells a trainer when its state is there, and has it log where it saves or ends: no loss is left unlogged."""

    def __init__(self, trainer: _SideBySide) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_log = control.should_log or control.should_save or control.should_training_stop

    on_epoch_end = on_step_end


def _stopped(history: list[Any]) -> dict[str, str]:
    """The runs that have stopped, and why."""
    return {name: why for entry in history for name, why in entry.get("stopped", {}).items()}


def _differing(was: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return f"it holds {', '.join(was) or 'none'}; {', '.join(names)} differ"
