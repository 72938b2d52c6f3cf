"""A LayerNorm that leaves `dropout(h) Aᵀ` beside its h, and the LoRA layer that finds it there."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, ROWS, compare, describe, draws_of, link, lora_arguments, pairwise
from models import assert_as_good_over_draws, assert_stock, checkpointing, gpt2, step, twins, with_lora
from test_packing import batch, outcome
from tolerances import assert_as_good_as
from torch import nn
from transformers import GPT2ForSequenceClassification

import fastpeft
from fastpeft import chain, norms, ops, reference
from fastpeft.chain import Link
from fastpeft.kernels import dropout, launch, layer_norm, lora_chain
from fastpeft.kernels.shrink import Shrink
from fastpeft.projections import Projection
from fastpeft.routes import Options

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # Of a large |z|, exp overflows to infinity, whose sigmoid is 0, as it should be.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
interpreted = pytest.mark.skipif(
    not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter"
)
INCLUDED = "fused kernels, LayerNorm included"
P = 0.3
TRITON = Options("triton")


def norm_of(k, device, dtype=torch.float32):
    norm = nn.LayerNorm(k, device=device, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(k)
    for t in (norm.weight, norm.bias):
        t.copy_(torch.randn(k, generator=generator))
    return norm


SAMPLE = pairwise(
    m=ROWS,
    k=[36, 136, 264],  # less than a strip of columns, one and a rest, several
    rank=[1, 32, 64],  # one of each strip
    p=[0.0, 0.1, 1.0],
    dtypes=list(DTYPES),
    form=["dense", "transposed"],
)


@pytest.mark.parametrize("case", list(SAMPLE), ids=describe)
def test_it_agrees_with_float64_with_the_layer_and_the_residual(case, device):
    m, k, p = case["m"], case["k"], case["p"]
    seed = torch.tensor([m + 5], device=device)
    keep = dropout.keep_mask(seed, m, k, p)
    norm = norm_of(k, device)

    def fused(x, weight, bias, lora_a, lora_b):
        before = lora_chain.Norm(norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps, True)
        layer = weight, bias, lora_a, lora_b
        y, residual = lora_chain.lora_chain(x, None, [link(layer, 1.5, p, seed if p else None, norm=before)])
        return y + residual

    def formula(x, weight, bias, lora_a, lora_b):
        # Both norms have the numbers of x's dtype, as the model that holds them has.
        w, b = (t.to(DTYPES[case["dtypes"]][0]).to(x.dtype) for t in (norm.weight, norm.bias))
        h = nn.functional.layer_norm(x, (k,), w, b, norm.eps)
        return x + reference.lora_linear(h, weight, bias, lora_a, lora_b, 1.5, p, keep)

    draws = draws_of(lora_arguments, m, k, k, case["rank"], case["dtypes"], device, form=case["form"])
    compare(fused, formula, [{**draw, "x": 3 * draw["x"] + 1} for draw in draws], ("lora_a", "lora_b"))


def test_a_mean_far_above_the_deviation_costs_no_digits(device):
    x = 1000 + torch.randn(9, 136, generator=torch.Generator().manual_seed(0)).to(device)
    norm, a = norm_of(136, device), torch.zeros(4, 136, device=device)
    h, _ = layer_norm.shrink(x, norm.weight, norm.bias, norm.eps, a, None)
    assert_as_good_as(h, norm(x), norm.double()(x.double()), "h")


@pytest.mark.parametrize("drops", [False, True])
def test_what_is_built_is_what_it_launches(drops, device, monkeypatch):
    norm, x, a = norm_of(24, device), torch.randn(2, 5, 24, device=device), torch.randn(3, 24, device=device)
    built = []
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_failures", {})
    monkeypatch.setattr(launch, "_why_not_built", lambda each: built.append(each) or "too large")
    with pytest.warns(UserWarning, match="uses PyTorch instead of Triton: too large"):
        assert layer_norm.ready_to_shrink(x, norm.weight, norm.bias, a, drops) == "too large"
    with launch.record() as launches:
        given = norm.weight, norm.bias, norm.eps, a, dropout.sample_dropout(x) if drops else None
        layer_norm.shrink(x, *given)
    assert len(built) == len(launches) == 1
    assert built[0].kernel is launches[0].kernel
    assert built[0].args.keys() == launches[0].args.keys()
    assert [each.args["seed_ptr"] is None for each in (*built, *launches)] == [not drops] * 2


class TestTheChain:
    """Of a LayerNorm and the layer behind it."""

    @pytest.fixture(autouse=True)
    def shrinks(self, monkeypatch):
        """How often a layer computed xa for itself."""
        seen, real = [], Shrink.__call__
        monkeypatch.setattr(Shrink, "__call__", lambda *a, **k: (seen.append(1), real(*a, **k))[1])
        return seen

    def layer(self, device, p=P):
        x, *tensors = lora_arguments(9, 24, 16, 3, "fp32", device).values()
        return x, Projection(*tensors, 1.0, p)

    def test_the_layer_takes_what_the_norm_leaves(self, device, shrinks):
        x, layer = self.layer(device)
        links = [Link(layer, norm_of(24, device))]
        chain.lora_chain(x, None, links, TRITON)  # on a GPU it is built, which goes through all kernels
        shrinks.clear()
        y, residual, (route,) = chain.lora_chain(x, None, links, TRITON)
        assert (route.reason, shrinks) == (INCLUDED, [])
        assert residual is x or torch.equal(residual, x)
        normed = norm_of(24, device)(x)
        ops.routed_lora_linear(normed, layer, TRITON)
        shrinks.clear()
        again, route = ops.routed_lora_linear(normed, layer, TRITON)
        assert (route.reason, shrinks) == ("fused kernels", [1])
        assert not torch.equal(y, again)  # another mask

    def test_the_seeds_are_drawn_once(self, device, monkeypatch):
        drawn, real = [], torch.randint
        monkeypatch.setattr(torch, "randint", lambda *a, **k: (drawn.append(a[1]), real(*a, **k))[1])
        x, fc = self.layer(device)
        _, *tensors = lora_arguments(9, 16, 24, 3, "fp32", device).values()
        links = [
            Link(fc, norm_of(24, device), activates=True),
            Link(Projection(*tensors, 1.0, P), residual_p=P),
        ]
        found = chain.lora_chain(x, None, links, TRITON)
        reasons = {route.reason for route in found.routes}
        assert (reasons, drawn) == ({"fused kernels, LayerNorm and GELU included"}, [(3, 2)])

    @pytest.mark.parametrize("trains", [False, True])
    def test_a_gradient_that_nobody_asked_for_is_not_computed(self, trains, device, monkeypatch):
        seen, real = [], layer_norm.backward
        monkeypatch.setattr(layer_norm, "backward", lambda *given: (seen.append(given), real(*given))[1])
        x, layer = self.layer(device)
        layer.lora_a.requires_grad_()
        x.requires_grad_(trains)
        links = [Link(layer, norm_of(24, device))]
        chain.lora_chain(x, None, links, TRITON)  # on a GPU it is built, which goes through all kernels
        seen.clear()
        y, residual, _ = chain.lora_chain(x, None, links, TRITON)
        assert y.requires_grad
        assert residual.requires_grad == trains
        y.sum().backward()
        assert len(seen) == trains

    @pytest.mark.parametrize(
        "step_aside",
        ["wide factor", "rank", "compiling", "autocast", "another width", "a norm that trains"],
    )
    def test_where_it_steps_aside(self, step_aside, device, monkeypatch):
        x, layer = self.layer(device)
        norm = norm_of(24, device)
        if step_aside == "wide factor":
            layer = layer._replace(lora_a=layer.lora_a.double())
        elif step_aside == "rank":
            layer = layer._replace(lora_a=layer.lora_a.repeat(22, 1), lora_b=layer.lora_b.repeat(1, 22))
        elif step_aside == "compiling":
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        elif step_aside == "another width":
            layer = layer._replace(lora_a=layer.lora_a[:, :8])
        elif step_aside == "a norm that trains":
            norm.bias.requires_grad_()
        seen, real = [], layer_norm.shrink
        monkeypatch.setattr(layer_norm, "shrink", lambda *given: (seen.append(given), real(*given))[1])
        with torch.autocast(device, torch.bfloat16, enabled=step_aside == "autocast"):
            found = chain.lora_chain(x, None, [Link(layer, norm)], TRITON)
        assert (found is not None) == (step_aside == "rank")  # by the layer's own pass
        assert seen == []

    @pytest.mark.parametrize("p", [0.0, P])
    def test_in_inference_mode_too(self, p, device, shrinks):
        x, layer = self.layer(device, p)
        norm = norm_of(24, device)
        with torch.inference_mode():
            y, _, (route,) = chain.lora_chain(x, None, [Link(layer, norm)], TRITON)
        assert (route.reason, shrinks) == (INCLUDED, [])
        if p == 0.0:
            expected = reference.lora_linear(norm(x), *layer[:5])
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


class Masked(nn.Dropout):
    """The kernels' dropout of one seed, over rows, in any dtype."""

    def __init__(self, seed):
        super().__init__(P)
        self.seed = seed

    def forward(self, x):
        rows = x.flatten(0, -2)
        keep = dropout.keep_mask(torch.tensor([self.seed]), *rows.shape, P) if self.training else None
        return reference.dropout(rows, keep, P).view(x.shape) if self.training else x


