"""bench/bench_lm_head.py times what computes the same gradients, with as many labels as it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import bench_lm_head
import layers
from cases import HeadCase, head_cases
from check import Wrong

from fastpeft.kernels import tiling

CASE = HeadCase(101, 24, 50, 0.3, "fp32")
has_chunks = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"),
    reason="this torch has no linear_cross_entropy in chunks",
)


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=has_chunks) if "torch" in v else v for v in layers.HEAD_VARIANTS]
)
def test_every_variant_agrees_with_the_truth_and_runs_under_its_name(variant, monkeypatch):
    ran = []
    named = layers.HEAD_VARIANTS[variant]
    monkeypatch.setitem(
        layers.HEAD_VARIANTS, variant, lambda *given: ran.append(len(given[0])) or named(*given)
    )
    head = layers.head_variant(CASE, variant, "cpu")
    assert set(ran) == {CASE.tokens}
    assert (head.labels >= 0).sum() == 15
    assert [p.requires_grad for p in head.parameters()] == [False]


def test_a_loss_of_other_gradients_is_not_timed(monkeypatch):
    loss = layers.HEAD_VARIANTS["fastpeft"]
    monkeypatch.setitem(layers.HEAD_VARIANTS, "fastpeft", lambda *given: loss(*given) * (1 + 1e-5))
    with pytest.raises(Wrong, match="fastpeft: gradient 0"):
        layers.head_variant(CASE, "fastpeft", "cpu")


def test_two_chunks_are_as_many_as_fastpeft_takes(monkeypatch):
    monkeypatch.setattr(layers, "_torch_chunked", lambda hidden, weight, labels, rows: rows)
    case = head_cases("cuda")[0]
    assert case.counting == 1.0
    hidden = torch.empty(case.tokens, 1)
    rows = layers.HEAD_VARIANTS["torch_two_chunks"](hidden, hidden, hidden)
    ours = tiling.head_rows(case.tokens, case.width)
    assert [-(-case.tokens // each) for each in (rows, ours)] == [2, 2]


def test_a_torch_without_chunks_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"2\.13 has"):
        bench_lm_head.test_lm_head(None, CASE, "torch_chunked")
