"""Codes are the nearest centroids to the vectors of the formula, equal input makes equal
tokenizers, and a folder identifies its backbone.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_features
from safetensors.torch import save_file

from icl_moe.cli import main
from icl_moe.errors import InputError
from icl_moe.images import load_image, to_square_pixels
from icl_moe.tokenizers.backbones import open_backbone
from icl_moe.tokenizers.features import (
    FeaturesTokenizer,
    fingerprint_of_first_stages,
    read_centroids,
)
from icl_moe.tokenizers.folder import load_weights
from preprocessing import synthetic
from preprocessing.tokenizers.features import (
    fit_features_tokenizer,
    k_means,
    principal_axes,
    refine_features_tokenizer,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def tokenizer(place) -> FeaturesTokenizer:
    model = toy_features.make_toy_features(place)
    model.save_pretrained(place / "tokenizer")
    return model


@pytest.fixture(scope="module")
def pixels_B3HW(place, tokenizer) -> torch.Tensor:
    files = sorted((place / "pictures").iterdir())
    return torch.stack([to_square_pixels(load_image(file), 64) for file in files])


def test_codes_are_the_nearest_centroids_of_the_formula(tokenizer, place, pixels_B3HW):
    maps = open_backbone(str(place / "backbone")).maps(pixels_B3HW)
    coarse = torch.nn.functional.interpolate(maps[16], (8, 8), mode="bilinear", align_corners=False)
    table = {name: value.double().numpy() for name, value in tokenizer.tables().items()}
    joined, start = [], 0
    for map_BChw in (maps[8], coarse):
        cells = map_BChw.flatten(2).transpose(1, 2).double().numpy()
        part = slice(start, start + cells.shape[-1])
        start = part.stop
        cells = (cells - table["mean_C"][part]) / table["deviation_C"][part]
        joined.append(cells / np.linalg.norm(cells, axis=-1, keepdims=True))
    features = (np.concatenate(joined, -1) - table["centre_C"]) @ table["projection_CD"]
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(tokenizer.features(pixels_B3HW).numpy(), features, atol=1e-4)

    distances = np.linalg.norm(features[:, :, None] - table["codebook_KD"], axis=-1)
    codes_BN = tokenizer.encode(pixels_B3HW)
    assert codes_BN.dtype == torch.int64 and codes_BN.shape == (8, 64)
    near = np.take_along_axis(distances, codes_BN.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(near, distances.min(-1), atol=1e-4)
    assert codes_BN.unique().numel() > toy_features.CODES // 2
    assert torch.equal(tokenizer.vectors(codes_BN), tokenizer.codebook_KD[codes_BN])


def test_codes_run_row_by_row_and_pictures_need_not_be_square(tokenizer):
    pixels_B3HW = torch.rand(1, 3, 64, 128) * 2 - 1
    pixels_B3HW[:, :, :, :64] = -1.0
    rows_Bhw = tokenizer.encode(pixels_B3HW).view(8, 16)
    assert rows_Bhw[:, :4].unique().numel() < rows_Bhw[:, 10:].unique().numel()
    with pytest.raises(InputError, match="multiples of 8 pixels, not 60 x 64"):
        tokenizer.encode(torch.zeros(1, 3, 60, 64))


def test_statistics_and_axes_are_those_of_the_cells(tokenizer, pixels_B3HW):
    cells_MC = tokenizer.cells(pixels_B3HW).flatten(0, 1)
    torch.testing.assert_close(tokenizer.mean_C, cells_MC.mean(0), atol=1e-5, rtol=1e-4)
    joined = tokenizer.join(cells_MC).double().numpy()
    values = np.linalg.eigvalsh(np.cov(joined.T, bias=True))[::-1]
    projected = (joined - joined.mean(0)) @ tokenizer.projection_CD.double().numpy()
    np.testing.assert_allclose(projected.var(0), values[: toy_features.DIMENSIONS], rtol=1e-3)


def test_k_means_finds_clusters_and_each_centroid_is_the_mean_of_its_points():
    generator = torch.Generator().manual_seed(0)
    middles_KD = torch.randn(5, 3, generator=generator) * 10
    points_MD = middles_KD.repeat_interleave(40, 0) + torch.randn(200, 3, generator=generator) * 0.1
    for seed in range(3):
        centroids_KD = k_means(points_MD, 5, seed)
        nearest_M = torch.cdist(points_MD, centroids_KD).argmin(1)
        for code in nearest_M.unique():
            torch.testing.assert_close(centroids_KD[code], points_MD[nearest_M == code].mean(0))
    axes_CD = principal_axes(points_MD, 2)[1]
    torch.testing.assert_close(axes_CD.T @ axes_CD, torch.eye(2), atol=1e-5, rtol=0)


def test_equal_pictures_and_seed_make_equal_tokenizers_and_another_seed_another(tokenizer, place):
    config = toy_features.toy_config(place / "backbone")
    again, other = (
        fit_features_tokenizer(place / "pictures", config, seed=seed) for seed in (0, 1)
    )
    assert again.fingerprint == tokenizer.fingerprint
    assert other.fingerprint != tokenizer.fingerprint


def test_saving_and_loading_changes_nothing(tokenizer, place, pixels_B3HW):
    again = FeaturesTokenizer.from_pretrained(place / "tokenizer")
    assert again.fingerprint == tokenizer.fingerprint and again.config == tokenizer.config
    assert torch.equal(again.encode(pixels_B3HW), tokenizer.encode(pixels_B3HW))
    names = sorted(path.name for path in (place / "tokenizer").iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert set(load_weights(place / "tokenizer" / "model.safetensors")) == set(tokenizer.tables())


def test_a_backbone_with_other_weights_is_refused(tokenizer, tmp_path):
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    other = toy_features.save_toy_backbone(tmp_path / "other", seed=1)
    (folder / "config.json").write_text(json.dumps({**config, "backbone": str(other)}))
    with pytest.raises(InputError, match=r"The backbone .*other has other weights"):
        FeaturesTokenizer.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "backbone": "/nowhere/at/all"}))
    with pytest.raises(InputError, match="The backbone /nowhere/at/all is neither"):
        FeaturesTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "vqgan"}, "is not a features tokenizer's"),
        ({"codebook_size": 25}, "contradicts its config: codebook_KD is"),
        ({"fingerprint": "0123456789abcdef"}, "are not those of the fingerprint 0123456789abcdef"),
        ({"strides": [8, 8]}, "strides must name at least one stride, each once"),
        ({"dimension": 6}, "unknown key 'dimension'"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(tokenizer, tmp_path, change, message):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        FeaturesTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_size": 1000}, "512 cells, fewer than 1000 codes"),
        ({"dimensions": 21}, "20 channels, fewer than 21 dimensions"),
        ({"strides": (8, 64)}, "no map of stride 64 at 64 x 64 pixels; it has 4, 8, 16, 32"),
    ],
)
def test_what_a_backbone_or_the_pictures_cannot_give_is_said(place, tokenizer, settings, message):
    config = toy_features.toy_config(place / "backbone", **settings)
    with pytest.raises(InputError, match=message):
        fit_features_tokenizer(place / "pictures", config, seed=0)


def test_codes_are_shown_in_the_mean_colour_of_their_cells(tokenizer, pixels_B3HW):
    codes_BN = tokenizer.encode(pixels_B3HW)
    drawn = tokenizer.show(codes_BN)
    assert drawn.shape == (8, 3, 64, 64) and drawn.abs().max() <= 1.0
    cells = torch.nn.functional.avg_pool2d(pixels_B3HW, 8)
    of_codes, of_all = (
        (cells - picture).square().mean()
        for picture in (drawn[:, :, ::8, ::8], cells.mean(dim=(0, 2, 3), keepdim=True))
    )
    assert of_codes < 0.7 * of_all
    first = drawn[:, :, ::8, ::8].flatten(2)
    same = codes_BN[0, 0] == codes_BN[0]
    assert torch.equal(first[0, :, same], first[0, :, :1].expand(-1, int(same.sum())))
    assert first.unique().numel() > 10


def test_the_command_makes_a_tokenizer_and_measures_it(place, tmp_path, capsys):
    toy_features.save_toy_backbone(tmp_path / "backbone")
    for split, images in (("train", 12), ("val", 6)):
        synthetic.write_dataset(tmp_path / split, images, seed=0, split=split)
    command = ["tokenizer", "features", tmp_path / "train" / "images", "--out", tmp_path / "made"]
    command += ["--backbone", tmp_path / "backbone", "--codes", 32, "--strides", "8,16"]
    command += ["--dimensions", 8, "--image-size", 64, "--downsampling", 8]
    command += ["--annotations", tmp_path / "train" / "instances_train.json"]
    assert main([str(part) for part in command]) == 0
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["pictures"] == 12 and report["cells"] == 12 * 64
    assert 0 < report["codes_1"]["miou"] < 1 and report["retention_1"] > 0
    assert f"tokenizer {' ' * 22} {report['tokenizer']}" in capsys.readouterr().out

    evaluate = ["tokenizer", "evaluate", tmp_path / "made", tmp_path / "val" / "images"]
    evaluate += ["--annotations", tmp_path / "val" / "instances_val.json", "--shots", "1"]
    examples = [tmp_path / "train" / "images", tmp_path / "train" / "instances_train.json"]
    assert main([str(part) for part in (*evaluate, "--examples", *examples)]) == 0
    assert "codes_1.miou" in capsys.readouterr().out
    assert main([str(part) for part in evaluate]) == 2
    assert "set --annotations for the images, and --examples" in capsys.readouterr().err


def test_centroids_are_read_without_the_backbone(tokenizer, tmp_path):
    """A machine that only trains starts from them and need not have the backbone's weights."""
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "backbone": "/nowhere"}))
    assert torch.equal(read_centroids(tmp_path), tokenizer.codebook_KD)

    weights = load_weights(tmp_path / "model.safetensors")
    save_file({**weights, "mean_C": weights["mean_C"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="are not those of the fingerprint"):
        read_centroids(tmp_path)


def test_each_stage_codes_what_the_stages_before_leave_over(
    tokenizer, place, pixels_B3HW, tmp_path
):
    """By plain loops over cells; more stages come closer to the features."""
    refined = refine_features_tokenizer(place / "pictures", place / "tokenizer", 3, seed=0)
    features_MD = refined.features(pixels_B3HW).flatten(0, 1).double().numpy()
    stages = refined.codebook_KD.double().numpy().reshape(3, toy_features.CODES, -1)
    codes_BN = refined.encode(pixels_B3HW)
    left_of_stage = np.zeros(3)
    for feature_D, code in zip(features_MD, codes_BN.flatten().tolist(), strict=True):
        left_D, sum_D = feature_D, np.zeros_like(feature_D)
        for stage, centroids_KD in enumerate(stages):
            digit = code // toy_features.CODES ** (2 - stage) % toy_features.CODES
            distances_K = np.linalg.norm(left_D - centroids_KD, axis=1)
            assert distances_K[digit] < distances_K.min() + 1e-4
            left_D = left_D - centroids_KD[digit]
            sum_D += centroids_KD[digit]
            left_of_stage[stage] += np.linalg.norm(left_D)
        vector_D = refined.vectors(torch.tensor([[code]]))[0, 0]
        np.testing.assert_allclose(vector_D, sum_D, atol=1e-6)
    assert (np.diff(left_of_stage) < 0).all()
    assert int(codes_BN.max()) < refined.codes == toy_features.CODES**3

    # The first stage is the tokenizer that it was made from, and is displayed in its colours.
    plain_BN = codes_BN // toy_features.CODES**2
    assert torch.equal(plain_BN, tokenizer.encode(pixels_B3HW))
    assert torch.equal(refined.show(codes_BN), tokenizer.show(plain_BN))
    refined.save_pretrained(tmp_path / "refined")
    assert (
        FeaturesTokenizer.from_pretrained(tmp_path / "refined").fingerprint == refined.fingerprint
    )
    assert fingerprint_of_first_stages(tmp_path / "refined", 1) == tokenizer.fingerprint
    assert fingerprint_of_first_stages(tmp_path / "refined", 2) != tokenizer.fingerprint
    at_once = toy_features.toy_config(place / "backbone", stages=3)
    at_once = fit_features_tokenizer(place / "pictures", at_once, seed=0)
    assert at_once.fingerprint == refined.fingerprint


def test_a_tokenizer_is_refined_by_the_command(place, tokenizer, tmp_path, capsys):
    command = ["tokenizer", "features", place / "pictures", "--refine", place / "tokenizer"]
    command = [str(part) for part in (*command, "--out", tmp_path / "made")]
    for more, message in (
        ((), "tokenizer has 1 stage already; set --stages higher"),
        (("--stages", "2", "--codes", "32"), "--codes is kept from the tokenizer to --refine"),
        (("--stages", "2", "--codes", "1024"), "--codes is kept from the tokenizer to --refine"),
        (
            ("--stages", "14"),
            ": 24 features codes in 14 stages make more combinations than 62",
        ),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--stages", "2"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert fingerprint_of_first_stages(tmp_path / "made", 1) == tokenizer.fingerprint
    assert len(json.loads((tmp_path / "made" / "report.json").read_text())["perplexity"]) == 2
