"""What `lanting pull` refuses, each in one sentence: wrong contents, full disks, evil names, silent hubs."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import pulling
from fakehub import FakeHub, serve
from lanting.core.errors import ModelError
from lanting.weights import home, hub, pull, transfer
from pulling import FILES, QUICK, REPO, WEIGHTS, bring

fake, own_home = pulling.fake, pulling.own_home  # fixtures count in the module that names them


@pytest.mark.parametrize("path", [WEIGHTS, "transformer/config.json"])
def test_wrong_contents_are_refused(fake: FakeHub, path: str) -> None:
    right = FILES[path]
    fake.lies[path] = bytes([right[0] ^ 1]) + right[1:]
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    with pytest.raises(ModelError, match=f"{path} arrived with other contents"):
        list(transfer.download(plan, waits=QUICK, every=0.02))
    folder = plan.folder
    assert not (folder / path).exists() and not (folder / "model_index.json").exists()
    (file,) = [file for file in plan.jobs[0].missing if file.path == path]
    assert not list((folder / home.STAGING).glob(f"{file.digest}*")), "the wrong file is thrown away"
    fake.lies.clear()
    bring(fake)
    assert (folder / path).read_bytes() == right


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("more", [1, 5_000_000])
def test_a_page_in_place_of_a_file_is_not_fetched_for_ever(fake: FakeHub, more: int, ranges: bool) -> None:
    """A proxy's page of its own, say, which is longer than the file."""
    name, fake.ranges = "transformer/config.json", ranges
    fake.lies[name] = b"<html>" + b"x" * (len(FILES[name]) + more - 6)
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    with pytest.raises(ModelError, match="more bytes than it lists"):
        for _ in transfer.download(plan, waits=QUICK, every=0.02):
            assert len(fake.fetched(name)) < 50
    assert not (plan.folder / name).exists()
    part = next(file for file in plan.jobs[0].missing if file.path == name)
    assert pull.part_path(plan.folder / home.STAGING, part).stat().st_size < 2_000_000, "it is not taken whole"
    del fake.lies[name]
    list(transfer.download(pull.plan_pull("qwen-image", endpoint=fake.endpoint), waits=QUICK))
    assert (plan.folder / name).read_bytes() == FILES[name]


def test_a_mirror_that_has_half_a_file_is_not_asked_for_ever(fake: FakeHub) -> None:
    fake.lies[WEIGHTS] = FILES[WEIGHTS][:-100]
    with pytest.raises(ModelError, match="the download stopped"):
        for _ in transfer.download(pull.plan_pull("qwen-image", endpoint=fake.endpoint), waits=QUICK, every=0.02):
            assert len(fake.fetched(WEIGHTS)) < 50


def test_a_full_disk_is_refused_before_the_download(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=2_000_000))
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    with pytest.raises(ModelError, match=r"needs 3 MB more and 2 MB are free"):
        list(transfer.download(plan))
    assert not fake.fetched(WEIGHTS) and not plan.folder.exists()


@pytest.mark.parametrize(
    "evil",
    [
        "../../evil.json",
        "/tmp/evil.json",
        "transformer/../../evil.json",
        "a\\..\\..\\evil.json",
        "C:evil.json",
        "~/evil.json",
        ".ssh/evil.json",
        "a//evil.json",
        "a/./evil.json",
        "evil\n.json",
        "con\u202e.json",
    ],
)
def test_evil_names_are_refused(fake: FakeHub, evil: str, tmp_path: Path) -> None:
    fake.files[evil] = b"{}"
    with pytest.raises(ModelError, match="don't trust this model"):
        bring(fake)
    assert not [path for _, path, _ in fake.requests if "/resolve/" in path]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_link_out_of_the_folder_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to" / "transformer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="don't trust this model"):
        bring(fake, folder=tmp_path / "to")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_evil_digest_is_refused(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = FakeHub.entry
    monkeypatch.setattr(FakeHub, "entry", lambda self, path, data: {**honest(self, path, data), "oid": "../../x"})
    with pytest.raises(ModelError, match="no usable size and digest"):
        bring(fake)


def test_a_saved_token_stays_away_from_mirrors(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    (tmp_path / "token").write_text("hf_secret")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    bring(fake)
    assert all("authorization" not in headers for _, _, headers in fake.requests)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert hub.list_hugging_face(REPO, None, fake.endpoint).headers["authorization"] == "Bearer hf_mine"


def test_refusals_are_sentences(fake: FakeHub) -> None:
    with pytest.raises(ModelError, match="shows us no owner/none"):
        bring(fake, name="owner/none")
    fake.gated = True
    with pytest.raises(ModelError, match="accept its terms"):
        bring(fake)
    with pytest.raises(ModelError, match="comes with this program"):
        pull.plan_pull("nano")
    with pytest.raises(ModelError, match="did you mean qwen-image"):
        pull.plan_pull("qwen-imag")
    with pytest.raises(ModelError, match="owner/name"):
        pull.plan_pull("../../etc/passwd")
    with pytest.raises(ModelError, match="not from ftp"):
        pull.plan_pull("qwen-image", source="ftp")


def test_a_repository_of_pickles_is_refused() -> None:
    pickles = FakeHub("some/pickles", {"config.json": b"{}", "model.bin": b"x"})
    with serve(pickles) as fake, pytest.raises(ModelError, match=r"no \.safetensors or \.gguf"):
        bring(fake, name="some/pickles")


def test_a_silent_address_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    with pytest.raises(ModelError, match="can't be reached"):
        pull.plan_pull("qwen-image", endpoint="http://127.0.0.1:9")


def test_a_place_that_cannot_be_written(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ModelError, match="can't be written"):
        bring(fake, folder=tmp_path / "file" / "deep")
