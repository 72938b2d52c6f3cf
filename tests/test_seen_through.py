"""The default scope: whatever a user's code does with a model, dropout off, it sees what the unpatched model shows.

Every use here runs on a stock model and on a patched twin; the same inputs without the use are packed.
"""

from __future__ import annotations

import copy
import functools
import io
import types
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import assert_stock, gpt2, with_adapters, with_lora
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear as LoraLinear
from test_packing import batch, packing_row
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.activations import NewGELUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as GPT2Output
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft import gemm, probe, swap
from fastpeft.adapters import Adapter
from fastpeft.kernels import launch
from fastpeft.stock import Defined

LENGTHS = [12, 4, 9]


def transformer(model):
    return next(m for m in model.modules() if isinstance(m, GPT2Model))


def seen(use, model, inputs):
    """What a use of the model shows: tensors, and the gradients that it leaves."""
    torch.manual_seed(0)
    shown = use(model, inputs)
    shown = list(shown) if isinstance(shown, (tuple, list)) else [shown]
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return shown, grads


def assert_the_same(use, model, inputs, reason=None):
    stock, patched = copy.deepcopy(model), fastpeft.patch(copy.deepcopy(model))
    assert_stock(stock)
    expected, result = seen(use, stock, dict(inputs)), seen(use, patched, dict(inputs))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    row = packing_row(patched)
    if reason is not None:
        assert (row.path, row.calls) == ("stock", 0)
        assert reason in row.reason, row.reason
    return patched


def classifier(**config):
    return with_lora(gpt2(GPT2ForSequenceClassification, **config)).train()


def logits(model, inputs):
    return model(**inputs).logits


def test_without_a_use_it_is_packed():
    model = assert_the_same(logits, classifier(), batch(LENGTHS))
    assert packing_row(model)[2:] == ("torch", "packed: no padding between the embeddings and the head", 1)


HOOKED = {
    "wte": lambda t: t.wte,
    "drop": lambda t: t.drop,
    "block": lambda t: t.h[0],
    "ln_1": lambda t: t.h[1].ln_1,
    "attention": lambda t: t.h[1].attn,
    "c_fc": lambda t: t.h[0].mlp.c_fc,
    "lora_A": lambda t: t.h[1].mlp.c_fc.lora_A["default"],
    "base_layer": lambda t: t.h[0].attn.c_attn.base_layer,
    "act": lambda t: t.h[0].mlp.act,
    "ln_f": lambda t: t.ln_f,
    "the model": lambda t: t,
}
KINDS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]


@pytest.mark.parametrize(
    ("where", "kind"), [*((w, "forward") for w in HOOKED), *(("block", k) for k in KINDS[1:])]
)
def test_a_hook_sees_the_callers_rows(where, kind):
    def use(model, inputs):
        shapes = []

        def look(module, *tensors):
            first = tensors[-1][0] if isinstance(tensors[-1], tuple) else tensors[-1]
            first = first if torch.is_tensor(first) else first[0]
            shapes.append(torch.tensor(first.shape))

        model.get_base_model().enable_input_require_grads()  # full backward hooks ask for it
        getattr(HOOKED[where](transformer(model)), f"register_{kind}_hook")(look)
        model(**inputs).logits.sum().backward()
        assert shapes
        return shapes

    assert_the_same(use, classifier(), batch(LENGTHS, "left"), "has a hook that looks on")


def test_hooks_that_come_and_go():
    model = fastpeft.patch(classifier())
    inputs = batch(LENGTHS)
    for _ in range(2):
        handle = transformer(model).h[1].mlp.register_forward_hook(lambda *_: None)
        model(**inputs)
        assert packing_row(model).reason == "h.1.mlp has a hook that looks on"
        handle.remove()
        model(**inputs)
        assert packing_row(model).path == "torch"


def test_global_hooks():
    def use(model, inputs):
        names = []
        handle = torch_modules.register_module_forward_hook(
            lambda module, args, output: names.append(type(module).__name__)
        )
        try:
            return [model(**inputs).logits, torch.tensor([len(names), len(set(names))])]
        finally:
            handle.remove()

    model = assert_the_same(use, classifier(), batch(LENGTHS), "global module hooks")
    assert {row.reason for row in fastpeft.report(model) if row.kind == "lora"} == {"global module hooks"}


def test_a_captured_hidden_state_packs_again_after():
    model = fastpeft.patch(classifier())
    assert len(model(**batch(LENGTHS), output_hidden_states=True).hidden_states) == 3
    assert packing_row(model).reason == "output_hidden_states"
    model(**batch(LENGTHS))
    assert packing_row(model).calls == 1, (
        "transformers' own hooks stay on the blocks, and collect nothing now"
    )


