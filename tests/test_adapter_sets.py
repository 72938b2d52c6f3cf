"""Several sets of bottleneck adapters in one model: the one in use, rows that use different ones, and their files."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import assert_fused, gpt2, randomise, with_lora
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_adapter_rows import batch, labelled, packing_of
from tolerances import assert_as_good_as
from torch import nn
from transformers import GPT2DoubleHeadsModel, GPT2ForSequenceClassification, GPT2LMHeadModel

import fastpeft
from fastpeft import AdapterConfig
from fastpeft.copies import Copied
from fastpeft.saving import CONFIG_FILE, WEIGHTS_FILE

#: Slots that sets share and slots of their own, in all layers or in one; shapes, activations and scales that differ.
SETS = {
    "default": [AdapterConfig(("post_attn", "post_mlp"), 4, "relu")],
    "a": [AdapterConfig(("post_attn", "post_block", "pre_head"), 7, "gelu", 0.5)],
    "b": [
        AdapterConfig(("post_mlp",), 3, "silu", layers=(1,)),
        AdapterConfig(("post_embed",), 5, "gelu_tanh", 2.0),
    ],
    "beside": [AdapterConfig(("parallel_mlp",), 6, "gelu", 0.7)],  # which isn't fused
}
NAMES = ("default", "a", "b")
APART = ["b", "default", "__base__", "a", "b", "default"]
TOGETHER = ["a", "a", "b", "b", "default", "__base__"]
ACTIVATIONS: dict[str, Any] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
IDS = torch.arange(2, 12)[None]


def with_sets(model: nn.Module, *names: str, own: tuple[str, ...] = ()) -> nn.Module:
    """`model` with these sets, or all that are fused, none of which is zero, and heads of their own for some."""
    for name in names or NAMES:
        for number, config in enumerate(SETS[name]):
            modules = ["score"] if name in own and not number else []
            fastpeft.add_adapters(model, config, name, modules_to_save=modules)
    return randomise(randomise(model, "adapter"), "own_").eval()


def transformer_of(model: nn.Module) -> Any:
    return next(m for name, m in model.named_modules() if name.split(".")[-1] == "transformer")


def hosts(transformer: Any, slot: str, layers: Any) -> list[nn.Module]:
    if slot in ("post_embed", "pre_head"):
        return [transformer.drop if slot == "post_embed" else transformer.ln_f]
    blocks = [transformer.h[i] for i in layers or range(len(transformer.h))]
    of = {"post_attn": "attn", "post_mlp": "mlp", "parallel_mlp": "mlp", "post_block": ""}
    return [block.get_submodule(of[slot]) for block in blocks]


def alone(model: nn.Module, name: str) -> nn.Module:
    """A copy of an unpatched model where nothing but this set adapts anything, by the formula written out."""
    found: Any = copy.deepcopy(model)
    if isinstance(getattr(found, "score", None), Copied):
        score = nn.Linear(found.score.in_features, found.score.out_features, bias=False)
        score.weight = (found.score._modules.get(f"own_{name}") or found.score).weight
        found.score = score
    transformer = transformer_of(found)
    for module in transformer.modules():
        module._forward_hooks.clear()
    for config in SETS.get(name, []):
        beside = config.slots == ("parallel_mlp",)
        for host in (host for slot in config.slots for host in hosts(transformer, slot, config.layers)):
            adapter = host._modules["adapter" if name == "default" else f"adapter_{name}"]

            def adapt(
                _: Any,
                args: Any,
                output: Any,
                adapter: Any = adapter,
                config: Any = config,
                beside: bool = beside,
            ) -> Any:
                x = output[0] if isinstance(output, tuple) else output
                read = args[0] if beside else x
                h = ACTIVATIONS[config.activation](read @ adapter.down.weight.T + adapter.down.bias)
                y = x + config.scale * (h @ adapter.up.weight.T + adapter.up.bias)
                return (y, *output[1:]) if isinstance(output, tuple) else y

            host.register_forward_hook(adapt)
    return found


def use(model: Any, name: str, lora: tuple[str, ...] = ()) -> nn.Module:
    """A model of `alone` with peft's adapter of this name, or none."""
    if name in lora:
        model.set_adapter(name)
        model.set_requires_grad(list(lora))
    elif lora:
        model.base_model.disable_adapter_layers()
    return model


