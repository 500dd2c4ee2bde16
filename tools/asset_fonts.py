"""Subsets of public fonts for the pictures that nano is trained on.

Every subset loses its hinting and layout tables and gets a neutral name: several of the sources reserve their own name
for unchanged files (SIL Open Font License 1.1, section 3). The copyright and licence entries of the name table stay.
"""

from dataclasses import dataclass
from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTCollection, TTFont

CHINESE_MARKS = "，。！？、：；（）《》“”「」￥"
ASCII = "".join(chr(code) for code in range(32, 127))
KEPT_NAMES = (0, 13, 14)  # copyright, licence, licence address


@dataclass(frozen=True)
class Source:
    """Where a subset comes from: a file below the folder of unpacked packages, and its face in a collection."""

    target: str
    origin: str
    path: str
    script: str  # "latin" or "chinese"
    face: str | None = None
    reserved: str = ""  # names the licence reserves and the font's own copyright line does not mention


NOTO = "fonts-noto-cjk/usr/share/fonts/opentype/noto"
WENKAI = "fonts-lxgw-wenkai/usr/share/fonts/truetype/lxgw-wenkai"
LICENSE_TEXT = "@fontsource/comic-neue/LICENSE"  # its text below the copyright line is the licence as published
SOURCES = (
    Source("Heiti-Bold.otf", "Noto Sans CJK", f"{NOTO}/NotoSansCJK-Bold.ttc", "chinese", "NotoSansCJKsc-Bold"),
    Source("Songti-Bold.otf", "Noto Serif CJK", f"{NOTO}/NotoSerifCJK-Bold.ttc", "chinese", "NotoSerifCJKsc-Bold"),
    Source("Kaiti-Bold.ttf", "LXGW WenKai", f"{WENKAI}/LXGWWenKai-Bold.ttf", "chinese", None, '"霞鹜" and "LXGW"'),
    Source("Sans-Bold.ttf", "Lato Heavy", "fonts-lato/usr/share/fonts/truetype/lato/Lato-Heavy.ttf", "latin"),
    Source(
        "Serif-Bold.ttf",
        "Merriweather Bold",
        "@fontsource/merriweather/files/merriweather-latin-700-normal.woff2",
        "latin",
    ),
    Source(
        "Hand-Bold.ttf",
        "Comic Neue Bold",
        "@fontsource/comic-neue/files/comic-neue-latin-700-normal.woff2",
        "latin",
    ),
)


def covered(packages: Path) -> set[int]:
    """The code points that all the Chinese sources draw."""
    sets = [set(_open(packages, source).getBestCmap()) for source in SOURCES if source.script == "chinese"]
    return set.intersection(*sets)


def write_fonts(packages: Path, folder: Path, hanzi: str) -> None:
    """Write every subset of ``SOURCES`` and its licence; the Chinese ones hold ``hanzi`` and the Chinese marks."""
    licence = (packages / LICENSE_TEXT).read_text(encoding="utf-8").split("\n", 1)[1]
    for source in SOURCES:
        text = hanzi + CHINESE_MARKS if source.script == "chinese" else ASCII
        font = _subset(_open(packages, source), text)
        _rename(font, "Lanting " + source.target.split("-")[0])
        font.save(folder / source.target)
        stem = source.target.split(".")[0]
        (folder / f"{stem}-LICENSE.txt").write_text(_notice(font, source) + licence, encoding="utf-8")


def _notice(font: TTFont, source: Source) -> str:
    held = " ".join((font["name"].getDebugName(0) or "").split())
    if source.reserved:
        held += f" with Reserved Font Names {source.reserved}"
    return f"{source.target} is a subset of {source.origin}, renamed.\n\n{held}\n"


def _open(packages: Path, source: Source) -> TTFont:
    path = packages / source.path
    if source.face is None:
        return TTFont(path)
    faces = TTCollection(path).fonts
    return next(font for font in faces if font["name"].getDebugName(6) == source.face)


def _subset(font: TTFont, text: str) -> TTFont:
    options = Options()
    options.hinting = False
    options.layout_features = []
    options.notdef_outline = True
    options.name_IDs = [*KEPT_NAMES, 1, 2, 4, 6]
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "BASE", "VORG", "vhea", "vmtx", "kern", "DSIG"]
    subsetter = Subsetter(options)
    subsetter.populate(text=text)
    subsetter.subset(font)
    font.flavor = None
    return font


def _rename(font: TTFont, name: str) -> None:
    table = font["name"]
    table.names = [record for record in table.names if record.nameID in KEPT_NAMES]
    for number, value in ((1, name), (2, "Bold"), (4, f"{name} Bold"), (6, name.replace(" ", "") + "-Bold")):
        table.setName(value, number, 3, 1, 0x409)
    if "CFF " in font:
        cff = font["CFF "].cff
        cff.fontNames = [name.replace(" ", "") + "-Bold"]
        top = cff.topDictIndex[0]
        top.FullName, top.FamilyName = f"{name} Bold", name
