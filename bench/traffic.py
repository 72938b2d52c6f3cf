"""Launches and bytes of GPT-2's LoRA layers and of the adapter, forward and backward, by variant.

    python bench/traffic.py [--tokens 8192 --rank 16 --dropout 0.1 --dtype bf16 --json FILE]

Counted from what is launched, not from formulas: eager ops are seen by a dispatch mode, fastpeft's kernels by
the arguments of their launches, with the tiles it takes on an H100. Tensors are on the meta device, so
nothing is computed. The same rules hold for all: a kernel reads each tensor it is given once and writes each
of its outputs once, however often its programs come back to a tile; an eager op is one kernel, as CUDA runs
it, where dropout is one too; a view or an allocation is none; an operand that is broadcast costs what it
stores. `bound` is one launch each way that reads and writes each tensor of the operation once.

`saved_bytes` is what autograd keeps between forward and backward, parameters left out, each storage once.

`flops` are those of matrix products, by torch's own counter, which counts what a causal mask hides too. Of fastpeft's
kernels they are those with frozen weights: a product of rank r has 2r for each element that it reads, so that its bytes
are what takes its time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import layers
import record
import torch
import torch.nn.functional as F
from cases import BOTTLENECK, DTYPES, VOCABULARY, WIDTH, projections
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.activations import NewGELUActivation

import fastpeft
from fastpeft import chain, modules, ops, reference, routes
from fastpeft.chain import Link
from fastpeft.kernels import launch, layer_norm, lm_head, lora_chain, tile_table, tiling
from fastpeft.kernels.dropout import Dropout
from fastpeft.kernels.groups import Groups
from fastpeft.projections import Projection
from fastpeft.residuals import Residual, added

RESIDUAL_DROPOUT = 0.1  # GPT-2's own
WIDTHS = (768, 1024, 1280, 1600)  # of the four published sizes
ADAPTERS = 8  # LoRA adapters that share a step
LENGTHS = (256, 1024)  # of the rows in which attention sees the tokens
HEAD_DIM = 64  # of all published sizes
H100 = next(a for a in tile_table.ARCHITECTURES if a.name == 90)
aten = torch.ops.aten
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
#: The frozen products of fastpeft's kernels, whose names begin so, by the names of their arguments.
PRODUCTS = {"linear": "MNK", "head_logits": "MVK", "head_gradient": "MVK"}
VIEWS = (aten._unsafe_view, aten._reshape_alias)  # those whose schema doesn't say so


class Kernel(NamedTuple):
    """One launch."""

    name: str
    bytes: int
    flops: int = 0  # which a bound has none of


class Traffic(NamedTuple):
    """What an operation costs."""

    forward: list[Kernel]
    backward: list[Kernel]
    saved_bytes: int

    def record(self) -> dict[str, Any]:
        """As it goes into the JSON."""
        both = self.forward + self.backward
        return {
            "launches": len(both),
            "bytes": sum(kernel.bytes for kernel in both),
            "saved_bytes": self.saved_bytes,
            "forward": [kernel._asdict() for kernel in self.forward],
            "backward": [kernel._asdict() for kernel in self.backward],
        }


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of the elements a tensor really has, an expanded dimension once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def distinct_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among `tensors`, two views of the same elements once."""
    found = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.numel()): stored_bytes(t)
        for t in tensors
        if isinstance(t, Tensor)
    }
    return sum(found.values())


class EagerKernels(TorchDispatchMode):
    """Collects a kernel for each eager op that launches one."""

    def __init__(self, kernels: list[Kernel]) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket not in (*ALLOCATIONS, *VIEWS):
            # A GEMM with beta=0 leaves its first operand alone.
            read = args[1:] if kwargs.get("beta") == 0 else args
            moved = distinct_bytes(tree_leaves((read, kwargs))) + distinct_bytes(tree_leaves(out))
            flops = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)(*args, **kwargs, out_val=out)
            self.kernels.append(Kernel(str(func), moved, flops))
        return out


