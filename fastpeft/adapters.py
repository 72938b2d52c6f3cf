"""Bottleneck adapters: their configuration, the eager modules, and how these are hooked into a GPT-2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat, starmap
from numbers import Real
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

from fastpeft import copies, reference
from fastpeft.groups import BASE, Groups, names_given, order_for, packed

PARALLEL = "parallel_mlp"
SLOTS = ("post_embed", "post_attn", "post_mlp", PARALLEL, "post_block", "pre_head")
#: Of the slots in blocks: the host's name below its block.
_BELOW = {"post_attn": ".attn", "post_mlp": ".mlp", PARALLEL: ".mlp", "post_block": ""}
#: The set that a call means which names none; its adapters bear no name in the state dict.
DEFAULT = "default"


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
            below 1, a scale that isn't a finite number, layers that aren't indices in rising order, or layers of a slot
            that is in none.
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
        if type(self.bottleneck) is not int or self.bottleneck < 1:
            raise ValueError(f"bottleneck must be a whole number of at least 1, got {self.bottleneck!r}")
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        object.__setattr__(self, "scale", float(self.scale))
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

    active = True  # whether its set is the one in use, for rows that aren't given one

    def __init__(self, width: int, bottleneck: int, activation: str = "relu", scale: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.act = _ACTIVATION_MODULES[activation]()
        self.up = nn.Linear(bottleneck, width)
        self.scale = scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., width) → (..., width), added to a residual if there is one."""
        y = x + self.update(x)
        return y if residual is None else residual + y

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


def add_adapters(
    model: nn.Module, config: AdapterConfig, name: str = DEFAULT, modules_to_save: Sequence[str] | None = None
) -> nn.Module:
    """Put trainable adapters into a GPT-2's slots, in place, and freeze its base.

    The head stays as trainable as it was (a head tied to the token embedding is frozen with it), LoRA factors,
    modules and biases that peft trains stay trainable. The first output is bit-equal to the output before.

    A model can hold several sets of adapters, each by a name and of its own slots and shapes. As with peft, the set
    added first is in use until `set_adapters` chooses another; `adapter_rows` gives rows of one batch different ones.
    All sets train, whichever is in use: a set that a step doesn't use gets no gradient. They share the head, but for
    those that have one of their own.

    Args:
        model: a GPT-2 with any head, plain or wrapped by peft (call `get_peft_model` first: it freezes
            whatever it finds).
        config: slots and shape.
        name: of the set that they belong to, a new one or one that hasn't these slots yet.
        modules_to_save: names of linear layers beside the GPT-2, a classifier's `score`, of which the set gets copies
            that train and are saved as its own. The layers themselves are for sets without copies, and for rows of no
            set; they train only as long as there is such a set.

    Returns:
        The model.

    Raises:
        ValueError: no GPT-2 inside the model, a layer that it hasn't, a slot that is taken in this set, a name that is
            empty, has a dot in it or is `"__base__"`, or a module that can't be copied; nothing is changed then.
    """
    transformer = transformer_of(model)
    hosts = free_hosts(transformer, [config], name)
    modules = (modules_to_save,) if isinstance(modules_to_save, str) else tuple(modules_to_save or ())
    copies.check(model, modules, name)
    attribute = attribute_of(name)
    trained_by_peft = {id(p) for p in _peft_parameters(transformer)}
    configs = [each for module in model.modules() for each in vars(module).get("peft_config", {}).values()]
    if any(getattr(each, "bias", "none") != "none" for each in configs):  # peft froze all others
        trained_by_peft |= {
            id(p) for key, p in transformer.named_parameters() if key.endswith("bias") and p.requires_grad
        }
    present = [adapter for *_, adapter in adapters_in(transformer)]
    adapters = {id(p) for adapter in present for p in adapter.parameters()}
    for parameter in transformer.parameters():
        if id(parameter) not in trained_by_peft | adapters:
            parameter.requires_grad_(False)
    width, active = transformer.config.n_embd, _active(transformer) in (name, None)
    for kind, _, host in hosts:
        near = next((p for p in host.parameters() if p.is_floating_point()), transformer.wpe.weight)
        adapter = kind(width, config.bottleneck, config.activation, config.scale)
        adapter.active = active
        setattr(host, attribute, adapter.to(near.device, near.dtype).train(transformer.training))
        if adapt_output not in host._forward_hooks.values():
            # First in line, so that hooks which record hidden states see the adapted output.
            host.register_forward_hook(adapt_output, prepend=True, with_kwargs=True)
    give_copies(model, modules, name)
    return model


def give_copies(model: nn.Module, modules: Sequence[str], name: str) -> None:
    """Give the set of this name, which the model has, copies of modules that `copies.check` has nothing against."""
    transformer = transformer_of(model)
    copies.give(model, modules, name, {each for _, _, each, _ in adapters_in(transformer)} - {name})
    copies.use(model, _active(transformer))


def set_adapters(model: nn.Module, name: str) -> None:
    """Use the set of adapters of this name, and no other, for rows that `adapter_rows` gives none.

    Raises:
        ValueError: no set has the name; nothing is changed then.
    """
    transformer = transformer_of(model)
    check_present(transformer, name)
    for _, _, each, adapter in adapters_in(transformer):
        adapter.active = each == name
    copies.use(model, name)


