"""If a file is of another kind that people often have instead, messages name that kind and say what
to do.
"""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from icl_moe.errors import InputError
from icl_moe.images import load_image
from icl_moe.inference.model import InContextModel
from icl_moe.inputs import read_json, shipped_folders
from icl_moe.tokenizers.releases import convert_release
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing.visual_genome import read_json_list

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
KINDS = {
    "is a web page": b"\n<!DOCTYPE html>\n<html><head>",
    "is a pointer of Git LFS": LFS,
    "is compressed with gzip": gzip.compress(b"[]"),
    "is a ZIP archive": b"PK\x03\x04\x14\x00",
}


def shipped(folder: Path, where: str, name: str, weights: Path) -> Path:
    """What ships as `name`, with other weights."""
    shutil.copytree(shipped_folders(where, "config.json")[name], folder)
    shutil.copyfile(weights, folder / "model.safetensors")
    return folder


DOORS: dict[str, Callable[[Path], object]] = {
    "annotations": read_json,
    "Visual Genome's files": lambda file: list(read_json_list(file)),
    "an image": load_image,
    "a tokenizer": lambda file: VQGAN.from_pretrained(
        shipped(file.parent / "tokenizer", "tokenizers/assets", "demo", file)
    ),
    "a model": lambda file: InContextModel.from_pretrained(
        shipped(file.parent / "model", "models", "demo", file), "cpu"
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_what_stands_in_the_place_of_a_file_is_called_what_it_is(tmp_path, door, kind):
    file = tmp_path / "file"
    file.write_bytes(KINDS[kind])
    with pytest.raises(InputError, match=f"(file|model.safetensors) {kind}"):
        DOORS[door](file)


def test_a_pointer_in_the_place_of_a_checkpoint_is_called_that(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(LFS)
    network = {"double_z": False, "z_channels": 32, "resolution": 32, "in_channels": 3, "out_ch": 3}
    network |= {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [16]}
    config = {"model": {"params": {"embed_dim": 32, "n_embed": 16, "ddconfig": network}}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"last\.ckpt is a pointer of Git LFS"):
        convert_release(tmp_path / "last.ckpt", tmp_path / "model.yaml", tmp_path / "out")
