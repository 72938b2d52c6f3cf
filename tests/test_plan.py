"""A call's plan is carried to the next, which compares or reads whatever a user can change between the two."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext

import pytest
import torch
from models import assert_fused, assert_stock, gpt2, with_adapters, with_lora
from peft import LoraConfig
from torch import nn
from transformers import GPT2ForSequenceClassification

import fastpeft
from fastpeft import ops
from fastpeft.kernels import launch

interpreted = pytest.mark.skipif(
    not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter"
)


def layer_of(model, name="c_fc"):
    return next(m for path, m in model.named_modules() if path.endswith(f"h.0.mlp.{name}"))


def replace_weight(model):
    layer = layer_of(model).base_layer
    layer.weight = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)


def transpose_in_memory(model):
    """Other strides, the same numbers."""
    weight = layer_of(model).base_layer.weight
    weight.data = weight.data.T.contiguous().T


def swap_factor(model):
    factors = layer_of(model).lora_A
    weight = factors["default"].weight
    factors["default"] = nn.Linear(weight.shape[1], 4, bias=False).to(weight.dtype)
    with torch.no_grad():
        factors["default"].weight.fill_(0.02)


def larger_rank(model):
    layer = layer_of(model)
    (width, wide), dtype = layer.base_layer.weight.shape, layer.base_layer.weight.dtype
    layer.lora_A["default"] = nn.Linear(width, 7, bias=False).to(dtype)
    layer.lora_B["default"] = nn.Linear(7, wide, bias=False).to(dtype)
    for i, each in enumerate((layer.lora_A, layer.lora_B)):
        nn.init.constant_(each["default"].weight, 0.02 + i)


def add_bias(model):
    layer = layer_of(model).lora_B["default"]
    layer.bias = nn.Parameter(torch.full_like(layer.weight[:, 0], 0.3))


def own_forward(model):
    factor = layer_of(model).lora_A["default"]
    factor.forward = lambda x: 3 * nn.Linear.forward(factor, x)


def own_class(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer_of(model).lora_B["default"].__class__ = Doubled


def hook_on(part, kind):
    def change(model):
        layer = layer_of(model)
        module = {
            "base": layer.base_layer, "a": layer.lora_A["default"], "b": layer.lora_B["default"],
            "dropout": layer.lora_dropout["default"], "layer": layer,
        }[part]  # fmt: skip
        if kind == "forward":
            module.register_forward_hook(lambda module, args, out: 2 * out)
        elif kind == "pre":
            module.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
        else:
            module.register_full_backward_hook(lambda module, d_in, d_out: tuple(2 * d for d in d_in))

    return change


def base_replaced(model):
    layer = layer_of(model)
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.weight.data.mul_(2)


def scaling(model):
    layer_of(model).scaling["default"] = 0.7


def scaling_dictionary(model):
    layer = layer_of(model)
    layer.scaling = dict.fromkeys(layer.scaling, 0.7)


def learnable_scaling(model):
    layer = layer_of(model)
    layer.scaling["default"] = nn.Parameter(torch.tensor(1.3, dtype=layer.base_layer.weight.dtype))


def another_adapter(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            nn.init.constant_(parameter, 0.1)
    model.set_adapter("other")


def both_adapters(model):
    another_adapter(model)
    for module in model.modules():
        if hasattr(module, "lora_A") and "other" in module.lora_A:
            module.set_adapter(["default", "other"])


def renamed(model):
    layer = layer_of(model)
    for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):
        part["new"] = part.pop("default")
    layer.scaling["new"] = layer.scaling.pop("default") * 2
    layer.set_adapter("new")


def deleted(model):
    another_adapter(model)
    model.delete_adapter("default")


def parameters_replaced_whole(part):
    def change(model):
        module = part(layer_of(model))
        module._parameters = {
            name: None if p is None else nn.Parameter(p.detach() * 2, p.requires_grad)
            for name, p in module._parameters.items()
        }

    return change


def factors_replaced_whole(model):
    factors = layer_of(model).lora_A
    held = dict(factors._modules)
    swap_factor(model)
    swapped, factors._modules = dict(factors._modules), held
    factors._modules = swapped


def blocks_replaced_whole(model):
    """The blocks change places."""
    blocks = next(m for path, m in model.named_modules() if path.endswith("transformer.h"))
    blocks._modules = dict(zip(blocks._modules, reversed(blocks._modules.values()), strict=True))


CHANGES = {
    "parameters of the base replaced whole": parameters_replaced_whole(lambda layer: layer.base_layer),
    "parameters of a factor replaced whole": parameters_replaced_whole(lambda layer: layer.lora_A["default"]),
    "factors replaced whole": factors_replaced_whole,
    "blocks replaced whole": blocks_replaced_whole,
    "weight replaced": replace_weight,
    "weight edited": lambda model: layer_of(model).base_layer.weight.data.mul_(2),
    "weight transposed in memory": transpose_in_memory,
    "base replaced": base_replaced,
    "factor replaced": swap_factor,
    "larger rank": larger_rank,
    "factor edited": lambda model: layer_of(model).lora_A["default"].weight.data.mul_(2),
    "factor's bias": add_bias,
    "own forward": own_forward,
    "own class": own_class,
    "scaling": scaling,
    "scaling's dictionary": scaling_dictionary,
    "learnable scaling": learnable_scaling,
    "scale_layer": lambda model: layer_of(model).scale_layer(0.5),
    "another adapter": another_adapter,
    "both adapters": both_adapters,
    "renamed": renamed,
    "deleted": deleted,
    "disabled": lambda model: layer_of(model).enable_adapters(False),
    "merged": lambda model: model.merge_adapter(),
    "weight trains": lambda model: layer_of(model).base_layer.weight.requires_grad_(),
    "factor frozen": lambda model: layer_of(model).lora_A["default"].weight.requires_grad_(False),
    "dropout of everything": lambda model: layer_of(model).lora_dropout.update({"default": nn.Dropout(1.0)}),
    "dropout's p": lambda model: setattr(layer_of(model).lora_dropout["default"], "p", 1.0),
    "evaluation": lambda model: model.eval(),
    "half of the type": lambda model: model.float(),
    **{
        f"{kind} hook on {part}": hook_on(part, kind)
        for part in ("base", "a", "b", "dropout", "layer")
        for kind in ("forward", "pre", "backward")
    },
}


def outcome(model, length=6):
    """The logits of padded rows, the loss, and every gradient."""
    ids = torch.arange(2, 2 + 2 * length).view(2, length)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    model.zero_grad()
    out = model(input_ids=ids * mask, attention_mask=mask, labels=torch.tensor([0, 1]))
    out.loss.backward()
    found = {"logits": out.logits.detach(), "loss": out.loss.detach()}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, stock, rtol=1e-9):
    mine, expected = outcome(model), outcome(stock)
    assert mine.keys() == expected.keys()
    for name, value in mine.items():
        # A type may have become narrower.
        tolerance = rtol if expected[name].dtype == torch.float64 else max(rtol, 1e-4)
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance * 10, msg=name)


def pair(dtype, adapted=None, **options):
    """A patched model whose calls have plans, and its stock twin, in training mode."""
    model = with_lora(gpt2(GPT2ForSequenceClassification)) if adapted is None else adapted
    model = model.to(dtype).train()
    stock = copy.deepcopy(model)
    assert_stock(stock)
    fastpeft.patch(model, **options)
    return model, stock


def interpreted_pair(blocks=(0,), **options):
    """As `pair`, through the kernels: narrow, LoRA in these blocks, for the interpreter takes its time by the tile."""
    model = gpt2(GPT2ForSequenceClassification, n_embd=16)
    return pair(torch.float32, with_lora(model, layers_to_transform=blocks), backend="triton", **options)


def drop_nothing(*models):
    """A mask that drops is drawn anew, unless it drops all: between nothing and all, a change can be seen."""
    for each in models:
        layer_of(each).lora_dropout["default"] = nn.Dropout(0.0)


def counts_through_the_kernels(change, changes, model, stock, assert_same):
    if change == "dropout's p":
        drop_nothing(model, stock)
    assert_same(model, stock, 1e-4)
    assert_fused(model, ("lora",), path="triton")
    for each in (model, stock):
        changes[change](each)
    for _ in range(2):
        assert_same(model, stock, 1e-4)


@pytest.mark.parametrize("scope", ["layers", "auto"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_between_two_calls_counts_at_the_second(change, scope):
    model, stock = pair(torch.float64, scope=scope)
    assert_same(model, stock)
    assert layer_of(model)._fastpeft.plan is not None
    if change.startswith("dropout"):
        drop_nothing(model, stock)
    assert_same(model, stock)
    for each in (model, stock):
        CHANGES[change](each)
    for _ in range(2):
        assert_same(model, stock)
    assert_fused(model, ("activation",))  # whatever became of the layer


@interpreted
@pytest.mark.parametrize("scope", ["layers", "auto"])
@pytest.mark.parametrize(
    "change",
    # What kernels are prepared for: addresses, strides, ranks, what is needed, and whether something drops.
    ["weight replaced", "weight transposed in memory", "larger rank", "factor frozen", "renamed",
     "weight trains", "dropout's p", "forward hook on a", "both adapters"],
)  # fmt: skip
def test_through_the_kernels_too(change, scope):
    counts_through_the_kernels(change, CHANGES, *interpreted_pair(scope=scope), assert_same)


@pytest.mark.parametrize("scope", ["layers", "auto"])
def test_a_weight_that_inference_mode_made_is_stocks_where_gradients_are_kept(scope):
    """Autograd's functions can't save one, and stock's product needn't: what comes into it has no gradient."""
    adapted = with_lora(
        gpt2(GPT2ForSequenceClassification), layers_to_transform=[0], target_modules=["c_attn"]
    )
    model, stock = pair(torch.float64, adapted, scope=scope)
    assert_same(model, stock)
    for each in (model, stock):
        layer = next(m for path, m in each.named_modules() if path.endswith("h.0.attn.c_attn")).base_layer
        with torch.inference_mode():
            weight = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)
        layer.weight = weight
        with torch.no_grad():  # which may leave a plan
            each(input_ids=torch.arange(2, 8)[None])
    assert_same(model, stock)
    row = next(row for row in fastpeft.report(model) if row.name.endswith("h.0.attn.c_attn"))
    assert (row.path, row.reason) == ("stock", "its tensors are of torch.inference_mode")


#: The adapters of two rows, which change places.
ROWS = ["second", "default"]


def with_rows(**overrides):
    """A model of two adapters, of different ranks and targets, both of which train."""
    model = with_lora(gpt2(GPT2ForSequenceClassification, **overrides), layers_to_transform=[0])
    model.add_adapter("second", second())
    for name, parameter in model.named_parameters():
        if ".second." in name:
            nn.init.constant_(parameter, 0.05)
    model.set_requires_grad(["default", "second"])
    return model


def second(**options):
    return LoraConfig(
        r=3, target_modules=["c_fc", "c_proj"], layers_to_transform=[0], fan_in_fan_out=True, **options
    )


def outcome_of_rows(model, names=ROWS, entered=True):
    """As `outcome`, of rows with these adapters; or the error."""
    try:
        with fastpeft.adapter_rows(model, names) if entered else nullcontext():
            return outcome(model)
    except (KeyError, RuntimeError, ValueError) as error:
        return {type(error).__name__: torch.tensor(list(str(error).encode()))}


def assert_same_rows(model, stock, rtol=1e-9, names=ROWS, entered=True):
    mine, expected = (outcome_of_rows(each, names, entered) for each in (model, stock))
    assert mine.keys() == expected.keys()
    for name, value in mine.items():
        tolerance = rtol if expected[name].dtype == torch.float64 else max(rtol, 1e-4)
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance * 10, msg=name)


def of_second(change):
    """What `change` does to the second adapter's parts of a layer, as a change of the model."""

    def of_model(model):
        layer = layer_of(model)
        change(layer, layer.lora_A["second"], layer.lora_B["second"])

    return of_model


