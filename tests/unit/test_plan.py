"""The planner: sizes to the byte, activations against the real networks, and what a choice must always hold."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lanting.core.errors import RequestError
from lanting.core.types import Request
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.qwen_vl import LanguageConfig, QwenVL, QwenVLConfig, VisionConfig
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig
from lanting.plan import (
    Budget,
    Device,
    Machine,
    RefusalError,
    cards,
    detect,
    find_card,
    job_of,
    machine_of,
    parse_bytes,
    plan,
    release,
    survey,
    usual_job,
)
from lanting.plan import activations as a
from lanting.plan.activations import Job
from lanting.plan.cards import Card, amd_cards, large, nvidia_cards, shown_by_hip
from lanting.plan.costs import Bill, Way
from lanting.plan.geometry import Geometry, Language, Transformer, Vae, Vision
from lanting.plan.kinds import KINDS
from lanting.plan.machine import cgroup_memory, gpus, parse_meminfo
from lanting.plan.planner import SPARE, rank
from lanting.plan.sizes import (
    Reader,
    language_tensors,
    live_weights,
    parameters,
    reader_bytes,
    transformer_sizes,
    transformer_tensors,
    vision_tensors,
)
from lanting.specs import get_spec, settle, spec_names
from live import Live, coding_peaks

G = 10**9
BF16 = KINDS["bf16"]


# ---------------------------------------------------------------- sizes
def test_the_published_networks_are_known_to_the_parameter():
    assert parameters(Geometry()) == {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656, "vae": 126_892_531}
    assert live_weights(Vae()) == 44_599_603
    assert parameters(Geometry(vae=Vae(input_channels=4)))["vae"] == 126_897_716
    assert parameters(Geometry(Transformer(use_additional_t_cond=True)))["transformer"] == 20_430_407_232


def test_modulation_is_a_third():
    sizes = transformer_sizes(Transformer(), BF16, BF16)
    assert sizes.total == 2 * 20_430_401_088
    assert sizes.blocks * sizes.modulation == 2 * 60 * 2 * (18432 * 3072 + 18432)


def test_the_packed_transformer_without_modulation_takes_seven_gigabytes():
    sizes = transformer_sizes(Transformer(), KINDS["int4"], BF16)
    assert 7.0 * G < sizes.total - sizes.blocks * sizes.modulation < 7.5 * G


@pytest.mark.parametrize(
    "config",
    [TransformerConfig(num_layers=2), TransformerConfig(3, 2, 64, 96, use_additional_t_cond=True)],
    ids=["wide", "small"],
)
def test_tensors_are_those_of_the_real_transformer(config):
    with torch.device("meta"):
        real = QwenImageTransformer(config).state_dict()
    fields = Transformer.__dataclass_fields__
    ours = Transformer(**{name: getattr(config, name) for name in fields})
    assert {name: tuple(t.shape) for name, t in real.items()} == dict(transformer_tensors(ours))


def test_tensors_are_those_of_the_real_reader():
    text = LanguageConfig(1024, 128, 384, 2, 4, 2, mrope_section=(4, 6, 6))
    with torch.device("meta"):
        real = QwenVL(QwenVLConfig(text, VisionConfig(2, 64, 96, 4, 128, fullatt_block_indexes=(1,)))).state_dict()
    ours = [*language_tensors(Language(1024, 128, 384, 2, 4, 2), True), *vision_tensors(Vision(2, 64, 96, 128))]
    assert {name: tuple(t.shape) for name, t in real.items()} == dict(ours)


def test_live_weights_are_those_of_the_real_vae():
    config = VAEConfig(base_dim=16, num_res_blocks=1, temperal_downsample=(False, False, True))
    with torch.device("meta"):
        real = AutoencoderKLQwenImage(config)
    ours = Vae(base_dim=16, num_res_blocks=1, temperal_downsample=(False, False, True))
    assert sum(p.numel() for p in real.parameters()) == live_weights(ours)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4", "bf16"])
def test_packed_bytes_are_those_of_the_real_linears(kind):
    """The transformer of nano, packed by our own Linears, weighs what the plan says."""
    from lanting.attach.quant import chooser
    from lanting.engine.choose import DTYPES
    from lanting.weights.build import store_transformer
    from lanting.weights.find import locate
    from lanting.weights.stored import Placing
    from nets import bytes_of

    folder = locate("nano")
    choose = None if kind == "bf16" else chooser("transformer", kind)
    placing = Placing(DTYPES["bfloat16"], torch.device("cpu"), choose)
    net = store_transformer(folder.checkpoint("transformer"), folder.configs["transformer"], placing).fill()
    sizes = transformer_sizes(Geometry.from_configs(folder.configs).transformer, KINDS[kind], BF16)
    assert abs(sizes.total - bytes_of(net)) <= 0.001 * sizes.total


# ---------------------------------------------------------------- activations, against the networks themselves
@pytest.fixture
def no_attention(monkeypatch):
    """Meta tensors choose an attention that materializes all scores; the devices' own doesn't."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *rest, **more: torch.empty_like(q))


