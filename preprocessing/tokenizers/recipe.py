"""The recipe of an image tokenizer, for `icl-moe tokenizer train`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from icl_moe.errors import InputError
from icl_moe.ranges import Count, LearningRate, Natural, Range, Weight
from icl_moe.tokenizers.vqgan import VQGANConfig

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class TokenizerData:
    """What a tokenizer is trained on. images: a folder of pictures, or `synthetic` for an unlimited
    number of drawn scenes.

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
    """The settings of `train_tokenizer`. Steps are optimizer steps; batch_size counts samples over
    all devices.

    The learning rate rises over warmup_steps and falls to zero at the last step as a half cosine.
    For the first unquantised_steps the decoder reads the latents without quantisation, so that the
    codes can then be initialised from meaningful latents. Every revive_every steps of the first
    three quarters of the training, a code that is chosen less than revive_below times per batch (a
    running mean over about 100 steps) is moved onto a latent of the batch.

    mask_weight: the weight of a hinge loss on the pixels of masks that are on the wrong side of the
    threshold or close to it; 0 by default.
    start_from: the folder of a tokenizer (or a shipped name) with the same network, whose weights
    replace the random initialisation; for example a converted release that is to learn masks.
    unquantised_steps should then be 0.
    perceptual_network: an .npz file of SqueezeNet weights for a perceptual loss; none by default.
    adversarial_from: the step from which a PatchGAN discriminator is trained as well; none by
    default. Every loss except the L1 loss has a weight.
    precision: the precision of the network's arithmetic; `auto` is bf16 if the device has
    instructions for it, otherwise fp32.
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

    def __post_init__(self) -> None:
        if self.network.lookup != "distance":
            raise InputError(
                "network.lookup must be distance for training, whose losses move a code to the "
                "latents that are nearest to it; dot_product is for converted IBQ tokenizers."
            )
