"""The methods compared, as data: what each trains, the options it takes, and how many parameters that is.

A method is a place in a GPT-2 and options: `lora`, `lora-qkv:r=16,dropout=0.1`, `adapter-mlp:bottleneck=8,layers=6-11`.
Whatever the place, a classifier's head trains as well; a language model's is its token embedding, frozen with the base.
`placement.py` puts them on a model; nothing here needs torch, so that a mistyped method is answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastpeft.compare.errors import BadInput
from fastpeft.compare.tasks import CLASSIFY, LM

#: No number may be larger, in a method or beside it: what it sizes would fit nowhere.
MOST = 2**31 - 1
#: peft's usual prefix; it takes this many of the model's positions.
PREFIX_TOKENS = 20
LORA_DROPOUT = 0.05

HEAD_TERM = "{classes}·{width}"
ADAPTER_TERM = "(2·{width}·{bottleneck} + {width} + {bottleneck})"
PREFIX_TERM = "{layers}·2·{tokens}·{width}"
BASE_TERM = (
    "({vocabulary} + {positions} + 2)·{width}"
    " + {layers}·(4·{width}·{width} + 2·{width}·{inner} + 9·{width} + {inner})"
)
_LORA_OPTIONS = ("r", "dropout", "layers")
_ADAPTER_OPTIONS = ("bottleneck", "layers")


@dataclass(frozen=True)
class Place:
    """What a method's name stands for."""

    kind: str  # head, lora, adapter, prefix, prompt or full: how placement.py puts it there
    where: tuple[str, ...]  # LoRA's projections, adapters' slots
    trains: str  # what, in a few words
    term: str  # the formula of its parameters, without a head's; fields are the keys of `sizes`
    #: A peak, tried on another split of the classifier: of LoRA's and the adapters' all from 5e-4 to 4e-3 do, within
    #: a point and a half.
    learning_rate: float
    options: tuple[str, ...] = ()
    senseless: tuple[str, str] | None = None  # a task that it makes no sense for, and why


def _lora(where: tuple[str, ...], trains: str, rows: str) -> Place:
    return Place("lora", where, trains, f"{{layers}}·{{r}}·{rows}", 1e-3, _LORA_OPTIONS)


def _adapter(where: tuple[str, ...], trains: str, term: str, options: tuple[str, ...]) -> Place:
    return Place("adapter", where, trains, term, 1e-3, options)


