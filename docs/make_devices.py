"""Write docs/devices.md and docs/devices.zh.md from the planner: `python docs/make_devices.py`.

Which devices run the large model, at which precision, in how much memory. A test compares the pages with the planner,
so they say what `lanting plan` says. Rejected: a table by hand, which is wrong with the next change of the code.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = "qwen-image-2512"
OTHER = "qwen-image-2.1"
TABLES = ((MODEL, (1328, 1328)), (MODEL, (768, 768)), (OTHER, (1024, 1024)))
WORDS = {
    "en": {
        "title": "Which devices run this model",
        "switch": "[中文](devices.zh.md)",
        "note": "Written by docs/make_devices.py from the planner; change that, then run it.",
        "lead": (
            "What `lanting plan {model}` answers for devices people have: 50 steps with guidance, as the release "
            "recommends; and `lanting plan {other}`: 40 steps without. `lanting plan MODEL --device 'RTX 4090'` "
            "prints the same for any release, size and number of references, and `lanting plan MODEL` for the computer "
            "in front of you."
        ),
        "at": "{model}, {width}×{height}",
        "head": "| device | RAM | weights | transformer | text encoder | VAE | VRAM | RAM used | one picture |",
        "how": "How to read it",
        "rules": (
            "**Weights.** What the transformer's Linears are held as. The planner takes the best precision that never "
            "waits: `bf16` is what is published; `int8`, `fp8` and `int4` round it. Blocks that don't fit stream from "
            "RAM while others compute. At large pictures that costs no time, because a step computes longer than it "
            "reads.",
            "**VRAM and RAM** are the most that is taken at any moment, the driver's share included. A GB here is 10^9 "
            "bytes, so a card sold as 24 GB has 25.8 of them. A Mac has one memory for both.",
            "**One picture** follows from the makers' figures and one efficiency (45 % of the dense rate, 60 % on "
            "Macs): right within about a factor of 1.5, and good for comparing rows. `?` where no maker states a rate. "
            "No time on a GPU was measured for this table. Lightning releases with 8 steps and no guidance need a "
            "twelfth of it.",
            "**RAM** is what such computers often have, less 3 GB for everything else; a card keeps 0.6 GB for the "
            "desktop. The peaks are compared with measured ones by `benchmarks/plan_grid.py`, on a CPU.",
        ),
        "sources": "Sources of the device figures",
        "source": (
            "Memory, bandwidth and rates (bfloat16, float32 accumulation, without sparsity) are the makers': NVIDIA's "
            "GA102, Ada and RTX Blackwell whitepapers and data sheets, AMD's product page, Apple's press releases. "
            "They stand in [devices.toml](../src/lanting/plan/devices.toml), where a device is four lines."
        ),
        "resident": "resident",
    },
    "zh": {
        "title": "哪些设备能运行这个模型",
        "switch": "[English](devices.md)",
        "note": "由 docs/make_devices.py 根据规划器写成；请修改脚本后重新运行。",
        "lead": (
            "这是 `lanting plan {model}` 对常见设备的回答：50 步，带引导，即该版本的推荐设置；"
            "以及 `lanting plan {other}` 的：40 步，无引导。"
            "`lanting plan MODEL --device 'RTX 4090'` 可以查询任何版本、尺寸和参考图数量；"
            "`lanting plan MODEL` 查询你眼前的这台电脑。"
        ),
        "at": "{model}，{width}×{height}",
        "head": "| 设备 | 内存 | 权重 | transformer | 文本编码器 | VAE | 显存占用 | 内存占用 | 一张图片 |",
        "how": "怎样读这张表",
        "rules": (
            "**权重**：transformer 的线性层以什么精度保存。规划器选择不需要等待的最高精度：`bf16` 是发布时的精度，"
            "`int8`、`fp8`、`int4` 对它取整。放不下的块在别的块计算时从内存流入；图片较大时不花额外时间，"
            "因为一步的计算比读取更久。",
            "**显存与内存占用**是任何时刻的最大值，包括驱动程序占用的部分。这里的 GB 是 10^9 字节，"
            "标称 24 GB 的显卡有 25.8 个。Mac 的两者是同一块内存。",
            "**一张图片**的时间由厂商数据和同一个效率推算（稠密峰值的 45 %，Mac 为 60 %）：误差约在 1.5 倍以内，"
            "适合比较各行。厂商没有给出速率的写作 `?`。这张表的时间没有在 GPU 上实测。"
            "8 步、无引导的 Lightning 版本只需十二分之一。",
            "**内存**是这类电脑常见的容量，减去其他程序的 3 GB；显卡为桌面保留 0.6 GB。"
            "占用的峰值由 `benchmarks/plan_grid.py` 在 CPU 上与实测比较。",
        ),
        "sources": "设备数据的来源",
        "source": (
            "容量、带宽和速率（bfloat16，float32 累加，不计稀疏）均来自厂商：NVIDIA 的 GA102、Ada、RTX Blackwell "
            "白皮书和产品数据表，AMD 的产品页，Apple 的新闻稿。它们写在 "
            "[devices.toml](../src/lanting/plan/devices.toml) 里，一个设备四行。"
        ),
        "resident": "常驻",
    },
}


@cache
def planned(card, name: str, size: tuple[int, int]):
    """Once for both pages."""
    from lanting.plan import machine_of, plan, release, usual_job
    from lanting.specs import get_spec

    model = release(get_spec(name))
    return plan(model, usual_job(model, size), machine_of(card))


def row(card, name: str, size: tuple[int, int]) -> str:
    """One device with one release."""
    from lanting.core.lang import say
    from lanting.plan import RefusalError
    from lanting.plan.words import encoder, residence, seconds
    from lanting.plan.words import size as in_words

    ram = "" if card.apple else f"{card.ram or 32:.0f} GB"
    try:
        chosen = planned(card, name, size)
    except RefusalError as refusal:
        return f"| {card.name} | {ram} | - | {refusal} | | | | | |"
    cells = [
        card.name if card.apple else f"{card.name}, {card.memory:g} GB".replace(" 16 GB, 16 GB", ", 16 GB"),
        ram,
        f"`{chosen.transformer}`",
        residence(chosen),
        f"{chosen.text_encoder}, {encoder(chosen)}",
        say("VAE in tiles") if chosen.vae_tile else "",
        in_words(chosen.peak_vram) if chosen.peak_vram else "",
        in_words(chosen.peak_ram),
        seconds(chosen.image_seconds),
    ]
    return "| " + " | ".join(cells) + " |"


def page(language: str) -> str:
    """The whole page, in "en" or "zh"."""
    from lanting.plan import cards

    words, before = WORDS[language], os.environ.get("LANTING_LANG")
    os.environ["LANTING_LANG"] = language
    try:
        parts = [
            f"# {words['title']}",
            str(words["switch"]),
            f"<!-- {words['note']} -->",
            str(words["lead"]).format(model=MODEL, other=OTHER),
        ]
        for model, (width, height) in TABLES:
            parts.append("## " + str(words["at"]).format(model=model, width=width, height=height))
            lines = [str(words["head"]), "|---" * 9 + "|", *(row(card, model, (width, height)) for card in cards())]
            parts.append("\n".join(lines))
        parts.append(f"## {words['how']}")
        parts += words["rules"]
        parts += [f"## {words['sources']}", str(words["source"])]
    finally:
        if before is None:
            del os.environ["LANTING_LANG"]
        else:
            os.environ["LANTING_LANG"] = before
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    for language, name in (("en", "devices.md"), ("zh", "devices.zh.md")):
        (FOLDER / name).write_text(page(language), encoding="utf-8")
        print(f"wrote {FOLDER / name}")
