"""Chinese sentences for a design: a skeleton, and the stated facts in the places that it leaves for them."""

from __future__ import annotations

import random
from string import Formatter
from typing import TYPE_CHECKING

from lanting.train.wording_en import fitting_skeletons, stated
from lanting.train.wording_quotes import pick_marks

if TYPE_CHECKING:
    from lanting.train.design import Design
    from lanting.train.wording_en import Facts

COLOURS = {
    **{"red": "红", "blue": "蓝", "green": "绿", "yellow": "黄", "white": "白", "black": "黑"},
    **{"orange": "橙", "purple": "紫", "pink": "粉", "gray": "灰", "brown": "棕", "cyan": "青"},
}
SCENES = {
    "sign": ("招牌", "招牌", "牌子", "标牌"),
    "poster": ("海报",),
    "label": ("标签",),
    "book": ("书封面", "书籍封面"),
    "slide": ("幻灯片",),
    "button": ("按钮",),
    "shop": ("店铺招牌", "店招", "商店招牌"),
}
CLASSIFIERS = {
    "sign": ("一块", "一块", "一个"),
    "poster": ("一张", "一张", "一幅"),
    "label": ("一张", "一个"),
    "book": ("一个", "一张"),
    "slide": ("一张", "一页"),
    "button": ("一个",),
    "shop": ("一块", "一个"),
}
FACES = {
    "mono": ("等宽",),
    "typewriter": ("打字机",),
    "sans": ("黑体", "粗体"),
    "serif": ("宋体",),
    "handwritten": ("楷体", "手写"),
}
TEXTURES = {
    "dots": ("圆点", "波点"),
    "stripes": ("条纹",),
    "grid": ("方格", "格子"),
    "waves": ("波浪", "波纹"),
    "paper": ("纸纹", "纸质"),
}
TEXTURE_TAILS = ("{}背景", "带{}", "背景有{}")
PLAIN = ("没有花纹", "背景无花纹", "不带花纹")
GRADIENTS = ("{0}到{1}的渐变", "从{0}到{1}渐变", "从{0}色到{1}色渐变", "{0}{1}渐变", "上{0}下{1}渐变")
PLACES = {
    "top": ("上方", "顶部", "最上面"),
    "middle": ("正中", "中间", "中央"),
    "bottom": ("下方", "底部", "最下面"),
}
ALIGNS = {"left": ("靠左", "左对齐", "居左"), "center": ("居中",), "right": ("靠右", "右对齐", "居右")}
AT_TAILS = ("文字{}", "文字{}", "字{}")
BORDERS = (("带边框", "有边框", "加边框", "四周有边框"), ("没有边框", "无边框", "不要边框"))
SIDES = {"above": ("上方", "上面"), "below": ("下方", "下面"), "left": ("左边", "左侧"), "right": ("右边", "右侧")}
CONCEPTS = ("{side}有{it}", "{side}是{it}", "{side}画着{it}", "文字{side}有{it}", "{it}在文字{side}")
SIDELESS = ("配{it}", "有{it}", "画着{it}", "带{it}", "加上{it}")
NUMBERS = ("", "一", "两", "三", "四")
VERBS = ("写着", "写着", "写着", "写有", "印着")
LETTERS = ("字", "字", "文字", "字体")
IS = ("文字是", "文字为", "内容是", "内容为", "字样是", "文字：")
TITLED = {"book": "书名是", "poster": "标题是", "slide": "标题是"}
MAKES = ("画", "生成", "做", "制作", "设计", "请画", "帮我画", "帮我做", "我要", "我想要")
WRITES = ("写", "写上", "写着", "印上")
BESIDE = {"above": "上方", "below": "下方", "left": "左边", "right": "右边"}
JOINTS = ("、", "、", "，", "和", "和", "")
NTH = ("第一行", "第二行", "第三行", "第四行")
EMPTY = ("空白的", "空的")

