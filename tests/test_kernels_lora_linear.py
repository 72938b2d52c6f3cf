"""The LoRA linear kernels against float64 with the same dropout mask: y, dx and every parameter's gradient."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from kernel_checks import (
    DTYPES,
    ROWS,
    check_lora,
    choose_tile,
    describe,
    draws_of,
    linear_cases,
    lora_arguments,
    pairwise,
    sizes_over,
)

from fastpeft.kernels import dropout, launch, lora_layer, lora_linear, tile_table, tiling
from fastpeft.kernels.gradients import Gradients
from fastpeft.kernels.linear import Linear
from fastpeft.kernels.shrink import Shrink

GPT2_LAYERS = {
    "attn.c_attn": (768, 2304),
    "attn.c_proj": (768, 768),
    "mlp.c_fc": (768, 3072),
    "mlp.c_proj": (3072, 768),
}
RAGGED = [
    (100, 36),
    (72, 72),
    (40, 264),
]  # columns of one tile, or two; rows of 16 bytes, which descriptors need, or not
TOKENS = [1, 17, 63, 128, 257]
LORA_RANKS = [1, 3, 8, 16, 64, 100]
DROPOUTS = [0.0, 0.1, 0.5]
SAMPLE = list(
    pairwise(
        m=ROWS,
        layer=RAGGED,
        rank=[1, 16, 100],  # padded to the least there is, just that, and too many to go with the GEMM
        p=[0.0, 0.1],
        dtypes=list(DTYPES),
        layout=["conv1d", "linear"],
        form=["dense", "offset", "transposed", "expanded"],
        bias=[True, False],
    )
)

pytestmark = pytest.mark.usefixtures("nan_empty")


@pytest.mark.parametrize("case", SAMPLE, ids=describe)
def test_ragged_shapes_agree_with_float64(case, device):
    k, n = case["layer"]
    sizes = case["m"], k, n, case["rank"], case["dtypes"], device
    form = {name: case[name] for name in ("layout", "form", "bias")}
    check_lora(lora_linear.lora_linear, draws_of(lora_arguments, *sizes, **form), case["p"])


# To more columns and to fewer, once each; all are in the full grid.
@pytest.mark.parametrize(
    ("layer", "dtypes", "p", "layout"),
    [("attn.c_attn", "bf16+fp32", 0.1, "conv1d"), ("mlp.c_proj", "fp16", 0.0, "linear")],
)
def test_gpt2_layers_agree_with_float64(layer, dtypes, p, layout, device):
    draws = draws_of(lora_arguments, 17, *GPT2_LAYERS[layer], 16, dtypes, device, layout=layout)
    check_lora(lora_linear.lora_linear, draws, p)


@pytest.mark.full
@pytest.mark.parametrize("layer", RAGGED)
@pytest.mark.parametrize("m", TOKENS)
def test_every_ragged_shape_agrees_with_float64(m, layer, device):
    for rank, p, dtypes in itertools.product(LORA_RANKS, DROPOUTS, DTYPES):
        check_lora(lora_linear.lora_linear, draws_of(lora_arguments, m, *layer, rank, dtypes, device), p)


@pytest.mark.full
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("layer", GPT2_LAYERS)
def test_every_gpt2_layer_agrees_with_float64(layer, dtypes, device):
    for rank, p in itertools.product(LORA_RANKS, DROPOUTS):
        draws = draws_of(lora_arguments, 17, *GPT2_LAYERS[layer], rank, dtypes, device)
        check_lora(lora_linear.lora_linear, draws, p)


@pytest.mark.parametrize(("device", "tile", "form", "variant"), linear_cases(epilogue=False))
def test_every_tile_of_the_gemm_in_both_forms(tile, form, variant, device, monkeypatch):
    choose_tile(monkeypatch, device, tile, form, variant, epilogue=False)
    draws = draws_of(lora_arguments, *sizes_over(tile), 16, "bf16", device, layout="linear")
    check_lora(lora_linear.lora_linear, draws, 0.3 if "dropout" in variant else 0.0)


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_a_descriptor_serves_operands_that_begin_anywhere(layout, device):
    """Prepared for aligned ones: where the next begin is no part of their kind."""
    x, weight, bias, a, b = lora_arguments(40, 72, 136, 8, "bf16", device, layout=layout).values()

    def moved(t):
        if t.stride(1) != 1:
            return moved(t.T).T
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].view(t.shape).copy_(t)

    tile = tile_table.Tile(32, 32, 32, 4, 2)
    linear = Linear(x, weight, bias, b.mT, tiling.Linear(tile, True, False, 4))
    u = x @ a.T
    expected, *_ = linear(x, weight, bias, b.mT, 0.5, u=u)
    torch.testing.assert_close(expected, x @ weight + bias + 0.5 * u @ b.T, rtol=2e-2, atol=2e-2)
    operands = moved(x), moved(weight)
    assert all(t.data_ptr() % 16 == 2 for t in operands)
    assert torch.equal(linear(*operands, bias, b.mT, 0.5, u=u)[0], expected)


@pytest.mark.parametrize("rank", sorted(tile_table.SHRINK))
def test_every_strip_of_the_rank_r_passes(rank, device):
    arguments = lora_arguments(150, 136, 40, rank, "bf16", device)
    x, lora_a, lora_b = arguments["x"], arguments["lora_a"], arguments["lora_b"]
    truth = x.double() @ lora_a.double().T
    for strip in tile_table.SHRINK[rank]:
        xa = Shrink(x, lora_a.T, strip)(x, lora_a.T)
        assert (xa.double() - truth).abs().max() <= 2**-8 * truth.abs().max()
    generator = torch.Generator().manual_seed(0)
    dy, dxa = (torch.randn(150, c, generator=generator).to(device, x.dtype) for c in (40, rank))
    for splits in (1, 3):
        d_a, d_b = torch.empty_like(lora_a), torch.empty_like(lora_b)
        tickets = torch.zeros(64, dtype=torch.int32, device=device)
        kernel = Gradients(dy, x, rank, d_b.dtype, d_a.dtype, splits=splits)
        kernel(dy, xa, x, dxa, d_b, d_a, 0.5, tickets)
        for found, of, by in ((d_b, dy, xa), (d_a.T, x, dxa)):
            truth = 0.5 * of.double().T @ by.double()
            assert (found.double() - truth).abs().max() <= 2**-8 * truth.abs().max()


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, True), (False, False, True)])
def test_partial_sums_are_complete_whichever_kernel_comes_before(needs, device, monkeypatch):
    """Tickets that nobody cleared would leave the gradient unwritten."""
    monkeypatch.setattr(tiling, "splits", lambda device, programs, rank: 4)
    x, weight, _, a, b = lora_arguments(129, 72, 264, 8, "fp32", device).values()
    dy, xa = x @ weight, x @ a.T
    dx, d_a, d_b = lora_layer.Layer().backward(dy, x, weight, a, b, xa, 1.5, None, *needs)
    torch.testing.assert_close(d_b, 1.5 * dy.T @ xa, rtol=1e-4, atol=1e-3)
    if needs[0]:
        torch.testing.assert_close(dx, dy @ weight.T + 1.5 * dy @ b @ a, rtol=1e-4, atol=1e-3)
    if needs[1]:
        torch.testing.assert_close(d_a, 1.5 * (dy @ b).T @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 24, 16), (5, 0, 16), (5, 24, 0)])
def test_an_empty_dimension_gives_empty_or_bias_and_zero_gradients(m, k, n, device):
    draws = draws_of(lora_arguments, m, k, n, 3, "fp32", device)[:2]  # nearly all is exact: luck has no part
    check_lora(lora_linear.lora_linear, draws, 0.5)


def test_no_rows_launch_no_kernel(device):
    arguments = lora_arguments(0, 24, 16, 3, "fp32", device)
    with launch.record() as launches:
        y, xa, _ = lora_layer.Layer().forward(**arguments, call=lora_layer.Call(1.0))
        x, weight, _, a, b = arguments.values()
        lora_layer.Layer().backward(y, x, weight, a, b, xa, 1.0, None, True, True, True)
    assert launches == []


def test_nan_stays_in_its_row(device):
    arguments = lora_arguments(70, 100, 36, 8, "fp16", device)
    arguments["x"][5] = float("nan")
    y, xa, _ = lora_layer.Layer().forward(**arguments, call=lora_layer.Call(1.0))
    assert y[5].isnan().all()
    assert y.isnan().any(1).sum() == 1
    dy = torch.ones_like(y)
    dy[69] = float("nan")
    x, weight, _, a, b = arguments.values()
    dx, _, _ = lora_layer.Layer().backward(dy, x, weight, a, b, xa, 1.0, None, True, True, True)
    assert dx[69].isnan().all()
    assert dx.isnan().any(1).sum() == 1


def test_only_what_is_asked_for_is_computed(device):
    arguments = lora_arguments(40, 24, 16, 3, "fp32", device)
    x, weight, _, a, b = arguments.values()
    y, xa, _ = lora_layer.Layer().forward(**arguments, call=lora_layer.Call(1.0))
    kernels = {}
    for needs in itertools.product([False, True], repeat=3):
        with launch.record() as launches:
            gradients = lora_layer.Layer().backward(y, x, weight, a, b, xa, 1.0, None, *needs)
        assert [g is not None for g in gradients] == list(needs)
        kernels[needs] = [each.kernel.__name__ for each in launches]
    assert kernels[False, False, False] == []
    assert not any("linear" in name for name in kernels[False, True, True])
    assert kernels[False, False, True][0] == "gradient_kernel"


def test_gradients_are_the_same_bits_each_time(device):
    arguments = lora_arguments(129, 72, 72, 8, "bf16+fp32", device)
    x, weight, _, a, b = arguments.values()
    mask = dropout.Dropout(0.5, torch.tensor([3], device=device))
    y, xa, _ = lora_layer.Layer().forward(**arguments, call=lora_layer.Call(1.0, mask))
    first = lora_layer.Layer().backward(y, x, weight, a, b, xa, 1.0, mask, True, True, True)
    again = lora_layer.Layer().backward(y, x, weight, a, b, xa, 1.0, mask, True, True, True)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


OFFSETS = """
import torch
from fastpeft.kernels import lora_layer
step = 2**31 + 64  # elements from one row to the next: beyond int32
storage = torch.from_file({path!r}, shared=True, size=3 * step, dtype=torch.float16)
torch.manual_seed(0)
def far(rows, columns):
    view = storage.as_strided((rows, columns), (step, 1))
    return view.copy_(torch.randn(rows, columns) * 0.1)
