"""Schedule, latents, guidance and loop, without any network: golden numbers and small fakes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lanting.core import ModelError, RequestError
from lanting.flow.guidance import guide, join
from lanting.flow.latents import LatentCodec, fit_preview, pack, unpack
from lanting.flow.loop import Canvas, Conditioning, Tokens, denoise, euler, velocity
from lanting.flow.schedule import Schedule, model_timestep, scale_noise, skipped_steps

BASE = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
LIGHTNING = {**BASE, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}


# ---------------------------------------------------------------- schedule
def sigmas(config, steps, tokens=4096, **rest):
    return Schedule.from_config(config).sigmas(steps, tokens, **rest)


@pytest.mark.parametrize(("tokens", "mu"), [(1600, 0.567742), (4096, 0.693548), (6889, 0.834325), (16384, 1.312903)])
def test_mu_of_the_released_schedule(tokens, mu):
    assert Schedule.from_config(BASE).mu(tokens) == pytest.approx(mu, abs=5e-7)


@pytest.mark.parametrize(
    ("config", "steps", "golden"),
    [
        (BASE, 4, [1, 0.766709, 0.455614, 0.02, 0]),
        (LIGHTNING, 4, [1, 0.9, 0.75, 0.5, 0]),
        (LIGHTNING, 8, [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]),
    ],
)
def test_golden_sigmas(config, steps, golden):
    assert sigmas(config, steps).tolist() == pytest.approx(golden, abs=6e-7)


def test_golden_sigmas_of_fifty_steps_and_of_layers():
    square = sigmas(BASE, 50)
    assert square[1].item() == pytest.approx(0.989701, abs=1e-6)
    assert square[-4:].tolist() == pytest.approx([0.095499, 0.058476, 0.02, 0], abs=1e-6)
    layers = sigmas(BASE, 50, tokens=1, mu=math.sqrt(1600 / 256))
    assert layers[:3].tolist() == pytest.approx([1, 0.997954, 0.995829], abs=1e-6)
    assert layers[-3:].tolist() == pytest.approx([0.188348, 0.02, 0], abs=1e-6)


def test_a_single_step_goes_from_noise_to_the_picture():
    """The terminal stretch has nothing to stretch there; the reference divides 0 by 0."""
    assert sigmas(BASE, 1).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_karras_sigmas", True),
        ("use_beta_sigmas", True),
        ("invert_sigmas", True),
        ("num_train_timesteps", 500),
        ("time_shift_type", "cubic"),
        ("_class_name", "DDIMScheduler"),
    ],
)
def test_a_schedule_we_cannot_follow_is_named(key, value):
    with pytest.raises(ModelError, match=value if isinstance(value, str) else key):
        Schedule.from_config({**BASE, key: value})


@pytest.mark.parametrize("steps", [0, -1, 1001, True, 2.0])
def test_steps_out_of_range(steps):
    with pytest.raises(RequestError, match="steps"):
        sigmas(BASE, steps)


@pytest.mark.parametrize("custom", [[], [1.0, 1.0], [0.5, 0.7], [1.2, 0.5], [1.0, 0.0], [float("nan")], [[1.0]]])
def test_own_sigmas_out_of_range(custom):
    with pytest.raises(RequestError, match="sigmas"):
        sigmas(BASE, 4, custom=custom)


@pytest.mark.parametrize(
    ("steps", "strength", "skipped"), [(50, 0.6, 20), (50, 0.33, 33), (50, 1.0, 0), (4, 0.1, 3), (1, 0.01, 0)]
)
def test_strength_leaves_out_the_first_steps(steps, strength, skipped):
    assert skipped_steps(steps, strength) == skipped


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan")])
def test_strength_out_of_range(strength):
    with pytest.raises(RequestError, match="strength"):
        skipped_steps(4, strength)


def test_timesteps_round_twice_in_bfloat16():
    given = [0.989701, 0.5, 0.095499]
    seen = [model_timestep(torch.tensor(s), torch.bfloat16).item() for s in given]
    assert seen == [0.98828125, 0.5, 0.095703125]
    assert model_timestep(torch.tensor(0.3), torch.float32).item() == pytest.approx(0.3, abs=1e-7)


def test_scale_noise_is_a_straight_line():
    clean, noise = torch.zeros(2, 3), torch.ones(2, 3)
    assert scale_noise(clean, noise, torch.tensor(0.25)).unique().tolist() == [0.25]
    assert scale_noise(clean.bfloat16(), noise.bfloat16(), torch.tensor(0.3)).dtype == torch.bfloat16


# ---------------------------------------------------------------- latents
def test_packing_order_is_channel_row_column():
    packed = pack(torch.arange(16 * 4 * 4.0).view(1, 16, 4, 4))
    assert packed.shape == (1, 4, 64)
    assert packed[0, 1, :9].tolist() == [2, 3, 6, 7, 18, 19, 22, 23, 34]
    assert packed[0, 2, :5].tolist() == [8, 9, 12, 13, 24]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (6, 2)])
def test_unpack_undoes_pack(rows, columns):
    latents = torch.randn(2, 16, 2 * rows, 2 * columns)
    assert torch.equal(unpack(pack(latents), (1, rows, columns)), latents)


class LinearVAE(nn.Module):
    """Latent = a mix of the mean colour of 8 x 8 pixels and of what it can't see; decoding is the inverse."""

    def __init__(self, channels=3, z=4):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(z, channels))[0])  # (z, channels)
        self.tiles: list[bool] = []

    def encode(self, pixels, *, tile=False):
        self.tiles.append(tile)
        small = nn.functional.avg_pool2d(pixels, 8)
        mean = torch.einsum("bchw,zc->bzhw", small, self.mix)
        return mean, torch.full_like(mean, 9.0)  # a posterior so wide that a sample would show

    def decode(self, latents, *, tile=False):
        self.tiles.append(tile)
        small = torch.einsum("bzhw,zc->bchw", latents, self.mix)
        return nn.functional.interpolate(small, scale_factor=8)