def added_again(model):
    model.delete_adapter("second")
    model.add_adapter("second", second(lora_alpha=5))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            nn.init.constant_(parameter, 0.04)


ROW_CHANGES = CHANGES | {
    "second's scaling": of_second(lambda layer, a, b: layer.scaling.update(second=0.7)),
    "second's weight replaced": of_second(lambda layer, a, b: setattr(b, "weight", nn.Parameter(b.weight * 2))),
    "second's weight edited": of_second(lambda layer, a, b: a.weight.data.mul_(2)),
    "second is frozen": of_second(lambda layer, a, b: b.weight.requires_grad_(False)),
    "second's bias": of_second(lambda layer, a, b: setattr(b, "bias", nn.Parameter(b.weight[:, 0] + 1))),
    "second's hook": of_second(lambda layer, a, b: b.register_forward_hook(lambda m, args, out: 2 * out)),
    "second's own forward": of_second(lambda layer, a, b: setattr(b, "forward", lambda x: x @ b.weight.T * 3)),
    "second's dropout": of_second(
        lambda layer, a, b: layer.lora_dropout.update({"second": nn.Dropout(1.0)})
    ),
    "second leaves the layer": of_second(lambda layer, a, b: layer.lora_A.pop("second")),
    "second deleted": lambda model: model.delete_adapter("second"),
    "second added again": added_again,
    "second renamed": lambda model: [
        part.update({"new": part.pop("second")})
        for part in (layer_of(model).lora_A, layer_of(model).lora_B, layer_of(model).lora_dropout)
    ],
}  # fmt: skip


