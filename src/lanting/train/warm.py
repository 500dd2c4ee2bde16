"""What a run begins from: codes of glyphs and pictograms as embeddings, and the weights of an earlier model.

A character's embedding starts as the principal components of its own latents. Drawing it is then one map for all
characters, and a character met for the first time is already half drawn. The codes are trained on like any weight.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.train.atlas import LATIN, alphabet, default_atlas, hanzi_cell
from lanting.train.model import NanoNet
from lanting.train.names import give_names
from lanting.train.replay import encode_pictures

EVENNESS = 0.5  # 1: all components equally strong, 0: as strong as they are
CODE = 0.75  # of the embedding's channels that a code may use; the reader needs some of its own
STRENGTH = 1.0  # root mean square of a code's row: layers add to it and steps move it, neither may drown it


def principal_codes(rows: Tensor, width: int, spare: bool = False) -> Tensor:
    """Rows (n, features) -> (n, width) of root mean square 1: leading principal components, evened out, turned at
    random within a share `CODE` of the channels' space; `spare`: within the rest of it."""
    centred = rows.double() - rows.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double())[0]
    turn = turn[int(CODE * width) :] if spare else turn[: int(CODE * width)]
    count = min(len(turn), s.numel())
    scores = u[:, :count] * s[:count] ** (1 - EVENNESS)
    codes = (scores @ turn[:count]).float()
    return codes / codes.square().mean().sqrt() * (len(turn) / width if spare else 1.0) ** 0.5


@torch.no_grad()
def glyph_codes(vae: AutoencoderKLQwenImage, width: int) -> tuple[str, Tensor]:
    """(characters, (n, width)) of all Chinese characters and marks."""
    characters = alphabet()[len(LATIN) :]
    cells = np.stack([hanzi_cell("mono", c) for c in characters])  # (n, 32, 32)
    pixels = torch.from_numpy(cells)[..., None].expand(-1, -1, -1, 3)
    return characters, principal_codes(encode_pictures(vae, pixels, 256).flatten(1), width)


@torch.no_grad()
def pictogram_latents(vae: AutoencoderKLQwenImage) -> Tensor:
    """(m, features) of all pictograms on grey."""
    blocks = default_atlas().pictograms.float()  # (m, 64, 64, 4)
    count = blocks.shape[0]
    images = blocks.view(count, 8, 8, 8, 8, 4).transpose(2, 3).reshape(count, 64, 64, 4)
    pixels = torch.lerp(torch.full_like(images[..., :3], 128.0), images[..., :3], images[..., 3:] / 255)
    return encode_pictures(vae, pixels.to(torch.uint8), 64).flatten(1).cpu()


@torch.no_grad()
def seed_names(table: Tensor, tokenizer: Tokenizer, vae: AutoencoderKLQwenImage) -> int:
    """Give the names of all pictograms their codes, in both languages; returns how many rows changed."""
    latents, width = pictogram_latents(vae), table.shape[1]
    english, chinese = principal_codes(latents, width), principal_codes(latents, width, spare=True)
    return give_names(table, tokenizer, english * STRENGTH, chinese * STRENGTH)


@torch.no_grad()
def seed_embeddings(net: NanoNet, tokenizer: Tokenizer, vae: AutoencoderKLQwenImage) -> int:
    """Give characters and names of pictograms their codes; returns how many rows changed."""
    table = net.language.embed_tokens.weight
    characters, codes = glyph_codes(vae, table.shape[1])
    ids = [_only(tokenizer, c) for c in characters]
    given = 0
    for number, code in zip(ids, codes, strict=True):
        if number is not None:
            table[number] = code * STRENGTH
            given += 1
    return given + seed_names(table, tokenizer, vae)


def _only(tokenizer: Tokenizer, text: str) -> int | None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return ids[0] if len(ids) == 1 else None


def shipped(model: Path) -> dict[str, Tensor]:
    """The trained tensors of an exported model folder under the names they have while training."""
    tensors = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    found = {f"transformer.{k}": v for k, v in tensors.items()}
    for name, tensor in load_file(model / "text_encoder" / "model.safetensors").items():
        found["language." + name.removeprefix("model.") if name.startswith("model.") else name] = tensor
    return found


@torch.no_grad()
def continue_from(net: NanoNet, tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Take over every tensor of an earlier nano that still has a place, and embeddings by their token.

    Returns the names that found no place. Tensors of another shape are left as they are.
    """
    theirs = shipped(folder)
    old_table = theirs.pop("language.embed_tokens.weight")
    own, lost = net.state_dict(), []
    for name, tensor in theirs.items():
        if name in own and own[name].shape == tensor.shape:
            own[name].copy_(tensor)
        else:
            lost.append(name)
    _carry_rows(net.language.embed_tokens.weight, tokenizer, old_table.float(), folder)
    return lost


def _carry_rows(table: Tensor, tokenizer: Tokenizer, old: Tensor, folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    before = dict(vocabulary["model"]["vocab"])
    before.update({entry["content"]: entry["id"] for entry in vocabulary["added_tokens"]})
    now = tokenizer.get_vocab(with_added_tokens=True)
    pairs: Sequence[tuple[int, int]] = [(now[token], row) for token, row in before.items() if token in now]
    mine, theirs = torch.tensor(pairs).T
    table[mine] = old[theirs]
