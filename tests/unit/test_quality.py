"""The dial without a model, and caches on small networks: who decides, what is left out, what stays as it is."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import nets
from lanting.attach.caches import State, residual_cache
from lanting.attach.compute import attach_kernels
from lanting.attach.frozen import frozen_references, kept_bytes
from lanting.attach.modulation import MODULATIONS, ModulationTable
from lanting.attach.parts import Part
from lanting.attach.stream import Mapped, Slots, Streamer
from lanting.core.quality import FIRST, LEVELS, Quality, check_words
from lanting.flow.budget import Budget, Forecast
from lanting.flow.frugal import Frugal
from lanting.flow.loop import Canvas, Conditioning, Tokens, denoise

LOOSE = Quality(step=9.0, mean=9.0, age=3)  # pays for everything that can be forecast
STRICT = Quality(step=1e-9, mean=1e-9, age=3)  # pays for nothing


def canvas(steps=8, guided=True, references=0, batch=1, **rest):
    draw = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    return Canvas(
        start=random(batch, 12, 16),
        grids=((1, 4, 3),),
        sigmas=torch.linspace(1, 0, steps + 1),
        positive=Conditioning(random(batch, 7, 48)),
        negative=Conditioning(random(batch, 5, 48)) if guided else None,
        references=tuple(Tokens(random(1, 4, 16), (1, 2, 2)) for _ in range(references)),
        **rest,
    )


class Counted:
    """How often each block of a network ran."""

    def __init__(self, net):
        self.runs = [0] * len(net.transformer_blocks)
        self.tokens = set()
        for index, block in enumerate(net.transformer_blocks):
            block.register_forward_pre_hook(lambda _, args, i=index: self._note(i, args))

    def _note(self, index, args):
        self.runs[index] += 1
        self.tokens.add(args[0].shape[1])


class Asking(Frugal):
    """Never guesses a whole step, so that what is cheaper than that is seen."""

    def _guess(self):
        return None


def drawn(net, given, quality=LOOSE, told=(), frozen=True, kind=Asking):
    """(latents, controller) of a drawing; quality None: the plain loop."""
    if quality is None:
        return list(denoise(net, given))[-1].latents, None
    frugal = kind(quality, given, told)
    with ExitStack() as hung:
        hung.enter_context(residual_cache(net, frugal))
        if frozen:
            hung.enter_context(frozen_references(net, frugal))
        return list(denoise(net, given, frugal))[-1].latents, frugal


# ---------------------------------------------------------------- arithmetic
def test_levels_ask_for_more_and_more():
    levels = list(LEVELS.values())
    assert levels[0].exact and not any(level.exact for level in levels[1:])
    for less, more in pairwise(levels):
        assert less.step < more.step and less.mean < more.mean and less.age <= more.age


def test_a_forecast_is_infinite_until_it_was_measured_and_grows_as_it_grew():
    forecast = Forecast()
    assert forecast.expected(0.1) == math.inf
    forecast.learn(0.02, 0.1)
    assert forecast.expected(0.2) == pytest.approx(0.04)
    forecast.learn(0.03, 0.1)
    assert forecast.expected(0.1) == pytest.approx(0.045)
    forecast.learn(0.9, 0.1)
    assert forecast.expected(0.1) == pytest.approx(1.8)  # twice the last one at most
    forecast.learn(0.1, 0.1)
    assert forecast.expected(0.1) == pytest.approx(0.1)  # and never less than it
    forecast.learn(math.nan, 0.1)
    assert forecast.expected(0.1) == math.inf


def test_no_more_is_spent_than_there_is():
    budget = Budget(Quality(step=0.1, mean=0.02, age=2), [1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0])
    for _ in range(FIRST):
        budget.begin()
        assert not budget.may(0.0)  # the first steps are computed, whatever they cost
    budget.begin()
    assert not budget.may(0.11) and not budget.may(0.01, age=3) and budget.may(0.06, age=2) and not budget.may(0.05)
    budget.begin()
    assert not budget.may(0.06) and budget.may(0.05)  # 0.016 less the 0.006 that are gone
    budget.begin()
    assert budget.may(0.02) and not budget.may(0.001)
    assert budget.spent == pytest.approx(0.02)
    assert not any(Budget(LEVELS["exact"], [1.0, 0.0]).may(0.0) for _ in range(2))


def test_words_of_strangers_are_checked():
    assert check_words(["FF", "F-", "l-", "cf"], 4) and check_words(["F"], 1)
    assert check_words(["P", "Q", "FF"], 3)
    for words, steps in (
        ("PF", 1),
        ("p", 1),
        ("PQ", 1),
        ("FF", 2),
        ("", 1),
        ("x", 1),
        ("-F", 1),
        ("FFF", 1),
        ("F F", 3),
    ):
        assert not check_words(words.split(), steps)


# ---------------------------------------------------------------- caches
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_a_budget_of_nothing_computes_everything_and_changes_no_bit(guided, kernels):
    net = nets.transformer()
    if kernels:
        attach_kernels(net)
    counted, given = Counted(net), canvas(guided=guided)
    wanted, _ = drawn(net, given, None)
    plain = list(counted.runs)
    found, frugal = drawn(net, given, STRICT)
    assert torch.equal(wanted, found) and counted.runs == [2 * n for n in plain]
    assert set(frugal.words) == {"FF" if guided else "F"} and frugal.budget.spent == 0
    again, _ = drawn(net, given, None)  # nothing is left hanging on the network
    assert torch.equal(wanted, again) and "forward" not in net.transformer_blocks.__dict__


@pytest.mark.parametrize("guided", [False, True])
def test_what_is_left_out_is_not_computed(guided):
    net = nets.transformer()
    counted, given = Counted(net), canvas(guided=guided)
    exact, _ = drawn(net, given, None)
    counted.runs = [0] * 5
    found, frugal = drawn(net, given)
    full = sum(letter == "F" for word in frugal.words for letter in word)
    every = sum(letter != "-" for word in frugal.words for letter in word)
    assert full < every < len("".join(frugal.words)) or (not guided and full < every == 8)
    assert counted.runs == [every] + [full] * 4
    error = (found - exact).norm() / exact.norm()
    assert 0 < error < 0.3
    # the same choices again, by what was said and not by what is measured
    again, told = drawn(net, given, LEVELS["exact"], frugal.words)
    assert torch.equal(found, again) and told.words == frugal.words


def test_a_line_goes_on_as_the_last_two_went():
    state = State(torch.zeros(1), torch.full((1, 2, 3), 3.0))
    assert torch.equal(state.guess(0.5), torch.full((1, 2, 3), 3.0))  # nothing to draw a line through
    state = replace(state, before=torch.full((1, 2, 3), 1.0))
    assert torch.equal(state.guess(0.0), torch.full((1, 2, 3), 3.0))
    assert torch.equal(state.guess(0.5), torch.full((1, 2, 3), 4.0))
    frugal = Frugal(LOOSE, canvas(steps=4), ["FF", "FF", "L-", "FF"])  # sigmas 1, 0.75, 0.5, 0.25
    for step in range(3):
        frugal.words.append("")
        assert frugal.ahead("positive") == pytest.approx((0.0, 0.0, 1.0)[step])
        frugal.computed("positive", 0.1, 0.1, 0.1)


def test_branches_keep_states_of_their_own():
    net, given = nets.transformer(), canvas(guided=True)
    frugal = Asking(LOOSE, given)
    with residual_cache(net, frugal) as cache:
        list(denoise(net, given, frugal))
        assert set(cache.states) == {"positive"}  # the negative side is left out whole, never taken from a cache
    both = replace(given, batched_guidance=True)
    frugal = Asking(LOOSE, both)
    with residual_cache(net, frugal) as cache:
        list(denoise(net, both, frugal))
        assert set(cache.states) == {"both"} and cache.states["both"].first.shape[0] == 2
    assert {len(word) for word in frugal.words} == {1} and "F" in frugal.words and len(set(frugal.words)) > 1


def test_one_branch_does_not_see_the_others_state():
    """The positive side with a negative one between is drawn as without it."""
    net = nets.transformer()
    latents, time, text, mask, grids, tokens = nets.inputs(net)
    ask = lambda branch, words: net(latents, time, words, mask, grids, tokens, branch=branch)  # noqa: E731

    class Always(Frugal):
        def watches(self, branch):
            return True

        def reuse(self, branch, change):
            return 0.0 if branch in self.residuals else None

    given = canvas(guided=True)
    with torch.no_grad():
        wanted = {branch: ask(branch, text * sign) for branch, sign in (("positive", 1), ("negative", -1))}
        frugal = Always(LOOSE, given)
        frugal.words.append("")
        with residual_cache(net, frugal):
            for _ in range(2):  # computed, then from the cache
                for branch, sign in (("positive", 1), ("negative", -1)):
                    found = ask(branch, text * sign)[:, :tokens]
                    assert torch.allclose(found, wanted[branch][:, :tokens], atol=1e-5)


def test_control_residuals_count_where_they_belong():
    net = nets.transformer()
    latents, time, text, mask, grids, tokens = nets.inputs(net)
    control = [torch.randn(1, 16, 64) for _ in range(2)]
    frugal = Frugal(STRICT, canvas())
    frugal.budget.begin()
    frugal.words.append("")
    with torch.no_grad():
        wanted = net(latents, time, text, mask, grids, tokens, control=control)
        with residual_cache(net, frugal):
            assert torch.equal(wanted, net(latents, time, text, mask, grids, tokens, control=control))


@pytest.mark.parametrize("how", ["mapped", "slots from disk"])
@pytest.mark.parametrize("resident", [0, 1, 3])
def test_streaming_and_the_table_go_on_when_blocks_are_left_out(how, resident, tmp_path):
    net, given = nets.transformer(), canvas(guided=True)
    read = nets.saved(net, tmp_path).read
    if how != "mapped":
        net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True)
    table = ModulationTable(net)
    table.prepare(given.sigmas[:-1])
    wanted, plain = drawn(net, given)
    assert any(word[0] in "CL" for word in plain.words)
    blocks = list(net.transformer_blocks)[resident:]
    paths = [f"transformer_blocks.{i}" for i in range(resident, 5)]
    parts = [Part(b, p, [f"{p}.{name}" for name in MODULATIONS]) for b, p in zip(blocks, paths, strict=True)]
    carrier = Mapped(parts, read) if how == "mapped" else Slots(parts, read, torch.device("cpu"), "disk", 2)
    streamer = Streamer(blocks, carrier, 2)
    for _ in range(2):
        found, frugal = drawn(net, given)
        assert torch.equal(wanted, found) and frugal.words == plain.words
    assert streamer.peak <= 2
    full, _ = drawn(net, given, None)
    assert torch.isfinite(full).all()
    streamer.close()


def test_stopping_leaves_nothing_out_any_more():
    net, given = nets.transformer(), canvas(steps=12, guided=True)
    frugal = Frugal(LOOSE, given)
    with residual_cache(net, frugal):
        for step in denoise(net, given, frugal):
            if step.index == 8:
                frugal.stop()
    assert frugal.words[8:] == ["FF"] * 4 and any(word != "FF" for word in frugal.words[:8])
    frugal.words[-1] = "L-"
    frugal.redone()
    assert frugal.words[-1] == "FF"


@pytest.mark.parametrize("guided", [False, True])
def test_a_whole_step_may_be_guessed(guided):
    net, counted = nets.transformer(), None
    given = canvas(guided=guided, steps=16)
    exact, _ = drawn(net, given, None)
    counted = Counted(net)
    found, frugal = drawn(net, given, kind=Frugal)
    guessed = sum(word in ("P", "Q") for word in frugal.words)
    assert guessed >= 8 and len({*frugal.words} & {"P", "Q"}) and counted.runs[0] <= (16 - guessed) * (1 + guided)
    assert 0 < (found - exact).norm() / exact.norm() < 0.3
    again, told = drawn(net, given, LEVELS["exact"], frugal.words, kind=Frugal)
    assert torch.equal(found, again) and told.words == frugal.words
    found, frugal = drawn(net, given, STRICT, kind=Frugal)
    assert torch.equal(found, exact)


@pytest.mark.parametrize("words", ["P P P P", "Q Q Q Q", "FF Q P F-", "c- l- cl L-", "F F F F", "f- FF CC C"])
@pytest.mark.parametrize("guided", [False, True])
def test_words_that_nobody_would_write_draw_something(guided, words):
    given = canvas(guided=guided, steps=4, references=1)
    latents, frugal = drawn(nets.transformer(), given, LEVELS["exact"], words.split(), kind=Frugal)
    assert torch.isfinite(latents).all() and check_words(frugal.words, 4)


def test_guesses_are_on_the_line_that_velocities_draw():
    """Of a velocity that falls evenly the third is known from two."""
    line = lambda latents, timestep, *rest, **more: timestep[:, None, None].expand_as(latents)  # noqa: E731
    given = canvas(guided=False, steps=8)
    exact = list(denoise(line, given))[-1].latents
    frugal = Frugal(Quality(step=0.05, mean=0.05, age=2), given)
    found = list(denoise(line, given, frugal))[-1].latents
    assert torch.allclose(found, exact, atol=1e-5) and frugal.words == ["F", "F", "F", "Q", "Q", "F", "Q", "Q"]
    assert frugal.budget.spent < 1e-5


# ---------------------------------------------------------------- frozen references
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_references_that_are_refreshed_every_step_change_no_bit(zero, kernels, guided):
    net = nets.transformer(zero_cond_t=zero)
    if kernels:
        attach_kernels(net)
    given = canvas(guided=guided, references=2)
    wanted, _ = drawn(net, given, None)
    found, frugal = drawn(net, given, STRICT)
    assert torch.equal(wanted, found) and not any(letter.islower() for word in frugal.words for letter in word)


@pytest.mark.parametrize("kernels", [False, True])
def test_frozen_references_are_not_computed(kernels):
    net = nets.transformer(zero_cond_t=True)
    if kernels:
        attach_kernels(net)
    given, counted = canvas(guided=False, references=2, steps=10), Counted(net)
    exact, _ = drawn(net, given, None)
    assert counted.tokens == {20}
    words = ["F", *"fffFfffff"]
    found, _ = drawn(net, given, LOOSE, words)
    assert counted.tokens == {12, 20}
    assert 0 < (found - exact).norm() / exact.norm() < 0.1
    for _ in range(2):
        again, frugal = drawn(net, given, LOOSE, words)
        assert torch.equal(found, again) and frugal.words == words


def test_a_reference_that_cannot_have_changed_costs_nothing():
    """With the same latents at the same time, kept keys are the new ones: the step is the same to a rounding."""
    net = nets.transformer(zero_cond_t=True)
    given = canvas(guided=False, references=1, steps=4)
    sigma = given.sigmas[0]
    frugal = Frugal(LOOSE, given, ["F", "f", "F", "F"])
    with torch.no_grad(), residual_cache(net, frugal), frozen_references(net, frugal):
        first, second = (frugal(net, given, given.start, sigma) for _ in range(2))
    assert torch.allclose(first, second, atol=1e-5)


def test_the_error_of_kept_references_is_measured_and_their_memory_known():
    net = nets.transformer(zero_cond_t=True)
    given = canvas(guided=False, references=2, steps=10)
    frugal = Frugal(STRICT, given)
    with torch.no_grad(), frozen_references(net, frugal) as frozen:
        list(denoise(net, given, frugal))
        kept = [tensor for pair in frozen.kept["positive"].values() for tensor in pair]
    assert sum(tensor.nbytes for tensor in kept) == kept_bytes(net.config, 8, 1, 4)
    rate = frugal.references["positive"].same.rate
    assert rate is not None and 0 < rate < 10


def test_caches_and_frozen_references_together():
    net, given = nets.transformer(zero_cond_t=True), canvas(guided=True, references=1, steps=16)
    exact, _ = drawn(net, given, None)
    found, frugal = drawn(net, given)
    letters = set("".join(frugal.words))
    assert letters & set("fcl") and letters & set("CcLl") and "-" in letters
    assert (found - exact).norm() / exact.norm() < 0.4
    again, _ = drawn(net, given, LOOSE, frugal.words)
    assert torch.equal(found, again)


def test_a_batch_is_judged_by_its_worst_picture(tmp_path):
    from lanting.attach.caches import relative

    error, of = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    error[1] *= 0.5
    of[1] *= 0.1
    assert relative(error, of) == pytest.approx(5.0)
