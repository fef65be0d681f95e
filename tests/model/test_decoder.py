"""The decoder compared with independent references: Hugging Face's GPT-2, and a mixture of experts
computed token by token.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_model import CODES, VOCABULARY, make_batch, make_config, make_sequences
from transformers import GPT2Config, GPT2LMHeadModel

from icl_moe.attributes import attribute_bits
from icl_moe.batch import RoutingPlan, collate
from icl_moe.model.attention import EpisodeAttention
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import (
    InContextDecoder,
    extend_codebook,
    initialise,
    start_from_codebook,
)
from icl_moe.model.deepspeed_moe import exported_name, sparse_layer_factory
from icl_moe.model.feed_forward import SparseFeedForward
from icl_moe.model.router import TokenGate, decide
from icl_moe.recipe import ModelSettings, TrainingRecipe
from icl_moe.sequence import NO_LINK
from icl_moe.settings import load_recipe, to_dict


def build(config, **options: object) -> InContextDecoder:
    model = InContextDecoder(config, **options)
    initialise(model, seed=0, exported_name=exported_name)
    return model


def loss_and_gradients(model, batch, **options: object) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(batch, **options).total
    loss.backward()
    gradients = {
        exported_name(name): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return loss.item(), gradients


def gpt2_like(model: InContextDecoder) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 with the same weights; its Conv1D stores matrices transposed."""
    s = model.settings
    config = GPT2Config(
        vocab_size=model.config.vocabulary_size,
        n_positions=s.positions,
        n_embd=s.width,
        n_layer=s.layers,
        n_head=s.heads,
        layer_norm_epsilon=s.layer_norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    peer = GPT2LMHeadModel(config).eval()
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    state = {
        "transformer.wte.weight": model.token_embedding.weight,
        "transformer.wpe.weight": model.position_embedding.weight,
    }
    state |= {f"transformer.ln_f.{kind}": getattr(model.norm, kind) for kind in ("weight", "bias")}
    for i, layer in enumerate(model.layers):
        for ours, theirs in names.items():
            module = layer.get_submodule(ours)
            weight = module.weight if "norm" in ours else module.weight.T
            state |= {
                f"transformer.h.{i}.{theirs}.weight": weight,
                f"transformer.h.{i}.{theirs}.bias": module.bias,
            }
    missing, surplus = peer.load_state_dict(state, strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}
    return peer


def test_dense_equals_hugging_face_gpt2_in_logits_and_gradients():
    model = build(make_config(feed_forward="dense"))
    peer = gpt2_like(model)
    tokens_BL = torch.randint(
        0, model.config.vocabulary_size, (2, 40), generator=torch.Generator().manual_seed(0)
    )
    positions_BL = torch.arange(40).expand(2, -1)
    ours = model.forward_logits(tokens_BL, positions_BL, torch.full_like(tokens_BL, 5))
    theirs = peer(tokens_BL).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten()).backward()
    torch.testing.assert_close(
        model.token_embedding.weight.grad, peer.transformer.wte.weight.grad, atol=1e-6, rtol=1e-4
    )
    for layer, block in zip(model.layers, peer.transformer.h, strict=True):
        torch.testing.assert_close(
            layer.attention.qkv.weight.grad, block.attn.c_attn.weight.grad.T, atol=1e-6, rtol=1e-4
        )
        torch.testing.assert_close(
            layer.feed_forward.up.weight.grad, block.mlp.c_fc.weight.grad.T, atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("feed_forward", "tags", "parameters"),
    [
        ("attributes", False, 324_458_496),
        ("attributes", True, 325_230_336),
        ("token", False, 324_407_808),
    ],
)
@pytest.mark.parametrize(
    "sparse_layer", [SparseFeedForward, sparse_layer_factory()], ids=["inference", "training"]
)
def test_paper_256_has_the_papers_parameters(feed_forward, tags, parameters, sparse_layer):
    recipe = load_recipe(
        TrainingRecipe,
        "paper_256",
        [f"model.feed_forward={feed_forward}", f"vocabulary.tags={tags}"],
    )
    with torch.device("meta"):
        model = InContextDecoder(DecoderConfig.from_recipe(recipe), sparse_layer)
    assert sum(p.numel() for p in model.parameters()) == parameters


