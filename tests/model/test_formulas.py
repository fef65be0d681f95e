"""The decoder's loss and all its gradients compared with the published formulas, computed slowly in
float64 (tests/plain_decoder.py); and the randomness of training: noise and dropout.
"""

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from plain_decoder import PlainDecoder
from torch import Tensor, nn
from toy_model import FORMAT, VOCABULARY, make_batch, make_config

from icl_moe.batch import collate
from icl_moe.inference.cache import KeyValueCache
from icl_moe.model.attention import EpisodeAttention
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.model.deepspeed_moe import exported_name, sparse_layer_factory
from icl_moe.model.feed_forward import SparseFeedForward
from icl_moe.sequence import Episode, SequenceCodec, TokenSequence
from icl_moe.tasks import TASKS
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.text import TextTokenizer

ROUTINGS = {
    "dense": {"feed_forward": "dense"},
    "attributes": {"feed_forward": "attributes"},
    "attributes, one expert": {"feed_forward": "attributes", "experts_per_token": 1},
    "attributes without noise": {"feed_forward": "attributes", "gate_noise": False},
    "no gate": {"feed_forward": "attributes", "gate_input": "none", "experts_per_token": 1},
    "merged weights": {"feed_forward": "attributes", "combination": "weights"},
    "stock tokens": {"feed_forward": "token"},
    "our gate on tokens": {"feed_forward": "attributes", "gate_input": "token"},
    "tokens and attributes": {"feed_forward": "attributes", "gate_input": "token+attributes"},
}
BY_TOKEN = ("stock tokens", "our gate on tokens", "tokens and attributes")
"""Their gates decide a token at a time, without noise."""
NOISE = (3, 5)


def uneven_episodes() -> list[TokenSequence]:
    """Episodes of both tasks with captions of different lengths, so that the shares of attribute
    classes differ, and a mean over episodes is not a mean over tokens.
    """
    rng = np.random.default_rng(0)
    codec = SequenceCodec(FORMAT, TextTokenizer(VOCABULARY.text_merges))

    def codes() -> np.ndarray:
        return rng.integers(0, VOCABULARY.image_codes, FORMAT.codes_per_image)

    def episode(task: str, *captions: str) -> TokenSequence:
        pairs = [
            CaptionPair(codes(), caption)
            if task == "captioning"
            else SegmentationPair(codes(), codes())
            for caption in captions
        ]
        return codec.encode(Episode(TASKS[task], "", tuple(pairs)))

    return [
        episode("captioning", "a", "b"),
        episode("segmentation", "", ""),
        episode("captioning", "bcd", "a"),
    ]


def trained_like(
    settings: dict, sparse_layer=SparseFeedForward, seed: int = 0, **options: float
) -> InContextDecoder:
    """A decoder whose parameters are as large as after training: initially biases are 0, norms 1
    and attention nearly uniform, which hides faults.
    """
    config = make_config(layer_norm_epsilon=0.01, **settings)
    model = InContextDecoder(config, sparse_layer, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(hash_of(exported_name(name), seed))
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * drawn if is_norm else 0.15 * drawn)
    return model


def hash_of(name: str, seed: int) -> int:
    return int.from_bytes(f"{seed}{name}".encode()[-7:], "big")


def noise_of(model: InContextDecoder) -> Callable[[int, int], Tensor]:
    """The noise in a gate's logits, up to a constant, which softmax removes."""

    @functools.cache
    def noise(layer: int, attributes: int) -> Tensor:
        sparse = model.layers[layer].feed_forward
        gate = getattr(sparse, "deepspeed_moe", sparse).gate
        noisy, clean = (gate.probabilities((attributes,), n)[0] for n in (NOISE, None))
        return (noisy.log() - clean.log()).detach().double()

    return noise


