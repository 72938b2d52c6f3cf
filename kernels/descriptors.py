"""Tensor descriptors, by which kernels on sm_90 and newer load and store tiles."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def described(
    tensors: Iterable[Tensor | None], blocks: Iterable[list[int]]
) -> tuple[TensorDescriptor | None, ...]:
    """Tensors (rows, columns), aligned, by descriptors of such blocks."""
    pairs = zip(tensors, blocks, strict=True)
    return tuple(t if t is None else _descriptor(t, block) for t, block in pairs)


def _descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """`TensorDescriptor.from_tensor` without its checks, which take the host as long as a launch by pointers.

    They hold for what torch has just allocated, and for operands like those that tiles were chosen for.
    """
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = t, t.shape, t.stride(), block
    return made


def aligned(t: Tensor) -> Tensor:
    """t, or a copy of it where it begins at an address that no descriptor may: that comes with each call."""
    return t if t.data_ptr() % 16 == 0 else t.clone()