def seeds(x, count):
    """Instead of drawn ones: 11, then 12 and 13 where several are drawn at once."""
    return torch.arange(11, 11 + count)[:, None].expand(count, 2).contiguous()


def second_half_at_once(name):
    """The seed of a layer's mask where everything behind the attention is one chain."""
    return {"mlp.c_fc": 12, "mlp.c_proj": 13}.get(name, 11)


def masked_twins(model, seeds_of=second_half_at_once):
    """Like `models.twins`, the stock ones with the masks that the kernels draw from `seeds`."""
    model, stock, truth = twins(model)
    assert_stock(stock)
    for each in (stock, truth):
        for name, module in each.named_modules():
            for adapter in module.lora_dropout if hasattr(module, "lora_dropout") else ():
                module.lora_dropout[adapter] = Masked(seeds_of(".".join(name.split(".")[-2:])))
    return model, stock, truth


def patched(model, **options):
    return fastpeft.patch(model, **{"backend": "triton", "scope": "model", **options})


def one_block(**config):
    """A GPT-2 of one block, both of whose norms have a LoRA layer behind them, that drops."""
    return with_lora(gpt2(n_layer=1), **{"lora_dropout": P, **config})


def listen(module, kind, seen):
    """Note in `seen` each call of a module, by one of the ways to do it."""
    if kind == "hook":
        module.register_forward_hook(lambda module, args, out: seen.append(1))
    elif kind == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: seen.append(1))
    else:

        def forward(*args, **kwargs):
            seen.append(1)
            return type(module).forward(module, *args, **kwargs)

        module.forward = forward


