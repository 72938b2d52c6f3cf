"""TRL's trainers on a patched model give stock's losses, where trl is installed: `pip install trl`."""

import copy

import pytest
import torch
from models import gpt2, with_lora

import fastpeft

pytest.importorskip("trl", reason="trl isn't installed")
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

ARGUMENTS = {
    "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "report_to": [],
    "use_cpu": True, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, "dataloader_num_workers": 0,
}  # fmt: skip
LENGTHS = (9, 4, 12, 7, 5, 11, 3, 8)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[EOS]": 1} | {f"w{i}": i for i in range(2, 61)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w2"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", eos_token="[EOS]")


def text(i, length):
    return " ".join(f"w{2 + (7 * i + 5 * j) % 59}" for j in range(length))


def losses(trainer):
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def packing_calls(model):
    return next(row.calls for row in fastpeft.report(model) if row.kind == "packing")


@pytest.mark.fidelity(
    "TRL's SFTTrainer: nll, dft, packing, padding-free, completions",
    "fused, packed where nobody reads the padding",
)
@pytest.mark.filterwarnings("ignore")  # trl's own
@pytest.mark.parametrize(("options", "scope", "packs"), [
    ({"loss_type": "nll"}, "auto", False),
    ({"loss_type": "dft"}, "auto", False),
    ({"loss_type": "nll"}, "model", True),
    ({"packing": True, "packing_strategy": "bfd", "max_length": 16}, "auto", True),
    ({"padding_free": True, "max_length": None}, "auto", True),
    ({"completion_only_loss": True}, "model", True),
], ids=["nll", "dft", "padded, packed", "packing", "padding-free", "completions"])  # fmt: skip
def test_sft(options, scope, packs, tmp_path):
    if options.get("completion_only_loss"):
        rows = [{"prompt": text(i, 4), "completion": " " + text(i + 9, n)} for i, n in enumerate(LENGTHS)]
    else:
        rows = [{"text": text(i, n)} for i, n in enumerate(LENGTHS)]
    stock = with_lora(gpt2())
    found = []
    for model in (stock, fastpeft.patch(copy.deepcopy(stock), scope=scope)):
        arguments = SFTConfig(tmp_path, **{**ARGUMENTS, **options})
        trainer = SFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
        found.append(losses(trainer))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert (packing_calls(model) > 0) == packs


@pytest.mark.fidelity("TRL's DPOTrainer", "fused")
@pytest.mark.filterwarnings("ignore")
def test_dpo(tmp_path):
    rows = [
        {"prompt": text(i, 4), "chosen": " " + text(i + 9, n), "rejected": " " + text(i + 20, n)}
        for i, n in enumerate(LENGTHS)
    ]
    stock = with_lora(gpt2())
    found = []
    for model in (stock, fastpeft.patch(copy.deepcopy(stock))):
        arguments = DPOConfig(tmp_path, **ARGUMENTS)
        trainer = DPOTrainer(
            model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
        found.append(losses(trainer))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
