"""Updates of groups of rows on the PyTorch path: alike neighbours at once, each as by itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tolerances import assert_as_good_as
from torch import Tensor

from fastpeft import projections, reference
from fastpeft.projections import Grouped, Update, by_torch

K, N = 24, 40


def update(
    seed: int, rank: int = 4, scaling: float = 2.0, dropout_p: float = 0.0, trains: bool = True
) -> Update:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, K, generator=generator) * 0.2, torch.randn(N, rank, generator=generator) * 0.2
    return Update(a.requires_grad_(trains), b.requires_grad_(trains), scaling, dropout_p)


def layer(updates: list[Update | None], sizes: list[int], dtype: torch.dtype = torch.float32) -> Grouped:
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    weight = torch.randn(K, N, generator=torch.Generator().manual_seed(9)).to(dtype)
    return Grouped(weight, torch.ones(N, dtype=dtype), updates, tuple(bounds))


@pytest.mark.parametrize(("updates", "sizes", "expected"), [
    ([update(0), update(1), update(2)], [5, 5, 5], [(0, 15, 3)]),
    ([update(0), update(1), update(2)], [5, 5, 4], [(0, 10, 2), (10, 14, 1)]),
    ([update(0), update(1, rank=2), update(2)], [5, 5, 5], [(0, 5, 1), (5, 10, 1), (10, 15, 1)]),
    ([update(0), update(1, scaling=1.0)], [5, 5], [(0, 5, 1), (5, 10, 1)]),
    ([update(0), update(1, dropout_p=0.1)], [5, 5], [(0, 5, 1), (5, 10, 1)]),
    ([update(0), update(1, trains=False)], [5, 5], [(0, 5, 1), (5, 10, 1)]),
    ([update(0), None, update(1)], [5, 5, 5], [(0, 5, 1), (10, 15, 1)]),
    ([update(0), None, update(1)], [5, 0, 5], [(0, 10, 2)]),
    ([update(0), update(1), update(2)], [5, 0, 5], [(0, 10, 2)]),
    ([None, update(0), update(1), None], [3, 6, 6, 2], [(3, 15, 2)]),
    ([update(0), update(1)], [7, 7], [(0, 7, 1), (7, 14, 1)]),
    ([None], [5], []),
])  # fmt: skip
def test_alike_neighbours_are_one_part(updates, sizes, expected, monkeypatch):
    monkeypatch.setattr(projections, "_FEW", 6)
    parts, factors = layer(updates, sizes).parts()
    assert [(part.rows.start, part.rows.stop, part.updates) for part in parts] == expected
    there = [each for each, size in zip(updates, sizes, strict=True) if each is not None and size]
    assert [id(f) for f in factors] == [id(f) for each in there for f in each[:2]]


def apart(x: Tensor, given: Grouped, _: bool) -> Tensor:
    """The formula, group by group, in x's dtype."""
    rows = []
    for each, (start, stop) in zip(given.updates, pairwise(given.bounds), strict=True):
        some = x[start:stop]
        if each is None:
            rows.append(some @ given.weight + given.bias)
        else:
            a, b = each.lora_a.to(x.dtype), each.lora_b.to(x.dtype)
            rows.append(reference.lora_linear(some, given.weight, given.bias, a, b, each.scaling))
    return torch.cat(rows)


def doubled(given: Grouped) -> Grouped:
    weight, bias, updates, bounds = given
    wider = [u and Update(*(f.detach().double().requires_grad_() for f in u[:2]), *u[2:]) for u in updates]
    return Grouped(weight.double(), bias.double(), wider, bounds)


