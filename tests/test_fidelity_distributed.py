"""Beyond one process: two gloo processes have the gradients of one on the joined batch, and write one report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, backward, build
from small_comparison import arguments, assert_one_report_of_two, options

HERE = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("distributed")  # one launch of two processes serves all tests


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Two processes, started as a user would: their gradients, what they compared, and what they said."""
    folder = tmp_path_factory.mktemp("distributed")
    asked = arguments(folder, methods=("lora",), seeds=1, max_steps=2)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "distributed_worker.py",
            folder / "gradients.pt",
            "compare",
            *options(asked),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "gradients.pt"), asked, done.stdout


@pytest.mark.fidelity("torchrun of fastpeft compare", "one report from all processes")
def test_two_processes_write_the_results_of_one(of_two):
    _, asked, said = of_two
    assert_one_report_of_two(asked, said)


@pytest.mark.fidelity(
    "DDP with and without find_unused_parameters, FSDP2 over blocks; patched before or after", "fused"
)
@pytest.mark.fidelity("graphs=True in DDP, with and without find_unused_parameters", "replayed")
@pytest.mark.fidelity(
    "LoRA layers or adapters that FSDP2 shards one by one",
    "fused if patched before; else stock, with the reason",
)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_gradients_equal_a_single_process_on_the_joined_batch(of_two, case):
    model = build(*case[:2]).train()  # stock, in one process
    backward(model, case[1])
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = of_two[0][case]
    assert grads.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)
