"""Drawn models under drawn sequences of operations: patched and unpatched twins agree after each one.

`make fuzz` draws thousands of sequences; the suite draws a few hundred.
"""

from __future__ import annotations

import copy
import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import gpt2, randomise, with_adapters
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

import fastpeft

TARGETS = ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"]
SLOTS = ["post_embed", "post_attn", "post_mlp", "post_block", "pre_head"]
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


class Twins(RuleBasedStateMachine):
    """A model that is patched now and then, and one that never is; every operation happens to both."""

    @initialize(
        head=st.sampled_from([GPT2LMHeadModel, GPT2ForSequenceClassification]),
        width=st.sampled_from([8, 20, 32]),
        layers=st.integers(1, 2),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
        lora=lora_configs,
        slots=st.lists(st.sampled_from(SLOTS), max_size=2, unique=True),
        bottleneck=st.integers(1, 9),
        activation=st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"]),
        seed=st.integers(0, 99),
        scope=st.sampled_from(["layers", "model"]),
    )
    def build(self, head, width, layers, dtype, lora, slots, bottleneck, activation, seed, scope):
        self.scope = scope
        model = gpt2(
            head,
            n_embd=width,
            n_head=4 if width != 20 else 5,
            n_layer=layers,
            vocab_size=VOCABULARY,
            seed=seed,
        )
        self.base = copy.deepcopy(model).to(dtype)
        model = get_peft_model(model.to(dtype), self.config(lora))
        if slots:
            with_adapters(model, *slots, bottleneck=bottleneck, activation=activation)
        self.slots = slots
        self.adapters = ["default"]
        self.merged = False
        self.stock = randomise(model, "lora_B").eval()
        self.patched = copy.deepcopy(self.stock)
        self.patch()
        self.dtype = dtype

    def config(self, lora):
        if self.scope == "model":  # packed rows draw other masks
            lora = {**lora, "lora_dropout": 0.0}
        task = "CAUSAL_LM" if isinstance(self.base, GPT2LMHeadModel) else "SEQ_CLS"
        return LoraConfig(**lora, fan_in_fan_out=True, task_type=task)

    def twins(self):
        return self.patched, self.stock

    @rule()
    def patch(self):
        if self.scope == "layers":
            fastpeft.patch(self.patched, exact=True)
        else:
            fastpeft.patch(self.patched, scope="model")
        self.is_patched = True

    @rule()
    def unpatch(self):
        fastpeft.unpatch(self.patched)
        self.is_patched = False

    @precondition(lambda self: len(self.adapters) < 3 and not self.merged)
    @rule(lora=lora_configs)
    def add_adapter(self, lora):
        name = f"adapter{len(self.adapters)}"
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
            if isinstance(self.base, GPT2LMHeadModel):
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
        for model in self.twins():
            model.unmerge_adapter()
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

    @precondition(lambda self: not self.merged and self.adapters == ["default"])
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
            torch.manual_seed(seed)
            model.zero_grad()
            self.real(
                model(input_ids=ids, attention_mask=mask).logits, mask
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

    @invariant()
    def agree(self):
        if not hasattr(self, "stock"):
            return
        ids, mask = self.tokens(3, 2, 5)
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            result, expected = (self.real(m(**inputs).logits, mask) for m in self.twins())
        self.assert_close(result, expected, expected.abs().max().item(), "logits")
        assert list(self.patched.state_dict()) == list(self.stock.state_dict())
        rows = fastpeft.report(self.patched)
        if not self.is_patched:
            assert all(row.path == "stock" for row in rows)
        elif not self.merged:
            for row in rows:
                fusible = row.kind in ("adapter", "packing") or (
                    row.kind == "lora" and "Dora" not in row.reason
                )
                excused = "no adapter is active" in row.reason or "not patched" in row.reason
                assert row.path == "torch" or not fusible or excused, row

    def tokens(self, seed, batch, length):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        return ids * mask, mask

    def real(self, logits, mask):
        """The logits where there is no padding: stock leaves noise there, and packing zeros."""
        return logits[mask.bool()] if logits.shape[:2] == mask.shape else logits

    def assert_close(self, result, expected, largest, what):
        """Within a hundred roundings of the largest element, which a wrong formula never is."""
        allowed = 100 * torch.finfo(self.dtype).eps * max(largest, 1e-3)
        difference = (result.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        assert difference <= allowed, f"{what}: {difference:.2e} apart, {allowed:.2e} allowed"


TestTwins = Twins.TestCase
for ignored in (
    "ignore:Adapter .* LoRA tensor",  # peft takes the one-dimensional bias of lora_B for a shard
    "ignore:Already unmerged",  # a layer without an active adapter wasn't merged
):
    TestTwins = pytest.mark.filterwarnings(ignored)(TestTwins)
TestTwins.settings = settings(
    max_examples=int(os.environ.get("FASTPEFT_FUZZ_SEQUENCES", "300")),
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a sequence is short enough to read unshrunk
    report_multiple_bugs=False,
    print_blob=True,
    derandomize="FASTPEFT_FUZZ_SEQUENCES" not in os.environ,  # the suite draws the same sequences each time
)
