"""The language model's loss without its logits against float64: each row's loss, and the gradient to hidden."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import describe, pairwise, view
from tolerances import assert_as_good_as

from fastpeft.kernels import launch, lm_head, tile_table, tiling

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

pytestmark = pytest.mark.usefixtures("nan_empty")


def arguments(m, k, v, dtype, device, *, form="dense", layout="embedding", bias=False, draw=0):
    """hidden, weight, labels and bias; some labels in the first and last places, logits of several units."""
    generator = torch.Generator().manual_seed(draw)
    hidden = torch.randn(m, k, generator=generator).to(device, DTYPES[dtype])
    weight = (3 * max(k, 1) ** -0.5 * torch.randn(v, k, generator=generator)).to(device, DTYPES[dtype])
    labels = torch.randint(v, (m,), generator=generator)
    labels[: m // 3], labels[: m // 4] = v - 1, 0
    more = torch.randn(v, generator=generator).to(device, DTYPES[dtype]) if bias else None
    return (
        view(hidden, form),
        weight if layout == "embedding" else weight.T.contiguous().T,
        labels.to(device),
        more,
    )


def formula(hidden, weight, labels, bias, smoothing, dtype):
    """Each row's loss as stock computes it in `dtype`, and the gradient of their sum."""
    hidden = hidden.to(dtype).contiguous().requires_grad_()
    logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = logits if dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum(), hidden)[0]


def check(*sizes, smoothing=0.0, **options):
    """Training and evaluation, held to the rule of tolerances.py, over several draws of a single row."""
    results = []
    for draw in range(4 if sizes[0] == 1 else 1):
        hidden, weight, labels, bias = arguments(*sizes, **options, draw=draw)
        fused = lm_head.losses(hidden, weight, labels, bias, smoothing=smoothing, gradient=True)
        alone, none = lm_head.losses(hidden, weight, labels, bias, smoothing=smoothing, gradient=False)
        assert none is None
        assert torch.equal(alone, fused[0])
        formulas = (
            formula(hidden, weight, labels, bias, smoothing, d) for d in (hidden.dtype, torch.float64)
        )
        results.append((fused, *formulas))
    for i, name in enumerate(("losses", "d_hidden")):
        assert_as_good_as(
            *(torch.cat([each[i] for each in kind]) for kind in zip(*results, strict=True)), name
        )


SAMPLE = list(
    pairwise(
        m=[1, 63, 129],  # one row, less than one tile, and one more than the tallest
        k=[36, 136],  # rows of 16 bytes, which descriptors need, or not
        v=[61, 256, 331],  # less than a tile, whole tiles, and a rest
        dtype=list(DTYPES),
        form=["dense", "offset", "transposed", "expanded"],
        layout=["embedding", "transposed"],
        bias=[False, True],
        smoothing=[0.0, 0.1],
    )
)


