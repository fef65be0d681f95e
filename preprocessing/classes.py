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

# Only words that mean the class and nothing else in a picture's description; each is taken in the
# plural too.
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
    """Finds the names of `classes` in texts, in the singular, in the plural, or as a synonym,
    whatever the case.
    """

    def __init__(self, classes: Iterable[str]) -> None:
        self._forms: dict[str, tuple[str, bool]] = {}
        for category in classes:
            for name in (category, *_SYNONYMS.get(category, ())):
                self._forms[_plural(name).lower()] = (category, True)
                self._forms[name.lower()] = (category, name == "skis")
        # Longer names come first, so that a hot dog is no dog.
        names = sorted(self._forms, key=lambda form: (-len(form), form))
        self._pattern = re.compile(
            r"\b(?:" + "|".join(re.escape(name) for name in names) + r")\b", re.IGNORECASE
        )

    def find(self, text: str) -> dict[str, bool]:
        """The classes that `text` names, in order, each with whether it is named in the plural."""
        found: dict[str, bool] = {}
        for match in self._pattern.finditer(text):
            category, plural = self._forms[match.group().lower()]
            found[category] = found.get(category, False) or plural
        return found

    def exact(self, name: str) -> str | None:
        """The class that `name`, as a whole, stands for."""
        form = self._forms.get(name.strip().lower())
        return form[0] if form else None


def _plural(name: str) -> str:
    if name in _PLURALS_OF_THEMSELVES:
        return name
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")
