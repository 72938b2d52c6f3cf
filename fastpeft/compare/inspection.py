"""What `fastpeft inspect` shows."""

from __future__ import annotations

from torch import nn

import fastpeft
from fastpeft.compare import base_model, checkpoint
from fastpeft.compare.arguments import IMDB_SMALL, Arguments
from fastpeft.compare.machine import machine, processes, versions
from fastpeft.compare.placement import apply
from fastpeft.compare.tasks import CLASSIFY


def inspection(name: str) -> str:
    """Versions, devices, and the report of the model `name` with LoRA and adapters on it, patched.

    Raises:
        BadInput: the model can't be loaded.
    """
    device = processes().device
    if name == IMDB_SMALL:
        model: nn.Module = base_model.untrained()  # a report doesn't depend on weights
    else:
        model = checkpoint.load(name, CLASSIFY, ("negative", "positive"), device).model
    for method in Arguments(methods=("lora", "adapter-houlsby")).chosen:
        model = apply(method, model, CLASSIFY)
    fastpeft.patch(model.to(device))
    lines = ["Versions"]
    lines += [f"  {package:<13} {found or 'not installed'}" for package, found in versions().items()]
    lines += ["", "Machine"]
    lines += [
        f"  {key.replace('_', ' '):<15} {value}" for key, value in machine().items() if value is not None
    ]
    lines += ["", f"{name} with LoRA and adapters after attention and MLP, patched"]
    lines += [f"  {line}" for line in str(fastpeft.report(model)).splitlines()]
    return "\n".join(lines)
