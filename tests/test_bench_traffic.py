"""bench/traffic.py counts what is launched: held against counts by hand."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import traffic  # noqa: E402

from fastpeft.kernels import tile_table  # noqa: E402

pytestmark = pytest.mark.xdist_group("traffic")  # two counts serve all tests
M, K, N, R = 640, 48, 144, 16  # tokens, in_features, out_features, rank
BF16, FP32, MASK = 2, 4, 1  # bytes


@pytest.fixture(scope="module")
def layer():
    return {name: found.record() for name, found in traffic.lora_variants(K, N, M, R, 0.1, "bf16").items()}


def test_the_frozen_layer_is_two_gemms(layer):
    forward = M * K + K * N + N + M * N
    backward = M * N + K * N + M * K
    assert layer["frozen"]["launches"] == 2
    assert layer["frozen"]["bytes"] == BF16 * (forward + backward)
    assert layer["frozen"]["saved_bytes"] == 0  # but the weight, which is a parameter


def test_peft_in_bf16_is_fourteen_kernels(layer):
    forward = [
        M * K + K * N + N + M * N,  # the frozen GEMM
        2 * M * K,  # dropout, and its mask below
        M * K + K * R + M * R,
        M * R + R * N + M * N,
        2 * M * N,  # times scaling
        3 * M * N,  # plus the frozen output
    ]
    backward = [
        2 * M * N,  # times scaling
        M * N + M * R + N * R,  # d_lora_b
        M * N + N * R + M * R,  # dxa
        M * R + M * K + K * R,  # d_lora_a
        M * R + K * R + M * K,  # gradient of dropout's output
        2 * M * K,  # through dropout
        M * N + K * N + M * K,  # the frozen GEMM's
        3 * M * K,  # and their sum
    ]
    assert layer["peft_bf16"]["launches"] == len(forward) + len(backward) == 14
    assert layer["peft_bf16"]["bytes"] == BF16 * sum(forward + backward) + 2 * MASK * M * K
    assert layer["peft_bf16"]["saved_bytes"] == BF16 * (M * K + M * R) + MASK * M * K


def test_the_bound_reads_and_writes_each_tensor_once(layer):
    factors = R * K + R * N
    forward = M * K + K * N + N + factors + M * N
    backward = M * N + M * K + K * N + factors + M * K + factors
    assert layer["bound"]["bytes"] == BF16 * (forward + backward)


def test_float32_factors_widen_what_eager_peft_moves(layer):
    assert layer["peft_fp32"]["bytes"] > 2 * layer["peft_bf16"]["bytes"]
    assert layer["peft_fp32"]["saved_bytes"] == FP32 * (M * K + M * R) + MASK * M * K


def test_fastpeft_is_counted_by_its_kernels_and_saves_x_and_xa_alone(layer):
    names = [kernel["name"] for kernel in layer["fastpeft"]["forward"] + layer["fastpeft"]["backward"]]
    assert sum(name.endswith("_kernel") for name in names) >= 4
    assert layer["fastpeft"]["saved_bytes"] == BF16 * (M * K + M * R) + 16  # the seed, aligned
    assert layer["bound"]["bytes"] < layer["fastpeft"]["bytes"] < layer["addmm"]["bytes"]


def test_products_are_counted_and_fastpeft_multiplies_by_the_frozen_weight_as_often(layer):
    flops = {name: sum(k["flops"] for k in row["forward"] + row["backward"]) for name, row in layer.items()}
    assert flops["frozen"] == flops["fastpeft"] == 2 * 2 * M * K * N
    # Of rank R: two forward, and a gradient each for xa, for dropout's output and for both factors backward.
    assert flops["peft_bf16"] == flops["frozen"] + 2 * M * R * (3 * K + 3 * N)


def test_attention_is_two_products_forward_and_five_backward():
    m, length, width, heads = 2048, 256, 768, 12
    found = traffic.attention(m, length, 0.1, "bf16")
    product = 2 * m * length * width
    assert [kernel.flops for kernel in found.forward] == [2 * product]
    assert [kernel.flops for kernel in found.backward] == [5 * product, 0]
    row, lse = BF16 * m * width, FP32 * heads * m
    # q, k, v and y; besides them dy, dq, dk, dv; and dqkv of these, joined. The rest is the state of the generator.
    least = (4 * row + lse, 8 * row + lse, 6 * row)
    for kernel, moved in zip(found.forward + found.backward, least, strict=True):
        assert moved <= kernel.bytes <= moved + 1024


@pytest.fixture(scope="module")
def neighbours():
    return {name: found.record() for name, found in traffic.neighbour_variants(M, R, 0.1, "bf16").items()}


def test_the_bound_with_neighbours_is_each_operation_alone(neighbours):
    row, w = M * 768, 768
    factors = [R * (k + n) for k, n in ((w, 3 * w), (w, w), (w, 4 * w), (4 * w, w))]
    biases, norms = (3 + 1 + 4 + 1) * w, 2 * 2 * w
    forward = 16 * row + 12 * w * w + biases + sum(factors)  # the projections
    forward += 2 * 2 * row + norms  # LayerNorms
    forward += 2 * 4 * row + 2 * 3 * row  # the GELU, and dropouts with residuals
    backward = 23 * row + 12 * w * w + 2 * sum(factors)
    backward += 2 * 3 * row + 2 * 3 * row  # LayerNorms, and the sums with the residuals' gradients
    backward += 3 * 4 * row + 2 * 2 * row
    assert neighbours["bound"]["bytes"] == BF16 * (forward + backward)


def test_the_model_scope_makes_no_pass_for_gelu_or_residuals(neighbours):
    row = M * 768
    gelu = (
        BF16 * 4 * row * (2 + 3 - 2)
    )  # passes of its own, less its result and the pre-activation beside the GEMMs
    forward = BF16 * 5 * row + MASK * row  # dropout and its mask, then the sum
    backward = BF16 * 2 * row + MASK * row
    seeds = 2 * (16 + 16 + 16)  # of the residuals' dropouts, drawn, read forward and backward
    residuals = 2 * (forward - BF16 * row + backward - BF16 * 2 * row) - seeds
    statistics = 2 * M * FP32  # a mean and a deviation, computed again instead
    norms = 2 * (BF16 * 2 * row + statistics + BF16 * 768)  # no sum of gradients after it, and no bias read
    shrinks = 2 * (BF16 * row + statistics)  # xa beside the LayerNorm
    layers, model = neighbours["fastpeft"], neighbours["fastpeft_model"]
    assert layers["bytes"] - model["bytes"] == gelu + residuals + norms + shrinks
    # Two kernels drop gradients; what follows the attention draws its seeds at once; two LayerNorms leave xa.
    assert layers["launches"] - model["launches"] == 2 + 2 * 3 + 2 - 2 + 2 + 2
    saved = BF16 * 4 * row + 2 * (MASK * row - 16) + 2 * statistics
    assert layers["saved_bytes"] - model["saved_bytes"] == saved


def test_each_layer_norm_leaves_what_the_layer_after_it_needs(neighbours):
    names = [kernel["name"] for kernel in neighbours["fastpeft_model"]["forward"]]
    assert names.count("layer_norm_shrink_kernel") == names.count("shrink_kernel") == 2
    assert "aten.native_layer_norm.default" not in names


@pytest.mark.parametrize(("arch", "passes"), [(80, 0), (90, 2)])
def test_without_dropout_a_block_is_four_products_and_two_layer_norms(arch, passes, monkeypatch):
    """And where xa isn't computed on the way, a pass before each product that no LayerNorm precedes."""
    monkeypatch.setattr(traffic, "RESIDUAL_DROPOUT", 0.0)
    monkeypatch.setattr(traffic, "H100", next(a for a in tile_table.ARCHITECTURES if a.name == arch))
    found = traffic.neighbour_variants(M, R, 0.0, "bf16")["fastpeft_model"].forward
    names = Counter(kernel.name.replace("_descriptor", "") for kernel in found)
    products = {"linear_kernel": 4, "layer_norm_shrink_kernel": 2}
    assert names == Counter(products | {"shrink_kernel": passes})


