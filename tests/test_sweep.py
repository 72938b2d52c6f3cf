"""Runs side by side against each alone: a loop written out with stock peft in float64, and transformers' Trainer."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import gpt2
from peft import AdaLoraConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)

import fastpeft
from fastpeft import AdapterConfig, Run, Sweep
from fastpeft.saving import CONFIG_FILE, WEIGHTS_FILE

TASKS = {GPT2LMHeadModel: "CAUSAL_LM", GPT2ForSequenceClassification: "SEQ_CLS"}
HEADS = pytest.mark.parametrize("head", list(TASKS))
EXAMPLES = 11  # batches of three: the last has two


def lora(head: type, r: int, *targets: str, **more: Any) -> LoraConfig:
    return LoraConfig(
        r=r, target_modules=list(targets), task_type=TASKS[head], fan_in_fan_out=True, lora_alpha=8, **more
    )


def runs_of(head: type, **more: Any) -> list[Run]:
    """Ranks, targets, learning rates and seeds that differ."""
    return [
        Run("wide", lora(head, 8, "c_attn", "c_proj", "c_fc", **more), learning_rate=3e-3, seed=5),
        Run("thin", lora(head, 2, "c_attn", use_rslora=True, **more), learning_rate=1e-2, seed=6),
        Run("inner", lora(head, 4, "c_fc", **more)),
    ]


def sets_of(head: type) -> list[Run]:
    """Bottlenecks, slots, activations, learning rates and seeds that differ."""
    return [
        Run("half", AdapterConfig(("post_attn", "post_mlp"), 6, "gelu"), learning_rate=3e-3, seed=5),
        Run("ends", AdapterConfig(("post_embed", "pre_head"), 4, "silu", 0.5), learning_rate=1e-2, seed=6),
        Run("a", AdapterConfig(("parallel_mlp", "post_block"), 3, layers=(1,))),
    ]


KINDS = {"lora": runs_of, "adapters": sets_of}


def arguments(folder: Any, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 3, "num_train_epochs": 2, "learning_rate": 5e-3, "logging_steps": 1, "seed": 3,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**options, **more})


def examples(head: type) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(EXAMPLES):
        ids = torch.randint(2, 61, (2 + i * 5 % 9,), generator=generator)
        found.append({"input_ids": ids, "labels": ids if head is GPT2LMHeadModel else i * i % 3 % 2})
    return found


def collator(side: str = "right") -> Callable[[list[Any]], dict[str, Tensor]]:
    def collate(batch: list[Any]) -> dict[str, Tensor]:
        longest = max(len(each["input_ids"]) for each in batch)

        def padded(rows: list[Tensor], value: int) -> Tensor:
            room = [longest - len(row) for row in rows]
            sides = [(n, 0) if side == "left" else (0, n) for n in room]
            return torch.stack([F.pad(row, pad, value=value) for row, pad in zip(rows, sides, strict=True)])

        ids = [each["input_ids"] for each in batch]
        labels = [each["labels"] for each in batch]
        whole = isinstance(labels[0], int)
        return {
            "input_ids": padded(ids, 0),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
            "labels": torch.tensor(labels) if whole else padded(labels, -100),
        }

    return collate


def loss_of(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The summed loss of a batch by the formula, and how many labels Trainer counts: first tokens, of GPT-2, too."""
    labels = batch["labels"]
    count = int((labels != -100).sum())
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if labels.dim() > 1:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum"), count


def put_on(model: Any, run: Run) -> Any:
    if isinstance(run.config, LoraConfig):
        return get_peft_model(model, copy.deepcopy(run.config))
    return fastpeft.add_adapters(model, run.config)


