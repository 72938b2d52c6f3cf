"""One of two gloo processes, started by torchrun.

It runs a command of fastpeft's, then a step or some on half of a batch in every case, and writes gradients.
"""

from __future__ import annotations

import gc
import sys

import pytest
import torch
import torch.distributed as dist
from models import assert_fused, gpt2, run_again, with_adapters, with_lora
from peft.tuners.lora import Linear as LoraLinear
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2ForSequenceClassification
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import fastpeft
from fastpeft import graphs
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
    ("ddp", "graphs", "before"),
    ("ddp", "graphs", "after"),
    ("ddp-unused", "graphs", "before"),
]
#: Of four rows, each step; what comes a second time in a process is captured there, and replayed from then on.
LENGTHS = [[9, 4, 40, 35], [8, 5, 9, 3], [7, 6, 38, 33], [4, 9, 36, 39], [9, 6, 8, 2]]


def build(engine, kind):
    if kind == "adapter":
        return with_adapters(gpt2(), "post_attn", "post_block")
    if kind == "lora":
        return with_lora(gpt2())
    model = with_lora(gpt2(GPT2ForSequenceClassification, use_cache=False, n_positions=64))
    if engine == "ddp-unused":
        model.add_adapter("unused", model.peft_config["default"])
        model.set_requires_grad(["default", "unused"])
    return model.double()  # what sums up over steps cancels


def backward(model, kind, rows=slice(None)):
    """A step on these rows of the batch; of the kind `graphs` one for each batch, whose gradients add up."""
    generator = torch.Generator().manual_seed(0)
    if kind != "graphs":
        ids = torch.randint(2, 61, (4, 7), generator=generator)[rows]
        model(input_ids=ids).logits.square().mean().backward()
        return
    for lengths in LENGTHS:
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(2, 61, mask.shape, generator=generator) * mask
        given = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2}
        model(**{name: t[rows] for name, t in given.items()}).loss.backward()


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
    model = build(engine, kind).train()
    options = {"graphs": kind == "graphs"}
    if when == "before":
        fastpeft.patch(model, **options)
    wrapped = wrap(model, engine)
    classes = sharded_classes(model)
    assert bool(classes) == engine.startswith("fsdp")
    if when == "after":
        fastpeft.patch(model, **options)
    rank = dist.get_rank()
    backward(wrapped, kind, slice(2 * rank, 2 * rank + 2))
    assert sharded_classes(model) == classes, "FSDP's classes must be left alone"
    if (engine, when) == ("fsdp-sites", "after"):
        rows = [row for row in fastpeft.report(model) if row.kind == kind]
        assert rows
        assert all(
            row.path == "stock" and f"isn't {'peft' if kind == 'lora' else 'fastpeft'}'s" in row.reason
            for row in rows
        )
    elif kind == "graphs":
        assert_fused(model, ("lora",))
        reason = model.base_model.model.transformer._fastpeft.last.reason
        assert reason.endswith("replayed as a graph"), (engine, when, reason)
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
    graphs.capture, graphs.why_not_device = run_again, lambda device: None
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
