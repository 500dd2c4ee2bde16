"""One slice of nano's training on a rented GPU: look at the machine, train, bring back little files and a report.

    python benchmarks/train_on_gpu.py --out back --minutes 27 --slice-minutes 9
    python benchmarks/train_on_gpu.py --out back2 --minutes 27 --slice-minutes 9 --resume-from back

The second call may run on another machine that has only this repository and the folder `back`: at most eight files of
at most 16 MB. It needs nothing but torch, numpy, pillow, safetensors and tokenizers. `--dry-run` does all of it with
a tiny network on the CPU in less than a minute, to be sure before the clock runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from PIL import Image

from lanting.core.errors import LantingError
from lanting.train import graphs, nano, vae_speed
from lanting.train.journal import NAME as LOG
from lanting.train.journal import entries
from lanting.train.loop import train
from lanting.train.nano_run import CLOSING, NanoRun
from lanting.train.portable import RUN, STATE, VAE, pack
from lanting.train.stopwatch import FILE as PROFILE
from lanting.train.stopwatch import profiled
from lanting.train.vae import CHECKPOINT, FROZEN
from lanting.train.workers import kept_atlas

MOST_FILES, MOST_BYTES = 8, 16 * 2**20
PROFILED = (40, 400)  # steps from which on a profile is taken: while shapes are new, and when most are known


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is brought back")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="folder of the run on this machine")
    parser.add_argument("--resume-from", type=Path, help="what an earlier slice brought back")
    parser.add_argument("--anew", action="store_true", help="with --resume-from: its weights begin a new schedule")
    parser.add_argument("--vae-anew", action="store_true", help="with --resume-from: train its autoencoder on first")
    parser.add_argument("--recode", action="store_true", help="names of pictograms get their codes again first")
    parser.add_argument("--atlas", type=Path, help="atlas.npz made beforehand; otherwise drawn here in seconds")
    parser.add_argument("--minutes", type=float, default=27.0, help="of the transformer, over all slices")
    parser.add_argument("--vae-minutes", type=float, default=3.0)
    parser.add_argument("--slice-minutes", type=float, default=9.0, help="of this call")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--large", action="store_true", help="canvases of 256 x 256 too")
    parser.add_argument("--batch-times", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--concepts", type=int, default=256)
    parser.add_argument("--compile", action="store_true", help="compiled blocks instead of a copy in 16 bits")
    parser.add_argument("--no-graphs", action="store_true", help="run every step's operations one by one")
    parser.add_argument("--profile", action="store_true", help="say where the time of a few steps goes: profile.txt")
    parser.add_argument("--warm", default="", help="model folder whose weights are continued")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="a tiny network on the CPU, all steps")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """What there is to work with, and how fast the GPU copies and multiplies."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "pillow", "safetensors", "tokenizers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpus"] = torch.cuda.device_count()
        found["gpu"], found["gpu_gib"] = properties.name, round(properties.total_memory / 2**30, 1)
        found["bfloat16"] = torch.cuda.is_bf16_supported()
        found |= rates()
    return found


