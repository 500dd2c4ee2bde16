"""Read a picture with an optical character reader and compare with the words that were asked for.

The judge is PP-OCR through rapidocr, whose weights come inside its package. Small pictures are enlarged and given a
margin first, since the reader was made for photographs; boxes on one row are joined, since it splits lines at wide
gaps. Case and spaces are ignored, as in published text-rendering benchmarks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lanting.core.errors import LantingError

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN, SCALE = 32, 3


class MissingJudgeError(LantingError):
    """An optional package is not installed."""


@cache
def reader() -> Any:
    """The optical reader, loaded once (about one second)."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        raise MissingJudgeError(
            "Reading pictures needs rapidocr; install it with: pip install 'lanting[eval]'"
        ) from None
    one = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
    return RapidOCR(params={**one, "Global.log_level": "error"})


def read_lines(image: Image) -> list[str]:
    """The lines of text found in a picture, top to bottom, without spaces."""
    from PIL import Image as Pillow

    padded = np.pad(np.asarray(image.convert("RGB")), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
    enlarged = Pillow.fromarray(padded).resize(
        (padded.shape[1] * SCALE, padded.shape[0] * SCALE), Pillow.Resampling.BICUBIC
    )
    found = reader()(np.asarray(enlarged)[:, :, ::-1], use_cls=False)
    if found.txts is None:
        return []
    rows: list[list[tuple[float, float, float, str]]] = []
    boxes = [(float(b[:, 1].mean()), float(np.ptp(b[:, 1])), float(b[:, 0].min())) for b in np.asarray(found.boxes)]
    for middle, height, left, text in sorted(zip(*zip(*boxes, strict=True), found.txts, strict=True)):
        if rows and abs(rows[-1][0][0] - middle) < 0.5 * min(height, rows[-1][0][1]):
            rows[-1].append((middle, height, left, text))
        else:
            rows.append([(middle, height, left, text)])
    return [squeeze("".join(box[3] for box in sorted(row, key=lambda box: box[2]))) for row in rows]


def squeeze(text: str) -> str:
    """Without white space."""
    return re.sub(r"\s+", "", text)


def hits(asked: Sequence[str], found: Sequence[str]) -> list[bool]:
    """For every asked line: was it read, case and spaces aside?"""
    seen = [line.casefold() for line in found]
    return [squeeze(line).casefold() in seen for line in asked]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def normalized_distance(asked: Sequence[str], found: Sequence[str]) -> float:
    """Edit distance of everything asked to everything read, divided by the longer: 0 perfect, 1 nothing right."""
    a, b = (squeeze("".join(lines)).casefold() for lines in (asked, found))
    return edit_distance(a, b) / max(len(a), len(b), 1)


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson score)."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    return middle - half, middle + half
