"""The fused modules: stock modules whose class was swapped, with no maths and no tensors of their own."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from fastpeft import gemm, ops, reference
from fastpeft.adapters import Adapter, activation_name
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

    def forward(self, x: Tensor, *args: Any, residual: ops.Residual | None = None, **kwargs: Any) -> Tensor:
        """x (..., in_features) → (..., out_features), added to a residual if the block gives one."""
        site = self._fastpeft
        reason = why_not_here() or ("called with extra arguments" if args or kwargs else why_not_lora(self))
        reason = reason or why_not_tensors(x, self.base_layer.weight)
        if reason:
            site.record(ops.Route("stock", reason))
            return ops.added(super().forward(x, *args, **kwargs), residual)
        projection, rest = projection_of(self)
        fused = None if rest else residual
        try:
            y, route = ops.routed_lora_linear(x, projection, site.backend, site.exact, site.strict, fused)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        for name in rest:
            dropped = self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype))
            y = (y + self.lora_B[name](self.lora_A[name](dropped)) * self.scaling[name]).to(y.dtype)
        site.record(route)
        return ops.added(y, residual) if rest else y


def projection_of(module: Any) -> tuple[ops.Projection, list[str]]:
    """What a call of this LoRA layer fuses, as its state is now, and the adapters that it has to add one by one."""
    base = module.base_layer
    weight = base.weight if isinstance(base, Conv1D) else base.weight.t()
    bias = base.bias
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


def dropout_p(dropout: nn.Module) -> float:
    """The probability with which a call of `nn.Dropout` or `nn.Identity` drops now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _active(module: Any) -> list[str]:
    """The adapters that a call of this layer adds up."""
    return [name for name in module.active_adapters if name in module.lora_A]


def why_not_lora(module: Any) -> str | None:
    """Why this LoRA layer, as it is now, must run stock; None where fusion computes the same."""
    base = module.base_layer
    if type(base) not in (Conv1D, nn.Linear, *FROZEN):
        return f"base layer is {type(base).__name__}, not Conv1D or nn.Linear"
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return "adapters are merged into the base weight"
    if not is_plain(base):
        return "base_layer has hooks or a replaced forward"
    names = _active(module)
    if not names:
        return "no adapter is active here"
    for name in names:
        if name in module.lora_variant:
            return f"adapter {name!r} is {type(module.lora_variant[name]).__name__}, not plain LoRA"
        lora_a, lora_b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        if not (is_plain(lora_a) and is_plain(lora_b) and is_plain(dropout)):
            return f"adapter {name!r} has hooks or a replaced forward"
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
            return f"adapter {name!r} has factors other than nn.Linear"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"adapter {name!r} has {type(dropout).__name__} for dropout"
        if not isinstance(module.scaling[name], numbers.Real):
            return f"adapter {name!r} has a {type(module.scaling[name]).__name__} for scaling, not a number"
        reason = why_not_tensors(base.weight, lora_a.weight, lora_b.weight, same_dtype=False)
        if reason:
            return reason
    return None


class FusedAdapter(nn.Module):
    """Mixed into an adapter's class by `swap.fused_class`: its down-act-up-residual path in one operation."""

    _fastpeft: Site
    down: Any
    act: Any
    up: Any

    def forward(self, x: Tensor, *args: Any, residual: Tensor | None = None, **kwargs: Any) -> Tensor:
        """x (..., width) → the same shape, added to a residual if the block gives one."""
        site = self._fastpeft
        reason = why_not_here() or (
            "called with extra arguments" if args or kwargs else why_not_adapter(self)
        )
        reason = reason or why_not_tensors(x, self.down.weight, same_dtype=not isinstance(self, Adapter))
        if reason:
            site.record(ops.Route("stock", reason))
            y = super().forward(x, *args, **kwargs)
            return y if residual is None else residual + y
        try:
            y, route = ops.routed_adapter(
                x,
                self.down.weight,
                self.down.bias,
                self.up.weight,
                self.up.bias,
                activation_name(self.act) or "",
                getattr(self, "scale", 1.0),
                site.backend,
                site.exact,
                site.strict,
                residual,
            )
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        site.record(route)
        return y


