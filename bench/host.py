"""Host time of GPT-2's steps: what issuing them costs, measured without a GPU.

    python bench/host.py [--layers 12] [--dropout 0.05] [--vary] [--rounds 15] [--json FILE]
    python bench/host.py --first

A step of a small model on a GPU lasts as long as the host takes to issue it, wherever the kernels are quicker. Here
Triton's kernels are compiled for an H100 and launched on nothing (driver.py), and tensors are so small that an operator
of torch costs its dispatch. One thread, and its processor time, since it waits for nothing; variants in turn within a
round, ratios within a round, medians over rounds.

A step of 8 runs, with its optimiser, is one after another or side by side (`fastpeft.Sweep`).

Attention is one operator with and without dropout, as on a GPU, and the PyTorch path's masks are drawn as there: the
CPU would make a dozen of either. A graph's replay is one launch of nothing. Parts are of samples of the stack: choosing
what runs, launching, operators with autograd and their own glue, and the rest, which is stock's.

`--first` compiles from an empty cache: kernels and seconds of the first steps at GPT-2 small's widths, each step with
another token count.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import driver
import record
import together
import torch
import torch.nn.functional as F
import variants
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GPT2Config

import fastpeft
from fastpeft import graphs, masks, modules, trunk
from fastpeft.kernels import tile_table

H100 = next(each for each in tile_table.ARCHITECTURES if each.name == 90)
WIDTH = 16
WARM_UP = 15  # every token count twice
STEPS = 4  # of a variant in a round
RUNS = 8
#: Name -> what `patch` is told; peft is what they are measured against.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "peft": None,
    "layers, torch": {"scope": "layers", "backend": "torch"},
    "auto, torch": {"backend": "torch"},
    "layers, triton": {"scope": "layers", "backend": "triton"},
    "auto, triton": {"backend": "triton"},
    "graphs, triton": {"backend": "triton", "graphs": True},
}
PARTS = ("planning", "dispatch and autograd", "launching", "the rest")
Batch = dict[str, Tensor]


def base(layers: int, width: int, head: str) -> nn.Module:
    """A frozen GPT-2 in float32, which a CPU multiplies quickest; its own dropouts as published, 0.1."""
    torch.manual_seed(0)
    tokens: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    size: dict[str, Any] = {
        "n_layer": layers,
        "n_embd": width,
        "n_head": max(1, width // 64),
        "vocab_size": 64,
        "n_positions": 2048,
    }
    model: nn.Module = variants.HEADS[head](GPT2Config(**size, **tokens, use_cache=head == "lm"))
    return model.requires_grad_(False)


def model_of(name: str, stock: nn.Module) -> nn.Module:
    """The model of a variant, with parameters of its own."""
    model, how = variants.twin(stock), VARIANTS[name]
    if how:
        fastpeft.patch(model, strict=True, **how)
    return model.train()


def batches_of(rows: int, length: int, vary: bool) -> list[Batch]:
    """Padded batches of a classifier, of other token counts each where they vary."""
    found = []
    for i in range(7 if vary else 1):
        lengths = [max(1, length - (3 * row + 5 * i) % (length - 1)) for row in range(rows)]
        lengths[0] = length
        ids = torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(i))
        mask = torch.arange(length) < torch.tensor(lengths)[:, None]
        found.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids[:, 0] % 2})
    return found


def training(model: Any, batches: list[Batch]) -> Callable[[], None]:
    """A step that takes the next batch each time."""
    following = itertools.cycle(batches)

    def step() -> None:
        model.zero_grad()
        model(**next(following)).loss.backward()

    return step


def decoding(model: Any, batches: list[Batch]) -> Callable[[], None]:
    """A step that reads one more token for every row, after a prompt that is one token longer each time."""
    model.eval()
    ids = batches[0]["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)

    @torch.no_grad()
    def step() -> None:
        if cache.get_seq_length() > 2 * ids.shape[1]:
            cache.crop(ids.shape[1] - cache.get_seq_length())
        model(input_ids=ids[:, :1], past_key_values=cache)

    return step


def without_dropout(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, dropout_p: float = 0.0, **kwargs: Any
) -> Any:
    """Attention as one operator, as CUDA has it with dropout too."""
    return _attention(query, key, value, *args, **kwargs)


_attention = F.scaled_dot_product_attention


def drawn(x: Tensor, dropout_p: float, *, exact: bool) -> Tensor:
    """A mask of the PyTorch path, as it is drawn on a GPU."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p)


