"""How trained weights are put on their base model again: for the page, and as a README beside each run's weights."""

from __future__ import annotations

from typing import Any

from fastpeft.compare.methods import Method
from fastpeft.compare.placement import MODEL_CLASSES, loading
from fastpeft.compare.tasks import CLASSIFY, TASKS


def base_lines(plan: dict[str, Any], task: str) -> str:
    """Python that makes `model`, the base of a comparison with this plan, with a head for its task."""
    found = plan["model"]
    place = repr(found["folder"] or found["name"])
    base = "fastpeft.compare.base_model.location()" if found["pretrained_here"] else place
    head = ""
    if task == CLASSIFY:
        labels = dict(enumerate(plan["data"]["labels"]))
        numbers = {label: number for number, label in labels.items()}
        head = (
            f", id2label={labels}, label2id={numbers}, "
            f"pad_token_id={found['pad_token_id']}, ignore_mismatched_sizes=True"
        )
    return f"base = {base}\nmodel = transformers.{MODEL_CLASSES[task].__name__}.from_pretrained(\n    base{head}\n)"


def card(plan: dict[str, Any], method: Method, record: dict[str, Any]) -> str:
    """A README for the weights of a run, in the folder above them."""
    task = TASKS[plan["arguments"]["task"]]
    quality = "diverged" if record["diverged"] else task.show(record["quality"])
    modules = "fastpeft, fastpeft.compare.base_model, peft, safetensors.torch, transformers"
    return (
        f"# {method.name}, seed {record['seed']}\n\n"
        f"Trained: {method.place.trains}; {record['trainable_parameters']:,} parameters, "
        f"{record['steps']} steps on {plan['data']['name']}. "
        f"On {plan['data']['eval_rows']:,} held-out {task.scored}: {quality}.\n\n"
        "The weights go on the base model that they were trained on; in this folder:\n\n"
        f"```python\nimport {modules}\n\n{record['base']}\n"
        f"{loading(method, task.name, 'weights')}\n```\n\n"
        f"SHA-256 of the base weights: `{plan['model']['sha256']}`\n"
    )