def rows_apart(stock: nn.Module, names: list[str], inputs: Any, lora: tuple[str, ...] = ()) -> dict[str, Any]:
    """Logits, and the gradients of the summed loss, of a batch whose rows are run by name, each alone."""
    counted = counts(inputs)
    logits: list[Any] = [None] * len(names)
    gradients: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        rows = [row for row, each in enumerate(names) if each == name]
        m = use(alone(stock, name), name, lora)
        output = m(**{key: value[rows] for key, value in inputs.items()})
        if output.loss.requires_grad:
            (output.loss * counted[rows].sum()).backward()
        for row, found in zip(rows, output.logits.detach(), strict=True):
            logits[row] = found
        for key, p in m.named_parameters():
            if p.grad is not None:
                key = key.replace("score", head_of(stock, name))
                gradients[key] = gradients.get(key, 0) + p.grad
    return {"logits": torch.stack(logits), **gradients}


def head_of(model: Any, name: str) -> str:
    """What a classifier has the head as that rows of this name go through."""
    own = f"score.own_{name}"
    return own if own in dict(model.named_modules()) else "score"


def counts(inputs: Any) -> Any:
    labels = inputs["labels"]
    return (labels if labels.dim() == 1 else labels[:, 1:])[:, None].flatten(1) != -100


def together(model: nn.Module, names: list[str], inputs: Any) -> dict[str, Any]:
    with fastpeft.adapter_rows(model, names):
        output = model(**inputs)
    (output.loss * counts(inputs).sum()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_same(found: Any, stock: Any, truth: Any, read: Any = slice(None)) -> None:
    assert found.keys() == stock.keys() == truth.keys()
    assert_as_good_as(found["logits"][read], stock["logits"][read], truth["logits"][read].double(), "logits")
    of: dict[str, list[str]] = {}  # by set, or head: of a few numbers one draw compares luck
    for key in found.keys() - {"logits"}:
        what = next((part for part in key.split(".") if part.startswith("adapter")), "all else")
        of.setdefault(what, []).append(key)
    for what, keys in of.items():
        every = (torch.cat([each[key].flatten() for key in keys]) for each in (found, stock, truth))
        assert_as_good_as(*every, f"gradient of {what}")


HOW: dict[str, Any] = {"auto": {}, "layers": {"scope": "layers"}, "exact": {"exact": True}, "unpatched": None}


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("head", "own"),
    [(GPT2LMHeadModel, ()), (GPT2ForSequenceClassification, ()), (GPT2ForSequenceClassification, ("a", "b"))],
)
def test_a_row_uses_the_set_of_its_name_alone(head, own, how, side):
    """As in a batch of the rows of that set, in outputs and in gradients, a head's included, shared or its own."""
    stock = with_sets(gpt2(head), own=own)
    inputs, names = labelled(batch(side), head), TOGETHER if side == "left" else APART
    found = copy.deepcopy(stock)
    if HOW[how] is not None:
        fastpeft.patch(found, **HOW[how])
    read = slice(None) if head is GPT2ForSequenceClassification else inputs["attention_mask"].bool()
    apart = [rows_apart(m, names, inputs) for m in (stock, copy.deepcopy(stock).double())]
    assert_same(together(found, names, inputs), *apart, read)
    if how != "unpatched":
        assert_fused(found, ("adapter",))
    if how == "auto":
        assert packing_of(found)[0] == "torch", packing_of(found)
        fastpeft.unpatch(found).zero_grad()
        assert_same(together(found, names, inputs), *apart, read)


