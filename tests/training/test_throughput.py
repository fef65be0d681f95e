"""The FLOPs behind MFU compared with PyTorch's count, and the peaks of devices."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_model import VOCABULARY, make_batch, make_config, model_settings

from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.model.kernels import onednn_linear
from icl_moe.training.throughput import peak_flops, peak_of, real_tokens, training_flops


def counted(batch, backward: bool, monkeypatch, **settings: object) -> tuple[int, int]:
    """PyTorch's counts: of linear layers and logits, and of attention, which it counts without the
    causal mask.
    """
    # Its counter supports neither oneDNN's operator nor fused attention on a CPU.
    monkeypatch.setattr(onednn_linear, "_goes_to_onednn", lambda _: False)
    decoder = InContextDecoder(make_config(**settings))
    initialise(decoder, seed=0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = decoder(batch).total
        if backward:
            loss.backward()
    by_operation = {
        str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()
    }
    attention = by_operation.pop("aten.bmm", 0)
    return sum(by_operation.values()), attention


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("task", ["segmentation", "captioning"])
@pytest.mark.parametrize(
    "settings",
    [
        {"feed_forward": "dense"},
        {"feed_forward": "attributes"},
        {"feed_forward": "attributes", "experts_per_token": 1},
        {"feed_forward": "attributes", "combination": "weights"},
        {"feed_forward": "token"},
        {"feed_forward": "dense", "link": True},
    ],
    ids=str,
)
def test_flops_are_those_that_pytorch_counts(settings, task, layout, monkeypatch):
    batch = make_batch(task, episodes=3, layout=layout)
    products, attention = counted(batch, True, monkeypatch, **settings)
    width, layers = 32, 3
    assert attention == 3 * layers * sum(4 * length**2 * width for length in batch.lengths)
    causal = 3 * layers * sum(2 * length * (length + 1) * width for length in batch.lengths)
    # The formula omits the attribute gate, which decides only once per class.
    assert training_flops(model_settings(**settings), VOCABULARY.size, batch) == pytest.approx(
        products + causal, rel=2e-3
    )


def test_the_link_costs_a_product_of_each_distinct_code():
    """Too little for the tolerance above."""
    batch, width = make_batch("segmentation", episodes=3), 32
    with_link, without = (
        training_flops(model_settings(link=link), VOCABULARY.size, batch) for link in (True, False)
    )
    assert with_link - without == 3 * 2 * width**2 * len(batch.links_T2.unique())


def test_padding_is_not_counted_as_tokens():
    padded, packed = (
        make_batch("captioning", episodes=3, layout=layout) for layout in ("padded", "packed")
    )
    assert real_tokens(padded) == real_tokens(packed) == len(packed.tokens_T) < len(padded.tokens_T)


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "fp32", 91.6),
        ("NVIDIA B200", "bf16", 2250),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla V100-PCIE-32GB", "fp32", 14),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA A100X", "bf16", None),
        ("Some accelerator", "bf16", None),
    ],
)
def test_peaks_are_known_by_the_devices_name(device, precision, tera):
    peak = peak_of(device, precision)
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpu_has_no_known_peak():

    assert peak_flops(torch.device("cpu"), {}) is None


def test_a_gpus_peak_is_that_of_the_precision_that_the_run_trains_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    device = torch.device("cuda")
    assert peak_flops(device, {"bf16": {"enabled": True}}) == pytest.approx(989.4e12)
    assert peak_flops(device, {}) == pytest.approx(66.9e12)
