"""A whole comparison: checked first, then run by run, each kept as it finishes, then put together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from rich.console import Console

from fastpeft import routes
from fastpeft.compare import (
    base_model,
    card,
    checkpoint,
    data,
    duration,
    machine,
    page,
    plots,
    preflight,
)
from fastpeft.compare.arguments import DEFAULT_METHODS, IMDB_SMALL, Arguments
from fastpeft.compare.encoding import encode
from fastpeft.compare.errors import BadInput
from fastpeft.compare.methods import Method, run_name
from fastpeft.compare.placement import TOGETHER, why_not
from fastpeft.compare.preflight import (
    LOCK_FILE,
    PLAN_FILE,
    RECORD_FORMAT,
    RESULTS_FILE,
    check_fit,
    part,
)
from fastpeft.compare.progress import Reporter
from fastpeft.compare.summary import nothing_left
from fastpeft.compare.tasks import CLASSIFY, TASKS, Task
from fastpeft.compare.train import (
    WEIGHTS_FOLDER,
    Setting,
    judged_untrained,
    train_run,
    train_together,
)

RUNS_FOLDER = "runs"
RECORD_FILE = "record.json"
CARD_FILE = "README.md"
BEFORE_FILE = "before.json"
REPORT_FILE = "report.html"


def compare(
    arguments: Arguments, reporter: Reporter | None = None, corpus: data.Data | None = None
) -> dict[str, Any]:
    """Train every method from every seed, writing `results.json`, `report.html` and plots to `arguments.out`.

    A comparison that was interrupted goes on where it stopped: runs that are in the folder are kept.

    Args:
        arguments: what to compare.
        reporter: shows how far it is; None shows nothing.
        corpus: what `preflight.check` gave for these arguments, where it has been asked already.

    Returns:
        What `results.json` holds.

    Raises:
        BadInput: an argument, file, model or output folder that can't be used; nothing has been written then. Or memory
            that doesn't suffice, or no method whose runs held; finished runs are kept.
    """
    reporter = reporter or Reporter(Console(quiet=True))
    state = machine.processes()
    out = arguments.out
    corpus = corpus or preflight.check(arguments)
    if arguments.together and state.num_processes > 1:
        raise BadInput("--together trains in one process: leave it out, or start one")
    _check_backend(arguments.backend, state.device)
    arguments = _trainable(arguments, reporter)
    plan: dict[str, Any] = {
        "arguments": arguments.recorded(),
        "data": corpus.summary(),
        "versions": machine.versions(),
        "machine": machine.machine(),
        "record": {"format": RECORD_FORMAT},
    }
    _refuse_another(plan, out)
    check_fit(arguments, checkpoint.shape(arguments.model))
    base = _base(arguments, corpus, reporter, state)
    plan["model"] = base.description
    _refuse_another(plan, out)
    encoded = encode(corpus, base, arguments)
    plan["data"] |= {"longest": encoded.longest, "cut_rows": encoded.cut, "weights": encoded.weights}

    with _alone(out, state):
        if state.is_main_process:
            _write(out / PLAN_FILE, plan)
            (out / RUNS_FOLDER).mkdir(exist_ok=True)
        setting = Setting(base, encoded, arguments)
        before = _before(setting, state)
        records = _train_all(setting, plan, reporter, state)
        results = plan | {"task": arguments.task, "before": before, "runs": records, "joined": None}
        if state.is_main_process:
            write(results, out)
        state.wait_for_everyone()
    if why := nothing_left(results):
        raise BadInput(f"--out {out}: {why}")
    return results


@contextlib.contextmanager
def _alone(out: Path, state: PartialState) -> Iterator[None]:
    """Keeps other comparisons from a folder while this one writes to it; the system lets go of it whatever happens."""
    with contextlib.ExitStack() as stack:
        taken = False
        if state.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(out / LOCK_FILE, timeout=0))
            except Timeout:
                taken = True
        if broadcast_object_list([taken])[0]:
            raise BadInput(f"--out {out}: another comparison is writing to it: wait for it, or name another")
        yield


def _trainable(arguments: Arguments, reporter: Reporter) -> Arguments:
    """These, without the methods that the installed versions can't train, which one mustn't have asked for."""
    reasons = {method.name: why_not(method, arguments.task) for method in arguments.chosen}
    for name, reason in reasons.items():
        if reason and arguments.methods != DEFAULT_METHODS[arguments.task]:
            raise BadInput(f"--methods: {name} can't be trained here, leave it out: {reason}")
        if reason:
            reporter.say(f"Without {name}, which can't be trained here: {reason}")
    kept = (name for name, reason in reasons.items() if reason is None)
    return replace(arguments, methods=tuple(kept)) if any(reasons.values()) else arguments


def write(results: dict[str, Any], out: Path) -> None:
    """Results as JSON; page and plots where there are methods to show."""
    out.mkdir(parents=True, exist_ok=True)
    _write(out / RESULTS_FILE, results)
    if not nothing_left(results):
        plots.write(results, out)
        _replace(out / REPORT_FILE, page.render(results))


def _train_all(
    setting: Setting, plan: dict[str, Any], reporter: Reporter, state: PartialState
) -> list[dict[str, Any]]:
    """The records of all runs, those that have none yet trained first."""
    arguments = setting.arguments
    runs = [(method, seed) for method in arguments.chosen for seed in range(arguments.seeds)]
    [records] = broadcast_object_list([[_record(arguments.out, *run) for run in runs]])
    kept = len(runs) - records.count(None)
    if kept:
        reporter.say(f"{kept} of {len(runs)} runs are in {arguments.out} already and kept")
    if missing := records.count(None):
        takes = duration.estimate(missing, setting, state.device)
        reporter.say(f"{missing} {'run' if missing == 1 else 'runs'} to train: {takes}")
    clock = duration.Clock(missing)
    apart = [method.name for method in arguments.chosen if method.place.kind not in TOGETHER]
    if arguments.together and apart:
        reporter.say(f"{', '.join(apart)}: one run at a time, only LoRA's and adapters' train together")
    for method in arguments.chosen:
        left = [index for index, (of, _) in enumerate(runs) if of == method and records[index] is None]
        at_once = len(left) if arguments.together and method.place.kind in TOGETHER else 1
        for start in range(0, len(left), max(at_once, 1)):
            indices = left[start : start + at_once]
            seeds = [runs[index][1] for index in indices]
            reporter.step("all runs", len(runs) - records.count(None), len(runs))
            finals = [arguments.out / RUNS_FOLDER / run_name(method, seed) for seed in seeds]
            unfinished = [folder.with_name(f".{folder.name}") for folder in finals]
            for folder in unfinished if state.is_main_process else ():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            state.wait_for_everyone()
            show = partial(reporter.step, f"{method.name}, seed {', '.join(map(str, seeds))}")
            if len(seeds) == 1:
                found = [train_run(method, seeds[0], setting, unfinished[0], show)]
            else:
                found = train_together(method, seeds, setting, unfinished, show)
                reporter.say(_saved(found, arguments.accumulate))
            for index, record, folder, final in zip(indices, found, unfinished, finals, strict=True):
                record["base"] = card.base_lines(plan, arguments.task)
                records[index] = record
                if state.is_main_process:
                    _replace(folder / CARD_FILE, card.card(plan, method, record))
                    _write(folder / RECORD_FILE, record)
                    folder.rename(final)  # the run counts from here on, weights and record together
                reporter.say(_line(record, index + 1, len(runs), TASKS[arguments.task]) + clock.left())
    return records


def _saved(records: list[dict[str, Any]], accumulate: int) -> str:
    """What training runs side by side saved, by what a step of each takes alone."""
    took = sum(record["train_seconds"] for record in records)
    alone = sum(record["steps"] * accumulate * record["step_seconds_auto"] for record in records)
    return (
        f"{records[0]['method']}: {len(records)} runs together trained in {took:.1f} s; "
        f"their steps one by one would take {alone:.1f} s"
    )


def _before(setting: Setting, state: PartialState) -> list[float] | None:
    """The scores of the base model, judged once; None where its head is fresh and says nothing."""
    out = setting.arguments.out
    if setting.arguments.task == CLASSIFY:
        return None
    path = out / BEFORE_FILE
    [known] = broadcast_object_list([path.exists()])
    if known:
        found: list[float] = json.loads(path.read_text(encoding="utf-8"))
        return found
    scores = judged_untrained(setting, out / ".before")
    if state.is_main_process:
        _replace(path, json.dumps(scores) + "\n")
    return scores


def finished_runs(out: Path) -> int:
    """How many runs a comparison's folder holds."""
    return len(list((out / RUNS_FOLDER).glob(f"[!.]*/{RECORD_FILE}")))