@pytest.mark.parametrize("how", ["auto", "unpatched"])
def test_a_set_beside_the_mlp(how):
    stock = with_sets(gpt2(GPT2ForSequenceClassification), "beside", "default")
    names, inputs = ["beside", "default", "beside", "__base__"], batch("right", [3, 8, 5, 2])
    inputs = labelled(inputs, GPT2ForSequenceClassification)
    found = copy.deepcopy(stock)
    if how == "auto":
        fastpeft.patch(found)
    apart = [rows_apart(m, names, inputs) for m in (stock, copy.deepcopy(stock).double())]
    assert_same(together(found, names, inputs), *apart)
    if how == "auto":
        assert packing_of(found)[0] == "torch", packing_of(found)


@pytest.mark.parametrize("how", ["auto", "layers", "unpatched"])
def test_a_name_may_be_of_lora_too(how):
    """Of "default" both apply, of "c" LoRA alone, of "a" the set alone; heads that peft saves go with their rows."""
    stock: Any = with_lora(gpt2(GPT2ForSequenceClassification))
    stock.add_adapter("c", LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True))
    stock.set_requires_grad(["default", "c"])
    with_sets(randomise(randomise(stock, "lora_B"), "modules_to_save.c"))
    names = ["c", "a", "default", "a", "__base__", "default"]
    inputs = labelled(batch("right"), GPT2ForSequenceClassification)
    found = copy.deepcopy(stock)
    if how != "unpatched":
        fastpeft.patch(found, scope=how)
    apart = [
        rows_apart(m, names, inputs, lora=("default", "c")) for m in (stock, copy.deepcopy(stock).double())
    ]
    assert_same(together(found, names, inputs), *apart)
    if how == "auto":
        assert_fused(found, ("lora",))
        assert packing_of(found)[0] == "torch", packing_of(found)


def test_what_peft_gives_names_for_leaves_the_set_in_use_to_all_rows():
    stock: Any = with_sets(with_lora(gpt2()), "a")
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = labelled(batch("right", [4, 6]), GPT2LMHeadModel)
    with torch.no_grad():
        patched(**inputs)  # from here on its modules are known, and but for hooks as they were
        outputs = [m(**inputs, adapter_names=["default", "__base__"]) for m in (patched, stock)]
        assert torch.allclose(outputs[0].loss, outputs[1].loss)
        assert not torch.allclose(outputs[1].loss, alone(stock, "none")(**inputs).loss)
    assert packing_of(patched)[1] == (
        "adapter_names that aren't the same for all LoRA layers and bottleneck adapters"
    )


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_the_set_added_first_is_in_use_until_another_is(patched):
    stock = with_sets(gpt2())
    model = fastpeft.patch(copy.deepcopy(stock)) if patched else copy.deepcopy(stock)
    inputs = labelled(batch("right"), GPT2LMHeadModel)
    for name in (None, "b", "a", "default"):
        if name is not None:
            fastpeft.set_adapters(model, name)
        model.zero_grad()
        model(**inputs).loss.backward()
        expected = alone(stock, name or "default")
        expected(**inputs).loss.backward()
        gradients = [
            {k: p.grad for k, p in m.named_parameters() if p.grad is not None} for m in (model, expected)
        ]
        assert gradients[0].keys() == gradients[1].keys()
        torch.testing.assert_close(*gradients)
    assert all(p.requires_grad for key, p in model.named_parameters() if "adapter" in key)


def test_a_set_that_is_not_in_use_is_added_unused_and_one_in_use_grows():
    model = with_sets(gpt2(), "a")
    before = model(IDS).logits
    fastpeft.add_adapters(model, SETS["default"][0])
    randomise(model, ".adapter.")
    assert torch.equal(model(IDS).logits, before)
    fastpeft.add_adapters(model, AdapterConfig(("post_mlp",), 2), "a")
    randomise(model, "mlp.adapter_a")
    assert not torch.allclose(model(IDS).logits, before)


def test_sets_without_rows_get_no_gradient():
    patched = fastpeft.patch(with_sets(gpt2()))
    with fastpeft.adapter_rows(patched, ["b", "__base__"]):
        patched(**labelled(batch("right", [4, 6]), GPT2LMHeadModel)).loss.backward()
    having = {key.split(".")[-3] for key, p in patched.named_parameters() if p.grad is not None}
    assert having == {"adapter_b"}


