"""The command line: help, exit codes, one clear line for what the user can mend."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_comparison import checkpoint, corpus

from fastpeft import cli
from fastpeft.compare import checkpoint as checkpoints
from fastpeft.compare import runner
from fastpeft.compare.arguments import Arguments
from fastpeft.compare.methods import PLACES
from fastpeft.compare.tasks import CLASSIFY


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with `texts.csv`, `gpt2`, and what is wrong in several ways."""
    folder = tmp_path_factory.mktemp("files")
    corpus(folder / "texts.csv")
    gpt2 = checkpoint(folder / "gpt2")
    bert = folder / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    (folder / "empty").mkdir()
    for name, missing in ("no-weights", "model.safetensors"), ("no-tokenizer", "tokenizer.json"):
        shutil.copytree(gpt2, folder / name)
        (folder / name / missing).unlink()
    shutil.copytree(gpt2, folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"not safetensors")
    checkpoint(folder / "few-tokens", vocab_size=20)
    (folder / "strange").mkdir()
    (folder / "strange" / "config.json").write_text("GPT-2", encoding="utf-8")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("mine", encoding="utf-8")
    (folder / "file").touch()
    texts = (folder / "texts.csv").read_text(encoding="utf-8")
    (folder / "no-label.csv").write_text(texts.replace("text,label", "text,stars"), encoding="utf-8")
    (folder / "no-text.csv").write_text(texts.replace("text,label", "words,label"), encoding="utf-8")
    (folder / "empty.csv").touch()
    (folder / "one-class.csv").write_text(texts.replace(",bad", ",good"), encoding="utf-8")
    (folder / "holes.csv").write_text(texts + '"",good\n" ",bad\n', encoding="utf-8")
    (folder / "latin1.csv").write_bytes(texts.encode() + b"caf\xe9,good\n")
    (folder / "unseen.csv").write_text(texts + "odd one out,ugly\n", encoding="utf-8")
    return folder