def _base(
    arguments: Arguments, corpus: data.Data, reporter: Reporter, state: PartialState
) -> checkpoint.Base:
    if arguments.model == IMDB_SMALL and not base_model.location().exists():
        reporter.say(
            "The base model is a small GPT-2 that is trained here, once, on IMDB reviews (a few minutes on two "
            "cores): no published one can be had without a network. --model takes any other GPT-2."
        )
    with state.main_process_first():
        base = checkpoint.load(
            arguments.model,
            arguments.task,
            corpus.label_names,
            state.device,
            partial(reporter.step, "pre-training the base model"),
        )
    reporter.say(page.base_sentence(base.description))
    return base


def _check_backend(backend: str, device: torch.device) -> None:
    try:
        routes.choose(routes.Options(backend), device)
    except ValueError as error:
        raise BadInput(f"--backend {backend}: {error}") from None


def _refuse_another(plan: dict[str, Any], out: Path) -> None:
    """Refuse a folder that holds a comparison of other arguments, data, model, versions or machine."""
    path = out / PLAN_FILE
    if not path.exists():
        return
    before = _read(path)
    if before is None or not all(isinstance(before.get(topic, {}), dict) for topic in plan):
        raise BadInput(f"--out {out}: {PLAN_FILE} is damaged: name another folder, or remove this one")
    differing = []
    for topic, now in plan.items():
        was = before.get(topic, {})
        for key in now:
            if (
                was.get(key) != now[key] and key != "folder"
            ):  # a model is told by its weights, wherever it lies
                option = f"--{key.replace('_', '-')}" if topic == "arguments" else f"{topic} {key}"
                differing.append(f"{option} (was {_shown(was.get(key))}, now {_shown(now[key])})")
    if differing:
        raise BadInput(
            f"--out {out}: holds a comparison of something else: {'; '.join(differing)}; name another "
            "folder, or remove this one"
        )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)[:60]


def _record(out: Path, method: Method, seed: int) -> dict[str, Any] | None:
    """The record of a finished run; None where it hasn't finished."""
    folder = out / RUNS_FOLDER / run_name(method, seed)
    if not folder.exists():
        return None
    record = _read(folder / RECORD_FILE)
    if record is None or not (folder / WEIGHTS_FOLDER).is_dir():
        raise BadInput(f"{folder}: is damaged: remove it, and the run is trained again")
    return record


def _read(path: Path) -> dict[str, Any] | None:
    """What a file of JSON holds; None where it can't be read, or isn't an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _line(record: dict[str, Any], number: int, total: int, task: Task) -> str:
    quality = "diverged" if record["diverged"] else f"{task.measure} {record['quality']:.3f}"
    return (
        f"[{number:>{len(str(total))}}/{total}] {record['method']} seed {record['seed']}: "
        f"{quality}, trained in {record['train_seconds']:.0f} s"
    )


def _write(path: Path, value: dict[str, Any]) -> None:
    _replace(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    """The file is the old one or the new one, never a part."""
    part(path).write_text(text, encoding="utf-8")
    os.replace(part(path), path)
