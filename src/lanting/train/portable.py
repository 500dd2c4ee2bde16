"""A run in a few small files, to go on with it on another machine.

Rented GPUs come bare, for minutes, and give back little: files of 16 MB and no more than a handful. `pack` writes the
average weights in bfloat16 first, then, while there is room, the weights as they are, then the optimizers. `unpack`
makes a checkpoint of whatever was brought: without weights the run goes on from the average, without optimizers its
rate warms up again. Of an autoencoder that is still being trained its checkpoint travels as it is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lanting.core.errors import ModelError
from lanting.core.files import replace_file
from lanting.train.brought import HEADS, RUN, VAE, check_stage, check_state, lacking, read_about, read_vae, readable
from lanting.train.journal import NAME as LOG
from lanting.train.kept import read_checkpoint, write_checkpoint, write_tensors
from lanting.train.model import NanoConfig
from lanting.train.vae import BEGUN, CHECKPOINT, CONFIG, DECODER, FROZEN, UNTUNED, WEIGHTS, shipped_vae
from lanting.train.warm import shipped
from lanting.train.widen import widen
from lanting.weights.find import embedded_nano

FILE_LIMIT = 15_900_000  # bytes of tensors in one file: with its header below 16 MB
TOTAL = 56_000_000  # bytes of everything
SHIPPED = ("transformer", "language", "visual")  # what becomes of a run; the rest only helps training
EMA, STATE = "ema", "state"  # folders, and the beginnings of their files' names


def write_parts(folder: Path, stem: str, tensors: Mapping[str, Tensor], limit: int = FILE_LIMIT) -> list[Path]:
    """Tensors in as few files `stem-00001-of-00002.safetensors` as `limit` bytes each allow; older ones go."""
    shares: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shares[-1]:
            shares.append({})
            room = limit
        shares[-1][name] = tensor.detach().cpu().contiguous()
        room -= size
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}-{i:05d}-of-{len(shares):05d}.safetensors" for i in range(1, len(shares) + 1)]
    for path, share in zip(paths, shares, strict=True):
        replace_file(path, lambda part, share=share: write_tensors(part, share, {"format": "pt"}))
    for old in set(folder.glob(f"{stem}-*.safetensors")) - set(paths):
        old.unlink()
    return paths


def read_parts(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of `write_parts`, {} where there are none. Raises ModelError where files are missing."""
    paths = sorted(folder.glob(f"{stem}-*.safetensors"))
    counts = {int(match[1]) for path in paths if (match := re.search(r"-of-(\d+)\.", path.name))}
    if paths and counts != {len(paths)}:
        raise ModelError("{folder} lacks some of the files {stem}-*.safetensors: bring all", folder=folder, stem=stem)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with readable(path):
            tensors |= load_file(str(path))
    return tensors


