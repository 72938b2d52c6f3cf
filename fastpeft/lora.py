"""peft's LoRA layers, fused: one operation of what their state is at a call."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft import ops
from fastpeft.groups import Groups, order_of
from fastpeft.modules import FROZEN, is_plain, why_not_here, why_not_tensors
from fastpeft.plan import Plan, like
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
        residual: ops.Residual | None = None,
        groups: Groups | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x (..., in_features) → (..., out_features), added to a residual if the block gives one.

        The rows of x use other adapters where the block gives their groups, or peft's hook `adapter_names`.
        """
        if groups is not None or kwargs.get("adapter_names") is not None:
            return self._grouped(x, args, kwargs, groups, residual)
        site = self._fastpeft
        plan = None if args or kwargs else planned(self, x)
        rest: list[str] = []
        if plan is None:
            reason = why_not_here() or (
                "called with extra arguments" if args or kwargs else why_not_lora(self)
            )
            reason = reason or why_not_tensors(x, self.base_layer.weight)
            if reason:
                site.record(ops.Route("stock", reason))
                return ops.added(super().forward(x, *args, **kwargs), residual)
            projection, rest = projection_of(self)
        else:
            projection = plan.projection()
        fused = None if rest else residual
        options = site.backend, site.exact, site.strict
        decided = None if plan is None else plan.decided
        try:
            y, route = ops.routed_lora_linear(x, projection, *options, fused, decided)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        for name in rest:
            dropped = self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype))
            y = (y + self.lora_B[name](self.lora_A[name](dropped)) * self.scaling[name]).to(y.dtype)
        site.record(route)
        return ops.added(y, residual) if rest else y

    def _grouped(
        self,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        groups: Groups | None,
        residual: ops.Residual | None,
    ) -> Tensor:
        """`forward`, of rows that use different adapters."""
        site, names = self._fastpeft, kwargs.pop("adapter_names", ())
        if args or kwargs:
            reason: str | None = "called with extra arguments"
        elif groups is None and len(names) != len(x):
            reason = "an error"  # for stock to raise
        else:
            reason = why_not_grouped(self, names if groups is None else groups.names, x, x.shape[-1])
        if reason:
            site.record(ops.Route("stock", reason))
            stock = super().forward
            if groups is None:
                y = stock(x, *args, adapter_names=names, **kwargs)
            else:  # each group as a batch of one row
                parts = [
                    stock(x.flatten(0, -2)[rows][None], adapter_names=[name]) for name, rows in groups.rows()
                ]
                y = torch.cat(parts, 1).view(*x.shape[:-1], -1)
            return ops.added(y, residual)
        order = None
        if groups is None:
            order = order_of(tuple(names), x.device)
            groups, x = order.groups_of(x), order.put(x)
        call = GroupedCall(self, groups)
        options = site.backend, site.exact, site.strict
        # What doesn't fit is for the operation to complain of.
        decided = call.before(()) if call.fits else None
        try:
            y, route = ops.routed_lora_linear(x, call.layer, *options, None if order else residual, decided)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        site.record(route)
        return y if order is None else ops.added(order.put_back(y), residual)


class GroupedCall:
    """What a `LoraPlan` is, of a call whose rows use different adapters, which are others at the next."""

    def __init__(self, module: Any, groups: Groups) -> None:
        base, self._site = module.base_layer, module._fastpeft
        factors = module.lora_A._modules, module.lora_B._modules
        updates = [
            ops.Update(
                factors[0][name].weight,
                factors[1][name].weight,
                module.scaling[name],
                dropout_p(module.lora_dropout[name]),
            )
            if name in factors[0]
            else None
            for name in groups.names
        ]
        weight = _weight(base)
        self.layer = ops.Grouped(weight, base.bias, updates, groups.bounds)
        self.updated = [u for u in updates if u is not None]
        ranks, dtypes = [len(u.lora_a) for u in self.updated], {t.dtype for u in self.updated for t in u[:2]}
        # What kernels are prepared for, which isn't how many adapters there are.
        drops = any(u.dropout_p > 0.0 for u in self.updated)
        self._key = like(weight), like(base.bias), max(ranks, default=0), frozenset(dtypes), drops
        self._projection: ops.Projection | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """Of what the layer takes, K, and of what it makes, N."""
        k, n = self.layer.weight.shape
        return k, n

    @property
    def fits(self) -> bool:
        """Whether the updates, if there are any, have shapes that go together with the layer's."""
        k, n = self.widths
        return all(a.shape[1:] == (k,) and b.shape == (n, len(a)) for a, b, *_ in self.updated)

    def before(self, others: Sequence[Any]) -> ops.Decided:
        """What was found out about a chain of such a layer and of such others behind it."""
        return self._site.grouped.once((self._key, *(each._key for each in others)), ops.Decided)

    def projection(self) -> ops.Projection:
        """What the call computes, for kernels."""
        if self._projection is None:
            self._projection = self.layer.stacked(self.layer.weight.device)
        assert self._projection is not None
        return self._projection