# Lower-case places may stay empty; upper-case ones need their fact. `{verb}` may hold letters and place.
SKELETONS = (
    "{scene}，{verb}{quote}{tail}",
    "{scene}，上面{verb}{quote}{tail}",
    "{scene}{verb}{quote}{tail}",
    "{scene}上{verb}{quote}{tail}",
    "{scene}上面{verb}{quote}{tail}",
    "{scene}：{quote}{tail}",
    "{scene}，{quote}{tail}",
    "{scene}，{is}{quote}{tail}",
    "{scene}{tail}，{is}{quote}",
    "{scene}{tail}，{verb}{quote}",
    "{scene}{tail}，上面{verb}{quote}",
    "{verb}{quote}的{scene}{tail}",
    "{counted}{verb}{quote}的{bare}{tail}",
    "{make}{counted}{verb}{quote}的{bare}{tail}",
    "{make}{scene}，{verb}{quote}{tail}",
    "{make}{scene}，上面{verb}{quote}{tail}",
    "{make}{scene}，{is}{quote}{tail}",
    "{make}{scene}{tail}，{is}{quote}",
    "在{scene}上{write}{quote}{tail}",
    "{quote}，{scene}{tail}",
    "{quote}写在{scene}上{tail}",
    "把{quote}写在{scene}上{tail}",
    "{scene}上有{quote}几个字{tail}",
    "{scene}的文字是{quote}{tail}",
    "{scene}上有{LETTERS}{quote}{tail}",
    "{scene}上是{LETTERS}{quote}{tail}",
    "{scene}，{LETTERS}{quote}{tail}",
    "{LETTERS}{quote}，{scene}{tail}",
    "{noun}，{GROUND}，{verb}{quote}{tail}",
    "{noun}，{GROUND}，{quote}{tail}",
    "{GROUND}，{quote}，{noun}{tail}",
    "{GROUND}的{noun}，{verb}{quote}{tail}",
    "{GROUND}上{verb}{quote}的{noun}{tail}",
    "{scene}，{quote}{beside}有{CONCEPT}{tail}",
    "{scene}，{quote}{beside}是{CONCEPT}{tail}",
    "{make}{scene}，{verb}{quote}，{quoted}{beside}有{CONCEPT}{tail}",
)
WORDLESS = (
    "{scene}上有{CONCEPT}{tail}",
    "{scene}上画着{CONCEPT}{tail}",
    "{scene}，上面有{CONCEPT}{tail}",
    "{scene}，{CONCEPT}{tail}",
    "{CONCEPT}，{scene}{tail}",
    "{make}{scene}，上面有{CONCEPT}{tail}",
    "{make}{scene}，画上{CONCEPT}{tail}",
    "在{scene}上画{CONCEPT}{tail}",
    "{counted}有{CONCEPT}的{bare}{tail}",
    "{noun}，{GROUND}，{CONCEPT}{tail}",
    "{GROUND}上有{CONCEPT}，{noun}{tail}",
    "{CONCEPT}在{scene}上{tail}",
)

NOTHING = ("{EMPTY}{bare}{tail}",)


def describe_zh(facts: Facts, skeletons: tuple[str, ...], one_quote: bool, rng: random.Random) -> str:
    """One Chinese sentence that states the facts."""
    text = _filled(rng.choice(fitting_skeletons(skeletons, stated(facts), NOTHING)), facts, one_quote, rng)
    return text + "。" if rng.random() < 0.12 else text


def _filled(skeleton: str, facts: Facts, one_quote: bool, rng: random.Random) -> str:
    design = facts.design
    keys = [key for _, key, _, _ in Formatter().parse(skeleton) if key]
    parts = {"beside": BESIDE[design.side], "EMPTY": rng.choice(EMPTY), "quoted": rng.choice(("文字", "字"))}
    if "CONCEPT" in keys:
        parts["CONCEPT"] = counted_concept(facts.name, design.count, rng)
        facts.concept = False
    if "LETTERS" in keys:
        parts["LETTERS"] = letters_zh(facts, rng)
    if "GROUND" in keys:
        parts["GROUND"] = ground_zh(facts, rng)
    parts["counted"] = rng.choice(CLASSIFIERS[design.scene])
    ground = "scene" in keys or "bare" in keys
    parts["bare"] = (_attributes(facts, rng) if ground else "") + rng.choice(SCENES[design.scene])
    parts["scene"] = (parts["counted"] if rng.random() < 0.45 else "") + parts["bare"]
    parts["noun"] = rng.choice(SCENES[design.scene])
    parts["verb"] = _verb(facts, rng, "上{verb}" in skeleton or "上面{verb}" in skeleton) if "verb" in keys else ""
    parts["is"] = TITLED[design.scene] if design.scene in TITLED and rng.random() < 0.3 else rng.choice(IS)
    parts["make"], parts["write"] = rng.choice(MAKES), rng.choice(WRITES)
    parts["quote"] = quote_zh(design.lines, one_quote, rng, "verb" in keys or "is" in keys) if design.lines else ""
    if "{beside}" in skeleton and "{quote}{beside}" in skeleton and len(design.lines) > 1:
        parts["beside"] = "，文字" + parts["beside"]
    parts["tail"] = "".join("，" + part for part in _rest(facts, rng))
    return skeleton.format(**parts)


def _attributes(facts: Facts, rng: random.Random) -> str:
    """`红色的`, `红底`, `从红到蓝渐变的条纹`, ... in front of the noun; may leave the ground for later."""
    design, draw = facts.design, rng.random()
    if not facts.ground or draw < 0.15:
        return ""
    if draw < 0.3:
        return ground_zh(facts, rng) + "的"
    ground = colour_zh(design, rng)
    if draw < 0.4 and design.ground2 is None:
        ground = COLOURS[design.ground] + "底"
    elif design.ground2 or rng.random() < 0.5:
        ground += "的"
    facts.ground = False
    if facts.texture and design.texture in TEXTURES and rng.random() < 0.6:
        facts.texture = False
        return ground + rng.choice(TEXTURES[design.texture])
    return ground


