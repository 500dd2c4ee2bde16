"""From words and pictures to the states the transformer reads.

A prompt is set into the release's template, run through Qwen2.5-VL, and the states of the constant opening
are dropped. Because attention is causal, cutting a long prompt before the model gives the states that the
reference cuts after it. Rejected: left padding and masks inside the model; rows are right-padded and a mask
is returned only when rows differ in length, so that a single prompt takes the unmasked attention kernel.

Source: Qwen-Image technical report; equal to the encode_prompt functions of diffusers 0.42.
"""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from lanting.core.errors import RequestError
from lanting.nn.qwen_vision import Grid
from lanting.nn.qwen_vl import QwenVL, Sampling
from lanting.text.pictures import PictureConfig, picture_patches
from lanting.text.templates import IMAGE_PAD, fill, load_template, opening, takes_pictures

ENDS = ("<|im_end|>", "<|endoftext|>")
LONGEST = 1024
"""Most tokens a prompt may be allowed; the reference refuses more."""


def check_length(tokens: int) -> None:
    """Raise RequestError for a max_sequence_length that is none."""
    if not 1 <= tokens <= LONGEST:
        raise RequestError(
            "max_sequence_length is {length}; choose between 1 and {longest}", length=tokens, longest=LONGEST
        )


class PromptEncoder:
    """Holds tokenizer, model and templates of one release, by their names for `load_template`.

    `edit_template` is the one for prompts with pictures, where it differs from `template`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: QwenVL,
        template: str,
        pictures: PictureConfig | None = None,
        edit_template: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.template = load_template(template)
        self.edit_template = load_template(edit_template or template)
        self.pictures = pictures or PictureConfig()
        self.pad = tokenizer.token_to_id("<|endoftext|>") or 0

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], images: Sequence[Image.Image] = (), max_sequence_length: int = 512
    ) -> tuple[Tensor, Tensor | None]:
        """Read prompts, each together with all `images` (any size; they are resized to multiples of 28
        pixels).

        Returns prompt_embeds (B, T, D) in the model's dtype, zero behind the end of shorter rows, and their
        mask (B, T) bool, or None when all rows are equally long. Templates without pictures keep at most
        `max_sequence_length` tokens of a prompt, its closing words included; the others keep everything.
        Raises RequestError.
        """
        check_length(max_sequence_length)
        self.refuse(prompts, images)
        patches, grids = self.see(images)
        template = self.edit_template if images else self.template
        drop = len(self.tokens(opening(template)))
        rows = [self.tokens(fill(template, prompt, self.counts(grids))) for prompt in prompts]
        if not takes_pictures(template):
            rows = [row[: drop + max_sequence_length] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        states = self.model(ids.to(self.model.device), patches, grids)[:, drop:]
        mask = torch.arange(longest) < lengths[:, None]
        if bool(mask.all()):
            return states, None
        mask = mask[:, drop:].to(states.device)
        return states.masked_fill(~mask[..., None], 0), mask

    def refuse(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
        """Raise RequestError for what the template can't hold."""
        if images and not takes_pictures(self.edit_template):
            raise RequestError("this model reads words only; leave the picture out or choose an edit model")
        if images and any(IMAGE_PAD in prompt for prompt in prompts):
            raise RequestError("the prompt contains {word}, which stands for a picture; remove it", word=IMAGE_PAD)

    def see(self, images: Sequence[Image.Image]) -> tuple[Tensor | None, list[Grid]]:
        """Patches of all pictures one after another (None without pictures) and their grids."""
        seen = [picture_patches(image, self.pictures) for image in images]
        patches = torch.cat([patches for patches, _ in seen]) if seen else None
        return patches, [grid for _, grid in seen]

    def counts(self, grids: Sequence[Grid]) -> list[int]:
        """Tokens per picture."""
        return [rows * columns // self.pictures.merge_size**2 for rows, columns in grids]

    def caption(self, image: Image.Image, language: str = "en", sampling: Sampling | None = None) -> str:
        """Describe a picture in words, in English ('en') or Chinese ('zh').

        The layered task uses this when it is given no prompt. The wording of the request is ours.
        """
        return self.words_of(list(self.write(f"caption-{language}", "", [image], sampling)))

    def write(
        self,
        template: str,
        prompt: str = "",
        images: Sequence[Image.Image] = (),
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """What the model says to a template filled with a prompt and pictures, token by token as it comes.

        `generator` is on the model's device. The model must have its head.
        """
        patches, grids = self.see(images)
        ids = torch.tensor([self.tokens(fill(load_template(template), prompt, self.counts(grids)))])
        return self.model.generate(ids.to(self.model.device), patches, grids, sampling, generator)

    def words_of(self, tokens: Sequence[int]) -> str:
        """What it has said."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def ends(self) -> tuple[int, ...]:
        """The tokens with which it ends what it says."""
        found = (self.tokenizer.token_to_id(word) for word in ENDS)
        return tuple(token for token in found if token is not None)
