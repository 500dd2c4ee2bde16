"""The recipe of nano's VAE: from random weights to legible signs in minutes of CPU time.

Two stages. `train_vae` trains both halves, then measures the statistics of the latents and freezes the
encoder: from there on the transformer may be trained. `finetune_decoder` goes on with the decoder alone, which
no latent can notice. What made it work: fan-in initialisation with quiet residual branches (the default leaves
12 dB after 90 s), Muon on the convolutions, a gradient term in the loss, and noise on the latents instead of a
KL term. One process per core with averaged gradients: threads lose half their time on a busy machine. On a GPU one
process takes large batches of what other processes make up. Rejected: an adversarial or perceptual loss, useless at
0.9 M parameters and for flat lettering.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor, nn

from lanting.core.files import replace_file
from lanting.core.lang import say
from lanting.nn.vae import AttentionBlock, AutoencoderKLQwenImage, ResidualBlock, VAEConfig, to_image_weights
from lanting.train.kept import own_file, read_checkpoint, write_checkpoint, write_tensors
from lanting.train.losses import redrawn
from lanting.train.optim import Muon, average_gradients
from lanting.train.pieces import Scraps, scraps_for
from lanting.train.redraw import held_out_designs, latent_statistics, psnr, to_tensor
from lanting.train.vae_speed import sped_up

WEIGHTS, DECODER, CONFIG = "vae.safetensors", "decoder_ft.safetensors", "config.json"
CHECKPOINT, UNTUNED, FROZEN, BEGUN = "train.pt", "decoder.pt", "ENCODER_FROZEN", "begun.safetensors"


@dataclass(frozen=True)
class VAERecipe:
    """How to train. Lengths in pixels, times in seconds; `batch` is per process."""

    batch: int = 10  # crops per step
    crop: int = 64
    canvas_share: float = 0.2  # of the steps show whole signs instead, so that attention meets their real size
    canvas_batch: int = 1
    lr: float = 2e-3
    noise: float = 0.1  # standard deviation added to the latents; keeps the decoder smooth where a sampler errs
    gradient_weight: float = 0.5
    decay_share: float = 0.5  # last part of the budget, linear to 2 %
    warmup_steps: int = 40
    processes: int = 2
    seed: int = 0
    judged: int = 12  # held-out designs per log line
    measured: int = 256  # signs behind the statistics of the latents
    log_every: float = 20.0
    warm: str = ""  # model folder whose autoencoder is continued instead of random weights
    save_every: float = 60.0
    device: str = "cpu"
    feeders: int = 0  # processes that make up designs; 0: the trainer does it itself
    until: float = float("inf")  # time.monotonic() at which this slice of the run ends


def nano_config() -> VAEConfig:
    """0.93 M live parameters; without temporal sampling, so the stored network has no time convolutions."""
    return VAEConfig(
        base_dim=16,
        num_res_blocks=1,
        temperal_downsample=(False, False, False),
        latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
    )


@torch.no_grad()
def initialise(vae: AutoencoderKLQwenImage, seed: int) -> None:
    """Fan-in normal convolutions; residual branches, attention and the last layer start quiet."""
    generator = torch.Generator().manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0, 1 / math.sqrt(module.weight[0].numel()), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight.mul_(0.4)
        elif isinstance(module, AttentionBlock):
            module.proj.weight.mul_(0.1)
    vae.decoder.conv_out.weight.mul_(0.3)


class VAETrainer:
    """One stage of the training. `part` is "all" or "decoder"; `seconds` is the time of one core spent on steps, on a
    GPU the time on the clock."""

    def __init__(
        self, vae: AutoencoderKLQwenImage, recipe: VAERecipe, minutes: float, part: str, rank: int = 0
    ) -> None:
        self.vae, self.recipe, self.minutes, self.part, self.rank = vae, recipe, minutes, part, rank
        self.step, self.seconds = 0, 0.0
        self.agreed = 0.0  # seconds as all processes last agreed on them: what the rate and the end go by
        self.device = torch.device(recipe.device)
        self.ended = False  # whether the slice has, for any process
        vae.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        torch.backends.cudnn.benchmark = self.device.type == "cuda"  # crops and canvases have few shapes
        vae.requires_grad_(part == "all")
        for module in (vae.decoder, vae.post_quant_conv):
            module.requires_grad_(True)
        self.params = [p for p in vae.parameters() if p.requires_grad]
        matrices = [p for p in self.params if p.ndim == 4 and p.shape[0] > 4]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.params if id(p) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=recipe.lr, momentum=0.9, weight_decay=0.0),
            torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.97), weight_decay=0.0),
        ]
        self.fast = sped_up(self)

    def rate(self) -> float:
        """The learning rate now: warm-up by steps, decay by the share of the time that is left."""
        left = max(0.0, 1 - self.agreed / max(1e-9, 60 * self.minutes))
        warm = min(1.0, (self.step + 1) / self.recipe.warmup_steps)
        return self.recipe.lr * warm * (min(1.0, left / self.recipe.decay_share) * 0.98 + 0.02)

    def loss(self, wanted: Tensor) -> Tensor:
        """How badly pictures (B, 3, H, W) in [-1, 1] are drawn again."""
        return redrawn(self.vae, wanted, self.recipe.noise, self.recipe.gradient_weight, self.part == "all")

    def train_step(self, wanted: Tensor) -> Tensor:
        """One update on pictures (B, 3, H, W) in [-1, 1]; returns the loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
        if self.fast is None:
            loss = self.loss(wanted)
            loss.backward()
        else:
            loss = self.fast(wanted)
        self.average()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.detach()

    def average(self) -> None:
        """Give all processes the mean of their gradients and of their clocks, so they also stop together."""
        self.ended = time.monotonic() > self.recipe.until
        if self.recipe.processes == 1:
            return
        self.agreed = self.seconds = average_gradients(self.params, self.seconds, self.recipe.processes)
        if self.recipe.until < float("inf"):
            late = torch.tensor(float(self.ended))
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
            self.ended = late.item() > 0

    def next_batch(self, scraps: Scraps) -> Tensor:
        """Crops, or whole signs in `canvas_share` of the steps."""
        if scraps.rng.random() < self.recipe.canvas_share:
            pictures = scraps.canvases(self.recipe.canvas_batch)
        else:
            pictures = scraps.crops(self.recipe.batch, self.recipe.crop)
        return to_tensor(pictures) if isinstance(pictures, np.ndarray) else pictures

    def run(self, checkpoint: Path, log: Callable[[str], None]) -> None:
        """Train until the budget or the slice is spent, saving to `checkpoint` every `save_every` seconds."""
        seed = (self.recipe.seed * 1_000_003 + self.step * self.recipe.processes + self.rank) % 2**63
        torch.manual_seed(seed)
        recipe, folder = self.recipe, checkpoint.parent
        with scraps_for(recipe.feeders, recipe.crop, seed, folder, self.device) as scraps:
            self.walk(scraps, checkpoint, log)

    def walk(self, scraps: Scraps, checkpoint: Path, log: Callable[[str], None]) -> None:
        """The loop of `run`."""
        judged = [picture.to(self.device) for picture in held_out_designs(self.recipe.judged)]
        logged = saved = time.monotonic()
        loss = torch.tensor(float("nan"))
        watch = time.process_time if self.device.type == "cpu" else time.monotonic
        while self.agreed < 60 * self.minutes and not self.ended:
            started = watch()
            loss = self.train_step(self.next_batch(scraps))
            self.seconds += watch() - started
            if self.recipe.processes == 1:
                self.agreed = self.seconds
            now = time.monotonic()
            if self.rank:
                continue
            if now - logged > self.recipe.log_every:
                log(self.report(loss.item(), judged))
                logged = now
            if now - saved > self.recipe.save_every:
                self.save(checkpoint)
                saved = now
        if self.rank == 0:
            log(self.report(loss.item(), judged))
            self.save(checkpoint)

    def report(self, loss: float, judged: list[Tensor]) -> str:
        told = {"seconds": self.seconds, "step": self.step, "rate": self.rate(), "loss": loss}
        told["db"] = psnr(self.vae, judged)
        return say(
            "autoencoder: {seconds:.0f} s, step {step}, rate {rate:.1e}, loss {loss:.4f}, held-out designs {db:.2f} dB",
            **told,
        )

    def save(self, path: Path) -> None:
        """Everything a resumed run needs; a kill at any moment leaves the old or the new file whole."""
        clock = self.step, self.seconds
        optimizers = [o.state_dict() for o in self.optimizers]
        write_checkpoint(path, {"vae": self.vae.state_dict(), "optimizers": optimizers, "clock": clock})

    def load(self, path: Path) -> None:
        state = read_checkpoint(path, self.device, ("vae", "optimizers", "clock"))
        self.vae.load_state_dict(state["vae"], strict=True)
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.seconds = state["clock"]
        self.agreed = self.seconds


