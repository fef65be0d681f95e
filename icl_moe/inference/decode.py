"""Decoding of outputs: token by token with a key-value cache, for a batch of queries, each
constrained by its grammar; or all cells of an image in one pass.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from icl_moe.attributes import PADDING, is_output_image
from icl_moe.batch import RoutingPlan
from icl_moe.errors import InputError
from icl_moe.inference.cache import KeyValueCache, SharedPast
from icl_moe.model.attention import AttentionCache, CachedAttention
from icl_moe.model.decoder import InContextDecoder
from icl_moe.sequence import NO_LINK, Episode, SequenceCodec, TokenSequence
from icl_moe.tasks.grammar import Allowed, is_forced

Request = tuple[Episode, np.ndarray]
"""An episode of examples only, and the image codes (N,) of the query that completes it."""


class Written(NamedTuple):
    """The tokens that complete a query, and the log-probability of each of them among those that
    its grammar allowed; None where the model had no choice.
    """

    tokens: list[int]
    log_probabilities: list[float | None]


_Row = tuple[int, ...]
"""A token to read: its id, position, attribute class and two `links`. Many of them are a table, an
array (L, 5).
"""


class Block(NamedTuple):
    """The input of one decoder pass, all int64 and padded on the left; see
    `InContextDecoder.last_logits`. The attributes stay on the host, the rest is on the device.
    """

    tokens_BL: torch.Tensor
    positions_BL: torch.Tensor
    attributes_BL: torch.Tensor
    cache: AttentionCache | None
    links_BL2: torch.Tensor


class Decoder(Protocol):
    """The interface that decoding needs of a model; `InContextDecoder` implements it."""

    @property
    def device(self) -> Any: ...

    def next_logits(
        self,
        tokens_BL: torch.Tensor,
        positions_BL: torch.Tensor,
        attributes_BL: torch.Tensor,
        cache: AttentionCache | None = None,
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
def decode_batch(
    decoder: Decoder,
    codec: SequenceCodec,
    requests: Sequence[Request],
    sampling: Sampling = GREEDY,
    progress: bool = False,
    openings: Sequence[Sequence[int]] | None = None,
    together: int | None = None,
    read: Sequence[Sequence[KeyValueCache]] | None = None,
) -> list[Written]:
    """What completes each request's query: everything after the prompt's marker, including a
    `given` category. openings: tokens that each output is to begin with. together: the most
    examples that are read in one sequence (all by default); groups of more all read the same
    output, each token of which is chosen by the mean of their probabilities, weighted by their
    sizes. read: what the decoder has read of each group of each request already, by
    `read_examples`.

    What all prompts begin with, such as the same examples, is read once. A step reads, for every
    incomplete query, its last token and the forced ones after it. Queries with fewer tokens to read
    are padded on the left, and complete ones leave the batch. Where all of them are within an
    image, and nothing is sampled, the codes are chosen without leaving the device.
    """
    outputs = [
        _Output(codec, n, group, image, np.random.default_rng((sampling.seed, sampling.first + n)))
        for n, (episode, image) in enumerate(requests)
        for group in in_groups(episode, together)
    ]
    for output in outputs:
        for token in openings[output.request] if openings else ():
            output.write(token)
    codes = codec.format.codes_per_image
    pasts = [past for groups in read for past in groups] if read else None
    pasts = pasts or _read_shared(
        decoder, [np.array(output.rows) for output in outputs], least=codes
    )
    for output, past in zip(outputs, pasts or (), strict=False):
        output.skip(past.length)
    room = max((output.unread for output in outputs), default=0) + codes
    cache = _joined(pasts, room) if pasts else KeyValueCache(room)
    grouped = len(outputs) > len(requests)
    going = outputs
    with tqdm(desc="writing", unit=" tokens", disable=not progress, delay=2, leave=False) as bar:
        while going:
            count = 0 if grouped else min(output.cells_ahead for output in going)
            if sampling.temperature == 0 and count and isinstance(decoder, InContextDecoder):
                _write_codes(decoder, cache, going, count, bar)
            else:
                _write_next(decoder, cache, going, sampling, grouped, bar)
            rows = [row for row, output in enumerate(going) if output.allowed]
            if len(rows) < len(going):
                cache.select(torch.tensor(rows, dtype=torch.long))
                going = [going[row] for row in rows]
    # All outputs of one request are equal.
    of_request = {output.request: output for output in outputs}
    return [Written(written.tokens, written.log_probabilities) for written in of_request.values()]


@torch.inference_mode()
def decode_at_once(
    decoder: InContextDecoder,
    codec: SequenceCodec,
    requests: Sequence[Request],
    together: int | None = None,
    read: Sequence[Sequence[KeyValueCache]] | None = None,
) -> torch.Tensor:
    """The probability of each image code in each cell of each request's output image,
    probabilities_BNK, float32, where the whole output image is hidden as [MASK].

    together: the most examples that one forward pass reads (all by default). More are read in
    groups of nearly equal size, and the result is the mean of the groups' probabilities, weighted
    by their sizes. read: what the decoder has read of each group of each request already, by
    `read_examples`; otherwise what the requests begin with, such as the same examples, is read
    once. The tasks must be those whose output is one image or begins with one, and the decoder must
    have been trained with mask corruption.
    """
    groups = [list(in_groups(episode, together)) for episode, _ in requests]
    means: list[Any] = [0.0] * len(requests)
    for turn in range(max(map(len, groups))):
        rows = [row for row, of_row in enumerate(groups) if turn < len(of_row)]
        batch = [(groups[row][turn], requests[row][1]) for row in rows]
        before = [read[row][turn] for row in rows] if read else None
        for row, probabilities_NK in zip(rows, _pass(decoder, codec, batch, before), strict=True):
            examples, total = len(groups[row][turn].pairs), len(requests[row][0].pairs)
            means[row] += (examples / total if total else 1.0) * probabilities_NK
    return torch.stack(means)


def in_groups(episode: Episode, together: int | None) -> Iterator[Episode]:
    """The episode with a part of its examples at a time, at most `together` of them."""
    count = len(episode.pairs)
    groups = -(-count // together) if together and count else 1
    for group in range(groups):
        yield replace(episode, pairs=episode.pairs[group::groups])


@torch.inference_mode()
def read_examples(
    decoder: Decoder, codec: SequenceCodec, episode: Episode, together: int | None = None
) -> list[KeyValueCache]:
    """What the decoder keeps of an episode's examples (and of its class prompt), for any number of
    queries that follow them; of each of the groups of `decode_at_once`.
    """
    return [
        _read(decoder, _table(codec.encode(group).unpadded()))
        for group in in_groups(episode, together)
    ]


def _pass(
    decoder: InContextDecoder,
    codec: SequenceCodec,
    requests: Sequence[Request],
    read: Sequence[KeyValueCache] | None,
) -> torch.Tensor:
    """The probabilities_BNK of one forward pass; see `decode_at_once`."""
    # The position of the last cell predicts no cell of the image.
    rows_of = [_table(codec.encode_hidden(*request).unpadded())[:-1] for request in requests]
    count, cache = codec.format.codes_per_image, None
    read = read or _read_shared(decoder, rows_of, least=count, kept=count)
    if read:
        rows_of = [rows[past.length :] for rows, past in zip(rows_of, read, strict=True)]
        alike = all(past is read[0] for past in read)
        room = max(map(len, rows_of))
        cache = SharedPast(read[0], len(read)) if alike else _joined(read, room)
    logits_BNK = decoder.last_logits(
        count, *_stacked(rows_of, decoder.device, cache), ids=codec.format.vocabulary.image_range
    )
    return logits_BNK.softmax(dim=-1)


def _read_shared(
    decoder: Decoder, rows_of: Sequence[np.ndarray], least: int, kept: int = 1
) -> list[KeyValueCache] | None:
    """What the decoder keeps of the rows that all tables (L, 5) begin with, for each of them the
    same, without the last `kept` rows of each. None for a single table, and for fewer rows than
    `least`, which are not worth a pass of their own.
    """
    most = min(map(len, rows_of), default=0) - kept
    if len(rows_of) < 2 or most < least:
        return None
    first = rows_of[0][:most]
    differs_L = np.any([(rows[:most] != first).any(axis=1) for rows in rows_of[1:]], axis=0)
    equal = int(differs_L.argmax()) if differs_L.any() else most
    return [_read(decoder, first[:equal])] * len(rows_of) if equal >= least else None


def _read(decoder: Decoder, rows: np.ndarray) -> KeyValueCache:
    cache = KeyValueCache(len(rows))
    decoder.next_logits(*_stacked([rows], decoder.device, cache))
    return cache


def _joined(read: Sequence[KeyValueCache], room: int) -> KeyValueCache:
    """A cache of what is `read`, with room for so many more positions."""
    return KeyValueCache.joined(read, max(cache.length for cache in read) + room)


def _write_next(
    decoder: Decoder,
    cache: KeyValueCache,
    outputs: Sequence["_Output"],
    sampling: Sampling,
    grouped: bool,
    bar: tqdm,
) -> None:
    """The next token of each output; grouped: outputs of one request choose it together."""
    block = _stacked([output.read() for output in outputs], decoder.device, cache)
    logits_BV = decoder.next_logits(*block)
    if grouped:
        logits_BV = _mean_of_groups(logits_BV, outputs)
    chosen = _choose(logits_BV, outputs, sampling)
    for output, token, log_probability in zip(outputs, *chosen, strict=True):
        output.write(token, log_probability)
        bar.update()


def _write_codes(
    decoder: InContextDecoder,
    cache: KeyValueCache,
    outputs: Sequence["_Output"],
    count: int,
    bar: tqdm,
) -> None:
    """The next `count` codes of the images that all outputs are within."""
    steps = []
    for chosen in _codes(decoder, cache, outputs, count):
        steps.append(chosen)
        bar.update(len(outputs))
    tokens_BN, log_probabilities_BN = (
        torch.stack(column, dim=1).tolist() for column in zip(*steps, strict=True)
    )
    for output, *written in zip(outputs, tokens_BN, log_probabilities_BN, strict=True):
        for token, log_probability in zip(*written, strict=True):
            output.write(token, log_probability)
        output.skip(count)


def _codes(
    decoder: InContextDecoder, cache: KeyValueCache, outputs: Sequence["_Output"], count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The next `count` codes of the images that all outputs are within, each the most probable one:
    tokens_B and their log-probabilities_B at a time. Nothing is copied to the host, and the gates
    decide once for all.

    Only the last token of each output is unread, and it is read with the first step.
    """
    device, ids = decoder.device, outputs[0].format.vocabulary.image_range
    attributes = [output.rows[-1][2] for output in outputs]
    attributes_B1 = torch.tensor(attributes)[:, None]
    plan = RoutingPlan.of_runs([[(attribute, 1)] for attribute in attributes]).to(device)
    decisions, _ = decoder.decide(plan)
    tokens_B, positions_B = (
        torch.tensor([output.rows[-1][column] for output in outputs], device=device)
        for column in (0, 1)
    )
    linked_nBM = None
    if decoder.settings.link:
        links_nB2 = np.stack([output.links_ahead(count) for output in outputs], axis=1)
        linked_TM = decoder.linked(torch.from_numpy(links_nB2).to(device).flatten(0, 1))
        linked_nBM = linked_TM.unflatten(0, links_nB2.shape[:2])
    for step in range(count):
        attention = CachedAttention(cache, attributes_B1, device)
        x_BM = decoder.embed(
            tokens_B, positions_B + step, None if linked_nBM is None else linked_nBM[step]
        )
        hidden_BM, _ = decoder.run(x_BM, attention, plan, decisions)
        best = decoder.logits(hidden_BM, ids).log_softmax(dim=-1).max(dim=-1)
        tokens_B = best.indices + ids.start
        yield tokens_B, best.values


