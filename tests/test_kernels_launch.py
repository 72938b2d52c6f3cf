"""Which calls the kernels serve, and what happens where one can't be built."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import lora_arguments
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import fastpeft
from fastpeft import ops
from fastpeft.kernels import launch, lora_chain, tile_table, tiling
from fastpeft.kernels.gradients import Gradients
from fastpeft.kernels.low_rank import Updated
from fastpeft.kernels.shrink import Shrink
from fastpeft.projections import Projection
from fastpeft.routes import Options, Route


class FakeKernel:
    """A kernel whose build raises what it is given."""

    def __init__(self, error):
        self.error = error
        self.__name__ = "fake_kernel"
        self.builds = 0

    def warmup(self, **arguments):
        self.builds += 1
        if self.error:
            raise self.error
        return self

    def __getitem__(self, grid):
        return None


@pytest.fixture
def build(monkeypatch):
    """`launch.build` as a GPU host has it, for one launch of a fake kernel."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_failures", {})

    def call(kernel, key="key"):
        return launch.build(key, torch.empty(1), lambda: launch.launch(kernel, (1,), {}, 4, 2))

    return call


BUILD_FAILURES = [
    CompilationError("", None, "no such layout"),
    OutOfResources(300_000, 232_448, "shared memory"),
    RuntimeError("PassManager::run failed"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
]


@pytest.mark.parametrize("error", BUILD_FAILURES, ids=lambda e: type(e).__name__)
def test_a_failed_build_warns_once_and_is_remembered(build, error):
    kernel = FakeKernel(error)
    with pytest.warns(UserWarning, match="uses PyTorch instead of Triton: fake_kernel can't be built here"):
        reason = build(kernel)
    assert type(error).__name__ in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(kernel) == reason
    assert kernel.builds == 1


def test_another_cuda_error_is_raised_as_it_is_each_time(build):
    kernel = FakeKernel(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            build(kernel)
    assert kernel.builds == 2


def test_a_kernel_is_built_once_for_each_key(build):
    kernel = FakeKernel(None)
    assert build(kernel) is None
    assert build(kernel) is None
    assert build(kernel, "another") is None
    assert kernel.builds == 2


BUILDS = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import driver, fastpeft, host, torch, triton
import triton.language as tl
from fastpeft.kernels import dropout, launch

@triton.jit
def broken_kernel(x_ptr, N: tl.constexpr):
    tl.static_assert(N == 1, "no such N")
    tl.store(x_ptr, 0.0)

def run(n):
    dropout.dropped(x, 0.5, seed)
    launch.launch(broken_kernel, (1, 1, 1), {"x_ptr": x, "N": n}, 4, 1)

x, seed = torch.ones(40, 48), torch.tensor([1])
with driver.nowhere(host.H100) as launches, warnings.catch_warnings(record=True):
    print(launch.build("bad", x, lambda: run(2)))
    print(launch.build("bad", x, lambda: run(2)))
    print(launch.build("good", x, lambda: run(1)), launches.launched)
layer = torch.ones(2, 4), torch.ones(4, 5), None, torch.ones(3, 4), torch.ones(5, 3), 1.0
print(fastpeft.lora_linear(*layer).shape)
try:
    fastpeft.lora_linear(*layer, backend="triton")
except ValueError as error:
    print(error)
"""


@functools.cache
def built_without_the_interpreter() -> list[str]:
    """What `BUILDS` prints: how three builds ended, and what a CPU's call is without them and with."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "builds.py"  # Triton reads a kernel's source from its file
        script.write_text(BUILDS)
        command = [sys.executable, str(script), str(Path(__file__).parent.parent / "bench")]
        environment |= {"TRITON_CACHE_DIR": folder, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.xdist_group("builds")  # one process serves both tests
def test_of_several_kernels_built_side_by_side_the_one_that_fails_is_named_at_every_look():
    first, again, good, *_ = built_without_the_interpreter()
    assert first.startswith("broken_kernel can't be built here: Compil")
    assert again == first
    assert good == "None 0"


@pytest.mark.xdist_group("builds")
def test_without_the_interpreter_a_cpu_model_refuses_triton_and_auto_takes_pytorch():
    shape, refusal = built_without_the_interpreter()[3:]
    assert shape == "torch.Size([2, 5])"
    assert "TRITON_INTERPRET=1" in refusal


def call(backend, *, strict=False, dropout_p=0.5):
    x, weight, bias, a, b = lora_arguments(9, 24, 16, 3, "fp32", "cpu").values()
    torch.manual_seed(5)
    y, route = ops.routed_lora_linear(
        x, Projection(weight, bias, a, b, 1.0, dropout_p), Options(backend, strict=strict)
    )
    return y, route, torch.get_rng_state()


def test_a_failed_build_falls_back_before_a_seed_is_drawn_and_strict_raises(monkeypatch):
    monkeypatch.setattr(lora_chain, "ready", lambda *a: "linear_kernel can't be built here: too large")
    y, route, state = call("triton")
    expected, _, expected_state = call("torch")
    assert route == Route("torch", "linear_kernel can't be built here: too large")
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
    with pytest.raises(RuntimeError, match="can't be built here"):
        call("triton", strict=True)


@pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter")
def test_the_generator_decides_the_mask():
    y, route, _ = call("triton")
    again, _, _ = call("triton")
    assert route.path == "triton"
    assert torch.equal(y, again)
    x, weight, bias, a, b = lora_arguments(9, 24, 16, 3, "fp32", "cpu").values()
    other = fastpeft.lora_linear(x, weight, bias, a, b, 1.0, 0.5, "triton")
    assert not torch.equal(y, other)


@pytest.mark.parametrize(
    ("dtypes", "rank", "reason"),
    [
        ((torch.float64, torch.float64), 3, "no kernel for torch.float64"),
        ((torch.float32, torch.float64), 3, "no kernel for torch.float64"),
        ((torch.float32, torch.float32), 257, "rank 257 is above 256"),
    ],
)
def test_what_no_kernel_serves_is_named(dtypes, rank, reason):
    x, factor = torch.empty(2, 300, dtype=dtypes[0]), torch.empty(rank, 300, dtype=dtypes[1])
    assert reason in launch.unsupported(x, rank, factor)
    x, factor = torch.zeros(2, 4, dtype=dtypes[0]), torch.zeros(rank, 4, dtype=dtypes[1])
    weight = torch.zeros(4, 5, dtype=dtypes[0])
    with pytest.raises(ValueError, match=f"backend='triton' can't serve this: .*{reason}"):
        ops.lora_linear(x, weight, None, factor, factor.new_zeros(5, rank), 1.0, backend="triton")


def test_devices_without_triton_are_named(monkeypatch):
    assert "NVIDIA" in launch.unsupported_device(torch.device("meta"))
    monkeypatch.setattr(launch, "_capability", lambda device: (7, 5))
    assert "8.0, and this GPU has 7.5" in launch.unsupported_device(torch.device("cuda"))
    monkeypatch.setattr(launch, "_capability", lambda device: (8, 6))
    assert launch.unsupported_device(torch.device("cuda")) is None
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in launch.unsupported_device(torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "tf32", "served"),
    [(torch.float32, False, False), (torch.float32, True, True), (torch.bfloat16, False, True)],
)
def test_float32_on_a_gpu_is_cublas_own_but_as_tf32(dtype, tf32, served, monkeypatch):
    monkeypatch.setattr(launch, "tf32_allowed", lambda: tf32)
    reason = launch.better_by_cublas(SimpleNamespace(is_cuda=True, dtype=dtype))
    assert reason is None if served else reason.startswith("float32 without TF32")
    assert launch.better_by_cublas(torch.ones(2, 2, dtype=dtype)) is None


class TestTheChoiceOfATile:
    """On the H100's figures: 132 multiprocessors, tensor descriptors."""

    @pytest.fixture(autouse=True)
    def h100(self, monkeypatch):
        architecture = next(a for a in tile_table.ARCHITECTURES if a.name == 90)
        monkeypatch.setattr(tiling, "architecture", lambda device: architecture)

    def linear(self, m, k, n, rank=16, beforehand=False, outer=False, epilogue=False, dtype=torch.bfloat16):
        return self.linear_ways(m, k, n, rank, beforehand, outer, epilogue, dtype)[0]

    def linear_ways(
        self, m, k, n, rank=16, beforehand=False, outer=False, epilogue=False, dtype=torch.bfloat16
    ):
        x, weight = (torch.empty(shape, dtype=dtype) for shape in ((m, k), (k, n)))
        return tiling.linear(x, weight, rank, beforehand, outer, epilogue)

    def test_many_rows_take_a_large_tile_and_few_a_small_one(self):
        assert self.linear(8192, 768, 2304, beforehand=True).tile[:2] == (128, 256)
        assert self.linear(64, 768, 768, beforehand=True, outer=True).tile[:2] == (64, 64)

    def test_a_small_rank_is_computed_on_the_way_and_a_large_one_or_a_dropped_one_before(self, monkeypatch):
        assert not any(how.single for how in self.linear_ways(512, 768, 2304))  # not where descriptors are
        a100 = next(a for a in tile_table.ARCHITECTURES if a.name == 80)
        monkeypatch.setattr(tiling, "architecture", lambda device: a100)
        assert not self.linear(8192, 768, 2304, rank=16).single  # products are dear beside a read
        assert self.linear(512, 768, 2304, rank=16).single  # and cheap beside a launch
        assert not self.linear(512, 768, 2304, rank=128).single
        assert not self.linear(512, 768, 2304, rank=16, beforehand=True).single

    @pytest.mark.parametrize("given", [False, True])
    def test_what_is_given_is_not_computed_again(self, given, monkeypatch):
        a100 = next(a for a in tile_table.ARCHITECTURES if a.name == 80)
        monkeypatch.setattr(tiling, "architecture", lambda device: a100)
        shapes = (512, 768), (768, 2304), (16, 768), (16, 2304)
        x, weight, a, f = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
        u = x.new_empty(512, 16) if given else None
        with launch.record() as launches:
            Updated(x, weight, None, a, f, given=given)(x, weight, None, a, f, 1.0, u=u)
        (only,) = launches
        assert (only.args["u_ptr"] is u, only.args["a_ptr"] is None) == (given, given)

    def test_what_a_descriptor_cant_describe_goes_by_pointers(self):
        assert self.linear(8192, 768, 768, beforehand=True).descriptor
        assert not self.linear(8192, 100, 768).descriptor
        assert not self.linear(8192, 768, 36).descriptor
        x, weight = (
            torch.empty(64, 769, dtype=torch.float16)[:, 1:],
            torch.empty(768, 768, dtype=torch.float16),
        )
        assert not tiling.linear(x, weight, 16, True, False, False)[0].descriptor
        assert tiling.linear(weight, weight.T, 16, True, False, False)[0].descriptor

    def test_every_multiprocessor_gets_a_program_of_the_rank_r_passes(self):
        dy, x = (torch.empty(8192, c, dtype=torch.bfloat16, device="meta") for c in (2304, 768))
        d_b, d_a, u = (dy.new_empty(shape) for shape in ((2304, 16), (16, 768), (8192, 16)))
        tickets = dy.new_empty(64, dtype=torch.int32)
        with launch.record() as launches:
            Shrink(x, d_a.T)(x, d_a.T)
            kernel = Gradients(dy, x, 16, d_b.dtype, d_a.dtype)
            kernel(dy, u, x, u, d_b, d_a, 1.0, tickets)
        programs = {each.kernel.__name__: math.prod(each.grid) for each in launches}
        assert len(programs) == 2
        assert all(100 <= count <= 264 for count in programs.values()), programs


def test_what_is_recorded_runs_backward_in_the_calling_thread():
    """A device's backward has a thread of its own otherwise, and that one launches for real."""
    with launch.record():
        assert not torch._C._is_multithreading_enabled()
    assert torch._C._is_multithreading_enabled()
