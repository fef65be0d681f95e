"""Code after code of an output image on buffers that stay in place, so that a CUDA graph can replay
a step: at one query a step's kernels take less time than launching them does.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from icl_moe.batch import RoutingPlan
from icl_moe.inference.cache import KeyValueCache
from icl_moe.inference.decode import Request
from icl_moe.model.decoder import InContextDecoder
from icl_moe.sequence import SequenceCodec


class StaticCodes:
    """Writes the output images of `rows` requests whose prompts have equal lengths, greedily, as
    `decode_batch` does. It holds keys and values for prompts of at most `longest` tokens.

    It supports only tasks whose output is one image, decoders without the link, and gates that read
    attributes alone: everything else needs the host. As an `AttentionScope` it attends to all
    positions that are written, over the whole of its buffers, since a graph's shapes are fixed.
    """

    def __init__(
        self, decoder: InContextDecoder, codec: SequenceCodec, rows: int, longest: int
    ) -> None:
        settings, device = decoder.settings, decoder.device
        self._decoder, self._codec = decoder, codec
        self._ids, self._count = codec.format.vocabulary.image_range, codec.format.codes_per_image
        capacity = longest + self._count
        shape = (rows, settings.heads, capacity, settings.width // settings.heads)
        # A tensor for each layer, so that torch.compile writes into it, and not into a copy of all.
        self._keys, self._values = (
            [torch.zeros(shape, device=device, dtype=decoder.dtype) for _ in decoder.layers]
            for _ in range(2)
        )
        self._steps_C = torch.arange(capacity, device=device)
        self._tokens_B, self._positions_B = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2)
        )
        # The place of the token that is read next, and the number of the code that it predicts.
        self._place_1, self._cell_1 = (
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)
        )
        self._codes_BN = torch.zeros(rows, self._count, dtype=torch.int64, device=device)
        self._plan: RoutingPlan | None = None
        self.run_step: Callable[[], None] = self.step

    @torch.no_grad()
    def write(self, requests: Sequence[Request]) -> list[list[int]]:
        """The tokens of each request's output."""
        self.read(requests)
        for _ in range(self._count - 1):
            self.run_step()
        tokens: list[list[int]] = self._codes_BN.tolist()
        return tokens

    @torch.no_grad()
    def read(self, requests: Sequence[Request]) -> None:
        """Read the prompts and choose the first code of each."""
        prompts = [self._codec.encode_prompt(*request).unpadded() for request in requests]
        device = self._decoder.device
        tokens_BL, positions_BL = (
            torch.from_numpy(np.stack(columns)).to(device)
            for columns in (
                [prompt.tokens_L for prompt in prompts],
                [prompt.positions_L for prompt in prompts],
            )
        )
        attributes_BL = torch.from_numpy(np.stack([prompt.attributes() for prompt in prompts]))
        length = tokens_BL.shape[1]
        cache = KeyValueCache(length)
        logits_BV = self._decoder.next_logits(tokens_BL, positions_BL, attributes_BL, cache)
        for layer in range(len(self._keys)):
            keys, values = cache.of_layer(layer)
            self._keys[layer][:, :, :length] = keys
            self._values[layer][:, :, :length] = values
        first, last = self._ids.start, self._ids.stop
        self._tokens_B.copy_(logits_BV[:, first:last].argmax(dim=-1) + first)
        self._positions_B.copy_(positions_BL[:, -1] + 1)
        self._place_1.fill_(length)
        self._cell_1.fill_(1)
        self._codes_BN[:, 0] = self._tokens_B
        if self._plan is None:
            format = self._codec.format
            attributes = [episode.task.output_attributes(format, first) for episode, _ in requests]
            self._plan = RoutingPlan.of_runs([[(attribute, 1)] for attribute in attributes]).to(
                device
            )
            self._decisions, _ = self._decoder.decide(self._plan)

    @torch.no_grad()
    def step(self) -> None:
        """Read the last code of each output and choose the next, in place."""
        assert self._plan is not None, "`read` comes first"
        x_BM = self._decoder.embed(self._tokens_B, self._positions_B)
        hidden_BM, _ = self._decoder.run(x_BM, self, self._plan, self._decisions)
        chosen_B = self._decoder.logits(hidden_BM, self._ids).argmax(dim=-1) + self._ids.start
        self._tokens_B.copy_(chosen_B)
        self._codes_BN.index_copy_(1, self._cell_1, chosen_B[:, None])
        for counter in (self._positions_B, self._place_1, self._cell_1):
            counter.add_(1)

    def attend(
        self, layer: int, queries_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, dropout: float
    ) -> Tensor:
        keys_BHCD, values_BHCD = self._keys[layer], self._values[layer]
        keys_BHCD.index_copy_(2, self._place_1, keys_THD[:, :, None])
        values_BHCD.index_copy_(2, self._place_1, values_THD[:, :, None])
        scale = 1 / math.sqrt(queries_THD.shape[-1])
        scores_BH1C = (queries_THD[:, :, None] * scale) @ keys_BHCD.transpose(2, 3)
        scores_BH1C = scores_BH1C.float().masked_fill(self._steps_C > self._place_1, -math.inf)
        return (scores_BH1C.softmax(dim=-1).to(values_BHCD.dtype) @ values_BHCD)[:, :, 0]

    def capture(self, requests: Sequence[Request], compiled: bool = False) -> None:
        """Record a step as a CUDA graph, which `write` replays from then on, for other requests of
        the same task too. compiled: let torch.compile fuse the step's kernels first.
        """
        step = torch.compile(self.step, dynamic=False) if compiled else self.step
        self.read(requests)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.read(requests)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        self.run_step = graph.replay
