"""What the kernel tests share: inputs, the truth in float64, PyTorch's own result as the yardstick."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_as_good_as
from torch import Tensor

from fastpeft import reference
from fastpeft.kernels import dropout, launch, lora_chain, tile_table, tiling

#: x's dtype and the parameters': float32 parameters on a 16-bit base are peft's default.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
}

#: One row, less than one tile (of 128 or 64 rows, but two strips of 32), and one more than the tallest tile.
ROWS = [1, 63, 129]

Arguments = dict[str, Tensor | None]

#: The forms of the GEMM, the least architecture of each, and the variants it comes in.
LINEAR_FORMS = {
    "pointer": (80, ("split", "dropout", "single", "single dropout")),
    "descriptor": (90, ("split", "dropout")),
}


def linear_cases(epilogue: bool) -> list[Any]:
    """(device, tile, form, variant) for every tile that some architecture takes in that form and variant.

    The interpreter has no warps and no stages: there, one stands for all tiles that differ in these alone. What an
    epilogue adds comes after the loop, whose tiles are all tested without one: there the smallest stands for its form
    and variant, and the others are in the full grid.
    """
    cases = {
        (tile, form, variant)
        for form, (least, variants) in LINEAR_FORMS.items()
        for variant in variants
        for arch in tile_table.LINEAR
        if arch >= least
        for tile in tile_table.linear_tiles(arch, form, variant, epilogue)
    }
    distinct = {(tile[:3], *kind): (tile, *kind) for tile, *kind in sorted(cases)}
    interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
    smallest = {tuple(kind): (tile, *kind) for tile, *kind in sorted(distinct.values(), reverse=True)}
    sample = set(smallest.values() if epilogue else distinct.values())
    places = ("cpu", distinct.values(), interpreted), ("cuda", cases, pytest.mark.gpu)
    return [
        pytest.param(
            device,
            *case,
            marks=[mark] if device == "cuda" or case in sample else [mark, pytest.mark.full],
            id="-".join(map(str, (device, *case[1:], *case[0]))),
        )
        for device, chosen, mark in places
        for case in sorted(chosen)
    ]


def sizes_over(tile: tile_table.Tile) -> tuple[int, int, int]:
    """M, K and N of a GEMM that takes a whole tile and a rest on every axis; rows of 16 bytes, for descriptors."""
    return tile.block_m + 6, tile.block_k + 8, tile.block_n + 8


def choose_tile(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    tile: tile_table.Tile,
    form: str,
    variant: str,
    epilogue: bool,
) -> None:
    """Make the GEMM run with this tile; skip where this GPU's table has no such choice."""
    if device == "cuda":
        arch = tiling.architecture(torch.device("cuda")).name
        if tile not in tile_table.linear_tiles(arch, form, variant, epilogue) or (
            form == "descriptor" and arch < 90
        ):
            pytest.skip(f"not in the table of sm_{arch}")

    def chosen(x, weight, rank, inner, outer, epilogue, derivative, grouped):
        single = variant.startswith("single") and not inner and not grouped
        return [tiling.Linear(tile, form == "descriptor", single, programs=3)]

    monkeypatch.setattr(tiling, "linear", chosen)


def pairwise(**axes: list[Any]) -> Iterator[dict[str, Any]]:
    """Combinations such that every pair of values of two axes occurs in one, chosen greedily."""
    names = list(axes)
    values = [(name, i) for name in names for i in range(len(axes[name]))]
    left = {tuple(sorted(pair)) for pair in itertools.combinations(values, 2) if pair[0][0] != pair[1][0]}
    while left:
        chosen = dict(min(left))
        for name in names:
            if name not in chosen:
                news = [
                    sum(
                        pair in left
                        for pair in itertools.combinations(sorted((*chosen.items(), (name, i))), 2)
                    )
                    for i in range(len(axes[name]))
                ]
                chosen[name] = news.index(max(news))
        left -= {tuple(sorted(pair)) for pair in itertools.combinations(chosen.items(), 2)}
        yield {name: axes[name][chosen[name]] for name in names}


def describe(case: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in case.items())


