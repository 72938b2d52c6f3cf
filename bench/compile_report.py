"""Compile every shipped kernel configuration to machine code, without a GPU, and read back what it costs.

    python bench/compile_report.py [--arch 80,86,89,90,100,120] [--kernel NAME] [--variant WORD] [--json FILE]

For each architecture and kernel: registers a thread, spill loads and stores, shared memory of a block against the
limit, tensor-core instructions in the main loop, blocks a multiprocessor holds. For the GEMM also the length of
its main loop over that of a plain Triton matmul with the same tile: what fusing costs the loop.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no machine code

import checkout  # noqa: F401
import torch
import triton
import triton.language as tl
from cases import VOCABULARY as V
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpeft.kernels import bottleneck, dropout, launch, layer_norm, lm_head, tile_table, tiling
from fastpeft.kernels.blocks import ticket_count
from fastpeft.kernels.dropout import Dropout
from fastpeft.kernels.gradients import Gradients
from fastpeft.kernels.groups import Groups
from fastpeft.kernels.linear import Epilogue, Linear
from fastpeft.kernels.shrink import Shrink

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
MMA = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
ARCHITECTURES = {a.name: a for a in tile_table.ARCHITECTURES}
RANKS = (16, 32, 64, 128, 256)
LAYOUTS = ("", " transposed")  # of W: forward, and as dx takes it
EXTREMES = (16, 256)  # where rank picks no tile; the GEMM takes 16 ranks at a time: one step, or a loop
M, K, N = 8192, 768, 2304  # c_attn of GPT-2 over 8192 tokens; only divisibility by 16 matters to the code


class Case(NamedTuple):
    """One configuration of one kernel; `dtype` is x's and, where they differ, the factors'."""

    kernel: str
    arch: int
    dtype: str
    tile: tuple[int, ...]
    rank: int
    variant: str = ""

    @property
    def config(self) -> str:
        *block, warps, stages = self.tile
        return " ".join(
            ("x".join(map(str, block)), f"w{warps}", f"s{stages}", f"r{self.rank}", self.variant)
        ).strip()


def cases(arch: int) -> Iterator[Case]:
    """Every configuration that tiling.py may choose on sm_`arch`, with each dtype that changes its code."""
    mixed = "bf16+fp32"  # float32 factors on a bfloat16 base: peft's default, and the costliest
    for form in ("pointer", "descriptor") if arch >= 90 else ("pointer",):
        for tile in tile_table.LINEAR[arch]["split"]:
            yield from (Case("linear", arch, mixed, tile, r, f"{form} split") for r in EXTREMES)
            yield Case("linear", arch, "fp16", tile, 16, f"{form} split")
            yield Case("linear", arch, "bf16", tile, 16, f"{form} split transposed")
        for tile in tile_table.LINEAR[arch]["dropout"]:
            yield from (Case("linear", arch, mixed, tile, r, f"{form} dropout transposed") for r in EXTREMES)
            yield Case("linear", arch, "fp16", tile, 16, f"{form} dropout transposed")
        for tile in tile_table.linear_tiles(arch, form, "split", epilogue=True):
            yield Case("linear", arch, mixed, tile, 16, f"{form} split gelu")
            yield Case("linear", arch, mixed, tile, 16, f"{form} split gelu alone")
            yield Case("linear", arch, mixed, tile, 16, f"{form} split residual")
        for variant in ("split", "dropout"):
            for tile in tile_table.linear_tiles(arch, form, variant, epilogue=True, derivative=True):
                yield Case("linear", arch, mixed, tile, 16, f"{form} {variant} transposed gelu")
        for tile in tile_table.linear_tiles(arch, form, "dropout", epilogue=True):
            yield Case("linear", arch, mixed, tile, 16, f"{form} dropout residual")
    for variant, layouts in (("single", LAYOUTS), ("single dropout", (" transposed",))):
        for tile, layout in itertools.product(tile_table.LINEAR[arch].get(variant, ()), layouts):
            for rank in (r for r in RANKS if tiling.single_pays(r, tile)):  # the factor is rounded beforehand
                yield Case("linear", arch, "bf16", tile, rank, f"pointer {variant}{layout}")
            yield Case("linear", arch, "fp16", tile, 16, f"pointer {variant}{layout}")
        for tile in tile_table.linear_tiles(arch, "pointer", variant, epilogue=True):
            yield from (Case("linear", arch, "bf16", tile, 16, f"pointer {variant}{l} gelu") for l in layouts)
            yield Case("linear", arch, "bf16", tile, 16, f"pointer {variant} residual")
            if variant == "single":  # without dropout: a forward's
                yield Case("linear", arch, "bf16", tile, 16, f"pointer {variant} gelu alone")
    yield from head_cases(arch)
    yield from grouped_cases(arch)
    for dtype in ("bf16", "fp16", "fp32"):
        yield Case("dropout", arch, dtype, dropout.STRIP, 0)
        for width in (1024, 2048):
            strip = (layer_norm.ELEMENTS // width, width, 4, 1)
            yield Case("layer_norm_backward", arch, dtype, strip, 0)
    for rank, strip in tile_table.LAYER_NORM_SHRINK.items():
        yield Case("layer_norm_shrink", arch, mixed, strip, rank, "dropout")
        yield Case("layer_norm_shrink", arch, "fp16", strip, rank)
    for rank in RANKS:
        for strip in tile_table.SHRINK[rank]:
            yield Case("shrink", arch, mixed, strip, rank, "dropout")
            yield Case("shrink", arch, "fp16", strip, rank)
        yield Case("gradient", arch, "bf16", tile_table.GRADIENT[rank], rank, "dropout")
        yield Case("gradient", arch, "bf16", tile_table.GRADIENT[rank], rank, "dropout gelu")
        yield Case("gradient", arch, "fp16", tile_table.GRADIENT[rank], rank)
        for strip in tile_table.ADAPTER[rank]:
            for kernel in ("adapter_forward", "adapter_backward"):
                yield Case(kernel, arch, mixed, strip, rank, "gelu")
            yield Case("adapter_forward", arch, "fp16", strip, rank, "silu")
            yield Case("adapter_forward", arch, mixed, strip, rank, "gelu residual")
        yield from (
            Case("adapter_gradient", arch, d, tile_table.ADAPTER_GRADIENT[rank], rank)
            for d in ("bf16", "fp16")
        )
    for kernel in ("adapter_forward", "adapter_backward"):
        for activation in ("relu", "gelu_tanh", "silu"):
            yield Case(kernel, arch, "bf16", tile_table.ADAPTER[64][0], 64, activation)
    for precision in ("tf32",) if arch == 100 else ("tf32", "fp32"):
        for rank in tile_table.LAYER_NORM_SHRINK:
            yield Case(
                "layer_norm_shrink", arch, precision, tile_table.LAYER_NORM_SHRINK_FLOAT32, rank, "dropout"
            )
        for rank in EXTREMES:
            for tile in tile_table.linear_tiles_float32(arch, precision == "tf32", epilogue=False):
                yield Case("linear", arch, precision, tile, rank, "pointer split")
                yield Case("linear", arch, precision, tile, rank, "pointer dropout transposed")
            for tile in tile_table.linear_tiles_float32(arch, precision == "tf32", epilogue=True):
                yield Case("linear", arch, precision, tile, rank, "pointer split gelu")
                yield Case("linear", arch, precision, tile, rank, "pointer split gelu alone")
                yield Case("linear", arch, precision, tile, rank, "pointer dropout transposed gelu")
                yield Case("linear", arch, precision, tile, rank, "pointer dropout residual")
            yield Case("shrink", arch, precision, tile_table.SHRINK_FLOAT32, rank, "dropout")
            yield Case("gradient", arch, precision, tile_table.GRADIENT_FLOAT32, rank, "dropout")
            yield Case("gradient", arch, precision, tile_table.GRADIENT_FLOAT32, rank, "dropout gelu")
            yield Case("adapter_forward", arch, precision, tile_table.ADAPTER_FLOAT32, rank, "gelu")
            yield Case("adapter_forward", arch, precision, tile_table.ADAPTER_FLOAT32, rank, "gelu residual")
            yield Case("adapter_backward", arch, precision, tile_table.ADAPTER_FLOAT32, rank, "gelu")
            yield Case("adapter_gradient", arch, precision, tile_table.ADAPTER_GRADIENT_FLOAT32, rank)


def grouped_cases(arch: int) -> Iterator[Case]:
    """The configurations for rows of many adapters; their ranks pick no code but that of the rank-r passes."""
    mixed, forms = "bf16+fp32", ("pointer", "descriptor") if arch >= 90 else ("pointer",)
    for form, variant in itertools.product(forms, ("split", "dropout")):
        plain = f"{form} {variant}" + (" transposed" if variant == "dropout" else "")
        tiles = functools.partial(tile_table.linear_tiles, arch, form, variant, grouped=True)
        for tile in tiles(epilogue=False):
            yield Case("linear", arch, mixed, tile, 16, f"{plain} grouped")
        for tile in tiles(epilogue=True):
            epilogue = "gelu" if variant == "split" else "residual"  # which adds the drawing of a mask
            yield Case("linear", arch, mixed, tile, 16, f"{form} {variant} {epilogue} grouped")
        for tile in tiles(epilogue=True, derivative=True):
            yield Case("linear", arch, mixed, tile, 16, f"{form} {variant} transposed gelu grouped")
    for rank in RANKS:
        yield Case("shrink", arch, mixed, tile_table.SHRINK_GROUPED[rank], rank, "dropout grouped")
        yield Case("gradient", arch, "bf16", tile_table.GRADIENT_GROUPED[rank], rank, "dropout gelu grouped")
    for precision in ("tf32",) if arch == 100 else ("tf32", "fp32"):
        for tile in tile_table.linear_tiles_float32(arch, precision == "tf32", epilogue=True, grouped=True):
            for variant in ("split gelu", "dropout transposed gelu", "dropout residual"):
                yield Case("linear", arch, precision, tile, 16, f"pointer {variant} grouped")
        for rank in EXTREMES:
            strip = tile_table.SHRINK_FLOAT32_GROUPED[rank]
            yield Case("shrink", arch, precision, strip, rank, "dropout grouped")
            gradient = tile_table.GRADIENT_FLOAT32_GROUPED
            yield Case("gradient", arch, precision, gradient, rank, "dropout gelu grouped")


def head_cases(arch: int) -> Iterator[Case]:
    """The configurations of the language model's head: all in the first form, and the costliest in the others."""
    forms = ("descriptor", "pointer") if arch >= 90 else ("pointer",)
    kinds = [*(("bf16", form) for form in forms), ("fp16", forms[0])]
    kinds += [(precision, "pointer") for precision in (("tf32",) if arch == 100 else ("tf32", "fp32"))]
    for i, (dtype, form) in enumerate(kinds):
        tiles = tile_table.head_tiles(arch, form == "descriptor", dtype.endswith("32"))
        for tile, variant in itertools.product(
            tiles["logits"], ("", " stored", " stored smoothed")[2 * (i > 0) :]
        ):
            yield Case("head_logits", arch, dtype, tile, 0, form + variant)
        for tile, variant in itertools.product(tiles["gradient"], ("", " runs", " smoothed")[2 * (i > 0) :]):
            yield Case("head_gradient", arch, dtype, tile, 0, form + variant)
    yield Case("head_loss", arch, "fp32", (lm_head.LOSS_ROWS, 32, 4, 1), 0, "smoothed")


