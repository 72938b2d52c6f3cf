"""Which tile a kernel runs with: a table by architecture, and the choice within it by shape.

What the table follows from:

- A GEMM step of BLOCK_M × BLOCK_N × BLOCK_K multiplies BLOCK_M · BLOCK_N numbers for each BLOCK_M + BLOCK_N it
  loads, so large tiles cost less for each output; but with fewer tiles than multiprocessors some of those idle.
- Accumulators live in registers: 8 warps hold a 128 × 128 float32 tile in 64 registers a thread, 128 × 256 in 128 of
  the 255. From sm_90 on operands are read from shared memory, which leaves room for 128 × 256; before, operand
  fragments need registers too, and 128 × 128 on 8 warps is the largest that never spills with the rank-r term.
- num_stages buffers of (BLOCK_M + BLOCK_N) · BLOCK_K elements must fit a block's shared memory.
- The rank-r kernels do at most R products for each element they load: they are bound by memory, so what counts is
  that every multiprocessor has a program, then that partial sums stay small beside what is read.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch import INTERPRETED


class Architecture(NamedTuple):
    """What a choice depends on, of the architecture's reference GPU."""

    name: int  # 10 · major + minor
    multiprocessors: int
    shared_limit: int  # bytes of shared memory a block may use
    flops_per_byte: int  # 16-bit matrix peak over memory bandwidth


ARCHITECTURES = (
    Architecture(80, 108, 163 * 1024, 156),  # A100
    Architecture(86, 84, 99 * 1024, 76),  # RTX 3090
    Architecture(89, 128, 99 * 1024, 165),  # RTX 4090
    Architecture(90, 132, 227 * 1024, 295),  # H100
    Architecture(100, 148, 227 * 1024, 281),  # B200
    Architecture(120, 170, 99 * 1024, 117),  # RTX 5090
)


class Tile(NamedTuple):
    """A tile of a GEMM: its rows, columns and depth of a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Strip(NamedTuple):
    """A tile of a pass over wide rows: so many rows, so many columns a step."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


class Linear(NamedTuple):
    """How `y = x W + …` runs: its tile, with tensor descriptors or pointers, xa on the way or before."""

    tile: Tile
    descriptor: bool
    single: bool
    programs: int  # of the persistent grid


#: The GEMM's tiles by architecture and bytes an element, largest first.
LINEAR = {
    (80, 2): (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 4), Tile(32, 64, 64, 4, 4)),
    (90, 2): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 4)),
    (80, 4): (Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3)),
}

#: The interpreter's cost goes by programs.
_INTERPRETER = Architecture(0, 2, 0, 0)


@functools.cache
def _architecture(device: torch.device) -> Architecture:
    properties = torch.cuda.get_device_properties(device)
    name = 10 * properties.major + properties.minor
    known = max((a for a in ARCHITECTURES if a.name <= name), key=lambda a: a.name)
    return known._replace(multiprocessors=properties.multi_processor_count)


def architecture(device: torch.device) -> Architecture:
    """The known architecture nearest below `device`'s, with the multiprocessors that the device has."""
    return _INTERPRETER if INTERPRETED else _architecture(device)


def padded_rank(rank: int) -> int:
    """The rank a kernel is compiled for: the next power of two, 16 at least (a matrix instruction's width)."""
    return max(16, triton.next_power_of_2(rank))


def linear(x: Tensor, weight: Tensor, rank: int, dropout_p: float, single: bool = True) -> Linear:
    return Linear(Tile(128, 128, 64, 8, 3), False, single and dropout_p == 0 and rank <= 32, 2)


def shrink(t: Tensor, rank: int) -> Strip:
    return Strip(128, 128, 4, 3)


def shrink_gradient(t: Tensor, rank: int) -> tuple[Strip, int]:
    return Strip(128, 128, 4, 3), 2


def gradient(t: Tensor, rank: int) -> tuple[Strip, int]:
    return Strip(128, 128, 4, 3), 2


def one_pass(rank: int) -> bool:
    return rank <= 32