@pytest.mark.parametrize(("scope", "once"), [("layers", True), ("auto", True), ("auto", False)])
@pytest.mark.parametrize("change", ROW_CHANGES)
def test_what_changed_between_two_calls_of_rows_with_adapters_counts_too(change, scope, once):
    """Within one `adapter_rows`, or in one of each call's own, which gives out handles of hooks."""
    model, stock = pair(torch.float64, with_rows(), scope=scope)
    if change.startswith("dropout"):
        drop_nothing(model, stock)
    with ExitStack() as stack:
        for each in (model, stock) if once else ():
            stack.enter_context(fastpeft.adapter_rows(each, ROWS))
        assert_same_rows(model, stock, entered=not once)
        plan = layer_of(model)._fastpeft.plan
        assert plan.names == set(ROWS)
        assert_same_rows(model, stock, entered=not once)
        assert layer_of(model)._fastpeft.plan is plan
        for each in (model, stock):
            ROW_CHANGES[change](each)
        for _ in range(2):
            assert_same_rows(model, stock, entered=not once)
    assert_fused(model, ("activation",))


@interpreted
@pytest.mark.parametrize(
    "change",
    # What kernels are prepared for, and what becomes a table of each adapter's: the rest is one plan's on either path.
    ["weight replaced", "larger rank", "factor frozen", "dropout's p", "second's scaling", "second added again",
     "second leaves the layer"],
)  # fmt: skip
def test_of_rows_with_adapters_through_the_kernels_too(change):
    twins = pair(torch.float32, with_rows(n_embd=16, n_layer=1), backend="triton")
    counts_through_the_kernels(change, ROW_CHANGES, *twins, assert_same_rows)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_other_rows_and_none_between_two_calls(backend):
    dtype, rtol = (torch.float64, 1e-9) if backend == "torch" else (torch.float32, 1e-4)
    model, stock = pair(dtype, with_rows(n_embd=16, n_layer=1), backend=backend)
    for names in (ROWS, ROWS[::-1], ["second", "second"], ["__base__", "second"], ["__base__"] * 2, ROWS):
        assert_same_rows(model, stock, rtol, names)
        if names == ["second", "second"]:
            assert_same(model, stock, rtol)
    assert_fused(model, ("lora",), path=backend)


