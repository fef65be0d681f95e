"""The VQ-GAN is the published one: it equals an independent implementation, accepts its
checkpoints, and refuses wrong ones.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hostile import MARK, Hostile
from torch import Tensor

from icl_moe.errors import InputError
from icl_moe.images import to_pixels
from icl_moe.tokenizers.releases import convert_release
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig
from preprocessing.synthetic import draw_scene

SMALL = VQGANConfig(
    image_size=32,
    codebook_size=64,
    code_channels=8,
    latent_channels=16,
    channels=32,
    channel_multipliers=(1, 2, 2),
)


def _release(
    folder: Path, state: dict[str, Tensor], network: dict[str, Any], codes: int, width: int
) -> tuple[Path, Path]:
    """A checkpoint and YAML as published: with a loss, and the class of a callback as a key."""
    path = "pytorch_lightning.callbacks.model_checkpoint"
    lightning = types.ModuleType(path)
    callback = lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": path})
    state = {
        **state,
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "loss.logvar": torch.zeros(()),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", path):
            patch.setitem(sys.modules, name, lightning)
        torch.save(
            {
                "epoch": 1,
                "callbacks": {callback: {"best_model_score": torch.tensor(0.5)}},
                "state_dict": state,
            },
            folder / "last.ckpt",
        )
    params = {"embed_dim": width, "n_embed": codes, "ddconfig": network}
    (folder / "model.yaml").write_text(
        yaml.safe_dump({"model": {"target": "taming.models.vqgan.VQModel", "params": params}})
    )
    return folder / "last.ckpt", folder / "model.yaml"


TINY = VQGANConfig(
    image_size=32,
    codebook_size=16,
    code_channels=8,
    latent_channels=8,
    channels=32,
    channel_multipliers=(1, 2),
)
TINY_NETWORK = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 32,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
}


def _tiny_release(
    folder: Path, without: str = "", extra: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    state = {key: value for key, value in VQGAN(TINY).state_dict().items() if key != without}
    return _release(folder, {**state, **(extra or {})}, TINY_NETWORK, codes=16, width=8)


def _sizes(
    image: int,
    channels: int,
    multipliers: tuple[int, ...],
    codes: int,
    attention: tuple[int, ...],
    width: int = 32,
) -> VQGANConfig:
    return VQGANConfig(image, codes, width, width, channels, multipliers, 2, attention)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(_sizes(64, 32, (1, 1, 2, 2, 4), 1024, (4,)), id="f16, 1024 codes"),
        pytest.param(_sizes(64, 32, (1, 2, 2, 4), 1024, (8, 16)), id="f8, attention in two levels"),
        pytest.param(_sizes(64, 32, (1, 1, 2, 2, 4), 16384, (4,)), id="f16, 16384 codes"),
        pytest.param(VQGANConfig(), id="f16 at its full size", marks=pytest.mark.slow),
    ],
)
def test_a_converted_release_gives_the_published_numbers(
    tmp_path: Path, config: VQGANConfig
) -> None:
    pytest.importorskip("taming", reason="pip install --no-deps taming-transformers-rom1504==0.0.6")
    from benchmarks.published_vqgan import PublishedVQGAN

    torch.manual_seed(0)
    published = PublishedVQGAN(config)
    release = _release(
        tmp_path,
        published.state_dict(),
        published.network,
        config.codebook_size,
        config.code_channels,
    )
    convert_release(*release, tmp_path / "out")
    ours = VQGAN.from_pretrained(tmp_path / "out")
    assert ours.config == config
    pixels_B3HW = torch.rand(3, 3, config.image_size, config.image_size) * 2 - 1
    latents, codes_BN = published.latents(pixels_B3HW), published.encode(pixels_B3HW)

    torch.testing.assert_close(ours.latents(pixels_B3HW).detach(), latents, atol=1e-5, rtol=1e-4)
    assert codes_BN.unique().numel() > 5
    differ = ours.encode(pixels_B3HW) != codes_BN
    assert not (
        differ & (_gap_to_second_nearest(latents, published.quantize.embedding.weight) > 1e-5)
    ).any()
    torch.testing.assert_close(ours.decode(codes_BN), published.decode(codes_BN), atol=1e-4, rtol=0)


def _gap_to_second_nearest(latents_BChw: Tensor, table_KC: Tensor) -> Tensor:
    flat = latents_BChw.movedim(1, -1).flatten(1, 2)
    two = torch.cdist(flat, table_KC.detach()).square().topk(2, dim=-1, largest=False).values
    return two[..., 1] - two[..., 0]


def test_bf16_draws_nearly_the_same_codes_and_pixels_and_is_the_same_tokenizer() -> None:
    exact, fast = VQGAN.from_pretrained("demo"), VQGAN.from_pretrained("demo", precision="bf16")
    assert fast.fingerprint == exact.fingerprint
    rng = np.random.default_rng(0)
    pixels_B3HW = torch.stack([to_pixels(draw_scene(rng, 64).image) for _ in range(24)])
    codes_BN = exact.encode(pixels_B3HW)
    # 1 would mean that nothing was computed in bfloat16.
    assert 0.98 < (fast.encode(pixels_B3HW) == codes_BN).float().mean() < 1
    assert (fast.decode(codes_BN) - exact.decode(codes_BN)).abs().mean() < 0.01


def test_the_default_is_the_released_network() -> None:
    with torch.device("meta"):
        model = VQGAN(VQGANConfig())
    # Encoder, decoder, codebook and the two 1 x 1 convolutions of vqgan_imagenet_f16_1024, without
    # its loss.
    assert sum(p.numel() for p in model.parameters()) == 72_141_699
    assert (model.downsampling, model.config.codes_per_image) == (16, 256)


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    model = VQGAN(SMALL).eval()
    model.save_pretrained(tmp_path)
    again = VQGAN.from_pretrained(tmp_path)
    assert again.fingerprint == model.fingerprint
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_that_half_precision_holds_are_stored_at_half_size(tmp_path: Path) -> None:
    model = VQGAN(SMALL).half().float()
    model.save_pretrained(tmp_path / "half")
    VQGAN(SMALL).save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    assert VQGAN.from_pretrained(tmp_path / "half").fingerprint == model.fingerprint


def test_the_fingerprint_tells_every_change() -> None:
    model = VQGAN(SMALL)
    before = model.fingerprint
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-6
    assert model.fingerprint != before


def test_codes_run_row_by_row_and_pictures_need_not_be_square() -> None:
    model = VQGAN(SMALL).eval()
    pixels_B3HW = torch.rand(2, 3, 32, 16) * 2 - 1
    codes_BN = model.encode(pixels_B3HW)
    assert codes_BN.shape == (2, 8 * 4) and codes_BN.dtype == torch.int64
    assert torch.equal(codes_BN.view(2, 8, 4), model.quantize.nearest(model.latents(pixels_B3HW)))
    assert model.decode(codes_BN, grid=(8, 4)).shape == pixels_B3HW.shape


def test_a_batch_is_encoded_as_its_pictures_are() -> None:
    torch.manual_seed(0)
    model = VQGAN(SMALL).eval()
    pixels_B3HW = torch.rand(4, 3, 32, 32) * 2 - 1
    assert torch.equal(
        model.encode(pixels_B3HW), torch.cat([model.encode(pixels[None]) for pixels in pixels_B3HW])
    )


def test_the_shipped_tokenizer_loads_by_name_and_draws_a_mask() -> None:
    model = VQGAN.from_pretrained("demo")
    assert (model.config.image_size, model.downsampling) == (64, 8)
    mask_B3HW = torch.full((1, 3, 64, 64), -1.0)
    mask_B3HW[..., 16:48, 16:48] = 1.0
    drawn = model.decode(model.encode(mask_B3HW)).mean(dim=1) > 0
    wanted = mask_B3HW[:, 0] > 0
    assert (drawn & wanted).sum() / (drawn | wanted).sum() > 0.85


def test_a_hostile_checkpoint_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, config = _tiny_release(tmp_path)
    torch.save({"state_dict": {"encoder.conv_in.weight": Hostile()}}, checkpoint)
    with pytest.raises(InputError, match="could run code"):
        convert_release(checkpoint, config, tmp_path / "out")
    assert not (tmp_path / MARK).exists() and not (tmp_path / "out").exists()
    # The file does run its code if it is loaded without protection.
    torch.load(checkpoint, weights_only=False)
    assert (tmp_path / MARK).exists()


def test_surplus_and_missing_keys_are_listed(tmp_path: Path) -> None:
    checkpoint, config = _tiny_release(
        tmp_path, extra={"encoder.conv_extra.weight": torch.zeros(1)}
    )
    with pytest.raises(InputError, match=r"surplus encoder\.conv_extra\.weight"):
        convert_release(checkpoint, config, tmp_path / "out")
    checkpoint, config = _tiny_release(tmp_path, without="quant_conv.bias")
    with pytest.raises(InputError, match=r"lacks quant_conv\.bias"):
        convert_release(checkpoint, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_contradicts_its_weights_is_refused(tmp_path: Path) -> None:
    checkpoint, config = _tiny_release(tmp_path)
    config.write_text(config.read_text().replace("n_embed: 16", "n_embed: 32"))
    with pytest.raises(
        InputError,
        match=r"quantize\.embedding\.weight is \(16, 8\) there and \(32, 8\) by the config",
    ):
        convert_release(checkpoint, config, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.yaml", "model: {params: {embed_dim: 8, n_embed: 16}}", "ddconfig"),
        ("model.yaml", "model: [", "not valid YAML"),
        ("model.yaml", "", "not a config of a taming-transformers VQModel"),
        ("model.yaml", "[1, 2]", "not a config of a taming-transformers VQModel"),
        ("last.ckpt", "no checkpoint", "not a torch"),
        ("last.ckpt", "<!DOCTYPE html><html>a page</html>" * 50, "page"),
    ],
)
def test_a_release_of_another_kind_is_refused(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    checkpoint, config = _tiny_release(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message):
        convert_release(checkpoint, config, tmp_path / "out")


def test_a_folder_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    VQGAN(SMALL).save_pretrained(tmp_path)
    other = VQGAN(SMALL)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes(
        (tmp_path / "other" / "model.safetensors").read_bytes()
    )
    with pytest.raises(InputError, match="fingerprint"):
        VQGAN.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 128}, "contradicts"),
        ({"chanels": 32}, "unknown key 'chanels'"),
        ({"channels": 33}, "multiple of 32"),
        ({"kind": "vae"}, "not a VQ-GAN's"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    VQGAN(SMALL).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(InputError, match=message):
        VQGAN.from_pretrained(tmp_path)


def test_missing_and_truncated_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of that name \\(demo"):
        VQGAN.from_pretrained("no_such_tokenizer")
    with pytest.raises(InputError, match=r"config\.json is missing"):
        VQGAN.from_pretrained(tmp_path)
    VQGAN(SMALL).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="missing or damaged"):
        VQGAN.from_pretrained(tmp_path)


def test_pictures_and_codes_that_do_not_fit_are_refused() -> None:
    model = VQGAN(SMALL).eval()
    with pytest.raises(InputError, match="multiples of 4"):
        model.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(InputError, match="not form a grid"):
        model.decode(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(InputError, match=r"0\.\.63"):
        model.decode(torch.full((1, 4), 64))