def save_vae(vae: AutoencoderKLQwenImage, path: Path) -> None:
    """Image-form weights (4-D kernels, official names) as safetensors."""
    state = {name: tensor.detach().contiguous() for name, tensor in vae.state_dict().items()}
    replace_file(path, lambda part: write_tensors(part, state))


def save_config(config: VAEConfig, path: Path) -> None:
    """The official `vae/config.json`."""
    values = {"_class_name": "AutoencoderKLQwenImage", "_diffusers_version": "0.42.0", **asdict(config)}
    replace_file(path, lambda part: part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))


def load_vae(folder: Path, weights: str = WEIGHTS) -> AutoencoderKLQwenImage:
    """The network, fp32, that `train_vae` (`weights=DECODER`: `finetune_decoder`) left in `folder`."""
    with own_file(folder):
        vae = AutoencoderKLQwenImage(VAEConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8"))))
        vae.load_state_dict(load_file(str(folder / weights)), strict=True)
        return vae


def shipped_vae(model: Path) -> dict[str, Tensor]:
    """The autoencoder of an exported model folder as a state of ours, fp32."""
    video = load_file(str(model / "vae" / "diffusion_pytorch_model.safetensors"))
    return {name: tensor.float().contiguous() for name, tensor in to_image_weights(video).items()}


def train_vae(
    out: Path,
    minutes: float,
    *,
    resume: bool = True,
    recipe: VAERecipe | None = None,
    log: Callable[[str], None] = print,
) -> AutoencoderKLQwenImage:
    """Train nano's VAE, freeze its encoder: `vae.safetensors`, `config.json`, `ENCODER_FROZEN` in `out`.

    `minutes` count the time of one core, summed over resumed runs, so a busy machine trains longer but not less; on a
    GPU they are minutes. A finished folder is returned as it is. Where the slice ended first, nothing is frozen yet.
    """
    if resume and (out / FROZEN).exists():
        return load_vae(out)
    recipe = recipe or VAERecipe()
    trainer = _train_together(out, minutes, recipe, resume, log)
    if trainer.agreed < 60 * minutes:
        return trainer.vae.cpu()
    mean, std = latent_statistics(trainer.vae, recipe.measured)
    vae = trainer.vae.cpu()
    vae.config = replace(vae.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    save_vae(vae, out / WEIGHTS)
    save_config(vae.config, out / CONFIG)
    frozen = f"trained {trainer.seconds:.0f} s; the transformer's latents depend on this encoder\n"
    replace_file(out / FROZEN, lambda part: part.write_text(frozen, encoding="utf-8"))
    return vae


def _train_together(
    out: Path, minutes: float, recipe: VAERecipe, resume: bool, log: Callable[[str], None]
) -> VAETrainer:
    """Run the first stage here and in `processes` - 1 others, which end with this one."""
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        (out / CHECKPOINT).unlink(missing_ok=True)
    if recipe.processes == 1:
        return _train_rank(0, out, minutes, recipe, log)
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as meeting:
        others = [
            context.Process(target=_follow, args=(rank, Path(meeting), out, minutes, recipe), daemon=True)
            for rank in range(1, recipe.processes)
        ]
        for other in others:
            other.start()
        _join(0, Path(meeting), recipe)
        trainer = _train_rank(0, out, minutes, recipe, log)
        dist.destroy_process_group()
        for other in others:
            other.join(60)
    return trainer


def _join(rank: int, meeting: Path, recipe: VAERecipe) -> None:
    store = dist.FileStore(str(meeting / "gloo"), recipe.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=recipe.processes)


def _follow(rank: int, meeting: Path, out: Path, minutes: float, recipe: VAERecipe) -> None:
    _join(rank, meeting, recipe)
    _train_rank(rank, out, minutes, recipe, print)
    dist.destroy_process_group()


def _train_rank(rank: int, out: Path, minutes: float, recipe: VAERecipe, log: Callable[[str], None]) -> VAETrainer:
    torch.set_num_threads(1)
    vae = AutoencoderKLQwenImage(nano_config())
    initialise(vae, recipe.seed)
    if recipe.warm:
        vae.load_state_dict(shipped_vae(Path(recipe.warm)))
    if (out / BEGUN).exists():  # a frozen one that a run goes on with
        vae.load_state_dict(load_file(str(out / BEGUN)))
    trainer = VAETrainer(vae, recipe, minutes, "all", rank)
    if (out / CHECKPOINT).exists():
        trainer.load(out / CHECKPOINT)
    if recipe.processes > 1:
        dist.barrier()  # nobody may save before everybody has loaded
    trainer.run(out / CHECKPOINT, log)
    return trainer


def finetune_decoder(
    out: Path, minutes: float, *, recipe: VAERecipe | None = None, log: Callable[[str], None] = print
) -> AutoencoderKLQwenImage:
    """Sharpen the decoder that `train_vae` left in `out`; `decoder_ft.safetensors` is there when `minutes` are over."""
    recipe, checkpoint = recipe or VAERecipe(lr=1e-3, processes=1, seed=1), out / UNTUNED
    torch.set_num_threads(1)
    trainer = VAETrainer(load_vae(out), recipe, minutes, "decoder")
    if checkpoint.exists():
        trainer.load(checkpoint)
    if trainer.agreed < 60 * minutes:
        trainer.run(checkpoint, log)
    if trainer.agreed >= 60 * minutes:
        save_vae(trainer.vae, out / DECODER)
    return trainer.vae.cpu()
