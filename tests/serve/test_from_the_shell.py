"""`lanting serve` as people start it, over nano: the documents' own lines against it, and the verb's refusals."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from fakeserve import ROOT, wait_for
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from PIL import Image

from lanting.cli.main import main

PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
ELSEWHERE = f"{ROOT / 'src'}:{ROOT / 'tests' / 'elsewhere'}"  # as unwilling as Windows is
ENV = os.environ | {"PYTHONPATH": ELSEWHERE, "OMP_NUM_THREADS": "1", "LANTING_LANG": "en"}
ENV |= {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONIOENCODING": "cp1252"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """(address, what was printed) of a server started with the verb."""
    folder = tmp_path_factory.mktemp("shell")
    words = [
        "-m",
        "lanting",
        "serve",
        "--port",
        "0",
        "--data",
        str(folder / "data"),
        "--device",
        "cpu",
        "--drain",
        "0.5",
    ]
    errors = (folder / "log").open("w")
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=errors, text=True, env=ENV)
    assert process.stdout is not None
    printed = [process.stdout.readline() for _ in range(7)]
    url = re.search(r"http://\S+", printed[0])[0]  # type: ignore[index]
    wait_for(lambda: ready(url), 60, 0.1)
    yield url, "".join(printed)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    for line in (folder / "log").read_text().splitlines():
        assert json.loads(line)["level"] in ("info", "debug"), line


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def test_the_first_lines_name_every_door_and_a_curl_line_that_works(shell):
    url, printed = shell
    for word in (f"{url}/v1", f"OLLAMA_HOST={url}", f"{url}/sdapi/v1", f"{url}/mcp", "lanting serve --mcp"):
        assert word in printed
    line = next(line for line in printed.splitlines() if line.strip().startswith("curl "))
    command = line.strip().removeprefix("curl").strip()
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    picture = Image.open(io.BytesIO(base64.b64decode(json.loads(done.stdout)["data"][0]["b64_json"])))
    assert picture.size == (224, 96)


@pytest.mark.parametrize("number", range(3))
def test_the_quickstarts_in_python_run(shell, number):
    url, _ = shell
    port = url.rpartition(":")[2]
    code = blocks("py")[number].replace("http://localhost:8353", url).replace("port=8353", f"port={port}")
    scope: dict[str, object] = {}
    exec(code, scope)
    picture = scope["picture"]
    image = Image.open(io.BytesIO(base64.b64decode(picture))) if isinstance(picture, str) else picture
    assert image.size == (224, 96)  # type: ignore[attr-defined]


def test_the_quickstarts_with_curl_run(shell, tmp_path):
    url, _ = shell
    first, own = blocks("bash")
    done = subprocess.run(["bash", "-c", first.replace("http://localhost:8353", url)], capture_output=True, text=True)
    assert json.loads(done.stdout)["seed"] == 7
    lines = own.replace("\\\n", " ").replace("http://localhost:8353", url).splitlines()
    told = json.loads(subprocess.run(["bash", "-c", lines[0]], capture_output=True, text=True).stdout)
    for line in lines[1:]:
        done = subprocess.run(
            ["bash", "-c", line.replace("ID", told["id"])], capture_output=True, cwd=tmp_path, timeout=60
        )
        assert done.returncode == 0
    assert Image.open(tmp_path / "sign.png").size[0] > Image.open(tmp_path / "sign.png").size[1]


def test_the_settings_for_open_webui_draw(shell):
    """What Open WebUI sends with the settings that the document names, by either engine."""
    url, _ = shell
    told = re.search(r"\*\*Open WebUI\*\*.*?\n\n", PAGE, re.DOTALL)[0]  # type: ignore[index]
    named = re.findall(r"`([^`]+)`", told)
    assert named[0] == "Open AI" and named[-2] == "Automatic1111"
    base, model, size, other = (named[1], *named[2:4], named[-1])
    body = {"model": model, "prompt": "a sign", "n": 1, "size": size, "response_format": "b64_json"}
    head = {"Authorization": "Bearer any", "X-OpenWebUI-User-Name": "anna"}
    base, other = (one.replace("http://localhost:8353", url) for one in (base, other))
    answer = httpx.post(f"{base}/images/generations", json=body, headers=head, timeout=60).json()
    data = base64.b64decode(answer["data"][0]["b64_json"])
    width, height = map(int, size.split("x"))
    assert Image.open(io.BytesIO(data)).size == (width, height)
    models = httpx.get(f"{other}/sdapi/v1/sd-models").json()
    options = httpx.get(f"{other}/sdapi/v1/options").json()
    assert options["sd_model_checkpoint"] in [one["title"] for one in models]
    asked = {"prompt": "a sign", "batch_size": 1, "width": width, "height": height}
    drawn = httpx.post(f"{other}/sdapi/v1/txt2img", json=asked, timeout=60).json()
    assert Image.open(io.BytesIO(base64.b64decode(drawn["images"][0]))).size == (width, height)


def test_the_settings_for_mcp_clients_draw(shell, tmp_path):
    """Both blocks as they are written; but for `lanting`, which is this one."""
    url, _ = shell
    process, address = (json.loads(block)["mcpServers"]["lanting"] for block in blocks("json"))
    assert process["command"] == "lanting"
    env = ENV | {"LANTING_HOME": str(tmp_path)}
    how = StdioServerParameters(command=sys.executable, args=["-m", "lanting", *process["args"]], env=env)
    client = create_mcp_http_client(headers=address["headers"])
    there = address["url"].replace("http://localhost:8353", url)

    async def ask(opening) -> bytes:
        async with opening as (read, write, *_), ClientSession(read, write) as session:
            await session.initialize()
            drawn = await session.call_tool("generate_image", {"prompt": "a sign", "steps": 2})
            return base64.b64decode(drawn.content[0].data)

    for opening in (lambda: stdio_client(how), lambda: streamable_http_client(there, http_client=client)):
        assert Image.open(io.BytesIO(asyncio.run(ask(opening())))).size == (224, 96)


def test_nano_draws_edits_and_shows_it_on_the_way(shell):
    """One job by every task it has; the preview looks like the picture."""
    url, _ = shell

    def draw(**body: object) -> dict:
        job = httpx.post(f"{url}/api/jobs", json=body).json()["id"]
        done = wait_for(lambda: d if (d := httpx.get(f"{url}/api/jobs/{job}").json())["ended"] else None, 60)
        assert done["state"] == "done", done
        return done

    first = draw(prompt='a blue sign that says "HI"', seed=3)
    data = base64.b64encode(httpx.get(url + first["images"][0]["url"]).content).decode()
    mask = Image.new("L", (224, 96), 0)
    mask.paste(255, (0, 0, 112, 96))
    buffer = io.BytesIO()
    mask.save(buffer, format="PNG")
    hole = base64.b64encode(buffer.getvalue()).decode()
    tasks = [
        draw(prompt="make the background red", images=[data])["recipes"][0]["task"],
        draw(prompt="a red sign", images=[data], mask=hole)["recipes"][0]["task"],
        draw(prompt="a red sign", images=[f"job:{first['id']}/0"], strength=0.8)["recipes"][0]["task"],
    ]
    assert tasks == ["edit", "edit_inpaint", "image_to_image"]


def test_answers_do_not_wait_for_drawings(shell):
    """The engine is in another process: submitting stays quick while it draws."""
    url, _ = shell
    with httpx.Client(base_url=url) as client:
        client.post("/api/jobs", json={"prompt": "a sign", "size": "512x512", "steps": 20}).raise_for_status()
        spent = []
        for _ in range(30):
            began = time.perf_counter()
            client.post("/api/jobs", json={"prompt": "a sign", "steps": 1}).raise_for_status()
            spent.append(time.perf_counter() - began)
        for job in client.get("/api/jobs", params={"limit": 31}).json()["jobs"]:  # nobody waits for them
            client.post(f"/api/jobs/{job['id']}/cancel").raise_for_status()
    assert sorted(spent)[27] < 0.25  # 0.01 s where nobody else uses the processor


# ---------------------------------------------------------------- the verbs
def test_keys_at_the_shell(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "en")
    data = ["--data", str(tmp_path)]
    assert main(["keys", "list", *data]) == 0 and "no keys yet" in capsys.readouterr().out
    assert main(["keys", "create", "Anna", "--share", "2", *data]) == 0
    out = capsys.readouterr()
    assert re.fullmatch(r"lk-[0-9a-f]{8}-[\w-]{43}\n", out.out) and "not shown again" in out.err
    assert main(["keys", "create", "Anna", *data]) == 2 and "already" in capsys.readouterr().err
    assert main(["keys", "list", "--json", *data]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert (row["name"], row["share"], row["priority"], row["revoked"]) == ("Anna", 2.0, "normal", None)
    assert main(["keys", "revoke", "Anna", *data]) == 0 and main(["keys", "revoke", "Anna", *data]) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--host", "0.0.0.0"], "lanting keys create"),
        (["--model", "qwen-image-2512"], "lanting pull qwen-image-2512"),
        (["--model", "nona"], "nona does not exist"),
        (["--port", "70000"], "0 to 65535"),
        (["--host", "203.0.113.7"], "can't listen"),
        (["--data", "/proc/nothing"], "choose another place with --data"),
        (["--model", "nano", "--model", "nano"], "two models are called nano"),
    ],
)
def test_servers_that_can_not_start_say_why(tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.setenv("LANTING_LANG", "en")
    monkeypatch.setenv("LANTING_HOME", str(tmp_path))
    monkeypatch.setattr("lanting.serve.logs.write_to_stderr", lambda: None)
    if "--data" not in words:
        words = [*words, "--data", str(tmp_path / "data")]
    assert main(["serve", "--port", "0", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_taken_port_is_told(shell, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lanting.serve.logs.write_to_stderr", lambda: None)
    port = shell[0].rpartition(":")[2]
    assert main(["serve", "--port", port, "--data", str(tmp_path / "data")]) == 2
    assert "--port" in capsys.readouterr().err


def test_help_stays_quick():
    code = "import sys; from lanting.cli.main import main; main(['-h']); print({'fastapi', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=60)
    assert done.stdout.rstrip().endswith("set()"), done.stderr


def test_the_servers_process_has_no_torch():
    code = "import sys, lanting.serve.run, lanting.serve.mcp_tools; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
    assert Path(ROOT / "docs" / "deploy.md").is_file()
