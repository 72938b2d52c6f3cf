"""Small models, and how tests compare a patched one with its stock twin."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tolerances import assert_as_good_as
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2PreTrainedModel

import fastpeft

TINY = {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 61, "n_positions": 32}
ALL_PROJECTIONS = ("c_attn", "c_proj", "c_fc")


def gpt2(head: type = GPT2LMHeadModel, seed: int = 0, **overrides: Any) -> nn.Module:
    """A GPT-2 with random weights, tiny unless `overrides` say otherwise, its dropouts off."""
    torch.manual_seed(seed)
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return head(GPT2Config(**{**TINY, **dropouts, **tokens, **overrides}))


def with_lora(model: nn.Module, targets: Any = ALL_PROJECTIONS, **config: Any) -> nn.Module:
    """`model` under peft LoRA, with lora_b nonzero: it starts at zero, which would hide half the mistakes."""
    task = "SEQ_CLS" if isinstance(model, GPT2ForSequenceClassification) else "CAUSAL_LM"
    targets = targets if isinstance(targets, str) else list(targets)
    conv1d = isinstance(model, GPT2PreTrainedModel)
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets,
        "task_type": task,
        "fan_in_fan_out": conv1d,
    }
    model = get_peft_model(model, LoraConfig(**{**defaults, **config}))
    return randomise(model, "lora_B")


def with_adapters(model: nn.Module, *slots: str, **config: Any) -> nn.Module:
    """`model` with bottleneck adapters of nonzero `up`."""
    fastpeft.add_adapters(
        model, fastpeft.AdapterConfig(slots or ("post_attn",), **{"bottleneck": 8, **config})
    )
    return randomise(model, "adapter.up")


def randomise(model: nn.Module, part: str) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def step(model: nn.Module, seed: int = 7, batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Logits, loss and every gradient of one training step on fixed tokens, dropout seeded."""
    vocab = model.config.vocab_size
    ids = torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    logits = model(input_ids=ids).logits
    logits.double().square().sum().backward()  # a mean would push float16 gradients below its normal range
    grads = {f"grad of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def checkpointing(model: Any, use_reentrant: bool = False) -> None:
    """Has a transformers model compute its blocks again in backward; older versions have the other name."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": use_reentrant})


def run_again(run: Callable[[], None], pool: Any, stream: Any) -> Callable[[], None]:
    """Stands for `graphs.capture` where nothing can be captured: a replay runs again, on the same buffers."""
    run()
    return run


def draws_of(model: nn.Module) -> int:
    """How many draws `assert_as_good_over_draws` needs: 16 behind a head of two numbers, else a few."""
    two = any(getattr(module, "out_features", 0) == 2 for module in model.modules())
    return 16 if two else 4


def assert_as_good_over_draws(
    models: Sequence[nn.Module], outcome: Callable[[nn.Module, int], dict[str, Tensor]], draws: int = 16
) -> None:
    """Hold `outcome(model, draw)` of a patched model to its stock twin's, both against a float64 twin's.

    Errors are taken over all draws, and over all layers where gradients have one role (say `down.bias`): behind a
    head of two numbers gradients differ in two directions only, so that one draw compares luck. 16 give 32 numbers.
    """
    results = [[outcome(model, draw) for draw in range(draws)] for model in models]
    names = {tuple(each) for result in results for each in result}
    assert len(names) == 1, "not the same gradients everywhere"
    roles: dict[str, list[str]] = {}
    for name in names.pop():
        roles.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    assert len(roles) > 1, "no gradients"
    for role, names_of_role in roles.items():
        fused, pytorch, truth = (
            torch.cat([each[name].flatten() for each in result for name in names_of_role])
            for result in results
        )
        assert_as_good_as(fused, pytorch, truth, role)


def assert_same_files(folder: Path, other: Path) -> None:
    """The same files with the same bytes; peft writes a set in an order of its own into its config."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        mine, theirs = (folder / name).read_bytes(), (other / name).read_bytes()
        if name.name == "adapter_config.json":
            mine, theirs = (
                {k: sorted(v) if k == "target_modules" else v for k, v in json.loads(data).items()}
                for data in (mine, theirs)
            )
        assert mine == theirs, name


def assert_stock(model: nn.Module) -> None:
    rows = fastpeft.report(model)
    assert rows, "nothing to fuse: this comparison would compare nothing"
    assert all(row.path == "stock" and row.calls == 0 for row in rows), str(rows)


def assert_fused(model: nn.Module, kinds: tuple[str, ...] = ("lora", "adapter"), path: str = "torch") -> None:
    rows = [row for row in fastpeft.report(model) if row.kind in kinds]
    assert rows, f"no site of kind {kinds}"
    assert all(row.path == path and row.calls > 0 for row in rows), str(fastpeft.report(model))


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The model, an unpatched twin of the same dtype, and an unpatched float64 twin for truth."""
    return model, copy.deepcopy(model), copy.deepcopy(model).double()
