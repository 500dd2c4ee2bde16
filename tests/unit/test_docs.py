"""The documents tell the truth: the command reference, the file tree, every link, command and snippet are checked."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import typer
from PIL import Image

import lanting
from fakes import FakeEngine
from lanting import Engine, Progress, Recipe, Request, Result
from lanting.cli.chinese import told
from lanting.cli.main import command_line, main
from lanting.core.types import TASK_NAMES
from lanting.specs import get_spec, settle, spec_names

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lanting"
CARD = PACKAGE / "nano" / "CARD.md"
PAGES = sorted(
    [
        *ROOT.glob("README*.md"),
        *ROOT.glob("CONTRIBUTING*.md"),
        CARD,
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("docs/adr/*"),
    ]
)
PAIRS = [(name, str(Path(name).with_suffix(".zh.md"))) for name in ("README.md", "CONTRIBUTING.md")] + [
    (path.relative_to(ROOT).as_posix(), path.with_suffix(".zh.md").relative_to(ROOT).as_posix())
    for path in sorted((ROOT / "docs").glob("*.md"))
    if path.name != "LOG.md" and not path.name.endswith(".zh.md")
]
OWN_UNITS = ("docs/how-it-works.md",)  # its Chinese counts in 万 and 亿
NOT_A_FILE = re.compile(r"[a-z]+:|#")  # https:, mailto:, a place on the same page


def text(page: Path | str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path | str, language: str = "") -> list[str]:
    """The fenced code blocks of a page, of one language or of all."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)
    return [code for kind, code in found if language in ("", kind)]


def prose(page: Path | str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)


def squeezed(words: str) -> str:
    return re.sub(r"\s+", "", words)


# ---------------------------------------------------------------- the command reference
@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """docs/make_cli.py as a module."""
    return script("make_cli")


