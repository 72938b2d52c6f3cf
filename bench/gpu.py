"""All that is tested, counted and measured on a GPU, into one page: at most eight minutes a call.

    python bench/gpu.py [--results bench/results/gpu] [--minutes 8]

Call it again until nothing is left: each step leaves its record, and what a record of the same sources, machine and
versions has already isn't done again. A step that fails is a line of the page; its output is in logs/.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import record
import tables
import torch
from checkout import ROOT

FOR_THE_PAGE = 40  # seconds
LEAST = 30  # seconds, to begin a step with
WITH_TESTS = ("-m", "pytest", "-m", "gpu")


class Step(NamedTuple):
    """A command of Python; `ending` is for one that resumes: seconds before its end in which it begins nothing."""

    command: tuple[str, ...]
    ending: int | None = None


def steps(folder: Path) -> dict[str, Step]:
    """The steps in their order, each named by its record or its file of tests."""
    from fastpeft.kernels import tiling

    def script(name: str, file: str, arguments: str, ending: int | None = None) -> Step:
        return Step((f"bench/{file}.py", *arguments.split(), "--json", str(folder / f"{name}.json")), ending)

    arch = tiling.architecture(torch.device("cuda")).name
    tests = {
        file: Step((*WITH_TESTS, "-n", "auto", "--maxprocesses=12", file)) for file in files_with_tests()
    }
    files = (f"bench/bench_{name}.py" for name in ("lora", "adapter", "lm_head"))
    micro = ("-m", "pytest", *files, "-W", "default", "--record")
    models = (
        "--model small medium --method lora adapter --dtype bf16 fp32 --dropout 0 0.1 --rank 16 --batch 8 "
    )
    sentences = (
        "--data random rotten-tomatoes --dtype bf16 fp32 --batch 32 --dropout 0.05 --model-dropout 0.1 "
    )
    graphs = "fastpeft_model fastpeft_graphs"
    language = (
        "--head lm --data rotten-tomatoes rotten-tomatoes-answers --dtype bf16 --batch 32 --dropout 0.05 "
        f"--model-dropout 0.1 --inference --variants peft fastpeft {graphs}"
    )
    # From 64 to 16,384 a step.
    tokens = (
        f"--dtype bf16 --batch 1 4 16 --seq 64 1024 --variants peft compile compile_graphs fastpeft {graphs}"
    )
    return {
        **tests,
        "compile_report": script(
            "compile_report", "compile_report", f"--arch {arch} --workers {os.cpu_count()}"
        ),
        "traffic": script("traffic", "traffic", ""),
        "sentences": script(
            "sentences",
            "throughput",
            sentences + f"--inference --variants frozen peft fastpeft {graphs}",
            ending=120,
        ),
        "tokens": script("tokens", "throughput", tokens, ending=120),
        "language": script("language", "throughput", language, ending=120),
        "together": script("together", "together", "--dtype bf16 --seq 128 --rows 8 64", ending=120),
        "throughput": script(
            "throughput", "throughput", models + "--seq 256 1024 --inference --startup", ending=180
        ),
        "micro": Step((*micro, str(folder / "micro.json")), ending=60),
    }


def files_with_tests() -> list[str]:
    """The files that have tests for a GPU."""
    command = [sys.executable, *WITH_TESTS, "--collect-only", "-q", "tests"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the tests can't be collected:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return re.findall(r"^(tests/\w+\.py): \d+$", done.stdout, re.MULTILINE)


def environment() -> dict[str, str]:
    """That of this process, in which `import fastpeft` means this checkout."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def go_on(steps: dict[str, Step], folder: Path, seconds: float) -> dict[str, str | None]:
    """Run what the folder's record doesn't have until the time is up: how each step ended, None for what is left."""
    path = folder / "steps.json"
    result = record.resumed(path, {"kind": "steps", **record.header(), "steps": {}})
    end = time.monotonic() + seconds
    for name, step in steps.items():
        while name not in result["steps"]:
            left = end - time.monotonic()
            if left < LEAST + (step.ending or 0):
                break
            print(f"{name} ...", flush=True)
            before = _content(folder, name)
            code = _run(step, folder, name, left)
            went_on = step.ending is not None and _content(folder, name) != before
            if code == record.LEFT or (code is None and (went_on or left < 0.9 * seconds)):
                break  # the next call has more time
            if code and went_on:
                continue  # a fresh process, as after an error that the device keeps
            result["steps"][name] = _ending(code, left, folder, name)
            record.write(path, result)
            print(f"  {result['steps'][name]}", flush=True)
    return {name: result["steps"].get(name) for name in steps}


def _run(step: Step, folder: Path, name: str, left: float) -> int | None:
    """The exit code of a step, its output in its log; None where it took longer than is left."""
    more = []
    if step.ending is not None:
        more = ["--resume", "--minutes", str((left - step.ending) / 60)]
    with _log(folder, name).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *step.command, *more],
            cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
                process.wait()


def _log(folder: Path, name: str) -> Path:
    path = folder / "logs" / f"{Path(name).stem}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _content(folder: Path, name: str) -> bytes | None:
    path = folder / f"{name}.json"
    return path.read_bytes() if path.exists() else None


def _ending(code: int | None, left: float, folder: Path, name: str) -> str:
    if code is None:
        return f"failed: took longer than {left:.0f} s"
    lines = _log(folder, name).read_text(encoding="utf-8").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    if name.startswith("tests/"):
        return last if code == 0 else f"failed: {last}"
    return "done" if code == 0 else f"failed: exit code {code}: {last}"


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--minutes", type=float, default=8, help="that this call takes at most")
    args = parser.parse_args()
    began = time.monotonic()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    folder = args.results.absolute()
    every = steps(folder)
    found = go_on(every, folder, began + 60 * args.minutes - FOR_THE_PAGE - time.monotonic())
    if tables.load(folder):
        page = folder / "report.html"
        plot = [sys.executable, "bench/plot.py", "--results", str(folder), "--report", str(page)]
        subprocess.run(plot, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, check=True)
        print(page)
    left = [name for name, ended in found.items() if ended is None]
    failed = [name for name, ended in found.items() if ended and ended.startswith("failed")]
    if failed:
        print(f"failed, see {folder / 'logs'}: {', '.join(failed)}")
    if left:
        print(f"left, the same command goes on: {', '.join(left)}")
    sys.exit(bool(failed) and not left)


if __name__ == "__main__":
    main()
