"""Distilling a few-step LoRA: the teacher's walks, the loss falls, the file loads, a killed run goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from lanting import Engine, ModelError, Request, RequestError
from lanting.core.errors import NotFiniteError
from lanting.engine.models import Models
from lanting.flow.loop import Canvas, denoise
from lanting.nn.lora import detach
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.train.lightning import Distiller, distil, export, student_of
from lanting.train.walks import LightningRun, merge_levels, together
from lanting.weights.find import locate
from lanting.weights.headers import read_header, read_metadata
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora_file import open_lora

QUICK = LightningRun(batch=4, fresh=2, capacity=8, teacher_steps=8, lr=1e-2, warmup_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("lightning") / "tiny", layers=2)


def prompts(rng: random.Random) -> tuple[str, tuple[int, int]]:
    words = rng.choice(["a sign", "a red sign with white text", "blue"])
    return words, rng.choice([(64, 48), (48, 48)])


def distiller(folder: Path, rank: int = 4, run: LightningRun = QUICK, asked=prompts) -> Distiller:
    return Distiller(Models(locate(str(folder)), "cpu", "float32"), asked, rank, run)


def test_levels_of_both_are_merged():
    assert merge_levels([1, 0.66, 0.33, 0], [1, 0.9, 0.3301, 0]) == [1, 0.9, 0.66, 0.3301, 0]


def test_walks_are_the_teachers_own_states(folder):
    """At the student's times, prompts of different lengths padded, no LoRA in between."""
    made = distiller(folder)
    walks = made.teacher.walk(random.Random(0))
    assert len(walks) == QUICK.fresh and len({walk.grid for walk in walks}) == 1
    states, asked = together(walks)
    tokens = walks[0].grid[1] * walks[0].grid[2]
    assert states.shape == (2, QUICK.steps + 1, tokens, 64) and states.dtype == torch.float32
    assert asked.embeds.shape[0] == 2
    sigmas = made.teacher.levels(tokens)
    assert torch.allclose(sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))

    levels = merge_levels(made.models.schedule.sigmas(8, tokens).tolist(), sigmas.tolist())
    canvas = Canvas(states[:, 0], (walks[0].grid,), torch.tensor(levels), asked)
    *_, last = denoise(made.models.transformer, canvas)  # in float32; the walk was drawn under autocast
    assert (last.latents - states[:, -1]).norm() <= 0.05 * last.latents.norm()


def test_the_loss_falls_and_the_teacher_stays(folder, tmp_path):
    """A few walks, learnt by heart: the student ends much nearer to the teacher than a plain model of four steps."""
    made = distiller(folder)
    before = {name: weight.clone() for name, weight in made.models.transformer.state_dict().items()}
    for _ in range(3):
        made.add()
    grid = made.kept[0].grid
    walks = [walk for walk in made.kept if walk.grid == grid]
    untouched = made.learn(walks, own=True)
    made.optimizer.zero_grad(set_to_none=True)
    for index in range(40):
        made.learn(walks, own=index % 2 == 0)
        made.optimizer.step()
        made.optimizer.zero_grad(set_to_none=True)
    trained = made.learn(walks, own=True)
    assert trained["loss"] < 0.2 * untouched["loss"] and trained["end"] < 0.2 * untouched["end"]
    after = made.models.transformer.state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in after.items())

    path = export(made.loras, tmp_path / "lightning.safetensors", QUICK)
    with Engine.open(str(folder), device="cpu", dtype="float32", loras=[str(path)]) as engine:
        result = engine.run(Request("a sign", size=(64, 48), seed=1))
        assert result.recipes[0].request["steps"] == 4 and result.recipes[0].request["guidance_scale"] == 1.0
        states, asked = together(walks[:1])
        canvas = Canvas(states[:, 0], (grid,), engine.models.schedule.sigmas(4, 12), asked)
        *_, drawn = denoise(engine.models.transformer, canvas)
        quick = (drawn.latents - states[:, -1]).norm()
        detach(engine.models.transformer)
        *_, plain = denoise(engine.models.transformer, canvas)
        assert quick < 0.8 * (plain.latents - states[:, -1]).norm(), "the file does what the student did"