def alone(
    base: nn.Module, run: Run, given: TrainingArguments, data: list[Any], collate: Any, stop: int = 999
) -> Any:
    """One run, unpatched, a loop written out: its losses and its model; `stop` ends it before that step."""
    seed = given.seed if run.seed is None else run.seed
    set_seed(seed)
    model: Any = put_on(copy.deepcopy(base), run)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = given.learning_rate if run.learning_rate is None else run.learning_rate
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # Of biases, and of what is below a LayerNorm, Trainer has none.
    bare = [p for name, p in named if name.endswith("bias") or ".ln_f." in name]
    groups = [{"params": [p for _, p in named if all(p is not each for each in bare)]}]
    groups.append({"params": bare, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=given.weight_decay)
    size, accumulate = given.per_device_train_batch_size, given.gradient_accumulation_steps
    batches = -(-len(data) // size)
    steps = int(given.num_train_epochs) * -(-batches // accumulate)
    schedule = get_scheduler(
        given.lr_scheduler_type, optimizer, given.get_warmup_steps(steps), num_training_steps=steps
    )
    losses: list[float] = []
    for epoch in range(int(given.num_train_epochs)):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        found = [collate([data[i] for i in order[at : at + size]]) for at in range(0, len(data), size)]
        for at in range(0, batches, accumulate):
            if len(losses) + 1 == stop:
                return losses, model
            parts = [loss_of(model.train(), batch) for batch in found[at : at + accumulate]]
            loss = sum(total for total, _ in parts) / sum(count for _, count in parts)
            optimizer.zero_grad()
            loss.backward()
            if given.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, given.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses, model


def assert_as_alone(sweep: Sweep, results: list[Any], base: nn.Module, data: list[Any], collate: Any) -> None:
    """The same curve, and the same weights in the folder, as of each run alone."""
    given = sweep.trainer.args
    for run, result in zip(sweep.trainer.runs, results, strict=True):
        losses, model = alone(base, run, given, data, collate)
        assert [step for step, _ in result.curve] == list(range(1, len(losses) + 1))
        assert [loss for _, loss in result.curve] == pytest.approx(losses, rel=1e-9), run.name
        assert (result.name, result.loss, result.stopped) == (run.name, result.curve[-1][1], None)
        assert_holds(result, base, model)


def assert_holds(result: Any, base: nn.Module, model: nn.Module) -> None:
    """The folder of a result, loaded by peft or as adapters, has these weights."""
    if isinstance(model, PeftModel):
        loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base), result.folder)
    else:
        loaded = fastpeft.load_adapters(copy.deepcopy(base), result.folder)
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name.replace("score.own_default", "score"): p for name, p in loaded.named_parameters()}
    assert expected
    for name, parameter in expected.items():
        torch.testing.assert_close(
            found[name], parameter.detach(), rtol=1e-8, atol=1e-11, msg=f"{result.name}: {name}"
        )


