"""Several comparisons of the same held-out texts, as one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from fastpeft.compare.errors import BadInput
from fastpeft.compare.preflight import RECORD_FORMAT, RESULTS_FILE

_PARTS = ("arguments", "model", "versions", "machine", "data")
#: Of the data the rest is the same, or the folders can't be joined.
_IN_PART = {"data": ("longest", "cut_rows")}
#: Where the model lies says nothing of what it is.
_UNTOLD = ("folder",)


def join(folders: list[Path]) -> dict[str, Any]:
    """The results of all folders in one, with what differs between them; of seeds, those that all have.

    A method that several have is told apart by as much of its folder's path as does it.

    Raises:
        BadInput: a folder without results, twice the same folder, or comparisons of different tasks or texts.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise BadInput("report takes each folder once")
    found = [_read(folder) for folder in folders]
    first = found[0]
    for folder, results in zip(folders[1:], found[1:], strict=True):
        for what, of in (
            ("task", lambda r: r["task"]),
            ("data", lambda r: f"{r['data']['name']}, {r['data']['sha256'][:12]}"),
            ("number of tokens", lambda r: sum(r["data"]["weights"])),
        ):
            if of(results) != of(first):
                raise BadInput(
                    f"{folders[0]} and {folder} can't be joined: the {what} differs ({of(first)}, "
                    f"{of(results)})"
                )
    seeds = min(results["arguments"]["seeds"] for results in found)
    counts = Counter(method for results in found for method in {run["method"] for run in results["runs"]})
    runs = [
        run
        | {"load": run["load"].replace("runs/", f"{folder.resolve()}/runs/")}
        | ({"method": f"{run['method']} [{label}]"} if counts[run["method"]] > 1 else {})
        for folder, label, results in zip(folders, _labels(folders), found, strict=True)
        for run in results["runs"]
        if run["seed"] < seeds
    ]
    methods = list(dict.fromkeys(run["method"] for run in runs))
    same_model = all(results["model"]["sha256"] == first["model"]["sha256"] for results in found)
    return first | {
        "arguments": first["arguments"] | {"methods": methods, "seeds": seeds},
        "before": first["before"] if same_model else None,
        "runs": runs,
        "joined": {"folders": [str(folder) for folder in folders], "differs": _differing(found)},
    }


def _labels(folders: list[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    ends = ([str(Path(*path[-size:])) for path in paths] for size in range(1, 1 + max(map(len, paths))))
    return next(labels for labels in ends if len(set(labels)) == len(labels))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file: name the --out folder of a finished comparison") from None
    except (OSError, ValueError):
        raise BadInput(f"{path}: can't be read as the results of a comparison") from None
    if not isinstance(found, dict) or not {"task", "runs", "record", *_PARTS} <= found.keys():
        raise BadInput(f"{path}: not the results of a comparison")
    if found["record"] != {"format": RECORD_FORMAT}:
        raise BadInput(f"{path}: by another version of fastpeft, which records other things: compare again")
    return found


def _differing(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each setting that isn't the same in all, its values in the order of the folders."""
    rows = []
    for part in _PARTS:
        for key in _IN_PART.get(part, found[0][part]):
            values = [results[part].get(key) for results in found]
            if key not in _UNTOLD and any(value != values[0] for value in values):
                rows.append(
                    {"what": f"{part} {key.replace('_', ' ')}", "values": [_shown(v) for v in values]}
                )
    return rows


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)[:60]
