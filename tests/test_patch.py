"""What `patch`, `unpatch` and `report` do to a model, and what they leave alone."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from models import assert_fused, assert_same_files, assert_stock, gpt2, step, with_adapters, with_lora
from peft import PrefixTuningConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

import fastpeft
from fastpeft.fused_adapter import FusedAdapter
from fastpeft.lora import FusedLoraLinear
from fastpeft.modules import FusedGelu

HEADS = [
    GPT2Model,
    GPT2LMHeadModel,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2ForQuestionAnswering,
]
IDS = torch.arange(2, 12)[None]


class UserAdapter(nn.Module):
    """The adapter people write by hand."""

    def __init__(self, width=48, bottleneck=6, act=None):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.act = act or nn.GELU()
        self.up = nn.Linear(bottleneck, width)

    def forward(self, x):
        return x + self.up(self.act(self.down(x)))


def paths(model, kind):
    return {row.name: (row.path, row.reason) for row in fastpeft.report(model) if row.kind == kind}


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.fidelity("every head of GPT-2", "fused")
@pytest.mark.parametrize("head", HEADS)
def test_every_head_of_gpt2_is_patched_and_keeps_its_outputs(head):
    model = gpt2(head)
    stock = copy.deepcopy(model)
    assert fastpeft.patch(model) is model
    with torch.no_grad():
        outputs, expected = model.eval()(IDS), stock.eval()(IDS)
    assert_fused(model, ("activation",))
    assert_stock(stock)
    for key in expected:
        if torch.is_tensor(expected[key]):
            torch.testing.assert_close(outputs[key], expected[key])


def test_patch_keeps_keys_parameters_and_isinstance():
    model = with_adapters(with_lora(gpt2()), "post_mlp")
    keys = list(model.state_dict())
    parameters = list(model.parameters())
    fastpeft.patch(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    fused = [m for m in model.modules() if isinstance(m, FusedLoraLinear)]
    assert len(fused) == 8
    assert all(isinstance(m, LoraLinear) for m in fused)
    assert sum(isinstance(m, FusedAdapter) for m in model.modules()) == 2
    assert sum(isinstance(m, FusedGelu) for m in model.modules()) == 2


@pytest.mark.fidelity("unpatch, once and twice", "classes, attributes and bits as before")
def test_unpatch_restores_classes_attributes_and_bits():
    model = with_adapters(with_lora(gpt2(), lora_dropout=0.1), "post_mlp")
    before_classes = classes(model)
    before_dicts = [set(module.__dict__) for module in model.modules()]
    before = step(model)
    fastpeft.patch(model)
    step(model)
    assert_fused(model)
    assert fastpeft.unpatch(model) is model
    assert classes(model) == before_classes
    assert [set(module.__dict__) for module in model.modules()] == before_dicts
    after = step(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    fastpeft.unpatch(model)
    assert classes(model) == before_classes


@pytest.mark.fidelity("patch twice", "fused; takes up what was added since")
def test_patch_twice_keeps_the_counts_and_takes_up_what_was_added():
    model = fastpeft.patch(with_lora(gpt2()))
    step(model)
    with_adapters(model, "post_attn")
    assert paths(model, "adapter")["base_model.model.transformer.h.0.attn.adapter"] == (
        "stock",
        "not patched: call fastpeft.patch",
    )
    fastpeft.patch(model)
    assert classes(model).count(FusedLoraLinear) == 8
    assert {row.calls for row in fastpeft.report(model) if row.kind == "lora"} == {1}
    step(model)
    assert_fused(model)
    assert {row.calls for row in fastpeft.report(model) if row.kind == "lora"} == {2}
    assert {row.calls for row in fastpeft.report(model) if row.kind == "adapter"} == {1}


def test_the_report_reads_as_a_table():
    model = fastpeft.patch(with_lora(gpt2(n_layer=1), ["c_attn"]))
    rows = list(fastpeft.report(model))
    assert [tuple(row) for row in rows] == [
        ("base_model.model", "loss", "torch", "not called yet", 0),
        ("base_model.model.transformer", "packing", "torch", "not called yet", 0),
        ("base_model.model.transformer.h.0.attn.c_attn", "lora", "torch", rows[2].reason, 0),
        ("base_model.model.transformer.h.0.mlp.act", "activation", "torch", "one pass", 0),
    ]
    step(model)
    text = str(fastpeft.report(model)).splitlines()
    assert text[0].split() == ["name", "kind", "path", "reason", "calls"]
    assert "no labels: the logits are what is asked for" in text[1]
    assert text[3].endswith(" 1")
    assert text[-1] == "4 sites: 1 stock, 3 torch"
    model(input_ids=torch.ones(1, 9, dtype=torch.long), output_hidden_states=True)
    assert str(fastpeft.report(model)).endswith("4 sites: 2 stock, 2 torch")


def test_a_model_with_nothing_to_fuse_warns_and_under_strict_raises():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="found nothing to fuse in Sequential"):
        fastpeft.patch(model)
    with pytest.raises(ValueError, match="can't fuse anything in Sequential"):
        fastpeft.patch(model, strict=True)
    assert str(fastpeft.report(model)).endswith("0 sites: nothing to fuse")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"scope": "everything"}, "unknown scope 'everything'"),
    ],
)
def test_bad_arguments_change_nothing(options, words):
    model = with_lora(gpt2())
    before = classes(model)
    with pytest.raises(ValueError, match=words):
        fastpeft.patch(model, **options)
    assert classes(model) == before


def test_strict_names_every_site_that_cannot_be_fused_and_changes_nothing():
    model = with_lora(gpt2(), use_dora=True)
    before = classes(model)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn: adapter 'default' is Dora.*h\.1\.mlp\.c_proj"):
        fastpeft.patch(model, strict=True)
    assert classes(model) == before


def test_dora_stays_stock_with_the_reason():
    model = with_lora(gpt2(), use_dora=True)
    expected = step(copy.deepcopy(model))
    fastpeft.patch(model, exact=True)
    result = step(model)
    assert all(path == "stock" and "Dora" in reason for path, reason in paths(model, "lora").values())
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.fidelity("patching that raises midway", "error; nothing is changed")
def test_patching_fails_as_a_whole(monkeypatch):
    model = with_adapters(with_lora(gpt2()), "post_mlp")
    before = classes(model)

    def broken(module):
        raise RuntimeError("no")

    monkeypatch.setattr(sys.modules["fastpeft.patching"], "why_not_adapter", broken)
    with pytest.raises(RuntimeError, match="no"):
        fastpeft.patch(model)
    assert classes(model) == before


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), F.relu, torch.relu, F.gelu, F.silu],
    ids=lambda act: getattr(act, "__name__", str(act)),  # str of a function has its address
)
@pytest.mark.parametrize("injection", ["hook", "forward"])
def test_a_users_own_adapter_is_fused(act, injection):
    model = with_user_adapters(act, injection)
    stock = copy.deepcopy(model)
    fastpeft.patch(model)
    result, expected = step(model), step(stock)
    assert_fused(model, ("adapter",))
    assert_stock(stock)
    assert [name for name in result if "adapter" in name], "the adapter must have gradients"
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])


class AdaptedMLP(nn.Module):
    """The other common injection: a wrapper whose forward calls the adapter."""

    def __init__(self, mlp, adapter):
        super().__init__()
        self.mlp, self.adapter = mlp, adapter

    def forward(self, hidden_states):
        return self.adapter(self.mlp(hidden_states))


def adapt_output(module, args, output):
    return module.adapter(output)


def with_user_adapters(act, injection="hook"):
    model = gpt2()
    model.requires_grad_(False)
    for block in model.transformer.h:
        if injection == "hook":
            block.mlp.adapter = UserAdapter(act=act)
            block.mlp.register_forward_hook(adapt_output)
        else:
            block.mlp = AdaptedMLP(block.mlp, UserAdapter(act=act))
    return model


class Scaled(UserAdapter):
    scale = 0.25

    def forward(self, x):
        return x + self.scale * self.up(self.act(self.down(x)))


class Gated(UserAdapter):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))


class NoResidual(UserAdapter):
    def forward(self, x):
        return self.up(self.act(self.down(x)))


class Doubled(UserAdapter):
    def forward(self, x):
        return x + 2 * self.up(self.act(self.down(x)))


class HiddenDropout(UserAdapter):
    def forward(self, x):
        return x + F.dropout(self.up(self.act(self.down(x))), 0.5, self.training)


class WithNorm(UserAdapter):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(48)


class Switched(UserAdapter):
    enabled = True

    def forward(self, x):
        return x + self.up(self.act(self.down(x))) if self.enabled else x


class Detached(UserAdapter):
    def forward(self, x):
        return x + self.up(self.act(self.down(x.detach())))


class Remembering(UserAdapter):
    def forward(self, x):
        self.h = self.act(self.down(x))
        return x + self.up(self.h)


class FirstTokens(UserAdapter):
    def forward(self, x):
        return x + self.up(self.act(self.down(x[:, :4])))


class InPlace(UserAdapter):
    def forward(self, x):
        x += self.up(self.act(self.down(x)))
        return x


class Branching(Scaled):
    def forward(self, x):
        return x + self.scale * self.up(self.act(self.down(x))) if self.scale else x


class IdleScale(UserAdapter):
    scale = 1.0


class ScaledInput(UserAdapter):
    scale = 1.0

    def forward(self, x):
        return self.scale * x + self.up(self.act(self.down(x)))


class OwnLookUp(UserAdapter):
    def __getattr__(self, name):
        return super().__getattr__(name)


class Property(UserAdapter):
    @property
    def up(self):
        return self._modules["up"]


class Wider(UserAdapter):
    def forward(self, x, y):
        return x + self.up(self.act(self.down(y)))


class NoAct(UserAdapter):
    def __init__(self):
        super().__init__()
        del self.act


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (NoResidual(), "a probe shows that its forward isn't"),
        (Doubled(), "a probe shows that its forward isn't"),
        (HiddenDropout(), "its forward reads F, dropout, training beside down, act, up and scale"),
        (UserAdapter(act=nn.Tanh()), "activation Tanh is none of relu, gelu, gelu_tanh, silu"),
        (Gated(), "it has parameters or buffers of its own"),
        (WithNorm(), "it has submodules besides down, act and up: norm"),
        (Switched(), "its forward reads enabled beside"),
        (Detached(), "its forward reads detach beside"),
        (Remembering(), "its forward reads h beside"),
        (FirstTokens(), "its forward does more than call, add and multiply"),
        (InPlace(), "its forward does more than call, add and multiply"),
        (Branching(), "its forward does more than call, add and multiply"),
        (IdleScale(), "it has a scale that its forward doesn't read"),
        (ScaledInput(), "a probe shows that its forward isn't"),
        (OwnLookUp(), "looks attributes up, in a way of its own"),
        (Property(), "its class defines down or up itself"),
        (Wider(), "probing its forward raised TypeError"),
        (NoAct(), "it has no activation named `act`"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_users_module_that_computes_something_else_stays_stock(adapter, reason):
    nn.init.zeros_(adapter.up.weight)  # with a zero `up`, a probe of the weights as they are would agree
    nn.init.zeros_(adapter.up.bias)
    model = nn.Sequential(adapter)
    state = torch.get_rng_state()
    fastpeft.patch(model)
    assert type(model[0]) is type(adapter)
    ((path, why),) = paths(model, "adapter").values()
    assert path == "stock"
    assert reason in why
    assert torch.equal(torch.get_rng_state(), state)


def test_a_users_scale_is_read_at_each_call():
    adapter = Scaled()
    model = fastpeft.patch(nn.Sequential(adapter))
    x = torch.randn(3, 48)
    for scale in (0.25, 2.0):
        adapter.scale = scale
        torch.testing.assert_close(model(x), x + scale * adapter.up(adapter.act(adapter.down(x))))
    assert_fused(model, ("adapter",))


@pytest.mark.fidelity("hooks on base_layer, lora_A, lora_B or lora_dropout", "stock, with the reason")
@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_hooks_that_fusing_would_bypass_keep_a_layer_stock(part):
    model = fastpeft.patch(with_lora(gpt2(n_layer=1), ["c_fc"], lora_dropout=0.1))
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    seen = []
    handle = layer.get_submodule(part).register_forward_hook(lambda *args: seen.append(1))
    step(model)
    ((path, reason),) = paths(model, "lora").values()
    assert (path, bool(seen)) == ("stock", True)
    assert "hooks or a replaced forward" in reason
    handle.remove()
    step(model)
    assert_fused(model, ("lora",))


def test_a_replaced_forward_of_the_base_layer_is_not_bypassed():
    model = fastpeft.patch(with_lora(gpt2(n_layer=1), ["c_fc"]))
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    layer.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], 192)
    with torch.no_grad():
        y = layer(torch.ones(2, 48))
    ((path, reason),) = paths(model, "lora").values()
    assert (path, reason) == ("stock", "base_layer has hooks or a replaced forward")
    assert y.abs().max() < 5  # the update alone


def test_hooks_on_a_fused_module_run():
    model = fastpeft.patch(with_adapters(with_lora(gpt2(n_layer=1)), "post_mlp"))
    model.enable_input_require_grads()
    seen = []
    for module in model.modules():
        if isinstance(module, (FusedLoraLinear, FusedAdapter, FusedGelu)):
            module.register_forward_hook(lambda module, args, output: seen.append(module))
            module.register_full_backward_hook(lambda module, dx, dy: seen.append(module))
    step(model)
    assert_fused(model)
    assert len(seen) == 2 * 6


@pytest.mark.fidelity("deepcopy, pickle, torch.save of the whole model", "fused")
@pytest.mark.parametrize("copy_of", [
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
    lambda model: torch.load(_saved(model), weights_only=False),
], ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
def test_copies_of_a_patched_model_are_patched(copy_of):
    model = fastpeft.patch(with_adapters(with_lora(with_user_adapters(F.relu), ["c_attn"])))
    step(model)
    twin = copy_of(model)
    assert classes(twin) == classes(model)
    calls = [row.calls for row in fastpeft.report(model) if row.kind not in ("packing", "loss")]
    result, expected = step(twin), step(model)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    calls_of_twin = [row.calls for row in fastpeft.report(twin) if row.kind not in ("packing", "loss")]
    assert calls_of_twin == [n + 1 for n in calls]
    fastpeft.unpatch(twin)
    assert_stock(twin)
    assert_fused(model)


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.fidelity("config files", "no trace of a fused class")
def test_saved_configs_bear_no_trace(tmp_path):
    for name, patched in (("stock", False), ("patched", True)):
        model = with_lora(gpt2(GPT2ForSequenceClassification))
        if patched:
            fastpeft.patch(model)
            step(model)
        model.save_pretrained(tmp_path / name)
        model.base_model.model.save_pretrained(tmp_path / name / "base")
    assert_same_files(tmp_path / "stock", tmp_path / "patched")
    assert len(list((tmp_path / "stock").rglob("*.safetensors"))) == 2


@pytest.mark.fidelity("prefix tuning", "as stock; the activation is fused")
def test_prefix_tuning_gains_the_activation_and_works_as_stock():
    model = get_peft_model(gpt2(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    stock = copy.deepcopy(model)
    fastpeft.patch(model)
    result, expected = step(model), step(stock)
    assert_fused(model, ("activation",))
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])


def test_a_wrong_width_names_the_layer_and_both_shapes():
    model = fastpeft.patch(with_lora(gpt2(n_layer=1), ["c_fc"]))
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    with pytest.raises(
        ValueError, match=r"h\.0\.mlp\.c_fc: x has shape \(2, 47\).*weight of shape \(48, 192\)"
    ):
        layer(torch.ones(2, 47))


@pytest.mark.fidelity(
    "a kernel that can't be built", "the PyTorch path, named in the report; under strict an error"
)
def test_a_kernel_that_cannot_be_built(monkeypatch):
    from fastpeft.kernels import adapter, lora_chain

    for kernels in (lora_chain, adapter):
        monkeypatch.setattr(kernels, "ready", lambda *arguments: "out of shared memory")
    model = with_adapters(with_lora(gpt2(n_layer=1)), "post_mlp")
    expected = step(copy.deepcopy(model))
    fastpeft.patch(model, backend="triton")
    result = step(model)
    assert set(paths(model, "lora").values()) | set(paths(model, "adapter").values()) == {
        ("torch", "out of shared memory")
    }
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)
    fastpeft.patch(model, backend="triton", strict=True)
    with pytest.raises(RuntimeError, match="out of shared memory"):
        step(model)
