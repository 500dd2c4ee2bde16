"""Teaching a LoRA: folders as people have them, gradients that packing, recomputing and streaming leave alone, runs
that go on, and memory that is what was said."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import nets
from lanting import Engine, ModelError, Request, RequestError
from lanting.attach.parts import Part
from lanting.attach.stream import Mapped, Slots, Streamer
from lanting.cli.main import main
from lanting.engine.models import Models
from lanting.nn.linears import Int8Linear
from lanting.nn.mmdit import Attend, QwenImageTransformer, TransformerConfig
from lanting.nn.swap import swap
from lanting.specs import get_spec
from lanting.train.kept import alone
from lanting.train.lora import memory
from lanting.train.lora.cache import load, prepare
from lanting.train.lora.dataset import DatasetOptions, batches, read_folder, size_for
from lanting.train.lora.job import LoraJob, LoraTraining
from lanting.train.lora.net import LoraNet
from lanting.train.lora.run import LoraRun, Trainer
from lanting.weights.find import locate
from lanting.weights.stored import NoInit
from live import Live

OWN = get_spec("qwen-image").defaults
QUICK = LoraRun(steps=8, rank=4, batch=2, lr=1e-2, warmup=1, probe_every=4, save_every=3)


def picture(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.picture(*size, seed=seed).save(path)
    return path


def pictures(folder: Path, count: int = 3, size: tuple[int, int] = (64, 48)) -> Path:
    for i in range(count):
        picture(folder / f"{i}.png", size, i)
        (folder / f"{i}.txt").write_text(f"a picture of {i} things", encoding="utf-8")
    return folder


# ---------------------------------------------------------------- folders
def test_a_folder_of_pictures_and_words(tmp_path):
    folder = pictures(tmp_path / "set")
    (folder / "notes.md").write_text("no picture")
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")  # beside each picture on macOS
    found = read_folder(folder, DatasetOptions(trigger="zxq"), OWN)
    assert [one.picture.name for one in found] == ["0.png", "1.png", "2.png"]
    assert found[1].caption == "zxq, a picture of 1 things" and found[1].size == (64, 48)
    (folder / "1.txt").write_text("the ZXQ and zxq\n again", encoding="utf-8-sig")
    assert read_folder(folder, DatasetOptions(trigger="zxq"), OWN)[1].caption == "the ZXQ and zxq again"
    (folder / "1.txt").unlink()
    assert read_folder(folder, DatasetOptions(trigger="zxq"), OWN)[1].caption == "zxq"
    assert read_folder(folder, DatasetOptions(caption="any"), OWN)[1].caption == "any"
    for name, size, words in (("1", (64, 15), "a"), ("2", (64, 48), "a " * 10_000)):
        picture(folder / f"{name}.png", size).with_suffix(".txt").write_text(words)
        with pytest.raises(RequestError, match=rf"{name}.png(: the prompt has| is 64x15)"):
            read_folder(folder, DatasetOptions(), OWN)
        (folder / f"{name}.png").unlink()


def test_what_pictures_were_made_from(tmp_path):
    folder = pictures(tmp_path / "set", 2)
    picture(folder / "references" / "0.png")
    with pytest.raises(RequestError, match=r"1\.png has 0 references"):
        read_folder(folder, DatasetOptions(), OWN)
    picture(folder / "references" / "1.webp")
    assert [one.references[0].name for one in read_folder(folder, DatasetOptions(), OWN)] == ["0.png", "1.webp"]
    for i in range(2):
        for path in (folder / "references").glob(f"{i}.*"):
            path.unlink()
        for k in (2, 1):
            picture(folder / "references" / f"{i}-{k}.png")
    assert [[r.name for r in one.references] for one in read_folder(folder, DatasetOptions(), OWN)][1] == [
        "1-1.png",
        "1-2.png",
    ]


def test_a_list_of_pictures(tmp_path):
    folder = tmp_path / "set"
    picture(folder / "deep" / "a.png"), picture(folder / "b.png")
    rows = [{"file_name": "deep/a.png", "prompt": "words", "references": names} for names in (["b.png"], "b.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    for found in read_folder(folder, DatasetOptions(), OWN):
        assert found.caption == "words" and [one.name for one in found.references] == ["b.png"]
    for line in ('{"file_name": "../x.png", "text": "a"}', '{"text": "a"}', "[]", "{", '{"file_name": 3, "text": "a"}'):
        (folder / "metadata.jsonl").write_text(json.dumps(rows[0]) + "\n" + line)
        with pytest.raises(RequestError, match="line 2"):
            read_folder(folder, DatasetOptions(), OWN)


def test_sizes_keep_their_ratio_and_are_never_larger_than_the_picture():
    assert size_for((3000, 2000), None, OWN) == (1248, 832)
    assert size_for((3000, 2000), 512, OWN) == (640, 416)
    assert size_for((300, 200), None, OWN) == (304, 192)
    assert size_for((224, 96), None, get_spec("nano").defaults) == (224, 96)
    assert size_for((4000, 4000), None, get_spec("nano").defaults) == (256, 256)
    rng = random.Random(0)
    for _ in range(200):
        w, h = rng.randint(64, 3000), rng.randint(64, 3000)
        width, height = size_for((w, h), None, OWN)
        assert width % 16 == height % 16 == 0 and width * height <= 1.1 * 1024 * 1024
        assert abs(width / height / (w / h) - 1) < 0.35


def test_batches_hold_every_example_once_and_one_kind_each():
    kinds = ["a"] * 5 + ["b"] * 3
    made = [batches(kinds, 2, 1, epoch) for epoch in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    for each in made:
        assert sorted(i for batch in each for i in batch) == list(range(8)) and len(each) == 5
        assert all(len({kinds[i] for i in batch}) == 1 for batch in each)


# ---------------------------------------------------------------- gradients
def inputs(net: QwenImageTransformer) -> tuple:
    draw = torch.Generator().manual_seed(5)
    config = net.config
    latents = torch.randn(2, 12 + 6, config.in_channels, generator=draw)
    words = torch.randn(2, 5, config.joint_attention_dim, generator=draw)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return latents, torch.tensor([0.3, 0.8]), words, mask, ((1, 3, 4), (1, 2, 3)), 12


def bare(net: QwenImageTransformer, streamer=None) -> Any:
    """A network where it computes, without files."""
    return SimpleNamespace(net=net, device=torch.device("cpu"), streamer=streamer)


def gradients(net: QwenImageTransformer, streamer=None, plain: bool = False) -> dict[str, torch.Tensor]:
    """Of every LoRA, its halves random; `plain`: by torch alone."""
    made = LoraNet(bare(net, streamer), 3, 6.0, "all", 1)
    draw = torch.Generator().manual_seed(2)
    for learner in made.loras.values():
        learner.up.data = torch.randn(learner.up.shape, generator=draw) * 0.1
    if plain:
        for module in net.modules():
            module.__dict__.pop("forward", None)
            module.__dict__.pop("product", None)
    loss = made(*inputs(net)).square().mean()
    made.learn(loss)
    grads = {f"{path} {name}": getattr(one, name).grad for path, one in made.loras.items() for name in ("down", "up")}
    assert len(grads) == 2 * 14 * 5
    grads = {path: torch.zeros(1) if grad is None else grad for path, grad in grads.items()}
    silent = {path for path, grad in grads.items() if not grad.any()}
    last = "transformer_blocks.4."  # its words go nowhere
    unheard = ("txt_mlp", "to_add_out", "add_q_proj")
    assert all(path.startswith(last) and any(name in path for name in (*unheard, "txt_mod")) for path in silent), silent
    return grads


@pytest.mark.parametrize("change", [nets.int4, lambda net: net], ids=["int4", "plain"])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_recomputing_and_packing_leave_gradients_alone(change, zero_cond_t):
    exact = gradients(change(nets.transformer(zero_cond_t=zero_cond_t)), plain=True)
    found = gradients(change(nets.transformer(zero_cond_t=zero_cond_t)))
    for path, grad in exact.items():
        assert torch.allclose(found[path], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max())), path


@pytest.mark.parametrize("carrier", ["mapped", "ram", "disk"])
def test_blocks_that_stream_leave_gradients_alone(carrier):
    exact = gradients(nets.int4(nets.transformer()))
    net = nets.int4(nets.transformer())
    kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    read = lambda names: {name: kept[name] for name in names}  # noqa: E731
    blocks = list(net.transformer_blocks)
    parts = [Part(blocks[i], f"transformer_blocks.{i}") for i in range(1, 5)]
    cpu = torch.device("cpu")
    bringer = Mapped(parts, read) if carrier == "mapped" else Slots(parts, read, cpu, carrier, 2)
    streamer = Streamer(blocks[1:], bringer, 2)
    try:
        found = gradients(net, streamer)
        assert streamer.peak <= 2
        streamer.rest()
        assert all(part.bytes == 0 for part in parts)
    finally:
        streamer.close()
    assert all(torch.equal(found[path], grad) for path, grad in exact.items())


def test_a_lora_that_learnt_nothing_changes_nothing():
    plain, learning = nets.transformer(), nets.transformer()
    made = LoraNet(bare(learning), 3, 3.0, "attention", 1)
    with torch.no_grad():
        assert torch.equal(made(*inputs(plain)), plain(*inputs(plain)))
    assert len(made.loras) == 8 * 5
    for targets, said in (("nowhere", "no Linear"), ("(", "no pattern")):
        with pytest.raises(RequestError, match=said):
            LoraNet(
                SimpleNamespace(net=nets.transformer(), device=torch.device("cpu"), streamer=None), 3, 3.0, targets, 1
            )


# ---------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("lora") / "tiny", layers=2)


def job(model: Path | str, data: Path, out: Path, run: LoraRun = QUICK, **more) -> LoraJob:
    found = locate(str(model))
    examples = read_folder(data, DatasetOptions(), found.spec.defaults)
    return LoraJob(found, examples, out, run, device="cpu", dtype="float32", **more)


def trained(own: LoraJob, stop: int = 10**9) -> list:
    reports = []
    for report in LoraTraining(own).run(lambda done, count: None):
        reports.append(report)
        if report.step == stop:
            break
    return reports


def test_the_probe_falls_and_a_run_that_was_cut_ends_alike(folder, tmp_path):
    data = pictures(tmp_path / "set")
    whole = trained(job(folder, data, tmp_path / "whole.safetensors"))
    probes = [report.probe for report in whole if report.probe is not None]
    assert [report.step for report in whole] == list(range(9)) and len(probes) == 3
    assert probes[-1] < 0.97 * probes[0]

    cut = job(folder, data, tmp_path / "cut.safetensors")
    trained(cut, stop=5)  # its checkpoint is of step 3
    rest = trained(cut)
    assert [report.step for report in rest] == [4, 5, 6, 7, 8]
    assert [report.loss for report in rest] == [report.loss for report in whole[4:]]
    one, other = load_file(cut.out), load_file(tmp_path / "whole.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert trained(cut) == [], "a run that is done has nothing to do"
    with pytest.raises(ModelError, match="another rank"):
        trained(job(folder, data, cut.out, replace(QUICK, rank=5)))
    assert [report.step for report in trained(replace(cut, run=replace(QUICK, steps=9)))] == [9]
    cut.checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(ModelError, match="can't be read"):
        trained(cut)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_packed_model_learns_and_the_file_changes_pictures(folder, tmp_path, quant):
    data, out = pictures(tmp_path / "set"), tmp_path / "ink.safetensors"
    samples = ("a sample",) if quant == "int4" else ()
    trained(job(folder, data, out, quant=quant, samples=samples, sample_every=8, trigger="ink"))
    drawn = {path.name for path in tmp_path.glob("ink.samples/*")}
    assert drawn == ({"step-00000-1.png", "step-00008-1.png"} if samples else set())
    request = Request("a picture of 1 things", size=(64, 48), seed=1, steps=2)
    drawn = []
    for loras in ([], [f"{out}"], [f"{out}:0"]):
        with Engine.open(str(folder), device="cpu", dtype="float32", quant=quant, loras=loras) as engine:
            drawn.append(engine.run(request).images[0].tobytes())
    assert drawn[0] == drawn[2] != drawn[1]


def test_edits_learn_beside_their_references(tmp_path):
    """nano, with a picture each was made from: the reader and the transformer see it."""
    data = pictures(tmp_path / "set", 2, (96, 64))
    for i in range(2):
        picture(data / "references" / f"{i}.png", (96, 64), 9 - i)
    own = job("nano", data, tmp_path / "edit.safetensors", LoraRun(steps=2, rank=2, batch=2, save_every=1))
    reports = trained(own)
    assert len(reports) == 3 and reports[-1].probe is not None
    seen = [load(path) for path in sorted((tmp_path / "edit.cache").iterdir())]
    assert all(one.references.shape == one.clean.shape and one.grids == ((1, 4, 6),) for one in seen)
    assert not torch.equal(seen[0].references, seen[1].references)
    models = Models(own.folder, "cpu", "float32")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "edit.cache").iterdir()}
    prepare(models, own.examples, tmp_path / "edit.cache", lambda done, count: pytest.fail("they are there"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "edit.cache").iterdir()}


# ---------------------------------------------------------------- memory
class Flash(torch.autograd.Function):
    """Attention as kernels do it: nothing of the size of tokens by tokens is ever there."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(v)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out

    @staticmethod
    def backward(ctx, *grads):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class FlashAttend(nn.Module):
    def forward(self, q, k, v, mask):
        return Flash.apply(q, k, v)


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_step_takes_what_was_said(zero_cond_t, monkeypatch):
    """Three blocks of full width at 1024 x 1024, int8, one reference where there may be one: bytes alive on meta."""
    words, refs = 300, 1 if zero_cond_t else 0
    tokens = 4096 * (1 + refs) + words
    with torch.device("meta"), NoInit():
        net = QwenImageTransformer(TransformerConfig(num_layers=3, zero_cond_t=zero_cond_t)).to(torch.bfloat16)
        int8 = lambda _, old: Int8Linear(old.in_features, old.out_features, scale=(old.out_features, 1))  # noqa: E731
        swap(net.transformer_blocks, nn.Linear, int8)
        swap(net, Attend, lambda path, old: FlashAttend())
    monkeypatch.setattr(memory, "stored", lambda models, kind: SimpleNamespace(module=net))
    device = torch.device("meta")
    models = SimpleNamespace(dtype=torch.bfloat16, device=device)
    said = memory.need(models, "int8", tokens, LoraRun(rank=16))

    made = LoraNet(SimpleNamespace(net=net, device=device, streamer=None), 16, 16.0, "blocks", 0)
    for p in made.parameters:
        p.grad = torch.empty_like(p)
    numbers = sum(p.numel() for p in made.parameters)
    assert said.learning == 16 * numbers
    net.rope = lambda grids, text, device: (torch.empty(tokens, 64, device="meta"),) * 2
    latents = torch.empty(1, tokens - words, 64, device="meta", dtype=torch.bfloat16)
    prompt = torch.empty(1, words, 3584, device="meta", dtype=torch.bfloat16)
    with Live() as live:
        made.learn(made(latents, torch.empty(1, device="meta"), prompt, None, (), 4096).float().square().mean())
    assert live.peak <= said.activations <= 1.3 * live.peak, (said, live.peak, live.where)


