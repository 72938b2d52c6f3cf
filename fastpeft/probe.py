"""Whether a user's own module computes what `reference.adapter` does, asked of a copy of the module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastpeft import reference
from fastpeft.adapters import activation_name
from fastpeft.fused_adapter import why_not_adapter


def looks_like_adapter(module: nn.Module) -> bool:
    """Whether `module` has the marks of a bottleneck adapter: `down` narrows to what `up` widens again."""
    down, up = module._modules.get("down"), module._modules.get("up")  # its own, not those a wrapper hands on
    if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
        return False
    return down.out_features == up.in_features and down.in_features == up.out_features


def why_not_fusible(module: Any) -> str | None:
    """Why the forward of a module that looks like an adapter can't be replaced; None where it is the formula.

    The copy gets random float64 weights (a zero `up` would agree with anything) and runs in eval and in
    training mode, so that a dropout hidden in the forward shows.
    """
    if not hasattr(module, "act"):
        return "it has no activation named `act`"
    others = sorted({name for name, _ in module.named_children()} - {"down", "act", "up"})
    if others:
        return f"it has submodules besides down, act and up: {', '.join(others)}"
    if list(module.named_parameters(recurse=False)) or list(module.named_buffers(recurse=False)):
        return "it has parameters or buffers of its own"
    reason = why_not_adapter(module)
    if reason or module.down.weight.is_meta:
        return reason or "its weights are on the meta device"
    try:
        agrees = _agrees(module, float(getattr(module, "scale", 1.0)))
    except Exception as error:  # a user's forward may raise anything; the reason goes into the report
        return f"probing its forward raised {type(error).__name__}: {error}"
    return None if agrees else "a probe shows that its forward isn't x + scale * up(act(down(x)))"


@torch.no_grad()
def _agrees(module: Any, scale: float) -> bool:
    device = module.down.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        probe = copy.deepcopy(module).double()
        for parameter in probe.parameters():
            parameter.normal_()
        x = torch.randn(2, 3, probe.down.in_features, dtype=torch.float64, device=device)
        expected = reference.adapter(
            x,
            probe.down.weight,
            probe.down.bias,
            probe.up.weight,
            probe.up.bias,
            activation_name(probe.act) or "",
            scale,
        )
        outputs = [probe.train(mode).forward(x) for mode in (False, True)]
    return all(torch.is_tensor(y) and y.shape == x.shape and torch.allclose(y, expected) for y in outputs)
