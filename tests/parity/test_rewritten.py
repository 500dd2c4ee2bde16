"""Rewritten prompts through whole engines over small random models: what the text encoder says equals transformers',
token for token; what is drawn, recorded, drawn again and taken up again is the same picture; what is not wished is not
loaded. Where an answer has to make sense it comes from a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from lanting import Engine, Progress, Request, Result
from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import ModelError, RequestError
from lanting.core.recipe import restore_request
from lanting.core.rewriting import QUOTES
from lanting.engine import rewriting
from lanting.nn.linears import GgufLinear
from lanting.nn.qwen_vl import Sampling, official_name
from lanting.text.encoder import PromptEncoder
from lanting.text.rewrite import AGAIN, rewrite
from lanting.text.templates import fill, load_template
from lanting.weights.gguf_encoder import write_text_encoder
from plans import plan

ASKED = 'a sign that says "HI"'
WORDS = 'A wooden sign that says "HI" hangs on a wall.'
AREA = 64 * 96


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    names = ("qwen-image", "qwen-image-edit-2511", "qwen-image-layered")
    return {name: tiny.save_folder(root / name, name) for name in names}


def open_engine(folder, **options):
    engine = Engine.open(str(folder), device="cpu", dtype="float32", **options)
    engine.models.spec = replace(engine.spec, defaults=replace(engine.spec.defaults, vl_area=AREA, vae_area=AREA))
    return engine


def wish(prompt: Any = ASKED, **values: Any) -> Request:
    return Request(
        prompt, **{"size": (64, 64), "steps": 3, "guidance_scale": 1.0, "seed": 7, "rewrite": True, **values}
    )


class Script:
    """Answers one after the other, in place of what the model says; the last one for ever. What was asked is kept."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[tuple[Any, ...]]()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Script:
        def write(encoder, template, prompt="", images=(), sampling=None, generator=None):
            assert hasattr(encoder.model, "lm_head")
            self.asked.append((template, prompt, images, sampling.temperature, generator))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            return iter(encoder.tokens(answer))

        monkeypatch.setattr(PromptEncoder, "write", write)
        return self


def pixels(result: Result) -> list[np.ndarray]:
    return [np.asarray(image) for image in result.images]


def same(one: Result, other: Result) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(pixels(one), pixels(other), strict=True))


