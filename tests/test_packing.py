"""The model scope: GPT-2 on packed tokens equals stock on every token that isn't padding."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_as_good_over_draws, assert_fused, draws_of, gpt2, with_adapters, with_lora
from peft import PrefixTuningConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

import fastpeft
from fastpeft import modules, packing
from fastpeft.adapters import SLOTS
from fastpeft.packing import PackedAttention


class FirstArguments(TorchFunctionMode):
    """Sees what a function is called with, and changes nothing of what fastpeft runs."""

    def __init__(self, monkeypatch, function):
        super().__init__()
        self.seen, self.function = [], function
        monkeypatch.setattr(modules, "HARMLESS_MODES", {FirstArguments})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is self.function:
            self.seen.append(args[0])
        return function(*args, **(kwargs or {}))


PAD = 0


def batch(lengths, side="right", seed=0, width=12):
    """Token ids and their mask, rows of the given lengths, padded on a side or, `mixed`, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 61, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        places = torch.randperm(width, generator=generator)[:length]
        mask[row, {"right": slice(length), "left": slice(width - length, width), "mixed": places}[side]] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def outcome(model, inputs, seed=0):
    """What a training step gives where there is no padding: hidden states or logits, and every gradient."""
    model.train().zero_grad()
    torch.manual_seed(seed)
    output = model(**inputs)[0]
    if output.shape[:2] == inputs["input_ids"].shape:
        output = output[inputs["attention_mask"].bool()]
    output.double().square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}


def packing_row(model):
    return next(row for row in fastpeft.report(model) if row.kind == "packing")


def redrawn(inputs, seed):
    """The same batch with other tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 61, inputs["input_ids"].shape, generator=generator)
    return {**inputs, "input_ids": ids * inputs["attention_mask"]}


def assert_packed_equals_stock(model, inputs, dtype=torch.float32):
    draws = draws_of(model)
    patched, stock, truth = model.to(dtype), copy.deepcopy(model), copy.deepcopy(model).double()
    fastpeft.patch(patched, scope="model")
    assert_as_good_over_draws(
        (patched, stock, truth), lambda model, draw: outcome(model, redrawn(inputs, draw)), draws
    )
    assert packing_row(patched)[2:] == ("torch", packing_row(patched).reason, draws)
    assert not any(isinstance(m, PackedAttention) for m in stock.modules())


#: Each side with each dtype and each kind of attention; all three at once are in the full grid.
PAIRS = [
    *(("right", torch.float32, "sdpa"), ("right", torch.bfloat16, "eager")),
    *(("left", torch.float32, "eager"), ("left", torch.bfloat16, "sdpa")),
    *(("mixed", torch.float32, "sdpa"), ("mixed", torch.bfloat16, "eager")),
]


@pytest.mark.parametrize(
    ("side", "dtype", "attention"),
    [
        pytest.param(*case, marks=[] if case in PAIRS else pytest.mark.full)
        for case in itertools.product(
            ["right", "left", "mixed"], [torch.float32, torch.bfloat16], ["sdpa", "eager"]
        )
    ],
    ids=str,
)
def test_every_side_of_padding(side, dtype, attention):
    model = with_adapters(
        with_lora(gpt2(GPT2ForSequenceClassification, attn_implementation=attention)), "post_attn"
    )
    assert_packed_equals_stock(model, batch([12, 5, 3, 1], side), dtype)


@pytest.mark.parametrize(("short", "attended"), [(12, torch.float32), (11, torch.bfloat16)])
def test_short_rows_attend_in_float32_on_the_cpu(short, attended, monkeypatch):
    monkeypatch.setattr(packing, "_SHORT", short)
    model = with_lora(gpt2(GPT2ForSequenceClassification)).bfloat16()
    fastpeft.patch(model, scope="model")
    with FirstArguments(monkeypatch, F.scaled_dot_product_attention) as queries:
        results = outcome(model, batch([12, 5, 3, 1]))
    assert {query.dtype for query in queries.seen} == {attended}
    assert all(result.dtype == torch.bfloat16 for result in results.values())


@pytest.mark.parametrize(
    "head", [GPT2Model, GPT2LMHeadModel, GPT2ForTokenClassification, GPT2ForQuestionAnswering]
)
def test_every_head(head):
    assert_packed_equals_stock(gpt2(head), batch([4, 9, 2]))


@pytest.mark.parametrize("slot", SLOTS)
def test_adapters_in_every_slot(slot):
    assert_packed_equals_stock(with_adapters(gpt2(GPT2ForSequenceClassification), slot), batch([4, 9, 2]))


@pytest.mark.parametrize("lengths", [[12] * 6, [12] * 5 + [11], [7] * 6], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_batches_and_full_views_under_a_classifier(lengths, attention):
    model = with_lora(gpt2(GPT2ForSequenceClassification, attn_implementation=attention))
    assert_packed_equals_stock(model, batch(lengths, "left"))


def test_equal_lengths_under_other_heads():
    assert_packed_equals_stock(with_lora(gpt2()), batch([7] * 6, "mixed"))


@pytest.mark.parametrize("given", [("input_ids", "attention_mask"), ("input_ids",)], ids="+".join)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_batches_where_every_token_is_read(given, attention, monkeypatch):
    inputs = batch([12] * 6)
    model = with_lora(gpt2(attn_implementation=attention))
    patched, stock = fastpeft.patch(copy.deepcopy(model)), model
    with FirstArguments(monkeypatch, F.layer_norm) as normed:
        outputs = [m.train()(**{name: inputs[name] for name in given}) for m in (patched, stock)]
    torch.testing.assert_close(*(output.logits for output in outputs))
    assert {x.shape for x in normed.seen} == {(6, 12, 48)}
    assert packing_row(patched).calls == 1
    caches = [output.past_key_values for output in outputs]
    assert {type(cache) for cache in caches} == {DynamicCache}
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values))
    assert_packed_equals_stock(model, inputs)


def test_nearly_full_batches_stay_stock_where_every_token_is_read():
    model = fastpeft.patch(gpt2(GPT2ForTokenClassification), scope="model")
    model.train()(**batch([12, 12, 10]))
    assert packing_row(model)[2:] == ("stock", "the batch is nearly full", 0)


def test_position_ids_and_token_type_ids():
    inputs = batch([4, 9, 2], "left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs["token_type_ids"] = inputs["input_ids"] % 3
    assert_packed_equals_stock(with_lora(gpt2(GPT2ForSequenceClassification)), inputs)


def flattened(*rows):
    """Sequences of the given lengths one after the other in each row, as DataCollatorWithFlattening lays them."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    ids = torch.randint(2, 61, positions.shape, generator=generator)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


