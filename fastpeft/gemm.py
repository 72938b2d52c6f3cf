"""Matrix products of the PyTorch path: by oneDNN itself where torch would ask MKL, or pass over the result first."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SMALL = 2**18  # multiplications, below which oneDNN's 20 µs a call cost more than they save


def mm(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x w + bias`, of x (M, K), w (K, N), bias (N,) or None, in one dtype, any strides; returns (M, N)."""
    if x.shape[0] * w.numel() >= SMALL and by_onednn(w, bias):
        bias = None if bias is None else bias.contiguous()  # it is read without regard to strides
        return torch.ops.mkldnn._linear_pointwise(x, w.T, bias, "none", [], "")
    return x @ w if bias is None else torch.addmm(bias, x, w)


def by_onednn(w: Tensor, bias: Tensor | None) -> bool:
    """Whether products with w, if they aren't small, go to oneDNN itself.

    Float32 ones do on AMD's CPUs with AVX-512, where torch asks MKL. Bfloat16 ones with a bias do where torch asks
    oneDNN too, but writes the bias to the result first and has the product added to it.
    """
    return (
        w.device.type == "cpu"
        and (w.dtype == torch.float32 or (w.dtype == torch.bfloat16 and bias is not None))
        and bool(torch.backends.mkldnn.enabled)  # torch's own switch
        and _onednn_is_faster(w.dtype)
    )


@functools.cache
def _onednn_is_faster(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_f") and has.get("sse4a"))  # SSE4a is AMD's alone
