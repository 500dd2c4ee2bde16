"""The dial between a picture as the model means it and one that comes sooner: `--quality`, as data.

Every level states a budget of error, in one unit: the relative error of the velocity, |v - exact v| / |v|, as the
controller (`lanting.flow.frugal`) forecasts it before it leaves something out. The numbers were chosen on nano with
`benchmarks/quality.py`; docs/quality.md says what they promise. Rejected: a flag per saving, since nobody can say what
a threshold of 0.08 for one and an interval of (0.2, 0.8) for another do to a picture together; and fewer steps at lower
levels, since steps that are left out where it costs least come nearer to the exact picture in the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

# Steps that are always computed: they decide what the picture is of, and what forecasts are made from. A fifth of the
# steps in their place kept 52 edits of 20 steps and 17 of 50 no nearer, and cost 1 to 12 % of the time (`--first`).
FIRST = 3


@dataclass(frozen=True, slots=True)
class Quality:
    """One position of the dial. All zeros: everything is computed, and the picture is exact to the last bit.

    step  the largest error that may be expected of one step's velocity, relative to its length
    mean  the largest error that may be expected of all steps, weighted by their widths in sigma. Since a picture is
          its noise minus the sum of width times velocity, this is what its latents may be off by, to first order
    age   nothing is used that was computed more than so many steps ago
    """

    step: float = 0.0
    mean: float = 0.0
    age: int = 0

    @property
    def exact(self) -> bool:
        """Nothing may be left out."""
        return self.step == 0 or self.mean == 0 or self.age == 0


LEVELS: dict[str, Quality] = {
    "exact": Quality(),
    "high": Quality(step=0.04, mean=0.02, age=2),  # differences that show when one flips between two pictures
    "balanced": Quality(step=0.08, mean=0.04, age=3),  # half the time
    "fast": Quality(step=0.16, mean=0.08, age=4),  # the same picture, details of its own
}
NAMES = tuple(LEVELS)

# One answer of the model: in full; with the residual of an earlier step; with that on the line through two earlier
# steps. Small letters: beside kept references.
LETTERS = "FfCcLl"
MOST_SAFE = 1000  # parts of networks that ran in a safer way
GUESSED = "PQ"  # a whole step: the velocity of the last step that was computed in full; on the line through two
REUSED = "-"  # the guidance is taken from an earlier step


def check_safe(entries: Sequence[Any], steps: int) -> bool:
    """Whether these can be (step, part of a network, safer way) of a drawing."""
    return len(entries) <= MOST_SAFE and all(
        isinstance(one, list | tuple)
        and len(cast("list[Any]", one)) == 3
        and isinstance(one[0], int)
        and 0 <= one[0] <= steps
        and all(isinstance(word, str) and len(word) < 200 for word in cast("list[Any]", one[1:]))
        for one in entries
    )


def computed(words: Sequence[str]) -> int:
    """In how many steps all blocks were computed for the positive side."""
    return sum(word[0] in "Ff" for word in words)


def check_words(told: Sequence[str], steps: int) -> bool:
    """Whether these can be the choices of so many steps: "FF", "F-", "l-", "F", ... each."""
    answers = LETTERS + REUSED
    return len(told) == steps and all(
        one in tuple(GUESSED) or (0 < len(one) <= 2 and one[0] in LETTERS and one[-1] in answers) for one in told
    )