def linear_codec(channels=3, **rest):
    statistics = [0.1, -0.2, 0.3, 0.4], [0.5, 2.0, 1.0, 3.0]
    return LatentCodec(LinearVAE(channels), *statistics, pixel_channels=channels, **rest)


def test_codec_normalises_with_mean_and_std_and_takes_the_mode():
    torch.manual_seed(0)
    codec, pixels = linear_codec(), torch.rand(2, 3, 32, 48) * 2 - 1
    tokens = codec.encode(pixels)
    assert tokens.grid == (1, 2, 3) and tokens.data.shape == (2, 6, 16)
    with torch.no_grad():  # the convolution of a CPU may round differently while gradients are recorded
        raw = codec.vae.encode(pixels)[0]
    want = (raw - codec.mean) / codec.std
    assert torch.allclose(unpack(tokens.data, tokens.grid), want, atol=1e-6)  # one by one there, both at once here
    seen = nn.functional.avg_pool2d(codec.decode(tokens.data, tokens.grid), 8)
    assert torch.allclose(seen, nn.functional.avg_pool2d(pixels, 8), atol=1e-6)


def test_codec_passes_tiling_on_and_follows_the_vae_dtype():
    codec = linear_codec(tile=True)
    codec.vae.bfloat16()
    tokens = codec.encode(torch.zeros(1, 3, 16, 16))
    assert tokens.data.dtype == torch.float32 and codec.decode(tokens.data, tokens.grid).dtype == torch.float32
    codec.tile = False
    codec.encode(torch.zeros(1, 3, 16, 16))
    assert codec.vae.tiles == [True, True, False]


def test_noise_is_drawn_per_picture_and_frame():
    codec, grid = linear_codec(), (1, 3, 5)
    generators = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    noise = codec.noise(grid, generators, frames=3)
    assert noise.shape == (2, 45, 16)
    drawn = torch.randn(1, 3, 4, 6, 10, generator=torch.Generator().manual_seed(8))[0]
    assert torch.equal(noise[1], torch.cat([pack(frame[None])[0] for frame in drawn]))


