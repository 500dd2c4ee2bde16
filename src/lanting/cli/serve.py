"""`lanting serve`: the queue, every dialect and the studio on one port."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.core.errors import ModelError, RequestError
from lanting.specs import spec_names

if TYPE_CHECKING:
    from lanting.serve.house import Hire, House
    from lanting.serve.settings import Served, Settings

Models = Annotated[
    list[str] | None, typer.Option("--model", "-m", help="What to serve; the first is the default. Repeatable.")
]
Host = Annotated[str, typer.Option("--host", help="Where to listen; anything but this computer needs keys.")]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FOLDER", help="Queue, pictures and keys. Default: serve in lanting's own folder."),
]
Hosts = Annotated[list[str] | None, typer.Option("--allow-host", help="A name a proxy answers to. Repeatable.")]
Origins = Annotated[
    list[str] | None, typer.Option("--allow-origin", help="A web page elsewhere that may call, as https://host.")
]
Batch = Annotated[
    int | None,
    typer.Option("--batch", help="Most jobs drawn together; 1: none. Default: as many as gain and stay the same."),
]
Workers = Annotated[
    str, typer.Option("--workers", metavar="N|auto", help="Processes that draw, of each model; auto: one per GPU.")
]
Rewrite = Annotated[
    bool, typer.Option("--rewrite", help="Rewrite prompts unless a request says no, where the model can.")
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="auto|local|HOST:PORT",
        help="Workers in a Ray cluster: the one this machine is in, one of its own, or that at an address.",
    ),
]


def serve(
    model: Models = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free.")] = 8353,
    api_keys: Annotated[bool, typer.Option("--api-keys", help="Ask for keys on this computer too.")] = False,
    allow_host: Hosts = None,
    allow_origin: Origins = None,
    lora: o.Lora = None,
    controlnet: o.ControlNet = None,
    text_encoder: o.TextEncoder = None,
    vae: o.Vae = None,
    data: Data = None,
    queue: Annotated[int, typer.Option("--queue", help="Jobs that may wait; more are refused with 429.")] = 1000,
    batch: Batch = None,
    workers: Workers = "1",
    ray: Ray = None,
    rewrite: Rewrite = False,
    max_side: Annotated[int, typer.Option("--max-side", help="Pictures up to this many pixels squared.")] = 2048,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds a job may be drawn.")] = 3600.0,
    drain: Annotated[float, typer.Option("--drain", help="Seconds a running job gets when told to stop.")] = 30.0,
    keep: Annotated[float, typer.Option("--keep", help="Days that finished jobs are kept.")] = 30.0,
    fetch_urls: Annotated[
        bool, typer.Option("--fetch-urls", help="Fetch input pictures from public addresses.")
    ] = False,
    mcp: Annotated[bool, typer.Option("--mcp", help="No port: speak MCP on stdin and stdout.")] = False,
    no_studio: Annotated[bool, typer.Option("--no-studio", help="No page for browsers: the APIs alone.")] = False,
    device: o.Device = None,
    dtype: o.DtypeFlag = None,
    quant: o.Quant = "auto",
    vram: o.Vram = None,
    ram: o.Ram = None,
    debug: o.Debug = False,
) -> None:
    """Serve a team: OpenAI, Ollama, A1111 and MCP clients, and Lanting's own API, over one queue that loses nothing."""
    ready()
    from lanting.serve.settings import Caps, Settings

    how: dict[str, Any] = {"device": device, "dtype": dtype, "quant": quant, "vram": vram, "ram": ram}
    how |= {"controlnet": controlnet, "parts": {"text_encoder": text_encoder, "vae": vae}, "loras": list(lora or ())}
    how["rewrite"] = rewrite or None
    options = {name: value for name, value in how.items() if value is not None}
    settings = Settings(
        data=folder_for(data),
        models=tuple(served(name, options, ray is None) for name in model or ["nano"]),
        host=host,
        port=port,
        hosts=tuple(allow_host or ()),
        origins=tuple(allow_origin or ()),
        keys=api_keys,
        urls=fetch_urls,
        timeout=timeout,
        drain=drain,
        keep_days=keep,
        batch=batch,
        rewrite=rewrite,
        workers=how_many(workers),
        caps=Caps(pixels=max(max_side, 0) ** 2, waiting=queue),
    )
    start(settings, mcp, not no_studio, ray)