def test_the_next_call_without_names_uses_the_set_in_use():
    stock = with_sets(gpt2())
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = labelled(batch("right"), GPT2LMHeadModel)
    plain = alone(stock, "default")(**inputs).loss
    for names in (APART, None, TOGETHER, None):
        if names:
            with fastpeft.adapter_rows(patched, names):
                assert not torch.allclose(patched(**inputs).loss, plain)
        else:
            assert torch.allclose(patched(**inputs).loss, plain)
        assert packing_of(patched)[0] == "torch", packing_of(patched)


def test_generate():
    stock = with_sets(gpt2())
    inputs = batch("left", [5, 3, 4, 5, 1, 2])
    patched = fastpeft.patch(copy.deepcopy(stock))
    for m in (patched, stock):
        with fastpeft.adapter_rows(m, APART):
            found = m.generate(**inputs, max_new_tokens=4, do_sample=False)
        for row, name in enumerate(APART):
            own = {key: value[row : row + 1] for key, value in inputs.items()}
            assert torch.equal(
                found[row : row + 1], alone(stock, name).generate(**own, max_new_tokens=4, do_sample=False)
            )


def test_a_set_is_saved_by_name_and_loads_under_another(tmp_path):
    model = with_sets(gpt2())
    for name in NAMES:
        fastpeft.save_adapters(fastpeft.patch(model), tmp_path / name, name)
    fastpeft.unpatch(model)
    loaded: Any = gpt2()
    for name, other in (("b", "default"), ("default", "c"), ("a", "a")):
        assert fastpeft.load_adapters(loaded, tmp_path / name, other) is loaded
        fastpeft.set_adapters(loaded, other)
        assert torch.equal(loaded(IDS).logits, alone(model, name)(IDS).logits)
    keys = {key: set(load_file(tmp_path / key / WEIGHTS_FILE)) for key in NAMES}
    assert keys["a"] == {
        f"transformer.{host}.adapter.{part}.{kind}"
        for host in ("h.0", "h.1", "h.0.attn", "h.1.attn", "ln_f")
        for part in ("down", "up")
        for kind in ("weight", "bias")
    }
    fastpeft.load_adapters(fastpeft.load_adapters(loaded, tmp_path / "b", "c2"), tmp_path / "b")  # and again
    with pytest.raises(ValueError, match="the model has other adapters"):
        fastpeft.load_adapters(loaded, tmp_path / "b", "c")


def test_files_written_before_sets_had_names_load_under_any(tmp_path):
    """Format 1, written out: one adapter of 2, after the second block's MLP, and a head."""
    place, generator = "transformer.h.1.mlp.adapter", torch.Generator().manual_seed(5)
    shapes = {"down.weight": (2, 48), "down.bias": (2,), "up.weight": (48, 2), "up.bias": (48,)}
    tensors = {f"{place}.{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    tensors["score.weight"] = torch.randn(2, 48, generator=generator)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    adapter = {"slots": ["post_mlp"], "bottleneck": 2, "activation": "relu", "scale": 0.5, "layers": [1]}
    described = {"format": 1, "width": 48, "layers": 2, "adapters": [adapter], "trained": ["score.weight"]}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(described))
    for name in ("default", "old"):
        model = fastpeft.load_adapters(gpt2(GPT2ForSequenceClassification), tmp_path, name).eval()
        base = gpt2(GPT2ForSequenceClassification).eval()

        def adapt(_, args, x):
            h = torch.relu(F.linear(x, tensors[f"{place}.down.weight"], tensors[f"{place}.down.bias"]))
            return x + 0.5 * F.linear(h, tensors[f"{place}.up.weight"], tensors[f"{place}.up.bias"])

        base.transformer.h[1].mlp.register_forward_hook(adapt)
        base.score.weight.data.copy_(tensors["score.weight"])
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits)
    state = model.state_dict()  # of the unnamed set, as before
    assert {key for key in state if "adapter" in key} == {
        key.replace("adapter", "adapter_old") for key in tensors
    } - {"score.weight"}


