"""Pictures of designs: equal to a plain renderer's, the same in any batch, and what an atlas keeps."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lanting.core.errors import RequestError
from lanting.train import atlas as atlases
from lanting.train.assets import concepts
from lanting.train.atlas import LATIN, Atlas, alphabet, character_label, default_atlas
from lanting.train.backdrop import pattern, patterns
from lanting.train.design import COLORS, FACES, SCENES, SQUARE, STRIP, TEXTURES, UNIT, WIDE, Design, place
from lanting.train.designs import DesignMaker, Mix
from lanting.train.draw import plan, render
from lanting.train.strips import Strips, _mix_numpy, _mix_torch, strips_of
from plain_draw import worst_difference

SIZES = (STRIP, WIDE, SQUARE, (128, 128))


def some(count: int, size: tuple[int, int], seed: int = 3) -> list[Design]:
    maker, rng = DesignMaker(seed, mix=Mix(concepts=len(concepts()), pictogram=0.4, open=0.7)), random.Random(seed)
    return [maker.sample(rng, size).design for _ in range(count)]


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_those_of_a_plain_renderer(size: tuple[int, int]) -> None:
    designs = some(48, size)
    pictures = render(designs)
    assert pictures.shape == (48, size[1], size[0], 3) and pictures.dtype == torch.uint8
    assert worst_difference(pictures, designs) <= 1


def test_every_scene_and_texture_is_that_of_a_plain_renderer() -> None:
    base = Design(WIDE, ("Open", "咖啡"), "yellow", "black", ground2="pink")
    designs = [
        replace(
            base, scene=scene, texture=texture, border=seed % 3 == 0, ornament=seed, ground2=(None, "pink")[seed % 2]
        )
        for seed, (scene, texture) in enumerate((s, t) for s in SCENES for t in TEXTURES)
    ]
    designs += [replace(d, ground="black", letters="white", ground2=None) for d in designs[::3]]
    designs += [replace(d, ground="blue", letters="white", ground2="black") for d in designs[1::3]]
    assert worst_difference(render(designs), designs) <= 1


def test_a_picture_does_not_depend_on_its_batch() -> None:
    designs = some(40, WIDE, seed=5)
    together = render(designs)
    alone = torch.cat([render([design]) for design in designs])
    turned = render(designs[::-1]).flip(0)
    assert torch.equal(together, alone) and torch.equal(together, turned)
    assert torch.equal(together, render(designs, placements=[place(design) for design in designs]))


@pytest.mark.parametrize(
    ("kind", "low", "high", "whole"), [("uint8", 0, 255, 255), ("uint8", 0, 255, 20), ("int16", -30, 290, 255)]
)
def test_both_ways_to_blend_are_one(kind: str, low: int, high: int, whole: int) -> None:
    dtype = getattr(torch, kind)
    generator = torch.Generator().manual_seed(0)
    under = torch.randint(low, high + 1, (500, 24), generator=generator).to(dtype)
    ink = torch.randint(0, 256, (500, 24), generator=generator, dtype=torch.uint8)
    cover = torch.randint(0, whole + 1, (500, 24), generator=generator, dtype=torch.uint8)
    mixed = _mix_numpy(under, ink, cover, whole)
    assert mixed.dtype == dtype and torch.equal(mixed, _mix_torch(under, ink, cover, whole))
    exact = under.double() + (ink.double() - under.double()) * cover.double() / whole
    assert (mixed.double() - exact).abs().max() <= 0.5


def test_textures_repeat_with_the_tokens() -> None:
    table = patterns(torch.device("cpu")).view(len(TEXTURES), 64, 16, 16)
    for number, texture in enumerate(TEXTURES[1:], 1):
        for seed in range(64):
            whole = pattern(texture, seed, (256, 256))
            assert torch.equal(whole, table[number, seed].repeat(16, 16)), (texture, seed)


def test_colours_are_exact_and_text_stays_in_its_cells() -> None:
    design = Design(SQUARE, ("Ag 营", "qy"), "orange", "blue", texture="plain")
    picture = render([design])[0].numpy()
    inside = np.zeros(picture.shape[:2], dtype=bool)
    for glyph in place(design).glyphs:
        box = np.s_[UNIT * glyph.y : UNIT * (glyph.y + glyph.height), UNIT * glyph.x : UNIT * (glyph.x + glyph.width)]
        inside[box] = True
        inked = (picture[box] == COLORS["blue"]).all(-1).any()
        assert inked == (glyph.character != " ")
    assert (picture[~inside] == COLORS["orange"]).all()


def test_a_gradient_goes_from_colour_to_colour() -> None:
    picture = render([Design(WIDE, ("A",), "white", "black", ground2="yellow")])[0].numpy()
    assert tuple(picture[0, 0]) == COLORS["white"] and tuple(picture[-1, 0]) == COLORS["yellow"]
    assert (np.diff(picture[:, 0, 2].astype(int)) <= 0).all()


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(RequestError):
        render([Design(WIDE, ("far too long a line",), "red", "white")])
    with pytest.raises(KeyError):
        render([Design(WIDE, ("é",), "red", "white")])


def test_a_plan_is_small() -> None:
    designs = some(16, SQUARE)
    made = plan(designs, [place(design) for design in designs], default_atlas())
    layouts = (made.layout, made.apart)
    placed = [made.stamps, *(p for layout in layouts for p in (layout.frames, layout.marks, layout.glyphs))]
    size = sum(p.where.nbytes for p in placed) + made.colours.nbytes + made.pattern.nbytes + made.depth.nbytes
    assert made.count == 16 and size < 16 * 1000


def drawings(strips: Strips, numbers: list[int]) -> set[bytes]:
    found = set()
    for number in numbers:
        part = slice(int(strips.first[number]), int(strips.first[number] + strips.count[number]))
        places = torch.stack((strips.row[part], strips.column[part]))
        found.add(strips.cover[part].numpy().tobytes() + places.numpy().tobytes())
    return found


def test_every_character_of_a_face_has_a_drawing_of_its_own() -> None:
    atlas = default_atlas()
    for face in FACES:
        small, large = atlas.faces[face, False], atlas.faces[face, True]
        assert set(small) == set(alphabet()) and set(large) == set(LATIN)
        assert len(drawings(atlas.glyphs, list(small.values()))) == len(alphabet()), face
        assert len(drawings(atlas.glyphs, list(large.values()))) == len(LATIN), face
    assert len(atlas.stamps.count) == len(concepts()) and int(atlas.stamps.count.min()) > 50
    assert [character_label(c) for c in (alphabet()[0], alphabet()[-1], "é")] == [1, len(alphabet()), 0]


def test_an_atlas_is_kept_whole(tmp_path: Path) -> None:
    atlas, path = default_atlas(), tmp_path / "atlas.npz"
    atlas.save(path, "one")
    assert path.stat().st_size < 40e6 and list(tmp_path.iterdir()) == [path]
    assert Atlas.load(path, "another") is None
    again = Atlas.load(path, "one")
    assert again is not None and again.names == atlas.names and torch.equal(again.pictograms, atlas.pictograms)
    for mine, theirs in ((again.glyphs, atlas.glyphs), (again.stamps, atlas.stamps)):
        assert all(
            torch.equal(getattr(mine, k), getattr(theirs, k)) for k in ("cover", "row", "column", "first", "count")
        )
    designs = some(4, WIDE)
    assert torch.equal(render(designs, again), render(designs, atlas))


def tiny_atlas() -> Atlas:
    glyphs = strips_of([np.eye(32, 16, dtype=np.uint8)])
    return Atlas.of(glyphs, ("mono 1 A",), torch.full((2, 64, 64, 4), 9, dtype=torch.uint8))


def test_the_atlas_is_drawn_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def build() -> Atlas:
        built.append(1)
        return tiny_atlas()

    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(atlases.Atlas, "build", build)
    fresh = default_atlas.__wrapped__
    first, second = fresh(), fresh()
    assert len(built) == 1 and torch.equal(first.glyphs.cover, second.glyphs.cover)
    monkeypatch.setattr(atlases, "source_key", lambda: "made from something else")
    fresh()
    assert len(built) == 2
    for broken in (b"", b"no archive", (tmp_path / "home" / "atlas.npz").read_bytes()[:300]):
        (tmp_path / "home" / "atlas.npz").write_bytes(broken)
        assert fresh().names == ("mono 1 A",)
    assert len(built) == 5


def test_a_folder_that_cannot_be_written_to_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(atlases.Atlas, "build", tiny_atlas)
    assert default_atlas.__wrapped__().names == ("mono 1 A",)
