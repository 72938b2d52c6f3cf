"""The runs of a sweep, each an adapter on one base: what they may be, and what is refused before anything changes."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastpeft.adapters import AdapterConfig, adapters_of, attribute_of
from fastpeft.groups import BASE
from fastpeft.modules import is_plain
from fastpeft.run_kinds import KINDS, NOT_PLAIN, owner_of
from fastpeft.swap import is_fused

#: Names that peft has for something else, beside any part of "lora_".
_PEFTS = {
    "default", BASE, "base_model", "model", "base_layer", "original_module", "modules_to_save", "lora_A", "lora_B"
}  # fmt: skip
_LONGEST = 100
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
    config: LoraConfig | AdapterConfig
    learning_rate: float | None = None
    seed: int | None = None  # of the adapter's first weights and of the order of the examples


def checked(model: Any, runs: list[Run], arguments: TrainingArguments, dataset: Any) -> list[Any]:
    """The runs, all of whose fields are filled; raises where a sweep can't train this, before anything changes."""
    _check_model(model)
    _check_arguments(arguments)
    if not hasattr(dataset, "__len__"):
        raise ValueError("dataset has no length: each run draws an order of its own from all of its examples")
    if not len(dataset):
        raise ValueError("dataset is empty: give examples to train on")
    if not runs:
        raise ValueError("no runs: give a fastpeft.Run for each adapter to train")
    runs = [_filled(run, arguments) for run in runs]
    names = [run.name for run in runs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several runs are named {', '.join(repeated)}: each needs a name of its own")
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    for run in runs:
        _check_run(run, parts, arguments)
    if len({type(run.config) for run in runs}) > 1:
        raise ValueError("some runs are of LoRA and some of bottleneck adapters: a sweep takes one kind")
    if len({getattr(run.config, "task_type", None) for run in runs}) > 1:
        raise ValueError("the runs' configs have different task_types: peft wraps a model for one of them")
    _rehearse(model, runs)
    return runs


def _filled(run: Run, arguments: TrainingArguments) -> Any:
    """The run with what it leaves to the arguments, in numbers of Python's own."""
    if not isinstance(run, Run):
        raise TypeError(f"runs must be of fastpeft.Run, got a {type(run).__name__}")
    rate = arguments.learning_rate if run.learning_rate is None else run.learning_rate
    seed = arguments.seed if run.seed is None else run.seed
    if not isinstance(rate, Real) or not 0 <= rate < math.inf:
        raise ValueError(f"run {run.name}: learning_rate={rate!r}: give a finite number from 0")
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"run {run.name}: seed={seed!r}: give a whole number from 0 to 2**32 - 1")
    return replace(run, learning_rate=float(rate), seed=int(seed))


def _check_model(model: Any) -> None:
    if any(is_fused(module) for module in model.modules()):
        raise ValueError(
            "the model is patched already: fastpeft.unpatch(model) first, a sweep patches by itself"
        )
    inner = getattr(model, "transformer", None)
    wrapped = any(isinstance(module, BaseTunerLayer) or adapters_of(module) for module in model.modules())
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
    if not is_plain(model):
        raise ValueError(
            "the model has hooks or a forward of its own, which a sweep would pass by: remove them first"
        )
    if isinstance(model, GPT2LMHeadModel) and model.loss_function is not ForCausalLMLoss:
        raise ValueError("the model has a loss_function of its own: a sweep computes its loss by itself")
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
    if not isinstance(arguments, TrainingArguments):
        raise TypeError(f"arguments must be TrainingArguments, got a {type(arguments).__name__}")
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise ValueError("a sweep runs in one process on one device: hide other GPUs by CUDA_VISIBLE_DEVICES")
    default = TrainingArguments(arguments.output_dir, use_cpu=arguments.use_cpu)
    for field in fields(arguments):
        name = field.name
        if name not in _KNOWN and getattr(arguments, name) != getattr(default, name):
            raise ValueError(f"a sweep doesn't know TrainingArguments' {name}: leave it as it comes")
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"seed={arguments.seed}: give a whole number from 0 to 2**32 - 1")
    for name, known in (("optim", _OPTIMISERS), ("train_sampling_strategy", _ORDERS)):
        if getattr(arguments, name) not in known:
            raise ValueError(f"{name}={getattr(arguments, name)!r}: a sweep takes one of {', '.join(known)}")


def _check_run(run: Run, parts: set[str], arguments: TrainingArguments) -> None:
    name, why = run.name, None
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name, re.ASCII):
        why = "take letters, digits, - and _"
    elif name in parts | _PEFTS:
        why = "take another, for this is a part of the model's names or one of peft's own"
    elif re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name):
        why = "take another, for Trainer's checkpoints have this one in output_dir"
    elif not _decays(name):
        why = "take another, for by this one Trainer takes weights for a bias or a norm's, which don't decay"
    elif len(name) > _LONGEST:
        why = f"take one of at most {_LONGEST} letters, for it is a folder's too"
    if why:
        raise ValueError(f"run name {name!r}: {why}")
    folder = Path(str(arguments.output_dir)) / name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run {name}: its folder is to be {folder}, where a file is: move it away")
    if type(run.config) not in KINDS:
        known = " or ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"run {run.name}: its config is a {type(run.config).__name__}, a sweep takes {known}")
    try:
        factors_of(run, arguments, 100)
    except (ArithmeticError, TypeError, ValueError) as error:
        kind: Any = arguments.lr_scheduler_type
        raise ValueError(f"run {run.name}: lr_scheduler_type {kind.value}: {error}") from error


def _decays(name: str) -> bool:
    """Whether weights decay that have this in their name: Trainer decides it by the names of parameters."""
    trainer, holder = cast(Any, Trainer), nn.Module()
    parts = {key: nn.Linear(1, 1, bias=False, device="meta") for key in (name, attribute_of(name))}
    holder._modules.update(parts)  # some names, like `half`, a module refuses
    return len(trainer.get_decay_parameter_names(None, holder)) == len(parts)


def factors_of(run: Any, arguments: TrainingArguments, steps: int) -> Callable[[int], float]:
    """What Trainer, of this run alone, multiplies its learning rate by at each of so many steps."""
    alone = torch.optim.SGD([nn.Parameter(torch.empty(0))], lr=run.learning_rate)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        alone,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )
    if not isinstance(schedule, LambdaLR):
        raise ValueError("it follows the loss, and a sweep takes schedules that follow the step alone")
    found: Callable[[int], float] = schedule.lr_lambdas[0]
    return found


def _rehearse(model: Any, runs: list[Run]) -> None:
    """Put the adapters on a model without memory, and see that each trains nothing but what is its own."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()), torch.device("meta"):
        warnings.simplefilter("ignore")  # they come again
        wrapped, twin = None, type(model)(copy.deepcopy(model.config))
        for run in runs:
            try:
                wrapped = KINDS[type(run.config)].add(twin, wrapped, run)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"run {run.name}: {error}") from error
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad and owner_of(name) is None:
                    raise ValueError(f"run {run.name}: {name} {NOT_PLAIN}")
