"""Whole-model throughput of GPT-2: training steps and inference, every variant in turn in one process.

    python bench/throughput.py [--model small] [--batch 8] [--seq 128] [--dtype fp32 bf16]
        [--method lora adapter] [--dropout 0 0.1] [--inference] [--startup] [--json FILE [--resume]] [--minutes N]
    python bench/throughput.py --data rotten-tomatoes --batch 32 [...]
    python bench/throughput.py --head lm --data random rotten-tomatoes rotten-tomatoes-answers --batch 16 [...]
    python bench/throughput.py --generate --batch 1 8 --seq 16 [...]

A training step is forward, loss and backward; the optimiser's share is the same for all and left out. A round
runs each variant once, in an order that rotates from round to round, so that whatever else slows the machine
meets all of them; ratios are taken within a round. Figures are medians, with the 20 % and 80 % quantiles.
Inference is a forward pass without gradients, a language model's for its loss, as perplexity is evaluated. With
--generate a step is `generate` of so many greedy tokens after a prompt, which are those that count.

Random tokens fill their batch, the same in every round. Of Rotten Tomatoes' sentences each round takes others,
in random order, padded to the longest of the batch; only their own tokens count. A language model learns all
of a sentence, or as an answer only the second half. All come with an attention mask, as from any collator.

Before anything is timed, each variant's logits and gradients are held against stock's, and the patched
model's report shows that its fused code ran; after it, that the auto scope packed whatever it could. A variant
that fails, in a check or in a step, is a row that says so. With --minutes no point is begun after so many, and
the exit code is 75 where some are left; with --resume those that FILE has already are kept.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import record
import sentences
import startup
import tables
import torch
import variants
from cases import DTYPES, MODELS
from check import Wrong
from torch import Tensor, nn

from fastpeft.compare.memory import PeakMemory
from fastpeft.packing import FULL

WARM_UP = 2
GENERATED = 16  # tokens of each row
RANDOM = "random"
Batch = dict[str, Tensor]


def rotated(names: list[str], turn: int) -> list[str]:
    """`names`, beginning with another one each turn."""
    turn %= max(len(names), 1)
    return names[turn:] + names[:turn]


def seconds(
    steps: dict[str, Callable[[Batch], None]],
    batches: list[Batch],
    device: str,
    failed: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each step, a number a round; a round is a batch, and the first `WARM_UP` don't count.

    A step that fails is noted in `failed` and left out from there on; without it, the error is raised.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn, batch in enumerate(batches, -WARM_UP):
        gc.collect()
        for name in rotated(list(found), turn):
            with record.noted(failed, name):
                wait(device)
                began = time.perf_counter()
                steps[name](batch)
                wait(device)
                if turn >= 0:
                    found[name].append(time.perf_counter() - began)
            if failed and name in failed:
                del found[name]
    return found


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def training_step(model: nn.Module, batch: Batch) -> None:
    model.zero_grad()
    model(**batch).loss.backward()


@torch.no_grad()
def inference_step(model: nn.Module, batch: Batch) -> None:
    model(**batch)


def generating_step(model: Any, batch: Batch) -> None:
    model.generate(
        **batch, max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False, use_cache=True
    )


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps from forward to backward, parameters left out, each storage once."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    loss.backward()
    return sum(size for storage, size in kept.items() if storage not in own)


def step_peak_bytes(step: Callable[[], None], device: str) -> int | None:
    """The most memory a step takes above what was held before it: by tensors on CUDA, else by the process."""
    peak = PeakMemory(torch.device(device))
    step()
    wait(device)
    return peak.bytes()


def batches_of(
    setting: variants.Setting, mode: str, data: str, batch: int, seq: int | None, rounds: int
) -> list[Batch]:
    """The batch of each round, those that warm up first: of random tokens, or of sentences where `seq` is None."""
    count = WARM_UP + rounds
    if seq is not None:
        found = [variants.batch_of(setting, [seq] * batch)] * count
    else:
        vocabulary, longest = (variants.size_of(setting, name) for name in ("vocab_size", "n_positions"))
        found = sentences.batches(count, batch, vocabulary, longest, setting.device, setting.head, data)
    if mode == "generate" or (mode == "inference" and setting.head == "classifier"):  # its logits are all
        found = [{name: tensor for name, tensor in each.items() if name != "labels"} for each in found]
    return found


def point(
    models: dict[str, nn.Module],
    setting: variants.Setting,
    mode: str,
    batches: list[Batch],
    failed: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measure one grid point: a dictionary by variant, without those that fail, which are noted in `failed`.

    Raises:
        Wrong: the auto scope didn't pack each batch that has padding or whose tokens aren't all read (likewise).
    """
    steps: dict[str, Callable[[Batch], None]] = {}
    step = {"training": training_step, "inference": inference_step, "generate": generating_step}[mode]
    for name, model in models.items():
        model.train(mode == "training")
        if name in variants.COMPILED:
            torch._dynamo.reset()  # each point its own graph, below the limit on recompilations
            same_shape = len({batch["input_ids"].shape for batch in batches}) == 1
            compiled = torch.compile(model, dynamic=not same_shape, mode=variants.COMPILED[name])
            model = cast(nn.Module, compiled)
        steps[name] = partial(step, model)
    packed = {name: variants.packed_calls(model) for name, model in models.items()}
    taken = seconds(steps, batches, setting.device, failed)
    packed = {name: variants.packed_calls(model) - packed[name] for name, model in models.items()}
    to_pack = sum(setting.head == "classifier" or not FULL < fill([batch]) < 1.0 for batch in batches)
    masks = [batch["attention_mask"] for batch in batches[WARM_UP:]]
    tokens = [len(mask) * GENERATED if mode == "generate" else int(mask.sum()) for mask in masks]
    found = {}
    for name, times in taken.items():
        with record.noted(failed, name):
            # Nothing is with a cache.
            expected = to_pack if variants.packs(name) and mode != "generate" else 0
            if packed[name] != expected:
                raise Wrong(f"{name} packed {packed[name]} of {len(batches)} batches, {expected} expected")
            row: dict[str, Any] = {"seconds": record.spread(times)}
            row["tokens_per_second"] = record.spread([n / t for n, t in zip(tokens, times, strict=True)])
            baseline = variants.BASELINES[setting.method][name]
            if baseline in taken:
                row["speedup"] = {"over": baseline, **ratios(taken[baseline], times)}
            if "frozen" in taken:
                row["over_frozen"] = ratios(times, taken["frozen"])
            if variants.packs(name) and "fastpeft" in taken:
                row["over_layers"] = ratios(times, taken["fastpeft"])
            row["step_peak_bytes"] = step_peak_bytes(partial(steps[name], batches[0]), setting.device)
            if (
                mode == "training" and name not in variants.COMPILED
            ):  # what a compiled graph saves, hooks don't see
                row["saved_bytes"] = saved_bytes(models[name], batches[0])
            found[name] = row
        models[name].zero_grad()
    return found


