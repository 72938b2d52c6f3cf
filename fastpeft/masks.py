"""Dropout masks of the PyTorch path: on the CPU, the positions of what is dropped; elsewhere torch's own mask.

Few elements are dropped, so a pass over the positions costs a fraction of one over a mask of every element.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

_BITS = 12  # of 16 drawn for a gap: a table of 2¹² entries stays in the cache
_FAR = 2.0**53  # beyond any tensor
_FEW = 2048  # gaps, up to which as many logarithms are quicker than the twenty calls that look gaps up
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw(x: Tensor, dropout_p: float, *, exact: bool) -> Tensor:
    """A mask for `x`: ascending positions of what is dropped, or, off the CPU, bool, set where x stays.

    `exact` consumes torch's generator as `F.dropout(x, dropout_p)` would and gives the same mask. Otherwise,
    on the CPU, torch's generator gives 16 bits for each position, where `bernoulli_` takes 64 for each element.
    """
    if exact and x.is_cuda:  # the kernel behind F.dropout, whose numbers depend on x's dtype
        return torch.native_dropout(x, dropout_p, True)[1]
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p)
    if dropout_p >= 1.0:  # torch draws nothing here
        positions = np.arange(x.numel())
    elif exact:
        positions = np.flatnonzero(~torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p).numpy())
    else:
        positions = _positions(x.numel(), dropout_p)
    return torch.from_numpy(
        positions.astype(np.min_scalar_type(-x.numel()))
    )  # 32 bits hold any but huge ones


def apply(mask: Tensor, x: Tensor) -> Tensor:
    """A copy of `x` with zeros for what is dropped, contiguous on the CPU."""
    if mask.dtype == torch.bool:
        return x * mask
    return drop_(mask, x.clone(memory_format=torch.contiguous_format))


def drop_(mask: Tensor, x: Tensor) -> Tensor:
    """`x`, contiguous, with zeros put where it is dropped."""
    if mask.dtype == torch.bool:
        return x.mul_(mask)
    # numpy has no bfloat16, and is slower with indices that aren't int64.
    flat = x.view(_INTEGERS[x.element_size()]).view(-1).numpy()
    flat[mask.numpy().astype(np.int64)] = 0
    return x


def _positions(size: int, dropout_p: float) -> np.ndarray:
    """The positions of what is dropped among `size` elements."""
    gaps = _gaps(int(size * dropout_p + 2.0 * math.sqrt(size * dropout_p)) + 1, dropout_p)
    positions = gaps.cumsum() - 1
    while positions[-1] < size:  # once in forty times
        gaps = _gaps(len(gaps), dropout_p)
        positions = np.concatenate([positions, positions[-1] + gaps.cumsum()])
    return positions[: positions.searchsorted(size)]


def _gaps(count: int, dropout_p: float) -> np.ndarray:
    """Distances from one dropped element to the next, geometric: k has probability p (1-p)ᵏ⁻¹."""
    if count <= _FEW:
        waits = (
            torch.empty(count, dtype=torch.float64, device="cpu")
            .exponential_(-math.log1p(-dropout_p))
            .numpy()
        )
        return np.minimum(waits, _FAR).astype(np.int64) + 1
    table, rest, total = _gap_law(dropout_p)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    lanes = words.numpy().view(np.uint16)[:count] >> (16 - _BITS)
    gaps = table.take(lanes, mode="clip")  # none is out of bounds, which "raise" would look for
    undecided = np.flatnonzero(gaps == 0)
    weights = torch.rand(len(undecided), dtype=torch.float64, device="cpu").numpy() * total
    found = rest.searchsorted(weights, side="right")
    # Beyond the weights the law begins again, by what is left of the same number.
    left = np.maximum(total - weights, 1e-300) / (total - rest[-1])
    again = np.log(left.clip(max=1.0)) / math.log1p(-dropout_p)
    gaps[undecided] = found + 1 + np.minimum(again, _FAR).astype(np.int64)
    return gaps


@functools.lru_cache(maxsize=16)
def _gap_law(dropout_p: float) -> tuple[np.ndarray, np.ndarray, int]:
    """How twelve random bits become a gap.

    A gap of probability P has ⌊2¹² P⌋ entries in the table, as long as that is one or more. Other entries are zero:
    a number below their count, the third result, then finds its gap in the cumulative weights of the second, which
    together with the entries give P.
    """
    longest = 1
    if 2**_BITS * dropout_p >= 1.0:
        longest += int(-math.log(2**_BITS * dropout_p) / math.log1p(-dropout_p))
    gaps = np.arange(1, longest + 1)
    expected = 2**_BITS * dropout_p * (1.0 - dropout_p) ** (gaps - 1)
    entries = np.floor(expected).astype(np.int64)
    table = np.zeros(2**_BITS, dtype=np.int64)
    table[: entries.sum()] = np.repeat(gaps, entries)
    return table, np.cumsum(expected - entries), 2**_BITS - int(entries.sum())