def layers(model, name):
    return [module for path, module in model.named_modules() if path.endswith(name)]


@interpreted
class TestTheModel:
    @pytest.fixture(autouse=True)
    def seeded(self, monkeypatch):
        monkeypatch.setattr(chain, "_drawn", seeds)

    @pytest.fixture
    def launches(self, monkeypatch):
        """The names of the kernels, as they are launched, that drop something before a factor."""
        seen, real = [], launch.launch

        def spy(kernel, grid, args, *given):
            if args.get("seed_ptr") is not None:
                seen.append(kernel.__name__)
            real(kernel, grid, args, *given)

        monkeypatch.setattr(launch, "launch", spy)
        return seen

    def check(self, model, prepare=lambda model: None, **options):
        """The patched model against its masked twins; returns it."""
        seeds_of = options.pop("seeds_of", second_half_at_once)
        model, stock, truth = masked_twins(model, seeds_of)
        for each in (model, stock, truth):
            prepare(each)
        patched(model, **options)
        assert_as_good_over_draws((model, stock, truth), step, draws=1)
        return model

    def counts(self, launches):
        return launches.count("layer_norm_shrink_kernel"), launches.count("shrink_kernel")

    @pytest.mark.parametrize("kind", ["bf16", "fp32"])
    def test_every_norm_leaves_xa_and_backward_draws_the_same_masks(self, kind, launches):
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
        model = self.check(with_lora(gpt2(), lora_dropout=P).to(dtype))
        assert self.counts(launches) == (4, 4)  # two norms and two c_proj in each of two blocks
        rows = {row.name.split("transformer.h.1.")[-1]: row.reason for row in fastpeft.report(model)}
        assert rows["attn.c_attn"] == INCLUDED
        assert rows["mlp.c_fc"] == "fused kernels, LayerNorm and GELU included"
        assert rows["attn.c_proj"] == "fused kernels"

    def test_without_dropout_it_drops_nothing(self, launches):
        model, stock, truth = twins(with_lora(gpt2(), lora_dropout=0.0))
        patched(model)
        assert_as_good_over_draws((model, stock, truth), step, draws=1)
        dropping = patched(with_lora(gpt2(), lora_dropout=P)).eval()
        dropping(input_ids=torch.ones(1, 3, dtype=torch.long))
        assert launches == []
        for each in (model, dropping):
            rows = {row.reason for row in fastpeft.report(each) if row.name.endswith("c_attn")}
            assert rows == {INCLUDED}

    def test_without_a_gradient_it_still_drops(self, launches):
        model, stock, _ = masked_twins(one_block())
        patched(model)
        with torch.no_grad():
            mine, expected = (each.train()(input_ids=torch.arange(2, 11)[None]) for each in (model, stock))
        torch.testing.assert_close(mine.logits, expected.logits)
        assert self.counts(launches)[0] == 2

    @pytest.mark.parametrize("name", ["h.0.ln_1", "h.0.attn.c_attn", "h.0.mlp"])
    @pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
    def test_what_listens_in_between_keeps_it_out(self, name, kind, launches):
        seen = []
        model = patched(with_lora(gpt2(), lora_dropout=P))
        (module,) = layers(model, "transformer." + name)
        listen(module, kind, seen)
        model.train()(input_ids=torch.arange(2, 11)[None])
        assert seen == [1]
        assert self.counts(launches) == (0, 8)

    def test_layer_by_layer_the_first_of_the_mlp_takes_it_too(self, launches, monkeypatch):
        reason = "linear_kernel can't be built here: too large"
        monkeypatch.setattr(lora_chain, "ready", lambda x, residual, links: reason if links[1:] else None)
        model = self.check(one_block(), seeds_of=lambda name: 11)
        assert self.counts(launches) == (2, 2)
        assert {m._fastpeft.last.reason for m in layers(model, ".mlp.c_fc")} == {INCLUDED}

    @pytest.mark.parametrize("part", ["weight", "bias"])
    def test_a_norm_that_trains_is_stocks(self, part, launches):
        def prepare(model):
            layers(model, "h.0.ln_2")[0].get_parameter(part).requires_grad_()

        self.check(one_block(), prepare, seeds_of=lambda name: 12 if name == "mlp.c_proj" else 11)
        assert self.counts(launches)[0] == 1

    def test_two_adapters_go_by_themselves(self, launches):
        model = one_block()
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
        patched(model)
        step(model)
        assert self.counts(launches) == (0, 4)

    def test_a_layer_without_lora_has_none(self, launches):
        self.check(one_block(target_modules=["c_fc", "c_proj"]))
        assert self.counts(launches)[0] == 1

    @pytest.mark.parametrize("options", [{"scope": "layers"}, {"backend": "torch"}], ids=str)
    def test_outside_the_model_scope_or_triton_there_is_none(self, options, launches):
        step(patched(one_block(), **options))
        assert self.counts(launches)[0] == 0

    def test_a_kernel_that_cant_be_built_leaves_it_to_the_layers(self, launches, monkeypatch):
        reason = "layer_norm_shrink_kernel can't be built here: too large"
        monkeypatch.setattr(layer_norm, "ready_to_shrink", lambda *a: reason)
        self.check(one_block())
        assert self.counts(launches) == (0, 4)
        with pytest.raises(RuntimeError, match=reason):
            step(patched(one_block(), strict=True))

    @pytest.mark.parametrize("head", [None, GPT2ForSequenceClassification])
    def test_packed_tokens_too(self, head, launches, monkeypatch):
        # A classifier pools in its last block alone.
        options = {"n_layer": 1} if head is None else {"head": head}
        model, other, _ = twins(with_lora(gpt2(**options), lora_dropout=P))
        padded = batch([7, 3, 5], "right")
        patched(model), patched(other)
        mine = outcome(model, padded)
        assert self.counts(launches)[0] == (2 if head is None else 4)
        monkeypatch.setattr(norms, "_shrinks", lambda *a: False)
        expected = outcome(other, padded)
        for name, value in mine.items():
            torch.testing.assert_close(value, expected[name])


@interpreted
def test_gradient_checkpointing_draws_the_same_masks_again():
    def gradients(reentrant=None):
        model = patched(with_lora(gpt2(n_layer=1), lora_dropout=P))
        if reentrant is not None:
            model.enable_input_require_grads()
            checkpointing(model, use_reentrant=reentrant)
        return step(model)

    expected = gradients()
    for reentrant in (False, True):
        for name, value in gradients(reentrant).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=f"{name}, {reentrant=}")


@interpreted
def test_two_forward_passes_before_a_backward():
    model = patched(one_block()).train()
    batches = [torch.arange(2, 11)[None], torch.arange(20, 29)[None]]

    def gradients(together):
        model.zero_grad()
        torch.manual_seed(0)
        losses = []
        for ids in batches:
            losses.append(model(input_ids=ids).logits.square().sum())
            if not together:
                losses.pop().backward()
        if together:
            for loss in losses:
                loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(one, other) for one, other in zip(gradients(True), gradients(False), strict=True))
