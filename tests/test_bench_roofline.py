"""bench/roofline.py models steps of counts and of the host's time: held against arithmetic by hand."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import roofline  # noqa: E402
import tables  # noqa: E402

from fastpeft.kernels import tile_table  # noqa: E402

pytestmark = pytest.mark.xdist_group("roofline")  # one count serves all tests of the full grid
CARD = roofline.Card("a card", "NVIDIA Some Card", 1e9, 1e12)
LAYERS = 12
HEADER = {
    "command": "bench/some.py", "commit": "0123456789ab", "sources": "abc",
    "machine": {"system": "Linux", "processor": "some CPU", "cores": 2, "torch_threads": 1, "gpu": None},
    "versions": {"torch": "2.13.0", "peft": "0.21.0"},
}  # fmt: skip


def launches(*each):
    """A record of launches by their bytes and flops, of which the last is the backward pass."""
    rows = [{"name": "some", "bytes": moved, "flops": flops} for moved, flops in each]
    return {"forward": rows[:-1], "backward": rows[-1:]}


def counts(tokens):
    """Of a block: on CARD a millisecond of products, which doesn't grow, and bytes that do; of a head such bytes."""
    blocks = {"peft_bf16": 1000, "fastpeft": 200, "fastpeft_model": 100}
    return {
        "neighbours": {name: launches((0, 10**9), (moved * tokens, 0)) for name, moved in blocks.items()},
        "head": {"768": {name: launches((500 * tokens, 0)) for name in ("stock_bf16", "fastpeft")}},
    }


@pytest.fixture
def record():
    return {
        "kind": "traffic", "dtype": "bf16", "architecture": "sm_90",
        "shapes": {"tokens": 4096, "width": 768, "rank": 16, "dropout": 0.1, "model_dropout": 0.1},
        "fewer": {"tokens": 256, **counts(256)},
        # At 1024 the products take twice what the bytes take.
        "attention": {"256": launches((4096 * 50, 0)), "1024": launches((4096 * 50, 4096 * 100 * 1000))},
        **counts(4096), **HEADER,
    }  # fmt: skip


@pytest.fixture
def issued():
    times = {
        "peft": 40.0,
        "layers, triton": 50.0,
        "auto, triton": 30.0,
        "graphs, triton": 16.0,
        "auto, torch": 60.0,
    }
    return {
        "kind": "host", "shapes": {"layers": LAYERS},
        "variants": {name: {"host_ms": ms} for name, ms in times.items()}, **HEADER,
    }  # fmt: skip


@pytest.fixture
def peaks(record, issued):
    return roofline.models(record, issued, [])[0]


def took(batch, seq, gpu=CARD.gpu, **seconds):
    """A record of bench/throughput.py of one point."""
    point = {
        "mode": "training", "model": "small", "method": "lora", "head": "lm", "data": "random", "dtype": "bf16",
        "rank": 16, "dropout": 0.1, "model_dropout": 0.1, "batch": batch, "seq": seq,
        "variants": {
            name: {"seconds": {"median": s}, "speedup": {"over": "peft", "median": seconds["peft"] / s}}
            for name, s in seconds.items()
        },
    }  # fmt: skip
    machine = {**HEADER["machine"], "gpu": gpu}
    return {"kind": "throughput", "points": [point], **HEADER, "machine": machine}


def test_a_launch_takes_the_longer_of_its_bytes_and_its_products():
    found = roofline.launched(launches((3000, 10**6), (1000, 2 * 10**6), (0, 0), (0, 5 * 10**6)), CARD)
    assert found == pytest.approx(3e-6 + 2e-6 + 5e-6)