ROUTINGS = {
    "stock tokens": {"feed_forward": "token"},
    "attributes": {"feed_forward": "attributes"},
    "merged weights": {"feed_forward": "attributes", "combination": "weights"},
    "our gate on tokens": {"feed_forward": "attributes", "gate_input": "token"},
    "tokens and attributes": {"feed_forward": "attributes", "gate_input": "token+attributes"},
}
routings = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())


def merged_expert(experts: list[nn.Module], weights: list[Tensor], x_M: Tensor) -> Tensor:
    """The output of one expert whose weights are the weighted sum of the experts' weights."""

    def merged(name: str) -> Tensor:
        return sum(
            w * expert.get_parameter(name) for w, expert in zip(weights, experts, strict=True)
        )

    hidden = F.gelu(merged("up.weight") @ x_M + merged("up.bias"), approximate="tanh")
    return merged("down.weight") @ hidden + merged("down.bias")


def reference_mixture(layer: SparseFeedForward, x_TM: Tensor, attributes_T: list[int]) -> Tensor:
    """x_out = sum over the top-k of G(x)_i FFN_i(x), token by token, as in the formula."""
    gate, rows = layer.gate, []
    k = gate.experts_per_token
    for x_M, attributes in zip(x_TM, attributes_T, strict=True):
        if isinstance(gate, TokenGate):
            h_M = x_M
            if hasattr(gate, "attributes") and attributes:
                bits = torch.tensor(attribute_bits(attributes), dtype=torch.float32)
                h_M = x_M + gate.attributes.norm(
                    gate.attributes.embed.weight @ bits + gate.attributes.embed.bias
                )
        elif attributes == 0:
            rows.append(torch.zeros_like(x_M))
            continue
        else:
            bits = torch.tensor(attribute_bits(attributes), dtype=torch.float32)
            h_M = gate.norm(gate.embed.weight @ bits + gate.embed.bias)
        p_E = (gate.wg.weight @ h_M).softmax(dim=0)
        best = sorted(range(len(p_E)), key=lambda i: -p_E[i].item())[:k]
        total = sum(p_E[i] for i in best) if k > 1 else torch.tensor(1.0)
        if layer.combination == "weights":
            rows.append(
                merged_expert([layer.experts[i] for i in best], [p_E[i] / total for i in best], x_M)
            )
        else:
            rows.append(sum(p_E[i] / total * layer.experts[i](x_M) for i in best))
    return torch.stack(rows)