class Around(nn.Module):
    """A causal convolution around a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        torch.manual_seed(2)
        self.conv = nn.Conv1d(48, 48, 3)

    def forward(self, h):
        return self.inner(h) + self.conv(F.pad(h.transpose(1, 2), (2, 0))).transpose(1, 2)


def around(name):
    def change(t):
        parent, _, last = name.rpartition(".")
        setattr(t.get_submodule(parent), last, Around(t.get_submodule(name)))

    return change


def forward_of_its_own(t):
    mlp = t.h[0].mlp
    mlp.forward = lambda h: type(mlp).forward(mlp, h).cumsum(1)


def replaced(t):
    torch.manual_seed(3)
    t.h[1] = GPT2Block(t.config, layer_idx=1)


def appended(t):
    t.h.append(copy.deepcopy(t.h[-1]))


def shared(t):
    t.h[1] = t.h[0]


def bidirectional(t):
    for block in t.h:
        block.attn.is_causal = False


def counted(t):
    t.wte.scale_grad_by_freq = True
    t.wte.weight.requires_grad_(True)


CHANGES = {
    "around the MLP": (around("h.0.mlp"), "h.0.mlp is a Around"),
    "around the norm": (around("ln_f"), "ln_f is a Around"),
    "around a LoRA layer's dropout": (around("h.0.mlp.c_fc.lora_dropout.default"), "which isn't known"),
    "a forward of its own": (forward_of_its_own, "h.0.mlp has a forward of its own"),
    "a block replaced": (replaced, ""),
    "a block appended": (appended, "layer_idx"),
    "a block shared": (shared, "a module is used twice"),
    "bidirectional": (bidirectional, "isn't causal"),
    "an embedding's gradient counted": (counted, "scale_grad_by_freq"),
}


@pytest.mark.parametrize("before", [True, False], ids=["before patch", "after patch"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_trunk(change, before):
    make, reason = CHANGES[change]
    model = classifier()
    if before:
        make(transformer(model))
        reason = "" if change == "a block replaced" else reason

    def use(model, inputs):
        if not before:
            make(transformer(model))
        loss = model(**inputs, use_cache=False).logits.square().sum()
        loss.backward()
        return loss

    changed = assert_the_same(use, model, batch(LENGTHS), reason if reason else None)
    if change == "a block replaced":
        after = ("torch", 1) if before else ("stock", 0)
        assert packing_row(changed)[2::2] == after
        assert before or packing_row(changed).reason == "h.1 isn't patched: call fastpeft.patch again"


def test_strict_names_what_keeps_the_trunk_stock_and_changes_nothing():
    model = classifier()
    around("h.0.mlp")(transformer(model))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"transformer: h\.0\.mlp is a Around, which isn't known"):
        fastpeft.patch(model, strict=True)
    assert [type(module) for module in model.modules()] == before
    fastpeft.patch(model, strict=True, scope="layers")


REPLACED = [
    *((kind, "forward") for kind in (
        LoraLinear, Conv1D, nn.Linear, nn.Dropout, nn.Identity, NewGELUActivation, nn.ReLU, Adapter,
        nn.LayerNorm, nn.Embedding, GPT2Block, modeling_gpt2.GPT2MLP, modeling_gpt2.GPT2Attention, GPT2Model,
    )),
    (nn.Module, "__call__"), (F, "linear"), (F, "dropout"), (torch, "addmm"),
    (F, "layer_norm"), (F, "embedding"), (F, "scaled_dot_product_attention"),
    (modeling_gpt2, "eager_attention_forward"), (modeling_gpt2, "create_causal_mask"),
]  # fmt: skip


def scaled(real):
    """What `real` gives, its tensors times 1.1."""

    @functools.wraps(real)
    def replacement(*args, **kwargs):
        output = real(*args, **kwargs)
        if isinstance(output, GPT2Output):
            return GPT2Output(last_hidden_state=output[0] * 1.1)
        if isinstance(output, tuple):
            return output[0] * 1.1, *output[1:]
        # The blocks of a GPT-2 call each other by way of lists and caches, and its mask may be None.
        return output * 1.1 if torch.is_tensor(output) and output.is_floating_point() else output

    return replacement


@pytest.mark.parametrize("scope", ["auto", "layers"])
@pytest.mark.parametrize(("owner", "name"), REPLACED, ids=lambda part: getattr(part, "__name__", part))
def test_what_a_library_defines_replaced_after_patch(owner, name, scope, monkeypatch):
    eager = name in ("eager_attention_forward", "create_causal_mask")
    model = gpt2(GPT2ForSequenceClassification, attn_implementation="eager" if eager else "sdpa")
    model = with_adapters(with_lora(model), "post_mlp").train()
    stock, patched = copy.deepcopy(model), fastpeft.patch(copy.deepcopy(model), scope=scope)
    before = logits(patched, batch(LENGTHS))
    with monkeypatch.context() as patch:
        real = getattr(owner, name)
        # A mask times 1.1 is the same mask: this one shows twice as much.
        mask = lambda *args, **kwargs: real(*args, **kwargs).clamp(min=-2)  # noqa: E731
        patch.setattr(owner, name, mask if name == "create_causal_mask" else scaled(real))
        expected = logits(stock, batch(LENGTHS))
        torch.testing.assert_close(logits(patched, batch(LENGTHS)), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, before, atol=1e-4), "it made no difference to see"
        if scope == "auto":
            assert packing_row(patched).reason == f"the {name} of {owner.__name__} was replaced"
    calls = [row.calls for row in fastpeft.report(patched)]
    torch.testing.assert_close(logits(patched, batch(LENGTHS)), before, rtol=1e-4, atol=1e-5)
    assert all(row.calls > count for row, count in zip(fastpeft.report(patched), calls, strict=True))


def test_what_was_replaced_before_is_never_taken_for_the_librarys(monkeypatch):
    places = (nn.Linear, "forward"), (F, "linear"), (GPT2Model, "forward")
    assert Defined(*places).replaced() is None
    for owner, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, scaled(getattr(owner, name)))  # which bears the library's name
            late = Defined(*places)
            assert late.replaced() == f"the {name} of {owner.__name__} was replaced"


def test_the_forward_of_a_users_adapter_replaced():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.down, self.act, self.up = nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 48)

        def forward(self, x):
            return x + self.up(self.act(self.down(x)))

    model, x = nn.Sequential(Own()), torch.randn(3, 48)
    fastpeft.patch(model)
    model(x)
    assert fastpeft.report(model)[0].calls == 1
    Own.forward = lambda self, x: self.down(x)
    for _ in range(2):
        torch.testing.assert_close(model(x), model[0].down(x))
        assert fastpeft.report(model)[0][2:] == ("stock", "the forward of Own was replaced", 1)
        fastpeft.patch(model)


class Scaling(TorchFunctionMode):
    """Changes what linear layers and activations give."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return output * 1.1 if func in (F.linear, torch.addmm, torch.tanh) else output


