"""GPT-2's MLP through the kernels: the GELU between its projections, against float64 and against single layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_checks import DTYPES, compare, describe, draws_of, lora_arguments, pairwise
from models import assert_fused, gpt2, step, twins, with_lora
from test_kernels_lora_linear import LINEAR_TILES
from tolerances import assert_as_good_as

import fastpeft
from fastpeft import reference
from fastpeft.kernels import dropout, launch, lora_linear, lora_mlp, tiling
from fastpeft.mlp import FusedMLP

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # Of a large |z|, exp overflows to infinity, whose sigmoid is 0, as it should be.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
LAYER = ("weight", "bias", "lora_a", "lora_b")
FUSED = "fused kernels, GELU included"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and not launch.INTERPRETED:
        pytest.skip("kernels are compiled here: the same test runs on cuda")
    return request.param


def mlp_arguments(m, k, hidden, rank, dtypes, device, *, draw=0, **form):
    fc = lora_arguments(m, k, hidden, rank, dtypes, device, draw=draw, **form)
    proj = lora_arguments(m, hidden, k, rank, dtypes, device, draw=draw + 1000, **form)
    return {
        "x": fc["x"],
        **{f"fc_{name}": fc[name] for name in LAYER},
        **{f"proj_{name}": proj[name] for name in LAYER},
    }


def check_mlp(draws, p):
    x = draws[0]["x"]
    hidden = draws[0]["fc_weight"].shape[1]
    seeds = [torch.tensor([n], device=x.device) if p > 0 else None for n in (3, 5)]
    keeps = [
        None if seed is None else dropout.keep_mask(seed, len(x), width, p)
        for seed, width in zip(seeds, (x.shape[1], hidden), strict=True)
    ]

    def layers(given):
        return ([given[f"{layer}_{name}"] for name in LAYER] for layer in ("fc", "proj"))

    def formula(**given):
        (fc, proj), x = layers(given), given["x"]
        h = reference.gelu_new(reference.lora_linear(x, *fc, 1.5, p, keeps[0]))
        return reference.lora_linear(h, *proj, 0.5, p, keeps[1])

    def fused(**given):
        fc, proj = layers(given)
        return lora_mlp.lora_mlp(given["x"], fc, 1.5, p, seeds[0], proj, 0.5, p, seeds[1])

    compare(fused, formula, draws, tuple(n for n in draws[0] if "lora" in n))


SAMPLE = pairwise(
    m=[1, 17, 63, 257],
    layer=[(36, 100), (40, 264)],
    rank=[1, 8, 64, 100],
    p=[0.0, 0.1, 0.5],
    dtypes=list(DTYPES),
    layout=["conv1d", "linear"],
    form=["dense", "offset", "transposed"],
)


@pytest.mark.parametrize("case", list(SAMPLE), ids=describe)
def test_ragged_shapes_agree_with_float64(case, device):
    sizes = case["m"], *case["layer"], case["rank"], case["dtypes"], device
    check_mlp(draws_of(mlp_arguments, *sizes, layout=case["layout"], form=case["form"]), case["p"])


@pytest.mark.parametrize(("dtypes", "p"), [("bf16+fp32", 0.1), ("fp16", 0.0)])
def test_the_mlp_of_gpt2_agrees_with_float64(dtypes, p, device):
    check_mlp(draws_of(mlp_arguments, 65, 768, 3072, 16, dtypes, device), p)


@pytest.mark.parametrize(("m", "k", "hidden"), [(0, 24, 16), (5, 24, 0)])
def test_an_empty_dimension_gives_bias_and_zero_gradients(m, k, hidden, device):
    check_mlp(draws_of(mlp_arguments, m, k, hidden, 3, "fp32", device), 0.5)


@pytest.mark.parametrize(
    ("form", "variant"),
    [
        *itertools.product(["pointer", "descriptor"], ["split", "dropout"]),
        *itertools.product(["pointer"], ["single", "single dropout"]),
    ],
)
@pytest.mark.parametrize("tile", LINEAR_TILES, ids=str)
def test_every_tile_of_the_gemm_in_both_forms(tile, form, variant, device, monkeypatch):
    if device == "cuda":
        arch = tiling.architecture(torch.device("cuda")).name
        if tile not in tiling.linear_tiles(arch, form, variant, gelu=True) or (
            form == "descriptor" and arch < 90
        ):
            pytest.skip(f"not in the table of sm_{arch}")

    def chosen(x, weight, rank, inner, outer, gelu):
        single = variant.startswith("single") and not inner
        return [tiling.Linear(tile, form == "descriptor", single, programs=3)]

    monkeypatch.setattr(tiling, "linear", chosen)
    draws = draws_of(mlp_arguments, 70, 72, 264, 16, "bf16", device, layout="linear")
    check_mlp(draws, 0.3 if "dropout" in variant else 0.0)


def test_no_pass_over_memory_is_the_gelus_own_and_backward_keeps_the_pre_activation_alone(device):
    x, *tensors = (t.requires_grad_() for t in mlp_arguments(40, 24, 64, 3, "fp32", device).values())
    fc, proj = tensors[:4], tensors[4:]
    saved = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with launch.record() as launches, keeping:
        lora_mlp.lora_mlp(x, fc, 1.0, 0.0, None, proj, 1.0, 0.0, None).sum().backward()
    with launch.record() as alone:
        lora_linear.lora_linear(lora_linear.lora_linear(x, *fc, 1.0), *proj, 1.0).sum().backward()
    assert [each.kernel for each in launches] == [each.kernel for each in alone]
    assert [t.shape for t in saved].count((40, 64)) == 1


def test_opcheck_passes_with_the_gelu_before_and_after(device):
    x, weight, bias, a, b = lora_arguments(9, 24, 16, 3, "fp32", device).values()
    pre = x.clone().requires_grad_()
    h = reference.gelu_new(x)
    a.requires_grad_()
    operator = torch.ops.fastpeft.lora_linear.default
    torch.library.opcheck(operator, (x, weight, bias, a, b, 2.0, 0.0, None, True, None))
    torch.library.opcheck(operator, (h, weight, bias, a, b, 2.0, 0.0, None, False, pre))


def patched(model, **options):
    return fastpeft.patch(model, **{"backend": "triton", "scope": "model", **options})


def test_a_patched_gpt2_takes_it_and_equals_stock(device):
    model, stock, truth = twins(with_lora(gpt2()).to(device))
    patched(model)
    if device == "cpu":  # `step` makes its tokens there
        results = [step(each) for each in (model, stock, truth)]
        for name in results[0]:
            assert_as_good_as(*(result[name] for result in results), name)
    rows = {row.name: row for row in fastpeft.report(model)}
    assert_fused(model, ("lora", "activation"), path="triton")
    for name in ("c_fc", "act", "c_proj"):
        row = rows[f"base_model.model.transformer.h.1.mlp.{name}"]
        assert (row.reason, row.calls) == (FUSED, 1)
    assert "GELU" not in rows["base_model.model.transformer.h.1.attn.c_proj"].reason
    fastpeft.unpatch(model)
    assert not any(isinstance(m, FusedMLP) for m in model.modules())


@pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter")
class TestWhatGoesLayerByLayer:
    """The layers stay fused, each by itself, and the result is stock's."""

    def run(self, model, prepare=lambda model: None, **options):
        prepare(model)
        model, stock, truth = twins(model)
        patched(model, **options)
        results = [step(each) for each in (model, stock, truth)]
        for name in results[0]:
            assert_as_good_as(*(result[name] for result in results), name)
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
        assert mlp.c_fc._fastpeft.last == fastpeft.ops.Route("triton", "fused kernels")

    def test_a_backend_that_isnt_triton(self):
        mlp = self.run(with_lora(gpt2()), backend="auto")
        assert mlp.c_proj._fastpeft.last.path == "torch"

    def test_kernels_that_cant_be_built(self, monkeypatch):
        monkeypatch.setattr(lora_mlp, "ready", lambda *a: "linear_kernel can't be built here: too large")
        mlp = self.run(with_lora(gpt2()))
        assert mlp.c_fc._fastpeft.last == fastpeft.ops.Route("triton", "fused kernels")
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
