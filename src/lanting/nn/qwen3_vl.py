"""Qwen3-VL: the reader of Qwen-Image-2.1. It turns prompts, with or without pictures, into states.

It only reads: neither 2.1's tasks nor this project let it write, so there is no `lm_head` here, whose 1.2 GB loaders
leave on disk. Source: Qwen3-VL technical report; equal to transformers' Qwen3VLForConditionalGeneration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lanting.nn.qwen3_language import Qwen3LanguageConfig, Qwen3LanguageModel
from lanting.nn.qwen3_vision import Qwen3Vision, Qwen3VisionConfig
from lanting.nn.qwen_vision import Grid
from lanting.nn.qwen_vl import official_name, picture_positions

__all__ = ["Qwen3VL", "Qwen3VLConfig", "official_name"]  # names are shortened as Qwen2.5-VL's are


@dataclass(frozen=True, slots=True)
class Qwen3VLConfig:
    text: Qwen3LanguageConfig = field(default_factory=Qwen3LanguageConfig)
    vision: Qwen3VisionConfig = field(default_factory=Qwen3VisionConfig)
    image_token_id: int = 151655
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> "Qwen3VLConfig":
        """Read config.json of a Qwen3VLForConditionalGeneration. Raises ValueError when the tower's output doesn't
        fit the language model, and what its parts raise.
        """
        text = json.get("text_config") or {}
        config = cls(
            Qwen3LanguageConfig.from_dict(text),
            Qwen3VisionConfig.from_dict(json.get("vision_config") or {}),
            json.get("image_token_id", 151655),
            bool(json.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )
        if config.vision.out_hidden_size != config.text.hidden_size:
            raise ValueError(
                f"vision_config.out_hidden_size {config.vision.out_hidden_size} differs from hidden_size"
                f" {config.text.hidden_size}"
            )
        return config


class Qwen3VL(nn.Module):
    """Vision tower `visual` and language model `model`.

    `vision=False` leaves the tower out: reading a prompt without pictures doesn't need it, and it weighs 1.15 GB
    in bf16.
    """

    def __init__(self, config: Qwen3VLConfig, vision: bool = True) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3LanguageModel(config.text)
        if vision:
            self.visual = Qwen3Vision(config.vision)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device  # an embedding may be packed

    def forward(self, ids: Tensor, patches: Tensor | None = None, grids: Sequence[Grid] = ()) -> Tensor:
        """Read ids (B, T), right-padded; every row sees the same pictures, given as `patches` and `grids`.

        Returns the states before the final norm (B, T, D). Raises ValueError when image tokens and pictures differ.
        """
        embeds = self.model.embed_tokens(ids)
        if patches is None:
            return self.model(embeds)
        merge, token = self.config.vision.spatial_merge_size, self.config.image_token_id
        cells = [(rows // merge, columns // merge) for rows, columns in grids]
        positions = torch.stack([picture_positions(row, token, cells) for row in ids.tolist()], 1)
        seen, deep = self.visual(patches.to(ids.device), grids)  # each (cells, D)
        place = (ids == token).unsqueeze(-1)

        def put(features: Tensor, into: Tensor) -> Tensor:
            return into.masked_scatter(place, features.to(into.dtype).repeat(len(ids), 1))

        empty = torch.zeros_like(embeds)
        return self.model(put(seen, embeds), positions.to(ids.device), [put(each, empty) for each in deep])