def block_of(model):
    return next(m for path, m in model.named_modules() if path.endswith("h.0"))


def of_block(change):
    """What `change` does to the first block, as a change of the model."""
    return lambda model: change(block_of(model))


def replace_norm(block, **options):
    norm = block.ln_2
    block.ln_2 = nn.LayerNorm(norm.normalized_shape, **options).requires_grad_(False)
    with torch.no_grad():
        block.ln_2.weight.copy_(norm.weight * 2)


BLOCK_CHANGES = {
    name: of_block(change)
    for name, change in {
        "norm's weight replaced": lambda b: setattr(b.ln_1, "weight", nn.Parameter(b.ln_1.weight * 2, False)),
        "norm's weight edited": lambda b: b.ln_2.weight.data.mul_(2),
        "norm's weight trains": lambda b: b.ln_2.weight.requires_grad_(),
        "norm's bias trains": lambda b: b.ln_1.bias.requires_grad_(),
        "norm's eps": lambda b: setattr(b.ln_2, "eps", 0.5),
        "norm replaced": replace_norm,
        "norm without a bias": lambda b: replace_norm(b, bias=False),
        "another layer disabled": lambda b: b.attn.c_proj.enable_adapters(False),
        "another layer merged": lambda b: b.mlp.c_proj.merge(),
        "another layer's scaling": lambda b: b.attn.c_attn.scaling.update(default=0.3),
        "another layer's weight trains": lambda b: b.attn.c_proj.base_layer.weight.requires_grad_(),
        "another layer's factor frozen": lambda b: b.attn.c_attn.lora_B["default"].weight.requires_grad_(
            False
        ),
        "another layer loses its LoRA": lambda b: setattr(b.attn, "c_proj", b.attn.c_proj.base_layer),
        "residual's dropout": lambda b: setattr(b.attn.resid_dropout, "p", 1.0),
        "another activation": lambda b: setattr(b.mlp, "act", nn.ReLU()),
        "hook on a norm": lambda b: b.ln_2.register_forward_hook(lambda module, args, out: 2 * out),
        "hook on the MLP": lambda b: b.mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    }.items()
}


