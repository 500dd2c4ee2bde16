"""One picture on several devices, here processes of one CPU: the same bits, and whatever happens to those who follow.

Followers are processes where their end is what is tested, and threads with the same code elsewhere (`following`).
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from following import ThreadPeer
from lanting import Engine, Progress, Request, RequestError
from lanting.cli.main import main
from lanting.core.checkpoint import Checkpoint
from lanting.engine import parallel, parallel_split
from lanting.engine.parallel import Layout, layout_of
from lanting.engine.parallel_follower import Follower
from lanting.engine.parallel_peer import GoneError, Peer, command, packed, unpacked
from lanting.flow.loop import Question
from lanting.plan import Budget, Device, Machine, RefusalError, parse_bytes
from lanting.plan.devices import names_of
from plans import plan

ASKED = Request('a red sign with white text "Bread"', seed=3, steps=4, size=(128, 64), guidance_scale=3.0)
BARE = replace(ASKED, guidance_scale=1.0)
PATIENCE = 60


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "en")


@pytest.fixture(scope="module")
def alone():
    with Engine.open("nano", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def pair():
    """Two processes; tests leave them as they find them, and the last one ends one."""
    with Engine.open("nano", device="cpu,cpu") as engine:
        yield engine


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(parallel, "Peer", ThreadPeer)


def pixels(result):
    return np.asarray(result.images[0], np.int16)


def drawn(engine, request) -> tuple[Any, list[str]]:
    *events, result = engine.stream(request)
    return result, told(events)


def told(events):
    events = [event for event in events if isinstance(event, Progress)]
    return [notice.sentence.format(**notice.values) for event in events for notice in event.notices]


def peers(engine) -> list[Peer]:
    assert engine.models.crew is not None
    return engine.models.crew.peers


def follower(engine) -> int:
    """Of two processes the second one."""
    return peers(engine)[0].process.pid


def equal(found, wanted):
    return np.array_equal(pixels(found), pixels(wanted)) and found.recipes == wanted.recipes


# ---------------------------------------------------------------- the same picture
def test_two_devices_draw_what_one_draws(pair, alone, monkeypatch):
    asked, ask = [], Peer.ask
    monkeypatch.setattr(Peer, "ask", lambda self, verb, **more: asked.append((verb, more)) or ask(self, verb, **more))
    found, notices = drawn(pair, ASKED)
    assert equal(found, alone.run(ASKED)) and notices == []
    steps = [more["branch"] for verb, more in asked if verb == "step"]
    assert steps == ["negative"] * 4  # and the positive side here


def test_edits_and_negative_prompts(pair, alone):
    picture = alone.run(ASKED).images[0]
    request = Request("make it blue", seed=5, steps=3, images=(picture,), guidance_scale=2.0, negative_prompt="red")
    assert equal(pair.run(request), alone.run(request))


def test_the_dial_decides_alike(pair, alone):
    """Steps in full are shared out, and those that leave out a side are not asked for it."""
    request = replace(ASKED, quality="fast", steps=12)
    found, notices = drawn(pair, request)
    assert equal(found, alone.run(request)) and notices == []
    choices = found.recipes[0].request["choices"]
    assert set(choices["steps"].split()) > {"FF"}
    again = replace(request, choices=choices)
    assert equal(pair.run(again), alone.run(again))


def test_a_drawing_goes_on_elsewhere(pair, alone):
    """Checkpoints of one device and of two are alike, both ways."""
    for first, second in ((pair, alone), (alone, pair)):
        with closing(first.stream_resumable(ASKED, every=2)) as events:
            kept = next(event for event in events if isinstance(event, Checkpoint))
        *_, result = second.stream_resumable(ASKED, resume=kept)
        assert equal(result, alone.run(ASKED))


def test_without_guidance_one_draws_and_says_so(pair, alone):
    found, notices = drawn(pair, BARE)  # too few tokens to share out
    assert equal(found, alone.run(BARE))
    assert notices == ["nothing in this picture can be shared out: cpu draws it alone"]


def test_threads_are_shared_out_while_two_compute(pair, monkeypatch):
    """And are the leader's again afterwards."""
    monkeypatch.setattr(torch, "set_num_threads", (seen := []).append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(pair.models.crew, "threads", 4)
    monkeypatch.setattr(parallel, "use_threads", lambda count: None)
    pair.run(ASKED)
    assert seen == [4, 8]


def test_pictures_have_all_devices(pair):
    assert pair.room(ASKED) == pair.room(ASKED, 4) == 1


# ---------------------------------------------------------------- trouble
def test_cancelled_and_broken_off_drawings_leave_nothing(pair, alone, monkeypatch):
    process = follower(pair)
    with closing(pair.stream(ASKED)) as events:
        next(event for event in events if event.phase == "denoise")
    positive = Question.ask

    def broken(self, prompt, branch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Question, "ask", broken)  # the follower was asked by then
        pair.run(replace(ASKED, seed=9))
    assert Question.ask is positive
    found, notices = drawn(pair, ASKED)
    assert equal(found, alone.run(ASKED)) and notices == [] and follower(pair) == process


def test_a_killed_follower_is_done_without_and_started_anew(pair, alone):
    wanted, process = alone.run(ASKED), follower(pair)
    events = []
    for event in pair.stream(ASKED):
        events.append(event)
        if isinstance(event, Progress) and event.phase == "denoise" and event.step == 2:
            os.kill(process, signal.SIGKILL)
    assert told(events) == ["cpu can't help: its process ended: exit code -9; the picture is drawn without it"]
    assert equal(events[-1], wanted)
    found, notices = drawn(pair, ASKED)
    assert equal(found, wanted) and notices == [] and follower(pair) != process


def test_a_follower_that_hangs_is_not_waited_for(pair, alone, monkeypatch):
    monkeypatch.setattr(parallel_split, "FIRST", 0.2)
    monkeypatch.setattr(parallel_split, "SLOWER", 0.1)
    process = follower(pair)
    os.kill(process, signal.SIGSTOP)
    found, notices = drawn(pair, ASKED)
    assert equal(found, alone.run(ASKED)) and not peers(pair) and not alive(process)
    assert notices == ["cpu can't help: it did not answer in 0 seconds; the picture is drawn without it"]


def test_three_processes_share_a_side_and_lose_one(alone, monkeypatch):
    """Nobody waits inside of a block for one that is gone."""
    monkeypatch.setattr(parallel_split, "WORTH", 1)
    wanted = alone.run(BARE)
    with Engine.open("nano", device="cpu,cpu,cpu") as engine:
        found, notices = drawn(engine, BARE)
        assert notices == [] and np.abs(pixels(found) - pixels(wanted)).max() <= 8
        assert found.recipes[0].versions["devices"] == "3"
        events, began = [], time.monotonic()
        for event in engine.stream(BARE):
            events.append(event)
            if isinstance(event, Progress) and event.phase == "denoise" and event.step == 2:
                os.kill(peers(engine)[1].process.pid, signal.SIGKILL)
        assert time.monotonic() - began < PATIENCE
        assert told(events) == ["cpu can't help: its process ended: exit code -9; the picture is drawn without it"]
        assert np.abs(pixels(events[-1]) - pixels(wanted)).max() <= 8


def test_a_follower_leaves_when_its_pipe_breaks():
    """However the leader ended; by itself, and with nothing to say."""
    process = subprocess.Popen(command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, errors) == (0, b"", b"")


def alive(process):
    """Whether a process is there and not just waiting to be collected."""
    with suppress(OSError):
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("number", [torch.nan, 1e6])
def test_wrong_numbers_are_noticed_and_the_step_is_done_again(alone, threads, monkeypatch, number):
    plain, asked = Follower.step, []

    def wrong(self, serial, **given):
        asked.append(serial)
        before, self.out = self.out, Spoiled(self.out, number) if len(asked) == 3 else self.out
        plain(self, serial, **given)
        self.out = before

    monkeypatch.setattr(Follower, "step", wrong)
    with Engine.open("nano", device="cpu,cpu") as engine:
        found, notices = drawn(engine, ASKED)
        assert equal(found, alone.run(ASKED)) and len(asked) == 3
        assert notices == ["cpu can't help: its numbers are not possible; the picture is drawn without it"]
        assert equal(engine.run(ASKED), alone.run(ASKED)) and len(asked) == 7


class Spoiled:
    """A way out on which every number becomes another."""

    def __init__(self, out, number):
        self.out, self.number = out, number

    def write(self, data):
        if len(data) > 8:
            verb, serial, found = pickle.loads(data)
            same = packed((verb, serial, torch.full_like(found, self.number)))
            assert len(same) == len(data)
            data = same
        self.out.write(data)

    def flush(self):
        self.out.flush()


def test_one_that_cannot_load_is_told_of_and_given_up_at_last(alone, threads, monkeypatch):
    def refuse(self, serial):
        raise RequestError("{device} has too little memory: close something", device="cpu")

    monkeypatch.setattr(Follower, "ready", refuse)
    wanted = alone.run(ASKED)
    with Engine.open("nano", device="cpu,cpu") as engine:
        for _ in range(parallel.FAILURES):
            found, notices = drawn(engine, ASKED)
            assert equal(found, wanted)
            reason = "cpu has too little memory: close something"
            assert notices == [f"cpu can't help: {reason}; the picture is drawn without it"]
        assert drawn(engine, ASKED)[1] == ["the other devices failed too often: cpu draws alone"]


def test_a_process_that_cannot_be_started_is_done_without(alone, monkeypatch):
    monkeypatch.setattr(Peer, "_start", lambda self: (_ for _ in ()).throw(BlockingIOError(11, "no more processes")))
    with Engine.open("nano", device="cpu,cpu") as engine:
        found, notices = drawn(engine, ASKED)
    assert equal(found, alone.run(ASKED))
    assert notices == ["cpu can't help: [Errno 11] no more processes; the picture is drawn without it"]


def test_other_files_than_the_leaders_are_not_drawn_with(alone, threads, monkeypatch):
    monkeypatch.setattr(Follower, "ready", lambda self, serial: answer(self.out, serial, "other files"))
    with Engine.open("nano", device="cpu,cpu") as engine:
        found, notices = drawn(engine, ASKED)
    assert equal(found, alone.run(ASKED))
    assert notices == ["cpu can't help: the model's files were changed; the picture is drawn without it"]


def answer(out, serial, value):
    from lanting.engine.parallel_peer import write

    write(out, packed(("answer", serial, value)))


def test_what_was_made_safe_is_made_safe_by_the_leader(alone, threads, monkeypatch):
    with Engine.open("nano", device="cpu,cpu") as engine:
        monkeypatch.setattr(engine.known(), "ways", {"transformer.proj_out": "plain"})
        found, notices = drawn(engine, ASKED)
        assert np.abs(pixels(found) - pixels(alone.run(ASKED))).max() <= 8
        assert notices == ["parts of this model run in a safer way: cpu draws alone"]


# ---------------------------------------------------------------- what is asked for
def test_layouts():
    found = {(n, guided): layout_of(n, guided, 24) for n in range(1, 9) for guided in (False, True)}
    assert all(found[n, False] == Layout(1, n) for n in range(1, 9))
    assert [found[n, True] for n in range(2, 9)] == [
        Layout(2, 1),
        Layout(1, 3),
        Layout(2, 2),
        Layout(1, 5),
        Layout(2, 3),
        Layout(1, 7),
        Layout(2, 4),
    ]
    assert layout_of(8, True, 1) == Layout(2, 1) and layout_of(8, False, 1) == Layout(1, 1)
    assert layout_of(5, True, 2) == Layout(2, 2)


@pytest.mark.parametrize(
    ("word", "cards", "names"),
    [
        (None, 4, ()),
        ("cuda:1", 4, ("cuda:1",)),
        ("anything", 0, ("anything",)),
        ("cuda, cuda:2", 4, ("cuda:0", "cuda:2")),
        ("cuda:all", 3, ("cuda:0", "cuda:1", "cuda:2")),
        ("cuda:all", 1, ("cuda:0",)),
        ("cuda:all", 0, ("cuda",)),
        ("cpu,cpu,cpu", 0, ("cpu", "cpu", "cpu")),
    ],
)
def test_devices_in_one_word(word, cards, names):
    assert names_of(word, cards) == names


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("cuda:0,cuda:0", "names a GPU twice"),
        ("cuda,cuda:0", "names a GPU twice"),
        ("cpu,cuda:0", "can't be drawn on cpu,cuda:0"),
        ("mps,mps", "can't be drawn on mps,mps"),
        ("cuda:0,", "can't be drawn on cuda:0,"),
        ("cuda:0,cuda:x", "can't be drawn on"),
        ("cuda:0,cuda:-1", "can't be drawn on"),
        ("cuda:0,cuda:01", "can't be drawn on"),
        ("cuda:0,cuda:all", "can't be drawn on"),
        ("cpu:0,cpu:1", "can't be drawn on"),
        (",".join(["cpu"] * 17), "17 devices are too many"),
    ],
)
def test_devices_that_cannot_draw_together(word, sentence, capsys, tmp_path):
    with pytest.raises(RequestError, match=sentence):
        Engine.open("nano", device=word)
    with suppress(SystemExit):
        assert main(["generate", "a sign", "--device", word, "-o", str(tmp_path / "a.png")]) == 2
    assert sentence in capsys.readouterr().err


