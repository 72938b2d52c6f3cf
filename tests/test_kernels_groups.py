"""Rows of many adapters in one batch: each one's output and gradients against float64 of its rows by themselves."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from kernel_checks import DTYPES, compare, describe, lora_arguments, pairwise
from torch import Tensor
from triton.runtime import interpreter

from fastpeft import reference
from fastpeft.kernels import dropout, groups, launch, linear, lora_chain, lora_layer, tile_table, tiling

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # Of a large |z|, exp overflows to infinity, whose sigmoid is 0, as it should be.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

RANKS = (0, 3, 8, 16, 0)  # the first adapter updates nothing, and the last isn't in this layer
SCALINGS = (0.0, 1.5, 0.5, 2.0, 1.0)


class Adapters(NamedTuple):
    """A layer's adapters, and how many rows each has."""

    lengths: tuple[int, ...]
    ranks: tuple[int, ...] = RANKS
    scalings: tuple[float, ...] = SCALINGS
    ps: tuple[float, ...] | None = None

    @property
    def starts(self) -> list[int]:
        return list(itertools.accumulate(self.lengths, initial=0))

    def slices(self) -> list[slice]:
        return list(itertools.starmap(slice, itertools.pairwise(self.starts)))

    def groups(self, device: str) -> groups.Groups:
        ps = self.ps or (0.0,) * len(self.ranks)
        of_row = [g for g, n in enumerate(self.lengths) for _ in range(n)]
        scalings = [s * dropout.keep_scale(p) for s, p in zip(self.scalings, ps, strict=True)]
        below = [dropout.threshold(p) for p in ps]

        def tensor(numbers: list, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(numbers, dtype=dtype, device=device)

        return groups.Groups(
            tensor(of_row), tensor(self.starts), tensor(list(self.ranks)), tensor(scalings, torch.float32),
            tensor(below) if self.ps else None,
        )  # fmt: skip

    def call(self, device: str, seed: Tensor | None = None, **more) -> lora_layer.Call:
        drops = None if self.ps is None else dropout.Dropout(0.0, seed)
        return lora_layer.Call(1.0, drops, groups=self.groups(device), **more)

    def stacked(self, factors: list[Tensor], axis: int) -> Tensor:
        """Factors of several ranks as one tensor, NaN past each adapter's."""
        shape = list(factors[0].shape)
        shape[axis] = max(self.ranks)
        out = []
        for factor in factors:
            around = factor.new_full(shape, float("nan"))
            around.narrow(axis, 0, factor.shape[axis]).copy_(factor)
            out.append(around)
        return torch.stack(out)

    def formula(self, x, weight, bias, lora_a, lora_b, seed=None):
        """`reference.lora_linear` of each adapter's rows by themselves, with its part of the mask."""
        y = []
        for g, rows in enumerate(self.slices()):
            p = self.ps[g] if self.ps else 0.0
            keep = dropout.keep_mask(seed, *x.shape, p)[rows] if p > 0 else None
            y.append(
                reference.lora_linear(x[rows], weight, bias, lora_a[g], lora_b[g], self.scalings[g], p, keep)
            )
        return torch.cat(y)


#: A tile has 128 rows, a strip 64 or 32: segments within one, as large, over several.
SEGMENTS = {
    "mixed": Adapters((5, 0, 1, 127, 30)),
    "many rows first": Adapters((0, 150, 3, 0, 0)),
    "empty between": Adapters((33, 31, 0, 40, 9)),
    "nobody": Adapters((9, 0, 0, 0, 0)),
}
DROPS = {"no": None, "some": (0.0, 0.3, 0.0, 0.1, 0.5)}


def layer_arguments(
    adapters: Adapters, k, n, dtypes, device, *, layout="conv1d", form="dense", bias=True, draw=0
):
    """x, weight and bias, and each adapter's factors by themselves: `a0`, `b0`, and so on."""
    given = lora_arguments(
        adapters.starts[-1], k, n, 1, dtypes, device, layout=layout, form=form, bias=bias, draw=draw
    )
    wide, generator = given.pop("lora_a").dtype, torch.Generator().manual_seed(draw + 77)
    given.pop("lora_b")
    for g, rank in enumerate(adapters.ranks):
        for name, shape, scale in ((f"a{g}", (rank, k), k**-0.5), (f"b{g}", (n, rank), max(rank, 1) ** -0.5)):
            given[name] = (torch.randn(shape, generator=generator) * scale).to(device, wide)
    return given


def factors_of(
    adapters: Adapters, given: dict[str, Tensor], prefix: str = ""
) -> tuple[list[Tensor], list[Tensor]]:
    return tuple([given[f"{prefix}{name}{g}"] for g in range(len(adapters.ranks))] for name in "ab")


def one_layer(adapters: Adapters, seed, x, weight, bias, **factors):
    lora_a, lora_b = factors_of(adapters, factors)
    layer = weight, bias, adapters.stacked(lora_a, 0), adapters.stacked(lora_b, 1)
    call = adapters.call(x.device, seed)
    return lora_chain.lora_chain(x, None, [lora_chain.Link(layer, call, lora_chain.Layer())])[0]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """So that several programs share an adapter's gradient."""
    monkeypatch.setattr(tiling, "GROUPED_ROWS", 128)


SAMPLE = pairwise(
    segments=list(SEGMENTS),
    layer=[
        (36, 100),
        (40, 264),
    ],  # one tile of columns by pointers, two by descriptors where they are 16 bits wide
    drops=["no", "some"],
    dtypes=["fp32", "bf16+fp32"],
    layout=["conv1d", "linear"],
    form=["dense", "offset"],
)


@pytest.mark.parametrize("case", list(SAMPLE), ids=describe)
def test_each_adapter_has_what_its_rows_alone_have(case, device):
    adapters = SEGMENTS[case["segments"]]._replace(ps=DROPS[case["drops"]])
    seed = torch.tensor([20260101], device=device) if adapters.ps else None
    form = {name: case[name] for name in ("layout", "form")}
    draws = [
        layer_arguments(adapters, *case["layer"], case["dtypes"], device, **form, draw=i) for i in range(2)
    ]

    def fused(**given):
        return one_layer(adapters, seed, **given)

    def formula(x, weight, bias, **factors):
        return adapters.formula(x, weight, bias, *factors_of(adapters, factors), seed)

    compare(fused, formula, draws, tuple(name for name in draws[0] if name[0] in "ab" and name != "bias"))


@pytest.mark.parametrize(("dtypes", "p"), [("fp32", 0.3), ("bf16", 0.0)])
def test_a_chain_with_all_that_stands_between_layers_agrees_with_float64(dtypes, p, device):
    k, hidden, lengths = 40, 72, (2, 15, 0, 11, 4)
    ps = (0.0, p, 0.0, p, p) if p else None
    first, fc, proj = (
        Adapters(lengths, ranks, scalings, ps)
        for ranks, scalings in (
            (RANKS, SCALINGS),
            ((0, 0, 4, 3, 16), (0.0, 0.5, 1.0, 2.0, 1.5)),
            ((0, 8, 8, 8, 8), (0.0, 1.0, 2.0, 0.5, 1.0)),
        )
    )  # fmt: skip
    m = first.starts[-1]
    weight, bias = (torch.linspace(low, 2.0, k, device=device) for low in (0.5, -1.0))
    seeds = [torch.tensor([n], device=device) if p else None for n in range(5)]
    added = [None if s is None else dropout.keep_mask(s, m, k, p) for s in seeds[3:]]
    layers = ("first_", first), ("fc_", fc), ("proj_", proj)

    def operands(prefix, adapters, given):
        return given[f"{prefix}weight"], given[f"{prefix}bias"], *factors_of(adapters, given, prefix)

    def fused(x, residual, **given):
        norm = lora_chain.Norm(weight.to(x.dtype), bias.to(x.dtype), 1e-5, False)
        drops = [None if s is None else dropout.Dropout(p, s) for s in seeds[3:]]
        more = {"residual_dropout": drops[0]}, {"stores": "yh"}, {"residual_dropout": drops[1]}
        links = []
        for i, (prefix, adapters) in enumerate(layers):
            w, b, lora_a, lora_b = operands(prefix, adapters, given)
            layer = w, b, adapters.stacked(lora_a, 0), adapters.stacked(lora_b, 1)
            call = adapters.call(x.device, seeds[i], **more[i])
            links.append(
                lora_chain.Link(layer, call, lora_chain.Layer(), norm if i == 1 else None, adds=i != 1)
            )
        y, carried = lora_chain.lora_chain(x, residual, links)
        assert carried is None
        return y

    def formula(x, residual, **given):
        linear = [
            lambda t, i=i, each=each: each[1].formula(t, *operands(*each, given), seeds[i])
            for i, each in enumerate(layers)
        ]
        residual = residual + reference.dropout(linear[0](x), added[0], p)
        w, b = (t.to(DTYPES[dtypes][0]).to(x.dtype) for t in (weight, bias))
        h = torch.nn.functional.layer_norm(residual, (k,), w, b, 1e-5)
        y = linear[2](reference.gelu_new(linear[1](h)))
        return residual + reference.dropout(y, added[1], p)

    draws = []
    for draw in range(2):
        given = {}
        for (prefix, adapters), (columns, n) in zip(layers, ((k, k), (k, hidden), (hidden, k)), strict=True):
            own = layer_arguments(adapters, columns, n, dtypes, device, draw=draw + len(given))
            given |= {
                "x": given.get("x", own.pop("x")),
                **{f"{prefix}{name}": t for name, t in own.items() if name != "x"},
            }
        residual = torch.randn(m, k, generator=torch.Generator().manual_seed(draw))
        draws.append({**given, "residual": residual.to(device, given["x"].dtype)})
    factors = tuple(name for name in draws[0] if name.split("_")[-1][0] in "ab" and "bias" not in name)
    compare(fused, formula, draws, factors)


def stacked_layer(adapters: Adapters, k: int, n: int, dtypes: str, device: str):
    """x, weight, bias, and the stacked factors."""
    given = layer_arguments(adapters, k, n, dtypes, device)
    lora_a, lora_b = factors_of(adapters, given)
    return (
        *(given[name] for name in ("x", "weight", "bias")),
        adapters.stacked(lora_a, 0),
        adapters.stacked(lora_b, 1),
    )


def gradients_of(adapters: Adapters, dy, x, weight, a, b, xa, call, *needs) -> tuple[Tensor | None, ...]:
    needs = needs or (True, True, True)
    given = dy, x, weight, a, b, xa, call.scaling, call.dropout, *needs, False, call.groups
    return lora_layer.Layer().backward(*given)


def run_every_other_program_first(monkeypatch) -> None:
    """In the interpreter, which else runs what shares a sum in turn: by rows of the grid, neighbours far apart."""
    builder = interpreter.interpreter_builder
    real = builder.set_grid_idx

    def set_grid_idx(x, y, z):
        columns, rows, _ = builder.grid_dim
        row, column = divmod(x * rows + y, columns)
        real(column, [*range(0, rows, 2), *range(1, rows, 2)][row], z)

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)


