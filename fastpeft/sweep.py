"""Runs side by side on one frozen base: each step reads the base once for all of them.

The loop, its batches, schedules, logs and checkpoints are transformers' `Trainer`'s; what is here keeps runs apart:
whose rows, loss, gradient's norm, learning rate and seed is whose, and that a run which diverges goes alone.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.trainer import TRAINER_STATE_NAME

from fastpeft.groups import BASE
from fastpeft.heads import IGNORED
from fastpeft.lm_head import routed_lm_head_loss
from fastpeft.mixing import adapter_rows
from fastpeft.modules import is_plain
from fastpeft.packing import Reads
from fastpeft.patching import patch
from fastpeft.swap import is_fused

logger = logging.getLogger(__name__)

#: What peft writes into a config beside what it is told.
_ELSEWHERE = ("base_model_name_or_path", "peft_version")
#: Names that peft has for something else, beside any part of "lora_".
_PEFTS = {
    "default", BASE, "base_model", "model", "base_layer", "original_module", "modules_to_save", "lora_A", "lora_B"
}  # fmt: skip
#: The names of what a run may train, and in them the run's.
_TRAINED = re.compile(
    r"base_model\.model\.(?:transformer\.h\..+\.lora_[AB]|score\.modules_to_save)\.([^.]+)\.(?:weight|bias)"
)
#: Initialisations that read nothing but the seed: others take something out of the base, which the runs share.
_INITS = (True, False, "gaussian")
_OPTIMISERS = ("adamw_torch", "adamw_torch_fused", "sgd")
_ORDERS = ("random", "sequential", "group_by_length")
#: The fields of TrainingArguments that mean for a sweep what they mean for each run alone; others must be as they come.
_KNOWN = {
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "max_grad_norm", "gradient_accumulation_steps", "seed",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "bf16", "use_cpu",
    "train_sampling_strategy", "length_column_name", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_pin_memory", "disable_tqdm", "report_to", "run_name", "log_level", "logging_strategy",
    "logging_first_step", "logging_steps", "logging_dir", "logging_nan_inf_filter", "save_strategy", "save_steps",
    "save_total_limit", "remove_unused_columns", "label_names", "project", "trackio_space_id",
    "per_device_eval_batch_size", "ddp_find_unused_parameters",  # which nothing here asks about
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of a sweep: an adapter, and how it trains; None leaves that to the sweep's arguments."""

    name: str  # of the adapter, of its folder, and of its line in the logs
    config: LoraConfig
    learning_rate: float | None = None
    seed: int | None = None  # of the adapter's first weights and of the order of the examples


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    name: str
    loss: float | None  # the curve's last; None where it diverged before it had one
    curve: list[tuple[int, float]]  # steps, and the loss averaged since the one before
    folder: Path  # of the adapter, for PeftModel.from_pretrained
    stopped: str | None  # why and when it diverged; it is saved as it was before


