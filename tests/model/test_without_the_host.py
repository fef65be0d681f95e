"""What a GPU would meet, on the device "meta", whose tensors have no content: tensors on the host
are not mixed with those on the device, and only the choices of gates are copied to the host.
"""

from contextlib import nullcontext

import pytest
import torch
from toy_model import FORMAT, VOCABULARY, make_batch, make_config

from icl_moe.inference.cache import KeyValueCache, SharedPast
from icl_moe.inference.decode import _stacked
from icl_moe.model import attention, decoder, router
from icl_moe.model.decoder import InContextDecoder
from icl_moe.model.moe import Decision

DEVICE = "meta"


@pytest.fixture
def model(monkeypatch):
    """A decoder in bfloat16 on that device. Its gates run, but what they choose is given: copying
    it to the host is the one wait of a forward pass.
    """
    monkeypatch.setattr(attention, "has_varlen", lambda queries: queries.device.type == DEVICE)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # It knows no "meta".

    def given(gates, plan):
        choices = {number: gate(plan) for number, gate in gates.items()}
        decisions = {
            number: Decision([[0, 1]] * len(plan.classes), choice.weights_CK)
            for number, choice in choices.items()
        }
        return decisions, [choice.auxiliary_loss for choice in choices.values()]

    monkeypatch.setattr(decoder, "decide", given)
    with torch.device(DEVICE):
        return InContextDecoder(make_config(dropout=0.1, attention_dropout=0.1, link=True)).to(
            torch.bfloat16
        )


@pytest.mark.parametrize("task", ["segmentation", "captioning"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_training_step_copies_nothing_to_the_host(model, task, layout, monkeypatch):
    # The real method asks for the distinct codes, which is a wait of its own.
    monkeypatch.setattr(
        InContextDecoder,
        "linked",
        lambda self, links_T2: self.link(self.token_embedding(links_T2[:, 0])),
    )
    batch = make_batch(task, 3, layout).to(DEVICE)
    loss = model.train()(batch, noise=(0, 1))
    assert all(part.device.type == DEVICE for part in loss)
    loss.total.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 50 and all(each.device.type == DEVICE for each in gradients)


def test_the_gates_choices_are_copied(model, monkeypatch):
    monkeypatch.setattr(decoder, "decide", router.decide)
    batch = make_batch("segmentation", 2).to(DEVICE)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        model.decide(batch.routing)


@torch.no_grad()
def test_decoding_passes_copy_nothing_to_the_host(model, monkeypatch):
    monkeypatch.setattr(
        InContextDecoder,
        "linked",
        lambda self, links_T2: self.link(self.token_embedding(links_T2[:, 0])),
    )
    rows = [
        [(VOCABULARY.boi, place, 149, -1, -1) for place in range(length)] for length in (40, 40, 37)
    ]
    model.eval()
    cache = KeyValueCache(64)
    for block in (rows, [row[:1] for row in rows]):
        logits_BV = model.next_logits(*_stacked(block, DEVICE, cache))
        assert logits_BV.shape == (3, VOCABULARY.size) and logits_BV.device.type == DEVICE
    cache.select(torch.tensor([0, 2]))
    model.next_logits(*_stacked([row[:1] for row in rows[:2]], DEVICE, cache))
    past = KeyValueCache(8)
    model.next_logits(*_stacked([rows[0][:8]], DEVICE, past))
    block = _stacked([row[8:] for row in rows], DEVICE, SharedPast(past, len(rows)))
    logits_BNK = model.last_logits(FORMAT.codes_per_image, *block, ids=VOCABULARY.image_range)
    assert logits_BNK.shape == (3, FORMAT.codes_per_image, VOCABULARY.image_codes)
    assert logits_BNK.device.type == DEVICE


def test_varlen_attention_of_a_stream_has_its_shape(model):
    lengths = (7, 5, 9)
    scope = attention.EpisodeAttention(lengths)
    inputs = [torch.empty(21, 4, 8, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    assert scope.attend(0, *inputs, 0.1).shape == (21, 4, 8)
    assert attention._offsets(lengths, torch.device("cpu")).tolist() == [0, 7, 12, 21]
