"""Figures of recorded results, and the tables in the README; nothing is measured here.

    python bench/plot.py [--results bench/results] [--table README.md] [--report FILE]

Draws a PNG for each record that the folder holds. `--table` rewrites the section of a Markdown file
between its two markers; `--report` writes tables and figures into one HTML file.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import report
import tables

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Okabe and Ito's palette, a brown and a wine red, for colour-blind readers; a variant keeps its colour.
COLOURS = {
    "frozen": "#999999",
    "peft": "#E69F00",
    "peft_bf16": "#E69F00",
    "peft_fp16": "#E69F00",
    "peft_fp32": "#D55E00",
    "eager": "#E69F00",
    "stock": "#E69F00",
    "torch_chunked": "#D55E00",
    "torch_two_chunks": "#CC79A7",
    "addmm": "#56B4E9",
    "compile": "#CC79A7",
    "compile_graphs": "#000000",
    "fastpeft": "#009E73",
    "fastpeft_model": "#8C6D31",
    "fastpeft_graphs": "#882255",
    "fastpeft_fp32": "#0072B2",
    "exact": "#F0E442",
}
#: Of a step's host time: planning, dispatch and autograd, launching, the rest.
PARTS = ("#E69F00", "#0072B2", "#009E73", "#999999")
RESULTS = Path(__file__).parent / "results"
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})


def roofline(record: dict[str, Any]) -> Figure:
    """Bytes and launches of each layer by variant, the bytes beside the least possible."""
    shapes = record["shapes"]
    layers = {**record["layers"], "adapter": record["adapter"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    width = 0.84 / max(len(rows) - 1 for rows in layers.values())
    for axes, key, unit in ((left, "bytes", 1e6), (right, "launches", 1)):
        for place, rows in enumerate(layers.values()):
            drawn = [variant for variant in rows if variant != "bound"]
            for i, variant in enumerate(drawn):
                x = place + (i - (len(drawn) - 1) / 2) * width
                value = rows[variant][key] / unit
                axes.bar(x, value, width * 0.92, color=COLOURS[variant])
                label = axes.annotate(f"{value:.0f}", (x, value), (0, 2), textcoords="offset points")
                label.set(
                    ha="center", fontsize=6, zorder=5, bbox={"color": "white", "pad": 0.4, "alpha": 0.8}
                )
            if key == "bytes":
                least = rows["bound"]["bytes"] / unit
                axes.hlines(least, place - 0.45, place + 0.45, color="black", linewidth=1.4)
        axes.set_xticks(range(len(layers)), list(layers))
        axes.yaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("MB moved, forward and backward")
    right.set_ylabel("kernel launches, forward and backward")
    seen = dict.fromkeys(v for rows in layers.values() for v in rows if v != "bound")
    handles: list[Artist] = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[v]) for v in seen]
    handles.append(plt.Line2D([], [], color="black", linewidth=1.4))
    names = [*(tables.LABELS[v] for v in seen), "each tensor once (least)"]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    figure.suptitle(
        f"GPT-2 small's layers, {shapes['tokens']} tokens, {record['dtype']}, r={shapes['rank']}, "
        f"dropout {shapes['dropout']:g}, bottleneck {shapes['bottleneck']}: counted from what is launched",
        fontsize=10,
    )
    return figure


def host(record: dict[str, Any]) -> Figure:
    """Host time of a training and of a decoding step, by variant and part."""
    figure, both = plt.subplots(2, 1, figsize=(7, 4.6), layout="constrained")
    for axes, key, title in zip(both, ("variants", "decoding"), ("training", "decoding"), strict=True):
        names = list(record[key])
        left = [0.0] * len(names)
        for part, colour in zip(next(iter(record[key].values()))["parts"], PARTS, strict=True):
            values = [record[key][name]["parts"][part] / 1e3 for name in names]
            axes.barh(names, values, 0.7, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for place, name in enumerate(names):
            axes.text(
                left[place],
                place,
                f" {record[key][name]['spread']['median']:.2f} x peft",
                va="center",
                fontsize=7,
            )
        axes.set_xlim(0, 1.2 * max(left))
        axes.invert_yaxis()
        axes.set_xlabel("ms of the host, by part")
        axes.set_title(f"a {title} step, {record['shapes']['layers']} layers", fontsize=9)
    figure.legend(
        *both[0].get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside lower center", ncols=4
    )
    return figure


def throughput(record: dict[str, Any]) -> Figure:
    """Tokens a second by variant, a panel a grid point, the 20 % to 80 % quantiles as whiskers."""
    points = sorted(record["points"], key=lambda point: point["mode"] != "training")
    columns = min(3, len(points))
    lines = math.ceil(len(points) / columns)
    bars = max(len(point["variants"]) for point in points)
    size = (4.6 * columns, (0.3 * bars + 0.9) * lines + 0.4)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, point in zip(grid.flat, points, strict=False):
        _tokens_per_second(axes, point)
    for axes in grid.flat[len(points) :]:
        axes.set_axis_off()
    machine = record["machine"]
    figure.suptitle(f"Tokens a second on {machine['gpu'] or machine['processor']}", fontsize=10)
    return figure


def _tokens_per_second(axes: Axes, point: dict[str, Any]) -> None:
    measured = [row for row in point["variants"].values() if "failed" not in row]
    furthest = max((row["tokens_per_second"]["q80"] for row in measured), default=1.0)
    for place, (variant, row) in enumerate(point["variants"].items()):
        if "failed" in row:
            axes.text(furthest * 0.03, place, "failed", va="center", fontsize=7)
            continue
        value, slow, fast = (row["tokens_per_second"][part] for part in ("median", "q20", "q80"))
        whiskers = [[max(value - slow, 0)], [max(fast - value, 0)]]  # quantiles of like numbers round apart
        axes.barh(place, value, 0.75, color=COLOURS[variant], xerr=whiskers, error_kw={"linewidth": 0.8})
        speedup = row.get("speedup")
        if speedup and speedup["over"] != variant:
            text = f"{speedup['median']:.2f} x {tables.LABELS[speedup['over']]}"
            axes.text(fast + furthest * 0.03, place, text, va="center", fontsize=7)
    axes.set_xlim(0, furthest * 1.5)
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks(range(len(point["variants"])), [tables.LABELS[v] for v in point["variants"]])
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")
    what = ", ".join((point["model"], point["method"], *tables.dropouts(point), point["dtype"]))
    axes.set_title(f"{point['mode']}: {what}\n{tables.size(point)}", fontsize=8)


def micro(record: dict[str, Any]) -> Figure:
    """Times of one layer over the baseline's, a panel a phase and state, a group a shape."""
    rows = record["rows"]
    panels = list(dict.fromkeys((r["phase"], r["run"], r["l2"]) for r in rows))
    height = 0.16 * len(rows) / len(panels) + 1.6
    width = max(4.6 * len(panels), 5.8)  # the legend's, below one panel
    figure, grid = plt.subplots(1, len(panels), figsize=(width, height), layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        _relative_times(axes, [r for r in rows if (r["phase"], r["run"], r["l2"]) == panel])
        state = () if rows[0]["device"] == "cpu" else (panel[1], f"{panel[2]} L2")
        axes.set_title(", ".join((panel[0], *state)), fontsize=9)
    for axes in grid.flat[1:]:
        axes.set_yticklabels([])
    seen = dict.fromkeys(r["variant"] for r in rows)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[v]) for v in seen]
    names = [tables.LABELS[v] for v in seen]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    return figure