@HEADS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("side", "more"),
    [
        ("right", {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}),
        ("left", {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}),
        ("right", {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"}),
        ("right", {"max_grad_norm": -1.0, "max_steps": -1}),
    ],
)
def test_each_run_is_what_it_is_alone(head, kind, side, more, tmp_path):
    base, data, collate = gpt2(head).double(), examples(head), collator(side)
    sweep = Sweep(copy.deepcopy(base), KINDS[kind](head), arguments(tmp_path, **more), data, collate)
    results = sweep.train()
    if (
        side == "right" or head is GPT2ForSequenceClassification
    ):  # else first tokens are predicted from the padding
        assert_packed(sweep)
    assert_as_alone(sweep, results, base, data, collate)


def assert_packed(sweep: Sweep) -> None:
    rows = [row for row in fastpeft.report(sweep.model) if row.kind in ("packing", "lora", "adapter", "loss")]
    rows = [row for row in rows if row.reason != "it reads another tensor than the one it is added to"]
    assert "packing" in {row.kind for row in rows}
    assert {"lora", "adapter"} & {row.kind for row in rows}
    assert all(row.path == "torch" and row.calls > 0 for row in rows), str(fastpeft.report(sweep.model))


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (GPT2LMHeadModel, {}),
        (GPT2LMHeadModel, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}),
        (GPT2ForSequenceClassification, {}),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_each_run_is_what_trainer_makes_of_it(kind, head, more, tmp_path):
    """With the same arguments, in float32: the order of its examples is Trainer's, and how its labels are counted."""
    base, data, collate = gpt2(head), examples(head), collator()
    runs = KINDS[kind](head)
    results = Sweep(copy.deepcopy(base), runs, arguments(tmp_path, **more), data, collate).train()
    for run, result in zip(runs, results, strict=True):
        seed = 3 if run.seed is None else run.seed
        set_seed(seed)
        model = put_on(copy.deepcopy(base), run)
        given = arguments(tmp_path / "alone", learning_rate=run.learning_rate or 5e-3, seed=seed, **more)
        trainer = Trainer(model, given, collate, data)
        trainer.train()
        curve = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        assert [step for step, _ in result.curve] == [step for step, _ in curve]
        assert [loss for _, loss in result.curve] == pytest.approx([loss for _, loss in curve], rel=2e-5)


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential"])
def test_orders_that_trainer_offers(strategy, tmp_path):
    seen: list[list[int]] = []

    def collate(batch: list[Any]) -> dict[str, Tensor]:
        seen.append([len(each["input_ids"]) for each in batch])
        return collator()(batch)

    head = GPT2LMHeadModel
    given = arguments(tmp_path, train_sampling_strategy=strategy, max_steps=4)
    Sweep(gpt2(), runs_of(head)[:2], given, examples(head), collate).train()
    lengths = [len(each["input_ids"]) for each in examples(head)]
    for run in range(2):
        of_run = seen[run::2]
        assert sorted(n for batch in of_run for n in batch) == sorted(lengths)
        if strategy == "sequential":
            assert [n for batch in of_run for n in batch] == lengths
        else:  # longest first, and a batch's lengths are close
            assert max(lengths) in of_run[0]
            assert of_run[0] == sorted(of_run[0], reverse=True)


def test_seeds_decide_weights_and_order(tmp_path):
    head, config = GPT2LMHeadModel, lora(GPT2LMHeadModel, 4, "c_attn")
    runs = [Run("one", config, seed=1), Run("again", config, seed=1), Run("other", config, seed=2)]
    one, again, other = Sweep(gpt2(), runs, arguments(tmp_path), examples(head), collator()).train()
    assert one.curve == again.curve
    assert one.curve != other.curve


class Interrupting(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("head", "kind"), [(GPT2LMHeadModel, "lora"), *((GPT2ForSequenceClassification, kind) for kind in KINDS)]
)
def test_an_interrupted_sweep_goes_on_to_the_same_numbers(head, kind, tmp_path):
    """With dropout, a run that had diverged by then, and losses that were not yet logged at the checkpoint."""

    def sweep(name: str) -> Sweep:
        if kind == "lora":
            runs = [*runs_of(head, lora_dropout=0.3), Run("wild", lora(head, 2, "c_fc"), learning_rate=1e38)]
        else:
            runs = [*sets_of(head), Run("wild", AdapterConfig(bottleneck=2), learning_rate=1e38)]
        floor: dict[str, Any] = {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-4},
        }
        given = arguments(tmp_path / name, save_strategy="steps", save_steps=3, logging_steps=2, **floor)
        return Sweep(gpt2(head, resid_pdrop=0.1), runs, given, examples(head), collator())

    through = sweep("through").train()
    first = sweep("stopped")
    first.trainer.add_callback(Interrupting(5))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert not any(module._forward_pre_hooks for module in first.model.modules())
    resumed = sweep("stopped").train(resume_from_checkpoint=True)
    assert [(each.loss, each.curve, each.stopped) for each in resumed] == [
        (each.loss, each.curve, each.stopped) for each in through
    ]
    assert [step for step, _ in through[0].curve] == [2, 3, 4, 6, 8]
    assert through[3].stopped
    for mine, theirs in zip(resumed, through, strict=True):
        names = {"lora": ("adapter_model.safetensors", "adapter_config.json")}
        for name in names.get(kind, (WEIGHTS_FILE, CONFIG_FILE)):
            contents = [(each.folder / name).read_bytes() for each in (mine, theirs)]
            assert contents[0] == contents[1], mine.name
            assert contents[0]


