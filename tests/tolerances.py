"""Tolerances computed, not guessed: as good as PyTorch in the same dtype, measured against float64."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as(fused: Tensor, pytorch: Tensor, truth: Tensor, what: str = "y") -> None:
    """error(fused) ≤ 2 · error(PyTorch) + one rounding, an error being the Euclidean distance from `truth`.

    `fused` and `pytorch` share a dtype; `truth` is float64. One rounding is that dtype's eps times ‖truth‖.
    """
    assert truth.dtype == torch.float64, f"{what}: the truth must be float64, not {truth.dtype}"
    assert fused.dtype == pytorch.dtype, f"{what}: {fused.dtype} against {pytorch.dtype}"
    assert fused.shape == pytorch.shape == truth.shape, (
        f"{what}: {fused.shape}, {pytorch.shape}, {truth.shape}"
    )
    assert torch.isfinite(fused).all(), f"{what}: not finite, or an element that nobody wrote"
    error = (fused.double() - truth).norm().item()
    allowed = 2 * (pytorch.double() - truth).norm().item()
    allowed += torch.finfo(fused.dtype).eps * truth.norm().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
