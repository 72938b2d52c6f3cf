"""A whole comparison on a tiny model: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
import transformers
from filelock import FileLock
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from small_comparison import arguments, assert_one_report_of_two, checkpoint, corpus, options
from transformers import AutoTokenizer, GPT2ForSequenceClassification, TrainingArguments

import fastpeft
from fastpeft.batches import Orders
from fastpeft.compare import plots, runner, train
from fastpeft.compare.arguments import Arguments
from fastpeft.compare.errors import BadInput
from fastpeft.compare.memory import PeakMemory
from fastpeft.compare.methods import run_name
from fastpeft.compare.placement import loading, trainable, why_not
from fastpeft.compare.progress import Reporter
from fastpeft.compare.runner import compare
from fastpeft.compare.tasks import CLASSIFY, LM

pytestmark = pytest.mark.xdist_group("comparison")  # one comparison serves most tests
#: A method of each kind, adapters in a block and outside; where the others go, test_compare_methods.py says.
SAMPLE = ("head", "lora", "adapter-mlp", "adapter-head", "prefix", "full")
#: What the installed peft and transformers train together: test_compare_methods.py says which that must be.
PLACED = tuple(
    method.name
    for method in Arguments(methods=(*SAMPLE, "adapter-attn", "adapter-block", "adapter-embed")).chosen
    if why_not(method, CLASSIFY) is None
)
PREFIX = "past keys and values, of a cache or a prefix"


@pytest.fixture
def undrawn(monkeypatch):
    """No plots, which take seconds, and no page: those of `finished` are looked at."""
    monkeypatch.setattr(
        runner, "write", lambda results, out: runner._write(out / runner.RESULTS_FILE, results)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """Folder, arguments and results of a comparison, with --full of all methods, made while no network was in reach."""
    folder = tmp_path_factory.mktemp("comparison")
    chosen = PLACED if request.config.getoption("--full") else [name for name in PLACED if name in SAMPLE]
    asked = arguments(folder, methods=tuple(chosen), seeds=1)

    def no_network(*_):
        raise AssertionError("a comparison of local files opened a connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        results = compare(asked)
    return folder, asked, results


def _logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["a lovely film", "a chore to watch, no. 7"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**batch).logits


def _base(folder: Path) -> GPT2ForSequenceClassification:
    return GPT2ForSequenceClassification.from_pretrained(
        folder / "gpt2", num_labels=2, pad_token_id=0, ignore_mismatched_sizes=True
    )


def test_results_json_has_a_full_record_of_every_run(finished):
    folder, asked, results = finished
    written = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(results))
    assert [(run["method"], run["seed"]) for run in written["runs"]] == [(name, 0) for name in asked.methods]
    for run in written["runs"]:
        assert 0 <= run["quality"] <= 1
        assert len(run["scores"]) == 6
        assert sum(run["scores"]) / 6 == pytest.approx(run["quality"])
        assert all(0 < run[f"step_seconds_{side}"] < 10 for side in ("stock", "layers", "auto"))
        assert run["unpacked_because"] == (PREFIX if run["method"] == "prefix" else None)
        assert run["train_seconds"] > 0
        assert run["steps"] == 4
        assert [point["step"] for point in run["curve"]] == [1, 2, 3, 4]
        assert all(point["loss"] > 0 for point in run["curve"])
        assert [point["step"] for point in run["curve"] if "eval_quality" in point] == [4]
        assert run["curve"][-1]["eval_quality"] == run["quality"]
        layers = [site for site in run["sites"] if site["kind"] in ("lora", "adapter", "activation")]
        assert layers
        assert all(site["path"] != "stock" for site in layers)
    assert written["versions"]["fastpeft"] == fastpeft.__version__
    assert written["machine"]["cores"] >= 1
    assert written["data"]["rows"] == 40
    assert written["data"]["eval_rows"] == 6
    assert socket.gethostname() not in json.dumps(written["machine"])


def test_adapter_runs_fuse_their_adapters_and_lora_runs_their_projections(finished):
    kinds = {
        run["method"]: {site["kind"]: site["count"] for site in run["sites"]} for run in finished[2]["runs"]
    }
    assert kinds["lora"]["lora"] == 8
    assert "adapter" not in kinds["lora"]
    assert kinds["adapter-mlp"]["adapter"] == 2
    assert kinds["adapter-head"]["adapter"] == 1
    assert all(kind["activation"] == 2 for kind in kinds.values())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of one run can't be measured")
def test_peak_memory_is_what_a_run_adds_whatever_ran_before(finished):
    assert all(0 < run["peak_memory_bytes"] < 1e9 for run in finished[2]["runs"])
    held = torch.ones(50_000_000)
    del held  # a peak of 200 MB, which isn't the next one's
    held = torch.ones(25_000_000)
    peak = PeakMemory(torch.device("cpu"))
    assert peak.bytes() < 5e6
    more = torch.ones(10_000_000)
    del held
    assert peak.bytes() == pytest.approx(more.nbytes, rel=0.2)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.full) for name in PLACED],
    ids="method-{}".format,
)
def test_saved_weights_load_back_without_fastpeft_compare_and_give_the_same_logits(
    finished, name, monkeypatch
):
    folder, asked, results = finished
    weights = folder / "again" / name / "weights"
    record = next(run for run in results["runs"] if run["method"] == name)
    trained = {}

    def keep(model, *_):
        trained["model"] = model
        raise InterruptedError  # the steps that are timed would train the model on

    monkeypatch.setattr(train.timing, "step_seconds", keep)
    [method] = [method for method in asked.chosen if method.name == name]
    base = runner.checkpoint.load(asked.model, CLASSIFY, ("bad", "good"), torch.device("cpu"))
    encoded = runner.encode(runner.data.load(asked.data, CLASSIFY), base, asked)
    with pytest.raises(InterruptedError):
        train.train_run(method, 0, train.Setting(base, encoded, asked), weights.parent)
    # By the line that the page gives, with peft, transformers, safetensors and fastpeft's public names.
    names = {"model": _base(folder), "peft": peft, "safetensors": safetensors, "transformers": transformers}
    names["fastpeft"] = fastpeft
    exec(loading(method, CLASSIFY, str(weights)), names)
    model = names["model"]
    expected = _logits(trained["model"], folder)
    assert torch.equal(_logits(model, folder), expected)
    assert not torch.equal(_logits(_base(folder), folder), expected)
    # The run that was kept is the same one: equal seeds train equal weights.
    for file in (folder / "out" / "runs" / f"{name}-seed0" / "weights").glob("*.safetensors"):
        kept, again = load_file(file), load_file(weights / file.name)
        assert kept.keys() == again.keys()
        assert all(torch.equal(kept[key], again[key]) for key in kept)
    # Judged by itself, each held-out text is right or wrong as the run has it, in the order of the texts.
    part = runner.data.load(asked.data, CLASSIFY).eval
    alone = [model(**base.tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in part.texts]
    assert record["scores"] == [float(a == b) for a, b in zip(alone, part.labels, strict=True)]
    assert record["trainable_parameters"] == sum(p.numel() for p in trainable(trained["model"]))


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_well_formed_self_contained_and_names_every_method(finished):
    folder, asked, results = finished
    text = (folder / "out" / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in images)
    assert all(name in image["alt"] for name in asked.methods for image in images)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert "http" not in text.replace("http-equiv", "")
    for run in results["runs"]:
        assert run["method"] in page.text
        assert f"{run['quality']:.1%}" in page.text
        assert run["formula"] in page.text
        for side in ("stock", "layers", "auto"):
            assert f"{run[f'step_seconds_{side}'] * 1e3:.1f} ms" in page.text
            assert f"{run[f'step_seconds_{side}'] * 1e3:.1f} ms {side}" in images[2]["alt"]
    assert page.text.count(f"as layers: {PREFIX}") == asked.methods.count("prefix")
    assert "One seed shows no spread: no verdict follows" in page.text


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Folder, arguments and results of a comparison of language models, two seeds each."""
    folder = tmp_path_factory.mktemp("language")
    asked = arguments(folder, task=LM, methods=("prompt", "lora:r=3,layers=1", "adapter-mlp"), max_length=6)
    return folder, asked, compare(asked)