def test_the_gpu_takes_its_blocks_attention_and_head(peaks):
    line = peaks.on_gpu("peft", 256, CARD)
    assert line.fixed == pytest.approx(LAYERS * 1e-3)
    assert line.each == pytest.approx(LAYERS * (1000 + 50) * 1e-9 + 500e-9)
    longer = peaks.on_gpu("peft", 1024, CARD)
    assert longer.each - line.each == pytest.approx(LAYERS * 50e-9)
    assert longer.fixed == pytest.approx(line.fixed)
    packed = peaks.on_gpu("auto, triton", 256, CARD)
    assert packed.each == pytest.approx(LAYERS * (100 + 50) * 1e-9 + 500e-9)
    assert packed == peaks.on_gpu("graphs, triton", 256, CARD)


@pytest.mark.parametrize("name", roofline.VARIANTS)
def test_below_the_crossing_the_host_sets_the_time_and_above_it_the_gpu(peaks, name):
    line, host = peaks.on_gpu(name, 256, CARD), peaks.on_host(name)
    crossing = line.crossing(host)
    assert line.at(crossing) == pytest.approx(host)
    below, above = int(0.99 * crossing), int(1.01 * crossing) + 1
    assert line.at(below) < host < line.at(above)
    assert peaks.step(name, below, 256, CARD) == host
    assert peaks.step(name, above, 256, CARD) == line.at(above) > host


def test_where_the_gpu_is_always_slower_it_sets_the_time_from_the_first_token():
    assert roofline.Line(2e-3, 1e-6).crossing(1e-3) == 0


def test_a_speedup_is_of_the_slower_of_host_and_gpu(peaks):
    assert peaks.speedup("graphs, triton", 8, 256, CARD) == pytest.approx(40 / 16)  # both wait for the host
    tokens = 10**5
    (peft, graphs) = (peaks.on_gpu(name, 256, CARD).at(tokens) for name in ("peft", "graphs, triton"))
    assert peaks.speedup("graphs, triton", tokens, 256, CARD) == pytest.approx(peft / graphs)
    assert peaks.speedup("peft", tokens, 256, CARD) == 1


def test_the_share_of_the_peaks_is_the_greatest_of_the_same_kernels(peaks, record, issued):
    at = {name: peaks.on_gpu(name, 256, CARD).at(2048) for name in roofline.VARIANTS}
    point = {"batch": 8, "seq": 256}
    steps = [
        roofline.Step(CARD, point, "peft", 2 * at["peft"]),
        roofline.Step(CARD, point, "peft", 5 * at["peft"]),
        roofline.Step(CARD, point, "auto, triton", 9 * at["auto, triton"]),  # waits for the host
        roofline.Step(CARD, point, "graphs, triton", 4 * at["auto, triton"]),
    ]
    first, second = roofline.models(record, issued, steps)
    assert set(first.share.values()) == {1}
    expected = {"peft": 1 / 2, "layers, triton": 1, "auto, triton": 1 / 4, "graphs, triton": 1 / 4}
    assert second.share == pytest.approx(expected)
    assert second.on_gpu("peft", 256, CARD).at(2048) == pytest.approx(2 * at["peft"])
    assert second.on_host("peft") == first.on_host("peft")


def test_only_what_was_counted_is_compared(monkeypatch, record):
    monkeypatch.setattr(roofline, "CARDS", (CARD,))

    def found(changes, gpu=CARD.gpu, **how):
        other = took(8, 256, gpu, peft=0.04, fastpeft=0.03)
        other["points"][0] |= changes
        return [(s.name, s.seconds) for s in roofline.measured(record, {"some": {**other, **how}})]

    assert found({}) == [("peft", 0.04), ("layers, triton", 0.03)]
    assert found({}, gpu="NVIDIA Some Card 80GB") == found({})
    assert found({}, gpu="NVIDIA Another") == found({}, gpu=None) == found({}, kind="traffic") == []
    for changes in (
        {"mode": "inference"}, {"model": "medium"}, {"method": "adapter"}, {"head": "classifier"}, {"dtype": "fp32"},
        {"rank": 8}, {"dropout": 0.0}, {"model_dropout": 0.0}, {"data": "rotten-tomatoes"}, {"seq": 64},
    ):  # fmt: skip
        assert found(changes) == [], changes
    failed = {"variants": {"peft": {"failed": "Wrong: it is"}}}
    assert found(failed) == []


