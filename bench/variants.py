"""Whole GPT-2 models in each of the ways they are compared, and the check that each computes the same.

The variants of one base share its frozen weights; what trains has the same values in each and is its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from cases import ADAPTER_SLOTS, BOTTLENECK, DTYPES, LORA_TARGETS, MODELS
from check import Wrong, hold
from peft import LoraConfig, get_peft_model
from record import noted
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import fastpeft

HEADS = {"lm": GPT2LMHeadModel, "classifier": GPT2ForSequenceClassification}
#: Variant and what it is measured against. `frozen` is the floor: nothing trains, but gradients flow through.
#: `fastpeft_model` runs GPT-2 on packed tokens too (the default, scope="auto"), `fastpeft_graphs` as CUDA graphs.
BASELINES = {
    "lora": {
        "frozen": "peft",
        "peft": "peft",
        "peft_fp32": "peft",
        "compile": "peft",
        "compile_graphs": "peft",
        "fastpeft": "peft",
        "fastpeft_model": "peft",
        "fastpeft_graphs": "peft",
        "fastpeft_fp32": "peft_fp32",
        "exact": "peft",
    },
    "adapter": {
        "frozen": "eager",
        "eager": "eager",
        "compile": "eager",
        "compile_graphs": "eager",
        "fastpeft": "eager",
        "fastpeft_model": "eager",
        "fastpeft_graphs": "eager",
    },
}
#: The variants that torch.compile makes of the stock model, each with its mode.
COMPILED = {"compile": "default", "compile_graphs": "reduce-overhead"}


class Setting(NamedTuple):
    """What the variants have in common."""

    model: str  # a name in cases.MODELS
    method: str  # lora or adapter
    dtype: str
    dropout: float  # LoRA's
    rank: int
    head: str
    device: str
    model_dropout: float = 0.0  # GPT-2's own, for all variants


def variants_of(setting: Setting) -> dict[str, str]:
    """The variants that exist for a setting, each with its baseline."""
    # Factors kept float32 are a variant of their own only where the model isn't float32.
    return {
        variant: baseline
        for variant, baseline in BASELINES[setting.method].items()
        if (setting.dtype != "fp32" or not variant.endswith("_fp32"))
        and (setting.device == "cuda" or not variant.endswith("_graphs"))
    }


def packs(name: str) -> bool:
    """Whether a variant runs on packed tokens."""
    return name in ("fastpeft_model", "fastpeft_graphs")


def build(setting: Setting, names: list[str], failed: dict[str, str] | None = None) -> dict[str, nn.Module]:
    """The models of the named variants, in training mode; one that can't be built is noted in `failed`."""
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    drops: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), setting.model_dropout)
    config = GPT2Config(**{**MODELS[setting.model], **drops, **tokens}, use_cache=False)
    head: Any = HEADS[setting.head]
    base: nn.Module = head(config).to(setting.device, DTYPES[setting.dtype])
    base.requires_grad_(False)
    stock = with_lora(base, setting) if setting.method == "lora" else with_adapters(base)
    models: dict[str, nn.Module] = {}
    for name in names:
        with noted(failed, name):
            models[name] = _variant(name, base if name == "frozen" else stock, setting)
    return models


def _variant(name: str, model: Any, setting: Setting) -> nn.Module:
    model = twin(model)
    if name == "frozen":
        model.enable_input_require_grads()
    if name.endswith("_fp32"):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if name.startswith(("fastpeft", "exact")):
        scope = "auto" if packs(name) else "layers"
        graphs = name == "fastpeft_graphs"
        fastpeft.patch(model, strict=True, exact=name == "exact", scope=scope, graphs=graphs)
    return model.train()


def with_lora(base: nn.Module, setting: Setting) -> nn.Module:
    """A twin of `base` under peft LoRA, factors in the base's dtype, `lora_B` nonzero."""
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        lora_dropout=setting.dropout,
        target_modules=list(LORA_TARGETS),
        fan_in_fan_out=True,
    )
    return randomised(get_peft_model(twin(base), config, autocast_adapter_dtype=False), "lora_B")


