"""What can be refused without torch: a file or folder that isn't there, a model that isn't GPT-2."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fastpeft.compare import data
from fastpeft.compare.arguments import IMDB_SMALL, Arguments
from fastpeft.compare.errors import BadInput

PLAN_FILE = "plan.json"
RESULTS_FILE = "results.json"


def check(arguments: Arguments) -> None:
    """Refuse what a look at files and folders tells; leaves no trace.

    Raises:
        BadInput: an output folder that can't be written or holds something else, no such data, a model folder that
            isn't there or holds no GPT-2.
    """
    check_folder(arguments.out, PLAN_FILE)
    data.check(arguments.data, arguments.task)
    check_model(arguments.model)


def check_model(name: str) -> None:
    """Refuse a model's folder that isn't there or holds no GPT-2; what the Hub has is known later.

    Raises:
        BadInput: with the reason.
    """
    if name != IMDB_SMALL and (folder := local_folder(name)):
        config(folder, name)


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
        raise BadInput(f"--model {name}: no such folder")
    return None


def config(folder: Path, name: str) -> dict[str, Any]:
    """The config of the GPT-2 in a folder.

    Raises:
        BadInput: it can't be read, or is another model's.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise BadInput(f"--model {name}: its config.json can't be read")
    if found.get("model_type") != "gpt2":
        kind = found.get("model_type", "of no stated type")
        raise BadInput(f"--model {name}: its model is {kind}, and fastpeft compares on GPT-2")
    return found


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
    known = {ours, part(out / ours).name}
    if out.exists() and any(out.iterdir()) and not known & {path.name for path in out.iterdir()}:
        raise BadInput(f"--out {out}: the folder holds something else: name an empty or new one")