@interpreted
@pytest.mark.parametrize("change", BLOCK_CHANGES)
def test_whatever_a_blocks_chains_are_made_of_counts_too(change):
    blocks = (
        (0, 1) if change == "another layer merged" else (0,)
    )  # the last, which the next block's is chained to
    model, stock = interpreted_pair(blocks)
    assert_same(model, stock, 1e-4)
    layers = [layer_of(model), block_of(model).attn.c_attn, block_of(model).mlp.c_proj]
    assert all("included" in layer._fastpeft.last.reason for layer in (layers[0], layers[2]))
    for each in (model, stock):
        BLOCK_CHANGES[change](each)
    for _ in range(2):
        assert_same(model, stock, 1e-4)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_a_change_between_forward_and_a_checkpoints_second_forward_is_stocks(backend):
    """Nobody has walked the trunk there: the second forward runs in backward."""
    model, stock = interpreted_pair() if backend == "triton" else pair(torch.float32, backend=backend)
    found = []
    for each in (model, stock):
        each.enable_input_require_grads()
        name = "activation_checkpointing_enable"  # gradient_checkpointing_enable in older transformers
        getattr(each, name if hasattr(each, name) else "gradient_checkpointing_enable")(
            {"use_reentrant": True}  # which compares nothing of what the two save
        )
        outcome(each)
        outcome(each)
        each.zero_grad()
        loss = each(input_ids=torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0, 1])).loss
        own_forward(each)
        loss.backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def adapter_of(model):
    return model.transformer.h[0].mlp.adapter


def own_up(model):
    up = adapter_of(model).up
    up.forward = lambda h: 2 * nn.Linear.forward(up, h)


def of_adapter(change):
    """What `change` does to the adapter, as a change of the model."""
    return lambda model: change(adapter_of(model))