def painted(config: TransformerConfig, job: Job, dtype: torch.dtype) -> int:
    """Peak bytes of one step of a real transformer on meta tensors."""
    every, text = job.picture_tokens, job.text_tokens
    rope = (torch.empty(every + text, config.attention_head_dim // 2, device="meta"),) * 2
    with torch.device("meta"), torch.no_grad():
        net = QwenImageTransformer(config).to(dtype)
        net.rope = lambda *_: rope  # type: ignore[assignment]
        given = torch.empty(job.batch, every, config.in_channels, dtype=dtype)
        states = torch.empty(job.batch, text, config.joint_attention_dim, dtype=dtype)
        with Live() as live:
            net(given, torch.empty(job.batch), states, None, [(1, 1, every)], job.target_tokens)
    return live.peak + given.nbytes + states.nbytes + 2 * rope[0].nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("job", "zero_cond_t"),
    [
        (Job((1024, 1024), text=300), False),
        (Job((256, 256), text=517), False),
        (Job((512, 512), text=100, batch=3), False),
        (Job((1024, 768), ((1024, 1024),), text=700), False),
        (Job((1024, 768), ((1024, 1024), (640, 480)), text=700), True),
    ],
)
def test_a_step_takes_what_the_real_network_takes(job, zero_cond_t, dtype, no_attention):
    config = TransformerConfig(3, 8, 128, 1024, zero_cond_t=zero_cond_t)
    net = Transformer(3, 8, 128, 1024, zero_cond_t=zero_cond_t)
    job = replace(job, guided=False)
    counted = painted(config, job, getattr(torch, dtype))
    said = a.transformer_peak(net, transformer_sizes(net, BF16, BF16), BF16, job, dtype, True, False)
    assert 0.98 * counted <= said <= 1.05 * counted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("size", "tile"), [((1024, 1024), 0), ((848, 640), 256), ((256, 512), 0)])
