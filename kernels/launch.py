"""One place from which every kernel is launched, and where it is decided whether a call's kernels can run at all."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

#: Whether Triton interprets kernels instead of compiling them (TRITON_INTERPRET=1, set before this import).
INTERPRETED = triton.knobs.runtime.interpret


class Launch(NamedTuple):
    """A kernel with its grid, its arguments by name, and how it is compiled (num_warps, num_stages)."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], num_warps: int, num_stages: int) -> None:
    """Run `kernel` over `grid`; under `record`, only note that it would run."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    launches = _recorded.get()
    if launches is None:
        kernel[grid](**args, **options)
    else:
        launches.append(Launch(kernel, grid, args, options))


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Within it launchers allocate and return as usual, but no kernel runs: the list collects the launches."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def unsupported_device(x: Tensor) -> str | None:
    """Why Triton can't run where `x` is; None where it can."""
    if x.device.type == "cpu":
        return None if INTERPRETED else "tensors on the CPU need TRITON_INTERPRET=1, set before fastpeft's kernels load"
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels run on NVIDIA GPUs, not on {x.device.type}"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major < 8:
        return f"the kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


def _is_compile_failure(error: Exception) -> bool:
    """Whether `error` says that a kernel can't be built for this device, rather than that CUDA failed."""
    if isinstance(error, (CompilationError, OutOfResources, PTXASError, subprocess.CalledProcessError)):
        return True
    named = ("PassManager::run failed", "Failed to find C compiler", "failed to translate module to LLVM IR")
    return isinstance(error, RuntimeError) and any(name in str(error) for name in named)


_failures: dict[Hashable, str | None] = {}


def build(key: Hashable, call: Callable[[], object]) -> str | None:
    """Compile and load every kernel that `call` launches, running none: None, or why one can't be built.

    Remembered by `key`; a failure warns once. Errors other than a failed build are raised as they are.
    """
    if INTERPRETED:
        return None
    if key not in _failures:
        _failures[key] = None
        with record() as launches:
            call()
        for kernel, grid, args, options in launches:
            try:
                kernel.warmup(grid=grid, **args, **options).run  # noqa: B018 - loads the module, or says what it lacks
            except Exception as error:
                if not _is_compile_failure(error):
                    del _failures[key]
                    raise
                cause = str(error).strip().splitlines() or [""]
                _failures[key] = f"{kernel.__name__} can't be built here: {type(error).__name__}: {cause[-1]}"
                warnings.warn(f"fastpeft uses PyTorch instead of Triton: {_failures[key]}", stacklevel=3)
                break
    return _failures[key]