def each_side(given: Grouped, dtype: torch.dtype, exact: bool = False) -> list[tuple[Tensor, list[Tensor]]]:
    """y, x and the factors: fused, by the formula in x's dtype, and in float64."""
    x = torch.randn(given.bounds[-1], K, generator=torch.Generator().manual_seed(7)).to(dtype)
    sides = (by_torch, given, x), (apart, given, x), (apart, doubled(given), x.double())
    found = []
    for compute, layer_of_side, rows in sides:
        leaf = rows.clone().requires_grad_()
        factors = [f for each in layer_of_side.updates if each is not None for f in each[:2]]
        found.append((compute(leaf, layer_of_side, exact), [leaf, *factors]))
    return found


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_is_as_by_itself(dtype, exact):
    """Two, one of no update, three of another rank of which one has no rows, and one of rows of its own number."""
    updates = [update(0), update(1), None, *(update(i, rank=3) for i in (2, 3, 4)), update(5)]
    given = layer(updates, [6, 6, 3, 5, 0, 5, 4], dtype)
    assert [part.updates for part in given.parts()[0]] == [2, 2, 1]
    dy = torch.randn(given.bounds[-1], N, generator=torch.Generator().manual_seed(8))
    found = [
        [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)]
        for y, leaves in each_side(given, dtype, exact)
    ]
    without_rows = 2 + 2 * 3, 3 + 2 * 3  # the factors of the fourth update
    for i, (fused, pytorch, truth) in enumerate(zip(*found, strict=True)):
        if i in without_rows:
            assert fused is None
            assert not truth.any()
        else:
            assert fused.stride() == pytorch.contiguous().stride()
            assert_as_good_as(fused, pytorch, truth, f"tensor {i}")
    with torch.no_grad():
        torch.testing.assert_close(each_side(given, dtype, exact)[0][0], found[0][0])


def test_second_derivatives_of_stacked_updates():
    found = []
    for y, leaves in each_side(layer([update(i) for i in range(3)], [5, 5, 5]), torch.float32):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for i, each in enumerate(zip(*found, strict=True)):
        assert_as_good_as(*each, f"tensor {i}")


def test_each_gradient_has_a_storage_of_its_own():
    y, (_, *factors) = each_side(layer([update(i, rank=1) for i in range(3)], [5, 5, 5]), torch.float32)[0]
    gradients = torch.autograd.grad(y.sum(), factors)
    assert len({each.untyped_storage().data_ptr() for each in gradients}) == 6
    assert [each.untyped_storage().nbytes() for each in gradients] == [4 * K, 4 * N] * 3
    assert not any(each._is_view() for each in gradients)


def test_a_factor_that_changed_since_is_an_error():
    y, (x, *factors) = each_side(layer([update(i) for i in range(3)], [5, 5, 5]), torch.float32)[0]
    with torch.no_grad():
        factors[2].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), [x])


def test_gradients_in_batches():
    y, leaves = each_side(layer([update(i) for i in range(3)], [5, 5, 5]), torch.float32)[0]
    several = torch.randn(4, *y.shape, generator=torch.Generator().manual_seed(8))
    found = torch.autograd.grad(y, leaves, several, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(several):
        for at_once, alone in zip(found, torch.autograd.grad(y, leaves, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(at_once[i], alone)


def test_stacked_updates_drop_apart():
    """Of y = keep / (1 - p) and dx, with every factor the identity."""
    rows, p = 200, 0.3
    eye = torch.eye(64)
    given = Grouped(torch.zeros(64, 64), None, [Update(eye, eye, 1.0, p)] * 3, (0, rows, 2 * rows, 3 * rows))
    assert [part.updates for part in given.parts()[0]] == [3]
    x = torch.ones(3 * rows, 64, requires_grad=True)
    y = by_torch(x, given, False)
    (dx,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(dx, y), "what is kept forward is kept backward"
    kept = (y.view(3, rows, 64) != 0).double()
    deviation = (p * (1 - p) / kept[0].numel()) ** 0.5
    assert (kept.mean((1, 2)) - (1 - p)).abs().max() < 5 * deviation
    for i in range(3):
        agree = (kept[i] == kept[i - 1]).double().mean().item()
        assert abs(agree - (p**2 + (1 - p) ** 2)) < 0.03, "two draws know nothing of each other"
