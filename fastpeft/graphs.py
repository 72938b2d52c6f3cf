"""The blocks of a packed GPT-2 as CUDA graphs: captured once for each size, then a launch each way instead of hundreds.

Token counts and longest sequences are rounded up to few sizes, so that what varies from batch to batch is data and not
shape. A graph repeats what was decided when it was captured: it serves a call only while every attribute of every
module below, every parameter's place and what autocast and torch's switches say are what they were. It draws its
dropout anew, from torch's generator. Saved activations are a graph's own: until its backward pass has run, or nobody
can ask for it any more, other calls run uncaptured.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor

MOST = 32  # graphs that a model keeps: the one used longest ago goes
WARM_UP = 2  # runs before a capture, which wants everything compiled and chosen
_NESTED = (dict, list, set)
#: Of a module's attributes, those that the trunk compares, or that are compared by what they hold.
_APART = {"_parameters", "_buffers", "_modules"}


def rounded(size: int, steps: int = 8) -> int:
    """`size` rounded up to so many steps an octave, and to a multiple of 32 at least."""
    step = max(32, 1 << (max(size, 1) - 1).bit_length() >> steps.bit_length())
    return -(-size // step) * step


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


class Graphs:
    """The graphs of one GPT-2."""

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._states: list[_State] = []
        self._pool: Any = None
        #: The autograd node whose backward pass reads a graph's activations.
        self._pending: Callable[[], Any] = _nothing

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()

    def __reduce__(self) -> Any:
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._held)

    def why_not(self, transformer: Any, caches: bool) -> str | None:
        """Why a packed call of this GPT-2 isn't replayed; None where it is."""
        reason = why_not_device(transformer.wte.weight.device)
        if reason:
            return reason
        if getattr(transformer, "_is_replica", False):
            return "a replica of DataParallel, whose weights are others at each call"
        if transformer.config._attn_implementation == "eager":
            return "eager attention"
        if transformer.gradient_checkpointing and transformer.training:
            return "gradient checkpointing"
        if caches:
            return "a cache is made: use_cache=False, in the call or the config"
        if self._pending() is not None:
            return "the backward pass of an earlier call is still to come"
        return None

    def replayed(self, blocks: Any, modules: Sequence[Any], hidden: Tensor, packed: Any) -> Tensor:
        """What comes out of the blocks for hidden (1, T, width), or the whole grid; captured at the first call."""
        with torch.cuda.device_of(hidden):  # it is launched on the current one
            return self._replayed(blocks, modules, hidden, packed)

    def _replayed(self, blocks: Any, modules: Sequence[Any], hidden: Tensor, packed: Any) -> Tensor:
        grads = torch.is_grad_enabled()
        key = (
            _rows(hidden, packed), hidden.shape[0], packed.view, packed.whole, packed.pooled is None, hidden.dtype,
            hidden.device, grads, grads and hidden.requires_grad, self._state(modules), *_switches(hidden.device),
        )  # fmt: skip
        captured = self._held.get(key)
        if captured is None:
            if self._pool is None and hidden.is_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            captured = self._held[key] = _Captured(blocks, modules, hidden, packed, self._pool)
            if len(self._held) > MOST:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        captured.load(hidden, packed)
        if not captured.wanted:
            return captured.forward(hidden.shape[1])
        return _Replay.apply(self, captured, hidden, *captured.trained)

    def _state(self, modules: Sequence[Any]) -> int:
        """The number of the state that the modules are in."""
        for i, state in enumerate(self._states):
            if state.holds(modules):
                return i
        if len(self._states) == MOST:  # most of their graphs will never be asked for again
            self._states.clear()
            self._held.clear()
        self._states.append(_State(modules))
        return len(self._states) - 1


def _nothing() -> None:
    return None


def _rows(hidden: Tensor, packed: Any) -> int:
    """How many rows are computed for hidden (1, T, width); of a whole grid, its length."""
    return rounded(hidden.shape[1]) if packed.spare else hidden.shape[1]


def _switches(device: torch.device) -> tuple[Hashable, ...]:
    """What torch's global switches change of what is launched."""
    kind, cuda = device.type, torch.backends.cuda
    return (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.fp32_precision, cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
    )  # fmt: skip


