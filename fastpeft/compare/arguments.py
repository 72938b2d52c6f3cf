"""What a comparison is asked to do, with its defaults; and the checks that need no file."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastpeft.backends import BACKENDS
from fastpeft.compare import methods
from fastpeft.compare.data import ROTTEN_TOMATOES
from fastpeft.compare.errors import BadInput
from fastpeft.compare.methods import Method
from fastpeft.compare.tasks import CLASSIFY, LM, TASKS

IMDB_SMALL = "imdb-small"
DEFAULT_METHODS = {
    CLASSIFY: ("head", "lora-qkv", "lora", "adapter-mlp", "prefix", "full"),
    LM: ("prefix", "lora-qkv", "lora", "adapter-mlp"),
}
#: With `--quick`: steps of a run, and seeds, at most.
QUICK = {"max_steps": 20, "seeds": 2}
_NUMBERS = (
    "seeds", "epochs", "max_steps", "batch_size", "accumulate", "max_length", "lr", "rank", "bottleneck"
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Arguments of one comparison: the command line's options, by the same names.

    Raises:
        BadInput: an unknown task or backend, a method that `methods.parse` refuses or one named twice, a number
            out of its range.
    """

    out: Path = Path("fastpeft-report")
    task: str = CLASSIFY
    methods: tuple[str, ...] = ()  # none: the task's `DEFAULT_METHODS`
    model: str = IMDB_SMALL
    data: str = ROTTEN_TOMATOES
    seeds: int = 3
    epochs: float = 1.0
    max_steps: int | None = None  # goes before epochs
    batch_size: int = 32  # a device
    accumulate: int = 1
    max_length: int | None = None  # None: what the model takes
    lr: float | None = None  # None: each method's own
    rank: int = 8
    bottleneck: int = 64
    layers: str | None = None  # None: all
    backend: str = "auto"
    together: bool = False  # the seeds of a method of LoRA or adapters train side by side

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            most = methods.MOST if isinstance(value, int) else sys.float_info.max
            if value is not None and not 0 < value <= most:
                bound = f" and at most {most:,}" if isinstance(value, int) and value > most else ""
                raise BadInput(f"--{name.replace('_', '-')} must be a number above 0{bound}, got {value}")
        if self.max_length == 1:
            raise BadInput("--max-length must be at least 2: a token is judged by what came before it")
        if self.task not in TASKS:
            raise BadInput(f"unknown task {self.task!r}: choose from {', '.join(TASKS)}")
        if not self.methods:
            object.__setattr__(self, "methods", DEFAULT_METHODS[self.task])
        self.refuse_twins([(method.place, method.options) for method in self.chosen])
        if self.backend not in BACKENDS:
            raise BadInput(f"unknown backend {self.backend!r}: choose from {', '.join(BACKENDS)}")

    @cached_property
    def chosen(self) -> tuple[Method, ...]:
        """The methods, parsed."""
        try:
            layers = None if self.layers is None else methods.layers(self.layers)
        except ValueError:
            raise BadInput(
                f"--layers must be a layer or a range of layers, like 6-11, got {self.layers!r}"
            ) from None
        defaults = {
            "r": self.rank,
            "bottleneck": self.bottleneck,
            "layers": layers,
            "dropout": methods.LORA_DROPOUT,
            "tokens": methods.PREFIX_TOKENS,
        }
        return tuple(methods.parse(name, self.task, defaults) for name in self.methods)

    def refuse_twins(self, settings: list[Any]) -> None:
        """Raises where two of the methods come to the same, by these."""
        for i, setting in enumerate(settings):
            if setting in settings[:i]:
                twin = self.methods[settings.index(setting)]
                raise BadInput(
                    f"--methods takes each method once, got {','.join(self.methods)!r}"
                    + (f": {self.methods[i]} comes to the same as {twin}" if self.methods[i] != twin else "")
                )

    @property
    def reserved(self) -> int:
        """Positions that texts leave to a prefix or prompt, whichever is the longest; the same for all methods."""
        return max(methods.PREFIX_TOKENS, *(method.options.get("tokens", 0) for method in self.chosen))

    def recorded(self) -> dict[str, Any]:
        """What decides the results, as JSON: all but `out`, so that a folder may be moved."""
        recorded = asdict(self) | {"methods": list(self.methods)}
        del recorded["out"]
        return recorded