def test_bits_a_token_are_those_of_a_model_that_reads_the_documents_itself(spoken):
    """Each run's weights on the base, asked for the probability of each token by itself, without a batch."""
    _, asked, results = spoken
    base = runner.checkpoint.load(asked.model, LM, (), torch.device("cpu"))
    corpus = runner.data.load(asked.data, LM)
    for name in (None, *(method for method in asked.chosen if method.place.kind != "prompt")):
        names = {"model": copy.deepcopy(base.model), "peft": peft, "fastpeft": fastpeft}
        scores = results["before"]
        if name:
            weights = asked.out / "runs" / run_name(name, 1) / "weights"
            exec(loading(name, LM, str(weights)), names)
            [scores] = [r["scores"] for r in results["runs"] if (r["method"], r["seed"]) == (name.name, 1)]
        model = names["model"].eval()
        expected = []
        for text in corpus.eval.texts:
            ids = [base.tokenizer.eos_token_id, *base.tokenizer(text)["input_ids"]]
            bits = 0.0
            for place in range(1, len(ids)):
                seen = ids[(place - 1) // 5 * 5 : place]  # examples of 6 tokens share their ends
                with torch.no_grad():
                    chances = model(input_ids=torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)
                bits -= chances[ids[place]].item() / 0.6931471805599453
            expected.append(bits)
        assert scores == pytest.approx(expected, rel=1e-4)
    tokens = [len(base.tokenizer(text)["input_ids"]) for text in corpus.eval.texts]
    assert results["data"]["weights"] == tokens
    assert max(tokens) > 6  # some documents are in more than one example
    for run in results["runs"]:
        assert run["quality"] == pytest.approx(sum(run["scores"]) / sum(tokens))


def test_a_language_models_page_says_bits_perplexity_and_what_the_base_had(spoken):
    folder, _, results = spoken
    page = _Page((folder / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    before = sum(results["before"]) / sum(results["data"]["weights"])
    assert (
        f"The base model, not fine-tuned: {before:.3f} bits a token (perplexity {2**before:.1f})" in page.text
    )
    assert "transformers.GPT2LMHeadModel.from_pretrained" in page.text
    assert "runs/lora_r=3_layers=1-seed0/weights" in page.text
    assert "accuracy" not in page.text.lower()


def test_beside_its_weights_each_run_has_a_readme_whose_lines_load_them(spoken, monkeypatch):
    _, asked, results = spoken
    for method in asked.chosen:
        folder = asked.out / "runs" / run_name(method, 0)
        text = (folder / "README.md").read_text(encoding="utf-8")
        [run] = [r for r in results["runs"] if (r["method"], r["seed"]) == (method.name, 0)]
        assert f"{run['quality']:.3f} bits a token" in text
        [lines] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        monkeypatch.chdir(folder)
        names = {}
        exec(lines, names)
        loaded = {
            n for n, p in names["model"].named_parameters() if "lora_" in n or "adapter" in n or "prompt" in n
        }
        assert loaded


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_of_language_models_goes_on_where_it_stopped(spoken, monkeypatch):
    _, asked, results = spoken
    monkeypatch.setattr(runner, "train_run", None)
    monkeypatch.setattr(runner, "judged_untrained", None)
    assert compare(asked) == results


def test_memory_that_does_not_suffice_is_one_line_naming_the_remedy(tmp_path, monkeypatch):
    asked = arguments(tmp_path, methods=("head",))

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train.Trainer, "train", exhausted)
    with pytest.raises(BadInput, match="memory doesn't suffice: halve --batch-size"):
        compare(asked)

    def other(*_):
        raise RuntimeError("shapes don't match")

    monkeypatch.setattr(train.Trainer, "train", other)
    with pytest.raises(RuntimeError, match="shapes don't match"):
        compare(asked)


@pytest.mark.parametrize("asked", ["fp16", "fp8", "half"])
def test_a_precision_that_the_cpu_has_no_autocast_for_is_refused(monkeypatch, asked):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    monkeypatch.setattr(runner.machine, "processes", lambda: SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(BadInput, match=f"ACCELERATE_MIXED_PRECISION={asked}: here it can be no, bf16"):
        runner.machine.mixed_precision()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("asked", "amx", "avx512", "expected"),
    [
        (None, False, False, "no"),
        (None, True, False, "bf16"),
        (None, False, True, "bf16"),
        ("no", True, True, "no"),
    ],
)
def test_training_is_in_bf16_where_the_cpu_multiplies_it_and_nothing_else_is_asked(
    tmp_path, monkeypatch, asked, amx, avx512, expected
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    if asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    assert runner.machine.mixed_precision() == expected
    seen = []

    def timed(model, batches, backend, autocast):
        with autocast():
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        raise KeyboardInterrupt  # it has trained and was judged by then

    monkeypatch.setattr(train.timing, "step_seconds", timed)
    with pytest.raises(KeyboardInterrupt):
        compare(arguments(tmp_path, methods=("lora",), seeds=1, max_steps=1))
    assert seen == [torch.bfloat16 if expected == "bf16" else None]


def test_accumulated_batches_are_averaged(tmp_path, undrawn):
    small = {"methods": ("head",), "seeds": 1, "max_steps": 1}
    losses = [
        compare(
            arguments(tmp_path, out=tmp_path / str(size), batch_size=size, accumulate=16 // size, **small)
        )
        for size in (16, 4)
    ]
    at_once, accumulated = (results["runs"][0]["curve"][0]["loss"] for results in losses)
    assert accumulated == pytest.approx(at_once, rel=0.2)  # other texts


def test_a_method_that_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "why_not", lambda method, _: {"lora": "too old"}.get(method.name))
    asked = arguments(tmp_path, methods=("head", "lora"))
    with pytest.raises(BadInput, match="lora can't be trained here, leave it out: too old"):
        compare(asked)
    assert not asked.out.exists()


def test_a_default_that_cannot_be_trained_is_left_out_with_a_line(monkeypatch):
    monkeypatch.setattr(runner, "why_not", lambda method, _: {"prefix": "too new"}.get(method.name))
    console = Console(file=io.StringIO())
    left = runner._trainable(Arguments(), Reporter(console))
    assert left.methods == ("head", "lora-qkv", "lora", "adapter-mlp", "full")
    assert console.file.getvalue() == "Without prefix, which can't be trained here: too new\n"


def test_the_plots_are_png_files_of_a_legible_size(finished):
    for name in "quality", "quality_time", "step_time", "curves":
        with Image.open(finished[0] / "out" / f"{name}.png") as image:
            assert image.width > 1000
            assert len(image.convert("L").getcolors()) > 20  # not blank


def test_quality_is_a_curve_where_it_was_judged_on_the_way(finished):
    results = json.loads((finished[0] / "out" / "results.json").read_text())
    (curves,) = (plot for plot in plots.PLOTS if plot.name == "curves")
    assert len(curves.draw(results).axes) == 1
    assert curves.describe(results).startswith("Training loss by training step")
    for run in results["runs"]:
        run["curve"][1]["eval_quality"] = 0.5
    assert [axes.get_ylabel() for axes in curves.draw(results).axes] == [
        "accuracy, higher is better",
        "training loss (nats)",
    ]
    assert curves.describe(results).startswith("Held-out accuracy and training loss by training step")


def _recorded(out: Path) -> dict[str, float]:
    """The finished runs in a folder and when each was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/[!.]*/record.json")}


@pytest.mark.usefixtures("undrawn")
def test_killed_and_started_again_it_keeps_finished_runs_and_ends_with_the_same_results(finished, tmp_path):
    """As the comparison that nothing cut short has them."""
    methods = "head", "adapter-mlp"
    asked = dataclasses.replace(finished[1], out=tmp_path / "out", methods=methods)
    command = [sys.executable, "-m", "fastpeft", "compare", *options(asked)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not _recorded(asked.out):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = _recorded(asked.out)
    assert 1 <= len(kept) < len(methods)
    assert not (asked.out / "results.json").exists()

    results = compare(asked)
    now = _recorded(asked.out)
    assert len(now) == len(methods)
    assert {name: now[name] for name in kept} == kept
    assert not list(asked.out.glob("runs/.*"))
    whole = [run for run in finished[2]["runs"] if run["method"] in methods]
    assert [run["method"] for run in results["runs"]] == [run["method"] for run in whole]
    assert [run["quality"] for run in results["runs"]] == [run["quality"] for run in whole]
    losses = [[point["loss"] for point in run["curve"]] for run in results["runs"]]
    assert losses == [[point["loss"] for point in run["curve"]] for run in whole]


@pytest.mark.usefixtures("undrawn")
def test_a_run_cut_short_by_ctrl_c_leaves_nothing_that_counts(tmp_path):
    asked = arguments(tmp_path, methods=("head",))

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.timing, "step_seconds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(asked)
    assert runner.finished_runs(asked.out) == 0
    assert len(compare(asked)["runs"]) == 2


@pytest.mark.usefixtures("undrawn")
def test_a_finished_comparison_started_again_trains_nothing(finished, monkeypatch):
    _, asked, results = finished
    monkeypatch.setattr(runner, "train_run", None)
    assert compare(asked)["runs"] == results["runs"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 3}, "--rank (was 2, now 3)"),
        ({"seeds": 2, "lr": 0.5}, "--seeds (was 1, now 2); --lr (was None, now 0.5)"),
        ({"methods": ("head",)}, "--methods (was head,lora,adapter-mlp"),
    ],
)
def test_other_arguments_on_the_same_folder_are_refused_by_name(finished, change, named, monkeypatch):
    folder, asked, _ = finished
    monkeypatch.setattr(
        runner.checkpoint, "load", lambda *_: pytest.fail("the model was loaded, or trained, first")
    )
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    with pytest.raises(BadInput) as refusal:
        compare(dataclasses.replace(asked, **change))
    assert named in str(refusal.value)
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")} == before


@pytest.mark.usefixtures("undrawn")
def test_other_data_or_another_model_under_the_same_name_is_refused(tmp_path):
    asked = arguments(tmp_path, methods=("head",), seeds=1, max_steps=1)
    compare(asked)
    corpus(Path(asked.data), rows=50)
    with pytest.raises(BadInput, match="data rows"):
        compare(asked)
    corpus(Path(asked.data))
    shutil.rmtree(asked.model)
    checkpoint(Path(asked.model), initializer_range=0.1)
    with pytest.raises(BadInput, match="model sha256"):
        compare(asked)


def test_points_that_are_moved_apart_meet_no_others():
    """As 355 and 357 would meet 448, where they are moved from each other alone."""
    for values in ([355, 357, 448], [100, 105, 118, 140], [10, 1000, 1001, 1002, 1600], [7]):
        placed = plots._apart(values)
        ordered = sorted(placed)
        assert [placed.index(each) for each in ordered] == list(range(len(values)))
        assert all(after > 1.1 * before for before, after in itertools.pairwise(ordered))
    assert plots._apart([10, 20]) == [10, 20]


def test_runs_judged_at_different_steps_share_a_curve(finished):
    results = copy.deepcopy(finished[2])
    [head] = [run for run in results["runs"] if run["method"] == "head"]
    other = copy.deepcopy(head) | {"seed": 1}
    other["curve"] = [point for point in other["curve"] if point["step"] in (2, 4)]
    results["runs"].append(other)
    [axes] = plots._draw_curves(results).axes
    [line] = [line for line in axes.get_lines() if line.get_label() == "head"]
    assert list(line.get_xdata()) == [2, 4]


@pytest.mark.parametrize("damage", ["half a record", "no record", "no weights"])
def test_a_damaged_run_is_named_and_left(finished, tmp_path, damage):
    folder, asked, _ = finished
    out = shutil.copytree(folder / "out", tmp_path / "out")
    run = out / "runs" / "head-seed0"
    if damage == "half a record":
        (run / "record.json").write_text('{"method": "he', encoding="utf-8")
    elif damage == "no record":
        (run / "record.json").unlink()
    else:
        shutil.rmtree(run / "weights")
    before = sorted(out.rglob("*"))
    with pytest.raises(
        BadInput, match="runs/head-seed0: is damaged: remove it, and the run is trained again"
    ):
        compare(dataclasses.replace(asked, out=out))
    assert set(out.rglob("*")) - {out / ".lock"} == set(before) - {out / ".lock"}


def test_a_folder_that_another_comparison_writes_to_is_refused(finished):
    _, asked, _ = finished
    with (
        FileLock(asked.out / ".lock"),
        pytest.raises(BadInput, match="another comparison is writing to it: wait for it, or name another"),
    ):
        compare(asked)


def test_a_run_that_diverges_is_recorded_as_that(tmp_path):
    asked = arguments(tmp_path, methods=("head", "full"), seeds=2, max_steps=6, lr=1e30)
    results = compare(asked)
    found = {run["method"]: run for run in results["runs"]}
    assert found["full"]["diverged"]
    assert found["full"]["quality"] is found["full"]["scores"] is None
    assert not found["head"]["diverged"]
    page = (asked.out / "report.html").read_text(encoding="utf-8")
    assert "full isn&#39;t compared: it diverged from seeds 0 and 1 at the learning rate 1e+30" in page
    strict = json.JSONDecoder(parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    strict.decode((asked.out / "results.json").read_text(encoding="utf-8"))
    with pytest.raises(BadInput, match=r"nothing is left to compare\. full isn't compared: it diverged"):
        compare(dataclasses.replace(asked, methods=("full",), out=tmp_path / "alone"))
    assert (tmp_path / "alone" / "results.json").exists()


def test_records_of_another_format_are_refused(finished, tmp_path):
    """A folder from before the two scopes were timed: its plan names no format."""
    folder, asked, _ = finished
    shutil.copytree(folder / "out", tmp_path / "old")
    plan = tmp_path / "old" / "plan.json"
    before = json.loads(plan.read_text(encoding="utf-8"))
    del before["record"]
    plan.write_text(json.dumps(before), encoding="utf-8")
    with pytest.raises(BadInput, match=r"record format \(was None, now 4\); name another folder"):
        compare(dataclasses.replace(asked, out=tmp_path / "old"))


@pytest.mark.usefixtures("undrawn")
def test_a_folder_that_moves_still_goes_on(finished, tmp_path):
    folder, asked, results = finished
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder / "out", moved)
    assert compare(dataclasses.replace(asked, out=moved))["runs"] == results["runs"]


def test_a_run_has_the_order_that_it_has_beside_others(tmp_path):
    """Of its seed alone, in each epoch: seeds are compared pair by pair, trained together or apart."""
    data = [{"input_ids": list(range(1 + i * 7 % 11)), "labels": 0} for i in range(40)]
    settings = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, train_sampling_strategy="group_by_length", seed=5,
        report_to="none", use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    model = torch.nn.Linear(1, 1)
    alone = train._InOrder(model, settings, list, data).get_train_dataloader()
    beside = Orders(transformers.Trainer(model, settings, list, data)._get_train_sampler(data), [4, 5], 4)
    for epoch in range(2):
        alone.set_epoch(epoch)
        beside.set_epoch(epoch)
        torch.manual_seed(epoch)  # nothing that all else draws from
        order = torch.tensor(list(beside)).view(-1, 2, 4)[:, 1].tolist()
        assert list(alone) == [[data[i] for i in batch] for batch in order]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["lora", "adapter-attn"])
def test_seeds_train_together(name, tmp_path, monkeypatch):
    heads, stock = [], train.fastpeft.Sweep.train

    def observed(sweep):
        of_heads = [p for key, p in sweep.model.named_parameters() if "score" in key and p.requires_grad]
        heads.extend(p.detach().clone() for p in of_heads)
        return stock(sweep)

    monkeypatch.setattr(train.fastpeft.Sweep, "train", observed)
    asked = arguments(tmp_path, methods=(name, "head"), seeds=2, together=True)
    console = Console(file=io.StringIO(), width=200)
    runs = compare(asked, Reporter(console))["runs"]
    said = console.file.getvalue()
    assert len(heads) == 2
    for seed, head in enumerate(heads):  # as they begin where a run trains alone
        transformers.set_seed(seed)
        assert torch.equal(head, torch.empty_like(head).normal_(std=0.02))
    assert "head: one run at a time, only LoRA's and adapters' train together" in said
    assert re.search(
        rf"{name}: 2 runs together trained in [\d.]+ s; their steps one by one would take [\d.]+ s", said
    )
    found = [(run["method"], run["seed"]) for run in runs]
    assert found == [(name, 0), (name, 1), ("head", 0), ("head", 1)]
    assert all(set(run) == set(runs[2]) for run in runs)
    weights = []
    for run in runs[:2]:
        assert (run["steps"], len(run["scores"])) == (4, len(runs[2]["scores"]))
        assert [point["step"] for point in run["curve"] if "loss" in point] == [1, 2, 3, 4]
        symbols, numbers = run["formula"].split(" = ")[:2]
        assert eval(numbers.replace("·", "*")) == run["trainable_parameters"], symbols
        folder = tmp_path / "out" / "runs" / run_name(asked.chosen[0], run["seed"])
        model = GPT2ForSequenceClassification.from_pretrained(tmp_path / "gpt2")
        fresh = _logits(copy.deepcopy(model), tmp_path)
        scope = {"model": model, "peft": peft, "fastpeft": fastpeft}
        exec(run["load"].replace('"runs/', f'"{tmp_path}/out/runs/'), scope)
        assert not torch.allclose(_logits(scope["model"], tmp_path), fresh)
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "record.json", "weights"]
        (file,) = (folder / "weights").glob("*.safetensors")
        weights.append(load_file(file))
    assert any(key.endswith("score.weight") for key in weights[0])
    zero = {key for key in weights[0] if key.endswith("up.bias")}  # which differ by little after so few steps
    assert all(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0].keys() - zero)
    with pytest.raises(BadInput, match="--together"):
        compare(dataclasses.replace(asked, together=False))


@pytest.mark.usefixtures("undrawn")
def test_seeds_vary_the_start_and_the_order_of_texts_on_one_split(tmp_path):
    asked = arguments(tmp_path, methods=("lora",), lr=1e-30)  # so small that the start is what is saved
    first, second = compare(asked)["runs"]
    assert first["curve"][0]["loss"] != second["curve"][0]["loss"]
    weights = [
        load_file(asked.out / "runs" / f"lora-seed{seed}" / "weights" / "adapter_model.safetensors")
        for seed in (0, 1)
    ]
    starts = [name for name in weights[0] if "lora_A" in name or "score" in name]
    assert len(starts) == 9
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in starts)


@pytest.mark.full  # the launch by torchrun, in test_fidelity_distributed.py, stands for it: accelerate ends in that
@pytest.mark.fidelity("accelerate launch of fastpeft compare", "one report from all processes")
def test_two_processes_of_accelerate_write_the_results_of_one(tmp_path):
    asked = arguments(tmp_path, methods=("lora",), seeds=1, max_steps=2)
    # Without --multi_gpu, it starts a single process where it sees no GPU.
    launcher = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",  # any that is free
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "fastpeft", "compare", *options(asked)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_one_report_of_two(asked, done.stdout)
