"""A model's networks in memory: which device, which dtype, and the networks themselves, built when first needed.

Networks are loaded one by one on first use, so a text-to-image run never reads a vision tower's weights twice and
`Engine.open` answers at once for a wrong name or a damaged header. Where there is a Plan, each is placed by it, and
`reader`, `prepare_transformer` and `rest` say whose turn on the device it is.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lanting.attach.graphs import forget_graphs
from lanting.attach.quant import KINDS, chooser
from lanting.core.errors import RequestError
from lanting.core.rewriting import Written
from lanting.engine.ahead import Ahead
from lanting.engine.allocator import return_memory, tidy
from lanting.engine.choose import choose_device, choose_dtypes
from lanting.engine.compute import record_steps, speed_up, speed_up_vae
from lanting.engine.placement import Placed, empty_cache, place_controlnet, place_encoder, place_transformer
from lanting.flow.latents import LatentCodec, Preview, fit_preview
from lanting.flow.loop import Conditioning
from lanting.flow.schedule import Schedule, model_timestep
from lanting.nn.lora import detach, set_strengths
from lanting.plan import Plan
from lanting.specs.detect import SINGLE_STREAM
from lanting.text.encoder import PromptEncoder
from lanting.text.encoder21 import PromptEncoder21
from lanting.text.pictures import PictureConfig
from lanting.text.templates import load_template, takes_pictures
from lanting.text.tokenizer import load_tokenizer
from lanting.weights.build import (
    ControlNet,
    TextEncoder,
    Transformer,
    build_vae,
    store_controlnet,
    store_text_encoder,
    store_transformer,
)
from lanting.weights.checkpoint import read_json
from lanting.weights.controls import check_controlnet, open_controlnet
from lanting.weights.find import ModelFolder
from lanting.weights.fits import check_fits, with_writing
from lanting.weights.forms import read_forms
from lanting.weights.home import lora_path
from lanting.weights.lora import attach_loras
from lanting.weights.lora_file import Lora, check_strength, find_loras
from lanting.weights.lora_wishes import with_wishes
from lanting.weights.stored import Placing

if TYPE_CHECKING:
    from lanting.engine.parallel import Crew


def release_loras(folder: ModelFolder) -> tuple[Lora, ...]:
    """The LoRA that makes a distilled release what it is; without it, four steps draw mud."""
    path = lora_path(folder.spec.name) if folder.spec.lora else None
    return find_loras(folder, [str(path)]) if path is not None else ()


class Models:
    """Everything `Engine` draws with; each network is a cached property that loads on first use."""

    def __init__(
        self,
        folder: ModelFolder,
        device: str | None,
        dtype: str | None,
        controlnets: Sequence[str] = (),
        loras: Sequence[str] = (),
        quant: str = "auto",
        plan: Plan | None = None,
    ):
        return_memory()
        self.plan = plan
        if plan is not None:
            device, dtype = device or plan.device, dtype or plan.dtype
        check_fits(folder.configs)
        reader = folder.checkpoint("text_encoder")
        folder = replace(folder, spec=with_writing(folder.spec, folder.configs["text_encoder"], reader))
        self.folder, self.release_loras = folder, release_loras(folder)
        # what plain Linears are packed as while they are loaded: one of attach.quant.KINDS, "none" or "auto"
        self.quant = quant
        chooser("transformer", quant)  # raises for a kind we don't know, before anything is read
        self.loras = find_loras(folder, loras)  # what a person asked for, on top of the release's own
        self.spec = with_wishes(folder.spec, self.loras)
        self.checkpoints = {name: folder.checkpoint(name) for name in ("transformer", "vae")} | {"text_encoder": reader}
        self.device = choose_device(device)
        self.dtypes = choose_dtypes(dtype, self.device, self.checkpoints["transformer"].bytes())
        self.dtype = self.dtypes["transformer"]  # also of latents and of what the tasks hand to it
        self.prompts: dict[Any, Conditioning] = {}  # the last ones that were read; `EngineStudio` keeps them
        self.writes = "layered" in self.spec.tasks  # a picture to be layered is described when nobody does
        self.sees = self.writes or takes_pictures(load_template(self.spec.template))
        self.written: dict[Any, Written] = {}  # the last prompts that were rewritten; `engine.rewriting` keeps them
        self.schedule = self._schedule()
        self.ahead = Ahead()
        self.crew: Crew | None = None  # processes on other devices that draw along
        self.controls = [check_controlnet(open_controlnet(net), folder.configs["transformer"]) for net in controlnets]

    @property
    def single_stream(self) -> bool:
        """Qwen-Image-2.1's transformer, which reads words and references as one text."""
        return self.folder.configs["transformer"].get("_class_name") == SINGLE_STREAM

    def _schedule(self) -> Schedule:
        """The folder's scheduler, with what the release and its LoRAs change."""
        own = self.folder.configs["model_index"].get("sample_sigmas") or ()
        config = {**self.folder.configs["scheduler"], "sample_sigmas": tuple(own), **self.spec.schedule}
        return Schedule.from_config(config)

    def kind(self, component: str) -> str:
        """What plain Linears of a component are packed as: what was asked for, else what the plan says, or "none"."""
        if self.quant != "auto" or self.plan is None:
            return "none" if self.quant == "auto" else self.quant
        planned = self.plan.text_encoder if component == "text_encoder" else self.plan.transformer
        packed = component in self.checkpoints and read_forms(self.checkpoints[component])
        return planned if planned in KINDS and not packed else "none"

    def placing(self, component: str) -> Placing:
        """Where a component's weights go, and as what."""
        on_cpu = component == "text_encoder" and self.plan is not None and self.plan.encoder == "cpu"
        device = torch.device("cpu") if on_cpu else self.device
        return Placing(self.dtypes[component], device, chooser(component, self.kind(component)))

    @cached_property
    def placed_transformer(self) -> Placed[Transformer]:
        config = self.folder.configs["transformer"]
        stored = store_transformer(self.checkpoints["transformer"], config, self.placing("transformer"))
        placed = place_transformer(stored, self.plan)
        attach_loras(placed.net, (*self.release_loras, *self.loras), self.dtype, self.device)
        speed_up(placed.net, self.device)
        if placed.streamer is None:
            record_steps(placed.net, placed.table, self.device)
        tidy()
        return placed

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """How strongly each LoRA that was asked for counts from now on; nothing that is loaded is read again."""
        if len(strengths) != len(self.loras):
            raise RequestError(
                "there are {loras} LoRAs and {strengths} strengths: give one for each",
                **{"loras": len(self.loras), "strengths": len(strengths)},
            )
        hung = all(lora.strength or not new for lora, new in zip(self.loras, strengths, strict=True))
        pairs = zip(self.loras, strengths, strict=True)
        self.loras = tuple(replace(lora, strength=check_strength(new)) for lora, new in pairs)
        self.spec = with_wishes(self.folder.spec, self.loras)
        self.schedule = self._schedule()
        if self.crew is not None:
            self.crew.strengths(strengths)
        placed, every = self.__dict__.get("placed_transformer"), (*self.release_loras, *self.loras)
        if placed is None:
            return
        if hung:
            set_strengths(placed.net, [lora.strength for lora in every])
        else:  # one that was left out because it counted for nothing
            detach(placed.net)
            attach_loras(placed.net, every, self.dtype, self.device)
            forget_graphs(placed.net)
        if placed.table is not None:
            placed.table.forget()

    @property
    def transformer(self) -> Transformer:
        return self.placed_transformer.net

    @cached_property
    def codec(self) -> LatentCodec:
        config = self.folder.configs["vae"]
        vae = build_vae(self.checkpoints["vae"], config, self.placing("vae"))
        speed_up_vae(vae, self.device, plenty=self.plan is None or self.plan.encoder == "keep")
        numbers = vae.config
        return LatentCodec(
            vae,
            numbers.latents_mean,
            numbers.latents_std,
            stride=numbers.downscale,
            patch=int(self.folder.configs["transformer"].get("patch_size", 2)),
            pixel_channels=numbers.input_channels,
        )

    @cached_property
    def preview(self) -> Preview:
        return fit_preview(self.codec)

    @cached_property
    def placed_encoder(self) -> Placed[TextEncoder]:
        config, placing = self.folder.configs["text_encoder"], self.placing("text_encoder")
        files = self.checkpoints["text_encoder"]
        stored = store_text_encoder(files, config, placing, vision=self.sees, head=self.writes)
        placed = place_encoder(stored, self.plan)
        speed_up(placed.net, placing.device)
        tidy()
        return placed

    @cached_property
    def encoder(self) -> PromptEncoder:
        tokenizer, spec = load_tokenizer(self.folder.tokenizer), self.spec
        net: Any = self.placed_encoder.net
        if self.single_stream:
            return PromptEncoder21(tokenizer, net, spec.template, self.pictures(), spec.edit_template)
        return PromptEncoder(tokenizer, net, spec.template, self.pictures(), spec.edit_template)

    def see_pictures(self) -> None:
        """Give the encoder its vision tower. A release that can draw from words alone does without it until its
        first edit; the encoder is then read again, and never held twice."""
        if not self.sees:
            self.sees = True
            self._read_again()

    def write_words(self) -> None:
        """Give the encoder its head, which all other work does without, in the same way."""
        if not self.writes:
            self.writes = True
            self._read_again()

    def _read_again(self) -> None:
        self.__dict__.pop("encoder", None)
        self._close("placed_encoder")
        gc.collect()  # as in `close`

    @property
    def take_turns(self) -> bool:
        """Text encoder and transformer are never on the device together."""
        return self.plan is not None and self.plan.encoder == "unload"

    def look_ahead(self) -> None:
        """Have the transformer and the text encoder read; on a GPU the first in the background (`ahead`)."""
        if self.device.type == "cuda" and "placed_transformer" not in self.__dict__:
            self.ahead.begin(lambda: self.placed_transformer)
        else:
            _ = self.transformer
        _ = self.encoder

    def reader(self) -> PromptEncoder:
        """The text encoder, ready to read."""
        if self.take_turns:
            self._unload("placed_transformer")
        encoder = self.encoder
        self.placed_encoder.load()
        return encoder

    def prepare_transformer(self, sigmas: Tensor) -> Transformer:
        """The transformer on its device, ready for the steps of a schedule (steps + 1 noise levels, the last one 0)."""
        self.ahead.meet()
        if self.take_turns:
            self._unload("placed_encoder")
        self.placed_transformer.load()
        for placed in (self.placed_transformer, *self.placed_controlnets.values()):
            if placed.table is not None:
                placed.table.prepare(model_timestep(sigmas[:-1], self.dtype).to(placed.stored.placing.dtype))
                tidy()
        if self.crew is not None:
            self.crew.prepare(sigmas)
        return self.transformer

    def rest(self) -> None:
        """Let go what only passes through memory."""
        self.ahead.end()
        if self.crew is not None:
            self.crew.rest()
        for name in ("placed_transformer", "placed_encoder"):
            if name in self.__dict__:
                self.__dict__[name].rest()
        tidy()

    def close(self) -> None:
        """Let all weights go; they are read again when they are needed."""
        if self.crew is not None:
            self.crew.close()
        for name in ("placed_transformer", "placed_encoder"):
            self._close(name)
        for placed in self.__dict__.pop("placed_controlnets", {}).values():
            placed.close()
        for name in ("codec", "encoder", "preview"):
            self.__dict__.pop(name, None)
        self.prompts.clear()
        self.written.clear()
        gc.collect()  # kernels and recordings hang on modules that they know: only this lets go of both
        empty_cache(self.device)

    def _unload(self, name: str) -> None:
        if name in self.__dict__ and self.plan is not None:
            self.__dict__[name].unload(self.plan.parked)

    def _close(self, name: str) -> None:
        placed = self.__dict__.pop(name, None)
        if placed is not None:
            placed.close()

    def pictures(self) -> PictureConfig | None:
        """How the reader's pictures are cut, where the model folder says so."""
        for name in ("preprocessor_config.json", "processor_config.json"):  # of older writers, and of transformers 5
            if (path := self.folder.path / "processor" / name).is_file():
                return PictureConfig.from_dict(read_json(path))
        return None

    @cached_property
    def placed_controlnets(self) -> dict[Path, Placed[ControlNet]]:
        """By where they are: one that is asked for twice is here once."""
        found: dict[Path, Placed[ControlNet]] = {}
        for file in self.controls:
            if file.path not in found:
                stored = store_controlnet(file.checkpoint, file.config, self.placing("controlnet"))
                found[file.path] = placed = place_controlnet(stored, self.plan)
                speed_up(placed.net, self.device)
        return found

    @property
    def controlnets(self) -> tuple[ControlNet, ...]:
        """In the order in which they were asked for."""
        return tuple(self.placed_controlnets[file.path].net for file in self.controls)

    def placed_by(self, name: str) -> Placed[Any]:
        """A network of the steps: "transformer", "controlnet", "controlnet2", ..."""
        if name == "transformer":
            return self.placed_transformer
        return list(self.placed_controlnets.values())[int(name.removeprefix("controlnet") or 1) - 1]

    @cached_property
    def fingerprint(self) -> str:
        """One hash over all components' weights, for recipes; LoRAs that were asked for are recorded by themselves."""
        parts = [self.checkpoints[name].fingerprint() for name in sorted(self.checkpoints)]
        parts += [lora.sha256 for lora in self.release_loras]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