# ---------------------------------------------------------------- what is said
@torch.no_grad()
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("pictures", [0, 2])
def test_the_model_says_what_transformers_says(folders, language, pictures):
    folder = folders["qwen-image-edit-2511"]
    engine = open_engine(folder)
    engine.models.write_words()
    encoder = engine.models.encoder
    images = [tiny.picture(56 + 28 * i, 56, seed=i) for i in range(pictures)]
    name = f"rewrite-{'edit-' if pictures else ''}{language}"
    found = list(encoder.write(name, ASKED, images, Sampling(24, stop=())))
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    patches, grids = encoder.see(images)
    ids = torch.tensor([encoder.tokens(fill(load_template(name), ASKED, encoder.counts(grids)))])
    shown = {"pixel_values": patches, "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])} if images else {}
    shown |= {"mm_token_type_ids": (ids == theirs.config.image_token_id).int()} if images else {}
    expected = theirs.generate(
        input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0, **shown
    )
    assert found == expected[0, ids.shape[1] :].tolist()


def drained(writing) -> Any:
    while True:
        try:
            next(writing)
        except StopIteration as end:
            return end.value


def test_words_do_not_depend_on_chance(folders):
    """Four tries of a random model, which never ends: the first one likeliest, the others drawn, always the same."""
    engine = open_engine(folders["qwen-image"])
    engine.models.write_words()
    encoder = engine.models.encoder
    torch.manual_seed(1)
    first = list(rewrite(encoder, "a cat", most=40))
    torch.manual_seed(2)
    assert list(rewrite(encoder, "a cat", most=40)) == first
    assert len(first) >= (1 + AGAIN) * 30  # as nothing it says can be used
    found = drained(rewrite(encoder, "a cat", most=40))
    assert found.words == "a cat" and found.reason


def test_a_prompt_that_is_long_already_is_not_asked_about(folders, monkeypatch):
    engine, script = open_engine(folders["qwen-image"]), Script(WORDS).install(monkeypatch)
    engine.models.write_words()
    found = drained(rewrite(engine.models.encoder, "word " * 600))
    assert found.reason == "the prompt is as long as prompts may be" and not script.asked


def test_numbers_that_are_not_finite_end_in_the_prompt_itself(folders):
    engine = open_engine(folders["qwen-image"])
    engine.models.write_words()
    with torch.no_grad():
        engine.models.encoder.model.lm_head.weight.fill_(float("nan"))
    assert drained(rewrite(engine.models.encoder, "a cat", most=40)).reason


# ---------------------------------------------------------------- what is drawn
def test_the_words_are_drawn_recorded_and_drawn_again(folders, monkeypatch):
    script = Script(WORDS).install(monkeypatch)
    engine = open_engine(folders["qwen-image"])
    events = list(engine.stream(wish()))
    result = events[-1]
    assert isinstance(result, Result) and "write" in result.seconds
    assert [event.phase for event in events[:3] if isinstance(event, Progress)] == ["load", "write", "encode"]
    told = result.recipes[0].request
    assert (told["prompt"], told["asked"]) == (WORDS, ASKED) and "rewrite" not in told and "unwritten" not in told
    assert script.asked == [("rewrite-en", ASKED, (), 0.0, None)]
    plain = open_engine(folders["qwen-image"])
    assert same(result, plain.run(wish(WORDS, rewrite=None)))
    assert not same(result, plain.run(wish(rewrite=None)))
    again = plain.run(restore_request(told))
    assert same(result, again) and again.recipes[0].request == told
    assert not hasattr(plain.models.encoder.model, "lm_head")
    assert len(script.asked) == 1


def test_without_the_wish_nothing_of_the_head_is_read(folders, monkeypatch):
    from lanting.weights.checkpoint import Checkpoint as Files

    read: list[str] = []
    plain = Files.read

    def watched(files, names):
        names = list(names)
        read.extend(names)
        return plain(files, names)

    monkeypatch.setattr(Files, "read", watched)
    for request in (wish(rewrite=None), wish(rewrite=False)):
        engine = open_engine(folders["qwen-image"])
        engine.run(request)
        assert not hasattr(engine.models.encoder.model, "lm_head")
    assert read and not [name for name in read if "lm_head" in name]
    Script(WORDS).install(monkeypatch)
    engine.run(wish())
    assert "lm_head.weight" in read


def test_batches_counts_and_seeds_share_the_words(folders, monkeypatch):
    script = Script('A "HI" sign of wood', "A grey dog").install(monkeypatch)
    engine = open_engine(folders["qwen-image"])
    result = engine.run(wish((ASKED, "a dog"), count=2))
    told = [recipe.request for recipe in result.recipes]
    assert [one["prompt"] for one in told] == ['A "HI" sign of wood'] * 2 + ["A grey dog"] * 2
    assert [one["asked"] for one in told] == [ASKED] * 2 + ["a dog"] * 2
    assert [one["seed"] for one in told] == [7, 8, 9, 10]
    engine.run(wish("a dog", seed=99))
    assert len(script.asked) == 2  # the answers are kept
    for index, one in enumerate(told):
        alone = engine.run(restore_request(one))
        assert np.abs(pixels(alone)[0].astype(int) - pixels(result)[index].astype(int)).max() <= 1
        assert alone.recipes[0].request == one


def test_edits_show_their_pictures(folders, monkeypatch):
    script = Script("Make the whole sign green.").install(monkeypatch)
    engine = open_engine(folders["qwen-image-edit-2511"])
    images = (tiny.picture(96, 64), tiny.picture(64, 64, "RGBA", seed=1))
    result = engine.run(wish("make it green", images=images))
    template, prompt, shown, *_ = script.asked[0]
    assert (template, prompt) == ("rewrite-edit-en", "make it green")
    assert [(one.mode, one.width * one.height <= 1.2 * AREA) for one in shown] == [("RGB", True)] * 2
    assert result.recipes[0].request["prompt"] == "Make the whole sign green."
    engine.run(wish("make it green", images=images[::-1]))
    assert len(script.asked) == 2  # other pictures, another question
    Script("把整个招牌改成绿色。").install(monkeypatch)
    assert engine.rewrite("改成绿色", images[:1]) == "把整个招牌改成绿色。"


def test_answers_that_can_not_be_used_are_asked_for_again_then_left(folders, monkeypatch):
    script = Script('A sign that says "HO"', "", WORDS).install(monkeypatch)
    engine = open_engine(folders["qwen-image"])
    assert engine.rewrite(ASKED) == WORDS
    assert [heat for *_, heat, _ in script.asked] == [0.0, 0.7, 0.7]
    assert [None if one is None else one.initial_seed() for *_, one in script.asked] == [None, 1, 2]

    script = Script('A sign that says "HO"').install(monkeypatch)
    engine = open_engine(folders["qwen-image"])
    *events, result = engine.stream(wish())
    assert len(script.asked) == 1 + AGAIN
    told = result.recipes[0].request
    assert (told["prompt"], told["asked"], told["unwritten"]) == (ASKED, ASKED, QUOTES)
    notices = [notice for event in events for notice in event.notices]
    assert [notice.values for notice in notices] == [{"prompt": ASKED, "reason": QUOTES}]
    assert same(result, open_engine(folders["qwen-image"]).run(wish(rewrite=None)))
    assert engine.rewrite(ASKED) == ASKED


def test_an_answer_longer_than_is_read_is_refused(folders, monkeypatch):
    Script("a cat " * 400).install(monkeypatch)
    engine = open_engine(folders["qwen-image"])
    assert engine.run(wish("a cat")).recipes[0].request["unwritten"] == "the answer was too long"


# ---------------------------------------------------------------- interrupted, shared, planned
def test_a_drawing_that_is_taken_up_again_keeps_its_words(folders, monkeypatch):
    script = Script(WORDS).install(monkeypatch)
    engine = open_engine(folders["qwen-image"])
    events = list(engine.stream_resumable(wish(), every=1))
    whole = events[-1]
    state = next(event for event in events if isinstance(event, Checkpoint))
    state = Checkpoint.from_bytes(state.to_bytes())
    script.answers = ["Something else that is said today."]
    fresh = open_engine(folders["qwen-image"])
    *_, result = fresh.stream_resumable(wish(), every=1, resume=state)
    assert same(whole, result) and result.recipes[0].request == whole.recipes[0].request
    assert len(script.asked) == 1 and not hasattr(fresh.models.encoder.model, "lm_head")
    with pytest.raises(RequestError, match="another drawing"):
        list(fresh.stream_resumable(wish("another sign"), every=1, resume=state))


def test_shared_steps_change_nothing(folders, monkeypatch):
    Script(WORDS).install(monkeypatch)
    alone = open_engine(folders["qwen-image"]).run(wish())
    engine = open_engine(folders["qwen-image"])
    assert engine.room(wish(rewrite=None), 4) > 1 and engine.room(wish(), 4) == 1
    found = {}
    shared = engine.together(forced=True)
    try:
        seats = [shared.join(wish()), shared.join(wish(rewrite=None))]
        while shared.seats:
            found |= {seat: event for seat, event in shared.round() if isinstance(event, Result)}
    finally:
        shared.close()
    assert found[seats[0]].recipes[0].request["prompt"] == WORDS
    worst = np.abs(pixels(found[seats[0]])[0].astype(int) - pixels(alone)[0].astype(int)).max()
    assert worst <= 1 and found[seats[1]].recipes[0].request["prompt"] == ASKED


@pytest.mark.parametrize(
    "how", [{"encoder": "unload"}, {"encoder": "unload", "streamed": "disk", "resident_blocks": 0}]
)
def test_plans_are_obeyed(folders, monkeypatch, how):
    Script(WORDS).install(monkeypatch)
    wanted = open_engine(folders["qwen-image"]).run(wish())
    planned = open_engine(folders["qwen-image"], plan=plan(**how), rewrite=True)
    assert same(planned.run(wish()), wanted) and same(planned.run(wish()), wanted)


def test_a_plan_without_the_head_and_without_room_is_a_sentence(folders, monkeypatch):
    Script(WORDS).install(monkeypatch)
    engine = open_engine(folders["qwen-image"], plan=plan(encoder="unload"))
    engine.run(wish())  # there is room
    engine = open_engine(folders["qwen-image"], plan=plan(encoder="unload"))
    monkeypatch.setattr(rewriting, "spare", lambda *_: 0)
    with pytest.raises(RequestError, match="GB more, for which this model was not planned"):
        engine.stream(wish())
    engine.stream(wish(rewrite=None))
    open_engine(folders["qwen-image"], plan=plan(encoder="unload"), rewrite=True).stream(wish())


def test_writing_can_be_stopped(folders, monkeypatch):
    Script("a cat " * 400).install(monkeypatch)
    monkeypatch.setattr(rewriting, "PAUSE", 0.0)
    engine = open_engine(folders["qwen-image"])
    events = engine.stream(wish("a cat"))
    event = next(events)
    assert (event.phase, event.step, event.steps) == ("write", 1, 512)
    events.close()
    assert isinstance(engine.run(wish("a cat", rewrite=None)), Result)


# ---------------------------------------------------------------- who can't
def without_head(folder, to):
    """The same folder, its text encoder without the matrix that writes."""
    import shutil

    shutil.copytree(folder, to)
    file = to / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    assert weights.pop("lm_head.weight").ndim == 2
    save_file(weights, file, {"format": "pt"})
    return to


def test_an_encoder_without_head_draws_and_is_refused_the_rest(folders, tmp_path):
    engine = open_engine(without_head(folders["qwen-image"], tmp_path / "headless"))
    assert not engine.spec.writes
    for asks in (lambda: engine.stream(wish()), lambda: engine.rewrite("a cat"), lambda: engine.room(wish(), 2)):
        with pytest.raises(RequestError, match=r"no lm_head\.weight"):
            asks()
    assert "placed_encoder" not in engine.models.__dict__  # before anything was loaded
    assert isinstance(engine.run(wish(rewrite=None)), Result)
    whole = open_engine(tmp_path / "headless", parts={"text_encoder": str(folders["qwen-image"] / "text_encoder")})
    assert whole.spec.writes


def test_what_has_no_words_to_rewrite(folders):
    engine = open_engine(folders["qwen-image-layered"])
    with pytest.raises(RequestError, match="layers have no prompt"):
        engine.stream(Request("", images=(tiny.picture(64, 64),), rewrite=True))
    with pytest.raises((RequestError, ModelError), match="can't do edit"):
        open_engine(folders["qwen-image"]).rewrite("make it red", (tiny.picture(64, 64),))


def test_the_command_line(folders, tmp_path, monkeypatch, capsys):
    import json

    from lanting.cli.main import main

    Script(WORDS).install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    words: Sequence[str] = ("--model", str(folders["qwen-image"]), "--size", "64x64", "--steps", "1", "--device", "cpu")
    assert main(["generate", ASKED, *words, "--rewrite", "-o", "sign.png"]) == 0
    assert f"  prompt: {WORDS}\n" in capsys.readouterr().out
    assert main(["replay", "sign.png", *words[:2]]) == 0
    assert "identical, pixel for pixel" in capsys.readouterr().out
    assert main(["generate", ASKED, *words, "--rewrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["prompt"], told["asked"]) == (WORDS, ASKED) and "unwritten" not in told
    assert told["files"][0]["path"].startswith("a-sign-that-says")
    Script("HO").install(monkeypatch)
    assert main(["generate", ASKED, *words, "--rewrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unwritten"] == QUOTES
    assert main(["generate", ASKED, *words, "--rewrite"]) == 0
    assert "is drawn as it was asked, not rewritten: quoted words were changed" in capsys.readouterr().err
    assert main(["generate", ASKED, "--model", "nano", "--rewrite"]) == 2
    assert "nano can't rewrite prompts" in capsys.readouterr().err
    assert main(["plan", "qwen-image-2.1", "--rewrite"]) == 2


@pytest.mark.parametrize("whole", [True, False])
def test_a_packed_file_writes_if_it_has_the_head(folders, tmp_path, whole):
    """A GGUF file with its `output` packed, and one that was repacked without it."""
    net = tiny.text_encoder()
    state = {official_name(name): tensor for name, tensor in net.state_dict().items()}
    if not whole:
        del state["lm_head.weight"]
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    about = {"config": net.config.to_dict(), "tokenizer": folders["qwen-image"] / "tokenizer"}
    write_text_encoder(tmp_path / "qwen.gguf", shapes, state.__getitem__, "q8_0", about)
    engine = open_engine(folders["qwen-image"], parts={"text_encoder": str(tmp_path / "qwen.gguf")})
    if not whole:
        with pytest.raises(RequestError, match=r"no lm_head\.weight"):
            engine.stream(wish())
        assert isinstance(engine.run(wish(rewrite=None)), Result)
        return
    engine.models.write_words()
    encoder = engine.models.encoder
    assert isinstance(encoder.model.lm_head, GgufLinear)
    found = list(encoder.write("rewrite-en", ASKED, sampling=Sampling(8, stop=())))
    dense = open_engine(folders["qwen-image"])
    dense.models.write_words()
    assert found[0] == next(iter(dense.models.encoder.write("rewrite-en", ASKED, sampling=Sampling(8, stop=()))))
