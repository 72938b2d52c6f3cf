"""Sets of bottleneck adapters in files: what is written, and what of it a model has to fit before it is loaded."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from numbers import Real
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

from fastpeft import copies
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
    free_hosts,
    give_copies,
    hosts_of,
    transformer_of,
    tuner_parameters,
)
from fastpeft.copies import Copied, unwrapped

CONFIG_FILE = "fastpeft_adapters.json"
WEIGHTS_FILE = "fastpeft_adapters.safetensors"
FORMAT = 1
#: Of the weights' metadata, what CONFIG_FILE says.
DESCRIPTION = "fastpeft"


def save_adapters(model: nn.Module, folder: str | os.PathLike[str], name: str = DEFAULT) -> None:
    """Write a set of the model's adapters, and every other parameter that trains (the head), to `folder`.

    Two files: the configuration as JSON and the weights as safetensors; the set's name isn't in them. LoRA factors are
    left to peft's own `save_pretrained`.

    Raises:
        ValueError: the model has no adapters, none of this name, no GPT-2 inside, or adapters that aren't as
            `add_adapters` makes them; nothing is written then.
        OSError: the folder can't be written.
    """
    transformer = transformer_of(model)
    if not adapters_in(transformer):
        raise ValueError("the model has no adapters to save: call add_adapters first")
    check_present(transformer, name)
    configs = _configs(transformer, name)
    adapter_keys = set(_adapter_shapes(model, configs))
    parameters = _plain_parameters(model, name)
    if missing := sorted(adapter_keys - parameters.keys()):
        raise ValueError(f"{missing[0]} isn't there: the adapters aren't as add_adapters makes them")
    own = copies.owned(model, name)
    trained = sorted(
        k for k, p in parameters.items() if (p.requires_grad or _in(k, own)) and k not in adapter_keys
    )
    names: dict[int, str] = {}  # of what is tied the first, which is written for all
    tied = {k: names[id(parameters[k])] for k in trained if names.setdefault(id(parameters[k]), k) != k}
    description = {
        "format": FORMAT,
        "width": transformer.config.n_embd,
        "layers": transformer.config.n_layer,
        "adapters": [asdict(config) for config in configs],
        "trained": trained,
        "tied": tied,
        "modules_to_save": own,
    }
    text = json.dumps(description, indent=2) + "\n"
    tensors = {
        k: parameters[k].detach().contiguous() for k in sorted(adapter_keys.union(trained) - tied.keys())
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # Each file appears whole or not at all; the weights have the JSON in them, to tell files of two saves.
    save_file(tensors, path / f"{WEIGHTS_FILE}.tmp", {DESCRIPTION: text})
    (path / f"{CONFIG_FILE}.tmp").write_text(text, encoding="utf-8")
    for file in WEIGHTS_FILE, CONFIG_FILE:
        os.replace(path / f"{file}.tmp", path / file)


def load_adapters(model: nn.Module, folder: str | os.PathLike[str], name: str = DEFAULT) -> nn.Module:
    """Load what `save_adapters` wrote as the set of this name, adding it where the model has none so named, in place.

    Adapters that are added have the dtype in which they were saved. Whatever else trained is loaded too, the head above
    all: a set that was saved with one of its own has it so again, and one whose head isn't that which other sets use
    gets its own.

    Returns:
        The model, its adapters and head trainable as `add_adapters` leaves them.

    Raises:
        FileNotFoundError: a file is missing in `folder`.
        ValueError: the files are damaged, of another version, not of one save, don't fit the model (width, layers,
            other adapters, a missing or extra key, a shape, parameters tied that the file has apart), or hold something
            else than a head that other sets use too, and differently; or a name as `add_adapters` refuses it. Nothing
            is changed then.
    """
    path = Path(folder)
    transformer = transformer_of(model)
    configs, trained, tied, own = _read_description(path / CONFIG_FILE, transformer)
    tensors = _read_tensors(path)
    tensors |= {key: tensors[first] for key, first in tied.items() if first in tensors}
    present = _configs(transformer, name)
    if present and _by_slot(present) != _by_slot(configs):
        raise ValueError(f"{path}: the model has other adapters: {present}, the file {configs}")
    if not present:
        free_hosts(transformer, configs, name)
    shapes = _adapter_shapes(model, configs)
    added = {} if present else dict(shapes)
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
    own = sorted({*own, *copies.owned(model, name)})
    for key in (each for each in trained if not _in(each, own)):
        for other in (each for each, p in parameters.items() if p is parameters[key] and each != key):
            if other not in trained or not torch.equal(tensors[key], tensors[other]):
                raise ValueError(
                    f"{path}: {key} and {other} are tied in the model, and not in the file: load into a model with "
                    "tie_word_embeddings=False"
                )
    changed = _changed_for_others(model, name, {key: tensors[key] for key in trained})
    given = sorted({*own, *changed} - {*copies.owned(model, name)})
    try:
        copies.check(model, given, name)
    except ValueError as error:
        what = f"its {' and '.join(given)} can't be those of other sets"
        raise ValueError(f"{path}: {what}: load into a model of its own; {error}") from None
    for config in [] if present else configs:
        add_adapters(model, config, name)
    give_copies(model, given, name)
    parameters = _plain_parameters(model, name)
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in added:
                parameters[key].data = parameters[key].to(tensor.dtype)
            parameters[key].copy_(tensor)
    return model


def _read_description(
    path: Path, transformer: GPT2Model
) -> tuple[list[AdapterConfig], list[str], dict[str, str], list[str]]:
    """The configs, the names of other trained parameters, those that others are tied to, and the set's modules.

    ValueError where they don't fit the model.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format"]
        if version != FORMAT:
            raise ValueError(f"format {version}, this fastpeft reads format {FORMAT}")
        configs = [AdapterConfig(**config) for config in description["adapters"]]
        size = description["width"], description["layers"]
        trained = [str(name) for name in description["trained"]]
        tied = {str(key): str(first) for key, first in dict(description.get("tied", {})).items()}
        own = description.get("modules_to_save", [])
        if not isinstance(own, list) or not all(isinstance(module, str) for module in own):
            raise ValueError(f"modules_to_save isn't a list of names: {own!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a description of adapters: {error}") from error
    if size != (transformer.config.n_embd, transformer.config.n_layer):
        raise ValueError(
            f"{path}: adapters for width {size[0]} and {size[1]} layers, "
            f"the model has {transformer.config.n_embd} and {transformer.config.n_layer}"
        )
    return configs, trained, tied, own


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            of_save = (file.metadata() or {}).get(DESCRIPTION)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if of_save is not None and json.loads(of_save) != json.loads((folder / CONFIG_FILE).read_text("utf-8")):
        raise ValueError(f"{path} and {CONFIG_FILE} beside it are of two saves: save the adapters again")
    return tensors


