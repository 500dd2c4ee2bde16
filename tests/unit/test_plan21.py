"""The planner and Qwen-Image-2.1: sizes to the byte, activations against the real networks on meta tensors.

Tolerances: sizes and names none; a step 2 % below to 5 % above what is alive, the autoencoder 3 % and 6 %, the reader
5 % and 10 %, as for the family's first networks (test_plan.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lanting.core.types import Request
from lanting.nn import qwen3_vl
from lanting.nn.qwen3_language import Qwen3LanguageConfig
from lanting.nn.qwen3_vision import Qwen3VisionConfig
from lanting.nn.qwen3_vl import Qwen3VL, Qwen3VLConfig
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig, keep_prefix, layout
from lanting.nn.vae21 import AutoencoderKLQwenImage21, VAE21Config, to_official_weights
from lanting.plan import Budget, Device, Machine, job_of, plan, release, survey, usual_job
from lanting.plan import activations as a
from lanting.plan.activations import Job
from lanting.plan.costs import Bill, Way
from lanting.plan.geometry import Geometry, Language3, SingleStream, Transformer, Vae21, Vision3
from lanting.plan.kinds import KINDS
from lanting.plan.sizes import (
    language_tensors,
    live_weights,
    parameters,
    reader_bytes,
    transformer_sizes,
    transformer_tensors,
    vae_tensors,
    vision_tensors,
)
from lanting.specs import get_spec, settle
from live import Live, coding_peaks

G = 10**9
BF16 = KINDS["bf16"]
MODEL = release(get_spec("qwen-image-2.1"))


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


# ---------------------------------------------------------------- sizes
def test_the_release_is_known_to_the_parameter_from_its_own_file():
    """The reader's number is that of transformers 5: Qwen3VLForConditionalGeneration with the 8B model's config."""
    assert MODEL.geometry == Geometry(SingleStream(), Vae21(), Language3(), Vision3())
    assert parameters(MODEL.geometry) == {
        "transformer": 7_115_124_736,
        "text_encoder": 8_767_123_696,
        "vae": 337_740_404,
    }
    assert live_weights(Vae21()) == 330_987_188
    assert release(get_spec("qwen-image-2.1-turbo")).geometry == MODEL.geometry


def test_there_is_no_modulation_to_tabulate():
    sizes = transformer_sizes(SingleStream(), BF16, BF16)
    assert sizes.total == 2 * 7_115_124_736 and sizes.modulation == sizes.mod_linear == 0
    assert sizes.linear == 3 * 4096**2
    assert sizes.rest == sizes.total - 2 * 32 * (13 * 4096**2 + 2 * 128)
    kinds = {name: transformer_sizes(SingleStream(), KINDS[name], BF16) for name in ("int8", "int4")}
    packed = 32 * 13 * 4096**2  # weights; three of ten Linears have 12288 rows or columns
    assert kinds["int8"].total == sizes.total - packed + 32 * 4 * (5 * 4096 + 2 * 3 * 4096)
    assert kinds["int4"].total == sizes.total - 2 * packed + packed * 34 // 64


@pytest.mark.parametrize(
    "config",
    [SingleStreamConfig(num_layers=2), SingleStreamConfig(3, 2, 64, 96, 16, 12, patch_size=2, mlp_ratio=2)],
    ids=["wide", "small"],
)
def test_tensors_are_those_of_the_real_transformer(config):
    with torch.device("meta"):
        real = QwenImage21Transformer(config).state_dict()
    ours = SingleStream(**{name: getattr(config, name) for name in SingleStream.__dataclass_fields__})
    assert shapes(real) == dict(transformer_tensors(ours))


@pytest.mark.parametrize(
    "config",
    [VAE21Config(), VAE21Config(base_dim=16, decoder_base_dim=None, num_res_blocks=1, dim_mult=(2, 4, 8, 8, 8))],
    ids=["published", "small"],
)
def test_tensors_are_those_of_the_real_vae(config):
    with torch.device("meta"):
        state = AutoencoderKLQwenImage21(config).state_dict()
        official = to_official_weights(state, config)
    given = {**asdict(config), "decoder_base_dim": config.decoder_base_dim}
    ours = Geometry.from_configs({"transformer": {"_class_name": "QwenImage21Transformer2DModel"}, "vae": given}).vae
    assert shapes(official) == dict(vae_tensors(ours))
    assert sum(tensor.numel() for tensor in state.values()) == live_weights(ours)


def test_tensors_are_those_of_the_real_reader():
    text = Qwen3LanguageConfig(1024, 128, 384, 2, 4, 2, 64, mrope_section=(12, 10, 10))
    eye = Qwen3VisionConfig(2, 64, 96, 4, 128, num_position_embeddings=36, deepstack_visual_indexes=(0, 1))
    with torch.device("meta"):
        real = Qwen3VL(Qwen3VLConfig(text, eye)).state_dict()
    words = Language3(1024, 128, 384, 2, 4, 2, 64)
    seen = Vision3(2, 64, 96, 4, 128, num_position_embeddings=36, deepstack_visual_indexes=(0, 1))
    assert shapes(real) == {**dict(language_tensors(words, False)), **dict(vision_tensors(seen))}
    assert dict(language_tensors(words, True)).keys() - real.keys() == {"lm_head.weight"}


def test_configs_say_which_networks_they_are():
    assert Geometry.from_configs({"transformer": {"num_layers": 2}}).transformer == Transformer(num_layers=2)
    configs = {
        "transformer": {"_class_name": "QwenImage21Transformer2DModel", "in_channels": 16, "out_channels": None},
        "vae": {"decoder_base_dim": None, "base_dim": 32},
        "text_encoder": {"text_config": {"head_dim": 16}, "vision_config": {"deepstack_visual_indexes": [1]}},
    }
    found = Geometry.from_configs(configs)
    assert found.transformer == SingleStream(in_channels=16, out_channels=16)
    assert found.vae == Vae21(base_dim=32, decoder_base_dim=0) and found.vae.decoder_width == 32
    assert found.language == Language3(head_dim=16) and found.vision == Vision3(deepstack_visual_indexes=(1,))


# ---------------------------------------------------------------- activations, against the networks themselves
@pytest.fixture
def no_attention(monkeypatch):
    """Meta tensors choose an attention that materializes all scores; the devices' own doesn't."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *rest, **more: torch.empty_like(q))