def test_a_bfloat16_draw_is_the_float32_draw_rounded():
    """What lets one seed mean the same picture in either dtype, and the same as the reference's bfloat16 draw."""
    draws = [
        torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(3), dtype=d) for d in (None, torch.bfloat16)
    ]
    assert torch.equal(draws[0].bfloat16(), draws[1])


@pytest.mark.parametrize("channels", [3, 4])
def test_preview_finds_a_linear_decoder(channels):
    codec = linear_codec(channels)
    preview = fit_preview(codec)
    assert preview.matrix.shape == (4, 3) and preview.bias.shape == (3,)
    colours = nn.functional.interpolate(torch.rand(1, channels, 4, 6) * 1.8 - 0.9, scale_factor=8)
    if channels == 4:
        colours[:, 3] = 1.0  # fitted for opaque pictures
    tokens = codec.encode(colours)
    twice = torch.cat([tokens.data, torch.randn_like(tokens.data)], 1)  # a second layer, which must not show
    guess = preview(twice, tokens.grid)
    assert guess.shape == (1, 3, 4, 6)
    assert (guess - nn.functional.avg_pool2d(colours[:, :3], 8)).abs().max() < 0.01


# ---------------------------------------------------------------- guidance
def test_guidance_keeps_the_length_of_the_positive_prediction():
    positive, negative = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    guided = guide(positive, negative, 4.0)
    assert torch.allclose(guided.norm(dim=-1), positive.norm(dim=-1), rtol=1e-5)
    plain = guide(positive, negative, 4.0, renormalize=False)
    assert torch.equal(plain, negative + 4.0 * (positive - negative))
    assert torch.allclose(nn.functional.cosine_similarity(guided, plain, dim=-1), torch.ones(2, 5))


def test_a_zero_token_stays_zero():
    zero = torch.zeros(1, 1, 4)
    assert guide(zero, zero, 4.0).tolist() == zero.tolist()
    assert guide(torch.ones(1, 1, 4) * 4, torch.ones(1, 1, 4), 0.0).isfinite().all()


def test_join_pads_the_shorter_text_and_masks_it():
    embeds, mask = join((torch.ones(2, 3, 4), None), (torch.ones(2, 5, 4), torch.tensor([[True] * 4 + [False]] * 2)))
    assert embeds.shape == (4, 5, 4) and mask is not None
    assert mask.sum(1).tolist() == [3, 3, 4, 4]
    assert embeds[:2, 3:].abs().sum() == 0
    assert join((torch.ones(1, 3, 4), None), (torch.ones(1, 3, 4), None))[1] is None


# ---------------------------------------------------------------- loop
class Spy:
    """A model whose prediction is the mean of its prompt plus a tenth of its input; it notes every call."""

    def __init__(self):
        self.calls = []

    def __call__(  # noqa: PLR0913  the transformer's own arguments
        self, latents, timestep, prompt_embeds, prompt_mask, grids, target_tokens, *, control=(), branch="positive"
    ):
        self.calls.append((branch, latents.shape, tuple(timestep.tolist()), tuple(grids), target_tokens))
        weight = torch.ones(prompt_embeds.shape[:2]) if prompt_mask is None else prompt_mask.float()
        mean = (prompt_embeds * weight[..., None]).sum((1, 2)) / weight.sum(1)
        steered = sum((r[:, : latents.shape[1]].mean(-1, keepdim=True) for r in control), start=0)
        return latents * 0.1 + mean[:, None, None] + steered


def canvas(**rest):
    given = {
        "start": torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)),
        "grids": ((1, 2, 3),),
        "sigmas": torch.tensor([1.0, 0.6, 0.2, 0.0]),
        "positive": Conditioning(torch.full((1, 3, 1), 0.5)),
    }
    return Canvas(**{**given, **rest})


