"""How parameters are partitioned over tensor ranks, without starting ranks; tests/distributed
trains on them.
"""

import pytest
import torch
from toy_model import make_config

from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.model.tensor_parallel import is_split, join, split

CUT = (
    "token_embedding.weight",
    "attention.qkv.weight",
    "attention.qkv.bias",
    "attention.out.weight",
    "layers.0.feed_forward.up.weight",
)


@pytest.fixture(scope="module")
def model() -> InContextDecoder:
    """Layer 0 dense, the others sparse; 1347 ids, which neither 2 nor 4 divides."""
    model = InContextDecoder(make_config())
    initialise(model, seed=0)
    return model


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_parts_join_to_the_whole(model, tp_size):
    vocabulary_size = model.config.vocabulary_size
    for name, parameter in model.named_parameters():
        parts = [split(name, parameter, rank, tp_size) for rank in range(tp_size)]
        assert len({part.shape for part in parts}) == 1, "all ranks must hold equally much"
        assert torch.equal(join(name, parts, vocabulary_size), parameter)
        if is_split(name):
            assert sum(part.numel() for part in parts) - parameter.numel() in range(
                tp_size * model.settings.width
            )
        else:
            assert all(part is parameter for part in parts)


def test_what_is_cut_is_the_vocabulary_attention_and_dense_layers(model):
    cut = {name for name, _ in model.named_parameters() if is_split(name)}
    assert all(any(name.endswith(end) for name in cut) for end in CUT)
    assert not any(
        word in name
        for name in cut
        for word in ("expert", "gate", "norm", "position", "out.bias", "down.bias")
    )
    assert "layers.0.feed_forward.down.weight" in cut


def test_each_rank_has_the_queries_keys_and_values_of_its_own_heads(model):
    name, heads, width = "layers.0.attention.qkv.weight", model.settings.heads, model.settings.width
    whole_3HDM = model.get_parameter(name).view(3, heads, -1, width)
    for rank in range(2):
        part_3HDM = split(name, model.get_parameter(name), rank, 2).view(3, heads // 2, -1, width)
        assert torch.equal(part_3HDM, whole_3HDM[:, rank * heads // 2 : (rank + 1) * heads // 2])


def test_the_vocabulary_is_padded_with_zeros(model):
    last = split("token_embedding.weight", model.token_embedding.weight, 3, 4)
    missing = -model.config.vocabulary_size % 4
    assert missing and not last[-missing:].any() and last[:-missing].any(dim=1).all()
