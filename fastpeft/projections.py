"""A linear layer as the LoRA operations take it, with one update for all rows or one for each group; and an adapter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft import autograd, reference

_FEW = 256  # rows of an update, up to which several are computed at once


class Projection(NamedTuple):
    """A linear layer with its LoRA update; with `groups` factors are stacked, one for each."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float  # of groups the largest
    groups: Any = None  # kernels.groups.Groups, in which each has its scaling and dropout

    def parts(self) -> tuple[list[autograd.Part], list[Tensor]]:
        """The update as the PyTorch path takes it, without groups, and its factors."""
        return [autograd.Part(None, self.scaling, self.dropout_p)], [self.lora_a, self.lora_b]


class Bottleneck(NamedTuple):
    """A bottleneck adapter as the operations take it: `reference.adapter` of a tensor, and these."""

    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    activation: str
    scale: float


class Update(NamedTuple):
    """The LoRA update of a group of rows."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float


class Grouped(NamedTuple):
    """A linear layer with an update for each group of rows: `y = x W + b`, plus the update of the group it is in.

    The rows are those of x (M, K), or of x (..., K) seen so. Group i has rows `bounds[i]` to `bounds[i + 1]`, and no
    update where `updates[i]` is None.
    """

    weight: Tensor
    bias: Tensor | None
    updates: Sequence[Update | None]
    bounds: tuple[int, ...]

    def apart(self) -> list[Projection]:
        """The layer with each of its updates."""
        return [Projection(self.weight, self.bias, *update) for update in self.updates if update is not None]

    def parts(self) -> tuple[list[autograd.Part], list[Tensor]]:
        """The updates as the PyTorch path takes them, and their factors; those without rows left out.

        Alike neighbours are stacked: products of all at once take half the time of one after another.
        """
        pieces = zip(self.updates, self.bounds, self.bounds[1:], strict=False)
        parts: list[autograd.Part] = []
        factors: list[Tensor] = []
        for kind, alike in groupby((piece for piece in pieces if piece[1] < piece[2]), _kind):
            if kind is not None:
                updates, starts, stops = zip(*alike, strict=True)
                laws = updates[0].scaling, updates[0].dropout_p
                parts.append(autograd.Part(slice(starts[0], stops[-1]), *laws, len(updates)))
                factors += (factor for update in updates for factor in update[:2])
        return parts, factors

    def stacked(self, device: torch.device) -> Projection | None:
        """The layer as the kernels take it, of which the stacked factors are copies; None where nothing is updated."""
        from fastpeft.kernels.groups import Groups

        there = [update for update in self.updates if update is not None]
        if not there:
            return None
        lora_a, lora_b = (
            self._stacked(factors) for factors in ([u.lora_a for u in there], [u.lora_b for u in there])
        )
        ranks = tuple(0 if u is None else u.lora_a.shape[0] for u in self.updates)
        drops = tuple(0.0 if u is None else float(u.dropout_p) for u in self.updates)
        scalings = tuple(
            0.0 if u is None else float(u.scaling) * reference.keep_scale(p)
            for u, p in zip(self.updates, drops, strict=True)
        )
        groups = Groups._make((*_rows(self.bounds, device), *_laws(ranks, scalings, drops, device)))
        return Projection(self.weight, self.bias, lora_a, lora_b, 1.0, max(drops), groups)

    def _stacked(self, factors: list[Tensor]) -> Tensor:
        first, *others = factors
        alike = all(f.shape == first.shape and f.dtype == first.dtype for f in others)
        if alike and len(factors) == len(self.updates):
            return torch.stack(factors)
        stacked: Tensor = autograd.Stacked.apply([update is not None for update in self.updates], *factors)
        return stacked


def _kind(piece: tuple[Update | None, int, int]) -> tuple[Any, ...] | None:
    """What updates share that are stacked, given with where their rows begin and end; None for no update."""
    update, start, stop = piece
    if update is None:
        return None
    lora_a, lora_b, scaling, dropout_p = update
    # Above so many rows the products of each alone are as quick.
    shared = (stop - start, None if stop - start <= _FEW else start, scaling, dropout_p)
    return shared + tuple((f.shape, f.dtype, f.requires_grad) for f in (lora_a, lora_b))


def by_torch(rows: Tensor, layer: Projection | Grouped, exact: bool) -> Tensor:
    """A LoRA layer of rows (M, K) on the PyTorch path."""
    parts, factors = layer.parts()
    if torch.is_grad_enabled():
        return autograd.LoraLinear.apply(rows, layer.weight, layer.bias, parts, exact, *factors)
    # An autograd function takes the host as long as its products do.
    return autograd.lora_linear(rows, layer.weight, layer.bias, parts, exact, factors)


@functools.lru_cache(maxsize=8)
def _rows(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The group of each row, and where each group's begin; asked for by every layer of a call."""
    with torch.inference_mode(False):  # training may use them too
        starts = torch.tensor(bounds, dtype=torch.int32, device="cpu")
        of_row = torch.arange(len(bounds) - 1, dtype=torch.int32, device="cpu")
        of_row = of_row.repeat_interleave(starts.diff())
        return of_row.to(device), starts.to(device)


@functools.lru_cache(maxsize=64)
def _laws(
    ranks: tuple[int, ...], scalings: tuple[float, ...], drops: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each group's rank, scaling, and threshold below which random numbers drop."""
    from fastpeft.kernels.dropout import threshold

    with torch.inference_mode(False):
        below = None
        if any(drops):
            below = torch.tensor([threshold(p) for p in drops], dtype=torch.int32, device=device)
        return (
            torch.tensor(ranks, dtype=torch.int32, device=device),
            torch.tensor(scalings, dtype=torch.float32, device=device),
            below,
        )
