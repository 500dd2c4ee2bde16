"""From words and pictures to the states that Qwen-Image-2.1 reads.

A prompt is set into the release's template and run through Qwen3-VL; the states of the system message are dropped.
The transformer puts a picture's latents where the reader saw the picture, so the states there are cut out, and
`places` tells where they were. Rows are right-padded (`text.encoder` says why); the reference pads on the left, which
moves all positions of a row by the same step and leaves its states as they are. Prompts are read whole.

Source: equal to the encode_prompt function of diffusers' QwenImage21Pipeline.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from lanting.core.errors import RequestError
from lanting.nn.qwen3_vl import Qwen3VL
from lanting.nn.qwen_vision import Grid
from lanting.text.encoder import PromptEncoder, check_length
from lanting.text.pictures import PictureConfig
from lanting.text.templates import IMAGE_PAD, fill, opening

PICTURES = PictureConfig(1 << 16, 1 << 24, patch_size=16, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
"""How Qwen3-VL's pictures are cut: kept as they are where their sides are multiples of 32 and their area is between
256 x 256 and 4096 x 4096 pixels; smaller ones are enlarged for the reader alone."""

END = "<|im_end|>\n"


class PromptEncoder21(PromptEncoder):
    """A `PromptEncoder` whose states leave out pictures, and tell where they were. It describes none."""

    model: Qwen3VL  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: Qwen3VL,
        template: str = "text-to-image-2.1",
        pictures: PictureConfig | None = None,
        edit_template: str = "edit-2.1",
    ) -> None:
        super().__init__(tokenizer, cast("Any", model), template, pictures or PICTURES, edit_template)

    @torch.no_grad()
    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, prompts: Sequence[str], images: Sequence[Image.Image] = (), max_sequence_length: int = 512
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """Read prompts, each together with all `images`, whose sides are multiples of 32 pixels (others are resized);
        transparent parts are read as white.

        Returns prompt_embeds (B, T, D) in the model's dtype, without pictures and zero behind the end of shorter
        rows; their mask (B, T) bool, or None when all rows are equally long; and for each picture how many of the T
        tokens stand before it, in every row. `max_sequence_length` is checked, but no prompt is cut. Raises
        RequestError.
        """
        check_length(max_sequence_length)
        self.refuse(prompts, images)
        patches, grids = self.see(images)
        rows = [self.tokens(self.text(prompt, grids)) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([row + [self.pad] * (int(lengths.max()) - len(row)) for row in rows])
        states = self.model(ids.to(self.model.device), patches, grids)
        drop = len(self.tokens(self.template.partition(END)[0] + END))
        words, places = self.places(rows[0], drop)
        keep = torch.cat([words, torch.arange(len(rows[0]), ids.shape[1])])
        states = states.index_select(1, keep.to(states.device))  # (B, T, D)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None])[:, keep]
        if bool(mask.all()):
            return states, None, places
        mask = mask.to(states.device)
        return states.masked_fill(~mask[..., None], 0), mask, places

    def refuse(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
        """Raise RequestError for what the template can't hold."""
        super().refuse(prompts, images)
        if any(IMAGE_PAD in prompt for prompt in prompts):  # a slot for a picture, even if there is none
            raise RequestError("the prompt contains {word}, which stands for a picture; remove it", word=IMAGE_PAD)

    def text(self, prompt: str, grids: Sequence[Grid]) -> str:
        """The whole text for a prompt (a space for an empty one) and pictures of these grids."""
        template = self.edit_template if grids else self.template
        before = opening(template)
        rest = fill(template.removeprefix(before), prompt or " ", self.counts(grids))
        return before + (rest[1:] if grids else rest)  # the space before a picture parts it from the one before

    def places(self, row: Sequence[int], drop: int) -> tuple[Tensor, tuple[int, ...]]:
        """Where the words of a row stand that are kept, (T,), and how many of them before each picture."""
        slot = self.model.config.image_token_id
        words = [place for place in range(drop, len(row)) if row[place] != slot]
        starts = [place for place in range(1, len(row)) if row[place] == slot != row[place - 1]]
        return torch.tensor(words), tuple(sum(word < start for word in words) for start in starts)
