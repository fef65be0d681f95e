import numpy as np
import pytest
import torch

from icl_moe.data.shards import ShardSet
from icl_moe.evaluation.held_out import held_out_loss
from icl_moe.inference.model import InContextModel


@pytest.mark.parametrize("task", ["segmentation", "captioning"])
@torch.inference_mode()
def test_the_loss_is_the_mean_over_targets_of_what_the_model_gives_the_true_token(
    task, toy_model_folder, toy_shards
):
    """Compared with the model's logits at every position of whole sequences in the padded layout,
    one at a time.
    """
    model, shards = InContextModel.from_pretrained(toy_model_folder), ShardSet(toy_shards)
    losses, targets, pairs = [], [], []
    for index in range(shards.count(task)):
        sequence = shards.sample(task, index).sequence
        inputs = [
            torch.from_numpy(np.asarray(x, dtype=np.int64))[None]
            for x in (sequence.tokens_L, sequence.positions_L, sequence.attributes())
        ]
        log_probabilities = model.decoder.forward_logits(*inputs)[0].log_softmax(-1)
        for position in np.flatnonzero(sequence.loss_weights()):
            token = int(sequence.tokens_L[position])
            losses.append(-float(log_probabilities[position - 1, token]))
            targets.append(token)
            pairs.append((position - model.format.prompt_length) // model.format.pair_length)
    shares = np.array([targets.count(token) for token in set(targets)]) / len(targets)
    result = held_out_loss(model, shards, task, batch_size=3)
    assert result.targets == len(targets)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    by_pair = [
        np.mean([loss for loss, p in zip(losses, pairs, strict=True) if p == pair])
        for pair in range(3)
    ]
    assert result.pair_loss == pytest.approx(by_pair, rel=1e-4)
