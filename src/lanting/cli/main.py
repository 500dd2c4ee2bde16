"""`lanting`: the verbs, and the one place where failures become a sentence and an exit code.

Exit codes: 0 done, 2 the request was wrong, 1 we failed, 130 cancelled. No traceback reaches a person without
--debug. Whether that and --json were asked is read from the arguments themselves, because a failure may come
before they are parsed.
"""

from __future__ import annotations

import _thread
import codecs
import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable
from contextlib import ExitStack
from importlib import import_module
from itertools import pairwise
from types import FrameType
from typing import Annotated, Any

import typer

from lanting.core.errors import LantingError
from lanting.core.lang import explain, language, say

# verb: the function, or the group of verbs, that does it; in the order of --help
VERBS = {
    "generate": "generate:generate",
    "edit": "edit:edit",
    "layers": "layers:layers",
    "finish": "finish:finish",
    "replay": "replay:replay",
    "list": "list:list_models",
    "plan": "plan:plan",
    "pull": "pull:pull",
    "show": "show:show",
    "quantize": "quantize:quantize",
    "remove": "remove:remove",
    "bench": "bench:bench",
    "doctor": "doctor:doctor",
    "config": "config:config",
    "serve": "serve:serve",
    "keys": "keys:keys",
    "lora": "lora:lora",
    "train": "train:train",
    "eval": "eval:eval_",
}


# what --help says of each without reading its module: how their own words begin, as far as a line goes
TOLD = {
    "generate": "Draw pictures from words.",
    "edit": "Change pictures by words.",
    "layers": "Take a picture apart into transparent layers, the lowest first.",
    "finish": "Draw a draft again with the whole model, every step.",
    "replay": "Draw a picture again from the recipe inside it: the same bits on the same machine.",
    "list": "List the releases, and every model that is on this machine.",
    "plan": "Say which ways of running a model fit, what each costs in memory, time and quality.",
    "pull": "Download a model.",
    "show": "Say what a model or a weights file is: tasks, parts, sizes, defaults.",
    "quantize": "Write a model's transformer or text encoder in fewer bits.",
    "remove": "Delete a downloaded model, finished or not.",
    "bench": "Measure what this machine can do, and how much of it the networks get.",
    "doctor": "Look over this machine and say what to change, with the commands to type.",
    "config": "Defaults of your own: show them, set one, take one back.",
    "serve": "Serve a team: OpenAI, Ollama, A1111 and MCP clients, and Lanting's own API.",
    "keys": "API keys: who may use a server others can reach.",
    "lora": "LoRA files: what they are and what they fit.",
    "train": "Train models.",
    "eval": "Measure models.",
}
READ = (".png", ".jpg", ".jpeg", ".webp", ".safetensors", ".gguf")  # files that verbs take several of
REPAIRS = ("config", "doctor")  # verbs that must run whatever the file of defaults says


def overview() -> typer.Typer:
    """The program without what its verbs do: for --help, and for words that are no verb."""
    app = _program()
    for verb, told in TOLD.items():
        app.command(verb, help=told)(lambda: None)
    return app


def command_line(verbs: Iterable[str] = VERBS) -> typer.Typer:
    """The program with these verbs. One verb alone starts in half the time, as the others' modules stay unread."""
    app = _program()
    for verb in verbs:
        module, name = VERBS[verb].split(":")
        done_by = getattr(import_module(f"lanting.cli.{module}"), name)
        if isinstance(done_by, typer.Typer):
            app.add_typer(done_by, name=verb)
        else:
            app.command(verb)(done_by)
    return app


def _program() -> typer.Typer:
    app = typer.Typer(
        name="lanting",
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Lanting (兰亭): draw and edit pictures with the Qwen-Image family, on your own machine.",
    )
    app.callback()(_options)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from lanting import __version__

        print(f"lanting {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Everything common to all verbs."""


def run() -> None:
    """The console script."""
    hear_ctrl_c()
    _write_anything()
    sys.exit(main(_as_shells_do(sys.argv[1:]) if os.name == "nt" else sys.argv[1:]))


def _as_shells_do(arguments: Iterable[str]) -> list[str]:
    """What Windows' shells leave to programs: `~`, and `*` in the names of files that we read."""
    import glob

    found: list[str] = []
    for word in arguments:
        path = os.path.expanduser(word) if word.startswith(("~/", "~\\")) else word
        many = "*" in path and path.lower().endswith(READ)
        found += (sorted(glob.glob(path)) if many else []) or [path]
    return found


def hear_ctrl_c() -> None:
    """Ctrl-C waits while torch is imported: there torch's own code loses it and goes on drawing, or dies of it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # whoever started us wants something else

    def heard(number: int, frame: FrameType | None) -> None:
        if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
            again = threading.Timer(0.1, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, heard)


def _write_anything() -> None:
    """Letters that the encoding of a pipe or terminal has not got (in names of files, "×") become JSON's escapes."""
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]  # the caller closed it
        return
    before = codecs.lookup_error(sys.stdout.errors or "strict")

    def escaped(error: UnicodeError) -> tuple[str | bytes, int]:
        try:
            return before(error)
        except UnicodeEncodeError as cause:
            return json.dumps(cause.object[cause.start : cause.end])[1:-1], cause.end

    codecs.register_error("lanting", escaped)
    sys.stdout.reconfigure(errors="lanting")  # type: ignore[attr-defined]


