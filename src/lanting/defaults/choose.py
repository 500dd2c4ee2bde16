"""What a command gets of the defaults: for every verb the values of its flags, as the parser of flags takes them.

A general model counts for a verb only if it can do that verb's task; what can't be told (a folder that is gone) counts,
so that it is said rather than passed over. `replay` gets nothing, since the recipe decides, and neither do verbs that
train, measure or pack.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lanting.core.errors import LantingError, RequestError
from lanting.defaults.file import Content, config_path, load
from lanting.defaults.keys import KEYS, Value, nearest, wrong_value

MODEL = "LANTING_MODEL"
CONFIG = "lanting config"  # the two places that a default comes from, as a person would look for them
NEEDS = {"generate": "text_to_image", "edit": "edit", "layers": "layered"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A default that holds, and where it comes from: MODEL or CONFIG."""

    value: Value
    source: str


@dataclass(frozen=True, slots=True)
class Defaults:
    """A person's own: checked values of the file by keys, and the model that the environment names ("": none)."""

    values: Mapping[str, Value]
    model: str = ""

    def choice(self, verb: str, parameter: str) -> Choice | None:
        """What holds for a verb's parameter where no flag is given; None: what is built in."""
        if parameter == "model" and self.model and able(verb, self.model):
            return Choice(self.model, MODEL)
        own = self.values.get(f"{verb}.{parameter}")
        if own is not None:
            return Choice(own, CONFIG)
        general = self.values.get(parameter)
        if general is None or verb not in KEYS[parameter].verbs:
            return None
        return Choice(general, CONFIG) if parameter != "model" or able(verb, str(general)) else None

    def of(self, verb: str) -> dict[str, Any]:
        """Defaults of a verb's parameters, as the parser of flags takes them."""
        parameters = dict.fromkeys(key.parameter for key in KEYS.values() if verb in key.verbs)
        found = {name: choice.value for name in parameters if (choice := self.choice(verb, name)) is not None}
        given: dict[str, Any] = {name: placed(name, value) for name, value in found.items()}
        if verb == "serve" and "model" in given:
            given["model"] = [given["model"]]  # its flag may be repeated
        return given


def placed(parameter: str, value: Value) -> Value:
    """Places begin at the home folder where they say so, and a place for pictures is a folder whether it is there or
    not."""
    if parameter == "output":
        return os.path.join(os.path.expanduser(str(value)), "")
    return os.path.expanduser(value) if parameter == "model" and isinstance(value, str) else value


def able(verb: str, model: str) -> bool:
    """Whether a model can do what a verb is for. Configs are read, and nothing of the weights."""
    return verb not in NEEDS or (tasks := tasks_of(model)) is None or NEEDS[verb] in tasks


def tasks_of(model: str) -> tuple[str, ...] | None:
    """None where there is no such model here."""
    from lanting.specs import get_spec, spec_names

    if model in spec_names():
        return get_spec(model).tasks
    from lanting.weights.find import locate

    try:
        return locate(os.path.expanduser(model)).spec.tasks
    except (LantingError, OSError, ValueError):
        return None


def problems(content: Content) -> Iterator[LantingError]:
    """All that is wrong with a file: what can't be read, keys nobody knows, values that can't be."""
    if content.broken is not None:
        yield content.broken
    for name, value in content.values.items():
        try:
            checked(name, value)
        except RequestError as error:
            yield located(content, name, error)


def checked(name: str, value: object) -> Value:
    if name not in KEYS:
        near = nearest(name, tuple(KEYS))
        raise RequestError(
            "there is no key {key}; did you mean {near}? 'lanting config --unset {key}' removes it", key=name, near=near
        )
    try:
        return KEYS[name].check(value)
    except RequestError as error:
        raise wrong_value(name, error) from None


def located(content: Content, name: str, error: LantingError) -> RequestError:
    """A sentence with the place it is about in front."""
    from lanting.core.lang import explain

    line = content.lines.get(name)
    if line is None:
        return RequestError("{path}: {reason}", path=content.path, reason=explain(error))
    return RequestError("{path}, line {line}: {reason}", path=content.path, line=line, reason=explain(error))


def defaults(content: Content, environ: Mapping[str, str] | None = None) -> Defaults:
    """Of a file and the environment. Raises the first of its problems."""
    for problem in problems(content):
        raise problem
    return sound(content, environ)


def sound(content: Content, environ: Mapping[str, str] | None = None) -> Defaults:
    """Of what is right in a file, the rest left out."""
    env = os.environ if environ is None else environ
    values: dict[str, Value] = {}
    for name, value in content.values.items():
        try:
            values[name] = checked(name, value)
        except RequestError:
            continue
    return Defaults(values, env.get(MODEL, "").strip())


def said(environ: Mapping[str, str] | None = None) -> Content | None:
    """The file's content; None where a person has said nothing, there or in LANTING_MODEL."""
    env = os.environ if environ is None else environ
    path = config_path(env)
    there = os.path.exists(path)
    return load(path) if there else Content(path) if env.get(MODEL) else None


def language_of(content: Content) -> str:
    """That the file asks for, also where the rest of it is wrong; "" where it asks for none."""
    return str(sound(content).values.get("lang", ""))


@contextmanager
def speak(lang: str) -> Iterator[None]:
    """Within it LANTING_LANG is set, for child processes too, where it was not and there is a language to speak."""
    if not lang or os.environ.get("LANTING_LANG"):
        yield
        return
    before = os.environ.get("LANTING_LANG")
    os.environ["LANTING_LANG"] = lang
    try:
        yield
    finally:
        if before is None:
            del os.environ["LANTING_LANG"]
        else:
            os.environ["LANTING_LANG"] = before
