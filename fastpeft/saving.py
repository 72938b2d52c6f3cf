"""Sets of bottleneck adapters in files: what is written, and what of it a model has to fit before it is loaded."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

from fastpeft.adapters import (
    DEFAULT,
    SLOTS,
    AdapterConfig,
    activation_name,
    adapters_in,
    adapters_of,
    add_adapters,
    attribute_of,
    check_present,
    hosts_of,
    transformer_of,
    tuner_parameters,
)

CONFIG_FILE = "fastpeft_adapters.json"
WEIGHTS_FILE = "fastpeft_adapters.safetensors"
FORMAT = 1


def save_adapters(model: nn.Module, folder: str | os.PathLike[str], name: str = DEFAULT) -> None:
    """Write a set of the model's adapters, and every other parameter that trains (the head), to `folder`.

    Two files: the configuration as JSON and the weights as safetensors; the set's name isn't in them. LoRA factors are
    left to peft's own `save_pretrained`.

    Raises:
        ValueError: the model has no adapters, none of this name, or no GPT-2 inside.
        OSError: the folder can't be written.
    """
    transformer = transformer_of(model)
    if not adapters_in(transformer):
        raise ValueError("the model has no adapters to save: call add_adapters first")
    check_present(transformer, name)
    configs = _configs(transformer, name)
    adapter_keys = set(_adapter_shapes(model, configs))
    parameters = _plain_parameters(model, name)
    trained = sorted(k for k, p in parameters.items() if p.requires_grad and k not in adapter_keys)
    description = {
        "format": FORMAT,
        "width": transformer.config.n_embd,
        "layers": transformer.config.n_layer,
        "adapters": [asdict(config) for config in configs],
        "trained": trained,
    }
    tensors = {k: parameters[k].detach().contiguous() for k in sorted(adapter_keys | set(trained))}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # Each file appears whole or not at all; the weights first, since the JSON is what vouches for them.
    save_file(tensors, path / f"{WEIGHTS_FILE}.tmp")
    os.replace(path / f"{WEIGHTS_FILE}.tmp", path / WEIGHTS_FILE)
    (path / f"{CONFIG_FILE}.tmp").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(path / f"{CONFIG_FILE}.tmp", path / CONFIG_FILE)


def load_adapters(model: nn.Module, folder: str | os.PathLike[str], name: str = DEFAULT) -> nn.Module:
    """Load what `save_adapters` wrote as the set of this name, adding it where the model has none so named, in place.

    Whatever else trained is loaded too, the head above all, which all sets share.

    Returns:
        The model, its adapters and head trainable as `add_adapters` leaves them.

    Raises:
        FileNotFoundError: a file is missing in `folder`.
        ValueError: the files are damaged, of another version, don't fit the model (width, layers, other
            adapters, a missing or extra key, a shape), or hold another head than the one that other sets of the model
            use; or a name as `add_adapters` refuses it. Nothing is changed then.
    """
    path = Path(folder)
    transformer = transformer_of(model)
    configs, trained = _read_description(path / CONFIG_FILE, transformer)
    tensors = _read_tensors(path / WEIGHTS_FILE)
    present = _configs(transformer, name)
    if present and _by_slot(present) != _by_slot(configs):
        raise ValueError(f"{path}: the model has other adapters: {present}, the file {configs}")
    shapes = _adapter_shapes(model, configs)
    parameters = _plain_parameters(model, name)
    for key in trained:
        if key not in parameters:
            raise ValueError(
                f"{path}: trained parameter {key!r} doesn't exist in the model: build it with that head"
            )
        shapes[key] = parameters[key].shape
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(f"{path / WEIGHTS_FILE}: missing keys {missing}, unexpected keys {extra}")
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            found = tuple(tensors[key].shape)
            raise ValueError(
                f"{path / WEIGHTS_FILE}: {key} has shape {found}, the model needs {tuple(shape)}"
            )
    others = sorted({each for _, _, each, _ in adapters_in(transformer)} - {name})
    changed = [
        key
        for key in trained
        if others and not torch.equal(tensors[key].to(parameters[key]), parameters[key])
    ]
    if changed:
        raise ValueError(
            f"{path}: {', '.join(changed)} would change for {', '.join(others)} too: load into a model of its own"
        )
    for config in [] if present else configs:
        add_adapters(model, config, name)
    parameters = _plain_parameters(model, name)
    with torch.no_grad():
        for key, tensor in tensors.items():
            parameters[key].copy_(tensor)
    return model


def _read_description(path: Path, transformer: GPT2Model) -> tuple[list[AdapterConfig], list[str]]:
    """The configs and the names of other trained parameters; ValueError where they don't fit the model."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format"]
        if version != FORMAT:
            raise ValueError(f"format {version}, this fastpeft reads format {FORMAT}")
        configs = [AdapterConfig(**config) for config in description["adapters"]]
        size = description["width"], description["layers"]
        trained = [str(name) for name in description["trained"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a description of adapters: {error}") from error
    if size != (transformer.config.n_embd, transformer.config.n_layer):
        raise ValueError(
            f"{path}: adapters for width {size[0]} and {size[1]} layers, "
            f"the model has {transformer.config.n_embd} and {transformer.config.n_layer}"
        )
    return configs, trained


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _configs(transformer: GPT2Model, name: str) -> list[AdapterConfig]:
    """The adapters that a set has in each slot, as they are: one config for all blocks that have them alike."""
    layers: dict[tuple[str, int, str, float], list[int]] = {}
    for slot, index, each, a in adapters_in(transformer):
        alike = slot, a.down.out_features, activation_name(a.act) or "", a.scale
        if each == name:
            layers.setdefault(alike, []).append(index)
    everywhere = {slot: list(range(len(hosts_of(transformer, slot)))) for slot in SLOTS}
    return [
        AdapterConfig(
            (slot,), bottleneck, activation, scale, None if found == everywhere[slot] else tuple(found)
        )
        for (slot, bottleneck, activation, scale), found in layers.items()
    ]


def _by_slot(configs: list[AdapterConfig]) -> set[AdapterConfig]:
    return {replace(config, slots=(slot,)) for config in configs for slot in config.slots}


def _adapter_shapes(model: nn.Module, configs: list[AdapterConfig]) -> dict[str, torch.Size]:
    """Plain name and shape of every parameter the adapters of `configs` have, or would have, in `model`, unnamed."""
    transformer = transformer_of(model)
    root = next(name for name, module in _unwrap(model).named_modules() if module is transformer)
    prefix = f"{root}." if root else ""
    width = transformer.config.n_embd
    return {
        f"{prefix}{name}.adapter.{part}": torch.Size(shape)
        for config in configs
        for slot in config.slots
        for name, _ in hosts_of(transformer, slot, config.layers)
        for part, shape in (
            ("down.weight", (config.bottleneck, width)),
            ("down.bias", (config.bottleneck,)),
            ("up.weight", (width, config.bottleneck)),
            ("up.bias", (width,)),
        )
    }


def _plain_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Parameters by the names the model has without peft and with this set of adapters alone, as the unnamed one.

    Those that peft saves by itself are left out.
    """
    root = _unwrap(model)
    left_out = {id(p) for m in root.modules() if isinstance(m, BaseTunerLayer) for p in tuner_parameters(m)}
    plain: dict[str, nn.Parameter] = {}
    for prefix, module in root.named_modules():
        for each, adapter in adapters_of(module).items():
            left_out |= {id(p) for p in adapter.parameters()}
            if each == name:
                plain |= dict(adapter.named_parameters(prefix=f"{prefix}.{attribute_of(DEFAULT)}"))
        wrapped = isinstance(module, ModulesToSaveWrapper)
        for key, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if id(parameter) not in left_out and not wrapped:
                plain[key.replace(".base_layer.", ".")] = parameter
    for prefix, module in root.named_modules():
        if isinstance(module, ModulesToSaveWrapper):  # one head, though the wrapper holds it twice
            plain = {k: p for k, p in plain.items() if not k.startswith(f"{prefix}.")}
            plain |= dict(module.modules_to_save[module.active_adapter].named_parameters(prefix=prefix))
    return plain


def _unwrap(model: nn.Module) -> nn.Module:
    """The model below torch.compile's, DistributedDataParallel's and peft's wrappers."""
    while True:
        if isinstance(model, PeftModel):
            return model.get_base_model()
        inner = getattr(model, "_orig_mod", None) or (
            model.module
            if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
            else None
        )
        if inner is None:
            return model
        model = inner
