"""The operations by themselves, against the formula in float64 with the same dropout mask."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_good_as

import fastpeft
from fastpeft import attention, masks, reference
from fastpeft.residuals import dropped

M, K, N, R = 37, 24, 40, 5


def lora_inputs(dtype=torch.float32, factors=None, lead=(M,), grad=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, to=dtype):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(to).requires_grad_(grad)

    return {
        "x": draw(*lead, K),
        "weight": draw(K, N),
        "bias": draw(N),
        "lora_a": draw(R, K, to=factors or dtype),
        "lora_b": draw(N, R, to=factors or dtype),
    }


def adapter_inputs(dtype=torch.float32, weights=None, lead=(M,), grad=True):
    inputs = lora_inputs(dtype, weights, lead, grad)
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(K, R, generator=generator).to(weights or dtype).requires_grad_(grad)
    down_bias = torch.randn(R, generator=generator).to(weights or dtype).requires_grad_(grad)
    up_bias = torch.randn(K, generator=generator).to(weights or dtype).requires_grad_(grad)
    return {
        "x": inputs["x"],
        "down_weight": inputs["lora_a"],
        "down_bias": down_bias,
        "up_weight": up,
        "up_bias": up_bias,
    }


def outcome(function, inputs, cast=None, **options):
    """y and the gradient of every input, of `function` on copies of `inputs` (cast to `cast`)."""
    leaves = {
        k: None if t is None else t.detach().to(cast or t.dtype).requires_grad_(t.requires_grad)
        for k, t in inputs.items()
    }
    y = function(**leaves, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    return {"y": y.detach(), **{k: t.grad for k, t in leaves.items() if t is not None and t.requires_grad}}


def assert_outcomes(fused, pytorch, truth):
    assert fused.keys() == pytorch.keys() == truth.keys()
    for name in fused:
        assert_as_good_as(fused[name], pytorch[name].to(fused[name].dtype), truth[name], name)


def kept(mask, x):
    """A mask of the PyTorch path as bool, set where elements of x stay."""
    return masks.apply(mask, torch.ones_like(x)).bool()


@pytest.fixture
def drawn_masks(monkeypatch):
    """Every mask the PyTorch path draws, as bool, set where elements stay."""
    drawn = []

    def draw(x, dropout_p, *, exact, real=masks.draw):
        mask = real(x, dropout_p, exact=exact)
        drawn.append(kept(mask, x))
        return mask

    monkeypatch.setattr(masks, "draw", draw)
    return drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_lora_linear_equals_the_formula(dtype, dropout_p, exact, frozen, drawn_masks):
    inputs = lora_inputs(dtype)
    inputs["weight"].requires_grad_(not frozen)
    fused = outcome(fastpeft.lora_linear, inputs, scaling=1.7, dropout_p=dropout_p, exact=exact)
    keep, *more = drawn_masks or [None]
    assert not more
    options = {"scaling": 1.7, "dropout_p": dropout_p, "keep": keep}
    pytorch = outcome(reference.lora_linear, inputs, **options)
    truth = outcome(reference.lora_linear, inputs, cast=torch.float64, **options)
    assert_outcomes(fused, pytorch, truth)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_lora_linear_with_float32_factors_on_a_16_bit_x(exact, dropout_p, drawn_masks):
    inputs = lora_inputs(torch.bfloat16, torch.float32)
    fused = outcome(fastpeft.lora_linear, inputs, scaling=0.5, dropout_p=dropout_p, exact=exact)
    assert fused["lora_a"].dtype == fused["lora_b"].dtype == torch.float32
    assert fused["x"].dtype == fused["y"].dtype == torch.bfloat16
    yardstick = (
        torch.float32 if exact else torch.bfloat16
    )  # the fast path rounds the factors, so its yardstick does
    options = {"scaling": 0.5, "dropout_p": dropout_p, "keep": drawn_masks[0] if dropout_p else None}
    pytorch = outcome(_peft_arithmetic, inputs, wide=yardstick, **options)
    truth = outcome(reference.lora_linear, inputs, cast=torch.float64, **options)
    for name in ("lora_a", "lora_b"):  # rounded factors give gradients with 16 bits' precision
        fused[name], pytorch[name] = fused[name].to(yardstick), pytorch[name].to(yardstick)
    assert_outcomes(fused, pytorch, truth)


def _peft_arithmetic(x, weight, bias, lora_a, lora_b, scaling, dropout_p, keep, wide):
    """peft's forward: the base in x's dtype, the update in the factors', the sum rounded to x's."""
    dropped = reference.dropout(x.to(wide), keep, dropout_p)
    update = F.linear(F.linear(dropped, lora_a.to(wide)), lora_b.to(wide)) * scaling
    return (torch.addmm(bias, x, weight) + update).to(x.dtype)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_adapter_equals_the_formula(activation, dtype, biases):
    inputs = adapter_inputs(dtype)
    if not biases:
        inputs["down_bias"] = inputs["up_bias"] = None
    options = {"activation": activation, "scale": 0.6}
    fused = outcome(fastpeft.adapter, inputs, **options)
    pytorch = outcome(reference.adapter, inputs, **options)
    truth = outcome(reference.adapter, inputs, cast=torch.float64, **options)
    assert_outcomes(fused, pytorch, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_relu_sees_on_which_side_of_zero_a_bias_puts_a_16_bit_product(dtype):
    inputs = adapter_inputs(dtype, lead=(1,))
    product = inputs["x"].detach().double() @ inputs["down_weight"].detach().double().T
    inputs["down_bias"] = (-product[0]).to(dtype).requires_grad_()  # what remains is its rounding
    options = {"activation": "relu", "scale": 0.6}
    passed = outcome(fastpeft.adapter, inputs, **options)["down_bias"] != 0
    assert torch.equal(
        passed, outcome(reference.adapter, inputs, cast=torch.float64, **options)["down_bias"] != 0
    )
    assert 0 < passed.sum() < len(passed)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_adapter_with_float32_weights_on_a_16_bit_x(exact):
    inputs = adapter_inputs(torch.bfloat16, torch.float32)
    options = {"activation": "gelu", "scale": 0.6}
    fused = outcome(fastpeft.adapter, inputs, exact=exact, **options)
    assert fused["y"].dtype == torch.bfloat16
    assert fused["down_weight"].dtype == torch.float32
    pytorch = outcome(reference.adapter, inputs, cast=torch.bfloat16, **options)
    truth = outcome(reference.adapter, inputs, cast=torch.float64, **options)
    for name in fused:
        assert_as_good_as(fused[name].bfloat16(), pytorch[name], truth[name], name)


def test_gradients_in_float64_equal_finite_differences():
    inputs = lora_inputs(torch.float64, lead=(3,))
    assert torch.autograd.gradcheck(lambda *args: fastpeft.lora_linear(*args, 1.3), tuple(inputs.values()))
    inputs = adapter_inputs(torch.float64, lead=(3,))
    for activation in ("gelu", "gelu_tanh", "silu"):
        function = lambda *args, act=activation: fastpeft.adapter(*args, act, 0.7)  # noqa: E731
        assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("op", ["lora_linear", "adapter"])
def test_only_the_gradients_asked_for_are_computed(op):
    inputs = lora_inputs() if op == "lora_linear" else adapter_inputs()
    options = {"scaling": 1.0} if op == "lora_linear" else {"activation": "relu", "scale": 1.0}
    function = getattr(fastpeft, op)
    full = outcome(function, inputs, **options)
    for wanted in itertools.chain(
        ({name} for name in inputs), ({"x", name} for name in inputs if name != "x"), [set(inputs) - {"x"}]
    ):
        some = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
        result = outcome(function, some, **options)
        assert result.keys() == {"y"} | wanted
        for name in result:
            torch.testing.assert_close(result[name], full[name])


def test_frozen_inputs_cost_no_gemm_in_backward():
    inputs = lora_inputs()
    for name in ("x", "weight", "bias"):
        inputs[name].requires_grad_(False)
    y = fastpeft.lora_linear(**inputs, scaling=1.0)
    with torch.profiler.profile(acc_events=True) as profile:
        y.sum().backward()
    gemms = sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))
    assert gemms == 3  # dxa, d_lora_b and d_lora_a; neither dy Wᵀ nor xᵀ dy


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_nothing_full_size_is_saved_but_x(dropout_p, frozen, drawn_masks):
    inputs = lora_inputs(lead=(64,))
    inputs["weight"].requires_grad_(not frozen)
    parameters = {t.data_ptr() for name, t in inputs.items() if name != "x"}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastpeft.lora_linear(**inputs, scaling=1.0, dropout_p=dropout_p)
    extra = sum(t.nbytes for t in saved if t.data_ptr() not in parameters)
    positions = sum(2 * int((~keep).sum()) for keep in drawn_masks)  # int16 hold 64 K
    assert extra == 64 * K * 4 + 64 * R * 4 + positions


def test_an_adapter_saves_x_and_the_pre_activation():
    inputs = adapter_inputs(lead=(64,))
    given = {t.data_ptr() for t in inputs.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastpeft.adapter(**inputs, activation="gelu", scale=1.0)
    assert sum(t.nbytes for t in saved if t.data_ptr() not in given) == 64 * R * 4


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions(lead):
    inputs = lora_inputs(lead=lead)
    fused = outcome(fastpeft.lora_linear, inputs, scaling=1.0)
    expected = outcome(reference.lora_linear, inputs, scaling=1.0)
    assert fused["y"].shape == (*lead, N)
    for name in fused:
        torch.testing.assert_close(fused[name], expected[name])
    assert fastpeft.adapter(**adapter_inputs(lead=lead), activation="relu", scale=1.0).shape == (*lead, K)


def test_strided_inputs():
    inputs = {k: t.detach() for k, t in lora_inputs(lead=(6, 5)).items()}
    expected = reference.lora_linear(**inputs, scaling=1.0)
    strided = dict(inputs)
    strided["x"] = inputs["x"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided["weight"] = inputs["weight"].T.contiguous().T  # nn.Linear's layout
    torch.testing.assert_close(fastpeft.lora_linear(**strided, scaling=1.0), expected)
    offset = torch.cat([inputs["x"], inputs["x"]], -1)[..., K:]
    torch.testing.assert_close(fastpeft.lora_linear(**{**inputs, "x": offset}, scaling=1.0), expected)
    row = inputs["x"][:1, :1].expand(4, 3, K)
    expanded = fastpeft.lora_linear(**{**inputs, "x": row}, scaling=1.0, dropout_p=0.0)
    torch.testing.assert_close(expanded, expected[:1, :1].expand(4, 3, N))


def plain_attention(query, key, value, mask, dropout_p, scaling, keep):
    scores = scaling * query @ key.mT
    scores += torch.full_like(scores, float("-inf")).triu(1) if mask is None else mask
    weights = torch.softmax(scores, -1)
    return (reference.dropout(weights, keep.view(weights.shape), dropout_p) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
@pytest.mark.parametrize("pooled", [False, True], ids=["causal", "one row, masked"])
def test_dropping_attention_equals_the_formula(dtype, dropout_p, pooled, drawn_masks):
    batch, heads, length, width = 3, 2, 7, 4
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, width, generator=generator).to(dtype)
    query, key, value = (part.transpose(1, 2).requires_grad_() for part in qkv.unbind(2))
    mask = None
    if pooled:
        query = query.detach()[:, :, :1].requires_grad_()
        mask = torch.zeros(batch, 1, 1, length, dtype=dtype)
        mask[1, ..., 4:] = torch.finfo(dtype).min
    inputs = {"query": query, "key": key, "value": value, "mask": mask}
    fused = outcome(attention.dropping, inputs, dropout_p=dropout_p, scaling=0.7)
    options = {"dropout_p": dropout_p, "scaling": 0.7, "keep": drawn_masks[0]}
    pytorch = outcome(plain_attention, inputs, **options)
    truth = outcome(plain_attention, inputs, cast=torch.float64, **options)
    assert len(drawn_masks) == 1
    assert_outcomes(fused, pytorch, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropping_attention_is_the_same_under_autocast(dtype):
    parts = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    inputs = {n: t.requires_grad_() for n, t in zip(("query", "key", "value"), parts, strict=True)}
    outcomes = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled):
            outcomes.append(outcome(attention.dropping, inputs, mask=None, dropout_p=0.3, scaling=0.7))
    for name in inputs:
        assert torch.equal(outcomes[0][name], outcomes[1][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
@pytest.mark.parametrize("strided", [False, True])
def test_dropped_equals_the_formula(dtype, dropout_p, strided, drawn_masks):
    x = lora_inputs(dtype)["weight"]
    inputs = {"x": x.detach().T.requires_grad_() if strided else x}
    fused = outcome(dropped, inputs, dropout_p=dropout_p)
    options = {"keep": drawn_masks[0], "dropout_p": dropout_p}
    pytorch = outcome(reference.dropout, inputs, **options)
    truth = outcome(reference.dropout, inputs, cast=torch.float64, **options)
    assert_outcomes(fused, pytorch, truth)
    assert dropped(x, 0.0) is x


def test_exact_dropout_is_the_mask_of_f_dropout_and_leaves_the_generator_where_it_would():
    x = torch.rand(50, 30) + 1
    torch.manual_seed(3)
    expected = F.dropout(x, 0.3) != 0
    state = torch.get_rng_state()
    torch.manual_seed(3)
    mask = masks.draw(x, 0.3, exact=True)
    assert torch.equal(kept(mask, x), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_fast_dropout_keeps_the_right_share_and_follows_the_seed():
    x = torch.empty(1000, 1001)
    for p in (1e-12, 1e-6, 1e-4, 0.05, 0.5, 0.9, 1 - 1e-6):
        torch.manual_seed(3)
        mask = masks.draw(x, p, exact=False)
        expected = x.numel() * p
        assert abs(len(mask) - expected) < 5 * (expected * (1 - p)) ** 0.5 + 1
        again = masks.draw(x, p, exact=False)
        assert p < 1e-4 or p > 0.99 or not torch.equal(again, mask)
        torch.manual_seed(3)
        assert torch.equal(masks.draw(x, p, exact=False), mask)


@pytest.mark.parametrize("draws", [1, 2**9])  # at once, and in parts of which few are dropped
@pytest.mark.parametrize("dropout_p", [1e-5, 0.003, 0.05, 0.3, 0.9, 1 - 2**-15])
def test_fast_dropout_drops_every_element_alike_and_none_with_another(dropout_p, draws):
    """Gaps of independent drops are geometric, and so are those between every second one, negative binomial."""
    part = torch.empty(min(2**25, int(2**19 / dropout_p)) // draws, dtype=torch.uint8)
    torch.manual_seed(3)
    parts = (masks.draw(part, dropout_p, exact=False).long() + i * len(part) for i in range(draws))
    positions = torch.cat(list(parts))
    for order in (1, 2):
        gaps = positions[order:] - positions[:-order]
        k = torch.arange(order, 1 + int(gaps.max()), dtype=torch.float64)
        law = dropout_p**order * (1 - dropout_p) ** (k - order) * (k - 1) ** (order - 1)
        counts = torch.bincount(gaps, minlength=len(k) + order).double()[order:]
        expected = law * len(gaps)
        common = expected >= 5
        chi_square = ((counts - expected) ** 2 / expected)[common].sum()
        freedom = common.sum() * order  # overlapping pairs vary up to twice as much
        assert abs(chi_square - common.sum()) < 5 * (2 * freedom) ** 0.5 + 5
        rare = len(gaps) * (1 - law[common].sum()).clamp(min=0.0)
        assert counts[~common].sum() <= rare + 5 * (order * rare) ** 0.5 + 5


@pytest.mark.parametrize("dropout_p", [0.05, 0.5])
def test_fast_dropout_of_few_elements_drops_each_alike(dropout_p):
    torch.manual_seed(3)
    x, rounds = torch.empty(3, 7), 20000
    counts = torch.stack([kept(masks.draw(x, dropout_p, exact=False), x) for _ in range(rounds)]).sum(0)
    deviation = (rounds * dropout_p * (1 - dropout_p)) ** 0.5
    assert ((counts - rounds * (1 - dropout_p)).abs() < 5 * deviation).all()


def test_fast_dropout_goes_on_where_more_is_dropped_than_it_drew_at_first():
    torch.manual_seed(3)
    drawn = [masks.draw(torch.empty(400), 0.5, exact=False) for _ in range(5000)]
    assert max(len(mask) for mask in drawn) > 200 + 3 * 10
    assert all((mask.diff() > 0).all() for mask in drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["positions", "bool"])  # what the CPU and other devices draw
def test_a_mask_is_applied_to_any_float_and_any_strides(dtype, form):
    x = torch.linspace(-1, 1, 33 * 5, dtype=torch.float64).view(33, 5).to(dtype).T
    mask = masks.draw(x, 0.5, exact=False)
    keep = kept(mask, x)
    assert 0 < keep.sum() < keep.numel()
    if form == "bool":
        mask = keep
    before = x.clone()
    dropped = masks.apply(mask, x)
    assert torch.equal(dropped, x * keep)
    assert dropped.dtype == dtype
    assert torch.equal(x, before)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_lora_linear_by_masks_as_they_are_drawn_off_the_cpu(frozen, monkeypatch):
    """By the same formula, up to their form."""
    drawn = []

    def draw(x, dropout_p, *, exact):
        drawn.append(torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p))
        return drawn[-1]

    monkeypatch.setattr(masks, "draw", draw)
    inputs = lora_inputs(torch.float32)
    inputs["weight"].requires_grad_(not frozen)
    fused = outcome(fastpeft.lora_linear, inputs, scaling=1.7, dropout_p=0.3)
    (keep,) = drawn
    options = {"scaling": 1.7, "dropout_p": 0.3, "keep": keep}
    pytorch = outcome(reference.lora_linear, inputs, **options)
    truth = outcome(reference.lora_linear, inputs, cast=torch.float64, **options)
    assert_outcomes(fused, pytorch, truth)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (3, 11)], ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_a_mask_is_the_positions_of_what_is_dropped(shape, exact):
    x = torch.ones(shape)
    mask = masks.draw(x, 0.5, exact=exact)
    assert torch.equal(mask.long(), (~kept(mask, x)).flatten().nonzero().flatten())


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_dropout_of_everything_leaves_the_base_layer(exact):
    inputs = lora_inputs()
    result = outcome(fastpeft.lora_linear, inputs, scaling=1.0, dropout_p=1.0, exact=exact)
    base = {k: inputs[k] for k in ("x", "weight", "bias")}
    expected = outcome(lambda x, weight, bias: x @ weight + bias, base)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])
    assert not result["lora_a"].any()
    assert not result["lora_b"].any()


def test_autocast_computes_in_its_dtype():
    inputs = lora_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = fastpeft.lora_linear(**inputs, scaling=1.0)
        stock = F.linear(inputs["x"], inputs["weight"].T, inputs["bias"])
    assert y.dtype == stock.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {t.grad.dtype for t in inputs.values()} == {torch.float32}
    pytorch = reference.lora_linear(**{k: t.detach().bfloat16() for k, t in inputs.items()}, scaling=1.0)
    truth = reference.lora_linear(**{k: t.detach().double() for k, t in inputs.items()}, scaling=1.0)
    assert_as_good_as(y.detach(), pytorch, truth)


def second_derivatives(call, inputs):
    """The gradient of a function of the first gradients, of every input."""
    leaves = [t for t in inputs.values() if t is not None]
    first = torch.autograd.grad(call(**inputs).sin().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@pytest.mark.parametrize("exact", [False, True])
def test_second_derivatives_are_those_of_the_formula(exact):
    inputs = {k: t.detach().double().requires_grad_() for k, t in lora_inputs().items()}
    ours = second_derivatives(lambda **given: fastpeft.lora_linear(**given, scaling=0.7, exact=exact), inputs)
    expected = second_derivatives(lambda **given: reference.lora_linear(**given, scaling=0.7), inputs)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_second_derivatives_of_an_adapter_are_those_of_the_formula(activation):
    inputs = {k: t.detach().double().requires_grad_() for k, t in adapter_inputs().items()}
    given = {"activation": activation, "scale": 0.7}
    ours = second_derivatives(lambda **i: fastpeft.adapter(**i, **given), inputs)
    expected = second_derivatives(lambda **i: reference.adapter(**i, **given), inputs)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda y, inputs: y.backward(create_graph=True),
        lambda y, inputs: torch.autograd.grad(y, inputs["lora_a"], create_graph=True),
    ],
    ids=["backward", "autograd.grad"],
)
def test_second_derivatives_through_dropout_are_refused(differentiate):
    inputs = lora_inputs()
    y = fastpeft.lora_linear(**{**inputs, "weight": inputs["weight"].detach()}, scaling=1.0, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="differentiable once"):
        differentiate(y.square().sum(), inputs)


def test_a_scaling_that_would_get_no_gradient_is_an_error():
    with pytest.raises(TypeError, match="scaling must be a number, got Parameter"):
        fastpeft.lora_linear(**lora_inputs(), scaling=torch.nn.Parameter(torch.ones(())))
    with pytest.raises(TypeError, match="scale must be a number, got Tensor"):
        fastpeft.adapter(**adapter_inputs(), activation="relu", scale=torch.ones(()))


def test_editing_a_saved_tensor_in_place_is_refused():
    inputs = {k: t.detach().clone().requires_grad_(k != "x") for k, t in lora_inputs().items()}
    y = fastpeft.lora_linear(**inputs, scaling=1.0)
    inputs["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"x": torch.ones(3, K + 1)},
            ValueError,
            rf"x has shape \(3, {K + 1}\).*weight of shape \({K}, {N}\)",
        ),
        ({"weight": torch.ones(K)}, ValueError, "weight of shape"),
        ({"bias": torch.ones(N + 1)}, ValueError, "bias has shape"),
        ({"lora_a": torch.ones(R, K + 1)}, ValueError, "lora_a has shape"),
        ({"lora_b": torch.ones(N, R + 1)}, ValueError, "lora_b has shape"),
        ({"x": torch.ones(3, K, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.ones(3, K, dtype=torch.complex64)}, TypeError, "x has dtype torch.complex64"),
        ({"x": torch.ones(3, K, dtype=torch.float64)}, TypeError, "weight must have x's dtype"),
        ({"lora_a": torch.ones(R, K, device="meta")}, ValueError, "lora_a is on meta"),
        ({"x": torch.tensor(1.0)}, ValueError, "at least one dimension"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda': choose one of auto, triton, torch"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_lora_linear_names_what_does_not_fit(change, error, words):
    with pytest.raises(error, match=words):
        fastpeft.lora_linear(**{**lora_inputs(), "scaling": 1.0, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(3, K + 1)}, "x has shape"),
        ({"up_weight": torch.ones(K, R + 1)}, "up_weight has shape"),
        ({"down_bias": torch.ones(R + 1)}, "down_bias has shape"),
        ({"up_bias": torch.ones(K + 1)}, "up_bias has shape"),
        ({"activation": "tanh"}, "unknown activation 'tanh': choose one of relu, gelu, gelu_tanh, silu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapter_names_what_does_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        fastpeft.adapter(**{**adapter_inputs(), "activation": "relu", "scale": 1.0, **change})
