"""Eyes: what stands in a picture, read by an optical reader that knows nothing of the model.

The reader is loaded by `lanting.reading.reader`; whether there is one is asked here, without any heavy library.
"""

from importlib.util import find_spec

from lanting.core.errors import LantingError


class MissingJudgeError(LantingError):
    """An optional package or program is not installed."""

    exit_code = 2


def can_read() -> bool:
    """Whether the reader is installed; loads nothing."""
    return find_spec("rapidocr") is not None and find_spec("onnxruntime") is not None


def check_reader() -> None:
    """Raises MissingJudgeError where nothing can read."""
    if not can_read():
        raise missing()


def missing() -> MissingJudgeError:
    return MissingJudgeError('Reading pictures needs rapidocr; install it with: pip install "lanting[eval]"')