class Shapes(TorchDispatchMode):
    """Notes the shapes that norms and products see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.native_layer_norm, torch.ops.aten.addmm):
            self.seen += [len(args[1]), *args[0].shape]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [Scaling, Shapes])
def test_a_mode_is_handed_stocks_operators(make):
    def use(model, inputs):
        with make() as mode:
            result = model(**inputs).logits
        return [result.detach(), torch.tensor(getattr(mode, "seen", []))]

    patched = assert_the_same(use, classifier(), batch(LENGTHS), "mode looks on")
    assert {row.path for row in fastpeft.report(patched)} == {"stock"}


def test_a_default_device_is_no_mode_that_looks_on():
    model = fastpeft.patch(classifier())
    with torch.device("cpu"):
        model(**batch(LENGTHS))
    assert packing_row(model).calls == 1


def test_a_tensor_of_a_users_class_sees_stocks_functions():
    def use(model, inputs):
        called = []

        class Noting(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                called.append(func)
                return super().__torch_function__(func, types, args, kwargs or {})

        inputs["input_ids"] = inputs["input_ids"].as_subclass(Noting)
        assert type(model(**inputs).logits) is Noting
        return torch.tensor([called.count(func) for func in (F.linear, torch.addmm, torch.tanh, F.gelu)])

    assert_the_same(use, classifier(), batch(LENGTHS), "input_ids")


@pytest.mark.parametrize("adapted", ["lora", "adapter"])
def test_a_parameter_that_became_an_attribute(adapted):
    """As hypernetworks have it, and torch's old weight_norm; also one that wasn't there before."""

    def use(model, inputs):
        model(**inputs)
        h = transformer(model).h
        if adapted == "lora":
            parts = [(h[0].mlp.c_fc.lora_A["default"], "weight"), (h[1].mlp.c_fc.base_layer, "bias")]
        else:
            parts = [(h[0].mlp.adapter.down, "weight"), (h[1].mlp.adapter.up, "bias")]
        for part, name in parts:
            value = getattr(part, name).detach() * 2 + 1
            delattr(part, name)
            setattr(part, name, value)
        return model(**inputs).logits.detach()

    model = gpt2(GPT2ForSequenceClassification)
    model = with_lora(model) if adapted == "lora" else with_adapters(model, "post_mlp")
    assert_the_same(use, model, batch(LENGTHS))


def test_tensors_without_data_make_stocks_error():
    messages = []
    for patched in (False, True):
        model = classifier()
        model = (fastpeft.patch(model) if patched else model).to("meta")
        inputs = {name: tensor.to("meta") for name, tensor in batch(LENGTHS).items()}
        with pytest.raises(RuntimeError) as caught:
            model(**inputs)
        messages.append((caught.type, str(caught.value)))
    assert messages[0] == messages[1]


def labels_of(inputs, **counts):
    """Labels that count at no position whose token, or the one before it, is hidden."""
    mask = inputs["attention_mask"].bool()
    before = F.pad(mask[:, :-1], (1, 0))
    return inputs["input_ids"].masked_fill(~(mask & before), -100)


HEADS = {
    "classifier": (GPT2ForSequenceClassification, lambda i: {"labels": torch.tensor([0, 1, 0])}, True),
    "classifier without labels": (GPT2ForSequenceClassification, lambda i: {}, True),
    "language model": (GPT2LMHeadModel, lambda i: {"labels": labels_of(i)}, True),
    "language model, num_items_in_batch": (
        GPT2LMHeadModel, lambda i: {"labels": labels_of(i), "num_items_in_batch": 5}, True
    ),
    "language model without labels": (GPT2LMHeadModel, lambda i: {}, False),
    "language model, labels over the padding": (GPT2LMHeadModel, lambda i: {"labels": i["input_ids"]}, False),
    "language model, logits_to_keep": (GPT2LMHeadModel, lambda i: {"logits_to_keep": 2}, False),
    "language model, another ignore_index": (
        GPT2LMHeadModel, lambda i: {"labels": i["input_ids"], "ignore_index": 0}, False
    ),
    "token classifier": (GPT2ForTokenClassification, lambda i: {
        "labels": (i["input_ids"] % 2).masked_fill(i["attention_mask"] == 0, -100)
    }, True),
    "token classifier, labels over the padding": (
        GPT2ForTokenClassification, lambda i: {"labels": i["input_ids"] % 2}, False
    ),
    "question answering": (GPT2ForQuestionAnswering, lambda i: {
        "start_positions": torch.tensor([1, 2, 1]), "end_positions": torch.tensor([3, 3, 2])
    }, False),
    "double heads": (
        GPT2DoubleHeadsModel, lambda i: {"labels": labels_of(i), "mc_token_ids": i["attention_mask"].argmax(1) + 2},
        True,
    ),
    "double heads, the last position": (GPT2DoubleHeadsModel, lambda i: {"labels": labels_of(i)}, False),
    "a bare model": (GPT2Model, lambda i: {}, False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("side", "training"),
    [("right", True), ("left", True), ("full", True), ("one row", False), ("right", False)],
)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_packed_where_it_reads_no_padding(name, side, training):
    head, arguments, packs = HEADS[name]
    lengths = {"full": [12] * 3, "one row": [7]}.get(side, LENGTHS)
    inputs = batch(lengths, "left" if side == "left" else "right")
    given = arguments(inputs)
    given = {k: v[:1] if torch.is_tensor(v) and len(v) > len(lengths) else v for k, v in given.items()}
    kept = inputs["attention_mask"].bool()
    packs = packs or (side == "full" and "ignore_index" not in name)
    # Rightmost columns are hidden under right padding alone.
    packs = packs or (name == "double heads, the last position" and side == "left")

    def use(model, inputs):
        with torch.set_grad_enabled(training):
            output = model.train(training)(**inputs, **given, use_cache=False)
        tensors = {key: value for key, value in output.items() if torch.is_tensor(value)}
        if packs:  # in words in README: zero at hidden positions
            tensors = {k: t[kept] if t.shape[:2] == kept.shape else t for k, t in tensors.items()}
        if training:
            sum(t.double().sin().sum() for t in tensors.values()).backward()
        return [t.detach() for t in tensors.values()]

    model = with_lora(gpt2(head, classifier_dropout=0.0, summary_first_dropout=0.0), task_type=None)
    patched = assert_the_same(use, model.double(), inputs)
    row = packing_row(patched)
    assert (row.path, row.calls) == (("torch", 1) if packs else ("stock", 0)), row.reason


def pooled(self, input_ids=None, attention_mask=None, **_):
    h = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
    share = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
    return types.SimpleNamespace(logits=self.score((h * share).sum(1)))


def test_a_pooling_of_ones_own():
    model = gpt2(GPT2ForSequenceClassification)
    model.forward = types.MethodType(pooled, model)
    stock, patched = copy.deepcopy(model), copy.deepcopy(model)
    for each in (stock, patched):
        each.forward = types.MethodType(pooled, each)
    fastpeft.patch(patched)
    torch.testing.assert_close(patched(**batch(LENGTHS)).logits, stock(**batch(LENGTHS)).logits)
    assert "called by itself" in packing_row(patched).reason


class Wide(GPT2ForSequenceClassification):
    """A head of one's own, by inheritance."""

    def forward(self, input_ids=None, attention_mask=None, **given):
        return types.SimpleNamespace(
            logits=self.score(self.transformer(input_ids, attention_mask=attention_mask)[0].mean(1))
        )


