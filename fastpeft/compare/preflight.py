"""What can be refused without torch: a file or folder that isn't there, a model that isn't GPT-2."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from fastpeft.compare import data
from fastpeft.compare.arguments import IMDB_SMALL, Arguments
from fastpeft.compare.errors import BadInput

PLAN_FILE = "plan.json"
RESULTS_FILE = "results.json"
#: Of a run's record: it goes up when a key comes, goes or changes its meaning.
RECORD_FORMAT = 4
#: Held while a comparison writes to its folder.
LOCK_FILE = ".lock"
FEWEST_TOKENS = 2  # of a text


class Shape(NamedTuple):
    """What methods must fit into, by the names of GPT-2's config."""

    n_layer: int
    n_positions: int


def check(arguments: Arguments) -> data.Data:
    """The data, and a refusal of what a look at files and folders tells; leaves no trace.

    Raises:
        BadInput: an output folder that can't be written or holds something else, data that can't be read or split, a
            model folder that isn't there or holds no GPT-2 that the methods fit.
    """
    check_folder(arguments.out, PLAN_FILE)
    data.check(arguments.data, arguments.task)
    if found := check_model(arguments.model):
        check_fit(arguments, found)
    return data.load(arguments.data, arguments.task)


def check_fit(arguments: Arguments, model: Shape) -> None:
    """Refuse methods that a model hasn't the layers or the positions for, or that come to the same in it.

    Raises:
        BadInput: with the reason.
    """
    arguments.refuse_twins(
        [
            (method.place, {**method.options, "layers": method.layers(model)})
            if "layers" in method.options
            else (method.place, method.options)
            for method in arguments.chosen
        ]
    )
    if model.n_positions - arguments.reserved < FEWEST_TOKENS:
        raise BadInput(
            f"--methods: {arguments.reserved} tokens before each text leave it fewer than {FEWEST_TOKENS}: the model "
            f"has {model.n_positions} positions"
        )


def check_model(name: str) -> Shape | None:
    """The shape of a model in a folder; None for what the Hub has or fastpeft makes, which is known later.

    Raises:
        BadInput: it isn't there or holds no GPT-2.
    """
    folder = None if name == IMDB_SMALL else local_folder(name)
    return shape(folder, name) if folder else None


def local_folder(name: str) -> Path | None:
    """The user's own folder of a checkpoint; None for a name that the Hub may have.

    Raises:
        BadInput: no such folder, or one without a config.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise BadInput(f"--model {name}: the folder has no config.json: expected a saved GPT-2 model")
        return path
    looks_like_a_path = path.exists() or path.is_absolute() or name.startswith((".", "~"))
    if looks_like_a_path or name.count("/") > 1 or not name:
        what = "is a file: give the folder it is in" if path.is_file() else "no such folder"
        raise BadInput(f"--model {name}: {what}")
    return None


def shape(folder: Path, name: str) -> Shape:
    """Of the GPT-2 in a folder.

    Raises:
        BadInput: it can't be read, or is another model's.
    """
    try:
        found: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise BadInput(f"--model {name}: its config.json can't be read")
    if found.get("model_type") != "gpt2":
        kind = found.get("model_type", "of no stated type")
        raise BadInput(f"--model {name}: its model is {kind}, and fastpeft compares on GPT-2")
    return Shape(found.get("n_layer", 12), found.get("n_positions", 1024))


def part(path: Path) -> Path:
    """Where a file is while it is written."""
    return path.with_name(f".{path.name}.part")


def check_folder(out: Path, ours: str) -> None:
    """Refuse a folder that can't be written, or that holds something but no file of this name; leaves no trace.

    Raises:
        BadInput: with the reason.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise BadInput(f"--out {out}: can't be written: {error.strerror}") from None
    known = {ours, part(out / ours).name, LOCK_FILE}
    if out.exists() and any(out.iterdir()) and not known & {path.name for path in out.iterdir()}:
        raise BadInput(f"--out {out}: the folder holds something else: name an empty or new one")