class _State:
    """What the modules of a trunk hold."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = list(modules)
        self._attributes = [
            {k: v.copy() if type(v) in _NESTED and k not in _APART else v for k, v in vars(m).items()}
            for m in modules
        ]
        self._tensors = _tensors(modules)

    def holds(self, modules: Sequence[Any]) -> bool:
        """Whether they are the same, with equal attributes, and tensors in the same places."""
        return (
            len(modules) == len(self._modules)
            and all(map(is_, modules, self._modules))
            and self._attributes == list(map(vars, modules))
            and self._tensors == _tensors(modules)
        )


def _tensors(modules: Sequence[Any]) -> list[Hashable]:
    """Where every parameter and buffer lies, and whether it trains."""
    return [
        (t.data_ptr(), t.dtype, t.requires_grad)
        for m in modules
        for held in (m._parameters, m._buffers)
        for t in held.values()
        if t is not None
    ]


class _Captured:
    """The blocks on rows of one size, forward and, where something trains, backward.

    Rows beyond those of a call are zero, stand in no sequence, and get no gradient.
    """

    def __init__(self, blocks: Any, modules: Sequence[Any], hidden: Tensor, packed: Any, pool: Any) -> None:
        grads = torch.is_grad_enabled()
        places = [
            (m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None
        ]
        parameters = [held[name] for held, name in places]
        self.weights = [p for p in parameters if p.dim() > 1]
        self.trained = [p for p in parameters if grads and p.requires_grad]
        # Others of the same memory: the hooks of the caller and of DDP know nothing of what is captured.
        self._leaves = [torch.nn.Parameter(p.detach()) for p in self.trained]
        self._places = [
            place for place, p in zip(places, parameters, strict=True) if grads and p.requires_grad
        ]
        rows = _rows(hidden, packed)
        self._hidden = hidden.detach().new_zeros(hidden.shape[0], rows, hidden.shape[2])
        self._hidden.requires_grad_(grads and hidden.requires_grad)
        self.wanted = [t for t in (self._hidden, *self._leaves) if t.requires_grad]
        slots = packed.slots.new_empty(hidden.shape[0] * rows)
        pooled = None if packed.pooled is None else torch.empty_like(packed.pooled)
        self._packed, self._blocks = packed._replace(slots=slots, pooled=pooled, graph=None), blocks
        self._out = self._dy = hidden.new_empty(0)
        self.load(hidden, packed)

        sites = [m._fastpeft for m in modules if "_fastpeft" in vars(m)]
        before = [(site.last, site.calls) for site in sites]
        with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []), _uncached_autocast():
            with _beside(hidden.device) as stream:
                for _ in range(WARM_UP):
                    self._run_forward()
                    self._dy = torch.zeros_like(self._out)
                    if self.wanted:
                        self._run_backward()
            counts = [site.calls for site in sites]
            self._forward = capture(self._run_forward, pool, stream)
            if self.wanted:
                self._backward = capture(self._run_backward, pool, stream)
        self._out = self._out.detach()  # what backward saved stays the pool's
        #: What a run notes, for each replay to note it.
        self._notes = [
            (site, site.last, site.calls - count) for site, count in zip(sites, counts, strict=True)
        ]
        for site, (last, calls) in zip(sites, before, strict=True):
            site.last, site.calls = last, calls

    def _run_forward(self) -> None:
        self._out = self._hidden  # the last run's nodes go: a leaf's would remember that run's stream
        for (held, name), leaf in zip(self._places, self._leaves, strict=True):
            held[name] = leaf
        try:
            with torch.set_grad_enabled(bool(self.wanted)):
                x = self._hidden
                for block in self._blocks:
                    x = block(x, packed=self._packed)
        finally:
            for (held, name), parameter in zip(self._places, self.trained, strict=True):
                held[name] = parameter
        self._out = x

    def _run_backward(self) -> None:
        # Kept, or the memory of what is read would be written to: a caller may ask for the same gradients again.
        found = torch.autograd.grad(self._out, self.wanted, self._dy, retain_graph=True, allow_unused=True)
        self._d_hidden, *grads = found if self._hidden.requires_grad else (None, *found)
        self._reached = [g is not None for g in grads]
        self._grads = [g for g in grads if g is not None]
        # One tensor a dtype: what leaves is a copy, since autograd may add to it, or keep it.
        self._flat = {
            dtype: torch.cat([g.flatten() for g in self._grads if g.dtype == dtype])
            for dtype in {g.dtype for g in self._grads}
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
        return self._out.detach()[:, :rows]

    def backward(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients to hidden and to what trains, None where there is none, in tensors of their own."""
        _fill(self._dy, dy)
        self._backward()
        d_hidden = None if self._d_hidden is None else self._d_hidden[:, : dy.shape[1]].clone()
        copies = {}
        for dtype, flat in self._flat.items():
            like = [g for g in self._grads if g.dtype == dtype]
            copies[dtype] = iter(torch._utils._unflatten_dense_tensors(flat.clone(), like))
        found = iter(next(copies[g.dtype]) for g in self._grads)
        return d_hidden, *(next(found) if reached else None for reached in self._reached)


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
def _beside(device: torch.device) -> Iterator[Any]:
    """A stream of its own, to warm up on and to capture on; None where there are none."""
    if device.type != "cuda":
        yield None
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream(device).wait_stream(stream)


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
        if torch.is_grad_enabled():
            raise RuntimeError("graphs are differentiable once: fastpeft.patch(model) for second derivatives")
        found = ctx.captured.backward(dy)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.graphs._pending = _nothing
        return None, None, *found
