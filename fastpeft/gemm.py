"""Matrix products of the PyTorch path: by oneDNN itself where torch would ask MKL, or pass over the result first."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 2**18  # multiplications, below which oneDNN's 20 µs a call cost more than they save


class Served(NamedTuple):
    """The products that oneDNN is faster at than torch: of so few rows, on several threads, or of so many columns."""

    rows: float
    columns: float


ALL, NONE = Served(math.inf, 0), Served(0, math.inf)
#: MKL shares the work of few rows badly among AMD's cores, and that with a vocabulary whatever the rows and cores.
SOME = Served(32, 2**14)


def mm(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x w + bias`, of x (M, K), w (K, N), bias (N,) or None, in one dtype, any strides; returns (M, N)."""
    rows = x.shape[0]
    if rows * w.numel() >= SMALL and by_onednn(w, bias, rows):
        bias = None if bias is None else bias.contiguous()  # it is read without regard to strides
        return torch.ops.mkldnn._linear_pointwise(x, w.T, bias, "none", [], "")
    return x @ w if bias is None else torch.addmm(bias, x, w)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a b`, of matrices by `mm`, or of as many of each, (G, M, K) and (G, K, N)."""
    return mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


def add_product(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """y, to which `alpha a b` was added, of matrices or of as many of each."""
    return y.addmm_(a, b, alpha=alpha) if y.dim() == 2 else y.baddbmm_(a, b, alpha=alpha)


def by_onednn(w: Tensor, bias: Tensor | None, rows: int = 1) -> bool:
    """Whether products of so many rows with w (K, N), if they aren't small, go to oneDNN itself.

    Float32 ones do on AMD's CPUs, where torch asks MKL: all of them with AVX-512, `SOME` with AVX2 alone. Bfloat16 ones
    with a bias do where torch asks oneDNN too, but writes the bias to the result first and has the product added to it.
    """
    if w.device.type != "cpu" or not torch.backends.mkldnn.enabled:  # torch's own switch
        return False
    if w.dtype != torch.float32 and (w.dtype != torch.bfloat16 or bias is None):
        return False
    served = _served(w.dtype)
    return w.shape[1] >= served.columns or (rows <= served.rows and torch.get_num_threads() > 1)


@functools.cache
def _served(dtype: torch.dtype) -> Served:
    if not torch.backends.mkldnn.is_available():
        return NONE
    if dtype == torch.bfloat16:
        return ALL if torch.ops.mkldnn._is_mkldnn_bf16_supported() else NONE
    has = torch.cpu.get_capabilities()
    if not has.get("sse4a"):  # AMD's alone
        return NONE
    return ALL if has.get("avx512_f") else SOME if has.get("avx2") else NONE
