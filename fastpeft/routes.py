"""Which implementation serves a call, and what is remembered of that for the next of its kind."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor
from torch.autograd import forward_ad

from fastpeft.backends import BACKENDS
from fastpeft.kernels.memo import Memo
from fastpeft.kernels.rows import rows_in


class Route(NamedTuple):
    """Which implementation serves a call, `triton` or `torch`, and why."""

    path: str
    reason: str


class Options(NamedTuple):
    """What the user asks of a call, or of all calls of a patched model."""

    backend: str = "auto"
    exact: bool = False  # peft's own masks and precision, by torch
    strict: bool = False  # a kernel that can't be built is an error


FUSED = Route("triton", "fused kernels")


def choose(options: Options, device: torch.device) -> Route:
    """The route that calls on `device` take, as far as the device decides it.

    Raises ValueError for an unknown backend, or where `backend="triton"` can't run there.
    """
    backend, exact, _ = options
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if exact:
        return Route("torch", "exact=True keeps torch's arithmetic")
    if backend == "torch":
        return Route("torch", "backend='torch'")
    if backend == "auto" and device.type != "cuda":
        return Route("torch", f"PyTorch path on {device.type}")
    if _TRITON_TOO_OLD:
        return _refuse(backend, _TRITON_TOO_OLD)
    try:
        from fastpeft.kernels import launch
    except ImportError:
        return _refuse(backend, "triton is not installed")
    reason = launch.unsupported_device(device)
    return _refuse(backend, reason) if reason else FUSED


def route_for(options: Options, device: torch.device) -> Route:
    """`choose` for a call, whose circumstances count too."""
    reason = transformed()
    return _refuse(options.backend, reason) if reason else choose(options, device)


def confirm(
    options: Options,
    unsupported: str | None,
    ready: Callable[[], str | None],
    slower: Callable[[], str | None],
) -> Route:
    """The route of a call for which Triton was chosen: whether the kernels serve it, are built and not measured slower.

    To be asked before a seed is drawn.
    """
    if unsupported:
        return _refuse(options.backend, unsupported)
    if torch.compiler.is_compiling():  # tensors have no addresses yet, which is what kernels are built for
        return FUSED
    failure = ready()
    if failure and options.strict:
        raise RuntimeError(failure)
    reason = failure or (slower() if options.backend == "auto" else None)
    return Route("torch", reason) if reason else FUSED


def _refuse(backend: str, reason: str) -> Route:
    if backend == "triton":
        raise ValueError(f"backend='triton' can't serve this: {reason}")
    return Route("torch", reason)


def why_not_products(backend: str, x: Tensor, rank: int, *others: Tensor | None) -> str | None:
    """Why the kernels that multiply x by a weight don't serve it, or had better not where nobody asks for them."""
    from fastpeft.kernels import launch

    reason = launch.unsupported(x, rank, *others)
    return reason or (launch.better_by_cublas(x) if backend == "auto" else None)


def transformed() -> str | None:
    """What makes of the computation more than a forward and a backward pass, which only stock's operations bear."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms it"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


def on_cpu(t: Tensor) -> bool:
    """Whether what is written for the CPU alone serves t."""
    return t.is_cpu


def _triton_too_old() -> str | None:
    """That the installed triton lacks what the kernels use, asked of its metadata, without importing it."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return f"triton {version} is older than 3.6" if Version(version) < Version("3.6") else None


_TRITON_TOO_OLD = _triton_too_old()


class Decided:
    """What was found out about a kind of call, for the next of its kind not to ask again.

    Whoever holds one vouches for the operands' shapes, dtypes, strides and device, and for its options; what else
    counts is in the keys. They hold no number of rows but the steps in which tiles are chosen: there are few.
    """

    def __init__(self) -> None:
        self.route: Route | None = None
        self.answers = Memo(256)

    def chosen(self, options: Options, device: torch.device) -> Route:
        """`choose`, asked once."""
        if self.route is None:
            self.route = choose(options, device)
        return self.route

    @property
    def by_torch(self) -> bool:
        """Whether torch was chosen."""
        return self.route is not None and self.route.path == "torch"


def kind_of(rows: Tensor, residual: Tensor | None) -> Hashable:
    """Of a call, what counts for its kernels beside the operands that a `Decided` is for."""
    import fastpeft.kernels.launch as launch
    import fastpeft.kernels.tiling as tiling

    aligned = (rows.data_ptr() | (0 if residual is None else residual.data_ptr())) % 16 == 0
    tf32 = rows.dtype == torch.float32 and launch.tf32_allowed()
    count = rows_in(rows)
    return (
        tiling.steps(count),
        count > 0,
        rows.dtype,
        rows.dim() == 2 and rows.stride(),
        aligned,
        None if residual is None else residual.dtype,
        torch.is_inference_mode_enabled(),
        tf32,
    )
