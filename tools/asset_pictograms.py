"""Named pictograms: Noto Emoji drawings (Apache-2.0) with English and Chinese names from Unicode CLDR (Unicode-3.0).

The first rows come from ``concepts_first.tsv``, chosen by hand; the other drawings follow by category. Left out are
people, flags, skin tones, drawings that carry letters (they would muddle lettering), and drawings unfit for a sign.
"""

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import resvg_py
from PIL import Image

NOTO = "@iconify-json/noto"
CLDR = "cldr-annotations-full/annotations/{}/annotations.json"
FIRST = Path(__file__).with_name("concepts_first.tsv")
SIDE, DRAWN, COLUMNS = 64, 256, 40  # px of a pictogram, px it is drawn at, pictograms in a row of the sheet
CATEGORIES = {
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Activities": "activity",
    "Objects": "object",
    "Travel & Places": "place",
    "Smileys & Emotion": "face",
    "Symbols": "symbol",
}
LETTERED = re.compile(
    r"button|keycap|input|regional|trade-mark|registered|copyright|information|arrow$|dna|atm-sign|water-closet"
    r"|circled-|mobile-phone-off|slot-machine|place-medal|e-mail|calendar|pager|name-badge|curly-loop|black-.*square|hundred-points|japanese-(?!castle|dolls|post)|red-dragon|anger|left-right|up-down|-arrow-|no-one-under"
)
UNFIT = re.compile(
    r"love-hotel|middle-finger|cigarette|no-smoking|bikini|briefs|one-piece|coffin|funeral|headstone|pistol|bomb|kiss"
    r"|face-vomiting|nauseated|pile-of-poo|symbols-on-mouth|map-of-japan|military|drop-of-blood|cockroach|zzz"
)


def choose(packages: Path) -> list[tuple[str, str, str, str]]:
    """(icon, English name, Chinese name, category) of every pictogram, in the order of the rows."""
    categories = json.loads((packages / NOTO / "metadata.json").read_text(encoding="utf-8"))["categories"]
    kind = {icon: CATEGORIES[name] for name, icons in categories.items() if name in CATEGORIES for icon in icons}
    rows = []
    for line in FIRST.read_text(encoding="utf-8").splitlines():
        icon, english, chinese = line.split("\t")
        rows.append((icon, english, chinese, kind[icon]))
    names = _cldr_names(packages)
    icons, used, used_zh = ({row[i] for row in rows} for i in (0, 1, 2))
    for icon, category in kind.items():
        english, chinese = names.get(icon, ("", ""))
        if icon in icons or not english or not chinese or english in used or chinese in used_zh or _left_out(icon):
            continue
        used.add(english)
        used_zh.add(chinese)
        rows.append((icon, english, chinese, category))
    return rows


def draw_sheet(packages: Path, icons: Iterable[str]) -> Image.Image:
    """All pictograms on one transparent sheet of ``COLUMNS`` to the row."""
    table = json.loads((packages / NOTO / "icons.json").read_text(encoding="utf-8"))["icons"]
    tiles = [_draw(table[icon]["body"]) for icon in icons]
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(tiles) // COLUMNS) * SIDE))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % COLUMNS * SIDE, index // COLUMNS * SIDE))
    return sheet


def _draw(body: str) -> Image.Image:
    box = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 128 128"'
    drawn = resvg_py.svg_to_bytes(svg_string=f"<svg {box}>{body}</svg>", width=DRAWN, height=DRAWN)
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    # premultiplied, so that the unseen colour of clear pixels does not bleed into the edge
    return image.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")


def _cldr_names(packages: Path) -> dict[str, tuple[str, str]]:
    chars = json.loads((packages / NOTO / "chars.json").read_text(encoding="utf-8"))
    english, chinese = (_spoken(packages / CLDR.format(language)) for language in ("en", "zh"))
    names: dict[str, tuple[str, str]] = {}
    for code, icon in chars.items():
        char = "".join(chr(int(part, 16)) for part in code.split("-")).replace("\ufe0f", "")
        if icon not in names and char in english and char in chinese:
            names[icon] = (english[char].lower(), chinese[char])
    return names


def _spoken(path: Path) -> dict[str, str]:
    table = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
    return {char.replace("\ufe0f", ""): entry["tts"][0] for char, entry in table.items() if "tts" in entry}


def _left_out(icon: str) -> bool:
    return bool("skin-tone" in icon or LETTERED.search(icon) or UNFIT.search(icon))
