"""The tiles that kernels are compiled with: a table by architecture.

What it follows from:

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

from collections.abc import Mapping
from typing import NamedTuple


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


def head_tiles(arch: int, descriptor: bool, float32: bool = False) -> Mapping[str, tuple[Tile, ...]]:
    """The tiles of the language model's head, by kernel."""
    if float32:
        return HEAD_FLOAT32
    return HEAD_DESCRIPTOR.get(arch, HEAD) if descriptor else HEAD