class Operators(TorchDispatchMode):
    """Counts torch's operators but for views and allocations, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = str(function.overloadpacket)
        if function.namespace == "aten" and not function.is_view and "empty" not in name:
            self.counts[name] += 1
        return out


modules.HARMLESS_MODES.add(Operators)  # which counts what fastpeft runs


_PLANNING_FILES = tuple(
    f"{name}.py"
    for name in (
        "kernels/memo", "kernels/tile_table", "kernels/tiling", "kernels/tuning",
        "fastpeft/checks", "fastpeft/plan", "fastpeft/routes", "fastpeft/trunk",
    )
)  # fmt: skip
_PLANNING_NAMES = (
    "_check", "norm_kind", "served", "_planned", "_settings", "_why_not",
    "for_kernels", "holds", "planned", "projection", "read", "why_not",
)  # fmt: skip


def part_of(frame: Any) -> str:
    """The part of `PARTS` that this stack belongs to."""
    innermost = frame.f_code.co_filename
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if "/triton/" in file or file.endswith("kernels/launch.py"):
            return "launching"
        if file.endswith(_PLANNING_FILES) or (_is_ours(file) and name.startswith(_PLANNING_NAMES)):
            return "planning"
        frame = frame.f_back
    return "dispatch and autograd" if _is_ours(innermost) or "/torch/autograd/" in innermost else "the rest"


def _is_ours(file: str) -> bool:
    return "/fastpeft/" in file.removeprefix(str(record.ROOT)) or file.startswith(
        str(record.ROOT / "kernels")
    )


@contextmanager
def sampled(counts: Counter[str]) -> Iterator[None]:
    """Counts the parts that the main thread is in, a sample each half a millisecond of processor time."""

    def note(number: int, frame: Any) -> None:
        counts[part_of(frame)] += 1

    before = signal.signal(signal.SIGPROF, note)
    signal.setitimer(signal.ITIMER_PROF, 0.0005, 0.0005)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def measure(
    steps: dict[str, Callable[[], None]], launches: driver.Launches, rounds: int
) -> dict[str, dict[str, Any]]:
    """`host_ms`, `spread` (over the first step's), `operators`, `launches`, `parts` (microseconds) of each step."""
    first = next(iter(steps))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for turn in range(rounds):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.process_time()
            for _ in range(STEPS):
                steps[name]()
            times[name].append((time.process_time() - began) / STEPS)
    found = {}
    for name, step in steps.items():
        before = launches.launched
        with Operators() as operators, mock.patch.object(graphs, "_why_not_here", return_value=None):
            step()
        launched = launches.launched - before
        host = statistics.median(times[name])
        counts: Counter[str] = Counter()
        with sampled(counts):
            for _ in range(max(STEPS, int(2 / host))):
                step()
        of_first = [mine / theirs for mine, theirs in zip(times[name], times[first], strict=True)]
        found[name] = {
            "host_ms": 1e3 * host,
            "spread": record.spread(of_first),
            "operators": sum(operators.counts.values()),
            "launches": launched,
            "parts": {part: 1e6 * host * counts[part] / max(1, counts.total()) for part in PARTS},
        }
    return found


def host(layers: int, dropout: float, vary: bool, rounds: int) -> dict[str, Any]:
    """The record: `variants` of a training step, `decoding` of a step with a cache."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "kind": "host",
        "shapes": {
            "layers": layers,
            "width": WIDTH,
            "rows": 4,
            "length": 12,
            "dropout": dropout,
            "vary": vary,
            "runs": RUNS,
        },
        "architecture": f"sm_{H100.name}",
    }
    batches = batches_of(4, 12, vary)
    with ExitStack() as stack:
        launches = stack.enter_context(driver.nowhere(H100))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", without_dropout))
        stack.enter_context(mock.patch.object(masks, "draw", drawn))
        # Which packing takes for torch's own.
        stack.enter_context(mock.patch.object(trunk._DEFINED, "_own", trunk._DEFINED._now()))
        for key, head, step_of in (("variants", "classifier", training), ("decoding", "lm", decoding)):
            setting = variants.Setting("small", "lora", "fp32", dropout, 8, head, "cpu")
            stock = variants.with_lora(base(layers, WIDTH, head), setting)
            models = {name: model_of(name, stock) for name in VARIANTS}
            steps = {name: step_of(model, batches) for name, model in models.items()}
            found[key] = measure(steps, launches, rounds)
            _hold(models, packed=key == "variants")
        found["runs"] = of_runs(layers, dropout, launches, rounds)
    return found | record.header()


def of_runs(layers: int, dropout: float, launches: driver.Launches, rounds: int) -> dict[str, Any]:
    """As `measure`, of `RUNS` runs of a language model, one after another and side by side, by the kernels."""
    stock, runs = base(layers, WIDTH, "lm"), together.runs_of(RUNS, 8, dropout)
    (batch,) = batches_of(RUNS * 4, 12, False)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    steps = {}
    for name, variant in (("one by one", "fastpeft_apart"), ("together", "together")):
        each = together.trainers(stock, runs, variant, backend="triton")
        steps[name] = together.training(each, batch)
    with mock.patch.object(type(each[0]), "_stop"):  # what nothing computed is rarely finite
        return measure(steps, launches, rounds)


def _hold(models: dict[str, Any], packed: bool) -> None:
    """Raises Wrong where a variant didn't run what it is named for, or not packed where it should."""
    for name, model in models.items():
        for row in fastpeft.report(model):
            expected = (VARIANTS[name] or {"backend": "stock"})["backend"]
            if row.kind == "lora" and row.path != expected:
                raise variants.Wrong(f"{name} ran {row.name} by {row.path}: {row.reason}")
            if packed and row.kind == "packing" and row.path == "stock":
                raise variants.Wrong(f"{name} wasn't packed: {row.reason}")


def first(layers: int, dropout: float, steps: int) -> dict[str, Any]:
    """Kernels compiled and seconds of the first steps from an empty cache, each of another token count."""
    torch.set_num_threads(1)
    rows = []
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache))
        launches = stack.enter_context(driver.nowhere(H100))
        setting = variants.Setting("small", "lora", "bf16", dropout, 8, "classifier", "cpu")
        stock = variants.with_lora(base(layers, 768, "classifier").bfloat16(), setting)
        model: Any = model_of("auto, triton", stock)
        for i in range(steps):
            (batch,) = batches_of(4, 40 << i, False)
            began, before = time.perf_counter(), launches.loaded
            model(**batch).loss.backward()
            seconds, tokens = time.perf_counter() - began, int(batch["attention_mask"].sum())
            rows.append({"tokens": tokens, "kernels": launches.loaded - before, "seconds": seconds})
    return {"kind": "first steps", "layers": layers, "width": 768, "steps": rows, **record.header()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Variants with their host time, beside peft's, and what it is spent on."""
    over = f"x {next(iter(rows))}"
    lines = [f"{'':16}{'ms':>8}{over:>16}{'operators':>11}{'launches':>10}  " + ", ".join(PARTS) + " (us)"]
    for name, row in rows.items():
        parts = "  ".join(f"{row['parts'][part]:.0f}" for part in PARTS)
        lines.append(
            f"{name:16}{row['host_ms']:8.2f}{row['spread']['median']:16.2f}{row['operators']:11}"
            f"{row['launches']:10}  {parts}"
        )
    return "\n".join(lines)


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dropout", type=float, default=0.05, help="of LoRA")
    parser.add_argument("--vary", action="store_true", help="another token count each step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--first", action="store_true", help="what the first steps compile, and how long they take"
    )
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    if args.first:
        result = first(args.layers, args.dropout, 4)
        for row in result["steps"]:
            print(f"{row['tokens']:5} tokens: {row['kernels']:3} kernels compiled, {row['seconds']:.1f} s")
    else:
        result = host(args.layers, args.dropout, args.vary, args.rounds)
        titles = {
            "variants": "a training step",
            "decoding": "a decoding step",
            "runs": f"a step of {RUNS} runs",
        }
        for key, title in titles.items():
            print(f"\n{title}\n{table(result[key])}")
    if args.json:
        record.write(args.json, result)


if __name__ == "__main__":
    main()
