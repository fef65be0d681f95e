"""Decoding of outputs: token by token with a key-value cache, for a batch of queries, each
constrained by its grammar; or all cells of an image in one pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from icl_moe.attributes import PADDING, is_output_image
from icl_moe.errors import InputError
from icl_moe.inference.cache import KeyValueCache
from icl_moe.model.decoder import InContextDecoder
from icl_moe.sequence import NO_LINK, Episode, SequenceCodec, TokenSequence
from icl_moe.tasks.grammar import Allowed, is_forced

Request = tuple[Episode, np.ndarray]
"""An episode of examples only, and the image codes (N,) of the query that completes it."""


class Written(NamedTuple):
    """The tokens that complete a query, and the log-probability of each of them among those that
    its grammar allowed; None where the model had no choice, or did not make it in this pass.
    """

    tokens: list[int]
    log_probabilities: list[float | None]


_Row = tuple[int, ...]
"""A token to read: its id, position, attribute class and two `links`."""


class Block(NamedTuple):
    """The input of one decoder pass, all int64 and padded on the left; see
    `InContextDecoder.last_logits`.
    """

    tokens_BL: torch.Tensor
    positions_BL: torch.Tensor
    attributes_BL: torch.Tensor
    cache: KeyValueCache | None
    links_BL2: torch.Tensor


class Decoder(Protocol):
    """The interface that decoding needs of a model; `InContextDecoder` implements it."""

    device: Any

    def next_logits(
        self,
        tokens_BL: torch.Tensor,
        positions_BL: torch.Tensor,
        attributes_BL: torch.Tensor,
        cache: KeyValueCache | None = None,
        links_BL2: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen among the allowed ones.

    temperature 0: the most probable one. Above 0: drawn from softmax(logits / temperature), among
    the `top_k` most probable if given. The n-th query draws from its own generator, seeded with
    (seed, n), independently of the others. first: the number n of a batch's first query.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature < math.inf:
            raise InputError(
                "The temperature must be 0 (the most probable token) or a positive number, not "
                f"{self.temperature}."
            )
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise InputError(f"top_k must be a whole number of at least 1, not {self.top_k}.")
        if not (isinstance(self.seed, int) and self.seed >= 0):
            raise InputError(f"seed must be a whole number of at least 0, not {self.seed}.")


GREEDY = Sampling()


@torch.inference_mode()
def read_examples(decoder: Decoder, codec: SequenceCodec, episode: Episode) -> KeyValueCache:
    """What the decoder keeps of an episode's examples (and of its class prompt), for any number of
    queries that follow them.
    """
    rows = _rows(codec.encode(episode).unpadded())
    cache = KeyValueCache(len(rows))
    decoder.next_logits(*_stacked([rows], decoder.device, cache))
    return cache


@torch.inference_mode()
def decode_batch(
    decoder: Decoder,
    codec: SequenceCodec,
    requests: Sequence[Request],
    sampling: Sampling = GREEDY,
    progress: bool = False,
    openings: Sequence[Sequence[int]] | None = None,
    read: Sequence[KeyValueCache] | None = None,
) -> list[Written]:
    """What completes each request's query: everything after the prompt's marker, including a
    `given` category. openings: tokens that each output is to begin with. read: what the decoder has
    read of each request already, by `read_examples`.

    A step reads, for every incomplete query, its last token and the forced ones after it. Queries
    with fewer tokens to read are padded on the left, and complete ones leave the batch.
    """
    outputs = [
        _Output(
            codec,
            *request,
            np.random.default_rng((sampling.seed, sampling.first + n)),
            read[n].length if read else 0,
        )
        for n, request in enumerate(requests)
    ]
    for output, opening in zip(outputs, openings or (), strict=False):
        for token in opening:
            output.write(token)
    cache = _cache(
        read, max((output.unread for output in outputs), default=0) + codec.format.codes_per_image
    )
    going = outputs
    with tqdm(desc="writing", unit=" tokens", disable=not progress, delay=2, leave=False) as bar:
        while going:
            block = _stacked([output.read() for output in going], decoder.device, cache)
            logits_BV = decoder.next_logits(*block)
            chosen = _choose(logits_BV, going, sampling)
            for output, token, log_probability in zip(going, *chosen, strict=True):
                output.write(token, log_probability)
                bar.update()
            rows = [row for row, output in enumerate(going) if output.allowed]
            if len(rows) < len(going):
                cache.select(torch.tensor(rows, dtype=torch.long, device=decoder.device))
                going = [going[row] for row in rows]
    return [Written(output.tokens, output.log_probabilities) for output in outputs]


@torch.inference_mode()
def decode_at_once(
    decoder: InContextDecoder,
    codec: SequenceCodec,
    requests: Sequence[Request],
    read: Sequence[KeyValueCache] | None = None,
) -> torch.Tensor:
    """The probability of each image code in each cell of each request's output image,
    probabilities_BNK, float32, from one forward pass in which the whole output image is hidden as
    [MASK].

    Of tasks whose output is one image or begins with one, and a decoder that was trained with mask
    corruption. read: see `decode_batch`.
    """
    # The position of the last cell predicts no cell of the image.
    rows = [
        _rows(codec.encode_hidden(*request).unpadded(), read[n].length if read else 0)[:-1]
        for n, request in enumerate(requests)
    ]
    cache = _cache(read, max(map(len, rows))) if read else None
    logits_BNK = decoder.last_logits(
        codec.format.codes_per_image,
        *_stacked(rows, decoder.device, cache),
        ids=codec.format.vocabulary.image_range,
    )
    return logits_BNK.softmax(dim=-1)


def _cache(read: Sequence[KeyValueCache] | None, room: int) -> KeyValueCache:
    """A cache of what is `read`, with room for so many more positions."""
    if not read:
        return KeyValueCache(room)
    return KeyValueCache.joined(read, max(cache.length for cache in read) + room)


class _Output:
    """The growing output of one query. read: the number of its tokens that the decoder has read.

    tokens: written so far; log_probabilities: see `Written`. allowed: the possible next tokens, at
    least two; empty once the output is complete.
    """

    def __init__(
        self,
        codec: SequenceCodec,
        episode: Episode,
        query_image: np.ndarray,
        generator: np.random.Generator,
        read: int = 0,
    ) -> None:
        self._format, self._task = codec.format, episode.task
        self._image: list[int] = codec.format.vocabulary.from_input_codes(query_image).tolist()
        self._cell = 0  # The next cell of the output image.
        self.generator = generator
        prompt = codec.encode_prompt(episode, query_image).unpadded()
        self._unread = _rows(prompt, read)
        self._next_position = int(prompt.positions_L[-1]) + 1
        self.tokens: list[int] = []
        self.log_probabilities: list[float | None] = []
        self._grammar = episode.task.grammar(codec, episode.category)
        self.allowed: Allowed = next(self._grammar)
        last = prompt.spans[-1]
        for token in prompt.tokens_L[last.start :].tolist() if last.role == "given" else ():
            # The prompt contains it already, so only the grammar must accept it.
            self._accept(token)
        self._write_forced()

    @property
    def unread(self) -> int:
        """The number of tokens that the decoder has not read yet."""
        return len(self._unread)

    def read(self) -> list[_Row]:
        """Return the tokens that the decoder has not read yet, and count them as read."""
        rows, self._unread = self._unread, []
        return rows

    def write(self, token: int, log_probability: float | None = None) -> None:
        """Append the token chosen among the allowed ones, and all tokens that the grammar forces
        after it.
        """
        self._append(token)
        self.log_probabilities[-1] = log_probability
        self._write_forced()

    def _write_forced(self) -> None:
        while is_forced(self.allowed):
            self._append(self.allowed[0].start)

    def _append(self, token: int) -> None:
        attributes = self._task.output_attributes(self._format, token)
        held, image = NO_LINK, self._image
        if is_output_image(attributes):
            held = image[self._cell]
            self._cell = (self._cell + 1) % len(image)
        self._accept(token)
        draws = self.allowed == (self._format.vocabulary.image_range,)
        predicted = image[self._cell] if draws else NO_LINK
        self._unread.append((token, self._next_position, attributes, predicted, held))
        self._next_position += 1

    def _accept(self, token: int) -> None:
        self.tokens.append(token)
        self.log_probabilities.append(None)
        try:
            self.allowed = self._grammar.send(token)
        except StopIteration:
            self.allowed = ()


def _rows(sequence: TokenSequence, start: int = 0) -> list[_Row]:
    """The tokens of a sequence from `start` on."""
    columns = (sequence.read_L, sequence.positions_L, sequence.attributes(), *sequence.links().T)
    return list(zip(*(column[start:].tolist() for column in columns), strict=True))


def _stacked(
    rows_of: Sequence[list[_Row]], device: Any, cache: KeyValueCache | None = None
) -> Block:
    """The unread tokens of several sequences, padded on the left."""
    length = max(map(len, rows_of), default=0)
    block_BL5 = np.zeros((len(rows_of), length, 5), dtype=np.int64)
    block_BL5[..., 2] = PADDING
    block_BL5[..., 3:] = NO_LINK
    for number, rows in enumerate(rows_of):
        block_BL5[number, length - len(rows) :] = rows
    block = torch.from_numpy(block_BL5).to(device)
    tokens_BL, positions_BL, attributes_BL = block[..., :3].unbind(dim=2)
    return Block(tokens_BL, positions_BL, attributes_BL, cache, block[..., 3:])


def _choose(
    logits_BV: torch.Tensor, outputs: Sequence[_Output], sampling: Sampling
) -> tuple[list[int], list[float]]:
    """The next token of each output, and its log-probability among the allowed ones."""
    rows_of: dict[Allowed, list[int]] = {}
    for row, output in enumerate(outputs):
        rows_of.setdefault(output.allowed, []).append(row)
    scores_BV = torch.full_like(logits_BV, -torch.inf)
    for allowed, rows in rows_of.items():
        for ids in allowed:
            scores_BV[rows, ids.start : ids.stop] = logits_BV[rows, ids.start : ids.stop]
    chosen_B = _draw(scores_BV, outputs, sampling)
    log_probabilities_B1 = scores_BV.log_softmax(dim=1).gather(1, chosen_B[:, None])
    return chosen_B.tolist(), log_probabilities_B1[:, 0].tolist()


def _draw(scores_BV: torch.Tensor, outputs: Sequence[_Output], sampling: Sampling) -> torch.Tensor:
    """One token of each row; those that are not allowed have the score -inf."""
    if sampling.temperature == 0:
        return scores_BV.argmax(dim=1)
    if sampling.top_k is not None:
        least_B1 = scores_BV.topk(min(sampling.top_k, scores_BV.shape[1]), dim=1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    # Subtracting the maximum before the division keeps temperatures near 0 from producing
    # infinities.
    excess_BV = scores_BV.double() - scores_BV.double().amax(dim=1, keepdim=True)
    cumulative_BV = (excess_BV / sampling.temperature).softmax(dim=1).cumsum(dim=1)
    draws_B1 = (
        cumulative_BV.new_tensor([[output.generator.random()] for output in outputs])
        * cumulative_BV[:, -1:]
    )
    return torch.searchsorted(cumulative_BV, draws_B1, right=True).squeeze(1)