def heads(model: Any) -> dict[str, Any]:
    return {k: p for k, p in model.named_parameters() if k.startswith("score")}


def test_a_head_of_its_own_trains_in_place_of_the_shared_one():
    alone_in_it: Any = gpt2(GPT2ForSequenceClassification)
    before = alone_in_it.score.weight.detach().clone()
    fastpeft.add_adapters(alone_in_it, AdapterConfig(), "a", modules_to_save="score")
    trains = {key: p.requires_grad for key, p in heads(alone_in_it).items()}
    assert trains == {"score.weight": False, "score.own_a.weight": True}
    assert all(torch.equal(p, before) for p in heads(alone_in_it).values())
    at_once = with_sets(gpt2(GPT2ForSequenceClassification), "a", own=("a",))
    torch.testing.assert_close(at_once(IDS).logits, alone(at_once, "a")(IDS).logits)
    frozen: Any = gpt2(GPT2ForSequenceClassification)
    frozen.score.requires_grad_(False)
    fastpeft.add_adapters(frozen, AdapterConfig(), modules_to_save=["score"])
    trains = {key: p.requires_grad for key, p in heads(frozen).items()}
    assert trains == {"score.weight": False, "score.own_default.weight": True}
    shared = with_sets(gpt2(GPT2ForSequenceClassification), "default", "a", "b", own=("b",))
    assert all(p.requires_grad for p in heads(shared).values())  # two sets use the one that was there
    stock = copy.deepcopy(shared)
    for name in ("default", "b", "a"):
        fastpeft.set_adapters(shared, name)
        shared.zero_grad()
        shared(IDS, labels=torch.tensor([1])).loss.backward()
        torch.testing.assert_close(shared(IDS).logits, alone(stock, name)(IDS).logits)
        assert [key for key, p in heads(shared).items() if p.grad is not None] == [
            f"{head_of(shared, name)}.weight"
        ]


def test_heads_are_saved_and_loaded_with_their_sets(tmp_path):
    model = randomise(with_sets(gpt2(GPT2ForSequenceClassification), own=("a", "b")), "score")
    for name in NAMES:
        fastpeft.save_adapters(fastpeft.patch(model), tmp_path / name, name)
        assert load_file(tmp_path / name / WEIGHTS_FILE)["score.weight"].shape == (2, 48)
    fastpeft.unpatch(model)
    for order in NAMES, NAMES[::-1]:
        loaded: Any = gpt2(GPT2ForSequenceClassification)
        for name in order:
            fastpeft.load_adapters(loaded, tmp_path / name, f"x{name}")
        for name in NAMES:
            fastpeft.set_adapters(loaded, f"x{name}")
            torch.testing.assert_close(loaded(IDS).logits, alone(model, name)(IDS).logits)
        own = {name for name in NAMES if loaded.score.has(f"x{name}")}
        assert own == {"a", "b"}  # the third has the shared one, which nobody else uses
    before = {key: p.detach().clone() for key, p in heads(loaded).items()}
    fastpeft.load_adapters(loaded, tmp_path / "b", "xb")  # again, into its own
    torch.testing.assert_close(dict(heads(loaded)), before)


def test_the_shared_head_trains_as_soon_as_a_set_uses_it(tmp_path):
    """Whichever came first, and what it has learnt is saved and loaded."""
    model: Any = gpt2(GPT2ForSequenceClassification)
    for name, own in (("a", True), ("b", False), ("c", True)):
        fastpeft.add_adapters(model, AdapterConfig(bottleneck=2), name, ["score"] if own else None)
        trains = {key for key, p in heads(model).items() if p.requires_grad}
        expected = {f"score.own_{each}.weight" for each in ("a", "c") if hasattr(model.score, f"own_{each}")}
        assert trains == expected | ({"score.weight"} if name != "a" else set())
    randomise(randomise(model, "score"), "adapter")
    frozen: Any = copy.deepcopy(model)
    frozen.score.weight.requires_grad_(False)  # by whoever wants it so
    fastpeft.add_adapters(frozen, AdapterConfig(), "d", ["score"])
    assert not frozen.score.weight.requires_grad
    for name in ("a", "b", "c"):
        fastpeft.save_adapters(model, tmp_path / name, name)
    for order in ("abc", "cba", "bca"):
        loaded: Any = gpt2(GPT2ForSequenceClassification)
        for name in order:
            fastpeft.load_adapters(loaded, tmp_path / name, name)
        for name in order:
            fastpeft.save_adapters(loaded, tmp_path / f"{order}-{name}", name)
            fresh = fastpeft.load_adapters(gpt2(GPT2ForSequenceClassification), tmp_path / f"{order}-{name}")
            for each in (model, loaded):
                fastpeft.set_adapters(each, name)
                torch.testing.assert_close(fresh(IDS).logits, each(IDS).logits)


