"""A language model's loss without its logits: whatever is done with a head's output, it is what stock's shows."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from models import assert_stock, gpt2, randomise, with_adapters, with_lora
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2DoubleHeadsModel, GPT2LMHeadModel, Trainer, TrainingArguments

import fastpeft
from fastpeft import deferred, heads
from fastpeft.deferred import Logits

VOCABULARY = 61


def batch(lengths=(9, 9, 9)):
    """Random tokens, padded on the right, with the labels that a collator gives."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_row(model):
    return next(row for row in fastpeft.report(model) if row.kind == "loss")


def twins(model=None, **options):
    stock = with_lora(gpt2()) if model is None else model
    patched = fastpeft.patch(copy.deepcopy(stock), **options)
    assert_stock(stock)
    return stock.train(), patched.train()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def unread(monkeypatch):
    """Fails where logits are computed."""

    def compute(value):
        assert type(value) is not Logits, "logits were computed"
        return value

    monkeypatch.setattr(deferred, "_computed", compute)


def assert_the_same(use, stock, patched, inputs, reason=None):
    """What `use` shows, and the gradients it leaves; the loss was computed without logits, unless for a `reason`."""
    results = []
    for model in (stock, patched):
        torch.manual_seed(0)
        results.append((use(model, {k: v.clone() for k, v in inputs.items()}), gradients(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    row = loss_row(patched)
    if reason is None:
        assert (row.path, row.calls) == ("torch", row.calls)
        assert row.calls > 0, row.reason
    else:
        assert (row.path, row.calls) == ("stock", 0)
        assert reason in row.reason, row.reason


def trained(model, inputs, **more):
    loss = model(**inputs, **more).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("head", [GPT2LMHeadModel, GPT2DoubleHeadsModel])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 3, 6)], ids=["full", "padded"])
def test_nobody_reads_the_logits(head, lengths, unread):
    assert_the_same(trained, *twins(with_lora(gpt2(head))), batch(lengths))


@pytest.mark.parametrize("given", [
    {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}, {"ignore_index": 7}, {"use_cache": False},
], ids=["a number", "a tensor", "ignore_index", "no cache"])  # fmt: skip
def test_arguments_of_stocks_loss(given, unread):
    assert_the_same(lambda m, i: trained(m, i, **given), *twins(), batch())


def test_shifted_labels(unread):
    inputs = batch()
    inputs["shift_labels"] = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    assert_the_same(trained, *twins(), inputs)


USES = {
    "attribute": lambda o: o.logits,
    "name": lambda o: o["logits"],
    "get": lambda o: o.get("logits"),
    "index": lambda o: o[1],
    "slice": lambda o: o[:2][1],
    "tuple": lambda o: o.to_tuple()[1],
    "items": lambda o: dict(o.items())["logits"].exp(),
    "values": lambda o: torch.cat([v for v in o.values() if isinstance(v, torch.Tensor) and v.dim() == 3]),
    "dict": lambda o: {**o}["logits"],
    "field": lambda o: getattr(o, dataclasses.fields(o)[1].name),
    "comparison": lambda o: (o.logits > 0).float(),
    "converted": lambda o: convert_outputs_to_fp32(lambda: o)().logits,
    "detached": lambda o: torch.from_numpy(dict(o.items())["logits"].detach().numpy()),
    "list": lambda o: torch.tensor(dict(o.items())["logits"].tolist()),
    "in place": lambda o: o.logits.masked_fill_(o.logits < 0, 0.0),
    "numpy": lambda o: torch.tensor(dict(o.items())["logits"].detach().cpu().numpy()),
    "generic": lambda o: torch.utils._pytree.tree_map(lambda v: v * 2 if torch.is_tensor(v) else v, o).logits,
}


