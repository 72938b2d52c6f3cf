"""Writes docs/fidelity.md from the tests' `fidelity` marks: python tests/fidelity_table.py"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "fidelity.md"
HEAD = """# Fidelity

What peft, transformers and torch do to a model, and what becomes of it once the model is patched. Stock means: exactly
what the unpatched model does. Written by `python tests/fidelity_table.py` from the tests named.

| what | patched | test |
|---|---|---|
"""


def rows(items: list[pytest.Item]) -> list[str]:
    """A row for each mark on each test function, in the order of the files."""
    found = {
        f"| {mark.args[0]} | {mark.args[1]} | `{item.path.name}::{item.originalname}` |": None
        for item in items
        for mark in item.iter_markers("fidelity")
    }
    return list(found)


class Collector:
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        DOCUMENT.write_text(HEAD + "\n".join(rows(session.items)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    pytest.main(
        ["--collect-only", "--quiet", *sorted(map(str, HERE.glob("test_*.py")))], plugins=[Collector()]
    )