@cache
def script(name: str) -> ModuleType:
    """A script of docs as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("language", "page"), [("en", "docs/cli.md"), ("zh", "docs/cli.zh.md")])
def test_the_command_reference_is_up_to_date(maker, language, page):
    assert text(page) == maker.page(language), "run: python docs/make_cli.py"


@pytest.mark.parametrize(("language", "page"), [("en", "docs/devices.md"), ("zh", "docs/devices.zh.md")])
def test_the_page_of_devices_is_what_the_planner_says(language, page):
    assert text(page) == script("make_devices").page(language), "run: python docs/make_devices.py"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_command_reference_agrees_with_help(maker, capsys, monkeypatch, language):
    """Every flag and sentence of the page is in the real --help, and no flag of --help is missing on the page."""
    monkeypatch.setenv("LANTING_LANG", language)
    words = told if language == "zh" else str
    for name, verb in maker.verbs():
        assert main([*name.split(), "--help"]) == 0
        printed = capsys.readouterr().out
        seen, section = squeezed(printed), maker.section(name, verb, language)
        assert squeezed(words(str(inspect.getdoc(verb)))) in seen
        declared = {"--help", "-h"}
        for _, _, info in maker.parameters(verb):
            assert squeezed(words(info.help)) in seen
            assert f"| {words(info.help)} |" in section
            declared |= set(maker.flags(info)) if hasattr(info, "prompt") else set()
        options = re.split("Options:|选项：", printed)[1]
        names = re.sub(r"  [A-Z\u4e00-\u9fff].*", "", options)  # what begins with a flag is no sentence
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", names)) <= declared
        assert all(f"`{flag}`" in section for flag in declared - {"--help", "-h"})


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """(page, words after `lanting`) of every command that a page shows."""
    for page in PAGES:
        for code in blocks(page, "sh"):
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["lanting"]:
                    yield name_of(page), words[1:]


def test_every_command_shown_can_be_typed():
    """Its verb and flags exist and its values have the right type; nothing is run."""
    commands = typer.main.get_command(command_line())
    shown = list(command_lines())
    assert len(shown) > 20
    for page, words in shown:
        here, rest = commands, list(words)
        context = here.make_context("lanting", [], resilient_parsing=True)
        while rest and hasattr(here, "commands") and not rest[0].startswith("-"):
            assert rest[0] in here.commands, f"{page}: lanting {' '.join(words)}"  # type: ignore[attr-defined]
            here = here.commands[rest.pop(0)]  # type: ignore[attr-defined]
        if not hasattr(here, "commands"):
            here.make_context("lanting", rest, parent=context)


# ---------------------------------------------------------------- the Python reference
def test_the_python_reference_names_everything_public():
    page = text("docs/python.md")
    for name in lanting.__all__:
        assert f"`{name}" in page, name
    for value in (Request, Recipe, Progress, Result):
        for field in fields(value):
            assert f"`{field.name}`" in page, f"{value.__name__}.{field.name}"
    for name in (*TASK_NAMES, *spec_names()):
        assert f"`{name}`" in page, name


def test_the_signatures_in_the_python_reference_are_the_real_ones():
    page = text("docs/python.md")
    for method in (Engine.open, Engine.run, Engine.stream):
        names = [name for name in inspect.signature(method).parameters if name != "self"]
        shown = re.search(rf"^Engine\.{method.__name__}\((.*?)\) ->", page, re.MULTILINE | re.DOTALL)
        shown = shown or re.search(rf"^engine\.{method.__name__}\((.*?)\) ->", page, re.MULTILINE | re.DOTALL)
        assert shown, method.__name__
        assert re.findall(r"(\w+)(?=:)", re.sub(r'"[^"]*"', "", shown[1])) == names


def opened(model: str = "nano", **options: object) -> FakeEngine:
    """What `Engine.open` gives in snippets: names, values and requests are checked, nothing is drawn."""
    inspect.signature(Engine.open).bind(model, **options)

    class Settling(FakeEngine):
        def stream(self, request, previews=False):
            settled = settle(request, self.spec)
            small = {key: value for key, value in settled.options.items() if key == "layers"}
            return super().stream(replace(settled, options=small), previews)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

    return Settling(spec=get_spec(model))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_snippets_run(page, tmp_path, monkeypatch, capsys):
    """All snippets of a page, one after another as a reader would type them, over an engine that draws nothing."""
    monkeypatch.setattr("lanting.engine.Engine.open", opened)
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "dog.png", "photo.png", "poster.png", "edges.png"):
        Image.new("RGB", (96, 64), "orange").save(name)
    Image.new("L", (96, 64), 255).save("mask.png")
    scope: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(compile(code, name_of(page), "exec"), scope)


# ---------------------------------------------------------------- trees, links, translations
def tree_of(page: str) -> set[str]:
    """Paths of the file tree at the end of a README, below src/lanting; two spaces of indent are one level."""
    found, folders = set(), []
    for line in blocks(page)[-1].splitlines():
        if not line.strip():
            continue
        depth, entry = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], entry]
        if not entry.endswith("/") or not any(True for _ in (PACKAGE / "".join(folders[1:])).glob("*.py")):
            found.add("".join(folders[1:]))
    return found - {""}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_file_tree_is_the_real_one(page):
    """Every module and release by name; folders without code (fonts, templates, weights) as one line."""
    real = {
        path.relative_to(PACKAGE).as_posix()
        for pattern in ("**/*.py", "**/*.toml")
        for path in PACKAGE.glob(pattern)
        if path.name != "__init__.py" or path.parent == PACKAGE
    }
    shown = tree_of(page)
    assert real - shown == set(), "files that the tree lacks"
    assert {entry for entry in shown - real if not (PACKAGE / entry).exists()} == set(), "files that are gone"


def anchor(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for target in links(name_of(page)):
        if NOT_A_FILE.match(target):
            continue
        where, _, place = target.partition("#")
        path = (page.parent / where).resolve()
        known = path.exists() and (
            not place or place in {anchor(h) for h in re.findall(r"^#+ (.+)$", text(path), re.MULTILINE)}
        )
        broken += [] if known else [target]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_waits_to_be_filled_in(page):
    assert "FILL" not in text(page)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_translations_have_the_same_shape(english, chinese):
    """As many headings of each level in the same order, the same code (comments apart), the same tables and links."""
    levels = [[len(mark) for mark in re.findall(r"^(#+) ", prose(page), re.MULTILINE)] for page in (english, chinese)]
    assert levels[0] == levels[1]
    codes = [[re.sub(r" *#.*", "", code) for code in blocks(page)] for page in (english, chinese)]
    last = -1 if english == "README.md" else len(codes[0])  # the tree's descriptions are translated
    assert codes[0][:last] == codes[1][:last]
    rows = [len(re.findall(r"^\|", prose(page), re.MULTILINE)) for page in (english, chinese)]
    assert rows[0] == rows[1]
    assert re.search(r"[\u4e00-\u9fff]{4}", prose(chinese))


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_translations_have_the_same_links_and_figures(english, chinese):
    """A translation leads to the same places, in its own language where that is written, and says the same numbers."""
    sides = [[linked(page, target) for target in links(page)] for page in (english, chinese)]
    assert set(sides[0]) == set(sides[1])
    strangers = [t for t in links(chinese) if t != Path(english).name and not t.startswith("#")]
    assert [t for t in strangers if linked(chinese, t) in dict(PAIRS) and ".zh.md" not in t] == []
    if english not in OWN_UNITS:
        assert figures(english) == figures(chinese)


def links(page: str) -> list[str]:
    return re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", prose(page))


def linked(page: str, target: str) -> str:
    """What a link leads to, as the name of the English page: addresses as they are, places on a page aside."""
    if re.match(r"[a-z]+:", target):
        return target
    where = target.partition("#")[0]
    path = (ROOT / page).parent / where if where else ROOT / page
    return path.resolve().relative_to(ROOT).as_posix().replace(".zh.md", ".md")


def figures(page: str) -> set[str]:
    """Numbers in digits, those in addresses aside."""
    return set(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"\]\([^)]*\)", "]", prose(page))))


def test_decisions_are_numbered_and_short():
    """Each has its four parts in about twenty lines."""
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        words = text(path)
        assert re.findall(r"^## (.+)$", words, re.MULTILINE) == ["Context", "Choice", "Rejected", "How to reverse"]
        assert len(words.splitlines()) <= 30, path.name