def recorded(case: Case) -> launch.Launch:
    """The launch of the case's kernel, on tensors that exist in shape only."""
    dtype, _, factors = case.dtype.partition("+")
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"

    def rows(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=names[dtype], device="meta")

    def factor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=names[factors or dtype], device="meta")

    rank, drop, gelu = case.rank, "dropout" in case.variant, "gelu" in case.variant.split()
    grouped = meta_groups() if "grouped" in case.variant else None
    many = () if grouped is None else (len(grouped.ranks),)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    mask = Dropout(0.1, seed) if drop else None
    tickets = seed.new_empty(ticket_count(60), dtype=torch.int32)
    weights = factor(rank, K), factor(K, rank)
    with launch.record() as launches:
        if case.kernel == "linear":
            form, variant = case.variant.split()[:2]
            how = tiling.Linear(tile_table.Tile(*case.tile), form == "descriptor", variant == "single", 132)
            given: dict[str, Any] = {}
            kind: dict[str, Any] = {"drops": drop, "tickets": len(tickets)}
            if "transposed" in case.variant:  # dx
                given |= {"a": rows(N, rank).T} if how.single else {"u": rows(M, rank)}
                epilogue = Epilogue(pre=rows(M, K) if gelu else None)
                operands = rows(M, N), rows(K, N).T, None, factor(*many, rank, K)
            else:
                given |= {"a": rows(rank, K)} if how.single else {"u": rows(M, rank)}
                stores = "h" if "alone" in case.variant else "yh" if gelu else "y"
                residual = rows(M, N) if "residual" in case.variant else None
                epilogue = Epilogue(stores, residual=residual)
                operands = rows(M, K), rows(K, N), rows(N), factor(*many, N, rank).mT
            kind |= {"epilogue": epilogue, "a": given.get("a")}
            given |= {"epilogue": epilogue, "dropout": mask, "tickets": tickets, "groups": grouped}
            Linear(*operands, how, **kind)(*operands, 2.0, **given)
        elif case.kernel.startswith("head"):
            form = case.variant.split()
            smoothing = 0.1 if "smoothed" in form else 0.0
            tile = (
                tile_table.HEAD_FLOAT32["logits"][0]
                if case.kernel == "head_loss"
                else tile_table.Tile(*case.tile)
            )
            how = tiling.Linear(tile, "descriptor" in form, False, 132)
            labels, weight = torch.empty(M, dtype=torch.int64, device="meta"), rows(V, K)
            losses = torch.empty(M, dtype=torch.float32, device="meta")
            if case.kernel == "head_gradient":
                logits = rows(M, -(-V // tiling.HEAD_ALIGNED) * tiling.HEAD_ALIGNED)
                runs = 2 if "runs" in form else 1
                lm_head.head_gradient(logits, losses, weight, labels, smoothing, rows(M, K), how, runs)
            else:
                given = rows(M, K), weight, labels, smoothing, rows(V), losses
                lm_head.head_losses(*given, "stored" in form, how)
        elif case.kernel == "shrink":
            operands = rows(M, K), factor(*many, rank, K).mT
            prepared = Shrink(*operands, tile_table.Strip(*case.tile), drops=drop)
            prepared(*operands, mask, groups=grouped)
        elif case.kernel == "dropout":
            dropout.dropped(rows(M, K), 0.1, seed)
        elif case.kernel == "layer_norm_shrink":
            norm = rows(K), rows(K), 1e-5
            layer_norm.shrink(rows(M, K), *norm, weights[0], mask)
        elif case.kernel == "layer_norm_backward":
            wide = rows(M, case.tile[1] * 3 // 4)
            layer_norm.backward(wide, wide, wide[0], wide, 1e-5)
        elif case.kernel == "gradient":
            dy, xa, x, dxa = rows(M, N), rows(M, rank), rows(M, K), rows(M, rank)
            d_b, d_a = factor(*many, N, rank), factor(*many, rank, K)
            kind = {"drops": drop, "activated": gelu, "grouped": grouped is not None}
            gradients = Gradients(dy, x, rank, d_b.dtype, d_a.dtype, **kind, splits=16)
            gradients(dy, xa, x, dxa, d_b, d_a, 2.0, tickets, mask, grouped)
        elif case.kernel == "adapter_forward":
            strip = tile_table.Strip(*case.tile)
            activation, *more = case.variant.split()
            residual = rows(M, K) if more else None
            biases = factor(rank), factor(K)
            some = (rows(M, K), weights[0], biases[0], weights[1], biases[1], activation, 1.0, residual)
            bottleneck.forward(*some, strip)
        else:
            strip = tile_table.Strip(*case.tile)
            some = (rows(M, K), rows(M, K), *weights, rows(M, rank), case.variant, 1.0, torch.float32, True)
            if case.kernel == "adapter_backward":
                bottleneck.backward(*some, False, strip)
            else:
                bottleneck.backward(*some, True, strip, strip, 16)
    wanted = f"{case.kernel}_kernel"
    return next(each for each in launches if each.kernel.__name__.replace("_descriptor", "") == wanted)


def meta_groups() -> Groups:
    """Eight adapters that all drop, in shape only."""
    each, more = (
        torch.empty(8, dtype=torch.int32, device="meta"),
        torch.empty(M, dtype=torch.int32, device="meta"),
    )
    return Groups(more, more[:9], each, each.to(torch.float32), each.clone())


def source(recorded: launch.Launch) -> ASTSource:
    """What Triton would compile for this launch: types, and the values it specialises on."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(recorded.kernel.params):
        value = recorded.args[parameter.name]
        kind, divisible = "constexpr", False
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            kind, divisible = f"*{DTYPES[value.dtype]}", True
        elif isinstance(value, float):
            kind = "fp32"
        elif isinstance(value, int):
            kind, divisible = "i32" if value < 2**31 else "i64", value % 16 == 0 and specialised
        else:  # a tensor descriptor
            kind = f"tensordesc<{DTYPES[value.base.dtype]}{value.block_shape}>".replace(" ", "")
        signature[parameter.name] = kind
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(recorded.kernel, signature=signature, constexprs=constants, attrs=attributes)


class Code(NamedTuple):
    registers: int
    shared_bytes: int
    tensor_memory: int  # columns, of 512
    spill_loads: int
    spill_stores: int
    mma: int  # tensor-core instructions in the main loop
    loop: int  # all instructions in the main loop
    wrong_descriptors: int


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([BIN / name, *arguments], capture_output=True, text=True, check=True).stdout


def machine_code(recorded: launch.Launch, arch: int) -> Code:
    """Compile a recorded launch for sm_`arch` and read its machine code."""
    compiled = triton.compile(source(recorded), target=GPUTarget("cuda", arch, 32), options=recorded.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        text = _tool("nvdisasm", "-c", cubin.name)
    loop = main_loop(text)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Code(
        registers=int(registers[1]),
        shared_bytes=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        spill_loads=len(re.findall(r"\bLDL\b", text)),
        spill_stores=len(re.findall(r"\bSTL\b", text)),
        mma=sum(bool(MMA.search(i)) for i in loop),
        loop=len(loop),
        wrong_descriptors=wrong_descriptors(text),
    )


def wrong_descriptors(disassembly: str) -> int:
    """Descriptors of wgmma operands whose high half was added to something else than zero.

    So ptxas 12.8 does where two operands of different layouts lie at the same place of a block's shared memory, one
    after the other: it takes the memory's address for the zero. All but the first step of the second read elsewhere.
    """
    found, last = 0, dict[str, str]()
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", disassembly):
        name, _, operands = re.sub(r"^@!?\w+\s+", "", instruction).partition(" ")
        written = re.search(r"UR\d+", operands)
        wide = re.match(r"UR\d+, (UR\d+), -?0x[0-9a-f]{8},", operands) if name == "UIADD3.X" else None
        found += wide is not None and "URZ" not in last.get(wide[1], "")
        if written and name.startswith(("U", "R2UR", "S2UR")):
            last[written[0]] = instruction
    return found


def main_loop(disassembly: str) -> list[str]:
    """The instructions of the innermost loop with the most tensor-core work; the longest where none has any."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in disassembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            instructions.append(instruction[1])
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(instructions)))
    work = {(a, b): sum(bool(MMA.search(i)) for i in instructions[a:b]) for a, b in loops if b - a > 8}
    inner = [
        (a, b) for a, b in work if work[a, b] and not any(a <= c and d < b and work[c, d] for c, d in work)
    ]
    # A wait that is retried out of line jumps back into the loop from far behind it: the shorter of two is the loop.
    first, last = (
        max(inner, key=lambda loop: (work[loop], loop[0] - loop[1]))
        if inner
        else max(work, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    )
    return instructions[first:last]


@triton.jit
def plain_kernel(
    x_ptr, w_ptr, y_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_wk, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """`y = x w` and nothing else, one tile a program: the yardstick of the main loop."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def plain_descriptor_kernel(
    x_desc, w_desc, y_desc,
    M, N, K,
    W_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """`plain_kernel` with tensor descriptors and a persistent grid."""
    num_pid_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * num_pid_n, tl.num_programs(0)):
        start_m, start_n = tile // num_pid_n * BLOCK_M, tile % num_pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            w = w_desc.load([start_n, k]).T if W_TRANSPOSED else w_desc.load([k, start_n])
            acc = tl.dot(x_desc.load([start_m, k]), w, acc, input_precision=INPUT_PRECISION)
        y_desc.store([start_m, start_n], acc.to(y_desc.dtype))


@functools.cache
def plain_loop(
    arch: int, dtype: torch.dtype, tile: tuple[int, ...], descriptor: bool, transposed: bool, precision: str
) -> int:
    """Instructions in the main loop of a plain Triton matmul."""
    block_m, block_n, block_k, num_warps, num_stages = tile
    n, k = (K, N) if transposed else (N, K)
    x, y = (torch.empty(M, columns, dtype=dtype, device="meta") for columns in (k, n))
    stored = torch.empty((n, k) if transposed else (k, n), dtype=dtype, device="meta")
    args: dict[str, Any] = {"M": M, "N": n, "K": k, "INPUT_PRECISION": precision}
    args |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    if descriptor:
        block = [block_n, block_k] if transposed else [block_k, block_n]
        args |= {
            "x_desc": TensorDescriptor.from_tensor(x, [block_m, block_k]),
            "w_desc": TensorDescriptor.from_tensor(stored, block),
            "y_desc": TensorDescriptor.from_tensor(y, [block_m, block_n]),
            "W_TRANSPOSED": transposed,
        }
    else:
        w = stored.T if transposed else stored
        args |= {"x_ptr": x, "w_ptr": w, "y_ptr": y}
        args |= dict(
            zip(("stride_xm", "stride_xk", "stride_wk", "stride_wn"), x.stride() + w.stride(), strict=True)
        )
    kernel = plain_descriptor_kernel if descriptor else plain_kernel
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return machine_code(launch.Launch(kernel, (1,), args, options), arch).loop


def row(case: Case) -> dict[str, Any]:
    """One line of the report."""
    each = recorded(case)
    code = machine_code(each, case.arch)
    ratio = None
    if case.kernel == "linear":
        x = each.args.get("x_ptr", each.args.get("x_desc"))
        dtype = x.dtype if isinstance(x, Tensor) else x.base.dtype
        form = (*case.variant.split(), "")
        descriptor, transposed = form[0] == "descriptor", "transposed" in form
        plain = plain_loop(
            case.arch, dtype, tuple(case.tile), descriptor, transposed, each.args["INPUT_PRECISION"]
        )
        ratio = round(code.loop / plain, 2)
    return {
        "kernel": case.kernel,
        "arch": case.arch,
        "dtype": case.dtype,
        "config": case.config,
        "registers": code.registers,
        "spill_loads": code.spill_loads,
        "spill_stores": code.spill_stores,
        "shared_bytes": code.shared_bytes,
        "shared_limit": ARCHITECTURES[case.arch].shared_limit,
        "tensor_memory": code.tensor_memory,
        "mma": code.mma,
        "blocks": blocks(code, each.options["num_warps"], case.arch),
        "loop_ratio": ratio,
        "wrong_descriptors": code.wrong_descriptors,
    }


def blocks(code: Code, num_warps: int, arch: int) -> int:
    """Blocks that one multiprocessor holds at a time, by registers, shared memory and warps."""
    registers = -(-code.registers // 8) * 8 * 32 * num_warps
    shared = code.shared_bytes + 1024  # the system's share of a block
    most_warps = 64 if arch in (80, 90, 100) else 48
    return min(
        65536 // registers, (ARCHITECTURES[arch].shared_limit + 1024) // shared, most_warps // num_warps
    )


def faults(line: dict[str, Any]) -> list[str]:
    """What a row of the report must not show."""
    found = []
    if line["spill_loads"] or line["spill_stores"]:
        found.append(f"spills {line['spill_loads']}/{line['spill_stores']}")
    if line["shared_bytes"] > line["shared_limit"] or line["tensor_memory"] > 512:
        found.append("over the limit")
    multiplies = line["kernel"] not in ("dropout", "layer_norm_backward", "head_loss")
    if line["dtype"] != "fp32" and multiplies and not line["mma"]:
        found.append("no tensor-core instruction")
    if line["wrong_descriptors"]:
        found.append(f"{line['wrong_descriptors']} wrong descriptors")
    limit = 1.35 if "single" in line["config"] else 1.15
    if line["loop_ratio"] is not None and line["loop_ratio"] > limit:
        found.append(f"loop {line['loop_ratio']}")
    return found


def report(every: list[Case], workers: int) -> Iterator[dict[str, Any]]:
    """The rows of these cases, in order, as they are compiled."""
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(row, every, chunksize=4)


def text(line: dict[str, Any]) -> str:
    """A row as a line of the table."""
    spills = f"{line['spill_loads']}/{line['spill_stores']}"
    shared = f"{line['shared_bytes'] / 1024:.0f}/{line['shared_limit'] // 1024}"
    return (
        f"{line['arch']:<5} {line['kernel']:<16} {line['dtype']:<9} {line['config']:<50} {line['registers']:>4} "
        f"{spills:>7} {shared:>8} {line['mma']:>4} {line['blocks']:>6} {line['loop_ratio'] or '-':>5}  "
        f"{', '.join(faults(line))}"
    ).rstrip()


HEAD = f"{'arch':<5} {'kernel':<16} {'dtype':<9} {'config':<50} {'regs':>4} {'spills':>7} {'KiB':>8} "
HEAD += f"{'mma':>4} {'blocks':>6} {'loop':>5}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile every shipped kernel configuration and read it back."
    )
    parser.add_argument(
        "--arch", default=",".join(map(str, ARCHITECTURES)), help="comma-separated, like 80,90"
    )
    parser.add_argument("--kernel", default="", help="only those whose names begin so")
    parser.add_argument("--variant", default="", help="only those whose variant has this word")
    parser.add_argument(
        "--json", type=Path, help="also write the rows there, in place of those it has of these"
    )
    parser.add_argument("--workers", type=int, default=2, help="compilations at a time")
    arguments = parser.parse_args()
    rows = []
    print(HEAD)
    archs = [int(arch) for arch in arguments.arch.split(",")]

    def chosen(arch: int, kernel: str, config: str) -> bool:
        asked = kernel.startswith(arguments.kernel) and arguments.variant in ("", *config.split())
        return asked and arch in archs

    every = [case for arch in archs for case in cases(arch) if chosen(arch, case.kernel, case.config)]
    for line in report(every, arguments.workers):
        rows.append(line)
        print(text(line), flush=True)
    bad = sum(bool(faults(line)) for line in rows)
    print(f"{len(rows)} configurations, {bad} with a fault; triton {triton.__version__}")
    if arguments.json:
        found = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
        rows = [r for r in found if not chosen(r["arch"], r["kernel"], r["config"])] + rows
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
