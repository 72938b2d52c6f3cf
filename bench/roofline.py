"""What a training step should take on GPUs, by counted work and the host's time: modelled, never measured.

On a GPU it is the sum over launches of the longer of bytes over bandwidth and products over their peak rate, as
bench/traffic.py counted both at two numbers of tokens. A straight line through the times of these gives any other, from
512 to 32,768 tokens within 2 % of what counting there gives. The host's time, bench/host.py's, doesn't grow with the
tokens. GPU and host work at once, so a step takes as long as the slower of the two.

No launch attains a data sheet's peaks. A second model divides by the greatest share of them that a measured step of the
same kernels attained; one that waited for its host shows less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Records = dict[str, dict[str, Any]]


class Card(NamedTuple):
    """A GPU: as it is called, as its driver calls it, and its peaks, of dense 16-bit products with float32 sums."""

    name: str
    gpu: str
    bytes_a_second: float
    flops_a_second: float


#: By NVIDIA's data sheets of the A100 and the H100 and its white paper on the Ada architecture.
CARDS = (
    Card("A100 SXM, 80 GB", "A100-SXM4-80GB", 2.039e12, 312e12),
    Card("H100 SXM", "H100 80GB HBM3", 3.35e12, 989e12),
    Card("RTX 4090", "RTX 4090", 1.008e12, 165e12),
)


class Variant(NamedTuple):
    """Its blocks and its head, as bench/traffic.py names what it counts, and its name in bench/throughput.py."""

    blocks: str
    head: str
    measured: str


BASELINE = "peft"
#: By their names in bench/host.py.
VARIANTS = {
    BASELINE: Variant("peft_bf16", "stock_bf16", "peft"),
    "layers, triton": Variant("fastpeft", "stock_bf16", "fastpeft"),
    "auto, triton": Variant("fastpeft_model", "fastpeft", "fastpeft_model"),
    "graphs, triton": Variant("fastpeft_model", "fastpeft", "fastpeft_graphs"),
}


class Line(NamedTuple):
    """Seconds by tokens: a fixed part, and each token's."""

    fixed: float
    each: float

    def at(self, tokens: float) -> float:
        """The seconds of so many tokens."""
        return self.fixed + self.each * tokens

    def crossing(self, seconds: float) -> float:
        """The tokens from which on it is more than so many seconds."""
        return max(0.0, (seconds - self.fixed) / self.each)


class Step(NamedTuple):
    """One that was measured."""

    card: Card
    point: dict[str, Any]
    name: str
    seconds: float

    @property
    def size(self) -> tuple[int, int]:
        """Its tokens, and those of a row."""
        return self.point["batch"] * self.point["seq"], self.point["seq"]


class Model(NamedTuple):
    """A language model's steps, by a record of counts, one of the host, and a variant's share of the peaks."""

    traffic: dict[str, Any]
    host: dict[str, Any]
    share: dict[str, float]

    def on_gpu(self, name: str, length: int, card: Card) -> Line:
        """The GPU's time, of tokens in rows of `length`."""
        variant, layers, fewer = VARIANTS[name], self.host["shapes"]["layers"], self.traffic["fewer"]
        tokens, width = self.traffic["shapes"]["tokens"], str(self.traffic["shapes"]["width"])
        few, many = (
            layers * launched(counts["neighbours"][variant.blocks], card)
            + launched(counts["head"][width][variant.head], card)
            for counts in (fewer, self.traffic)
        )
        each = (many - few) / (tokens - fewer["tokens"])
        # It reads no weights, so that it has no fixed part.
        attention = layers * launched(self.traffic["attention"][str(length)], card) / tokens
        share = self.share[name]
        return Line((many - each * tokens) / share, (each + attention) / share)

    def on_host(self, name: str) -> float:
        """The host's time, a classifier's."""
        return self.host["variants"][name]["host_ms"] / 1e3

    def step(self, name: str, tokens: int, length: int, card: Card) -> float:
        """Seconds of a step."""
        return max(self.on_host(name), self.on_gpu(name, length, card).at(tokens))

    def speedup(self, name: str, *where: Any) -> float:
        """How many times as fast as the baseline's a step is."""
        return self.step(BASELINE, *where) / self.step(name, *where)


def launched(traffic: dict[str, Any], card: Card) -> float:
    """Seconds of launches one after another, at the peaks."""
    return sum(
        max(kernel["bytes"] / card.bytes_a_second, kernel["flops"] / card.flops_a_second)
        for kernel in traffic["forward"] + traffic["backward"]
    )


def measured(traffic: dict[str, Any], on_gpu: Records) -> Iterator[Step]:
    """The steps in records of bench/throughput.py that are of a card here and of what was counted."""
    alike = {"mode": "training", "model": "small", "method": "lora", "head": "lm", "data": "random"}
    alike |= {key: traffic["shapes"][key] for key in ("rank", "dropout", "model_dropout")}
    alike["dtype"] = traffic["dtype"]
    for record in on_gpu.values():
        for card in CARDS:
            if record["kind"] != "throughput" or card.gpu not in (record["machine"]["gpu"] or ""):
                continue
            for point in record["points"]:
                if alike.items() <= point.items() and str(point["seq"]) in traffic["attention"]:
                    rows = {name: point["variants"].get(v.measured, {}) for name, v in VARIANTS.items()}
                    for name, row in rows.items():
                        if "seconds" in row:
                            yield Step(card, point, name, row["seconds"]["median"])


def models(traffic: dict[str, Any], host: dict[str, Any], steps: list[Step]) -> tuple[Model, Model]:
    """The model at the peaks, and at the share that `steps` attained, where there are some of the same kernels."""
    peaks = Model(traffic, host, dict.fromkeys(VARIANTS, 1.0))
    attained: dict[str, float] = {}
    for step in steps:
        tokens, length = step.size
        share = peaks.on_gpu(step.name, length, step.card).at(tokens) / step.seconds
        blocks = VARIANTS[step.name].blocks
        attained[blocks] = max(attained.get(blocks, 0.0), share)
    return peaks, peaks._replace(share={n: attained.get(v.blocks, 1.0) for n, v in VARIANTS.items()})
