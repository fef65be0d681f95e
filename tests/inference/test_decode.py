"""Decoding in a batch with padding and a cache equals plain decoding, which handles one query and
reads all tokens again at each step.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from icl_moe.attributes import PADDING, attribute_class
from icl_moe.errors import InputError
from icl_moe.inference.decode import Sampling, Written, decode_batch, read_examples
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.recipe import ModelSettings
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat
from icl_moe.settings import to_dict
from icl_moe.tasks import SEGMENTATION, TASKS
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_merges=2000, image_codes=32)
TEXT = TextTokenizer(merges=2000)
CODES = 32
FORMATS = [
    SequenceFormat(VOCABULARY, CODES, category="written", box="text"),
    SequenceFormat(
        VOCABULARY, CODES, category="given", box="image", class_prompt=True, prompt_length=8
    ),
    SequenceFormat(VOCABULARY, CODES, category="given", box="none"),
]


def small_decoder(
    format: SequenceFormat, feed_forward: str = "attributes", link: bool = False
) -> InContextDecoder:
    settings = ModelSettings(
        layers=2,
        width=32,
        heads=2,
        positions=format.length(3),
        feed_forward=feed_forward,
        layers_with_experts=(1,),
        experts=4,
        link=link,
    )
    config = DecoderConfig(
        model=to_dict(settings),
        vocabulary=to_dict(format.vocabulary),
        format=to_dict(format),
        image_size=56,
        examples=2,
    )
    decoder = InContextDecoder(config)
    initialise(decoder, seed=0)
    with torch.no_grad():  # As large as after training, so that the choices depend on the prompt.
        for parameter in decoder.parameters():
            parameter.mul_(4.0)
    return decoder.eval()


def requests(format: SequenceFormat, rng: np.random.Generator) -> list[tuple[Episode, np.ndarray]]:
    """Queries of both tasks after 0, 1 or 2 examples, so that their prompts differ in length."""

    def codes() -> np.ndarray:
        return rng.integers(0, VOCABULARY.image_codes, CODES)

    def pair(task: str) -> SegmentationPair | CaptionPair:
        if task == "segmentation":
            return SegmentationPair(codes(), codes())
        return CaptionPair(
            codes(),
            "a" * int(rng.integers(1, 4)),
            "cat",
            (0.1, 0.1, 0.5, 0.9),
            codes() if format.box == "image" else None,
        )

    return [
        (Episode(TASKS[task], "cat", tuple(pair(task) for _ in range(shots))), codes())
        for task in ("segmentation", "captioning")
        for shots in (1, 0, 2)
    ]


def plainly(
    decoder: InContextDecoder, codec: SequenceCodec, episode: Episode, query: np.ndarray
) -> Written:
    """Greedy decoding without batch, padding or cache, with positions and attributes from the
    padded layout.
    """
    prompt = codec.encode_prompt(episode, query)
    tokens, attributes = prompt.tokens_L.tolist(), prompt.attributes().tolist()
    given = prompt.spans[-1].length if prompt.spans[-1].role == "given" else 0
    output = tokens[len(tokens) - given :]
    log_probabilities: list[float | None] = [None] * given
    grammar = episode.task.grammar(codec, episode.category)
    allowed = next(grammar)
    for token in output:
        allowed = grammar.send(token)
    while True:
        everything = (
            torch.tensor([tokens]),
            torch.arange(len(tokens))[None],
            torch.tensor([attributes]),
            plain_links(tokens),
        )
        logits = decoder.forward_logits(*everything)[0, -1]
        ids = torch.tensor([i for part in allowed for i in part])
        token = int(ids[logits[ids].argmax()])
        forced = len(ids) == 1
        log_probabilities.append(None if forced else logits[ids].log_softmax(0).max().item())
        modality = "image" if token in VOCABULARY.image_range else "text"
        tokens.append(token)
        output.append(token)
        attributes.append(
            attribute_class(
                episode.task.outputs(codec.format), modality, True, codec.format.class_prompt
            )
        )
        try:
            allowed = grammar.send(token)
        except StopIteration:
            return Written(output, log_probabilities)


def plain_links(tokens: list[int]) -> torch.Tensor:
    """The links (1, L, 2) of a sequence or its beginning, derived only from the order of tokens: an
    image directly after another is its output.
    """
    links = torch.full((1, len(tokens), 2), -1)
    opened = [place for place, token in enumerate(tokens) if token == VOCABULARY.boi]
    for first, second in itertools.pairwise(opened):
        # After an output image and [EOC] or text, another pair begins.
        if second == first + 1 + CODES:
            for cell in range(CODES):
                for place, column in ((second + cell, 0), (second + cell + 1, 1)):
                    if place < len(tokens):
                        links[0, place, column] = tokens[first + 1 + cell]
    return links


def decoded(*arguments) -> list[list[int]]:
    """The tokens that `decode_batch` writes for each request."""
    return [written.tokens for written in decode_batch(*arguments)]


@pytest.mark.parametrize(
    ("format", "feed_forward", "link"),
    [
        (FORMATS[0], "attributes", False),
        (FORMATS[1], "attributes", False),
        (FORMATS[2], "attributes", False),
        (FORMATS[0], "token", False),
        (FORMATS[2], "dense", False),
        (FORMATS[0], "attributes", True),
        (FORMATS[1], "dense", True),
    ],
    ids=["box=text", "box=image", "no box", "token gate", "dense", "link", "link, box=image"],
)
@torch.inference_mode()
def test_batched_cached_decoding_equals_plain_decoding(format, feed_forward, link):
    decoder, codec = small_decoder(format, feed_forward, link), SequenceCodec(format, TEXT)
    batch = requests(format, np.random.default_rng(0))
    written = decode_batch(decoder, codec, batch)
    expected = [plainly(decoder, codec, episode, query) for episode, query in batch]
    together = [each.tokens for each in written]
    assert together == [each.tokens for each in expected]
    for ours, plain in zip(written, expected, strict=True):
        assert ours.log_probabilities == pytest.approx(plain.log_probabilities, abs=1e-4)
    assert len({tuple(tokens) for tokens in together}) == len(batch), (
        "outputs that do not depend on the prompt would prove nothing"
    )
    # Examples that were read before, and differ in length.
    known = [n for n, (episode, _) in enumerate(batch) if episode.pairs or format.class_prompt]
    read = [read_examples(decoder, codec, batch[n][0]) for n in known]
    again = decode_batch(decoder, codec, [batch[n] for n in known], read=read)
    assert [each.tokens for each in again] == [together[n] for n in known]


class Oracle:
    """A decoder that knows an episode's whole sequence, predicts its next token, and records what
    it reads.
    """

    device = torch.device("cpu")

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.read: list[tuple[int, int, int]] = []

    def next_logits(self, tokens_BL, positions_BL, attributes_BL, cache=None, links_BL2=None):
        block_L3 = torch.stack([tokens_BL, positions_BL, attributes_BL], dim=2)[0]
        self.read += [tuple(row) for row in block_L3.tolist() if row[2] != PADDING]
        return F.one_hot(torch.tensor([self.tokens[len(self.read)]]), VOCABULARY.size).float()


@pytest.mark.parametrize("format", FORMATS, ids=["box=text", "box=image", "no box"])
def test_the_decoder_reads_each_token_once_and_as_training_shows_it(format):
    codec = SequenceCodec(format, TEXT)
    for episode, _ in requests(format, np.random.default_rng(1)):
        if not episode.pairs:
            continue
        whole = codec.encode(episode).unpadded()
        oracle = Oracle(whole.tokens_L.tolist())
        examples = Episode(episode.task, episode.category, episode.pairs[:-1])
        (output,) = decoded(oracle, codec, [(examples, episode.pairs[-1].image)])
        expected = list(
            zip(
                whole.tokens_L.tolist(),
                whole.positions_L.tolist(),
                whole.attributes().tolist(),
                strict=True,
            )
        )
        assert oracle.read == expected[: len(oracle.read)]
        # The [EOC] of a mask need not be written.
        eoc = [VOCABULARY.eoc] if episode.task is SEGMENTATION else []
        assert (output + eoc) == oracle.tokens[-len(output + eoc) :]
        assert len(oracle.read) >= len(oracle.tokens) - 2, (
            "only the last choice and what follows it need no reading"
        )


def test_sampling_repeats_with_its_seed_and_does_not_depend_on_the_batch():
    format = FORMATS[0]
    decoder, codec = small_decoder(format), SequenceCodec(format, TEXT)
    batch = requests(format, np.random.default_rng(2))
    first = decoded(decoder, codec, batch, Sampling(temperature=1.0, seed=1))
    assert first == decoded(decoder, codec, batch, Sampling(temperature=1.0, seed=1))
    assert first != decoded(decoder, codec, batch, Sampling(temperature=1.0, seed=2))
    assert first[:2] == decoded(decoder, codec, batch[:2], Sampling(temperature=1.0, seed=1))
    assert decoded(decoder, codec, batch) == decoded(
        decoder, codec, batch, Sampling(temperature=0.7, top_k=1)
    )


def test_sampling_draws_allowed_tokens_in_proportion():
    """With logits fixed, the first code of many masks follows softmax(logits / temperature)."""

    class Fixed:
        device = torch.device("cpu")

        def next_logits(self, tokens_BL, positions_BL, attributes_BL, cache=None, links_BL2=None):
            # All forbidden tokens have higher logits than all allowed ones.
            logits_V = torch.full((VOCABULARY.size,), 50.0)
            logits_V[VOCABULARY.image_range.start : VOCABULARY.image_range.stop] = -1e4
            logits_V[VOCABULARY.image_range.start : VOCABULARY.image_range.start + 3] = (
                torch.tensor([0.0, 1.0, 2.0])
            )
            return logits_V.expand(len(tokens_BL), -1)

    codec = SequenceCodec(SequenceFormat(VOCABULARY, CODES), TEXT)
    request = (Episode(TASKS["segmentation"], "", ()), np.zeros(CODES, int))
    drawn = (
        np.concatenate(decoded(Fixed(), codec, [request] * 100, Sampling(temperature=2.0)))
        - VOCABULARY.image_range.start
    )
    expected = torch.tensor([0.0, 0.5, 1.0]).softmax(0).numpy()
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / len(drawn), expected, atol=0.03)
    top = np.concatenate(
        decoded(Fixed(), codec, [request] * 20, Sampling(temperature=2.0, top_k=2))
    )
    assert set(top - VOCABULARY.image_range.start) == {1, 2}
    # How probable each code is among the allowed ones, at temperature 1.
    (greedy,) = decode_batch(Fixed(), codec, [request])
    likeliest = torch.tensor([0.0, 1.0, 2.0]).log_softmax(0)[2].item()
    assert greedy.log_probabilities == pytest.approx([likeliest] * CODES)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}])
def test_impossible_sampling_is_refused(settings):
    with pytest.raises(InputError):
        Sampling(**settings)


def shared_requests(format: SequenceFormat, count: int, task: str) -> list:
    """Queries with the same two examples."""
    rng = np.random.default_rng(5)
    by_task = {True: requests(format, rng)[2], False: requests(format, rng)[5]}
    episode, _ = by_task[task == "segmentation"]
    return [(episode, rng.integers(0, VOCABULARY.image_codes, CODES)) for _ in range(count)]


@pytest.mark.parametrize(
    ("format", "task", "link"),
    [
        (FORMATS[0], "segmentation", True),
        (FORMATS[0], "captioning", False),
        (FORMATS[1], "captioning", True),
    ],
)
@torch.inference_mode()
def test_shared_examples_are_read_once_and_change_nothing(format, task, link, monkeypatch):
    decoder, codec = small_decoder(format, link=link), SequenceCodec(format, TEXT)
    batch = shared_requests(format, 3, task)
    assert all(len(episode.pairs) == 2 for episode, _ in batch)
    read, run = [], InContextDecoder.run
    monkeypatch.setattr(
        InContextDecoder,
        "run",
        lambda self, x_TM, *more: read.append(len(x_TM)) or run(self, x_TM, *more),
    )
    together = decoded(decoder, codec, batch)
    examples = len(codec.encode(batch[0][0]).unpadded())
    assert examples <= read[0] <= examples + 2, "the examples and the next marker, once"
    assert read[1] < 3 * 2 * CODES, "then an image of each query, and what is forced after it"
    monkeypatch.undo()
    assert together == [plainly(decoder, codec, *request).tokens for request in batch]
