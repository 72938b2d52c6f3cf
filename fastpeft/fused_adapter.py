"""Bottleneck adapters, fastpeft's and users' own, fused: one operation of what their state is at a call."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft import ops, reference
from fastpeft.adapters import Adapter, activation_name
from fastpeft.modules import is_plain, why_not_here, why_not_tensors
from fastpeft.plan import Plan
from fastpeft.projections import Bottleneck
from fastpeft.routes import Route
from fastpeft.swap import Site


class FusedAdapter(nn.Module):
    """Mixed into an adapter's class by `swap.fused_class`: its down-act-up-residual path in one operation."""

    _fastpeft: Site
    down: Any
    act: Any
    up: Any

    def forward(self, x: Tensor, *args: Any, residual: Tensor | None = None, **kwargs: Any) -> Tensor:
        """x (..., width) → the same shape, added to a residual if the block gives one."""
        site = self._fastpeft
        plan = "called with extra arguments" if args or kwargs else _planned(self, x)
        if isinstance(plan, str):
            site.record(Route("stock", plan))
            y = super().forward(x, *args, **kwargs)
            return y if residual is None else residual + y
        if plan is None:
            down, up = self.down, self.up
            tensors = [down.weight, down.bias, up.weight, up.bias]
            activation, decided = activation_name(self.act) or "", None
        else:
            tensors, activation, decided = plan.read(), plan.activation, plan.decided
        bottleneck = Bottleneck._make((*tensors, activation, getattr(self, "scale", 1.0)))
        try:
            y, route = ops.routed_adapter(x, bottleneck, site.options, residual, decided)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        site.record(route)
        return y


class _AdapterPlan(Plan):
    """An adapter: all that `why_not_adapter` reads, compared or read again, and what x was."""

    def __init__(self, module: Any, x: Tensor) -> None:
        self._projections = module.down, module.up
        self._act, self._dtype = module.act, x.dtype
        self._stock, self._forward = module._fastpeft_stock, module._fastpeft_stock.forward
        self.activation = activation_name(module.act) or ""
        acts = [module.act] if isinstance(module.act, nn.Module) else []
        super().__init__(module, [], [module.down, module.up, *acts])

    def read(self) -> list[Tensor | None]:
        """Weights and biases, down and up."""
        return [
            each._parameters.get(name, False) for each in self._projections for name in ("weight", "bias")
        ]

    def holds(self, module: Any, x: Tensor, walked: Any = None) -> bool:
        """As `Plan.holds`, for x of the width that the adapter takes."""
        act = module.act
        return (
            act is self._act
            and "update" not in vars(module)
            and self._stock.forward is self._forward
            and (type(act) is not nn.GELU or activation_name(act) == self.activation)
            and type(getattr(module, "scale", 1.0)) in (float, int)
            and super().holds(module, x, walked)
            and x.shape[-1:] == module.down.weight.shape[1:]
        )

    def takes(self, x: Tensor, first: Tensor) -> bool:
        return x.dtype == self._dtype and not torch.is_autocast_enabled(x.device.type)


def _planned(module: Any, x: Tensor) -> _AdapterPlan | str | None:
    """The plan of a call of this adapter on x, made where there is none.

    Why it runs stock, where it does; None where it is fused without a plan: traced, of shapes that are for the
    operation to complain of, or of a scale that is no plain number.
    """
    traced, site = torch.compiler.is_compiling(), module._fastpeft
    plan = None if traced else site.plan
    if plan is not None and plan.holds(module, x):
        return plan
    reason = why_not_here() or why_not_adapter(module)
    reason = reason or why_not_tensors(x, module.down.weight, same_dtype=not isinstance(module, Adapter))
    if reason or traced:
        return reason
    plan = _AdapterPlan(module, x)
    if not plan.holds(module, x):
        return None
    site.plan = plan
    return plan


def why_not_adapter(module: Any) -> str | None:
    """Why this adapter, as it is now, must run stock; None where fusion computes the same."""
    if "update" in vars(module):
        return "it has an update of its own"
    stock = getattr(module, "_fastpeft_stock", None)
    if stock is not None and stock.forward is not type(module)._fastpeft_forward:
        return f"the forward of {stock.__name__} was replaced"
    for part in (module.down, module.up):
        if type(part) is not nn.Linear:
            return f"its projections are {type(part).__name__}, not nn.Linear"
        if not is_plain(part):
            return "its projections have hooks or a replaced forward"
    scale = getattr(module, "scale", 1.0)
    if not isinstance(scale, numbers.Real):
        return f"its scale is a {type(scale).__name__}, not a number"
    act = module.act
    if activation_name(act) is None:
        name = getattr(act, "__name__", type(act).__name__)
        return f"activation {name} is none of {', '.join(reference.ACTIVATIONS)}"
    if isinstance(act, nn.Module) and not is_plain(act):
        return "its activation has hooks or a replaced forward"
    return why_not_tensors(module.down.weight, module.up.weight)
