"""peft's LoRA layers, fused: one operation of what their state is at a call."""

from __future__ import annotations

import numbers
from collections.abc import Hashable, Sequence, Set
from itertools import chain
from operator import is_
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft import ops
from fastpeft.groups import Groups, order_of
from fastpeft.modules import FROZEN, is_plain, why_not_here, why_not_tensors
from fastpeft.plan import Plan
from fastpeft.projections import Grouped, Projection, Update
from fastpeft.residuals import Residual, added
from fastpeft.routes import Decided, Route
from fastpeft.swap import Site, stands_for


@stands_for(LoraLinear)
class FusedLoraLinear(LoraLinear):
    """peft's `lora.Linear` with the frozen GEMM and the LoRA update fused; same parameters, same keys.

    Where the contract of `why_not_lora` doesn't hold at a call, peft's own forward runs.
    """

    _fastpeft: Site
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any

    def forward(
        self,
        x: Tensor,
        *args: Any,
        residual: Residual | None = None,
        groups: Groups | None = None,
        walked: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """x (..., in_features) → (..., out_features), added to a residual if the block gives one.

        The rows of x use other adapters where the block gives their groups, or peft's hook `adapter_names`. A `walked`
        that it gives is as in `Plan.holds`.
        """
        if groups is not None or kwargs.get("adapter_names") is not None:
            return self._grouped(x, args, kwargs, groups, residual)
        site = self._fastpeft
        plan = "called with extra arguments" if args or kwargs else planned(self, x, walked=walked)
        layer: Projection | Grouped
        rest: list[str] = []
        if isinstance(plan, str):
            site.record(Route("stock", plan))
            return added(super().forward(x, *args, **kwargs), residual)
        if plan is None:
            layer, rest = projection_of(self)
        else:
            layer = plan.layer()
        fused = None if rest else residual
        decided = None if plan is None else plan.decided
        try:
            y, route = ops.routed_lora_linear(x, layer, site.options, fused, decided)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        for name in rest:
            dropped = self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype))
            y = (y + self.lora_B[name](self.lora_A[name](dropped)) * self.scaling[name]).to(y.dtype)
        site.record(route)
        return added(y, residual) if rest else y

    def _grouped(
        self,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        groups: Groups | None,
        residual: Residual | None,
    ) -> Tensor:
        """`forward`, of rows that use different adapters."""
        site, names = self._fastpeft, kwargs.pop("adapter_names", ())
        plan: LoraPlan | str | None
        if args or kwargs:
            plan = "called with extra arguments"
        elif torch.compiler.is_compiling():
            plan = "traced"
        elif groups is None and len(names) != len(x):
            plan = "an error"  # for stock to raise
        elif site.options.exact and any(
            dropout_p(self.lora_dropout[name]) for name in set(names) & self.lora_dropout.keys()
        ):
            plan = "exact=True keeps peft's masks, which it draws for one adapter after another, of a set"
        else:
            plan = planned(self, x, names=frozenset(names if groups is None else groups.names))
            if plan is None and x.shape[-1:] != (self.in_features,):
                plan = "an error"
        if isinstance(plan, str):
            site.record(Route("stock", plan))
            stock = super().forward
            if groups is None:
                y = stock(x, *args, adapter_names=names, **kwargs)
            else:  # each group as a batch of one row
                parts = [
                    stock(x.flatten(0, -2)[rows][None], adapter_names=[name]) for name, rows in groups.rows()
                ]
                y = torch.cat(parts, 1).view(*x.shape[:-1], -1)
            return added(y, residual)
        order = None
        if groups is None:
            order = order_of(tuple(names), x.device)
            groups, x = order.groups_of(x), order.put(x)
        layer = plan.layer(groups) if plan else grouped_of(self, groups)
        decided = plan.decided if plan else None
        try:
            y, route = ops.routed_lora_linear(x, layer, site.options, None if order else residual, decided)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        site.record(route)
        return y if order is None else added(order.put_back(y), residual)


