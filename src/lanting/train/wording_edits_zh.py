"""Instructions for edits in Chinese, six phrasings or more for every kind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lanting.train.assets import concepts
from lanting.train.wording_quotes import pick_marks
from lanting.train.wording_zh import ALIGNS, COLOURS, FACES, PLACES, SCENES, TEXTURES, counted_concept, quote_zh

if TYPE_CHECKING:
    from lanting.train.design import Design

EDITS = {
    "rewrite": (
        "把{old}改成{new}",
        "将{old}改为{new}",
        "把{old}换成{new}",
        "{old}改成{new}",
        "不写{old}，写{new}",
        "把文字{old}改成{new}",
        "用{new}替换{old}",
        "把{old}这行改成{new}",
    ),
    "rewrite_all": (
        "把文字改成{new}",
        "文字改为{new}",
        "把字换成{new}",
        "让它写着{new}",
        "把{old}改成{new}",
        "改写成{new}",
        "文字应该是{new}",
    ),
    "ground": (
        "把背景改成{ground}",
        "背景换成{ground}",
        "把背景颜色改为{ground}",
        "背景要{ground}",
        "用{ground}背景",
        "让背景变成{ground}",
        "背景应该是{ground}",
        "换一个{ground}的背景",
        "给它{ground}背景",
    ),
    "letters": (
        "把字改成{colour}色",
        "文字换成{colour}色",
        "把文字颜色改为{colour}色",
        "字要{colour}色的",
        "用{colour}色的字",
        "让文字变成{colour}色",
        "把字体颜色换成{colour}色",
    ),
    "add": (
        "在文字{side}加{it}",
        "在{side}画{it}",
        "{side}加上{it}",
        "在文字{side}放{it}",
        "在{side}添加{it}",
        "给{side}加上{it}",
        "文字{side}要有{it}",
    ),
    "add_line": (
        "加上文字{new}",
        "再写上{new}",
        "添加一行{new}",
        "增加文字{new}",
        "还要写{new}",
        "把{new}也写上",
    ),
    "more": ("改成{it}", "变成{it}", "要{it}", "画{it}", "应该有{it}", "换成{it}"),
    "remove": (
        "去掉{the}",
        "删除{the}",
        "把{the}去掉",
        "移除{the}",
        "不要{the}",
        "把{the}删掉",
        "把{the}拿走",
    ),
    "remove_line": (
        "去掉{gone}",
        "删除文字{gone}",
        "把{gone}删掉",
        "不要{gone}",
        "移除{gone}",
        "把{gone}这些字去掉",
    ),
    "replace": (
        "把{the}换成{new_it}",
        "将{the}改为{new_it}",
        "把{the}改成{new_it}",
        "用{new_it}替换{the}",
        "{the}换成{it}",
        "把{the}变成{it}",
        "不要{the}，要{it}",
    ),
    "move": (
        "把{the}移到文字{side}",
        "把{the}放到{side}",
        "将{the}移到{side}",
        "{the}放在文字{side}",
        "让{the}在文字{side}",
        "把{the}挪到{side}",
    ),
    "move_text": (
        "把文字移到{at}",
        "文字放到{at}",
        "将文字移到{at}",
        "把字放在{at}",
        "让文字在{at}",
        "把字挪到{at}",
    ),
    "face": (
        "把字体改成{face}",
        "字体换成{face}",
        "用{face}写",
        "把文字改为{face}",
        "文字用{face}",
        "换成{face}字体",
        "让字变成{face}",
    ),
    "translate": (
        "把{old}翻译成{tongue}",
        "将文字翻译成{tongue}",
        "把文字译成{tongue}",
        "翻译成{tongue}",
        "把{old}改成{tongue}",
        "用{tongue}写{old}",
        "文字换成{tongue}",
    ),
    "border_on": (
        "加上边框",
        "添加边框",
        "加一个边框",
        "给它加边框",
        "四周画上边框",
        "给{noun}加上边框",
        "要有边框",
    ),
    "border_off": (
        "去掉边框",
        "删除边框",
        "不要边框",
        "把边框去掉",
        "移除边框",
        "把边框删掉",
        "去掉四周的边框",
    ),
    "texture": (
        "把背景改成{texture}",
        "背景换成{texture}",
        "给背景加上{texture}",
        "用{texture}背景",
        "让背景有{texture}",
        "背景要{texture}",
        "背景改为{texture}风格",
    ),
    "texture_off": (
        "去掉背景花纹",
        "背景不要花纹",
        "把花纹去掉",
        "删除背景的花纹",
        "让背景没有花纹",
        "去掉{texture}",
    ),
    "scene": (
        "把它变成{noun_to}",
        "改成{noun_to}",
        "把{noun}改成{noun_to}",
        "做成{noun_to}",
        "换成{noun_to}",
        "将{noun}变为{noun_to}",
        "把它做成{noun_to}",
    ),
    "ground_from": (
        "用{two}的背景色",
        "使用{two}的背景颜色",
        "把{one}的背景换成{two}的背景",
        "背景改成和{two}一样",
        "{one}用{two}的背景",
        "把背景换成{two}的颜色",
        "背景颜色参考{two}",
    ),
    "concept_from": (
        "加上{two}的图标",
        "把{two}的{name}加到{one}",
        "在文字上方加上{two}的图案",
        "把{two}里的{name}放到文字上方",
        "添加{two}中的{name}",
        "把{two}的图标放到{one}上",
        "给{one}加上{two}的{name}",
    ),
    "text_from": (
        "把{two}的文字写到{one}上",
        "用{two}的文字",
        "把文字换成{two}的文字",
        "文字改成{two}上的字",
        "{one}写上{two}的字",
        "把{one}的文字改成和{two}一样",
        "使用{two}里的文字",
    ),
}
SIDES = {"above": ("上方", "上面"), "below": ("下方", "下面"), "left": ("左边", "左侧"), "right": ("右边", "右侧")}
PICTURES = (("图1", "图2"), ("图一", "图二"), ("图片1", "图片2"), ("第一张图", "第二张图"))
KEEP = ("，其他不变", "，其余保持不变")
PLAIN_NAMES = {"paper": "纸纹"}


def instruct_zh(form: str, phrasings: Sequence[str], pair: tuple[Design, Design], rng: random.Random, refs: int) -> str:
    """The Chinese sentence for one form of edit; see `lanting.train.wording_edits.instruct`."""
    before, after = pair
    one, two = rng.choice(PICTURES)
    parts = {**_parts(before, after, rng), **_quotes(form, before, after, rng), "one": one, "two": two}
    text = rng.choice(phrasings).format(**parts)
    if refs > 1 and not form.endswith("_from"):
        text = f"{one}：{text}" if rng.random() < 0.5 else f"在{one}里，{text}"
    if rng.random() < 0.06:
        text += rng.choice(KEEP)
    return text + "。" if rng.random() < 0.12 else text


def _quotes(form: str, before: Design, after: Design, rng: random.Random) -> dict[str, str]:
    old, new = before.lines, after.lines
    if form == "rewrite":
        pairs = [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
        old, new = (pairs[0][0],), (pairs[0][1],)
    if form == "add_line":
        new = tuple(line for line in after.lines if line not in before.lines) or after.lines
    gone = tuple(line for line in before.lines if line not in after.lines) or before.lines
    parts = {"old": old, "new": new, "gone": gone}
    if all(len(lines) == 1 for lines in parts.values()):  # the same marks everywhere in a sentence
        opening, closing = pick_marks([*old, *new, *gone], rng, "zh")
        return {key: opening + lines[0] + closing for key, lines in parts.items()}
    return {key: quote_zh(lines, False, rng, False) if lines else "文字" for key, lines in parts.items()}


def _parts(before: Design, after: Design, rng: random.Random) -> dict[str, str]:
    ground = COLOURS[after.ground] + "色"
    if after.ground2:
        ground = f"从{COLOURS[after.ground]}到{COLOURS[after.ground2]}渐变"
    drawn = concepts()[after.concept].name_zh if after.concept is not None else "图标"
    texture = after.texture if after.texture in TEXTURES else before.texture
    align = {"center": "中间", "left": "左边", "right": "右边"}[after.align]
    chinese = any(ord(c) > 0x2000 for line in after.lines for c in line)
    return {
        "ground": ground,
        "colour": COLOURS[after.letters],
        "it": counted_concept(drawn, after.count, rng),
        "new_it": drawn,
        "name": drawn,
        "the": concepts()[before.concept].name_zh if before.concept is not None else "图标",
        "side": rng.choice(SIDES[after.side]),
        "at": rng.choice(PLACES[after.place]) if before.place != after.place else align,
        "face": face_name(after.face, rng),
        "tongue": "中文" if chinese else rng.choice(("英文", "英语")),
        "texture": PLAIN_NAMES.get(texture) or rng.choice(TEXTURES.get(texture, ("花纹",))),
        "noun": rng.choice(SCENES[before.scene]),
        "noun_to": rng.choice(SCENES[after.scene]),
    }


def face_name(face: str, rng: random.Random) -> str:
    """`宋体`, `等宽字体`: a face as a thing."""
    name = rng.choice(FACES[face])
    return name if name.endswith("体") else name + "字体"


__all__ = ["ALIGNS", "EDITS", "face_name", "instruct_zh"]
