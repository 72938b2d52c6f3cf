"""Many adapters on one frozen GPT-2 at once: runs trained side by side, and rows of a batch with adapters of their own.

    python bench/together.py [--model small] [--head lm] [--runs 8] [--batch 4] [--seq 32] [--rows 1 8 64]
        [--adapters 1 8 64] [--dropout 0.05] [--rounds N] [--json FILE [--resume]] [--minutes N]

A training step is all of one: batch, loss, backward, each run's gradient clipped, AdamW; of so many runs, by
`fastpeft.Sweep` at once, or one after another by transformers' Trainer, patched and not. Inference is a classifier's
forward pass without gradients, of rows that take the adapters in turn: by `adapter_names` patched and not, and patched
with one adapter for all rows.

Rounds, ratios and figures as in throughput.py. Before a point is timed, logits by both `adapter_names` are compared, or
reports show that patched sides ran fused code.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import record
import tables
import throughput
import torch
import variants
from cases import DTYPES, LORA_TARGETS, MODELS
from check import Wrong
from peft import LoraConfig, get_peft_model
from throughput import Batch
from torch import nn
from transformers import GPT2Config, Trainer, TrainingArguments, set_seed

import fastpeft

#: Each variant of a point, and what its speed-up is over.
BASELINES = {
    "training": {"peft_apart": "peft_apart", "fastpeft_apart": "peft_apart", "together": "fastpeft_apart"},
    "inference": {"peft_rows": "peft_rows", "one_adapter": "one_adapter", "fastpeft_rows": "peft_rows"},
}


def runs_of(count: int, rank: int, dropout: float) -> list[fastpeft.Run]:
    """Runs that differ in nothing but their seed."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=list(LORA_TARGETS),
        fan_in_fan_out=True,
    )
    return [fastpeft.Run(f"run{i}", config, learning_rate=1e-4, seed=i) for i in range(count)]


def trainers(base: nn.Module, runs: list[fastpeft.Run], variant: str, **patching: Any) -> list[Any]:
    """What trains these runs on a frozen base: a Trainer each, or one for all."""
    device = next(base.parameters()).device
    folder = tempfile.mkdtemp()
    options: dict[str, Any] = {"learning_rate": runs[0].learning_rate, "use_cpu": device.type == "cpu"}
    given = TrainingArguments(folder, **options, report_to="none", disable_tqdm=True)
    if variant == "together":
        sweep = fastpeft.Sweep(variants.twin(base), runs, given, [0])
        fastpeft.patch(sweep.model, **patching)
        return [sweep.trainer]
    found = []
    for run in runs:
        set_seed(run.seed or 0)  # as a sweep does
        model = get_peft_model(variants.twin(base), cast(LoraConfig, copy.deepcopy(run.config)))
        if variant == "fastpeft_apart":
            fastpeft.patch(model, **patching)
        found.append(Trainer(model, given))
    return found


def training(each: list[Any], batch: Batch) -> Callable[..., None]:
    """A step of all runs on a batch that holds theirs one below the other."""
    parts = {key: tensor.chunk(len(each)) for key, tensor in batch.items()}
    batches = [{key: part[i] for key, part in parts.items()} for i in range(len(each))]
    for trainer in each:
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1

    def step(_: Any = None) -> None:
        for trainer, own in zip(each, batches, strict=True):
            (given,), counts = trainer.get_batch_samples(iter([own]), 1, trainer.args.device)
            trainer.training_step(trainer.model, given, counts)
            trainer._clip_grad_norm(trainer.model)
            trainer.optimizer.step()
            trainer.model.zero_grad()

    return step


def base_of(args: argparse.Namespace, dtype: str, head: str, device: str) -> nn.Module:
    """A frozen GPT-2 with its own dropouts off."""
    torch.manual_seed(0)
    drops: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model: Any = variants.HEADS[head](
        GPT2Config(**{**MODELS[args.model], **drops, **tokens}, use_cache=False)
    )
    return model.to(device, DTYPES[dtype]).requires_grad_(False)


def setting_of(args: argparse.Namespace, dtype: str, head: str, device: str) -> variants.Setting:
    return variants.Setting(args.model, "lora", dtype, args.dropout, args.rank, head, device)


def of_training(args: argparse.Namespace, dtype: str, device: str) -> dict[str, Callable[[Batch], None]]:
    """A step a variant, whose runs have made one each, with the same losses."""
    base, runs = base_of(args, dtype, args.head, device), runs_of(args.runs, args.rank, args.dropout)
    batch = variants.batch_of(setting_of(args, dtype, args.head, device), [args.seq] * args.batch * args.runs)
    steps = {}
    for name in BASELINES["training"]:
        each = trainers(base, runs, name)
        steps[name] = training(each, batch)
        steps[name](batch)
        stock = [
            row
            for t in each
            for row in fastpeft.report(t.model)
            if row.kind == "lora" and row.path == "stock"
        ]
        if bool(stock) != (name == "peft_apart"):
            raise Wrong(f"{name} doesn't run the code it is named for:\n{fastpeft.report(each[0].model)}")
    return steps


