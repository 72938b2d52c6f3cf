"""Dropout masks of the PyTorch path: drawn cheaply or as torch draws them, kept at one bit an element."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

_LANES = 1 << 16
_CHUNK = 1 << 12  # bytes of bits, for which 64 KiB of random lanes are drawn


def draw(x: Tensor, dropout_p: float, *, exact: bool) -> tuple[Tensor, float]:
    """One bit for each element of `x`, set where it stays, and the probability it was drawn with.

    `exact` consumes torch's generator as `F.dropout(x, dropout_p)` would and gives the same mask. Otherwise,
    on the CPU, one 63-bit seed is taken from torch's generator (so `torch.manual_seed` and checkpointing
    hold) and 16-bit lanes of numpy's SFC64 are compared, a tenth of the cost of `bernoulli_`; the
    probability is then rounded to a multiple of 2⁻¹⁶.
    """
    if dropout_p >= 1.0:  # torch draws nothing here
        return torch.zeros(-(-x.numel() // 8), dtype=torch.uint8, device=x.device), 1.0
    if x.is_cuda:  # the kernel behind F.dropout, whose numbers depend on x's dtype
        return _pack(torch.native_dropout(x, dropout_p, True)[1]), dropout_p
    if exact or x.device.type != "cpu":
        return _pack(torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p)), dropout_p
    drop_below = min(round(dropout_p * _LANES), _LANES - 1)
    generator = np.random.SFC64(int(torch.randint(2**63 - 1, ())))
    bits = np.empty(-(-x.numel() // 8), np.uint8)
    for start in range(0, len(bits), _CHUNK):  # in pieces that stay in the cache
        chunk = bits[start : start + _CHUNK]
        lanes = generator.random_raw(2 * len(chunk)).view(np.uint16)
        chunk[:] = np.packbits(lanes >= drop_below)
    return torch.from_numpy(bits), drop_below / _LANES


def unpack(bits: Tensor, x: Tensor) -> Tensor:
    """The mask of `x` as ones and zeros in x's shape and dtype."""
    # Copying rows of a table of all bytes is three times as fast as casting booleans.
    return _bytes(x.dtype, x.device).index_select(0, bits.int()).view(-1)[: x.numel()].view(x.shape)


def _pack(keep: Tensor) -> Tensor:
    if keep.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep.numpy()))
    flat = torch.nn.functional.pad(keep.flatten(), (0, -keep.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(7, -1, -1, device=keep.device)).sum(1, dtype=torch.uint8)


@functools.cache
def _bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the bits of each byte, the highest first, as numpy packs them."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return torch.from_numpy(bits).to(device, dtype)
