"""Seconds a training step, stock and patched, measured in turn on the same model and batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.compare.methods import trainable

ROUNDS = 3  # after one that warms up
BATCHES = 3


class StepSeconds(NamedTuple):
    """Median seconds a step."""

    stock: float
    patched: float
    steps: int  # measured on each side


def step_seconds(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    backend: str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> StepSeconds:
    """Time forward, backward and AdamW's step of `model`, patching and unpatching it between steps.

    Each batch is taken by both sides one right after the other, who goes first alternating, so that whatever
    else slows the machine meets both. Trains the model on: call it when its weights are no longer needed.

    Raises:
        RuntimeError: the stock side wasn't stock, or the patched side's fused code wasn't called.
    """
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-5)
    seconds: dict[str, list[float]] = {"stock": [], "patched": []}
    model.train()
    for turn in range(ROUNDS + 1):
        for index, batch in enumerate(batches):
            sides = ("stock", "patched") if (turn + index) % 2 else ("patched", "stock")
            for side in sides:
                taken = _step_as(side, model, batch, optimizer, backend, autocast)
                if turn > 0:
                    seconds[side].append(taken)
    fastpeft.unpatch(model)
    return StepSeconds(
        statistics.median(seconds["stock"]), statistics.median(seconds["patched"]), len(seconds["stock"])
    )


def _step_as(
    side: str,
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    backend: str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> float:
    if side == "stock":
        fastpeft.unpatch(model)
        if any(row.path != "stock" for row in fastpeft.report(model)):
            raise RuntimeError(f"the stock side isn't stock:\n{fastpeft.report(model)}")
    else:
        fastpeft.patch(model, backend=backend)
    before = fused_calls(model)
    taken = _step(model, batch, optimizer, autocast)
    called = fused_calls(model) - before
    if (called > 0) != (side == "patched"):
        raise RuntimeError(f"{called} fused calls in a {side} step:\n{fastpeft.report(model)}")
    return taken


def fused_calls(model: nn.Module) -> int:
    """Calls of fused code so far, over all sites."""
    return sum(row.calls for row in fastpeft.report(model))


def _step(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> float:
    device = next(iter(batch.values())).device
    _wait(device)
    began = time.perf_counter()
    optimizer.zero_grad()
    with autocast():
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