class OwnLanguageModel(nn.Module):
    """A module around GPT2Model that decodes from its cache."""

    def __init__(self):
        super().__init__()
        self.transformer, self.lm_head = gpt2(GPT2Model), nn.Linear(48, 61)

    def forward(self, input_ids, attention_mask, **given):
        output = self.transformer(input_ids, attention_mask=attention_mask, **given)
        more = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
        # By position: transformers 5.24 has another name for the cache.
        after = self.transformer(input_ids[:, :1], output.past_key_values, more)
        return types.SimpleNamespace(logits=self.lm_head(after.last_hidden_state))


@pytest.mark.parametrize("lengths", [LENGTHS, [12] * 3], ids=["padded", "full"])
@pytest.mark.parametrize(
    "make", [lambda: gpt2(Wide), OwnLanguageModel], ids=["a subclass", "a module around it"]
)
def test_a_head_of_ones_own(make, lengths):
    torch.manual_seed(0)
    patched = assert_the_same(logits, make().eval(), batch(lengths))
    assert packing_row(patched).calls == (lengths != LENGTHS)


@pytest.mark.parametrize("part", ["score", "a hook on score"])
def test_what_reads_the_last_hidden_state_may_look_along_the_sequence(part):
    def use(model, inputs):
        head = model.get_base_model()
        if part == "score":
            head.score = nn.Sequential(nn.Conv1d(12, 12, 1), nn.Linear(48, 2, bias=False))
        shapes = []
        if part != "score":
            head.score.register_forward_hook(lambda module, args, output: shapes.append(output.detach()))
        return [model(**inputs).logits, *shapes]

    assert_the_same(use, classifier(), batch(LENGTHS), "score")


def test_a_loss_function_of_its_own():
    """It gets stock's arguments, and no more."""

    def use(model, inputs):
        names = []

        def loss(logits, labels, vocab_size, **given):
            names.append(sorted(given))
            return logits.logsumexp(-1).mean()

        model.get_base_model().loss_function = loss
        output = model(**inputs, labels=labels_of(inputs))
        assert "reads" not in names[0]
        assert len(names) == 1
        output.loss.backward()
        return output.loss

    assert_the_same(use, with_lora(gpt2()), batch(LENGTHS), "called by itself")


def test_an_argument_that_packing_does_not_know():
    def use(model, inputs):
        return model(**inputs, something_new=torch.ones(3)).logits

    assert_the_same(use, classifier(), batch(LENGTHS), "something_new, which packing doesn't know")


def test_errors_of_the_padding_are_stocks():
    inputs = batch(LENGTHS)
    inputs["input_ids"][inputs["attention_mask"] == 0] = -1
    long = {
        "input_ids": torch.ones(2, 40, dtype=torch.long),
        "attention_mask": torch.ones(2, 40, dtype=torch.long),
    }
    long["attention_mask"][:, 5:] = 0
    for given in (inputs, long):
        messages = []
        for model in (gpt2(GPT2LMHeadModel), fastpeft.patch(gpt2(GPT2LMHeadModel))):
            with pytest.raises(IndexError) as caught:
                model(**given, labels=torch.full_like(given["input_ids"], -100))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_adapter_names():
    def use(model, inputs):
        return model.eval()(**inputs, adapter_names=["default", "b", "__base__"]).logits

    model = classifier()
    model.add_adapter("b", copy.deepcopy(model.peft_config["default"]))
    patched = assert_the_same(use, model, batch(LENGTHS))
    assert packing_row(patched).calls == 1
    layer = "transformer.h.0.attn.c_attn"  # peft's hook is known by identity, and hides no other beside it

    def watched(model, inputs):
        watcher = partial(lambda module, args, kwargs, adapter_names: None, adapter_names=["b"])
        found = model.base_model.model.get_submodule(layer)
        handle = found.register_forward_pre_hook(watcher, with_kwargs=True)
        result = use(model, inputs)
        handle.remove()
        return result

    assert_the_same(watched, model, batch(LENGTHS), "has a hook that looks on")


def test_an_alora_batch_of_one_row():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True, r=4)
    config.alora_invocation_tokens = [5, 6]
    from peft import get_peft_model

    model = get_peft_model(gpt2(), config).eval()
    inputs = batch([12])
    inputs["input_ids"][0, 6:8] = torch.tensor([5, 6])
    assert_the_same(logits, model, inputs, "")


# Derivatives


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors if t is not None])


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def by_grad(model, inputs):
    loss = model(**inputs).logits.square().sum()
    first = torch.autograd.grad(loss, trained(model), create_graph=True)
    return flat(torch.autograd.grad(flat(first).square().sum(), trained(model), allow_unused=True))


def by_backward(model, inputs):
    model(**inputs).logits.square().sum().backward(create_graph=True)
    first = [p.grad for p in trained(model)]
    model.zero_grad()
    flat(first).square().sum().backward()
    result = flat([p.grad.detach() for p in trained(model)])
    model.zero_grad()
    return result


