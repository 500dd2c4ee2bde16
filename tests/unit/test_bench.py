"""`lanting bench`: what is counted, what the limits make of it, and what a person is told."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lanting.bench import layer, nano, run, vae, words
from lanting.bench.judge import judge, limit_of
from lanting.bench.limits import Limits, Rate, last_caches, measure
from lanting.bench.subject import Subject, Times
from lanting.bench.watch import Watch, split
from lanting.bench.work import Share, Work, block, decoding, prediction, reading
from lanting.cli.main import main
from lanting.kernels import library
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.qwen_language import LanguageConfig, QwenLanguageModel
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig
from lanting.plan.geometry import Geometry, Language, Transformer, Vae
from lanting.plan.kinds import KINDS

SMALL = Transformer(num_layers=2, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=48)
USUAL = "bf16" if library.multiplies_bfloat16() else "fp32"  # what a small model computes in on this machine
TINY_VAE = Vae(base_dim=8, num_res_blocks=1)
TINY = run.Scale((16,), (16,), 1, 0.0, 3, SMALL, TINY_VAE)
RATES = {"float32": Rate(1e9, "x"), "bfloat16": Rate(2e9, "x"), "int8": Rate(4e9, "x")}
LIMITS = Limits(1, RATES, {"float32": 0.8e9}, 1e9, 0.5e9)


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANTING_LANG", "en")


# ---------------------------------------------------------------- counts
def counted(call) -> float:
    """Operations by PyTorch's own counter, which leaves out the CPU's attention."""

    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={flash: attention}) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def parameters(*modules: torch.nn.Module) -> int:
    """Matrices alone."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.ndim > 1)


def test_a_prediction_is_counted_as_torch_counts_it():
    config = TransformerConfig(2, 2, 32, 48, axes_dims_rope=(4, 14, 14))
    net = QwenImageTransformer(config).eval()
    latents, text = torch.randn(1, 24, 64), torch.randn(1, 5, 48)
    work = prediction(SMALL, 24, 5, "float32")
    assert counted(lambda: net(latents, torch.ones(1), text, None, [(1, 4, 6)], 24)) == work.operations
    outside = parameters(net)
    assert work.bytes == 4 * (outside + SMALL.num_layers * 2 * 29 * SMALL.width)


@pytest.mark.parametrize("config", [TINY_VAE, Vae(base_dim=8), replace(TINY_VAE, temperal_downsample=(False,) * 3)])
def test_decoding_is_counted_as_torch_counts_it(config):
    net = AutoencoderKLQwenImage(VAEConfig(**asdict(config))).eval()
    work = decoding(config, (32, 24), "float32")
    assert counted(lambda: net.decode(torch.randn(1, 16, 3, 4))) == work.operations
    assert work.bytes == 4 * (parameters(net.decoder, net.post_quant_conv) - gammas(net) + 12 * 16 + 32 * 24 * 3)


def test_kernels_need_fewer_products():
    """Sixteen of 36 and nine of 36, but for what is no 3x3 convolution and for the first one."""
    plain, saved = (decoding(Vae(), (64, 64), "bfloat16", each).operations for each in (False, True))
    assert 9 / 36 < saved / plain < 18 / 36


def gammas(net: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in net.decoder.named_parameters() if name.endswith("gamma"))


def test_the_published_decoder_takes_what_the_plan_says():
    per_pixel = decoding(Vae(), (256, 256), "bfloat16").operations / 256**2
    assert per_pixel == pytest.approx(4.5e6, rel=0.1)


def test_reading_is_counted_as_torch_counts_it():
    config = LanguageConfig(50, 64, 96, 2, 4, 2, mrope_section=(2, 3, 3))
    net = QwenLanguageModel(config).eval()
    work = reading(Language(50, 64, 96, 2, 4, 2), 7, "float32")
    assert counted(lambda: net(torch.arange(7)[None])) == work.operations


