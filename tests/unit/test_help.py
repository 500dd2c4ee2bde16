"""`--help` and complaints about a command line in Chinese: complete, true to the English, laid out for wide letters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from lanting.cli.chinese import columns, complaint, in_chinese, told, wrap
from lanting.cli.main import TOLD, command_line, main
from lanting.core.lang import chinese_help

EXACT = (  # what is the same in both languages: flags, numbers, quoted and code, names of files and components
    r"(?<![\w-])--?[a-z][a-z-]*",
    r"\d+(?:[.,]\d+)*",
    r"'[^']*'(?!\w)|`[^`]*`",
    r"\b[a-z]+(?:_[a-z0-9]+)+\b|\.[a-z]{3,}\b|\b[A-Z]{3,}[_/]\w+",
)
CLOSING = "，。；：！？、）”》"


def commands(command: Any = None, path: str = "") -> Iterator[tuple[str, Any]]:
    """("train nano", command) of every page; the program itself is ""."""
    command = command or get_command(command_line())
    yield path.strip(), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


PATHS = [path for path, _ in commands()]


def sentences() -> set[str]:
    """Every paragraph and sentence of our own that a page may show."""
    found = set(TOLD.values())
    for _, command in commands():
        found |= {" ".join(paragraph.split()) for paragraph in inspect.cleandoc(command.help).split("\n\n")}
        found |= {" ".join(parameter.help.split()) for parameter in command.params if getattr(parameter, "help", None)}
    return found


@pytest.fixture
def page(capsys, monkeypatch):
    def shown(path: str, language: str = "zh", width: int = 80) -> str:
        monkeypatch.setenv("LANTING_LANG", language)
        monkeypatch.setenv("COLUMNS", str(width))
        assert main([*path.split(), "--help"]) == 0
        return capsys.readouterr().out

    return shown


def test_every_sentence_of_help_is_translated_and_none_is_left_over():
    words, used = chinese_help()["words"], sentences()
    assert len(used) > 150
    assert sorted(used - set(words)) == []
    assert sorted(set(words) - used) == []


@pytest.mark.parametrize("form", EXACT)
def test_flags_numbers_and_code_are_the_same(form):
    for english, translated in chinese_help()["words"].items():
        assert set(re.findall(form, english)) == set(re.findall(form, translated, re.ASCII)), english


def test_the_chinese_is_chinese():
    """Its marks are Chinese, and a space parts it from Latin letters and digits."""
    for table in chinese_help().values():
        for translated in table.values():
            assert not re.search(r"[\u4e00-\u9fff][,;:!?()]|[,;!?(][\u4e00-\u9fff]", translated), translated
            glued = re.search(r"[\u4e00-\u9fff][A-Za-z0-9'`]|[A-Za-z0-9'`][\u4e00-\u9fff]", translated)
            assert not glued or "宽x高" in translated, translated


@pytest.mark.parametrize("path", PATHS)
def test_nothing_english_is_left_on_a_page(page, path):
    """No two English words in a row, but for commands to type; of typer's frame none at all."""
    shown = page(path)
    frame = chinese_help()["frame"]
    assert not re.search(rf"^({'|'.join(frame)})\b|\[({'|'.join(frame)})\b", shown, re.MULTILINE)
    body = re.sub(r"(?m)^  -.*?(?:  |$)|'[^']*'", "", shown.split("\n", 1)[1].replace("lanting generate", ""))
    assert not re.search(r"\b[A-Za-z]{2,} [a-z]{2,}\b", body)
    assert ("显示这些说明。" in shown) and shown.startswith("用法：lanting")


def test_the_frame_is_what_typer_writes(page):
    """A newer typer with other words is noticed."""
    shown = "".join(page(path, "en") for path in PATHS)
    for words in chinese_help()["frame"]:
        assert re.search(rf"^\s*{words}:|\s\s{words}$|[\[ ]{words}[:\]]", shown, re.MULTILINE), words


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("path", PATHS)
def test_lines_fit_and_columns_line_up(page, path, width):
    shown = page(path, "zh", width)
    widest = min(width, 80) - 2
    for line in shown.splitlines():
        assert columns(line) <= widest, line
        assert line == line.rstrip() and not line.strip().startswith(tuple(CLOSING)), line
    options, _, verbs = shown.partition("选项：")[2].partition("命令：")
    for part in (options, verbs):
        rows = [re.match(r"  (?:-.*?|\w+)  +(?=\S)| {6,}(?=\S)", line) for line in part.splitlines() if line]
        assert len({columns(row[0]) for row in rows if row}) <= 1, part


