"""Which tile a kernel runs with: a table by architecture, and the choice within it by shape.

What the table follows from:

- A step of a GEMM's tile multiplies BLOCK_M · BLOCK_N numbers for each BLOCK_M + BLOCK_N it loads, so large
  tiles cost less for each output; but with fewer tiles than multiprocessors some of those idle.
- Accumulators live in registers: 8 warps hold a 128 × 128 float32 tile in 64 registers a thread, 128 × 256 in
  128 of the 255. On sm_90 and sm_100 operands are read from shared memory, which leaves room for 128 × 256;
  elsewhere operand fragments need registers too, and 128 × 128 on 8 warps is the largest that never spills.
- num_stages buffers of (BLOCK_M + BLOCK_N) · BLOCK_K elements must fit a block's shared memory.
- The rank-r kernels do at most R products for each element they load: they are bound by memory, so what
  counts is that every multiprocessor has a program, then that partial sums stay small beside what is read.

That each row spills nothing and fits is not argued but compiled: bench/compile_report.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import INTERPRETED, tf32_allowed
from .rows import rounded


class Architecture(NamedTuple):
    """What a choice depends on, of the architecture's reference GPU."""

    name: int  # 10 · major + minor
    multiprocessors: int
    shared_limit: int  # bytes of shared memory a block may use
    teraflops: int  # peak of 16-bit matrix products
    flops_per_byte: int  # that peak over memory bandwidth


ARCHITECTURES = (
    Architecture(80, 108, 163 * 1024, 312, 156),  # A100
    Architecture(86, 84, 99 * 1024, 71, 76),  # RTX 3090
    Architecture(89, 128, 99 * 1024, 165, 165),  # RTX 4090
    Architecture(90, 132, 227 * 1024, 989, 295),  # H100
    Architecture(100, 148, 227 * 1024, 2250, 281),  # B200
    Architecture(120, 170, 99 * 1024, 210, 117),  # RTX 5090
)


class Tile(NamedTuple):
    """A tile of a GEMM: its rows, columns and depth of a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Strip(NamedTuple):
    """A tile of a pass over wide rows: so many rows and columns a step."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


class Linear(NamedTuple):
    """How `y = x W + …` runs: its tile, with tensor descriptors or pointers, xa on the way or before."""

    tile: Tile
    descriptor: bool
    single: bool
    programs: int  # of the descriptor form's persistent grid


# Tiles of the GEMM, largest first. Before sm_90 and on sm_120 warps multiply from registers (mma.sync).
_MMA_SYNC = {
    "split": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
        Tile(32, 64, 64, 4, 4),
    ),
    "dropout": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
        Tile(32, 64, 64, 4, 4),
    ),
    "single": (Tile(64, 128, 64, 4, 3),),
    "single dropout": (Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 4, 4)),
}
_MMA_SYNC_120 = {**_MMA_SYNC, "single": (Tile(128, 128, 64, 8, 3),)}
# sm_90 and sm_100 read operands from shared memory (wgmma, tcgen05); the mask's booleans leave no room for 128 × 256.
# They have no u on the way: on an H100 a pass of its own and descriptors were quicker at every shape tried, and
# ptxas 12.8 gives a second operand of a loop that isn't pipelined a wrong descriptor there.
_WGMMA = {
    "split": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
    ),
    "dropout": (Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
}
_TCGEN05 = {"split": _WGMMA["split"], "dropout": (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4))}

#: The GEMM's tiles on 16-bit numbers, by architecture and variant: u given or on the way, under a mask or not.
LINEAR: Mapping[int, Mapping[str, tuple[Tile, ...]]] = {
    80: _MMA_SYNC,
    86: _MMA_SYNC,
    89: _MMA_SYNC,
    90: _WGMMA,
    100: _TCGEN05,
    120: _MMA_SYNC_120,
}

#: The GEMM's tiles on float32, of every architecture, in pointer form: multiplied as TF32, or in full.
LINEAR_TF32 = (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3))
LINEAR_FLOAT32 = (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4))

#: Tiles that an epilogue makes spill, or lengthens the main loop of: their form, variant and architecture.
_NOT_WITH_EPILOGUE = {
    80: {("pointer single dropout", Tile(64, 128, 32, 4, 4))},
    **{arch: {("pointer single dropout", tile) for tile in _MMA_SYNC["single dropout"]} for arch in (86, 89)},
    90: {
        ("pointer split", Tile(128, 256, 64, 8, 3)),
        ("pointer split", Tile(128, 128, 64, 8, 4)),
        ("pointer dropout", Tile(128, 128, 64, 8, 4)),
    },
    100: {
        ("pointer split", Tile(128, 256, 64, 8, 3)),
        ("descriptor split", Tile(128, 256, 64, 8, 3)),
    },
    120: {
        ("pointer split", Tile(128, 64, 64, 4, 3)),
        ("pointer single", Tile(128, 128, 64, 8, 3)),
    },
}

#: Tiles that the derivative of a GELU makes spill, beside those: with it this one fills all 255 registers.
_NOT_WITH_DERIVATIVE = {90: {("descriptor split", Tile(128, 256, 64, 8, 3))}}

