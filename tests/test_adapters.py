"""Bottleneck adapters: where they go, what trains, and their files."""

from __future__ import annotations

import copy
import itertools
import json
import os

import numpy as np
import pytest
import torch
from models import gpt2, randomise, step, with_adapters, with_lora
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

import fastpeft
from fastpeft.adapters import PARALLEL, SLOTS, Adapter
from fastpeft.saving import CONFIG_FILE, WEIGHTS_FILE

#: As many as one model takes: the MLP has an adapter after it or one beside it.
TOGETHER = tuple(slot for slot in SLOTS if slot != PARALLEL)
IDS = torch.arange(2, 12)[None]


def logits(model):
    with torch.no_grad():
        output = model.eval()(IDS)
    return output.last_hidden_state if isinstance(model, GPT2Model) else output.logits


@pytest.mark.parametrize("slots", [*[(slot,) for slot in SLOTS], TOGETHER], ids=str)
@pytest.mark.parametrize("head", [GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_fresh_adapters_change_no_bit_of_the_output_yet_have_a_gradient(head, slots):
    model = gpt2(head)
    before = logits(model)
    assert fastpeft.add_adapters(model, fastpeft.AdapterConfig(slots, bottleneck=8)) is model
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(fastpeft.patch(model, exact=True)), before)  # exact: GELU left as it was
    output = model.train()(IDS)
    (output.last_hidden_state if head is GPT2Model else output.logits).square().sum().backward()
    ups = [p.grad for n, p in model.named_parameters() if "adapter.up" in n]
    assert len(ups) == 2 * sum(1 if slot in ("post_embed", "pre_head") else 2 for slot in slots)
    assert all(grad.any() for grad in ups)


@pytest.mark.parametrize("slot", SLOTS)
def test_a_slot_adapts_the_tensor_it_names(slot):
    model = gpt2(n_layer=1)
    adapted = copy.deepcopy(model)
    with_adapters(adapted, slot, activation="gelu")
    adapter = next(m for m in adapted.modules() if isinstance(m, Adapter))
    transformer = model.transformer
    block = transformer.h[0]
    with torch.no_grad():
        hidden = transformer.wte(IDS) + transformer.wpe(torch.arange(IDS.shape[1]))
        hidden = adapter(hidden) if slot == "post_embed" else hidden
        out = block.attn(block.ln_1(hidden))[0]
        hidden = hidden + (adapter(out) if slot == "post_attn" else out)
        read = block.ln_2(hidden)
        out = block.mlp(read)
        if slot == "parallel_mlp":
            out = out + adapter.up(F.gelu(adapter.down(read)))
        hidden = hidden + (adapter(out) if slot == "post_mlp" else out)
        hidden = adapter(hidden) if slot == "post_block" else hidden
        hidden = transformer.ln_f(hidden)
        hidden = adapter(hidden) if slot == "pre_head" else hidden
        expected = model.lm_head(hidden)
    assert not torch.allclose(logits(model), expected)
    torch.testing.assert_close(logits(adapted), expected)


def test_adapters_of_some_layers_are_in_those_alone_and_are_read_as_they_are(tmp_path):
    model = gpt2(n_layer=3)
    upper = fastpeft.AdapterConfig(("post_attn", "post_mlp"), bottleneck=8, layers=(1, 2))
    fastpeft.add_adapters(model, upper)
    fastpeft.add_adapters(model, fastpeft.AdapterConfig(("post_mlp",), bottleneck=4, layers=[0]))
    fastpeft.add_adapters(model, fastpeft.AdapterConfig(("post_block",), bottleneck=2, layers=(0, 1, 2)))
    hosts = {
        n.removesuffix(".adapter") for n, m in model.transformer.named_modules() if isinstance(m, Adapter)
    }
    assert hosts == {"h.0", "h.1", "h.2", "h.1.attn", "h.2.attn", "h.0.mlp", "h.1.mlp", "h.2.mlp"}
    randomise(model, "adapter")
    fastpeft.save_adapters(model, tmp_path)
    fresh = fastpeft.load_adapters(gpt2(n_layer=3), tmp_path)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter" not in k}, strict=False)
    assert torch.equal(logits(fresh), logits(model))
    other = fastpeft.add_adapters(gpt2(n_layer=3), fastpeft.AdapterConfig(("post_mlp",), layers=(1,)))
    with pytest.raises(ValueError, match="the model has other adapters"):
        fastpeft.load_adapters(other, tmp_path)


def test_a_layer_that_is_not_there_is_refused_before_anything_changes():
    model = gpt2(n_layer=2)
    with pytest.raises(ValueError, match="no layer 2: the model has layers 0 to 1"):
        fastpeft.add_adapters(model, fastpeft.AdapterConfig(("post_attn", "post_mlp"), layers=(0, 2)))
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_see_what_the_residual_stream_drops():
    """`post_attn` and `post_mlp` come after the dropout: at p=1 they see zeros."""
    model = with_adapters(gpt2(n_layer=1, resid_pdrop=1.0), "post_attn", "post_mlp")
    seen = []
    for module in model.modules():
        if isinstance(module, Adapter):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.train()(IDS)
    assert len(seen) == 2
    assert not any(x.any() for x in seen)


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_base_is_frozen_and_the_head_trains():
    model = with_adapters(gpt2(GPT2ForSequenceClassification), *TOGETHER)
    assert {n for n in trainable(model) if ".adapter." not in n} == {"score.weight"}
    assert {n for n, _ in model.named_parameters() if ".adapter." in n} <= trainable(model)


def test_a_head_tied_to_the_embedding_is_frozen_with_it():
    assert all(".adapter." in name for name in trainable(with_adapters(gpt2(GPT2LMHeadModel))))


def test_lora_weights_and_the_head_peft_trains_stay_trainable():
    model = with_lora(gpt2(GPT2ForSequenceClassification))
    before = trainable(model)
    assert any("lora_A" in name for name in before)
    assert any("score" in name for name in before)
    with_adapters(model)
    with_adapters(model, "post_mlp")
    assert before < trainable(model)
    assert all(".adapter." in name for name in trainable(model) - before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trains_stay_trainable(bias):
    model = with_lora(gpt2(), bias=bias)
    before = trainable(model)
    assert any(name.endswith("bias") for name in before)
    with_adapters(model)
    assert before == {name for name in trainable(model) if ".adapter." not in name}


def test_adapters_are_part_of_hidden_states_asked_for_before():
    model = gpt2()
    model(IDS, output_hidden_states=True)
    plain = model(IDS, output_hidden_states=True).hidden_states
    with_adapters(model, "post_block")
    adapted = model(IDS, output_hidden_states=True).hidden_states
    expected = model.transformer.h[0].adapter(plain[1])
    torch.testing.assert_close(adapted[1], expected)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slots": ("post_mlp", "behind")}, "slots must be one or more of post_embed"),
        ({"slots": ()}, "slots must be one or more of"),
        ({"slots": ("post_mlp", "post_mlp")}, "each once"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"bottleneck": 0}, "bottleneck must be a whole number of at least 1, got 0"),
        ({"scale": "2"}, "scale must be a finite number, got '2'"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"bottleneck": True}, "bottleneck must be a whole number of at least 1, got True"),
    ],
)
def test_a_config_names_what_is_wrong(fields, words):
    with pytest.raises(ValueError, match=words):
        fastpeft.AdapterConfig(**fields)


