"""The loss on episodes that the model was not trained on, over all pairs, as in training."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from icl_moe.batch import collate
from icl_moe.data.shards import ShardSet
from icl_moe.inference.model import InContextModel
from icl_moe.model.attention import EpisodeAttention
from icl_moe.model.kernels import cross_entropy
from icl_moe.sequence import TokenSequence
from icl_moe.tasks import TASKS


@dataclass(frozen=True)
class HeldOutLoss:
    """Cross-entropy under teacher forcing, in nats per target token. Targets are the tokens of
    outputs (mask codes, caption texts), of every pair or, if the model was trained so, of the query
    alone.

    loss: the mean over all targets. unigram_entropy: -sum over ids v of p(v) ln p(v), where p is
    the distribution of the same targets; no model that ignores its context can have a lower loss.
    pair_loss: the mean over the targets of the first pair, of the second, and so on. It falls along
    the pairs if a model uses its examples, but may also fall for other reasons.
    """

    targets: int
    loss: float
    unigram_entropy: float
    pair_loss: tuple[float, ...]


@torch.inference_mode()
def held_out_loss(
    model: InContextModel,
    shards: ShardSet,
    task: str,
    limit: int | None = None,
    batch_size: int = 8,
) -> HeldOutLoss:
    """The loss on the first `limit` samples of `task` (all by default), each with at most as many
    examples as the model's training episodes had. Shards and model must have the same format.
    """
    samples = min(shards.count(task), limit or shards.count(task))
    losses, labels, pairs = [], [], []
    for start in tqdm(range(0, samples, batch_size), desc=f"held-out loss, {task}", unit="batch"):
        sequences = [
            _as_trained(model, shards, task, index)
            for index in range(start, min(start + batch_size, samples))
        ]
        loss_on = model.decoder.config.loss_on
        batch = collate(sequences, model.format.vocabulary, task, loss_on=loss_on)
        batch = batch.to(model.decoder.device)
        attention = EpisodeAttention(batch.lengths, batch.real_T)
        hidden_TM, _ = model.decoder.hidden(
            batch.tokens_T, batch.positions_T, attention, batch.routing, batch.links_T2
        )
        embedding_VM = model.decoder.token_embedding.weight
        _, found_P = cross_entropy(
            hidden_TM[batch.predictors_P], embedding_VM, batch.labels_P, batch.weights_P
        )
        losses.append(found_P.double().cpu().numpy())
        labels.append(batch.labels_P.cpu().numpy())
        positions_P = batch.positions_T[batch.predictors_P].cpu().numpy()
        pairs.append((positions_P - model.format.length(0)) // model.format.pair_length)
    losses_P, pairs_P = np.concatenate(losses), np.concatenate(pairs)
    by_pair = tuple(float(losses_P[pairs_P == pair].mean()) for pair in np.unique(pairs_P))
    return HeldOutLoss(
        len(losses_P), float(losses_P.mean()), _entropy(np.concatenate(labels)), by_pair
    )


def _as_trained(model: InContextModel, shards: ShardSet, task: str, index: int) -> TokenSequence:
    """A sample's sequence, without the last of its examples if they are more than in training."""
    sample, most = shards.sample(task, index), model.decoder.config.examples
    if most is None or shards.manifest.examples <= most:
        return sample.sequence
    episode = model.codec.decode(sample.sequence, TASKS[task])
    pairs = (*episode.pairs[:most], episode.pairs[-1])
    return model.codec.encode(replace(episode, category=sample.category, pairs=pairs))


def _entropy(labels_P: np.ndarray) -> float:
    """-sum p ln p of the labels' empirical distribution, in nats."""
    _, counts = np.unique(labels_P, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