class Sweep:
    """Several runs on one base, trained side by side; each comes out as `Trainer` would train it alone.

    A step takes a batch of every run through the base at once, each row with its run's adapter (`adapter_rows`). A run
    has a loss (the mean over its own labels), a norm to which its gradient is clipped, a learning rate and an order of
    examples of its own. A run whose loss or gradient isn't finite stops before that step and leaves the others as they
    were. What is drawn while training, dropout's masks, is drawn from the arguments' seed for all.

    Args:
        model: a GPT2LMHeadModel or GPT2ForSequenceClassification, neither wrapped nor patched. Its weights freeze, and
            the adapters go into it as by peft's `get_peft_model`; `sweep.model` is the patched PeftModel.
        runs: what to train. Their LoraConfigs may differ in rank, targets, scaling and dropout; a classifier's runs
            have heads of their own where `task_type` is SEQ_CLS.
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
        runs = list(runs)
        _check(model, runs, arguments, dataset)
        filled = [_filled(run, arguments) for run in runs]
        wrapped: Any = None
        for run in filled:
            set_seed(run.seed)
            wrapped = _with_adapter(model, wrapped, run)
        wrapped.set_requires_grad([run.name for run in filled])
        self.model: PeftModel = patch(wrapped)  # type: ignore[assignment]
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
            ValueError: no checkpoint, or one of other runs.
        """
        trainer = self.trainer
        with trainer.rows:
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        folder = Path(str(trainer.args.output_dir))
        self.model.save_pretrained(str(folder))
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

    model: Any  # a PeftModel

    def __init__(
        self, model: Any, runs: list[Run], arguments: TrainingArguments, dataset: Any, collate_fn: Any
    ) -> None:
        arguments = copy.copy(arguments)
        arguments.max_grad_norm = arguments.max_grad_norm or math.inf  # the norms are looked at anyway
        arguments.logging_nan_inf_filter = False
        super().__init__(model, arguments, collate_fn, dataset, callbacks=[_Watch(self)])
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the counts of all accumulated batches
        self.runs: list[Any] = runs  # all of whose fields are filled
        self.live = [run.name for run in runs]
        self.rows = ExitStack()  # holds the context in which the rows of a batch are the runs'
        self._given: tuple[str, ...] = ()
        self._recent: dict[str, list[float]] = {name: [] for name in self.live}  # losses since the last log
        self._parameters: dict[str, list[nn.Parameter]] = {name: [] for name in self.live}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._parameters[_owner(name)].append(parameter)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of batches that hold a run's examples after another's."""
        args, sampler = self.args, self._get_train_sampler(self.train_dataset)
        loader: Any = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=len(self.runs) * args.train_batch_size,
            sampler=_Orders(sampler, [run.seed for run in self.runs], args.train_batch_size),
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
        return _joined(batches, size, self.model.config.pad_token_id or 0)

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
                        p for n, p in trained.items() if _owner(n) == run.name and (n in decaying) == decays
                    ]
                    decay = self.args.weight_decay if decays else 0.0
                    groups.append({"params": own, "lr": run.learning_rate, "weight_decay": decay})
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of a step, without the rows of runs that have stopped; and the labels of each run in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(self.live) < len(self.runs):
            kept = torch.tensor([run.name in self.live for run in self.runs], device=device)
            batches = [
                {k: v.unflatten(0, (len(kept), -1))[kept].flatten(0, 1) for k, v in each.items()}
                for each in batches
            ]
        self._losses: Any = 0.0
        return batches, sum(
            (_targets(each["labels"]) != IGNORED).view(len(self.live), -1).sum(1) for each in batches
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the runs' losses, each the mean over its labels in all batches of the step."""
        size = len(inputs["input_ids"]) // len(self.live)
        self._give(tuple(name for name in self.live for _ in range(size)))
        with self.accelerator.autocast():
            losses = _losses(self.model.get_base_model(), **inputs)
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
            history.append({"step": 0, "runs": self._told()})
        stopped = _stopped(history)
        self.live = [run.name for run in self.runs if run.name not in stopped]
        self._recent = {name: [] for name in self.live}
        self._given = ()

    def _told(self) -> dict[str, Any]:
        """The runs as JSON."""
        told = {}
        for run in self.runs:
            config = {k: v for k, v in run.config.to_dict().items() if k not in _ELSEWHERE}
            told[run.name] = {"learning_rate": run.learning_rate, "seed": run.seed, "config": config}
        found: dict[str, Any] = json.loads(json.dumps(told, default=lambda value: sorted(value)))
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trainer's own would load the first adapter to train and the others not to."""
        folder = Path(resume_from_checkpoint)
        history: list[Any] = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).log_history
        was: dict[str, Any] = next((entry["runs"] for entry in history if "runs" in entry), {})
        if was != self._told():
            raise ValueError(f"{folder} is of other runs: {_differing(was, self._told())}")
        for run in self.runs:
            weights = load_peft_weights(str(folder / run.name), device=str(self.args.device))
            set_peft_model_state_dict(self.model, weights, adapter_name=run.name)


class _Watch(TrainerCallback):
    """Tells a trainer when its state is there, and has it log where it saves: a checkpoint has no unlogged losses."""

    def __init__(self, trainer: _SideBySide) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end