def _relative_times(axes: Axes, rows: list[dict[str, Any]]) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name, more = "adapter", ""
        if row["operation"] == "lora":
            name, more = row["projection"], f", p={row['dropout']:g}"
        elif row["operation"] == "lm_head":
            name, more = "head", f", {row['counting']:.0%} count"
        groups.setdefault(f"{name}, {row['dtype']}{more}", []).append(row)
    place, ticks = 0.0, []
    for group in groups.values():
        ticks.append(place + (len(group) - 1) / 2)
        for row in group:
            if "failed" in row:
                axes.text(0.03, place, "failed", va="center", fontsize=5)
                place += 1
                continue
            median, most, least = (1 / row["speedup"][name] for name in ("median", "q20", "q80"))
            whiskers = [[max(median - least, 0)], [max(most - median, 0)]]
            axes.barh(
                place,
                median,
                0.85,
                color=COLOURS[row["variant"]],
                xerr=whiskers,
                error_kw={"linewidth": 0.6},
            )
            place += 1
        place += 1
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(ticks, list(groups))
    axes.invert_yaxis()
    baselines = dict.fromkeys(tables.MICRO[row["operation"]][1] for row in rows)
    axes.set_xlabel(f"time over that of {' or '.join(baselines)}")


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records and figures")
    parser.add_argument("--table", type=Path, help="rewrite the marked section of this Markdown file")
    parser.add_argument("--report", type=Path, help="write tables and figures into this HTML file")
    args = parser.parse_args()
    records = tables.load(args.results)
    if not records:
        parser.error(f"no record in {args.results}: `make bench` makes them")
    figures = {}
    draw = {"traffic": roofline, "host": host, "throughput": throughput, "micro": micro}
    for name, record in records.items():
        if record["kind"] not in draw:
            continue
        figures[name] = args.results / f"{name}.png"
        draw[record["kind"]](record).savefig(figures[name])
        print(figures[name])
    if args.table:
        on_gpu = tables.load(args.results / "gpu")
        found = [*tables.short(on_gpu), *tables.modelled(records, on_gpu), *tables.short(records)]
        tables.rewrite(args.table, found)
    if args.report:
        report.write(args.report, args.results, records, figures)


if __name__ == "__main__":
    main()
