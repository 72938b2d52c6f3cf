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


def matrix() -> list[str]:
    """What is run over every head, padding and scope, and which cells run on packed tokens."""
    from test_fidelity_matrix import (
        DONE,
        HEADS,
        LENGTHS,
        packs,
    )  # no sooner: pytest has to rewrite its assertions

    stays = ", ".join(done for done, (_, _, packable) in DONE.items() if packable)
    leaves = ", ".join(done for done, (_, _, packable) in DONE.items() if not packable)
    cells = [
        f"| {head} | {padding} | "
        + " | ".join("packed" if packs(head, padding, scope) else "stock" for scope in ("auto", "model"))
        + " |"
        for head in HEADS
        for padding in LENGTHS
    ]
    return [
        "",
        "## The matrix",
        "",
        "`test_fidelity_matrix.py` runs what is done to a model over these heads and paddings, in both scopes, exact,",
        "in training and evaluation, with either attention, with bottleneck adapters and without, every pair of values",
        "at least once, and compares outputs and gradients in float64. Labels, where a head takes some, count at no",
        f"hidden position. Cells are as below for: {stays}. They are stock, whatever the head, for: {leaves}. `exact`",
        "packs none.",
        "",
        "| head | padding | auto | model |",
        "|---|---|---|---|",
        *cells,
    ]


class Collector:
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        DOCUMENT.write_text(HEAD + "\n".join([*rows(session.items), *matrix()]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    pytest.main(
        ["--collect-only", "--quiet", *sorted(map(str, HERE.glob("test_*.py")))], plugins=[Collector()]
    )
