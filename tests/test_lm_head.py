"""`fastpeft.lm_head_loss` against cross-entropy of float64 logits, and no logits kept."""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_good_as

import fastpeft
from fastpeft import lm_head

V, K = 101, 24  # V divides nothing
COLUMNS = 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(lm_head, "_CHUNK", 5 * V)  # rows
    monkeypatch.setattr(lm_head, "_TILE", 5 * COLUMNS)
    monkeypatch.setattr(lm_head, "_COLUMNS", COLUMNS)


def operands(dtype, *, bias=False, trains=False, rows=(3, 7)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*rows, K, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, K, generator=generator) * 0.3).to(dtype).requires_grad_(trains)
    offset = torch.randn(V, generator=generator).to(dtype).requires_grad_(trains) if bias else None
    labels = torch.randint(V, rows, generator=generator)
    labels.view(-1)[1:4] = -100
    return hidden, weight, offset, labels


def plain(hidden, weight, bias, labels, dtype=None, **options):
    """Stock's head and loss, in `dtype`."""
    hidden, weight, bias = (t if t is None or dtype is None else t.to(dtype) for t in (hidden, weight, bias))
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten(), **options
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("bias", "trains", "smoothing"), list(itertools.product([False, True], [False, True], [0.0, 0.1]))
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients(dtype, bias, trains, smoothing, reduction):
    *inputs, labels = operands(dtype, bias=bias, trains=trains)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    hidden, weight, offset = inputs
    loss = fastpeft.lm_head_loss(hidden, weight, labels, bias=offset, **options)
    assert loss.shape == (labels.shape if reduction == "none" else ())
    expected = plain(*inputs, labels, **options).view(loss.shape)
    truth = plain(*inputs, labels, torch.float64, **options).view(loss.shape).to(torch.float64)
    dy = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    trained = [t for t in inputs if t is not None and t.requires_grad]
    assert len(trained) == 1 + trains * (1 + bias)
    results = [
        [value.detach(), *torch.autograd.grad(value, trained, dy.to(value.dtype))]
        for value in (loss, expected, truth)
    ]
    for name, fused, pytorch, exact in zip(("loss", "dh", "dW", "db"), *results, strict=False):
        assert_as_good_as(fused, pytorch, exact.double(), name)


@pytest.mark.parametrize("rows", [1, 5, 6, 11], ids=["one row", "a chunk", "and a row", "odd chunks"])
def test_chunks_of_any_size(rows):
    hidden, weight, _, labels = operands(torch.float64, rows=(rows + 3,))
    loss = fastpeft.lm_head_loss(hidden, weight, labels)
    expected = plain(hidden, weight, None, labels)
    (got,), (want,) = (torch.autograd.grad(value, [hidden]) for value in (loss, expected))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, want)
    assert (got[1:4] == 0).all(), "ignored labels have no gradient"


@pytest.mark.parametrize("trains", [False, True])
def test_logits_are_gone_before_the_next_are_made(trains, monkeypatch):
    made, real = [], lm_head.mm

    def mm(x, w, bias=None):
        product = real(x, w, bias)
        if bias is not None:  # these are logits
            assert all(each() is None for each in made)
            made.append(weakref.ref(product))
        return product

    monkeypatch.setattr(lm_head, "mm", mm)
    hidden, weight, bias, labels = operands(torch.float32, bias=True, trains=trains)
    fastpeft.lm_head_loss(hidden, weight, labels, bias=bias).backward()
    # Of 18 rows 4, 5, 4 and 5 at a time, by 40 or 32 columns; where the head trains, all columns again in backward.
    assert len(made) == 2 * (3 + 4) + 4 * trains


def test_no_label_that_counts():
    hidden, weight, _, labels = operands(torch.float32)
    ignored = torch.full_like(labels, -100)
    for options in ({}, {"num_items": 7}, {"reduction": "sum"}, {"reduction": "none"}):
        loss = fastpeft.lm_head_loss(hidden, weight, ignored, **options)
        expected = torch.zeros(loss.shape) if options else torch.tensor(float("nan"))
        torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
        (gradient,) = torch.autograd.grad(loss.sum(), [hidden])
        assert (gradient == 0).all()
    empty = fastpeft.lm_head_loss(hidden[:0], weight, labels[:0])
    assert empty.isnan()


def test_num_items_takes_the_place_of_the_count():
    hidden, weight, _, labels = operands(torch.float64)
    total = plain(hidden, weight, None, labels, reduction="sum")
    for items in (9, 9.0, torch.tensor(9)):
        torch.testing.assert_close(fastpeft.lm_head_loss(hidden, weight, labels, num_items=items), total / 9)