#: Tiles that spill, or whose main loop lengthens, where rows belong to several adapters; with an epilogue these
#: besides; and these by whether it is the derivative of a GELU.
_NOT_GROUPED = {
    80: {("pointer split", Tile(128, 64, 64, 4, 3))},
    **{
        arch: {
            *(("pointer split", tile) for tile in _MMA_SYNC["split"][1:]),
            ("pointer dropout", Tile(32, 64, 64, 4, 4)),
        }
        for arch in (86, 89)
    },
    120: {
        ("pointer split", Tile(64, 64, 64, 4, 4)),
        ("pointer dropout", Tile(128, 64, 64, 4, 3)),
        ("pointer dropout", Tile(64, 64, 64, 4, 4)),
        ("descriptor split", Tile(64, 64, 64, 4, 4)),
        ("descriptor dropout", Tile(32, 64, 64, 4, 4)),
    },
}
_NOT_GROUPED_WITH_EPILOGUE = {
    80: {("pointer dropout", Tile(128, 64, 64, 4, 3))},
    86: {("pointer dropout", Tile(64, 64, 64, 4, 4))},
    89: {("pointer dropout", Tile(64, 64, 64, 4, 4))},
    90: {("pointer dropout", Tile(64, 128, 64, 4, 4))},
    120: {("pointer dropout", Tile(32, 64, 64, 4, 4))},
}
_NOT_GROUPED_BY_DERIVATIVE = {
    (120, True): {("pointer split", Tile(128, 128, 64, 8, 3))},
    (120, False): {("pointer split", Tile(32, 64, 64, 4, 4))},
}
LINEAR_TF32_GROUPED = {arch: Tile(128, 64, 32, 8 if arch in (90, 100) else 4, 3) for arch in LINEAR}
LINEAR_FLOAT32_GROUPED = Tile(32, 64, 32, 4, 3)

#: Strips by padded rank, tallest first; for float32 the one that never spills when multiplied in full.
SHRINK = {
    16: (Strip(64, 64, 4, 4), Strip(32, 128, 4, 3)),
    32: (Strip(64, 128, 4, 3), Strip(32, 128, 4, 3)),
    64: (Strip(64, 64, 8, 3), Strip(32, 64, 4, 4)),
    128: (Strip(64, 64, 8, 3), Strip(32, 64, 8, 3)),
    256: (Strip(64, 32, 8, 3), Strip(32, 32, 8, 3)),
}
SHRINK_FLOAT32 = Strip(64, 32, 8, 3)
#: Where rows belong to several adapters the shortest, for a taller one spills; and on float32.
SHRINK_GROUPED = {rank: strips[-1] for rank, strips in SHRINK.items()}
SHRINK_FLOAT32_GROUPED = dict.fromkeys(SHRINK, Strip(32, 32, 8, 3)) | {256: Strip(32, 16, 8, 3)}
#: The same beside a LayerNorm: with its statistics a taller strip, or a larger rank, spills on some architecture.
LAYER_NORM_SHRINK = {16: Strip(32, 128, 4, 3), 32: Strip(32, 128, 8, 3), 64: Strip(32, 64, 4, 4)}
LAYER_NORM_SHRINK_FLOAT32 = Strip(16, 32, 8, 3)
GRADIENT = {
    16: Strip(32, 128, 4, 3),
    32: Strip(32, 128, 8, 3),
    64: Strip(64, 128, 8, 3),
    128: Strip(64, 64, 8, 3),
    256: Strip(64, 64, 8, 3),
}
GRADIENT_FLOAT32 = Strip(32, 32, 8, 3)
GRADIENT_GROUPED = GRADIENT | {16: Strip(32, 128, 8, 3)}
GRADIENT_FLOAT32_GROUPED = Strip(16, 32, 8, 3)

#: A batch of many adapters is split, for their gradients, as one of so many rows would be.
GROUPED_ROWS = 8192

#: The adapter's strips by padded bottleneck, tallest first, and those of its gradients.
ADAPTER = {
    16: (Strip(64, 64, 4, 3), Strip(32, 64, 4, 3)),
    32: (Strip(64, 64, 4, 3), Strip(32, 64, 4, 3)),
    64: (Strip(64, 64, 4, 3), Strip(32, 64, 4, 3)),
    128: (Strip(64, 64, 8, 3), Strip(32, 64, 8, 2)),
    256: (Strip(32, 32, 8, 2),),
}
ADAPTER_FLOAT32 = Strip(16, 32, 4, 3)
ADAPTER_GRADIENT = {
    16: Strip(32, 64, 8, 3),
    32: Strip(32, 64, 8, 3),
    64: Strip(32, 64, 8, 3),
    128: Strip(32, 32, 8, 3),
    256: Strip(32, 32, 8, 3),
}
ADAPTER_GRADIENT_FLOAT32 = Strip(16, 32, 8, 3)

#: A chunk of logits has rows so many elements apart, or a multiple: whole steps of the gradient's tiles, 128 bytes.
HEAD_ALIGNED = 64

