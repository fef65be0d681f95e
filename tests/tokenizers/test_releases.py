"""An IBQ release becomes a tokenizer that gives the numbers of its architecture as written down
once more in plain_ibq.py, and that works wherever a VQ-GAN does.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import plain_ibq
import pytest
import torch
import yaml
from plain_ibq import PlainIBQ, Sizes, random_weights, write_release

from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.settings import from_dict
from icl_moe.tokenizers import vqgan
from icl_moe.tokenizers.releases import convert_release
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig
from preprocessing.tokenizers.recipe import TokenizerRecipe

SMALL = Sizes(64, 16, 24, 32, 32, (1, 2), 4, (16,))


@pytest.mark.parametrize(
    ("sizes", "images"),
    [
        pytest.param(SMALL, 1, id="f2, attention in its last level"),
        pytest.param(Sizes(1024, 32, 32, 64, 32, (1, 1, 2, 2, 4), 4, (4,)), 2, id="f16"),
        pytest.param(Sizes(2048, 32, 64, 16, 32, (1, 1), 3, (16, 8)), 1, id="f2, attention in all"),
        pytest.param(plain_ibq.RELEASED, 1, id="the released size", marks=pytest.mark.slow),
    ],
)
def test_a_converted_release_gives_the_numbers_of_the_architecture(
    tmp_path: Path, sizes: Sizes, images: int
) -> None:
    averages = random_weights(sizes, seed=0)
    release = write_release(tmp_path, sizes, random_weights(sizes, seed=1), averages)
    convert_release(*release, tmp_path / "out")
    plain, ours = PlainIBQ(sizes, averages), VQGAN.from_pretrained(tmp_path / "out")
    pixels_B3HW = torch.rand(images, 3, sizes.resolution, sizes.resolution) * 2 - 1
    with torch.no_grad():
        latents = plain.latents(pixels_B3HW)
        torch.testing.assert_close(ours.latents(pixels_B3HW), latents, atol=1e-4, rtol=1e-4)
    codes_BN, leads_BN = plain_ibq.lookup(latents, averages["quantize.embedding.weight"])
    assert len(np.unique(codes_BN)) > 5
    differ = ours.encode(pixels_B3HW).numpy() != codes_BN
    assert not (differ & (leads_BN > 1e-3)).any() and differ.mean() < 0.01
    drawn = plain.decode(torch.from_numpy(codes_BN))
    torch.testing.assert_close(ours.decode(torch.from_numpy(codes_BN)), drawn, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("most_scores", [2**26, 300], ids=["at once", "in slices"])
def test_the_lookup_is_exact(most_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whole numbers, whose dot products no order of summation rounds, ties included: the first
    one of equal codes is taken.
    """
    monkeypatch.setattr(vqgan, "_MOST_SCORES", most_scores)
    rng = np.random.default_rng(0)
    config = VQGANConfig(image_size=32, codebook_size=60, code_channels=5, lookup="dot_product")
    with torch.device("meta"):
        network = VQGAN(config)
    codebook = network.quantize.to_empty(device="cpu")
    table_KC = torch.from_numpy(rng.integers(-9, 10, (60, 5))).float()
    table_KC[40:] = table_KC[:20]
    codebook.embedding.weight.data.copy_(table_KC)
    latents_BChw = torch.from_numpy(rng.integers(-9, 10, (3, 5, 8, 7))).float()
    codes_BN, leads_BN = plain_ibq.lookup(latents_BChw, table_KC)
    assert (leads_BN == 0).any()
    found_BN = codebook.nearest(latents_BChw).flatten(1).numpy()
    assert np.array_equal(found_BN, codes_BN)
    distances = torch.cdist(latents_BChw.permute(0, 2, 3, 1).flatten(1, 2), table_KC)
    assert (found_BN != distances.argmin(dim=-1).numpy()).any()