def test_an_adapters_gradients_have_the_same_bits_alone_in_company_and_in_any_order(device, monkeypatch):
    adapters = Adapters((20, 90, 0, 33, 130), (0, 3, 8, 16, 5))
    x, weight, bias, a, b = stacked_layer(adapters, 40, 72, "bf16+fp32", device)
    call = adapters.call(device)
    y, xa, _ = lora_layer.Layer().forward(x, weight, bias, a, b, call)
    _, d_a, d_b = gradients_of(adapters, y, x, weight, a, b, xa, call)
    with monkeypatch.context() as patched:
        run_every_other_program_first(patched)
        again = gradients_of(adapters, y, x, weight, a, b, xa, call)
    assert torch.equal(d_a, again[1])
    assert torch.equal(d_b, again[2])
    for g, rows in enumerate(adapters.slices()):
        rank = adapters.ranks[g]
        alone = Adapters(adapters.lengths[g : g + 1], (rank,), adapters.scalings[g : g + 1])
        given = y[rows], x[rows], weight, a[g : g + 1], b[g : g + 1], xa[rows], alone.call(device)
        if alone.lengths[0]:
            _, one_a, one_b = gradients_of(alone, *given)
            assert torch.equal(one_a[0], d_a[g])
            assert torch.equal(one_b[0], d_b[g])
            assert d_a[g].any() == (rank > 0)
        else:
            assert not d_a[g].any()
            assert not d_b[g].any()
        assert not d_a[g, rank:].any()
        assert not d_b[g, :, rank:].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
