"""Dropout masks: the kernel's bits are PyTorch's, they are Philox's, and they drop what they should."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastpeft.kernels import dropout


@triton.jit
def write_mask(
    out_ptr, seed_ptr, start_m, start_k, drop_below, stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    keep = dropout.keep_tile(seed_ptr, start_m, start_k, drop_below, BLOCK_M, BLOCK_K)
    ptrs = out_ptr + tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]
    tl.store(ptrs, keep.to(tl.int8))


@pytest.mark.parametrize("block", [(64, 64), (16, 128), (128, 8)], ids=str)
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 11, 2**63 - 1])
def test_a_tile_of_any_size_holds_the_masks_bits(seed, block, device):
    seed = torch.tensor([seed], device=device)
    mask = dropout.keep_mask(seed, 384, 384, 0.3)
    out = torch.empty(block, dtype=torch.int8, device=device)
    for start in ((0, 0), (128, 64), (256, 256)):
        write_mask[(1,)](out, seed, *start, dropout.threshold(0.3), block[1], *block)
        expected = mask[start[0] : start[0] + block[0], start[1] : start[1] + block[1]]
        assert torch.equal(out.bool(), expected)


def test_the_words_are_philox_4x32_7():
    """Random123's known answer for a zero counter and key, read off the mask through every threshold it crosses."""
    known = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    lanes = [half for word in known for half in (word & 0xFFFF, word >> 16)]
    seed = torch.tensor([0])
    for k, lane in enumerate(lanes):
        assert dropout.keep_mask(seed, 1, 8, lane / 65536)[0, k]
        assert not dropout.keep_mask(seed, 1, 8, (lane + 1) / 65536)[0, k]


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.9, 1.0])
def test_the_share_dropped_is_p(p):
    keep = dropout.keep_mask(torch.tensor([12345]), 1000, 1000, p)
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs((~keep).double().mean() - p) <= 5 * deviation + 2**-17


def test_neighbours_rows_and_seeds_drop_independently():
    keep = dropout.keep_mask(torch.tensor([1]), 1000, 1000, 0.5).double() - 0.5
    other = dropout.keep_mask(torch.tensor([2]), 1000, 1000, 0.5).double() - 0.5
    pairs = [(keep[:, 1:], keep[:, :-1]), (keep[1:], keep[:-1]), (keep[:, 8:], keep[:, :-8]), (keep, other)]
    for one, another in pairs:
        assert abs((one * another).mean() * 4) < 5 / 1000


def test_the_mask_does_not_depend_on_how_much_of_it_is_drawn():
    seed = torch.tensor([9])
    large = dropout.keep_mask(seed, 50, 77, 0.5)
    assert torch.equal(dropout.keep_mask(seed, 20, 13, 0.5), large[:20, :13])
    assert dropout.keep_mask(seed, 0, 13, 0.5).shape == (0, 13)