def test_what_does_not_fit_is_packed_and_then_streams(folder):
    models, run = Models(locate(str(folder)), "cpu", "float32"), LoraRun(rank=4)
    every = [memory.need(models, kind, 100, run) for kind in memory.KINDS]
    assert every[0].total > every[1].total > every[2].total
    for one in every:
        assert memory.choose(models, "auto", one.total, 100, run) == one
    assert memory.choose(models, "int8", every[1].total, 100, run).kind == "int8"
    with pytest.raises(RequestError, match=r"needs \d+ (kB|MB) of memory here and \d+ (kB|MB|bytes) are free"):
        memory.choose(models, "auto", every[2].weights // 2, 100, run)


def test_a_run_whose_blocks_stream_ends_as_one_whose_blocks_stay(tmp_path):
    model = tiny.save_folder(tmp_path / "deep", layers=5)
    data, files = pictures(tmp_path / "set"), []
    for name in ("stay", "stream"):
        own = job(model, data, tmp_path / f"{name}.safetensors", LoraRun(steps=2, rank=2, save_every=1), quant="int8")
        training = LoraTraining(own)
        if name == "stream":
            tokens = max(memory.tokens_of(one, training.models.spec.defaults) for one in own.examples)
            training.need = memory.need(training.models, "int8", tokens, own.run, resident=1)
        assert len(list(training.run(lambda done, count: None))) == 3
        files.append(load_file(own.out))
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():  # a mapped weight begins elsewhere in memory, which may round sums otherwise
        assert torch.allclose(files[1][name].float(), tensor.float(), rtol=0.02, atol=1e-5), name


# ---------------------------------------------------------------- the command
def test_the_command_teaches_nano_and_goes_on(tmp_path, capsys):
    data, out = pictures(tmp_path / "set", 2), tmp_path / "new" / "mine.safetensors"
    told = ["train", "lora", str(data), "-o", str(out), "--rank", "2", "--lr", "1e-3", "--trigger", "zxq"]
    assert main([*told, "--steps", "2"]) == 0
    first = capsys.readouterr()
    assert first.out.strip() == str(out) and "GB of memory" in first.err
    (beside := tmp_path / "beside").touch()
    assert out.stat().st_mode == beside.stat().st_mode  # others may read it, too
    steps = [json.loads(line) for line in first.err.splitlines() if line.startswith("{")]
    assert steps[-1]["step"] == 2 and steps[-1]["probe"] > 0
    assert main(["lora", "show", str(out)]) == 0 and "zxq" in capsys.readouterr().out
    torn = next(out.with_suffix(".cache").iterdir())
    torn.write_bytes(torn.read_bytes()[:1000])  # it ended the run with a word of the library's
    assert main([*told, "--steps", "2"]) == 0 and '"step"' not in capsys.readouterr().err
    with alone(out):
        assert main([*told, "--steps", "3"]) == 2 and "being written by another run" in capsys.readouterr().err


def test_too_little_memory_is_a_sentence_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    data, out = pictures(tmp_path / "set", 2), tmp_path / "mine.safetensors"
    told = ["train", "lora", str(data), "-o", str(out), "--rank", "2", "--steps", "3", "--save-every", "1"]
    learn = Trainer.learn

    def greedy(trainer: Trainer) -> Any:
        if trainer.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return learn(trainer)

    monkeypatch.setattr(Trainer, "learn", greedy)
    assert main(told) == 2
    assert "too little memory" in capsys.readouterr().err and out.exists()
    monkeypatch.setattr(Trainer, "learn", learn)
    assert main(told) == 0 and '"step": 0' not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["none"], "no folder"),
        (["EMPTY"], "holds no pictures"),
        (["SET", "-o", "x.pt"], ".safetensors"),
        (["SET", "-o", "D.safetensors"], "D.safetensors is a folder"),
        (["SET", "-o", "/dev/null/new/x.safetensors"], "x.safetensors can't be written"),
        (["SET", "--noise", "loud"], "--noise"),
        (["SET", "--lr", "7"], "--lr"),
        (["SET", "--seed", "-1"], "--seed must be a whole number from 0"),
        (["SET", "--seed", str(2**63)], "--seed must be"),
        (["SET", "--targets", "nothing"], "no Linear"),
        (["SET", "--targets", "("], "no pattern"),
        (["SET", "--quant", "int3"], "int3"),
        (["SET", "--device", "tpu"], "tpu"),
        (["SET", "--dtype", "float16"], "use bfloat16 or float32"),
        (["BARE"], "has no caption"),
        (["BROKEN"], "broken.png"),
    ],
)
def test_what_can_not_be_taught_is_a_sentence(tmp_path, monkeypatch, capsys, wrong, said):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "SET", 1), picture(tmp_path / "BARE" / "a.png"), (tmp_path / "EMPTY").mkdir()
    (tmp_path / "D.safetensors").mkdir()
    pictures(tmp_path / "BROKEN", 1)
    (tmp_path / "BROKEN" / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "BROKEN" / "broken.txt").write_text("words")
    assert main(["train", "lora", *wrong]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert not list(tmp_path.glob("lora.*"))  # nor was an example prepared
