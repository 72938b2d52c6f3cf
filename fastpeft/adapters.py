"""Bottleneck adapters: their configuration, the eager module, injection into GPT-2, and their files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

from fastpeft import reference

PARALLEL = "parallel_mlp"
SLOTS = ("post_embed", "post_attn", "post_mlp", PARALLEL, "post_block", "pre_head")
#: Of the slots in blocks: the host's name below its block.
_BELOW = {"post_attn": ".attn", "post_mlp": ".mlp", PARALLEL: ".mlp", "post_block": ""}
CONFIG_FILE = "fastpeft_adapters.json"
WEIGHTS_FILE = "fastpeft_adapters.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class AdapterConfig:
    """Where bottleneck adapters go and what they look like.

    Args:
        slots: any of `post_embed` (after the embeddings' dropout), `post_attn` (the attention's output,
            after its dropout and before the residual), `post_mlp` (likewise), `post_block` (after the
            block's last residual) and `pre_head` (after the final LayerNorm); or, instead of `post_mlp`,
            `parallel_mlp` (what the MLP reads, its update added to what the MLP returns).
        bottleneck: width of the bottleneck, at least 1.
        activation: `relu`, `gelu`, `gelu_tanh` or `silu`.
        scale: factor of the adapter's update before its residual.
        layers: indices of the blocks that get them, for slots in blocks; None for all.

    Raises:
        ValueError: an unknown or repeated slot, no slot, both slots of the MLP, an unknown activation, a bottleneck
            below 1, layers that aren't indices in rising order, or layers of a slot that is in none.
    """

    slots: tuple[str, ...] = ("post_attn",)
    bottleneck: int = 64
    activation: str = "relu"
    scale: float = 1.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        slots = (self.slots,) if isinstance(self.slots, str) else tuple(self.slots)
        object.__setattr__(self, "slots", slots)
        unknown = [slot for slot in slots if slot not in SLOTS]
        if unknown or not slots or len(set(slots)) < len(slots):
            raise ValueError(f"slots must be one or more of {', '.join(SLOTS)}, each once; got {slots}")
        if {"post_mlp", PARALLEL} <= set(slots):
            raise ValueError(
                f"post_mlp and {PARALLEL} are both the MLP's, which takes one adapter; got {slots}"
            )
        if self.activation not in reference.ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}: choose one of {', '.join(reference.ACTIVATIONS)}"
            )
        if not isinstance(self.bottleneck, int) or self.bottleneck < 1:
            raise ValueError(f"bottleneck must be a whole number of at least 1, got {self.bottleneck!r}")
        if self.layers is not None:
            layers = tuple(self.layers)
            object.__setattr__(self, "layers", layers)
            if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
                raise ValueError(f"layers must be indices of blocks in rising order, got {layers}")
            if outside := [slot for slot in slots if slot not in _BELOW]:
                raise ValueError(f"layers are for slots in blocks; {', '.join(outside)} is in none")


class Adapter(nn.Module):
    """`x + scale · up(act(down(x)))`; `up` starts at zero, so a fresh adapter changes nothing.

    Weights of another dtype than x are computed in theirs, and the sum returned in x's.
    """

    def __init__(self, width: int, bottleneck: int, activation: str = "relu", scale: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.act = _ACTIVATION_MODULES[activation]()
        self.up = nn.Linear(bottleneck, width)
        self.scale = scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) → (..., width)."""
        return x + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """What is added: x (..., width) → (..., width), in x's dtype."""
        return (self.scale * self.up(self.act(self.down(x.to(self.down.weight.dtype))))).to(x.dtype)


class ParallelAdapter(Adapter):
    """`output + scale · up(act(down(x)))`, of what a layer reads and returns (He et al., 2022)."""

    def forward(self, x: Tensor, output: Tensor) -> Tensor:  # type: ignore[override]
        """x and output (..., width) → (..., width)."""
        return output + self.update(x)


_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}
_ACTIVATION_NAMES: dict[Any, str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    NewGELUActivation: "gelu_tanh",
    GELUActivation: "gelu",
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}


def activation_name(act: Any) -> str | None:
    """The name in `reference.ACTIVATIONS` of an activation module or function; None where it is another."""
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    key = type(act) if isinstance(act, nn.Module) else act
    return _ACTIVATION_NAMES.get(key)


