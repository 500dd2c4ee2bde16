"""English names of counted things: article, plural, and the icon that stands in where there is no plural."""

import random

NUMBERS = ("no", "one", "two", "three", "four")
ICONS = ("icon", "icon", "symbol")
IRREGULAR = {
    **{"mouse": "mice", "goose": "geese", "wolf": "wolves", "leaf": "leaves", "knife": "knives"},
    **{"foot": "feet", "tooth": "teeth", "ox": "oxen", "potato": "potatoes", "tomato": "tomatoes"},
    **{name: name for name in ("sheep", "fish", "deer", "shrimp", "squid", "blowfish", "bison", "dice")},
}
UNCOUNTED = (
    "bread rice corn garlic cheese milk sushi popcorn fire bacon butter honey salt spaghetti broccoli ginger money "
    "luggage rain snow wind fog lightning tea sake tofu clothing jewelry music trash ice meat soup wood lava tennis "
    "bowling badminton cutlery soap boba sakura"
)


def article(noun: str) -> str:
    """The noun behind `a` or `an`."""
    vowel = noun[0].lower() in "aeiou" and not noun.startswith(("uni", "uku", "eu", "one", "use", "ufo"))
    return ("an " if vowel or noun.startswith(("hour", "x-")) else "a ") + noun


def plural(name: str) -> str:
    """The plural of a pictogram's name: of its last word, or of the word before `of`, `in` or `with`."""
    for small in (" of ", " in ", " with ", " on "):
        head, found, tail = name.partition(small)
        if found:
            return plural(head) + found + tail
    first, gap, last = name.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return first + gap + last


def concept_phrase(name: str, count: int, rng: random.Random) -> str:
    """`a cat`, `two cats`, `three bread icons`: names without a plural of their own become icons."""
    last = name.split()[-1].lower()
    odd = last in UNCOUNTED.split() or (last.endswith("s") and not last.endswith(("ss", "us", "is")))
    if odd or rng.random() < 0.1:
        icon = rng.choice(ICONS)
        return f"{NUMBERS[count]} {name} {icon}s" if count > 1 else article(f"{name} {icon}")
    return f"{NUMBERS[count]} {plural(name)}" if count > 1 else article(name)
