"""A Triton driver for a GPU that isn't there: kernels are compiled for it, and launches do nothing.

What is left of a step's time is the host's. Tensors are the CPU's, and fastpeft is told that they are a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import checkout  # noqa: F401
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastpeft import graphs, routes
from fastpeft.kernels import launch, tile_table, tiling


class Launches:
    """How many kernels were launched, and how many were loaded, since."""

    def __init__(self) -> None:
        self.launched = self.loaded = 0

    def count(self, *arguments: Any) -> None:
        """Note a launch."""
        self.launched += 1


class NoDriver:
    """As much of a Triton driver as compiling and launching ask for."""

    def __init__(self, architecture: tile_table.Architecture, launches: Launches) -> None:
        self.architecture, self.launches = architecture, launches
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=self._properties)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a compiled kernel: nothing does."""
        return self.launches.count

    def _load(self, *kernel: Any) -> tuple[int, ...]:
        self.launches.loaded += 1
        return 1, 1, 64, 0, 1024  # module, function, registers, spills, threads

    def _properties(self, device: int) -> dict[str, int]:
        known = self.architecture
        return {"max_shared_mem": known.shared_limit, "multiprocessor_count": known.multiprocessors}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture.name, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def nowhere(architecture: tile_table.Architecture) -> Iterator[Launches]:
    """Within it the kernels are compiled for `architecture`, and launched on nothing; what was, is counted.

    Raises:
        RuntimeError: this process interprets Triton's kernels (TRITON_INTERPRET=1).
    """
    if launch.INTERPRETED:
        raise RuntimeError("host time is that of compiled kernels: unset TRITON_INTERPRET")
    launches = Launches()
    with ExitStack() as stack:
        before = driver._active
        driver.set_active(NoDriver(architecture, launches))
        stack.callback(setattr, driver, "_active", before)

        def capture(run: Callable[[], None], pool: Any, stream: Any) -> Callable[[], None]:
            run()
            return launches.count

        for where, name, value in (
            (graphs, "why_not_device", lambda device: None),
            (graphs, "capture", capture),
            (launch, "unsupported_device", lambda device: None),
            (launch, "_capability", lambda device: divmod(architecture.name, 10)),
            (tiling, "architecture", lambda device: architecture),
            (routes, "on_cpu", lambda tensor: False),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield launches