def colour_zh(design: Design, rng: random.Random) -> str:
    """`红色` or `从红到蓝渐变`."""
    if design.ground2 is None:
        return COLOURS[design.ground] + "色"
    return rng.choice(GRADIENTS[1:]).format(COLOURS[design.ground], COLOURS[design.ground2])


def ground_zh(facts: Facts, rng: random.Random) -> str:
    """`红色背景`, `红色条纹背景`, `红底`, `红蓝渐变背景`; states the ground."""
    design = facts.design
    facts.ground = False
    texture = ""
    if facts.texture and design.texture in TEXTURES:
        facts.texture, texture = False, rng.choice(TEXTURES[design.texture])
    if not texture and design.ground2 is None and rng.random() < 0.25:
        return COLOURS[design.ground] + "底"
    return colour_zh(design, rng) + texture + "背景"


def letters_zh(facts: Facts, rng: random.Random) -> str:
    """`白色宋体字`, `白字`, `手写字体`; states colour and face."""
    colour = COLOURS[facts.design.letters] if facts.letters else ""
    face = rng.choice(FACES[facts.design.face]) if facts.face else ""
    facts.letters = facts.face = False
    noun = rng.choice(LETTERS if face else LETTERS[:3])
    if colour and not face and noun == "字":
        return colour + rng.choice(("字", "色字", "色的字"))
    return (colour + rng.choice(("色", "色", "色的")) if colour else "") + face + noun


def _verb(facts: Facts, rng: random.Random, placed: bool) -> str:
    """`写着`, `用白色宋体字写着`, `写着白色的字`, or, where no `上面` is in front, `上方写着`."""
    verb = rng.choice(VERBS)
    if (facts.letters or facts.face) and rng.random() < 0.45:
        letters = letters_zh(facts, rng)
        verb = f"用{letters}{verb}" if rng.random() < 0.6 else verb + letters
    if facts.place and not placed and rng.random() < 0.5:
        facts.place = False
        verb = rng.choice(PLACES[facts.design.place]) + verb
    return verb


def _rest(facts: Facts, rng: random.Random) -> list[str]:
    """Clauses for everything not yet stated, in random order."""
    design, rest = facts.design, []
    if facts.ground:
        rest.append(_ground_clause(facts, rng))
    if facts.texture and design.texture in TEXTURES:
        rest.append(rng.choice(TEXTURE_TAILS).format(rng.choice(TEXTURES[design.texture])))
    elif facts.texture:
        rest.append(rng.choice(PLAIN))
    if facts.letters and not facts.face and rng.random() < 0.3:
        facts.letters = False
        rest.append(rng.choice(("字是{}色的", "文字是{}色", "文字为{}色")).format(COLOURS[design.letters]))
    if facts.letters or facts.face:
        rest.append(letters_zh(facts, rng))
    if facts.align:
        rest.append(rng.choice(AT_TAILS).format(rng.choice(ALIGNS[design.align])))
    if facts.place:
        what = rng.choice(("文字在", "字在")) if design.lines else rng.choice(("图案在", "位于", "在"))
        rest.append(what + rng.choice(PLACES[design.place]))
    if facts.border:
        rest.append(rng.choice(BORDERS[0 if design.border else 1]))
    if facts.concept:
        rest.append(_concept_clause(facts, rng))
    rng.shuffle(rest)
    return rest


def _ground_clause(facts: Facts, rng: random.Random) -> str:
    if rng.random() < 0.35:
        facts.ground = False
        return "背景" + rng.choice(("是", "为")) + colour_zh(facts.design, rng)
    return ground_zh(facts, rng)


def _concept_clause(facts: Facts, rng: random.Random) -> str:
    design = facts.design
    it = counted_concept(facts.name, design.count, rng)
    if design.lines and (design.side != "above" or rng.random() < 0.5):
        return rng.choice(CONCEPTS).format(side=rng.choice(SIDES[design.side]), it=it)
    return rng.choice(SIDELESS).format(it=it)


def counted_concept(name: str, count: int, rng: random.Random) -> str:
    """`一个猫`, `两个猫`, `一个猫的图案`."""
    return NUMBERS[count] + "个" + name + (rng.choice(("图案", "图标")) if rng.random() < 0.12 else "")


def quote_zh(lines: tuple[str, ...], one_quote: bool, rng: random.Random, numbered: bool) -> str:
    """The lines in quotation marks, from the top down; `numbered` allows 第一行, 第二行."""
    opening, closing = pick_marks(lines, rng, "zh")
    count = len(lines)
    if one_quote or count == 1:
        return opening + " ".join(lines) + closing
    quotes = [opening + line + closing for line in lines]
    draw = rng.random()
    if numbered and draw < 0.2:
        return "，".join(nth + quote for nth, quote in zip(NTH, quotes, strict=False))
    if count > 2 and draw < 0.5:
        return "、".join(quotes[:-1]) + "和" + quotes[-1]
    text = rng.choice(JOINTS).join(quotes)
    return f"{text}{NUMBERS[count]}行字" if numbered and draw > 0.85 else text