def of_inference(args: argparse.Namespace, dtype: str, device: str, rows: int, adapters: int) -> Any:
    """A step a variant, whose logits are the same."""
    setting = setting_of(args, dtype, "classifier", device)
    base, runs = base_of(args, dtype, "classifier", device), runs_of(adapters, args.rank, 0.0)
    first = cast(LoraConfig, copy.deepcopy(runs[0].config))
    stock: Any = get_peft_model(base, first, adapter_name=runs[0].name)
    for run in runs[1:]:
        stock.add_adapter(run.name, copy.deepcopy(run.config))
    variants.randomised(stock.to(DTYPES[dtype]), "lora_B").requires_grad_(False).eval()
    patched = fastpeft.patch(variants.twin(stock))
    batch = variants.batch_of(setting, [args.seq] * rows)
    names = [runs[row % adapters].name for row in range(rows)]
    calls: dict[str, Callable[[], Any]] = {
        "peft_rows": partial(stock, batch["input_ids"], adapter_names=names),
        "one_adapter": partial(patched, batch["input_ids"]),
        "fastpeft_rows": partial(patched, batch["input_ids"], adapter_names=names),
    }
    with torch.no_grad():
        logits = {name: call().logits for name, call in calls.items()}
    within = 1e-3 if dtype == "fp32" else 5e-2
    torch.testing.assert_close(logits["fastpeft_rows"], logits["peft_rows"], rtol=within, atol=within)

    def step(call: Callable[[], Any], _: Batch) -> None:
        with torch.no_grad():
            call()

    return {name: partial(step, call) for name, call in calls.items()}


def point(
    steps: dict[str, Callable[[Batch], None]], about: dict[str, Any], failed: dict[str, str]
) -> dict[str, Any]:
    """Measure the variants of a point in turn."""
    tokens = about["batch"] * about["seq"] * (about["adapters"] if about["mode"] == "training" else 1)
    rounds: list[Batch] = [{}] * (throughput.WARM_UP + about["rounds"])
    taken = throughput.seconds(steps, rounds, about["device"], failed)
    found: dict[str, Any] = {}
    for name, times in taken.items():
        found[name] = {
            "seconds": record.spread(times),
            "tokens_per_second": record.spread([tokens / each for each in times]),
        }
        baseline = BASELINES[about["mode"]][name]
        if baseline in taken:
            found[name]["speedup"] = {"over": baseline, **throughput.ratios(taken[baseline], times)}
        if name == "fastpeft_rows" and "one_adapter" in taken:
            found[name]["over_one"] = throughput.ratios(times, taken["one_adapter"])
    return found | {name: {"failed": line} for name, line in failed.items()}


def abouts(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """What tells the points from one another."""
    shared = {
        "model": args.model,
        "rank": args.rank,
        "seq": args.seq,
        "device": device,
        "rounds": args.rounds,
    }
    found = []
    for dtype in args.dtype:
        sizes = {"dtype": dtype, **shared}
        if args.runs:
            found.append(
                {
                    "mode": "training",
                    **sizes,
                    "head": args.head,
                    "dropout": args.dropout,
                    "adapters": args.runs,
                    "batch": args.batch,
                }
            )
        for rows in args.rows:
            for adapters in args.adapters:
                if adapters <= rows:
                    found.append(
                        {"mode": "inference", **sizes, "dropout": 0.0, "adapters": adapters, "batch": rows}
                    )
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record, written after each point."""
    over, device = record.timer(args.minutes), "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"kind": "together", **record.header(), "points": []}
    if args.resume:
        result = record.resumed(args.json, result)
    for about in abouts(args, device):
        if any(
            about.items() <= {k: v for k, v in each.items() if k != "variants"}.items()
            for each in result["points"]
        ):
            continue
        if over():
            print("the time is up: --resume goes on", flush=True)
            sys.exit(record.LEFT)
        failed: dict[str, str] = {}
        if about["mode"] == "training":
            steps = of_training(args, about["dtype"], device)
        else:
            steps = of_inference(args, about["dtype"], device, about["batch"], about["adapters"])
        result["points"].append({**about, "variants": point(steps, about, failed)})
        for table in tables.together({**result, "points": result["points"][-1:]}):
            print(tables.markdown(table), flush=True)
        if args.json:
            record.write(args.json, result)
    return result


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--head", choices=("lm", "classifier"), default="lm", help="in training")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.05, help="of LoRA, in training")
    parser.add_argument("--runs", type=int, default=8, help="trained side by side; 0: no training")
    parser.add_argument("--batch", type=int, default=4, help="rows of each run")
    parser.add_argument("--seq", type=int, default=32)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 64], help="of a batch in inference")
    parser.add_argument("--adapters", nargs="*", type=int, default=[1, 8, 64], help="at most one a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--resume", action="store_true", help="keep the points that --json holds already")
    parser.add_argument("--minutes", type=float, help="begin no point after so many")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    measure(parsed())