class _Output:
    """The growing output of one query after one group of its examples. request: the number of the
    query's request.

    tokens: written so far; log_probabilities: see `Written`. allowed: the possible next tokens, at
    least two; empty once the output is complete.
    """

    def __init__(
        self,
        codec: SequenceCodec,
        request: int,
        episode: Episode,
        query_image: np.ndarray,
        generator: np.random.Generator,
    ) -> None:
        self.request, self.examples = request, len(episode.pairs)
        self.format, self._task = codec.format, episode.task
        self._image: list[int] = codec.format.vocabulary.from_input_codes(query_image).tolist()
        self._cell = 0  # The next cell of the output image.
        self.generator = generator
        prompt = codec.encode_prompt(episode, query_image).unpadded()
        self.rows = _rows(prompt)
        """The tokens that the decoder has not read yet."""
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
        return len(self.rows)

    @property
    def cells_ahead(self) -> int:
        """How many codes of an image come next, if only the last token is unread and is of the
        image's attribute class; otherwise 0.
        """
        codes = self.format.vocabulary.image_range
        if self.unread != 1 or self.allowed != (codes,):
            return 0
        alike = self.rows[-1][2] == self._task.output_attributes(self.format, codes.start)
        return len(self._image) - self._cell if alike else 0

    def links_ahead(self, count: int) -> np.ndarray:
        """The links (count, 2) of the last token, and of the next count - 1 codes of the image that
        this output is within.
        """
        held = self._image[self._cell : self._cell + count]
        links_n2 = np.array([self.rows[-1][3:]] * count)
        links_n2[1:] = np.stack([held[1:], held[:-1]], axis=1)
        return links_n2

    def read(self) -> list[_Row]:
        """Return the tokens that the decoder has not read yet, and count them as read."""
        rows, self.rows = self.rows, []
        return rows

    def skip(self, count: int) -> None:
        """Count the first `count` unread tokens as read."""
        del self.rows[:count]

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
        attributes = self._task.output_attributes(self.format, token)
        held, image = NO_LINK, self._image
        if is_output_image(attributes):
            held = image[self._cell]
            self._cell = (self._cell + 1) % len(image)
        self._accept(token)
        draws = self.allowed == (self.format.vocabulary.image_range,)
        predicted = image[self._cell] if draws else NO_LINK
        self.rows.append((token, self._next_position, attributes, predicted, held))
        self._next_position += 1

    def _accept(self, token: int) -> None:
        self.tokens.append(token)
        self.log_probabilities.append(None)
        try:
            self.allowed = self._grammar.send(token)
        except StopIteration:
            self.allowed = ()