class LoraPlan(Plan):
    """A LoRA layer of one active adapter, or of those that groups of rows name.

    All that `why_not_lora`, `projection_of` and `grouped_of` read is compared, or read again.
    """

    def __init__(self, module: Any, names: Set[str] | None = None) -> None:
        active = module._active_adapter
        self._active = list(active) if isinstance(active, list) else active
        self.names = names  # of groups; None for the active adapter
        #: Those that the layer has.
        self.adapters = (
            _active(module) if names is None else [name for name in module.lora_A if name in names]
        )
        self._scaling = module.scaling
        self._transposed = not isinstance(module.base_layer, Conv1D)
        factors = module.lora_A, module.lora_B, module.lora_dropout
        parts = [[part[name] for name in self.adapters] for part in factors]
        self._dropouts = parts[2]
        self._held = [(module.base_layer, name) for name in ("weight", "bias")]
        for lora_a, lora_b in zip(*parts[:2], strict=True):
            self._held += [(lora_a, "weight"), (lora_b, "weight"), (lora_a, "bias"), (lora_b, "bias")]
        self._chains: dict[int, tuple[Sequence[LoraPlan], Decided]] = {}
        super().__init__(module, factors, [module.base_layer, *chain(*parts)])

    def before(self, others: Sequence[LoraPlan]) -> Decided:
        """What was found out about a chain of this layer and of these others behind it."""
        known, decided = self._chains.get(len(others), ((), None))
        if decided is None or not all(map(is_, known, others)):
            kinds = self._kind(), *(each._kind() for each in others)
            module: Any = self._module()
            decided = module._fastpeft.decided.once(kinds, Decided)
            self._chains[len(others)] = others, decided
        return decided

    def _kind(self) -> Hashable:
        """What kernels are prepared for, which isn't how many adapters there are."""
        weight, bias, *factors = self._like
        if self.names is None:
            return weight, bias, *factors
        ranks = [shape[0] for _, _, _, shape, *_ in factors[::4]]
        dtypes = (frozenset(dtype for _, dtype, *_ in factors[i::4]) for i in range(2))
        return weight, bias, max(ranks, default=0), *dtypes

    def read(self) -> list[Tensor | None]:
        """Weight and bias of the frozen layer; of each adapter lora_a, lora_b, and their biases, which mustn't be."""
        return [each._parameters.get(name, False) for each, name in self._held]

    @property
    def widths(self) -> tuple[int, int]:
        """Of what the layer takes, K, and of what it makes, N."""
        k, n = self._like[0][3]
        return (n, k) if self._transposed else (k, n)

    @property
    def fits(self) -> bool:
        """Whether the parameters have shapes that go together."""
        weight, bias, *factors = self.read()
        if weight is None or weight.dim() != 2:
            return False
        k, n = self.widths
        return (bias is None or bias.shape == (n,)) and all(
            a.shape[1:] == (k,) and b.shape == (n, len(a)) and bias_a is bias_b is None
            for a, b, bias_a, bias_b in zip(*[iter(factors)] * 4, strict=True)
        )

    def holds(self, module: Any, x: Tensor, walked: Any = None) -> bool:
        return (
            not module._disable_adapters
            and not module.merged_adapters
            and module.cast_input_dtype_enabled
            and (self.names is not None or module._active_adapter == self._active)
            and module.lora_variant.keys().isdisjoint(self.adapters)
            and module.scaling is self._scaling
            and _NUMBERS.issuperset(map(type, map(self._scaling.get, self.adapters)))
            and super().holds(module, x, walked)
        )

    def layer(self, groups: Groups | None = None) -> Projection | Grouped:
        """What the call computes, with an update for each group where there are groups.

        Of parameters that `holds` has just seen.
        """
        tensors: list[Any] = self.read()
        weight, bias, *factors = tensors
        if self._transposed:
            weight = weight.t()
        held = zip(factors[::4], factors[1::4], self.adapters, self._dropouts, strict=True)
        updates = [
            Update(lora_a, lora_b, float(self._scaling[name]), dropout_p(dropout))
            for lora_a, lora_b, name, dropout in held
        ]
        if groups is None:
            return Projection(weight, bias, *updates[0])
        of = dict(zip(self.adapters, updates, strict=True))
        return Grouped(weight, bias, [of.get(name) for name in groups.names], groups.bounds)

    def projection(self, groups: Groups | None) -> Projection:
        """`layer` as kernels take it, of one adapter or more."""
        layer = self.layer(groups)
        found = layer.stacked(layer.weight.device) if isinstance(layer, Grouped) else layer
        assert found is not None
        return found


#: Of scalings.
_NUMBERS = frozenset((float, int))


