"""docs/fidelity.md says what the tests say."""

from __future__ import annotations

from fidelity_table import DOCUMENT, HERE, matrix, rows


def test_the_document_is_the_tests_table(request):
    items = request.session.items
    written = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if "::" in line]
    assert set(rows(items)) <= set(written), "run: python tests/fidelity_table.py"
    assert "\n".join(matrix()) in DOCUMENT.read_text(encoding="utf-8"), "run: python tests/fidelity_table.py"
    for line in written:
        file, name = line.rsplit("`", 2)[1].split("::")
        assert f"def {name}(" in (HERE / file).read_text(encoding="utf-8"), f"{file} has no {name}"
