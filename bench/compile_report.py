"""Compile every shipped kernel configuration to machine code, without a GPU, and read back what it costs.

    python bench/compile_report.py [--arch 80,86,89,90,100,120] [--json FILE]

For each architecture and kernel: registers a thread, spill loads and stores, shared memory of a block, tensor-core
instructions in the main loop, blocks a multiprocessor can hold. For the GEMM also its main loop's length over
that of a plain Triton matmul with the same tile: what fusing costs the loop.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no machine code

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpeft.kernels import launch, lora_linear, tiling

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
MMA = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")


def source(recorded: launch.Launch) -> ASTSource:
    """What Triton would compile for this launch: types, and the values it specialises on."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(recorded.kernel.params):
        value = recorded.args[parameter.name]
        kind, divisible = "constexpr", False
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            kind, divisible = f"*{DTYPES[value.dtype]}", True
        elif isinstance(value, float):
            kind = "fp32"
        elif isinstance(value, int):
            kind, divisible = "i32" if value < 2**31 else "i64", value % 16 == 0
        else:  # a tensor descriptor
            kind = f"tensordesc<{DTYPES[value.base.dtype]}{value.block_shape}>".replace(" ", "")
        signature[parameter.name] = kind
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(recorded.kernel, signature=signature, constexprs=constants, attrs=attributes)


class Code(NamedTuple):
    registers: int
    shared_bytes: int
    spill_loads: int
    spill_stores: int
    mma: int  # tensor-core instructions in the main loop
    loop: int  # all instructions in the main loop


def machine_code(recorded: launch.Launch, arch: int) -> Code:
    """Compile a recorded launch for sm_`arch` and read its machine code."""
    compiled = triton.compile(source(recorded), target=GPUTarget("cuda", arch, 32), options=recorded.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        )
        text = subprocess.run(
            [BIN / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    loop = main_loop(text)
    return Code(
        registers=int(re.search(r"REG:(\d+)", usage.stdout)[1]),
        shared_bytes=compiled.metadata.shared,
        spill_loads=len(re.findall(r"\bLDL\b", text)),
        spill_stores=len(re.findall(r"\bSTL\b", text)),
        mma=sum(bool(MMA.search(i)) for i in loop),
        loop=len(loop),
    )


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
    bodies = [instructions[a:b] for a, b in loops if b - a > 8]
    weighed = [(sum(bool(MMA.search(i)) for i in body), body) for body in bodies]
    with_mma = [body for mma, body in weighed if mma]
    return min(with_mma, key=len) if with_mma else max(bodies, key=len, default=[])
