"""What the tests of `lanting pull` share: a small model on a hub of our own, and a home that is empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakehub import FakeHub, serve
from lanting.weights import pull, transfer

REPO = "Qwen/Qwen-Image"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
BIG = bytes(range(256)) * 12_000  # 3 MB
FILES = {
    "model_index.json": b'{"_class_name": "QwenImagePipeline"}',
    "README.md": b"---\nlicense: apache-2.0\n---\n",
    "transformer/config.json": b'{"num_layers": 1}',
    WEIGHTS: BIG,
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.bin": b"a pickle that could run code",
    "assets/sample.png": b"\x89PNG",
}
QUICK = (0.0,) * 3


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with serve(FakeHub(REPO, dict(FILES))) as running:
        yield running


def bring(fake: FakeHub, name: str = "qwen-image", **more: object) -> list[transfer.PullProgress]:
    plan = pull.plan_pull(name, endpoint=fake.endpoint, **more)  # type: ignore[arg-type]
    return list(transfer.download(plan, waits=QUICK, every=0.02))
