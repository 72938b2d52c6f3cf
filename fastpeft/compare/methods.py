"""The methods compared: how each is put on a GPT-2, what it trains, and how its weights are kept.

Every method trains the classification head as well; a method is what it trains besides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from torch import nn

from fastpeft.adapters import AdapterConfig, add_adapters, save_adapters

if TYPE_CHECKING:
    from fastpeft.compare.arguments import Arguments

#: peft's usual prefix; it takes this many of the model's positions.
PREFIX_TOKENS = 20
LORA_DROPOUT = 0.05
HEAD_FILE = "head.safetensors"

HEAD_TERM = "{classes}·{width}"
LORA_TERM = "{layers}·{rank}·(8·{width} + 2·{inner})"
ADAPTER_TERM = "(2·{width}·{bottleneck} + {width} + {bottleneck})"
PREFIX_TERM = "{layers}·2·{tokens}·{width}"
BASE_TERM = (
    "({vocabulary} + {positions} + 2)·{width}"
    " + {layers}·(4·{width}·{width} + 2·{width}·{inner} + 9·{width} + {inner})"
)


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning a GPT-2 classifier."""

    trains: str  # what, beside the head, in a few words
    term: str  # the formula of its parameters, without the head's; fields are the keys of `sizes`
    learning_rate: float  # a peak that suits it, tried on another split than the reported one
    apply: Callable[[Any, Arguments], Any]  # takes a GPT-2, returns it with the method on it
    save: Callable[[Any, Path], None]
    load: str  # Python that puts the saved weights on `model`

    def formula(self, config: Any, arguments: Arguments) -> str:
        """Trainable parameters as `symbols = numbers`, for a GPT-2 classifier of this config."""
        formula = f"{self.term} + {HEAD_TERM}" if self.term else HEAD_TERM
        sizes = _sizes(config, arguments)
        return f"{formula.format(**{name: name for name in sizes})} = {formula.format(**sizes)}"


def _sizes(config: Any, arguments: Arguments) -> dict[str, int]:
    return {
        "layers": config.n_layer,
        "width": config.n_embd,
        "inner": config.n_inner or 4 * config.n_embd,
        "vocabulary": config.vocab_size,
        "positions": config.n_positions,
        "classes": config.num_labels,
        "rank": arguments.rank,
        "bottleneck": arguments.bottleneck,
        "tokens": PREFIX_TOKENS,
    }


def _head(model: Any, arguments: Arguments) -> Any:
    model.transformer.requires_grad_(False)
    return model


def _full(model: Any, arguments: Arguments) -> Any:
    return model


def _lora(model: Any, arguments: Arguments) -> Any:
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=LORA_DROPOUT,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    return _wrapped(model, config)


def _prefix(model: Any, arguments: Arguments) -> Any:
    return _with_prefix(model)


def _with_prefix(model: Any) -> Any:
    config = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=PREFIX_TOKENS)
    return _wrapped(model, config)


def why_not(name: str) -> str | None:
    """Why the peft and transformers that are installed can't train this method together; None where they can."""
    if name != "prefix":
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
        model = _with_prefix(transformers.GPT2ForSequenceClassification(config))
        try:
            model(input_ids=token, attention_mask=token)
        except ValueError as error:
            return f"peft {peft.__version__} on transformers {transformers.__version__}: {error}"
    return None


def _wrapped(model: Any, config: PeftConfig) -> Any:
    with warnings.catch_warnings():
        # peft asks transformers for an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


def _adapter(model: Any, arguments: Arguments, slot: str) -> Any:
    return add_adapters(model, AdapterConfig((slot,), arguments.bottleneck))


def _save_head(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(
        {name: p.detach().contiguous() for name, p in model.score.named_parameters()}, folder / HEAD_FILE
    )


def _save_pretrained(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


_LOAD_PEFT = 'model = peft.PeftModel.from_pretrained(model, "{folder}")'
_LOAD_ADAPTERS = 'fastpeft.load_adapters(model, "{folder}")'
_LOAD_HEAD = f'model.score.load_state_dict(safetensors.torch.load_file("{{folder}}/{HEAD_FILE}"))'
_LOAD_FULL = 'model = transformers.GPT2ForSequenceClassification.from_pretrained("{folder}")'


def _bottleneck(slot: str, where: str, every_layer: bool) -> Method:
    return Method(
        trains=f"bottleneck adapters {where}",
        term=f"{{layers}}·{ADAPTER_TERM}" if every_layer else ADAPTER_TERM,
        learning_rate=1e-3,
        apply=partial(_adapter, slot=slot),
        save=save_adapters,
        load=_LOAD_ADAPTERS,
    )


METHODS: dict[str, Method] = {
    "head": Method("nothing else", "", 5e-3, _head, _save_head, _LOAD_HEAD),
    "lora": Method(
        "LoRA on every projection (c_attn, attn.c_proj, c_fc, mlp.c_proj)",
        LORA_TERM,
        1e-3,
        _lora,
        _save_pretrained,
        _LOAD_PEFT,
    ),
    "adapter-attn": _bottleneck("post_attn", "after each attention", every_layer=True),
    "adapter-mlp": _bottleneck("post_mlp", "after each MLP", every_layer=True),
    "adapter-block": _bottleneck("post_block", "after each block", every_layer=True),
    "adapter-embed": _bottleneck("post_embed", "after the embeddings", every_layer=False),
    "adapter-head": _bottleneck("pre_head", "before the head", every_layer=False),
    "prefix": Method(
        f"a prefix of {PREFIX_TOKENS} keys and values in every layer",
        PREFIX_TERM,
        5e-3,
        _prefix,
        _save_pretrained,
        _LOAD_PEFT,
    ),
    "full": Method("every weight of the model", BASE_TERM, 3e-4, _full, _save_pretrained, _LOAD_FULL),
}


def trainable(model: Any) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]
