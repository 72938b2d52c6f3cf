"""Many adapters over one frozen layer in one step: which rows are whose, for launchers and in kernels.

Rows come ordered by adapter; those without an update have one of rank 0. A tile of rows may reach over borders between
adapters; then what is each adapter's is computed for it in turn, and taken by its own rows alone: an adapter whose
numbers are no longer finite leaves its neighbours' rows as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Groups(NamedTuple):
    """Whose rows of x (M, K) are whose among G adapters, whose factors are stacked: lora_a (G, R, K), lora_b (G, N, R).

    R is the largest rank, and what lies past an adapter's own is never read. All on x's device and contiguous.
    """

    of_row: Tensor  # (M,) int32, rising: each row's adapter
    starts: Tensor  # (G + 1,) int32: where each adapter's rows begin, from 0 on, and the last one's end, at M
    ranks: Tensor  # (G,) int32: each adapter's rank, 0 where it updates nothing in this layer
    scalings: Tensor  # (G,) float32, times the 1 / (1 - p) of each adapter's dropout
    below: Tensor | None = None  # (G,) int32: each adapter's `dropout.threshold`; None where none drops


#: The arguments by which a kernel knows groups, all None where rows have one adapter.
GROUP_ARGUMENTS = ("of_row_ptr", "starts_ptr", "ranks_ptr", "scalings_ptr", "below_ptr", "adapters")


def group_arguments(groups: Groups | None) -> tuple[Any, ...]:
    """The values of `GROUP_ARGUMENTS`."""
    return _UNGROUPED if groups is None else (*groups, len(groups.ranks))


_UNGROUPED = (None,) * len(GROUP_ARGUMENTS)


@triton.jit
def adapters_in(of_row_ptr, start_m, M, BLOCK_M: tl.constexpr):
    """The first adapter of a tile of rows, and the one after the last."""
    first = tl.load(of_row_ptr + start_m)
    last = tl.load(of_row_ptr + tl.minimum(start_m + BLOCK_M, M) - 1)
    # It is never less than 0: a compiler that doesn't know spills in products on sm_80.
    return tl.maximum(first, 0), last + 1


@triton.jit
def rank_in(starts_ptr, ranks_ptr, g):
    """Adapter g's rank in a tile between whose first and last adapter it lies: 0 where it has no rows."""
    rows = tl.load(starts_ptr + g + 1) - tl.load(starts_ptr + g)
    return tl.where(rows > 0, tl.load(ranks_ptr + g), 0)


@triton.jit
def share_of(program, starts_ptr, adapters, rows):
    """(g, k, count): `program` is number k of the `count` that share adapter g's rows, `rows` each, in their order.

    Every adapter has one program or more, and which rows one takes depends on that adapter's alone. Adapter g's begin
    at number `starts[g] // rows + g`, which needs no sum over those before it; so some numbers are nobody's, and have
    k >= count.
    """
    g = -1
    for i in range(0, adapters, 64):
        each = i + tl.arange(0, 64)
        inside = each < adapters
        starts = tl.load(starts_ptr + each, mask=inside, other=0)
        g += tl.sum((inside & (starts // rows + each <= program)).to(tl.int32))
    start, end = tl.load(starts_ptr + g), tl.load(starts_ptr + g + 1)
    return g, program - start // rows - g, tl.maximum(tl.cdiv(end - start, rows), 1)


def share_count(m: int, adapters: int, rows: int) -> int:
    """How many programs `share_of` spreads over m rows of so many adapters."""
    return m // rows + adapters


def tickets_for(x: Tensor, count: int, groups: Groups | None) -> Tensor | None:
    """So many tickets, for each of several adapters, which a kernel is to clear; None where there are none."""
    adapters = 1 if groups is None else len(groups.ranks)
    return x.new_empty(count * adapters, dtype=torch.int32) if count else None