def rates() -> dict[str, float]:
    """Ceilings: bfloat16 products in TFLOP/s and device memory in TB/s, read plus written."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = seconds_on_gpu(lambda: a @ a)
    copy = seconds_on_gpu(lambda: a.clone())
    return {"tflops": round(2 * 8192**3 / product / 1e12), "tb_per_s": round(2 * a.nbytes / copy / 1e12, 2)}


def seconds_on_gpu(work: Any, times: int = 10) -> float:
    for _ in range(3):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times / 1000


class Keeper(threading.Thread):
    """Leaves the latest checkpoint in `out`, of either stage, so that a call that is cut off was not for nothing."""

    def __init__(self, run: NanoRun, out: Path, every: float = 20.0):
        super().__init__(daemon=True)
        self.run_of, self.out, self.every, self.done = run, out, every, threading.Event()

    def run(self) -> None:
        kept, paths = 0.0, (self.run_of.folder / "checkpoint.pt", self.run_of.vae / CHECKPOINT)
        while not self.done.wait(self.every):
            try:
                newest = max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
                if newest > kept and any((self.run_of.vae / name).exists() for name in (FROZEN, CHECKPOINT)):
                    kept = newest
                    pack(self.run_of.folder, self.out, 0)
            except (OSError, RuntimeError, LantingError) as error:
                print(f"not kept: {error}", file=sys.stderr, flush=True)


class Load(threading.Thread):
    """Asks now and then how busy the GPU is."""

    def __init__(self, every: float = 5.0):
        super().__init__(daemon=True)
        self.every, self.seen, self.done = every, [], threading.Event()

    def run(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self.done.wait(self.every):
            try:
                told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
                self.seen.append([int(word) for word in told.split()])
            except (OSError, subprocess.SubprocessError, ValueError):
                return

    def end(self) -> list[list[int]]:
        self.done.set()
        return self.seen


@dataclass
class Speed:
    """What the log says of this slice; rates are designs a second."""

    steps: int = 0
    designs: int = 0
    seconds: float = 0.0
    mean_rate: float = 0.0
    best_rate: float = 0.0
    queue: float = 0.0  # how full, 0..1, mean
    waited: float = 0.0  # share of time, mean
    feeding: float = 0.0
    reuse: float = 0.0
    missed: float = 0.0  # looks at an empty queue a step


def speed(log: list[dict[str, Any]]) -> Speed:
    """Sums up entries of one slice; the first of them still holds warming up and is left out of the rates."""
    figures = [entry for entry in log if "left" in entry]
    if not figures:
        return Speed()
    first, last = figures[0], figures[-1]
    steady = figures[1:] or figures
    means = {key: mean([e[key] for e in steady if key in e]) for key in ("queue", "waited", "feeding", "reuse")}
    steps = last["step"] - first["step"]
    return Speed(
        steps=last["step"],
        designs=last["seen"],
        seconds=last["seconds"],
        mean_rate=mean([e["per_second"] for e in steady]),
        best_rate=max(e["per_second"] for e in steady),
        missed=round(sum(e.get("missed", 0) for e in steady) / max(1, steps), 3),
        **means,
    )


def mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 3) if values else 0.0


def the_run(asked: argparse.Namespace) -> NanoRun:
    """What is to be trained."""
    run = NanoRun(
        asked.folder,
        minutes=asked.minutes,
        vae_minutes=asked.vae_minutes,
        slice_minutes=asked.slice_minutes,
        resume_from=str(asked.resume_from or "") if goes_on(asked.resume_from) else "",
        anew=asked.anew,
        vae_anew=asked.vae_anew,
        recode=asked.recode,
        width=asked.width,
        layers=asked.layers,
        large=asked.large,
        batch_times=asked.batch_times,
        lr=asked.lr,
        concepts=asked.concepts,
        compiled=asked.compile or None,
        warm=asked.warm,
        seed=asked.seed,
        device="cpu" if asked.dry_run else "cuda",
        watch_minutes=3.0,
    )
    return rehearsal(run) if asked.dry_run else run


def goes_on(source: Path | None) -> bool:
    """Whether an earlier slice left something to go on from: of a first call there may be an empty folder."""
    return source is not None and any((source / name).is_file() for name in (RUN, VAE, CHECKPOINT))


def rehearsal(run: NanoRun) -> NanoRun:
    """The same run so small that it takes seconds: a stage 1 that is over before it began, two steps of stage 2."""
    from lanting.nn.vae import AutoencoderKLQwenImage
    from lanting.train import vae

    nano.seed_embeddings = lambda *_: 0  # half a minute of encoding characters
    if not run.resume_from and not (run.vae / vae.FROZEN).exists():
        run.vae.mkdir(parents=True, exist_ok=True)
        net = AutoencoderKLQwenImage(vae.nano_config())
        vae.initialise(net, 0)
        vae.save_vae(net, run.vae / vae.WEIGHTS)
        vae.save_config(net.config, run.vae / vae.CONFIG)
        (run.vae / vae.FROZEN).write_text("not trained\n")
    shape = {"width": 64, "layers": 1, "concepts": 32} if layers_of(run.resume_from) == 1 else {}
    small = replace(run, **shape, capacity=12, feeders=1, workers=1, vae_minutes=min(run.vae_minutes, 0.05))
    return replace(small, minutes=max(run.minutes, 0.0) / 1000, slice_minutes=1.0)


def layers_of(source: str) -> int:
    """Layers of what is brought; those of a rehearsal where there is nothing."""
    if not source or not (Path(source) / RUN).is_file():
        return 1
    return json.loads((Path(source) / RUN).read_text())["config"]["transformer"]["num_layers"]


def prepare(asked: argparse.Namespace) -> None:
    """Put the atlas where the run looks for it."""
    vae = asked.folder / "vae"
    vae.mkdir(parents=True, exist_ok=True)
    for place in (asked.folder / "atlas.npz", vae / "atlas.npz"):
        if asked.atlas and not place.exists():
            shutil.copyfile(asked.atlas, place)
    kept_atlas(asked.folder / "atlas.npz")
    if not (vae / "atlas.npz").exists():
        shutil.copyfile(asked.folder / "atlas.npz", vae / "atlas.npz")


def bring_back(run: NanoRun, out: Path, report: dict[str, Any]) -> list[Path]:
    """Everything worth keeping, in `out`; raises SystemExit where it is more than a rented machine gives back."""
    out.mkdir(parents=True, exist_ok=True)
    if run.portable.is_dir():
        shutil.copytree(run.portable, out, dirs_exist_ok=True)
        if not (run.portable / CHECKPOINT).is_file():  # kept while stage 1 was on
            (out / CHECKPOINT).unlink(missing_ok=True)
    sheets = latest_sheets(run.folder / "sheets")
    if sheets:
        one_sheet(sheets).save(out / "sheet.png", optimize=True)
    told = out / PROFILE
    if told.is_file() and len(list(out.rglob("*.*"))) >= MOST_FILES:
        report["profile"] = told.read_text(encoding="utf-8").splitlines()
        told.unlink()
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    if len(files) > MOST_FILES:  # the average of the weights is enough to go on from
        shutil.rmtree(out / STATE, ignore_errors=True)
        files = [path for path in files if path.is_file()]
    if len(files) > MOST_FILES or any(path.stat().st_size > MOST_BYTES for path in files):
        raise SystemExit(f"{out} holds {len(files)} files, or one above 16 MB: begin with an empty --out")
    return files


def latest_sheets(folder: Path) -> list[Path]:
    """The last sheet of every set."""
    names = {path.name.rpartition("-")[0] for path in folder.glob("*.png")}
    return [max(folder.glob(f"{name}-*.png")) for name in sorted(names)]


def one_sheet(paths: list[Path]) -> Image.Image:
    """Sheets below one another."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def main() -> None:
    began, asked = time.monotonic(), arguments()
    found = machine()
    print(json.dumps(found), flush=True)
    if not asked.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --dry-run rehearses without one")
    if find_spec("triton") is None and not asked.dry_run:
        print("no triton here: the blocks run uncompiled", flush=True)
    prepare(asked)
    run = replace(the_run(asked), until=began + 60 * asked.slice_minutes - CLOSING)
    before = len(entries(asked.resume_from / LOG)) if goes_on(asked.resume_from) else len(entries(run.folder / LOG))
    if asked.no_graphs:
        graphs.MOST = 0
    vae_speed.COMPILED = asked.compile
    if asked.profile:
        starts, steps = ((0,), 1) if asked.dry_run else (PROFILED, 10)
        nano.train = profiled(train, asked.out, starts, steps)
    load = Load()
    load.start()
    keeper = Keeper(run, asked.out)
    keeper.start()
    nano.main(run)
    keeper.done.set()
    keeper.join()
    log = entries(run.folder / LOG)[before:]
    scores = [entry for entry in log if any(key.startswith("ink ") for key in entry)][-1:]
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    report = {
        "machine": found,
        "speed": asdict(speed(log)),
        "scores": scores,
        "peak_gib": round(memory, 1),
        "load": load.end(),
        "wall_seconds": round(time.monotonic() - began, 1),
        "last": log[-1:],
    }
    for path in bring_back(run, asked.out, report):
        print(f"{path.stat().st_size:>10,}  {path}")
    print(json.dumps({key: report[key] for key in ("speed", "scores", "peak_gib", "wall_seconds", "last")}))


if __name__ == "__main__":
    main()
