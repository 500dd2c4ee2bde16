"""What `--tries` gains: held-out texts drawn by nano until PP-OCR reads all of their lines, by one seed and by several.

    python benchmarks/tries.py --out tries.json [-n 100] [--tries 4] [--sets lines words]

A picture counts when every quoted text is read in it, case and spaces aside; the same pictures are counted after one
seed, two, and so on. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lanting import Engine, Request
from lanting.core.quotes import quoted
from lanting.evals.scores import wilson
from lanting.evals.sets import text_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--tries", type=int, default=4)
    parser.add_argument("--sets", nargs="*", default=["posters", "faces"])
    own = parser.parse_args()
    found = {}
    with Engine.open("nano") as engine:
        for name in own.sets:
            right = [0] * own.tries
            cases = [case for case in text_cases(name, "en", own.n, seed=1) if quoted(case.prompt)]
            for number, case in enumerate(cases):
                request = Request(case.prompt, size=case.design.size, seed=1000 * number, tries=own.tries)
                (reading,) = engine.run(request).readings
                for tries in range(own.tries):
                    right[tries] += not reading.missing and reading.tries <= tries + 1
            rows = [(count / len(cases), *wilson(count, len(cases))) for count in right]
            found[name] = {"n": len(cases), "right after tries": [[round(x, 4) for x in row] for row in rows]}
            print(name, found[name], flush=True)
    told = {"machine": f"torch {torch.__version__}", "tries": own.tries, **found}
    own.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