def assert_equals_the_formulas(model: InContextDecoder, routing: str, layout: str) -> None:
    noisy = routing not in ("dense", "attributes without noise", *BY_TOKEN)
    sequences = uneven_episodes()
    parameters = {exported_name(name): p for name, p in model.named_parameters()}
    plain = PlainDecoder(
        parameters, model.settings, VOCABULARY.image_range, noise_of(model) if noisy else None
    )
    expected = plain.loss(sequences, input_weight=0.5, auxiliary_weight=model.auxiliary_weight)
    batch = collate(sequences, VOCABULARY, "mixed", layout, input_weight=0.5)
    found = model(batch, noise=NOISE)
    for name, value in expected._asdict().items():
        assert getattr(found, name).item() == pytest.approx(value.item(), rel=1e-5), name
    found.total.backward()
    expected.total.backward()
    for name, parameter in parameters.items():
        ours, theirs = (
            torch.zeros(parameter.shape) if p.grad is None else p.grad.float()
            for p in (parameter, plain.weights[name])
        )
        torch.testing.assert_close(
            ours, theirs, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("routing", "layout"),
    [
        *((routing, "packed") for routing in ROUTINGS),
        *((routing, "padded") for routing in ("dense", "attributes", "tokens and attributes")),
    ],
)
def test_loss_and_gradients_equal_the_formulas(routing, layout):
    model = trained_like(ROUTINGS[routing], auxiliary_weight=0.7)
    assert_equals_the_formulas(model, routing, layout)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("routing", ["attributes", "stock tokens", "tokens and attributes"])
def test_so_do_those_of_deepspeeds_layers(routing, layout, one_rank):
    model = one_rank(trained_like(ROUTINGS[routing], sparse_layer_factory()))
    assert model.auxiliary_weight == 0.02
    assert_equals_the_formulas(model, routing, layout)


def test_gate_noise_has_the_published_spread_and_its_own_draw_for_seed_step_layer_and_class():
    """The standard deviation is 1 / E. Softmax reveals only the differences of E logits from their
    mean, whose variance is (E - 1) / E of the logits'.
    """
    model = trained_like({"feed_forward": "attributes", "experts": 4})
    noises = {}
    for layer, seed, step in itertools.product((1, 2), (0, 1), range(150)):
        gate = model.layers[layer].feed_forward.gate
        noisy, clean = (gate.probabilities((5, 9), noise).log() for noise in ((seed, step), None))
        noises[layer, seed, step] = (noisy - clean) - (noisy - clean).mean(1, keepdim=True)
    drawn = torch.stack([rows_CE.detach() for rows_CE in noises.values()])
    assert drawn.std().item() == pytest.approx(1 / 4 * math.sqrt(3 / 4), rel=0.04)
    assert drawn.mean(dim=0).abs().max() < 0.04
    assert len({tuple(row) for row in drawn.flatten(0, 1).mul(1e4).round().tolist()}) == 2 * len(
        drawn
    )


