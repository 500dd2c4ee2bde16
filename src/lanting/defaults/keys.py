"""The keys there are: what each stands for, and which values it may have. The only list of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lanting.core.errors import OutputError, RequestError
from lanting.core.quality import NAMES as QUALITIES

Value = str | int
DRAWING = ("generate", "edit", "layers")
LANGUAGES = ("en", "zh")
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class Key:
    """One default. `name`: as in the file; `flag`: what it stands for; `verbs`: whose flag that is.

    check  what is kept of a value, as a file has it (text or a whole number), or a RequestError; asks no disk
    """

    name: str
    flag: str
    verbs: tuple[str, ...]
    check: Callable[[object], Value]
    built_in: str = ""

    @property
    def parameter(self) -> str:
        """The last part of the name, which is also what the verb calls it."""
        return self.name.rpartition(".")[2]


def words(value: object) -> str:
    """Text that says something."""
    if not isinstance(value, str):
        raise RequestError("it must be text in quotation marks, not {value}", value=value)
    if not value.strip() or not value.isprintable():
        raise RequestError("it must be text that can be printed, not {value}", value=repr(value))
    return value.strip()


def one_of(value: object, names: tuple[str, ...]) -> str:
    text = words(value)
    if text not in names:
        near = nearest(text.lower(), names)
        raise RequestError(
            "{value} is none of {names}; did you mean {near}?", value=text, names=", ".join(names), near=near
        )
    return text


def device(value: object) -> str:
    """What `--device` takes, whether it is here or not."""
    from lanting.plan.devices import names_of

    text = words(value)
    for name in names_of(text, 1):
        if not DEVICE.fullmatch(name):
            near = nearest(name.lower(), ("cpu", "cuda", "cuda:0", "cuda:1", "mps"))
            raise RequestError("there is no device {name}; did you mean {near}?", name=name, near=near)
    return text


def amount(value: object) -> str:
    """Memory, as 12G."""
    from lanting.plan.machine import parse_bytes

    text = words(value)
    parse_bytes(text)
    return text


def port(value: object) -> int:
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) > 65535:
        raise RequestError("a port is a whole number from 0 to 65535, not {value}", value=repr(value))
    return int(text)


def quality(value: object) -> str:
    return one_of(value, QUALITIES)


def lang(value: object) -> str:
    return one_of(value, LANGUAGES)


def host(value: object) -> str:
    text = words(value)
    if not re.fullmatch(r"[\w.:%-]+", text):
        raise RequestError("{value} is no address to listen on: use 127.0.0.1, or 0.0.0.0 for all", value=repr(text))
    return text


KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        Key("model", "--model", (*DRAWING, "plan", "serve"), words, "nano"),
        Key("device", "--device", (*DRAWING, "plan", "serve"), device),
        Key("vram", "--vram", (*DRAWING, "plan", "serve"), amount),
        Key("ram", "--ram", (*DRAWING, "plan", "serve"), amount),
        Key("quality", "--quality", DRAWING, quality, "exact"),
        Key("output", "--output", DRAWING, words),
        Key("lang", "LANTING_LANG", (), lang),
        Key("generate.model", "--model", ("generate",), words),
        Key("edit.model", "--model", ("edit",), words),
        Key("layers.model", "--model", ("layers",), words, "qwen-image-layered"),
        Key("serve.model", "--model", ("serve",), words),
        Key("serve.device", "--device", ("serve",), device),
        Key("serve.vram", "--vram", ("serve",), amount),
        Key("serve.ram", "--ram", ("serve",), amount),
        Key("serve.host", "--host", ("serve",), host, "127.0.0.1"),
        Key("serve.port", "--port", ("serve",), port, "8353"),
    )
}


def nearest(word: str, names: tuple[str, ...]) -> str:
    """The most similar name; the last part of a dotted one counts, too."""
    tail = word.rpartition(".")[2]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return tail if tail in names else close[0] if close else names[0]


def key_named(name: str) -> Key:
    """Raises RequestError with the nearest one."""
    if name in KEYS:
        return KEYS[name]
    raise RequestError("there is no key {key}; did you mean {near}?", key=name, near=nearest(name, tuple(KEYS)))


def settled(key: Key, text: str) -> Value:
    """What is written down of a value that a person types: places in full, so that they hold in every folder. Raises
    LantingError for a model that nobody knows and for a folder that is not there."""
    try:
        value = key.check(text)
    except RequestError as error:
        raise wrong_value(key.name, error) from None
    if key.parameter == "model":
        return model_meant(str(value))
    if key.parameter == "output":
        folder = Path(str(value)).expanduser()
        if not folder.is_dir():
            raise OutputError("the folder {folder} does not exist: make it first, or write elsewhere", folder=folder)
        return str(folder.resolve())
    return value


def wrong_value(name: str, error: RequestError) -> RequestError:
    """What is wrong with the value of a key."""
    from lanting.core.lang import explain

    return RequestError("{key}: {reason}", key=name, reason=explain(error))


def model_meant(name: str) -> str:
    """A release, a repository, or the full path of what is here."""
    from lanting.specs import get_spec, spec_names
    from lanting.weights.home import REPO, file_in

    if name in spec_names():
        return name
    path = Path(name).expanduser()
    if path.exists():
        return str(path.resolve())
    if not REPO.fullmatch(name) and file_in(name) is None:
        if "/" in name or "\\" in name:
            raise RequestError("{path} does not exist", path=name)
        get_spec(name)  # raises, naming the closest ones
    return name