class _Orders(Sampler[int]):
    """A batch of each run in turn, each in the order in which Trainer would have it from the run's seed."""

    def __init__(self, sampler: Any, seeds: list[int], batch_size: int) -> None:
        self._sampler, self._seeds, self._batch_size = sampler, seeds, batch_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._seeds) * len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        orders = []
        for seed in self._seeds:
            self._sampler.generator = torch.Generator().manual_seed(seed + self._epoch)
            orders.append(list(self._sampler))
        for start in range(0, len(self._sampler), self._batch_size):
            for order in orders:
                yield from order[start : start + self._batch_size]


def _targets(labels: Tensor) -> Tensor:
    """What each position is to predict, (rows, length); of a classifier's labels, what each text is, (rows,)."""
    return labels if labels.dim() == 1 else F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _losses(head: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The loss of each target, 0 where it is ignored."""
    given, targets = {"input_ids": input_ids, "attention_mask": attention_mask}, _targets(labels)
    if isinstance(head, GPT2ForSequenceClassification):
        return F.cross_entropy(head(**given, use_cache=False).logits, targets, reduction="none")
    reads = Reads(positions=targets != IGNORED)
    hidden = head.transformer(**given, use_cache=False, reads=reads).last_hidden_state
    weight, bias, site = head.lm_head.weight, head.lm_head.bias, head._fastpeft
    losses, route = routed_lm_head_loss(
        hidden, weight, targets, bias, IGNORED, "none", None, 0.0, site.backend
    )
    site.record(route)
    return losses


#: What a batch holds, and what its padding is, None for the model's own.
_FILL = {"input_ids": None, "attention_mask": 0, "labels": IGNORED}


def _joined(batches: list[dict[str, Tensor]], size: int, padding: int) -> dict[str, Tensor]:
    """Batches of one run each, one below the other; the shorter get padding after what they have."""
    unknown = sorted({key for batch in batches for key in batch} - {*_FILL})
    if unknown or any(not {"input_ids", "labels"} <= {*batch} for batch in batches):
        raise ValueError(
            f"collate_fn gave {', '.join(batches[0])}: a sweep takes input_ids, labels and attention_mask"
        )
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    joined = {}
    for key, fill in _FILL.items():
        parts = [batch.get(key, torch.ones_like(batch["input_ids"])) for batch in batches]
        if any(len(part) != size for part in parts):
            raise ValueError(
                f"collate_fn made {len(parts[0])} rows of {size} examples: a row for each is needed"
            )
        value = padding if fill is None else fill
        joined[key] = torch.cat(
            [F.pad(p, (0, longest - p.shape[1]), value=value) if p.dim() > 1 else p for p in parts]
        )
    return joined


def _owner(parameter: str) -> str:
    """The run that a trained parameter of this name is of."""
    found = _TRAINED.fullmatch(parameter)
    assert found, parameter
    return found[1]


def _stopped(history: list[Any]) -> dict[str, str]:
    """The runs that have stopped, and why."""
    return {name: why for entry in history for name, why in entry.get("stopped", {}).items()}


def _differing(was: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return f"it holds {', '.join(was) or 'none'}; {', '.join(names)} differ"


def _filled(run: Run, arguments: TrainingArguments) -> Any:
    """The run with what it leaves to the arguments."""
    left = {
        name: getattr(arguments, name) for name in ("learning_rate", "seed") if getattr(run, name) is None
    }
    return replace(run, **left)


def _with_adapter(model: Any, wrapped: Any, run: Run) -> Any:
    """`model` under peft with this run's adapter beside those that `wrapped`, if it is one, has already."""
    config = copy.deepcopy(run.config)  # peft writes into it
    if wrapped is None:
        return get_peft_model(model, config, adapter_name=run.name)
    wrapped.add_adapter(run.name, config)
    return wrapped


def _check(model: Any, runs: list[Run], arguments: TrainingArguments, dataset: Any) -> None:
    """Raises where a sweep can't train this, before anything changes."""
    _check_model(model)
    _check_arguments(arguments)
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise ValueError("dataset has no length: each run draws an order of its own from all of its examples")
    if not runs:
        raise ValueError("no runs: give a fastpeft.Run for each adapter to train")
    names = [run.name for run in runs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several runs are named {', '.join(repeated)}: each needs a name of its own")
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    for run in runs:
        _check_run(run, parts)
    if len({run.config.task_type for run in runs}) > 1:
        raise ValueError("the runs' configs have different task_types: peft wraps a model for one of them")
    _rehearse(model, runs)


def _check_model(model: Any) -> None:
    if any(is_fused(module) for module in model.modules()):
        raise ValueError(
            "the model is patched already: fastpeft.unpatch(model) first, a sweep patches by itself"
        )
    inner = getattr(model, "transformer", None)
    wrapped = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if (
        type(model) not in (GPT2LMHeadModel, GPT2ForSequenceClassification)
        or type(inner) is not GPT2Model
        or wrapped
    ):
        raise TypeError(
            f"a sweep takes a plain GPT2LMHeadModel or GPT2ForSequenceClassification, without adapters, got "
            f"{'one with adapters' if wrapped else type(model).__name__}: give the model that they go into"
        )
    head = model.score if isinstance(model, GPT2ForSequenceClassification) else model.lm_head
    if type(head) is not nn.Linear or not is_plain(head):
        raise ValueError("the model's head is more than a linear layer: a sweep computes its loss by itself")
    if any(vars(module).get("gradient_checkpointing") for module in model.modules()):
        raise ValueError(
            "call model.gradient_checkpointing_disable() first: rows of runs don't go through it"
        )
    config: Any = model.config
    if isinstance(model, GPT2ForSequenceClassification):
        if config.pad_token_id is None:
            raise ValueError("config.pad_token_id is None: GPT-2 finds the last token of each text by it")
        if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                "a sweep classifies by one label a text: num_labels from 2, no other problem_type"
            )


def _check_arguments(arguments: Any) -> None:
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise ValueError("a sweep runs in one process on one device: hide other GPUs by CUDA_VISIBLE_DEVICES")
    default = TrainingArguments(arguments.output_dir, use_cpu=arguments.use_cpu)
    for field in fields(arguments):
        name = field.name
        if name not in _KNOWN and getattr(arguments, name) != getattr(default, name):
            raise ValueError(f"a sweep doesn't know TrainingArguments' {name}: leave it as it comes")
    for name, known in (("optim", _OPTIMISERS), ("train_sampling_strategy", _ORDERS)):
        if getattr(arguments, name) not in known:
            raise ValueError(f"{name}={getattr(arguments, name)!r}: a sweep takes one of {', '.join(known)}")


def _check_run(run: Run, parts: set[str]) -> None:
    if not re.fullmatch(r"[\w-]+", run.name, re.ASCII) or run.name in parts | _PEFTS or run.name in "lora_":
        raise ValueError(
            f"run name {run.name!r}: take letters, digits, - and _, and nothing that peft could take for a part of the "
            "model's names or its own"
        )
    if type(run.config) is not LoraConfig:
        raise TypeError(
            f"run {run.name}: its config is a {type(run.config).__name__}, a sweep takes LoraConfig"
        )
    for name, known in (("init_lora_weights", _INITS), ("layer_replication", (None,))):
        if (found := getattr(run.config, name)) not in known:
            raise ValueError(f"run {run.name}: {name}={found!r} would change the base, which the runs share")


def _rehearse(model: Any, runs: list[Run]) -> None:
    """Put the adapters on a model without memory, and see that each trains nothing but LoRA and a head of its own."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()), torch.device("meta"):
        warnings.simplefilter("ignore")  # they come again
        wrapped, twin = None, type(model)(copy.deepcopy(model.config))
        for run in runs:
            try:
                wrapped = _with_adapter(twin, wrapped, run)
                wrapped.set_requires_grad([run.name])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"run {run.name}: {error}") from error
            trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
            strange = [name for name in trained if not _TRAINED.fullmatch(name)] + [
                name
                for name, m in wrapped.named_modules()
                if isinstance(m, LoraLayer) and (type(m) is not LoraLinear or m.lora_variant)
            ]
            if strange:
                raise ValueError(
                    f"run {run.name}: {strange[0]} isn't plain LoRA of the blocks' projections, nor a classifier's "
                    "head: a sweep trains nothing else"
                )
