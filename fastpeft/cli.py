"""The command line: `fastpeft compare` and `fastpeft inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastpeft.compare.arguments import DEFAULT_METHODS, IMDB_SMALL, ROTTEN_TOMATOES, Arguments
from fastpeft.compare.errors import BadInput
from fastpeft.compare.methods import METHODS
from fastpeft.ops import BACKENDS

app = typer.Typer(
    help="Fused-kernel runtime for parameter-efficient fine-tuning of GPT-2.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_METHODS_HELP = f"Methods to compare, joined by commas: {', '.join(METHODS)}."
_MODEL_HELP = (
    f"A GPT-2: a folder, a name on the Hugging Face Hub, or {IMDB_SMALL}, a small one that is trained on "
    "IMDB reviews at first use and kept in your cache folder."
)


def _quieten() -> None:
    """Leave the terminal to fastpeft: transformers reports every fresh head, and draws bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        app(arguments, prog_name="fastpeft")
    except BadInput as error:
        print(f"fastpeft: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def compare(
    out: Annotated[
        Path, typer.Option(help="Folder of the results; an interrupted comparison goes on in it.")
    ] = Arguments.out,
    methods: Annotated[str, typer.Option(help=_METHODS_HELP)] = ",".join(DEFAULT_METHODS),
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = IMDB_SMALL,
    data: Annotated[
        str,
        typer.Option(help=f"{ROTTEN_TOMATOES}, or a .csv, .tsv or .jsonl file with columns text and label."),
    ] = ROTTEN_TOMATOES,
    seeds: Annotated[
        int, typer.Option(help="Runs of each method, from seeds 0, 1, 2, ...")
    ] = Arguments.seeds,
    epochs: Annotated[float, typer.Option(help="Passes over the training texts.")] = Arguments.epochs,
    max_steps: Annotated[
        int | None,
        typer.Option(help="Stop a run after so many steps, whatever --epochs says.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts a step, on each device.")] = Arguments.batch_size,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of all methods, instead of each one's own.", show_default=False
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = Arguments.rank,
    bottleneck: Annotated[
        int, typer.Option(help="Width of the adapters' bottleneck.")
    ] = Arguments.bottleneck,
    backend: Annotated[
        str, typer.Option(help=f"What runs the fused paths: {', '.join(BACKENDS)}.")
    ] = Arguments.backend,
) -> None:
    """Train fine-tuning methods side by side on one split of labelled text.

    Shows a table, and writes results.json, report.html, plots and the trained weights to --out.
    """
    arguments = Arguments(
        out=out,
        methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
        model=model,
        data=data,
        seeds=seeds,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        lr=lr,
        rank=rank,
        bottleneck=bottleneck,
        backend=backend,
    )
    # Imported here: `--help` and a mistyped option needn't wait for the Trainer and the plots.
    from fastpeft.compare.machine import processes
    from fastpeft.compare.progress import Reporter
    from fastpeft.compare.runner import REPORT_FILE, finished_runs
    from fastpeft.compare.runner import compare as run
    from fastpeft.compare.table import table

    _quieten()
    leads = processes().is_main_process
    try:
        with Reporter(Console(stderr=True, quiet=not leads)) as reporter:
            results = run(arguments, reporter)
    except BadInput:
        if leads:
            raise
        raise typer.Exit(2) from None  # the leading process says it for all
    except KeyboardInterrupt:
        if leads:
            kept = finished_runs(out)
            runs = "run" if kept == 1 else "runs"
            print(
                f"fastpeft: stopped; {kept} finished {runs} kept; the same command goes on", file=sys.stderr
            )
        raise typer.Exit(130) from None
    if leads:
        console = Console(highlight=False)
        console.print(table(results))
        console.print(f"Report: {out / REPORT_FILE}", soft_wrap=True)


@app.command()
def inspect(model: Annotated[str, typer.Option(help=_MODEL_HELP)] = IMDB_SMALL) -> None:
    """Show versions, devices, and what fastpeft would fuse in a model with LoRA and adapters on it."""
    from fastpeft.compare.inspection import inspection

    _quieten()
    print(inspection(model))


if __name__ == "__main__":
    main()
