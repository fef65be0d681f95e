"""The step that a CUDA graph can record writes the same masks as ordinary decoding."""

import numpy as np
import pytest
import torch
from test_decode import CODES, FORMATS, TEXT, VOCABULARY, small_decoder

from icl_moe.inference.decode import decode_batch
from icl_moe.inference.static_codes import StaticCodes
from icl_moe.sequence import Episode, SequenceCodec
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.segmentation import SegmentationPair


def queries(shots: int, count: int, seed: int) -> list[tuple[Episode, np.ndarray]]:
    rng = np.random.default_rng(seed)

    def codes() -> np.ndarray:
        return rng.integers(0, VOCABULARY.image_codes, CODES)

    def episode() -> Episode:
        pairs = tuple(SegmentationPair(codes(), codes()) for _ in range(shots))
        return Episode(SEGMENTATION, "", pairs)

    return [(episode(), codes()) for _ in range(count)]


@pytest.mark.parametrize("feed_forward", ["attributes", "dense"])
def test_static_buffers_write_the_same_codes_again_and_again(feed_forward):
    decoder, codec = small_decoder(FORMATS[0], feed_forward), SequenceCodec(FORMATS[0], TEXT)
    static = StaticCodes(decoder, codec, rows=3, longest=codec.format.length(3))
    # A shorter prompt leaves the rest of an older one.
    for shots, seed in ((2, 0), (1, 1), (2, 2)):
        requests = queries(shots, 3, seed)
        assert static.write(requests) == [
            written.tokens for written in decode_batch(decoder, codec, requests)
        ]


def test_torch_compile_can_trace_the_step():
    decoder, codec = small_decoder(FORMATS[0]), SequenceCodec(FORMATS[0], TEXT)
    static = StaticCodes(decoder, codec, rows=2, longest=codec.format.length(3))
    requests = queries(1, 2, 3)
    static.run_step = torch.compile(static.step, backend="eager", fullgraph=True, dynamic=False)
    assert static.write(requests) == [
        written.tokens for written in decode_batch(decoder, codec, requests)
    ]