def test_a_copy_is_saved_frozen_too(tmp_path):
    model: Any = with_sets(gpt2(GPT2ForSequenceClassification), "a", own=("a",))
    model.score.requires_grad_(False)
    fastpeft.save_adapters(model, tmp_path, "a")
    loaded: Any = fastpeft.load_adapters(gpt2(GPT2ForSequenceClassification), tmp_path, "b")
    assert torch.equal(loaded.score.own_b.weight, model.score.own_a.weight)
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)


def test_a_file_whose_modules_are_no_list_is_refused(tmp_path):
    fastpeft.save_adapters(with_sets(gpt2(), "a"), tmp_path, "a")
    described = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**described, "modules_to_save": "score"}))
    with pytest.raises(ValueError, match="modules_to_save isn't a list of names: 'score'"):
        fastpeft.load_adapters(gpt2(), tmp_path)


def test_a_model_with_copies_keeps_its_head_through_save_pretrained(tmp_path):
    model: Any = randomise(with_sets(gpt2(GPT2ForSequenceClassification), "a", own=("a",)), "score")
    model.save_pretrained(tmp_path)
    loaded = GPT2ForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.score.weight, model.score.weight)


def test_a_set_with_another_head_than_other_sets_use_gets_its_own(tmp_path):
    model = with_sets(gpt2(GPT2ForSequenceClassification), "a")
    fastpeft.save_adapters(model, tmp_path, "a")
    fastpeft.load_adapters(model, tmp_path, "b")  # the same head
    saved = model.score.weight.detach().clone()
    randomise(model, "score").score.weight.data.add_(1)
    changed = model.score.weight.detach().clone()
    fastpeft.load_adapters(model, tmp_path, "c")
    torch.testing.assert_close(dict(heads(model)), {"score.weight": changed, "score.own_c.weight": saved})
    assert all(p.requires_grad for p in heads(model).values())


def test_what_else_other_sets_use_differently_is_refused(tmp_path):
    model = with_sets(gpt2(), "a")
    model.transformer.wpe.weight.requires_grad_(True)
    fastpeft.save_adapters(model, tmp_path, "a")
    model.transformer.wpe.weight.data.add_(1)
    state = copy.deepcopy(model.state_dict())
    words = r"its transformer.wpe can't be those of other sets: load .*; no copy of 'transformer.wpe'"
    with pytest.raises(ValueError, match=words):
        fastpeft.load_adapters(model, tmp_path, "c")
    torch.testing.assert_close(model.state_dict(), state)


def peft_classifier() -> nn.Module:
    return with_lora(gpt2(GPT2ForSequenceClassification))