def test_a_checkpoint_of_other_runs_is_refused(tmp_path):
    head = GPT2LMHeadModel
    given = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    Sweep(gpt2(), runs_of(head), given, examples(head), collator()).train()
    again = runs_of(head)
    again[0].config.peft_version = "0.0"  # which peft writes there by itself
    Sweep(gpt2(), again, given, examples(head), collator()).train(resume_from_checkpoint=True)
    others = [*runs_of(head)[:2], Run("inner", lora(head, 4, "c_fc"), learning_rate=7.0)]
    with pytest.raises(ValueError, match="is of other runs: it holds inner, thin, wide; inner differ"):
        Sweep(gpt2(), others, given, examples(head), collator()).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_runs_in_another_order_is_refused(tmp_path):
    """The optimiser's state would go to other runs."""
    head = GPT2LMHeadModel
    given = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    Sweep(gpt2(), runs_of(head), given, examples(head), collator()).train()
    turned = Sweep(gpt2(), runs_of(head)[::-1], given, examples(head), collator())
    before = copy.deepcopy(turned.model.state_dict())
    with pytest.raises(ValueError, match="in another order, give them in that one: wide, thin, inner"):
        turned.train(resume_from_checkpoint=True)
    torch.testing.assert_close(turned.model.state_dict(), before, rtol=0, atol=0)


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups if group["params"]])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cosine_with_min_lr", {"min_lr": 1e-3}),
        ("polynomial", {"lr_end": 2e-3}),
        ("warmup_stable_decay", {"num_decay_steps": 2}),
    ],
)
def test_a_schedule_is_of_each_runs_rate(kind, options, tmp_path):
    """Some end at a rate that is given, which is another share of each run's."""
    head = GPT2LMHeadModel
    more = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options, "warmup_steps": 1, "max_steps": 5}
    sweep = Sweep(gpt2(), runs_of(head), arguments(tmp_path, **more), examples(head), collator())
    rates = Rates()
    sweep.trainer.add_callback(rates)
    sweep.train()
    seen = list(rates.seen)
    sweep.train()
    assert rates.seen == seen + seen
    rates.seen = seen
    for run, seen in zip(sweep.trainer.runs, zip(*rates.seen, strict=True), strict=True):
        given = arguments(tmp_path / "alone", learning_rate=run.learning_rate, **more)
        expected = Rates()
        model = get_peft_model(gpt2(), run.config)
        Trainer(model, given, collator(), examples(head), callbacks=[expected]).train()
        assert [[rate] for rate in seen] == expected.seen
        assert len(set(seen)) > 2


def test_numbers_of_numpy(tmp_path):
    runs = [Run(f"run-{seed}", FINE.config, np.float32(1e-2), seed) for seed in np.arange(2)]
    results = Sweep(gpt2(), runs, arguments(tmp_path), examples(LM), collator()).train()
    (other,) = Sweep(
        gpt2(),
        [Run("x", FINE.config, float(np.float32(1e-2)), 1)],
        arguments(tmp_path),
        examples(LM),
        collator(),
    ).train()
    assert results[1].curve == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in other.curve]


def test_a_run_that_nobody_logged_has_a_loss(tmp_path):
    given = arguments(tmp_path, logging_steps=500)
    (found,) = Sweep(gpt2(), [FINE], given, examples(LM), collator()).train()
    losses, _ = alone(gpt2(), FINE, given, examples(LM), collator())
    assert found.curve == [(8, pytest.approx(sum(losses) / 8, rel=1e-5))]


def test_a_schedule_that_follows_the_loss_is_refused(tmp_path):
    given = arguments(tmp_path)
    given.lr_scheduler_type = SchedulerType.REDUCE_ON_PLATEAU  # which they want an evaluation for
    with pytest.raises(
        ValueError, match="run fine: lr_scheduler_type reduce_lr_on_plateau: it follows the loss"
    ):
        Sweep(gpt2(), [FINE], given, examples(LM), collator())