class LoraPlan(Plan):
    """A LoRA layer of one active adapter: all that `why_not_lora` and `projection_of` read, compared or read again."""

    def __init__(self, module: Any, name: str) -> None:
        factors = module.lora_A, module.lora_B, module.lora_dropout
        self._places = [
            each._parameters for each in (module.base_layer, *(part[name] for part in factors[:2]))
        ]
        self._dropout = module.lora_dropout[name]
        active = module._active_adapter
        self._active = list(active) if isinstance(active, list) else active
        self._name, self._scaling = name, module.scaling
        self._transposed = not isinstance(module.base_layer, Conv1D)
        self._chains: dict[int, tuple[Sequence[LoraPlan], ops.Decided]] = {}
        super().__init__(module, [module, *factors], [module.base_layer, *(part[name] for part in factors)])

    def before(self, others: Sequence[LoraPlan]) -> ops.Decided:
        """What was found out about a chain of this layer and of these others behind it."""
        known, decided = self._chains.get(len(others), ((), None))
        if decided is None or not all(map(is_, known, others)):
            decided = ops.Decided()
            self._chains[len(others)] = others, decided
        return decided

    def read(self) -> list[Tensor | None]:
        """Weight and bias of the frozen layer, lora_a and lora_b, and the latter's bias, which there mustn't be."""
        base, lora_a, lora_b = self._places
        held = [(base, "weight"), (base, "bias"), (lora_a, "weight"), (lora_b, "weight"), (lora_b, "bias")]
        return [each.get(name, False) for each, name in held]

    @property
    def widths(self) -> tuple[int, int]:
        """Of what the layer takes, K, and of what it makes, N."""
        _, _, lora_a, lora_b, _ = self.tensors
        assert lora_a is not None
        assert lora_b is not None
        return lora_a.shape[1], lora_b.shape[0]

    @property
    def fits(self) -> bool:
        """Whether the parameters have shapes that go together."""
        weight, bias, lora_a, lora_b, *_ = self.projection()
        rank, (k, n) = lora_a.shape[0], self.widths
        shapes = weight.shape, (n,) if bias is None else bias.shape, lora_b.shape
        return shapes == ((k, n), (n,), (n, rank))

    def holds(self, module: Any, x: Tensor, walked: Any = None) -> bool:
        return (
            not module._disable_adapters
            and not module.merged_adapters
            and not module.lora_variant
            and module._active_adapter == self._active
            and module.scaling is self._scaling
            and type(self._scaling[self._name]) in (float, int)
            and super().holds(module, x, walked)
        )

    def projection(self) -> ops.Projection:
        """What the call computes, of tensors that `holds` has just seen."""
        weight, bias, lora_a, lora_b, _ = self.tensors
        assert weight is not None
        assert lora_a is not None
        assert lora_b is not None
        if self._transposed:
            weight = weight.t()
        scaling = float(self._scaling[self._name])
        return ops.Projection(weight, bias, lora_a, lora_b, scaling, dropout_p(self._dropout))


