"""Which of its tiles a kernel runs with: by shape, and by how many multiprocessors there are."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import tile_table as table
from .launch import INTERPRETED, tf32_allowed
from .rows import rounded
from .tile_table import Architecture, Strip, Tile


class Linear(NamedTuple):
    """How `y = x W + …` runs: its tile, with tensor descriptors or pointers, xa on the way or before."""

    tile: Tile
    descriptor: bool
    single: bool
    programs: int  # of the descriptor form's persistent grid


#: A batch of many adapters is split, for their gradients, as one of so many rows would be.
GROUPED_ROWS = 8192

#: A chunk of logits has rows so many elements apart, or a multiple: whole steps of the gradient's tiles, 128 bytes.
HEAD_ALIGNED = 64

#: The interpreter's cost goes by programs and steps, so it takes the largest tiles.
_INTERPRETER = Architecture(90, 2, 0, 0, 1 << 30)


@functools.cache
def _architecture(device: torch.device) -> Architecture:
    properties = torch.cuda.get_device_properties(device)
    name = 10 * properties.major + properties.minor
    known = max((a for a in table.ARCHITECTURES if a.name <= name), key=lambda a: a.name)
    return known._replace(multiprocessors=properties.multi_processor_count)


def architecture(device: torch.device) -> Architecture:
    """The known architecture nearest below `device`'s, with the multiprocessors that the device has."""
    return _INTERPRETER if INTERPRETED else _architecture(device)


def padded_rank(rank: int) -> int:
    """The rank a kernel is compiled for: the next power of two, at least a matrix instruction's 16."""
    return max(16, 1 << (rank - 1).bit_length())


def linear(
    x: Tensor,
    weight: Tensor,
    rank: int,
    beforehand: bool,
    outer: bool,
    epilogue: bool,
    derivative: bool = False,
    grouped: bool = False,
) -> list[Linear]:
    """The ways to run `u = (inner ⊙ x) aᵀ, y = x W + outer ⊙ (u f) + …`, the one to take first.

    `beforehand`: whether u isn't to be computed on the way: it is there, or x has a mask, which is drawn just once so.
    `outer`: whether a dropout mask falls there.
    `epilogue`: whether a GELU, its `derivative` or a residual follows, with another tensor as large as y. `grouped`:
    whether rows belong to several adapters, of which u is computed beforehand.
    """
    arch = architecture(x.device)
    described = (
        arch.name >= 90
        and x.dtype != torch.float32
        and weight.shape[1] % 8 == 0
        and _describable(x)
        and (_describable(weight) or _describable(weight.T))
    )
    shape = steps(x.shape[0]), weight.shape[1], x.shape[1], padded_rank(rank)
    options = beforehand, outer, epilogue, derivative, grouped
    if x.dtype == torch.float32:
        some = table.linear_tiles_float32(arch.name, tf32_allowed(), epilogue, grouped)
        return [Linear(tile, False, False, 0) for tile in _cheapest_first(some, *shape[:2], arch)]
    return _linear(arch, described, shape, options)


def steps(rows: int) -> int:
    """The number of rows for which tiles are chosen."""
    return rounded(rows)


@functools.lru_cache(maxsize=4096)
def _linear(
    arch: Architecture,
    descriptor: bool,
    shape: tuple[int, int, int, int],
    options: tuple[bool, bool, bool, bool, bool],
) -> list[Linear]:
    """`linear` on 16-bit numbers, of `shape` (rows, N, K, padded rank), with tensor descriptors where they can be."""
    (m, n, k, padded), (beforehand, outer, epilogue, derivative, grouped) = shape, options
    form = "descriptor" if descriptor else "pointer"
    tiles = _cheapest_first(
        table.linear_tiles(arch.name, form, "dropout" if outer else "split", epilogue, derivative, grouped),
        m,
        n,
        arch,
    )
    split = [Linear(tile, descriptor, False, arch.multiprocessors) for tile in tiles]
    if beforehand or grouped:
        return split
    tiles = _cheapest_first(
        table.linear_tiles(
            arch.name, "pointer", "single dropout" if outer else "single", epilogue, derivative
        ),
        m,
        n,
        arch,
    )
    single = [Linear(tile, False, True, 0) for tile in tiles if single_pays(padded, tile)]
    if not single:
        return split
    # On the way, u costs RANK / BLOCK_N more products; before, another read of x and a launch of some 3 µs. All in
    # units of the GEMM's time.
    read, launch = arch.flops_per_byte / n, 3e6 * arch.teraflops / (2 * m * n * max(k, 1))
    return single + split if padded / single[0].tile.block_n <= read + launch else split + single


def single_pays(rank: int, tile: Tile) -> bool:
    """Whether xa on the way adds few enough products to be considered: an eighth."""
    return 8 * rank <= tile.block_n