def test_a_file_where_a_runs_folder_is_to_be_is_refused(tmp_path):
    (tmp_path / "fine").write_text("")
    with pytest.raises(ValueError, match=r"run fine: its folder is to be .*fine, where a file is"):
        Sweep(gpt2(), [FINE], arguments(tmp_path), examples(LM), collator())


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
@HEADS
def test_a_run_that_diverges_leaves_the_others_as_they_are(head, kind, what, tmp_path):
    base, data, collate = gpt2(head).double(), examples(head), collator()
    runs = KINDS[kind](head)
    config = {"lora": lora(head, 4, "c_attn"), "adapters": AdapterConfig(bottleneck=4)}[kind]
    runs.insert(1, Run("wild", config, learning_rate=1e-3, seed=8))
    sweep = Sweep(
        copy.deepcopy(base), runs, arguments(tmp_path, gradient_accumulation_steps=2), data, collate
    )
    of_run = r"(lora_B\.wild|adapter_wild\.up)\.weight"
    broken = [p for name, p in sweep.model.named_parameters() if re.search(of_run, name)][-1]

    class Breaking(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and what == "gradient":
                broken.register_hook(lambda gradient: gradient * float("inf"))
            if state.global_step == 2 and what == "loss":
                broken.register_post_accumulate_grad_hook(lambda p: None)
                self.kept = broken.detach().clone()
                broken.data.fill_(float("nan"))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and what == "loss":
                broken.data.copy_(self.kept)

    sweep.trainer.add_callback(Breaking())
    results = sweep.train()
    wild = results.pop(1)
    assert wild.stopped == f"stopped at step 3: its {what} is not finite"
    losses, model = alone(base, runs[1], sweep.trainer.args, data, collate, stop=3)
    assert wild.curve == [(i + 1, pytest.approx(loss, rel=1e-9)) for i, loss in enumerate(losses)]
    assert_holds(wild, base, model)
    sweep.trainer.runs.pop(1)
    assert_as_alone(sweep, results, base, data, collate)


def test_losses_before_a_run_stopped_are_told(tmp_path):
    head = GPT2LMHeadModel
    runs = [Run("tame", lora(head, 2, "c_attn")), Run("wild", lora(head, 2, "c_attn"), learning_rate=1e38)]
    given, data, collate = arguments(tmp_path, logging_steps=5), examples(head), collator()
    tame, wild = Sweep(gpt2(), runs, given, data, collate).train()
    assert [step for step, _ in tame.curve] == [5, 8]
    assert [step for step, _ in wild.curve] == [1]
    first, _ = alone(gpt2(), Run("wild", runs[1].config), given, data, collate, stop=2)
    assert [wild.loss] == pytest.approx(first, rel=1e-5)


def test_a_sweep_ends_when_all_runs_have_stopped(tmp_path):
    head = GPT2LMHeadModel
    runs = [Run(name, lora(head, 2, "c_attn"), learning_rate=1e38) for name in ("one", "two")]
    sweep = Sweep(gpt2(), runs, arguments(tmp_path), examples(head), collator())
    assert all(result.stopped for result in sweep.train())
    assert sweep.trainer.state.global_step < 8


def test_autocast(tmp_path):
    """As a run by Trainer in bfloat16, whose rounding is a hundredth."""
    head = GPT2LMHeadModel
    base, data, given = gpt2(), examples(head), arguments(tmp_path, bf16=True)
    sweep = Sweep(copy.deepcopy(base), runs_of(head), given, data, collator())
    with torch.autocast("cpu", enabled=False):
        results = sweep.train()
    for run, result in zip(runs_of(head), results, strict=True):
        losses, _ = alone(base, run, given, data, collator())
        assert [loss for _, loss in result.curve] == pytest.approx(losses, rel=1e-2)
        assert [loss for _, loss in result.curve] != pytest.approx(losses, rel=1e-6)


def test_results_are_json_in_the_state(tmp_path):
    head = GPT2LMHeadModel
    given = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    Sweep(gpt2(), runs_of(head), given, examples(head), collator()).train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][0]["runs"]["thin"]["learning_rate"] == 1e-2
    assert (tmp_path / "checkpoint-4" / "training_args.bin").exists()  # as Trainer has it there


