"""Makes the assets of nano's designs again: characters, phrases, pictograms and fonts, from public packages.

    python -m venv /tmp/assets && /tmp/assets/bin/pip install fonttools brotli pillow resvg_py
    /tmp/assets/bin/python tools/make_assets.py

Needs a Debian system with apt-get and dpkg, and npm. Not part of the wheel. Written by hand and only read here:
``dictionary.tsv`` beside the assets, ``concepts_first.tsv`` and ``unfit_zh.txt`` beside this file.
Which package holds what, and under which licence: src/lanting/train/assets/LICENSES.md.
"""

import argparse
import gzip
import shutil
import subprocess
import tempfile
from pathlib import Path

import asset_fonts
import asset_pictograms
import asset_words

DEBIAN = ("fonts-noto-cjk", "fonts-lxgw-wenkai", "fonts-lato", "python3-jieba")
NPM = {
    "@fontsource/merriweather": "5.3.0",
    "@fontsource/comic-neue": "5.3.0",
    "@iconify-json/noto": "1.2.9",
    "cldr-annotations-full": "48.2.0",
}
TRAIN = Path(__file__).parents[1] / "src" / "lanting" / "train"
CHARACTERS = 3500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder of packages already unpacked, one folder per package")
    parser.add_argument("--out", type=Path, default=TRAIN, help="folder with the folders assets and fonts")
    options = parser.parse_args()
    for name in ("assets", "fonts"):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    if options.packages:
        make(options.packages, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        make(Path(folder), options.out)


def fetch(folder: Path) -> None:
    """Download and unpack every package to ``folder / name``."""
    for name in DEBIAN:
        subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
        archive = next(folder.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg", "-x", archive, folder / name], check=True)
    for name, version in NPM.items():
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True, capture_output=True, text=True
        )
        (folder / name).mkdir(parents=True)
        archive = folder / packed.stdout.strip()
        subprocess.run(["tar", "xzf", archive, "-C", folder / name, "--strip-components=1"], check=True)


def make(packages: Path, out: Path) -> None:
    """Write all assets and fonts below ``out``."""
    assets = out / "assets"
    words = asset_words.read_words(packages)
    pictograms = asset_pictograms.choose(packages)
    hanzi = asset_words.most_used(words, asset_fonts.covered(packages), _always(), CHARACTERS)
    (assets / "hanzi.txt").write_text(hanzi + "\n", encoding="utf-8")
    phrases = "\n".join(asset_words.phrases(words, hanzi)) + "\n"
    (assets / "phrases-zh.txt.gz").write_bytes(gzip.compress(phrases.encode(), 9, mtime=0))
    rows = (f"{index} {row[1]}\t{row[2]}\t{row[3]}\n" for index, row in enumerate(pictograms))
    (assets / "concepts.tsv").write_text("".join(rows), encoding="utf-8")
    sheet = asset_pictograms.draw_sheet(packages, [row[0] for row in pictograms])
    sheet.save(assets / "pictograms.webp", lossless=True, quality=80, method=4)
    shutil.copy(packages / "cldr-annotations-full" / "LICENSE", assets / "CLDR-LICENSE.txt")
    shutil.copy(packages / "python3-jieba/usr/share/doc/python3-jieba/copyright", assets / "jieba-LICENSE.txt")
    asset_fonts.write_fonts(packages, out / "fonts", hanzi)


def _always() -> str:
    """Characters of the names we chose by hand: they must be drawable, however rare."""
    written = (asset_pictograms.FIRST, TRAIN / "assets" / "dictionary.tsv")
    lines = (line for path in written for line in path.read_text(encoding="utf-8").splitlines())
    return "".join(line.rsplit("\t", 1)[1] for line in lines)


if __name__ == "__main__":
    main()