def test_gpus_that_are_not_there(monkeypatch):
    with pytest.raises(RequestError, match="not available on this machine"):
        Engine.open("nano", device="cuda:0,cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RequestError, match="there is no cuda:7: this machine has 2 CUDA devices"):
        Engine.open("nano", device="cuda:0,cuda:7")


def test_from_the_shell(threads, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a red sign", "--seed", "3", "--steps", "2", "--size", "128x64", "--device", "cpu,cpu"]
    with suppress(SystemExit):
        assert main([*words, "-o", "a.png"]) in (0, None)
    with suppress(SystemExit):
        assert main(["replay", "a.png", "--device", "cpu"]) in (0, None)
    assert "identical, pixel for pixel" in capsys.readouterr().out


# ---------------------------------------------------------------- plans
def test_plans_are_for_the_smallest_device_and_a_share_of_the_memory():
    cards = [Device("cuda", "A", 24 << 30, 20 << 30), Device("cuda:1", "B", 16 << 30, 9 << 30)]
    machine = Machine(64 << 30, 60 << 30, 8, (*cards, Device("cpu", "CPU")))
    assert machine.device("cuda:0,cuda:1") is cards[1] and machine.device("cuda:all") is cards[1]
    assert machine.device("cpu,cpu").name == "cpu" and machine.device(None) is cards[0]
    with pytest.raises(RequestError, match="no device cuda:5"):
        machine.device("cuda:0,cuda:5")
    assert Budget().of(machine, cards[1], 2) == (9 << 30, 30 << 30)
    assert Budget(ram=8 << 30).of(machine, cards[1], 4) == (9 << 30, 2 << 30)


def test_copies_that_do_not_fit_are_refused():
    with pytest.raises(RefusalError):
        Engine.open("nano", device="cpu,cpu", ram="400M")
    Engine.open("nano", device="cpu", ram="400M").close()
    with pytest.raises(RequestError, match="2 processes need 2000.0 GB".replace(".", "[.]")):
        Engine.open("nano", device="cpu,cpu", plan=plan(peak_ram=10**12))
    assert parse_bytes("400M") == 4 * 10**8


# ---------------------------------------------------------------- messages
def test_tensors_travel_with_all_their_bits():
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 4).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    tensors += [torch.tensor(0.5), torch.zeros(0, 3), torch.randn(1).expand(1), torch.randn(3, 1).expand(3, 4)]
    tensors += [torch.randn(4, 4)[:, ::2], torch.tensor([True, False]), torch.arange(5)]
    found = pickle.loads(packed(tensors))
    for one, other in zip(tensors, found, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert unpacked(b"", "float32", (0, 2)).shape == (0, 2)


def test_answers_that_nobody_waits_for_are_passed_over(threads):
    with Engine.open("nano", device="cpu,cpu") as engine:
        engine.run(ASKED)
        (peer,) = peers(engine)
        first, second = peer.ask("ready"), peer.ask("ready")
        assert peer.answer(second, 10) == engine.models.fingerprint and first < second
        with pytest.raises(GoneError, match="did not answer"):
            peer.answer(second + 1, 0.01)