def test_adapters_together_read_what_they_share_once():
    found = traffic.many_variants(M, R, 0.1, "bf16")
    together, one_by_one = (found[name].record() for name in ("together", "one_by_one"))
    assert len(found["together"].forward) * 8 == len(found["one_by_one"].forward)

    def gemms(record):
        kernels = [k for k in record["forward"] + record["backward"] if "linear" in k["name"]]
        return len(kernels), sum(k["bytes"] for k in kernels)

    weights = BF16 * sum(k * n for _, k, n in traffic.projections())
    biases = BF16 * sum(n for _, _, n in traffic.projections())
    seeds = 16 * (2 + 4)  # of two residuals' masks forward, and of each layer's backward
    groups = 4 * (M + 9 + 3 * 8)  # whose rows are whose, for each of the eight launches
    assert gemms(together) == (8, gemms(one_by_one)[1] - 7 * (2 * weights + biases + seeds) + 8 * groups)
    assert gemms(one_by_one)[0] == 8 * 8
    assert together["saved_bytes"] <= one_by_one["saved_bytes"]


def test_the_head_stores_a_chunk_of_logits_once_and_reads_it_once():
    """In two chunks of 4096 rows; on sm_90 a row's logits are 197 tiles of 256."""
    m, k, v, padded, tiles = 8192, 768, 50257, 50304, 197
    rows, weight, logits, part, of_row, label = (
        BF16 * m * k,
        BF16 * v * k,
        BF16 * m * padded,
        FP32 * m * tiles,
        FP32 * m,
        8 * m,
    )
    found = traffic.head_variants(m, k, "bf16")
    kernels = {
        "head_logits_descriptor_kernel": rows + 2 * weight + logits + part + of_row + label,
        "head_loss_kernel": part + of_row + of_row,  # in place, and lse
        "head_gradient_descriptor_kernel": logits + of_row + label + 2 * weight + rows,
        "aten.mul.Tensor": 2 * rows,
    }
    moved = dict.fromkeys(kernels, 0)
    for kernel in found["fastpeft"]["forward"] + found["fastpeft"]["backward"]:
        moved[kernel["name"]] += kernel["bytes"]
    assert moved == kernels