def planned(
    module: Any,
    x: Tensor,
    width: int | None = None,
    walked: Any = None,
    names: Set[str] | None = None,
) -> LoraPlan | str | None:
    """The plan of a call of this LoRA layer on x, made where there is none.

    Why it runs stock, where it does; None where it is fused without a plan: traced, of several adapters at once, or of
    shapes that are for the operation to complain of. Where a `width` is given, the call is on a tensor of that width
    that comes of x. `walked` is as in `Plan.holds`. Where groups of rows have adapters, `names` are theirs.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_nested or x.dim() == 0:
        return _why_not_call(module, x, names)
    width = x.shape[-1] if width is None else width
    site = module._fastpeft
    plan = site.plan
    if plan is not None and plan.names == names and plan.holds(module, x, walked):
        return plan if width == plan.widths[0] else None
    reason = _why_not_call(module, x, names)
    if reason or (names is None and len(_active(module)) > 1):
        return reason
    plan = LoraPlan(module, names)
    if not plan.holds(module, x) or not plan.fits or width != plan.widths[0]:
        return None
    plan.decided = plan.before(())
    site.plan = plan
    return plan


def for_kernels(layer: Any, x: Tensor, width: int, walked: Any, groups: Groups | None) -> LoraPlan | None:
    """`planned`, where kernels may do what the layer does beside other work; else None."""
    if type(layer) is not FusedLoraLinear:
        return None
    site = layer._fastpeft
    if site.plan is not None and site.plan.decided.by_torch:
        return None
    plan = planned(layer, x, width, walked, None if groups is None else frozenset(groups.names))
    if not isinstance(plan, LoraPlan) or plan.decided.chosen(site.options, x.device).path != "triton":
        return None
    return plan if plan.adapters else None


def projection_of(module: Any) -> tuple[Projection, list[str]]:
    """What a call of this LoRA layer fuses, as its state is now, and the adapters that it has to add one by one."""
    base = module.base_layer
    weight, bias = _weight(base), base.bias
    names, rest = _active(module), []
    dropouts = [dropout_p(module.lora_dropout[name]) for name in names]
    if len(names) > 1 and any(dropouts):  # each draws a mask of its own over x
        names, rest = names[:1], names[1:]
    for name in names:
        lora_bias = module.lora_B[name].bias
        if lora_bias is not None:
            update = (module.scaling[name] * lora_bias).to(weight.dtype)
            bias = update if bias is None else bias + update
    if len(names) == 1:
        lora_a, lora_b = module.lora_A[names[0]].weight, module.lora_B[names[0]].weight
        scaling = module.scaling[names[0]]
    else:  # without dropout, several adapters are one of the summed rank
        lora_a = torch.cat([module.lora_A[name].weight for name in names])
        lora_b = torch.cat([module.lora_B[name].weight * module.scaling[name] for name in names], dim=1)
        scaling = 1.0
    return Projection(weight, bias, lora_a, lora_b, scaling, dropouts[0]), rest


def grouped_of(module: Any, groups: Groups) -> Grouped:
    """What a call of this LoRA layer on these groups of rows fuses, as its state is now."""
    base = module.base_layer
    updates = [
        Update(
            module.lora_A[name].weight,
            module.lora_B[name].weight,
            float(module.scaling[name]),
            dropout_p(module.lora_dropout[name]),
        )
        if name in module.lora_A
        else None
        for name in groups.names
    ]
    return Grouped(_weight(base), base.bias, updates, groups.bounds)


def _weight(base: Any) -> Tensor:
    """A base layer's weight as (K, N)."""
    weight: Tensor = base.weight
    return weight if isinstance(base, Conv1D) else weight.t()


def dropout_p(dropout: nn.Module) -> float:
    """The probability with which a call of `nn.Dropout` or `nn.Identity` drops now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _active(module: Any) -> list[str]:
    """The adapters that a call of this layer adds up."""
    return [name for name in module.active_adapters if name in module.lora_A]


def _why_not_call(module: Any, x: Tensor, names: Set[str] | None) -> str | None:
    """Why a call of this LoRA layer on what comes of x runs stock, of rows with these adapters where they are given."""
    base = module.base_layer
    reason = why_not_here() or why_not_lora(module, names)
    return reason or why_not_tensors(x, *(t for t in (base.weight, base.bias) if t is not None))


def why_not_lora(module: Any, given: Set[str] | None = None) -> str | None:
    """Why this LoRA layer, as it is now, must run stock; None where fusion computes the same.

    It is asked about the adapters that are active, or about these.
    """
    base = module.base_layer
    if type(base) not in (Conv1D, nn.Linear, *FROZEN):
        return f"base layer is {type(base).__name__}, not Conv1D or nn.Linear"
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return "adapters are merged into the base weight"
    if not module.cast_input_dtype_enabled:
        return "peft is told not to cast what comes in"
    if not is_plain(base):
        return "base_layer has hooks or a replaced forward"
    parts = module.lora_A, module.lora_B, module.lora_dropout
    names = _active(module) if given is None else [name for name in parts[0] if name in given]
    if not names and given is None:
        return "no adapter is active here"
    for name in names:
        if name in module.lora_variant:
            return f"adapter {name!r} is {type(module.lora_variant[name]).__name__}, not plain LoRA"
        lora_a, lora_b, dropout = (part[name] for part in parts)
        if not (is_plain(lora_a) and is_plain(lora_b) and is_plain(dropout)):
            return f"adapter {name!r} has hooks or a replaced forward"
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
            return f"adapter {name!r} has factors other than nn.Linear"
        if lora_a.bias is not None or (given is not None and lora_b.bias is not None):
            return f"adapter {name!r} has a bias"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"adapter {name!r} has {type(dropout).__name__} for dropout"
        if not isinstance(module.scaling[name], numbers.Real):
            return f"adapter {name!r} has a {type(module.scaling[name]).__name__} for scaling, not a number"
        reason = why_not_tensors(base.weight, lora_a.weight, lora_b.weight, same_dtype=False)
        if reason:
            return reason
    return None
