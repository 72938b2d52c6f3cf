"""README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.filterwarnings(
    "ignore"
)  # as in a process of its own, whose imports would take ten times as long
def test_the_snippets_run_in_order_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 2
    monkeypatch.chdir(tmp_path)
    exec("\n".join(snippets), {"__name__": "__main__"})
    assert "h.0.attn.c_attn" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-adapters", "my-sweep", "small-adapters"]
