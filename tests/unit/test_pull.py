"""`lanting pull` against a hub on loopback: what goes over the wire, what lands on the disk, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import pulling
from fakehub import COMMIT, FakeHub, serve
from lanting.cli.main import main
from lanting.core.errors import ModelError
from lanting.weights import fetch, home, hub, pull, transfer
from pulling import BIG, FILES, QUICK, REPO, WEIGHTS, bring

fake, own_home = pulling.fake, pulling.own_home  # fixtures count in the module that names them


def test_a_whole_model(fake: FakeHub) -> None:
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    wanted = {name for name in FILES if not name.endswith((".bin", ".png"))}
    assert {file.path for file in plan.jobs[0].listing.files} == wanted
    assert plan.left == plan.total == sum(len(FILES[name]) for name in wanted)
    last = list(transfer.download(plan, waits=QUICK))[-1]
    assert last.done == last.total == plan.total
    folder = home.model_folder("qwen-image")
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert on_disk == {*wanted, home.MARKER}
    assert all((folder / name).read_bytes() == FILES[name] for name in wanted)
    marker = home.read_marker(folder)
    assert marker is not None and (marker.repo, marker.commit) == (REPO, COMMIT)
    assert home.downloaded("qwen-image") == home.downloaded(REPO) == folder
    assert all("authorization" not in headers for _, _, headers in fake.requests)


def test_nothing_is_fetched_twice(fake: FakeHub) -> None:
    bring(fake)
    fake.requests.clear()
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    assert plan.done and plan.left == 0
    list(transfer.download(plan))
    assert not [path for _, path, _ in fake.requests if "/resolve/" in path]


def test_a_cut_connection_goes_on_where_it_was(fake: FakeHub) -> None:
    fake.cuts[WEIGHTS] = [1_000_000, 700_000]
    last = bring(fake)[-1]
    ranges = fake.fetched(WEIGHTS)
    assert ranges[0] == "" and len(ranges) == 3
    begins = [int(value.removeprefix("bytes=").rstrip("-")) for value in ranges[1:]]
    assert 0 < begins[0] < begins[1] < len(BIG)
    assert last.done == last.total
    assert (home.model_folder("qwen-image") / WEIGHTS).read_bytes() == BIG


def test_a_pull_that_ended_is_taken_up_by_the_next(fake: FakeHub) -> None:
    fake.cuts[WEIGHTS] = [2_000_000, 0, 0, 0, 0]
    with pytest.raises(ModelError, match="what has arrived is kept"):
        bring(fake)
    folder = home.model_folder("qwen-image")
    assert not (folder / "model_index.json").exists() and home.downloaded("qwen-image") is None
    begun = home.unfinished(folder)
    assert begun is not None and WEIGHTS in begun.missing and 0 < begun.have < begun.total
    with pytest.raises(ModelError, match=r"only in part, .* of 3 MB; .* is missing"):
        pull.have_offline("qwen-image")
    fake.cuts.clear()
    fake.requests.clear()
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    assert plan.total - plan.left == begun.have
    list(transfer.download(plan, waits=QUICK))
    (asked,) = fake.fetched(WEIGHTS)
    assert int(asked.removeprefix("bytes=").rstrip("-")) > 1_000_000
    assert home.downloaded("qwen-image") == folder and not (folder / home.STAGING).exists()


def test_a_killed_process_is_taken_up_too(fake: FakeHub, tmp_path: Path) -> None:
    fake.cuts[WEIGHTS] = [1_500_000, 0, 0, 0, 0, 0, 0, 0, 0]
    program = (
        "from lanting.weights.pull import plan_pull\nfrom lanting.weights.transfer import download\n"
        f"plan = plan_pull('qwen-image', endpoint={fake.endpoint!r})\n"
        "for progress in download(plan, waits=(60.0,)):\n"
        "    if progress.done > 1_000_000: print('now', flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "now\n"
    child.kill()
    child.wait(10)
    assert home.downloaded("qwen-image") is None
    fake.cuts.clear()
    fake.requests.clear()
    bring(fake)
    assert fake.fetched(WEIGHTS)[0].startswith("bytes=1")


def test_a_hub_without_ranges_still_ends_well(fake: FakeHub) -> None:
    fake.ranges = False
    fake.cuts[WEIGHTS] = [1_000_000]
    last = bring(fake)[-1]
    assert last.done == last.total and len(fake.fetched(WEIGHTS)) == 2
    assert (home.model_folder("qwen-image") / WEIGHTS).read_bytes() == BIG


def test_a_busy_hub_is_waited_for(fake: FakeHub) -> None:
    fake.errors[WEIGHTS] = [503, 429]
    bring(fake)
    assert len(fake.fetched(WEIGHTS)) == 3


def test_a_damaged_partial_file_gets_a_second_chance(fake: FakeHub) -> None:
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    (file,) = [file for file in plan.jobs[0].missing if file.path == WEIGHTS]
    staging = plan.folder / home.STAGING
    staging.mkdir(parents=True)
    pull.part_path(staging, file).write_bytes(b"x" * 1000)
    last = bring(fake)[-1]
    assert fake.fetched(WEIGHTS) == ["bytes=1000-", ""]
    assert last.done == last.total and (plan.folder / WEIGHTS).read_bytes() == BIG


def test_offline_uses_what_is_there(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="not on this machine"):
        pull.have_offline("qwen-image")
    bring(fake)
    fake.requests.clear()
    folder = home.model_folder("qwen-image")
    assert pull.have_offline("qwen-image") == pull.have_offline("qwen-image", folder) == folder
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of its files .{WEIGHTS}"):
        pull.have_offline("qwen-image")
    assert not fake.requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.offline() and not hub.offline.__defaults__[0]  # type: ignore[index]


def test_a_revision_is_pinned_and_changed(fake: FakeHub) -> None:
    fake.revisions = ("main", "v1")
    bring(fake, revision="v1")
    folder = home.model_folder("qwen-image")
    marker = home.read_marker(folder)
    assert marker is not None and (marker.revision, marker.commit) == ("v1", COMMIT)
    with pytest.raises(ModelError, match="has no revision v9"):
        bring(fake, revision="v9")
    fake.commit = "2" * 40
    fake.files = {**FILES, "transformer/config.json": b'{"num_layers": 2}'}
    del fake.files["README.md"]
    fake.requests.clear()
    bring(fake)
    assert (folder / "transformer/config.json").read_bytes() == b'{"num_layers": 2}'
    assert not (folder / "README.md").exists() and (folder / "model_index.json").exists()
    assert not fake.fetched(WEIGHTS), "weights that did not change are not fetched again"
    marker = home.read_marker(folder)
    assert marker is not None and marker.commit == "2" * 40


def test_a_mirror_by_flag_and_by_environment(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", fake.endpoint + "/")
    plan = pull.plan_pull("qwen-image")
    assert plan.jobs[0].listing.source == fake.endpoint
    list(transfer.download(plan))
    assert fake.fetched(WEIGHTS) == [""]
    with pytest.raises(ModelError, match="is no address of a hub"):
        pull.plan_pull("qwen-image", endpoint="hub.example")


def test_a_raw_repository_and_another_place(tmp_path: Path) -> None:
    with serve(FakeHub("some/lora", {"lora.safetensors": BIG, "copy.safetensors": BIG})) as fake:
        bring(fake, name="some/lora", folder=tmp_path / "here")
        assert (tmp_path / "here/lora.safetensors").read_bytes() == (tmp_path / "here/copy.safetensors").read_bytes()
        assert len([p for _, p, _ in fake.requests if "/resolve/" in p]) == 1, "equal contents are fetched once"
    assert home.read_marker(tmp_path / "here") is not None


def test_files_that_are_there_already_are_adopted(fake: FakeHub, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    (place / "transformer").mkdir(parents=True)
    (place / WEIGHTS).write_bytes(BIG)
    (place / "notes.md").write_text("my own")
    bring(fake, folder=place)
    assert not fake.fetched(WEIGHTS) and (place / "notes.md").exists()
    (place / WEIGHTS).write_bytes(b"\1" + BIG[1:])  # rot that keeps the size
    assert pull.plan_pull("qwen-image", place, endpoint=fake.endpoint).done
    assert not pull.plan_pull("qwen-image", place, endpoint=fake.endpoint, recheck=True).done
    list(transfer.download(pull.plan_pull("qwen-image", place, endpoint=fake.endpoint, recheck=True)))
    assert (place / WEIGHTS).read_bytes() == BIG


def test_closing_the_generator_stops(fake: FakeHub) -> None:
    fake.cuts[WEIGHTS] = [500_000] + [0] * 50
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    going = transfer.download(plan, waits=(30.0,) * 3, every=0.02)
    next(going)
    going.close()
    assert home.read_marker(plan.folder) is None
    assert (plan.folder / home.STAGING).is_dir()


@pytest.mark.parametrize("update", [False, True])
def test_a_crash_while_moving_in_leaves_no_half_model(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, update: bool
) -> None:
    fake.files["zzz.json"] = b"{}"
    if update:
        bring(fake)
        fake.commit, fake.files["zzz.json"] = "2" * 40, b'{"new": 1}'
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    move = os.replace

    def crash(source: object, target: object) -> None:
        if str(target).endswith("zzz.json"):
            raise OSError(5, "the cable came loose")
        move(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(ModelError, match="the cable came loose"):
        list(transfer.download(plan, waits=QUICK))
    assert not (plan.folder / "model_index.json").exists() and home.downloaded("qwen-image") is None
    monkeypatch.setattr(os, "replace", move)
    fake.requests.clear()
    bring(fake)
    assert home.downloaded("qwen-image") == plan.folder
    assert (plan.folder / "zzz.json").read_bytes() == fake.files["zzz.json"]
    assert not [path for _, path, _ in fake.requests if "/resolve/" in path], "what was staged is not fetched again"


def test_two_pulls_of_one_model_do_not_mix(fake: FakeHub) -> None:
    fake.cuts[WEIGHTS] = [500_000] + [0] * 50
    plan = pull.plan_pull("qwen-image", endpoint=fake.endpoint)
    first = transfer.download(plan, waits=(30.0,) * 3, every=0.02)
    next(first)
    try:
        with pytest.raises(ModelError, match="another pull"):
            list(transfer.download(plan))
    finally:
        first.close()


def test_a_cache_of_which_not_all_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("one", "two"):
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot / "model_index.json").write_text("{}")
    (tmp_path / "models--org--one" / "refs").mkdir()
    (tmp_path / "models--org--one" / "refs" / "main").write_bytes(b"\xff")
    assert [repo for repo, _ in home.cached_snapshots()] == ["org/one", "org/two"]


def test_a_distilled_release_shares_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    assert home.model_folder("qwen-image-lightning-4") == home.model_folder("qwen-image")
    lora = "Qwen-Image-Lightning-4steps-V2.0.safetensors"
    base = FakeHub(REPO, dict(FILES))
    extra = FakeHub("lightx2v/Qwen-Image-Lightning", {lora: BIG[:99], "other.safetensors": BIG})
    with serve(base), serve(extra):
        ask = {REPO: base.endpoint, extra.repo: extra.endpoint}
        monkeypatch.setattr(pull, "list_hugging_face", lambda r, rev, e: hub.list_hugging_face(r, rev, ask[r]))
        plan = pull.plan_pull("qwen-image-lightning-4")
        list(transfer.download(plan, waits=QUICK))
    path = home.lora_path("qwen-image-lightning-4")
    assert path is not None and path.read_bytes() == BIG[:99]
    assert not path.with_name("other.safetensors").exists()
    assert home.downloaded("qwen-image-lightning-4") == home.downloaded("qwen-image")
    assert home.downloaded("qwen-image-lightning-8") is None, "its own LoRA is not here"


def test_modelscope_is_asked_through_its_library(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(ModelError, match="pip install modelscope"):
        pull.plan_pull("qwen-image", source="modelscope")
    asked: list[tuple[str, str, str]] = []

    class HubApi:
        def __init__(self, endpoint: str) -> None:
            self.endpoint = endpoint

        def list_repo_files(self, repo: str, kind: str, revision: str) -> list[SimpleNamespace]:
            asked.append((repo, kind, revision))
            sums = {path: fake.entry("x.safetensors", data)["lfs"]["oid"] for path, data in FILES.items()}  # type: ignore[index]
            folder = SimpleNamespace(path="transformer", size=0, sha256=None, type="tree")
            return [folder] + [
                SimpleNamespace(path=path, size=len(data), sha256=sums[path], type="blob")
                for path, data in FILES.items()
            ]

    library = ModuleType("modelscope_hub")
    library.HubApi = HubApi  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope_hub", library)
    plan = pull.plan_pull("qwen-image", source="modelscope", endpoint=fake.endpoint)
    assert asked == [(REPO, "model", "master")]
    address = plan.jobs[0].listing.address(plan.jobs[0].missing[0])
    assert address.startswith(f"{fake.endpoint}/api/v1/models/{REPO}/repo?Revision=master&FilePath=")


def test_importing_a_pull_is_cheap() -> None:
    program = (
        "import sys, lanting.weights.transfer, lanting.cli.pull\n"
        "print([name for name in ('torch', 'huggingface_hub', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, timeout=30)
    assert done.stdout.strip() == "[]", done.stderr


def test_git_digests_are_gits() -> None:
    here = Path(__file__)
    made = fetch.digest_of(here, "0" * 40)
    git = subprocess.run(["git", "hash-object", "--no-filters", str(here)], capture_output=True, text=True)
    assert git.returncode != 0 or git.stdout.strip() == made
    assert json.loads(json.dumps(made)) == made and len(made) == 40


def test_the_verb(fake: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("LANTING_LANG", "en")
    ask = ["pull", "qwen-image", "--endpoint", fake.endpoint]
    assert main([*ask, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "Qwen/Qwen-Image 11111111: 3 MB in 5 files" in said and "3 MB to download, " in said and " free in " in said
    assert main([*ask, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["to_download"] == told["bytes"] > 3_000_000 and not fake.fetched(WEIGHTS)
    assert main(ask) == 0
    folder = home.model_folder("qwen-image")
    assert f"qwen-image is complete: {folder}" in capsys.readouterr().out
    assert main(["pull", "qwen-image", "--offline", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert main(["pull", "qwen-image-layered", "--offline"]) == 2
    assert "not on this machine" in capsys.readouterr().err
    assert constants.HF_HUB_DISABLE_TELEMETRY