#: Tiles of the language model's head on 16-bit numbers, of the logits and of the gradient to hidden: with descriptors
#: where operands come from shared memory, and all others. What a row leaves of 256 columns spills on sm_100.
HEAD_DESCRIPTOR = {
    90: {
        "logits": (Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4)),
        "gradient": (Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4)),
    },
    100: {
        "logits": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4)),
        "gradient": (Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4)),
    },
}
HEAD = {
    "logits": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    "gradient": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
}
HEAD_FLOAT32 = {
    "logits": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
    "gradient": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
}

#: The interpreter's cost goes by programs and steps, so it takes the largest tiles.
_INTERPRETER = Architecture(90, 2, 0, 0, 1 << 30)


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
    """The rank a kernel is compiled for: the next power of two, at least a matrix instruction's 16."""
    return max(16, 1 << (rank - 1).bit_length())


def linear_tiles(
    arch: int, form: str, variant: str, epilogue: bool, derivative: bool = False, grouped: bool = False
) -> tuple[Tile, ...]:
    """The tiles of `linear_kernel` on 16-bit numbers in this form and variant, with an epilogue or without.

    `derivative`: whether the epilogue is the derivative of a GELU. `grouped`: whether rows belong to several adapters:
    to take what is whose from one of two accumulators needs as many registers as that.
    """
    excluded = _NOT_WITH_EPILOGUE[arch] if epilogue or grouped else set()
    if derivative or grouped:
        excluded = excluded | _NOT_WITH_DERIVATIVE.get(arch, set())
    if grouped:
        excluded = excluded | _NOT_GROUPED.get(arch, set())
        excluded = excluded | _NOT_GROUPED_BY_DERIVATIVE.get((arch, derivative), set())
    if grouped and epilogue:
        excluded = excluded | _NOT_GROUPED_WITH_EPILOGUE.get(arch, set())
    tiles = LINEAR[arch].get(variant, ())
    return tuple(tile for tile in tiles if (f"{form} {variant}", tile) not in excluded)


def linear_tiles_float32(arch: int, tf32: bool, epilogue: bool, grouped: bool = False) -> tuple[Tile, ...]:
    """The same on float32: with an epilogue the larger would spill."""
    if grouped:
        return (LINEAR_TF32_GROUPED[arch] if tf32 else LINEAR_FLOAT32_GROUPED,)
    tiles = LINEAR_TF32 if tf32 else LINEAR_FLOAT32
    return tiles[1:] if epilogue else tiles


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
        some = linear_tiles_float32(arch.name, tf32_allowed(), epilogue, grouped)
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
        linear_tiles(arch.name, form, "dropout" if outer else "split", epilogue, derivative, grouped),
        m,
        n,
        arch,
    )
    split = [Linear(tile, descriptor, False, arch.multiprocessors) for tile in tiles]
    if beforehand or grouped:
        return split
    tiles = _cheapest_first(
        linear_tiles(arch.name, "pointer", "single dropout" if outer else "single", epilogue, derivative),
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
        strips = SHRINK_FLOAT32_GROUPED if t.dtype == torch.float32 else SHRINK_GROUPED
        return [strips[padded_rank(rank)]]
    return [SHRINK_FLOAT32] if t.dtype == torch.float32 else _tallest_first(SHRINK[padded_rank(rank)], t)


def layer_norm_shrink(x: Tensor, rank: int) -> Strip | None:
    """The strip of a LayerNorm that leaves `rank` numbers a row beside its result; None where it had better not."""
    strip = LAYER_NORM_SHRINK.get(padded_rank(rank))
    return strip and (LAYER_NORM_SHRINK_FLOAT32 if x.dtype == torch.float32 else strip)


def gradient(t: Tensor, rank: int, grouped: bool = False) -> Strip:
    """The strip of the pass that leaves `rank` numbers a column, of one adapter or several."""
    if grouped:
        return GRADIENT_FLOAT32_GROUPED if t.dtype == torch.float32 else GRADIENT_GROUPED[padded_rank(rank)]
    return GRADIENT_FLOAT32 if t.dtype == torch.float32 else GRADIENT[padded_rank(rank)]


def adapter(x: Tensor, rank: int) -> list[Strip]:
    """The strips of the adapter's passes over rows, the one to take first."""
    return [ADAPTER_FLOAT32] if x.dtype == torch.float32 else _tallest_first(ADAPTER[padded_rank(rank)], x)


def adapter_gradient(x: Tensor, rank: int) -> Strip:
    """The strip of the adapter's weight gradients."""
    return ADAPTER_GRADIENT_FLOAT32 if x.dtype == torch.float32 else ADAPTER_GRADIENT[padded_rank(rank)]


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
    tiles = head_tiles(arch.name, described, float32)[kernel]
    tile = _cheapest_first(tiles, steps(len(hidden)), n, arch)[0]
    return Linear(tile, described, False, arch.multiprocessors)


def head_tiles(arch: int, descriptor: bool, float32: bool = False) -> Mapping[str, tuple[Tile, ...]]:
    """The tiles of the language model's head, by kernel."""
    if float32:
        return HEAD_FLOAT32
    return HEAD_DESCRIPTOR.get(arch, HEAD) if descriptor else HEAD


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
