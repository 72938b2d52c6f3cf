"""Dropout masks of the PyTorch path: drawn cheaply or as torch draws them, kept at one bit an element."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

_LANES = 1 << 16
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def draw(x: Tensor, dropout_p: float, *, exact: bool) -> tuple[Tensor, float]:
    """One bit for each element of `x`, set where it stays, and the probability it was drawn with.

    `exact` consumes torch's generator as `F.dropout(x, dropout_p)` would and gives the same mask. Otherwise,
    on the CPU, each byte of the mask is looked up by 16 bits of torch's generator, where `bernoulli_` takes 64 for
    each bit; the probability is then rounded to a multiple of 2⁻¹⁶.
    """
    if dropout_p >= 1.0:  # torch draws nothing here
        return torch.zeros(-(-x.numel() // 8), dtype=torch.uint8, device=x.device), 1.0
    if x.is_cuda:  # the kernel behind F.dropout, whose numbers depend on x's dtype
        return _pack(torch.native_dropout(x, dropout_p, True)[1]), dropout_p
    if exact or x.device.type != "cpu":
        return _pack(torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p)), dropout_p
    dropout_p = min(round(dropout_p * _LANES), _LANES - 1) / _LANES
    table, rest = _byte_law(dropout_p)
    size = -(-x.numel() // 8)
    words = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = words.numpy().view(np.uint16)[:size]
    bits = table.take(lanes, mode="clip")
    undecided = np.flatnonzero(lanes >= len(table))
    weights = torch.rand(len(undecided), dtype=torch.float64).numpy() * rest[-1]
    bits[undecided] = rest[:-1].searchsorted(weights, side="right")
    return torch.from_numpy(bits), dropout_p


def unpack(bits: Tensor, x: Tensor) -> Tensor:
    """The mask of `x` as ones and zeros in x's shape and dtype."""
    return _ones(bits, x).to(x.dtype)


def apply(bits: Tensor, x: Tensor) -> Tensor:
    """A copy of `x` with zeros where the mask is zero."""
    # Minus one is all bits set, and the bits of integers meet those of floats: a third of the time of a product.
    mask = _ones(bits, x).view(torch.int8).neg_().to(_INTEGERS[x.element_size()])
    return mask.bitwise_and_(x.view(mask.dtype)).view(x.dtype)


def _ones(bits: Tensor, x: Tensor) -> Tensor:
    """The mask of `x` as uint8 ones and zeros in x's shape, in new memory."""
    if bits.device.type == "cpu":
        ones = torch.from_numpy(np.unpackbits(bits.numpy(), count=x.numel()))
    else:
        ones = (bits[:, None] >> torch.arange(7, -1, -1, device=bits.device) & 1).view(-1)[: x.numel()]
    return ones.view(x.shape)


def _pack(keep: Tensor) -> Tensor:
    if keep.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep.numpy()))
    flat = torch.nn.functional.pad(keep.flatten(), (0, -keep.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(7, -1, -1, device=keep.device)).sum(1, dtype=torch.uint8)


@functools.lru_cache(maxsize=16)
def _byte_law(dropout_p: float) -> tuple[np.ndarray, np.ndarray]:
    """How 16 random bits become eight independent ones, each zero with `dropout_p`.

    A byte of probability P has ⌊2¹⁶ P⌋ entries in the table of lanes. What the floors leave is drawn, for the lanes
    beyond the table, by the cumulative weights of the second result: together they give P.
    """
    kept = _BITS.sum(1)
    expected = _LANES * dropout_p ** (8 - kept) * (1.0 - dropout_p) ** kept
    entries = np.floor(expected).astype(np.int64)
    return np.repeat(np.arange(256, dtype=np.uint8), entries), np.cumsum(expected - entries)
