"""A slow reference implementation of the decoder and its training loss from the published formulas,
in float64, one episode, head and routed token at a time.

It shares no code with icl_moe.model or icl_moe.data: it uses the exported names of weights, and the
tokens, position ids and spans of an episode.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from icl_moe.recipe import ModelSettings
from icl_moe.sequence import TokenSequence

Noise = Callable[[int, int], Tensor]
"""(layer, attribute class) -> the noise that is added to the gate's logits (E,)."""


_ZERO = torch.zeros((), dtype=torch.float64)


class PlainLoss(NamedTuple):
    """total: the loss of the batch. auxiliary: the mean of the layers' auxiliary losses. The rest:
    weighted sums of the cross-entropy and the sums of the weights, by modality.
    """

    total: Tensor
    auxiliary: Tensor
    image_sum: Tensor
    image_weight: Tensor
    text_sum: Tensor
    text_weight: Tensor


@dataclass(frozen=True)
class _Token:
    id: int
    position: int
    attributes: int
    weight: float


class PlainDecoder:
    """weights: by exported name, in any precision. image_ids: the ids of image codes."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        settings: ModelSettings,
        image_ids: range,
        noise: Noise | None = None,
    ) -> None:
        self.weights = {
            name: value.detach().double().requires_grad_() for name, value in weights.items()
        }
        self._settings = settings
        self._image_ids = image_ids
        self._noise = noise

    def loss(
        self, sequences: Sequence[TokenSequence], input_weight: float, auxiliary_weight: float
    ) -> PlainLoss:
        """total = sum of w (-log p) / sum of w + auxiliary_weight * mean over layers of the
        auxiliary loss, which is E * sum over experts of (mean probability) x (share of tokens whose
        first expert it is) of each episode, averaged over the episodes.
        """
        losses: dict[str, list[Tensor]] = {"image": [_ZERO], "text": [_ZERO]}
        weights: dict[str, list[Tensor]] = {"image": [_ZERO], "text": [_ZERO]}
        auxiliary: list[Tensor] = []
        for sequence in sequences:
            tokens = _tokens(sequence, input_weight)
            hidden_LM, of_episode = self._hidden(tokens)
            auxiliary += of_episode
            for before_M, token in zip(hidden_LM[:-1], tokens[1:], strict=True):
                if token.weight:
                    logits_V = self.weights["token_embedding.weight"] @ before_M
                    modality = "image" if token.id in self._image_ids else "text"
                    losses[modality].append(
                        token.weight * (logits_V.logsumexp(0) - logits_V[token.id])
                    )
                    weights[modality].append(_ZERO + token.weight)
        image, text = (torch.stack(losses[modality]).sum() for modality in ("image", "text"))
        of_image, of_text = (torch.stack(weights[modality]).sum() for modality in ("image", "text"))
        mean = torch.stack(auxiliary).mean() if auxiliary else _ZERO
        total = (image + text) / (of_image + of_text) + auxiliary_weight * mean
        return PlainLoss(total, mean, image, of_image, text, of_text)

    def _hidden(self, tokens: list[_Token]) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (L, M) of one episode, and the auxiliary loss of each sparse layer."""
        s, w = self._settings, self.weights
        x_LM = torch.stack(
            [
                w["token_embedding.weight"][token.id]
                + w["position_embedding.weight"][token.position]
                for token in tokens
            ]
        )
        auxiliary = []
        for layer in range(s.layers):
            name = f"layers.{layer}"
            x_LM = x_LM + self._attention(
                f"{name}.attention",
                self._norm(f"{name}.attention_norm", x_LM, s.layer_norm_epsilon),
            )
            normed_LM = self._norm(f"{name}.feed_forward_norm", x_LM, s.layer_norm_epsilon)
            if layer in s.sparse_layers:
                out_LM, loss = self._experts(layer, normed_LM, tokens)
                auxiliary.append(loss)
            else:
                out_LM = _mlp(normed_LM, *self._mlp_weights(f"{name}.feed_forward"))
            x_LM = x_LM + out_LM
        return self._norm("norm", x_LM, s.layer_norm_epsilon), auxiliary

    def _norm(self, name: str, x: Tensor, epsilon: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return centred / spread * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _attention(self, name: str, x_LM: Tensor) -> Tensor:
        w, width = self.weights, self._settings.width
        size = width // self._settings.heads
        qkv_L3M = x_LM @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"]
        heads = []
        for head in range(self._settings.heads):
            q, k, v = (
                qkv_L3M[:, part * width + head * size : part * width + (head + 1) * size]
                for part in range(3)
            )
            weights_LL = (q @ k.T / math.sqrt(size)).exp().tril()
            heads.append(weights_LL / weights_LL.sum(1, keepdim=True) @ v)
        return torch.cat(heads, dim=1) @ w[f"{name}.out.weight"].T + w[f"{name}.out.bias"]

    def _mlp_weights(self, name: str) -> list[Tensor]:
        return [self.weights[f"{name}.{n}"] for n in _MLP]

    def _experts(self, layer: int, x_LM: Tensor, tokens: list[_Token]) -> tuple[Tensor, Tensor]:
        s, name = self._settings, f"layers.{layer}.feed_forward"
        rows, probabilities, first = [], [], torch.zeros(s.experts, dtype=torch.float64)
        for x_M, token in zip(x_LM, tokens, strict=True):
            p_E = self._gate(layer, x_M, token.attributes)
            best = p_E.argsort(descending=True).tolist()[: s.experts_per_token]
            total = sum(p_E[e] for e in best) if len(best) > 1 else 1.0
            parts = [(p_E[e] / total, self._mlp_weights(f"{name}.experts.{e}")) for e in best]
            if s.combination == "weights":
                columns = zip(*([share * w for w in ws] for share, ws in parts), strict=True)
                rows.append(_mlp(x_M, *(sum(column) for column in columns)))
            else:
                rows.append(sum(share * _mlp(x_M, *ws) for share, ws in parts))
            probabilities.append(p_E)
            first[best[0]] += 1 / len(tokens)
        if s.gate_input == "none":
            return torch.stack(rows), torch.zeros((), dtype=torch.float64)
        return torch.stack(rows), s.experts * (torch.stack(probabilities).mean(0) * first).sum()

    def _gate(self, layer: int, x_M: Tensor, attributes: int) -> Tensor:
        """p = softmax(W_g h), where h is the token, LayerNorm(W_t a + b_t) of its attribute bits a,
        or the sum of both.
        """
        s, name = self._settings, f"layers.{layer}.feed_forward.gate"
        if s.gate_input == "none":
            writes_text, target = attributes >> 3 & 1, attributes >> 6 & 1
            own = (2 * writes_text + target) % s.experts
            return torch.eye(s.experts, dtype=torch.float64)[own]
        reads = s.gate_input if s.feed_forward == "attributes" else "token"
        h_M = x_M if "token" in reads else torch.zeros_like(x_M)
        if "attributes" in reads:
            w, inner = self.weights, f"{name}.attributes" if "token" in reads else name
            bits = torch.tensor([attributes >> i & 1 for i in range(8)], dtype=torch.float64)
            embedded_M = w[f"{inner}.embed.weight"] @ bits + w[f"{inner}.embed.bias"]
            h_M = h_M + self._norm(f"{inner}.norm", embedded_M, 1e-5)
        logits_E = self.weights[f"{name}.wg.weight"] @ h_M
        if self._noise is not None:
            logits_E = logits_E + self._noise(layer, attributes)
        return logits_E.softmax(0)


_MLP = ("up.weight", "up.bias", "down.weight", "down.bias")


def _mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """GPT-2's MLP, with the tanh approximation of the GELU (Hendrycks and Gimpel 2016, arXiv
    1606.08415).
    """
    h = x @ up.T + up_bias
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return gelu @ down.T + down_bias


def _tokens(sequence: TokenSequence, input_weight: float) -> list[_Token]:
    """The tokens of an episode without padding. Outputs have the loss weight 1, input images
    `input_weight`, all other tokens 0.
    """
    weights = {"output": 1.0, "input": input_weight}
    return [
        _Token(
            int(sequence.tokens_L[i]),
            int(sequence.positions_L[i]),
            span.attributes,
            weights.get(span.role, 0.0),
        )
        for span in sequence.spans
        if span.role != "padding"
        for i in range(span.start, span.stop)
    ]
