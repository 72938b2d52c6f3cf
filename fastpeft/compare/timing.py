"""Seconds a training step, stock and patched in either scope, measured in turn on the same model and batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.compare.placement import trainable

#: Of the scopes of `patch`: layers one by one, and the default, which also leaves out the padding that nobody reads.
SCOPES = ("layers", "auto")
SIDES = ("stock", *SCOPES)
BATCHES = 3  # a run's seeds are more


class StepSeconds(NamedTuple):
    """What a step took."""

    medians: dict[str, float]  # by side
    steps: int  # measured on each side
    unpacked: str | None  # why no step of the auto scope was packed, where none was


def step_seconds(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    backend: str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> StepSeconds:
    """Time forward, backward and AdamW's step of `model`, patching and unpatching it between steps.

    Each batch is taken by all sides one right after the other, in an order that rotates, so that whatever
    else slows the machine meets all; one of them is taken before, to warm up. Trains the model on: call it when
    its weights are no longer needed.

    Raises:
        RuntimeError: the stock side wasn't stock, or a patched side's fused code wasn't called.
    """
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-5)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    unpacked: list[str | None] = []
    model.train()
    for turn, batch in enumerate([batches[len(batches) // 2], *batches]):
        first = turn % len(SIDES)
        for side in SIDES[first:] + SIDES[:first]:
            taken = _step_as(side, model, batch, optimizer, backend, autocast)
            if turn > 0:
                seconds[side].append(taken)
            if side == "auto":
                unpacked.append(why_unpacked(model))
    fastpeft.unpatch(model)
    return StepSeconds(
        {side: statistics.median(taken) for side, taken in seconds.items()},
        len(seconds["stock"]),
        None if None in unpacked else unpacked[-1],
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
        fastpeft.patch(model, backend=backend, scope=side)
    before = fused_calls(model)
    taken = _step(model, batch, optimizer, autocast)
    called = fused_calls(model) - before
    packs = any(row.kind == "packing" for row in fastpeft.report(model))
    if (called > 0) != (side != "stock") or packs != (side == "auto"):
        raise RuntimeError(f"{called} fused calls in a {side} step:\n{fastpeft.report(model)}")
    return taken


def why_unpacked(model: nn.Module) -> str | None:
    """Why the last step of the auto scope ran on padded batches; None where it was packed."""
    [row] = [row for row in fastpeft.report(model) if row.kind == "packing"]
    return row.reason if row.path == "stock" else None


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
