"""Matrix products of the PyTorch path: float32 ones go to oneDNN on AMD's CPUs, where torch asks MKL."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SMALL = 2**18  # multiplications, below which oneDNN's 20 µs a call cost more than they save


def mm(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x w + bias`, of x (M, K), w (K, N), bias (N,) or None, in one dtype, any strides; returns (M, N)."""
    if x.shape[0] * w.numel() >= SMALL and by_onednn(w):
        bias = None if bias is None else bias.contiguous()  # it is read without regard to strides
        return torch.ops.mkldnn._linear_pointwise(x, w.T, bias, "none", [], "")
    return x @ w if bias is None else torch.addmm(bias, x, w)


def by_onednn(w: Tensor) -> bool:
    """Whether products with w, if they aren't small, go to oneDNN where torch would go elsewhere."""
    return (
        w.device.type == "cpu"
        and w.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)  # torch's own switch
        and _onednn_is_faster()
    )


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether this is a CPU where oneDNN's float32 kernels beat MKL's, which torch would take: AMD's with AVX-512."""
    has = torch.cpu.get_capabilities()
    # SSE4a is AMD's alone.
    return torch.backends.mkldnn.is_available() and bool(has.get("avx512_f") and has.get("sse4a"))
