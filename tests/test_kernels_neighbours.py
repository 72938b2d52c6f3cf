"""The projections with their neighbours in one kernel: the GELU between two, and the dropout with its residual."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import (
    DTYPES,
    ROWS,
    choose_tile,
    compare,
    describe,
    draws_of,
    linear_cases,
    link,
    lora_arguments,
    mlp,
    pairwise,
    sizes_over,
)
from models import assert_as_good_over_draws, assert_fused, gpt2, step, twins, with_adapters, with_lora
from test_packing import batch, outcome

import fastpeft
from fastpeft import reference
from fastpeft.block import FusedMLP
from fastpeft.kernels import dropout, launch, layer_norm, lora_chain, lora_linear, tile_table
from fastpeft.routes import Route

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # Of a large |z|, exp overflows to infinity, whose sigmoid is 0, as it should be.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
LAYER = ("weight", "bias", "lora_a", "lora_b")
FUSED = "fused kernels, LayerNorm and GELU included"


def mlp_arguments(m, k, hidden, rank, dtypes, device, *, residual=True, draw=0, **form):
    fc = lora_arguments(m, k, hidden, rank, dtypes, device, draw=draw, **form)
    proj = lora_arguments(m, hidden, k, rank, dtypes, device, draw=draw + 1000, **form)
    added = torch.randn(m, k, generator=torch.Generator().manual_seed(draw)).to(device, fc["x"].dtype)
    return {
        "x": fc["x"],
        **{f"fc_{name}": fc[name] for name in LAYER},
        **{f"proj_{name}": proj[name] for name in LAYER},
        "residual": added if residual else None,
    }


def check_mlp(draws, p, residual_p=0.0):
    x = draws[0]["x"]
    hidden = draws[0]["fc_weight"].shape[1]

    def masks(*sizes):
        """A seed and its mask, from PyTorch, for each width and probability."""
        for n, (width, p) in enumerate(sizes):
            seed = torch.tensor([n + 3], device=x.device) if p > 0 else None
            yield seed, None if seed is None else dropout.keep_mask(seed, len(x), width, p)

    seeds, keeps = zip(*masks((x.shape[1], p), (hidden, p), (x.shape[1], residual_p)), strict=True)

    def layers(given):
        return ([given[f"{layer}_{name}"] for name in LAYER] for layer in ("fc", "proj"))

    def formula(**given):
        (fc, proj), x = layers(given), given["x"]
        h = reference.gelu_new(reference.lora_linear(x, *fc, 1.5, p, keeps[0]))
        y = reference.lora_linear(h, *proj, 0.5, p, keeps[1])
        if given["residual"] is None:
            return y
        return given["residual"] + reference.dropout(y, keeps[2], residual_p)

    def fused(**given):
        fc, proj = layers(given)
        drops = (1.5, p, seeds[0]), (0.5, p, seeds[1]), (residual_p, seeds[2])
        return mlp(given["x"], fc, proj, given["residual"], *drops)

    compare(fused, formula, draws, tuple(n for n in draws[0] if "lora" in n))


SAMPLE = pairwise(
    m=ROWS,
    layer=[(36, 100), (40, 264)],  # one tile of columns, two
    rank=[1, 16, 100],  # padded to the least there is, just that, and too many to go with the GEMM
    p=[0.0, 0.1],
    residual_p=[None, 0.0, 0.3],  # None: there is no residual
    dtypes=list(DTYPES),
    layout=["conv1d", "linear"],
    form=["dense", "offset", "transposed"],
)


@pytest.mark.parametrize("case", list(SAMPLE), ids=describe)
def test_ragged_shapes_agree_with_float64(case, device):
    sizes = case["m"], *case["layer"], case["rank"], case["dtypes"], device
    form = {"layout": case["layout"], "form": case["form"], "residual": case["residual_p"] is not None}
    check_mlp(draws_of(mlp_arguments, *sizes, **form), case["p"], case["residual_p"] or 0.0)


# float16 and no mask: each layer by itself has them in test_kernels_lora_linear.py.
@pytest.mark.parametrize(
    ("dtypes", "p"), [("bf16+fp32", 0.1), pytest.param("fp16", 0.0, marks=pytest.mark.full)]
)
def test_the_mlp_of_gpt2_agrees_with_float64(dtypes, p, device):
    check_mlp(draws_of(mlp_arguments, 17, 768, 3072, 16, dtypes, device), p, 0.1)


def behind_attention(m, k, hidden, dtypes, device, *, draw=0):
    """Arguments of a block from its attention's result on: c_proj, a LayerNorm, the MLP, and the residual."""
    first = lora_arguments(m, k, k, 3, dtypes, device, draw=draw + 2000)
    given = mlp_arguments(m, k, hidden, 3, dtypes, device, draw=draw)
    return {**given, "x": first["x"], **{f"first_{name}": first[name] for name in LAYER}}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_all_that_follows_an_attention_agrees_with_float64(dtypes, p, device):
    m, k, hidden = 17, 40, 72
    weight, bias = (torch.linspace(low, 2.0, k, device=device) for low in (0.5, -1.0))
    seeds = [torch.tensor([n], device=device) if p > 0 else None for n in range(5)]
    widths = k, k, k, hidden, k
    keeps = [
        seed if seed is None else dropout.keep_mask(seed, m, n, p)
        for seed, n in zip(seeds, widths, strict=True)
    ]

    def layers(given):
        return ([given[f"{layer}_{name}"] for name in LAYER] for layer in ("first", "fc", "proj"))

    def fused(x, residual, **given):
        first, fc, proj = layers(given)
        norm = lora_chain.Norm(weight.to(x.dtype), bias.to(x.dtype), 1e-5, p > 0)
        links = [
            link(first, 1.5, p, seeds[0], adds=True, added=(p, seeds[1])),
            link(fc, 0.5, p, seeds[2], norm=norm, stores="yh"),
            link(proj, 2.0, p, seeds[3], adds=True, added=(p, seeds[4])),
        ]
        y, carried = lora_chain.lora_chain(x, residual, links)
        assert carried is None
        return y

    def formula(x, residual, **given):
        first, fc, proj = layers(given)
        y = reference.lora_linear(x, *first, 1.5, p, keeps[0])
        residual = residual + (y if p == 0.0 else reference.dropout(y, keeps[1], p))
        w, b = (t.to(DTYPES[dtypes][0]).to(x.dtype) for t in (weight, bias))
        h = torch.nn.functional.layer_norm(residual, (k,), w, b, 1e-5)
        h = reference.gelu_new(reference.lora_linear(h, *fc, 0.5, p, keeps[2]))
        y = reference.lora_linear(h, *proj, 2.0, p, keeps[3])
        return residual + (y if p == 0.0 else reference.dropout(y, keeps[4], p))

    draws = [behind_attention(m, k, hidden, dtypes, device, draw=i) for i in range(4)]
    compare(fused, formula, draws, tuple(n for n in draws[0] if "lora" in n))


