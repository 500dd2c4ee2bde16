"""Write docs/cli.md and docs/cli.zh.md from the verbs: `python docs/make_cli.py`. A test compares them with the code.

The words come from the same declarations that `--help` prints, and the test also looks each of them up in the real
`--help`. Rejected: pasting help screens, whose line breaks and type names change with every version of typer.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from lanting.cli.chinese import told
from lanting.cli.main import command_line

FOLDER = Path(__file__).parent
PAGES = {"en": "cli.md", "zh": "cli.zh.md"}
HEAD = {
    "en": """\
# The command line

[中文](cli.zh.md)

<!-- Written by docs/make_cli.py; change the verbs in src/lanting/cli, then run it. -->

`lanting VERB --help` prints what stands here. `python -m lanting` is the same program. `lanting --version` prints the
version.

**Where things go.** Results go to stdout, progress and remarks to stderr. With `--quiet` a verb prints the bare
result (paths, names), with `--json` one JSON object, also for a failure: `{"error": ..., "kind": ...}`.

**Exit codes.** 0 done; 2 the request, a file or a model was wrong; 1 we failed; 130 cancelled with Ctrl-C. Whatever
the code, no half-written picture is left. A failure is one sentence; `--debug` adds the traceback.

**Environment.**

| variable | meaning |
|---|---|
| `LANTING_LANG` | `en` or `zh`; otherwise the locale decides |
| `LANTING_MODEL` | the model where no `--model` is given, for verbs whose task it can do |
| `LANTING_CONFIG` | file of [your defaults](guide.md#defaults-of-your-own); default `~/.config/lanting/config.toml` |
| `LANTING_HOME` | where `pull` keeps models; default `~/.cache/lanting` |
| `HF_HOME`, `HF_HUB_CACHE` | the Hugging Face cache, whose models are found and used where they are |
| `HF_ENDPOINT`, `MODELSCOPE_ENDPOINT` | another address of the hub |
| `HF_TOKEN` | sent to the hub that is asked; a token saved by `hf auth login` goes to Hugging Face alone |
| `HF_HUB_OFFLINE` | 1: ask nobody, as `--offline` |
""",
    "zh": """\
# 命令行

[English](cli.md)

<!-- 由 docs/make_cli.py 写成；请修改 src/lanting/cli 里的动词和 core/zh_help.toml，然后运行它。 -->

这里的内容就是 `lanting VERB --help` 显示的。`python -m lanting` 是同一个程序。`lanting --version` 显示版本号。

**输出到哪里。** 结果写到标准输出，进度和提示写到标准错误。加 `--quiet`，动词只输出结果本身（路径、名字）；
加 `--json`，只输出一个 JSON 对象，失败时也一样：`{"error": ..., "kind": ...}`。

**退出码。** 0：完成；2：请求、文件或模型有问题；1：程序自己失败；130：按 Ctrl-C 取消。无论哪一种，
都不会留下写了一半的图片。失败时只说一句话；加 `--debug` 则另外显示调用栈。

**环境变量。**

| 变量 | 含义 |
|---|---|
| `LANTING_LANG` | `en` 或 `zh`；不设就看系统的区域设置 |
| `LANTING_MODEL` | 不给 `--model` 时用的模型，只用于它能做的动词 |
| `LANTING_CONFIG` | [自己的默认值](guide.zh.md#自己的默认值)放在哪个文件；默认 `~/.config/lanting/config.toml` |
| `LANTING_HOME` | `pull` 把模型放在哪里；默认 `~/.cache/lanting` |
| `HF_HOME`、`HF_HUB_CACHE` | Hugging Face 的缓存，里面的模型找得到，就地使用 |
| `HF_ENDPOINT`、`MODELSCOPE_ENDPOINT` | 模型站的另一个地址 |
| `HF_TOKEN` | 发给所访问的模型站；`hf auth login` 存下的令牌只发给 Hugging Face |
| `HF_HUB_OFFLINE` | 1：不联网，与 `--offline` 相同 |
""",
}
EXAMPLES = {
    "generate": (
        "lanting generate 'A blue sign that says \"HELLO\"' --seed 7 -o hello.png",
        "lanting generate 'a red sign with white text \"Fresh Bread\"' --size 1:1 --count 4",
        'lanting generate "a lighthouse at dusk" --model qwen-image-2512 --size 16:9 --steps 30',
        'lanting generate "a fox in the snow" --model qwen-image --lora ink.safetensors:0.8',
    ),
    "edit": (
        'lanting edit cat.png "give it a red scarf" --model qwen-image-edit-2511',
        'lanting edit cat.png dog.png "the cat and the dog share a sofa" --model qwen-image-edit-2511',
        'lanting edit photo.png "an empty bench" --mask mask.png --model qwen-image --strength 0.9',
    ),
    "quantize": (
        "lanting quantize qwen-image --to int4 -o qwen-image-int4.safetensors",
        "lanting quantize qwen-image --to q4_k_m -o qwen-image-Q4_K_M.gguf",
        "lanting quantize qwen-image --component text_encoder --to int8 -o reader-int8.safetensors",
    ),
    "layers": ("lanting layers poster.png --layers 3 -o layers/", "lanting layers poster.png -o poster.psd"),
    "finish": (
        "lanting generate 'a tea house in the mist' --model qwen-image-2512 --draft --count 4",
        "lanting finish a-tea-house-in-the-mist-7.png",
    ),
    "replay": ("lanting replay hello.png",),
    "list": ("lanting list",),
    "plan": (
        "lanting plan qwen-image-2512",
        "lanting plan qwen-image-edit-2511 --references 2 --device 'RTX 4070' --ram 32G",
        "lanting plan nano --size 1024x1024 --ram 500M",
    ),
    "pull": ("lanting pull qwen-image-2512", "lanting pull qwen-image-2512 --dry-run"),
    "show": ("lanting show qwen-image-2512", "lanting show lora.safetensors --json", "lanting show --machine"),
    "lora show": ("lanting lora show ink.safetensors", "lanting lora show ink.safetensors --model qwen-image --json"),
    "remove": ("lanting remove qwen-image-2512",),
    "bench": ("lanting bench --quick", "lanting bench --only layer,vae --threads 1 --json bench.json"),
    "doctor": ("lanting doctor", "lanting doctor --json"),
    "config": (
        "lanting config",
        "lanting config model qwen-image-2512",
        "lanting config edit.model qwen-image-edit-2511",
        "lanting config --unset edit.model",
    ),
    "serve": (
        "lanting serve",
        "lanting serve --model qwen-image-2512 --lora ink.safetensors --port 8353",
        "lanting serve --host 0.0.0.0 --allow-host pictures.example.com",
    ),
    "keys create": ("lanting keys create Anna", "lanting keys create 'nightly batch' --share 0.5 --priority low"),
    "keys list": ("lanting keys list",),
    "keys revoke": ("lanting keys revoke Anna",),
    "train nano": ("lanting train nano --folder runs/nano",),
    "train lora": (
        "lanting train lora slates -o slate.safetensors --batch 4 --steps 300 --lr 1e-3",
        "lanting train lora photos --model qwen-image-2512 --trigger 'zxq dog' --vram 24G -o dog.safetensors",
    ),
    "train lightning": ("lanting train lightning --model runs/nano/nano -o lightning.safetensors",),
    "eval text": (
        "lanting eval text",
        "lanting eval text --lang zh --set random -n 400 -o zh/",
        "lanting eval text --model qwen-image-2512 --set posters -n 50 --steps 30",
    ),
    "eval follow": ("lanting eval follow --concepts 1000 -n 400",),
    "eval edit": ("lanting eval edit --kinds rewrite,ground,add -n 60",),
}
WORDS = {
    "en": {int: "number", float: "number", str: "text", Path: "path"},
    "zh": {int: "数", float: "数", str: "文字", Path: "路径"},
}
BETWEEN = {"en": ", ", "zh": "、"}
REPEATABLE = {"en": ", repeatable", "zh": "，可重复"}
COLUMNS = {"en": "| | value | default | |", "zh": "| | 值 | 默认 | |"}


def verbs(group: Any = None, path: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """("train nano", function) of every verb, in the order of `--help`."""
    group = group or command_line()
    for command in group.registered_commands:
        yield f"{path}{command.name}", command.callback
    for inner in group.registered_groups:
        yield from verbs(inner.typer_instance, f"{path}{inner.name} ")


def parameters(verb: Callable[..., Any]) -> Iterator[tuple[inspect.Parameter, type, Any]]:
    """(parameter, its type, typer's declaration) of a verb."""
    hints = typing.get_type_hints(verb, include_extras=True)
    for parameter in inspect.signature(verb).parameters.values():
        hint, info = typing.get_args(hints[parameter.name])[:2]
        if isinstance(hint, types.UnionType):  # X | None: the flag may be left out
            hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        yield parameter, hint, info


def flags(info: OptionInfo) -> list[str]:
    """The long name first; what turns a flag on, then what turns it off."""
    return [name for each in (str(info.default), *(info.param_decls or ())) for name in each.split("/")]


def kind(hint: Any, language: str = "en") -> str:
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return BETWEEN[language].join(f"`{choice.value}`" for choice in hint)
    if typing.get_origin(hint) is list:
        return f"{kind(typing.get_args(hint)[0], language)}{REPEATABLE[language]}"
    return "" if hint is bool else WORDS[language][hint]


def default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is None or value is False or value == "" or value is inspect.Parameter.empty:
        return ""
    shown = value.value if isinstance(value, StrEnum) else f"{value:g}" if isinstance(value, float) else value
    return f"`{shown}`"


def section(name: str, verb: Callable[..., Any], language: str = "en") -> str:
    """One verb: what it does, its usage, its arguments and flags, examples."""
    in_words = told if language == "zh" else str
    words, rows = [], []
    for parameter, hint, info in parameters(verb):
        value = kind(hint, language)
        if isinstance(info, ArgumentInfo):
            metavar = info.metavar or parameter.name.upper()
            words.append(metavar)
            rows.append(f"| `{metavar}` | {value.removesuffix(REPEATABLE[language])} | | {in_words(info.help)} |")
        else:
            shown = BETWEEN[language].join(f"`{flag}`" for flag in flags(info))
            rows.append(f"| {shown} | {value} | {default(parameter)} | {in_words(info.help)} |")
    usage = " ".join(["lanting", name, "[OPTIONS]", *words])
    table = "\n".join([COLUMNS[language], "|---|---|---|---|", *rows])
    examples, doc = "\n".join(EXAMPLES[name]), in_words(inspect.getdoc(verb))
    return f"## `lanting {name}`\n\n{doc}\n\n```text\n{usage}\n```\n\n{table}\n\n```sh\n{examples}\n```\n"


def page(language: str = "en") -> str:
    """The whole of docs/cli.md, or of docs/cli.zh.md."""
    return "\n".join([HEAD[language], *(section(name, verb, language) for name, verb in verbs())])


if __name__ == "__main__":
    for language, name in PAGES.items():
        (FOLDER / name).write_text(page(language), encoding="utf-8")
        print(f"wrote {FOLDER / name}")
