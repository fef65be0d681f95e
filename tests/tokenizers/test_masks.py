"""Masks as black-and-white patches: encoding, decoding, and expected values."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from icl_moe.errors import InputError
from icl_moe.tokenizers.masks import PatchTokenizer, PictureMasks
from icl_moe.tokenizers.vqgan import VQGAN

SIDE = 4


@pytest.fixture
def tokenizer() -> PatchTokenizer:
    """Black, white, left half, top half, and a grey square."""
    patches = torch.zeros(5, SIDE, SIDE)
    patches[1] = 1
    patches[2, :, :2] = 1
    patches[3, :2] = 1
    patches[4] = 0.5
    return PatchTokenizer(patches)


def test_a_cell_is_written_as_the_nearest_patch_and_read_as_it(tokenizer):
    mask_HW = np.zeros((8, 12), dtype=bool)
    mask_HW[:4, 4:8] = True  # Cell 1 is white,
    mask_HW[:4, 8:10] = True  # cell 2 has its left half,
    mask_HW[4:6, 4:8] = True  # cell 4 its top half but for one pixel,
    mask_HW[4, 7] = False
    mask_HW[4:, 8:] = np.eye(4, dtype=bool)  # and a diagonal is nearest to black.
    codes_BN = tokenizer.encode(mask_HW[None])
    assert codes_BN.tolist() == [[0, 1, 2, 0, 3, 0]]
    square_BN = np.array([[1, 2, 3, 4], [0, 9, 5, 1]])
    drawn = tokenizer.decode(square_BN)
    assert drawn.shape == (2, 8, 8)
    for cells_N, levels_HW in zip(square_BN, (drawn + 1) / 2, strict=True):
        for cell, code in enumerate(cells_N):
            row, column = SIDE * (cell // 2), SIDE * (cell % 2)
            found = levels_HW[row : row + SIDE, column : column + SIDE]
            patch = tokenizer.patches_KPP[code] if code < 5 else torch.zeros(SIDE, SIDE)
            assert torch.equal(found, patch)


def test_expected_pixels_are_the_mean_of_the_patches(tokenizer):
    """With eight codes, three of which have no patch and are black."""
    generator = torch.Generator().manual_seed(0)
    probabilities_BNK = torch.randn(2, 9, 8, generator=generator).softmax(dim=-1)
    found = (tokenizer.decode_expected(probabilities_BNK) + 1) / 2
    for batch in range(2):
        for cell in range(9):
            row, column = SIDE * (cell // 3), SIDE * (cell % 3)
            p_K = probabilities_BNK[batch, cell]
            expected = sum(p_K[code] * tokenizer.patches_KPP[code] for code in range(5))
            cell_HW = found[batch, row : row + SIDE, column : column + SIDE]
            torch.testing.assert_close(cell_HW, expected)


def test_the_probability_of_a_colour_is_the_mean_of_its_patches():
    """Code by code, from what each code paints; and for the VQ-GAN, the chances of each corner of
    the RGB cube sum to 1.
    """
    patches = np.random.default_rng(0).integers(0, 5, (6, 2, 2)) / 4
    patches[0] = 0
    tokenizer = PatchTokenizer(torch.from_numpy(patches))
    corners_C3 = np.array([(1, 0, 0), (0, 1, 1), (1, 1, 1), (0, 0, 1)], dtype=bool)
    codes = tokenizer.painted_codes + 2  # The last two have no patch and are black.
    generator = torch.Generator().manual_seed(0)
    probabilities_BNK = torch.randn(2, 9, codes, generator=generator).softmax(dim=-1)
    found_BCHW = tokenizer.decode_colours(probabilities_BNK, corners_C3)
    assert found_BCHW.shape == (2, 4, 6, 6)
    expected_BCHW = torch.zeros(2, 4, 6, 6)
    for code in range(codes):
        levels_3HW = (tokenizer.decode_painted(np.array([[code]]))[0] + 1) / 2
        on_3 = levels_3HW.flatten(1).amax(dim=1) > 0
        for place, corner_3 in enumerate(torch.from_numpy(corners_C3)):
            if on_3.equal(corner_3):
                for cell in range(9):
                    top, left = 2 * (cell // 3), 2 * (cell % 3)
                    p_B11 = probabilities_BNK[:, cell, code, None, None]
                    part = p_B11 * levels_3HW.amax(dim=0)
                    expected_BCHW[:, place, top : top + 2, left : left + 2] += part
    torch.testing.assert_close(found_BCHW, expected_BCHW)

    every_C3 = np.array(list(np.ndindex(2, 2, 2)), dtype=bool)
    vqgan = VQGAN.from_pretrained("demo")
    probabilities_BNK = torch.randn(1, 64, 512, generator=generator).softmax(dim=-1)
    shares_BCHW = PictureMasks(vqgan).decode_colours(probabilities_BNK, every_C3)
    assert shares_BCHW.min() >= 0
    torch.testing.assert_close(shares_BCHW.sum(dim=1), torch.ones(1, 64, 64))


def test_a_folder_gives_the_tokenizer_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = PatchTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.patches_KPP, tokenizer.patches_KPP)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.codes, again.side) == (5, SIDE)


def test_the_shipped_one_draws_masks_as_they_are():
    shipped = PatchTokenizer.from_pretrained("demo_masks")
    assert (shipped.codes, shipped.side) == (512, 8)
    rows, columns = np.mgrid[:64, :64]
    disc_HW = (rows - 30) ** 2 + (columns - 34) ** 2 < 20**2
    drawn_HW = (shipped.decode(shipped.encode(disc_HW[None]))[0] > 0).numpy()
    assert (drawn_HW & disc_HW).sum() / (drawn_HW | disc_HW).sum() > 0.95


def test_masks_that_do_not_divide_into_cells_are_refused(tokenizer):
    with pytest.raises(InputError, match="do not divide into cells of 4 x 4"):
        tokenizer.encode(np.zeros((1, 8, 10), dtype=bool))


def _other_fingerprint(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"fingerprint": "0123"}))


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "does not exist"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a mask tokenizer's"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "missing or damaged"),
        (
            lambda folder: save_file({"other": torch.zeros(1)}, folder / "model.safetensors"),
            "must hold `patches`",
        ),
        (
            lambda folder: save_file(
                {"patches": torch.full((3, 4, 4), 0.5)}, folder / "model.safetensors"
            ),
            "the first one black",
        ),
        (_other_fingerprint, "not those of the fingerprint"),
    ],
)
def test_a_damaged_folder_is_refused(tokenizer, tmp_path, harm, sentence):
    tokenizer.save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(InputError, match=sentence):
        PatchTokenizer.from_pretrained(tmp_path)


def test_a_painted_cell_is_the_nearest_patch_in_any_colour() -> None:
    """Against a plain search over all patches in all seven colours; white masks keep their codes,
    and a code beyond them is black.
    """
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 5, (6, 2, 2)) / 4
    patches[0] = 0
    tokenizer = PatchTokenizer(torch.from_numpy(patches))
    assert tokenizer.painted_codes == 1 + 7 * 5
    coloured = {}
    for code in range(tokenizer.painted_codes + 1):
        pixels_3HW = tokenizer.decode_painted(np.array([[code]]))[0]
        coloured[code] = (pixels_3HW.movedim(0, -1).numpy() + 1) / 2
    assert not coloured[0].any() and not coloured[tokenizer.painted_codes].any()
    assert len({picture.tobytes() for picture in coloured.values()}) == tokenizer.painted_codes

    painted_BHW3 = rng.random((4, 4, 4, 3)) < 0.4
    codes_BN = tokenizer.encode_painted(painted_BHW3)
    for picture_HW3, codes_N in zip(painted_BHW3, codes_BN, strict=True):
        for cell, code in enumerate(codes_N.tolist()):
            top, left = 2 * (cell // 2), 2 * (cell % 2)
            part = picture_HW3[top : top + 2, left : left + 2]
            distances = {c: float(((part - each) ** 2).sum()) for c, each in coloured.items()}
            assert distances[code] == pytest.approx(min(distances.values()))
    masks_BHW = rng.random((4, 4, 4)) < 0.5
    white_BHW3 = np.repeat(masks_BHW[..., None], 3, axis=-1)
    assert np.array_equal(tokenizer.encode_painted(white_BHW3), tokenizer.encode(masks_BHW))