ADAPTER_CHANGES = {
    name: of_adapter(change)
    for name, change in {
        "weight replaced": lambda a: setattr(a.down, "weight", nn.Parameter(a.down.weight * 2)),
        "weight edited": lambda a: a.up.weight.data.mul_(2),
        "down replaced": lambda a: setattr(a, "down", nn.Linear(len(a.up.weight), 8).to(a.up.weight)),
        "bias gone": lambda a: setattr(a.up, "bias", None),
        "activation": lambda a: setattr(a, "act", nn.GELU("tanh")),
        "approximation": lambda a: setattr(a.act, "approximate", "tanh"),
        "unknown activation": lambda a: setattr(a, "act", nn.Tanh()),
        "scale": lambda a: setattr(a, "scale", 0.3),
        "hook on up": lambda a: a.up.register_forward_hook(lambda module, args, out: 2 * out),
        "hook on act": lambda a: a.act.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        "hook on it": lambda a: a.register_forward_hook(lambda module, args, out: 2 * out),
    }.items()
}
ADAPTER_CHANGES["own forward"] = own_up


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("change", ADAPTER_CHANGES)
def test_an_adapters_changes_count_too(change, backend):
    dtype, rtol = (torch.float64, 1e-9) if backend == "torch" else (torch.float32, 1e-4)
    model = gpt2(GPT2ForSequenceClassification, n_embd=16)  # narrow, and one adapter, for the interpreter
    with torch.no_grad():
        for parameter in model.transformer.h[0].mlp.parameters():
            parameter.mul_(10)  # or the adapter reads all but zeros
    model = with_adapters(model, "post_mlp", activation="gelu", layers=(0,)).to(dtype).train()
    stock = copy.deepcopy(model)
    assert_stock(stock)
    fastpeft.patch(model, backend=backend)
    assert_same(model, stock, rtol)
    assert_fused(model, ("adapter",), path=backend)
    assert adapter_of(model)._fastpeft.plan is not None
    for each in (model, stock):
        torch.manual_seed(3)
        ADAPTER_CHANGES[change](each)
    for _ in range(2):
        assert_same(model, stock, rtol)


@pytest.mark.parametrize("scope", ["layers", "auto"])
def test_circumstances_are_read_at_each_call(scope):
    model, stock = pair(torch.float32, scope=scope)
    assert_same(model, stock, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        mine, expected = outcome(model), outcome(stock)
    torch.testing.assert_close(mine["logits"], expected["logits"], rtol=0.05, atol=0.05)
    assert mine["logits"].dtype == expected["logits"].dtype
    with torch.no_grad():
        ids = torch.ones(2, 3, dtype=torch.long)
        assert not model(input_ids=ids).logits.requires_grad
    with torch.inference_mode():
        assert model(input_ids=ids).logits.is_inference()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        assert_same(model, stock, 1e-5)
        factor = layer_of(model).lora_A["default"]
        assert any(module is factor for module in seen)
    finally:
        handle.remove()
    assert_same(model, stock, 1e-5)
    assert_fused(model, ("lora",))


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's own, of its jvp
def test_torch_func_and_dual_numbers_see_stock_after_a_plan_was_made():
    model, stock = pair(torch.float64, scope="layers")
    outcome(model)
    mine, theirs = layer_of(model), layer_of(stock)
    assert mine._fastpeft.plan is not None
    x, tangent = torch.rand(3, 48, dtype=torch.float64), torch.rand(3, 48, dtype=torch.float64)
    for transform in (
        lambda layer: torch.func.grad(lambda x: layer(x).square().sum())(x),
        lambda layer: torch.func.jvp(layer, (x,), (tangent,))[1],
        lambda layer: torch.func.vmap(layer)(x),
    ):
        torch.testing.assert_close(transform(mine), transform(theirs))
        assert mine._fastpeft.last.path == "stock"


@interpreted
def test_a_tf32_setting_and_another_number_of_rows_are_seen_and_few_things_are_kept(monkeypatch):
    model, stock = interpreted_pair()
    assert_same(model, stock, 1e-4)
    seen, real = [], launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda kernel, grid, args, *how: (seen.append(args), real(kernel, grid, args, *how))
    )
    monkeypatch.setattr(launch, "tf32_allowed", lambda: True)
    from fastpeft.kernels import blocks

    monkeypatch.setattr(blocks, "tf32_allowed", lambda: True)
    outcome(model)
    assert {args["INPUT_PRECISION"] for args in seen if "INPUT_PRECISION" in args} == {"tf32"}
    block = model.get_base_model().transformer.h[0]
    first, second = (layer._fastpeft.plan for layer in (block.attn.c_attn, block.attn.c_proj))
    others = [layer._fastpeft.plan for layer in (block.mlp.c_fc, block.mlp.c_proj)]
    memories = [launch.launchers, first.before([]).answers, second.before(others).answers]
    kept = list(map(len, memories))
    assert all(kept)
    for length in (3, 11, 13):  # 4, 16 and 19 tokens: odd numbers of rows, and one that 16 divides
        outcome(model, length)
    assert list(map(len, memories)) == kept