def adapt_output(host: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """The forward hook of a host: adapts its output, the first of a tuple."""
    if getattr(kwargs.get("packed"), "graph", None) is not None:
        return output  # of blocks that a graph has gone through, their adapters and all
    if isinstance(output, tuple):
        return (adapted(host, output[0], *args[:1]), *output[1:])
    return adapted(host, output, *args[:1])


def adapts(host: nn.Module) -> bool:
    """Whether a call of this module has its output adapted, as things are now."""
    found, names = adapters_of(host), names_given(host)
    return _in_use(found) is not None if names is None else not found.keys().isdisjoint(names)


def adapted(
    host: nn.Module,
    x: Tensor,
    read: Tensor | None = None,
    residual: Tensor | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """x (..., width), a host's output, through the adapter in use, or each row through that of its set.

    The rows are those of x seen as (M, width) where their groups are given or tokens are packed, else of its first
    dimension. `read` is what the host read, for parallel adapters; a residual is added. Both have x's shape and order.
    """
    found, names = adapters_of(host), names_given(host)
    if names is None:
        return _through(_in_use(found), x, read, residual)
    if not any(isinstance(each, ParallelAdapter) for each in found.values()):
        read = None
    order, groups = None, groups or packed.get()
    if groups is None:
        order = order_for(names, x)
        groups, x = order.groups_of(x), order.put(x)
        read = None if read is None else order.put(read)
    # Split, not sliced group by group: the gradients of the parts are then joined once.
    sizes = [rows.stop - rows.start for _, rows in groups.rows()]
    parts = (repeat(None) if t is None else t.flatten(0, -2).split(sizes) for t in (x, read, residual))
    each = zip(map(found.get, groups.names), *parts, strict=False)
    y = torch.cat(list(starmap(_through, each))).view(x.shape)
    return y if order is None else order.put_back(y)


def _in_use(found: dict[str, Any]) -> Any:
    """Of a host's adapters the one in use; None where it is of a set that has none here."""
    return next((each for each in found.values() if getattr(each, "active", True)), None)


def _through(adapter: Any, x: Tensor, read: Tensor | None, residual: Tensor | None) -> Tensor:
    """x through an adapter, if there is one, added to a residual, if there is one."""
    if isinstance(adapter, ParallelAdapter):
        x, adapter = adapter(read, x), None
    if adapter is None:
        return x if residual is None else residual + x
    return adapter(x) if residual is None else adapter(x, residual=residual)


def adapters_of(host: nn.Module) -> dict[str, Any]:
    """The adapters behind a module by the names of their sets."""
    if adapt_output not in host._forward_hooks.values():
        return {}
    prefix = f"{attribute_of(DEFAULT)}_"
    return {
        key.removeprefix(prefix) if key.startswith(prefix) else DEFAULT: module
        for key, module in host._modules.items()
        if module is not None and f"{key}_".startswith(prefix)
    }


def attribute_of(name: str) -> str:
    """What a host has the adapter of this set as; ValueError for what can't be a set's name."""
    if not isinstance(name, str) or not name or "." in name or name == BASE:
        raise ValueError(
            f"a set of adapters can't be named {name!r}: choose a word without dots, other than {BASE}"
        )
    return "adapter" if name == DEFAULT else f"adapter_{name}"


def _active(transformer: GPT2Model) -> str | None:
    """The name of the set in use; None where there is none."""
    return next((name for _, _, name, adapter in adapters_in(transformer) if adapter.active), None)


def check_present(transformer: GPT2Model, name: str) -> None:
    """ValueError where no set of adapters has the name."""
    names = dict.fromkeys(each for _, _, each, _ in adapters_in(transformer))
    if name not in names:
        raise ValueError(f"no set of adapters is named {name!r}: the model has {', '.join(names) or 'none'}")


def _kind(slot: str) -> type[Adapter]:
    return ParallelAdapter if slot == PARALLEL else Adapter


def transformer_of(model: nn.Module) -> GPT2Model:
    """The one GPT-2 in the model; ValueError where there is none, or several."""
    found = [module for module in model.modules() if isinstance(module, GPT2Model)]
    if len(found) != 1:
        raise ValueError(f"adapters need one GPT-2 in the model; {type(model).__name__} has {len(found)}")
    return found[0]


def hosts_of(
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


def free_hosts(
    transformer: GPT2Model, configs: list[AdapterConfig], name: str
) -> list[tuple[type[Adapter], str, nn.Module]]:
    """Kind of adapter, name and module of each host that these configs give one; ValueError where it has one."""
    attribute, taken = attribute_of(name), set()
    hosts = [
        (_kind(slot), *host)
        for config in configs
        for slot in config.slots
        for host in hosts_of(transformer, slot, config.layers)
    ]
    for _, place, host in hosts:
        if hasattr(host, attribute) or place in taken:
            raise ValueError(
                f"{place} already has an adapter: a slot takes one of each set, and {name!r} has it"
            )
        taken.add(place)
    return hosts


def adapters_in(transformer: GPT2Model) -> list[tuple[str, int, str, Adapter]]:
    """Slot, place in the slot (of a block: its index), set and module of every adapter that `add_adapters` put in."""
    return [
        (slot, index, name, adapter)
        for slot in SLOTS
        for index, (_, host) in enumerate(hosts_of(transformer, slot))
        for name, adapter in adapters_of(host).items()
        if isinstance(adapter, Adapter) and isinstance(adapter, ParallelAdapter) == (slot == PARALLEL)
    ]


def tuner_parameters(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """What a layer of peft has of its own, beside the layer that it wraps."""
    parts = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return [p for part in parts if isinstance(part, (nn.Module)) for p in part.parameters()]


def _peft_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What peft trains inside `module`: tuner layers' own parameters and modules to save."""
    found: list[nn.Parameter] = []
    for child in module.modules():
        if isinstance(child, BaseTunerLayer):
            found += tuner_parameters(child)
        elif isinstance(child, ModulesToSaveWrapper):
            found += child.modules_to_save.parameters()
    return found