def by_hessian_vector_product(model, inputs):
    ps = dict(model.named_parameters())
    names = [n for n, p in ps.items() if p.requires_grad][:2]

    def loss(*values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, given, (), inputs).logits.square().sum()

    values = tuple(ps[n].detach() for n in names)
    return flat(torch.autograd.functional.hvp(loss, values, tuple(torch.ones_like(v) for v in values))[1])


def by_a_maml_step(model, inputs):
    ps = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = torch.func.functional_call(model, ps, (), inputs).logits.square().sum()
    grads = torch.autograd.grad(loss, list(ps.values()), create_graph=True)
    stepped = {n: p - 0.01 * g for (n, p), g in zip(ps.items(), grads, strict=True)}
    outer = torch.func.functional_call(model, stepped, (), inputs).logits.square().sum()
    return flat(torch.autograd.grad(outer, list(ps.values())))


def by_batched_gradients(model, inputs):
    y = model(**inputs).logits.flatten()
    rows = torch.eye(len(y))
    return flat(torch.autograd.grad(y, trained(model), rows, is_grads_batched=True))


def by_torch_func(model, inputs):
    ps = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(ps):
        return torch.func.functional_call(model, ps, (), inputs).logits.square().sum()

    return flat(torch.func.grad(loss)(ps).values())


def by_jvp(model, inputs):
    ps = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    tangents = {n: torch.ones_like(p) for n, p in ps.items()}

    def run(ps):
        return torch.func.functional_call(model, ps, (), inputs).logits

    return torch.func.jvp(run, (ps,), (tangents,))[1].detach()


def by_dual_numbers(model, inputs):
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        ps = {
            n: forward_ad.make_dual(p.detach(), torch.ones_like(p))
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        return forward_ad.unpack_dual(
            torch.func.functional_call(model, ps, (), inputs).logits
        ).tangent.detach()


SECOND = [by_grad, by_backward, by_hessian_vector_product, by_a_maml_step, by_batched_gradients]
OTHER = [by_torch_func, by_jvp, by_dual_numbers]


@pytest.mark.parametrize("lengths", [LENGTHS, [12, 12]], ids=["padded", "full"])
@pytest.mark.parametrize("adapted", ["lora", "adapter"])
@pytest.mark.parametrize("how", SECOND + OTHER, ids=lambda how: how.__name__)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode's own
def test_derivatives_by_every_road(how, adapted, lengths):
    model = gpt2(GPT2ForSequenceClassification, attn_implementation="eager")
    model = with_lora(model) if adapted == "lora" else with_adapters(model, "post_mlp", activation="gelu")
    patched = assert_the_same(how, model.train().double(), batch(lengths))
    if how in SECOND:
        assert packing_row(patched).calls, packing_row(patched)
    else:
        assert packing_row(patched).path == "stock"


@pytest.mark.parametrize("how", [by_grad, by_backward], ids=lambda how: how.__name__)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_second_derivatives_through_dropout_are_an_error(how):
    model = with_lora(gpt2(GPT2ForSequenceClassification, attn_implementation="eager"), lora_dropout=0.5)
    fastpeft.patch(model).train()
    with pytest.raises(RuntimeError, match=r"differentiable once.*model\.eval\(\), or fastpeft\.unpatch"):
        how(model, batch(LENGTHS))


def test_a_learnable_scaling_gets_its_gradient():
    def use(model, inputs):
        scalings = []
        for layer in model.modules():
            if isinstance(getattr(layer, "scaling", None), dict):
                layer.s = layer.scaling["default"] = nn.Parameter(torch.tensor(2.0))
                scalings.append(layer.s)
        model(**inputs).logits.sum().backward()
        return torch.stack([s.grad for s in scalings])

    patched = assert_the_same(use, classifier(), batch(LENGTHS))
    reasons = {row.reason for row in fastpeft.report(patched) if row.kind == "lora"}
    assert reasons == {"adapter 'default' has a Parameter for scaling, not a number"}


def test_a_learnable_scale_of_an_adapter_gets_its_gradient():
    def use(model, inputs):
        scales = []
        for module in model.modules():
            if isinstance(module, fastpeft.adapters.Adapter):
                del module.scale
                module.scale = nn.Parameter(torch.tensor(2.0))
                scales.append(module.scale)
        model(**inputs).logits.sum().backward()
        return torch.stack([s.grad for s in scales])

    assert_the_same(use, with_adapters(gpt2(GPT2ForSequenceClassification), "post_mlp"), batch(LENGTHS))


# Classes


def test_fused_classes_bear_stocks_names():
    stock = with_adapters(classifier(), "post_mlp")
    patched = fastpeft.patch(copy.deepcopy(stock))
    assert repr(patched) == repr(stock)
    assert [type(m).__qualname__ for m in patched.modules()] == [
        type(m).__qualname__ for m in stock.modules()
    ]
    assert [str(type(m)) for m in patched.modules()] == [str(type(m)) for m in stock.modules()]
    assert sum(swap.is_fused(m) for m in patched.modules()) == 2 + 2 * (3 + 4 + 1 + 1)
    assert patched.get_layer_status() == stock.get_layer_status()
    for model in (stock, patched):
        with pytest.raises(
            TypeError, match=r"^Linear\.forward\(\) missing 1 required positional argument: 'x'"
        ):
            transformer(model).h[0].mlp.c_fc()


def test_a_gpt2_of_no_layers():
    model = gpt2(n_layer=0)
    with pytest.warns(UserWarning, match="found nothing to fuse"):
        patched = fastpeft.patch(copy.deepcopy(model))
    torch.testing.assert_close(logits(patched, batch(LENGTHS)), logits(model, batch(LENGTHS)))


def test_unpatch_below_a_parametrization_names_the_remedy():
    model = fastpeft.patch(classifier())
    layer = transformer(model).h[0].mlp.act
    torch.nn.utils.parametrizations.weight_norm(transformer(model).h[0].mlp.c_fc.lora_A["default"])
    fastpeft.unpatch(model)
    fastpeft.patch(model)
    layer.register_parameter("weight", nn.Parameter(torch.ones(3, 3)))
    torch.nn.utils.parametrizations.weight_norm(layer)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"act: parametrizations were put on top .*remove_parametrizations"):
        fastpeft.unpatch(model)
    assert [type(m) for m in model.modules()] == before
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    fastpeft.unpatch(model)
    assert not any(swap.is_below(m) for m in model.modules())