def _programs(tile: Tile, m: int, n: int) -> int:
    return -(-m // tile.block_m) * -(-n // tile.block_n)


def _cheapest_first(tiles: tuple[Tile, ...], m: int, n: int, arch: Architecture) -> list[Tile]:
    """Tiles by their rounds over the multiprocessors, times the products and loads of a round."""

    def cost(tile: Tile) -> float:
        rounds = -(-_programs(tile, m, n) // arch.multiprocessors)
        # Two bytes from L2 take about as long as 64 products of a multiprocessor's matrix units.
        return rounds * (tile.block_m * tile.block_n + 64 * (tile.block_m + tile.block_n))

    return sorted(tiles, key=cost)


def _describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can describe t: a dense last axis, rows 16 bytes apart, no overlap."""
    row = t.stride(0) * t.element_size()
    return t.stride(1) == 1 and t.numel() > 0 and row > 0 and row % 16 == 0 and t.data_ptr() % 16 == 0


def shrink(t: Tensor, rank: int, grouped: bool = False) -> list[Strip]:
    """The strips of a pass that leaves `rank` numbers a row, of one adapter or several; the one to take first."""
    if grouped:
        strips = table.SHRINK_FLOAT32_GROUPED if t.dtype == torch.float32 else table.SHRINK_GROUPED
        return [strips[padded_rank(rank)]]
    if t.dtype == torch.float32:
        return [table.SHRINK_FLOAT32]
    return _tallest_first(table.SHRINK[padded_rank(rank)], t)


def layer_norm_shrink(x: Tensor, rank: int) -> Strip | None:
    """The strip of a LayerNorm that leaves `rank` numbers a row beside its result; None where it had better not."""
    strip = table.LAYER_NORM_SHRINK.get(padded_rank(rank))
    return strip and (table.LAYER_NORM_SHRINK_FLOAT32 if x.dtype == torch.float32 else strip)


def gradient(t: Tensor, rank: int, grouped: bool = False) -> Strip:
    """The strip of the pass that leaves `rank` numbers a column, of one adapter or several."""
    if t.dtype == torch.float32:
        return table.GRADIENT_FLOAT32_GROUPED if grouped else table.GRADIENT_FLOAT32
    return (table.GRADIENT_GROUPED if grouped else table.GRADIENT)[padded_rank(rank)]


def adapter(x: Tensor, rank: int) -> list[Strip]:
    """The strips of the adapter's passes over rows, the one to take first."""
    if x.dtype == torch.float32:
        return [table.ADAPTER_FLOAT32]
    return _tallest_first(table.ADAPTER[padded_rank(rank)], x)


def adapter_gradient(x: Tensor, rank: int) -> Strip:
    """The strip of the adapter's weight gradients."""
    if x.dtype == torch.float32:
        return table.ADAPTER_GRADIENT_FLOAT32
    return table.ADAPTER_GRADIENT[padded_rank(rank)]


def head_rows(m: int, k: int) -> int:
    """How many of m rows go into a chunk of logits, all chunks alike, in whole tiles.

    Each chunk reads the weight twice, V K numbers each time, for 2 V numbers a row that it stores and reads: with 5 K
    rows that is a fifth more. Fewer than 4096 would leave multiprocessors idle.
    """
    chunks = -(-m // max(4096, 5 * k))
    return -(-m // max(chunks, 1) // 128) * 128 or 128


def head_logits(hidden: Tensor, weight: Tensor) -> Linear:
    """How a chunk's logits (M, V) are computed."""
    return _head("logits", hidden, weight, len(weight))


def head_gradient(hidden: Tensor, weight: Tensor) -> tuple[Linear, int]:
    """How the gradient to a chunk's rows (M, K) is computed, and in how many runs over V: few rows have few tiles."""
    how = _head("gradient", hidden, weight, weight.shape[1])
    return how, max(1, how.programs // _programs(how.tile, *hidden.shape))


def _head(kernel: str, hidden: Tensor, weight: Tensor, n: int) -> Linear:
    arch, float32 = architecture(hidden.device), hidden.dtype == torch.float32
    described = arch.name >= 90 and not float32 and _describable(hidden) and _describable(weight)
    tiles = table.head_tiles(arch.name, described, float32)[kernel]
    tile = _cheapest_first(tiles, steps(len(hidden)), n, arch)[0]
    return Linear(tile, described, False, arch.multiprocessors)


def splits(device: torch.device, programs: int, rank: int) -> int:
    """Into how many runs to split a sum that `programs` programs would share, so that none idles.

    Two runs a multiprocessor hide more latency, but at larger ranks their partial sums cost more than that.
    """
    return max(1, architecture(device).multiprocessors * (2 if rank <= 32 else 1) // programs)


def run(m: int, splits: int, strip: Strip) -> int:
    """How many of m rows go into each of at most so many runs of a sum over rows, in whole steps."""
    return -(-m // (splits * strip.block_m)) * strip.block_m


def group_rows(splits: int, strip: Strip) -> int:
    """The same where rows belong to many adapters: of each one's own rows, whatever the others have.

    As if `GROUPED_ROWS` were to be split: then an adapter's sum has the same bits in any company. Partial sums of
    more rows cost no larger a share, of fewer nothing, for a run by itself has none.
    """
    return run(GROUPED_ROWS, splits, strip)


def _tallest_first(strips: tuple[Strip, ...], t: Tensor) -> list[Strip]:
    """Strips with the tallest that gives every multiprocessor a program first, else the lowest."""
    enough = architecture(t.device).multiprocessors
    best = next((s for s in strips if -(-steps(t.shape[0]) // s.block_m) >= enough), strips[-1])
    return [best, *(s for s in strips if s != best)]
