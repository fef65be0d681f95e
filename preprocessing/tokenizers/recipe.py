"""The recipe of an image tokenizer: what `icl-moe tokenizer train` reads."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from icl_moe.errors import InputError
from icl_moe.ranges import Count, LearningRate, Natural, Range, Weight
from icl_moe.tokenizers.vqgan import VQGANConfig

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class TokenizerData:
    """images: a folder of pictures, or `synthetic` for an endless supply of drawn scenes.

    annotations: a COCO instances file of that folder's pictures, from which masks are taken.
    mask_share: the share of training samples that are masks, white on black. smallest_crop: the
    least side of a random crop, as a share of the picture's short side.
    """

    images: str = SYNTHETIC
    annotations: str | None = None
    mask_share: Annotated[float, Range(0, 1)] = 0.0
    smallest_crop: Annotated[float, Range(above=0, most=1)] = 0.5

    def __post_init__(self) -> None:
        if self.mask_share and self.images != SYNTHETIC and self.annotations is None:
            raise InputError(
                "data.mask_share needs data.annotations, a COCO instances file, to take masks from."
            )


@dataclass(frozen=True)
class TokenizerRecipe:
    """What `train_tokenizer` reads. Steps are optimizer steps; batch_size counts samples over all
    devices.

    The learning rate rises over warmup_steps and falls to zero at the last step as a half cosine.
    For the first unquantised_steps the decoder sees the latents themselves, so that the codes can
    then start among meaningful ones. A code that is chosen less than revive_below times a batch (a
    running mean over about 100 steps) is moved onto a latent of the batch, every revive_every steps
    up to three quarters of the training.

    mask_weight: of a hinge on the pixels of masks that lie on the wrong side of the threshold, or
    close to it; none by default.
    start_from: a tokenizer's folder (or a shipped name) of this network, whose weights to begin
    with instead of random ones, such as a converted release that is to learn masks;
    unquantised_steps is best 0 then.
    perceptual_network: the .npz of SqueezeNet weights for a perceptual loss, none by default.
    adversarial_from: the step from which a PatchGAN discriminator trains along, none by default.
    Every loss but the L1 difference has its weight.
    precision: of the network's arithmetic; `auto` is bf16 where the device has instructions for it,
    else fp32.
    """

    network: VQGANConfig = field(default_factory=VQGANConfig)
    start_from: str | None = None
    data: TokenizerData = field(default_factory=TokenizerData)
    steps: Count = 10_000
    batch_size: Count = 32
    learning_rate: LearningRate = 4e-4
    warmup_steps: Natural = 100
    unquantised_steps: Natural = 500
    commitment: Weight = 0.25
    mask_weight: Weight = 0.0
    perceptual_network: str | None = None
    perceptual_weight: Weight = 1.0
    adversarial_from: Natural | None = None
    adversarial_weight: Weight = 0.8
    ema_decay: Annotated[float, Range(0, below=1)] = 0.999
    revive_every: Count = 50
    revive_below: Annotated[float, Range(0)] = 0.05
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    half_weights: bool = False
    seed: Natural = 0
    log_every: Count = 100
    save_every: Count = 500