modules.HARMLESS_MODES.add(EagerKernels)  # which counts what fastpeft runs


@contextmanager
def counted(kernels: list[Kernel]) -> Iterator[None]:
    """Collects the kernels of eager operators and those of fastpeft, which are launched on nothing."""
    with launch.record() as launches, EagerKernels(kernels):
        yield
    for one in launches:
        # A descriptor stands for its tensor. Only partial sums are read by the kernel that writes them.
        tensors = [getattr(value, "base", value) for value in one.args.values()]
        moved = distinct_bytes(tensors) + distinct_bytes([one.args.get("partials_ptr")])
        name = one.kernel.__name__
        product = next((sizes for begins, sizes in PRODUCTS.items() if name.startswith(begins)), None)
        flops = 2 * math.prod(one.args[size] for size in product) if product else 0
        kernels.append(Kernel(name, moved, flops))


@contextmanager
def on_an_h100() -> Iterator[None]:
    """Within it fastpeft takes the route and the tiles that it takes on an H100."""
    with (
        mock.patch.object(routes, "choose", return_value=routes.FUSED),
        mock.patch.object(routes, "confirm", return_value=routes.FUSED),
        mock.patch.object(launch, "unsupported", return_value=None),
        mock.patch.object(layer_norm, "ready", return_value=None),
        mock.patch.object(layer_norm, "ready_to_shrink", return_value=None),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),  # it doesn't know meta tensors
        mock.patch.object(tiling, "architecture", return_value=H100),
    ):
        yield


class DropoutAsOnCuda(TorchFunctionMode):
    """Runs `F.dropout` as the one kernel that it is on CUDA; elsewhere torch makes three of it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout:
            return _fused_dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


modules.HARMLESS_MODES.add(DropoutAsOnCuda)


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def traffic(operation: Callable[..., Any], x: Tensor | list[Tensor], parameters: Iterable[Tensor]) -> Traffic:
    """Run `operation` on x and backward from its outputs, for x and those `parameters` that train."""
    parameters, inputs = list(parameters), tree_leaves(x)
    forward, backward, saved = [], [], []  # `saved` keeps storages alive, so that each has its own identity
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with on_an_h100(), DropoutAsOnCuda():
        with keeping, counted(forward):
            y = tree_leaves(operation(*inputs))
        dy = [torch.empty_like(each) for each in y]
        with counted(backward):
            torch.autograd.grad(y, [*inputs, *(p for p in parameters if p.requires_grad)], dy)
    own = {p.untyped_storage()._cdata for p in parameters}
    kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    return Traffic(forward, backward, sum(size for storage, size in kept.items() if storage not in own))


def bound(x: Tensor, y: Tensor, parameters: Iterable[Tensor]) -> Traffic:
    """Each tensor once: x, y and parameters forward; dy, x and parameters backward, and the gradients out."""
    parameters = list(parameters)
    forward = stored_bytes(x) + stored_bytes(y) + sum(map(stored_bytes, parameters))
    # A frozen bias isn't read backward.
    bias = sum(stored_bytes(p) for p in parameters if p.dim() == 1 and not p.requires_grad)
    gradients = stored_bytes(x) + sum(stored_bytes(p) for p in parameters if p.requires_grad)
    return Traffic([Kernel("bound", forward)], [Kernel("bound", forward - bias + gradients)], stored_bytes(x))


def projection(layer: Any, dropout_p: float) -> Projection:
    """A peft layer as fastpeft's operations take it; the module itself leaves meta tensors to stock."""
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Projection(base.weight, base.bias, a, b, layer.scaling["default"], dropout_p)


def fused_lora(layer: Any, dropout_p: float, x: Tensor) -> Tensor:
    """A peft layer by `fastpeft.lora_linear`."""
    return ops.routed_lora_linear(x, projection(layer, dropout_p), routes.Options())[0]


