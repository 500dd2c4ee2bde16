"""The architecture as a test: who may import whom, what is heavy where, and how large things may grow.

Read from the syntax trees, so nothing needs to be installed and an import inside a function counts too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "lanting"
FILES = sorted(ROOT.rglob("*.py"))

# room -> rooms it may import; a room that is not here may not exist
MAY: dict[str, set[str]] = {
    "core": set(),
    "nn": set(),
    "kernels": set(),
    "specs": {"core"},
    "flow": {"core"},
    "plan": {"core", "specs", "kernels"},
    "weights": {"core", "specs", "nn", "plan"},
    "attach": {"core", "nn", "kernels", "weights"},
    "text": {"core", "specs", "nn"},
    "tasks": {"core", "specs", "flow"},
    "engine": {"core", "specs", "plan", "nn", "kernels", "weights", "attach", "flow", "text", "tasks", "reading"},
    "reading": {"core"},
    "train": {"core", "specs", "nn", "weights", "flow", "text", "tasks", "engine"},
    "evals": {"core", "specs", "reading", "engine", "train"},  # held-out sets are train's designs; train knows no judge
    "bench": {"core", "specs", "plan", "nn", "kernels", "attach", "engine"},
    "serve": {"core", "specs", "plan", "kernels", "engine", "reading"},  # kernels: how many threads there are
    "cluster": {"core", "specs", "plan", "serve"},
    "defaults": {"core", "specs", "plan", "weights"},  # weights: whether a model that is a folder can do a verb's task
    "doctor": {"core", "specs", "plan", "kernels", "weights", "defaults"},
    "cli": {"core", "specs", "plan", "kernels", "weights", "engine", "train", "evals", "bench", "serve", "cluster"}
    | {"reading", "defaults", "doctor"},
}
# heavy library -> rooms that may import it when they are imported themselves; everyone else inside functions
TORCH_ROOMS = {"nn", "kernels", "weights", "attach", "flow", "text", "tasks", "engine", "train", "evals", "bench"}
HEAVY = {
    "torch": TORCH_ROOMS,
    "numpy": TORCH_ROOMS | {"reading"},
    "safetensors": {"weights", "engine", "train"},
    "tokenizers": {"text", "train"},
    "huggingface_hub": set(),
    "rich": set(),
    "rapidocr": set(),
    "onnxruntime": set(),
    "triton": set(),  # but for JIT
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "prometheus_client": {"serve"},
    "mcp": {"serve"},
    "gradio": set(),
    "ray": set(),
}
JIT = "kernels/gpu/jit/"  # kernels in Triton; others import them inside functions, where Triton is
NEVER = {"transformers", "diffusers", "torchvision", "accelerate", "peft"}  # oracles of the tests, nothing more
# importing these must not import torch, so other rooms only inside functions
LIGHT = {"core", "specs", "plan", "defaults", "doctor", "cli"}
NO_TORCH = LIGHT | {"serve"}  # the same, but this room brings web libraries, so light ones import it inside functions
# files of other rooms that light rooms ask about this machine: no heavy library, and nothing heavy of their own room
LIGHT_FILES = {"kernels/__init__.py", "kernels/build.py", "kernels/library.py", "kernels/limits.py"}
LIGHT_FILES |= {"reading/__init__.py"}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 350, 40, 7
MAX_VERB = 60  # lines of a verb, or of a kernel in Triton
# the transformer's own arguments, and the protocol that repeats them for the loop
CROWDED = {"nn/mmdit.py forward", "nn/single_stream.py forward", "flow/loop.py __call__"}
CROWDED |= {"serve/mcp_tools.py generate_image", "serve/mcp_tools.py edit_image"}  # what clients of MCP are shown
VERBS = {"generate", "edit", "plan", "layers", "replay", "quantize", "nano", "pull", "text", "follow", "lightning"}
VERBS |= {"bench", "finish", "serve", "lora"}


def room_of(path: Path) -> str:
    """The first folder below the package; the package's own files are the lobby."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else "lobby"


def imports(node: ast.AST, top: bool = True) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, runs when the file is imported); type-only imports are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr) or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            continue  # nothing is imported inside an expression
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.lineno, "." if child.level else str(child.module), top
        else:
            yield from imports(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


@cache
def trees() -> tuple[tuple[Path, ast.Module], ...]:
    return tuple((path, ast.parse(path.read_text(encoding="utf-8"))) for path in FILES)


@cache
def functions() -> tuple[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef], ...]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return tuple((path, node) for path, tree in trees() for node in ast.walk(tree) if isinstance(node, kinds))