@pytest.mark.fidelity(
    "a language model's logits, read before or after its loss's backward pass",
    "computed when they are read; as stock",
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_every_way_to_the_logits(use, when):
    def shown(model, inputs):
        outputs = model(**inputs, use_cache=False)
        if when == "after":
            outputs.loss.backward()
        logits = use(outputs)
        assert type(logits) is torch.Tensor
        assert logits.shape == (3, 9, VOCABULARY)
        if when == "before":
            outputs.loss.backward()
        return logits.detach()

    assert_the_same(shown, *twins(), batch())


def test_the_output_is_stocks():
    stock, patched = (model(**batch()) for model in twins())
    assert repr(type(patched)) == repr(type(stock))
    assert isinstance(patched, type(stock))
    assert list(patched) == list(stock)
    assert len(patched) == len(stock)
    assert patched.logits is patched.logits is patched["logits"]
    assert patched.logits.requires_grad
    assert [(v.shape, v.dtype, v.device, v.dim(), v.requires_grad) for k, v in patched.items() if k == "logits"] == [
        (v.shape, v.dtype, v.device, v.dim(), v.requires_grad) for k, v in stock.items() if k == "logits"
    ]  # fmt: skip
    patched.logits = None
    assert patched.logits is None


def test_a_saved_output_is_stocks():
    stock, patched = twins()
    with torch.no_grad():
        expected, outputs = (model(**batch(), use_cache=False) for model in (stock, patched))
    deferred_logits = dict(outputs.items())["logits"]
    for copied in (pickle.loads(pickle.dumps(outputs)), copy.deepcopy(outputs)):
        assert type(copied) is type(expected)
        torch.testing.assert_close(copied.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert type(deferred_logits) is Logits
    assert type(pickle.loads(pickle.dumps(deferred_logits))) is torch.Tensor
    assert type(copy.deepcopy(deferred_logits)) is torch.Tensor


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits * logits

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy * ctx.saved_tensors[0]


GRADIENTS = {
    "both": lambda o: o.loss + o.logits.square().mean(),
    "the logits alone": lambda o: o.logits.square().mean(),
    "through an autograd function": lambda o: _Square.apply(dict(o.items())["logits"]).mean(),
    "of a torch function on items": lambda o: dict(o.items())["logits"].square().mean(),
    "retained": lambda o: (o.logits.retain_grad(), o.logits.square().mean())[1],
    "a distillation": lambda o: (
        o.loss + F.kl_div(o.logits.log_softmax(-1), torch.full_like(o.logits, 0.1), reduction="batchmean")
    ),
    "a loss of one's own on old shifts": lambda o: nn.CrossEntropyLoss()(
        o.logits[..., :-1, :].contiguous().view(-1, VOCABULARY), batch()["labels"][..., 1:].reshape(-1)
    ),
    "class probabilities": lambda o: F.cross_entropy(
        dict(o.items())["logits"].flatten(0, 1), torch.full((27, VOCABULARY), 1 / VOCABULARY)
    ),
    "class weights": lambda o: F.cross_entropy(
        dict(o.items())["logits"].view(-1, VOCABULARY), batch()["labels"].view(-1), torch.arange(61.0)
    ),
}


@pytest.mark.fidelity("losses of one's own on a language model's logits", "as stock")
@pytest.mark.parametrize("loss_of", GRADIENTS.values(), ids=list(GRADIENTS))
def test_gradients_of_the_logits(loss_of):
    def use(model, inputs):
        loss = loss_of(model(**inputs, use_cache=False))
        loss.backward()
        return loss.detach()

    stock, patched = twins()
    expected, result = ((use(model, batch()), gradients(model)) for model in (stock, patched))
    assert expected[1]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_second_derivatives():
    def use(model, inputs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(model(**inputs).loss, parameters, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return torch.stack([g.detach().norm() for g in first])

    assert_the_same(use, *twins(with_lora(gpt2(attn_implementation="eager"))), batch())


def test_a_method_that_outlives_unpatch_is_stocks():
    """accelerate keeps the bound forward of the model that it prepares."""
    stock, patched = twins()
    forward = patched.get_base_model().forward
    fastpeft.unpatch(patched)
    torch.testing.assert_close(forward(**batch()).loss, stock(**batch()).loss)


def test_a_forward_replaced_for_the_whole_class_sees_stock(monkeypatch):
    stock, patched = twins()
    own = GPT2LMHeadModel.forward

    def forward(self, *args, **kwargs):
        outputs = own(self, *args, **kwargs)
        self.last = outputs.loss.detach()
        return {"loss": outputs.loss, "logits": outputs.logits}

    monkeypatch.setattr(GPT2LMHeadModel, "forward", forward)
    results = [model.get_base_model()(**batch()) for model in (stock, patched)]
    torch.testing.assert_close(*results)
    assert patched.get_base_model().last == results[1]["loss"]


def test_a_linear_layers_forward_replaced_for_all(monkeypatch):
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) * 2)
    model = gpt2().requires_grad_(False)  # the head alone is a Linear
    model.transformer.ln_f.requires_grad_(True)
    assert_the_same(trained, *twins(model), batch(), "the forward of Linear was replaced")


def test_what_was_read_and_edited_stays_so():
    _, patched = twins()
    with torch.no_grad():
        outputs = patched(**batch())
        outputs.logits.mul_(0)
        logits = dict(outputs.items())["logits"]
        loss = F.cross_entropy(logits.view(-1, VOCABULARY).float(), batch()["labels"].view(-1))
    assert loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item())


def test_a_copy_of_an_output_keeps_what_was_added():
    _, patched = twins()
    with torch.no_grad():
        outputs = patched(**batch(), use_cache=False)
    outputs["extra"] = torch.ones(2)
    for copied in (copy.copy(outputs), copy.deepcopy(outputs), pickle.loads(pickle.dumps(outputs))):
        assert torch.equal(copied["extra"], outputs["extra"])
        assert type(copied.logits) is type(dict(copied.items())["logits"]) is torch.Tensor


def test_float64_is_rounded_as_stock_rounds_it():
    assert_the_same(trained, *twins(with_lora(gpt2()).double()), batch(), "float64 logits to float32")


def test_a_step_between_loss_and_logits():
    def use(model, inputs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        outputs = model(**inputs)
        outputs.loss.backward()
        optimizer.step()
        return outputs.logits.detach()

    assert_the_same(use, *twins(), batch())


@pytest.mark.fidelity(
    "a language model's head changed between a call and the reading of its logits",
    "error that names the remedy",
)
@pytest.mark.parametrize("change", [
    lambda model: model.get_base_model().lm_head.weight.mul_(2),
    lambda model: model.load_state_dict(model.state_dict()),
    lambda model: setattr(model.get_base_model().lm_head.weight, "data", torch.zeros(VOCABULARY, 48)),
], ids=["in place", "loaded", "replaced"])  # fmt: skip
def test_a_head_that_changed_before_the_logits_were_read(change):
    _, patched = twins()
    outputs = patched(**batch())
    with torch.no_grad():
        change(patched)
    with pytest.raises(RuntimeError, match="before the change"):
        _ = outputs.logits


def test_autocast_and_sixteen_bits():
    def use(model, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**inputs, use_cache=False)
        assert outputs.loss.dtype == torch.float32
        return outputs.logits.dtype == torch.bfloat16, outputs.loss.detach()

    stock, patched = twins()
    (_, expected), (_, result) = use(stock, batch()), use(patched, batch())
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)  # a bfloat16's
    for head in (GPT2LMHeadModel, GPT2DoubleHeadsModel):  # whose loss has the dtype of its logits
        stock, patched = twins(with_lora(gpt2(head)).bfloat16())
        losses = [model(**batch()).loss for model in (stock, patched)]
        assert losses[0].dtype == losses[1].dtype
        torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)
        assert loss_row(patched).calls == 1