# By pointers, and by descriptors.
@pytest.mark.parametrize(("n", "value"), [(100, float("inf")), (264, float("nan"))])
def test_an_adapter_that_diverged_leaves_the_others_as_they_are(n, value, device):
    adapters = Adapters((5, 20, 9, 0, 31), (0, 3, 8, 16, 5))
    x, weight, bias, a, b = stacked_layer(adapters, 40, n, "bf16", device)
    call, (*before, bad, _, after) = adapters.call(device), adapters.slices()

    def run():
        y, xa, _ = lora_layer.Layer().forward(x, weight, bias, a, b, call)
        return y, *gradients_of(adapters, y, x, weight, a, b, xa, call)

    by_row, by_adapter = (run()[part] for part in (slice(2), slice(2, 4)))
    a[2, 0, 0] = b[2, 0, 0] = value
    x[bad.start, 0] = value
    y, dx, d_a, d_b = run()
    for mine, expected in zip((y, dx), by_row, strict=True):
        for rows in (*before, after):
            assert torch.equal(mine[rows], expected[rows])
        assert not mine[bad].isfinite().all()
    for mine, expected in zip((d_a, d_b), by_adapter, strict=True):
        for g in (0, 1, 3, 4):
            assert torch.equal(mine[g], expected[g])
        assert not mine[2].isfinite().all()
    assert not d_a[2, adapters.ranks[2] :].any()
    assert not d_b[2, :, adapters.ranks[2] :].any()


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, True), (False, False, True)])
def test_what_is_needed_is_complete_whichever_kernel_comes_before(needs, device):
    """Tickets that nobody cleared would leave a gradient unwritten; of so many adapters, those of the last."""
    adapters = Adapters((3, *(0,) * 12, 2, 140), (0, *(3,) * 14), (1.5,) * 15)
    x, weight, bias, a, b = stacked_layer(adapters, 40, 72, "fp32", device)
    call = adapters.call(device)
    y, xa, _ = lora_layer.Layer().forward(x, weight, bias, a, b, call)
    everything = gradients_of(adapters, y, x, weight, a, b, xa, call)
    found = gradients_of(adapters, y, x, weight, a, b, xa, call, *needs)
    assert [each is not None for each in found] == list(needs)
    for mine, expected in zip(found, everything, strict=True):
        assert mine is None or torch.equal(mine, expected)


