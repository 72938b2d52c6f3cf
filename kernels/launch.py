"""Where every kernel is launched from, and where it is decided whether a call's kernels can run at all."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.knobs import HookChain
from triton.runtime._async_compile import AsyncCompileMode, FutureKernel
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources, PTXASError

from .memo import Memo

_log = logging.getLogger("fastpeft")

#: Whether Triton interprets kernels instead of compiling them (TRITON_INTERPRET=1, set before this import).
INTERPRETED = triton.knobs.runtime.interpret


#: What the kernels multiply; parameters may also be wider than x.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_RANK = 256


class Launch(NamedTuple):
    """A kernel with its grid, its arguments by name, and how it is compiled (num_warps, num_stages)."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def _options(num_warps: int, num_stages: int) -> dict[str, Any]:
    # Fusing products with sums is Triton's default up to 3.9, which warns that it won't be later.
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], num_warps: int, num_stages: int) -> None:
    """Run `kernel` over `grid`; under `record`, only note that it would run."""
    options = _options(num_warps, num_stages)
    launches = _recorded.get()
    if launches is None:
        kernel[grid](**args, **options)
    else:
        launches.append(Launch(kernel, grid, args, options))


#: Pointers to what torch has just allocated, which is aligned.
_FRESH = {
    f"{name}_ptr"
    for name in "u y h xa z dz dx dxa da db out partials parts sums lse losses logits tickets seed".split()  # noqa: SIM905
}


class Launcher:
    """A kernel with the arguments that stay as they are; the others come with each call.

    It is compiled at the first call, and from then on launched without Triton's binder, which takes the host longer
    than all else in a call. What a kernel is specialised on is either among the arguments that stay, and so in its key
    in `launchers`, or excluded from specialisation (`do_not_specialize`); where a pointer isn't 16 bytes aligned, the
    binder decides.
    """

    def __init__(
        self, kernel: Any, changing: tuple[str, ...], staying: dict[str, Any], num_warps: int, num_stages: int
    ) -> None:
        self._kernel, self._how = kernel, (num_warps, num_stages)
        self._names = kernel.arg_names
        given = [*changing, *(name for name in self._names if name not in changing)]
        self._staying = [staying.get(name) for name in given[len(changing) :]]
        self._in_order = itemgetter(*map(given.index, self._names))
        self._pointers = [
            i for i, name in enumerate(changing) if name.endswith("_ptr") and name not in _FRESH
        ]
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *changing: Any) -> None:
        """Launch over `grid`, with what changes in the order in which it was named."""
        arguments = self._in_order((*changing, *self._staying))
        pointers = 0
        for i in self._pointers:
            pointer = changing[i]
            if pointer is not None:
                pointers |= pointer.data_ptr()
        if INTERPRETED or _recorded.get() is not None:
            launch(self._kernel, grid, dict(zip(self._names, arguments, strict=True)), *self._how)
        elif self._compiled is None or pointers % 16:
            compiled = self._kernel[grid](*arguments, **_options(*self._how))
            self._compiled = None if pointers % 16 else compiled
        else:
            _run(self._compiled, grid, arguments)