def _hooked(model):
    seen = []
    model.get_base_model().lm_head.register_forward_hook(lambda _, __, y: seen.append(type(y)))
    return model


def _own_loss(model):
    model.get_base_model().loss_function = lambda logits, labels, **_: logits.square().mean()
    return model


def _trains(model):
    for parameter in model.get_base_model().lm_head.parameters():
        parameter.requires_grad_()
    return model


def _resized(model):
    model.resize_token_embeddings(70)
    return with_lora(model)


REASONS = {
    "a hook on lm_head": (lambda: _hooked(with_lora(gpt2())), "lm_head is more than a linear layer"),
    "a loss_function": (lambda: _own_loss(with_lora(gpt2())), "a loss_function of its own"),
    "a head that trains": (lambda: _trains(with_lora(gpt2())), "lm_head trains"),
    "LoRA on lm_head": (
        lambda: with_lora(gpt2(tie_word_embeddings=False), ("lm_head",), fan_in_fan_out=False), "more than",
    ),
    "modules_to_save": (
        lambda: with_lora(gpt2(tie_word_embeddings=False), ("c_attn",), modules_to_save=["lm_head"]), "more than",
    ),
    "token indices": (
        lambda: randomise(get_peft_model(
            gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[3, 4])
        ), "lora_B"), "more than",
    ),
    "a resized head": (lambda: _resized(gpt2()), None),
    "an untied head": (lambda: with_lora(gpt2(tie_word_embeddings=False)), None),
    "LoRA on the embedding": (lambda: with_lora(gpt2(tie_word_embeddings=False), ("wte",)), None),
}  # fmt: skip