#: A LoRA of a layer K → N has r·(K + N) parameters (Hu et al., 2021); an adapter 2·width·bottleneck and its two
#: biases (Houlsby et al., 2019; in parallel, He et al., 2022); a prefix a key and a value a token and layer (Li &
#: Liang, 2021); a prompt an embedding a token (Lester et al., 2021).
PLACES: dict[str, Place] = {
    "head": Place(
        "head", (), "nothing else", "", 5e-3,
        senseless=(LM, "a language model's head is its token embedding, frozen with the base"),
    ),
    "lora": _lora(
        ("c_attn", "c_proj", "c_fc"),
        "LoRA on every projection (c_attn, attn.c_proj, c_fc, mlp.c_proj)",
        "(8·{width} + 2·{inner})",
    ),
    "lora-qkv": _lora(("c_attn",), "LoRA on queries, keys and values (c_attn)", "4·{width}"),
    "lora-proj": _lora(("attn.c_proj",), "LoRA on the attention's output projection (attn.c_proj)", "2·{width}"),
    "lora-mlp": _lora(("c_fc", "mlp.c_proj"), "LoRA on the MLP (c_fc, mlp.c_proj)", "(2·{width} + 2·{inner})"),
    "adapter-attn": _adapter(
        ("post_attn",), "bottleneck adapters after each attention", f"{{layers}}·{ADAPTER_TERM}", _ADAPTER_OPTIONS
    ),
    "adapter-mlp": _adapter(
        ("post_mlp",), "bottleneck adapters after each MLP", f"{{layers}}·{ADAPTER_TERM}", _ADAPTER_OPTIONS
    ),
    "adapter-houlsby": _adapter(
        ("post_attn", "post_mlp"),
        "bottleneck adapters after each attention and each MLP",
        f"{{layers}}·2·{ADAPTER_TERM}",
        _ADAPTER_OPTIONS,
    ),
    "adapter-parallel": _adapter(
        ("parallel_mlp",), "bottleneck adapters beside each MLP", f"{{layers}}·{ADAPTER_TERM}", _ADAPTER_OPTIONS
    ),
    "adapter-block": _adapter(
        ("post_block",), "bottleneck adapters after each block", f"{{layers}}·{ADAPTER_TERM}", _ADAPTER_OPTIONS
    ),
    "adapter-embed": _adapter(
        ("post_embed",), "a bottleneck adapter after the embeddings", ADAPTER_TERM, ("bottleneck",)
    ),
    "adapter-head": _adapter(
        ("pre_head",), "a bottleneck adapter before the head", ADAPTER_TERM, ("bottleneck",)
    ),
    "prefix": Place("prefix", (), "a prefix of keys and values in every layer", PREFIX_TERM, 5e-3, ("tokens",)),
    "prompt": Place(
        "prompt", (), "embeddings before the text", "{tokens}·{width}", 3e-2, ("tokens",),
        senseless=(
            CLASSIFY,
            "GPT-2 given embeddings instead of tokens judges at the last position, padding in most rows",
        ),
    ),
    "full": Place("full", (), "every weight of the model", BASE_TERM, 3e-4),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A place and the value of every option that it takes."""

    name: str  # as it was asked for
    place: Place
    options: dict[str, Any]  # `layers` is (first, last), or None for all

    def layers(self, config: Any) -> list[int]:
        """Indices of the layers that it is put on, of a GPT-2 of this config.

        Raises:
            BadInput: the model hasn't all of them.
        """
        first, last = self.options.get("layers") or (0, config.n_layer - 1)
        if last >= config.n_layer:
            raise BadInput(
                f"--methods {self.name}: no layer {last}: the model has layers 0 to {config.n_layer - 1}"
            )
        return list(range(first, last + 1))

    def formula(self, config: Any, task: str) -> str:
        """Trainable parameters as `symbols = numbers`, for a GPT-2 of this config with the task's head."""
        terms = [self.place.term, HEAD_TERM if task == CLASSIFY else ""]
        formula = " + ".join(term for term in terms if term)
        sizes = {
            "width": config.n_embd,
            "inner": config.n_inner or 4 * config.n_embd,
            "vocabulary": config.vocab_size,
            "positions": config.n_positions,
            "classes": config.num_labels,
            **self.options,
            "layers": len(self.layers(config)),
        }
        return f"{formula.format(**{name: name for name in sizes})} = {formula.format(**sizes)}"


def parse(text: str, task: str, defaults: dict[str, Any]) -> Method:
    """The method that `NAME:option=value,...` stands for; options not named are as in `defaults`.

    Raises:
        BadInput: an unknown name, one that makes no sense for the task, an unknown option, a value it can't have.
    """
    name, colon, given = text.partition(":")
    place = PLACES.get(name)
    if place is None:
        raise BadInput(f"unknown method {name!r}: choose from {', '.join(PLACES)}")
    if place.senseless and place.senseless[0] == task:
        raise BadInput(
            f"--methods: {name} makes no sense with --task {task}, leave it out: {place.senseless[1]}"
        )
    options = {option: defaults[option] for option in place.options}
    named: set[str] = set()
    for pair in given.split(",") if colon else ():
        option, equals, value = pair.partition("=")
        if option in named:
            raise BadInput(f"--methods {text}: {option} is given twice")
        named.add(option)
        if option not in options:
            takes = f"takes {', '.join(options)}" if options else "takes no options"
            raise BadInput(f"--methods {text}: no option {option!r}: {name} {takes}")
        try:
            options[option] = _READ[option](value)
        except ValueError:
            raise BadInput(
                f"--methods {text}: {option} must be {_WANTED[option]}, got {value if equals else 'nothing'!r}"
            ) from None
    return Method(text, place, options)


def run_name(method: Method, seed: int) -> str:
    """The folder of a run: its method's name, fit for a file, and its seed."""
    return f"{method.name.replace(':', '_').replace(',', '_')}-seed{seed}"


def names(text: str) -> tuple[str, ...]:
    """The methods in `a,b:x=1,y=2,c`: after a comma a method begins, or an option of the one before."""
    found: list[str] = []
    for piece in filter(None, "".join(text.split()).split(",")):
        if "=" in piece and ":" not in piece and found:
            found[-1] += f"{',' if ':' in found[-1] else ':'}{piece}"
        else:
            found.append(piece)
    return tuple(found)


def layers(text: str) -> tuple[int, int]:
    """First and last layer of `6-11`, or of `6`; ValueError where it is neither."""
    first, dash, last = text.partition("-")
    ends = _whole(first), _whole(last if dash else first)
    if ends[0] > ends[1]:
        raise ValueError(text)
    return ends


def _whole(text: str) -> int:
    """`int` takes `1_0` and digits of any script too."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return int(text)


def _count(text: str) -> int:
    if not 1 <= _whole(text) <= MOST:
        raise ValueError(text)
    return int(text)


def _probability(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise ValueError(text)
    return float(text)


_READ: dict[str, Any] = {
    "r": _count, "bottleneck": _count, "tokens": _count, "dropout": _probability, "layers": layers
}  # fmt: skip
_WANTED = {
    **dict.fromkeys(("r", "bottleneck", "tokens"), "a whole number of at least 1"),
    "dropout": "a number from 0 up to, not including, 1",
    "layers": "a layer or a range of layers, like 6-11",
}
