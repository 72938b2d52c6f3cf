"""Which adapter each row of a batch uses, where not all use the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.model import _adapter_names_pre_forward_hook
from torch import Tensor, nn

#: As peft has it: of a row that no adapter is for.
BASE = "__base__"
#: peft's hook before a module's forward, which gives it the call's `adapter_names`.
hook = _adapter_names_pre_forward_hook


def mark(module: Any, args: Any, adapter_names: Sequence[str]) -> None:
    """The hook before a module's forward whose output bottleneck adapters adapt: it changes nothing, and is found."""


class Groups(NamedTuple):
    """Rows that stand by the adapter that they use."""

    names: tuple[str, ...]  # of the adapters, each once
    bounds: tuple[int, ...]  # where the rows of each begin, and where the last end
    pooled: tuple[int, ...] = ()  # the same of the rows that a head pools, one a sequence

    def rows(self) -> Iterator[tuple[str, slice]]:
        """Each adapter with its rows, `BASE` among them."""
        return zip(self.names, map(slice, self.bounds, self.bounds[1:]), strict=False)

    def at_pooled(self) -> Groups:
        """The groups of the rows that a head pools."""
        return Groups(self.names, self.pooled)


#: The groups of the tokens while a packed GPT-2 runs whose rows use different adapters, for hooks to see.
packed: ContextVar[Groups | None] = ContextVar("packed", default=None)


class Order(NamedTuple):
    """How the rows of a batch are put by adapter, and back again."""

    names: tuple[str, ...]  # of the adapters, each once
    rows: tuple[int, ...]  # the batch's rows in their new order
    starts: tuple[int, ...]  # where those of each adapter begin there, and where the last end
    by_adapter: Tensor | None  # the rows in their new order, int64; None where they stand so already
    back: Tensor | None  # where each of the batch's rows went

    def groups(self, sizes: Sequence[int]) -> Groups:
        """The groups where the batch's rows are so many rows each."""
        ends = (0, *accumulate(sizes[row] for row in self.rows))
        return Groups(self.names, tuple(ends[start] for start in self.starts), self.starts)

    def groups_of(self, x: Tensor) -> Groups:
        """The groups of x (batch, ..., width), seen as rows of its width."""
        return self.groups([x[:1].numel() // x.shape[-1]] * len(x))

    def put(self, x: Tensor) -> Tensor:
        """x (batch, ...) in the new order."""
        return x if self.by_adapter is None else x.index_select(0, self.by_adapter)

    def put_back(self, x: Tensor) -> Tensor:
        """What was `put` so, in the batch's order."""
        return x if self.back is None else x.index_select(0, self.back)


@functools.lru_cache(maxsize=64)
def order_of(names: tuple[str, ...], device: torch.device) -> Order:
    """How rows with these adapters are ordered: an adapter where its first row is, its rows as they come."""
    adapters = tuple(dict.fromkeys(names))
    rows = tuple(sorted(range(len(names)), key=lambda row: adapters.index(names[row])))
    starts = (0, *accumulate(map(names.count, adapters)))
    if rows == tuple(range(len(names))):
        return Order(adapters, rows, starts, None, None)
    with torch.inference_mode(False):  # training may use them too
        by_adapter = torch.tensor(rows, device=device)
        return Order(adapters, rows, starts, by_adapter, by_adapter.argsort())


def order_for(names: Sequence[str], x: Tensor) -> Order:
    """`order_of` the rows of a batch x; ValueError where it has another number of them."""
    if len(names) != len(x):
        raise ValueError(f"the batch has {len(x)} rows, and {len(names)} were given adapters")
    return order_of(tuple(names), x.device)


def names_given(module: nn.Module) -> Sequence[str] | None:
    """The `adapter_names` that a hook gives to a call of this module; None where none does."""
    found = None
    hooks: dict[int, Any] = module._forward_pre_hooks
    for each in hooks.values():
        if is_names(each):
            found = each.keywords["adapter_names"]
    return found


def is_names(candidate: Any) -> bool:
    """Whether a hook has the names of a batch's adapters, peft's or ours."""
    return (
        type(candidate) is partial
        and candidate.func in (hook, mark)
        and "adapter_names" in candidate.keywords
    )
