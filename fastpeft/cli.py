"""The command line: `fastpeft compare` and `fastpeft inspect`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpeft.backends import BACKENDS
from fastpeft.compare import joining, preflight
from fastpeft.compare.arguments import DEFAULT_METHODS, IMDB_SMALL, QUICK, Arguments
from fastpeft.compare.data import KINDS, ROTTEN_TOMATOES
from fastpeft.compare.errors import BadInput
from fastpeft.compare.methods import PLACES, names
from fastpeft.compare.tasks import CLASSIFY, LM

app = typer.Typer(
    help="Fused-kernel runtime for parameter-efficient fine-tuning of GPT-2.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing what draws boxes takes as long as all the rest of an answer
    context_settings={"help_option_names": ["-h", "--help"]},
)

_METHODS_HELP = (
    "Methods to compare, joined by commas, with options after a colon: "
    "lora:r=4,dropout=0.1,prefix:tokens=10. They are listed below."
)
#: Each on a line of its own: help is wrapped at hyphens, which names have. An escape keeps the lines as they are.
_METHODS_LISTED = "\n".join(
    [
        "\b\nMethods, and what each trains beside a classifier's head:",
        *(f"  {name:<17} {place.trains.partition(' (')[0]}" for name, place in PLACES.items()),
        "Without --methods:",
        *(f"  {task:<9} {','.join(methods)}" for task, methods in DEFAULT_METHODS.items()),
    ]
)
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


def _methods(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    if not (found := names(text)):
        raise BadInput(f"--methods names none: choose from {', '.join(PLACES)}")
    return found


@app.command(epilog=_METHODS_LISTED)
def compare(
    out: Annotated[
        Path, typer.Option(help="Folder of the results; an interrupted comparison goes on in it.")
    ] = Arguments.out,
    task: Annotated[
        str, typer.Option(help=f"{CLASSIFY}: tell the labels of texts; {LM}: predict their tokens.")
    ] = CLASSIFY,
    methods: Annotated[str | None, typer.Option(help=_METHODS_HELP, show_default=False)] = None,
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = IMDB_SMALL,
    data: Annotated[
        str,
        typer.Option(
            help=f"{ROTTEN_TOMATOES}, or a file ({', '.join(KINDS[LM])}) with columns text and label; --task {LM} "
            "reads text alone, and of a .txt file each piece between blank lines."
        ),
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
    accumulate: Annotated[
        int, typer.Option(help="Batches a step: less memory at the same texts a step.")
    ] = Arguments.accumulate,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a text, where the model takes more.", show_default=False),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of all methods, instead of each one's own.", show_default=False
        ),
    ] = None,
    rank: Annotated[
        int, typer.Option(help="Rank of LoRA, where a method's r says no other.")
    ] = Arguments.rank,
    bottleneck: Annotated[
        int, typer.Option(help="Width of the adapters' bottleneck, likewise.")
    ] = Arguments.bottleneck,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers of LoRA and adapters, like 6-11, likewise.", show_default=False),
    ] = None,
    together: Annotated[
        bool,
        typer.Option(
            "--together", help="Train the seeds of LoRA and adapters side by side: sooner, in more memory."
        ),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"A short look: at most {QUICK['max_steps']} steps a run and {QUICK['seeds']} seeds.",
        ),
    ] = False,
    backend: Annotated[
        str, typer.Option(help=f"What runs the fused paths: {', '.join(BACKENDS)}.")
    ] = Arguments.backend,
) -> None:
    """Train methods side by side and say which is worth its cost.

    Each trains on one split of your texts. Shows a table, and writes results.json, report.html, plots and the
    trained weights to --out.
    """
    arguments = Arguments(
        out=out.expanduser(),
        task=task,
        methods=_methods(methods),
        model=model,
        data=data,
        seeds=min(seeds, QUICK["seeds"]) if quick else seeds,
        epochs=epochs,
        max_steps=min(max_steps or QUICK["max_steps"], QUICK["max_steps"]) if quick else max_steps,
        batch_size=batch_size,
        accumulate=accumulate,
        max_length=max_length,
        lr=lr,
        rank=rank,
        bottleneck=bottleneck,
        layers=layers,
        backend=backend,
        together=together,
    )
    corpus = preflight.check(arguments)
    # Imported here: `--help`, a mistyped option and a missing file needn't wait for torch and all that needs it.
    from rich.console import Console

    from fastpeft.compare.machine import processes
    from fastpeft.compare.progress import Reporter
    from fastpeft.compare.runner import compare as run
    from fastpeft.compare.runner import finished_runs

    gc.freeze()  # what is imported stays: collections, one before each run, needn't look through it
    _quieten()
    leads = processes().is_main_process
    try:
        with Reporter(Console(stderr=True, quiet=not leads)) as reporter:
            results = run(arguments, reporter, corpus)
    except BadInput:
        if leads:
            raise
        raise typer.Exit(2) from None  # the leading process says it for all
    except KeyboardInterrupt:
        if leads:
            kept = finished_runs(arguments.out)
            runs = "run" if kept == 1 else "runs"
            print(
                f"fastpeft: stopped; {kept} finished {runs} kept; the same command goes on", file=sys.stderr
            )
        raise typer.Exit(130) from None
    if leads:
        _show(results, arguments.out)


def _show(results: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from fastpeft.compare.runner import REPORT_FILE
    from fastpeft.compare.table import table

    console = Console(highlight=False)
    # A narrower terminal folds the lines, where rich would drop columns.
    console.width = max(console.width, 80)
    console.print(table(results))
    console.print(f"Report: {out / REPORT_FILE}", soft_wrap=True)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="The --out folders of finished comparisons.")],
    out: Annotated[Path, typer.Option(help="Folder of the joined report.")] = Path("fastpeft-report-joined"),
) -> None:
    """Join comparisons into one report, with what differs between them.

    They have to be judged by the same texts.
    """
    out = out.expanduser()
    preflight.check_folder(out, preflight.RESULTS_FILE)
    if (out / preflight.PLAN_FILE).exists():
        raise BadInput(f"--out {out}: holds a comparison of its own: name another folder")
    results = joining.join([folder.expanduser() for folder in folders])
    from fastpeft.compare.runner import write
    from fastpeft.compare.summary import nothing_left

    if why := nothing_left(results):
        raise BadInput(why)
    write(results, out)
    _show(results, out)


@app.command()
def inspect(model: Annotated[str, typer.Option(help=_MODEL_HELP)] = IMDB_SMALL) -> None:
    """Show versions, devices, and what fastpeft would fuse in a model.

    The model gets LoRA and adapters to be looked at.
    """
    preflight.check_model(model)
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("Importing torch, transformers and peft") as status:
        from fastpeft.compare.inspection import inspection

        status.update(f"Loading {model} and looking at each of its modules")
        _quieten()
        shown = inspection(model)
    print(shown)


if __name__ == "__main__":
    main()
