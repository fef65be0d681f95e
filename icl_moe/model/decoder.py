"""The decoder: a GPT-2-style trunk whose feed-forwards are dense or sparse, one class for training
and inference.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedModel

from icl_moe.batch import RoutingPlan, TokenBatch
from icl_moe.model.attention import (
    AttentionCache,
    AttentionScope,
    CachedAttention,
    EpisodeAttention,
    SelfAttention,
)
from icl_moe.model.config import DecoderConfig
from icl_moe.model.feed_forward import FeedForward, SparseFeedForward
from icl_moe.model.kernels import Linear, cross_entropy
from icl_moe.model.loss import DecoderLoss, combine
from icl_moe.model.moe import Decision
from icl_moe.model.router import GATE, decide
from icl_moe.recipe import ModelSettings
from icl_moe.seeds import stable_seed
from icl_moe.sequence import NO_LINK, SequenceFormat
from icl_moe.vocabulary import stage_rows


class InContextDecoder(PreTrainedModel):
    """Token ids of both modalities in, logits over the one vocabulary out; input and output
    embeddings are tied.

    sparse_layer: builds the feed-forward of a sparse layer from (settings, layer); training passes
    that of deepspeed.moe (icl_moe.model.deepspeed_moe), inference uses the plain default.
    auxiliary_weight: the weight of the auxiliary loss in `forward`.
    """

    config_class = DecoderConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = [GATE]  # noqa: RUF012

    def __init__(
        self,
        config: DecoderConfig,
        sparse_layer: Callable[[ModelSettings, int], nn.Module] = SparseFeedForward,
        auxiliary_weight: float = 0.02,
    ) -> None:
        super().__init__(config)
        settings = config.settings
        self.settings = settings
        self.auxiliary_weight = auxiliary_weight
        self.gradient_checkpointing = False
        # Tensor-parallel training replaces this, for a vocabulary that is spread over ranks.
        self.target_losses = cross_entropy
        self._vocabulary = config.token_vocabulary
        self.token_embedding = nn.Embedding(self._vocabulary.size, settings.width)
        self.position_embedding = nn.Embedding(settings.positions, settings.width)
        if settings.link:
            self.link = Linear(settings.width, settings.width, bias=False)
        self.layers = nn.ModuleList(
            DecoderLayer(
                settings,
                layer,
                sparse_layer(settings, layer)
                if layer in settings.sparse_layers
                else FeedForward(settings.width),
            )
            for layer in range(settings.layers)
        )
        self.norm = nn.LayerNorm(settings.width, eps=settings.layer_norm_epsilon)
        self.post_init()

    @property
    def sequence_format(self) -> SequenceFormat:
        return self.config.sequence_format

    def forward(self, batch: TokenBatch, noise: tuple[int, int] | None = None) -> DecoderLoss:
        """The loss of a micro-batch; `noise` is (seed, step) of the gate noise, used in training
        mode only.
        """
        attention = EpisodeAttention(batch.lengths, batch.real_T)
        routing = batch.routing.with_noise(noise)
        hidden_TM, auxiliary = self.hidden(
            batch.tokens_T, batch.positions_T, attention, routing, batch.links_T2
        )
        predictors_PM = hidden_TM.index_select(0, batch.predictors_P)
        weighted_sum, losses_P = self.target_losses(
            predictors_PM, self.token_embedding.weight, batch.labels_P, batch.weights_P
        )
        return combine(
            weighted_sum,
            losses_P,
            batch.weights_P,
            batch.visual_P,
            batch.loss_scale,
            auxiliary,
            self.auxiliary_weight,
        )

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: AttentionScope,
        routing: RoutingPlan,
        links_T2: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (T, M) after the last norm, of a stream of tokens, and the auxiliary loss
        of each layer that has one. links_T2: its `TokenSequence.links`, which a model with a link
        must have.
        """
        decisions, auxiliary = self.decide(routing)
        linked_TM = None
        if self.settings.link:
            assert links_T2 is not None, "a model with the link needs the links of its sequences"
            linked_TM = self.linked(links_T2)
        x_TM = self.embed(tokens_T, positions_T, linked_TM)
        hidden_TM, of_tokens = self.run(x_TM, attention, routing, decisions)
        return hidden_TM, auxiliary + of_tokens

    def decide(self, routing: RoutingPlan) -> tuple[dict[int, Decision], list[Tensor]]:
        """The decisions of the gates that read attributes alone, by layer, and their auxiliary
        losses. On a GPU it waits for the device once.
        """
        gates = {
            number: gate
            for number, layer in enumerate(self.layers)
            if (gate := getattr(layer.feed_forward, "stream_gate", None)) is not None
        }
        return decide(gates, routing)

    def embed(
        self, tokens_T: Tensor, positions_T: Tensor, linked_TM: Tensor | None = None
    ) -> Tensor:
        """What the first layer reads (T, M); `linked_TM` is what `linked` adds in a model with the
        link.
        """
        x_TM = self.embed_tokens(tokens_T) + self.position_embedding(positions_T)
        return x_TM if linked_TM is None else x_TM + linked_TM

    def embed_tokens(self, tokens_T: Tensor) -> Tensor:
        """The vectors E[token] (T, M); that of a features code of several stages is the sum of its
        stages' rows, see `Vocabulary`.
        """
        vocabulary = self._vocabulary
        if vocabulary.feature_stages == 1:
            embedded_TM: Tensor = self.token_embedding(tokens_T)
            return embedded_TM
        first = vocabulary.feature_range.start
        is_feature_T = tokens_T >= first
        rows = stage_rows(tokens_T - first, vocabulary.features, vocabulary.feature_stages)
        # Another token has one row, its own.
        rows_ST = torch.where(is_feature_T, first + torch.stack(rows), tokens_T)
        is_used_ST1 = is_feature_T[:, None].repeat(len(rows), 1, 1)
        is_used_ST1[0] = True
        return (self.token_embedding(rows_ST) * is_used_ST1).sum(dim=0)

    def run(
        self,
        x_TM: Tensor,
        attention: AttentionScope,
        routing: RoutingPlan,
        decisions: dict[int, Decision],
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers and the last norm after `embed`: hidden states (T, M), and the auxiliary loss
        of each layer whose gate reads tokens.
        """
        auxiliary = []
        x_TM = F.dropout(x_TM, self.settings.dropout, self.training)
        for number, layer in enumerate(self.layers):
            inputs = x_TM, attention, routing, decisions.get(number)
            if self.gradient_checkpointing and self.training:
                x_TM = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x_TM = layer(*inputs)
            if (loss := getattr(layer.feed_forward, "auxiliary_loss", None)) is not None:
                auxiliary.append(loss)
        return self.norm(x_TM), auxiliary

    def linked(self, links_T2: Tensor) -> Tensor:
        """sum over the links c of each position of W E[c], (T, M): the link of a position that
        predicts or holds a cell of an output image to that cell in the input image.

        W is applied once to each distinct code. If a batch has no link, W and E take part
        nevertheless, with a gradient of zero, so that ranks with different batches reduce the same
        parameters.
        """
        codes_U, rows_T2 = links_T2.unique(return_inverse=True)
        table_UM = self.link(self.embed_tokens(codes_U.clamp(min=0)))
        table_UM = table_UM * (codes_U != NO_LINK).unsqueeze(1)
        return F.embedding(rows_T2, table_UM).sum(dim=1)

    def forward_logits(
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        attributes_BL: Tensor,
        links_BL2: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V), float32, at every position. Tokens of attribute class 0 are padding, to
        which no token attends. links_BL2: see `hidden`.
        """
        length = tokens_BL.shape[1]
        return self.last_logits(length, tokens_BL, positions_BL, attributes_BL, links_BL2=links_BL2)

    def next_logits(
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        attributes_BL: Tensor,
        cache: AttentionCache | None = None,
        links_BL2: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, V), float32, of the token after the last position of each row; see
        `last_logits`.
        """
        return self.last_logits(1, tokens_BL, positions_BL, attributes_BL, cache, links_BL2)[:, 0]

    def last_logits(
        self,
        count: int,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        attributes_BL: Tensor,
        cache: AttentionCache | None = None,
        links_BL2: Tensor | None = None,
        ids: range | None = None,
    ) -> Tensor:
        """Logits (B, count, V), float32, of the tokens after each of the last `count` positions of
        each row; only of the token ids `ids`, if given.

        With a cache, the rows hold the tokens that are new since the last call. Padding (attribute
        class 0) is on the left. links_BL2: see `hidden`. The routing is planned on the host, so
        attributes_BL should be there, whatever the device of the rest.
        """
        if cache is None:
            attention: AttentionScope = self._episodes(attributes_BL, tokens_BL.device)
        else:
            attention = CachedAttention(cache, attributes_BL, tokens_BL.device)
        hidden_TM, _ = self.hidden(
            tokens_BL.flatten(),
            positions_BL.flatten(),
            attention,
            RoutingPlan.of_rows(attributes_BL.cpu().numpy()).to(tokens_BL.device),
            None if links_BL2 is None else links_BL2.flatten(0, 1),
        )
        return self.logits(hidden_TM.unflatten(0, tokens_BL.shape)[:, -count:], ids)

    def _episodes(self, attributes_BL: Tensor, device: torch.device) -> EpisodeAttention:
        """Rows of equal length, each an episode, in which attribute class 0 is padding."""
        rows, length = attributes_BL.shape
        real_T = attributes_BL.flatten() != 0
        return EpisodeAttention((length,) * rows, None if real_T.all() else real_T.to(device))

    def logits(self, hidden: Tensor, ids: range | None = None) -> Tensor:
        """Logits (.., V), float32, of hidden states (.., M); only of the token ids `ids`, if
        given.
        """
        weight_VM = self.token_embedding.weight
        assert weight_VM.shape[0] == self._vocabulary.size, (
            "a tensor rank has logits of a part of the vocabulary"
        )
        return F.linear(
            hidden, weight_VM if ids is None else weight_VM[ids.start : ids.stop]
        ).float()

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: `initialise` draws the weights of a new model, and a loaded one has them
        all.
        """


class DecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward, each with its residual and hidden dropout."""

    def __init__(self, settings: ModelSettings, layer: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.dropout = settings.dropout
        self.attention_norm = nn.LayerNorm(settings.width, eps=settings.layer_norm_epsilon)
        self.attention = SelfAttention(settings, layer)
        self.feed_forward_norm = nn.LayerNorm(settings.width, eps=settings.layer_norm_epsilon)
        self.feed_forward = feed_forward

    def forward(
        self,
        x_TM: Tensor,
        attention: AttentionScope,
        routing: RoutingPlan,
        decision: Decision | None = None,
    ) -> Tensor:
        """decision: the decision of the feed-forward's gate, if it decides for whole streams."""
        x_TM = x_TM + self._drop(self.attention(self.attention_norm(x_TM), attention))
        normed_TM = self.feed_forward_norm(x_TM)
        dense = isinstance(self.feed_forward, FeedForward)
        return x_TM + self._drop(
            self.feed_forward(normed_TM)
            if dense
            else self.feed_forward(normed_TM, routing, decision)
        )

    def _drop(self, x_TM: Tensor) -> Tensor:
        return F.dropout(x_TM, self.dropout, self.training)


def initialise(
    model: InContextDecoder, seed: int, exported_name: Callable[[str], str] = lambda name: name
) -> None:
    """Draw a new model's weights.

        gpt2    N(0, 0.02^2), as GPT-2 does
        fan_in  embeddings and the link N(0, 1 / M), other matrices N(0, 1 / fan_in); then W_k = W_q
                in every layer, so that at the start a token attends to tokens like itself

    Both divide residual projections by sqrt(2 x layers); biases are 0, norms 1; the link's matrix
    is N(0, 1 / M). Every parameter has its own stream, from the seed and its exported name (an
    expert's is its global id), so the weights do not depend on how the model is spread over ranks,
    and experts differ from each other.
    """
    fan_in = model.settings.initialisation == "fan_in"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = exported_name(name)
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name.split(".")[-2]:
                parameter.fill_(1.0)
            else:
                # An embedding's rows are vectors of width M, a linear layer's of its fan-in.
                std = parameter.shape[1] ** -0.5 if fan_in or name == "link.weight" else 0.02
                if name.endswith(("attention.out.weight", ".down.weight")):
                    std /= math.sqrt(2 * model.settings.layers)
                parameter.copy_(_normal(seed, name, parameter.shape) * std)
        for layer in range(model.settings.layers) if fan_in else ():
            fused = model.get_parameter(f"layers.{layer}.attention.qkv.weight")
            queries, keys, _ = fused.chunk(3)
            keys.copy_(queries)


@torch.no_grad()
def start_from_codebook(
    model: InContextDecoder,
    vectors_KC: Tensor,
    frequencies_K: Tensor,
    first: int,
    seed: int,
    whiten: bool = True,
    stages: int = 1,
) -> None:
    """Set the embeddings of a tokenizer's K codes, the ids from `first` on, to z R, each row then
    to norm 1.

    z: the codes' vectors, less their mean and, to whiten them, over their standard deviation by
    channel, both weighted by the codes' frequencies; R: a map C x M drawn from N(0, 1) by the seed.
    So codes that look alike get similar embeddings. Of a features tokenizer of several `stages`,
    whose vectors follow each other, this is of the K codes of the first; those of the others get
    z R times the mean factor by which the first stage's rows came to norm 1.
    """
    vectors_KC, *further = vectors_KC.chunk(stages)
    shares_K1 = (frequencies_K / frequencies_K.sum()).unsqueeze(1)
    centred_KC = vectors_KC - (shares_K1 * vectors_KC).sum(dim=0)
    if whiten:
        deviation_C = (shares_K1 * centred_KC.square()).sum(dim=0).sqrt()
        centred_KC = centred_KC / deviation_C.clamp(min=1e-12)
    weight_VM = model.token_embedding.weight
    map_CM = _normal(seed, "codebook", (vectors_KC.shape[1], weight_VM.shape[1]))
    projected_KM = centred_KC @ map_CM
    rows_KM = F.normalize(projected_KM, dim=1)
    factor = (shares_K1 / projected_KM.norm(dim=1, keepdim=True).clamp(min=1e-12)).sum()
    rows_KM = torch.cat([rows_KM, *(stage_KC @ map_CM * factor for stage_KC in further)])
    weight_VM[first : first + len(rows_KM)] = rows_KM


@torch.no_grad()
def extend_codebook(model: InContextDecoder, vectors_SKC: Tensor, first: int, known: int) -> None:
    """Set the embeddings of the codes of a features tokenizer's further stages, in a model that has
    learned those of its first `known` stages, to z W. first: the first id of the codes.

    vectors_SKC: the vectors z of the K codes of each stage. W: the map of least squares from the
    vectors of the known codes to their embeddings, both less their means over a stage. So a cell
    starts with about the embedding that the model would have learned for a code that is just like
    the cell.
    """
    weight_VM = model.token_embedding.weight
    stages, codes, _ = vectors_SKC.shape
    rows_SKM = weight_VM[first : first + stages * codes].unflatten(0, (stages, codes))
    centred_KC, centred_KM = (
        (stages_SKX[:known] - stages_SKX[:known].mean(dim=1, keepdim=True)).flatten(0, 1)
        for stages_SKX in (vectors_SKC, rows_SKM)
    )
    map_CM = torch.linalg.lstsq(centred_KC, centred_KM).solution
    rows_SKM[known:] = vectors_SKC[known:] @ map_CM


def _normal(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(stable_seed("weights", seed, name))
    return torch.randn(tuple(shape), generator=generator)


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModel.register(DecoderConfig, InContextDecoder)
