"""Linear layers, heads above all, of which sets of bottleneck adapters have copies that are theirs alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from operator import sub
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Model, GPT2SequenceSummary

from fastpeft.groups import names_given, order_for
from fastpeft.swap import restore, stock_class

#: In these nothing is copied: what they hold is theirs, or isn't called with a row for each row of the batch.
_CLOSED = (GPT2Model, GPT2SequenceSummary, ModulesToSaveWrapper, BaseTunerLayer)


class Copied(nn.Linear):
    """A linear layer that has become one with copies, which it holds, for some sets of adapters.

    A call goes through that of the set in use, each row of `adapter_rows` through that of its set. What has none goes
    through the layer itself.
    """

    in_use: str | None = None  # the name of a set
    withheld: tuple[nn.Parameter, ...] = ()  # what would train if a set without a copy used it

    def forward(self, input: Tensor) -> Tensor:
        """input (batch, ..., in_features) → (batch, ..., out_features)."""
        names = names_given(self)
        if names is None:
            return self._through(self.in_use, input)
        order = order_for(names, input)
        parts = order.put(input).split(list(map(sub, order.starts[1:], order.starts)))
        return order.put_back(torch.cat(list(map(self._through, order.names, parts))))

    def _through(self, name: str | None, x: Tensor) -> Tensor:
        own = self._modules.get(f"own_{name}")
        return super().forward(x) if own is None else own(x)

    def of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters that a set's rows go through, by their names in the layer."""
        own = self._modules.get(f"own_{name}") or self
        return {key: p for key, p in own._parameters.items() if p is not None}

    def has(self, name: str) -> bool:
        """Whether a set has a copy of its own."""
        return f"own_{name}" in self._modules

    def give(self, name: str) -> None:
        """A set gets a copy of its own, which trains."""
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        own = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, self.bias is not None, **like
        )
        own.load_state_dict({key: p for key, p in self._parameters.items() if p is not None})
        self.add_module(f"own_{name}", own)


def check(model: nn.Module, modules: Sequence[str], name: str) -> None:
    """ValueError where the set of this name can't have copies of these modules, by their names without wrappers."""
    root = unwrapped(model)
    found = dict(_candidates(root))
    for key in modules:
        if key not in found:
            raise ValueError(
                f"no copy of {key!r} can be given to a set: only linear layers beside the GPT-2 that are neither "
                f"peft's nor output embeddings have copies, and {type(root).__name__} has {', '.join(found) or 'none'}"
            )
        if isinstance(found[key], Copied) and found[key].has(name):
            raise ValueError(f"{name!r} has a {key} of its own already")


def _candidates(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What may be copied, with its name."""
    embeddings = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    for key, child in module.named_children():
        if stock_class(type(child)) is nn.Linear or type(child) is Copied:
            if child is not embeddings:
                yield f"{prefix}{key}", child
        elif not isinstance(child, _CLOSED):
            yield from _candidates(child, f"{prefix}{key}.")


def give(model: nn.Module, modules: Sequence[str], name: str, others: Collection[str]) -> None:
    """Give the set of this name copies of these modules, and see to what trains of others that have some.

    A layer itself trains, if it did, only as long as there is a set without a copy of it, among these and the others.
    """
    root = unwrapped(model)
    for key in modules:
        module: Any = root.get_submodule(key)
        if not isinstance(module, Copied):
            restore([module])
            module.__class__ = Copied
        module.give(name)
    for each in _copied(model):
        shared = not all(map(each.has, {name, *others}))
        if shared:
            for parameter in each.withheld:
                parameter.requires_grad_(True)
            each.withheld = ()
        else:
            each.withheld += tuple(p for p in each.parameters(recurse=False) if p.requires_grad)
            for parameter in each.withheld:
                parameter.requires_grad_(False)


def use(model: nn.Module, name: str | None) -> None:
    """Have the set of this name in use, for what has copies."""
    for module in _copied(model):
        module.in_use = name


def owned(model: nn.Module, name: str) -> list[str]:
    """The names of the modules of which the set of this name has copies."""
    found = unwrapped(model).named_modules()
    return [key for key, module in found if isinstance(module, Copied) and module.has(name)]


def _copied(model: nn.Module) -> list[Copied]:
    return [module for module in model.modules() if isinstance(module, Copied)]


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
