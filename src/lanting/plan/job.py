"""What is to be drawn, as far as it costs memory and time."""

from __future__ import annotations

from dataclasses import dataclass

TOKEN = 16  # pixels per side of a token
CELL, CELL21 = 28, 32  # pixels per side of what the text encoder makes one token of: Qwen2.5-VL, Qwen3-VL
ASKED = 250  # tokens of the longest template that asks for a rewritten prompt
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be drawn, as far as it costs memory and time.

    size        of a picture, pixels
    references  sizes at which the VAE sees input pictures that stay beside the target (edits, layers)
    seen        sizes at which the text encoder sees pictures
    encoded     sizes of all pictures that the VAE encodes, references included
    batch       pictures drawn together; frames: pictures per picture of the batch (layers)
    prompts     different prompts; text: tokens of the longest, its closing words included; opening: of the template
    guided      two predictions per step; joined: both at once
    cell        pixels per side of a token of the text encoder's
    cut         the transformer sees no such tokens: references stand in their places (Qwen-Image-2.1)
    writes      prompts are rewritten by the text encoder before it reads them
    kept        what does not change from step to step is computed once, where the transformer can do so
    """

    size: Size = (1024, 1024)
    references: tuple[Size, ...] = ()
    seen: tuple[Size, ...] = ()
    encoded: tuple[Size, ...] = ()
    batch: int = 1
    frames: int = 1
    prompts: int = 1
    text: int = 517
    opening: int = 34
    steps: int = 50
    guided: bool = True
    joined: bool = False
    cell: int = CELL
    cut: bool = False
    kept: bool = True
    writes: bool = False

    @property
    def target_tokens(self) -> int:
        return self.frames * tokens(self.size)

    @property
    def picture_tokens(self) -> int:
        """Target and references."""
        return self.target_tokens + sum(tokens(size) for size in self.references)

    @property
    def text_tokens(self) -> int:
        """What the transformer sees: prompt and pictures."""
        return self.text if self.cut else self.text + self.seen_tokens

    @property
    def seen_tokens(self) -> int:
        """Pictures, among the text encoder's tokens."""
        return sum(cells(size, self.cell) for size in self.seen)

    @property
    def read_tokens(self) -> int:
        """What the text encoder reads: template, prompt and pictures."""
        return self.opening + self.text + self.seen_tokens

    @property
    def written_tokens(self) -> int:
        """Of the longest prompt that is rewritten: what is asked of the text encoder, and its answer; one at a time."""
        return ASKED + 2 * self.text + self.seen_tokens if self.writes else 0

    @property
    def prefix_tokens(self) -> int:
        """What stands before the target where all is one stream: prompt and references."""
        return self.text_tokens + self.picture_tokens - self.target_tokens

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1


def tokens(size: Size) -> int:
    """Of the transformer, for a picture."""
    return (size[0] // TOKEN) * (size[1] // TOKEN)


def cells(size: Size, side: int = CELL) -> int:
    """Tokens a picture takes among the text encoder's, one for `side` x `side` pixels; a patch has half that side."""
    return max(round(size[0] / side), 1) * max(round(size[1] / side), 1)
