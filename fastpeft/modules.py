"""The fused GELU and frozen layers; and what any module must be to be fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from fastpeft import gemm, ops, reference, routes
from fastpeft.adapters import Adapter
from fastpeft.checks import FLOATS, is_dense
from fastpeft.kernels.rows import rows_in
from fastpeft.routes import Route
from fastpeft.stock import Defined
from fastpeft.swap import Site, stands_for

#: What a call of a fused layer stands for, and what runs between a call and the forward.
_LAYERS = Defined(
    (nn.Module, "__call__"), (nn.Module, "_call_impl"), (F, "linear"), (F, "dropout"), (torch, "addmm"),
    *((kind, name) for name in ("forward", "__call__") for kind in (
        LoraLinear, Adapter, Conv1D, nn.Linear, nn.Dropout, nn.Identity,
        NewGELUActivation, GELUActivation, nn.GELU, nn.ReLU, nn.SiLU,
    )),
    (Adapter, "update"),
)  # fmt: skip
#: Modes to which it is all the same whose operators run: `torch.device(...)` and torch.set_default_device.
HARMLESS_MODES: set[type] = {DeviceContext}


@stands_for(NewGELUActivation)
class FusedGelu(NewGELUActivation):
    """GPT-2's `gelu_new` in one pass: the tanh GELU, which is the same function."""

    _fastpeft: Site

    def forward(self, input: Tensor) -> Tensor:
        site = vars(self).get("_fastpeft")
        if site is None:  # made by somebody of this class, which takes no arguments
            return super().forward(input)
        reason = "exact=True keeps stock's arithmetic" if site.options.exact else _why_not_operators()
        reason = reason or why_not_tensors(input)
        if reason:
            site.record(Route("stock", reason))
            return super().forward(input)
        site.record(Route("torch", "one pass"))
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
    if not routes.on_cpu(module.weight):  # moved since; a GPU doesn't wait for notes
        return False
    reason = _why_not_frozen_call(module, x) or why_not_frozen(module, rows_in(x))
    module._fastpeft.record(Route("stock", reason) if reason else Route("torch", "oneDNN"))
    return reason is None


def _why_not_frozen_call(module: Any, x: Tensor) -> str | None:
    if torch.compiler.is_compiling() or routes.transformed():
        return "traced"  # whatever traces or transforms knows stock's product
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    held = (t for t in (module.weight, module.bias) if t is not None)
    reason = _why_not_operators() or why_not_tensors(x, *held)
    width = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
    return reason or (None if x.shape[-1:] == (width,) else "an error")  # for stock to raise


def why_not_frozen(module: Any, rows: int = 1) -> str | None:
    """Why products of a `Conv1D` or `nn.Linear` with so many rows had better stay stock's, as on most machines."""
    weight, bias = module.weight if isinstance(module, Conv1D) else module.weight.t(), module.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "it trains"
    if not gemm.by_onednn(weight, bias, rows):
        return f"oneDNN is off, or no faster at such products of {weight.dtype} on this {weight.device.type}"
    # By 16 rows a product with less stays torch's anyway.
    return "it is small" if 16 * weight.numel() < gemm.SMALL else None


def why_not_here() -> str | None:
    """Why no module may be fused in this call, whatever it is: something looks at what is inside, or replaced it."""
    if torch.compiler.is_compiling():
        return _replaced()
    return "global module hooks" if _has_any_global_hook() else _why_not_operators() or routes.transformed()


def _why_not_operators() -> str | None:
    """Why a call has to run stock's own operators: they were replaced, or a mode is handed each of them."""
    if torch.compiler.is_compiling():
        return _replaced()
    if torch.jit.is_tracing():
        return "traced"  # which knows no operations but torch's
    if torch._C._len_torch_dispatch_stack() and not _harmless(_get_current_dispatch_mode_stack()):
        return "a dispatch mode looks on"
    if torch._C._len_torch_function_stack() and not _harmless(_get_current_function_mode_stack()):
        return "a function mode looks on"
    return _LAYERS.replaced()


def _harmless(modes: list[Any]) -> bool:
    return HARMLESS_MODES.issuperset(map(type, modes))


@torch.compiler.assume_constant_result  # what is compiled stays as it was traced, as stock does
def _replaced() -> str | None:
    return _LAYERS.replaced()


def held_by(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, one that is held twice twice; `nn.Module.modules` takes five times as long."""
    found = [module]
    for each in found:  # which grows: each after the one that holds it
        found.extend(m for m in each._modules.values() if m is not None)
    return found


def touched(attributes: list[dict[str, Any]]) -> bool:
    """Whether any of the modules with these `__dict__`s has a hook on its forward, or a forward of its own.

    Hooks come with handles, which torch numbers; but some take a module's dictionary of hooks away for a call, and put
    it back. A loop, for three lookups in one take less than three passes by `map`.
    """
    for held in attributes:  # noqa: SIM110 - `any` would enter a generator for each
        if held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held:
            return True
    return False


def is_plain(module: nn.Module, but_for: Any = None) -> bool:
    """Whether a call of `module` runs its class's forward, and perhaps `but_for` after it, and nothing else."""
    return not (
        (module._forward_hooks and any(hook is not but_for for hook in module._forward_hooks.values()))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def why_not_tensors(first: Tensor, *others: Tensor, same_dtype: bool = True) -> str | None:
    """Why these tensors can't go into one fused operation; stock decides what becomes of them."""
    traced = torch.compiler.is_compiling()  # which can't ask `is_inference` or `is_neg`
    saves = torch.is_grad_enabled() and not traced
    for tensor in (first, *others):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its tensors are {type(tensor).__name__}"
        if tensor.dtype not in FLOATS:
            return f"dtype {tensor.dtype}"
        if not traced and not is_dense(tensor):
            return "a sparse or nested tensor, or a negative view"
        if saves and tensor.is_inference():  # no autograd function can save one
            return "its tensors are of torch.inference_mode"
        if tensor.is_meta or tensor.device != first.device:
            return f"tensors on {first.device} and {tensor.device}"
        if same_dtype and tensor.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
            return f"dtypes {first.dtype} and {tensor.dtype}"
    return None