def test_copies_and_pickles_have_no_plan_of_their_model(tmp_path):
    model, stock = pair(torch.float64)
    outcome(model)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (twin, loaded):
        assert layer_of(each)._fastpeft.plan is None
        each.train()
        for one in (each, stock):
            layer_of(one).lora_A["default"].weight.data.mul_(2)
        assert_same(each, stock)
        for one in (stock,):
            layer_of(one).lora_A["default"].weight.data.div_(2)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_a_rank_that_no_longer_fits_is_an_error_that_names_the_layer(backend, rows):
    model, _ = pair(torch.float32, with_rows(n_embd=16, n_layer=1), backend=backend)
    with fastpeft.adapter_rows(model, ROWS) if rows else nullcontext():
        outcome(model)
        layer = layer_of(model)
        wide, width = layer.out_features, layer.in_features
        layer.lora_A["default"].weight = nn.Parameter(torch.ones(7, width))
        message = rf"h\.0\.mlp\.c_fc: lora_b has shape \({wide}, 4\), expected \({wide}, 7\)"
        with pytest.raises(ValueError, match=message):
            outcome(model)


def test_a_model_that_is_gone_is_not_kept():
    model, _ = pair(torch.float32)
    outcome(model)
    layer = layer_of(model)
    plan = layer._fastpeft.plan
    assert any(referrer is not None for referrer in gc.get_referrers(plan))
    import weakref

    gone = weakref.ref(layer)
    del model, layer, plan
    gc.collect()
    assert gone() is None


def test_threads_share_a_model():
    model, stock = pair(torch.float64, scope="auto")
    model.eval(), stock.eval()
    batches = [
        torch.randint(2, 60, (1 + i % 3, 4 + i), generator=torch.Generator().manual_seed(i)) for i in range(8)
    ]
    with torch.no_grad():
        expected = [stock(input_ids=ids).logits for ids in batches]
    ready = threading.Barrier(4)

    def run(turn):
        ready.wait()
        with torch.no_grad():
            return [model(input_ids=ids).logits for ids in batches[turn:] + batches[:turn]]

    with ThreadPoolExecutor(4) as pool:
        for turn, found in enumerate(pool.map(run, range(4))):
            for mine, theirs in zip(found, expected[turn:] + expected[:turn], strict=True):
                torch.testing.assert_close(mine, theirs)


def test_a_plan_asks_nothing_again(monkeypatch):
    model, _ = pair(torch.float32)
    outcome(model)
    from fastpeft import lora

    monkeypatch.setattr(lora, "why_not_lora", lambda *given: pytest.fail("asked again"))
    monkeypatch.setattr(ops, "check_lora_linear", lambda *given: pytest.fail("checked again"))
    outcome(model)
    outcome(model, 9)
    nn.Linear(1, 1).register_forward_hook(print)  # somebody's, whose handle counts among all
    outcome(model)


def test_nor_does_one_of_rows_with_adapters(monkeypatch):
    model, _ = pair(torch.float32, with_rows())
    outcome_of_rows(model)
    from fastpeft import lora

    monkeypatch.setattr(lora, "why_not_lora", lambda *given: pytest.fail("asked again"))
    monkeypatch.setattr(ops, "check_lora_linear", lambda *given: pytest.fail("checked again"))
    outcome_of_rows(model)
    outcome_of_rows(model, ROWS[::-1])


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_what_was_replaced_and_a_model_are_freed_at_once(backend):
    """Without the collector: on a GPU memory is short until it comes."""
    model, _ = interpreted_pair() if backend == "triton" else pair(torch.float32)
    outcome(model)
    replaced = weakref.ref(layer_of(model).base_layer.weight)
    gc.collect()
    gc.disable()
    try:
        model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
        assert replaced() is None
        held = [weakref.ref(module) for module in model.modules()]
        del model
        assert [each() for each in held if each() is not None] == []
    finally:
        gc.enable()