def start(settings: Settings, mcp: bool, page: bool, ray: str | None = None) -> None:
    """With workers on this machine, or in a Ray cluster for as long."""
    from lanting.serve.hand import processes
    from lanting.serve.logs import write_to_stderr

    write_to_stderr()
    if ray is None:
        open_doors(settings, mcp, page, processes)
        return
    from lanting.cluster.join import join
    from lanting.serve.settings import check

    check(settings)
    cluster = join(ray)
    try:
        open_doors(settings, mcp, page, cluster.hire)
    finally:
        cluster.close()


def open_doors(settings: Settings, mcp: bool, page: bool, hire: Hire) -> None:
    """On a port, or on stdin and stdout."""
    if mcp:
        from lanting.serve.mcp_tools import speak

        speak(settings, hire)
        return
    from lanting.serve.run import serve as listen
    from lanting.serve.studio.door import studio

    if page and importlib.util.find_spec("gradio") is None:
        Screen().line('the studio needs gradio, which is not installed: run pip install "lanting[serve]" for it')
        page = False
    listen(settings, tell, studio if page else None, hire)


def tell(house: House) -> None:
    """The addresses, and a line that works when pasted."""
    screen, settings = Screen(), house.settings
    url = settings.url
    screen.line("Lanting serves {models} at {url}", models=", ".join(one.name for one in settings.models), url=url)
    screen.line("browser   {url}", url=url)
    screen.line("OpenAI    base_url {url}/v1", url=url)
    screen.line("Ollama    OLLAMA_HOST={url}", url=url)
    screen.line("A1111     {url}/sdapi/v1", url=url)
    screen.line("MCP       {url}/mcp, or the command 'lanting serve --mcp'", url=url)
    key = " -H 'Authorization: Bearer KEY'" if settings.needs_keys else ""
    body = '-H \'Content-Type: application/json\' -d \'{"prompt": "a blue sign that says \\"HELLO\\""}\''
    if os.name == "nt":  # whose cmd knows no single quotes
        key = key.replace("'", '"')
        body = '-H "Content-Type: application/json" -d "{\\"prompt\\": \\"a blue sign that says \'HELLO\'\\"}"'
    screen.line("curl      curl {url}/v1/images/generations{key} {body}", url=url, key=key, body=body)
    if settings.needs_keys:
        screen.line("a key is needed: 'lanting keys create NAME' makes one")


def served(model: str, options: dict[str, Any], here: bool = True) -> Served:
    """A model under the name clients call it by: a release's own, else that of its file or folder. Raises ModelError
    where there is none `here`; whether it can be opened, its worker will tell."""
    from lanting.serve.settings import Served
    from lanting.weights.home import REPO, downloaded, file_in, path_of

    if model == "nano":
        return Served(model, model, options)
    path, named = path_of(model), bool(model in spec_names() or REPO.fullmatch(model))
    found = path.is_dir() or downloaded(model) is not None if here and named else path.exists()
    if here and not found:
        if named or file_in(model):
            raise ModelError("{name} is not here yet: run 'lanting pull {name}', or give a folder", name=model)
        raise ModelError("{path} does not exist", path=model)
    return Served(model if named else path.resolve().name, model, options)


def how_many(workers: str) -> int | None:
    """A number, or None for as many as there are GPUs. Its range is the server's to check."""
    if workers == "auto":
        return None
    if not workers.isascii() or not workers.isdigit():
        raise RequestError("--workers must be a whole number or auto, not {value}", value=repr(workers))
    return int(workers)


def folder_for(data: str | None) -> Path:
    """Where a server keeps everything."""
    from lanting.weights.home import home

    return home() / "serve" if data is None else Path(data).expanduser()


def ready() -> None:
    """Raises RequestError where the server's libraries are not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise RequestError('the server\'s libraries are not installed: run pip install "lanting[serve]"') from None
