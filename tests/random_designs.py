"""Designs at random for the tests of the wording, with whatever may be said of them."""

import random

from lanting.train.design import ALIGNS, COLORS, FACES, PLACES, SCENES, SIDES, TEXTURES, Design, Said

TEXTS = {
    "en": ("OPEN", "Fresh bread", "it's", "50%", "a", "the cat", "SALE!", "9:30"),
    "zh": ("咖啡", "营业中", "好", "小心，地滑", "特价！", "红色", "招牌"),
}


def draw(rng: random.Random, language: str, count: int | None = None) -> tuple[Design, Said]:
    count = rng.choice((0, 1, 1, 2, 3)) if count is None else count
    lines = tuple(rng.sample(TEXTS[language if rng.random() < 0.8 else "en"], count))
    concept = rng.randrange(256) if count == 0 or rng.random() < 0.4 else None
    side, colours = rng.choice(SIDES), rng.sample(list(COLORS), 3)
    design = Design(
        (192, 192),
        lines,
        colours[0],
        colours[1],
        colours[2] if rng.random() < 0.1 else None,
        rng.choice(FACES),
        rng.choice(SCENES),
        rng.choice(ALIGNS),
        rng.choice(PLACES),
        concept,
        rng.choice((1, 2, 3)) if side in ("above", "below") else 1,
        side,
        rng.random() < 0.5,
        rng.choice(TEXTURES),
    )
    said = Said(*(rng.random() < share for share in (0.9, 0.7, 0.5, 0.3, 0.3, 0.4, 0.2)), one_quote=rng.random() < 0.4)
    return design, said