def test_another_label_is_ignored():
    hidden, weight, _, labels = operands(torch.float64)
    labels = labels.masked_fill(labels == -100, 5)
    loss = fastpeft.lm_head_loss(hidden, weight, labels, ignore_index=5)
    torch.testing.assert_close(loss, plain(hidden, weight, None, labels, ignore_index=5))


def test_a_row_of_nan_stays_alone():
    hidden, weight, _, labels = operands(torch.float32)
    with torch.no_grad():
        hidden[2, 3] = float("nan")
    losses = fastpeft.lm_head_loss(hidden, weight, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses, [hidden], torch.ones_like(losses))
    bad = torch.zeros_like(labels, dtype=torch.bool)
    bad[2, 3] = True
    assert torch.equal(losses.isnan(), bad)
    assert torch.equal(gradient.isnan().all(2), bad)
    assert torch.equal(gradient.isnan().any(2), bad)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_second_derivatives(trains):
    hidden, weight, bias, labels = operands(torch.float64, bias=True, trains=trains)
    trained = [t for t in (hidden, weight, bias) if t.requires_grad]
    results = []
    for loss in (
        fastpeft.lm_head_loss(hidden, weight, labels, bias=bias, label_smoothing=0.1),
        plain(hidden, weight, bias, labels, label_smoothing=0.1),
    ):
        first = torch.autograd.grad(loss, trained, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained))
    torch.testing.assert_close(*results)


def test_torch_func_and_the_compiler_see_the_plain_formula():
    hidden, weight, _, labels = operands(torch.float64)
    hidden = hidden.detach()
    expected = torch.func.grad(lambda h: plain(h, weight, None, labels))(hidden)
    torch.testing.assert_close(
        torch.func.grad(lambda h: fastpeft.lm_head_loss(h, weight, labels))(hidden), expected
    )
    compiled = torch.compile(fastpeft.lm_head_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden, weight, labels), plain(hidden, weight, None, labels))


def test_autocast():
    hidden, weight, _, labels = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastpeft.lm_head_loss(hidden, weight, labels)
        expected = plain(hidden, weight, None, labels)
    torch.testing.assert_close(loss, expected)
    (got,), (want,) = (torch.autograd.grad(value, [hidden]) for value in (loss, expected))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)  # a bfloat16's


def test_a_loss_scaler_loses_nothing_in_float16():
    hidden, weight, _, labels = operands(torch.float16, rows=(64, 64))
    weight = weight * 1e-3
    scaled = fastpeft.lm_head_loss(hidden, weight, labels) * 2.0**16
    (gradient,) = torch.autograd.grad(scaled, [hidden])
    exact = hidden.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(plain(exact, weight.double(), None, labels) * 2.0**16, [exact])
    (unscaled,) = torch.autograd.grad(fastpeft.lm_head_loss(hidden, weight, labels), [hidden])
    assert (gradient.double() - truth).norm() < 5e-3 * truth.norm()
    assert (unscaled.double() * 2.0**16 - truth).norm() > 5e-2 * truth.norm(), "nothing to lose: no test"


def test_backward_twice_and_the_same_at_each_run():
    hidden, weight, _, labels = operands(torch.float32)
    loss = fastpeft.lm_head_loss(hidden, weight, labels)
    first = torch.autograd.grad(loss, [hidden], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden])
    again = fastpeft.lm_head_loss(hidden, weight, labels)
    assert torch.equal(again, loss)
    assert torch.equal(first[0], second[0])
    assert torch.equal(torch.autograd.grad(again, [hidden])[0], first[0])


def test_logits_of_a_tile_are_all_that_is_held(monkeypatch):
    hidden, weight, _, labels = operands(torch.float32, rows=(200,))
    held = []
    product = lm_head.mm

    def mm(x, w, *bias):
        if bias:  # these are logits
            held.append(x.shape[0] * w.shape[1])
        return product(x, w, *bias)

    monkeypatch.setattr(lm_head, "mm", mm)
    fastpeft.lm_head_loss(hidden, weight, labels).backward()
    assert max(held) <= 5 * COLUMNS
    assert sum(held) == 197 * V, "a row whose label is ignored is never projected"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, COLUMNS, V])
