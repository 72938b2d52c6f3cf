"""Host time is measured on kernels that are compiled and launched on nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import driver  # noqa: E402
import host  # noqa: E402

from fastpeft.kernels import launch  # noqa: E402

LAUNCHED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import driver, torch
from fastpeft.kernels import dropout, tile_table, tiling
x, seed = torch.ones(40, 48), torch.tensor([1])
with driver.nowhere(next(each for each in tile_table.ARCHITECTURES if each.name == 90)) as launches:
    found = []
    for rows in (40, 7, 1):
        dropout.dropped(x[:rows], 0.5, seed)
        found.append((launches.launched, launches.loaded))
    dropout.dropped(torch.ones(40 * 48 + 1)[1:].view(40, 48), 0.5, seed)
    found.append((launches.launched, launches.loaded))
print(json.dumps(found))
"""


def test_a_kernel_is_compiled_once_for_all_numbers_of_rows_and_launched_on_nothing(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", LAUNCHED, str(BENCH)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # The last is of a tensor that isn't 16 bytes aligned, for which another is compiled.
    assert json.loads(done.stdout) == [[1, 1], [2, 1], [3, 1], [4, 2]]


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
def test_interpreted_kernels_have_no_host_time_to_measure():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), driver.nowhere(host.H100):
        pass


def test_batches_are_padded_and_vary_in_their_number_of_tokens():
    counts = [int(batch["attention_mask"].sum()) for batch in host.batches_of(4, 12, True)]
    assert len(set(counts)) > 4
    assert max(counts) < 4 * 12
    assert len(host.batches_of(4, 12, False)) == 1


def test_views_and_allocations_are_no_operators():
    x = torch.ones(3, 4)
    with host.Operators() as operators:
        (x.view(4, 3).T + torch.empty(3, 4)).sum()
    assert operators.counts == {"aten.add": 1, "aten.sum": 1}


def test_samples_fall_into_the_parts_that_they_are_of():
    counts = Counter()

    def planning_what_runs():
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    source = "def why_not_this(run):\n    run()\n"
    ours = {}
    exec(compile(source, str(BENCH.parent / "fastpeft" / "some.py"), "exec"), ours)
    with host.sampled(counts):
        ours["why_not_this"](planning_what_runs)
    assert counts["planning"] > 20
    assert counts["planning"] > 0.9 * counts.total()