@pytest.mark.parametrize(("m", "k", "hidden"), [(0, 24, 16), (5, 24, 0)])
def test_an_empty_dimension_gives_bias_and_zero_gradients(m, k, hidden, device):
    draws = draws_of(mlp_arguments, m, k, hidden, 3, "fp32", device)[
        :2
    ]  # nearly all is exact: luck has no part
    check_mlp(draws, 0.5, 0.5)


@pytest.mark.parametrize(("device", "tile", "form", "variant"), linear_cases(epilogue=True))
def test_every_tile_of_the_gemm_in_both_forms(tile, form, variant, device, monkeypatch):
    choose_tile(monkeypatch, device, tile, form, variant, epilogue=True)
    draws = draws_of(mlp_arguments, *sizes_over(tile), 16, "bf16", device, layout="linear")
    p = 0.3 if "dropout" in variant else 0.0
    check_mlp(draws, p, p)


def test_no_neighbour_has_a_pass_of_its_own_and_backward_keeps_the_pre_activation_alone(device):
    x, *tensors = (t.requires_grad_() for t in mlp_arguments(40, 24, 64, 3, "fp32", device).values())
    fc, proj, residual = tensors[:4], tensors[4:8], tensors[8]
    saved = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with launch.record() as launches, keeping:
        mlp(x, fc, proj, residual).sum().backward()
    with launch.record() as alone:
        lora_linear.lora_linear(lora_linear.lora_linear(x, *fc, 1.0), *proj, 1.0).sum().backward()
    assert "gradient_kernel" in [each.kernel.__name__ for each in launches]  # backward is recorded too
    assert [each.kernel for each in launches] == [each.kernel for each in alone]
    assert [t.shape for t in saved].count((40, 64)) == 1


