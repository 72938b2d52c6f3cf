"""What was fused, what was not, and why."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from fastpeft import routes
from fastpeft.patching import Candidate, candidates

#: Of the kinds that torch always serves.
_FIRST_REASON = {
    "activation": "one pass",
    "frozen": "oneDNN",
    "packing": "not called yet",
    "loss": "not called yet",
}


class Row(NamedTuple):
    """One site of a model."""

    name: str  # of its module
    kind: str  # lora, adapter, activation, frozen, packing or loss
    path: str  # triton, torch or stock
    reason: str  # why this path
    calls: int  # fused calls so far


class Report(tuple[Row, ...]):
    """The rows of `report`; `str()` is a table with a summary line."""

    def __str__(self) -> str:
        cells = [Row._fields, *((r.name, r.kind, r.path, r.reason, str(r.calls)) for r in self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        paths = Counter(row.path for row in self)
        summary = ", ".join(f"{count} {path}" for path, count in sorted(paths.items())) or "nothing to fuse"
        return "\n".join([*lines, f"{len(self)} sites: {summary}"])


def report(model: nn.Module) -> Report:
    """A row for each LoRA layer, bottleneck adapter, `gelu_new` and fused frozen layer of `model`, its packing, and a
    language model's loss without its logits.

    A site's path and reason are those of its last call; before the first, those its next call would take.
    """
    return Report(_row(candidate) for candidate in candidates(model))


def _row(candidate: Candidate) -> Row:
    name, module, kind, _, reason = candidate
    site = vars(module).get("_fastpeft")
    if site is None:
        return Row(name, kind, "stock", reason or "not patched: call fastpeft.patch", 0)
    # A frozen layer that isn't served any more notes no calls.
    if site.last is not None and not (kind == "frozen" and reason):
        path = _path_below(module) if site.last.path == "packed" else site.last.path
        return Row(name, kind, path, site.last.reason, site.calls)
    if reason:
        return Row(name, kind, "stock", reason, site.calls)
    if kind in _FIRST_REASON:
        return Row(name, kind, "torch", _FIRST_REASON[kind], site.calls)
    path, why = routes.choose(site.options, next(module.parameters()).device)
    return Row(name, kind, path, why, site.calls)


def _path_below(transformer: nn.Module) -> str:
    """The path that the layers of a packed GPT-2 took."""
    sites = [vars(m).get("_fastpeft") for m in transformer.modules()]
    paths = {site.last.path for site in sites if site is not None and site.last is not None}
    return "triton" if "triton" in paths else "torch"