def test_a_layer_has_the_operations_of_its_linears_and_attention():
    made = layer.make(SMALL, "bf16", native=False)
    subject = layer.subject(SMALL, 16, 8, "bf16", made)
    assert counted(lambda: subject.call(lambda: 0.0)) == subject.work.operations
    assert layer.subject(SMALL, 16, 8, "bf16", (made[0], True)).work == subject.work
    packed = block(SMALL, 16, 8, KINDS["int4"], ("bfloat16", "int8"))
    assert [share.type for share in packed.shares] == ["int8", "bfloat16"]
    assert packed.bytes == 24 * 64**2 * 34 / 64 + 2 * 24 * 64 * 2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_layers_run_with_and_without_kernels(kind, monkeypatch):
    for native in (True, False):
        if not native:
            monkeypatch.setattr("lanting.bench.layer.attach_kernels", lambda _: False)
        made = layer.make(SMALL, kind)
        subject = layer.subject(SMALL, 16, 16, kind, made)
        types = {share.part: share.type for share in subject.work.shares}
        assert types["linears"] == ("int8" if made[1] else "bfloat16")
        with torch.no_grad():
            img, txt = subject.call(lambda: 0.0)  # type: ignore[misc]
        assert img.isfinite().all() and txt.isfinite().all()


def test_work_adds_up():
    work = Work((Share("linears", "int8", 3.0),), 2.0) + Work((Share("linears", "int8", 1.0),), 1.0) * 2
    assert work == Work((Share("linears", "int8", 5.0),), 4.0)


# ---------------------------------------------------------------- limits and percent
def test_the_limit_is_the_longer_of_computing_and_moving():
    work = Work((Share("linears", "int8", 8e9), Share("attention", "bfloat16", 1e9)), 1e9)
    assert limit_of(work, LIMITS) == (2.5, "int8")
    assert limit_of(replace(work, bytes=3e9), LIMITS) == (3.0, "memory")


def test_a_type_without_instructions_is_as_fast_as_what_it_is_widened_to():
    assert Limits(1, {"float32": Rate(1e9, "x")}, {}, 1.0, 2.0).operations("bfloat16") == 1e9


def made_row(seconds: float, spent: dict[str, list[float]], work: Work, kernels: int = 0):
    watch = Watch()
    watch.spent, watch.kernels = spent, kernels
    subject = Subject("int8", work, lambda _: None)
    return judge(("layer", "256 + 128"), subject, Times(seconds, seconds, 3), watch, LIMITS)


WORK = Work((Share("linears", "int8", 8e9), Share("attention", "bfloat16", 1e9)), 1e9)


def test_near_the_limit_the_limit_holds_back():
    row = made_row(3.0, {"linears": [2.4], "attention": [0.6]}, WORK, 2)
    assert row.percent == pytest.approx(100 * 2.5 / 3) and row.near and row.by == "kernels"
    assert words.held(row) == "compute int8"
    assert words.held(made_row(3.5, {"linears": [3.5]}, replace(WORK, bytes=3e9))) == "memory"


def test_far_from_it_the_part_that_lost_most_is_named():
    row = made_row(10.0, {"linears": [8.0], "attention": [1.0], "between": [1.0]}, WORK)
    assert words.held(row) == "linears in int8 at 25 % of the limit, 80 % of the time"
    assert sum(loss.seconds for loss in row.losses) == pytest.approx(10)
    told = row.to_dict()
    assert told["percent"] == pytest.approx(25) and told["held_back_by"] == ["linears"]
    assert told["operations_per_second"] == pytest.approx(0.9e9)


def test_two_parts_are_named_where_both_matter():
    row = made_row(10.0, {"linears": [2.0], "attention": [4.5], "between": [3.5]}, WORK)
    assert words.held(row) == (
        "attention in bf16 at 11 % of the limit, 45 % of the time; what lies between products: 35 % of the time"
    )


def test_many_small_calls_are_small_work():
    row = made_row(1.0, {"between": [1e-9] * 2000}, Work((Share("linears", "int8", 1e6),), 1e3))
    assert words.held(row) == "small work: overhead of 2,000 calls, 100 % of the time"


def native_calls() -> list[object]:
    found = library.library()
    return [] if found is None else [getattr(found, name) for name in library.CALLS]


