"""The dtypes that autocast gives a linear layer's operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.checks import check_dtypes
from fastpeft.projections import Grouped, Projection, Update

#: Devices that have an autocast; of another torch mustn't be asked whether it is on. Known at import: Dynamo of torch
#: 2.11 can't trace the question.
_AUTOCASTS = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla"))
)


def layer_as_autocast(x: Tensor, layer: Any) -> tuple[Tensor, Any]:
    """x and the layer as autocast would have them; TypeError where weight or bias still differ from x."""
    if isinstance(layer, Grouped):
        updates = [u and Update._make((*as_autocast(*u[:2]), *u[2:])) for u in layer.updates]
        x, weight, bias = as_autocast(x, *layer[:2])
        layer = Grouped(weight, bias, updates, layer.bounds)
    else:
        x, weight, bias, lora_a, lora_b = as_autocast(x, *layer[:4])
        numbers = float(layer.scaling), float(layer.dropout_p)
        layer = Projection(weight, bias, lora_a, lora_b, *numbers, layer.groups)
    check_dtypes(x=x, weight=weight, bias=bias)
    return x, layer


def as_autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """A linear layer's inputs in the dtype that they have there, `dtype_here`."""
    dtype = dtype_here(x)
    return (x, *tensors) if dtype is None else tuple(t if t is None else t.to(dtype) for t in (x, *tensors))


def dtype_here(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a linear layer's inputs, all but float64 ones; None where it is off."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) and x.dtype != torch.float64 else None


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return x.device.type in _AUTOCASTS and torch.is_autocast_enabled(x.device.type)