def test_the_report_runs_no_code_of_the_users(monkeypatch):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.act, self.up = nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 48)

        def forward(self, x):
            return x + self.up(self.act(self.down(x)))

    calls, real = [], Own.forward
    monkeypatch.setattr(probe, "_why_not_code", lambda module: None)
    monkeypatch.setattr(Own, "forward", lambda self, x: (calls.append(x), real(self, x))[1])
    model = gpt2(n_layer=1)
    model.transformer.h[0].mlp.adapter = Own()
    fastpeft.report(model)
    assert not calls
    fastpeft.patch(model)
    probed = len(calls)
    assert probed
    fastpeft.report(model)
    assert len(calls) == probed


def language_model(**config):
    return with_lora(gpt2(GPT2LMHeadModel, **config)).train()


def with_labels(lengths):
    inputs = batch(lengths)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def loss_and_step(model, inputs):
    loss = model(**inputs).loss
    loss.backward()
    return loss


@pytest.mark.fidelity("a mask function registered with transformers", "stock, with the reason")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [LENGTHS, [9, 9]], ids=["padded", "full"])
def test_a_mask_function_of_ones_own(implementation, lengths, monkeypatch):
    """Each token sees itself alone."""

    def use(model, inputs):
        own = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

        def diagonal(*args, **kwargs):
            mask = own(*args, **{**kwargs, "allow_is_causal_skip": False})
            keep = torch.eye(mask.shape[-1], dtype=torch.bool)
            if mask.dtype == torch.bool:
                return mask & keep
            return mask.masked_fill(~keep, torch.finfo(mask.dtype).min)

        AttentionMaskInterface.register(implementation, diagonal)
        try:
            return loss_and_step(model, inputs)
        finally:
            AttentionMaskInterface.register(implementation, own)

    model = language_model(attn_implementation=implementation)
    assert_the_same(use, model, with_labels(lengths), "or its mask, isn't transformers' own")


@pytest.mark.fidelity("an attention with a config of its own", "stock, with the reason")
@pytest.mark.parametrize("embeds", [False, True])
def test_an_attention_with_a_config_of_its_own(embeds):
    def use(model, inputs):
        attn = transformer(model).h[1].attn
        attn.config = copy.deepcopy(attn.config)
        attn.config._attn_implementation = "zeros"
        if embeds:
            inputs["inputs_embeds"] = transformer(model).wte(inputs.pop("input_ids"))
        return logits(model, inputs)

    zeros = lambda module, q, k, v, mask, **_: (torch.zeros_like(v).transpose(1, 2).contiguous(), None)  # noqa: E731
    ALL_ATTENTION_FUNCTIONS.register("zeros", zeros)
    try:
        assert_the_same(use, language_model(), with_labels(LENGTHS), "a config of its own")
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["zeros"]


