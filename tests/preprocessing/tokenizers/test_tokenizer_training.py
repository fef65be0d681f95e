"""Training a tokenizer learns, revives codes and resumes exactly after an interruption; measures of
a tokenizer are correct.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from distributed.rank_group import RankGroup
from PIL import Image

from icl_moe.errors import InputError
from icl_moe.images import mask_to_pixels, pixels_to_mask
from icl_moe.settings import load_recipe
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig
from icl_moe.training.distributed import Place
from preprocessing.synthetic import write_dataset
from preprocessing.tokenizers import measures, samples, train
from preprocessing.tokenizers.losses import Adversary, PerceptualLoss
from preprocessing.tokenizers.measures import evaluate_tokenizer
from preprocessing.tokenizers.recipe import TokenizerData, TokenizerRecipe
from preprocessing.tokenizers.train import train_tokenizer

RECIPE = TokenizerRecipe(
    network=VQGANConfig(
        image_size=32,
        codebook_size=32,
        code_channels=8,
        latent_channels=16,
        channels=32,
        channel_multipliers=(1, 1),
        blocks_per_level=1,
        attention_sizes=(),
    ),
    data=TokenizerData(mask_share=0.5),
    steps=30,
    batch_size=8,
    learning_rate=2e-3,
    warmup_steps=5,
    unquantised_steps=10,
    ema_decay=0.9,
    revive_every=5,
    log_every=10,
    save_every=10,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer(RECIPE, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_dataset(folder, images=12, seed=5, image_size=64)
    return folder


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_learns_and_logs(trained: Path) -> None:
    rows = _rows(trained)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 2
    assert {"loss", "l1", "codebook", "psnr", "perplexity", "codes_used"} <= rows[0].keys()
    assert rows[-1]["perplexity"] > 3
    with Image.open(trained / "samples" / "step_000030.png") as grid:
        assert grid.size == (8 * 32, 4 * 32)
    assert VQGAN.from_pretrained(trained).config == RECIPE.network


def interrupt(
    recipe: TokenizerRecipe, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Train until a Ctrl-C before `step`."""
    train_step = train._Run.train_step

    def interrupted(run: train._Run, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if run.step == step:
            raise KeyboardInterrupt
        return train_step(run, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(recipe, folder)


def test_an_interrupted_training_ends_where_an_unbroken_one_does(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(RECIPE, tmp_path, monkeypatch, step=25)
    torch.manual_seed(123)  # other random draws must have no effect
    assert (
        train_tokenizer(RECIPE, tmp_path).fingerprint == VQGAN.from_pretrained(trained).fingerprint
    )
    assert _rows(tmp_path) == _rows(trained)


def test_a_training_that_was_killed_before_it_wrote_its_tokenizer_writes_it_when_run_again(
    trained: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    expected = VQGAN.from_pretrained(out).fingerprint
    VQGAN(RECIPE.network).save_pretrained(out)  # As it was at the save before the last one.
    assert VQGAN.from_pretrained(out).fingerprint != expected
    train_tokenizer(RECIPE, out)
    assert VQGAN.from_pretrained(out).fingerprint == expected


SHARED = dataclasses.replace(
    RECIPE, steps=18, batch_size=12, adversarial_from=16, log_every=2, save_every=9
)


def _train_as_rank(_: Place, folder: Path) -> str:
    return train_tokenizer(SHARED, folder).fingerprint


@pytest.mark.slow
def test_two_devices_train_as_one_does(
    rank_group: Callable[[int], RankGroup], tmp_path: Path
) -> None:
    """This includes the moving of codes, from step 10 on, and shares of 6 samples, which separate
    the 4 crops of a picture.
    """
    fingerprints = rank_group(2).run(_train_as_rank, tmp_path / "two")
    assert fingerprints[0] == fingerprints[1]
    train_tokenizer(SHARED, tmp_path / "one")
    two, one = _rows(tmp_path / "two"), _rows(tmp_path / "one")
    assert [row["step"] for row in two] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    # After these steps the discriminator joins, whose batch norms use a device's share.
    for a, b in zip(two[:8], one[:8], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.fixture
def new_state() -> Iterator[None]:
    """Reset the precision of this process, which accelerate otherwise keeps for later tests."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("new_state")
def test_auto_is_the_precision_that_the_device_computes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(train, "computes_in_bf16", lambda _: precision == "bf16")
    auto, named = (
        train_tokenizer(dataclasses.replace(RECIPE, steps=2, precision=name), tmp_path / name)
        for name in ("auto", precision)
    )
    assert auto.fingerprint == named.fingerprint
    assert AcceleratorState().mixed_precision == {"fp32": "no", "bf16": "bf16"}[precision]


def test_a_finished_training_is_not_run_again(trained: Path) -> None:
    before = (trained / "training_state.pt").stat().st_mtime_ns
    assert (
        train_tokenizer(RECIPE, trained).fingerprint == VQGAN.from_pretrained(trained).fingerprint
    )
    assert (trained / "training_state.pt").stat().st_mtime_ns == before


def test_a_training_can_start_from_a_tokenizer(trained: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        RECIPE,
        start_from=str(trained),
        unquantised_steps=0,
        steps=4,
        log_every=2,
        learning_rate=1e-4,
    )
    train_tokenizer(recipe, tmp_path / "on")
    # From scratch it would be 10 dB less.
    assert _rows(tmp_path / "on")[0]["psnr"] == pytest.approx(_rows(trained)[-1]["psnr"], abs=0.5)
    other = dataclasses.replace(RECIPE, start_from="demo")
    with pytest.raises(
        InputError,
        match=r"start_from: demo has another network: image_size is 64 there and 32 here",
    ):
        train_tokenizer(other, tmp_path / "other")


def test_another_recipe_does_not_go_on_from_a_state(trained: Path) -> None:
    with pytest.raises(InputError, match=r"another recipe \(learning_rate differ"):
        train_tokenizer(dataclasses.replace(RECIPE, learning_rate=1e-4), trained)


def test_a_damaged_state_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "training_state.pt").write_bytes(
        (trained / "training_state.pt").read_bytes()[:5000]
    )
    with pytest.raises(InputError, match="is damaged; remove it"):
        train_tokenizer(RECIPE, tmp_path)


def test_half_weights_ship_in_half_the_bytes(tmp_path: Path) -> None:
    train_tokenizer(dataclasses.replace(RECIPE, steps=1, half_weights=True), tmp_path / "half")
    train_tokenizer(dataclasses.replace(RECIPE, steps=1), tmp_path / "whole")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_adversary_joins_at_its_step_and_resumes_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(
        RECIPE, steps=12, unquantised_steps=2, adversarial_from=6, log_every=4, save_every=8
    )
    whole = train_tokenizer(recipe, tmp_path / "whole")
    assert [("discriminator" in row) for row in _rows(tmp_path / "whole")] == [False, True, True]

    interrupt(recipe, tmp_path / "parts", monkeypatch, step=10)
    assert train_tokenizer(recipe, tmp_path / "parts").fingerprint == whole.fingerprint


def test_the_discriminator_learns_to_tell_noise_from_pictures() -> None:
    torch.manual_seed(0)
    adversary = Adversary(train.Accelerator(), 1e-3)
    source = samples.open_source(RECIPE)
    losses = []
    for step in range(8):
        given_B3HW, _ = source([step], range(4))
        losses.append(
            float(adversary.train_step(torch.rand(4, 3, 32, 32) * 2 - 1, given_B3HW, 1e-3))
        )
    assert losses[-1] < 0.5 * losses[0]


def _squeezenet(path: Path) -> Path:
    """Random weights in the file's format with the real sizes."""
    rng, arrays, width = np.random.default_rng(0), {"conv1.w": (96, 3, 7, 7)}, 96
    for i, (squeeze, expand) in enumerate(
        [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)],
        start=2,
    ):
        arrays |= {
            f"fire{i}_s.w": (squeeze, width, 1, 1),
            f"fire{i}_e1.w": (expand, squeeze, 1, 1),
            f"fire{i}_e3.w": (expand, squeeze, 3, 3),
        }
        width = 2 * expand
    weights = {
        name: rng.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype(np.float16)
        for name, shape in arrays.items()
    }
    np.savez(
        path,
        **weights,
        **{
            name.replace(".w", ".b"): np.zeros(shape[0], np.float32)
            for name, shape in arrays.items()
        },
    )
    return path


def test_the_perceptual_loss_grows_with_damage_and_takes_part_in_training(tmp_path: Path) -> None:
    network = _squeezenet(tmp_path / "net.npz")
    loss = PerceptualLoss(network)
    given_B3HW, _ = samples.open_source(dataclasses.replace(RECIPE, data=TokenizerData()))(
        [0], range(4)
    )
    noise = torch.randn(given_B3HW.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        float(loss(given_B3HW + amount * noise, given_B3HW)) for amount in (0.0, 0.05, 0.3)
    ]
    assert distances[0] == 0 < distances[1] < distances[2]
    train_tokenizer(
        dataclasses.replace(RECIPE, steps=2, log_every=1, perceptual_network=str(network)),
        tmp_path / "out",
    )
    assert all(row["perceptual"] > 0 for row in _rows(tmp_path / "out"))
    with pytest.raises(InputError, match="holds no SqueezeNet"):
        PerceptualLoss(tmp_path / "out" / "config.json")


def test_new_codes_are_spread_over_unlike_latents() -> None:
    """With a thousand latents in one spot and five far away, drawing six codes must find all
    five.
    """
    generator = torch.Generator().manual_seed(0)
    latents_NC = torch.cat(
        [
            torch.randn(1000, 4, generator=generator) * 1e-3,
            10 * torch.eye(5, 4) + 5 * torch.arange(5)[:, None],
        ]
    )
    vectors_DC = train._spread(latents_NC, torch.zeros(1, 4), 5, generator)
    nearest = torch.cdist(latents_NC[1000:], vectors_DC).min(dim=1).values
    assert (nearest < 1e-6).all()


def test_dead_codes_come_back_to_life() -> None:
    recipe = dataclasses.replace(RECIPE, unquantised_steps=0)
    run = train._Run(recipe, train.Accelerator())
    source = samples.open_source(recipe)
    pixels_B3HW, is_mask_B = source([0], range(8))
    with torch.no_grad():
        run.trained.quantize.embedding.weight.fill_(1e3)  # no latent is close to a code
    run.step = 5  # as if some steps had chosen no code except these
    run.train_step(pixels_B3HW, is_mask_B)
    assert run.trained.encode(pixels_B3HW).unique().numel() > 16


def test_masks_are_mixed_in_at_their_share(pictures: Path) -> None:
    for data in (
        TokenizerData(mask_share=0.3),
        TokenizerData(
            images=str(pictures / "images"),
            annotations=str(pictures / "instances_train.json"),
            mask_share=0.3,
        ),
    ):
        source = samples.open_source(dataclasses.replace(RECIPE, data=data))
        pixels_B3HW, is_mask_B = source([0], range(200))
        black_and_white_B = (pixels_B3HW.abs() == 1).flatten(1).all(dim=1)
        assert torch.equal(black_and_white_B, is_mask_B)
        assert 0.2 < is_mask_B.float().mean() < 0.4


def test_a_perfect_tokenizer_measures_as_perfect_and_a_black_one_does_not(
    pictures: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fake encoders and decoders the expected measures are known."""
    kept: list[
        torch.Tensor
    ] = []  # at most one slice, so that the decoder receives what was just encoded

    def remember(self: VQGAN, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        kept[:] = [pixels_B3HW]
        return torch.arange(16)[None].expand(len(pixels_B3HW), 16)

    monkeypatch.setattr(VQGAN, "encode", remember)
    monkeypatch.setattr(VQGAN, "decode", lambda self, codes_BN: kept[0])
    report = evaluate_tokenizer(
        trained, pictures / "images", pictures / "instances_train.json", batch_size=5
    )
    assert report["pictures"] == 12 and report["masks"] >= 12
    assert (
        report["psnr"] > 80
        and report["ssim"] == pytest.approx(1.0)
        and report["mask_iou"] == report["mask_miou"] == 1.0
        and report["mask_mae"] == 0.0
    )
    assert report["codes_used"] == 0.5 and report["perplexity"] == pytest.approx(16.0)
    assert report["masks"] == sum(report[f"masks_{size}"] for size in ("small", "medium", "large"))

    monkeypatch.setattr(VQGAN, "decode", lambda self, codes_BN: torch.full_like(kept[0], -1.0))
    assert (
        evaluate_tokenizer(trained, pictures / "images", pictures / "instances_train.json")[
            "mask_iou"
        ]
        == 0.0
    )


def test_classes_count_alike_and_their_masks_by_their_pixels(trained: Path) -> None:
    """There are two classes: a large mask of the first is reproduced and a small one missed; half
    of one mask of the second is reproduced.
    """
    found = measures._Measures(VQGAN.from_pretrained(trained), batch_size=8)
    masks = np.zeros((3, 32, 32), dtype=bool)
    masks[0, :30], masks[1, :2], masks[2, :20] = True, True, True
    drawn = masks.copy()
    drawn[1] = False
    drawn[2, 10:] = False
    found._redraw = lambda pixels_B3HW: torch.stack([mask_to_pixels(mask) for mask in drawn])
    for mask_HW, category in zip(masks, (1, 1, 2), strict=True):
        found.add_mask(mask_HW, category, area=int(mask_HW.sum()))
    found._measure_masks()
    found.add_picture(torch.zeros(3, 32, 32))
    found._redraw = lambda pixels_B3HW: pixels_B3HW
    found._use_K[0] = 1
    report = found.report()
    assert report["mask_miou"] == pytest.approx((30 / 32 + 0.5) / 2)
    assert report["mask_iou"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert report["mask_mae"] == pytest.approx((0 + 2 / 32 + 10 / 32) / 3)


def test_the_batch_size_does_not_change_the_measures(pictures: Path, trained: Path) -> None:
    reports = [
        evaluate_tokenizer(
            trained, pictures / "images", pictures / "instances_train.json", batch_size=n
        )
        for n in (1, 7)
    ]
    assert reports[0].pop("tokenizer") == reports[1].pop("tokenizer")
    numbers = [
        {name: value for name, value in report.items() if value is not None} for report in reports
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def test_the_shipped_tokenizer_is_as_good_as_its_page_says(tmp_path: Path) -> None:
    """Mask ceiling, fidelity and use of its codes on unseen scenes, with a small tolerance."""
    write_dataset(tmp_path, images=80, seed=987_654, split="val")
    report = evaluate_tokenizer("demo", tmp_path / "images", tmp_path / "instances_val.json")
    assert report["mask_miou"] >= 0.90
    assert report["psnr"] >= 24.0
    assert report["codes_used"] >= 0.60


def test_the_mask_threshold_is_the_middle() -> None:
    mask_HW = np.zeros((32, 32), dtype=bool)
    mask_HW[:10] = True
    assert (pixels_to_mask(mask_to_pixels(mask_HW) * 0.01) == mask_HW).all()


def test_the_shipped_recipe_is_the_shipped_network() -> None:
    recipe = load_recipe(TokenizerRecipe, "tokenizer_demo", package="preprocessing.tokenizers")
    assert recipe.network == VQGAN.from_pretrained("demo").config


def test_wrong_recipes_and_files_are_refused(tmp_path: Path, pictures: Path, trained: Path) -> None:
    with pytest.raises(InputError, match=r"data\.mask_share needs data\.annotations"):
        TokenizerData(images="somewhere", mask_share=0.5)
    with pytest.raises(InputError, match="did you mean 'steps'"):
        load_recipe(
            TokenizerRecipe, "tokenizer_demo", ["step=5"], package="preprocessing.tokenizers"
        )
    with pytest.raises(InputError, match=r"holds no images, such as \.jpg"):
        evaluate_tokenizer(trained, tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        evaluate_tokenizer(trained, pictures / "images", tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        evaluate_tokenizer(trained, pictures / "images", tmp_path / "broken.json")


def test_records_without_a_file_name_are_no_records_of_a_picture(pictures: Path) -> None:
    """LVIS has none."""
    file = pictures / "without_names.json"
    content = json.loads((pictures / "instances_train.json").read_text())
    for record in content["images"][1:]:
        del record["file_name"]
    file.write_text(json.dumps(content))
    masks = samples.ClassMasks(file)
    names = [path.name for path in samples.image_files(pictures / "images")]
    assert [masks.has(name) for name in names] == [True, *[False] * (len(names) - 1)]


def test_a_picture_that_disagrees_with_its_record_is_refused(
    tmp_path: Path, pictures: Path, trained: Path
) -> None:
    content = json.loads((pictures / "instances_train.json").read_text())
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 50)).save(tmp_path / "images" / "1.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"1\.jpg is 40 x 50 pixels, but its record in .* says 64 x 64"
    ):
        evaluate_tokenizer(trained, tmp_path / "images", tmp_path / "instances.json")