def specialised(each: launch.Launch) -> tuple[str, ...]:
    """What the kernel of a launch is compiled for."""
    kernel = each.kernel
    excluded = kernel.kwargs["do_not_specialize"] if launch.INTERPRETED else kernel.do_not_specialize
    seen = [kernel.__name__, str(each.options)]
    for name, value in each.args.items():
        if isinstance(value, Tensor):
            value = value.dtype
        elif hasattr(value, "block_shape"):
            value = value.block_shape
        elif isinstance(value, float) or (name in excluded and value is not None):
            value = type(value)
        seen.append(f"{name}={value}")
    return tuple(seen)


@pytest.mark.parametrize("n", [100, 264])  # by pointers, and by descriptors
def test_no_kernel_is_compiled_anew_for_other_segments_or_another_number_of_adapters(n, device):
    found, layer = [], lora_chain.Layer()
    for adapters in (
        SEGMENTS["mixed"],
        Adapters((100, 60), (16, 3), (1.0, 2.0)),
        SEGMENTS["mixed"]._replace(lengths=(4, 0, 1, 127, 30)),
    ):
        adapters = adapters._replace(ps=DROPS["some"][: len(adapters.ranks)])
        x, weight, bias, a, b = stacked_layer(adapters, 40, n, "bf16", device)
        call = adapters.call(device, torch.tensor([1], device=device))
        links = [lora_chain.Link((weight, bias, a.requires_grad_(), b.requires_grad_()), call, layer)]
        with launch.record() as launches:
            lora_chain.lora_chain(x.requires_grad_(), None, links)[0].sum().backward()
        found.append([specialised(each) for each in launches])
        if len(found) == 1:
            known = len(launch.launchers)
    assert len(found[0]) == 5
    assert found[0] == found[1] == found[2]
    assert len(launch.launchers) == known


