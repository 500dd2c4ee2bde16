"""Read a picture with PP-OCR through rapidocr, whose weights come inside its package.

Small pictures are enlarged and given a margin first, since the reader was made for photographs; its finder then looks
at 512 pixels, which on 66 clean and spoilt designs found no line less than its usual 736 and more, in a third of the
time. Boxes on one row are joined, since it splits lines at wide gaps. The finder misses single characters that the
recogniser reads, so where the place of a line is known it may be read there alone (`read_boxes`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lanting.reading import missing

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN, SCALE, ENOUGH = 32, 3, 1024  # pixels, times, pixels along the longer side that need no enlarging
FINDER = 512  # pixels along the longer side, as the finder sees a picture that was enlarged SCALE times
LINE_HEIGHT, LINE_MARGIN = 64, 0.12  # a known line is brought to this height with a share of it around
Box = tuple[int, int, int, int]  # x, y, width, height in pixels


@cache
def reader(longest: int = 0) -> Any:
    """The optical reader, loaded once (about one second); its finder sees at most `longest` pixels, 0: its own rule."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        raise missing() from None
    one = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
    small = {"Det.limit_type": "max", "Det.limit_side_len": longest} if longest else {}
    return RapidOCR(params={**one, **small, "Global.log_level": "error"})


def enlarged(image: Image, most: int = SCALE) -> tuple[Image, int]:
    """The picture with a margin of its own border colours, small ones enlarged; and how many times. RGB."""
    from PIL import Image as Pillow

    padded = np.pad(np.asarray(image.convert("RGB")), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
    times = min(most, max(1, ENOUGH // max(image.size)))
    size = (padded.shape[1] * times, padded.shape[0] * times)
    return Pillow.fromarray(padded).resize(size, Pillow.Resampling.BICUBIC), times


def read_lines(image: Image) -> list[str]:
    """The lines of text found in a picture, top to bottom, without spaces."""
    rows: list[list[tuple[float, float, float, str]]] = []
    for (left, top, _, height), text in sorted(_found(image), key=lambda one: one[0][1] + one[0][3] / 2):
        middle = top + height / 2
        if rows and abs(rows[-1][0][0] - middle) < 0.5 * min(height, rows[-1][0][1]):
            rows[-1].append((middle, height, left, text))
        else:
            rows.append([(middle, height, left, text)])
    return [squeeze("".join(box[3] for box in sorted(row, key=lambda box: box[2]))) for row in rows]


def text_boxes(image: Image) -> list[Box]:
    """Where text was found: x, y, width, height in the picture's own pixels."""
    return [(round(x), round(y), round(w), round(h)) for (x, y, w, h), _ in _found(image)]


def _found(image: Image) -> list[tuple[tuple[float, float, float, float], str]]:
    """(box in the picture's pixels, text) of everything that reads as text."""
    large, times = enlarged(image)
    eye = reader(FINDER) if times == SCALE else reader()
    # the flags stay set inside the reader, so every call names all three
    found = eye(np.asarray(large)[:, :, ::-1], use_det=True, use_cls=False, use_rec=True)
    if found.txts is None:
        return []
    boxes = []
    for corners in np.asarray(found.boxes, dtype=np.float64) / times - MARGIN:  # (4, 2)
        (left, _), (width, height) = corners.min(0), np.ptp(corners, axis=0)
        middle = corners[:, 1].mean()  # of a slanted box the middle of its row, not of its extent
        boxes.append((float(left), float(middle - height / 2), float(width), float(height)))
    return list(zip(boxes, found.txts, strict=True))


def read_boxes(image: Image, boxes: Sequence[Box]) -> list[str]:
    """What the recogniser alone reads in the given boxes, one line each; "" where it reads nothing."""
    lines = []
    for part in cut_lines(image, boxes, LINE_HEIGHT):
        found = reader(FINDER)(np.asarray(part)[:, :, ::-1], use_det=False, use_cls=False, use_rec=True)
        lines.append(squeeze("".join(found.txts or ())))
    return lines


def cut_lines(image: Image, boxes: Sequence[Box], height: int) -> list[Image]:
    """The boxes with a margin around them, each brought to `height` pixels. RGB."""
    from PIL import Image as Pillow

    parts, plain = [], image.convert("RGB")
    for left, top, wide, high in boxes:
        margin = round(LINE_MARGIN * high)
        part = plain.crop((left - margin, top - margin, left + wide + margin, top + high + margin))
        size = (max(1, round(part.width * height / part.height)), height)
        parts.append(part.resize(size, Pillow.Resampling.BICUBIC))
    return parts


def squeeze(text: str) -> str:
    """Without white space."""
    return re.sub(r"\s+", "", text)
