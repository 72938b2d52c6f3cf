"""Tables of recorded results, and the section of a Markdown file made of them; nothing here measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import roofline

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
LABELS = {
    "bound": "each tensor once",
    "bound_fused": "each projection and its neighbours as one",
    "frozen": "frozen model alone",
    "peft": "peft",
    "peft_bf16": "peft, bf16 factors",
    "peft_fp16": "peft, fp16 factors",
    "peft_fp32": "peft, fp32 factors",
    "addmm": "addmm by hand",
    "compile": "torch.compile",
    "compile_graphs": "torch.compile, reduce-overhead",
    "eager": "eager module",
    "fastpeft": "fastpeft",
    "fastpeft_model": "fastpeft, auto scope",
    "fastpeft_graphs": "fastpeft, graphs",
    "fastpeft_fp32": "fastpeft, fp32 factors",
    "exact": "fastpeft, exact",
    "stock_bf16": "transformers",
    "stock_fp16": "transformers",
    "stock_fp32": "transformers",
    "stock": "transformers",
    "torch_chunked": "torch, chunked",
    "torch_two_chunks": "torch, two chunks",
    "recomputed": "logits never stored",
    "peft_apart": "peft, one after another",
    "fastpeft_apart": "fastpeft, one after another",
    "one_by_one": "fastpeft, one by one",
    "together": "fastpeft, side by side",
    "peft_rows": "peft, adapter_names",
    "fastpeft_rows": "fastpeft, adapter_names",
    "one_adapter": "fastpeft, one adapter for all rows",
}


#: Of records, in the order in which they are shown.
KINDS = ("traffic", "host", "throughput", "together", "micro")


class Table(NamedTuple):
    """A title, a line on how it came about, and cells."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The records in `folder` by name, those of a kind together."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    }
    records = {name: r for name, r in found.items() if isinstance(r, dict) and r.get("kind") in KINDS}
    return dict(sorted(records.items(), key=lambda item: KINDS.index(item[1]["kind"])))