def test_watching_sorts_operations_and_puts_the_kernels_back():
    before, watch = native_calls(), Watch()
    a = torch.randn(64, 64)
    with watch.looking(), torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(a[None, None], a[None, None], a[None, None])
        torch.relu(a @ a)
        torch.nn.functional.conv2d(a[None, None], a[None, None, :3, :3])
    assert native_calls() == before
    assert {name: len(spent) for name, spent in watch.spent.items() if name != "between"} == {
        "linears": 1,
        "attention": 1,
        "convolutions": 1,
    }
    parts = split(watch, 1.0)
    assert sum(part.seconds for part in parts) == pytest.approx(1) and parts[-1].name == "small"


@pytest.mark.skipif(not library.ready(), reason="the kernels are not built here")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_block_that_is_one_call_is_watched_kernel_by_kernel(kind):
    net = Transformer(num_layers=1, num_attention_heads=4, attention_head_dim=128)
    case = run.Case("layer", "256", lambda: layer.subject(net, 256, 128, kind, layer.make(net, kind)))
    row = run.row_of(case, replace(LIMITS, threads=2), replace(TINY, least=5))  # two: the clock is the wall's
    parts = {loss.part: loss for loss in row.losses}
    assert row.by == "kernels" and parts["linears"].calls == 12 and parts["attention"].calls == 1
    assert parts["linears"].seconds + parts["attention"].seconds > row.seconds / 2


def test_kernels_of_whole_blocks_have_no_overhead_of_their_own():
    """They are scaled to the time of the whole, and each block counts as one call."""
    watch = Watch()
    watch.within, watch.blocks = {"linears": [1e-9] * 300, "attention": [1e-9] * 100}, 20
    parts = [(part.name, part.seconds, part.calls) for part in split(watch, 2e-7)]
    assert parts == [("linears", pytest.approx(1.5e-7), 300), ("attention", pytest.approx(0.5e-7), 100)]
    assert split(watch, 1.0)[-1].calls == 20


def test_limits_are_measured_with_and_without_kernels(monkeypatch):
    monkeypatch.setattr("lanting.bench.limits.buffer_size", lambda: 16 << 20)
    monkeypatch.setattr("lanting.bench.limits.SIDE", 256)  # without instructions for bfloat16, 1024 take ten seconds
    found = measure(1, 2)
    assert found.operations("float32") > 1e8 and found.bandwidth > 1e8 and set(found.product) == {"float32", "bfloat16"}
    if library.ready():
        assert found.best["float32"].source in (library.instruction_set(), "torch") and "int8" in found.best
    monkeypatch.setattr("lanting.kernels.limits.library", lambda: None)
    plain = measure(1, 2)
    assert {rate.source for rate in plain.best.values()} == {"torch"} and plain.read > 1e8 and plain.copy > 1e8


def test_the_last_caches_are_added_up(tmp_path):
    for cpu, shared in (("cpu0", "0-1"), ("cpu1", "0-1"), ("cpu2", "2-3")):
        for index, level, size in (("index2", 2, "1024K"), ("index3", 3, "32768K")):
            folder = tmp_path / cpu / "cache" / index
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("shared_cpu_list", shared), ("size", size)):
                (folder / name).write_text(f"{value}\n")
    assert last_caches(tmp_path) == 64 << 20 and last_caches(tmp_path / "none") == 0


