"""The language model's loss without its logits against float64: each row's loss, and the gradient to hidden."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import describe, pairwise, view
from tolerances import assert_as_good_as

from fastpeft.kernels import lm_head

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
    """Training and evaluation, held to the rule of tolerances.py, over several draws where few rows differ."""
    few = sizes[0] < 17 or options.get("form") == "expanded"
    results = []
    for draw in range(8 if few else 1):
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
