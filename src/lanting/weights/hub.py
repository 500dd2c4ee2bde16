"""What a hub says a repository holds: the resolved commit and every file with its size and digest.

Hugging Face and its mirrors are asked through `huggingface_hub`, ModelScope through `modelscope_hub` when that
is installed. Both end in the same `Listing`, so the download, its checks and its messages are written once.
Nothing but the repository's name leaves this machine: telemetry is off, and a saved token goes only to Hugging
Face.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from lanting.core.errors import ModelError, first_line
from lanting.weights.home import WEIGHTS

HUGGING_FACE = "https://huggingface.co"
MODELSCOPE = "https://www.modelscope.cn"
YES = {"1", "ON", "YES", "TRUE"}
WANTED = (*WEIGHTS, ".json", ".txt", ".model", ".jinja", "README.md", "LICENSE", "LICENSE.md", "NOTICE")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository. `digest`: sha256 of a large file, git's sha1 of a small one."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit: the files we take from it."""

    repo: str
    revision: str  # as asked
    commit: str  # "" where the hub does not tell
    source: str  # the endpoint
    prefix: str  # address of a file, less its path
    files: tuple[RemoteFile, ...]
    headers: dict[str, str] = field(default_factory=dict[str, str], repr=False)  # may hold a token

    def address(self, file: RemoteFile) -> str:
        return self.prefix + quote(file.path, safe="/")


def offline(flag: bool = False) -> bool:
    """Whether the network must be left alone: the flag, or HF_HUB_OFFLINE."""
    return flag or os.environ.get("HF_HUB_OFFLINE", "").upper() in YES


def endpoint_of(given: str | None) -> str:
    """The hub to ask: what was given, else HF_ENDPOINT, else Hugging Face."""
    address = (given or os.environ.get("HF_ENDPOINT", "") or HUGGING_FACE).rstrip("/")
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", address):
        raise ModelError("{address} is no address of a hub: it should begin with https://", address=repr(address))
    return address


def list_hugging_face(repo: str, revision: str | None, endpoint: str | None) -> Listing:
    """Ask a Hugging Face hub, or a mirror of it. ModelError when it can't be asked or has no such thing."""
    source = endpoint_of(endpoint)
    _quiet()
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import build_hf_headers

    token = None if _may_see_token(source) else False
    api = HfApi(endpoint=source, library_name="lanting", token=token)
    asked = revision or "main"
    try:
        commit = api.repo_info(repo, revision=asked, timeout=20).sha or asked
        entries = list(api.list_repo_tree(repo, recursive=True, revision=commit))
    except Exception as error:
        raise explain(error, source, repo, asked) from None
    found = [
        RemoteFile(entry.path, int(entry.size), entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    ]
    prefix = f"{source}/{repo}/resolve/{quote(commit, safe='')}/"
    headers = build_hf_headers(token=token, library_name="lanting")
    return Listing(repo, asked, commit, source, prefix, _wanted(repo, found), headers)


def list_modelscope(repo: str, revision: str | None, endpoint: str | None) -> Listing:
    """Ask ModelScope, whose repositories of this family carry the same names."""
    try:
        import modelscope_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ModelError(
            "pulling from ModelScope needs its library: run 'pip install modelscope' and try again"
        ) from None
    source = endpoint_of(endpoint or os.environ.get("MODELSCOPE_ENDPOINT") or MODELSCOPE)
    asked = revision or "master"
    try:
        api = modelscope_hub.HubApi(endpoint=source)
        entries = api.list_repo_files(repo, "model", revision=asked)
    except Exception as error:
        raise explain(error, source, repo, asked) from None
    found = [RemoteFile(e.path, int(e.size), str(e.sha256 or "")) for e in entries if e.type != "tree"]
    prefix = f"{source}/api/v1/models/{repo}/repo?Revision={quote(asked, safe='')}&FilePath="
    return Listing(repo, asked, "", source, prefix, _wanted(repo, found))


def explain(error: Exception, source: str, repo: str, revision: str) -> ModelError:
    """One sentence for whatever went wrong between us and a hub."""
    if isinstance(error, ModelError):
        return error
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return ModelError(
            "{repo} asks you to accept its terms first: do that on its page, then run 'hf auth login'",
            repo=repo,
        )
    if "RevisionNotFoundError" in kinds:
        return ModelError(
            "{repo} has no revision {revision}: leave it out for the newest", repo=repo, revision=revision
        )
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if "RepositoryNotFoundError" in kinds or "NotExistError" in kinds or status in (401, 403, 404):
        return ModelError(
            "{source} shows us no {repo}: check the name; if it is private, run 'hf auth login' first",
            **{"source": source, "repo": repo},
        )
    if status:
        return ModelError(
            "{source} answered with error {status}: try again later, or name a mirror with --endpoint",
            **{"source": source, "status": status},
        )
    return ModelError(
        "{source} can't be reached ({reason}): check the connection, or name a mirror with --endpoint",
        **{"source": source, "reason": first_line(error)},
    )


def _quiet() -> None:
    """Switch the hub library's telemetry off, also where somebody imported it before us."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def _may_see_token(source: str) -> bool:
    """A token saved by 'hf auth login' belongs to Hugging Face; one set as HF_TOKEN goes where one says."""
    return (urlsplit(source).hostname or "") in ("huggingface.co", "hf.co") or bool(os.environ.get("HF_TOKEN"))


def _wanted(repo: str, files: list[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The files we take: safetensors, GGUF and text. Never pickles, which can run code, nor pictures."""
    taken = tuple(file for file in files if file.path.endswith(WANTED))
    if not any(file.path.endswith(WEIGHTS) for file in taken):
        raise ModelError("{repo} holds no .safetensors or .gguf weights, and no other kind is read", repo=repo)
    return taken