@routings
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    "attributes_T", [[7] * 9 + [0] * 2 + [3] * 2 + [7, 0, 9], [5] * 6], ids=["uneven", "one class"]
)
def test_sparse_layer_equals_the_formula_token_by_token(routing, k, attributes_T):
    torch.manual_seed(0)
    settings = ModelSettings(
        layers=2,
        layers_with_experts=(1,),
        width=16,
        heads=2,
        experts=8,
        experts_per_token=k,
        **routing,
    )
    layer = SparseFeedForward(settings, 1)
    x_TM = torch.randn(len(attributes_T), 16, requires_grad=True)
    plan = RoutingPlan.of_rows(np.array([attributes_T]))
    gates = {} if layer.stream_gate is None else {1: layer.stream_gate}
    out = layer(x_TM, plan, decide(gates, plan)[0].get(1))
    reference = reference_mixture(layer, x_TM, attributes_T)
    torch.testing.assert_close(out, reference, atol=1e-6, rtol=1e-5)

    def gradients(value: Tensor) -> list[Tensor]:
        wanted = [x_TM, *layer.parameters()]
        found = torch.autograd.grad(value.square().sum(), wanted, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]

    for ours, theirs in zip(gradients(out), gradients(reference), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@routings
@pytest.mark.parametrize("task", ["segmentation", "captioning"])
@pytest.mark.parametrize("k", [1, 2])
def test_deepspeed_layers_equal_the_plain_ones(routing, task, k, one_rank):
    compare_with_deepspeed(make_config(**routing, experts_per_token=k), task, one_rank)


@pytest.mark.parametrize("task", ["segmentation", "captioning"])
def test_deepspeed_layers_without_a_gate_equal_the_plain_ones(task, one_rank):
    routing = {"feed_forward": "attributes", "gate_input": "none", "experts_per_token": 1}
    compare_with_deepspeed(make_config(**routing), task, one_rank)


def compare_with_deepspeed(config, task, one_rank):
    plain, trained = build(config), one_rank(build(config, sparse_layer=sparse_layer_factory()))
    batch = make_batch(task, 4)
    (loss, gradients), (expected, reference) = (
        loss_and_gradients(trained, batch),
        loss_and_gradients(plain, batch),
    )
    assert loss == pytest.approx(expected, abs=1e-6)
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("task", ["segmentation", "captioning"])
@pytest.mark.parametrize(
    "routing", [{"feed_forward": "dense"}, *ROUTINGS.values()], ids=["dense", *ROUTINGS]
)
def test_packed_and_padded_layouts_give_equal_losses_and_gradients(task, routing):
    model = build(make_config(**routing), auxiliary_weight=0.5)
    packed, padded = (
        loss_and_gradients(model, make_batch(task, 4, layout, input_weight=0.5))
        for layout in ("packed", "padded")
    )
    assert packed[0] == pytest.approx(padded[0], abs=1e-6)
    for name, gradient in packed[1].items():
        torch.testing.assert_close(gradient, padded[1][name], atol=1e-6, rtol=1e-4)


def test_attention_stays_inside_an_episode():
    model = build(make_config())
    sequences = make_sequences("captioning", 3)
    alone = sum(
        model(collate([s], VOCABULARY, "captioning", loss_scale=1.0)).text_sum.item()
        for s in sequences
    )
    together = model(collate(sequences, VOCABULARY, "captioning", loss_scale=1.0)).text_sum.item()
    assert together == pytest.approx(alone, rel=1e-5)


def test_auxiliary_loss_is_gshards_per_episode_and_reaches_the_gate(one_rank):
    model = one_rank(
        build(
            make_config(feed_forward="attributes"),
            sparse_layer=sparse_layer_factory(),
            auxiliary_weight=1.0,
        )
    )
    batch = make_batch("captioning", 3)
    loss = model(batch)
    plan, expected = batch.routing, []
    for layer in (1, 2):
        probabilities_CE = model.layers[layer].feed_forward.deepspeed_moe.gate.probabilities(
            plan.classes
        )
        for shares_C in plan.shares_BC:
            mean_E = sum(share * p_E for share, p_E in zip(shares_C, probabilities_CE, strict=True))
            first_E = torch.zeros(8)
            for share, p_E in zip(shares_C, probabilities_CE, strict=True):
                first_E[int(p_E.argmax())] += share
            expected.append(8 * (mean_E * first_E).sum())
    assert loss.auxiliary.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    gate = model.layers[1].feed_forward.deepspeed_moe.gate.wg.weight
    without = torch.autograd.grad(
        loss.total - torch.stack(expected).mean(), gate, retain_graph=True
    )[0]
    assert not torch.allclose(torch.autograd.grad(loss.total, gate)[0], without)


TOKEN_ROUTINGS = {name: ROUTINGS[name] for name in ROUTINGS if "token" in name}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("routing", TOKEN_ROUTINGS.values(), ids=TOKEN_ROUTINGS.keys())
@pytest.mark.parametrize("training", [False, True], ids=["plain", "stock"])
def test_the_auxiliary_loss_of_token_gates_is_gshards_per_episode_without_padding(
    routing, k, training, one_rank
):
    config = make_config(**routing, experts_per_token=k, layers_with_experts=(1,))
    model = build(config)
    if training:
        model = one_rank(build(config, sparse_layer=sparse_layer_factory()))
    layer, gate_inputs = model.layers[1].feed_forward, []
    gate = layer.deepspeed_moe.gate if training else layer.gate
    gate.register_forward_hook(lambda _, inputs, __: gate_inputs.append(inputs[0]))
    batch = make_batch("captioning", 3, "padded")
    assert batch.real_T is not None
    loss = model(batch)
    (x_TM,), plan = gate_inputs, batch.routing
    if hasattr(gate, "attributes"):
        x_TM = x_TM + gate.attributes(plan)
    p_TE, expected = (x_TM @ gate.wg.weight.T).softmax(dim=-1), []
    for p_LE, real_L in zip(
        p_TE.split(batch.lengths), batch.real_T.split(batch.lengths), strict=True
    ):
        first_E = p_LE[real_L].argmax(dim=-1).bincount(minlength=8) / int(real_L.sum())
        expected.append(8 * (p_LE[real_L].mean(dim=0) * first_E).sum())
    expected = torch.stack(expected).mean()
    assert loss.auxiliary.item() == pytest.approx(expected.item(), rel=1e-5)
    model.auxiliary_weight, parameters = 1.0, [gate.wg.weight, model.token_embedding.weight]
    with_it = torch.autograd.grad(model(batch).total, parameters)
    model.auxiliary_weight = 0.0
    without = torch.autograd.grad(model(batch).total, parameters)
    wanted = torch.autograd.grad(expected, parameters)
    for ours, rest, gradient in zip(with_it, without, wanted, strict=True):
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(ours - rest, gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_the_division_into_micro_batches_changes_no_loss(routing):
    model, sequences = build(make_config(**routing)), make_sequences("captioning", 4)
    micro_batches = [
        [collate(sequences[i : i + n], VOCABULARY, "captioning") for i in range(0, 4, n)]
        for n in (1, 2, 4)
    ]
    auxiliary = [
        sum(model(batch).auxiliary.item() for batch in batches) / len(batches)
        for batches in micro_batches
    ]
    assert auxiliary == pytest.approx([auxiliary[0]] * 3, rel=1e-5)


def test_gate_noise_is_a_function_of_seed_step_layer_and_class_and_absent_in_evaluation():
    model = build(make_config(feed_forward="attributes", gate_noise=True))
    gate = model.layers[1].feed_forward.gate
    clean = gate.probabilities((11, 13))
    assert torch.equal(gate.probabilities((11, 13), (0, 5)), gate.probabilities((11, 13), (0, 5)))
    assert torch.equal(
        gate.probabilities((13,), (0, 5))[0], gate.probabilities((11, 13), (0, 5))[1]
    )
    assert not torch.equal(
        gate.probabilities((11, 13), (0, 5)), gate.probabilities((11, 13), (0, 6))
    )
    assert not torch.equal(clean, gate.probabilities((11, 13), (0, 5)))
    batch = make_batch("segmentation", 2)
    model.eval()
    assert model(batch, noise=(0, 1)).total.item() == model(batch, noise=(0, 2)).total.item()


def test_activation_checkpointing_changes_no_gradient():
    model = build(make_config(feed_forward="attributes", dropout=0.1))
    batch = make_batch("segmentation", 2)
    results = []
    for activation_checkpointing in (False, True):
        model.gradient_checkpointing = activation_checkpointing
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, batch, noise=(0, 1)))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name])