@pytest.mark.parametrize(
    ("make", "name", "modules", "words"),
    [
        (
            None,
            "b",
            ["transformer.h.0.mlp.c_fc"],
            "have copies, and GPT2ForSequenceClassification has score$",
        ),
        (None, "b", ["score", "scores"], "no copy of 'scores' can be given"),
        (None, "b", ["score.own_a"], "no copy of 'score.own_a' can be given"),
        (None, "a", ["score"], "'a' has a score of its own already"),
        (peft_classifier, "b", ["score"], "have copies, and GPT2ForSequenceClassification has none$"),
        (gpt2, "b", ["lm_head"], "have copies, and GPT2LMHeadModel has none$"),
        (lambda: gpt2(GPT2DoubleHeadsModel), "b", ["multiple_choice_head.summary"], "Model has none$"),
    ],
)
def test_modules_that_cannot_be_copied_are_refused(make, name, modules, words):
    model = make() if make else with_sets(gpt2(GPT2ForSequenceClassification), "a", own=("a",))
    state = copy.deepcopy(model.state_dict())
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        fastpeft.add_adapters(model, AdapterConfig(("post_embed",), 2), name, modules_to_save=modules)
    torch.testing.assert_close(model.state_dict(), state)
    assert trained == [p.requires_grad for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
def test_a_head_that_peft_has_wrapped_since_is_refused(tmp_path):
    model = with_lora(with_sets(gpt2(GPT2ForSequenceClassification), "a", own=("a",)))
    with pytest.raises(ValueError, match="peft has put score in a wrapper of its own"):
        fastpeft.save_adapters(model, tmp_path, "a")


@pytest.mark.parametrize("name", ["", "a.b", "__base__", None])
def test_what_cannot_be_a_name_is_refused(tmp_path, name):
    fastpeft.save_adapters(with_sets(gpt2(), "a"), tmp_path, "a")
    model = gpt2()
    with pytest.raises(ValueError, match="can't be named"):
        fastpeft.add_adapters(model, AdapterConfig(), name)
    with pytest.raises(ValueError, match="can't be named"):
        fastpeft.load_adapters(model, tmp_path, name)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_errors_name_the_sets(tmp_path):
    model = with_sets(gpt2(), "a", "b")
    with pytest.raises(
        ValueError, match="mlp already has an adapter: a slot takes one of each set, and 'b' has it"
    ):
        fastpeft.add_adapters(model, AdapterConfig(("post_mlp",)), "b")
    for call in (
        lambda: fastpeft.set_adapters(model, "c"),
        lambda: fastpeft.save_adapters(model, tmp_path, "c"),
    ):
        with pytest.raises(ValueError, match="no set of adapters is named 'c': the model has b, a"):
            call()
    for names, words in (
        (["x", "a", "y"], "no adapter is named x, y: the model has a, b"),
        ("a", "sequence"),
    ):
        with pytest.raises((TypeError, ValueError), match=words), fastpeft.adapter_rows(model, names):
            pass
    for m in (model, fastpeft.patch(copy.deepcopy(model))):
        with fastpeft.adapter_rows(m, ["a", "b"]):
            with pytest.raises(ValueError, match="the batch has 1 rows, and 2 were given adapters"):
                m(IDS)
            with pytest.raises(ValueError, match="have adapters already"), fastpeft.adapter_rows(m, ["a"]):
                pass
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not list(tmp_path.iterdir())


def test_adapters_that_came_after_patch_are_used_too():
    """Not fused, yet packed: the block hands them its residual, and each group of rows theirs."""
    stock = with_sets(gpt2(GPT2ForSequenceClassification))
    found: Any = fastpeft.patch(with_sets(gpt2(GPT2ForSequenceClassification), "a"))
    for name in ("default", "b"):
        for config in SETS[name]:
            fastpeft.add_adapters(found, config, name)
    found.load_state_dict(stock.state_dict())
    fastpeft.set_adapters(found, "default")
    inputs = labelled(batch("right"), GPT2ForSequenceClassification)
    torch.testing.assert_close(found(**inputs).loss, alone(stock, "default")(**inputs).loss)
    with fastpeft.adapter_rows(found, APART):
        torch.testing.assert_close(found(**inputs).logits, rows_apart(stock, APART, inputs)["logits"])
    assert packing_of(found)[0] == "torch", packing_of(found)


def test_a_model_that_was_compiled_before_uses_them_too():
    model = with_sets(gpt2(n_layer=1), "default", "a")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IDS).logits, alone(model, "default")(IDS).logits)
    with fastpeft.adapter_rows(model, ["a"]):
        torch.testing.assert_close(compiled(IDS).logits, alone(model, "a")(IDS).logits)
