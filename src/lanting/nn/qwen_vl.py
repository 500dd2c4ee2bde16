"""Qwen2.5-VL: the reader of Qwen-Image. It turns prompts, with or without pictures, into states, and can
also write.

Positions of picture tokens are always the three-dimensional ones the weights were trained with. (diffusers
0.42 with transformers 5 leaves them one-dimensional for lack of a type mask; results then differ slightly
from the release.) Rejected: transformers' own class, which takes seconds and hundreds of megabytes to
import.

Source: Qwen2.5-VL technical report; equal to transformers' Qwen2_5_VLForConditionalGeneration.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.qwen_language import LanguageConfig, QwenLanguageModel
from lanting.nn.qwen_vision import Grid, QwenVision, VisionConfig


@dataclass(frozen=True, slots=True)
class QwenVLConfig:
    text: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    image_token_id: int = 151655
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> "QwenVLConfig":
        """Read config.json of a Qwen2_5_VLForConditionalGeneration, written by transformers 4 (text numbers
        at the top level) or 5 (`text_config`). Raises ValueError when the tower's output doesn't fit the
        language model.
        """
        text = json.get("text_config") or json
        tied = json.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        config = cls(
            LanguageConfig.from_dict(text),
            VisionConfig.from_dict(json.get("vision_config") or {}),
            json.get("image_token_id", 151655),
            bool(tied),
        )
        if config.vision.out_hidden_size != config.text.hidden_size:
            raise ValueError(
                f"vision_config.out_hidden_size {config.vision.out_hidden_size} differs from hidden_size"
                f" {config.text.hidden_size}"
            )
        return config


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the likeliest when `temperature` is 0, else drawn from the likeliest
    tokens that together reach `top_p`. `repetition_penalty` above 1 makes tokens already present less
    likely.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[int, ...] = (151645, 151643)


def official_name(name: str) -> str:
    """Map a tensor name as transformers 5 has it in memory to the name on the hub, which is ours; others
    pass.
    """
    for theirs, ours in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def picture_positions(ids: Sequence[int], image_token: int, cells: Sequence[Grid]) -> Tensor:
    """Positions (3, T) on the time, height and width axes of one row of token ids.

    Text advances all three by one. A picture of R x Q merged cells (`cells`, in order) that begins at p
    keeps time at p, counts height from p and width from p, and the text after it goes on at p + max(R, Q).
    Raises ValueError when the row's runs of image tokens aren't these pictures.
    """
    parts, start, left = [], 0, list(cells)
    for is_picture, run in groupby(ids, key=lambda token: token == image_token):
        length = len(list(run))
        if not is_picture:
            parts.append(torch.arange(start, start + length).expand(3, -1))
            start += length
            continue
        if not left or left[0][0] * left[0][1] != length:
            raise ValueError(f"{length} image tokens in a row don't match the pictures {list(cells)}")
        rows, columns = left.pop(0)
        parts.append(start + torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).T)
        start += max(rows, columns)
    if left:
        raise ValueError(f"{len(left)} of {len(cells)} pictures have no place among the tokens")
    return torch.cat(parts, 1)


class QwenVL(nn.Module):
    """Vision tower `visual`, language model `model` and, unless tied to the embedding, `lm_head`.

    `vision=False` and `head=False` leave those parts out: reading a prompt without pictures needs neither,
    and they weigh 1.4 GB and 1.1 GB in bf16.
    """

    def __init__(self, config: QwenVLConfig, vision: bool = True, head: bool = True) -> None:
        super().__init__()
        self.config = config
        self.model = QwenLanguageModel(config.text)
        if vision:
            self.visual = QwenVision(config.vision)
        if head and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device  # an embedding may be packed

    def forward(self, ids: Tensor, patches: Tensor | None = None, grids: Sequence[Grid] = ()) -> Tensor:
        """Read ids (B, T), right-padded; every row sees the same pictures, given as `patches` and `grids`.

        Returns the states after the final norm (B, T, D). Raises ValueError when image tokens and pictures
        differ.
        """
        embeds, positions = self.embed(ids, patches, grids)
        return self.model(embeds, positions)[0]

    def embed(self, ids: Tensor, patches: Tensor | None, grids: Sequence[Grid]) -> tuple[Tensor, Tensor | None]:
        """Token embeddings (B, T, D) with pictures in place of image tokens, and positions (3, B, T) if
        any.
        """
        embeds = self.model.embed_tokens(ids)
        if patches is None:
            return embeds, None
        merge = self.config.vision.spatial_merge_size
        cells = [(rows // merge, columns // merge) for rows, columns in grids]
        token = self.config.image_token_id
        positions = [picture_positions(row, token, cells) for row in ids.tolist()]
        seen = self.visual(patches.to(ids.device), grids).to(embeds.dtype)  # (cells, D)
        place = (ids == token).unsqueeze(-1)
        embeds = embeds.masked_scatter(place, seen.repeat(ids.shape[0], 1))
        return embeds, torch.stack(positions, 1).to(ids.device)

    def logits(self, states: Tensor) -> Tensor:
        """Scores (..., vocabulary) of the next token after states (..., D)."""
        tied = self.config.tie_word_embeddings
        return F.linear(states, self.model.embed_tokens.weight) if tied else self.lm_head(states)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        patches: Tensor | None = None,
        grids: Sequence[Grid] = (),
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """Continue one row of ids (1, T), yielding token ids as they come; stop tokens end it and aren't
        yielded.

        `generator` (on the model's device) makes drawn tokens repeatable; it has no say at temperature 0.
        """
        sampling = sampling or Sampling()
        embeds, positions = self.embed(ids, patches, grids)
        following = int(positions.max()) + 1 if positions is not None else ids.shape[1]
        states, cache = self.model(embeds, positions)
        said = ids
        for _ in range(sampling.max_new_tokens):
            chosen = choose(self.logits(states[:, -1]).float(), said, sampling, generator)  # (1, 1)
            token = int(chosen)
            if token in sampling.stop:
                return
            yield token
            said = torch.cat([said, chosen], 1)
            place = torch.full((3, 1, 1), following, device=ids.device)
            states, cache = self.model(chosen, place, cache)
            following += 1


def choose(logits: Tensor, said: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Pick the next token (1, 1) from logits (1, V); `said` (1, T) are the tokens present so far. Nothing is drawn
    from logits that are not finite, by which a GPU would come to a stop.
    """
    if sampling.repetition_penalty != 1.0:
        old = logits.gather(1, said)
        penalty = sampling.repetition_penalty
        logits = logits.scatter(1, said, torch.where(old < 0, old * penalty, old / penalty))
    if sampling.temperature <= 0.0 or not bool(logits.isfinite().all()):
        return logits.argmax(-1, keepdim=True)
    chances, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    chances = chances.masked_fill(chances.cumsum(-1) - chances >= sampling.top_p, 0.0)  # the first always stays
    return order.gather(1, torch.multinomial(chances, 1, generator=generator))