def painted(config: SingleStreamConfig, job: Job, dtype: torch.dtype) -> tuple[int, int]:
    """Peak bytes of a drawing's steps of a real transformer on meta tensors, and what it keeps between them."""
    references = [a.tokens(size) for size in job.references]
    grids = tuple((1, 1, count) for count in (job.target_tokens, *references))
    places = tuple(range(4, 4 + len(references)))
    with torch.device("meta"), torch.no_grad():
        net = QwenImage21Transformer(config).to(dtype)
        place = layout(config.axes_dims_rope, grids, places, job.text, torch.device("meta"))
        net.layouts = lambda *_: place  # type: ignore[assignment]
        given = torch.empty(job.batch, job.picture_tokens, config.in_channels, dtype=dtype)
        sides = [torch.empty(job.batch, job.text, config.context_in_dim, dtype=dtype) for _ in range(job.branches)]
        with keep_prefix(net) if job.kept else nullcontext(), Live() as live:
            for _ in range(2):
                for branch, states in zip(("positive", "negative"), sides, strict=False):
                    time = torch.empty(job.batch)
                    net(given, time, states, None, grids, job.target_tokens, branch=branch, places=places)
            kept = live.now
    masks = sum(mask.nbytes for *_, mask in place.segments if mask is not None)
    turns = sum(table.nbytes for table in (*place.prefix, *place.target))
    return live.peak + given.nbytes + sum(s.nbytes for s in sides) + job.branches * (turns + masks), kept


@pytest.mark.parametrize(
    ("job", "dtype"),
    [
        (Job((1024, 1024), text=300, guided=False), "bfloat16"),
        (Job((1024, 1024), text=300, guided=False), "float32"),
        (Job((256, 256), text=517, batch=3), "bfloat16"),
        (Job((1024, 768), ((1024, 1024),), text=700, guided=False), "float32"),
        (Job((768, 768), ((1024, 1024), (640, 480)), text=700), "bfloat16"),
        (Job((1024, 768), ((640, 480),), text=300, kept=False, guided=False), "bfloat16"),
        (Job((1024, 768), ((640, 480),), text=300, kept=False, guided=False), "float32"),
    ],
    ids=["large", "large, float32", "words", "edit", "guided", "again", "again, float32"],
)
def test_a_step_takes_what_the_real_network_takes(job, dtype, no_attention):
    config, net = SingleStreamConfig(4, 8, context_in_dim=1024), SingleStream(4, 8, context_in_dim=1024)
    job = replace(job, cut=True)
    counted, kept = painted(config, job, getattr(torch, dtype))
    said = a.transformer_peak(net, transformer_sizes(net, BF16, BF16), BF16, job, dtype, True, False)
    assert 0.98 * counted <= said <= 1.05 * counted
    assert kept == pytest.approx(a.kept_bytes(net, job, dtype), rel=1e-3, abs=100)


