"""The record of the microbenchmarks, written row by row: one that fails is a row that says so."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import record
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write the record here")
    parser.addoption("--resume", action="store_true", help="keep what the record has already")
    parser.addoption("--minutes", type=float, help="begin nothing after so many")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path:
        config.pluginmanager.register(
            Recorder(path, config.getoption("--resume"), config.getoption("--minutes"))
        )


class Recorder:
    """Leaves out what the record has, adds what ends, and stops when the time is up."""

    def __init__(self, path: Path, resume: bool, minutes: float | None) -> None:
        fresh = {"kind": "micro", "rows": [], **record.header()}
        self.path, self.over = path, record.timer(minutes)
        self.result = record.resumed(path, fresh) if resume else fresh
        self.left = False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = {row["id"] for row in self.result["rows"]}
        config.hook.pytest_deselected(items=[item for item in items if item.name in known])
        items[:] = [item for item in items if item.name not in known]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.over():
            self.left = True
            item.session.shouldstop = "the time is up: --resume goes on"
            pytest.skip("the time is up")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        benchmark: Any = getattr(item, "funcargs", {}).get("benchmark")
        timed = benchmark is not None and (benchmark.stats or call.excinfo)  # not under --benchmark-disable
        if call.when == "call" and timed and not report.skipped:
            row: dict[str, Any] = {"id": item.name, **benchmark.extra_info}
            if call.excinfo is None:
                times = benchmark.stats.stats.data
                row |= {"seconds": record.spread(times), "rounds": len(times)}
            else:
                row["failed"] = record.failure(call.excinfo.value)
            self.result["rows"].append(row)
            record.write(self.path, self.result)
            if call.excinfo is not None and torch.cuda.is_available():
                torch.cuda.synchronize()  # an error that a device keeps ends this process, and not the next
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.left:
            session.exitstatus = record.LEFT
        elif session.exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.OK  # failures are rows; nothing to run is nothing left
