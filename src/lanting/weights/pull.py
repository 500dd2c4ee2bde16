"""Look before a download: what the hub holds, what is here already, and whether the rest fits on the disk.

The names that a hub lists are checked here, before a single file is asked for. Carrying the plan out is
`transfer.download`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

from lanting.core.errors import ModelError
from lanting.specs import get_spec, spec_names
from lanting.weights.fetch import digest_of
from lanting.weights.home import (
    STAGING,
    WEIGHTS,
    check_repo,
    downloaded,
    file_in,
    files_folder,
    inside,
    lora_path,
    missing_files,
    model_folder,
    read_marker,
    unfinished,
)
from lanting.weights.hub import Listing, RemoteFile, list_hugging_face, list_modelscope

DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}|")  # "": the hub does not tell


@dataclass(frozen=True, slots=True)
class Job:
    """One repository on its way into one folder."""

    listing: Listing
    folder: Path
    missing: tuple[RemoteFile, ...]  # not in its place yet; some of it may be staged
    here: int  # bytes that need no download: in place, staged, or in a partial file

    @property
    def total(self) -> int:
        return sum(file.size for file in self.listing.files)


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull would do. Sizes in bytes."""

    name: str
    jobs: tuple[Job, ...]
    free: int  # on the disk of the first folder
    file: str = ""  # the only one that is asked for, in the first folder

    @property
    def folder(self) -> Path:
        return self.jobs[0].folder

    @property
    def path(self) -> Path:
        """What there will be to give to other commands."""
        return inside(self.folder, self.file) if self.file else self.folder

    @property
    def total(self) -> int:
        return sum(job.total for job in self.jobs)

    @property
    def left(self) -> int:
        return self.total - sum(job.here for job in self.jobs)

    @property
    def done(self) -> bool:
        """Nothing to do: every file is in its place and the marker says so."""
        return all(not job.missing and is_marked(job) for job in self.jobs)


def plan_pull(
    name: str,
    folder: Path | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    source: str = "huggingface",
    recheck: bool = False,
    without: Sequence[str] = (),
) -> PullPlan:
    """Ask the hub what `name` (a release, "owner/name", or one file of it) holds and compare with what is here.

    `recheck` reads every file again instead of trusting the marker; the weights of parts in `without` (transformer,
    text_encoder, vae) are left out. Raises ModelError.
    """
    single = file_in(name)
    repo = check_repo(single[0]) if single is not None else repo_of(name)
    lister = {"huggingface": list_hugging_face, "modelscope": list_modelscope}.get(source)
    if lister is None:
        raise ModelError("models come from huggingface or modelscope, not from {source}", source=source)
    if single is not None:
        if without:
            raise ModelError("{name} is one file: leave --without out", name=name)
        place = (folder or files_folder(repo)).expanduser()
        job = _compare(only(lister(repo, revision, endpoint), single[1]), place, recheck)
        return PullPlan(name, (job,), _free(place), single[1])
    place = (folder or model_folder(name)).expanduser()
    jobs = [_compare(less(lister(repo, revision, endpoint), without), place, recheck)]
    if name in spec_names() and (target := lora_path(name)) is not None:
        owner, short, *path = get_spec(name).lora.split("/")
        listing = only(lister(f"{owner}/{short}", None, endpoint), "/".join(path))
        jobs.append(_compare(listing, target.parents[len(path) - 1], recheck))
    return PullPlan(name, tuple(jobs), _free(place))


def less(listing: Listing, parts: Sequence[str]) -> Listing:
    """A repository as if it did not hold the weights of these parts; their configs are small, and wanted. Raises
    ModelError for a part it doesn't have."""
    found = listing.files
    for part in parts:
        left = tuple(file for file in found if not (file.path.startswith(f"{part}/") and file.path.endswith(WEIGHTS)))
        if len(left) == len(found):
            folders = sorted(
                {file.path.split("/")[0] for file in found if "/" in file.path and file.path.endswith(WEIGHTS)}
            )
            raise ModelError(
                "{repo} has no weights in a folder {part}; parts are {folders}",
                **{"repo": listing.repo, "part": part, "folders": ", ".join(folders) or "-"},
            )
        found = left
    return replace(listing, files=found)


def only(listing: Listing, path: str) -> Listing:
    """A repository as if it held this file alone. Raises ModelError where it doesn't, with the nearest one it does."""
    found = tuple(file for file in listing.files if file.path == path)
    if not found:
        weights = [file.path for file in listing.files if file.path.endswith(WEIGHTS)]
        near = get_close_matches(path, weights, 1, cutoff=0) or [""]
        raise ModelError(
            "{repo} holds no {file}; the nearest is {near}", **{"repo": listing.repo, "file": path, "near": near[0]}
        )
    return replace(listing, files=found)