@pytest.mark.parametrize("width", traffic.WIDTHS)
def test_the_head_moves_little_more_than_it_must(width):
    found = traffic.head_variants(8192, width, "bf16")
    assert found["fastpeft"]["bytes"] <= 1.2 * found["bound"]["bytes"]
    assert found["stock_bf16"]["bytes"] > 8 * found["fastpeft"]["bytes"]
    # What it saves by not computing logits again outweighs their bytes, on the GPU with most operations for a byte.
    more = (found["recomputed"]["teraflops"] - found["fastpeft"]["teraflops"]) * 1e12
    assert more > (found["fastpeft"]["bytes"] - found["recomputed"]["bytes"]) * traffic.H100.flops_per_byte


def test_an_expanded_operand_costs_what_it_stores():
    assert traffic.stored_bytes(torch.empty(N, device="meta").expand(M, N)) == FP32 * N
    assert traffic.distinct_bytes([w := torch.empty(K, N), w.T, w[:1]]) == FP32 * (K * N + N)


def test_the_record_of_gpt2_small_names_every_variant_of_every_layer(tmp_path, monkeypatch):
    path = tmp_path / "traffic.json"
    monkeypatch.setattr(sys, "argv", ["traffic.py", "--json", str(path)])
    traffic.main()
    record = json.loads(path.read_text())
    variants = ["bound", "frozen", "peft_bf16", "peft_fp32", "addmm", "fastpeft"]
    assert list(record["block"]) == variants
    assert list(record["layers"]) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    for key in ("launches", "bytes", "saved_bytes"):
        for variant in variants:
            by_layer = [rows[variant][key] for rows in record["layers"].values()]
            assert record["block"][variant][key] == sum(by_layer)
    assert record["neighbours"]["fastpeft_model"]["bytes"] <= 1.2 * record["neighbours"]["bound"]["bytes"]
    assert 4.8 < record["block"]["peft_bf16"]["bytes"] / record["block"]["bound"]["bytes"] < 5.0
    assert list(record["attention"]) == ["256", "1024"]
    fewer = record["fewer"]
    assert fewer["tokens"] == record["shapes"]["tokens"] / 16
    assert fewer["neighbours"].keys() == record["neighbours"].keys()
    assert fewer["head"]["768"].keys() == record["head"]["768"].keys()
    flops = [
        sum(k["flops"] for k in each["neighbours"]["fastpeft_model"]["forward"]) for each in (fewer, record)
    ]
    assert 16 * flops[0] == flops[1] == 2 * 8192 * 12 * 768 * 768
    assert {"commit", "machine", "versions", "command", "shapes", "dtype"} <= record.keys()
