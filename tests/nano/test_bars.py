"""What nano was built to do, on a sample: held-out texts read back by an optical reader, edits that do what was asked.

The full measurement (hundreds of lines a set, with intervals) is benchmarks/nano_measures.py; this is the alarm. The
bounds here are what that measured less the noise of the smaller sample.
"""

from __future__ import annotations

import pytest

from lanting.evals.draw import How, Tell
from lanting.evals.edit import judge_edit
from lanting.evals.ocr import Judge, judges
from lanting.evals.sets import edit_cases, text_cases
from lanting.evals.text import MODEL, judge_text


@pytest.mark.parametrize(
    ("name", "language", "bar"),
    [("words", "en", 0.8), ("random", "en", 0.6), ("posters", "en", 0.6), ("faces", "en", 0.25), ("words", "zh", 0.85)],
)
def test_held_out_lines_are_read_back(as_usual, name, language, bar):
    """Lines of English, characters of Chinese."""
    judge = judges(["pp"], language)[0][0]
    whole = Judge(judge.name, judge.read)  # known boxes, which it would read too, have no bar here
    report = judge_text(as_usual, text_cases(name, language, 16), How(seed=50), [whole], Tell(), False)
    scores = report.scores[MODEL]["pp"]
    assert (scores.characters if language == "zh" else scores.lines).value >= bar


def test_edits_do_what_was_asked_and_keep_the_rest(as_usual):
    judge = judges(["pp"], "en")[0][0]
    kinds = ("ground", "letters", "rewrite", "border")
    row = judge_edit(as_usual, edit_cases(kinds, 12), How(seed=60), judge, Tell(), False).row(None)
    assert row["done"].value >= 0.5 and row["kept_median"] >= 24