def _refused(arguments: list[str], capsys) -> str:
    """The one line on stderr with which these arguments are refused."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert said.out == ""
    assert said.err.startswith("fastpeft: ")
    assert said.err.count("\n") == 1
    return said.err


BAD_INPUT = {
    "no such file": (["--data", "{}/none.csv"], "none.csv: no such file"),
    "no label column": (["--data", "{}/no-label.csv"], "no 'label' column"),
    "no text column": (["--data", "{}/no-text.csv"], "no 'text' column"),
    "empty file": (["--data", "{}/empty.csv"], "the file is empty"),
    "one class": (["--data", "{}/one-class.csv"], "one class only ('good')"),
    "empty rows": (["--data", "{}/holes.csv"], "2 rows are unusable (empty text): row 42, 43"),
    "rows that are not UTF-8": (["--data", "{}/latin1.csv"], "1 row is unusable (not UTF-8): row 42"),
    "a label only in the eval part": (
        ["--data", "{}/unseen.csv"],
        "only the eval part would have the label 'ugly'",
    ),
    "another kind of file": (["--data", "{}/file"], "a file ending in .csv, .tsv, .jsonl"),
    "unknown method": (["--methods", "head,ia3"], "unknown method 'ia3': choose from head, lora"),
    "a method twice": (["--methods", "head,head"], "each method once"),
    "no method": (["--methods", ","], "--methods names none: choose from head, lora"),
    "an unknown option of a method": (["--methods", "lora:rank=4"], "lora takes r, dropout, layers"),
    "a layer that isn't there": (["--methods", "lora:layers=1-2"], "no layer 2: the model has layers 0 to 1"),
    "layers that are none": (["--layers", "up"], "--layers must be a layer or a range of layers"),
    # Of a language model: a classifier's prefix can't be trained by every peft and transformers that are admitted.
    "a prefix that leaves no room": (
        ["--task", "lm", "--methods", "prefix:tokens=63"],
        "63 tokens before each text leave it",
    ),
    "an unknown task": (["--task", "translate"], "unknown task 'translate': choose from classify, lm"),
    "a method that makes no sense": (["--task", "lm"], "head makes no sense with --task lm"),
    "texts of one token": (["--max-length", "1"], "--max-length must be at least 2"),
    "unknown backend": (["--backend", "cuda"], "unknown backend 'cuda': choose from auto, triton, torch"),
    "no seed": (["--seeds", "0"], "--seeds must be a number above 0, got 0"),
    "more texts a step than can be": (["--batch-size", "9" * 21], "and at most 2,147,483,647, got"),
    "a negative learning rate": (["--lr", "-1"], "--lr must be a number above 0, got -1"),
    "a learning rate that is no number": (["--lr", "nan"], "--lr must be a number above 0, got nan"),
    "no steps": (["--max-steps", "0"], "--max-steps must be a number above 0, got 0"),
    "a model that isn't GPT-2": (["--model", "{}/bert"], "its model is bert"),
    "a model's file": (["--model", "{}/gpt2/config.json"], "is a file: give the folder it is in"),
    "no such model folder": (["--model", "{}/none"], "no such folder"),
    "a model folder without config": (["--model", "{}/empty"], "no config.json"),
    "a config that can't be read": (["--model", "{}/strange"], "config.json can't be read"),
    "a model without weights": (["--model", "{}/no-weights"], "can't be loaded"),
    "a damaged model": (["--model", "{}/damaged"], "can't be loaded"),
    "a model without tokenizer": (["--model", "{}/no-tokenizer"], "tokenizer"),
    "a tokenizer of another model": (
        ["--model", "{}/few-tokens"],
        "tokens, its model 20: keep the tokenizer's files",
    ),
    "a Hub name without network": (["--model", "openai-community/gpt2"], "the Hub can't be reached"),
    "a name that the Hub can't have": (["--model", "openai gpt2"], "neither a folder here nor a name"),
    "an output folder below a file": (["--out", "{}/file/out"], "can't be written: Not a directory"),
    "an output folder of something else": (["--out", "{}/full"], "holds something else"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_exit_code_2_and_leaves_nothing(
    case, files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(runner, "train_run", lambda *_: pytest.fail("training began"))
    before = sorted(files.rglob("*"))
    wrong, message = BAD_INPUT[case]
    options = {
        "--out": str(tmp_path / "out"),
        "--data": str(files / "texts.csv"),
        "--model": str(files / "gpt2"),
        "--methods": "head",
        **{option: value.format(files) for option, value in zip(wrong[::2], wrong[1::2], strict=True)},
    }
    said = _refused(["compare", *(word for option in options.items() for word in option)], capsys)
    assert message in said
    assert list(tmp_path.iterdir()) == []
    assert sorted(files.rglob("*")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that refuses even root")
def test_an_output_folder_that_cannot_be_written_is_refused(files, capsys):
    given = ["compare", "--methods", "lora", "--data", str(files / "texts.csv")]
    said = _refused([*given, "--out", "/proc/comparison"], capsys)
    assert "--out /proc/comparison: can't be written" in said


def test_a_backend_that_this_machine_cannot_run_is_refused(files, tmp_path, capsys, monkeypatch):
    def cannot(options, device):
        raise ValueError(f"no {options.backend} on {device}")

    monkeypatch.setattr(runner.routes, "choose", cannot)
    said = _refused(["compare", "--backend", "triton", "--out", str(tmp_path / "out")], capsys)
    assert "--backend triton: no triton on" in said
    assert list(tmp_path.iterdir()) == []


def test_compare_shows_a_line_a_run_a_table_and_the_path_of_the_report(files, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--out", str(out), "--data", str(files / "texts.csv"), "--model", str(files / "gpt2")]
    numbers = ["--seeds", "2", "--max-steps", "2", "--batch-size", "4", "--bottleneck", "3"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["compare", *options, *numbers, "--methods", "head,adapter-mlp"])
    assert not exit_.value.code
    said = capsys.readouterr()
    assert "[1/4] head seed 0: accuracy" in said.err
    assert "[4/4] adapter-mlp seed 1: accuracy" in said.err
    assert "adapter-mlp" in said.out
    assert "No difference follows from 6 held-out texts and 2 seeds" in said.out
    assert f"Report: {out / 'report.html'}" in said.out.replace("\n", "")
    recorded = json.loads((out / "results.json").read_text(encoding="utf-8"))["arguments"]
    assert recorded["bottleneck"] == 3
    assert recorded["methods"] == ["head", "adapter-mlp"]


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(files, tmp_path, capsys, monkeypatch):
    real = runner.train_run

    def second_is_interrupted(name, seed, *rest):
        if seed == 1:
            raise KeyboardInterrupt
        return real(name, seed, *rest)

    monkeypatch.setattr(runner, "train_run", second_is_interrupted)
    options = [
        "--out",
        str(tmp_path / "out"),
        "--data",
        str(files / "texts.csv"),
        "--model",
        str(files / "gpt2"),
    ]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["compare", *options, "--methods", "head", "--max-steps", "1"])
    assert exit_.value.code == 130
    assert "1 finished run kept; the same command goes on" in capsys.readouterr().err


def test_inspect_shows_versions_the_machine_and_every_site(files, capsys, monkeypatch):
    def no_network(*_):
        raise AssertionError("inspect opened a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["inspect", "--model", str(files / "gpt2")])
    assert not exit_.value.code
    said = capsys.readouterr().out
    for word in ("fastpeft", "torch", "peft", "processor", "device"):
        assert f"  {word}" in said
    sites = [line.split()[:2] for line in said.splitlines() if ".h." in line]
    kinds = [kind for _, kind in sites]
    assert (kinds.count("lora"), kinds.count("adapter"), kinds.count("activation")) == (8, 4, 2)
    assert any(name.endswith("transformer.h.1.attn.c_attn") for name, _ in sites)


def test_inspect_of_the_built_in_model_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        cli.main(["inspect"])
    assert "transformer.h.1.mlp.adapter" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_inspect_refuses_what_compare_refuses(files, capsys):
    assert "its model is bert" in _refused(["inspect", "--model", str(files / "bert")], capsys)


def test_help_names_every_method_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["compare", "--help"])
    assert not exit_.value.code
    said = capsys.readouterr().out
    assert all(name in said for name in PLACES)
    for option in ("--methods", "--model", "--data", "--seeds", "--epochs", "--max-steps", "--batch-size"):
        assert option in said
    for option in ("--lr", "--rank", "--bottleneck", "--out", "--backend"):
        assert option in said
    assert "rotten-tomatoes" in said


HEAVY = {"torch", "transformers", "peft", "numpy", "accelerate", "matplotlib"}
#: What needs none of these to be answered, and what answers it.
AT_ONCE = {
    "help": (["--help"], "Usage"),
    "help of compare": (["compare", "--help"], "--methods"),
    "an unknown option": (["compare", "--speed", "9"], "No such option"),  # quoted, or after a colon
    "an unknown method": (["compare", "--methods", "ia3"], "unknown method 'ia3'"),
    "a missing file": (["compare", "--data", "none.csv"], "no such file"),
    "a missing model": (["compare", "--model", "./none"], "no such folder"),
    "a missing model to inspect": (["inspect", "--model", "./none"], "no such folder"),
    "a missing report": (["report", "none"], "none/results.json: no such file"),
    "a file without texts": (["compare", "--data", "empty.csv"], "the file is empty"),
    "a layer that isn't there": (
        ["compare", "--model", "gpt2", "--methods", "lora:layers=2"],
        "no layer 2: the model has layers 0 to 1",
    ),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_what_needs_no_torch_is_answered_without_it(case, tmp_path):
    """Its import takes seconds; without it, and without what draws boxes around help, the answer takes typer's."""
    arguments, answer = AT_ONCE[case]
    (tmp_path / "empty.csv").touch()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}', encoding="utf-8")
    code = (
        "import sys, fastpeft.__main__\n"
        f"sys.argv = ['fastpeft', *{arguments!r}]\n"
        "try:\n    fastpeft.__main__.main()\n"
        f"finally:\n    print('heavy', sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert answer in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "heavy []"


def test_python_m_fastpeft_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "fastpeft", "compare", "--out", "unused", "--methods", "none"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastpeft: unknown method 'none'")
    assert "Traceback" not in done.stderr


def test_a_hub_that_never_answers_is_given_up_on(files, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(checkpoints.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(checkpoints.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(checkpoints, "HUB_TIMEOUT", 0.2)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        began = time.monotonic()
        said = _refused(["inspect", "--model", "openai-community/gpt2"], capsys)
    assert "the Hub can't be reached" in said
    assert time.monotonic() - began < 5


def test_texts_are_padded_on_the_right_whatever_the_checkpoint_says(files, tmp_path):
    """Positions count from the first token, so padding before it would give every text another meaning."""
    shutil.copytree(files / "gpt2", tmp_path / "gpt2")
    settings = tmp_path / "gpt2" / "tokenizer_config.json"
    changed = json.loads(settings.read_text(encoding="utf-8")) | {"padding_side": "left"}
    settings.write_text(json.dumps(changed), encoding="utf-8")
    base = runner.checkpoint.load(
        str(tmp_path / "gpt2"), CLASSIFY, ("bad", "good"), runner.machine.processes().device
    )
    padded = base.tokenizer(["short", "a much longer text"], padding=True)["attention_mask"][0]
    assert padded == sorted(padded, reverse=True)
    assert 0 in padded


def test_each_text_is_cut_to_what_model_and_prefix_can_take(files):
    base = runner.checkpoint.load(
        str(files / "gpt2"), CLASSIFY, ("bad", "good"), runner.machine.processes().device
    )
    long = runner.data.Part(["a lovely film " * 50, "short"], [1, 0])
    corpus = runner.data.Data("x", ("bad", "good"), long, long, 0, "")
    for asked, longest in (
        (Arguments(), 64 - 20),
        (Arguments(methods=("prefix:tokens=30", "head")), 64 - 30),
        (Arguments(max_length=9), 9),
    ):
        encoded = runner.encode(corpus, base, asked)
        assert encoded.cut == 2
        assert max(len(example["input_ids"]) for example in encoded.train) == longest