def main(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    try:
        with ExitStack() as speaking:
            return _main(arguments, speaking)
    except KeyboardInterrupt:  # while the verb's modules were read, before anything else could hear it
        return _cancelled()


def _main(arguments: list[str], speaking: ExitStack) -> int:
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug, as_json = "--debug" in flags, _wants_json(flags)
    if flags and flags[0] in VERBS:
        app = command_line({flags[0]})
    else:
        app = command_line() if set(flags) & set(VERBS) else overview()
    try:
        own = _defaults(flags, speaking)
        command = typer.main.get_command(app)
        if language() == "zh":
            from lanting.cli.chinese import in_chinese

            in_chinese(command)
        code = command(arguments, prog_name="lanting", standalone_mode=False, **own)
        return _cancelled() if code == 130 else code if isinstance(code, int) else 0
    except LantingError as error:
        return _fail(explain(error), error.exit_code, error, debug, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _cancelled()
    except Exception as error:
        if _nobody_reads(error):
            _write_nowhere()
            return 0
        message = getattr(error, "format_message", None)  # what a wrong command line raises in typer
        if message is not None and type(error).__name__ == "NoArgsIsHelpError":
            print(message(), file=sys.stderr)
            return 2
        if message is not None:
            return _fail(_usage(str(message()), flags, app), 2, error, debug, as_json)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            name = f"{str(error.filename)[:40]}…"
            return _fail(say("{name} is too long to be the name of a file", name=name), 2, error, debug, as_json)
        words = say("something went wrong inside ({reason}); run again with --debug", reason=_reason(error))
        return _fail(words, 1, error, debug, as_json)


def _wants_json(flags: list[str]) -> bool:
    """Whether failures are told to a program: `bench` writes JSON to a file, which nobody reads for them, or to -."""
    if flags[:1] == ["bench"]:
        return "--json=-" in flags or ("--json", "-") in pairwise(flags)
    return "--json" in flags


def _defaults(flags: list[str], speaking: ExitStack) -> dict[str, Any]:
    """What the parser of flags is to know of a person's own defaults: nothing where there are none, nor for --help."""
    verb = next((word for word in flags if word in VERBS), None)
    if verb is None or set(flags) & {"-h", "--help"}:
        return {}
    from lanting.defaults.choose import defaults, language_of, said, speak

    if (content := said()) is None:
        return {}
    speaking.enter_context(speak(language_of(content)))
    if verb in REPAIRS:
        return {}
    own = defaults(content)
    return {"default_map": {verb: own.of(verb)}, "obj": own}


def _cancelled() -> int:
    print("lanting: " + say("cancelled; no half-written file was left"), file=sys.stderr)
    return 130


def _fail(sentence: str, code: int, error: Exception, debug: bool, as_json: bool) -> int:
    first = sentence.split(" ")[0]
    if first in ("The", "This", "There", "A", "An"):  # after "lanting: " a sentence goes on
        sentence = first.lower() + sentence[len(first) :]
    if debug:
        traceback.print_exception(error)
    if as_json:
        try:
            print(json.dumps({"error": sentence, "kind": type(error).__name__}, ensure_ascii=False), flush=True)
        except OSError:  # nobody reads it any more
            _write_nowhere()
    print(f"lanting: {sentence}", file=sys.stderr)
    return code


def _nobody_reads(error: Exception) -> bool:
    """The reader of our output left (head, less), which is not a failure worth words. Windows calls it invalid."""
    if os.name == "nt" and isinstance(error, OSError):
        return error.errno in (errno.EINVAL, errno.EPIPE) and error.filename is None
    return isinstance(error, BrokenPipeError)


def _write_nowhere() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(message: str, flags: list[str], app: typer.Typer) -> str:
    """Typer's complaint as one sentence, and where to read on."""
    words = " ".join(message.split()).rstrip(".")
    verbs = [word for word in flags if not word.startswith("-")]
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    path, here = "", app
    for verb in verbs[:2]:
        if here is None or verb not in {c.name for c in here.registered_commands} | set(groups):
            break
        path, here = f"{path} {verb}", groups.get(verb)
    told = f"{words[:1].lower()}{words[1:]}"
    if language() == "zh":
        from lanting.cli.chinese import complaint

        told = complaint(words) or told
    return say("{complaint}; see 'lanting{path} --help'", complaint=told, path=path)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