def test_decoding_and_encoding_take_what_the_real_vae_takes(size, tile, dtype, no_attention):
    kind, (width, height) = getattr(torch, dtype), size
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLQwenImage(VAEConfig()).to(kind)
        latents = torch.empty(1, 16, height // 8, width // 8, dtype=kind)
        pixels = torch.empty(1, 3, height, width, dtype=kind)
        peaks = coding_peaks(vae, latents, pixels, bool(tile))
    said = a.decoding_peak(Vae(), Job(size), dtype, tile), a.encoding_peak(Vae(), (size,), dtype, tile)
    beside = 12 * width * height, 36 * width * height  # float32 pictures, which the codec makes around the network
    for told, counted, more in zip(said, peaks, beside, strict=True):
        assert 0.97 * counted <= told <= 1.06 * counted + 2 * more


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reading_takes_what_the_real_reader_takes(dtype, no_attention):
    config = LanguageConfig(1024, 512, 2048, 4, 8, 2, mrope_section=(8, 12, 12))
    job = Job(text=500, opening=34, prompts=2)
    with torch.device("meta"), torch.no_grad():
        net = QwenVL(QwenVLConfig(config, VisionConfig(out_hidden_size=512)), vision=False).to(getattr(torch, dtype))
        with Live() as live:
            net(torch.zeros(2, 534, dtype=torch.long))
    geometry = Geometry(language=Language(1024, 512, 2048, 4, 8, 2))
    assert 0.95 * live.peak <= a.reader_peak(geometry, job, BF16, dtype, True) <= 1.1 * live.peak


def test_work_is_that_of_the_measured_table():
    """57.4 TFLOP in Linears and 13.2 in attention for 1024 x 1024 and 128 words."""
    assert a.work(Transformer(), Job((1024, 1024), text=128)) / 1e12 == pytest.approx(57.4 + 13.2, rel=0.01)


# ---------------------------------------------------------------- choosing
def machine(vram: int, ram: int) -> Machine:
    gpu = (Device("cuda", "NVIDIA GeForce RTX 4090", vram, vram),) if vram else ()
    return Machine(ram, ram, 8, (*gpu, Device("cpu", "CPU")))


MODEL = release(get_spec("qwen-image-2512"))
JOB = usual_job(MODEL, (1024, 1024))


def tried(vram: int, ram: int, **more):
    return plan(MODEL, JOB, machine(vram, ram), **more)


def test_everything_stays_where_there_is_room():
    chosen = tried(80 * G, 128 * G)
    assert chosen.trivial and chosen.streamed == "none" and chosen.resident_blocks == 60


def test_more_memory_never_makes_a_plan_worse():
    dice = random.Random(7)
    for _ in range(12):
        vram, ram = dice.choice([0, dice.randint(4, 60) * G]), dice.randint(4, 90) * G
        more = vram + (dice.randint(0, 20) * G if vram else 0), ram + dice.randint(0, 40) * G
        try:
            before = tried(vram, ram)
        except RefusalError:
            continue
        assert rank(tried(*more)) <= rank(before), (vram, ram, more)


def test_no_plan_exceeds_its_budget():
    dice = random.Random(8)
    for _ in range(20):
        vram, ram = dice.choice([0, dice.randint(2, 60) * G]), dice.randint(3, 90) * G
        try:
            chosen = tried(vram, ram)
        except RefusalError:
            continue
        assert chosen.peak_vram <= vram and chosen.peak_ram <= ram
        assert 0 <= chosen.resident_blocks <= 60
        assert (chosen.streamed == "none") == (chosen.resident_blocks == 60)


@pytest.mark.parametrize(("vram", "ram"), [(G, 64 * G), (0, G), (12 * G, G), (G, G), (3 * G, G), (0, 4 * G // 5)])
def test_a_refusal_says_a_number_that_then_works(vram, ram):
    with pytest.raises(RefusalError) as caught:
        tried(vram, ram)
    sentence = str(caught.value)
    found = {name: parse_bytes(size) for name, size in re.findall(r"--(vram|ram) ([\d.]+[MG])", sentence)}
    assert found
    enough = tried(found.get("vram", vram), found.get("ram", ram))
    assert enough.peak_vram <= found.get("vram", vram) and enough.peak_ram <= found.get("ram", ram)


def test_budgets_are_hard_whatever_the_machine_has():
    roomy = machine(80 * G, 128 * G)
    chosen = plan(MODEL, JOB, roomy, Budget(vram=12 * G, ram=24 * G))
    assert SPARE * chosen.peak_vram <= 12 * G and SPARE * chosen.peak_ram <= 24 * G  # predictions may be a little low


def test_an_asked_kind_is_the_only_one():
    assert tried(80 * G, 128 * G, quant="int4").transformer == "int4"
    with pytest.raises(RequestError):
        tried(80 * G, 128 * G, quant="int5")


def test_the_survey_has_a_row_for_every_kind_and_the_choice_first():
    rows = survey(MODEL, JOB, machine(12 * G, 32 * G))
    assert [kept for _, kept in rows] == sorted((kept for _, kept in rows), reverse=True)
    assert {each.transformer for each, _ in rows} == {"bf16", "int8", "fp8", "int4"}
    assert rows[0][0].transformer == tried(12 * G, 32 * G).transformer


def test_every_release_has_a_plan_for_every_device_of_the_table():
    for name in spec_names():
        model = release(get_spec(name))
        chosen = plan(model, usual_job(model, None), machine_of(cards()[0]))
        assert chosen.to_dict()["reasons"] and chosen.sentence().startswith("plan: ")


def test_a_request_becomes_a_job():
    from PIL import Image

    spec = get_spec("qwen-image-edit-2511")
    images = (Image.new("RGB", (1920, 1080)), Image.new("RGB", (800, 600)))
    settled = settle(Request("swap them", images=images, count=2, steps=8, guidance_scale=1.0), spec)
    job = job_of(settled, release(spec))
    assert job.references == ((1376, 768), (1184, 896)) and job.batch == 2 and not job.guided
    assert job.seen == ((512, 288), (448, 320)) and job.text_tokens == 9 + 5 + 18 * 10 + 16 * 11


def test_a_layered_release_draws_frames():
    model = release(get_spec("qwen-image-layered"))
    job = usual_job(model, None)
    assert job.frames == 5 and job.references == ((640, 640),) and model.writes


# ---------------------------------------------------------------- machines
@pytest.mark.parametrize(
    ("text", "size"),
    [("12G", 12 * G), ("12GB", 12 * G), ("12GiB", 12 * 2**30), ("800M", 800 * 10**6), (" 7.5 gb ", 7_500_000_000)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12x", "-1G", "12", "1e9G", "9999999T", "G", "nan"])
def test_amounts_that_are_none(text):
    with pytest.raises(RequestError):
        parse_bytes(text)


def test_meminfo():
    text = "MemTotal:       32768 kB\nMemFree:  1000 kB\nMemAvailable:    2000 kB\n"
    assert parse_meminfo(text) == (32768 * 1024, 2000 * 1024)


def test_nvidia_smi():
    found = nvidia_cards("0, NVIDIA GeForce RTX 3060, 12288, 11872\n1, Odd, [N/A], 5\nNo devices were found\n")
    assert found == [Card("", Device("cuda", "NVIDIA GeForce RTX 3060", 12288 * 2**20, 11872 * 2**20)), Card("", None)]


def test_what_would_do_for_several_devices_does():
    cards = tuple(Device(name, "A Card", 12 * G, 12 * G) for name in ("cuda", "cuda:1"))
    here = Machine(2 * G, G, 8, (*cards, Device("cpu", "A Processor")))
    with pytest.raises(RefusalError) as told:
        plan(MODEL, JOB, here, device="cuda:all")
    assert told.value.ram is not None
    assert plan(MODEL, JOB, here, Budget(told.value.vram, told.value.ram), "cuda:all")


def test_a_gpu_without_memory_of_its_own_is_planned_half_of_the_computers(monkeypatch):
    told = "0, NVIDIA GB10, [N/A], [N/A], GPU-1a\n"
    monkeypatch.setattr("lanting.plan.machine._run", lambda *command: told if command[0] == "nvidia-smi" else "")
    monkeypatch.setattr("lanting.plan.machine.memory", lambda: (128 * G, 120 * G))
    monkeypatch.setattr("lanting.plan.machine.cgroup_memory", lambda: (None, None))
    here = detect({})
    assert here.devices[0] == Device("cuda", "NVIDIA GB10", 64 * G, 60 * G, shared=True)
    assert (here.ram, here.ram_free) == (128 * G, 60 * G)
    chosen = plan(MODEL, JOB, here)
    assert (chosen.device, chosen.transformer, chosen.streamed) == ("cuda", "bf16", "none")


def test_cards_are_shown_by_number_or_by_uuid(monkeypatch):
    told = "0, A, 12288, 11872, GPU-1a-b\n1, B, 24576, 24000, GPU-2c-d\n"
    monkeypatch.setattr("lanting.plan.machine._run", lambda *command: told if command[0] == "nvidia-smi" else "")
    for said, titles in (
        (None, ["A", "B"]),
        ("1", ["B"]),
        ("1,0", ["B", "A"]),
        ("GPU-2c-d", ["B"]),
        ("GPU-2c,GPU-1a", ["B", "A"]),
        ("GPU-2c, GPU-1a", ["B"]),
        (" 1gpu,+0", ["B", "A"]),
        ("", []),
        ("-1", []),
        ("7", []),
        ("1,7,0", ["B"]),
        ("1,-1,0", ["B"]),
        ("0,0", []),
        ("0,7,7", []),
        ("GPU-2c-d,1,1", ["B"]),
        ("0,GPU-2c", ["A"]),
        ("GPU-3", []),
        ("GPU-", []),
        ("GPU-2c,GPU-2c-d", []),
        ("MIG-1a", []),
        ("NoDevFiles", []),
    ):
        found = gpus({} if said is None else {"CUDA_VISIBLE_DEVICES": said})
        assert [card.title for card in found] == titles, said
        assert [card.name for card in found] == ["cuda", "cuda:1"][: len(titles)]


SLICED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1a)
  MIG 3g.20gb     Device  0: (UUID: MIG-aa-1)
  MIG 1g.5gb      Device  1: (UUID: MIG-bb-2)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-2c)
"""
XML = """<nvidia_smi_log>
<gpu id="00000000:01:00.0"><fb_memory_usage><total>40960 MiB</total></fb_memory_usage><mig_devices>
<mig_device><index>0</index><fb_memory_usage><total>20096 MiB</total><used>6 MiB</used><free>20090 MiB</free>
</fb_memory_usage></mig_device>
<mig_device><index>1</index><fb_memory_usage><total>4864 MiB</total><free>4861 MiB</free></fb_memory_usage></mig_device>
</mig_devices></gpu><gpu id="00000000:41:00.0"><fb_memory_usage><total>40960 MiB</total></fb_memory_usage></gpu>
</nvidia_smi_log>"""


@pytest.mark.parametrize(
    ("said", "titles", "memory"),
    [
        (None, ["MIG 3g.20gb"], 20096),  # one, and no other card beside it
        ("0", ["MIG 3g.20gb"], 20096),
        ("1", ["A100-SXM4-40GB"], 40960),
        ("GPU-1a", ["MIG 3g.20gb"], 20096),
        ("MIG-bb-2", ["MIG 1g.5gb"], 4864),
        ("MIG-bb,MIG-aa-1", ["MIG 1g.5gb"], 4864),
        ("MIG-cc", [], 0),
    ],
)
def test_of_a_card_in_slices_one_is_shown(said, titles, memory, monkeypatch):
    table = "0, NVIDIA A100-SXM4-40GB, 40960, 40000, GPU-1a\n1, NVIDIA A100-SXM4-40GB, 40960, 40000, GPU-2c\n"
    environ = {} if said is None else {"CUDA_VISIBLE_DEVICES": said}
    monkeypatch.setattr("lanting.plan.machine.cut_into_slices", lambda told, environ, place: True)
    for details in (XML, ""):  # drivers that say less
        told = {"-L": SLICED, "-q": details}
        monkeypatch.setattr("lanting.plan.machine._run", lambda *command, told=told: told.get(command[1], table))
        found = gpus(environ)
        assert [card.title.removeprefix("NVIDIA ").removeprefix("A100-SXM4-40GB ") for card in found] == titles
        if found:
            assert found[0].name == "cuda" and 0.85 < found[0].memory / (memory * 2**20) <= 1
            assert details == "" or found[0].memory == memory * 2**20


def test_slices_are_asked_for_where_there_may_be_some(monkeypatch, tmp_path):
    asked = []
    whole, hidden = (
        "0, A, 12288, 11872, GPU-1a\n",
        "0, A, [Insufficient Permissions], [Insufficient Permissions], GPU-1a\n",
    )
    monkeypatch.setattr("lanting.plan.machine.CAPABILITIES", tmp_path)
    for table, environ in ((whole, {}), (hidden, {}), (whole, {"CUDA_VISIBLE_DEVICES": "MIG-aa"})):
        monkeypatch.setattr("lanting.plan.machine._run", lambda *c, table=table: asked.append(c[1]) or table)
        gpus(environ)
    assert [word for word in asked if word == "-L"] == ["-L"] * 2
    (tmp_path / "gpu0" / "mig" / "gi1").mkdir(parents=True)
    gpus({})
    assert asked[-2:] == ["-L", "-q"]


def test_amd_s_cards_are_shown_by_two_variables(tmp_path):
    """A processor's own graphics are counted by HIP, and hold no model."""
    for name, size, own in (("card0", 24, "a1"), ("card2", 16, "b2"), ("card10", 8, "c3"), ("card3", 0.5, "d4")):
        place = tmp_path / name / "device"
        place.mkdir(parents=True)
        (place / "mem_info_vram_total").write_text(f"{int(size * 2**30)}\n")
        (place / "product_name").write_text(f"{name}\n")
        (place / "unique_id").write_text(f"{own}\n")
    (tmp_path / "card0-DP-1").mkdir()
    cards = amd_cards(tmp_path)
    assert [card.uuid for card in cards] == ["GPU-a1", "GPU-b2", "GPU-d4", "GPU-c3"]
    for environ, titles in (
        ({}, ["card0", "card2", None, "card10"]),
        ({"HIP_VISIBLE_DEVICES": "1"}, ["card2"]),
        ({"CUDA_VISIBLE_DEVICES": "3,0"}, ["card10", "card0"]),
        ({"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1,2"}, ["card2", None]),
        ({"ROCR_VISIBLE_DEVICES": "1,3", "HIP_VISIBLE_DEVICES": "1"}, ["card10"]),
        ({"ROCR_VISIBLE_DEVICES": "3,GPU-a1", "CUDA_VISIBLE_DEVICES": "1,0"}, ["card0", "card10"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-c3"}, ["card10"]),
        ({"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, []),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
    ):
        found = [device and device.title for device in large(shown_by_hip(cards, environ))]
        assert found == titles, environ


def test_a_containers_limit_is_the_machine(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("8000000000\n")
    (tmp_path / "a" / "memory.current").write_text("3000000000\n")
    (tmp_path / "a" / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    (folder / "memory.max").write_text("max\n")
    assert cgroup_memory(tmp_path, "0::/a/b") == (8 * G, 5_500_000_000)
    assert cgroup_memory(tmp_path / "elsewhere", "0::/") == (None, None)


def test_files_that_were_read_are_no_memory_taken_in_older_containers(tmp_path):
    (tmp_path / "memory").mkdir()
    for name, told in {
        "limit_in_bytes": "8000000000",
        "usage_in_bytes": "7900000000",
        "stat": "cache 7\ninactive_file 1\ntotal_inactive_file 6000000000",
    }.items():
        (tmp_path / "memory" / f"memory.{name}").write_text(told + "\n")
    assert cgroup_memory(tmp_path, "3:memory:/docker/1\n") == (8 * G, 6_100_000_000)


def test_this_machine_is_found():
    here = detect()
    assert here.ram >= here.ram_free > 0 and here.cores >= 1 and here.devices[-1].name == "cpu"
    with pytest.raises(RequestError):
        here.device("cuda:77")


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("rtx 4070", "GeForce RTX 4070"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "GeForce RTX 4070 Ti SUPER"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("3060", "GeForce RTX 3060"),
        ("Apple M1 Max", "Apple M1 Max, 64 GB"),
        ("m4 max", "Apple M4 Max, 128 GB"),
    ],
)
def test_cards_are_found_by_what_they_are_called(title, name):
    card = find_card(title)
    assert card is not None and card.name == name


@pytest.mark.parametrize("title", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4080", "AMD EPYC", ""])
def test_other_cards_are_not_mistaken(title):
    assert find_card(title) is None


def test_the_text_encoder_without_eyes_and_head_is_smaller():
    every = reader_bytes(Geometry(), BF16, BF16, True, True).every
    assert every == 2 * 8_292_166_656
    assert reader_bytes(Geometry(), BF16, BF16, False, False).every == every - 2 * (676_550_144 + 544_997_376)


def test_streamed_blocks_are_gone_while_a_cpu_decodes():
    job, home = replace(JOB, size=(768, 768)), machine(0, 64 * G)
    bill = Bill(MODEL, job, home, home.devices[0])
    way = Way(KINDS["int4"], KINDS["int4"], 0, "disk", False, "unload", "disk", 0)
    sizes = bill.sizes(way.kind)
    assert bill.passing(way) == 2 * (sizes.block + sizes.modulation)
    assert bill.passing(replace(way, table=True)) == 2 * sizes.block
    assert bill.passing(replace(way, resident=60, streamed="none")) == 0
    card = machine(8 * G, 64 * G)
    assert Bill(MODEL, job, card, card.devices[0]).passing(way) == 0  # a device's buffers stay


def test_a_cpu_keeps_the_rows_of_the_words_it_reads_and_not_the_table():
    home, gpu = machine(0, 64 * G), machine(8 * G, 64 * G)
    way = Way(BF16, BF16, 60, "none", False, "keep", "disk", 0)
    table = 2 * 152_064 * 3584
    whole = Bill(MODEL, JOB, gpu, gpu.devices[0]).reader(way)
    assert whole == reader_bytes(Geometry(), BF16, BF16, False, False).every
    assert 0 < Bill(MODEL, JOB, home, home.devices[0]).reader(way) - (whole - table) < table // 20
    cast = replace(MODEL, precision="float32")
    assert (
        Bill(cast, JOB, home, home.devices[0]).reader(way)
        == reader_bytes(Geometry(), BF16, KINDS["fp32"], False, False).every
    )
    held = {"model.layers.0.a": 7, "model.embed_tokens.weight": table, "lm_head.weight": 5, "visual.layers.x": 3}
    packed = replace(MODEL, reader_kind="int4", reader_held=held)
    assert packed.reader(KINDS["int4"], "bfloat16", False) == Reader(7 + table, 7, table)
    assert packed.reader(KINDS["int4"], "bfloat16", True) == Reader(10 + table, 7, table)
