"""Linear layers, a head above all, of which sets of bottleneck adapters have copies that are theirs alone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from operator import sub
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

from fastpeft.groups import names_given, order_for
from fastpeft.swap import stock_class


class Copied(nn.Module):
    """A linear layer and copies of it, one for each of some sets of adapters.

    A call goes through that of the set in use, each row of `adapter_rows` through that of its set. What has none goes
    through the layer itself.
    """

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared
        self.in_use: str | None = None  # the name of a set

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, ..., in_features) → (batch, ..., out_features)."""
        names = names_given(self)
        if names is None:
            return self.of(self.in_use)(x)  # type: ignore[no-any-return]
        order = order_for(names, x)
        parts = order.put(x).split(list(map(sub, order.starts[1:], order.starts)))
        layers = map(self.of, order.names)
        return order.put_back(torch.cat([layer(part) for layer, part in zip(layers, parts, strict=True)]))

    def of(self, name: str | None) -> nn.Module:
        """What a set's rows go through."""
        return self._modules.get(f"own_{name}") or self.shared

    def has(self, name: str) -> bool:
        """Whether a set has a copy of its own."""
        return f"own_{name}" in self._modules

    def give(self, name: str) -> None:
        """A set gets a copy of its own, which trains."""
        self.add_module(f"own_{name}", copy.deepcopy(self.shared).requires_grad_())


def check(model: nn.Module, modules: Sequence[str], name: str) -> None:
    """ValueError where the set of this name can't have copies of these modules, by their names without wrappers."""
    root = unwrapped(model)
    inside = {id(m) for each in root.modules() if isinstance(each, GPT2Model) for m in each.modules()}
    found = {
        key: module
        for key, module in root.named_modules()
        if id(module) not in inside and (stock_class(type(module)) is nn.Linear or type(module) is Copied)
    }
    found = {k: m for k, m in found.items() if type(found.get(k.rpartition(".")[0])) is not Copied}
    for key in modules:
        if key not in found:
            raise ValueError(
                f"no copy of {key!r} can be given to a set: {type(root).__name__} has {', '.join(found) or 'none'} "
                "as linear layers beside its GPT-2"
            )
        if type(found[key]) is Copied and found[key].has(name):
            raise ValueError(f"{name!r} has a {key} of its own already")


def give(model: nn.Module, modules: Sequence[str], name: str, others: Collection[str]) -> None:
    """Give the set of this name copies of these modules, which freeze unless one of the other sets has none."""
    root = unwrapped(model)
    for key in modules:
        module: Any = root.get_submodule(key)
        if not isinstance(module, Copied):
            root.set_submodule(key, module := Copied(module).train(module.training))
        module.give(name)
        if all(map(module.has, others)):
            module.shared.requires_grad_(False)


def use(model: nn.Module, name: str | None) -> None:
    """Have the set of this name in use, for what has copies."""
    for module in model.modules():
        if isinstance(module, Copied):
            module.in_use = name


def unwrapped(model: nn.Module) -> nn.Module:
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