def test_what_is_built_is_what_is_launched(device, monkeypatch):
    built = []
    monkeypatch.setattr(launch, "_failures", {})
    monkeypatch.setattr(launch, "_why_not_built", built.append)
    monkeypatch.setattr(launch, "_compile_at_once", lambda launches: None)
    keys = []
    for adapters in (SEGMENTS["mixed"], Adapters((3, 100, 60), (0, 16, 3), (0.0, 1.0, 2.0))):
        adapters = adapters._replace(ps=DROPS["some"][: len(adapters.ranks)])
        x, weight, bias, a, b = stacked_layer(adapters, 40, 40, "bf16", device)
        call = adapters.call(device, torch.tensor([1], device=device))
        layer = weight, bias, a.requires_grad_(), b.requires_grad_()
        links = [lora_chain.Link(layer, call, lora_chain.Layer(), adds=i == 1) for i in range(2)]
        with monkeypatch.context() as compiled:
            compiled.setattr(launch, "INTERPRETED", False)
            assert lora_chain.ready(x, x, links) is None
        keys.append(list(launch._failures))
        with launch.record() as launches:
            y, _ = lora_chain.lora_chain(x, x, links)
            y.backward(torch.ones_like(y))
        kernels = {specialised(each) for each in built}
        assert all(specialised(each) in kernels for each in launches)
        assert any("gradient_kernel" in each for each in kernels)
    assert keys[0] == keys[1]  # another number of adapters is nothing new to build


def test_a_layer_norm_leaves_no_xa_of_many_adapters(device):
    adapters = SEGMENTS["nobody"]._replace(ps=DROPS["some"])
    x, weight, bias, a, b = stacked_layer(adapters, 40, 40, "fp32", device)
    call = adapters.call(device, torch.tensor([1], device=device))
    norm = lora_chain.Norm(x[0], x[1], 1e-5, True)
    link = lora_chain.Link((weight, bias, a, b), call, lora_chain.Layer(), norm)
    with pytest.raises(ValueError, match="too many values to unpack"):
        lora_chain.lora_chain(x, None, [link])


@pytest.mark.skipif(not launch.INTERPRETED, reason="what a kernel calls is seen in the interpreter")
def test_an_adapter_without_rows_in_a_tile_costs_it_no_product(monkeypatch):
    adapters = Adapters((2, 10, 0, 15, 5))  # in one tile; one has no rows, and two no rank
    x, weight, bias, a, b = stacked_layer(adapters, 40, 36, "fp32", "cpu")
    products, real = [], linear.plus_ranks

    def counting(*given):
        products.append(given)
        return real(*given)

    monkeypatch.setattr(linear, "plus_ranks", counting)
    lora_layer.Layer().forward(x, weight, bias, a, b, adapters.call("cpu"))
    assert len(products) == 2


def test_every_kernel_of_many_adapters_has_a_tile_of_theirs(device):
    """In float32, where none of them is one adapter's too."""
    adapters = SEGMENTS["mixed"]
    x, weight, bias, a, b = stacked_layer(adapters, 40, 72, "fp32", device)
    call = adapters.call(device)
    with launch.record() as launches:
        y, xa, _ = lora_layer.Layer().forward(x, weight, bias, a, b, call)
        for need_x in (True, False):
            gradients_of(adapters, y, x, weight, a, b, xa, call, need_x, True, True)
    product = "linear_kernel", tile_table.LINEAR_FLOAT32_GROUPED
    shrink = "shrink_kernel", tile_table.SHRINK_FLOAT32_GROUPED[16]
    gradient = "gradient_kernel", tile_table.GRADIENT_FLOAT32_GROUPED
    found = []
    for kernel, _, args, options in launches:
        block = (size for name, size in args.items() if name.startswith("BLOCK"))
        found.append((kernel.__name__, (*block, options["num_warps"], options["num_stages"])))
    assert found == [shrink, product, shrink, product, gradient, shrink, gradient]


def test_the_xa_of_many_adapters_is_not_computed_on_the_way(monkeypatch):
    a100 = next(a for a in tile_table.ARCHITECTURES if a.name == 80)
    monkeypatch.setattr(tiling, "architecture", lambda device: a100)
    x, weight = torch.empty(512, 768, dtype=torch.bfloat16), torch.empty(768, 2304, dtype=torch.bfloat16)
    given = x, weight, 16, False, False, False, False
    assert any(how.single for how in tiling.linear(*given))
    assert not any(how.single for how in tiling.linear(*given, grouped=True))