def planned(module: Any, x: Tensor, width: int | None = None, walked: Any = None) -> LoraPlan | None:
    """The plan of a call of this LoRA layer on x, made where there is none; None where it isn't fused by one.

    Where a `width` is given, the call is on a tensor of that width that comes of x. `walked` is as in `Plan.holds`.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dim() == 0:
        return None
    width = x.shape[-1] if width is None else width
    site = module._fastpeft
    plan = site.plan
    if plan is not None and plan.holds(module, x, walked):
        return plan if width == plan.widths[0] else None
    base = module.base_layer
    if why_not_here() or why_not_lora(module):
        return None
    if why_not_tensors(x, *(t for t in (base.weight, base.bias) if t is not None)):
        return None
    names = _active(module)
    if len(names) > 1 or module.lora_variant:
        return None
    if module.lora_B[names[0]].bias is not None:
        return None
    plan = LoraPlan(module, names[0])
    if not plan.holds(module, x) or width != plan.widths[0] or not plan.fits:
        return None  # a shape for the operation to complain of
    site.plan = plan
    return plan


def for_kernels(
    layer: Any, x: Tensor, width: int, walked: Any, groups: Groups | None
) -> LoraPlan | GroupedCall | None:
    """`planned`, or a call by `groups`, where kernels may do what the layer does beside other work; else None."""
    if type(layer) is not FusedLoraLinear:
        return None
    site = layer._fastpeft
    if groups is not None:
        if ops.choose(site.backend, site.exact, x.device).path != "triton":
            return None
        if why_not_grouped(layer, groups.names, x, width):
            return None
        call = GroupedCall(layer, groups)
        return call if call.updated and call.fits else None
    if site.plan is not None and site.plan.decided.by_torch:
        return None
    plan = planned(layer, x, width, walked)
    if plan is None or plan.decided.chosen(site.backend, site.exact, x.device).path != "triton":
        return None
    return plan


def projection_of(module: Any) -> tuple[ops.Projection, list[str]]:
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
    return ops.Projection(weight, bias, lora_a, lora_b, scaling, dropouts[0]), rest


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


def why_not_grouped(module: Any, names: Sequence[str], x: Tensor, width: int) -> str | None:
    """Why a call of this LoRA layer on rows that use these adapters must run stock; else None.

    The rows are of this width and come of x.
    """
    if torch.compiler.is_compiling():
        return "traced"
    base = module.base_layer
    reason = why_not_here() or why_not_lora(module, names)
    reason = reason or why_not_tensors(x, *(t for t in (base.weight, base.bias) if t is not None))
    return reason or (None if width == module.in_features else "an error")  # for stock to raise


def why_not_lora(module: Any, given: Sequence[str] | None = None) -> str | None:
    """Why this LoRA layer, as it is now, must run stock; None where fusion computes the same.

    It is asked about the adapters that are active, or about these, one a row.
    """
    base = module.base_layer
    if type(base) not in (Conv1D, nn.Linear, *FROZEN):
        return f"base layer is {type(base).__name__}, not Conv1D or nn.Linear"
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return "adapters are merged into the base weight"
    if not is_plain(base):
        return "base_layer has hooks or a replaced forward"
    names = (
        _active(module) if given is None else [name for name in dict.fromkeys(given) if name in module.lora_A]
    )
    if not names and given is None:
        return "no adapter is active here"
    for name in names:
        if name in module.lora_variant:
            return f"adapter {name!r} is {type(module.lora_variant[name]).__name__}, not plain LoRA"
        lora_a, lora_b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        if not (is_plain(lora_a) and is_plain(lora_b) and is_plain(dropout)):
            return f"adapter {name!r} has hooks or a replaced forward"
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
            return f"adapter {name!r} has factors other than nn.Linear"
        if given is not None and lora_b.bias is not None:
            return f"adapter {name!r} has a bias"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"adapter {name!r} has {type(dropout).__name__} for dropout"
        if not isinstance(module.scaling[name], numbers.Real):
            return f"adapter {name!r} has a {type(module.scaling[name]).__name__} for scaling, not a number"
        reason = why_not_tensors(base.weight, lora_a.weight, lora_b.weight, same_dtype=False)
        if reason:
            return reason
    return None