def pack(folder: Path, out: Path, most: int = TOTAL) -> list[Path]:
    """Write what a run in `folder` needs to go on into `out`; returns the files. Raises ModelError for an empty run."""
    files = pack_stage(folder / "vae", out)
    if (folder / LOG).is_file():
        replace_file(out / LOG, lambda part: shutil.copyfile(folder / LOG, part))
        files.append(out / LOG)
    if not (folder / "checkpoint.pt").is_file():
        return files
    state = read_checkpoint(folder / "checkpoint.pt")
    average = {k: v.bfloat16() for k, v in state["average"].items()}
    carried = {f"net.{k}": v.bfloat16() for k, v in state["net"].items()}
    momenta = {
        f"optimizer.{n}.{i}.{name}": value.float() if name == "step" else value.bfloat16()
        for n, optimizer in enumerate(state["optimizers"])
        for i, values in optimizer["state"].items()
        for name, value in values.items()
    }
    left = most - sum(file.stat().st_size for file in files) - _size(average)
    extra: dict[str, Tensor] = {}
    for tensors in (carried, momenta):
        if _size(tensors) > left:
            break
        extra |= tensors
        left -= _size(tensors)
    files += write_parts(out / EMA, EMA, average)
    files += write_parts(out / STATE, STATE, extra) if extra else []
    about = {"clock": state["clock"], "config": state["config"]}
    replace_file(out / RUN, lambda part: part.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8"))
    return [*files, out / RUN]


def pack_stage(folder: Path, out: Path) -> list[Path]:
    """The autoencoder, finished or not. Raises ModelError where there is none yet."""
    done = (folder / FROZEN).is_file()
    kept = [name for name in ((UNTUNED, DECODER) if done else (CHECKPOINT,)) if (folder / name).is_file()]
    if not done and not kept:
        raise ModelError("{folder} holds no checkpoint yet; run 'lanting train nano' first", folder=folder.parent)
    out.mkdir(parents=True, exist_ok=True)
    for name in kept:
        replace_file(out / name, lambda part, name=name: shutil.copyfile(folder / name, part))
    files = [pack_vae(folder, out / VAE)] if done else []
    files += [out / name for name in kept]
    for old in {out / name for name in (VAE, CHECKPOINT, UNTUNED, DECODER)} - set(files):
        old.unlink(missing_ok=True)
    return files


def slim(source: Path, out: Path) -> list[Path]:
    """What a packed run holds beyond the model that was exported from it: the helper heads, the log, the clock.

    `unpack` takes the rest from the embedded model, so that its weights are kept once. Raises ModelError.
    """
    about = read_about(source)
    heads = {k: v for k, v in read_parts(source / EMA, EMA).items() if k.split(".")[0] not in SHIPPED}
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / HEADS, lambda part: write_tensors(part, heads, {"format": "pt"}))
    if (source / LOG).is_file():
        replace_file(out / LOG, lambda part: shutil.copyfile(source / LOG, part))
    replace_file(out / RUN, lambda part: part.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8"))
    return [out / HEADS, out / RUN]


def unfold_vae(model: Path, folder: Path) -> None:
    """The autoencoder of an exported model folder, where stage 1 leaves its own."""
    folder.mkdir(parents=True, exist_ok=True)
    state = shipped_vae(model)
    replace_file(folder / WEIGHTS, lambda part: write_tensors(part, state))
    replace_file(folder / CONFIG, lambda part: shutil.copyfile(model / "vae" / "config.json", part))
    (folder / FROZEN).write_text("taken from the embedded model\n", encoding="utf-8")


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def pack_vae(folder: Path, path: Path) -> Path:
    """The trained autoencoder as one file: its configuration and what froze it are in the file's header."""
    words = {
        "config": (folder / CONFIG).read_text(encoding="utf-8"),
        "frozen": (folder / FROZEN).read_text(encoding="utf-8"),
    }
    tensors = load_file(str(folder / WEIGHTS))
    replace_file(path, lambda part: write_tensors(part, tensors, words))
    return path


def unpack(
    source: Path,
    folder: Path,
    width: int = 0,
    anew: bool = False,
    vae_anew: bool = False,
    wanted: NanoConfig | None = None,
) -> bool:
    """Put what `pack` wrote where a run looks for it, unless that run has a checkpoint of its own; whether it did so.

    A transformer narrower than `width` is widened; where the autoencoder is not finished, there may be none. `anew`:
    its weights begin a new run, with the clock at zero; `vae_anew`: so do the autoencoder's. Raises ModelError, before
    anything is written, where `source` is no packed run, or not one of the shape that is `wanted`.
    """
    vae = folder / "vae"
    begun = any((source / name).is_file() for name in (VAE, CHECKPOINT)) and not (source / RUN).is_file()
    own = [folder / "checkpoint.pt", *((vae / name for name in (FROZEN, CHECKPOINT)) if begun else ())]
    if any(path.exists() for path in own):
        return False
    state = None if begun else _state(source, width, anew)
    if state is not None:
        check_state(source, state, wanted)
    check_stage(source)
    folder.mkdir(parents=True, exist_ok=True)
    if (source / HEADS).is_file():
        unfold_vae(embedded_nano(), vae)
    unpack_stage(source, vae, vae_anew)
    if (source / LOG).is_file() and not (folder / LOG).exists():
        shutil.copyfile(source / LOG, folder / LOG)
    if state is not None:
        write_checkpoint(folder / "checkpoint.pt", state)
    return True


def _state(source: Path, width: int, anew: bool) -> dict[str, Any]:
    """The checkpoint of stage 2. Raises ModelError."""
    about = read_about(source)
    if (source / HEADS).is_file():
        with readable(source / HEADS):
            trained = load_file(str(source / HEADS)) | shipped(embedded_nano())
    elif not (trained := read_parts(source / EMA, EMA)):
        raise lacking(source, f"{EMA}/{EMA}-*.safetensors")
    average = {k: v.float() for k, v in trained.items()}
    extra = read_parts(source / STATE, STATE)
    carried = {k.removeprefix("net."): v.float() for k, v in extra.items() if k.startswith("net.")}
    state: dict[str, Any] = {
        "net": carried or {k: v.clone() for k, v in average.items()},
        "average": average,
        "optimizers": _optimizers(extra),
        "clock": about["clock"],
        "config": about["config"],
    }
    shape = about["config"]["transformer"]
    old = shape["num_attention_heads"] * shape["attention_head_dim"]
    if old < width:
        state["net"], state["average"] = (widen(state[key], old, width) for key in ("net", "average"))
        state["optimizers"] = []
        shape["num_attention_heads"] = width // shape["attention_head_dim"]
    if anew:
        state |= {"clock": {"step": 0, "seen": about["clock"]["seen"], "seconds": 0.0}, "optimizers": []}
    return state


def _optimizers(extra: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """States as `Optimizer.state_dict` has them, without groups; [] where none came along."""
    found: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, value in extra.items():
        if key.startswith("optimizer."):
            _, number, index, name = key.split(".")
            found.setdefault(int(number), {}).setdefault(int(index), {})[name] = value.float()
    return [{"state": found[number]} for number in sorted(found)]


def unpack_stage(source: Path, folder: Path, anew: bool) -> None:
    """Undo `pack_stage`. `anew`: an autoencoder that is finished is trained on, and the decoder that was sharpened for
    it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    if (source / VAE).is_file():
        unpack_vae(source / VAE, folder)
    for name in (CHECKPOINT, UNTUNED, DECODER):
        if (source / name).is_file():
            replace_file(folder / name, lambda part, name=name: shutil.copyfile(source / name, part))
    if anew and (folder / FROZEN).is_file():
        (folder / FROZEN).unlink()
        (folder / WEIGHTS).rename(folder / BEGUN)
        for name in (UNTUNED, DECODER):
            (folder / name).unlink(missing_ok=True)


def unpack_vae(path: Path, folder: Path) -> None:
    """Undo `pack_vae`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, words = read_vae(path)
    replace_file(folder / WEIGHTS, lambda part: write_tensors(part, tensors))
    for name, key in ((CONFIG, "config"), (FROZEN, "frozen")):
        replace_file(folder / name, lambda part, key=key: part.write_text(words[key], encoding="utf-8"))


__all__ = ["pack", "pack_vae", "read_parts", "slim", "unpack", "unpack_vae", "write_parts"]
