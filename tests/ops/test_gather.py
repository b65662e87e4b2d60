"""Rows gathered from several arrays: equal to the copy row by row, and what is wrong is named before it is written."""

import pytest
import torch

from unite_kernels.gather import gather_rows, gather_rows_reference


@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (3, 64, 64)])
def test_gather_rows(shape, threads):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8) for n in (1, 9, 4)]
    part = torch.randint(0, 3, (23,), generator=generator)
    row = (torch.rand(23, generator=generator) * torch.tensor([1, 9, 4])[part]).long()
    out, expected = torch.full((2, 23, *shape), 77, dtype=torch.uint8)
    gather_rows(parts, part, row, out, threads)
    gather_rows_reference(parts, part, row, expected)
    assert torch.equal(out, expected)
    gather_rows(parts, part[:0], row[:0], out[:0], threads)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row": torch.tensor([0, 9])}, "row 9 of 9"),
        ({"row": torch.tensor([0, -1])}, "row -1"),
        ({"part": torch.tensor([0, 1])}, "part 1 of 1"),
        ({"part": torch.tensor([0.0, 0.0])}, "part must be int64"),
        ({"row": torch.tensor([0])}, "row must have shape"),
        ({"out": torch.zeros(2, 5, dtype=torch.uint8)}, "4 bytes, of out 5"),
        ({"out": torch.zeros(2, 4)}, "out must be uint8"),
        ({"out": torch.zeros(4, 2, dtype=torch.uint8).t()}, "out must be contiguous"),
        ({"threads": 0}, "threads must be positive"),
    ],
)
def test_gather_rows_refuses(change, words):
    arguments = {
        "parts": [torch.zeros(9, 4, dtype=torch.uint8)],
        "part": torch.tensor([0, 0]),
        "row": torch.tensor([0, 8]),
        "out": torch.zeros(2, 4, dtype=torch.uint8),
    }
    gather_rows(**arguments)
    with pytest.raises(RuntimeError, match=words):
        gather_rows(**arguments | change)