def test_numbers_that_are_not_finite_are_not_learnt(folder, monkeypatch):
    made = distiller(folder)
    before = [parameter.clone() for parameter in made.parameters]
    learn = made.learn

    def broken(walks, own):
        report = learn(walks, own=own)
        made.parameters[0].grad.fill_(float("nan"))
        return report

    monkeypatch.setattr(made, "learn", broken)
    with pytest.raises(NotFiniteError, match="in step 1: begin again with a lower --lr"):
        made.step()
    assert all(map(torch.equal, before, made.parameters))


def test_distil_writes_a_file_and_goes_on(folder, tmp_path):
    out, told = tmp_path / "runs" / "lightning.safetensors", []
    assert distil(folder, prompts, out, 0.02, rank=2, run=QUICK, log=told.append) == out
    notes = read_metadata(out)
    assert (notes["lanting.steps"], notes["lanting.guidance_scale"], notes["lanting.shift"]) == ("4", "1.0", "3.0")
    assert {info.dtype for info in read_header(out).values()} == {"BF16"}
    checkpoint = torch.load(out.with_suffix(".checkpoint"), weights_only=True)
    assert checkpoint["clock"]["step"] > 0 and told

    again = distiller(folder, rank=2)
    assert again.resume(out.with_suffix(".checkpoint"))
    assert again.clock.step == checkpoint["clock"]["step"]
    for path, halves in checkpoint["lora"].items():
        assert torch.equal(again.loras[path].up, halves["up"]) and torch.equal(again.loras[path].down, halves["down"])
    longer = checkpoint["clock"]["seconds"] / 60 + 0.01
    distil(folder, prompts, out, longer, rank=2, run=QUICK, log=told.append)
    more = torch.load(out.with_suffix(".checkpoint"), weights_only=True)["clock"]
    assert more["step"] > checkpoint["clock"]["step"] and more["seconds"] >= 60 * longer
    with pytest.raises(ModelError, match="begun with another model or settings"):
        distil(folder, prompts, out, 0.03, rank=3, run=QUICK)
    with pytest.raises(RequestError, match="can't be negative"):
        distil(folder, prompts, out, -1)


def test_a_guided_teacher_teaches_the_guided_picture(folder):
    plain = distiller(folder, asked=lambda rng: ("a sign", (64, 48)))
    guided = distiller(folder, run=LightningRun(batch=4, fresh=2, guidance_scale=4.0), asked=plain.teacher.prompts)
    a, b = (one.teacher.walk(random.Random(0))[0].states for one in (plain, guided))
    assert torch.equal(a[0], b[0]) and (a[-1] - b[-1]).norm() > 0.01 * a[-1].norm()


SCRIPT = """
import sys
from pathlib import Path
from lanting.train.lightning import distil
from lanting.train.walks import LightningRun
run = LightningRun(batch=4, fresh=2, capacity=8, teacher_steps=8, save_every=0.0)
distil(Path(sys.argv[1]), lambda rng: ("a sign", (48, 48)), Path(sys.argv[2]), 10, rank=2, run=run)
"""


def test_a_killed_run_leaves_whole_files(folder, tmp_path):
    out = tmp_path / "lightning.safetensors"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(out)]
    running = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    while not out.exists() and running.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.05)
    time.sleep(0.3)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    made = distiller(folder, rank=2)
    assert made.resume(out.with_suffix(".checkpoint")) and made.clock.step > 0
    open_lora(out, transformer_linears(made.models.folder.configs["transformer"]))


def test_a_file_of_rank_16_at_width_128_is_small(tmp_path):
    net = QwenImageTransformer(TransformerConfig(8, 4, 32, joint_attention_dim=128, axes_dims_rope=(4, 14, 14)))
    student, loras = student_of(net, 16, ".*", seed=0)
    assert next(iter(loras.values())).base.weight is net.get_submodule(next(iter(loras))).weight, "weights are shared"
    x, text = torch.randn(1, 4, 64), torch.randn(1, 3, 128)
    with torch.no_grad():
        assert torch.equal(*(one(x, torch.ones(1), text, None, [(1, 2, 2)], 4) for one in (net, student)))
    path = export(loras, tmp_path / "a.safetensors", LightningRun())
    assert path.stat().st_size < 2_000_000
    shapes = {name: tuple(m.weight.shape) for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(open_lora(path, shapes).pieces) == set(shapes)
    with pytest.raises(RequestError, match="no Linear of this model"):
        student_of(net, 16, "nothing", seed=0)