def test_a_head_that_is_not_tied_freezes_with_the_base(tmp_path):
    base: Any = gpt2(tie_word_embeddings=False)
    before = base.lm_head.weight.detach().clone()
    sweep = Sweep(base, sets_of(LM)[:2], arguments(tmp_path, max_steps=1), examples(LM), collator())
    assert all(result.stopped is None for result in sweep.train())
    assert torch.equal(base.lm_head.weight, before)


LM = GPT2LMHeadModel
FINE = Run("fine", lora(LM, 2, "c_attn"))


def wrapped() -> Any:
    return get_peft_model(gpt2(), lora(LM, 2, "c_attn"))


def hooked() -> Any:
    model = gpt2()
    model.register_forward_hook(lambda module, args, output: output)
    return model


def forwarded() -> Any:
    model: Any = gpt2()
    model.forward = model.forward
    return model


def judged() -> Any:
    model: Any = gpt2()
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    return model


def checkpointed() -> Any:
    model: Any = gpt2()
    model.transformer.gradient_checkpointing = True
    return model


@pytest.mark.parametrize(
    ("model", "runs", "more", "words"),
    [
        (gpt2, [], {}, "no runs"),
        (gpt2, [FINE, FINE], {}, "several runs are named fine"),
        (gpt2, [Run("lr0.1", FINE.config)], {}, "run name 'lr0.1': take letters"),
        (gpt2, [Run("default", FINE.config)], {}, "run name 'default'"),
        (gpt2, [Run("lora", FINE.config)], {}, "run lora: take a longer name"),
        (gpt2, [Run("mlp", FINE.config)], {}, "run name 'mlp': .* a part of the model's names"),
        (gpt2, [FINE, Run("p", PrefixTuningConfig(num_virtual_tokens=2))], {}, "run p: its config is a Prefix"),
        (gpt2, [Run("x", AdaLoraConfig(total_step=9, target_modules=["c_attn"]))], {}, "config is a AdaLora"),
        (gpt2, [FINE, Run("d", lora(LM, 2, "c_attn", use_dora=True))], {}, "run d: .* isn't plain LoRA"),
        (gpt2, [Run("b", lora(LM, 2, "c_attn", bias="all"))], {}, "run b: .* isn't plain LoRA"),
        (gpt2, [Run("e", lora(LM, 2, "c_attn", "wte"))], {}, "run e: .*wte.* isn't plain LoRA"),
        (gpt2, [Run("head", lora(LM, 2, "c_attn", modules_to_save=["lm_head"]))], {}, "run head: .*lm_head"),
        (gpt2, [FINE, Run("t", lora(LM, 2, "nowhere"))], {}, "run t: .*nowhere"),
        (gpt2, [Run("s", lora(LM, 2, "c_attn", init_lora_weights="pissa"))], {}, "run s: init_lora_weights='pissa'"),
        (gpt2, [FINE, Run("c", lora(GPT2ForSequenceClassification, 2, "c_attn"))], {}, "different task_types"),
        (wrapped, [FINE], {}, "got one with adapters"),
        (lambda: wrapped().base_model.model, [FINE], {}, "got one with adapters"),
        (lambda: GPT2Model(gpt2().config), [FINE], {}, "a plain GPT2LMHeadModel .* got GPT2Model"),
        (lambda: gpt2(GPT2ForTokenClassification), [FINE], {}, "got GPT2ForTokenClassification"),
        (lambda: fastpeft.patch(gpt2()), [FINE], {}, "patched already: fastpeft.unpatch"),
        (lambda: gpt2(GPT2ForSequenceClassification, pad_token_id=None), [FINE], {}, "pad_token_id is None"),
        (lambda: gpt2(GPT2ForSequenceClassification, num_labels=1), [FINE], {}, "one label a text"),
        (checkpointed, [FINE], {}, "gradient_checkpointing_disable"),
        (hooked, [FINE], {}, "the model has hooks or a forward of its own"),
        (forwarded, [FINE], {}, "the model has hooks or a forward of its own"),
        (judged, [FINE], {}, "a loss_function of its own"),
        (gpt2, ["fine"], {}, "runs must be of fastpeft.Run, got a str"),
        (gpt2, [Run("a", FINE.config)], {}, "run a: take a longer name: it is contained in 'lora_'"),
        (gpt2, [Run("no-bias", FINE.config)], {}, "run name 'no-bias': .* a bias or a norm's"),
        (gpt2, [Run("x_norm", AdapterConfig())], {}, "run name 'x_norm': .* a bias or a norm's"),
        (gpt2, [Run("n" * 101, FINE.config)], {}, "take one of at most 100 letters"),
        (gpt2, [FINE, Run("x", AdapterConfig())], {}, "some runs are of LoRA and some of bottleneck adapters"),
        (gpt2, [Run("x", AdapterConfig(layers=(2,)))], {}, "run x: no layer 2: the model has layers 0 to 1"),
        (lambda: fastpeft.add_adapters(gpt2(), AdapterConfig()), [FINE], {}, "got one with adapters"),
        (gpt2, [Run("checkpoint-4", FINE.config)], {}, "run name 'checkpoint-4': .* Trainer's checkpoints"),
        (gpt2, [FINE, Run("x", FINE.config, learning_rate=-1.0)], {}, "run x: learning_rate=-1.0: give a finite"),
        (gpt2, [FINE, Run("x", FINE.config, learning_rate=float("nan"))], {}, "run x: learning_rate=nan"),
        (gpt2, [FINE, Run("x", FINE.config, learning_rate="1")], {}, "run x: learning_rate='1'"),
        (gpt2, [FINE, Run("x", FINE.config, seed=2**32)], {}, "run x: seed=4294967296: give a whole number"),
        (gpt2, [FINE, Run("x", FINE.config, seed=-1)], {}, "run x: seed=-1"),
        (gpt2, [Run("x", FINE.config, seed=1)], {"seed": -1}, "^seed=-1: give a whole number"),
        (gpt2, [FINE, Run("x", FINE.config, 1e-9)], {"lr_scheduler_type": "polynomial"}, "run x: .*lr_end"),
        (gpt2, [FINE], {"label_smoothing_factor": 0.1}, "doesn't know TrainingArguments' label_smoothing_factor"),
        (gpt2, [FINE], {"eval_strategy": "steps"}, "TrainingArguments' eval_strategy"),
        (gpt2, [FINE], {"optim": "adafactor"}, "optim=.*adafactor.*: a sweep takes one of adamw_torch"),
    ],
)  # fmt: skip
def test_bad_input_changes_nothing(model, runs, more, words, tmp_path):
    m = model()
    before = [(name, type(module)) for name, module in m.named_modules()]
    trained = [p.requires_grad for p in m.parameters()]
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=words):
        Sweep(m, runs, arguments(tmp_path / "out", **more), examples(LM), collator())
    assert before == [(name, type(module)) for name, module in m.named_modules()]
    assert trained == [p.requires_grad for p in m.parameters()]
    assert torch.equal(state, torch.get_rng_state()) or model is not gpt2
    assert not (tmp_path / "out").exists()


def test_what_collate_fn_gives(tmp_path):
    data = examples(LM)
    for collate, words in (
        (lambda batch: {**collator()(batch), "position_ids": None}, "a sweep takes input_ids, labels and"),
        (lambda batch: collator()(batch[:1]), "collate_fn made 1 rows of 3 examples"),
    ):
        with pytest.raises(ValueError, match=words):
            Sweep(gpt2(), [FINE], arguments(tmp_path), data, collate).train()
    with pytest.raises(ValueError, match="dataset has no length"):
        Sweep(gpt2(), [FINE], arguments(tmp_path), iter(data))
    with pytest.raises(ValueError, match="dataset is empty"):
        Sweep(gpt2(), [FINE], arguments(tmp_path), [])
