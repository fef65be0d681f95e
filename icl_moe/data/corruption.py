"""Mask corruption: some of the codes of the query's output image, a mask or a drawn box, are hidden
from the model that has to write them.

Hidden codes are read as [MASK]; the targets and the masks of the examples do not change. A model
that is trained in this way relies less on the codes that it has just written and more on the
examples. When all codes are hidden it has to write the whole mask at once, as in parallel decoding.
"""

from dataclasses import replace

import numpy as np

from icl_moe.attributes import is_output_image
from icl_moe.seeds import stable_seed
from icl_moe.sequence import TokenSequence
from icl_moe.vocabulary import Vocabulary

NOTHING, EVERYTHING = 0.25, 0.25
"""The shares of episodes in which no code is hidden, and in which all are."""


def hide_query_mask(
    sequence: TokenSequence, vocabulary: Vocabulary, seed: int, step: int, place: int
) -> TokenSequence:
    """The sequence with each code of the query's output image hidden at a rate p, drawn for the
    episode: 0 in 25% of them, 1 in 25%, and uniform in 0..1 otherwise.

    The draw is a pure function of (seed, step, place in the global batch of that step). A sequence
    whose output is text alone is returned unchanged.
    """
    spans = [
        span
        for span in sequence.query_spans
        if span.role == "output" and is_output_image(span.attributes)
    ]
    if not spans:
        return sequence
    generator = np.random.Generator(
        np.random.Philox(stable_seed("mask corruption", seed, step, place))
    )
    kind, rate = generator.random(2)
    rate = 0.0 if kind < NOTHING else 1.0 if kind < NOTHING + EVERYTHING else rate
    inputs_L = sequence.tokens_L.copy()
    for span in spans:
        hidden = generator.random(span.length) < rate
        inputs_L[span.start : span.stop][hidden] = vocabulary.mask_token
    return replace(sequence, inputs_L=inputs_L)
