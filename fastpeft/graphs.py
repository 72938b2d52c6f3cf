"""The blocks of a packed GPT-2 as CUDA graphs: captured once for each size, then a launch each way instead of hundreds.

Token counts and longest sequences are rounded up to few sizes, so that what varies from batch to batch is data and not
shape. A graph repeats what was decided when it was captured: it serves a call only while every attribute of every
module below, every parameter's place and torch's switches are what they were. Dropout is drawn anew. Saved activations
are a graph's own: until its backward pass has run, or nobody can ask for it any more, other calls run uncaptured, as do
those that are looked at from within.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastpeft import routes
from fastpeft.kernels.rows import rounded

MOST = 64  # graphs of a model. None is given up for another: cuBLAS's memory goes with the first of a stream that goes
WARM_UP = 2  # runs before a capture, which wants everything compiled and chosen
_NESTED = (dict, list, set)
#: Of a module's attributes, those whose tensors are what a graph computes with.
_TENSORS = {"_parameters", "_buffers"}
_SIMPLE = (bool, int, float, str)


def capture(run: Callable[[], None], pool: Any, stream: Any) -> Callable[[], None]:
    """What repeats the launches of `run`, captured here on a stream, with memory of `pool`."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, of a data loader or a process group, may go on allocating.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay


def why_not_device(device: torch.device) -> str | None:
    """Why nothing can be captured on `device` now; None where it can."""
    if device.type != "cuda":
        return f"no CUDA graphs on {device.type}"
    return "captured already, by somebody else" if torch.cuda.is_current_stream_capturing() else None


def _why_not_here() -> str | None:
    """What looks at a computation from within, where a replay shows nothing; None where nothing does."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors, of a checkpoint or an offload"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode looks on"
    return "anomaly detection" if torch.is_anomaly_enabled() else None


class Graphs:
    """The graphs of one GPT-2."""

    def __init__(self) -> None:
        #: By size and state; None for what came once: a size that doesn't come again is worth no capture.
        self._held: dict[Hashable, _Captured | None] = {}
        self._states: list[_State] = []
        self._most = MOST
        self._pool: Any = None
        self._stream: Any = None  # of all captures: what cuBLAS keeps for a stream is kept once
        self._used: Any = None  # the stream of the last call
        self._lock = threading.Lock()
        #: The autograd node whose backward pass reads a graph's activations.
        self._pending: Callable[[], Any] = _nothing
        #: Why the last call wasn't replayed; None where it was.
        self.why_not: str | None = None

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()

    def __reduce__(self) -> Any:
        return Graphs, ()

    def __len__(self) -> int:
        return sum(captured is not None for captured in self._held.values())

    def refused(self, transformer: Any, trained: Iterable[Any], caches: bool, grouped: bool) -> bool:
        """Whether a packed call of this GPT-2, of which these parameters train, runs uncaptured, as `why_not` says."""
        self.why_not = why_not_device(transformer.wte.weight.device) or _why_not_here()
        if self.why_not is not None:
            return True
        for reason, holds in (
            ("eager attention", transformer.config._attn_implementation == "eager"),
            ("gradient checkpointing", transformer.gradient_checkpointing and transformer.training),
            ("rows use different adapters", grouped),
            ("a cache is made: use_cache=False, in the call or the config", caches),
            (
                "a replica of DataParallel, whose weights are others at each call",
                hasattr(transformer, "_is_replica"),
            ),
            ("weights that are computed", not all(t is None or t.is_leaf for t in trained)),
        ):
            if holds:
                self.why_not = reason
                return True
        return False

    def through(self, blocks: Any, modules: Sequence[Any], hidden: Tensor, packed: Any) -> Tensor:
        """What comes out of the blocks for hidden (1, T, width), or the grid; replayed where `why_not` is None."""
        if not self._lock.acquire(blocking=False):
            self.why_not = "another thread is at it"
            return _through(blocks, hidden, packed._replace(graph=None))
        try:
            with torch.cuda.device_of(hidden):  # it is launched on the current one
                found = self._found(blocks, modules, hidden, packed)
                if isinstance(found, str):
                    self.why_not = found
                    return _through(blocks, hidden, packed._replace(graph=None))
                self.why_not = None
                return self._replayed(found, hidden, packed)
        finally:
            self._lock.release()

    def _found(self, blocks: Any, modules: Sequence[Any], hidden: Tensor, packed: Any) -> _Captured | str:
        """The graph of such a call, captured now if it wasn't, or why there is none."""
        if self._pending() is not None:
            return "the backward pass of an earlier call is still to come"
        state = self._state(modules)
        if state is None:
            return "its modules change from call to call"
        reason = self._states[state].reason
        if reason:
            return reason
        grads = torch.is_grad_enabled()
        key = (
            _rows(hidden, packed), hidden.shape[0], packed.view, packed.whole, packed.pooled is None, hidden.dtype,
            hidden.device, grads, grads and hidden.requires_grad, state, *_switches(hidden.device),
        )  # fmt: skip
        if key not in self._held:
            if len(self._held) < 8 * MOST:
                self._held[key] = None
            return "a batch of its size comes for the first time"
        if self._held[key] is None and len(self) < self._most:
            if hidden.is_cuda and self._stream is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            try:
                self._held[key] = _Captured(blocks, modules, hidden, packed, self._pool, self._stream)
            except torch.OutOfMemoryError:
                self._most = len(self)
        return self._held[key] or f"{len(self)} sizes are captured, and no more fit"

    def _replayed(self, captured: _Captured, hidden: Tensor, packed: Any) -> Tensor:
        if hidden.is_cuda and self._used != (stream := torch.cuda.current_stream()):
            if self._used is not None:
                stream.wait_stream(self._used)  # which may still read what is written now
            self._used = stream
        captured.load(hidden, packed)
        if captured.wanted:
            return _Replay.apply(self, captured, hidden, *captured.trained)
        return captured.forward(hidden.shape[1]).clone()

    def _state(self, modules: Sequence[Any]) -> int | None:
        """The number of the state that the modules are in; None for one too many."""
        atoms = _atoms(modules)
        tensors = _tensors(modules)
        for i, state in enumerate(self._states):
            if state.is_of(atoms, tensors):
                return i
        if len(self._states) == MOST:
            return None
        self._states.append(_State(modules, atoms, tensors))
        return len(self._states) - 1