def with_adapters(base: nn.Module) -> nn.Module:
    """A twin of `base` with bottleneck adapters, `up` nonzero."""
    config = fastpeft.AdapterConfig(slots=ADAPTER_SLOTS, bottleneck=BOTTLENECK)
    return randomised(fastpeft.add_adapters(twin(base), config), "adapter.up.weight")


def randomised(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def twin(model: nn.Module) -> Any:
    """A copy of `model` that shares its frozen parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def size_of(setting: Setting, name: str) -> int:
    """What a setting's model has of a size that `GPT2Config` names."""
    return MODELS[setting.model].get(name, getattr(GPT2Config(), name))


def batch_of(setting: Setting, lengths: list[int]) -> dict[str, Tensor]:
    """Random tokens in rows of these lengths, padded to the longest, with labels for the head."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, size_of(setting, "vocab_size"), shape, generator=generator) * mask
    labels = ids.masked_fill(mask == 0, -100) if setting.head == "lm" else ids[:, 0] % 2
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}


def check(
    models: dict[str, nn.Module], setting: Setting, failed: dict[str, str] | None = None
) -> dict[str, nn.Module]:
    """Hold logits and gradients of each variant against its baseline, both measured against float64.

    A variant may err twice as much as stock does in the same dtype, plus one rounding. LoRA's dropout is off,
    but for `exact` on the CPU, which draws stock's masks.

    Returns:
        The models that pass; without `failed`, where the others are noted, an error is raised.

    Raises:
        Wrong: a variant is further off, or its report says that it ran other code than its name promises.
    """
    # Padded, or nothing would be packed, and many: of a classifier's few logits, stock's own error is luck.
    batch = batch_of(setting, [16, 9, 8, 7, 6, 5, 4, 1] * 4)
    stock = models.get(BASELINES[setting.method]["fastpeft"])
    truth = copy.deepcopy(stock).double() if stock else None
    passed: dict[str, nn.Module] = {}
    for name, model in models.items():
        with noted(failed, name):
            if name == "frozen":
                if not torch.isfinite(model(**batch).loss):
                    raise Wrong("frozen: the loss isn't finite")
            elif stock is None or truth is None:
                raise Wrong(f"{name}: what it is held against couldn't be built")
            else:
                training = name == "exact" and setting.device == "cpu"
                exact, expected, found = (results(m, batch, training) for m in (truth, stock, model))
                for part in exact:
                    hold(f"{name}: {part}", found[part], expected[part], exact[part])
            _assert_runs_its_own_code(name, model)
            passed[name] = model
    return passed


def results(model: nn.Module, batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
    """Logits, and the gradients of everything that trains, joined by role."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(3)
    out = model(**batch)
    out.loss.backward()
    model.train()
    logits = out.logits.detach()
    if logits.shape[:2] == batch["input_ids"].shape:  # what stock leaves in the padding is noise
        logits = logits[batch["attention_mask"].bool()]
    return {"logits": logits, **{role: torch.cat(grads) for role, grads in _gradients(model)}}


def _gradients(model: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    roles: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                raise Wrong(f"{name} trains and got no gradient")
            role = next(part for part in ("lora_A", "lora_B", "down", "up") if f".{part}." in name)
            roles.setdefault(f"gradient of {role}", []).append(parameter.grad.flatten())
    yield from roles.items()


def _assert_runs_its_own_code(name: str, model: nn.Module) -> None:
    rows = [row for row in fastpeft.report(model) if row.kind in ("lora", "adapter")]
    fused = [row for row in rows if row.path != "stock" and row.calls > 0]
    expected = len(rows) if name.startswith(("fastpeft", "exact")) else 0
    packed = packed_calls(model) > 0
    if len(fused) != expected or bool(rows) == (name == "frozen") or packed != packs(name):
        raise Wrong(f"{name} doesn't run the code it is named for:\n{fastpeft.report(model)}")


def packed_calls(model: nn.Module) -> int:
    """How many calls of a model ran on packed tokens so far."""
    return sum(row.calls for row in fastpeft.report(model) if row.kind == "packing")