def draws_of(make: Callable[..., Arguments], *sizes: Any, **options: Any) -> list[Arguments]:
    """Several draws where few rows differ or a gradient is few numbers, one elsewhere.

    `sizes` starts with the number of rows and has the length of the shortest gradient, a bias's, in the third place.
    Of 16 numbers, one kernel in 200 as good as PyTorch would show twice its error by luck; of 32, one in 10 000.
    Where few rows differ, the errors of a gradient are those of as many numbers as the rank: eight draws at most.
    """
    few_rows = sizes[0] < 17 or options.get("form") == "expanded"
    rank = min(size for size in sizes[1:] if isinstance(size, int))
    few_numbers = -(-32 // max(sizes[2], 1))
    several = min(8, -(-32 // max(rank, 1))) if few_rows else 1
    return [make(*sizes, **options, draw=draw) for draw in range(max(several, few_numbers))]


def view(tensor: Tensor, form: str) -> Tensor:
    """The values of `tensor` (M, K) in another layout; around a view lies NaN, which no kernel may touch."""
    m, k = tensor.shape
    if form == "dense":
        return tensor
    if form == "transposed":
        return tensor.T.contiguous().T
    if form == "expanded":
        return tensor[:1].expand(m, k)
    assert form == "offset"
    around = tensor.new_full((m + 3, k + 5), float("nan"))
    around[1 : m + 1, 2 : k + 2] = tensor
    return around[1 : m + 1, 2 : k + 2]


def compare(
    fused: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    draws: list[Arguments],
    parameters: tuple[str, ...],
) -> None:
    """`fused(**arguments)` and its gradients by all floating arguments, held to the rule of tolerances.py.

    `formula` computes the same from the arguments in any dtype. `parameters` may be wider than x: fused rounds them
    to x's dtype, so truth and yardstick do too. Errors are taken over all draws of the arguments together: over one
    number, PyTorch's own error is luck.
    """

    def run(
        call: Callable[..., Tensor], arguments: Arguments, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        x = arguments["x"]
        assert x is not None
        leaves = {n: t.detach().requires_grad_() for n, t in arguments.items() if t is not None}
        used = dict(leaves)
        if dtype is not None:
            used = {n: (t.to(x.dtype) if n in parameters else t).to(dtype) for n, t in leaves.items()}
            used["x"] = used["x"].contiguous()  # the CPU's bfloat16 matmul reads past the rows of a strided x
        y = call(**{**arguments, **used})
        generator = torch.Generator().manual_seed(y.numel())
        dy = torch.randn(y.shape, generator=generator).to(x.device, x.dtype).to(y.dtype)
        wanted = leaves if dtype is None or dtype == x.dtype else used  # the truth's gradients stay float64
        gradients = torch.autograd.grad(y, list(wanted.values()), dy)
        return {"y": y.detach(), **{f"d_{n}": g for n, g in zip(leaves, gradients, strict=True)}}

    dtype = next(t.dtype for n, t in draws[0].items() if n == "x" and t is not None)
    results = [
        [run(call, arguments, kind) for arguments in draws]
        for call, kind in ((fused, None), (formula, dtype), (formula, torch.float64))
    ]
    for name in results[0][0]:
        mine, yardstick, truth = (torch.cat([r[name].flatten() for r in each]) for each in results)
        assert_as_good_as(mine, yardstick, truth, name)


def lora_arguments(
    m: int,
    k: int,
    n: int,
    rank: int,
    dtypes: str,
    device: str,
    *,
    layout: str = "conv1d",
    form: str = "dense",
    bias: bool = True,
    draw: int = 0,
) -> Arguments:
    """Arguments of a LoRA linear layer; lora_b nonzero, and an asymmetric weight where it is square."""
    dtype, wide = DTYPES[dtypes]
    generator = torch.Generator().manual_seed(draw)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    weight = randn(k, n, scale=max(k, 1) ** -0.5)
    weight = weight if layout == "conv1d" else weight.T.contiguous().T
    return {
        "x": view(randn(m, k).to(device, dtype), form),
        "weight": weight.to(device, dtype),
        "bias": randn(n).to(device, dtype) if bias else None,
        "lora_a": randn(rank, k, scale=max(k, 1) ** -0.5).to(device, wide),
        "lora_b": randn(n, rank, scale=rank**-0.5).to(device, wide),
    }


def check_lora(fused: Callable[..., Tensor], draws: list[Arguments], dropout_p: float) -> None:
    """Hold `fused(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)` to the formula with its own mask."""
    x = draws[0]["x"]
    assert x is not None
    seed = torch.tensor([20240229 + x.shape[0]], device=x.device) if dropout_p > 0 else None
    keep = None if seed is None else dropout.keep_mask(seed, *x.shape, dropout_p)

    def formula(**given: Any) -> Tensor:
        return reference.lora_linear(**given, scaling=1.5, dropout_p=dropout_p, keep=keep)

    def call(**given: Any) -> Tensor:
        return fused(**given, scaling=1.5, dropout_p=dropout_p, seed=seed)

    compare(call, formula, draws, ("lora_a", "lora_b"))


def adapter_arguments(
    m: int,
    k: int,
    rank: int,
    dtypes: str,
    device: str,
    *,
    form: str = "dense",
    bias: bool = True,
    draw: int = 0,
) -> Arguments:
    """Arguments of a bottleneck adapter, `up` nonzero."""
    dtype, wide = DTYPES[dtypes]
    generator = torch.Generator().manual_seed(draw)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    return {
        "x": view(randn(m, k).to(device, dtype), form),
        "down_weight": randn(rank, k, scale=k**-0.5).to(device, wide),
        "down_bias": randn(rank, scale=0.3).to(device, wide) if bias else None,
        "up_weight": randn(k, rank, scale=rank**-0.5).to(device, wide),
        "up_bias": randn(k, scale=0.3).to(device, wide) if bias else None,
    }


def check_adapter(fused: Callable[..., Tensor], draws: list[Arguments], activation: str) -> None:
    """Hold `fused(x, down_weight, down_bias, up_weight, up_bias, activation, scale)` to the formula."""

    def formula(**given: Any) -> Tensor:
        return reference.adapter(**given, activation=activation, scale=0.7)

    def call(**given: Any) -> Tensor:
        return fused(**given, activation=activation, scale=0.7)

    compare(call, formula, draws, ("down_weight", "up_weight"))


def link(layer, scaling=1.0, p=0.0, seed=None, *, norm=None, stores="y", adds=False, added=(0.0, None)):
    """A layer (weight, bias, lora_a, lora_b) of a chain; `added` is the dropout before its residual."""
    drops = [None if seed is None else dropout.Dropout(p, seed) for p, seed in ((p, seed), added)]
    call = lora_chain.Call(scaling, drops[0], stores, drops[1])
    return lora_chain.Link(tuple(layer), call, lora_chain.Layer(), norm, adds)


def mlp(
    x, fc, proj, residual=None, fc_drops=(1.0, 0.0, None), proj_drops=(1.0, 0.0, None), added=(0.0, None)
):
    """`proj(gelu(fc(x)))`, added to a residual if there is one; a layer drops by (scaling, p, seed)."""
    stores, _ = lora_chain.stores(x, residual, (fc, proj), (True, False))
    links = [
        link(fc, *fc_drops, stores=stores),
        link(proj, *proj_drops, adds=residual is not None, added=added),
    ]
    return lora_chain.lora_chain(x, residual, links)[0]