def _configs(transformer: GPT2Model, name: str) -> list[AdapterConfig]:
    """The adapters that a set has in each slot, as they are: one config for all blocks that have them alike."""
    layers: dict[tuple[str, int, str, float], list[int]] = {}
    for slot, index, each, a in adapters_in(transformer):
        if each != name:
            continue
        if not isinstance(a.scale, Real):
            raise ValueError(f"the scale of an adapter in {slot} is a {type(a.scale).__name__}, not a number")
        alike = slot, a.down.out_features, activation_name(a.act) or "", a.scale
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
    root = next(name for name, module in unwrapped(model).named_modules() if module is transformer)
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
    root = unwrapped(model)
    own: dict[str, nn.Parameter] = {}
    left_out = {id(p) for m in root.modules() if isinstance(m, BaseTunerLayer) for p in tuner_parameters(m)}
    plain: dict[str, nn.Parameter] = {}
    for prefix, module in root.named_modules():
        for each, adapter in adapters_of(module).items():
            left_out |= {id(p) for p in adapter.parameters()}
            if each == name:
                own |= dict(adapter.named_parameters(prefix=f"{prefix}.{attribute_of(DEFAULT)}"))
        wrapped = isinstance(module, ModulesToSaveWrapper)
        for key, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if id(parameter) not in left_out and not wrapped:
                plain[key.replace(".base_layer.", ".")] = parameter
    for prefix, module in root.named_modules():
        used: dict[str, nn.Parameter] = {}
        if isinstance(module, Copied):
            used = module.of(name)
        elif isinstance(module, ModulesToSaveWrapper):  # one head, though the wrapper holds it twice
            used = dict(module.modules_to_save[module.active_adapter].named_parameters())
            if any(isinstance(each, Copied) for each in module.modules()):
                raise ValueError(
                    f"peft has put {prefix} in a wrapper of its own since sets have copies of it: call get_peft_model "
                    "before add_adapters"
                )
        if used:
            plain = {k: p for k, p in plain.items() if not k.startswith(f"{prefix}.")}
            plain |= {f"{prefix}.{key}": parameter for key, parameter in used.items()}
    return plain | own


def _changed_for_others(model: nn.Module, name: str, loaded: dict[str, Tensor]) -> set[str]:
    """The names of modules whose parameters would change so for sets beside that of this name."""
    parameters = _plain_parameters(model, name)
    others = {each for _, _, each, _ in adapters_in(transformer_of(model))} - {name}
    changed = {
        key.rpartition(".")[0]
        for key, tensor in loaded.items()
        if not torch.equal(tensor.to(parameters[key]), parameters[key])
    }
    return {module for each in others for module in changed.difference(copies.owned(model, each))}


def _in(key: str, modules: list[str]) -> bool:
    """Whether a parameter is of one of these modules."""
    return key.rpartition(".")[0] in modules
