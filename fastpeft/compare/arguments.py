"""What a comparison is asked to do, with its defaults; and the checks that need no file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpeft.compare.errors import BadInput
from fastpeft.compare.methods import METHODS
from fastpeft.ops import BACKENDS

ROTTEN_TOMATOES = "rotten-tomatoes"
IMDB_SMALL = "imdb-small"
DEFAULT_METHODS = ("head", "lora", "adapter-attn", "adapter-mlp", "prefix")


@dataclass(frozen=True)
class Arguments:
    """Arguments of one comparison: the command line's options, by the same names.

    Raises:
        BadInput: an unknown method or one named twice, an unknown backend, a number out of its range.
    """

    out: Path = Path("fastpeft-report")
    methods: tuple[str, ...] = DEFAULT_METHODS
    model: str = IMDB_SMALL
    data: str = ROTTEN_TOMATOES
    seeds: int = 3
    epochs: float = 1.0
    max_steps: int | None = None  # goes before epochs
    batch_size: int = 32  # a device
    lr: float | None = None  # None: each method's own
    rank: int = 8
    bottleneck: int = 64
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "max_steps", "batch_size", "lr", "rank", "bottleneck"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise BadInput(f"--{name.replace('_', '-')} must be a number above 0, got {value}")
        for name in self.methods:
            if name not in METHODS:
                raise BadInput(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise BadInput(f"--methods takes each method once, got {','.join(self.methods) or 'none'!r}")
        if self.backend not in BACKENDS:
            raise BadInput(f"unknown backend {self.backend!r}: choose from {', '.join(BACKENDS)}")

    def recorded(self) -> dict[str, Any]:
        """What decides the results, as JSON: all but `out`, so that a folder may be moved."""
        recorded = asdict(self) | {"methods": list(self.methods)}
        del recorded["out"]
        return recorded
