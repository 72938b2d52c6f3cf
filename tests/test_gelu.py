"""`gelu_new` in few passes, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_good_as

from fastpeft import reference
from fastpeft.gelu import gelu_new


def outcome(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_it_equals_the_formula(dtype, spread):
    x = (torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * spread).to(dtype)
    for x_ in (x, x.T):
        found, pytorch, exact = (
            outcome(*each)
            for each in ((gelu_new, x_), (reference.gelu_new, x_), (reference.gelu_new, x_.double()))
        )
        for part, *results in zip(("y", "dx"), found, pytorch, exact, strict=True):
            assert_as_good_as(*results, part)


def test_16_bits_are_rounded_once():
    x = torch.linspace(-5, 5, 4096).bfloat16()
    once = reference.gelu_new(x.double()).bfloat16()
    assert (gelu_new(x) != once).double().mean() < 0.01


def test_far_out_it_is_zero_or_x():
    x = torch.tensor([-1e30, -100.0, -12.0, 0.0, 12.0, 100.0, 1e30])
    torch.testing.assert_close(gelu_new(x), x.relu(), rtol=0, atol=0)
    assert gelu_new(torch.tensor([float("nan")])).isnan().all()


def test_it_keeps_nothing_but_x():
    kept = []
    x = torch.randn(8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        gelu_new(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
