"""The kinds of adapters that a sweep trains: how one goes on the base that all share, and into files and back."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from transformers import GPT2ForSequenceClassification

from fastpeft.adapters import AdapterConfig, add_adapters
from fastpeft.saving import load_adapters, save_adapters

#: Initialisations of LoRA that read nothing but the seed: others take something out of the base, which the runs share.
_INITS = (True, False, "gaussian")
NOT_PLAIN = (
    "isn't plain LoRA of the blocks' projections, nor a classifier's head: a sweep trains nothing else"
)
#: What peft writes into a config beside what it is told.
_ELSEWHERE = ("base_model_name_or_path", "peft_version")


class Lora:
    """LoRA of the blocks' projections by peft, and a classifier's head as peft copies it."""

    #: The names of what a run may train, and in them the run's.
    trained = re.compile(
        r"base_model\.model\.(?:transformer\.h\..+\.lora_[AB]|score\.modules_to_save)\.([^.]+)\.(?:weight|bias)"
    )

    def add(self, model: Any, wrapped: Any, run: Any) -> Any:
        """`model` with this run's adapter beside those that are in `wrapped`, which is None or was returned before.

        Raises:
            KeyError, TypeError, ValueError: it can't be put there, or would change what the runs share.
        """
        name, config = run.name, copy.deepcopy(run.config)  # peft writes into it
        if name in "lora_":
            raise ValueError(
                "take a longer name: it is contained in 'lora_', by which peft knows its weights"
            )
        for option, known in (("init_lora_weights", _INITS), ("layer_replication", (None,))):
            if (found := getattr(config, option)) not in known:
                raise ValueError(f"{option}={found!r} would change the base, which the runs share")
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        layers = [(key, module) for key, module in wrapped.named_modules() if isinstance(module, LoraLayer)]
        # Which old versions of peft say of the first adapter alone.
        if not any(name in layer.scaling for _, layer in layers):
            raise ValueError(f"the model has no modules {config.target_modules}")
        for key, layer in layers:
            if type(layer) is not LoraLinear or layer.lora_variant:
                raise ValueError(f"{key} {NOT_PLAIN}")
        wrapped.set_requires_grad(list(wrapped.peft_config))  # peft leaves only the active one's so
        return wrapped

    def save(self, model: Any, folder: Path, names: list[str]) -> None:
        """Write each run's to a folder of its name."""
        model.save_pretrained(str(folder), selected_adapters=names)

    def load(self, model: Any, folder: Path, name: str) -> None:
        """Take up what `save` wrote to this folder."""
        weights = load_peft_weights(str(folder / name), device=str(model.device))
        set_peft_model_state_dict(model, weights, adapter_name=name)

    def described(self, config: LoraConfig) -> dict[str, Any]:
        return {key: value for key, value in config.to_dict().items() if key not in _ELSEWHERE}


class Sets:
    """Sets of bottleneck adapters, named as their runs, and copies of a classifier's head."""

    trained = re.compile(
        r"(?:transformer\..+\.adapter_([^.]+)\.(?:down|up)|score\.own_([^.]+))\.(?:weight|bias)"
    )

    def add(self, model: Any, wrapped: Any, run: Any) -> Any:
        """`model`, in which this run's set is now; ValueError where it can't be."""
        classifier = isinstance(model, GPT2ForSequenceClassification)
        if not classifier:
            model.lm_head.requires_grad_(False)  # one that isn't tied
        return add_adapters(model, run.config, run.name, ["score"] if classifier else [])

    def save(self, model: Any, folder: Path, names: list[str]) -> None:
        for name in names:
            save_adapters(model, folder / name, name)

    def load(self, model: Any, folder: Path, name: str) -> None:
        load_adapters(model, folder / name, name)

    def described(self, config: AdapterConfig) -> dict[str, Any]:
        return asdict(config)


KINDS: dict[type, Any] = {LoraConfig: Lora(), AdapterConfig: Sets()}


def owner_of(parameter: str) -> str | None:
    """The run that a trained parameter of this name is of; None for one that no run may train."""
    for kind in KINDS.values():
        if found := kind.trained.fullmatch(parameter):
            return str(next(filter(None, found.groups())))
    return None
