"""Drawn models under drawn sequences of operations: patched and unpatched twins agree after each one.

`make fuzz` draws thousands of sequences; the suite draws a hundred and fifty.
"""

from __future__ import annotations

import copy
import os
import tempfile
import types
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import gpt2, randomise, run_again, with_adapters
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import (
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

import fastpeft
from fastpeft import graphs

TARGETS = ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"]
SLOTS = ["post_embed", "post_attn", "post_mlp", "parallel_mlp", "post_block", "pre_head"]
VOCABULARY = 31

lora_configs = st.fixed_dictionaries(
    {
        "r": st.integers(1, 9),
        "lora_alpha": st.sampled_from([1, 8, 13]),
        "target_modules": st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
        "lora_dropout": st.sampled_from([0.0, 0.1, 0.6]),
        "use_rslora": st.booleans(),
        "lora_bias": st.booleans(),
        "use_dora": st.sampled_from([False, False, False, True]),
    }
).map(lambda lora: {**lora, "lora_bias": lora["lora_bias"] and not lora["use_dora"]})  # peft refuses both


def _returns(call):
    """Whether this call returns, rather than raises RuntimeError."""
    try:
        call()
    except RuntimeError:
        return False
    return True


class MeanHead(GPT2ForSequenceClassification):
    """A head of one's own, which reads every position, padding too."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **given):
        hidden = self.transformer(input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return types.SimpleNamespace(logits=self.score(hidden.mean(1)), loss=hidden.sin().mean())


def _have_room(slots):
    """Whether the MLP gets one adapter at most, after it or beside it."""
    return not {"post_mlp", "parallel_mlp"} <= set(slots)


def gpt2_of(model):
    return next(m for m in model.modules() if isinstance(m, GPT2Model))


class Around(nn.Module):
    """A module that looks along the sequence, around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        return self.inner(h) + 0.1 * F.pad(h, (0, 0, 1, 0))[:, :-1]


def along(module, args, output):
    """A hook that does, too; where it is always called, of no output after an error."""
    if output is None:
        return None
    first = output[0] if isinstance(output, tuple) else output
    changed = first + 0.1 * first.flip(1)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def shifted(self, *args, **kwargs):
    """A forward of an instance's own."""
    return type(self).forward(self, *args, **kwargs) * 1.1


HEADS = [
    GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2ForQuestionAnswering, MeanHead,
]  # fmt: skip
#: Where a user may put something, below GPT-2.
PLACES = ["wte", "drop", "h.0", "h.0.ln_1", "h.0.attn", "h.0.attn.c_attn", "h.0.mlp", "h.0.mlp.act", "ln_f"]


class Twins(RuleBasedStateMachine):
    """A model that is patched now and then, and one that never is; every operation happens to both."""

    def __init__(self):
        super().__init__()
        self.replays = ExitStack()  # on the CPU a graph is replayed by running again
        self.replays.enter_context(mock.patch.object(graphs, "capture", run_again))
        self.replays.enter_context(mock.patch.object(graphs, "why_not_device", return_value=None))

    def teardown(self):
        self.replays.close()

    @initialize(
        head=st.sampled_from(HEADS),
        width=st.sampled_from([8, 20, 32]),
        layers=st.integers(1, 2),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
        lora=lora_configs,
        slots=st.lists(st.sampled_from(SLOTS), max_size=2, unique=True).filter(_have_room),
        bottleneck=st.integers(1, 9),
        activation=st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"]),
        seed=st.integers(0, 99),
        scope=st.sampled_from(["layers", "model", "auto", "auto"]),
        graphs=st.booleans(),
    )
    def build(self, head, width, layers, dtype, lora, slots, bottleneck, activation, seed, scope, graphs):
        # Who asks for the model scope says that no padding is read.
        self.scope = "auto" if head in (MeanHead, GPT2ForQuestionAnswering) and scope == "model" else scope
        self.graphs = graphs and scope != "layers"
        model = gpt2(
            head,
            n_embd=width,
            n_head=4 if width != 20 else 5,
            n_layer=layers,
            vocab_size=VOCABULARY,
            seed=seed,
            classifier_dropout=0.0,
            # Eager attention's second derivatives torch has; graphs have none, and want no cache.
            attn_implementation="sdpa" if self.graphs else "eager",
            use_cache=not self.graphs,
        )
        self.base = copy.deepcopy(model).to(dtype)
        model = get_peft_model(model.to(dtype), self.config(lora))
        if slots:
            with_adapters(model, *slots, bottleneck=bottleneck, activation=activation)
        self.slots = slots
        self.adapters = ["default"]
        self.hooks = []
        self.changed = False
        self.merged = False
        self.stock = randomise(model, "lora_B").eval()
        self.patched = copy.deepcopy(self.stock)
        self.patch()
        self.dtype = dtype

    def config(self, lora):
        if self.scope != "layers":  # packed rows draw other masks
            lora = {**lora, "lora_dropout": 0.0}
        tasks = {GPT2LMHeadModel: "CAUSAL_LM", GPT2ForSequenceClassification: "SEQ_CLS"}
        return LoraConfig(**lora, fan_in_fan_out=True, task_type=tasks.get(type(self.base)))

    def twins(self):
        return self.patched, self.stock

    @rule()
    def patch(self):
        if self.scope == "layers":
            fastpeft.patch(self.patched, exact=True)
        else:
            fastpeft.patch(self.patched, scope=self.scope, graphs=self.graphs)
        self.is_patched = True

    @rule()
    def unpatch(self):
        fastpeft.unpatch(self.patched)
        self.is_patched = False

    @precondition(lambda self: len(self.adapters) < 3 and not self.merged)
    @rule(lora=lora_configs)
    def add_adapter(self, lora):
        name = f"adapter{len(self.adapters)}"
        places = [f".{place}" for place, _ in self.stock.named_modules()]
        # A module around another gives what is below it another name, and peft refuses what it doesn't find.
        assume(any(place.endswith(f".{each}") for place in places for each in lora["target_modules"]))
        lora["use_dora"] = False  # peft refuses to mix DoRA with others in one layer's batch
        for model in self.twins():
            model.add_adapter(name, self.config(lora))
            randomise(model, f".{name}.").eval()
        self.adapters.append(name)

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def set_adapter(self, data):
        names = data.draw(st.lists(st.sampled_from(self.adapters), min_size=1, unique=True))
        for model in self.twins():
            if not isinstance(self.base, GPT2ForSequenceClassification) or type(self.base) is MeanHead:
                model.base_model.set_adapter(names)
            else:  # a trained head allows one adapter at a time
                model.set_adapter(names[0])

    @rule(scale=st.sampled_from([0.0, 0.5, 2.0]))
    @precondition(lambda self: not self.merged)
    def set_scale(self, scale):
        for model in self.twins():
            for module in model.modules():
                if isinstance(module, LoraLinear):
                    for name in module.scaling:
                        module.set_scale(name, scale)

    @precondition(lambda self: not self.merged)
    @rule(safe=st.booleans())
    def merge(self, safe):
        for model in self.twins():
            model.merge_adapter(safe_merge=safe)
        self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        # Old versions of peft can't for DoRA on a Conv1D, and stop half-way.
        can = [_returns(model.unmerge_adapter) for model in self.twins()]
        assert len(set(can)) == 1
        assume(all(can))
        self.merged = False

    @rule(factor=st.sampled_from([0.9, 1.1]))
    @precondition(lambda self: not self.merged)
    def edit_weights(self, factor):
        with torch.no_grad():
            for model in self.twins():
                for parameter in model.parameters():
                    parameter.mul_(factor)

    @rule()
    def deepcopy(self):
        self.patched = copy.deepcopy(self.patched)

    @rule()
    def reload_state(self):
        for model in self.twins():
            model.load_state_dict(copy.deepcopy(self.stock.state_dict()))

    @rule(place=st.sampled_from(PLACES), always=st.booleans())
    def add_hook(self, place, always):
        self.hooks.append(
            [
                gpt2_of(m).get_submodule(place).register_forward_hook(along, always_call=always)
                for m in self.twins()
            ]
        )

    @precondition(lambda self: self.hooks)
    @rule()
    def remove_hooks(self):
        """Of every twin by hand: a copy's hooks have no handles."""
        for model in self.twins():
            for module in model.modules():
                for key in [key for key, hook in module._forward_hooks.items() if hook is along]:
                    del module._forward_hooks[key]
        self.hooks = []

    @precondition(lambda self: not self.changed)
    @rule(place=st.sampled_from(["drop", "h.0.mlp", "h.0.mlp.act", "ln_f"]), own=st.booleans())
    def change_a_module(self, place, own):
        for model in self.twins():
            module = gpt2_of(model).get_submodule(place)
            parent, _, name = place.rpartition(".")
            if own:
                module.forward = types.MethodType(shifted, module)
            else:
                setattr(gpt2_of(model).get_submodule(parent), name, Around(module).eval())
        self.changed = True

    @precondition(lambda self: not self.merged and not self.changed and self.adapters == ["default"])
    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.patched.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(copy.deepcopy(self.base), folder, is_trainable=True)
        if not self.slots:
            own = {n for n, _ in self.patched.named_parameters() if "lora_" in n}
            assert own == {n for n, _ in loaded.named_parameters() if "lora_" in n}
            for name in own:
                assert torch.equal(loaded.get_parameter(name), self.patched.get_parameter(name))

    @precondition(lambda self: not self.merged)
    @rule(seed=st.integers(0, 99), batch=st.integers(1, 3), length=st.integers(1, 6))
    def train_step(self, seed, batch, length):
        grads = []
        for model in self.twins():
            model.train()
            ids, mask = self.tokens(seed, batch, length)
            for _ in range(1 + self.graphs):  # a size is captured when it comes again
                torch.manual_seed(seed)
                model.zero_grad()
                self.real(
                    self.logits(model(input_ids=ids, attention_mask=mask)), mask
                ).double().square().mean().backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            model.eval()
        assert grads[0].keys() == grads[1].keys()
        largest = max((g.abs().max().item() for g in grads[1].values()), default=0.0)
        for name in grads[1]:
            self.assert_close(grads[0][name], grads[1][name], largest, name)
        with torch.no_grad():  # one step down, the same for both, so that rounding doesn't pile up
            for p, q in zip(self.patched.parameters(), self.stock.parameters(), strict=True):
                if q.grad is not None:
                    q.sub_(q.grad, alpha=1e-3)
                    p.copy_(q)

    @precondition(lambda self: not self.merged)
    @rule(seed=st.integers(0, 99), batch=st.integers(1, 3), over_padding=st.booleans(), twice=st.booleans())
    def differentiate(self, seed, batch, over_padding, twice):
        """The loss of labels, and its first or second derivatives by autograd.grad."""
        results, twice = [], twice and not self.graphs
        ids, mask = self.tokens(seed, batch, 5)
        for model in self.twins():
            ps = [p for p in model.parameters() if p.requires_grad]
            labels = self.labels(ids, mask, over_padding and self.scope != "model")
            for _ in range(1 + self.graphs):
                loss = model(input_ids=ids, attention_mask=mask, **labels).loss
                grads = torch.autograd.grad(loss, ps, create_graph=twice, allow_unused=True)
            if twice:
                total = sum(g.square().sum() for g in grads if g is not None)
                grads = torch.autograd.grad(total, ps, allow_unused=True)
            results.append([loss.detach(), *grads])
        self.assert_same_derivatives(results)

    @precondition(lambda self: not self.merged)
    @rule(data=st.data(), seed=st.integers(0, 99), batch=st.integers(1, 5))
    def differentiate_rows_apart(self, data, seed, batch):
        """The loss and its derivatives where each row uses an adapter of its own."""
        any_name = st.sampled_from([*self.adapters, "__base__"])
        names = data.draw(st.lists(any_name, min_size=batch, max_size=batch))
        results, errors = [], []
        ids, mask = self.tokens(seed, batch, 5)
        for model in self.twins():
            ps = [p for p in model.parameters() if p.requires_grad]
            labels = self.labels(ids, mask, False)
            try:
                with fastpeft.adapter_rows(model, names):
                    loss = model(input_ids=ids, attention_mask=mask, **labels).loss
            except ValueError as error:  # peft's, of DoRA
                errors.append(str(error))
                continue
            grads = torch.autograd.grad(loss, ps, allow_unused=True) if loss.requires_grad else ()
            results.append([loss.detach(), *grads])
        assert len(errors) in (0, 2)
        assert len(set(errors)) < 2
        if results:
            self.assert_same_derivatives(results)

    def assert_same_derivatives(self, results):
        largest = max((g.abs().max().item() for g in results[1] if g is not None), default=0.0)
        for ours, theirs in zip(*results, strict=True):
            zero = torch.zeros(()) if ours is None or theirs is None else None
            ours, theirs = (
                zero if t is None else t for t in (ours, theirs)
            )  # no gradient, or one that is zero
            self.assert_close(ours, theirs, largest, "a derivative")

    @precondition(lambda self: not self.merged)
    @rule(seed=st.integers(0, 99))
    def transform(self, seed):
        """torch.func.grad through functional_call."""
        ids, mask = self.tokens(seed, 2, 5)
        results = []
        for model in self.twins():
            ps = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

            def loss(ps, model=model):
                given = {"input_ids": ids, "attention_mask": mask, **self.labels(ids, mask, True)}
                return torch.func.functional_call(model, ps, (), given).loss

            results.append(torch.func.grad(loss)(ps))
        largest = max((g.abs().max().item() for g in results[1].values()), default=0.0)
        for name in results[1]:
            self.assert_close(results[0][name], results[1][name], largest, name)

    def labels(self, ids, mask, over_padding):
        if isinstance(self.base, GPT2ForQuestionAnswering):
            places = mask.argmax(1)
            return {"start_positions": places, "end_positions": places}
        if isinstance(self.base, GPT2ForSequenceClassification):
            return {"labels": ids[:, -1] % 2}
        labels = ids if isinstance(self.base, GPT2LMHeadModel) else ids % 2
        shown = mask.bool() & F.pad(mask.bool()[:, :-1], (1, 0), value=True)
        return {"labels": labels if over_padding else labels.masked_fill(~shown, -100)}

    @invariant()
    def agree(self):
        if not hasattr(self, "stock"):
            return
        ids, mask = self.tokens(3, 2, 5)
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            result, expected = (self.real(self.logits(m(**inputs)), mask) for m in self.twins())
        self.assert_close(result, expected, expected.abs().max().item(), "logits")
        assert list(self.patched.state_dict()) == list(self.stock.state_dict())
        rows = fastpeft.report(self.patched)
        if not self.is_patched:
            assert all(row.path == "stock" for row in rows)
        elif not self.merged:
            known = self.scope == "model" or type(self.base) is GPT2ForSequenceClassification
            packs = known and not self.hooks and not self.changed
            for row in rows:
                fusible = row.kind == "adapter" or (row.kind == "lora" and "Dora" not in row.reason)
                if row.kind == "packing":
                    assert row.path == ("torch" if packs else "stock"), row
                reasons = "no adapter is active", "not patched", "reads another tensor"
                excused = any(reason in row.reason for reason in reasons)
                if "base_layer has hooks" in row.reason:  # which came before there was LoRA around it
                    excused = bool(self.patched.get_submodule(f"{row.name}.base_layer")._forward_hooks)
                assert row.path == "torch" or not fusible or excused, row

    def tokens(self, seed, batch, length):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        return ids * mask, mask

    def logits(self, output):
        return output.logits if hasattr(output, "logits") else output.start_logits + 2 * output.end_logits

    def real(self, logits, mask):
        """In the model scope, the logits where there is no padding: stock leaves noise there, and packing zeros."""
        return logits[mask.bool()] if self.scope == "model" and logits.shape[:2] == mask.shape else logits

    def assert_close(self, result, expected, largest, what):
        """Within four hundred roundings of the largest element, which a wrong formula never is.

        Through a LayerNorm over eight numbers stock itself was seen 170 from float64, where the patched was 50.
        """
        allowed = 400 * torch.finfo(self.dtype).eps * max(largest, 1e-3)
        difference = (result.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        assert difference <= allowed, f"{what}: {difference:.2e} apart, {allowed:.2e} allowed"


TestTwins = Twins.TestCase
for ignored in (
    "ignore:Adapter .* LoRA tensor",  # peft takes the one-dimensional bias of lora_B for a shard
    "ignore:Already unmerged",  # a layer without an active adapter wasn't merged
):
    TestTwins = pytest.mark.filterwarnings(ignored)(TestTwins)
TestTwins.settings = settings(
    max_examples=int(os.environ.get("FASTPEFT_FUZZ_SEQUENCES", "150")),
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a sequence is short enough to read unshrunk
    report_multiple_bugs=False,
    print_blob=True,
    derandomize="FASTPEFT_FUZZ_SEQUENCES" not in os.environ,  # the suite draws the same sequences each time
)
