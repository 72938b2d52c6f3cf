"""The rule by which a variant may be timed: it computes what stock computes."""

from __future__ import annotations

import torch
from torch import Tensor


class Wrong(RuntimeError):
    """A variant that must not be timed: it isn't what it says, or computes something else."""


def hold(what: str, found: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Let `found` err twice as much as stock's `expected` does in the same dtype, plus one rounding.

    An error is the Euclidean distance from `exact`, which is float64.

    Raises:
        Wrong: the error is larger, or not a number.
    """
    error, stock_error = ((t.double() - exact).norm().item() for t in (found, expected))
    allowed = 2 * stock_error + torch.finfo(expected.dtype).eps * exact.norm().item()
    if not error <= allowed:  # a NaN compares false
        raise Wrong(f"{what}: error {error:.3e} where stock's allows {allowed:.3e}")