def flags_or_kernel(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A verb, whose parameters are its flags, or a kernel in Triton, whose are addresses and strides."""
    return in_jit(path) or (room_of(path) == "cli" and node.name in VERBS)


def light(module: str) -> bool:
    """Whether it is one of the light files, given as it is imported: lanting.kernels.library."""
    path = "/".join(module.split(".")[1:])
    return f"{path}.py" in LIGHT_FILES or f"{path}/__init__.py" in LIGHT_FILES


def in_jit(path: Path) -> bool:
    return path.relative_to(ROOT).as_posix().startswith(JIT)


def violations(path: Path, tree: ast.Module) -> Iterator[str]:
    room, is_light = room_of(path), path.relative_to(ROOT).as_posix() in LIGHT_FILES
    for line, name, top in imports(tree):
        where = f"{path.relative_to(ROOT)}:{line} ({room})"
        head, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if name == ".":
            yield f"{where} imports relatively"
        elif top and name.startswith("lanting.kernels.gpu.jit") and not in_jit(path):
            yield f"{where} must import {name} inside a function"
        elif head in NEVER:
            yield f"{where} imports {head}, which is only an oracle of the tests"
        elif head == "lanting" and other and room != "lobby" and other != room:
            if other not in MAY[room]:
                yield f"{where} must not import {other}"
            elif top and room in NO_TORCH and other not in LIGHT:
                yield f"{where} must import {other} inside a function"
        elif head == "triton" and in_jit(path):
            continue
        elif top and head in HEAVY and (is_light or room not in HEAVY[head]):
            yield f"{where} must import {head} inside a function"
        elif top and is_light and head == "lanting" and not light(name):
            yield f"{where} is light and must import {name} inside a function"


def test_every_room_is_known():
    rooms = {room_of(path) for path in FILES} - {"lobby"}
    assert rooms <= set(MAY), "a new room needs its row in MAY"
    assert FILES


def test_imports_follow_the_arrows():
    assert [text for path, tree in trees() for text in violations(path, tree)] == []


@pytest.mark.parametrize(
    ("file", "code", "word"),
    [
        ("core/odd.py", "import torch", "inside a function"),
        ("flow/odd.py", "from lanting.nn.mmdit import X", "must not import nn"),
        ("nn/odd.py", "from lanting.core.types import X", "must not import core"),
        ("nn/odd.py", "from lanting.kernels import calls", "must not import kernels"),
        ("kernels/odd.py", "def f():\n    from lanting.core.errors import LantingError", "must not import core"),
        ("kernels/library.py", "import torch", "inside a function"),
        ("kernels/gpu/odd.py", "import triton", "inside a function"),
        ("attach/odd.py", "from lanting.kernels.gpu.jit.rows import norm_kernel", "inside a function"),
        ("kernels/library.py", "from lanting.kernels.calls import product", "inside a function"),
        ("cli/odd.py", "from lanting.engine import Engine", "inside a function"),
        ("cli/odd.py", "from lanting.kernels.library import ready", "inside a function"),
        ("serve/odd.py", "from lanting.engine import Engine", "inside a function"),
        ("cli/odd.py", "from lanting.serve.run import serve", "inside a function"),
        ("cluster/odd.py", "import ray", "inside a function"),
        ("serve/odd.py", "def f():\n    from lanting.cluster.join import join", "must not import cluster"),
        ("nn/odd.py", "def f():\n    import diffusers", "oracle"),
        ("nn/odd.py", "from . import vae", "relatively"),
    ],
)
def test_the_rules_can_be_broken(file, code, word):
    assert any(word in text for text in violations(ROOT / file, ast.parse(code)))


def test_light_files_exist():
    assert {file for file in LIGHT_FILES if not (ROOT / file).is_file()} == set()


def test_rooms_form_no_cycle():
    done: set[str] = set()
    while len(done) < len(MAY):
        ready = {room for room, others in MAY.items() if room not in done and others <= done}
        assert ready, f"a cycle among {sorted(set(MAY) - done)}"
        done |= ready


def test_files_form_no_cycle():
    modules = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): tree for path, tree in trees()}
    modules = {name.removesuffix(".__init__"): tree for name, tree in modules.items()}
    arrows = {name: {other for _, other, top in imports(tree) if top} & set(modules) for name, tree in modules.items()}
    done: set[str] = set()
    while ready := {name for name, others in arrows.items() if name not in done and others - {name} <= done}:
        done |= ready
    assert sorted(set(modules) - done) == []


def test_files_and_functions_stay_small():
    long_files = {
        str(path.relative_to(ROOT)): lines
        for path in FILES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE
    }
    assert long_files == {}
    long_functions = {
        f"{path.relative_to(ROOT)} {node.name}": lines
        for path, node in functions()
        if (lines := (node.end_lineno or 0) - node.lineno + 1)
        > (MAX_VERB if flags_or_kernel(path, node) else MAX_FUNCTION)
    }
    assert long_functions == {}


def test_parameter_lists_stay_short():
    crowded = {}
    for path, node in functions():
        everything = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in everything)
        name = f"{path.relative_to(ROOT)} {node.name}"
        if count > MAX_PARAMETERS and not flags_or_kernel(path, node) and name not in CROWDED:
            crowded[name] = count
    assert crowded == {}


def test_nothing_is_written_twice():
    bodies: dict[str, list[str]] = defaultdict(list)
    for path, node in functions():
        body = node.body[1:] if ast.get_docstring(node) else node.body
        code = "\n".join(ast.unparse(statement) for statement in body)
        if len(body) > 1 or len(code) > 100:
            bodies[code].append(f"{path.relative_to(ROOT)} {node.name}")
    assert {code: places for code, places in bodies.items() if len(places) > 1} == {}
