"""Dropout masks from a seed: the same bits in a Triton tile and in PyTorch.

Philox4x32-7 (Salmon et al., 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"; 7 rounds is the fewest that
passes BigCrush) with the counter (k // 8, m, 0, 0) gives element (m, k) the 16-bit lane k % 8 of its 128
bits; the element is kept where the lane is at least round(p · 2¹⁶). A mask depends on the seed and the
element alone, so every kernel redraws it, whatever its tiles.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import rounded
from .launch import Launcher, launchers
from .rows import rows_in

ROUNDS = 7
STRIP = (32, 128, 4, 1)  # rows, columns, warps and stages of a program of `dropped`


@functools.lru_cache(maxsize=64)
def threshold(dropout_p: float) -> int:
    """The smallest 16-bit lane that is kept: p to the nearest 2⁻¹⁶."""
    return round(dropout_p * 65536)


def keep_scale(dropout_p: float) -> float:
    """What the kept elements are multiplied by."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


class Dropout(NamedTuple):
    """A mask to apply: the probability of dropping, and the int64 seed (1,) on the device."""

    p: float
    seed: Tensor


def mask_arguments(dropout: Dropout | None) -> tuple[Tensor | None, int, float]:
    """The seed, the threshold and the scale that a kernel which applies `dropout`'s mask is launched with."""
    return (None, 0, 1.0) if dropout is None else (dropout.seed, threshold(dropout.p), keep_scale(dropout.p))


def sample_dropout(t: Tensor) -> Dropout:
    """A dropout on t's device to measure with, which draws no seed."""
    return Dropout(0.5, torch.zeros(2, dtype=torch.int64, device=t.device))


@triton.jit
def keep_tile(seed_ptr, start_m, start_k, drop_below, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Booleans (BLOCK_M, BLOCK_K): which elements from (start_m, start_k) on are kept; 8 divides start_k."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    groups = start_k // 8 + tl.arange(0, BLOCK_K // 8)
    row, _ = tl.broadcast(offs_m[:, None], groups[None, :])
    zero = row * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), zero + groups[None, :], row, zero, zero, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes number the words 2i + j
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes, (BLOCK_M, BLOCK_K)).to(tl.int32) >= drop_below


@triton.jit(do_not_specialize=["M", "drop_below"])
def dropout_kernel(
    t_ptr, out_ptr, seed_ptr,
    M, N,
    stride_tm, stride_tn,
    drop_below, drop_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`out = drop_scale · (keep ⊙ t)`: t (M, N), out contiguous; a tile a program."""
    start_m, start_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    t = tl.load(t_ptr + rows[:, None] * stride_tm + columns[None, :] * stride_tn, mask=mask, other=0.0)
    keep = keep_tile(seed_ptr, start_m, start_n, drop_below, BLOCK_M, BLOCK_N)
    out = rounded(tl.where(keep, t.to(tl.float32) * drop_scale, 0.0), t.dtype)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], out, mask=mask)


def dropped(t: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Inverted dropout of t (M, N), or of a contiguous t (..., N); contiguous."""
    n, out = t.shape[-1], torch.empty_like(t, memory_format=torch.contiguous_format)
    m = rows_in(t)
    block_m, block_n, *how = STRIP

    strides = t.stride() if t.dim() == 2 else (n, 1)

    def launcher() -> Launcher:
        args = {
            "N": n,
            "stride_tm": strides[0],
            "stride_tn": strides[1],
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        }
        changing = ("t_ptr", "out_ptr", "seed_ptr", "M", "drop_below", "drop_scale")
        return Launcher(dropout_kernel, changing, args, *how)

    if t.numel() > 0:
        key = ("dropped", n, strides, t.dtype, t.get_device())
        grid = -(-m // block_m), -(-n // block_n), 1
        launchers.once(key, launcher)(grid, t, out, seed, m, threshold(dropout_p), keep_scale(dropout_p))
    return out


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a 32 × 32 bit product, as 32-bit values in int64 (the product wraps at 64 bits)."""
    product = a * b
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def keep_mask(seed: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """The kernels' dropout mask, in PyTorch: booleans (rows, columns), True where an element is kept.

    `seed` is an int64 tensor of one element; the mask is made on its device.
    """
    key = seed.reshape(()).to(torch.int64)
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    row = torch.arange(rows, device=seed.device)[:, None]
    group = torch.arange(-(-columns // 8), device=seed.device)[None, :]
    c0, c1 = torch.broadcast_tensors(group, row)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi2, lo2 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi2 ^ c1 ^ k0, lo2, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, :columns]
    return lanes >= threshold(dropout_p)
