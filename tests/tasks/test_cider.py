"""CIDEr equals pycocoevalcap's scorer, caption by caption."""

import random

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from icl_moe.tasks.cider import cider_d


@pytest.mark.parametrize("queries", [1, 2, 60])
def test_cider_equals_pycocoevalcaps(queries):
    drawn = random.Random(queries)
    words = [f"w{number}" for number in range(25)]

    def caption() -> str:
        """Some are empty, or shorter than the longest n-gram."""
        return " ".join(drawn.choices(words, k=drawn.choice([0, 1, 2, 3, 9, 12])))

    references = [[caption() for _ in range(drawn.choice([1, 2, 5]))] for _ in range(queries)]
    candidates = [drawn.choice([caption(), texts[0]]) for texts in references]
    _, expected = Cider().compute_score(
        dict(enumerate(references)), {n: [text] for n, text in enumerate(candidates)}
    )
    np.testing.assert_allclose(cider_d(candidates, references), expected, atol=1e-12)


def test_captions_without_any_word_score_nothing():
    assert cider_d(["", ""], [[""], ["", ""]]).tolist() == [0.0, 0.0]