@pytest.mark.parametrize("case", SAMPLE, ids=describe)
def test_ragged_shapes_agree_with_float64(case, device):
    options = {name: case[name] for name in ("form", "layout", "bias", "smoothing")}
    check(*(case[name] for name in ("m", "k", "v", "dtype")), device, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_width_of_gpt2_agrees_with_float64(dtype, device):
    check(17, 768, 307, dtype, device)


def interpreted_tiles():
    """(form, kernel, tile) for every tile that some architecture takes; the interpreter has no warps and no stages."""
    forms = {
        "pointer": [tile_table.HEAD],
        "descriptor": [tile_table.HEAD, *tile_table.HEAD_DESCRIPTOR.values()],
    }
    found = {
        (form, kernel, tile[:3]): (form, kernel, tile)
        for form, tables in forms.items()
        for table in tables
        for kernel, tiles in table.items()
        for tile in tiles
    }
    return [pytest.param(*case, id="-".join(map(str, key))) for key, case in sorted(found.items())]


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU takes the tiles of its own architecture")
@pytest.mark.parametrize(("form", "kernel", "tile"), interpreted_tiles())
def test_every_tile_in_both_forms(form, kernel, tile, monkeypatch):
    real = tiling._head

    def chosen(which, *given):
        how = real(which, *given)
        return (
            how._replace(tile=tile, descriptor=form == "descriptor", programs=3) if which == kernel else how
        )

    monkeypatch.setattr(tiling, "_head", chosen)
    m, k, v = tile.block_m + 6, 72, tile.block_n + 8
    check(m, *((k, v) if kernel == "logits" else (v, k)), "bf16", "cpu", smoothing=0.1)


@pytest.mark.parametrize("runs", [1, 2, 5, 100])
def test_runs_over_the_vocabulary_leave_nothing_out(runs, device, monkeypatch):
    real = tiling.head_gradient
    monkeypatch.setattr(tiling, "head_gradient", lambda *given: (real(*given)[0], runs))
    for dtype in ("bf16", "fp32"):
        check(20, 40, 301, dtype, device)


def test_chunks_are_what_one_chunk_would_be_and_repeat_bit_by_bit(device, monkeypatch):
    monkeypatch.setattr(tiling, "head_gradient", lambda *g, real=tiling.head_gradient: (real(*g)[0], 2))
    hidden, weight, labels, bias = arguments(301, 40, 61, "bf16", device, bias=True)

    def run(rows):
        sizes.clear()
        monkeypatch.setattr(tiling, "head_rows", lambda m, k: rows)
        return lm_head.losses(hidden, weight, labels, bias, smoothing=0.1, gradient=True)

    sizes, made, real = [], [], lm_head.head_losses

    def head_losses(rows, *given):
        assert all(logits() is None for logits in made), "a chunk is gone before the next is made"
        sizes.append(len(rows))
        logits, lse = real(rows, *given)
        made.append(weakref.ref(logits))
        return logits, lse

    monkeypatch.setattr(lm_head, "head_losses", head_losses)
    whole = run(384)
    assert sizes == [301]
    again, chunked = run(384), run(128)
    assert sizes == [128, 128, 45]
    for one, other, third in zip(whole, again, chunked, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.filterwarnings(
    "ignore:All-NaN slice encountered:RuntimeWarning"
)  # the interpreter's maximum of them
@pytest.mark.parametrize("gradient", [False, True])
def test_a_row_of_nan_stays_there(gradient, device):
    hidden, weight, labels, _ = arguments(67, 40, 301, "bf16", device)
    expected = lm_head.losses(hidden, weight, labels, gradient=gradient)
    hidden[5, 7] = float("nan")
    found = lm_head.losses(hidden, weight, labels, gradient=gradient)
    others = torch.arange(67, device=device) != 5
    for one, other in zip(found, expected, strict=True):
        if one is not None:
            assert one[5].isnan().all()
            assert torch.equal(one[others], other[others])


@pytest.mark.filterwarnings(
    "ignore:divide by zero encountered in log:RuntimeWarning"
)  # -inf, as it should be
def test_a_logit_of_minus_infinity_is_never_likely(device):
    """Among others, and in a whole tile."""
    hidden, weight, labels, _ = arguments(9, 40, 300, "fp32", device)
    bias = torch.zeros(300, device=device)
    bias[3], bias[128:] = -torch.inf, -torch.inf
    labels %= 3
    losses, d_hidden = lm_head.losses(hidden, weight, labels, bias, gradient=True)
    left = [i for i in range(128) if i != 3]
    expected = formula(hidden, weight[left], labels, None, 0.0, torch.float32)
    torch.testing.assert_close((losses, d_hidden), expected)


def test_logits_are_rounded_as_stock_rounds_them(device):
    """Of whole numbers sums are exact, and most between 256 and 1024 aren't bfloat16's: then nothing else differs."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randint(0, 15, (n, 8), generator=generator).bfloat16().to(device) for n in (40, 301)
    )
    labels = torch.arange(40, device=device)
    losses, _ = lm_head.losses(hidden, weight, labels, gradient=False)
    expected, _ = formula(hidden, weight, labels, None, 0.0, torch.bfloat16)
    torch.testing.assert_close(losses, expected)


def test_a_confident_row_keeps_what_is_left_of_its_gradient(device):
    """At p = 0.9998 rounded before the one is taken off, bfloat16 would leave nothing."""
    hidden, weight, labels, _ = arguments(8, 40, 61, "bf16", device)
    bias = torch.zeros(61, device=device, dtype=torch.bfloat16)
    bias[4] = 24.0
    labels[:] = 4
    _, d_hidden = lm_head.losses(hidden, weight, labels, bias, gradient=True)
    _, yardstick = formula(hidden, weight, labels, bias, 0.0, torch.bfloat16)
    _, truth = formula(hidden, weight, labels, bias, 0.0, torch.float64)
    assert_as_good_as(d_hidden, yardstick, truth, "d_hidden")
    assert truth.norm() > 0


@pytest.mark.parametrize("gradient", [False, True])
def test_no_rows_launch_nothing(gradient, device):
    hidden, weight, labels, _ = arguments(0, 40, 61, "bf16", device)
    with launch.record() as launches:
        losses, d_hidden = lm_head.losses(hidden, weight, labels, gradient=gradient)
    assert launches == []
    assert losses.shape == (0,)
    assert (d_hidden is None) != gradient
    assert d_hidden is None or d_hidden.shape == (0, 40)


def test_evaluation_stores_no_logits(device):
    hidden, weight, labels, _ = arguments(300, 40, 61, "fp32", device)
    with launch.record() as launches:
        lm_head.losses(hidden, weight, labels, gradient=False)
    assert [each.kernel.__name__ for each in launches] == ["head_logits_kernel", "head_loss_kernel"]
    assert all(each.args.get(name) is None for each in launches for name in ("logits_ptr", "lse_ptr"))