def test_experts_start_different_and_weights_do_not_depend_on_the_layout():
    plain = dict(build(make_config()).named_parameters())
    trained = {
        exported_name(n): p
        for n, p in build(make_config(), sparse_layer=sparse_layer_factory()).named_parameters()
    }
    assert plain.keys() == trained.keys()
    assert all(torch.equal(parameter, trained[name]) for name, parameter in plain.items())
    name = "layers.1.feed_forward.experts.{}.up.weight"
    assert not torch.equal(plain[name.format(0)], plain[name.format(1)])


def test_exported_folder_loads_to_equal_logits(tmp_path):
    model = build(make_config()).eval()
    model.save_pretrained(tmp_path)
    loaded = InContextDecoder.from_pretrained(tmp_path).eval()
    tokens_BL = torch.arange(20).view(1, -1)
    attributes_BL = torch.tensor([[5] * 10 + [9] * 10])
    args = (tokens_BL, torch.arange(20).view(1, -1), attributes_BL)
    assert torch.equal(model.forward_logits(*args), loaded.forward_logits(*args))
    assert not isinstance(loaded.layers[1].feed_forward, nn.Linear)


def linked_embeddings(model: InContextDecoder, tokens: list[int]) -> Tensor:
    """Input embeddings of segmentation pairs [BOI] image [BOI] mask [EOC], token by token: E[token]
    + P[position], plus W E[c_j] at the positions that predict and that hold mask cell j.
    """
    n = CODES
    E, P, W = (
        model.token_embedding.weight,
        model.position_embedding.weight,
        model.link.weight,
    )
    rows = []
    for position, token in enumerate(tokens):
        x_M = E[token] + P[position]
        pair, place = divmod(position, 3 + 2 * n)
        image = tokens[pair * (3 + 2 * n) + 1 :][:n]
        cell = place - (2 + n)  # The cell at this position; -1 at the mask's marker, n at [EOC].
        if 0 <= cell < n:
            x_M = x_M + W @ E[image[cell]]
        if -1 <= cell < n - 1:
            x_M = x_M + W @ E[image[cell + 1]]
        rows.append(x_M)
    return torch.stack(rows)


