"""bench/gpu.py: each step once, in parts, and a failure is a line."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import gpu
import record
import throughput
import together
import variants

#: A step that resumes: it adds a row a call, then ends as its argument says.
ROW_BY_ROW = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
rows = json.loads(path.read_text()) if path.exists() else []
path.write_text(json.dumps([*rows, sys.argv[3:]]))
sys.exit(int(sys.argv[2]) if len(rows) < 2 else 0)
"""


def code(text: str, *arguments: object, ending: int | None = None) -> gpu.Step:
    return gpu.Step(("-c", textwrap.dedent(text), *map(str, arguments)), ending)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0)


def test_a_step_runs_once_and_its_failure_is_a_line(tmp_path):
    ran = tmp_path / "ran"
    steps = {
        "tests/test_some.py": code("print('3 passed in 1.0s\\n')"),
        "wrong": code("import sys; print('so it is'); sys.exit(3)"),
        "traffic": code(f"open({str(ran)!r}, 'a').write('once ')"),
    }
    expected = {
        "tests/test_some.py": "3 passed in 1.0s",
        "wrong": "failed: exit code 3: so it is",
        "traffic": "done",
    }
    assert gpu.go_on(steps, tmp_path, 60) == expected
    assert gpu.go_on(steps, tmp_path, 60) == expected
    assert ran.read_text() == "once "
    assert json.loads((tmp_path / "steps.json").read_text())["steps"] == expected
    assert (tmp_path / "logs" / "test_some.txt").read_text().startswith("3 passed")


def test_other_sources_begin_again(tmp_path, monkeypatch):
    steps = {"traffic": code("print('ran')")}
    gpu.go_on(steps, tmp_path, 60)
    monkeypatch.setattr(record, "sources", lambda: "others")
    (tmp_path / "logs" / "traffic.txt").unlink()
    gpu.go_on(steps, tmp_path, 60)
    assert (tmp_path / "logs" / "traffic.txt").exists()


def test_a_step_whose_time_is_up_is_left_and_goes_on_in_the_next_call(tmp_path):
    rows = tmp_path / "micro.json"
    steps = {"micro": code(ROW_BY_ROW, rows, record.LEFT, ending=10)}
    assert gpu.go_on(steps, tmp_path, 70) == {"micro": None}
    assert gpu.go_on(steps, tmp_path, 70) == {"micro": None}
    assert gpu.go_on(steps, tmp_path, 70) == {"micro": "done"}
    (resume, minutes, value), *_ = json.loads(rows.read_text())
    assert (resume, minutes) == ("--resume", "--minutes")
    assert 0.9 < float(value) <= 1.0  # of its time, the ending left out


def test_a_step_that_crashes_goes_on_in_a_fresh_process_as_long_as_it_gets_further(tmp_path):
    steps = {"micro": code(ROW_BY_ROW, tmp_path / "micro.json", 1, ending=0)}
    assert gpu.go_on(steps, tmp_path, 60) == {"micro": "done"}
    assert len(json.loads((tmp_path / "micro.json").read_text())) == 3
    steps = {"stuck": code("import sys; sys.exit(1)", ending=0)}
    assert gpu.go_on(steps, tmp_path, 60) == {"stuck": "failed: exit code 1: "}


def test_a_step_that_takes_too_long_is_killed_with_its_workers(tmp_path):
    worker = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    sleeps = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    began = time.monotonic()
    found = gpu.go_on({"first": code("import time; time.sleep(0.5)"), "long": code(sleeps)}, tmp_path, 1.5)
    assert found == {"first": "done", "long": None}  # the next call has more time
    assert time.monotonic() - began < 15
    assert gpu.go_on({"long": code(sleeps)}, tmp_path, 1) == {"long": "failed: took longer than 1 s"}
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_without_enough_time_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 30)
    steps = {"micro": code("", ending=60), "traffic": code("")}
    assert gpu.go_on(steps, tmp_path, 60) == {"micro": None, "traffic": "done"}


def test_every_microbenchmark_is_run_on_a_gpu_and_by_make_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "files_with_tests", lambda: [])
    monkeypatch.setattr("fastpeft.kernels.tiling.architecture", lambda _: SimpleNamespace(name="90"))
    command = gpu.steps(tmp_path)["micro"].command
    makefile = (gpu.ROOT / "Makefile").read_text()
    found = [f"bench/{path.name}" for path in (gpu.ROOT / "bench").glob("bench_*.py")]
    assert len(found) == 3
    for file in found:
        assert file in command
        assert f" {file} " in makefile


def test_models_are_timed_by_commands_that_their_scripts_take(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "files_with_tests", lambda: [])
    monkeypatch.setattr("fastpeft.kernels.tiling.architecture", lambda _: SimpleNamespace(name="90"))
    parsers = {"bench/throughput.py": throughput.parsed, "bench/together.py": together.parsed}
    taken = {}
    for name, step in gpu.steps(tmp_path).items():
        if parse := parsers.get(step.command[0]):
            taken[name] = parse([*step.command[1:], "--resume", "--minutes", "3"])
    assert taken.keys() == {"sentences", "tokens", "language", "together", "throughput"}
    assert all(args.json == tmp_path / f"{name}.json" for name, args in taken.items())
    tokens = taken["tokens"]
    per_step = {batch * seq for batch in tokens.batch for seq in tokens.seq}
    assert (min(per_step), max(per_step)) == (64, 16384)
    assert set(tokens.variants) >= variants.COMPILED.keys() | {"fastpeft_graphs"}
