"""Which parameters of a whole decoder have weight decay, and which ones Muon moves."""

from toy_model import make_config

from icl_moe.model.decoder import InContextDecoder
from icl_moe.optim.parameter_groups import muon_groups, parameter_groups


def test_matrices_decay_and_norms_biases_and_embeddings_do_not():
    decoder = InContextDecoder(make_config())
    groups = parameter_groups(decoder, weight_decay=0.05)
    decay = {
        id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]
    }
    assert (
        len(decay)
        == sum(len(group["params"]) for group in groups)
        == len(list(decoder.parameters()))
    )
    decayed = {name for name, parameter in decoder.named_parameters() if decay[id(parameter)]}
    matrices = (
        "attention.qkv.weight",
        "attention.out.weight",
        "up.weight",
        "down.weight",
        "gate.embed.weight",
        "gate.wg.weight",
    )
    assert decayed == {name for name, _ in decoder.named_parameters() if name.endswith(matrices)}
    assert {decay[id(parameter)] for parameter in decoder.parameters()} == {0.0, 0.05}
    assert not any(
        "embedding" in name or "norm" in name or name.endswith("bias") for name in decayed
    )


def test_without_weight_decay_no_group_has_any():
    assert {
        group["weight_decay"] for group in parameter_groups(InContextDecoder(make_config()), 0.0)
    } == {0.0}


def test_muon_moves_the_matrices_between_hidden_states_and_knows_the_fused_ones():
    decoder = InContextDecoder(make_config())
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    groups = muon_groups(decoder, weight_decay=0.05, rate_ratio=10.0)
    found = [(names[id(each)], group) for group in groups for each in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    for name, group in found:
        fused = name.endswith("attention.qkv.weight")
        hidden = name.endswith(("attention.out.weight", "up.weight", "down.weight"))
        gate = name.endswith(("gate.embed.weight", "gate.wg.weight"))
        assert group.get("matrices_in_one") == (3 if fused else 1 if hidden else None), name
        assert group.get("rate_ratio") == (10.0 if fused or hidden else None), name
        assert group["weight_decay"] == (0.05 if fused or hidden or gate else 0.0), name
