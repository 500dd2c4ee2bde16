"""Two independent optical readers behind one face: PP-OCR (rapidocr) and tesseract (its command line).

They share no code and no weights, so where both read a line it is legible, and where one fails alone the other says
whose fault it was. Rejected: a large vision-language model as the judge, which reads what should be there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from lanting.core.errors import ModelError
from lanting.reading import can_read
from lanting.reading.reader import Box, cut_lines, enlarged, read_boxes, read_lines

if TYPE_CHECKING:
    from PIL.Image import Image

TESSERACT_LANGUAGES = {"en": "eng", "zh": "chi_sim"}
TESSERACT_SCALE, TESSERACT_HEIGHT, WHITE = 2, 48, 16  # times for small pictures; pixels of a known line, of its margin
FAINT = 48  # grey levels: a ground with its texture and no letters spans less
PATIENCE = 60  # seconds for one picture


@dataclass(frozen=True)
class Judge:
    """A reader; language is "en" or "zh".

    read        (picture, language) -> the lines it finds, top to bottom
    read_boxes  (picture, boxes, language) -> one line for each box, "" where it reads nothing

    Both raise ModelError where the reader itself fails.
    """

    name: str
    read: Callable[[Image, str], list[str]]
    read_boxes: Callable[[Image, Sequence[Box], str], list[str]] = lambda image, boxes, language: [""] * len(boxes)


def judges(names: Sequence[str], language: str) -> tuple[list[Judge], list[str]]:
    """(the asked readers that are installed, the names of those that are not)."""
    ready = {"pp": can_read, "tesseract": lambda: language in tesseract_languages()}
    present = [name for name in names if ready[name]()]
    return [KNOWN[name] for name in present], [name for name in names if name not in present]


@cache
def tesseract_languages() -> frozenset[str]:
    """Which of our languages an installed tesseract reads; none where it is not installed."""
    program = shutil.which("tesseract")
    if program is None:
        return frozenset()
    listed = subprocess.run(
        [program, "--list-langs"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )
    known = set((listed.stdout + listed.stderr).split())
    return frozenset(ours for ours, theirs in TESSERACT_LANGUAGES.items() if theirs in known)


def read_with_tesseract(image: Image, language: str) -> list[str]:
    """Lines as tesseract finds them in one block of text (--psm 6); photographs it parts into ink and paper itself."""
    large, times = enlarged(image, TESSERACT_SCALE)
    return _tesseract(black_on_white(large) if times > 1 else large.convert("L"), language, page=6)


def read_boxes_with_tesseract(image: Image, boxes: Sequence[Box], language: str) -> list[str]:
    """What tesseract reads in the given boxes, each as a single line (--psm 7)."""
    parts = cut_lines(image, boxes, TESSERACT_HEIGHT)
    return ["".join(_tesseract(black_on_white(part), language, page=7)) for part in parts]


def _tesseract(image: Image, language: str, page: int) -> list[str]:
    low, high = image.getextrema()
    if low == high:  # on a bare strip it sees letters
        return []
    command = ["tesseract", "stdin", "stdout", "--psm", str(page), "-l", TESSERACT_LANGUAGES[language]]
    data = BytesIO()
    image.save(data, format="PNG")
    one_core = os.environ | {"OMP_THREAD_LIMIT": "1"}
    try:
        done = subprocess.run(
            command, input=data.getvalue(), capture_output=True, env=one_core, timeout=PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:  # no picture's fault: counted as unread it would be one
        told = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        reason = told[-1] if told else error
        raise ModelError("tesseract failed ({reason}); mend it, or read with --ocr pp alone", reason=reason) from None
    lines = done.stdout.decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def black_on_white(image: Image) -> Image:
    """Two levels parted where they differ most (Otsu), what most of the border is turned white, a white margin.

    Textures of the ground vanish so, which tesseract's own thresholds keep. All white where nothing stands out.
    """
    from PIL import Image as Pillow

    grey = np.asarray(image.convert("L"))
    if np.ptp(grey) < FAINT:
        return Pillow.new("L", image.size, 255)
    count = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, mass = count.cumsum() / grey.size, (count * np.arange(256)).cumsum() / grey.size
    spread = (mass[-1] * below - mass) ** 2 / np.maximum(below * (1 - below), 1e-9)
    dark = grey <= int(spread.argmax())
    border = np.concatenate((dark[0], dark[-1], dark[:, 0], dark[:, -1]))
    ink = ~dark if border.mean() > 0.5 else dark
    return Pillow.fromarray(np.pad(np.where(ink, 0, 255).astype(np.uint8), WHITE, constant_values=255))


KNOWN = {
    "pp": Judge("pp", lambda image, _: read_lines(image), lambda image, boxes, _: read_boxes(image, boxes)),
    "tesseract": Judge("tesseract", read_with_tesseract, read_boxes_with_tesseract),
}