def test_without_guidance_one_call_per_step():
    spy = Spy()
    steps = list(denoise(spy, canvas()))
    assert [s.index for s in steps] == [1, 2, 3] and {s.total for s in steps} == {3}
    assert [c[0] for c in spy.calls] == ["positive"] * 3
    assert [round(c[2][0], 6) for c in spy.calls] == [1.0, 0.6, 0.2]
    assert torch.equal(steps[-1].denoised, steps[-1].latents)  # at noise level 0
    assert torch.allclose(steps[0].denoised, canvas().start - steps[0].velocity, atol=1e-6)


def test_two_calls_with_guidance_or_one_of_twice_the_batch():
    negative = Conditioning(torch.full((1, 5, 1), -0.5))
    runs = {}
    for batched in (False, True):
        spy = Spy()
        runs[batched] = [*denoise(spy, canvas(negative=negative, batched_guidance=batched))][-1].latents
        assert [c[0] for c in spy.calls] == (["both"] * 3 if batched else ["positive", "negative"] * 3)
        assert {c[1][0] for c in spy.calls} == {2 if batched else 1}
    assert torch.allclose(runs[False], runs[True], atol=1e-6)


def test_references_stand_behind_the_target_and_are_cut_off():
    spy, reference = Spy(), Tokens(torch.randn(1, 4, 8), (1, 2, 2))
    given = canvas(references=(reference,), start=torch.randn(2, 6, 8), positive=Conditioning(torch.ones(2, 3, 1)))
    prediction = velocity(spy, given, given.start, given.sigmas[0])
    assert prediction.shape == (2, 6, 8)
    assert spy.calls[0][1] == (2, 10, 8) and spy.calls[0][3] == ((1, 2, 3), (1, 2, 2)) and spy.calls[0][4] == 6


def test_control_is_asked_once_per_step_with_the_positive_prompt():
    asked = []

    def control(latents, timestep, sigma, prompt, grids):
        asked.append((latents.shape, float(sigma), prompt.embeds.shape[1]))
        return [torch.ones(1, 6, 3)]

    reference = Tokens(torch.randn(1, 4, 8), (1, 2, 2))
    negative = Conditioning(torch.full((1, 5, 1), -0.5))
    for batched in (False, True):
        asked.clear()
        given = canvas(control=control, negative=negative, references=(reference,), batched_guidance=batched)
        steered = velocity(Spy(), given, given.start, given.sigmas[1])
        assert asked == [((1, 6, 8), pytest.approx(0.6), 3)]
        free = canvas(negative=negative, references=(reference,), batched_guidance=batched)
        assert not torch.allclose(steered, velocity(Spy(), free, free.start, free.sigmas[1]))


def test_keep_is_applied_at_the_next_noise_level():
    levels = []

    def keep(latents, sigma):
        levels.append(float(sigma))
        return latents * 0 + 7

    last = [*denoise(Spy(), canvas(keep=keep))][-1]
    assert levels == pytest.approx([0.6, 0.2, 0.0]) and last.latents.unique().tolist() == [7.0]


def test_closing_the_generator_stops_the_work():
    spy = Spy()
    walk = denoise(spy, canvas())
    next(walk)
    walk.close()
    assert len(spy.calls) == 1 and list(walk) == []


def test_gradients_are_the_consumers_business():
    for _ in denoise(Spy(), canvas()):
        assert torch.is_grad_enabled()


def test_euler_rounds_the_product_but_not_the_sum_in_bfloat16():
    latents, prediction = torch.tensor([[3.0]]).bfloat16(), torch.tensor([[0.7]]).bfloat16()
    sigma, following = torch.tensor(0.9), torch.tensor(0.61803)
    product = ((following - sigma) * prediction).float()  # rounded once
    assert euler(latents, prediction, sigma, following).item() == (3.0 + product).bfloat16().item()
    assert euler(latents.float(), prediction.float(), sigma, following).dtype == torch.float32
