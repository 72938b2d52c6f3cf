"""Peers' own tests on patched models: what passes on stock models must pass on patched ones.

    python tests/peers.py CHECKOUT FILE [FILE ...] [-- PYTEST OPTION ...]

Runs the files of a checkout of peft or transformers twice, the second time with every model patched as it is made, and
names what passes only unpatched. `make test-peers` runs the files that concern GPT-2 and LoRA.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest

PATCHED, OUTCOMES = "FASTPEFT_PEERS_PATCHED", "FASTPEFT_PEERS_OUTCOMES"


def _patched_after(owner: Any, name: str, model_of: Any) -> None:
    """Wraps the method of a class: afterwards, the model that it made or changed is patched."""
    import fastpeft

    real = getattr(owner, name)

    @functools.wraps(real)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # most models of a peer have nothing to fuse
            fastpeft.patch(model_of(self))
        return result

    setattr(owner, name, method)


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin, in the second run."""
    if os.environ.get(PATCHED) != "1":
        return
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import GPT2PreTrainedModel

    _patched_after(BaseTuner, "inject_adapter", lambda tuner: tuner.model)
    _patched_after(GPT2PreTrainedModel, "post_init", lambda model: model)


class Outcomes:
    """Writes what became of each test."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.found[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        Path(os.environ[OUTCOMES]).write_text(json.dumps(self.found), encoding="utf-8")


def pytest_cmdline_main(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes())


def outcomes(checkout: Path, arguments: list[str], patched: bool) -> dict[str, str]:
    """What becomes of each test of these files, by its id."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        environment = {
            **os.environ,
            PATCHED: str(int(patched)),
            OUTCOMES: str(file),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        options = ["-q", "-p", "peers", "-p", "no:cacheprovider", "-o", "addopts="]  # which may want plugins
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        return json.loads(file.read_text(encoding="utf-8"))


def main(checkout: str, *arguments: str) -> int:
    given = [each for each in arguments if each != "--"]
    stock, patched = (outcomes(Path(checkout).resolve(), given, patched) for patched in (False, True))
    passed = [name for name, outcome in stock.items() if outcome == "passed"]
    lost = [name for name in passed if patched.get(name) != "passed"]
    for name in lost:
        print(f"passes on stock models only: {name}")
    print(
        f"{len(passed)} of {len(stock)} pass on stock models, {len(passed) - len(lost)} of these on patched ones"
    )
    return int(bool(lost) or not passed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