def test_the_averaged_weights_are_taken_where_the_config_says_so(tmp_path: Path) -> None:
    last, averages = random_weights(SMALL, seed=1), random_weights(SMALL, seed=0)
    for use_ema, expected in ((True, averages), (False, last)):
        folder = tmp_path / str(use_ema)
        folder.mkdir()
        release = write_release(folder, SMALL, last, averages, {"use_ema": use_ema})
        found = convert_release(*release, folder / "out").state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    release = write_release(tmp_path, SMALL, last, None)
    with pytest.raises(InputError, match=r"lacks the averaged weights \(model_ema\.encoderconv_in"):
        convert_release(*release, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_works_wherever_a_vqgan_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conversion on the command line, shards, their verification, and the mask ceiling."""
    sizes = Sizes(64, 16, 24, 32, 32, (1, 1, 1, 1), 4, ())
    weights = random_weights(sizes, seed=0)
    checkpoint, config = write_release(tmp_path, sizes, weights, weights)
    out = tmp_path / "ibq"
    assert (
        main(["tokenizer", "convert", f"{checkpoint}", "--config", f"{config}", f"--out={out}"])
        == 0
    )
    assert "64 codes at downsampling 8, fingerprint" in capsys.readouterr().out
    tokenizer = VQGAN.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["lookup"] == "dot_product"
    by_distance = VQGANConfig(**{**vars(tokenizer.config), "lookup": "distance"})
    weights_of = tokenizer.state_dict()
    other = VQGAN.from_weights(by_distance, weights_of, origin="the same weights")
    assert other.fingerprint != tokenizer.fingerprint

    settings = (
        f"tokenizer={out} vocabulary.image_codes=64 image_size=32 synthetic.images=8 samples=2"
    )
    shards = tmp_path / "shards"
    build = ["shards", "build", "demo", "captioning=null"]
    assert main([*build, *settings.split(), f"--out={shards}", "--workers=1"]) == 0
    assert main(["shards", "verify", f"{shards}"]) == 0
    built = ShardSet(shards)
    assert built.manifest.image_tokenizer == tokenizer.fingerprint
    assert VQGAN.from_pretrained(shards / "image_tokenizer").fingerprint == tokenizer.fingerprint

    images = shards / "synthetic" / "images"
    instances = shards / "synthetic" / "instances_train.json"
    capsys.readouterr()
    assert main(["tokenizer", "evaluate", f"{out}", f"{images}", f"--annotations={instances}"]) == 0
    assert "mask_miou" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_path": "src.Open_MAGVIT2.models.lfqgan.VQModel"}, "config of src.Open_MAGVIT2"),
        ({"init_args": None}, "not a config of an IBQ tokenizer .* lacks the section model.init_a"),
        ({"init_args.n_embed": None}, "not a config of an IBQ tokenizer .* lacks 'n_embed'"),
        ({"init_args.ddconfig.z_channels": None}, "model.init_args.ddconfig lacks 'z_channels'"),
        ({"init_args.cosine_similarity": True}, "only networks with model.init_args.cosine_simil"),
        ({"init_args.layers": 3}, "the key model.init_args.layers is unknown"),
        ({"init_args.n_embed": 128}, r"quantize.embedding.weight is \(64, 16\) there and \(128, "),
        ({"init_args.ddconfig.num_res_blocks": 2}, "surplus encoder.down.0.block.2"),
        ({"init_args.n_embed": 0}, "codebook_size must be at least 1"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    weights = random_weights(SMALL, seed=0)
    checkpoint, config = write_release(tmp_path, SMALL, weights, weights)
    content = yaml.safe_load(config.read_text())
    for path, value in change.items():
        *sections, key = path.split(".")
        section = content["model"]
        for name in sections:
            section = section[name]
        section |= {key: value}
        if value is None:
            del section[key]
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message):
        convert_release(checkpoint, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_with_the_dot_product_is_refused() -> None:
    network = {"lookup": "dot_product"}
    with pytest.raises(InputError, match=r"network\.lookup must be distance for training"):
        from_dict(TokenizerRecipe, {"network": network}, origin="recipe.yaml")