def test_wrapping_loses_nothing_and_breaks_at_no_mark():
    text = "编辑模型（见 'lanting list'）修改：vae=float32,transformer=bfloat16。“引号”里的字 [默认：nano；必填]"
    for width in range(4, 90):
        lines = wrap(text, width)
        assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
        assert all(columns(line) <= width for line in lines)
        if width >= 34:
            assert not any(line[0] in CLOSING or line[-1] in "（“《" for line in lines)
            assert any("transformer=bfloat16。" in line for line in lines)
    assert wrap("", 20) == [""]
    assert wrap("一二三四五六七八。", 16) == ["一二三四五", "六七八。"]  # no lone letter on the last line


def test_the_overview_is_that_of_the_verbs(page, capsys):
    """Word for word, though it reads none of them, and a line for each."""
    told_first = page("")
    command = get_command(command_line())
    in_chinese(command)
    command(["--help"], prog_name="lanting", standalone_mode=False)
    assert capsys.readouterr().out == told_first
    assert len(told_first.partition("命令：")[2].split("\n")) == len(TOLD) + 2


def test_the_locale_decides_and_english_stays(page, capsys, monkeypatch):
    before = page("generate", "en")
    assert "用文字画图。" in page("generate") and page("generate", "en") == before
    monkeypatch.delenv("LANTING_LANG")
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.delenv("LC_MESSAGES", raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert main(["lora"]) == 2
    assert capsys.readouterr().err.startswith("用法：lanting lora")


def test_words_without_an_entry_stay_english():
    assert told("Draw\n  pictures from words.\n\nWho knows?") == "用文字画图。\n\nWho knows?"
    assert complaint("Who knows?") is None


WRONG = {
    "frob": "没有命令 'frob'；请看 'lanting --help'",
    "generat": "没有命令 'generat'，相近的有 'generate'；请看 'lanting --help'",
    "generate x --stepps 3": "没有选项 --stepps，相近的有 --steps, --tries；请看 'lanting generate --help'",
    "train nano --qqqq": "没有选项 --qqqq；请看 'lanting train nano --help'",
    "train --": "缺少命令；请看 'lanting train --help'",
    "pull": "缺少参数 'NAME'；请看 'lanting pull --help'",
    "quantize nano": "缺少选项 '--to'；请看 'lanting quantize --help'",
    "generate x --steps": "选项 '--steps' 后面要有值；请看 'lanting generate --help'",
    "generate x --force=1": "选项 '--force' 后面不能有值；请看 'lanting generate --help'",
    "generate x y": "多出了参数 y；请看 'lanting generate --help'",
    "generate x --steps a": "'--steps' 的值无效：'a' 不是整数；请看 'lanting generate --help'",
    "eval text -n a": "'--number' / '-n' 的值无效：'a' 不是整数；请看 'lanting eval text --help'",
    "generate x --guidance a": "'--guidance' 的值无效：'a' 不是数；请看 'lanting generate --help'",
    "eval text -n 0": "'--number' / '-n' 的值无效：0 不在 1<=x<=10000 的范围内；请看 'lanting eval text --help'",
    "pull x --from y": "'--from' 的值无效：'y' 不是 'huggingface', 'modelscope' 之一；请看 'lanting pull --help'",
}


@pytest.mark.parametrize("line", WRONG)
def test_complaints(line, capsys, monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert main(line.split()) == 2
    assert capsys.readouterr().err == f"lanting: {WRONG[line]}\n"


def test_every_form_of_complaint_is_one_of_these():
    """No form in the table that nothing brings about any more."""
    told = [translated for translated in chinese_help()["complaints"].values()]
    forms = [re.sub(r"\\{\w+\\}", ".+", re.escape(translated)) for translated in dict.fromkeys(told)]
    for form in forms:
        assert any(re.search(form, complaint) for complaint in WRONG.values()), form
