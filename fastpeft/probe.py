"""Whether a user's own module computes what `reference.adapter` does: asked of its code, then of a copy of it."""

from __future__ import annotations

import copy
import dis
from types import FunctionType
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

    Its code must be a straight line of calls, sums and products of `down`, `act`, `up` and `scale`: whatever else it
    reads may change, and whatever else it does would be lost. Then numbers tell which it is: the copy gets random
    float64 weights, for a zero `up` would agree with anything, and another scale.
    """
    if not hasattr(module, "act"):
        return "it has no activation named `act`"
    others = sorted({name for name, _ in module.named_children()} - {"down", "act", "up"})
    if others:
        return f"it has submodules besides down, act and up: {', '.join(others)}"
    if list(module.named_parameters(recurse=False)) or list(module.named_buffers(recurse=False)):
        return "it has parameters or buffers of its own"
    reason = _why_not_code(module) or why_not_adapter(module)
    if reason or module.down.weight.is_meta:
        return reason or "its weights are on the meta device"
    try:
        agrees = _agrees(module)
    except Exception as error:  # a user's forward may raise anything; the reason goes into the report
        return f"probing its forward raised {type(error).__name__}: {error}"
    return None if agrees else "a probe shows that its forward isn't x + scale * up(act(down(x)))"


_READ = {"down", "act", "up", "scale"}
#: The bytecode of calls, sums, products and names for them, in Python 3.10 to 3.14.
_STRAIGHT = {
    "RESUME", "CACHE", "NOP", "PUSH_NULL", "PRECALL", "CALL", "CALL_FUNCTION", "CALL_METHOD", "LOAD_METHOD",
    "LOAD_ATTR", "LOAD_CONST", "LOAD_SMALL_INT", "BINARY_ADD", "BINARY_MULTIPLY", "RETURN_VALUE",
    *(f"{do}_FAST{how}" for do in ("LOAD", "STORE") for how in ("", "_BORROW", "_LOAD_FAST", "_STORE_FAST")),
    "LOAD_FAST_CHECK", "LOAD_FAST_BORROW_LOAD_FAST_BORROW",
}  # fmt: skip
_LOOKED_UP = ("__call__", "__getattr__")


def _why_not_code(module: Any) -> str | None:
    """Why the code of a module's forward, or how it is come by, may do more than the formula; else None."""
    kind = type(module)
    if any(getattr(kind, name) is not getattr(nn.Module, name) for name in _LOOKED_UP) or (
        kind.__getattribute__ is not object.__getattribute__
    ):
        return "its class is called, or looks attributes up, in a way of its own"
    if any(name in vars(each) for each in kind.__mro__ for name in ("down", "up")):
        return "its class defines down or up itself"
    if type(kind.forward) is not FunctionType:
        return "its forward isn't a plain function"
    code = kind.forward.__code__
    others = sorted(set(code.co_names) - _READ)
    if others:
        return f"its forward reads {', '.join(others)} beside down, act, up and scale"
    for step in dis.get_instructions(code):
        if step.opname not in _STRAIGHT and (step.opname, step.argrepr) not in (
            ("BINARY_OP", "+"), ("BINARY_OP", "*")
        ):  # fmt: skip
            return f"its forward does more than call, add and multiply: {step.opname} {step.argrepr}".rstrip()
    if hasattr(module, "scale") and "scale" not in code.co_names:
        return "it has a scale that its forward doesn't read"
    return None


@torch.no_grad()
def _agrees(module: Any) -> bool:
    device = module.down.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        probe = copy.deepcopy(module).double()
        for parameter in probe.parameters():
            parameter.normal_()
        scale = 1.0
        if hasattr(probe, "scale"):
            probe.scale = scale = 0.75
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
        y = probe.forward(x)
    return torch.is_tensor(y) and y.shape == x.shape and torch.allclose(y, expected)