def fill(batches: list[Batch]) -> float:
    """The share of real tokens, the rest being padding."""
    masks = [batch["attention_mask"] for batch in batches]
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def ratios(these: list[float], those: list[float]) -> dict[str, float]:
    """The spread of `these` over `those`, round by round."""
    return record.spread([this / that for this, that in zip(these, those, strict=True)])


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line a variant: what it took, and how that compares."""
    columns = (
        "ms (20-80 %)", "tokens/s", "speed-up (20-80 %)", "x frozen", "x layers", "saved MB", "step peak MB"
    )  # fmt: skip
    lines = [f"{'':16}" + "".join(f"{c:>22}" for c in columns)]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"{name:16}failed: {row['failed']}")
            continue
        s, speedup = row["seconds"], row.get("speedup")
        frozen, layers = row.get("over_frozen"), row.get("over_layers")
        saved, peak = row.get("saved_bytes"), row["step_peak_bytes"]
        cells = [
            f"{s['median'] * 1e3:.1f} ({s['q20'] * 1e3:.1f}-{s['q80'] * 1e3:.1f})",
            f"{row['tokens_per_second']['median']:.0f}",
            f"{speedup['median']:.2f} ({speedup['q20']:.2f}-{speedup['q80']:.2f})" if speedup else "",
            f"{frozen['median']:.3f}" if frozen else "",
            f"{layers['median']:.3f}" if layers else "",
            "" if saved is None else f"{saved / 1e6:.1f}",
            "" if peak is None else f"{peak / 1e6:.1f}",
        ]
        lines.append(f"{name:16}" + "".join(f"{c:>22}" for c in cells))
    return "\n".join(lines)


def settings(args: argparse.Namespace) -> list[variants.Setting]:
    """What to build, each once: LoRA's dropout is nothing to adapters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    product = itertools.product(args.model, args.method, args.dtype, args.dropout)
    rest = (args.rank, args.head, device, args.model_dropout)
    wanted = [variants.Setting(*each, *rest) for each in product]
    return list(dict.fromkeys(s if s.method == "lora" else s._replace(dropout=0.0) for s in wanted))


