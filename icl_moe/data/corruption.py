"""Mask corruption: some of the query's mask codes are hidden from the model that is to write them.

What is hidden is read as [MASK]; targets stay, and so do the examples' masks. A model that has seen
this relies less on the codes that it has just written and more on the examples, and when all codes
are hidden it has to write the whole mask at once, which is what parallel decoding asks of it.
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
    """The sequence with each code of the query's mask hidden at a rate p, drawn for the episode: 0
    in 25% of them, 1 in 25%, else uniform in 0..1.

    The draw is a pure function of (seed, step, place in the global batch of that step). A sequence
    whose output is text is returned as it is: a box that is drawn before a caption is none.
    """
    spans = [span for span in sequence.query_spans if span.role == "output"]
    if not all(is_output_image(span.attributes) for span in spans):
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
