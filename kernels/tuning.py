"""Opt-in autotuning: with FASTPEFT_AUTOTUNE=1 a GPU measures what tiling.py otherwise reasons out.

The first call of a kind times the table's candidates, and the kernels against the PyTorch path; Triton's cache on
disk remembers what was fastest, by GPU, Triton version and shape (rows to the next power of two).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.testing import do_bench

from . import launch

ENABLED = os.environ.get("FASTPEFT_AUTOTUNE") == "1"

Candidate = TypeVar("Candidate")
_decided: dict[str, Any] = {}


def active(x: Tensor) -> bool:
    """Whether calls on x go by what was measured: opted in, on a GPU, and not only recording launches."""
    return ENABLED and x.is_cuda and not launch.recording()


def capturing(x: Tensor) -> bool:
    """Whether a graph is captured, within which nothing can be measured."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def fastest(
    kernel: str,
    x: Tensor,
    key: tuple[Any, ...],
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], object],
) -> Candidate:
    """The candidate whose `run` takes the least time; the first one, unmeasured, unless tuning is active.

    Within a graph that is captured it is the one that was measured before, if one was.
    """
    if not active(x) or len(candidates) == 1:
        return candidates[0]

    def measure() -> int:
        times = [_milliseconds(run, candidate) for candidate in candidates]
        return times.index(min(times))

    index = _remembered(f"{kernel} {_kind(x)} {key} {candidates}", None if capturing(x) else measure)
    return candidates[index or 0]


def slower_than(
    operation: str,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    kernels: Callable[..., Tensor],
    pytorch: Callable[..., Tensor],
) -> str | None:
    """Why PyTorch should serve calls like this one: it was measured to be faster; None otherwise.

    Both are called with `tensors`, the first of which is x, and run backward where one of them needs a gradient.
    """
    x = tensors[0]
    assert x is not None
    if not active(x):
        return None
    shapes = [None if t is None else (t.dtype, *t.shape, t.requires_grad) for t in tensors[1:]]

    def milliseconds(call: Callable[..., Tensor]) -> float:
        return do_bench(lambda: _step(call, tensors), return_mode="median")

    def measure() -> list[float]:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # measuring must draw no seed
            return [milliseconds(kernels), milliseconds(pytorch)]

    key = f"{operation} {_kind(x)} {x.requires_grad} {shapes} {options} {torch.is_grad_enabled()}"
    ours, theirs = _remembered(key, None if capturing(x) else measure) or (0.0, 0.0)
    if ours <= theirs:
        return None
    return f"measured here: {theirs:.3f} ms a step through PyTorch, {ours:.3f} ms through the kernels"


def _step(call: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]) -> None:
    leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    y = call(*leaves)
    if y.requires_grad:
        torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], y.detach())


def _milliseconds(run: Callable[[Candidate], object], candidate: Candidate) -> float:
    try:
        return do_bench(lambda: run(candidate), return_mode="median")
    except launch.BUILD_FAILURES:
        return float("inf")


def _kind(x: Tensor) -> str:
    rows = triton.next_power_of_2(max(x.shape[0], 1))
    return f"{torch.cuda.get_device_name(x.device)} {triton.__version__} {x.dtype} {rows} {x.shape[1]}"


def _remembered(key: str, decide: Callable[[], Any] | None) -> Any:
    """What `decide` returned for this key, in this process or an earlier one; None for neither, where it can't now."""
    if key not in _decided:
        cache = get_cache_manager(hashlib.sha256(f"fastpeft {key}".encode()).hexdigest())
        found = cache.get_file("decided.json")
        if found is None:
            if decide is None:
                return None
            found = cache.put(json.dumps(decide()), "decided.json", binary=False)
        _decided[key] = json.loads(Path(found).read_text())
    return _decided[key]