def grid(modes: list[str], args: argparse.Namespace) -> Iterator[tuple[str, str, int, int | None]]:
    """Mode, data, batch and length of each point; sentences have lengths of their own."""
    for mode, data in itertools.product(modes, args.data):
        yield from itertools.product([mode], [data], args.batch, args.seq if data == RANDOM else [None])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record: each of its `points` has its setting, shapes, and what was measured by variant.

    It is written after each point, so that nothing costs what was measured before it.
    """
    over = record.timer(args.minutes)
    result: dict[str, Any] = {"kind": "throughput", **record.header(), "points": []}
    if args.resume:
        result = record.resumed(args.json, result)
    if args.startup and "startup" not in result:
        result["startup"] = startup.measure()
        print(f"import fastpeft: {result['startup']['import_seconds']:.3f} s beyond torch, peft and GPT-2")
        print(f"fastpeft.patch on GPT-2 small: {result['startup']['patch_seconds']:.4f} s")
    inferred: set[variants.Setting] = set()
    for setting in settings(args):
        names = [name for name in variants.variants_of(setting) if not args.variants or name in args.variants]
        modes = ["generate" if args.generate else "training"]
        without_dropout = setting._replace(dropout=0.0)  # as inference is
        if args.inference and without_dropout not in inferred:
            inferred.add(without_dropout)
            modes.append("inference")
        abouts = [about(setting, *each, args.rounds) for each in grid(modes, args)]
        todo = [each for each in abouts if not any(is_of(each, point, names) for point in result["points"])]
        models: dict[str, nn.Module] = {}
        failed: dict[str, str] = {}
        for each in todo:
            if over():
                print("the time is up: --resume goes on", flush=True)
                sys.exit(record.LEFT)
            if not models and not failed:
                models = variants.build(setting, names, failed)
                models = variants.check(models, setting, failed)
            shape = {key: each[key] for key in ("mode", "data", "batch", "seq", "rounds")}
            batches = batches_of(setting, **shape)
            lines = dict(failed)
            rows = point(models, setting, each["mode"], batches, lines)
            rows |= {name: {"failed": line} for name, line in lines.items()}
            ordered = {name: rows[name] for name in names}
            found = {**each, "fill": fill(batches[WARM_UP:]), "variants": ordered}
            result["points"].append(found)
            print(f"\n{tables.describe(found)}, {args.rounds} rounds\n{table(ordered)}", flush=True)
            if args.json:
                record.write(args.json, result)
            wait(setting.device)  # an error that a device keeps ends this process, and not the next
    return result


def about(
    setting: variants.Setting, mode: str, data: str, batch: int, seq: int | None, rounds: int
) -> dict[str, Any]:
    """What tells a point from others."""
    return {"mode": mode, **setting._asdict(), "data": data, "batch": batch, "seq": seq, "rounds": rounds}


def is_of(each: dict[str, Any], measured: dict[str, Any], names: list[str]) -> bool:
    """Whether a recorded point is the one that `about` tells, with all of these variants."""
    return (
        all(measured[key] == value for key, value in each.items())
        and set(names) <= measured["variants"].keys()
    )


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["small"])
    parser.add_argument("--method", nargs="+", choices=variants.BASELINES, default=["lora"])
    parser.add_argument("--data", nargs="+", choices=(RANDOM, *sentences.NAMES), default=[RANDOM])
    parser.add_argument("--head", choices=variants.HEADS, help="default: lm; classifier for sentences")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.1], help="of LoRA")
    parser.add_argument(
        "--model-dropout", type=float, default=0.0, help="GPT-2's own three; it is published with 0.1"
    )
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--seq", nargs="+", type=int, default=[128], help="of random tokens")
    everything = sorted({name for method in variants.BASELINES.values() for name in method})
    parser.add_argument("--variants", nargs="+", choices=everything, help="default: all")
    parser.add_argument("--inference", action="store_true", help="measure inference as well")
    parser.add_argument("--generate", action="store_true", help="measure generate instead of training")
    parser.add_argument("--startup", action="store_true", help="time `import fastpeft` and `patch` as well")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--resume", action="store_true", help="keep what the record has already")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many")
    args = parser.parse_args(arguments)
    if args.resume and not args.json:
        parser.error("--resume goes on with the record of --json: name it")
    for method in args.method:
        stock = variants.BASELINES[method]["fastpeft"]
        if args.variants and stock not in args.variants:
            parser.error(f"--variants of {method} are held against {stock}: name it too")
    some = [name for name in args.data if name in sentences.NAMES]
    args.head = args.head or ("classifier" if some else "lm")
    if args.generate and (some or args.head != "lm"):
        parser.error("--generate goes on from random tokens, by a language model: --head lm --data random")
    if sentences.ANSWERS in some and args.head != "lm":
        parser.error(f"--data {sentences.ANSWERS} is for a language model: --head lm")
    if some and (why := sentences.why_not()):
        args.data = [name for name in args.data if name not in some]
        print(f"{' and '.join(some)} left out: {why}")
        if not args.data:
            parser.error("nothing is left to measure")
    return args


def main() -> None:
    args = parsed()
    if args.threads:
        torch.set_num_threads(args.threads)
    measure(args)


if __name__ == "__main__":
    main()
