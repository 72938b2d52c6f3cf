"""Several comparisons in one report: what may be joined, and what is said to differ."""

from __future__ import annotations

import io
import json
import re
from contextlib import chdir
from pathlib import Path

import pytest
from rich.console import Console

from fastpeft import cli
from fastpeft.compare.errors import BadInput
from fastpeft.compare.joining import join
from fastpeft.compare.page import render
from fastpeft.compare.table import table

MODEL = {
    "name": "gpt2", "folder": None, "pretrained_here": None, "sha256": "m" * 64, "layers": 2, "width": 8,
    "parameters": 99, "pad_token_id": 0,
}  # fmt: skip


def _run(method: str, seed: int, scores: list[float]) -> dict:
    return {
        "method": method,
        "seed": seed,
        "trains": f"what {method} trains",
        "base": "base = ...",
        "diverged": False,
        "load": f'load("runs/{method}-seed{seed}/weights")',
        "quality": sum(scores) / len(scores),
        "scores": scores,
        "trainable_parameters": 100,
        "trainable_share": 0.01,
        "formula": "1·100 = 100",
        "learning_rate": 1e-3,
        "steps": 10,
        "step_seconds_stock": 0.2,
        "step_seconds_layers": 0.1,
        "step_seconds_auto": 0.05,
        "unpacked_because": None,
        "peak_memory_bytes": None,
        "train_seconds": 3.0,
        "curve": [{"step": 1, "loss": 0.7, "eval_quality": 0.5}],
        "sites": [],
    }


def _finished(
    folder: Path, *methods: str, seeds: int = 2, rank: int = 8, sha256: str = "d" * 64, **top
) -> Path:
    """A folder with the results of a comparison, made up."""
    folder.mkdir()
    scores = [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    results = {
        "arguments": {
            "task": "classify", "methods": list(methods), "seeds": seeds, "rank": rank, "batch_size": 4,
            "accumulate": 1, "lr": None,
        },
        "data": {
            "name": "texts.csv", "sha256": sha256, "weights": [1, 1, 1, 1], "train_rows": 20, "eval_rows": 4,
            "labels": {"a": {}, "b": {}}, "skipped_rows": 0, "longest": 60, "cut_rows": 0,
        },
        "model": MODEL,
        "versions": {"torch": "2.13"},
        "machine": {
            "device": "cpu", "processor": "some", "cores": 2, "gpu": None, "system": "Linux", "processes": 1,
            "torch_threads": 2, "mixed_precision": "no",
        },
        "record": {"format": 4},
        "task": "classify",
        "before": None,
        "joined": None,
        "runs": [_run(method, seed, scores[seed]) for method in methods for seed in range(seeds)],
        **top,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def test_all_methods_are_in_it_with_what_differs(tmp_path):
    a = _finished(tmp_path / "a", "head", "lora")
    b = _finished(tmp_path / "b", "lora", "full", seeds=3, rank=4)
    joined = join([a, b])
    assert [(run["method"], run["seed"]) for run in joined["runs"]] == [
        (method, seed) for method in ("head", "lora [a]", "lora [b]", "full") for seed in (0, 1)
    ]
    assert joined["arguments"]["methods"] == ["head", "lora [a]", "lora [b]", "full"]
    assert joined["runs"][-1]["load"] == f'load("{b}/runs/full-seed1/weights")'
    assert joined["joined"]["differs"] == [
        {"what": "arguments methods", "values": ["head, lora", "lora, full"]},
        {"what": "arguments seeds", "values": ["2", "3"]},
        {"what": "arguments rank", "values": ["8", "4"]},
    ]


def test_folders_of_one_name_are_told_apart_by_where_they_are(tmp_path):
    folders = [tmp_path / side / "report" for side in ("first", "second")]
    for folder in folders:
        folder.parent.mkdir()
        _finished(folder, "head")
    joined = join(folders)
    assert joined["arguments"]["methods"] == ["head [first/report]", "head [second/report]"]
    with chdir(folders[0]):
        assert join([Path(), folders[1]])["arguments"]["methods"] == joined["arguments"]["methods"]


def test_the_page_of_folders_that_differ_states_no_folders_facts_for_all(tmp_path):
    a = _finished(tmp_path / "a", "head")
    b = _finished(tmp_path / "b", "lora", model={**MODEL, "name": "other", "sha256": "other"})
    results = json.loads((b / "results.json").read_text(encoding="utf-8"))
    results["arguments"] |= {"lr": 0.01, "batch_size": 8}
    results["data"] |= {"cut_rows": 7, "longest": 3}
    for run in results["runs"]:
        run["base"] = "base = other"
    (b / "results.json").write_text(json.dumps(results), encoding="utf-8")
    page = render(join([a, b]))
    for row in ("arguments lr", "arguments batch size", "model sha256", "data cut rows"):
        assert f"<td>{row}</td>" in page
    for fact in ("Every run takes", "The base model is", "Each method has its own", "were cut to"):
        assert fact not in page
    [first, second] = re.findall(r"<pre>(base = .*?)</pre>", page, re.DOTALL)
    assert first.startswith("base = ...")
    assert f"{a}/runs/head-seed0" in first
    assert second.startswith("base = other")
    assert f"{b}/runs/lora-seed0" in second


def test_what_the_base_had_is_said_where_all_have_one_base(tmp_path):
    speaking = {"task": "lm", "before": [9.0] * 4}
    a = _finished(tmp_path / "a", "lora", **speaking)
    b = _finished(tmp_path / "b", "full", **speaking)
    assert join([a, b])["before"] == [9.0] * 4
    other = _finished(tmp_path / "c", "full", **speaking, model={"sha256": "other"})
    assert join([a, other])["before"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "e" * 64}, "the data differs"),
        ({"task": "lm"}, "the task differs"),
        ({"record": {"format": 5}}, "by another version of fastpeft, which records other things"),
    ],
)
def test_what_was_judged_otherwise_is_refused(tmp_path, change, message):
    folders = [_finished(tmp_path / "a", "head"), _finished(tmp_path / "b", "lora", **change)]
    with pytest.raises(BadInput, match=message):
        join(folders)


