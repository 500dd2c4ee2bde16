"""FLIP: its properties, and pairs whose value the authors' own program (flip-evaluator 1.7) gives."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lanting.evals.flip import flip, mean_flip

HIGH, WIDE = 48, 64


def plain(*color: float) -> torch.Tensor:
    return torch.tensor(color).expand(HIGH, WIDE, 3).clone()


def ramp() -> torch.Tensor:
    x = torch.linspace(0, 1, WIDE)[None].expand(HIGH, WIDE)
    y = torch.linspace(0, 1, HIGH)[:, None].expand(HIGH, WIDE)
    return torch.stack((x, y, 1 - x), 2)


def marked(rows: slice, columns: slice, *color: float) -> torch.Tensor:
    picture = plain(0.25, 0.25, 0.25)
    picture[rows, columns] = torch.tensor(color)
    return picture


KNOWN = [
    ("ramp and its mirror image", ramp(), ramp().flip(1), 0.76564694),
    ("a square", plain(0.25, 0.25, 0.25), marked(slice(16, 32), slice(20, 44), 1, 0.5, 0), 0.19811647),
    ("a line", plain(0.25, 0.25, 0.25), marked(slice(None), slice(30, 31), 0.9, 0.9, 0.9), 0.05482410),
    ("black and white", plain(0, 0, 0), plain(1, 1, 1), 0.96736527),
    ("green and blue, the largest difference", plain(0, 1, 0), plain(0, 0, 1), 1.0),
    ("the same", ramp(), ramp(), 0.0),
]


@pytest.mark.parametrize(("one", "other", "expected"), [case[1:] for case in KNOWN], ids=[case[0] for case in KNOWN])
def test_known_pairs(one, other, expected):
    assert mean_flip(one, other) == pytest.approx(expected, abs=2e-4)


def test_it_does_not_matter_which_picture_is_first():
    one, other = ramp(), marked(slice(4, 9), slice(4, 9), 0, 1, 0)
    assert torch.allclose(flip(one, other), flip(other, one))


def test_the_map_shows_where_and_bytes_are_as_good_as_floats():
    one, other = plain(0.25, 0.25, 0.25), marked(slice(4, 9), slice(4, 9), 1, 0, 0)
    seen = flip(one, other)
    assert seen.shape == (HIGH, WIDE)
    assert float(seen[6, 6]) > 0.5 > 1e-3 > float(seen[40, 50])
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
    as_bytes = [(picture * 255).round().byte() for picture in (one, other)]
    assert mean_flip(*as_bytes) == pytest.approx(float(seen.mean()), abs=2e-3)


def test_a_larger_change_counts_for_more_and_fine_stripes_for_less():
    base = plain(0.5, 0.5, 0.5)
    faint, strong = (base.clone() for _ in range(2))
    faint[10:20, 10:20] += 0.05
    strong[10:20, 10:20] += 0.4
    assert 0 < mean_flip(base, faint) < mean_flip(base, strong)
    stripes = base.clone()
    stripes[:, ::2] += 0.1
    stripes[:, 1::2] -= 0.1
    assert mean_flip(base, stripes) < 0.5 * mean_flip(base, base + 0.1)  # the eye blurs fine stripes


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="one size"):
        flip(torch.zeros(4, 4, 3), torch.zeros(4, 5, 3))


def test_kernels_run_along_rows_and_columns():
    """In one piece they took 441 products a pixel: minutes for the seeds of eight prompts."""
    one, other = torch.rand(64, 64, 3), torch.rand(64, 64, 3)
    with FlopCounterMode(display=False) as counter:
        flip(one, other)
    assert counter.get_total_flops() / 64**2 < 3000  # they were 11,000