def test_an_mlp_takes_an_adapter_after_it_or_beside_it():
    with pytest.raises(ValueError, match="post_mlp and parallel_mlp are both the MLP's"):
        fastpeft.AdapterConfig(("parallel_mlp", "post_mlp"))
    with pytest.raises(ValueError, match=r"h\.0\.mlp already has an adapter"):
        with_adapters(with_adapters(gpt2(), "post_mlp"), "parallel_mlp")


def test_an_adapter_beside_the_mlp_is_kept_as_such(tmp_path):
    """Its parameters have the names and shapes of one after the MLP, so that the files' slot alone tells."""
    model = with_adapters(gpt2(), "parallel_mlp", scale=4.0)
    randomise(model, "adapter")
    fastpeft.save_adapters(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["adapters"][0]["slots"] == ["parallel_mlp"]
    loaded = fastpeft.load_adapters(gpt2(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="the model has other adapters"):
        fastpeft.load_adapters(with_adapters(gpt2(), "post_mlp", scale=4.0), tmp_path)


def test_a_taken_slot_is_refused_before_anything_changes():
    model = with_adapters(gpt2(), "post_mlp")
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="mlp already has an adapter"):
        fastpeft.add_adapters(model, fastpeft.AdapterConfig(("post_attn", "post_mlp")))
    assert [name for name, _ in model.named_parameters()] == before


def test_a_model_without_gpt2_is_refused():
    with pytest.raises(ValueError, match="Linear has 0"):
        fastpeft.add_adapters(nn.Linear(2, 2), fastpeft.AdapterConfig())


def test_adapters_take_the_dtype_of_their_host():
    model = with_adapters(gpt2().bfloat16(), *TOGETHER)
    assert {p.dtype for n, p in model.named_parameters() if ".adapter." in n} == {torch.bfloat16}
    assert step(model)["logits"].dtype == torch.bfloat16


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_saved_adapters_load_into_a_fresh_model(tmp_path, lora, patched):
    def fresh():
        model = gpt2(GPT2ForSequenceClassification)
        return with_lora(model) if lora else model

    trained = fresh()
    with_adapters(trained, "post_attn", activation="silu", scale=0.5)
    with_adapters(trained, "pre_head", bottleneck=5)
    randomise(trained, "adapter")
    randomise(trained, "score")
    if patched:
        fastpeft.patch(trained)
    fastpeft.save_adapters(trained, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    keys = load_file(tmp_path / WEIGHTS_FILE).keys()
    assert "score.weight" in keys
    assert "transformer.h.0.attn.adapter.down.weight" in keys
    assert not any("lora" in key or "base_layer" in key for key in keys)
    loaded = fresh()
    assert not torch.equal(logits(loaded), logits(trained))
    fastpeft.load_adapters(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(fastpeft.unpatch(trained)))
    assert trainable(loaded) == trainable(trained)
    assert torch.equal(logits(fastpeft.load_adapters(loaded, tmp_path)), logits(trained))  # and again


def test_a_base_parameter_that_trains_is_saved_too(tmp_path):
    model = with_adapters(gpt2())
    model.transformer.ln_f.weight.requires_grad_(True)
    randomise(model, "ln_f.weight")
    fastpeft.save_adapters(model, tmp_path)
    assert torch.equal(logits(fastpeft.load_adapters(gpt2(), tmp_path)), logits(model))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_an_embedding_that_trains_is_saved_once_and_loads(tmp_path, tied):
    model = with_adapters(gpt2())
    model.lm_head.weight.requires_grad_(True)  # tied: the token embedding too
    randomise(model, "wte")
    fastpeft.save_adapters(model, tmp_path)
    kept = load_file(tmp_path / WEIGHTS_FILE)
    assert {"lm_head.weight", "transformer.wte.weight"} - kept.keys() == {"transformer.wte.weight"}
    loaded = fastpeft.load_adapters(gpt2(tie_word_embeddings=tied, seed=0), tmp_path)
    rest = {k: v for k, v in model.state_dict().items() if "wte" not in k and "lm_head" not in k}
    loaded.load_state_dict(rest, strict=False)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("parts", [("lm_head",), ("wte",), ("lm_head", "wte")], ids=str)
def test_a_head_apart_from_the_embedding_is_refused_where_they_are_tied(tmp_path, parts):
    apart = with_adapters(gpt2(tie_word_embeddings=False))
    for name, parameter in apart.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("adapter", *parts)))
    randomise(apart, "lm_head")
    fastpeft.save_adapters(apart, tmp_path)
    model = gpt2()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="are tied in the model, and not in the file"):
        fastpeft.load_adapters(model, tmp_path)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_adapters_that_are_added_have_the_dtype_in_which_they_were_saved(tmp_path):
    model = with_adapters(gpt2().bfloat16())
    for module in model.modules():
        if isinstance(module, Adapter):
            module.float()
    randomise(model, "adapter")
    fastpeft.save_adapters(model, tmp_path)
    loaded = fastpeft.load_adapters(gpt2().bfloat16(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    expected = {n: p for n, p in model.named_parameters() if ".adapter." in n}
    assert all(p.dtype == torch.float32 for p in expected.values())
    found = {n: p for n, p in loaded.named_parameters() if ".adapter." in n}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_adapters_behind_a_module_that_peft_saves(tmp_path):
    model = with_adapters(with_lora(gpt2(), modules_to_save=["ln_f"]), "pre_head")
    randomise(randomise(model, "modules_to_save"), "adapter")
    fastpeft.save_adapters(model, tmp_path)
    loaded = with_lora(gpt2(), modules_to_save=["ln_f"])
    assert torch.equal(logits(fastpeft.load_adapters(loaded, tmp_path)), logits(model))
    plain = fastpeft.load_adapters(gpt2(), tmp_path)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(False)
    assert torch.equal(logits(plain), logits(model))


def test_a_scale_of_numpy_is_a_number(tmp_path):
    model = with_adapters(gpt2(), scale=np.float32(0.5))
    next(m for m in model.modules() if isinstance(m, Adapter)).scale = np.float32(0.25)
    fastpeft.save_adapters(model, tmp_path)
    assert torch.equal(logits(fastpeft.load_adapters(gpt2(), tmp_path)), logits(model))


def scale_learned(adapter):
    adapter.scale = nn.Parameter(torch.tensor(0.5))


def bias_gone(adapter):
    adapter.up.bias = None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scale_learned, "the scale of an adapter in post_attn is a Parameter, not a number"),
        (bias_gone, r"transformer.h.0.attn.adapter.up.bias isn't there: the adapters aren't as add_adapters"),
    ],
)
def test_adapters_that_a_file_cannot_hold_leave_the_files_as_they_are(tmp_path, change, words):
    fastpeft.save_adapters(with_adapters(gpt2()), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = with_adapters(gpt2())
    change(next(m for m in model.modules() if isinstance(m, Adapter)))
    with pytest.raises(ValueError, match=words):
        fastpeft.save_adapters(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_of_two_saves_are_refused(tmp_path, monkeypatch):
    fastpeft.save_adapters(with_adapters(gpt2()), tmp_path)
    replace = os.replace

    def failing(source, target):
        if target.name == CONFIG_FILE:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        fastpeft.save_adapters(with_adapters(gpt2(), scale=3.0), tmp_path)
    monkeypatch.undo()
    model = gpt2()
    with pytest.raises(ValueError, match="are of two saves"):
        fastpeft.load_adapters(model, tmp_path)
    assert model.state_dict().keys() == gpt2().state_dict().keys()


def test_a_description_of_two_adapters_for_one_place_changes_nothing(tmp_path):
    fastpeft.save_adapters(with_adapters(gpt2(), "post_mlp"), tmp_path)
    rewrite(tmp_path, lambda t, d: d["adapters"].append({**d["adapters"][0], "slots": ["parallel_mlp"]}))
    model = gpt2()
    with pytest.raises(ValueError, match=r"h\.0\.mlp already has an adapter"):
        fastpeft.load_adapters(model, tmp_path)
    assert model.state_dict().keys() == gpt2().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def rewrite(folder, change):
    """Apply `change` to the tensors, or to the description, of saved adapters."""
    tensors, description = load_file(folder / WEIGHTS_FILE), json.loads((folder / CONFIG_FILE).read_text())
    change(tensors, description)
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(description))


KEY = "transformer.h.0.attn.adapter.up.bias"
DAMAGES = {
    "missing key": (lambda t, d: t.pop(KEY), rf"missing keys \['{KEY}'\]"),
    "extra key": (lambda t, d: t.update(other=torch.ones(1)), r"unexpected keys \['other'\]"),
    "wrong width": (lambda t, d: d.update(width=64), "for width 64 and 2 layers, the model has 48 and 2"),
    "wrong layers": (lambda t, d: d.update(layers=3), "for width 48 and 3 layers"),
    "wrong shape": (
        lambda t, d: t.update({KEY: torch.ones(3)}),
        r"has shape \(3,\), the model needs \(48,\)",
    ),
    "wrong version": (lambda t, d: d.update(format=99), "format 99, this fastpeft reads format 1"),
    "no version": (lambda t, d: d.pop("format"), "not a description of adapters"),
    "unknown slot": (lambda t, d: d["adapters"][0].update(slots=["behind"]), "slots must be one or more of"),
    "other head": (
        lambda t, d: d["trained"].append("score.weight"),
        "'score.weight' doesn't exist in the model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("has_adapters", [False, True], ids=["fresh", "adapted"])
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, damage, has_adapters):
    change, words = DAMAGES[damage]
    fastpeft.save_adapters(with_adapters(gpt2()), tmp_path)
    rewrite(tmp_path, change)
    model = with_adapters(gpt2()) if has_adapters else gpt2()
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        fastpeft.load_adapters(model, tmp_path)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) and after[n].requires_grad == g for n, (p, g) in before.items())


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("left", [0, 20, 100])
def test_a_truncated_file_is_refused(tmp_path, name, left):
    fastpeft.save_adapters(with_adapters(gpt2()), tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:left])
    with pytest.raises(ValueError, match=name):
        fastpeft.load_adapters(gpt2(), tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(tmp_path, name):
    fastpeft.save_adapters(with_adapters(gpt2()), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        fastpeft.load_adapters(gpt2(), tmp_path)


def test_other_adapters_in_the_model_are_refused(tmp_path):
    fastpeft.save_adapters(with_adapters(gpt2(), bottleneck=4), tmp_path)
    for slot, size in itertools.product(("post_attn", "post_mlp"), (4, 8)):
        if (slot, size) != ("post_attn", 4):
            with pytest.raises(ValueError, match="the model has other adapters"):
                fastpeft.load_adapters(with_adapters(gpt2(), slot, bottleneck=size), tmp_path)


def test_a_model_without_adapters_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        fastpeft.save_adapters(gpt2(), tmp_path)
    assert not list(tmp_path.iterdir())
