"""How each kind of method is put on a GPT-2, how its weights are kept, and what puts them on again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import save_file
from torch import nn

from fastpeft.adapters import AdapterConfig, add_adapters
from fastpeft.compare.methods import PREFIX_TOKENS, Method
from fastpeft.compare.tasks import CLASSIFY, LM
from fastpeft.saving import CONFIG_FILE, load_adapters, save_adapters

HEAD_FILE = "head.safetensors"
#: Of transformers: what the base model is for each task.
MODEL_CLASSES: dict[str, Any] = {
    CLASSIFY: transformers.GPT2ForSequenceClassification,
    LM: transformers.GPT2LMHeadModel,
}
_TASK_TYPES = {CLASSIFY: TaskType.SEQ_CLS, LM: TaskType.CAUSAL_LM}


def apply(method: Method, model: Any, task: str) -> Any:
    """The GPT-2 with the method on it, in place or wrapped by peft: only what the method trains is trainable."""
    return _KINDS[method.place.kind].apply(method, model, task)


def save(method: Method, model: Any, folder: Path) -> None:
    """Write the trained weights of a model that `apply` returned."""
    _KINDS[method.place.kind].save(model, folder)


def loading(method: Method, task: str, folder: str) -> str:
    """A line of Python that puts the weights saved in `folder` on `model`, the base model."""
    return _KINDS[method.place.kind].load.format(folder=folder, model=MODEL_CLASSES[task].__name__)


#: The kinds of which runs can share a base.
TOGETHER = ("lora", "adapter")


def run_config(method: Method, config: Any, task: str) -> LoraConfig | AdapterConfig:
    """What a sweep is told of a method, for a GPT-2 of this config."""
    return (
        lora_config(method, config, task) if method.place.kind == "lora" else adapter_config(method, config)
    )


def loaded(model: Any, folder: Path) -> Any:
    """The model with what a run of a sweep left in its folder, which trains as it did."""
    if (folder / CONFIG_FILE).exists():
        return load_adapters(model, folder)
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def why_not(method: Method, task: str) -> str | None:
    """Why the peft and transformers that are installed can't train this method together; None where they can."""
    if method.place.kind != "prefix":
        return None
    # peft looks for an argument of GPT-2's forward by a name that transformers 5.24 changed: a small one tells.
    sizes: dict[str, Any] = {
        "n_layer": 1,
        "n_embd": 4,
        "n_head": 1,
        "n_positions": 2 * PREFIX_TOKENS,
        "vocab_size": 2,
    }
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    token = torch.ones(1, 1, dtype=torch.long)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        model = _with_prefix(MODEL_CLASSES[task](config), 1, task)
        try:
            model(input_ids=token, attention_mask=token)
        except ValueError as error:
            return f"peft {peft.__version__} on transformers {transformers.__version__}: {error}"
    return None


def trainable(model: Any) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


def _head(method: Method, model: Any, task: str) -> Any:
    model.transformer.requires_grad_(False)
    return model


def _full(method: Method, model: Any, task: str) -> Any:
    return model


def lora_config(method: Method, config: Any, task: str) -> LoraConfig:
    """What peft is told of a LoRA method, for a GPT-2 of this config."""
    rank, dropout = method.options["r"], method.options["dropout"]
    return LoraConfig(
        task_type=_TASK_TYPES[task],
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=list(method.place.where),
        layers_to_transform=method.layers(config),
        layers_pattern="h",
        fan_in_fan_out=True,
    )


def _lora(method: Method, model: Any, task: str) -> Any:
    return _wrapped(model, lora_config(method, model.config, task))


def adapter_config(method: Method, config: Any) -> AdapterConfig:
    """What `add_adapters` is told of a method of bottleneck adapters, for a GPT-2 of this config."""
    chosen = tuple(method.layers(config)) if method.options.get("layers") else None
    return AdapterConfig(method.place.where, method.options["bottleneck"], layers=chosen)


def _adapter(method: Method, model: Any, task: str) -> Any:
    return add_adapters(model, adapter_config(method, model.config))


def _prefix(method: Method, model: Any, task: str) -> Any:
    return _with_prefix(model, method.options["tokens"], task)


def _with_prefix(model: Any, tokens: int, task: str) -> Any:
    return _wrapped(model, PrefixTuningConfig(task_type=_TASK_TYPES[task], num_virtual_tokens=tokens))


def _prompt(method: Method, model: Any, task: str) -> Any:
    tokens = method.options["tokens"]
    return _wrapped(model, PromptTuningConfig(task_type=_TASK_TYPES[task], num_virtual_tokens=tokens))


def _wrapped(model: Any, config: PeftConfig) -> Any:
    with warnings.catch_warnings():
        # peft asks transformers for an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


def _save_head(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(
        {name: p.detach().contiguous() for name, p in model.score.named_parameters()}, folder / HEAD_FILE
    )


def _save_pretrained(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


class _Kind(NamedTuple):
    apply: Callable[[Method, Any, str], Any]
    save: Callable[[Any, Path], None]
    load: str


_LOAD_PEFT = 'model = peft.PeftModel.from_pretrained(model, "{folder}")'
_KINDS = {
    "head": _Kind(
        _head,
        _save_head,
        f'model.score.load_state_dict(safetensors.torch.load_file("{{folder}}/{HEAD_FILE}"))',
    ),
    "lora": _Kind(_lora, _save_pretrained, _LOAD_PEFT),
    "adapter": _Kind(_adapter, save_adapters, 'fastpeft.load_adapters(model, "{folder}")'),
    "prefix": _Kind(_prefix, _save_pretrained, _LOAD_PEFT),
    "prompt": _Kind(_prompt, _save_pretrained, _LOAD_PEFT),
    "full": _Kind(_full, _save_pretrained, 'model = transformers.{model}.from_pretrained("{folder}")'),
}
