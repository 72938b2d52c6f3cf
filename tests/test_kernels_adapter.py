"""The adapter kernels against float64: y, dx and every parameter's gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_checks import (
    DTYPES,
    ROWS,
    adapter_arguments,
    check_adapter,
    compare,
    describe,
    draws_of,
    pairwise,
)

from fastpeft import reference
from fastpeft.kernels import adapter, bottleneck, launch, tile_table

ACTIVATIONS = list(reference.ACTIVATIONS)
TOKENS = [1, 17, 63, 128, 257]
BOTTLENECKS = [1, 3, 8, 16, 64, 100, 256]
SAMPLE = [
    *pairwise(
        m=ROWS,
        width=[36, 100, 136],  # less than a step of 64 columns, or more, and more than two
        bottleneck=[12, 16, 100, 256],  # padded to the least there is, just that, padded, and the largest
        activation=ACTIVATIONS,
        dtypes=list(DTYPES),
        form=["dense", "offset", "transposed", "expanded"],
        bias=[True, False],
    ),
    # Once and in one strip, for it takes 32 draws: every stride of the weights is 1.
    dict(m=17, width=36, bottleneck=1, activation="gelu", dtypes="bf16", form="dense", bias=True),
]

pytestmark = pytest.mark.usefixtures("nan_empty")


@pytest.mark.parametrize("case", SAMPLE, ids=describe)
def test_ragged_shapes_agree_with_float64(case, device):
    sizes = case["m"], case["width"], case["bottleneck"], case["dtypes"], device
    draws = draws_of(adapter_arguments, *sizes, form=case["form"], bias=case["bias"])
    check_adapter(adapter.adapter, draws, case["activation"])


# Each is a whole number of strips: the narrowest stands for all.
@pytest.mark.parametrize(
    "width", [768, *(pytest.param(k, marks=pytest.mark.full) for k in (1024, 1280, 1600))]
)
def test_every_gpt2_width_agrees_with_float64(width, device):
    draws = draws_of(adapter_arguments, 65, width, 64, "bf16+fp32", device)
    check_adapter(adapter.adapter, draws, "gelu_tanh")


@pytest.mark.full
@pytest.mark.parametrize("width", [36, 136, 768])
@pytest.mark.parametrize("m", TOKENS)
def test_every_shape_agrees_with_float64(m, width, device):
    for rank, activation, dtypes in itertools.product(BOTTLENECKS, ACTIVATIONS, DTYPES):
        draws = draws_of(adapter_arguments, m, width, rank, dtypes, device)
        check_adapter(adapter.adapter, draws, activation)


@pytest.mark.parametrize("rank", sorted(tile_table.ADAPTER))
def test_every_strip_gives_what_the_chosen_one_gives(rank, device):
    x, down, down_bias, up, up_bias = adapter_arguments(70, 72, rank, "bf16", device).values()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device, x.dtype)
    y, z = bottleneck.forward(x, down, down_bias, up, up_bias, "silu", 0.5)
    dx, flat = bottleneck.backward(dy, x, down, up, z, "silu", 0.5, torch.float32, True, True)
    for strip in tile_table.ADAPTER[rank]:
        y_strip, z_strip = bottleneck.forward(x, down, down_bias, up, up_bias, "silu", 0.5, None, strip)
        torch.testing.assert_close(y_strip, y)
        torch.testing.assert_close(z_strip, z)
        for splits in (1, 3):
            some = (True, True, strip, tile_table.ADAPTER_GRADIENT[rank], splits)
            dx_strip, flat_strip = bottleneck.backward(dy, x, down, up, z, "silu", 0.5, torch.float32, *some)
            torch.testing.assert_close(dx_strip, dx)
            torch.testing.assert_close(flat_strip, flat, atol=2e-2, rtol=1e-2)


# The residual has x's dtype: it is widened or it is not.
@pytest.mark.parametrize(
    "dtypes", ["fp32", "bf16", *(pytest.param(d, marks=pytest.mark.full) for d in ("fp16", "bf16+fp32"))]
)
@pytest.mark.parametrize("m", [0, 65])  # nothing, and more than a strip
def test_a_residual_is_added_and_gets_dy(m, dtypes, device):
    draws = draws_of(adapter_arguments, m, 100, 16, dtypes, device)
    for draw, arguments in enumerate(draws):
        x, generator = arguments["x"], torch.Generator().manual_seed(draw)
        arguments["residual"] = torch.randn(x.shape, generator=generator).to(device, x.dtype)

    def formula(residual, **given):
        return residual + reference.adapter(**given, activation="silu", scale=0.7)

    def fused(**given):
        return adapter.adapter(**given, activation="silu", scale=0.7)

    compare(fused, formula, draws, ("down_weight", "up_weight"))


@pytest.mark.parametrize(("m", "width"), [(0, 24), (5, 0)])
def test_no_rows_or_no_columns_launch_no_kernel(m, width, device):
    with launch.record() as launches:
        x, down, down_bias, up, up_bias = (
            t if t is None else t.requires_grad_()
            for t in adapter_arguments(m, max(width, 1), 3, "fp32", device).values()
        )
        if width == 0:
            x, down, up, up_bias = (t.detach()[..., :0] for t in (x, down, up.T, up_bias))
            up = up.T
            y, _ = bottleneck.forward(x, down, down_bias.detach(), up, up_bias, "relu", 1.0)
        else:
            y = adapter.adapter(x, down, down_bias, up, up_bias, "relu", 1.0)
            y.sum().backward()
            assert all(not t.grad.any() for t in (down, down_bias, up, up_bias))
    assert y.shape == (m, width)
    assert launches == []


def test_nan_stays_in_its_row(device):
    x, down, down_bias, up, up_bias = adapter_arguments(70, 100, 8, "fp16", device).values()
    x[5] = float("nan")
    y, z = bottleneck.forward(x, down, down_bias, up, up_bias, "relu", 1.0)
    assert y[5].isnan().all()
    assert y.isnan().any(1).sum() == 1
    dy = torch.ones_like(y)
    dy[69] = float("nan")
    dx, _ = bottleneck.backward(dy, x, down, up, z.nan_to_num(), "relu", 1.0, x.dtype, True, False)
    assert dx[69].isnan().all()
    assert dx.isnan().any(1).sum() == 1


def test_only_what_is_asked_for_is_computed(device):
    x, down, _, up, _ = adapter_arguments(40, 24, 3, "fp32", device).values()
    y, z = bottleneck.forward(x, down, None, up, None, "relu", 1.0)
    kernels = {}
    for need_x, need_parameters in ((True, False), (False, True), (True, True)):
        with launch.record() as launches:
            dx, flat = bottleneck.backward(y, x, down, up, z, "relu", 1.0, x.dtype, need_x, need_parameters)
        assert (dx is not None, flat is not None) == (need_x, need_parameters)
        kernels[need_x, need_parameters] = launches
    assert [each.kernel.__name__ for each in kernels[True, False]] == ["adapter_backward_kernel"]
    assert kernels[False, True][0].args["dx_ptr"] is None


@pytest.mark.parametrize("frozen", range(5))
def test_a_frozen_argument_gets_no_gradient_and_the_others_keep_theirs(frozen, device):
    arguments = list(adapter_arguments(40, 24, 3, "fp32", device).values())
    leaves = [t.clone().requires_grad_() for t in arguments]
    adapter.adapter(*leaves, "gelu", 1.0).square().sum().backward()
    some = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(arguments)]
    adapter.adapter(*some, "gelu", 1.0).square().sum().backward()
    for i, (one, other) in enumerate(zip(leaves, some, strict=True)):
        assert other.grad is None if i == frozen else torch.equal(one.grad, other.grad)


def test_parameters_of_different_dtypes_get_gradients_in_their_own(device):
    x, down, down_bias, up, up_bias = adapter_arguments(40, 24, 3, "bf16", device).values()
    leaves = [down.float(), down_bias, up, up_bias.float()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    adapter.adapter(x, *leaves, "relu", 1.0).sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]


def test_gradients_are_the_same_bits_each_time(device):
    x, down, down_bias, up, up_bias = adapter_arguments(129, 72, 8, "bf16+fp32", device).values()
    y, z = bottleneck.forward(x, down, down_bias, up, up_bias, "gelu", 1.0)
    first, again = (
        bottleneck.backward(y, x, down, up, z, "gelu", 1.0, torch.float32, True, True) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.14, of its own check
def test_opcheck_passes_with_and_without_biases(device):
    x, down, down_bias, up, up_bias = (
        t.requires_grad_() for t in adapter_arguments(9, 24, 3, "fp32", device).values()
    )
    operator = torch.ops.fastpeft.adapter.default
    torch.library.opcheck(operator, (x, down, down_bias, up, up_bias, "silu", 0.5, torch.ones_like(x)))
    torch.library.opcheck(operator, (x, down, None, up, None, "relu", 1.0, None))


def test_a_second_derivative_is_refused(device):
    x, *parameters = adapter_arguments(9, 24, 3, "fp32", device).values()
    x.requires_grad_()
    y = adapter.adapter(x, *parameters, "silu", 1.0)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()