def test_logits_that_are_no_numbers(columns, dtype, monkeypatch):
    """Tokens that a bias rules out: whole tiles of them, a label among them, all but the label."""
    monkeypatch.setattr(lm_head, "_TILE", 5 * columns)
    monkeypatch.setattr(lm_head, "_COLUMNS", columns)
    hidden, weight, _, _ = operands(dtype, rows=(4,))
    labels = torch.tensor([0, 50, 99, 100])
    for allowed in (range(40, V), range(V - 1), [100]):
        bias = torch.full((V,), float("-inf"), dtype=dtype)
        bias[list(allowed)] = 0.5
        losses = fastpeft.lm_head_loss(hidden, weight, labels, bias=bias, reduction="none")
        expected = plain(hidden, weight, bias, labels, reduction="none")
        torch.testing.assert_close(losses, expected)
        truth = plain(hidden, weight, bias, labels, torch.float64, reduction="none")
        gradients = [torch.autograd.grad(each.sum(), [hidden])[0] for each in (losses, expected, truth)]
        assert_as_good_as(gradients[0], gradients[1], gradients[2].double(), "dh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [COLUMNS, V])
def test_a_label_that_is_all_but_certain(dtype, columns, monkeypatch):
    """What is left of its share and its target is far smaller than either."""
    monkeypatch.setattr(lm_head, "_TILE", 5 * columns)
    monkeypatch.setattr(lm_head, "_COLUMNS", columns)
    _, weight, _, labels = operands(dtype)
    hidden = (weight[labels.clamp(0)] * 12).requires_grad_()
    losses = [fastpeft.lm_head_loss(hidden, weight, labels), plain(hidden, weight, None, labels)]
    exact = hidden.detach().double().requires_grad_()
    truth = plain(exact, weight.double(), None, labels)
    assert 0 < truth < 0.01
    gradients = [torch.autograd.grad(loss, [hidden])[0] for loss in losses]
    assert_as_good_as(*gradients, torch.autograd.grad(truth, [exact])[0], "dh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_weights_that_have_much_in_common(dtype, smoothing, monkeypatch):
    """It cancels in the gradient, of which rounding would leave a multiple; so do small logits' weights."""
    monkeypatch.setattr(lm_head, "_TILE", 64 * 5003)
    generator = torch.Generator().manual_seed(0)
    weight, common = 0.14 * torch.randn(5003, K, generator=generator), torch.randn(K, generator=generator)
    hidden, labels = torch.randn(64, K, generator=generator), torch.randint(5003, (64,), generator=generator)
    for offset, scale in ((3.0, 1.0), (0.0, 0.01)):
        alike, leaf = (weight + offset * common).to(dtype), (hidden * scale).to(dtype).requires_grad_()
        exact = leaf.detach().double().requires_grad_()
        losses = [
            fastpeft.lm_head_loss(leaf, alike, labels, label_smoothing=smoothing),
            plain(leaf, alike, None, labels, label_smoothing=smoothing),
            plain(exact, alike.double(), None, labels, label_smoothing=smoothing),
        ]
        leaves = leaf, leaf, exact
        gradients = [torch.autograd.grad(*each)[0] for each in zip(losses, leaves, strict=True)]
        assert_as_good_as(*gradients, f"dh of weights that share {offset}")


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothing_over_tokens_that_are_ruled_out(smoothing):
    hidden, weight, bias, labels = operands(torch.float32, bias=True)
    bias[labels[0, 0]] = float("-inf")
    losses = fastpeft.lm_head_loss(
        hidden, weight, labels, bias=bias, label_smoothing=smoothing, reduction="none"
    )
    expected = plain(hidden, weight, bias, labels, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(losses.flatten(), expected, equal_nan=True)
    assert losses.isinf().any()


def test_sums_that_float16_cannot_hold():
    weight = torch.full((V, K), 3000.0, dtype=torch.float16)  # 22 of them are too large
    hidden = torch.zeros(3, K, dtype=torch.float16, requires_grad=True)
    loss = fastpeft.lm_head_loss(hidden, weight, torch.tensor([0, 50, 100]))
    (gradient,) = torch.autograd.grad(loss, [hidden])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=3.0, rtol=0.0)  # of 3,000


@pytest.mark.parametrize(("changes", "error", "match"), [
    ({"labels": torch.full((3, 7), V)}, IndexError, f"label {V} is out of range"),
    ({"labels": torch.full((3, 7), -1)}, IndexError, "label -1 is out of range"),
    ({"labels": torch.zeros(3, 7)}, TypeError, r"int64, as labels.long\(\) gives"),
    ({"labels": torch.zeros(21, dtype=torch.long)}, ValueError, "hidden has shape"),
    ({"weight": torch.zeros(V, K + 1)}, ValueError, "hidden has shape"),
    ({"weight": torch.zeros(V, K, dtype=torch.bfloat16)}, TypeError, "weight must have hidden's dtype"),
    ({"bias": torch.zeros(V + 1)}, ValueError, "bias has shape"),
    ({"reduction": "median"}, ValueError, "unknown reduction 'median'"),
    ({"reduction": "sum", "num_items": 3}, ValueError, "num_items takes the place"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1"),
    ({"backend": "cuda"}, ValueError, "unknown backend"),
])  # fmt: skip
def test_one_clear_error(changes, error, match):
    hidden, weight, _, labels = operands(torch.float32)
    given = {"weight": weight, "labels": labels, **changes}
    with pytest.raises(error, match=match):
        fastpeft.lm_head_loss(hidden, **given)
