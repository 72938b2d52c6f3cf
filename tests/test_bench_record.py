"""The record of the microbenchmarks: written row by row, gone on with, and a failure is a row."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import record  # noqa: E402

BENCHMARKS = """
import pytest

@pytest.mark.parametrize("variant", ["good", "bad", "slow"])
def test_layer(benchmark, variant):
    benchmark.extra_info.update(variant=variant)
    if variant == "bad":
        raise RuntimeError("no memory\\nfor this")
    benchmark.extra_info["speedup"] = 2.0
    benchmark.pedantic(lambda: None, rounds=3)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the benchmarks above as bench/ runs its own."""
    # pytest-benchmark times nothing where it sees a worker's name.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    # Of what else is installed nothing has a say: a plugin that shuffles tests would shuffle rows.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    (tmp_path / "bench_some.py").write_text(BENCHMARKS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q -W ignore --import-mode=importlib\n")

    def main(*options):
        path = tmp_path / "micro.json"
        arguments = [
            str(tmp_path / "bench_some.py"),
            "-c",
            str(tmp_path / "pytest.ini"),
            "-q",
            "-W",
            "ignore",
            "-p",
            "pytest_benchmark.plugin",
        ]
        code = pytest.main([*arguments, "--record", str(path), *options], plugins=[plugin])
        return code, json.loads(path.read_text())["rows"] if path.exists() else []

    return main


def test_a_failure_is_a_row_beside_what_was_measured(run):
    code, rows = run()
    good, bad, slow = rows
    assert code == 0
    assert bad == {"id": "test_layer[bad]", "variant": "bad", "failed": "RuntimeError: no memory for this"}
    for row in good, slow:
        assert row["rounds"] == 3
        assert row["seconds"]["median"] > 0
        assert row["speedup"] == 2.0


def test_what_the_record_has_is_not_measured_again_and_nothing_left_is_no_error(run):
    _, first = run("-k", "good")
    _, every = run("--resume")
    assert every[0] == first[0]
    assert [row["variant"] for row in every] == ["good", "bad", "slow"]
    assert run("--resume") == (0, every)
    assert run("-k", "good")[1] != first  # without --resume


def test_when_the_time_is_up_the_rest_is_left(run, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(record, "timer", lambda minutes: lambda: next(answers))
    code, rows = run("--minutes", "1")
    assert code == record.LEFT
    assert [row["variant"] for row in rows] == ["good"]


def test_a_record_of_other_sources_is_not_gone_on_with(run, monkeypatch):
    run("-k", "good")
    monkeypatch.setattr(record, "sources", lambda: "others")
    _, rows = run("--resume", "-k", "bad")
    assert [row["variant"] for row in rows] == ["bad"]


def test_sources_are_what_is_measured_and_nothing_else(tmp_path, monkeypatch):
    for folder in "fastpeft/compare", "kernels", "bench/results":
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    seen = {record.sources()}
    for name in "fastpeft/ops.py", "fastpeft/compare/train.py", "kernels/launch.py", "bench/cases.py":
        (tmp_path / name).write_text(name)
        seen.add(record.sources())
    assert len(seen) == 5
    (tmp_path / "bench/results/traffic.json").write_text("{}")
    assert record.sources() in seen
