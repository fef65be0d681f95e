"""Class names in text: COCO's 80, their plurals and a few synonyms."""

import re
from collections.abc import Iterable

_COCO_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
    elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee,
    skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana,
    apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
    couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
    cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
    scissors, teddy bear, hair drier, toothbrush
"""
COCO_CLASSES = tuple(" ".join(_COCO_NAMES.split()).split(", "))

# Only words that can mean nothing but the class in the description of a picture. Their plurals
# count as well.
_SYNONYMS = {
    "person": ("man", "woman", "boy", "girl", "child", "kid", "lady", "guy"),
    "bicycle": ("bike",),
    "motorcycle": ("motorbike",),
    "airplane": ("plane", "aeroplane"),
    "couch": ("sofa",),
    "tv": ("television",),
    "donut": ("doughnut",),
    "cell phone": ("cellphone", "mobile phone"),
    "refrigerator": ("fridge",),
    "hair drier": ("hair dryer",),
    "skis": ("ski",),
}
_IRREGULAR_PLURALS = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "knife": "knives",
    "mouse": "mice",
}
_PLURALS_OF_THEMSELVES = ("skis", "scissors", "sheep", "broccoli")


class ClassFinder:
    """Finds the names of `classes` in texts: singular, plural or synonym, regardless of case."""

    def __init__(self, classes: Iterable[str]) -> None:
        self._forms: dict[str, tuple[str, bool]] = {}
        for category in classes:
            for name in (category, *_SYNONYMS.get(category, ())):
                self._forms[plural(name).lower()] = (category, True)
                self._forms[name.lower()] = (category, name == "skis")
        # Longer names come first, so that "hot dog" does not match "dog".
        names = sorted(self._forms, key=lambda form: (-len(form), form))
        self._pattern = re.compile(
            r"\b(?:" + "|".join(re.escape(name) for name in names) + r")\b", re.IGNORECASE
        )

    def find(self, text: str) -> dict[str, bool]:
        """The classes that `text` names, in order -> whether the name is plural."""
        found: dict[str, bool] = {}
        for match in self._pattern.finditer(text):
            category, plural = self._forms[match.group().lower()]
            found[category] = found.get(category, False) or plural
        return found

    def exact(self, name: str) -> str | None:
        """The class that `name` as a whole names."""
        form = self._forms.get(name.strip().lower())
        return form[0] if form else None


def plural(name: str) -> str:
    """The plural of a class's name."""
    if name in _PLURALS_OF_THEMSELVES:
        return name
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")