def _run(compiled: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
    """`compiled[grid](*arguments)`, without what it prepares for launch hooks where there are none."""
    runtime = triton.knobs.runtime
    if _no_hooks(runtime.launch_enter_hook) and _no_hooks(runtime.launch_exit_hook):
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    else:
        compiled[grid](*arguments)


def _no_hooks(hook: Any) -> bool:
    return hook is None or (type(hook) is HookChain and not hook.calls)


#: Launchers by what their kernels are specialised on: a few for each kind of layer, whatever the number of rows.
launchers = Memo(1024)


def fixed(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """Of operands (M, columns), or factors and weights, what doesn't change with the number of rows."""
    return tuple(t if t is None else (t.dtype, t.get_device(), t.stride()) for t in tensors)


def recording() -> bool:
    """Whether launches are only being noted."""
    return _recorded.get() is not None


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Within it launchers work as usual, but kernels don't run: the list collects the launches."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        # CUDA's backward runs in a thread of autograd's own, which sees no context variable, unless told to stay here.
        with torch.autograd.set_multithreading_enabled(False):
            yield launches
    finally:
        _recorded.reset(token)


def unsupported(x: Tensor, rank: int, *others: Tensor | None) -> str | None:
    """Why no kernel serves rows `x` with this rank (or bottleneck) and these other tensors; else None."""
    for tensor in (x, *others):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"no kernel for {tensor.dtype}"
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}, the most a kernel holds in registers"
    reason = unsupported_device(x.device)
    if reason is None and x.is_cuda and _capability(x.device)[0] == 10 and x.dtype == torch.float32:
        return None if tf32_allowed() else "Triton has only TF32 for float32 on compute capability 10.x"
    return reason


def better_by_cublas(x: Tensor) -> str | None:
    """Why torch's own products had better serve rows x, though kernels could; else None.

    On an H100 cuBLAS was quicker at every shape of GPT-2's that was tried, and so was a step of peft's.
    """
    if x.is_cuda and x.dtype == torch.float32 and not tf32_allowed():
        return "float32 without TF32, which cuBLAS multiplies faster"
    return None


def unsupported_device(device: torch.device) -> str | None:
    """Why Triton can't run on `device`; None where it can."""
    if device.type == "cpu":
        return None if INTERPRETED else "on the CPU Triton needs TRITON_INTERPRET=1, set before its first use"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are for NVIDIA GPUs, not {device.type}"
    major, minor = _capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


_capabilities: dict[torch.device, tuple[int, int]] = {}


def _capability(device: torch.device) -> tuple[int, int]:
    if device not in _capabilities:  # remembered by hand: Dynamo warns at functools.cache
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


def tf32_allowed() -> bool:
    """Whether torch is set to multiply float32 matrices as TF32 on CUDA."""
    if _precision is not None:  # torch's own attribute takes ten times as long
        return _precision("cuda", "matmul") == "tf32"
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def eager(x: Tensor) -> bool:
    """Whether a call on x runs as it is written: not traced, nor on tensors of a class that must see operators."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def differentiated() -> bool:
    """Whether the backward pass that runs now is differentiated in turn, or mapped over: operators refuse that."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


_ONCE = "fastpeft's operations are differentiable once: unpatch the model for second derivatives"


def differentiable_once(operator: Any) -> None:
    """Make a second derivative through the custom operator of a backward pass an error that says so."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(_ONCE)

    operator.register_autograd(refuse)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Any], *tensors: Tensor | None) -> Any:  # type: ignore[override]
        return compute(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(_ONCE)


def once_differentiable(compute: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """`compute(*tensors)`, through which a derivative is an error that says so; so is mapping over it."""
    return _Once.apply(compute, *tensors)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's GPU current: Triton launches there."""
    return _HERE if x.get_device() <= 0 and _gpus() <= 1 else torch.cuda.device_of(x)


_HERE = nullcontext()
_counted: list[int] = []


def _gpus() -> int:
    if not _counted:
        _counted.append(torch.cuda.device_count())
    return _counted[0]


def describe(*tensors: Tensor | None, rows: bool = False) -> tuple[Hashable, ...]:
    """All of the tensors that a kernel is specialised on; of `rows` that isn't how many they are."""
    return tuple(
        t if t is None else (t.dtype, t.device, t.shape[rows:], t.stride(), t.data_ptr() % 16)
        for t in tensors
    )


#: What building a kernel raises where the device can't run it, or its tools are missing.
BUILD_FAILURES = (CompilationError, OutOfResources, PTXASError, subprocess.CalledProcessError)


def _is_build_failure(error: Exception) -> bool:
    """Whether `error` says that a kernel can't be built for this device, rather than that CUDA failed."""
    if isinstance(error, BUILD_FAILURES):
        return True
    named = ("PassManager::run failed", "Failed to find C compiler", "failed to translate module to LLVM IR")
    return isinstance(error, RuntimeError) and any(name in str(error) for name in named)


_failures: dict[Hashable, str | None] = {}


def build(key: Hashable, x: Tensor, call: Callable[[], object]) -> str | None:
    """Compile and load every kernel that `call` launches, running none: None, or why one can't be built.

    Remembered by `key`; a failure warns once. Errors other than a failed build are raised as they are.
    """
    if INTERPRETED:
        return None
    key = (key, tf32_allowed())
    if key not in _failures:
        with on_device_of(x):
            with record() as launches:
                call()
            if len(launches) > 1:
                _compile_at_once(launches)
            _failures[key] = next((reason for each in launches if (reason := _why_not_built(each))), None)
        if _failures[key]:
            warnings.warn(f"fastpeft uses PyTorch instead of Triton: {_failures[key]}", stacklevel=3)
    return _failures[key]


_SILENT = 2.0  # seconds of compiling, after which a line says what is being waited for


def _compile_at_once(launches: list[Launch]) -> None:
    """Compile what the launches need side by side; what fails is left for who builds it to say why."""
    said = threading.Timer(
        _SILENT, _log.warning, ("compiling kernels for this GPU; Triton's cache keeps them",)
    )
    said.daemon = True
    said.start()
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for each in launches:
                each.kernel.warmup(grid=each.grid, **each.args, **each.options)
    finally:
        said.cancel()


def _why_not_built(each: Launch) -> str | None:
    """Compile the kernel of a launch and load it on the current device; what that lacked, or None."""
    try:
        compiled = each.kernel.warmup(grid=each.grid, **each.args, **each.options)
        if isinstance(compiled, FutureKernel):
            compiled = compiled.result()  # of a build that failed beside others: raises what that raised
        # Loads the module, or raises for want of shared memory, tensor memory or threads: at every look, where
        # `compiled.run` raises at the first alone.
        _ = compiled[each.grid]
    except Exception as error:
        if not _is_build_failure(error):
            raise
        cause = str(error).strip().splitlines() or [""]
        return f"{each.kernel.__name__} can't be built here: {type(error).__name__}: {cause[-1]}"
    return None