x = far(3, 24)
weight, a, b = torch.randn(24, 16).half(), torch.randn(4, 24).half(), torch.randn(16, 4).half()
call = lora_layer.Call(1.0)
near = lora_layer.Layer().forward(x.clone(), weight, None, a, b, call)[:2]
assert all(map(torch.equal, lora_layer.Layer().forward(x, weight, None, a, b, call), near))
xa = near[1]
dy = far(3, 16)
args = (weight, a, b, xa, 1.0, None, True, True, True)
close = lora_layer.Layer().backward(dy.clone(), dy.new_ones(3, 24), *args)
assert all(map(torch.equal, lora_layer.Layer().backward(dy, dy.new_ones(3, 24), *args), close))
w = far(3, 16)
rows, a = torch.randn(5, 3).half(), torch.randn(4, 3).half()
near = lora_layer.Layer().forward(rows, w.clone(), None, a, b, call)[:2]
assert all(map(torch.equal, lora_layer.Layer().forward(rows, w, None, a, b, call), near))
print("same")
"""


def test_offsets_beyond_int32_reach_the_right_rows(tmp_path):
    """A sparse file stands for 12 GiB, of which only the touched pages exist; in a process, for it may crash."""
    script = OFFSETS.format(path=str(tmp_path / "sparse"))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.14, of its own check
def test_opcheck_passes_with_and_without_dropout_and_bias(device):
    x, weight, bias, a, b = lora_arguments(9, 24, 16, 3, "fp32", device).values()
    a.requires_grad_()
    b.requires_grad_()
    x.requires_grad_()
    operator = torch.ops.fastpeft.lora_linear.default
    torch.library.opcheck(operator, (x, weight, bias, a, b, 2.0, 0.5, torch.tensor([5], device=device)))
    torch.library.opcheck(operator, (x, weight, None, a, b, 2.0, 0.0, None))


def test_a_second_derivative_is_refused(device):
    x, weight, bias, a, b = lora_arguments(9, 24, 16, 3, "fp32", device).values()
    x.requires_grad_()
    y = lora_linear.lora_linear(x, weight, bias, a, b, 2.0)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()
