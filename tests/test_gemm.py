"""`gemm.mm` against float64, by torch and by oneDNN, and the rule that chooses."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerances import assert_as_good_as
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import gemm, modules
from fastpeft.gemm import mm

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN here"
)
needs_bfloat16 = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bfloat16 on this CPU",
)


class Products(TorchDispatchMode):
    """Counts the products that go to oneDNN."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.mkldnn._linear_pointwise.default
        return func(*args, **(kwargs or {}))


modules.HARMLESS_MODES.add(Products)  # which counts what fastpeft runs


@pytest.fixture(params=["torch", pytest.param("onednn", marks=needs_onednn)])
def library(request, monkeypatch):
    """The library that float32 products of any size go to."""
    monkeypatch.setattr(gemm, "_served", lambda dtype: gemm.ALL if request.param == "onednn" else gemm.NONE)
    monkeypatch.setattr(gemm, "SMALL", 1)
    return request.param


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


M, K, N = 37, 48, 20
OPERANDS = {
    "contiguous": (normal(M, K), normal(K, N), normal(N)),
    "transposed": (normal(K, M).T, normal(N, K).T, normal(N)),
    "every second": (normal(M, 2 * K)[:, ::2], normal(2 * K, 2 * N)[::2, ::2], normal(2 * N)[::2]),
    "expanded": (normal(1, K).expand(M, K), normal(K, 1).expand(K, N), normal(1).expand(N)),
    "with every second of a bias": (normal(M, K), normal(K, N), normal(2 * N)[::2]),
    "with one bias for all": (normal(M, K), normal(K, N), normal(1).expand(N)),
    "a number expanded": (normal(1, 1).expand(M, K), normal(1, 1).expand(K, N), None),
    "of one row": (normal(1, K), normal(K, N), normal(N)),
    "of one column": (normal(M, K), normal(K, 1), None),
    "outer": (normal(M, 1), normal(1, N), normal(N)),
    "of no rows": (normal(0, K), normal(K, N), normal(N)),
    "over nothing": (normal(M, 0), normal(0, N), normal(N)),
    "to nothing": (normal(M, K), normal(K, 0), None),
}


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)], ids=str
)
def test_a_product_equals_float64(operands, dtype, library):
    x, w, bias = (None if t is None else t.to(dtype) for t in OPERANDS[operands])
    expected, exact = (
        torch.einsum("mk,kn->mn", x.to(each), w.to(each)) + (0 if bias is None else bias.to(each))
        for each in (dtype, torch.float64)
    )
    with Products() as onednn:
        y = mm(x, w, bias)
    assert_as_good_as(y, expected, exact)
    multiplied = x.numel() * w.numel() > 0
    served = dtype == torch.float32 or bias is not None
    assert onednn.count == (library == "onednn" and multiplied and served)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_stay_with_torch(dtype, monkeypatch):
    monkeypatch.setattr(gemm, "_served", lambda dtype: gemm.ALL)
    x, w = normal(128, 64).to(dtype), normal(64, 64).to(dtype)
    with Products() as onednn:
        y, plus = mm(x, w), mm(x, w, w[0])
    assert onednn.count == 0
    assert torch.equal(y, x @ w)
    assert torch.equal(plus, torch.addmm(w[0], x, w))


@needs_onednn
def test_size_and_torchs_switch_decide(monkeypatch):
    monkeypatch.setattr(gemm, "_served", lambda dtype: gemm.ALL)
    x, w = normal(64, 64), normal(64, 64)
    with Products() as onednn:
        mm(x, w)
        assert onednn.count == 1
        mm(x[:63], w)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        mm(x, w)
    assert onednn.count == 1


@needs_onednn
def test_with_avx2_alone_few_rows_on_several_threads_or_many_columns_are_onednns(monkeypatch):
    monkeypatch.setattr(gemm, "_served", lambda dtype: gemm.SOME)
    monkeypatch.setattr(gemm, "SMALL", 1)
    square, wide = normal(4, 4), normal(4, 2**14)
    served = {}
    for count in (2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        for rows, w in itertools.product((32, 33), (square, wide[:, 1:], wide)):
            with Products() as onednn:
                y = mm(normal(rows, 4), w)
            torch.testing.assert_close(y, normal(rows, 4) @ w)
            served[count, rows, w.shape[1]] = onednn.count
    assert served == {
        (count, rows, columns): columns == 2**14 or (count == 2 and rows == 32)
        for count, rows, columns in served
    }
    assert len(served) == 2 * 2 * 3


@needs_onednn
@pytest.mark.parametrize(
    ("capabilities", "served"),
    [
        ({"avx2": True, "avx512_f": True, "sse4a": True}, gemm.ALL),
        ({"avx2": True, "avx512_f": True, "sse4a": False}, gemm.NONE),
        ({"avx2": True, "avx512_f": False, "sse4a": True}, gemm.SOME),
        ({"avx2": False, "avx512_f": False, "sse4a": True}, gemm.NONE),
        ({"neon": True}, gemm.NONE),
    ],
    ids=["amd", "intel", "amd with avx2 alone", "an old amd", "arm"],
)
def test_onednn_is_for_cpus_that_mkl_serves_badly(capabilities, served, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert gemm._served.__wrapped__(torch.float32) is served


@needs_bfloat16
def test_bfloat16_goes_by_what_onednn_has_not_by_the_cpus_maker(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "sse4a": False})
    assert gemm._served.__wrapped__(torch.bfloat16) is gemm.ALL
