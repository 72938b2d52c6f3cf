"""What `--data` reads, what it refuses, and how it is split."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest
from small_comparison import corpus, texts

from fastpeft.compare import data, tables
from fastpeft.compare.errors import BadInput
from fastpeft.compare.tasks import CLASSIFY, LM


def _table(tmp_path: Path, *rows: str, name: str = "texts.csv", header: str = "text,label") -> Path:
    path = tmp_path / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def _load(path: Path, task: str = CLASSIFY) -> data.Data:
    return data.load(str(path), task)


ROWS = [f"{text},{label}" for text, label in ((f"word {i}", "yes" if i % 2 else "no") for i in range(20))]


@pytest.mark.parametrize("ending", tables.TABLES)
def test_the_three_kinds_of_file_hold_the_same_corpus(tmp_path, ending):
    read = data.load(str(corpus(tmp_path / f"texts{ending}")), CLASSIFY)
    pairs = {
        (text, read.label_names[label])
        for part in (read.train, read.eval)
        for text, label in zip(*part, strict=True)
    }
    assert pairs == set(texts())
    assert read.label_names == ("bad", "good")


def test_quoted_commas_line_breaks_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "texts.csv"
    rows = "\r\n".join(['"one, two\nthree",yes', *ROWS])
    path.write_bytes(b"\xef\xbb\xbf" + f"text,label\r\n{rows}\r\n".encode())
    read = _load(path)
    assert "one, two\nthree" in read.train.texts + read.eval.texts


def test_the_split_is_seeded_stratified_and_keeps_every_row_once(tmp_path):
    labels = ["a"] * 100 + ["b"] * 60 + ["c"] * 2
    train, evaluation = data.split(labels, 162)
    assert sorted(train + evaluation) == list(range(162))
    assert Counter(labels[i] for i in evaluation) == {"a": 15, "b": 9, "c": 1}
    assert (train, evaluation) == data.split(labels, 162)


def test_whole_number_labels_are_ordered_by_value(tmp_path):
    lines = [json.dumps({"text": f"text {i}", "label": i % 11}) for i in range(33)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert _load(path).label_names == tuple(map(str, range(11)))


def test_a_repeated_text_counts_once_so_that_no_eval_text_was_trained_on(tmp_path):
    read = _load(_table(tmp_path, *ROWS, *ROWS[:6]))
    assert read.repeated == 6
    assert not set(read.train.texts) & set(read.eval.texts)
    assert read.summary()["rows"] == 20
    assert read.summary()["skipped_rows"] == 6


def test_the_hash_tells_corpora_apart(tmp_path):
    first = _load(_table(tmp_path, *ROWS)).sha256
    assert first == _load(_table(tmp_path, *ROWS, name="again.csv")).sha256
    assert first != _load(_table(tmp_path, *ROWS[:-1], "word 19,no")).sha256


def test_rotten_tomatoes_is_the_whole_corpus_balanced_in_both_parts():
    read = data.load_rotten_tomatoes()
    assert len(read.train.texts) + len(read.eval.texts) + read.repeated == 8530
    assert read.label_names == ("negative", "positive")
    assert 0.49 < sum(read.train.labels) / len(read.train.labels) < 0.51
    assert 0.49 < sum(read.eval.labels) / len(read.eval.labels) < 0.51


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (ROWS, "text,class", "no 'label' column (columns: text, class)"),
        (ROWS, "sentence,label", "no 'text' column (columns: sentence, label)"),
        ([], "text,label", "the file is empty"),
        ([*ROWS, "   ,yes", ",no"], "text,label", "2 rows are unusable (empty text): row 22, 23"),
        ([*ROWS, "more,"], "text,label", "1 row is unusable (empty label): row 22"),
        ([*ROWS, "less"], "text,label", "1 row is unusable (empty label): row 22"),
        ([*ROWS, "not, quoted,yes"], "text,label", "row 22 has more fields than the header"),
        ([f"text {i},yes" for i in range(9)], "text,label", "one class only ('yes')"),
        ([*ROWS, "strange,maybe"], "text,label", "only the eval part would have the label 'maybe'"),
        (['"so" they say,yes', *ROWS], "text,label", "line 2: ',' expected after '\"'"),
        ([*ROWS, '"never closed,yes'], "text,label", "a field that begins with a quote has to end with one"),
        ([f"{row},no" for row in ROWS], "text,label,label", "two columns are named 'label'"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} rows",
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, rows, header, message):
    with pytest.raises(BadInput) as refusal:
        _load(_table(tmp_path, *rows, header=header))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 2 is not JSON"),
        ("[1]", "row 2 is not a JSON object"),
        ('{"text": "one"}', "row 2: no 'label' column"),
        ('{"text": 3, "label": "yes"}', "row 2: text is 3"),
        ('{"text": "three", "label": [1]}', "row 2: label is [1]"),
        ('{"text": null, "label": "yes"}', "(empty text): row 2"),
        (r'{"text": "half \ud83d", "label": "yes"}', "(not UTF-8): row 2"),
        (f'{{"text": "long", "label": {"9" * 5000}}}', "row 2 is not JSON"),
        ("[" * 100_000, "row 2 is not JSON"),
    ],
)
def test_json_lines_that_cannot_be_used_are_refused(tmp_path, line, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "fine", "label": "no"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(BadInput) as refusal:
        _load(path)
    assert message in str(refusal.value)


def test_a_quote_that_opens_a_text_swallows_no_rows(tmp_path):
    rows = ['"Great film\tyes', *(row.replace(",", "\t") for row in ROWS), '"Bad one\tno']
    with pytest.raises(BadInput, match="has to end with one"):
        _load(_table(tmp_path, *rows, name="texts.tsv", header="text\tlabel"))


def test_another_encoding_is_named(tmp_path):
    path = _table(tmp_path, *ROWS)
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-16")
    with pytest.raises(BadInput, match="is UTF-16: save it as UTF-8"):
        _load(path)


def test_documents_are_numbered_by_their_lines_in_one_pass(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\nmore\n\n\n two\n \nthree\n", encoding="utf-8")
    assert [(row.number, row.text) for row in tables.read(path, ("text",))] == [
        (1, "one\nmore"), (5, "two"), (7, "three")
    ]  # fmt: skip
    path.write_text("a document of some words\n\n" * 60_000, encoding="utf-8")
    began = time.perf_counter()
    assert tables.read(path, ("text",))[-1].number == 2 * 60_000 - 1
    assert time.perf_counter() - began < 5  # counted from the start each time, four minutes


def test_an_empty_file_is_refused(tmp_path):
    for ending in tables.TABLES:
        path = tmp_path / f"texts{ending}"
        path.touch()
        with pytest.raises(BadInput, match="the file is empty"):
            _load(path)


def test_rows_that_are_not_utf8_are_counted_and_named(tmp_path):
    path = tmp_path / "texts.csv"
    rows = [row.encode() for row in ROWS]
    rows[3], rows[7] = b"caf\xe9,yes", b"na\xefve,no"
    path.write_bytes(b"\n".join([b"text,label", *rows]))
    with pytest.raises(BadInput) as refusal:
        _load(path)
    assert "2 rows are unusable (not UTF-8): row 5, 9" in str(refusal.value)


def test_long_lists_of_rows_are_cut_short(tmp_path):
    with pytest.raises(BadInput) as refusal:
        _load(_table(tmp_path, *ROWS, *[",no"] * 30))
    assert "30 rows" in str(refusal.value)
    assert "row 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, ...;" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "message"), [("none.csv", "no such file"), ("texts.xlsx", "ending in .csv")]
)
def test_a_file_that_is_not_there_or_of_another_kind_is_refused(tmp_path, name, message):
    with pytest.raises(BadInput, match=message):
        _load(tmp_path / name)


def test_documents_of_a_language_model_are_rows_or_what_blank_lines_part(tmp_path):
    table = _load(_table(tmp_path, *(f"document {i}" for i in range(20)), header="text"), LM)
    plain = tmp_path / "book.txt"
    plain.write_text("\n \n".join(f"chapter {i}\nof the book" for i in range(20)) + "\n", encoding="utf-8")
    for read, text in (table, "document {}"), (_load(plain, LM), "chapter {}\nof the book"):
        assert sorted(read.train.texts + read.eval.texts) == sorted(map(text.format, range(20)))
        assert len(read.eval.texts) == 3
        assert read.label_names == ()
    assert sorted(row.number for row in tables.read(plain, ("text",)))[:3] == [1, 4, 7]


def test_of_very_many_documents_some_hundreds_judge_and_the_rest_train(tmp_path):
    many = _load(_table(tmp_path, *(f"document {i}" for i in range(4000)), header="text"), LM)
    assert (len(many.train.texts), len(many.eval.texts)) == (3600, 400)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", "one\n\ntwo", "2 documents are too few to hold some out"),
        ("long.txt", "a line\n" * 50, "1 document is too few to hold some out"),
        ("blank.txt", "\n \n", "the file is empty"),
        ("holes.csv", "text\n" + "".join(f"no. {i}\n" for i in range(12)) + '""\n', "(empty text): row 14"),
        ("labels.csv", "label\nyes\n", "no 'text' column"),
        ("latin1.txt", "caf\udce9\n\n" * 12, "not UTF-8): row 1, 3, 5"),
    ],
)
def test_documents_that_cannot_be_used_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BadInput) as refusal:
        _load(path, LM)
    assert message in str(refusal.value)


def test_plain_text_has_no_labels_to_tell(tmp_path):
    (tmp_path / "book.txt").write_text("a\n\nb", encoding="utf-8")
    with pytest.raises(BadInput, match=r"ending in \.csv, \.tsv, \.jsonl$"):
        _load(tmp_path / "book.txt")