def why_not_adapter(module: Any) -> str | None:
    """Why this adapter, as it is now, must run stock; None where fusion computes the same."""
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


@stands_for(NewGELUActivation)
class FusedGelu(NewGELUActivation):
    """GPT-2's `gelu_new` in one pass: the tanh GELU, which is the same function."""

    _fastpeft: Site

    def forward(self, input: Tensor) -> Tensor:
        if self._fastpeft.exact:
            self._fastpeft.record(ops.Route("stock", "exact=True keeps stock's arithmetic"))
            return super().forward(input)
        self._fastpeft.record(ops.Route("torch", "one pass"))
        return reference.gelu_new(input)


@stands_for(Conv1D)
class FusedConv1D(Conv1D):
    """A frozen `Conv1D` whose products go to oneDNN itself."""

    _fastpeft: Site

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) → (..., out_features)."""
        return ops.frozen_linear(x, self.weight, self.bias) if _is_served(self, x) else super().forward(x)


@stands_for(nn.Linear)
class FusedLinear(nn.Linear):
    """A frozen `nn.Linear` whose products go to oneDNN itself."""

    _fastpeft: Site

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) → (..., out_features)."""
        if _is_served(self, input):
            return ops.frozen_linear(input, self.weight.t(), self.bias)
        return super().forward(input)


FROZEN = (FusedConv1D, FusedLinear)


def _is_served(module: Any, x: Tensor) -> bool:
    """Whether this call of a fused frozen layer goes to oneDNN itself, noted in its site."""
    if not module.weight.is_cpu:  # moved since; a GPU doesn't wait for notes
        return False
    reason = _why_not_frozen_call(module, x) or why_not_frozen(module)
    module._fastpeft.record(ops.Route("stock", reason) if reason else ops.Route("torch", "oneDNN"))
    return reason is None


def _why_not_frozen_call(module: Any, x: Tensor) -> str | None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or ops.transformed():
        return "traced"  # whatever traces or transforms knows stock's product
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    width = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
    if x.shape[-1:] != (width,):
        return "an error"  # for stock to raise
    return why_not_tensors(x, *(t for t in (module.weight, module.bias) if t is not None))


def why_not_frozen(module: Any) -> str | None:
    """Why the products of a `Conv1D` or `nn.Linear` had better stay stock's, which is so on most machines."""
    weight, bias = module.weight, module.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "it trains"
    if not gemm.by_onednn(weight, bias):
        return f"oneDNN is off, or no faster for {weight.dtype} on this {weight.device.type}"
    # By 16 rows a product with less stays torch's anyway.
    return "it is small" if 16 * weight.numel() < gemm.SMALL else None


def why_not_here() -> str | None:
    """Why no module may be fused in this call, whatever it is: something looks at what is inside."""
    if torch.compiler.is_compiling():
        return None
    return "global module hooks" if _has_any_global_hook() else ops.transformed()


def is_plain(module: nn.Module, but_for: Any = None) -> bool:
    """Whether a call of `module` runs its class's forward, and perhaps `but_for` after it, and nothing else."""
    return not (
        any(hook is not but_for for hook in module._forward_hooks.values())
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def why_not_tensors(first: Tensor, *others: Tensor, same_dtype: bool = True) -> str | None:
    """Why these tensors can't go into one fused operation; stock decides what becomes of them."""
    for tensor in (first, *others):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its tensors are {type(tensor).__name__}"
        if tensor.dtype not in ops.FLOATS:
            return f"dtype {tensor.dtype}"
        if tensor.is_meta or tensor.device != first.device:
            return f"tensors on {first.device} and {tensor.device}"
        if same_dtype and tensor.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
            return f"dtypes {first.dtype} and {tensor.dtype}"
    return None