def repo_of(name: str) -> str:
    """The repository behind a release's name or an "owner/name"; ModelError for anything else."""
    if name not in spec_names():
        return check_repo(name) if "/" in name else get_spec(name).repo  # get_spec names the closest ones
    if repo := get_spec(name).repo:
        return repo
    raise ModelError("{name} comes with this program: there is nothing to download", name=name)


def check_space(plan: PullPlan) -> None:
    """A ModelError with the numbers when a plan does not fit on its disks."""
    needs: dict[int, int] = {}
    for job in plan.jobs:
        device = _existing(job.folder).stat().st_dev
        needs[device] = needs.get(device, 0) + job.total - job.here
        if needs[device] > _free(job.folder):
            raise ModelError(
                "{name} needs {need} more and {free} are free on the disk of {folder}: make room, "
                "or choose another place with --to",
                **{"name": plan.name, "need": gigabytes(needs[device]), "folder": str(job.folder)},
                free=gigabytes(_free(job.folder)),
            )


def have_offline(name: str, folder: Path | None = None) -> Path:
    """The folder of a finished model without asking anybody, or a ModelError that says what is missing."""
    if (single := file_in(name)) is not None:
        place = (folder or files_folder(single[0])).expanduser() / single[1]
        if not place.is_file():
            raise ModelError("{repo} is not on this machine: pull it with a connection", repo=name)
        return place
    repo = repo_of(name)
    place = (folder or model_folder(name)).expanduser()
    if folder is None and (found := downloaded(name)) is not None:
        return found
    if read_marker(place) is None:
        begun = unfinished(place)
        if begun is None:
            raise ModelError("{repo} is not on this machine: pull it with a connection", repo=repo)
        raise ModelError(
            "{repo} is here only in part, {have} of {total}; {first} is missing: pull it with a connection",
            **{"repo": repo, "have": gigabytes(begun.have), "total": gigabytes(begun.total)},
            first=", ".join(begun.missing[:3]),
        )
    if gone := missing_files(place):
        raise ModelError(
            "{folder} lacks {count} of its files ({first}): pull it with a connection",
            **{"folder": str(place), "count": len(gone), "first": ", ".join(gone[:3])},
        )
    target = lora_path(name) if name in spec_names() else None
    if target is not None and not target.is_file():
        raise ModelError("{name} lacks its LoRA {file}: pull it with a connection", name=name, file=target.name)
    return place


def gigabytes(count: int) -> str:
    """Bytes for people: "57.7 GB", "254 MB", "4 kB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count} bytes"


def _compare(listing: Listing, folder: Path, recheck: bool) -> Job:
    """Which of the listed files are in their places already; everything the hub claims is checked first."""
    marker, staging = read_marker(folder), folder / STAGING
    known = marker.files if marker is not None and not recheck else {}
    missing: list[RemoteFile] = []
    here = 0
    for file in listing.files:
        path = inside(folder, file.path)
        if not DIGEST.fullmatch(file.digest) or file.size < 0:
            raise ModelError("the hub tells no usable size and digest of {file}", file=repr(file.path))
        right = path.is_file() and path.stat().st_size == file.size
        if right and known.get(file.path, {}).get("digest") != file.digest:
            right = digest(path, file) == file.digest
        if right:
            here += file.size
            continue
        missing.append(file)
        for staged in (staging / staged_name(file), part_path(staging, file)):
            if staged.is_file():
                here += min(staged.stat().st_size, file.size)
                break
    return Job(listing, folder, tuple(missing), here)


def is_marked(job: Job) -> bool:
    """Whether the folder's marker is of the same repository and commit."""
    marker = read_marker(job.folder)
    return marker is not None and (marker.repo, marker.commit) == (job.listing.repo, job.listing.commit)


def staged_name(file: RemoteFile) -> str:
    """The name under which a file is staged."""
    return file.digest or sha256(f"{file.path}:{file.size}".encode()).hexdigest()


def part_path(staging: Path, file: RemoteFile) -> Path:
    """Where a file is kept while it is not all here."""
    return staging / f"{staged_name(file)}.part"


def digest(path: Path, file: RemoteFile) -> str:
    """What `file.digest` should be, computed from a file on the disk."""
    return digest_of(path, file.digest) if file.digest else ""


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
