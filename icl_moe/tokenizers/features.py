"""The features tokenizer: k-means codes over the feature grid of a frozen backbone. It encodes only
input images; outputs need the VQ-GAN or a mask tokenizer.

A cell's features combine several strides: each stride's map is resized to the grid, standardised by
channel and normalised to length 1; the concatenation is projected by PCA and normalised again. Its
code is the nearest of K centroids. With several stages, the next stage's code is the nearest of K
centroids to what is left, the features less the centroids of the stages before (residual vector
quantisation; Juang and Gray 1982, "Multiple stage vector quantization for speech coding"). All of a
cell's codes are combined into one number (`icl_moe.vocabulary.join_stages`). A saved tokenizer is a
folder of config.json and model.safetensors, which identifies its backbone by fingerprint and does
not contain the backbone's weights.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.errors import InputError
from icl_moe.ranges import Count, ImageSide, Range
from icl_moe.settings import from_dict, to_dict
from icl_moe.tokenizers.backbones import Backbone, open_backbone
from icl_moe.tokenizers.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_keys,
    check_sides,
    find_tokenizer,
    load_weights,
    read_config,
    save_folder,
    weights_fingerprint,
)
from icl_moe.vocabulary import Stages, check_stages, join_stages, split_stages, stage_rows


@dataclass(frozen=True)
class FeaturesConfig:
    """The configuration of a features tokenizer.

    backbone, weights: see `open_backbone`. strides: the feature maps to combine, by stride in
    pixels of the image. channels: the number of channels of each of these maps. image_size: the
    side of its images. downsampling: side in pixels of the square that one code represents.
    codebook_size: the number of codes of each stage. dimensions: the number of principal
    components. stages: how many codes describe a cell.
    """

    backbone: str = "efficientnet_lite0"
    weights: str | None = None
    strides: tuple[Count, ...] = (16, 32)
    channels: tuple[Count, ...] = (112, 320)
    image_size: ImageSide = 256
    downsampling: Count = 16
    codebook_size: Annotated[int, Range(2)] = 1024
    dimensions: Count = 64
    stages: Stages = 1

    def __post_init__(self) -> None:
        if self.image_size % self.downsampling:
            raise InputError(
                f"image_size must be a multiple of {self.downsampling}, the downsampling, not "
                f"{self.image_size}."
            )
        if not self.strides or len(set(self.strides)) != len(self.strides):
            raise InputError("strides must name at least one stride, each once.")
        if len(self.channels) != len(self.strides):
            raise InputError("channels must be a number for each of the strides.")
        check_stages(self.codebook_size, self.stages)

    @property
    def codes(self) -> int:
        """The number of combinations of the stages' codes."""
        return self.codebook_size**self.stages

    @property
    def codes_per_image(self) -> int:
        return (self.image_size // self.downsampling) ** 2


class FeaturesTokenizer(nn.Module):
    """An image tokenizer that only encodes: its codes cannot be decoded.

    Its tables, besides the backbone: mean_C and deviation_C of the joined channels C, centre_C and
    projection_CD of the PCA, the centroids codebook_KD of each stage, one below the other (those
    of the first stage have a length of 1 or a little less), and colours_K3, the mean colour of the
    cells of each code of the first stage in [-1, 1], with which codes are displayed.
    """

    mean_C: Tensor
    deviation_C: Tensor
    centre_C: Tensor
    projection_CD: Tensor
    codebook_KD: Tensor
    colours_K3: Tensor

    def __init__(self, config: FeaturesConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        for name, table in _empty_tables(config).items():
            self.register_buffer(name, table)
        self.eval()

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "FeaturesTokenizer":
        """The tokenizer in the folder `source`, or the shipped one of that name, with its backbone,
        in eval mode.

        Raises InputError if files are missing, damaged or inconsistent, or if the backbone is
        missing or has other weights than at the tokenizer's creation.
        """
        stored = _Stored.read(source)
        backbone = open_backbone(stored.config.backbone, stored.config.weights)
        if backbone.fingerprint != stored.backbone_fingerprint:
            raise InputError(
                f"The backbone {stored.config.backbone} has other weights (fingerprint "
                f"{backbone.fingerprint}) than the tokenizer {source} was made with "
                f"({stored.backbone_fingerprint})."
            )
        model = cls(stored.config, backbone)
        model.load_state_dict(stored.tables, strict=False)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder: configuration, tables, and the backbone's name and fingerprint."""
        config = {**to_dict(self.config), "backbone_fingerprint": self.backbone.fingerprint}
        tables = {name: table.cpu().contiguous() for name, table in self.tables().items()}
        save_folder(Path(folder), "features", config, self.fingerprint, tables)

    def tables(self) -> dict[str, Tensor]:
        """All stored tensors, which exclude the backbone."""
        return dict(self.named_buffers(recurse=False))

    @property
    def device(self) -> torch.device:
        return self.mean_C.device

    @property
    def downsampling(self) -> int:
        return self.config.downsampling

    @property
    def codes(self) -> int:
        return self.config.codes

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of a SHA-256 over everything that determines a code: configuration,
        tables, and the backbone's fingerprint, but not the path of the backbone.
        """
        return _fingerprint(self.config, self.backbone.fingerprint, self.tables())

    @torch.inference_mode()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] as codes_BN, int64, the grid of H/f x W/f codes row by row.

        Raises InputError if a side is not a multiple of the downsampling f.
        """
        return self.codes_of(self.features(pixels_B3HW))

    def codes_of(self, features_BND: Tensor) -> Tensor:
        """The codes_BN of features: in each stage, the index of the centroid that is nearest to
        what the stages before leave over.
        """
        left_BND, parts = features_BND, []
        for centroids_KD in self.codebook_KD.split(self.config.codebook_size):
            parts.append(nearest(left_BND, centroids_KD))
            left_BND = left_BND - centroids_KD[parts[-1]]
        return join_stages(parts, self.config.codebook_size)

    @torch.inference_mode()
    def features(self, pixels_B3HW: Tensor) -> Tensor:
        """The features (B, N, D) of the cells before quantisation, each of length 1."""
        return self.project(self.join(self.cells(pixels_B3HW)))

    def vectors(self, codes_BN: Tensor) -> Tensor:
        """The features (B, N, D) that codes represent: the sum of their stages' centroids."""
        rows = stage_rows(codes_BN, self.config.codebook_size, self.config.stages)
        return self.codebook_KD[torch.stack(rows)].sum(dim=0)

    def cells(self, pixels_B3HW: Tensor) -> Tensor:
        """The backbone's raw maps on the grid, (B, N, C)."""
        maps = grid_maps(self.backbone, self.config.strides, self.config.downsampling, pixels_B3HW)
        found = tuple(map_BNC.shape[-1] for map_BNC in maps)
        if found != self.config.channels:
            raise InputError(
                f"The backbone {self.config.backbone} has maps of {found} channels at the strides "
                f"{self.config.strides}, but the tokenizer was made for {self.config.channels}."
            )
        return torch.cat(maps, dim=-1)

    def join(self, cells_BNC: Tensor) -> Tensor:
        """`cells`, standardised by channel, then normalised to length 1 for each stride."""
        parts = ((cells_BNC - self.mean_C) / self.deviation_C).split(list(self.config.channels), -1)
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)

    def project(self, joined_BNC: Tensor) -> Tensor:
        """The projection of joined cells onto the principal axes, (..., D), each of length 1."""
        return F.normalize((joined_BNC - self.centre_C) @ self.projection_CD, dim=-1)

    def show(self, codes_BN: Tensor) -> Tensor:
        """A picture (B, 3, H, W) in [-1, 1] for display: each cell in the mean colour of its first
        stage's code.
        """
        side = round(codes_BN.shape[1] ** 0.5)
        first_BN = split_stages(codes_BN, self.config.codebook_size, self.config.stages)[0]
        cells_B3hw = self.colours_K3[first_BN].transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(cells_B3hw, scale_factor=float(self.downsampling), mode="nearest")


@dataclass(frozen=True)
class _Stored:
    """What a tokenizer's folder holds: everything but the backbone."""

    config: FeaturesConfig
    backbone_fingerprint: Any
    tables: dict[str, Tensor]

    @classmethod
    def read(cls, source: str | Path) -> "_Stored":
        """Raises InputError if files are missing, damaged or inconsistent."""
        folder = find_tokenizer(source, "features_tokenizer")
        settings, fingerprint = read_config(
            folder / CONFIG_FILE, "features", "a features tokenizer"
        )
        backbone_fingerprint = settings.pop("backbone_fingerprint", None)
        config = from_dict(FeaturesConfig, settings, origin=str(folder / CONFIG_FILE))
        tables = load_weights(folder / WEIGHTS_FILE)
        check_keys(_empty_tables(config), tables, str(folder / WEIGHTS_FILE))
        if _fingerprint(config, backbone_fingerprint, tables) != fingerprint:
            raise InputError(
                f"The tables in {folder} are not those of the fingerprint {fingerprint} in its "
                f"{CONFIG_FILE}."
            )
        return cls(config, backbone_fingerprint, tables)


def _empty_tables(config: FeaturesConfig) -> dict[str, Tensor]:
    channels = sum(config.channels)
    return {
        "mean_C": torch.zeros(channels),
        "deviation_C": torch.ones(channels),
        "centre_C": torch.zeros(channels),
        "projection_CD": torch.zeros(channels, config.dimensions),
        "codebook_KD": torch.zeros(config.stages * config.codebook_size, config.dimensions),
        "colours_K3": torch.zeros(config.codebook_size, 3),
    }


def _fingerprint(config: FeaturesConfig, backbone: Any, tables: dict[str, Tensor]) -> str:
    settings = to_dict(config)
    del settings["backbone"], settings["weights"]
    if config.stages == 1:
        del settings["stages"]  # As before there were stages.
    return weights_fingerprint({**settings, "backbone_fingerprint": backbone}, tables)


def read_centroids(source: str | Path) -> Tensor:
    """The centroids codebook_KD of the tokenizer `source`, float32, without its backbone, whose
    weights a machine that only trains need not have.

    Raises InputError if files are missing, damaged or inconsistent.
    """
    return _Stored.read(source).tables["codebook_KD"].float()


def fingerprint_of_first_stages(source: str | Path, stages: int) -> str:
    """The fingerprint of the tokenizer that has only the first `stages` of those of `source`.

    Raises InputError if files are missing, damaged or inconsistent.
    """
    stored = _Stored.read(source)
    rows = stages * stored.config.codebook_size
    tables = {**stored.tables, "codebook_KD": stored.tables["codebook_KD"][:rows].contiguous()}
    return _fingerprint(replace(stored.config, stages=stages), stored.backbone_fingerprint, tables)


@torch.inference_mode()
def grid_maps(
    backbone: Backbone, strides: tuple[int, ...], downsampling: int, pixels_B3HW: Tensor
) -> list[Tensor]:
    """The backbone's map of each stride on the grid of H/f x W/f cells, (B, N, channels).

    Finer maps are averaged over a cell, coarser ones interpolated. Raises InputError if the
    backbone has no map of a stride, or a side of the image is not a multiple of f.
    """
    check_sides(pixels_B3HW, downsampling)
    height, width = pixels_B3HW.shape[-2:]
    maps = backbone.maps(pixels_B3HW)
    lacking = [stride for stride in strides if stride not in maps]
    if lacking:
        raise InputError(
            f"The backbone has no map of stride {lacking[0]} at {height} x {width} pixels; it has "
            f"{', '.join(map(str, sorted(maps)))}."
        )
    grid = (height // downsampling, width // downsampling)
    return [_on_grid(maps[stride], grid).flatten(2).transpose(1, 2) for stride in strides]


def _on_grid(map_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
    if map_BChw.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(map_BChw, grid)
    return F.interpolate(map_BChw, grid, mode="bilinear", align_corners=False)


def nearest(features_BND: Tensor, codebook_KD: Tensor) -> Tensor:
    """codes_BN: the index of the nearest centroid e, which has the least |e|^2 - 2 f.e."""
    flat_MD = features_BND.flatten(0, 1)
    lengths_K = codebook_KD.square().sum(dim=1)
    # In slices, since the distances of 4096 codes for a whole batch would take gigabytes.
    codes = [
        (lengths_K - 2 * part_MD @ codebook_KD.T).argmin(dim=1) for part_MD in flat_MD.split(8192)
    ]
    return torch.cat(codes).view(features_BND.shape[:-1])