@pytest.mark.parametrize("trains", [None, "proj"])
@pytest.mark.parametrize(
    ("form", "variant"), [("pointer", "split"), ("descriptor", "split"), ("pointer", "single")]
)
def test_without_a_gradient_to_it_the_pre_activation_is_not_stored(
    form, variant, trains, device, monkeypatch
):
    tile = tile_table.linear_tiles(80 if variant == "single" else 90, form, variant, epilogue=True)[-1]
    choose_tile(monkeypatch, device, tile, form, variant, epilogue=True)
    x, *tensors = mlp_arguments(70, 72, 136, 16, "bf16", device, layout="linear").values()
    fc, proj, residual = tensors[:4], tensors[4:8], tensors[8]

    def run():
        return mlp(x, fc, proj, residual, (1.5, 0.0, None), (0.5, 0.0, None))

    def wide_outputs():
        with launch.record() as launches:
            run()
        outs = [one.args.get(name) for one in launches for name in ("y_ptr", "h_ptr", "y_desc", "h_desc")]
        return sum(getattr(t, "base", t).shape == (70, 136) for t in outs if t is not None)

    for t in proj[2:] if trains else ():
        t.requires_grad_()
    alone, outputs = run(), wide_outputs()
    leaves = proj[2:] if trains else []
    gradients = torch.autograd.grad(alone.square().sum(), leaves) if trains else ()
    fc[2].requires_grad_()
    both = run()
    assert torch.equal(alone, both)
    assert (outputs, wide_outputs()) == (1, 2)
    for mine, expected in zip(
        gradients, torch.autograd.grad(both.square().sum(), leaves) if trains else (), strict=True
    ):
        assert torch.equal(mine, expected)
    with torch.no_grad():
        assert wide_outputs() == 1


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_built_for_the_mlp_is_what_it_launches(grad, device, monkeypatch):
    x, *tensors = mlp_arguments(40, 24, 64, 3, "fp32", device).values()
    fc, proj, residual = tensors[:4], tensors[4:8], tensors[8]
    fc[2].requires_grad_(grad)
    built = []
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_failures", {})
    monkeypatch.setattr(launch, "_why_not_built", lambda each: built.append(each))
    links = [link(fc, stores="yh" if grad else "h"), link(proj, adds=True)]
    assert lora_chain.ready(x, residual, links) is None
    assert launch._failures.keys()
    with launch.record() as launches:
        mlp(x, fc, proj, residual)

    def outputs(each):
        return [each.kernel, each.args.get("y_ptr") is None, each.args.get("h_ptr") is None]

    assert all(outputs(each) in map(outputs, built) for each in launches)


def test_the_dropout_of_a_gradient_is_the_masks(device):
    t = torch.randn(70, 200, generator=torch.Generator().manual_seed(0)).to(device)[:, ::2]
    seed = torch.tensor([5], device=device)
    expected = reference.dropout(t, dropout.keep_mask(seed, 70, 100, 0.3), 0.3)
    torch.testing.assert_close(dropout.dropped(t, 0.3, seed), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 36), (17, 100), (65, 768), (9, 1600), (0, 24)])