def test_a_folder_that_holds_no_comparison_is_refused(tmp_path):
    a = _finished(tmp_path / "a", "head")
    with pytest.raises(BadInput, match=r"none/results\.json: no such file: name the --out folder"):
        join([a, tmp_path / "none"])
    with pytest.raises(BadInput, match="each folder once"):
        join([a, a])
    for content, message in ("{", "can't be read"), ('{"runs": []}', "not the results of a comparison"):
        (a / "results.json").write_text(content, encoding="utf-8")
        with pytest.raises(BadInput, match=message):
            join([a])


def test_the_command_writes_the_joined_report_and_shows_it(tmp_path, capsys):
    folders = [_finished(tmp_path / "a", "head"), _finished(tmp_path / "b", "lora", rank=4)]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["report", *map(str, folders), "--out", str(tmp_path / "joined")])
    assert not exit_.value.code
    assert "No difference follows" in capsys.readouterr().out
    page = (tmp_path / "joined" / "report.html").read_text(encoding="utf-8")
    assert "What differs between the folders" in page
    assert "arguments rank" in page
    assert "fastpeft report" in page
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "other")])
    assert capsys.readouterr().err.startswith(f"fastpeft: {tmp_path / 'none' / 'results.json'}: no such file")
    assert not (tmp_path / "other").exists()


def test_a_comparison_is_not_written_over_by_a_joined_report(tmp_path, capsys):
    a, b = _finished(tmp_path / "a", "head"), _finished(tmp_path / "b", "lora")
    (a / "plan.json").write_text("{}", encoding="utf-8")
    before = (a / "results.json").read_bytes()
    with pytest.raises(SystemExit):
        cli.main(["report", str(a), str(b), "--out", str(a)])
    assert "holds a comparison of its own: name another folder" in capsys.readouterr().err
    assert (a / "results.json").read_bytes() == before


def test_methods_of_two_folders_are_told_apart_in_the_terminal(tmp_path):
    results = join([_finished(tmp_path / "a", "head"), _finished(tmp_path / "b", "head")])
    console = Console(width=80, file=io.StringIO())
    console.print(table(results))
    shown = console.file.getvalue()
    assert "head [a] " in shown
    assert "head [b] " in shown