def test_the_tables_say_that_they_are_modelled_and_how_far_off(monkeypatch, record, issued):
    monkeypatch.setattr(roofline, "CARDS", (CARD,))
    # GPU at 2048 tokens, ms: 12 + 2048 · (12 · (100 + 50) + 500) / 1e6 = 16.71, and peft's 12 + 26.83 = 38.83.
    on_gpu = {"some": took(8, 256, peft=0.08, fastpeft_graphs=0.0334)}
    expected, checked = tables.modelled({"a": record, "b": issued}, on_gpu)
    assert expected.title.startswith("Modelled")
    assert expected.note.startswith("Modelled, not measured")
    assert "some CPU" in expected.note
    rows = {row[1]: row[2:] for row in expected.rows}
    # Tokens: (16 - 12) / 2.3e-3, and half of the peaks, (8 - 12) less than none.
    assert rows["graphs, triton"][:3] == ["16.0", "16.7 / 33.4", "1700 / 0"]
    assert rows["graphs, triton"][3:5] == ["2.50 / 1.52", "2.39 / 2.40"]  # 40 / 26.3, 40 / 16.71, 80 / 33.4
    assert rows["peft"][1] == "38.8 / 80.0"
    assert [row[0] for row in checked.rows] == ["a card, batch 8 x 256 tokens", ""]
    assert checked.rows[1][1:] == [
        "graphs, triton", "33.4", "16.7 / 33.4", "0.50 / 1.00", "0.50", "2.40", "2.39 / 2.40",
    ]  # fmt: skip
    assert CARD.gpu in checked.note
    (alone,) = tables.modelled({"a": record, "b": issued}, {})
    assert {row[1]: row[2:] for row in alone.rows}["graphs, triton"][:3] == ["16.0", "16.7", "1700"]


def test_of_records_without_the_counts_nothing_is_modelled(record, issued):
    older = copy.deepcopy(record)
    del older["attention"]
    for records in ([], [record], [issued], [older, issued], [{**record, "dtype": "fp32"}, issued]):
        assert not list(tables.modelled(dict(enumerate(records)), {}))
    del issued["variants"]["graphs, triton"]
    assert not list(tables.modelled({"a": record, "b": issued}, {}))


def test_the_peaks_are_those_that_tiles_are_chosen_by():
    by_name = {a.name: a for a in tile_table.ARCHITECTURES}
    for card, architecture in zip(roofline.CARDS, (80, 90, 89), strict=True):
        assert card.flops_a_second / 1e12 == by_name[architecture].teraflops
        ridge = card.flops_a_second / card.bytes_a_second
        assert ridge == pytest.approx(by_name[architecture].flops_per_byte, rel=0.03)


@pytest.fixture(scope="module")
def counted():
    import traffic

    return traffic.measure(8192, 16, 0.1, "bf16")


@pytest.mark.full
@pytest.mark.parametrize("tokens", [1024, 2048, 32768])
def test_a_straight_line_is_within_two_percent_of_counting(counted, issued, tokens):
    import traffic

    found = {v: t.record() for v, t in traffic.neighbour_variants(tokens, 16, 0.1, "bf16").items()}
    head = {"768": traffic.head_variants(tokens, 768, "bf16")}
    there = {**counted, "neighbours": found, "head": head, "shapes": {**counted["shapes"], "tokens": tokens}}
    there["attention"] = {"256": traffic.attention(tokens, 256, 0.1, "bf16").record()}
    line, exact = (roofline.models(each, issued, [])[0] for each in (counted, there))
    for card in roofline.CARDS:
        for name in roofline.VARIANTS:
            truth = exact.on_gpu(name, 256, card).at(tokens)
            assert line.on_gpu(name, 256, card).at(tokens) == pytest.approx(truth, rel=0.02)
