"""Whole-model throughput of GPT-2: training steps and inference, every variant in turn in one process.

    python bench/throughput.py [--model small] [--batch 8] [--seq 128] [--dtype fp32 bf16]
        [--method lora adapter] [--dropout 0 0.1] [--inference] [--startup] [--json FILE]

A training step is forward, loss and backward; the optimiser's share is the same for all and left out. A round
runs each variant once, in an order that rotates from round to round, so that whatever else slows the machine
meets all of them; ratios are taken within a round. Figures are medians, with the 20 % and 80 % quantiles.

Before anything is timed, each variant's logits and gradients are held against stock's, and the patched
model's report shows that its fused code ran.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import startup
import tables
import torch
import variants
from cases import DTYPES, MODELS
from torch import Tensor, nn

from fastpeft.compare.memory import PeakMemory

WARM_UP = 2


def rotated(names: list[str], turn: int) -> list[str]:
    """`names`, beginning with another one each turn."""
    turn %= len(names)
    return names[turn:] + names[:turn]


def seconds(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, a number a round."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-WARM_UP, rounds):
        gc.collect()
        for name in rotated(list(steps), turn):
            wait(device)
            began = time.perf_counter()
            steps[name]()
            wait(device)
            if turn >= 0:
                found[name].append(time.perf_counter() - began)
    return found


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def training_step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model.zero_grad()
    model(**batch).loss.backward()


@torch.no_grad()
def inference_step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model(input_ids=batch["input_ids"])


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward, parameters left out, each storage once."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        loss = model(**batch).loss
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    loss.backward()
    return sum(size for storage, size in kept.items() if storage not in own)


def step_peak_bytes(step: Callable[[], None], device: str) -> int | None:
    """The most memory a step takes above what was held before it: by tensors on CUDA, else by the process."""
    peak = PeakMemory(torch.device(device))
    before = peak.bytes()
    step()
    wait(device)
    after = peak.bytes()
    return None if before is None or after is None else after - before


def point(
    models: dict[str, nn.Module], setting: variants.Setting, mode: str, batch: int, seq: int, rounds: int
) -> dict[str, Any]:
    """Measure one grid point: a dictionary by variant."""
    data = variants.batch_of(setting, batch, seq)
    steps: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        model.train(mode == "training")
        if name == "compile":
            torch._dynamo.reset()  # each point its own graph, below the limit on recompilations
            model = torch.compile(model, dynamic=False)
        run = training_step if mode == "training" else inference_step
        steps[name] = lambda run=run, model=model: run(model, data)
    taken = seconds(steps, rounds, setting.device)
    found = {}
    for name, times in taken.items():
        row: dict[str, Any] = {"seconds": record.spread(times)}
        row["tokens_per_second"] = batch * seq / row["seconds"]["median"]
        baseline = variants.BASELINES[setting.method][name]
        if baseline in taken:
            ratios = [b / t for b, t in zip(taken[baseline], times, strict=True)]
            row["speedup"] = {"over": baseline, **record.spread(ratios)}
        if "frozen" in taken:
            row["over_frozen"] = record.spread([t / f for t, f in zip(times, taken["frozen"], strict=True)])
        row["step_peak_bytes"] = step_peak_bytes(steps[name], setting.device)
        if mode == "training" and name != "compile":  # what a compiled graph saves, hooks don't see
            row["saved_bytes"] = saved_bytes(models[name], data)
        found[name] = row
        models[name].zero_grad()
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line a variant: what it took, and how that compares."""
    columns = ("ms (20-80 %)", "tokens/s", "speed-up (20-80 %)", "x frozen", "saved MB", "step peak MB")
    lines = [f"{'':14}" + "".join(f"{c:>22}" for c in columns)]
    for name, row in rows.items():
        s, speedup, frozen = row["seconds"], row.get("speedup"), row.get("over_frozen")
        saved, peak = row.get("saved_bytes"), row["step_peak_bytes"]
        cells = [
            f"{s['median'] * 1e3:.1f} ({s['q20'] * 1e3:.1f}-{s['q80'] * 1e3:.1f})",
            f"{row['tokens_per_second']:.0f}",
            f"{speedup['median']:.2f} ({speedup['q20']:.2f}-{speedup['q80']:.2f})" if speedup else "",
            f"{frozen['median']:.3f}" if frozen else "",
            "" if saved is None else f"{saved / 1e6:.1f}",
            "" if peak is None else f"{peak / 1e6:.1f}",
        ]
        lines.append(f"{name:14}" + "".join(f"{c:>22}" for c in cells))
    return "\n".join(lines)


def settings(args: argparse.Namespace) -> list[variants.Setting]:
    """What to build, each once: LoRA's dropout is nothing to adapters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    product = itertools.product(args.model, args.method, args.dtype, args.dropout)
    wanted = [variants.Setting(*each, args.rank, args.head, device) for each in product]
    return list(dict.fromkeys(s if s.method == "lora" else s._replace(dropout=0.0) for s in wanted))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record: each of its `points` has its setting, shapes, and what was measured by variant.

    It is written after each point, so that a point which doesn't fit the machine costs none before it.
    """
    result = {"kind": "throughput", **record.header(), "points": []}
    if args.startup:
        result["startup"] = startup.measure()
        print(f"import fastpeft: {result['startup']['import_seconds']:.3f} s beyond torch, peft and GPT-2")
        print(f"fastpeft.patch on GPT-2 small: {result['startup']['patch_seconds']:.4f} s")
    inferred: set[variants.Setting] = set()
    for setting in settings(args):
        names = [name for name in variants.variants_of(setting) if not args.variants or name in args.variants]
        models = variants.build(setting, names)
        variants.check(models, setting)
        modes = ["training"]
        without_dropout = setting._replace(dropout=0.0)  # as inference is
        if args.inference and without_dropout not in inferred:
            inferred.add(without_dropout)
            modes.append("inference")
        for mode, batch, seq in itertools.product(modes, args.batch, args.seq):
            found = {"mode": mode, **setting._asdict(), "batch": batch, "seq": seq, "rounds": args.rounds}
            found["variants"] = point(models, setting, mode, batch, seq, args.rounds)
            result["points"].append(found)
            print(f"\n{tables.describe(found)}, {args.rounds} rounds\n{table(found['variants'])}", flush=True)
            if args.json:
                record.write(args.json, result)
    return result


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["small"])
    parser.add_argument("--method", nargs="+", choices=variants.BASELINES, default=["lora"])
    parser.add_argument("--head", choices=variants.HEADS, default="lm")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.1], help="of LoRA")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--seq", nargs="+", type=int, default=[128])
    everything = sorted({name for method in variants.BASELINES.values() for name in method})
    parser.add_argument("--variants", nargs="+", choices=everything, help="default: all")
    parser.add_argument("--inference", action="store_true", help="measure inference as well")
    parser.add_argument("--startup", action="store_true", help="time `import fastpeft` and `patch` as well")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--json", type=Path, help="write the record here")
    return parser.parse_args(arguments)


def main() -> None:
    args = parsed()
    if args.threads:
        torch.set_num_threads(args.threads)
    measure(args)


if __name__ == "__main__":
    main()