def fused_chain(links: list[Link], x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Layers with what stands between them by `chain.lora_chain`: the result, and the residual to go on with."""
    served = chain.lora_chain(x, residual, links, routes.Options())
    assert served is not None
    return served.y, served.residual


def fused_adapter(layer: Any, x: Tensor) -> Tensor:
    """An eager adapter by `fastpeft.adapter`."""
    down, up = layer.down, layer.up
    return fastpeft.adapter(x, down.weight, down.bias, up.weight, up.bias, "relu", layer.scale)


def lora_variants(k: int, n: int, tokens: int, rank: int, dropout_p: float, dtype: str) -> dict[str, Traffic]:
    """The traffic of one LoRA layer by variant."""
    x = torch.empty(1, tokens, k, dtype=DTYPES[dtype], device="meta", requires_grad=True)
    shape = (k, n, rank, dropout_p, DTYPES[dtype])
    layer = layers.peft_layer(*shape, device="meta")
    parameters = list(layer.parameters())
    with_float32 = layers.peft_layer(*shape, float32_factors=True, device="meta")
    y = x.new_empty(1, tokens, n)
    return {
        "bound": bound(x, y, parameters),
        "frozen": traffic(layers.frozen(layer), x, layers.frozen(layer).parameters()),
        f"peft_{dtype}": traffic(layer, x, parameters),
        "peft_fp32": traffic(with_float32, x, with_float32.parameters()),
        "addmm": traffic(layers.AddmmLora(layer), x, parameters),
        "fastpeft": traffic(partial(fused_lora, layer, dropout_p), x, parameters),
    }


def adapter_variants(tokens: int, dtype: str) -> dict[str, Traffic]:
    """The traffic of one adapter by variant."""
    x = torch.empty(1, tokens, WIDTH, dtype=DTYPES[dtype], device="meta", requires_grad=True)
    layer: nn.Module = layers.adapter_layer(WIDTH, BOTTLENECK, DTYPES[dtype], "meta")
    parameters = list(layer.parameters())
    return {
        "bound": bound(x, x, parameters),
        "eager": traffic(layer, x, parameters),
        "fastpeft": traffic(partial(fused_adapter, layer), x, parameters),
    }


def neighbour_variants(tokens: int, rank: int, dropout_p: float, dtype: str) -> dict[str, Traffic]:
    """The traffic of a block's projections with its LayerNorms, GELU, dropouts and residuals, by variant.

    `bound` is every operation by itself: each LayerNorm, projection, GELU, and dropout with its residual, reads and
    writes each of its tensors once. `bound_fused` is a projection with its neighbours as one operation.
    """
    kind = DTYPES[dtype]
    rows = [torch.empty(1, tokens, WIDTH, dtype=kind, device="meta", requires_grad=True) for _ in range(2)]
    norm = nn.LayerNorm(WIDTH, dtype=kind, device="meta").requires_grad_(False)
    every = [layers.peft_layer(p.k, p.n, rank, dropout_p, kind, device="meta") for p in projections()]
    parameters = [p for module in (*every, norm) for p in module.parameters()]
    one_by_one = [partial(fused_lora, layer, dropout_p) for layer in every]

    def alone(gelu: Callable[[Tensor], Tensor], layers: list[Any]) -> Traffic:
        """Every layer, and every neighbour, by itself."""
        c_attn, c_proj, c_fc, mlp_c_proj = layers

        def block(x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
            qkv = c_attn(norm(x))
            x = added(c_proj(attended), Residual(x, RESIDUAL_DROPOUT))
            y = mlp_c_proj(gelu(c_fc(norm(x))))
            return qkv, added(y, Residual(x, RESIDUAL_DROPOUT))

        return traffic(block, rows, parameters)

    return {
        **neighbour_bounds(rows[0], every, norm),
        f"peft_{dtype}": alone(NewGELUActivation(), every),
        "fastpeft": alone(reference.gelu_new, one_by_one),
        "fastpeft_model": traffic(partial(block_at_once, every, norm, dropout_p), rows, parameters),
    }


def block_at_once(
    every: list[Any], norm: nn.LayerNorm, dropout_p: float, x: Tensor, attended: Tensor
) -> tuple[Tensor, Tensor]:
    """A block's projections with their neighbours as the model scope runs them: qkv, and what the block returns."""
    c_attn, c_proj, c_fc, mlp_c_proj = (projection(layer, dropout_p) for layer in every)
    qkv, residual = fused_chain([Link(c_attn, norm)], x, None)
    behind = [
        Link(c_proj, residual_p=RESIDUAL_DROPOUT),
        Link(c_fc, norm, activates=True),
        Link(mlp_c_proj, residual_p=RESIDUAL_DROPOUT),
    ]
    return qkv, fused_chain(behind, attended, residual)[0]


def many_variants(tokens: int, rank: int, dropout_p: float, dtype: str) -> dict[str, Traffic]:
    """The traffic of `block_at_once` with the rows of `ADAPTERS` adapters, as many of each: one by one, and together.

    What adapters share, one by one, is read for each: the frozen weights. Partial sums of gradients are counted as if
    every program left one; those of an adapter with one program leave none.
    """
    kind = DTYPES[dtype]
    norm = nn.LayerNorm(WIDTH, dtype=kind, device="meta").requires_grad_(False)
    every = [layers.peft_layer(p.k, p.n, rank, dropout_p, kind, device="meta") for p in projections()]

    def rows(count: int) -> list[Tensor]:
        return [torch.empty(1, count, WIDTH, dtype=kind, device="meta", requires_grad=True) for _ in range(2)]

    parameters = [p for module in (*every, norm) for p in module.parameters()]
    one = traffic(partial(block_at_once, every, norm, dropout_p), rows(tokens // ADAPTERS), parameters)
    one_by_one = Traffic(one.forward * ADAPTERS, one.backward * ADAPTERS, one.saved_bytes * ADAPTERS)
    frozen = [(layer.base_layer.weight, layer.base_layer.bias) for layer in every]
    factors = [
        tuple(
            torch.empty(ADAPTERS, *shape, dtype=kind, device="meta", requires_grad=True) for shape in shapes
        )
        for shapes in (((rank, p.k), (p.n, rank)) for p in projections())
    ]
    numbers = torch.empty(tokens + 1, dtype=torch.int32, device="meta")
    each, seed = numbers[:ADAPTERS], torch.empty(2, dtype=torch.int64, device="meta")
    groups = Groups(numbers[1:], numbers[: ADAPTERS + 1], each.clone(), each.float(), each.clone())

    def link(i: int, *more: Any, stores: str = "y", adds: bool = False) -> lora_chain.Link:
        residual = Dropout(RESIDUAL_DROPOUT, seed) if adds else None
        call = lora_chain.Call(1.0, Dropout(dropout_p, seed), stores, residual, groups)
        return lora_chain.Link((*frozen[i], *factors[i]), call, lora_chain.Layer(), *more, adds=adds)

    def together(x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        before = lora_chain.Norm(norm.weight, norm.bias, norm.eps, False)
        qkv, residual = lora_chain.lora_chain(x, None, [link(0, before)])
        behind = [link(1, adds=True), link(2, before, stores="yh"), link(3, adds=True)]
        assert residual is not None
        return qkv, lora_chain.lora_chain(attended, residual, behind)[0]

    own = [norm.weight, norm.bias, *(t for pair in (*frozen, *factors) for t in pair)]
    return {"one_by_one": one_by_one, "together": traffic(together, rows(tokens), own)}


def neighbour_bounds(x: Tensor, every: list[nn.Module], norm: nn.Module) -> dict[str, Traffic]:
    """`bound` and `bound_fused` of `neighbour_variants`, in tensors as large as x: qkv is three, a GELU's four."""
    empty = x[:, :0]
    weights = [bound(empty, empty, module.parameters()) for module in (*every, norm, norm)]
    forward, backward = (sum(k.bytes for t in weights for k in t[way]) for way in (0, 1))

    def of(rows_forward: int, rows_backward: int, rows_saved: int) -> Traffic:
        each = (forward + rows_forward * stored_bytes(x), backward + rows_backward * stored_bytes(x))
        return Traffic(*([Kernel("bound", moved)] for moved in each), rows_saved * stored_bytes(x))

    projections = (1 + 3) + (1 + 1) + (1 + 4) + (4 + 1), (3 + 1 + 1) + (1 + 1 + 1) + (4 + 1 + 1) + (1 + 4 + 4)
    norms = 2 * 2, 2 * (3 + 3)  # backward with the sum of a residual's gradient and the norm's
    gelu, residuals = (4 + 4, 4 + 4 + 4), (2 * 3, 2 * 2)
    alone = (sum(way) for way in zip(projections, norms, gelu, residuals, strict=True))
    # x qkv, attended x x', x' pre, pre x' y; dqkv x dx dx, dx' attended d(attended), dpre x' dy dx', dy pre dpre
    fused = (1 + 3) + 3 + (1 + 4) + (4 + 2), (3 + 3) + 3 + (4 + 3) + (1 + 4 + 4)
    return {"bound": of(*alone, 8), "bound_fused": of(*fused, 7)}


def stock_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The language model's loss as transformers has it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def head_variants(tokens: int, k: int, dtype: str) -> dict[str, dict[str, Any]]:
    """The traffic of the language model's head with its loss, and its products in teraflops, by variant.

    `bound` reads and writes hidden, the weight, their logits and the gradient as often as storing the logits needs:
    the weight by each GEMM, logits by who writes and who reads them. `recomputed`, which isn't built, stores none, and
    computes them again in backward for each 256 columns of the gradient, which is what accumulators have room for.
    """
    hidden = torch.empty(tokens, k, dtype=DTYPES[dtype], device="meta", requires_grad=True)
    weight = torch.empty(VOCABULARY, k, dtype=DTYPES[dtype], device="meta")
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    forward, backward = [], []
    with on_an_h100():
        with counted(forward):
            _, d_hidden = lm_head.losses(hidden.detach(), weight, labels, gradient=True)
        with counted(backward):
            torch.mul(d_hidden, 1.0 / tokens)
    rows, logits = stored_bytes(hidden), stored_bytes(hidden) // k * VOCABULARY
    small = 8 * tokens + 4 * tokens + 2 * rows  # labels, losses, and the gradient scaled
    gemm = 2 * tokens * k * VOCABULARY / 1e12
    found = {
        "bound": (
            Traffic(
                [Kernel("bound", 2 * rows + 2 * stored_bytes(weight) + 2 * logits)],
                [Kernel("bound", small)],
                rows,
            ),
            2,
        ),
        f"stock_{dtype}": (traffic(partial(stock_head, weight=weight, labels=labels), hidden, [weight]), 2),
        "fastpeft": (Traffic(forward, backward, rows), 2),
        "recomputed": (
            Traffic(
                [Kernel("loss", rows + stored_bytes(weight))],
                [Kernel("gradient", 2 * rows + stored_bytes(weight) + small)],
                rows,
            ),
            2 + -(-k // 256),
        ),
    }
    return {name: {**each.record(), "teraflops": gemm * gemms} for name, (each, gemms) in found.items()}


def attention(tokens: int, length: int, dropout_p: float, dtype: str) -> Traffic:
    """The traffic of a block's attention in rows of `length`, which every variant leaves to torch's FlashAttention.

    Joining the gradients of queries, keys and values is part of it.
    """
    heads = WIDTH // HEAD_DIM

    def attended(qkv: Tensor) -> Tensor:
        split = qkv.view(tokens // length, length, 3, heads, HEAD_DIM).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in split)
        y = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, True)[0]
        return y.transpose(1, 2).reshape(1, tokens, WIDTH)

    qkv = torch.empty(1, tokens, 3 * WIDTH, dtype=DTYPES[dtype], device="meta", requires_grad=True)
    return traffic(attended, qkv, [])


def block(by_layer: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, int]]:
    """The sums over a block's layers, by variant."""
    variants = next(iter(by_layer.values()))
    keys = ("launches", "bytes", "saved_bytes")
    return {v: {key: sum(layer[v][key] for layer in by_layer.values()) for key in keys} for v in variants}


def measure(tokens: int, rank: int, dropout_p: float, dtype: str) -> dict[str, Any]:
    """The JSON: `block`, `neighbours`, `adapter`, `many` by variant, `layers` by layer and variant; bytes are bytes.

    `attention` is by length, `head` by width and variant; `fewer` has `neighbours` and `head` of a sixteenth of the
    tokens, which shows what doesn't grow with them.
    """
    fewer = tokens // 16
    by_layer = {
        p.name: {v: t.record() for v, t in lora_variants(p.k, p.n, tokens, rank, dropout_p, dtype).items()}
        for p in projections()
    }
    shapes = {
        "tokens": tokens, "width": WIDTH, "rank": rank, "dropout": dropout_p, "model_dropout": RESIDUAL_DROPOUT,
        "bottleneck": BOTTLENECK, "adapters": ADAPTERS,
    }  # fmt: skip
    return {
        "kind": "traffic",
        "shapes": shapes,
        "dtype": dtype,
        "architecture": f"sm_{H100.name}",
        "block": block(by_layer),
        "neighbours": {v: t.record() for v, t in neighbour_variants(tokens, rank, dropout_p, dtype).items()},
        "adapter": {v: t.record() for v, t in adapter_variants(tokens, dtype).items()},
        "many": {v: t.record() for v, t in many_variants(tokens, rank, dropout_p, dtype).items()},
        "attention": {
            str(length): attention(tokens, length, RESIDUAL_DROPOUT, dtype).record()
            for length in LENGTHS
            if tokens % length == 0
        },
        "head": {str(width): head_variants(tokens, width, dtype) for width in WIDTHS},
        "fewer": {
            "tokens": fewer,
            "neighbours": {
                v: t.record() for v, t in neighbour_variants(fewer, rank, dropout_p, dtype).items()
            },
            "head": {str(WIDTH): head_variants(fewer, WIDTH, dtype)},
        },
        "layers": by_layer,
        **record.header(),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Variants with launches, MB and the ratio of bytes to the bound, or to the first."""
    least = next(iter(rows.values()))["bytes"]
    lines = [f"{'':14}{'launches':>9}{'MB':>9}{'x bound':>9}{'saved MB':>10}"]
    for variant, row in rows.items():
        ratio, megabytes, saved = row["bytes"] / least, row["bytes"] / 1e6, row["saved_bytes"] / 1e6
        products = f"{row['teraflops']:10.2f} TFLOP" if "teraflops" in row else ""
        lines.append(f"{variant:14}{row['launches']:9}{megabytes:9.1f}{ratio:9.2f}{saved:10.1f}{products}")
    return "\n".join(lines)


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1, help="of LoRA")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    result = measure(args.tokens, args.rank, args.dropout, args.dtype)
    whole = ((name, result[name]) for name in ("block", "neighbours", "adapter"))
    heads = ((f"head of width {width}", rows) for width, rows in result["head"].items())
    many = (f"a block for {ADAPTERS} adapters", result["many"])
    for name, rows in [*result["layers"].items(), *whole, many, *heads]:
        print(f"\n{name}\n{table(rows)}")
    if args.json:
        record.write(args.json, result)


if __name__ == "__main__":
    main()