@pytest.mark.parametrize(
    ("size", "tile", "dtype"),
    [((1024, 1024), 0, "bfloat16"), ((1024, 1024), 0, "float32"), ((304, 256), 256, "bfloat16")],
)
def test_decoding_and_encoding_take_what_the_real_vae_takes(size, tile, dtype, no_attention):
    kind, (width, height) = getattr(torch, dtype), size
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLQwenImage21(VAE21Config()).to(kind)
        latents = torch.empty(1, 64, height // 16, width // 16, dtype=kind)
        pixels = torch.empty(1, 4, height, width, dtype=kind)
        peaks = coding_peaks(vae, latents, pixels, bool(tile))
    said = a.decoding_peak(Vae21(), Job(size), dtype, tile), a.encoding_peak(Vae21(), (size,), dtype, tile)
    beside = 16 * width * height, 48 * width * height  # float32 pictures, which the codec makes around the network
    for told, counted, more in zip(said, peaks, beside, strict=True):
        assert 0.97 * counted <= told <= 1.06 * counted + 2 * more


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("seen", [(), ((512, 512),), ((1024, 1024), (768, 512))], ids=["words", "one", "two"])
def test_reading_takes_what_the_real_reader_takes(seen, dtype, no_attention, monkeypatch):
    text = Qwen3LanguageConfig(1024, 512, 1536, 6, 8, 2, 64, mrope_section=(12, 10, 10))
    eye = Qwen3VisionConfig(4, 288, 1076, 4, 512, deepstack_visual_indexes=(0, 1, 2))
    job = Job(text=400, opening=14, prompts=2, seen=seen, cell=32, cut=True)
    length = job.read_tokens
    monkeypatch.setattr(qwen3_vl, "picture_positions", lambda *_: torch.empty(3, length, dtype=torch.long))
    monkeypatch.setattr(torch.Tensor, "masked_scatter", lambda x, *_: torch.empty_like(x))  # meta tensors have none
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: [[]] * len(x))
    grids = [(height // 16, width // 16) for width, height in seen]
    with torch.device("meta"), torch.no_grad():
        net = Qwen3VL(Qwen3VLConfig(text, eye)).to(getattr(torch, dtype))
        patches = torch.empty(4 * job.seen_tokens, 2 * 3 * 16 * 16) if seen else None
        with Live() as live:
            net(torch.zeros(2, length, dtype=torch.long), patches, grids)
    counted = live.peak + (0 if patches is None else 2 * patches.nbytes)  # those of each picture, and all together
    geometry = Geometry(
        language=Language3(1024, 512, 1536, 6, 8, 2, 64),
        vision=Vision3(4, 288, 1076, 4, 512, deepstack_visual_indexes=(0, 1, 2)),
    )
    assert 0.95 * counted <= a.reader_peak(geometry, job, BF16, dtype, True) <= 1.1 * counted


def test_work_is_that_of_the_real_networks():
    """Steps behind the first compute the target alone; the first computes the prefix beside."""
    config, net = SingleStreamConfig(2, 8, context_in_dim=1024), SingleStream(2, 8, context_in_dim=1024)
    job = Job((512, 512), text=256, cut=True)
    found = []
    with torch.device("meta"), torch.no_grad():
        real, states = QwenImage21Transformer(config), torch.empty(1, 256, 1024)
        given, time, grids = torch.empty(1, 1024, 64), torch.empty(1), ((1, 32, 32),)
        place = layout(config.axes_dims_rope, grids, (), 256, torch.device("meta"))
        real.layouts = lambda *_: place  # type: ignore[assignment]
        with keep_prefix(real):
            for _ in range(2):
                with FlopCounterMode(display=False) as counter:
                    real(given, time, states, None, grids, 1024)
                found.append(counter.get_total_flops())
        vae, latents = AutoencoderKLQwenImage21(VAE21Config()), torch.empty(1, 64, 16, 16)
        with FlopCounterMode(display=False) as counter:
            vae.decode(latents)
    assert found[1] == pytest.approx(a.work(net, job), rel=0.02)
    assert a.first_work(net, job) > found[0] - found[1] > 0.4 * a.first_work(net, job)  # the last block needs less
    assert counter.get_total_flops() == pytest.approx(a.decoding_work(Vae21(), Job((256, 256))), rel=0.01)
    again = replace(job, kept=False)
    assert a.work(net, again) == a.work(net, job) + a.first_work(net, job) and a.first_work(net, again) == 0
    assert a.first_work(Transformer(), Job()) == 0


# ---------------------------------------------------------------- choosing
def test_a_picture_stands_in_the_transformers_text_with_its_own_tokens():
    images = (Image.new("RGB", (1920, 1080)), Image.new("RGB", (800, 600)))
    job = job_of(settle(Request("swap them", images=images), MODEL.spec), MODEL)
    assert job.references == job.seen == ((1376, 768), (1184, 896))  # both readers see the same pictures
    assert job.opening == 14 and job.text == job.text_tokens == 9 + 8 + 2 * 7
    assert job.read_tokens == 14 + job.text + 43 * 24 + 37 * 28
    assert job.prefix_tokens == job.text + 86 * 48 + 74 * 56 and not job.guided and job.steps == 40


def test_long_prompts_are_not_cut():
    lengths = [job_of(settle(Request("word " * count), MODEL.spec), MODEL).text for count in (10, 100, 1000)]
    assert lengths == [50 + 8, 500 + 8, 512 + (5000 - 512) // 3 + 8]
    assert usual_job(MODEL, None).text == 512 and usual_job(MODEL, None, 2).prefix_tokens == 512 + 14 + 2 * 4096


def machine(vram: int, ram: int) -> Machine:
    gpu = (Device("cuda", "NVIDIA GeForce RTX 4090", vram, vram),) if vram else ()
    return Machine(ram, ram, 8, (*gpu, Device("cpu", "CPU")))


@pytest.mark.parametrize(("vram", "ram"), [(80, 128), (24, 64), (16, 32), (12, 32), (8, 32), (0, 64), (0, 16)])
def test_every_usual_machine_has_a_plan_within_its_memory(vram, ram):
    home = machine(vram * G, ram * G)
    chosen = plan(MODEL, usual_job(MODEL, None), home)
    assert chosen.peak_vram <= vram * G and chosen.peak_ram <= ram * G
    assert chosen.blocks == 32 and not chosen.modulation_table
    assert not any(each.modulation_table for each, _ in survey(MODEL, usual_job(MODEL, None), home, Budget()))
    if vram == 80:
        assert chosen.trivial and chosen.step_seconds and chosen.image_seconds > 40 * chosen.step_seconds


def test_references_that_have_no_room_are_computed_again_rather_than_refused():
    job = usual_job(MODEL, None, 3)
    small, large = (plan(MODEL, job, machine(vram * G, 64 * G)) for vram in (8, 40))
    assert not small.prefix_kept and small.peak_vram <= 8 * G and not small.trivial
    assert any("computed again" in reason for reason in small.reasons)
    assert large.prefix_kept and large.wait == 1 < 3 < small.wait
    assert large.step_seconds * small.wait == pytest.approx(small.step_seconds, rel=0.2)
    assert all(each.prefix_kept for each, _ in survey(MODEL, usual_job(MODEL, None), machine(8 * G, 64 * G)))


def test_the_prefix_stays_until_the_picture_is_decoded():
    home = machine(80 * G, 128 * G)
    small, large = (Bill(MODEL, usual_job(MODEL, (512, 512), count), home, home.devices[0]) for count in (1, 4))
    way = Way(BF16, BF16, 32, "none", False, "unload", "disk", 0)
    more = large.peaks(way)[0] - small.peaks(way)[0]
    kept = large.prefix - small.prefix
    assert kept == 2 * 32 * 4096 * 2 * 3 * (4096 + 7) and more > kept


def test_the_reader_is_counted_without_its_head_and_without_eyes_where_nothing_is_seen():
    every = reader_bytes(MODEL.geometry, BF16, BF16, True, True).every
    assert every == 2 * 8_767_123_696
    eye = sum(torch.Size(shape).numel() for _, shape in vision_tensors(Vision3()))
    assert MODEL.reader(BF16, "bfloat16", False).every == every - 2 * (eye + 151_936 * 4096)
    assert MODEL.reader(BF16, "bfloat16", True).every == every - 2 * 151_936 * 4096