@pytest.mark.fidelity(
    "a hook, LoRA, modules_to_save or trainable tokens on lm_head, a loss_function of one's own",
    "stock, with the reason",
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # peft 0.19
@pytest.mark.parametrize(("make", "reason"), REASONS.values(), ids=list(REASONS))
def test_a_head_of_another_kind(make, reason):
    def use(model, inputs):
        outputs = model(**inputs, use_cache=False)
        outputs.loss.backward()
        return outputs.loss.detach(), outputs.logits.detach()

    assert_the_same(use, *twins(make()), batch(), reason)


@pytest.mark.parametrize(("given", "reason"), [
    ({"return_dict": False}, "a tuple holds its logits"),
    ({"labels": None}, "no labels"),
], ids=["a tuple", "no labels"])  # fmt: skip
def test_a_call_of_another_kind(given, reason):
    def use(model, inputs):
        return model(**{**inputs, **given}, use_cache=False)[0].detach()

    assert_the_same(use, *twins(), batch(), reason)


def test_a_label_out_of_range_is_stocks_error():
    inputs = batch()
    inputs["labels"][1, 4] = VOCABULARY
    for model in twins():
        with pytest.raises(IndexError, match=str(VOCABULARY)):
            model(**inputs)


def test_the_layers_scope_and_unpatch_know_nothing_of_it():
    _, patched = twins(scope="layers")
    assert "loss" not in {row.kind for row in fastpeft.report(patched)}
    assert type(dict(patched(**batch()).items())["logits"]) is torch.Tensor
    _, patched = twins()
    assert type(dict(patched(**batch()).items())["logits"]) is Logits
    assert type(dict(fastpeft.unpatch(patched)(**batch()).items())["logits"]) is torch.Tensor


def test_torch_func_and_compile_are_stocks():
    stock, patched = twins()
    inputs = batch()

    def loss_of(model):
        parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, kwargs=inputs).loss)(parameters)

    torch.testing.assert_close(loss_of(patched), loss_of(stock), rtol=1e-4, atol=1e-5)
    stock, patched = twins(with_adapters(gpt2(n_layer=1)))
    patched.loss_type = "ForCausalLM"  # or transformers logs a line, which breaks the graph
    compiled = torch.compile(patched, backend="eager")(**inputs)
    torch.testing.assert_close(compiled.logits, stock(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert loss_row(patched).calls == 0


def test_what_the_compiler_calls_uncompiled_has_plain_logits(monkeypatch):
    monkeypatch.setattr(heads, "get_eval_frame_callback", lambda: object())
    assert_the_same(trained, *twins(), batch(), "torch.compile takes plain logits")


class _Sentences(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {name: value[i % 3] for name, value in batch((9, 4, 7)).items()}


@pytest.mark.fidelity(
    "Trainer on a language model: evaluation, label smoothing, bf16, accumulation",
    "loss without logits; with smoothing stock's",
)
@pytest.mark.parametrize("options", [
    {"prediction_loss_only": True}, {"prediction_loss_only": True, "bf16": True}, {"label_smoothing_factor": 0.1}, {},
], ids=["loss only", "bf16", "smoothing", "predictions"])  # fmt: skip
def test_trainer(options, tmp_path, monkeypatch):
    read = []
    computed = deferred._computed
    monkeypatch.setattr(
        deferred, "_computed", lambda v: (read.append(1) if type(v) is Logits else None, computed(v))[1]
    )
    figures = []
    for model in twins():
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=4, report_to=[],
            use_cpu=True, save_strategy="no", logging_steps=1, gradient_accumulation_steps=2, **options,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=_Sentences(), eval_dataset=_Sentences())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        figures.append(torch.tensor([*losses, trainer.evaluate()["eval_loss"]]))
    tolerance = 1e-2 if "bf16" in options else 1e-4
    torch.testing.assert_close(*figures, rtol=tolerance, atol=tolerance)
    assert not read if options.get("prediction_loss_only") else True
    assert loss_row(model).calls == (0 if "label_smoothing_factor" in options else 10)
