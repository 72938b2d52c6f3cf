"""One of two gloo processes, started by torchrun.

It runs a command of fastpeft's, then a step on half of a batch in every case, and writes gradients.
"""

from __future__ import annotations

import gc
import sys

import pytest
import torch
import torch.distributed as dist
from models import assert_fused, gpt2, with_adapters, with_lora
from peft.tuners.lora import Linear as LoraLinear
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import fastpeft
from fastpeft.__main__ import main as command_line
from fastpeft.adapters import Adapter

#: engine, kind, when the model is patched
CASES = [
    ("ddp", "lora", "before"),
    ("ddp-unused", "lora", "after"),
    ("ddp", "adapter", "after"),
    ("fsdp", "lora", "before"),
    ("fsdp", "lora", "after"),
    ("fsdp", "adapter", "before"),
    ("fsdp", "adapter", "after"),
    ("fsdp-sites", "lora", "before"),
    ("fsdp-sites", "lora", "after"),
    ("fsdp-sites", "adapter", "after"),
]


def build(kind):
    return with_lora(gpt2()) if kind == "lora" else with_adapters(gpt2(), "post_attn", "post_block")


def loss_of(model, ids):
    return model(input_ids=ids).logits.square().mean()


def tokens():
    return torch.randint(2, 61, (4, 7), generator=torch.Generator().manual_seed(0))


def sharded_classes(model):
    return [type(module) for module in model.modules() if type(module).__name__.startswith("FSDP")]


def wrap(model, engine):
    if engine.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=engine == "ddp-unused")
    sites = (LoraLinear, Adapter) if engine == "fsdp-sites" else ()
    for module in reversed(list(model.modules())):
        if isinstance(module, (GPT2Block, *sites)):
            fully_shard(module)
    return fully_shard(model)


def gradients(engine, kind, when):
    model = build(kind).train()
    if when == "before":
        fastpeft.patch(model)
    wrapped = wrap(model, engine)
    classes = sharded_classes(model)
    assert bool(classes) == engine.startswith("fsdp")
    if when == "after":
        fastpeft.patch(model)
    rank = dist.get_rank()
    loss_of(wrapped, tokens()[2 * rank : 2 * rank + 2]).backward()
    assert sharded_classes(model) == classes, "FSDP's classes must be left alone"
    if (engine, when) == ("fsdp-sites", "after"):
        rows = [row for row in fastpeft.report(model) if row.kind == kind]
        assert rows
        assert all(
            row.path == "stock" and f"isn't {'peft' if kind == 'lora' else 'fastpeft'}'s" in row.reason
            for row in rows
        )
    else:
        assert_fused(model, (kind,))
    if engine.startswith("fsdp") and when == "before":
        all_classes = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match="unpatch before you shard"):
            fastpeft.unpatch(model)
        assert [type(module) for module in model.modules()] == all_classes
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def run(command: list[str]) -> None:
    """`fastpeft` with these arguments, as its own process would."""
    sys.argv = ["fastpeft", *command]
    try:
        command_line()
    except SystemExit as end:
        if end.code:
            raise


def main(output: str, *command: str) -> None:
    torch.set_num_threads(1)
    run(list(command))
    assert dist.get_world_size() == 2  # of the group that the command made
    results = {case: gradients(*case) for case in CASES}
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.barrier()
    gc.collect()  # engines in reference cycles, whose threads would meet an interpreter that ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