# ---------------------------------------------------------------- the verb
@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case, small; limits that cost nothing."""
    monkeypatch.setattr(run, "SCALES", dict.fromkeys(("quick", "usual", "full"), TINY))
    monkeypatch.setattr(run, "measure", lambda count, runs: replace(LIMITS, threads=count))


@pytest.mark.usefixtures("tiny")
def test_all_cases_as_json(capsys):
    assert main(["bench", "--quick", "--threads", "1", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == "" and told["threads"] == 1 and told["clock"] == "processor"
    assert [(case["group"], case["form"]) for case in told["cases"]] == [
        *(("layer", kind) for kind, _ in layer.forms()),
        *[("vae", "bf16")] * (2 if library.ready() else 1),
        ("step", USUAL),
        ("picture", USUAL),
    ]
    for case in told["cases"]:
        assert case["percent"] == pytest.approx(100 * case["limit_seconds"] / case["seconds"])
        assert case["held_back_by"] and case["runs"] >= 1 and case["bytes"] > 0
        assert sum(part["seconds"] for part in case["parts"]) == pytest.approx(case["seconds"])
    assert set(told["limits"]["all"]["best"]) == set(RATES)


@pytest.mark.usefixtures("tiny")
def test_only_some_in_a_table_and_a_file(capsys, tmp_path, monkeypatch):
    target = tmp_path / "bench.json"
    assert main(["bench", "--only", "layer", "--threads", "2", "--json", str(target)]) == 0
    out, err = capsys.readouterr()
    assert "layer, 16 + 128 tokens" in out and "held back by" in out and "2 threads" in out and str(target) in out
    first = "bf16, torch" if library.ready() else "bf16"
    assert f"2/{1 + len(layer.forms())} layer 16 + 128 {first}\n" in err
    assert {case["group"] for case in json.loads(target.read_text())["cases"]} == {"layer"}
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert main(["bench", "--only", "vae", "--threads", "1", "--json", str(target), "--force", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(target)


@pytest.mark.usefixtures("tiny")
def test_chinese(capsys, monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert main(["bench", "--only", "layer", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "受限于" in out and "一层" in out and "1 线程" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "layer,chess"], "chess is none we know"),
        (["--quick", "--full"], "choose one"),
        (["--threads", "0"], "threads must be a whole number from 1 to 1024, not 0"),
        (["--json", "."], "is a folder"),
        (["--json", "no/such/place.json"], "does not exist"),
        (["--json", "-", "--threads", "0"], "threads must be"),
        (["--json=-", "--threads", "0"], "threads must be"),
        (["--threads", "many"], "--threads"),
    ],
)
def test_wrong_requests_are_a_sentence(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err and len(err.splitlines()) == 1
    if "-" in arguments or "--json=-" in arguments:  # a program listens
        assert said in json.loads(out)["error"]
    else:
        assert out == ""


def test_a_file_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "a.json").write_text("mine")
    assert main(["bench", "--json", str(tmp_path / "a.json")]) == 2
    assert "--force" in capsys.readouterr().err and (tmp_path / "a.json").read_text() == "mine"


@pytest.mark.usefixtures("tiny")
def test_cancelling_leaves_nothing(capsys, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    before, threads = native_calls(), torch.get_num_threads()
    monkeypatch.setattr(Subject, "watched", stop)
    assert main(["bench", "--only", "vae", "--threads", "1", "--json", str(tmp_path / "a.json")]) == 130
    assert "cancelled" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert native_calls() == before and torch.get_num_threads() == threads


@pytest.mark.usefixtures("tiny")
def test_gpus_are_said_to_be_left_out(capsys, monkeypatch):
    monkeypatch.setattr("lanting.cli.bench.gpus", lambda: ("a card",))
    monkeypatch.setattr("lanting.kernels.library.ready", lambda: False)
    for off, said in (("", "python -m lanting.kernels.build"), ("off", "switched off by LANTING_KERNELS")):
        monkeypatch.setenv("LANTING_KERNELS", off)
        assert main(["bench", "--only", "vae", "--threads", "1"]) == 0
        err = capsys.readouterr().err
        assert "GPUs come with a later version" in err and said in err


def test_nano_takes_what_torch_counts(monkeypatch):
    for room in ("compute", "vae"):  # whose work torch would not count
        monkeypatch.setattr(f"lanting.attach.{room}.ready", lambda: False)
    drawing = nano.open_drawing()
    with drawing.engine:
        found = counted(lambda: drawing.engine.run(drawing.request()))
        assert drawing.whole.operations == pytest.approx(found, rel=0.01)
        assert drawing.form == USUAL and drawing.step_seconds(iter(range(99)).__next__) == 1


def test_the_full_networks_are_what_is_measured():
    assert run.SCALES["usual"].block == Geometry().transformer and run.SCALES["quick"].vae == Geometry().vae
    made = vae.make(TINY_VAE)
    assert next(made.parameters()).dtype == torch.bfloat16 and not vae.saves(vae.make(TINY_VAE, native=False))
    assert vae.saves(made) == (library.ready() and not vae.multiplies_tiles())


def test_help_needs_no_torch():
    code = "import sys; from lanting.cli.main import main; main(['bench', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