@pytest.mark.fidelity("attention heads pruned by hand", "stock, with the reason")
def test_heads_pruned_by_hand():
    def use(model, inputs):
        keep = torch.arange(width // heads, width)
        for block in transformer(model).h:
            attn = block.attn
            for layer, index, dim in (
                (attn.c_attn, torch.cat([keep + i * width for i in range(3)]), 1),
                (attn.c_proj, keep, 0),
            ):
                layer.weight = nn.Parameter(
                    layer.weight.detach().index_select(dim, index), requires_grad=False
                )
                layer.nx, layer.nf = layer.weight.shape
            attn.c_attn.bias = nn.Parameter(attn.c_attn.bias.detach()[index_of_bias], requires_grad=False)
            attn.num_heads, attn.split_size = heads - 1, len(keep)
        return loss_and_step(model, inputs)

    model = with_lora(gpt2(GPT2LMHeadModel), ["c_fc"])
    width, heads = model.config.n_embd, model.config.n_head
    index_of_bias = torch.cat([torch.arange(width // heads, width) + i * width for i in range(3)])
    assert_the_same(use, model, with_labels(LENGTHS), "aren't what the config says")


@pytest.mark.fidelity("hooks put away for a call and put back, without a new handle", "seen, as stock")
@pytest.mark.parametrize("where", ["block", "lora_A", "the model"])
@pytest.mark.parametrize("scope", ["auto", "layers"])
def test_hooks_put_away_for_a_call_and_put_back(where, scope):
    """No handle is given out for those that come back."""

    def use(model, inputs):
        module, seen = HOOKED[where](transformer(model)), []
        module.register_forward_hook(lambda m, given, output: seen.append(1))
        hooks, shown = module._forward_hooks, []
        for held in (hooks, {}, hooks):
            module._forward_hooks = held
            shown += [loss_and_step(model, inputs), torch.tensor(len(seen))]
        return shown

    model = language_model()
    stock, patched = copy.deepcopy(model), fastpeft.patch(copy.deepcopy(model), scope=scope)
    expected = seen(use, stock, with_labels(LENGTHS))
    torch.testing.assert_close(seen(use, patched, with_labels(LENGTHS)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.fidelity("a bias of lora_A", "stock, with the reason")
def test_a_bias_of_lora_a():
    def use(model, inputs):
        layer = transformer(model).h[0].mlp.c_fc.lora_A["default"]
        layer.bias = nn.Parameter(torch.ones(layer.out_features))
        return loss_and_step(model, inputs)

    model = assert_the_same(use, language_model(), with_labels(LENGTHS))
    reasons = {row.reason for row in fastpeft.report(model) if row.kind == "lora" and row.path == "stock"}
    assert reasons == {"adapter 'default' has a bias"}


def test_peft_told_not_to_cast():
    model = fastpeft.patch(language_model())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "lora" in name else parameter.data.bfloat16()
    model(**batch(LENGTHS))
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="same dtype"):
        model(**batch(LENGTHS))


@pytest.mark.parametrize("dropout", ["attn_pdrop", "resid_pdrop", "lora_dropout"])
def test_a_default_device_that_is_another(dropout):
    lora = {"lora_dropout": 0.1} if dropout == "lora_dropout" else {}
    model = with_lora(gpt2(GPT2LMHeadModel, **({} if lora else {dropout: 0.1})), **lora)
    fastpeft.patch(model.train())
    inputs = with_labels(LENGTHS)
    with torch.device("meta"):
        loss = model(**inputs).loss
    assert loss.isfinite()


def test_a_tensor_in_the_config():
    def use(model, inputs):
        for weight in (1.0, 2.0):
            transformer(model).config.class_weights = torch.tensor([weight, 3.0])
            loss = loss_and_step(model, inputs)
        return loss

    assert_the_same(use, language_model(), with_labels(LENGTHS))


def language_model_of_its_own_head():
    """LoRA around an `nn.Linear` whose weight trains."""
    model = with_lora(gpt2(GPT2LMHeadModel, tie_word_embeddings=False), ["c_fc", "lm_head"])
    model.get_base_model().lm_head.base_layer.weight.requires_grad_()
    return model.train()


@pytest.mark.fidelity("the strides of gradients", "as stock")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_gradients_lie_in_memory_as_stocks():
    def use(model, inputs):
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([g.view(-1) for g in torch.autograd.grad(model(**inputs).loss, trained)])

    model = with_adapters(language_model(), "post_mlp")
    layer = transformer(model).h[0].mlp.c_fc.base_layer
    layer.weight.requires_grad_()
    assert_the_same(use, model, with_labels(LENGTHS))
    head = language_model_of_its_own_head()
    assert_the_same(use, head, with_labels(LENGTHS))


@pytest.mark.fidelity(
    "hidden states edited in place before the logits are read, without gradients", "as stock"
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hidden_states_edited_before_the_logits_are_read(mode):
    def use(model, inputs):
        with mode():
            output = model(**inputs, output_hidden_states=True)
            output.hidden_states[-1].zero_()
            return output.logits.clone()

    assert_the_same(use, language_model().eval(), with_labels([9, 9]))


@pytest.mark.fidelity("logits that a reentrant checkpoint returns", "as stock, with their gradient")
def test_logits_that_a_checkpoint_returns_have_its_history():
    def use(model, inputs):
        ids = inputs["input_ids"]
        asked = torch.ones((), requires_grad=True)
        given = lambda ids, _: tuple(model(ids, labels=ids).values())[:2]  # noqa: E731
        loss, found = torch.utils.checkpoint.checkpoint(given, ids, asked, use_reentrant=True)
        (loss + found.square().mean()).backward()
        return found * 1

    assert_the_same(use, language_model(use_cache=False), batch([9, 9]))


@pytest.mark.parametrize("use", ["instance", "hook"])
def test_what_stands_on_the_transformer_is_handed_stocks_arguments(use):
    def replaced(model, inputs):
        inner = transformer(model)
        own, names = inner.forward, []

        def forward(*args, **given):
            names.append(sorted(given))
            return own(*args, **given)

        if use == "instance":
            inner.forward = forward
        else:
            inner.register_forward_pre_hook(
                lambda m, args, given: names.append(sorted(given)), with_kwargs=True
            )
        loss = loss_and_step(model, inputs)
        return loss, torch.tensor(["reads" in each or "packed" in each for each in names])

    assert_the_same(replaced, language_model(), with_labels(LENGTHS))


@pytest.mark.fidelity("sparse and nested tensors, negative views", "stock, with the reason")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("kind", ["csr", "nested", "mkldnn", "csr weight", "negative", "negative weight"])
def test_tensors_that_are_more_than_their_memory(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    lora = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model, x = get_peft_model(model, lora), torch.randn(6, 16)
    negative = torch.randn(16, 16, dtype=torch.complex64).conj().imag
    if kind.endswith("weight"):
        weight = model.base_model.model[0].base_layer.weight
        held = negative if kind == "negative weight" else weight.detach().to_sparse_csr()
        model.base_model.model[0].base_layer.weight = nn.Parameter(held, requires_grad=False)
    given = {
        "csr": x.to_sparse_csr,
        "nested": lambda: torch.nested.nested_tensor([x[:2], x[2:]]),
        "mkldnn": x.to_mkldnn,
        "negative": lambda: negative[:6],
    }.get(kind, lambda: x)()
    plain = {"nested": lambda y: y.to_padded_tensor(0.0), "mkldnn": lambda y: y.to_dense()}.get(
        kind, lambda y: y
    )
    expected = plain(model(given)).detach()
    patched = fastpeft.patch(model)
    torch.testing.assert_close(plain(patched(given)).detach(), expected, rtol=1e-4, atol=1e-5)
    assert {row.path for row in fastpeft.report(patched) if row.kind == "lora"} & {"stock"}


def test_softmax_replaced_counts_for_attention_that_drops(monkeypatch):
    own = F.softmax
    model = language_model(attn_implementation="eager", attn_pdrop=1e-6)
    monkeypatch.setattr(F, "softmax", lambda x, dim=-1, **given: 0.5 * own(x, dim, **given))
    assert_the_same(
        loss_and_step, model, with_labels(LENGTHS), "the softmax of torch.nn.functional was replaced"
    )


def test_a_class_called_in_a_way_of_its_own(monkeypatch):
    calls = []

    def called(self, *args, **kwargs):
        calls.append(1)
        return nn.Module.__call__(self, *args, **kwargs)

    def use(model, inputs):
        calls.clear()
        loss_and_step(model, inputs)
        return torch.tensor(len(calls))

    model = language_model()
    monkeypatch.setattr(GPT2Attention, "__call__", called)
    assert_the_same(use, model, with_labels(LENGTHS), "the __call__ of GPT2Attention was replaced")


@pytest.mark.parametrize("grad", [False, True])
def test_logits_of_a_frozen_head_can_be_changed_in_place(grad, monkeypatch):
    def use(model, inputs):
        with torch.set_grad_enabled(grad):
            found = model(**batch([5, 5])).logits
        found.add_(torch.ones((), requires_grad=True))
        return found.detach_()

    monkeypatch.setattr(gemm, "by_onednn", lambda *_: torch.backends.mkldnn.enabled)  # as on AMD's CPUs
    monkeypatch.setattr(gemm, "SMALL", 0)
    model = assert_the_same(use, with_lora(gpt2(GPT2LMHeadModel)), {})
    assert {row.reason for row in fastpeft.report(model) if row.kind == "frozen"} == {"oneDNN"}


def test_a_layers_result_is_no_view_which_may_be_changed_and_detached():
    """In place, as stock's may be."""

    def use(model, inputs):
        inner = transformer(model)
        x = torch.linspace(-1, 1, 2 * 5 * 48).view(2, 5, 48).requires_grad_()
        adapter = next(module for module in inner.modules() if isinstance(module, Adapter))
        for module in inner.h[0].mlp.c_fc, adapter:
            y = module(x)
            assert not y._is_view()
            y[:, 1:, : y.shape[-1] // 2] *= 2
            y.sum().backward()
            y.detach_()
        return x.grad

    model = with_adapters(with_lora(gpt2(GPT2LMHeadModel)).eval())
    model = assert_the_same(use, model, {})
    assert {row.path for row in fastpeft.report(model) if row.calls} == {"torch"}


@pytest.mark.fidelity("a new module made by a patched one's class", "stock")
def test_another_module_of_a_patched_ones_class(tmp_path):
    model = fastpeft.patch(with_lora(gpt2(GPT2LMHeadModel)))
    inner = transformer(model)
    ids = torch.arange(2, 9)[None]
    again = type(inner)(inner.config)
    assert not swap.is_fused(again)
    assert again(ids)[0].shape == inner(ids)[0].shape
    block = inner.h[0]
    assert type(block.mlp.act)()(torch.ones(3)).shape == (3,)
    old = block.mlp.c_fc
    block.mlp.c_fc = type(old)(
        old.base_layer,
        "default",
        LoraConfig(fan_in_fan_out=True),
        r=4,
        lora_alpha=4,
        is_target_conv_1d_layer=True,
    )
    assert model(ids).logits.shape[:2] == ids.shape
    copied = copy.deepcopy(inner)
    assert swap.is_fused(copied)


@pytest.mark.fidelity("torch.jit.trace of a layer", "stock")
@pytest.mark.filterwarnings("ignore:.torch.jit.")  # Deprecation- or FutureWarning, by version
def test_traced_by_jit_a_layer_is_stocks():
    model = fastpeft.patch(language_model().eval())
    layer = transformer(model).h[0].mlp.c_fc
    traced = torch.jit.trace(layer, torch.ones(3, 48))
    torch.testing.assert_close(traced(torch.ones(2, 48)), layer(torch.ones(2, 48)))
    torch.jit.save(traced, io.BytesIO())


def test_an_update_of_an_adapters_own():
    def use(model, inputs):
        adapter = next(m for m in model.modules() if isinstance(m, Adapter))
        shown = []
        for own in (None, lambda x: 3 * torch.ones_like(x)):
            if own is not None:
                adapter.update = own
            shown.append(loss_and_step(model, inputs))
        return shown

    assert_the_same(use, with_adapters(language_model(), "post_mlp"), with_labels(LENGTHS))


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_a_negative_gradient_comes_to_the_kernels(kind):
    if not launch.INTERPRETED:
        pytest.skip("the CPU runs kernels only in the interpreter")
    layer = nn.Sequential(nn.Linear(16, 16)) if kind == "lora" else nn.Sequential(Adapter(16, 4, "gelu"))
    if kind == "lora":
        layer = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    stock, patched = copy.deepcopy(layer), fastpeft.patch(layer, backend="triton")
    x, dy = torch.randn(5, 16), torch.randn(5, 16, dtype=torch.complex64).conj().imag
    assert dy.is_neg()
    found = []
    for model in (stock, patched):
        given = x.clone().requires_grad_()
        model(given).backward(dy)
        found.append([given.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert {row.path for row in fastpeft.report(patched) if row.kind == kind} == {"triton"}


def test_a_layer_norm_without_weight_beside_the_kernels():
    if not launch.INTERPRETED:
        pytest.skip("the CPU runs kernels only in the interpreter")
    model = with_lora(gpt2(GPT2LMHeadModel, n_embd=16, n_layer=1))
    for block in transformer(model).h:
        block.ln_1 = block.ln_2 = None
        block.ln_1, block.ln_2 = (nn.LayerNorm(16, elementwise_affine=False) for _ in range(2))
    stock, patched = copy.deepcopy(model), fastpeft.patch(model, backend="triton")
    inputs = with_labels([5, 3])
    torch.testing.assert_close(
        loss_and_step(patched, inputs), loss_and_step(stock, inputs), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("place", ["h.0.mlp", "h.0.ln_1"], ids=["behind a hook", "where a hook comes too"])
def test_a_forward_of_its_own_after_a_call(place):
    """Of a module whose output an adapter's hook adapts, and of another while rows get adapters."""
    stock = with_adapters(gpt2(), "post_mlp").eval()
    inputs = with_labels(LENGTHS)
    found = []
    for model in (fastpeft.patch(copy.deepcopy(stock)), stock):
        model(**inputs)
        module = transformer(model).get_submodule(place)
        module.forward = lambda x, own=module.forward: own(x).cumsum(-2) / 9  # looks along the sequence
        rows = ["default", "__base__"] * len(LENGTHS)
        names = fastpeft.adapter_rows(model, rows[: len(LENGTHS)]) if place == "h.0.ln_1" else nullcontext()
        with names:
            found.append(model(**inputs).loss)
    torch.testing.assert_close(*found)