def outputs(model: InContextDecoder) -> dict[str, Tensor]:
    """Name of a module -> its inputs and outputs at the last pass, updated while the decoder
    computes.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_: nn.Module, inputs: tuple, output: object) -> None:
            for end, value in (("in", inputs[0]), ("out", output)):
                if isinstance(value, Tensor):
                    seen[f"{name} {end}"] = value.detach()

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    return seen


def test_hidden_dropout_falls_on_the_embeddings_and_on_both_branches_of_every_layer_in_training():
    """Every value is either dropped or scaled by 1 / (1 - p)."""
    p = 0.25
    model = trained_like({"dropout": p, "layers": 2, "layers_with_experts": (1,)})
    seen, batch = outputs(model), make_batch("segmentation", 2)
    for dropped in (True, False):
        model.train(dropped)
        model(batch)
        embedded = seen["token_embedding out"] + seen["position_embedding out"]
        branches = [(embedded, seen["layers.0 in"])]
        for layer in ("layers.0", "layers.1"):
            between = seen[f"{layer}.feed_forward_norm in"]
            branches += [
                (seen[f"{layer}.attention out"], between - seen[f"{layer} in"]),
                (seen[f"{layer}.feed_forward out"], seen[f"{layer} out"] - between),
            ]
        for whole, passed in branches:
            if not dropped:
                torch.testing.assert_close(passed, whole, atol=1e-5, rtol=1e-4)
                continue
            kept = passed.abs() > 1e-5
            torch.testing.assert_close(passed[kept], whole[kept] / (1 - p), atol=1e-5, rtol=1e-4)
            assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.03)


LENGTHS = {"even": (12, 12, 12), "uneven": (5, 12, 9), "padded": (12, 12, 12)}


@pytest.mark.parametrize("kind", LENGTHS)
def test_attention_drops_weights_of_the_past_and_of_nothing_else(kind):
    """If the values are a basis, the output is the attention matrix."""
    p, lengths = 0.4, LENGTHS[kind]
    tokens, heads = sum(lengths), 64
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(tokens, heads, tokens, generator=generator) for _ in range(2))
    real_T = torch.ones(tokens, dtype=torch.bool)
    if kind == "padded":
        real_T[9:12] = real_T[33:36] = False
    attention = EpisodeAttention(lengths, real_T if kind == "padded" else None)
    values = torch.eye(tokens)[:, None].expand(-1, heads, -1)
    episode_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    order_T = torch.arange(tokens)
    seen_TT = (episode_T[:, None] == episode_T) & (order_T[:, None] >= order_T)
    seen_TT &= real_T | (order_T[:, None] == order_T)
    scores = torch.einsum("ihd,jhd->ihj", q, k) / math.sqrt(tokens)
    expected = scores.masked_fill(~seen_TT[:, None], -math.inf).softmax(-1)
    whole = attention.attend(0, q, k, values, 0.0)
    torch.testing.assert_close(whole, expected)
    dropped = attention.attend(0, q, k, values, p)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], expected[kept] / (1 - p))
    share = kept.sum().item() / (heads * seen_TT.sum().item())
    assert share == pytest.approx(1 - p, abs=0.02)


def test_attention_dropout_is_its_own_setting_and_training_alone_has_it():
    batch = make_batch("captioning", 2)

    def losses(**settings: float) -> tuple[float, ...]:
        model = trained_like(settings)
        torch.manual_seed(0)
        return tuple(model.train(mode)(batch).total.item() for mode in (True, True, False))

    first, second, evaluated = losses(attention_dropout=0.3)
    assert first != second
    plain = losses()
    assert plain == (evaluated, evaluated, evaluated)


def test_new_weights_are_spread_as_gpt2s_and_drawn_from_the_seed():
    model = InContextDecoder(make_config(layers=2, layers_with_experts=(1,)))
    initialise(model, seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            ends = ("attention.out.weight", "down.weight")
            std = 0.02 / math.sqrt(2 * 2) if name.endswith(ends) else 0.02
            noise = 4 * std / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(std, abs=noise), name
    again, other = (InContextDecoder(model.config) for _ in range(2))
    initialise(again, seed=1)
    initialise(other, seed=2)
    drawn, same, different = (m.token_embedding.weight for m in (model, again, other))
    assert torch.equal(drawn, same)
    assert not torch.equal(drawn, different)


def test_activation_checkpointing_computes_each_layer_again_in_training_alone():
    model = trained_like({})
    batch = make_batch("segmentation", 1)
    computed = []
    for layer in model.layers:
        layer.attention_norm.register_forward_hook(lambda *_: computed.append(1))
    for checkpointing, training, expected in ((False, True, 3), (True, True, 6), (True, False, 3)):
        model.gradient_checkpointing = checkpointing
        computed.clear()
        model.train(training)(batch).total.backward()
        assert len(computed) == expected


def test_the_next_tokens_logits_are_the_last_ones_with_a_cache_and_without():
    """Rows of different lengths, padded on the left, read in chunks of 5, 1 and 4 tokens."""
    model = trained_like({}).eval()
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, VOCABULARY.size, (2, 10), generator=generator)
    attributes_BL = torch.tensor([[0, 0, 0, *[5] * 4, *[9] * 3], [*[5] * 6, *[9] * 4]])
    positions_BL = torch.stack([torch.arange(10) - 3, torch.arange(10)]).clamp(min=0)
    rows = (tokens_BL, positions_BL, attributes_BL)
    alone = [
        model.forward_logits(*(x[row : row + 1, start:] for x in rows))[0]
        for row, start in ((0, 3), (1, 0))
    ]
    cache = KeyValueCache(capacity=4)
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 6), (6, 10)):
            expected = torch.stack([alone[0][stop - 1 - 3], alone[1][stop - 1]])
            whole = model.next_logits(*(x[:, :stop] for x in rows))
            cached = model.next_logits(*(x[:, start:stop] for x in rows), cache)
            torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(cached, expected, atol=1e-4, rtol=1e-4)
