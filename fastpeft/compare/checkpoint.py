"""The base model of a comparison and its tokenizer: the built-in one, a folder's, or the Hub's."""

from __future__ import annotations

import hashlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastpeft.compare import base_model, preflight
from fastpeft.compare.arguments import IMDB_SMALL
from fastpeft.compare.errors import BadInput
from fastpeft.compare.placement import MODEL_CLASSES
from fastpeft.compare.tasks import LM

#: The Hub must answer within this many seconds; a machine without a network must not wait for minutes.
HUB_TIMEOUT = 10


class Base(NamedTuple):
    """A GPT-2 with the task's head (a classifier's is fresh), its tokenizer, and what the record says of it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    description: dict[str, Any]


def shape(name: str) -> preflight.Shape:
    """A model's; refuses, before any work, one that isn't there or isn't GPT-2. Reads no weights.

    Raises:
        BadInput: with the reason.
    """
    if name == IMDB_SMALL:
        base_model.tokenizer()
        return preflight.Shape(base_model.RECIPE["layers"], base_model.RECIPE["positions"])
    return preflight.shape(_find(name, "config"), name)


def load(
    name: str,
    task: str,
    label_names: tuple[str, ...],
    device: torch.device,
    notify: Callable[[int, int], None] = lambda step, steps: None,
) -> Base:
    """The model in float32 on the CPU, a classifier for these labels; the built-in one is trained if it never was.

    Raises:
        BadInput: the checkpoint or its tokenizer can't be loaded.
    """
    if name == IMDB_SMALL:
        folder = base_model.ensure(device, notify)
        description: dict[str, Any] = {
            "name": name,
            "folder": None,
            "pretrained_here": base_model.described(folder),
        }
    else:
        shape(name)
        folder = _find(name)
        own = preflight.local_folder(name)
        description = {"name": name, "folder": own and str(own.resolve()), "pretrained_here": None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = MODEL_CLASSES[task].from_pretrained(folder, dtype=torch.float32, **_head(task, label_names))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"--model {name}: can't be loaded: {str(error).strip().splitlines()[0]}") from None
    if not 0 < tokenizer.vocab_size <= len(tokenizer) <= model.config.vocab_size:
        raise BadInput(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its model "
            f"{model.config.vocab_size}: keep the tokenizer's files (tokenizer.json) beside the weights"
        )
    _set_padding(tokenizer, model)
    description |= {
        "layers": model.config.n_layer,
        "width": model.config.n_embd,
        "positions": model.config.n_positions,
        "pad_token_id": model.config.pad_token_id,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": _fingerprint(model.transformer),
    }
    return Base(model, tokenizer, description)


def _head(task: str, label_names: tuple[str, ...]) -> dict[str, Any]:
    """What `from_pretrained` is told of the head."""
    if task == LM:
        return {}
    return {
        "num_labels": len(label_names),
        "ignore_mismatched_sizes": True,
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: i for i, label in enumerate(label_names)},
    }


def _find(name: str, files: str = "*") -> Path:
    """The folder of a checkpoint: the user's own, or the Hub's copy of these files in its cache."""
    return preflight.local_folder(name) or _from_hub(name, files)


def _from_hub(name: str, files: str) -> Path:
    wanted = [f"{files}.json", f"{files}.txt", f"{files}.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=not _hub_answers()))
    except HFValidationError:
        raise BadInput(f"--model {name}: neither a folder here nor a name the Hub could have") from None
    except RepositoryNotFoundError:
        raise BadInput(f"--model {name}: no such folder, and no such public model on the Hub") from None
    except OSError:
        raise BadInput(
            f"--model {name}: no such folder, and the Hub can't be reached to look for it: "
            "check the network or give a local folder"
        ) from None


def _hub_answers() -> bool:
    """Whether the Hub gives any answer in time; its own client would try again and again for minutes."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # an answer, whose certificate the client may know
    except TimeoutError:
        return False
    return True


def _set_padding(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """GPT-2 has no padding token, and the classifier finds a text's last token by it: use end-of-text."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"


def _fingerprint(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