@pytest.mark.fidelity(
    "several sequences in a row, by position_ids that begin again", "packed; each attends to itself alone"
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[(9, 3, 20, 5)], [(6, 6), (12,)], [(6, 6), (6, 6)], [(1, 2, 1)]], ids=str)
@pytest.mark.parametrize("scope", ["auto", "model"])
def test_positions_that_begin_again_are_other_sequences(rows, attention, scope):
    """Longer in all than the model has positions, too."""
    stock = with_lora(gpt2(n_positions=20, attn_implementation=attention)).train()
    patched = fastpeft.patch(copy.deepcopy(stock), scope=scope)
    inputs = flattened(*rows)
    results = []
    for model in (stock, patched):
        outputs = model(**inputs, use_cache=False)
        outputs.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((outputs.loss.detach(), outputs.logits.detach(), grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert packing_row(patched)[2:] == ("torch", "packed: no padding between the embeddings and the head", 1)


def test_one_long_sequence_among_short_ones_stays_stock():
    """Attention's view, (sequences, longest), would be far larger than the grid."""
    stock = gpt2().train()
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = flattened((20,) + (1,) * 30)
    torch.testing.assert_close(patched(**inputs, use_cache=False).loss, stock(**inputs, use_cache=False).loss)
    assert packing_row(patched).path == "stock"
    assert "a long sequence among short ones" in packing_row(patched).reason


def test_what_a_flattening_collator_gives_is_packed():
    rows = [{"input_ids": list(range(2, 2 + n))} for n in (4, 7, 2)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    stock = gpt2().train()
    patched = fastpeft.patch(copy.deepcopy(stock))
    expected, result = (model(**collator(rows), use_cache=False) for model in (stock, patched))
    torch.testing.assert_close((result.loss, result.logits), (expected.loss, expected.logits))
    assert packing_row(patched).calls == 1


@pytest.mark.parametrize("head", [GPT2ForSequenceClassification, GPT2Model])
def test_positions_that_begin_again_under_any_head(head):
    stock = gpt2(head).eval()
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = {name: value for name, value in flattened((4, 8), (7, 5)).items() if name != "labels"}
    torch.testing.assert_close(patched(**inputs, use_cache=False)[0], stock(**inputs, use_cache=False)[0])
    assert packing_row(patched).calls == 1


def test_with_a_cache_positions_that_begin_again_are_one_sequence():
    stock = gpt2().eval()
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = flattened((4, 8), (7, 5))
    expected, result = stock(**inputs), patched(**inputs)
    torch.testing.assert_close(result.logits, expected.logits)
    assert not torch.allclose(result.logits, stock(**inputs, use_cache=False).logits), (
        "no test: they are the same"
    )
    torch.testing.assert_close(result.past_key_values.layers[1].keys, expected.past_key_values.layers[1].keys)
    assert packing_row(patched).calls == 1


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9).filter(
        lambda n: sum(n) <= 0.9 * 12 * len(n)
    ),
    side=st.sampled_from(["right", "left", "mixed"]),
    head=st.sampled_from([GPT2LMHeadModel, GPT2ForSequenceClassification]),
    slots=st.lists(st.sampled_from(["post_embed", "post_mlp", "post_block"]), max_size=2, unique=True),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_drawn_lengths(lengths, side, head, slots, dtype):
    model = with_lora(gpt2(head, n_layer=1))
    if slots:  # smooth ones: few rows reach a ReLU near 0, and on which side 16 bits put them is luck
        model = with_adapters(model, *slots, activation="gelu")
    assert_packed_equals_stock(model, batch(lengths, side), dtype)


def test_hidden_states_keep_their_shape_and_padding_is_zero():
    model = fastpeft.patch(gpt2(GPT2Model), scope="model").train()
    inputs = batch([4, 9, 2])
    hidden = model(**inputs).last_hidden_state
    assert hidden.shape == (3, 12, 48)
    assert not hidden[~inputs["attention_mask"].bool()].any()
    assert hidden[inputs["attention_mask"].bool()].any(1).all()
    assert torch.equal(model(**inputs, return_dict=False)[0], hidden)


def test_nothing_leaks_between_sequences():
    model = fastpeft.patch(with_lora(gpt2()), scope="model").train()
    inputs = batch([4, 9, 2])
    before = model(**inputs)[0]
    inputs["input_ids"][1, :9] = 7
    after = model(**inputs)[0]
    assert packing_row(model).calls == 2
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


ASIDE = {
    "an attention_mask that hasn't the shape of input_ids": lambda i: {
        **i, "attention_mask": torch.zeros(3, 1, 12, 12)
    },
    "a cache of padded rows": lambda i: {**i, "use_cache": True},
    "output_hidden_states": lambda i: {**i, "output_hidden_states": True},
    "the mask hides a token that is read, or all of them": lambda i: {
        **i, "attention_mask": i["attention_mask"] * torch.tensor([[1], [0], [1]])
    },
    "input_ids (batch, length) are needed to see the padding": lambda i: {
        "inputs_embeds": torch.ones(3, 12, 48), "attention_mask": i["attention_mask"]
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", ASIDE)
@pytest.mark.filterwarnings("ignore")  # transformers' own, on padding without a mask
def test_it_steps_aside_for_a_call(reason):
    stock = gpt2(GPT2ForSequenceClassification).eval()
    model = fastpeft.patch(copy.deepcopy(stock), scope="model")
    inputs = ASIDE[reason](batch([4, 9, 2]))
    with torch.no_grad():
        outputs, expected = model(**inputs), stock(**inputs)
    assert packing_row(model) == ("transformer", "packing", "stock", reason, 0)
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert outputs.keys() == expected.keys()


def test_it_steps_aside_for_cross_attention():
    model = fastpeft.patch(gpt2(add_cross_attention=True), scope="model").train()
    model(**batch([4, 9, 2]), encoder_hidden_states=torch.ones(3, 2, 48))
    assert packing_row(model).reason == "cross-attention"


def test_it_steps_aside_for_prefix_tuning():
    model = get_peft_model(gpt2(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    fastpeft.patch(model, scope="model").train()(**batch([4, 9, 2]))
    assert packing_row(model)[2:4] == ("stock", "past keys and values, of a cache or a prefix")


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("head", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_a_cache_by_default_is_built_in_the_callers_grid(head, side):
    """What a decoding step makes of it, its padding masked, is what it makes of stock's."""
    stock = with_lora(gpt2(head)).eval()
    model = fastpeft.patch(copy.deepcopy(stock))
    inputs = batch([4, 12, 2], side)
    labels = inputs["input_ids"].clone()
    labels[inputs["attention_mask"].roll(1, 1) * inputs["attention_mask"] == 0] = -100
    labels = labels if head is GPT2LMHeadModel else torch.tensor([0, 1, 0])
    logits = []
    for each in (model, stock):
        cache = each(**inputs, labels=labels).past_key_values
        assert cache.get_seq_length() == 12
        more = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        if head is GPT2LMHeadModel:
            logits.append(each(torch.full((3, 1), 7), attention_mask=more, past_key_values=cache).logits)
        else:
            shown = inputs["attention_mask"].bool()
            logits.append(torch.stack([layer.keys.transpose(1, 2)[shown] for layer in cache.layers]))
    torch.testing.assert_close(*logits)
    assert packing_row(model).calls == 1


def test_generation_is_stocks():
    stock = gpt2().eval()
    model = fastpeft.patch(copy.deepcopy(stock), scope="model")
    for inputs in batch([4, 12, 2], "left"), batch([12, 12]):
        texts = [m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, stock)]
        assert torch.equal(*texts)


def test_a_replaced_attention_or_block_keeps_the_model_stock():
    model = gpt2(GPT2ForSequenceClassification)
    attention = model.transformer.h[1].attn
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    with pytest.raises(ValueError, match=r"transformer: h\.1\.attn has a forward of its own"):
        fastpeft.patch(model, scope="model", strict=True)
    assert not any(isinstance(m, PackedAttention) for m in model.modules())
    fastpeft.patch(model, scope="model").train()(**batch([4, 9, 2]))
    assert packing_row(model).path == "stock"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(reentrant):
    results = []
    for checkpointing in (False, True):
        model = with_lora(
            gpt2(GPT2ForSequenceClassification, attn_pdrop=0.2, resid_pdrop=0.2), lora_dropout=0.3
        )
        model.enable_input_require_grads()
        if checkpointing:
            name = "activation_checkpointing_enable"  # gradient_checkpointing_enable in older transformers
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(
                {"use_reentrant": reentrant}
            )
        fastpeft.patch(model, scope="model")
        results.append(outcome(model, batch([4, 9, 2])))
        assert packing_row(model).calls == 1
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name])


def test_dropout_has_stocks_distribution():
    """Means and variances of the logits over many seeds, within five standard errors."""
    stock = with_lora(
        gpt2(GPT2ForSequenceClassification, n_layer=1, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.2),
        lora_dropout=0.3,
    )
    patched = fastpeft.patch(copy.deepcopy(stock), scope="model")
    inputs = batch([4, 9, 2])
    draws = []
    for model in (patched, stock):
        torch.manual_seed(1)
        with torch.no_grad():
            draws.append(torch.stack([model.train()(**inputs).logits.flatten() for _ in range(400)]).double())
    assert packing_row(patched).calls == 400
    deviation = draws[1].std(0)
    assert ((draws[0].mean(0) - draws[1].mean(0)).abs() < 5 * deviation * (2 / 400) ** 0.5).all()
    assert ((draws[0].std(0) / deviation - 1).abs() < 5 * (1 / 400) ** 0.5).all()


@pytest.mark.parametrize("adapted", [with_lora, lambda model: with_adapters(model, "post_attn", "post_mlp")])
def test_training_draws_no_number_for_each_element(adapted, monkeypatch):
    """GPT-2's own dropouts, attention's included, on full batches and on packed ones."""
    drawn = []

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            drawn.extend([func] if "bernoulli" in str(func) or "dropout" in str(func) else [])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(modules, "HARMLESS_MODES", {Draws})

    def draws_of(model, lengths):
        drawn.clear()
        with Draws():
            model.train()(**batch(lengths))
        return len(drawn)

    stock = adapted(gpt2(attn_pdrop=0.2, resid_pdrop=0.2))
    patched = fastpeft.patch(copy.deepcopy(stock), scope="model")
    for lengths in ([12, 12], [12, 3]):
        assert draws_of(patched, lengths) == 0
        assert draws_of(stock, lengths) == 6
    assert packing_row(patched).calls == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own
@pytest.mark.parametrize("lengths", [[12, 12], [12, 3]], ids=str)
def test_blocks_compiled_one_by_one_train_with_dropout(lengths):
    model = with_lora(gpt2(n_layer=1, attn_pdrop=0.2, resid_pdrop=0.2), ["c_attn"], lora_dropout=0.3)
    fastpeft.patch(model, scope="model")
    for block in model.base_model.model.transformer.h:
        block.compile(backend="aot_eager")
    results = outcome(model, batch(lengths))
    assert packing_row(model).calls == 1
    assert all(torch.isfinite(result).all() for result in results.values())


def test_stocks_warning_of_padding_without_a_mask_is_kept(monkeypatch):
    warned = []
    monkeypatch.setattr(
        GPT2Model, "warn_if_padding_and_no_attention_mask", lambda self, ids, mask: warned.append(mask)
    )
    model = fastpeft.patch(gpt2()).train()
    model(**batch([12, 12]))
    assert None not in warned
    model(input_ids=batch([12, 12])["input_ids"])
    assert warned.count(None) == 1
    assert packing_row(model).calls == 2


@contextlib.contextmanager
def rows_of(function):
    """Collects the number of rows of every x that `F.<function>` gets."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = getattr(F, function)
        patch.setattr(
            F,
            function,
            lambda x, *args, **given: (seen.append(x.shape[:-1].numel()), real(x, *args, **given))[1],
        )
        yield seen


def test_the_last_block_goes_on_only_at_the_tokens_that_a_classifier_pools():
    model = with_adapters(with_lora(gpt2(GPT2ForSequenceClassification)), "post_mlp", "post_block")
    fastpeft.patch(model).train()
    with rows_of("gelu") as rows:
        model(**batch([4, 9, 2]))
    assert rows == [15, 3]
    with rows_of("gelu") as rows:
        model.base_model.model.transformer(**batch([4, 9, 2]))
    assert rows == [36, 36], "whoever calls GPT2Model by itself may look at every token"


def test_other_heads_get_every_token():
    model = fastpeft.patch(gpt2(GPT2ForTokenClassification), scope="model").train()
    with rows_of("gelu") as rows:
        model(**batch([4, 9, 2]))
    assert rows == [15, 15]


@pytest.mark.parametrize("pad_token_id", [None, 7])
def test_the_pooled_token_is_chosen_by_its_id_as_stock_does(pad_token_id):
    """Another pad_token_id makes stock pool the last column: packed only where the mask shows it."""
    stock = gpt2(GPT2ForSequenceClassification, pad_token_id=pad_token_id).eval()
    model = fastpeft.patch(copy.deepcopy(stock), scope="model")
    for side, path in (("left", "torch"), ("right", "stock")):
        inputs = batch([4, 9, 2] if pad_token_id else [4], side)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits)
        assert packing_row(model).path == path


def test_unpatch_and_the_layers_scope_take_it_back():
    model = gpt2(GPT2ForSequenceClassification)
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    fastpeft.unpatch(fastpeft.patch(model, scope="model"))
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert not model.transformer._forward_hooks
    assert not model.transformer._forward_pre_hooks
    fastpeft.patch(fastpeft.patch(model, scope="model"), scope="layers")
    assert not any(row.kind == "packing" for row in fastpeft.report(model))
    fastpeft.patch(model, scope="model", exact=True)
    assert not any(row.kind == "packing" for row in fastpeft.report(model))


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_pack_too(copy_of):
    model = fastpeft.patch(with_lora(gpt2(GPT2ForSequenceClassification)), scope="model")
    inputs = batch([4, 9, 2])
    expected = outcome(model, inputs)
    twin = copy_of(model)
    result = outcome(twin, inputs)
    assert packing_row(twin).calls == 2
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_saved_files_bear_no_trace(tmp_path):
    model = gpt2(GPT2Model)
    model.save_pretrained(tmp_path / "stock")
    fastpeft.patch(model, scope="model").train()(**batch([4, 9, 2]))
    model.save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "stock").iterdir():
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()
    assert_fused(model, ("activation", "packing"))
