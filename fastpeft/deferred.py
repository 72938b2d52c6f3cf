"""Logits that nobody has read yet: a tensor that is computed when it is, and a head's output that holds one.

Stock's own loss is handed such a tensor and computes the loss without it. Whoever reads `outputs.logits` gets a plain
tensor. What walks over an output's values (Trainer's evaluation, accelerate's conversion to float32) passes the
deferred one on: it counts as a tensor of its shape and dtype, and becomes a plain one in the first operation that
isn't a change of either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.utils import ModelOutput

from fastpeft.lm_head import routed_lm_head_loss
from fastpeft.swap import Site


class Product(NamedTuple):
    """What logits are computed from."""

    hidden: Tensor  # (..., K)
    weight: Tensor  # (V, K), which doesn't train
    bias: Tensor | None
    dtype: torch.dtype  # autocast's, where there was one
    site: Site  # of the head

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias in the product's dtype."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return self.hidden.to(self.dtype), self.weight.to(self.dtype), bias

    def state(self) -> list[Any]:
        """What changes when something else is put into one of its tensors."""
        tensors = [t for t in self[:3] if t is not None]
        return [(t.data_ptr(), t.shape, None if t.is_inference() else t._version) for t in tensors]


class Logits(Tensor):
    """`hidden weightᵀ + bias`, (..., V), with no storage: computed when it is read."""

    product: Product
    state: list[Any]  # the product's, when it was deferred
    grad_mode: bool  # likewise
    plain: Tensor | None  # once it was read

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        waits = func in _DEFERRED and all(type(a) is not Logits or a.plain is None for a in args)
        deferred = _DEFERRED[func](*args, **kwargs) if waits else None
        return func(*tree_map(read, args), **tree_map(read, kwargs)) if deferred is None else deferred

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any, kwargs: Any
    ) -> Any:
        """For what asks no torch function, such as another autograd function: history is kept above."""
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would change logits that weren't read: read outputs.logits first")
        return func(*tree_map(_computed, args), **tree_map(_computed, kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return read(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return read(self).__deepcopy__(memo)


def defer(product: Product, dtype: torch.dtype | None = None) -> Logits:
    """The logits of `product`, in its dtype or another, to be computed when they are read."""
    logits: Any = _Deferred.apply(product.hidden, product.weight, dtype or product.dtype)
    logits.product, logits.state = product, product.state()
    logits.grad_mode, logits.plain = torch.is_grad_enabled(), None
    return logits


def read(value: Any) -> Any:
    """Plain logits, with stock's history, of deferred ones; anything else as it is.

    Raises:
        RuntimeError: what they are computed from was changed since.
    """
    if type(value) is not Logits:
        return value
    if value.plain is None:
        hidden = value.product.hidden
        with torch.inference_mode(hidden.is_inference()), torch.set_grad_enabled(value.grad_mode):
            value.plain = _computed(value)
            if value.requires_grad and not value.plain.requires_grad:
                with torch.enable_grad():  # an autograd function, or checkpoint, has returned it since
                    value.plain = _Plain.apply(value, value.plain)
    return value.plain


def _computed(value: Any) -> Any:
    if type(value) is not Logits:
        return value
    if value.plain is not None:
        return value.plain.detach()
    hidden, weight, bias = _unchanged(value).operands()
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden, weight, bias).to(value.dtype)


def _unchanged(logits: Logits) -> Product:
    if logits.product.state() != logits.state:
        raise RuntimeError(
            "the hidden states or the head's weight were changed before these logits were read, and they can't be "
            "computed any more: read outputs.logits before the change, or use fastpeft.patch(model, scope='layers')"
        )
    return logits.product


class _Deferred(torch.autograd.Function):
    """Gives deferred logits the history that reading them gives."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        ctx.dtype = hidden.dtype
        shape = (*hidden.shape[:-1], len(weight))
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        return make(Logits, shape, dtype=dtype, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return (d_logits.to(weight.dtype) @ weight).to(ctx.dtype), None, None


class _Plain(torch.autograd.Function):
    """Gives plain logits the history that the deferred ones have got since."""

    @staticmethod
    def forward(ctx: Any, deferred: Tensor, plain: Tensor) -> Tensor:  # type: ignore[override]
        return plain.view_as(plain)

    @staticmethod
    def backward(ctx: Any, d_plain: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return d_plain, None


def _float(logits: Logits) -> Logits:
    return logits if logits.dtype == torch.float32 else defer(_unchanged(logits), torch.float32)


def _view(logits: Logits, *shape: Any) -> Logits | None:
    """As rows, (M, V); None for another shape."""
    if shape not in ((-1, logits.shape[-1]), ((-1, logits.shape[-1]),)):
        return None
    product = _unchanged(logits)
    return defer(product._replace(hidden=product.hidden.flatten(0, -2)), logits.dtype)


def _getitem(logits: Logits, key: Any) -> Logits | None:
    """Some positions, (..., L, V); None where the last dimension isn't left whole."""
    if not (
        isinstance(key, tuple)
        and key[:1] == (...,)
        and key[-1:] == (slice(None),)
        and all(isinstance(k, slice) for k in key[1:])
    ):
        return None
    product = _unchanged(logits)
    return defer(product._replace(hidden=product.hidden[key]), logits.dtype)


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """The loss without the logits; None where it is of another kind, or an error."""
    if type(input) is not Logits or type(target) is not Tensor or target.dtype != torch.int64:
        return None
    if not (weight is size_average is reduce is None) or input.dim() != 2 or target.shape != input.shape[:1]:
        return None
    product, device = _unchanged(input), input.device.type
    autocast = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False):
        hidden, head, bias = product.operands()
        backend = product.site.options.backend
        loss, route = routed_lm_head_loss(
            hidden, head, target, bias, ignore_index, reduction, None, label_smoothing, backend
        )
    product.site.record(route)
    return loss.to(torch.float32 if autocast else input.dtype)


_DEFERRED: dict[Any, Callable[..., Any]] = {
    Tensor.float: _float,
    Tensor.view: _view,
    Tensor.contiguous: lambda logits: logits,
    Tensor.__getitem__: _getitem,
    F.cross_entropy: _cross_entropy,
}
#: What a tensor without storage knows.
_METADATA = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda")),
}  # fmt: skip


class _Output:
    """Mixed into the class of a head's output, whose logits are plain then for whoever asks for them."""

    @property
    def logits(self) -> Any:
        return read(vars(self)["logits"])

    @logits.setter
    def logits(self, value: Any) -> None:
        vars(self)["logits"] = value

    def __getitem__(self: Any, key: Any) -> Any:
        if isinstance(key, str):
            return read(super().__getitem__(key))  # type: ignore[misc]
        picked = tuple(self.values())[key]
        return tuple(map(read, picked)) if isinstance(key, slice) else read(picked)

    def get(self: Any, key: Any, default: Any = None) -> Any:
        return read(super().get(key, default))  # type: ignore[misc]

    def __reduce__(self: Any) -> Any:
        self.logits = self.logits  # a copy's are plain
        return type(self).__mro__[2], *super().__reduce__()[1:]


@functools.cache
def _output_class(stock: type[ModelOutput]) -> type[ModelOutput]:
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (_Output, stock), names)


def reading(output: ModelOutput) -> ModelOutput:
    """`output`, whose deferred logits become plain ones where they are read."""
    output.__class__ = _output_class(type(output))
    return output
