"""What nano was built to do, on a sample: held-out words read back by an optical reader.

The full measurement (hundreds of lines a set, with intervals) is benchmarks/nano_bars.py; this is the alarm. The
bounds here are its bars less the noise of the smaller sample.
"""

from __future__ import annotations

import random

import pytest

from lanting import Request
from lanting.evals.reading import hits, read_lines
from lanting.train.sign_texts import is_held_out
from lanting.train.signs import SQUARE, WIDE, Sign, SignMaker


@pytest.mark.parametrize(
    ("size", "share", "bar"),
    [(WIDE, 0.0, 0.86), (SQUARE, 0.0, 0.70), (WIDE, 1.0, 0.65)],
    ids=["words-wide", "words-square", "random-strings"],
)
def test_held_out_lines_are_read_back(nano, size, share, bar):
    maker, rng = SignMaker(1, held_out=True, random_share=share), random.Random(9)
    signs: list[Sign] = []
    while len(signs) < 24:
        sign = maker.sample(rng, size=size)
        if share or all(line.isalpha() and is_held_out(line) for line in sign.lines):
            signs.append(sign)
    images = nano.run(Request(prompt=tuple(s.prompt for s in signs), size=size, seed=50)).images
    right = [hit for sign, image in zip(signs, images, strict=True) for hit in hits(sign.lines, read_lines(image))]
    assert sum(right) / len(right) >= bar
