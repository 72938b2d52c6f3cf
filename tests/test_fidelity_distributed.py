"""Beyond one process: two gloo processes have the gradients of one process on the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, build, loss_of, tokens

HERE = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("distributed")  # one launch of two processes serves all tests


def torchrun(*arguments: str) -> None:
    """Two processes of a script, started as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *arguments,
    ]
    result = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def gradients_of_two(tmp_path_factory):
    output = tmp_path_factory.mktemp("distributed") / "gradients.pt"
    torchrun("distributed_worker.py", str(output))
    return torch.load(output)


@pytest.mark.fidelity(
    "DDP with and without find_unused_parameters, FSDP2 over blocks; patched before or after", "fused"
)
@pytest.mark.fidelity(
    "LoRA layers or adapters that FSDP2 shards one by one",
    "fused if patched before; else stock, with the reason",
)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_gradients_equal_a_single_process_on_the_joined_batch(gradients_of_two, case):
    model = build(case[1]).train()  # stock, in one process
    loss_of(model, tokens()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = gradients_of_two[case]
    assert grads.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)