def add_adapters(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Put trainable adapters into a GPT-2's slots, in place, and freeze its base.

    The head stays as trainable as it was (a head tied to the token embedding is frozen with it), LoRA factors
    and modules that peft trains stay trainable. The first output is bit-equal to the output before.

    Args:
        model: a GPT-2 with any head, plain or wrapped by peft (call `get_peft_model` first: it freezes
            whatever it finds).
        config: slots and shape.

    Returns:
        The model.

    Raises:
        ValueError: no GPT-2 inside the model, a layer that it hasn't, or a slot that is taken; nothing is changed
            then.
    """
    transformer = _transformer(model)
    hosts = [
        (_kind(slot), *host) for slot in config.slots for host in _hosts(transformer, slot, config.layers)
    ]
    for _, name, host in hosts:
        if hasattr(host, "adapter"):
            raise ValueError(f"{name} already has an adapter: a slot takes one")
    trained_by_peft = {id(p) for p in _peft_parameters(transformer)}
    adapters = {id(p) for *_, adapter in _adapters(transformer) for p in adapter.parameters()}
    for parameter in transformer.parameters():
        if id(parameter) not in trained_by_peft | adapters:
            parameter.requires_grad_(False)
    width = transformer.config.n_embd
    for kind, _, host in hosts:
        near = next((p for p in host.parameters() if p.is_floating_point()), transformer.wpe.weight)
        adapter = kind(width, config.bottleneck, config.activation, config.scale)
        host.adapter = adapter.to(near.device, near.dtype).train(transformer.training)
        # First in line, so that hooks which record hidden states see the adapted output.
        host.register_forward_hook(adapt_output, prepend=True)
    return model


def save_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the model's adapters, and every other parameter that trains (the head), to `folder`.

    Two files: the configuration as JSON and the weights as safetensors. LoRA factors are left to peft's own
    `save_pretrained`.

    Raises:
        ValueError: the model has no adapters, or no GPT-2 inside.
        OSError: the folder can't be written.
    """
    transformer = _transformer(model)
    configs = _configs(transformer)
    if not configs:
        raise ValueError("the model has no adapters to save: call add_adapters first")
    adapter_keys = set(_adapter_shapes(model, configs))
    parameters = _plain_parameters(model)
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


def load_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what `save_adapters` wrote, adding the adapters where the model has none, in place.

    Returns:
        The model, its adapters and head trainable as `add_adapters` leaves them.

    Raises:
        FileNotFoundError: a file is missing in `folder`.
        ValueError: the files are damaged, of another version, or don't fit the model (width, layers, other
            adapters, a missing or extra key, a shape); nothing is changed then.
    """
    path = Path(folder)
    transformer = _transformer(model)
    configs, trained = _read_description(path / CONFIG_FILE, transformer)
    tensors = _read_tensors(path / WEIGHTS_FILE)
    present = _configs(transformer)
    if present and _by_slot(present) != _by_slot(configs):
        raise ValueError(f"{path}: the model has other adapters: {present}, the file {configs}")
    shapes = _adapter_shapes(model, configs)
    parameters = _plain_parameters(model)
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
    for config in [] if present else configs:
        add_adapters(model, config)
    parameters = _plain_parameters(model)
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


def adapt_output(host: Any, args: Any, output: Any) -> Any:
    """The forward hook of a host: adapts its output, the first of a tuple."""
    if isinstance(host.adapter, ParallelAdapter):
        return host.adapter(args[0], output)
    if isinstance(output, tuple):
        return (host.adapter(output[0]), *output[1:])
    return host.adapter(output)


def _kind(slot: str) -> type[Adapter]:
    return ParallelAdapter if slot == PARALLEL else Adapter


def _transformer(model: nn.Module) -> GPT2Model:
    found = [module for module in model.modules() if isinstance(module, GPT2Model)]
    if len(found) != 1:
        raise ValueError(f"adapters need one GPT-2 in the model; {type(model).__name__} has {len(found)}")
    return found[0]


def _hosts(
    transformer: GPT2Model, slot: str, layers: tuple[int, ...] | None = None
) -> list[tuple[str, nn.Module]]:
    """Names (below the GPT2Model) and modules whose output a slot adapts, in these layers or in all."""
    if slot == "post_embed":
        return [("drop", transformer.drop)]
    if slot == "pre_head":
        return [("ln_f", transformer.ln_f)]
    below, blocks = _BELOW[slot], cast(nn.ModuleList, transformer.h)
    if layers and layers[-1] >= len(blocks):
        raise ValueError(f"no layer {layers[-1]}: the model has layers 0 to {len(blocks) - 1}")
    return [
        (f"h.{i}{below}", blocks[i].get_submodule(below.lstrip(".")))
        for i in (range(len(blocks)) if layers is None else layers)
    ]


def _adapters(transformer: GPT2Model) -> list[tuple[str, int, Adapter]]:
    """Slot, place in the slot (of a block: its index) and module of every adapter that `add_adapters` put in."""
    return [
        (slot, index, adapter)
        for slot in SLOTS
        for index, (_, host) in enumerate(_hosts(transformer, slot))
        if isinstance(adapter := getattr(host, "adapter", None), Adapter)
        and isinstance(adapter, ParallelAdapter) == (slot == PARALLEL)
    ]


def _configs(transformer: GPT2Model) -> list[AdapterConfig]:
    """The adapters of each slot as they are: one config for all blocks that have them alike."""
    layers: dict[tuple[str, int, str, float], list[int]] = {}
    for slot, index, a in _adapters(transformer):
        alike = slot, a.down.out_features, activation_name(a.act) or "", a.scale
        layers.setdefault(alike, []).append(index)
    everywhere = {slot: list(range(len(_hosts(transformer, slot)))) for slot in SLOTS}
    return [
        AdapterConfig(
            (slot,), bottleneck, activation, scale, None if found == everywhere[slot] else tuple(found)
        )
        for (slot, bottleneck, activation, scale), found in layers.items()
    ]


def _by_slot(configs: list[AdapterConfig]) -> set[AdapterConfig]:
    return {replace(config, slots=(slot,)) for config in configs for slot in config.slots}


def _adapter_shapes(model: nn.Module, configs: list[AdapterConfig]) -> dict[str, torch.Size]:
    """Plain name and shape of every parameter the adapters of `configs` have, or would have, in `model`."""
    transformer = _transformer(model)
    root = next(name for name, module in _unwrap(model).named_modules() if module is transformer)
    prefix = f"{root}." if root else ""
    width = transformer.config.n_embd
    return {
        f"{prefix}{name}.adapter.{part}": torch.Size(shape)
        for config in configs
        for slot in config.slots
        for name, _ in _hosts(transformer, slot, config.layers)
        for part, shape in (
            ("down.weight", (config.bottleneck, width)),
            ("down.bias", (config.bottleneck,)),
            ("up.weight", (width, config.bottleneck)),
            ("up.bias", (width,)),
        )
    }


def _plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names the model has without peft; those that peft saves by itself left out."""
    root = _unwrap(model)
    by_peft = {id(p) for m in root.modules() if isinstance(m, BaseTunerLayer) for p in _tuner_parameters(m)}
    plain: dict[str, nn.Parameter] = {}
    for prefix, module in root.named_modules():
        wrapped = isinstance(module, ModulesToSaveWrapper)
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if id(parameter) not in by_peft and not wrapped:
                plain[name.replace(".base_layer.", ".")] = parameter
    for prefix, module in root.named_modules():
        if isinstance(module, ModulesToSaveWrapper):  # one head, though the wrapper holds it twice
            plain = {k: p for k, p in plain.items() if not k.startswith(f"{prefix}.")}
            plain |= dict(module.modules_to_save[module.active_adapter].named_parameters(prefix=prefix))
    return plain


def _tuner_parameters(layer: BaseTunerLayer) -> list[nn.Parameter]:
    parts = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return [p for part in parts if isinstance(part, (nn.Module)) for p in part.parameters()]


def _peft_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What peft trains inside `module`: tuner layers' own parameters and modules to save."""
    found: list[nn.Parameter] = []
    for child in module.modules():
        if isinstance(child, BaseTunerLayer):
            found += _tuner_parameters(child)
        elif isinstance(child, ModulesToSaveWrapper):
            found += child.modules_to_save.parameters()
    return found


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