def test_a_layer_norm_beside_its_residual_agrees_with_float64(m, k, dtype, device):
    generator = torch.Generator().manual_seed(k)
    weight, bias, scale, *draws = (
        torch.randn(size, generator=generator).to(device, dtype) for size in (k, k, k, *[(m, k)] * 3)
    )

    def outcome_of(norm):
        def call(x):
            h, residual = norm(x, weight.to(x.dtype), bias.to(x.dtype))
            return h * scale.to(x.dtype) + residual  # two gradients that differ

        return call

    def fused(x, weight, bias):
        return layer_norm.layer_norm(x, weight, bias, 1e-5)

    def formula(x, weight, bias):
        return torch.nn.functional.layer_norm(x, (k,), weight, bias, 1e-5), x

    compare(outcome_of(fused), outcome_of(formula), [{"x": 3 * x + 1} for x in draws], ())


def unless_alone(x, residual, links):
    """Of `lora_chain.ready`: that only single layers can be built."""
    return "linear_kernel can't be built here: too large" if len(links) > 1 else None


def patched(model, **options):
    return fastpeft.patch(model, **{"backend": "triton", "scope": "model", **options})


@pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter")
def test_a_patched_gpt2_takes_it_and_equals_stock():
    model, stock, truth = twins(with_lora(gpt2()))
    patched(model)
    assert_as_good_over_draws((model, stock, truth), step, draws=1)
    rows = {row.name: row for row in fastpeft.report(model)}
    assert_fused(model, ("lora", "activation"), path="triton")
    for name in ("c_fc", "act", "c_proj"):
        row = rows[f"base_model.model.transformer.h.1.mlp.{name}"]
        assert (row.reason, row.calls) == (FUSED, 1)
    assert "GELU" not in rows["base_model.model.transformer.h.1.attn.c_proj"].reason
    fastpeft.unpatch(model)
    assert not any(isinstance(m, FusedMLP) for m in model.modules())


@pytest.fixture
def residuals(monkeypatch):
    """What each launch of the GEMM has added, by its dropout."""
    seen, real = [], launch.launch

    def spy(kernel, grid, args, *options):
        if args.get("residual_ptr") is not None and "DROPOUT" in args:
            seen.append(args["DROPOUT"])
        real(kernel, grid, args, *options)

    monkeypatch.setattr(launch, "launch", spy)
    return seen


PADDED = batch([7, 3, 5], "left")


@pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter")
class TestResiduals:
    @pytest.fixture(autouse=True)
    def norms(self, monkeypatch):
        """How often a LayerNorm's backward took its residual's gradient in."""
        seen, real = [], layer_norm.backward
        monkeypatch.setattr(layer_norm, "backward", lambda *given: (seen.append(given), real(*given))[1])
        return seen

    def test_both_projections_and_both_norms_of_a_packed_block_take_theirs(self, residuals, norms):
        model, stock, truth = twins(with_lora(gpt2()))
        patched(model)
        assert_as_good_over_draws((model, stock, truth), lambda each, draw: outcome(each, PADDED), draws=1)
        assert residuals == [False] * 4  # two in each block
        assert len(norms) == 3  # nothing before the first block trains

    @pytest.mark.parametrize("part", ["weight", "bias"])
    def test_a_norm_that_trains_is_stocks(self, part, norms):
        model, stock, truth = twins(with_lora(gpt2()))
        for each in (model, stock, truth):
            each.base_model.model.transformer.h[1].ln_2.get_parameter(part).requires_grad_()
        patched(model)
        assert_as_good_over_draws((model, stock, truth), lambda each, draw: outcome(each, PADDED), draws=1)
        assert len(norms) == 2

    def test_their_dropout_is_the_blocks(self, residuals):
        model, stock, _ = twins(with_lora(gpt2(resid_pdrop=1.0)))
        patched(model)
        mine, expected = outcome(model, PADDED), outcome(stock, PADDED)
        torch.testing.assert_close(mine["output"], expected["output"])
        assert residuals == [True] * 4
        model.eval()(**PADDED)
        assert residuals[4:] == [False] * 4

    @pytest.mark.parametrize("part", ["attn", "attn.c_proj", "attn.resid_dropout", "mlp", "mlp.dropout"])
    def test_a_hook_on_the_way_sees_what_it_saw(self, part, residuals):
        def seen_by(model):
            seen = []
            listened = model.base_model.model.transformer.h[1].get_submodule(part)
            listened.register_forward_hook(
                lambda _, args, out: seen.append(out[0] if part == "attn" else out)
            )
            model.train()(**PADDED)
            return seen[0]

        model, stock, _ = twins(with_lora(gpt2()))
        patched(model)
        torch.testing.assert_close(seen_by(model), seen_by(stock))
        assert residuals == []

    def test_adapters_add_their_blocks(self, norms, monkeypatch):
        seen, real = [], launch.launch
        monkeypatch.setattr(
            launch, "launch", lambda kernel, *given: (seen.append(given[1]), real(kernel, *given))
        )
        model, stock, truth = twins(with_adapters(gpt2(), "post_attn", "post_mlp"))
        patched(model)
        assert_as_good_over_draws((model, stock, truth), lambda each, draw: outcome(each, PADDED), draws=1)
        forward = [args for args in seen if "residual_ptr" in args and "ACTIVATION" in args]
        assert len(forward) == 4
        assert all(args["residual_ptr"] is not None for args in forward)
        assert len(norms) == 3

    def test_an_adapter_that_something_listens_to_leaves_the_residual_out(self):
        model, stock, _ = twins(with_adapters(gpt2(), "post_mlp"))
        patched(model)
        seen = []
        for each in (model, stock):
            each.transformer.h[1].mlp.adapter.register_forward_hook(lambda _, args, out: seen.append(out))
            outcome(each, PADDED)
        torch.testing.assert_close(*seen)

    def test_a_wider_residual_is_added_outside(self, residuals, norms):
        model, stock, _ = twins(with_lora(gpt2()))
        patched(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine, expected = outcome(model, PADDED), outcome(stock, PADDED)
        for name, value in mine.items():
            torch.testing.assert_close(
                value, expected[name], rtol=0.1, atol=0.05 * float(expected[name].abs().max())
            )
        assert residuals == []
        assert len(norms) == 3


@pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter")
class TestWhatGoesLayerByLayer:
    """The layers stay fused, each by itself, and the result is stock's."""

    def run(self, model, prepare=lambda model: None, **options):
        prepare(model)
        model, stock, truth = twins(model)
        patched(model, **options)
        assert_as_good_over_draws((model, stock, truth), step, draws=1)
        mlp = next(m for m in model.modules() if isinstance(m, FusedMLP))
        assert mlp.act._fastpeft.last.path == "torch"
        return mlp

    def test_a_hook_between_the_layers_sees_what_it_saw(self):
        seen = []

        def hook(model):
            model.base_model.model.transformer.h[0].mlp.act.register_forward_hook(
                lambda module, args, output: seen.append(output.shape)
            )

        self.run(with_lora(gpt2()), hook)
        assert seen == [(3, 9, 192)] * 3

    def test_a_projection_without_lora(self):
        mlp = self.run(with_lora(gpt2(), ("c_attn", "c_fc")))
        assert mlp.c_fc._fastpeft.last == Route("triton", "fused kernels, LayerNorm included")

    def test_a_backend_that_isnt_triton(self):
        mlp = self.run(with_lora(gpt2()), backend="auto")
        assert mlp.c_proj._fastpeft.last.path == "torch"

    def test_kernels_that_cant_be_built(self, monkeypatch):
        monkeypatch.setattr(lora_chain, "ready", unless_alone)
        mlp = self.run(with_lora(gpt2()))
        assert mlp.c_fc._fastpeft.last == Route("triton", "fused kernels, LayerNorm included")
        strict = patched(with_lora(gpt2()), strict=True)
        with pytest.raises(RuntimeError, match="can't be built here"):
            step(strict)

    def test_two_adapters_with_dropout(self):
        model = with_lora(gpt2(), lora_dropout=0.5)
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
        patched(model)
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
        mlp = model.base_model.model.transformer.h[0].mlp
        model.train()(input_ids=torch.ones(1, 3, dtype=torch.long))
        assert mlp.act._fastpeft.last.path == "torch"
