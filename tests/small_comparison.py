"""A GPT-2 and a corpus so small that a comparison of them takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from fastpeft.compare.arguments import Arguments

GOOD = ("a lovely film", "bright and warm", "the best of them", "moving, funny, true", "a joy to watch")
BAD = ("a dull film", "flat and cold", "the worst of them", "tired, loud, false", "a chore to watch")


def texts(rows: int = 40) -> list[tuple[str, str]]:
    """Labelled texts, no two alike, both labels equally often."""
    return [
        (f"{(GOOD if i % 2 else BAD)[i // 2 % 5]} no. {i}", "good" if i % 2 else "bad") for i in range(rows)
    ]


def corpus(path: Path, rows: int = 40) -> Path:
    """A corpus as CSV, TSV or JSON lines, by the path's ending."""
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": text, "label": label}) for text, label in texts(rows)]
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        lines = [f"text{comma}label", *(f'"{text}"{comma}{label}' for text, label in texts(rows))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def checkpoint(folder: Path, **config: Any) -> Path:
    """A saved GPT-2 of two layers with random weights, and a byte-level BPE of its own."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text for text, _ in texts()], vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(
        GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **config})
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(folder: Path, **changes: Any) -> Arguments:
    """Arguments of a comparison on the corpus and checkpoint that are, or will be, in `folder`."""
    data, model = folder / "texts.csv", folder / "gpt2"
    if not data.exists():
        corpus(data)
    if not model.exists():
        checkpoint(model)
    small = {"data": str(data), "model": str(model), "seeds": 2, "max_steps": 4, "batch_size": 8}
    return Arguments(**{"out": folder / "out", **small, "rank": 2, "bottleneck": 4, **changes})


def options(asked: Arguments) -> list[str]:
    """The arguments as words of a command line."""
    given = {"out": asked.out, **asked.recorded(), "methods": ",".join(asked.methods)}
    return [
        word
        for name, value in given.items()
        if value is not None and value is not False
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]


def assert_one_report_of_two(asked: Arguments, said: str) -> None:
    """Two processes, which said this, wrote the results of one."""
    results = json.loads((asked.out / "results.json").read_text(encoding="utf-8"))
    assert results["machine"]["processes"] == 2
    assert len(results["runs"]) == 1
    assert said.count("Report:") == 1