def test_the_link_equals_its_formula_token_by_token_in_loss_and_gradients():
    model = build(make_config(feed_forward="dense", link=True, initialisation="fan_in"))
    sequence = make_sequences("segmentation", 1)[0]
    batch = collate([sequence], VOCABULARY, "segmentation")
    loss, gradients = loss_and_gradients(model, batch)
    assert gradients["link.weight"].abs().max() > 1e-4

    model.zero_grad()
    x_TM = linked_embeddings(model, batch.tokens_T.tolist())
    for layer in model.layers:
        x_TM = layer(x_TM, EpisodeAttention(batch.lengths), batch.routing)
    logits_PV = (model.norm(x_TM) @ model.token_embedding.weight.T)[batch.predictors_P]
    expected = F.cross_entropy(logits_PV, batch.labels_P)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)

    arguments = (
        batch.tokens_T[None],
        batch.positions_T[None],
        torch.ones_like(batch.tokens_T)[None],
    )
    found = model.forward_logits(*arguments, links_BL2=batch.links_T2[None])[0]
    torch.testing.assert_close(found[batch.predictors_P], logits_PV, atol=1e-4, rtol=1e-4)


def test_a_features_code_of_several_stages_is_the_sum_of_its_rows():
    """In embeddings, links and gradients, against plain additions, token by token."""
    vocabulary = replace(VOCABULARY, features=7, feature_stages=3)
    config = make_config(link=True, initialisation="fan_in")
    config.vocabulary = to_dict(vocabulary)
    model = build(config)
    first = vocabulary.feature_range.start
    E, P, W = (
        model.token_embedding.weight,
        model.position_embedding.weight,
        model.link.weight,
    )
    assert len(E) == first + 21
    # (A token, its rows): the first and the last codes, one between them, and other tokens.
    rows_of = {
        first: [first, first + 7, first + 14],
        first + 342: [first + 6, first + 13, first + 20],
        first + 5 * 49 + 2 * 7 + 3: [first + 5, first + 9, first + 17],
        0: [0],
        first - 1: [first - 1],
    }
    tokens, links = list(rows_of), [first + 262, NO_LINK, first, first + 262, NO_LINK]
    rows_of[first + 262] = [first + 5, first + 9, first + 17]
    links_T2 = torch.tensor([links, links[::-1]]).T
    found = model.embed(torch.tensor(tokens), torch.arange(5), model.linked(links_T2))
    expected = []
    for place, token in enumerate(tokens):
        x_M = P[place] + sum(E[row] for row in rows_of[token])
        for link in links_T2[place].tolist():
            if link != NO_LINK:
                x_M = x_M + W @ sum(E[row] for row in rows_of[link])
        expected.append(x_M)
    torch.testing.assert_close(found, torch.stack(expected))
    gradients = (
        torch.autograd.grad(value.square().sum(), (E, P, W))
        for value in (found, torch.stack(expected))
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_codes_of_further_stages_start_in_the_scale_of_the_first():
    """So the vector of a cell starts in the direction of the features that its codes represent."""
    generator = torch.Generator().manual_seed(1)
    vectors = F.normalize(torch.randn(12, 8, generator=generator), dim=1)
    vectors = torch.cat([vectors, 0.3 * torch.randn(12, 8, generator=generator)])
    frequencies, first = torch.rand(24, generator=generator), VOCABULARY.image_range.start
    model, plain = build(make_config()), build(make_config())
    start_from_codebook(model, vectors, frequencies[:12], first, 0, False, 2)
    start_from_codebook(plain, vectors[:12], frequencies[:12], first, 0, False)
    found = model.token_embedding.weight.detach()[first : first + 24]
    torch.testing.assert_close(found[:12], plain.token_embedding.weight.detach()[first:][:12])
    share = frequencies[:12] / frequencies[:12].sum()
    centred = vectors[:12] - share @ vectors[:12]
    # The map that gave the first rows, whose lengths were then changed.
    directions = torch.linalg.lstsq(vectors[12:].double(), found[12:].double()).solution.float()
    torch.testing.assert_close(
        found[:12], F.normalize(centred @ directions, dim=1), atol=1e-4, rtol=1e-3
    )
    scale = (share * found[:12].norm(dim=1) / (centred @ directions).norm(dim=1)).sum()
    assert scale.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("known", [1, 2])
def test_codes_that_a_model_lacks_start_where_it_has_learned_that_such_features_are(known):
    """Also where the embeddings of its stages have different means."""
    generator = torch.Generator().manual_seed(1)
    vectors, first = torch.randn(3, 8, 5, generator=generator), VOCABULARY.image_range.start
    map_CM = torch.randn(5, 32, generator=generator)
    model = build(make_config())
    before = model.token_embedding.weight.detach().clone()
    with torch.no_grad():
        for stage in range(known):
            rows = slice(first + 8 * stage, first + 8 * (stage + 1))
            model.token_embedding.weight[rows] = vectors[stage] @ map_CM + 3.0 * (1 - stage)
    learned = model.token_embedding.weight.detach().clone()
    extend_codebook(model, vectors, first, known)
    now, start = model.token_embedding.weight.detach(), first + 8 * known
    expected = (vectors[known:] @ map_CM).flatten(0, 1)
    torch.testing.assert_close(now[start : first + 24], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(now[:start], learned[:start])
    assert torch.equal(now[first + 24 :], before[first + 24 :])


@pytest.mark.parametrize("task", ["segmentation", "captioning"])
def test_the_link_is_the_same_in_packed_and_padded_layouts_and_over_episodes(task):
    model = build(make_config(link=True), auxiliary_weight=0.0)
    packed, padded = (
        loss_and_gradients(model, make_batch(task, 4, layout)) for layout in ("packed", "padded")
    )
    alone = [
        model(collate([sequence], VOCABULARY, task, loss_scale=1.0)).total.item()
        for sequence in make_sequences(task, 4)
    ]
    weight = sum(float(s.loss_weights().sum()) for s in make_sequences(task, 4))
    assert packed[0] == pytest.approx(padded[0], abs=1e-6)
    assert packed[0] == pytest.approx(sum(alone) / weight, abs=1e-5)
    for name, gradient in packed[1].items():
        torch.testing.assert_close(gradient, padded[1][name], atol=1e-6, rtol=1e-4)


def test_without_a_link_in_the_batch_its_matrix_has_a_gradient_of_zero():
    """Ranks whose batches differ must reduce the same parameters."""
    model = build(make_config(link=True))
    _, gradients = loss_and_gradients(model, make_batch("captioning", 2))
    assert not gradients["link.weight"].any()


def test_fan_in_weights_have_the_scale_of_their_inputs_and_keys_start_as_queries():
    config = make_config(width=64, link=True, initialisation="fan_in", positions=500)
    weights = dict(build(config).named_parameters())
    residual = (2 * 3) ** -0.5
    scales = {
        "token_embedding.weight": 64**-0.5,
        "position_embedding.weight": 64**-0.5,
        "link.weight": 64**-0.5,
        "layers.0.attention.qkv.weight": 64**-0.5,
        "layers.0.attention.out.weight": 64**-0.5 * residual,
        "layers.0.feed_forward.up.weight": 64**-0.5,
        "layers.0.feed_forward.down.weight": 256**-0.5 * residual,
        "layers.1.feed_forward.experts.3.up.weight": 64**-0.5,
        "layers.1.feed_forward.experts.3.down.weight": 256**-0.5 * residual,
        "layers.1.feed_forward.gate.embed.weight": 8**-0.5,
        "layers.1.feed_forward.gate.wg.weight": 64**-0.5,
    }
    for name, scale in scales.items():
        assert weights[name].std().item() == pytest.approx(scale, rel=0.1), name
    for layer in range(3):
        queries, keys, values = weights[f"layers.{layer}.attention.qkv.weight"].chunk(3)
        assert torch.equal(queries, keys)
        assert not torch.equal(queries, values)
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert not weight.any()
        elif "norm" in name:
            assert (weight == 1).all()


def test_gpt2s_scale_is_what_it_was_and_does_not_reach_the_link():
    with_link = dict(build(make_config(link=True)).named_parameters())
    without = dict(build(make_config()).named_parameters())
    assert with_link.pop("link.weight").std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert with_link.keys() == without.keys()
    assert all(torch.equal(weight, without[name]) for name, weight in with_link.items())
    assert without["layers.0.attention.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("whiten", [True, False])
def test_image_codes_start_as_a_random_map_of_their_vectors(whiten):
    model = build(make_config(initialisation="fan_in"))
    before = model.token_embedding.weight.detach().clone()
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(32, 8, generator=generator) * torch.arange(1, 9) + 5.0
    vectors[7] = vectors[3]  # Two codes with the same vector.
    frequencies = torch.rand(32, generator=generator)
    first = VOCABULARY.image_range.start
    start_from_codebook(model, vectors, frequencies, first, seed=0, whiten=whiten)
    rows = model.token_embedding.weight.detach()[first : first + 32]

    share = frequencies / frequencies.sum()
    mean = sum(share[k] * vectors[k] for k in range(32))
    deviation = sum(share[k] * (vectors[k] - mean) ** 2 for k in range(32)).sqrt()
    z = (vectors - mean) / (deviation if whiten else 1.0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(32))
    assert torch.equal(rows[3], rows[7])
    cosine = F.cosine_similarity(z[:, None], z[None], dim=2)
    got = rows @ rows.T
    assert torch.corrcoef(torch.stack([cosine.flatten(), got.flatten()]))[0, 1] > 0.9
    rest = torch.ones(len(before), dtype=torch.bool)
    rest[first : first + 32] = False
    assert torch.equal(model.token_embedding.weight.detach()[rest], before[rest])
    again = build(make_config(initialisation="fan_in"))
    start_from_codebook(again, vectors, frequencies, first, seed=0, whiten=whiten)
    assert torch.equal(again.token_embedding.weight, model.token_embedding.weight)
