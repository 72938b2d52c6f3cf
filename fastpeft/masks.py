"""Dropout masks of the PyTorch path: drawn cheaply or as torch draws them, kept at one bit an element."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LANES = 1 << 16


def quantise(dropout_p: float) -> float:
    """The probability that 16-bit lanes draw for `dropout_p`: the nearest multiple of 2⁻¹⁶."""
    return round(dropout_p * _LANES) / _LANES


def draw(x: Tensor, dropout_p: float, *, exact: bool) -> tuple[Tensor, float]:
    """A boolean mask shaped like `x`, true where an element stays, and the probability it was drawn with.

    `exact` consumes torch's generator as `F.dropout(x, dropout_p)` would and gives the same mask. Otherwise
    one 63-bit seed is taken from torch's generator (so `torch.manual_seed` and checkpointing hold) and the
    CPU's bits come from numpy's SFC64, a tenth of the cost of `bernoulli_`.
    """
    if exact or x.device.type != "cpu":
        if dropout_p >= 1.0:  # torch draws nothing here
            return torch.zeros_like(x, dtype=torch.bool), 1.0
        if x.is_cuda:  # the fused kernel of F.dropout, whose numbers depend on x's dtype
            return torch.native_dropout(x, dropout_p, True)[1], dropout_p
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p), dropout_p
    dropout_p = quantise(dropout_p)
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4)
    lanes = torch.from_numpy(words.view(np.int16))[: x.numel()]
    # Signed lanes: shifting the threshold by 2¹⁵ spares a pass to make them unsigned.
    keep = (
        lanes >= round(dropout_p * _LANES) - _LANES // 2
        if dropout_p < 1.0
        else torch.zeros_like(lanes, dtype=torch.bool)
    )
    return keep.view(x.shape), dropout_p


def pack(keep: Tensor) -> Tensor:
    """A boolean mask as bytes of eight bits, the form saved for backward."""
    if keep.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep.numpy()))
    flat = torch.nn.functional.pad(keep.flatten(), (0, -keep.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(7, -1, -1, device=keep.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The boolean mask of `shape` that `pack` packed."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel())).view(torch.bool).view(shape)
    lanes = bits[:, None] >> torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8) & 1
    return lanes.flatten()[: shape.numel()].view(torch.bool).view(shape)
