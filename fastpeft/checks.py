"""What the operations refuse of their arguments: dtypes, devices, shapes and numbers, each named in its error."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from fastpeft import reference
from fastpeft.projections import Bottleneck, Projection

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_lora_linear(x: Tensor, projection: Projection) -> None:
    """Raises TypeError or ValueError where `ops.lora_linear` doesn't serve these."""
    weight, bias, lora_a, lora_b, scaling, dropout_p, _ = projection
    _check_number("scaling", scaling)
    check_tensors(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)
    k, n = weight.shape if weight.dim() == 2 else (-1, -1)
    rank = lora_a.shape[0]
    check_shapes(
        ("x", x, (*x.shape[:-1], k)),
        ("bias", bias, (n,)),
        ("lora_a", lora_a, (rank, k)),
        ("lora_b", lora_b, (n, rank)),
        against=f"weight of shape {tuple(weight.shape)} (in_features, out_features)",
    )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")


def check_adapter(x: Tensor, adapter: Bottleneck) -> None:
    """Raises TypeError or ValueError where `ops.adapter` doesn't serve these."""
    down_weight, down_bias, up_weight, up_bias, activation, scale = adapter
    _check_number("scale", scale)
    check_tensors(x=x, down_weight=down_weight, down_bias=down_bias, up_weight=up_weight, up_bias=up_bias)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}: choose one of {', '.join(reference.ACTIVATIONS)}"
        )
    rank, k = down_weight.shape if down_weight.dim() == 2 else (-1, -1)
    check_shapes(
        ("x", x, (*x.shape[:-1], k)),
        ("down_bias", down_bias, (rank,)),
        ("up_weight", up_weight, (k, rank)),
        ("up_bias", up_bias, (k,)),
        against=f"down_weight of shape {tuple(down_weight.shape)} (bottleneck, width)",
    )


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a number, got {type(value).__name__}, which would get no gradient here"
        )


def is_dense(t: Tensor) -> bool:
    """Whether t's numbers are what lies in memory at its strides, of which kernels know no more than the address."""
    return t.layout is torch.strided and not t.is_nested and not t.is_neg()


def check_tensors(**named: Tensor | None) -> None:
    """Raises where one of these tensors has a dtype or layout that isn't served, or isn't where the first is."""
    (first, x), *_ = named.items()
    assert x is not None
    if x.dim() == 0:
        raise ValueError(f"{first} must have at least one dimension, got a scalar")
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}: use float32, bfloat16, float16 or float64")
        if not torch.compiler.is_compiling() and not is_dense(tensor):
            raise TypeError(
                f"{name} is sparse, nested or a negative view: use a dense tensor, or resolve_neg()"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first} on {x.device}: move them to one device"
            )


def check_dtypes(**named: Tensor | None) -> None:
    """Raises where one of these tensors hasn't the dtype of the first."""
    (first, x), *others = named.items()
    assert x is not None
    for name, tensor in others:
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have {first}'s dtype {x.dtype}, got {tensor.dtype}")


def check_shapes(*named: tuple[str, Tensor | None, tuple[int, ...]], against: str) -> None:
    """Raises where one of these tensors hasn't the shape beside it."""
    for name, tensor, shape in named:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} beside {against}")