def _rows(sequence: TokenSequence) -> list[_Row]:
    return [tuple(row) for row in _table(sequence).tolist()]


def _table(sequence: TokenSequence) -> np.ndarray:
    """The rows of a sequence, int64 (L, 5)."""
    columns = (sequence.read_L, sequence.positions_L, sequence.attributes(), *sequence.links().T)
    return np.stack(columns, axis=1, dtype=np.int64)


def _stacked(
    rows_of: Sequence[list[_Row] | np.ndarray], device: Any, cache: AttentionCache | None = None
) -> Block:
    """The unread tokens of several sequences, padded on the left."""
    length = max(map(len, rows_of), default=0)
    block_BL5 = np.zeros((len(rows_of), length, 5), dtype=np.int64)
    block_BL5[..., 2] = PADDING
    block_BL5[..., 3:] = NO_LINK
    for number, rows in enumerate(rows_of):
        block_BL5[number, length - len(rows) :] = rows
    attributes_BL = torch.from_numpy(block_BL5[..., 2])
    block = torch.from_numpy(block_BL5).to(device)
    return Block(block[..., 0], block[..., 1], attributes_BL, cache, block[..., 3:])


def _mean_of_groups(logits_BV: torch.Tensor, outputs: Sequence[_Output]) -> torch.Tensor:
    """For each output, the logarithm of the mean of the probabilities after all groups of examples
    of its request, weighted by the sizes of the groups.
    """
    rows_of: dict[int, list[int]] = {}
    for row, output in enumerate(outputs):
        rows_of.setdefault(output.request, []).append(row)
    # A request without examples is one group, whose size must not be 0.
    sizes_B = logits_BV.new_tensor([max(1, output.examples) for output in outputs])
    mean_BV = torch.empty_like(logits_BV)
    for rows in rows_of.values():
        weights_G1 = sizes_B[rows, None] / sizes_B[rows].sum()
        mean_BV[rows] = (logits_BV[rows].log_softmax(dim=1) + weights_G1.log()).logsumexp(dim=0)
    return mean_BV


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