def _nothing() -> None:
    return None


def _through(blocks: Any, x: Tensor, packed: Any) -> Tensor:
    for block in blocks:
        x = block(x, packed=packed)
    return x


def _rows(hidden: Tensor, packed: Any) -> int:
    """How many rows are computed for hidden (1, T, width); of a whole grid, its length."""
    return rounded(hidden.shape[1]) if packed.spare else hidden.shape[1]


def _switches(device: torch.device) -> tuple[Hashable, ...]:
    """What torch's global switches change of what is launched."""
    kind, cuda = device.type, torch.backends.cuda
    return (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.fp32_precision, cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_fp16_accumulation,
        cuda.preferred_blas_library(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(), *torch._C._get_sdp_priority_order(),
    )  # fmt: skip


def _atoms(modules: Sequence[Any]) -> list[Any]:
    """Every attribute of the modules with its name, and what those that are containers hold."""
    held: list[dict[str, Any]] = [vars(m) for m in modules]
    values = list(chain.from_iterable(map(dict.values, held)))
    inner = chain.from_iterable(
        (*v, *v.values()) if type(v) is dict else v for v in values if type(v) in _NESTED
    )
    return [*modules, *chain.from_iterable(held), *values, *inner]


def _tensors(modules: Sequence[Any]) -> list[Hashable]:
    """Where every parameter and buffer lies and how, and whether it trains."""
    return [
        (t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad)
        for m in modules
        for held in (m._parameters, m._buffers)
        for t in held.values()
        if t is not None
    ]


class _State:
    """What the modules of a trunk hold."""

    def __init__(self, modules: Sequence[Any], atoms: list[Any], tensors: list[Hashable]) -> None:
        self._atoms, self._all_tensors = atoms, tensors
        #: Why no graph can be of it; None where one can.
        self.reason: str | None = None
        for module in modules:
            for name, value in vars(module).items():
                inner = value.values() if type(value) is dict else value if type(value) in _NESTED else ()
                if name not in _TENSORS and any(isinstance(each, Tensor) for each in (value, *inner)):
                    self.reason = f"{name} of a {type(module).__name__} is a tensor, or holds one"

    def is_of(self, atoms: list[Any], tensors: list[Hashable]) -> bool:
        """Whether these are the same objects, or numbers and strings that are equal, and tensors in their places."""
        if len(atoms) != len(self._atoms) or tensors != self._all_tensors:
            return False
        return all(map(is_, atoms, self._atoms)) or all(
            a is b or (type(a) is type(b) and type(a) in _SIMPLE and a == b)
            for a, b in zip(atoms, self._atoms, strict=True)
        )


class _Captured:
    """The blocks on rows of one size, forward and, where something trains, backward.

    Rows beyond those of a call are zero, stand in no sequence, and get no gradient.
    """

    def __init__(
        self, blocks: Any, modules: Sequence[Any], hidden: Tensor, packed: Any, pool: Any, stream: Any
    ) -> None:
        grads, rows = torch.is_grad_enabled(), _rows(hidden, packed)
        below = [m for block in blocks for m in block.modules()]
        places = [(m._parameters, name) for m in below for name, p in m._parameters.items() if p is not None]
        self.weights = [held[name] for held, name in places if held[name].dim() > 1]
        self._places = [(held, name) for held, name in places if grads and held[name].requires_grad]
        self.trained = [held[name] for held, name in self._places]
        # Others of the same memory: the hooks of the caller and of DDP know nothing of what is captured.
        self._leaves = [torch.nn.Parameter(p.detach()) for p in self.trained]
        self._blocks = blocks
        self._hidden = hidden.detach().new_zeros(hidden.shape[0], rows, hidden.shape[2])
        self._hidden.requires_grad_(grads and hidden.requires_grad)
        self._out: Any = None  # made by the first run, as is what goes back
        self._dy: Any = None
        slots = packed.slots.new_empty(hidden.shape[0] * rows)
        pooled = None if packed.pooled is None else torch.empty_like(packed.pooled)
        self._packed = packed._replace(slots=slots, pooled=pooled, graph=None)
        #: What a gradient is asked for, and what got one: of the leaves first, of the rows last.
        self.wanted = [*self._leaves, *([self._hidden] if self._hidden.requires_grad else [])]
        self._live: Tensor | None = None  # what came out, as backward knows it
        self._shapes: dict[torch.dtype, list[Tensor]] | None = None
        self._flat: dict[torch.dtype, Tensor] = {}
        self._d_hidden: Tensor | None = None
        self.load(hidden, packed)

        sites = [m._fastpeft for m in below if "_fastpeft" in vars(m)]
        before = [(site.last, site.calls) for site in sites]
        try:
            with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []), _uncached_autocast():
                with _on(stream):
                    for _ in range(WARM_UP):
                        self._run_forward()
                        if not self._wants():
                            self.wanted = []
                        self._run_backward()
                    self._live = None  # and its memory, before more is taken
                counts = [site.calls for site in sites]
                self._forward = capture(self._run_forward, pool, stream)
                if self.wanted:
                    self._backward = capture(self._run_backward, pool, stream)
            self._live = None  # what backward reads stays the pool's
            #: What a run notes, for each replay to note it.
            self._notes = [
                (site, site.last, site.calls - count) for site, count in zip(sites, counts, strict=True)
            ]
        finally:
            for site, (last, calls) in zip(sites, before, strict=True):
                site.last, site.calls = last, calls

    def _wants(self) -> bool:
        return self._live is not None and self._live.requires_grad

    def _run_forward(self) -> None:
        parameters = [held[name] for held, name in self._places]
        try:
            for (held, name), leaf in zip(self._places, self._leaves, strict=True):
                held[name] = leaf
            with torch.set_grad_enabled(bool(self.wanted)):
                self._live = _through(self._blocks, self._hidden, self._packed)
        finally:
            for (held, name), parameter in zip(self._places, parameters, strict=True):
                held[name] = parameter
        with torch.no_grad():
            if self._out is None:
                self._out, self._dy = torch.empty_like(self._live), torch.zeros_like(self._live)
            self._out.copy_(self._live)

    def _run_backward(self) -> None:
        if not self.wanted:
            return
        assert self._live is not None
        # Kept, or the memory of what is read would be written to: a caller may ask for the same gradients again.
        found = torch.autograd.grad(self._live, self.wanted, self._dy, retain_graph=True, allow_unused=True)
        if self._shapes is None:  # the first run says what gets any
            self._learn(found)
            found = tuple(g for g in found if g is not None)
        if self._d_hidden is not None:
            self._d_hidden.copy_(found[-1])
        # One tensor a dtype: what leaves is a copy, since autograd may add to it, or keep it.
        for dtype, flat in self._flat.items():
            torch.cat([g.flatten() for g in found[: len(self.trained)] if g.dtype == dtype], out=flat)

    def _learn(self, found: tuple[Tensor | None, ...]) -> None:
        """Leave out what gets no gradient, and make room for those that do."""
        if self._hidden.requires_grad and found[-1] is not None:
            self._d_hidden = torch.empty_like(self._hidden)
        reached = [i for i, _ in enumerate(self.trained) if found[i] is not None]
        self.trained = [self.trained[i] for i in reached]
        self.wanted = [t for t, g in zip(self.wanted, found, strict=True) if g is not None]
        dtypes = dict.fromkeys(p.dtype for p in self.trained)
        self._shapes = {
            d: [torch.empty(p.shape, device="meta") for p in self.trained if p.dtype == d] for d in dtypes
        }
        self._flat = {
            d: self._hidden.new_empty(sum(t.numel() for t in shapes), dtype=d)
            for d, shapes in self._shapes.items()
        }

    @torch.no_grad()
    def load(self, hidden: Tensor, packed: Any) -> None:
        """Take what a call comes with."""
        _fill(self._hidden, hidden)
        slots, count = self._packed.slots, len(packed.slots)
        slots[:count].copy_(packed.slots)
        batch, longest = packed.view
        slots[count:].fill_(batch * longest)
        if packed.pooled is not None:
            self._packed.pooled.copy_(packed.pooled)

    def forward(self, rows: int) -> Tensor:
        """What comes out, (1, rows, width), or of the whole grid: until the next call."""
        noted = [(site, last, site.calls + calls) for site, last, calls in self._notes]
        self._forward()
        for site, last, calls in noted:
            site.last, site.calls = last, calls
        return self._out[:, :rows]

    def backward(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients to hidden, None where there is none, and to what trains, in tensors of their own."""
        _fill(self._dy, dy)
        self._backward()
        d_hidden = None if self._d_hidden is None else self._d_hidden[:, : dy.shape[1]].clone()
        pieces = {
            dtype: iter(torch._utils._unflatten_dense_tensors(self._flat[dtype].clone(), shapes))
            for dtype, shapes in (self._shapes or {}).items()
        }
        # `.data`: who writes to one hasn't written to the others.
        return d_hidden, *(next(pieces[p.dtype]).data for p in self.trained)


def _fill(static: Tensor, given: Tensor) -> None:
    rows = given.shape[1]
    static[:, :rows].copy_(given)
    if rows < static.shape[1]:
        static[:, rows:].zero_()


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Within it autocast casts weights anew each time: a graph must see what they have become."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    """Within it work goes to this stream, after what was asked for before and ahead of what comes; None is here."""
    if stream is None:
        yield
        return
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        here.wait_stream(stream)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, graphs: Graphs, captured: _Captured, hidden: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.graphs, ctx.captured = graphs, captured
        ctx.save_for_backward(
            *captured.weights
        )  # for torch to see who changes one before backward, or asks twice
        graphs._pending = weakref.ref(ctx)
        return captured.forward(hidden.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _ = ctx.saved_tensors
        if torch.is_grad_enabled() or routes.transformed() or torch._C._functorch.is_legacy_batchedtensor(dy):
            raise RuntimeError(
                "graphs are differentiable once, one gradient at a time: fastpeft.patch(model) without"
            )
        with torch.cuda.device_of(dy):
            found = ctx.captured.backward(dy)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.graphs._pending = _nothing
        return None, None, *found
