"""Shared fixtures. Kernels run in Triton's interpreter where there is no CUDA device."""

from __future__ import annotations

import functools
import gc
import importlib.util
import inspect
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small here: threads would wait for each other

import torch

if not torch.cuda.is_available():  # before anything imports a Triton kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")  # comparisons are held against float32

import pytest


def interpret_faster() -> None:
    """Look for what is builtin in Triton's language once, not at every call of a function that a kernel calls.

    The search takes a fifth of the interpreter's time. What is patched, and by what, stays Triton's.
    """
    from triton.runtime import interpreter

    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def names(owner: object) -> list[str]:
        return [name for name, member in inspect.getmembers(owner) if is_builtin(member)]

    def patch_builtin(owner: object, *rest: object) -> None:
        for name in names(owner):
            if is_builtin(member := getattr(owner, name)):  # else it is patched already
                interpreter._patch_attr(owner, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpret_faster()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full grids, not only their samples")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="part of the full grid: run with --full"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays() -> None:
    """No collection of garbage, which benchmarks ask for, need look through what came before a file's tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test runs: in the interpreter on the CPU, or compiled on a GPU."""
    from fastpeft.kernels import launch  # no sooner: tests of the package itself come without it

    if request.param == "cpu" and not launch.INTERPRETED:
        pytest.skip("kernels are compiled here: the same test runs on cuda")
    return request.param


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, or 77 where it holds int32, so that an element nobody wrote shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)

        def poisoned(*args, real=real, **kwargs):
            tensor = real(*args, **kwargs)
            if tensor.dtype == torch.int32:
                tensor.fill_(77)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
            return tensor

        monkeypatch.setattr(owner, name, poisoned)