def compiled(folder: Path) -> Iterator[Table]:
    """What the kernels cost once compiled, an architecture a row, where the folder has a compile report."""
    path = folder / "compile_report.json"
    if not path.exists():
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    by_architecture: dict[int, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        by_architecture.setdefault(row["arch"], []).append(row)
    rows = []
    for architecture, found in by_architecture.items():
        spills = sum(1 for row in found if row["spill_loads"] or row["spill_stores"])
        registers = max(row["registers"] for row in found)
        shared = max(row["shared_bytes"] / row["shared_limit"] for row in found)
        rows.append([f"sm_{architecture}", str(len(found)), str(spills), str(registers), f"{shared:.0%}"])
    header = ["", "configurations", "that spill", "most registers", "most shared memory, of the limit"]
    yield Table("Compiled kernels", f"Machine code read back; triton {report['triton']}.", header, rows)


def steps(folder: Path) -> Iterator[Table]:
    """How each step of bench/gpu.py ended, where the folder has its record."""
    path = folder / "steps.json"
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        yield Table(
            "Steps", provenance(record), ["", "ended"], [list(each) for each in record["steps"].items()]
        )


def every(records: dict[str, dict[str, Any]]) -> Iterator[Table]:
    """All tables that the records give."""
    make = {"traffic": traffic, "host": host, "throughput": throughput, "together": together, "micro": micro}
    for record in records.values():
        yield from make[record["kind"]](record)


def short(records: dict[str, dict[str, Any]]) -> Iterator[Table]:
    """What a README has room for."""
    for record in records.values():
        if record["kind"] == "traffic":
            yield from traffic(record)
        elif record["kind"] == "host":
            yield from host(record)
        elif record["kind"] == "together":
            yield from together(record)
        elif record["kind"] == "throughput":
            yield speedups(record)


NEIGHBOURS = "Neighbours are LayerNorms, the GELU, and dropouts with their residuals"


def traffic(record: dict[str, Any]) -> Iterator[Table]:
    """The bytes and launches of a block's four LoRA layers, of an adapter, and of a language model's head."""
    shapes = record["shapes"]
    lora = f"r={shapes['rank']}, dropout {shapes['dropout']:g}"

    def note(what: str) -> str:
        counted = f"Counted, not timed: what is launched on {record['architecture']}. {provenance(record)}"
        return f"{shapes['tokens']} tokens, {record['dtype']}, forward and backward, {what}. {counted}"

    lora = f"width {shapes['width']}, {lora}"
    for title, rows, what in (
        ("Memory traffic of the LoRA layers of one block", record["block"], lora),
        (
            "Memory traffic of these layers with their neighbours",
            record["neighbours"],
            f"{lora}. {NEIGHBOURS}",
        ),
        (
            "Memory traffic of a block for the rows of many adapters",
            record.get("many", {}),  # which older records haven't
            f"{shapes.get('adapters')} adapters, as many rows of each, {lora}. {NEIGHBOURS}",
        ),
        (
            "Memory traffic of one adapter",
            record["adapter"],
            f"width {shapes['width']}, bottleneck {shapes['bottleneck']}",
        ),
    ):
        cells = []
        for variant, row in rows.items():
            first = next(iter(rows.values()))
            moved, saved = mega(row["bytes"]), mega(row["saved_bytes"])
            share = f"{row['bytes'] / first['bytes']:.2f}"
            cells.append([LABELS[variant], str(row["launches"]), moved, share, saved])
        if cells:
            over = "x least" if "bound" in rows else "x the first"
            yield Table(title, note(what), ["", "launches", "MB moved", over, "MB saved for backward"], cells)
    rows = []
    for variant in next(iter(record["head"].values())):
        each = [(found[variant], found["bound"]["bytes"]) for found in record["head"].values()]
        sizes = [f"{mega(r['bytes'])} ({r['bytes'] / least:.2f}), {r['teraflops']:.1f}" for r, least in each]
        rows.append([LABELS[variant], *sizes])
    yield Table(
        "Memory traffic of a language model's head and loss",
        note(
            "the head frozen, its vocabulary GPT-2's. Logits never stored would be multiplied for anew in backward"
        ),
        ["MB moved (x least), TFLOP", *(f"width {width}" for width in record["head"])],
        rows,
    )


def host(record: dict[str, Any]) -> Iterator[Table]:
    """What issuing a step takes the host, by variant."""
    shapes = record["shapes"]
    counts = "token counts that vary" if shapes["vary"] else "one token count"
    note = (
        f"Of {shapes['layers']} layers, LoRA everywhere, {{}}{counts}, float32, one thread. Kernels are compiled for "
        f"{record['architecture']} and launched on nothing, and tensors are so small that an operator costs its "
        f"dispatch. {provenance(record)}"
    )
    header = ["", "ms", "x {} (20-80 %)", "operators", "launches"]
    training = f"dropout {shapes['dropout']:g}, GPT-2's own 0.1, "
    parts_of = [("variants", "a training step", training), ("decoding", "a decoding step", "")]
    if "runs" in record:  # older records have none
        parts_of.append(("runs", f"a step of {shapes['runs']} runs, optimiser and all", training))
    for key, title, drops in parts_of:
        parts = list(next(iter(record[key].values()))["parts"])
        baseline = next(iter(record[key]))
        rows = []
        for name, row in record[key].items():
            over = "" if name == baseline else ratio(row["spread"])
            shares = [f"{row['parts'][part] / 1e3:.1f}" for part in parts]
            rows.append(
                [name, f"{row['host_ms']:.1f}", over, str(row["operators"]), str(row["launches"]), *shares]
            )
        columns = [*(each.format(baseline) for each in header), *(f"{p}, ms" for p in parts)]
        yield Table(f"Host time of {title}", note.format(drops), columns, rows)


def modelled(records: roofline.Records, on_gpu: roofline.Records) -> Iterator[Table]:
    """What steps should take on GPUs, by bench/roofline.py, and beside it those that were measured."""
    by_kind = {record["kind"]: record for record in records.values()}
    traffic, host = by_kind.get("traffic", {}), by_kind.get("host", {"variants": {}})
    counted = traffic.get("attention") and traffic["dtype"] == "bf16"  # older records have no attention
    if not counted or not roofline.VARIANTS.keys() <= host["variants"].keys():
        return
    steps = list(roofline.measured(traffic, on_gpu))
    both = roofline.models(traffic, host, steps)
    length, shown = min(map(int, traffic["attention"])), (512, 2048, 8192)
    rows = []
    for card in roofline.CARDS:
        for name in roofline.VARIANTS:
            lines = [model.on_gpu(name, length, card) for model in both]
            crossings = [float(f"{line.crossing(both[0].on_host(name)):.2g}") for line in lines]
            rows.append(
                [
                    card.name if name == roofline.BASELINE else "",
                    name,
                    f"{1e3 * both[0].on_host(name):.1f}",
                    pair([1e3 * line.at(shown[1]) for line in lines], ".1f"),
                    pair(crossings, ".0f"),
                    *(pair([model.speedup(name, t, length, card) for model in both], ".2f") for t in shown),
                ]
            )
    shapes = traffic["shapes"]
    attained = " / at the share of them that the steps of the next table attained" * bool(steps)
    note = (
        f"Modelled, not measured: at the peaks of NVIDIA's data sheets{attained}. A language model's step without its "
        f"embeddings and its optimiser, {host['shapes']['layers']} layers, LoRA everywhere, r={shapes['rank']}, "
        f"dropout {shapes['dropout']:g}, {traffic['dtype']}, rows of {length} tokens without padding. On every card a "
        "launch takes as long as its bytes or its products, whichever take longer, both counted for "
        f"{traffic['architecture']} at commit {traffic['commit']}. The host's time is a classifier's on "
        f"{host['machine']['processor']}; a host of twice the speed halves it, and with it about the tokens. "
        f"{provenance(host)}"
    )
    header = ["", "", "host, ms", f"GPU, ms, {shown[1]} tokens", "tokens from which the GPU sets the time"]
    header += [f"x {roofline.BASELINE}, {tokens} tokens" for tokens in shown]
    title = "Modelled: from how many tokens the GPU, and not the host, sets a training step's time"
    yield Table(title, note, header, rows)
    if steps:
        yield checked(both, steps, on_gpu)


def checked(
    both: tuple[roofline.Model, roofline.Model], steps: list[roofline.Step], on_gpu: roofline.Records
) -> Table:
    """Modelled steps beside the same measured."""
    rows: list[list[str]] = []
    for step in steps:
        tokens, length = step.size
        seconds = [model.step(step.name, tokens, length, step.card) for model in both]
        share = both[0].on_gpu(step.name, length, step.card).at(tokens) / step.seconds
        found = step.point["variants"][roofline.VARIANTS[step.name].measured]["speedup"]["median"]
        rows.append(
            [
                f"{step.card.name}, {size(step.point)}" if step.name == roofline.BASELINE else "",
                step.name,
                f"{1e3 * step.seconds:.1f}",
                pair([1e3 * each for each in seconds], ".1f"),
                pair([each / step.seconds for each in seconds], ".2f"),
                f"{share:.2f}",
                f"{found:.2f}",
                pair([model.speedup(step.name, tokens, length, step.card) for model in both], ".2f"),
            ]
        )
    header = ["", "", "measured, ms", "modelled, ms", "modelled : measured", "share of the peaks"]
    header += [f"x {roofline.BASELINE}, measured", f"x {roofline.BASELINE}, modelled"]
    where = " ".join(provenance(record) for record in on_gpu.values() if record["kind"] == "throughput")
    note = (
        "At the peaks / at the greatest share of them that a step of the same kernels attained, which makes that "
        f"step's own figures agree; modelled with the host of the table above. Measured: {where}"
    )
    return Table("How far the model is from what was measured", note, header, rows)


def throughput(record: dict[str, Any]) -> Iterator[Table]:
    """Every variant of every point, training and inference apart."""
    header = ["", "ms", "tokens/s", "speed-up (20-80 %)", "x frozen", "x layers", "MB saved", "MB step peak"]
    for point in record["points"]:
        rows = []
        for variant, row in point["variants"].items():
            if "failed" in row:
                rows.append([LABELS[variant], failed(row), *[""] * (len(header) - 2)])
                continue
            speedup, saved = row.get("speedup"), row.get("saved_bytes")
            frozen, layers = row.get("over_frozen"), row.get("over_layers")
            is_baseline = speedup is None or speedup["over"] == variant
            rows.append(
                [
                    LABELS[variant],
                    f"{row['seconds']['median'] * 1e3:.1f}",
                    f"{row['tokens_per_second']['median']:.0f}",
                    "" if is_baseline else f"{ratio(speedup)} over {LABELS[speedup['over']]}",
                    "" if frozen is None else f"{frozen['median']:.2f}",
                    "" if layers is None else f"{layers['median']:.2f}",
                    "" if saved is None else mega(saved),
                    "" if row["step_peak_bytes"] is None else mega(row["step_peak_bytes"]),
                ]
            )
        yield Table(
            describe(point), f"Medians of {point['rounds']} rounds. {provenance(record)}", header, rows
        )


def speedups(record: dict[str, Any]) -> Table:
    """A line for each variant that is compared with another, over all points; a point is named once."""
    rows = []
    for point in record["points"]:
        name = describe(point)
        for variant, row in point["variants"].items():
            if "failed" in row:
                rows.append([name, LABELS[variant], failed(row), "", "", "", ""])
                name = ""
                continue
            speedup, frozen, layers = (row.get(key) for key in ("speedup", "over_frozen", "over_layers"))
            if variant == "frozen" or speedup is None or speedup["over"] == variant:
                continue
            against = point["variants"][speedup["over"]]
            theirs = "failed" if "failed" in against else f"{against['tokens_per_second']['median']:.0f}"
            tokens = f"{row['tokens_per_second']['median']:.0f} : {theirs}"
            compared = f"{LABELS[variant]} : {LABELS[speedup['over']]}"
            over = ["" if other is None else f"{other['median']:.2f}" for other in (frozen, layers)]
            peaks = [each.get("step_peak_bytes") for each in (row, against)]
            # What a graph holds between steps isn't in it.
            peak = "" if None in peaks or variant == "fastpeft_graphs" else " : ".join(map(mega, peaks))
            rows.append([name, compared, tokens, ratio(speedup), *over, peak])
            name = ""
    times = ["time over the frozen model's", "time over the layers scope's"]
    header = ["", "compared", "tokens/s", "speed-up (20-80 %)", *times, "a step's peak MB"]
    data = dict.fromkeys(point["data"] for point in record["points"])
    names = " and ".join("random tokens" if each == "random" else each for each in data)
    return Table(f"Whole models on {names}", f"Medians of rounds. {provenance(record)}", header, rows)


def together(record: dict[str, Any]) -> Iterator[Table]:
    """Runs side by side against one after another, and rows with adapters of their own against one for all."""
    first = record["points"][0]
    about = f"r={first['rank']}, {first['seq']} tokens a row, random; half is six layers of small's."
    rows: dict[str, list[list[str]]] = {"training": [], "inference": []}
    for point in record["points"]:
        if point["mode"] == "training":
            dropout = f"dropout {point['dropout']:g}"
            name = f"{point['adapters']} runs of {point['batch']} rows each, {dropout}, {point['dtype']}"
        else:
            counts = [
                f"{count} {noun}{'' if count == 1 else 's'}"
                for count, noun in ((point["batch"], "row"), (point["adapters"], "adapter"))
            ]
            name = ", ".join([*counts, point["dtype"]])
        name = f"GPT-2 {point['model']} ({point.get('head', 'classifier')}), {name}"
        for variant, row in point["variants"].items():
            if "failed" in row:
                cells = [failed(row), "", "", ""]
            else:
                speedup = row.get("speedup")
                over = speedup and speedup["over"] != variant
                cells = [
                    f"{row['seconds']['median'] * 1e3:.1f}",
                    f"{row['tokens_per_second']['median']:.0f}",
                    f"{ratio(speedup)} over {LABELS[speedup['over']]}" if over else "",
                    f"{row['over_one']['median']:.2f}" if "over_one" in row else "",
                ]
            rows[point["mode"]].append([name, LABELS[variant], *cells])
            name = ""
    titles = {
        "training": (
            "Runs trained side by side",
            "A training step, its optimiser's share included; GPT-2's own dropout is 0.",
        ),
        "inference": ("Rows of a batch with adapters of their own", "A classifier's forward pass."),
    }
    header = ["", "", "ms", "tokens/s", "speed-up (20-80 %)", "time over one adapter's"]
    for mode, (title, note) in titles.items():
        if rows[mode]:
            columns = header if mode == "inference" else header[:-1]
            cut = [row[: len(columns)] for row in rows[mode]]
            yield Table(title, f"{note} Medians of rounds. {about} {provenance(record)}", columns, cut)


#: Of a microbenchmark its title, and what its speed-up is over.
MICRO = {
    "lora": ("One lora layer", "peft"),
    "adapter": ("One adapter layer", "the eager module"),
    "lm_head": ("A language model's frozen head and loss", "transformers"),
}


def micro(record: dict[str, Any]) -> Iterator[Table]:
    """Median times of one layer and how they compare with the baseline's, a column a variant."""
    by_operation: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        by_operation.setdefault(row["operation"], []).append(row)
    for operation, rows in by_operation.items():
        variants = list(dict.fromkeys(row["variant"] for row in rows))
        lines: dict[str, dict[str, str]] = {}
        for row in rows:
            if "failed" in row:
                cell = failed(row)
            else:
                cell = f"{row['seconds']['median'] * 1e3:.3f} ({row['speedup']['median']:.2f})"
            lines.setdefault(shape(row), {})[row["variant"]] = cell
        cells = [[name, *(line.get(v, "") for v in variants)] for name, line in lines.items()]
        header = ["ms (speed-up)", *(LABELS[v] for v in variants)]
        title, over = MICRO[operation]
        note = f"Medians; the speed-up is over {over}, in turn with each. {provenance(record)}"
        yield Table(title, note, header, cells)


def shape(row: dict[str, Any]) -> str:
    """What a microbenchmark measured, in words."""
    inner = row.get("bottleneck", row.get("vocabulary"))
    parts = [row.get("projection", f"{row.get('width')} x {inner}"), f"{row['tokens']} tokens"]
    if row["operation"] == "lora":
        parts += [f"r={row['rank']}", f"dropout {row['dropout']:g}"]
    elif row["operation"] == "lm_head":
        parts.append(f"{row['counting']:.0%} of the labels count")
    state = [] if row["device"] == "cpu" else [row["run"], f"{row['l2']} L2"]
    return ", ".join([*parts, row["dtype"], row["phase"], *state])


def describe(point: dict[str, Any]) -> str:
    """A grid point of the throughput in words."""
    lora = f" r={point['rank']}" if point["method"] == "lora" else ""
    where = "GPU" if point["device"] == "cuda" else "CPU"
    what = f"{point['mode']}, GPT-2 {point['model']} ({point['head']}), {point['method']}{lora}"
    return ", ".join((what, *dropouts(point), point["dtype"], size(point), where))


def dropouts(point: dict[str, Any]) -> list[str]:
    """What drops at a grid point of the throughput, in words."""
    if point["mode"] != "training":
        return []
    lora = [f"dropout {point['dropout']:g}"] if point["method"] == "lora" else []
    return lora + [f"GPT-2's own {point['model_dropout']:g}"] * (point["model_dropout"] > 0)


def size(point: dict[str, Any]) -> str:
    """The batches of a grid point in words."""
    if point["data"] == "random":
        return f"batch {point['batch']} x {point['seq']} tokens"
    return f"batch {point['batch']} of {point['data']}, {1 - point['fill']:.0%} padding"


def provenance(record: dict[str, Any]) -> str:
    """Where a record comes from."""
    machine, versions = record["machine"], record["versions"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['torch_threads']} threads"
    return f"{where}; torch {versions['torch']}, peft {versions['peft']}; commit {record['commit']}."


def failed(row: dict[str, Any]) -> str:
    """What a row says instead of numbers; a bar would end its cell in Markdown."""
    return f"failed: {row['failed']}".replace("|", "/")


def ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['q20']:.2f}-{spread['q80']:.2f})"


def pair(values: list[float], form: str) -> str:
    """Figures that belong together, once where they don't differ."""
    return " / ".join(dict.fromkeys(format(value, form) for value in values))


def mega(size: int) -> str:
    """Bytes as MB."""
    return f"{size / 1e6:.1f}" if size < 1e8 else f"{size / 1e6:.0f}"


def markdown(table: Table) -> str:
    """A table as Markdown, its title above and its note below."""
    lines = [
        f"| {' | '.join(row)} |"
        for row in (table.header, ["---"] + ["---:"] * (len(table.header) - 1), *table.rows)
    ]
    return "\n".join([f"**{table.title[0].upper()}{table.title[1:]}**", "", *lines, "", table.note, ""])


def rewrite(path: Path, tables: list[Table]) -> None:
    """Replace what stands between the markers in a Markdown file.

    Raises:
        ValueError: the file doesn't have both markers, once and in order.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{path.name} needs one {BEGIN} and, below it, one {END}: the tables go between them"
        )
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    section = "\n".join(map(markdown, tables))
    path.write_text(f"{before}{BEGIN}\n{section}{END}{after}", encoding="utf-8")
