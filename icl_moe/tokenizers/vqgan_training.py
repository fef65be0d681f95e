"""Training a VQ-GAN on pictures and masks, and measuring one: fidelity, use of its codes, and how
well masks survive it.
"""

import contextlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.images import (
    crop_and_resize,
    crop_and_resize_mask,
    load_image,
    mask_to_pixels,
    middle_square,
    pixels_to_mask,
    to_image,
    to_pixels,
)
from icl_moe.outputs import output_folder, writing
from icl_moe.processes import default_device, join_processes
from icl_moe.recipe import to_dict
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig, check_free
from icl_moe.tokenizers.vqgan_losses import Adversary, PerceptualLoss

STATE_FILE, LOG_FILE = "training_state.pt", "log.jsonl"
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
    mask_share: float = 0.0
    smallest_crop: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.mask_share <= 1 or not 0 < self.smallest_crop <= 1:
            raise InputError(
                "data.mask_share must lie in 0..1 and data.smallest_crop in 0..1 without 0."
            )
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
    """

    network: VQGANConfig = field(default_factory=VQGANConfig)
    start_from: str | None = None
    data: TokenizerData = field(default_factory=TokenizerData)
    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 4e-4
    warmup_steps: int = 100
    unquantised_steps: int = 500
    commitment: float = 0.25
    mask_weight: float = 0.0
    perceptual_network: str | None = None
    perceptual_weight: float = 1.0
    adversarial_from: int | None = None
    adversarial_weight: float = 0.8
    ema_decay: float = 0.999
    revive_every: int = 50
    revive_below: float = 0.05
    precision: Literal["fp32", "bf16"] = "fp32"
    half_weights: bool = False
    seed: int = 0
    log_every: int = 100
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "revive_every", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must lie in 0..1 without 1, not {self.ema_decay}.")


Draw = Callable[[np.random.Generator], tuple[Image.Image, list[np.ndarray]]]
"""From a generator, a picture and its class masks (H, W)."""


def train_tokenizer(recipe: TokenizerRecipe, out: Path, draw_scene: Draw) -> VQGAN:
    """Train by `recipe` into the tokenizer folder `out`, and return the averaged (EMA) model that
    was saved there.

    draw_scene: draws what data.images=synthetic stands for. Beside the tokenizer, `out` gets
    log.jsonl, samples/*.png and the state from which the same call goes on, exactly, after an
    interruption. Every sample and choice is a function of (seed, step): under `accelerate launch`
    all devices share the batch that one would have. Raises InputError where `out` holds the state
    of another recipe, or a tokenizer without a state.
    """
    out = output_folder(out)
    if not (out / STATE_FILE).is_file():
        check_free(out)
    join_processes()
    accelerator = Accelerator(mixed_precision="bf16" if recipe.precision == "bf16" else "no")
    run = _Run(recipe, accelerator)
    run.resume(out)
    source = _open_source(recipe, draw_scene)
    share = recipe.batch_size // accelerator.num_processes
    if share * accelerator.num_processes != recipe.batch_size:
        raise InputError(
            f"batch_size {recipe.batch_size} cannot be shared evenly by "
            f"{accelerator.num_processes} devices."
        )
    mine = range(share * accelerator.process_index, share * (accelerator.process_index + 1))
    with writing(out):
        _train(run, source, mine, out)
    accelerator.wait_for_everyone()
    return run.finished()


def _train(run: "_Run", source: "Source", mine: range, out: Path) -> None:
    """Take the steps that are left, on this device's share of each batch; the main process keeps
    the record in `out`.
    """
    recipe, accelerator = run.recipe, run.accelerator
    unseen_B3HW, _ = source((recipe.seed, _UNSEEN), range(64))
    (out / "samples").mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        range(run.step, recipe.steps),
        initial=run.step,
        total=recipe.steps,
        desc="tokenizer",
        disable=not accelerator.is_main_process,
    )
    for step in bar:
        losses = run.train_step(*source((recipe.seed, step), mine))
        last = step + 1 == recipe.steps
        logged = (step + 1) % recipe.log_every == 0 or last
        if logged:
            losses = {name: accelerator.reduce(value, "mean") for name, value in losses.items()}
        if logged and accelerator.is_main_process:
            row = {
                "step": step + 1,
                **{name: round(float(value), 5) for name, value in losses.items()},
                **run.measure(unseen_B3HW),
            }
            _log(out, row)
            _save_grid(run.averaged, unseen_B3HW, out / "samples" / f"step_{step + 1:06d}.png")
            bar.set_postfix(psnr=f"{row['psnr']:.2f}", codes=f"{row['codes_used']:.0%}")
        if accelerator.is_main_process and ((step + 1) % recipe.save_every == 0 or last):
            run.save(out)


def evaluate_tokenizer(
    folder: str | Path, images: Path, annotations: Path | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """Measure the tokenizer `folder` (or a shipped one by name) on the pictures in `images`, as
    plain values.

    Each picture's short side is resized to the tokenizer's image size and its middle square is
    taken. Reported are the means over pictures of PSNR and SSIM, and the share and perplexity of
    the codes over the whole set. With `annotations`, a COCO
    instances file, also the mask ceiling: each class mask of a picture is drawn white on black,
    encoded, decoded and thresholded; mask_miou is the mean over classes of (sum of a class's
    intersections with the masks put in) / (sum of its unions), mask_iou the mean over masks of
    intersection / union, mask_mae the mean share of wrong pixels. By size: mask_iou for COCO's
    small, medium and large, bounded by 32^2 and 96^2 pixels of the whole mask in the picture as it
    is in its file.

    Memory does not grow with the number of pictures. Raises InputError for a folder without
    pictures, an unreadable picture, annotations that are not COCO's, and a picture whose size
    disagrees with its record.
    """
    tokenizer = VQGAN.from_pretrained(folder).to(default_device())
    truth = _ClassMasks(Path(annotations)) if annotations else None
    measures = _Measures(tokenizer, batch_size)
    for file in tqdm(_image_files(Path(images)), desc="measuring", unit="image", disable=None):
        image = load_image(file)
        box, size = middle_square(image.size), tokenizer.config.image_size
        measures.add_picture(to_pixels(crop_and_resize(image, box, size)))
        for category, mask_HW in truth.of(file.name, image.size).items() if truth else ():
            measures.add_mask(
                crop_and_resize_mask(mask_HW, box, size), category, int(mask_HW.sum())
            )
    return measures.report()


class _Run:
    """The state of one training: model, its running mean, optimizer, use of the codes."""

    def __init__(self, recipe: TokenizerRecipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator, self.step = recipe, accelerator, 0
        torch.manual_seed(recipe.seed)
        trained = VQGAN(recipe.network)
        self.use_K = torch.zeros(recipe.network.codebook_size, device=accelerator.device)
        if recipe.start_from is not None:
            trained.load_state_dict(_weights_to_start_from(recipe.start_from, recipe.network))
            self.use_K.fill_(
                recipe.revive_below
            )  # its codes have their meaning: none is dead before it was not chosen
        self.averaged = VQGAN(recipe.network).to(accelerator.device).eval().requires_grad_(False)
        self.averaged.load_state_dict(trained.state_dict())
        optimizer = torch.optim.AdamW(
            trained.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.model, self.optimizer = accelerator.prepare(_Autoencoder(trained), optimizer)
        self.trained = trained
        self.perceptual = (
            PerceptualLoss(recipe.perceptual_network).to(accelerator.device)
            if recipe.perceptual_network
            else None
        )
        self.adversary = (
            Adversary(accelerator, recipe.learning_rate)
            if recipe.adversarial_from is not None
            else None
        )

    def train_step(self, pixels_B3HW: Tensor, is_mask_B: Tensor) -> dict[str, Tensor]:
        """One optimizer step on this device's share of the batch; returns the parts of the loss by
        name.
        """
        recipe = self.recipe
        learning_rate = recipe.learning_rate * _schedule(self.step, recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        pixels_B3HW = pixels_B3HW.to(self.accelerator.device)
        since = self.step - recipe.unquantised_steps
        if since >= 0 and since % recipe.revive_every == 0 and self.step < 0.75 * recipe.steps:
            self._revive(pixels_B3HW)
        drawn_B3HW, codebook, commitment, codes_Bhw = self.model(pixels_B3HW, since >= 0)
        parts = {
            "l1": (drawn_B3HW.float() - pixels_B3HW).abs().mean(),
            "codebook": codebook,
            "commitment": commitment,
        }
        reconstruction = parts["l1"]
        if recipe.mask_weight:
            parts["mask"] = _mask_hinge(
                drawn_B3HW.float(), pixels_B3HW, is_mask_B.to(pixels_B3HW.device)
            )
            reconstruction = reconstruction + recipe.mask_weight * parts["mask"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(drawn_B3HW, pixels_B3HW)
            reconstruction = reconstruction + recipe.perceptual_weight * parts["perceptual"]
        loss = reconstruction + codebook + recipe.commitment * commitment
        judged = (
            self.adversary is not None
            and recipe.adversarial_from is not None
            and self.step >= recipe.adversarial_from
        )
        if self.adversary is not None and judged:
            parts["fooling"] = self.adversary.fooling_loss(
                drawn_B3HW, reconstruction, self.trained.decoder.conv_out.weight
            )
            loss = loss + recipe.adversarial_weight * parts["fooling"]
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.optimizer.step()
        if self.adversary is not None and judged:
            parts["discriminator"] = self.adversary.train_step(
                drawn_B3HW, pixels_B3HW, learning_rate
            )
        parts["batch_perplexity"] = self._count(codes_Bhw, since)
        self._average()
        self.step += 1
        return {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}

    def _count(self, codes_Bhw: Tensor, since: int) -> Tensor:
        """Add this batch to the running use of the codes; returns the batch's perplexity over all
        devices.
        """
        use_K = torch.bincount(codes_Bhw.flatten(), minlength=self.use_K.numel()).float()
        use_K = self.accelerator.reduce(use_K, "sum")
        if since >= 0:
            self.use_K.lerp_(use_K, max(0.01, 1 / (since + 1)))
        return torch.tensor(_perplexity(use_K), device=use_K.device)

    @torch.no_grad()
    def _average(self) -> None:
        # The mean starts short, so that the random beginning is soon forgotten.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.averaged.parameters()), list(self.trained.parameters()), 1 - decay
        )

    @torch.no_grad()
    def _revive(self, pixels_B3HW: Tensor) -> None:
        """Move codes that are hardly used onto latents of this batch, the same on all devices; the
        first time, all codes.
        """
        dead_K = self.use_K < self.recipe.revive_below
        if not dead_K.any():
            return
        table_KC = self.trained.quantize.embedding.weight
        latents_NC = self.trained.latents(pixels_B3HW).movedim(1, -1).flatten(0, -2).float()
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        latents_NC = self.accelerator.gather(latents_NC)
        vectors_DC = broadcast(_spread(latents_NC, table_KC[~dead_K], int(dead_K.sum()), generator))
        for model in (self.trained, self.averaged):
            model.quantize.embedding.weight[dead_K] = vectors_DC
        # A moved code is as good as used: it gets until the next look to be chosen.
        self.use_K[dead_K] = self.recipe.revive_below

    def measure(self, pixels_B3HW: Tensor) -> dict[str, float]:
        """How the averaged model draws these pictures: mean PSNR, perplexity and share of the codes
        that occur in them.
        """
        drawn_B3HW, codes_BN = _through(self.averaged, pixels_B3HW)
        use_K = torch.bincount(codes_BN.flatten(), minlength=self.recipe.network.codebook_size)
        psnr = float(_psnr_B(drawn_B3HW, pixels_B3HW).mean())
        used = float((use_K > 0).float().mean())
        return {
            "psnr": round(psnr, 3),
            "perplexity": round(_perplexity(use_K), 1),
            "codes_used": round(used, 4),
        }

    def finished(self) -> VQGAN:
        """The averaged model; its weights rounded to what float16 holds where the recipe asks for
        the smaller file.
        """
        weights = {key: value.detach().cpu() for key, value in self.averaged.state_dict().items()}
        if self.recipe.half_weights:
            weights = {key: value.half().float() for key, value in weights.items()}
        return VQGAN.from_weights(
            self.recipe.network,
            {k: v.clone() for k, v in weights.items()},
            origin="the trained model",
        )

    def save(self, out: Path) -> None:
        state = {
            "step": self.step,
            "recipe": to_dict(self.recipe),
            "trained": self.trained.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "use": self.use_K,
            "adversary": self.adversary.state_dict() if self.adversary is not None else None,
        }
        # Not torch's own writing, which says nothing of a full disk but that a position is off.
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(out / STATE_FILE, content.getvalue())
        self.finished().save_pretrained(out)

    def resume(self, out: Path) -> None:
        path = out / STATE_FILE
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            before = dict(state["recipe"])
        except Exception as error:  # Damage raises many kinds.
            raise InputError(f"{path} is damaged; remove it to train anew.") from error
        if before != to_dict(self.recipe):
            changed = [
                key for key, value in to_dict(self.recipe).items() if before.get(key) != value
            ]
            raise InputError(
                f"{path} was made with another recipe ({', '.join(changed)} differ); give another "
                "folder."
            )
        try:
            self.trained.load_state_dict(state["trained"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.use_K.copy_(state["use"])
            if self.adversary is not None:
                self.adversary.load_state_dict(state["adversary"])
            self.step = int(state["step"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged; remove it to train anew.") from error
        if self.accelerator.is_main_process:
            _cut_log(out, self.step)


class _Autoencoder(nn.Module):
    """The tokenizer as one differentiable call, so that it can be wrapped for several devices."""

    def __init__(self, tokenizer: VQGAN) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(
        self, pixels_B3HW: Tensor, quantised: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """drawn_B3HW, codebook loss, commitment loss, codes_Bhw (van den Oord et al., 2017);
        gradients pass straight through.

        Without `quantised` the picture is drawn from the latents themselves, and both losses are
        zero.
        """
        latents_BChw = self.tokenizer.latents(pixels_B3HW).float()
        with (
            torch.no_grad(),
            torch.autocast(latents_BChw.device.type, enabled=False),
        ):  # distances in bfloat16 choose wrong codes
            codes_Bhw = self.tokenizer.quantize.nearest(latents_BChw)
        vectors_BChw = self.tokenizer.quantize.vectors(codes_Bhw)
        codebook = F.mse_loss(vectors_BChw, latents_BChw.detach())
        commitment = F.mse_loss(latents_BChw, vectors_BChw.detach())
        if not quantised:
            # The zero terms keep every parameter in the graph, as training on several devices
            # needs.
            return self.tokenizer.pixels(latents_BChw), 0.0 * codebook, 0.0 * commitment, codes_Bhw
        passed_BChw = latents_BChw + (vectors_BChw - latents_BChw).detach()
        return self.tokenizer.pixels(passed_BChw), codebook, commitment, codes_Bhw


def _weights_to_start_from(source: str, network: VQGANConfig) -> dict[str, Tensor]:
    tokenizer = VQGAN.from_pretrained(source)
    if tokenizer.config != network:
        theirs, ours = to_dict(tokenizer.config), to_dict(network)
        differences = ", ".join(
            f"{key} is {theirs[key]} there and {ours[key]} here"
            for key in ours
            if theirs[key] != ours[key]
        )
        raise InputError(f"start_from: {source} is of another network: {differences}.")
    return tokenizer.state_dict()


def _mask_hinge(
    drawn_B3HW: Tensor, pixels_B3HW: Tensor, is_mask_B: Tensor, margin: float = 0.5
) -> Tensor:
    """Mean over the batch of relu(margin - t y), t = +1 or -1 the mask's colour: what a pixel lacks
    to lie clearly on its side.

    The L1 difference pulls on a pixel that is nearly white as hard as on one that is on the wrong
    side of the threshold.
    """
    lacking_B = F.relu(margin - pixels_B3HW * drawn_B3HW).flatten(1).mean(dim=1)
    return (lacking_B * is_mask_B).mean()


def _spread(latents_NC: Tensor, taken_MC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the latents, each drawn with a chance in proportion to its squared distance from
    the nearest vector so far.

    This is the seeding of k-means++ (Arthur and Vassilvitskii, 2007): most latents of masks are
    alike, and codes drawn evenly would nearly all fall on black. taken_MC: the vectors that are
    there already.
    """
    distance_N = torch.full_like(latents_NC[:, 0], 1e6)
    if len(taken_MC):
        distance_N = torch.cdist(latents_NC, taken_MC).square().min(dim=1).values
    chosen = []
    for _ in range(count):
        chances_N = distance_N.cpu().double() + 1e-12
        chosen.append(int(torch.multinomial(chances_N, 1, generator=generator)))
        distance_N = torch.minimum(
            distance_N, (latents_NC - latents_NC[chosen[-1]]).square().sum(dim=1)
        )
    return latents_NC[chosen].contiguous()


def _schedule(step: int, recipe: TokenizerRecipe) -> float:
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


# --- Samples ---

Source = Callable[[Sequence[int], range], tuple[Tensor, Tensor]]
"""(key, wanted) -> pixels_B3HW in [-1, 1], is_mask_B: the samples `wanted` of the endless row of
samples that `key` stands for.
"""

_UNSEEN = 2**31  # a step number that no training reaches: its samples are drawn for the log
_CROPS = 4
"""Samples of one picture, so that drawing or decoding pictures does not hold up the training."""


def _open_source(recipe: TokenizerRecipe, draw_scene: Draw) -> Source:
    draw = (
        (lambda rng, _: draw_scene(rng))
        if recipe.data.images == SYNTHETIC
        else _folder_source(recipe.data)
    )
    size, smallest = recipe.network.image_size, recipe.data.smallest_crop

    def crops(key: Sequence[int], number: int) -> list[tuple[Tensor, bool]]:
        rng = np.random.default_rng([*key, number])
        is_mask = (rng.random(_CROPS) < recipe.data.mask_share).tolist()
        image, masks = draw(rng, any(is_mask))
        made = []
        for masked in is_mask:
            box = _random_crop(rng, image.size, smallest)
            if masked:
                made.append(
                    mask_to_pixels(crop_and_resize_mask(masks[rng.integers(len(masks))], box, size))
                )
            else:
                made.append(to_pixels(crop_and_resize(image, box, size)))
        return list(zip(made, is_mask, strict=True))

    def samples(key: Sequence[int], wanted: range) -> tuple[Tensor, Tensor]:
        first = wanted.start // _CROPS
        made = [
            crop
            for number in range(first, -(-wanted.stop // _CROPS))
            for crop in crops(key, number)
        ]
        pixels, is_mask = zip(*made[wanted.start - first * _CROPS :][: len(wanted)], strict=True)
        return torch.stack(pixels), torch.tensor(is_mask)

    return samples


def _folder_source(
    data: TokenizerData,
) -> Callable[[np.random.Generator, bool], tuple[Image.Image, list[np.ndarray]]]:
    """Draws a picture of the folder by chance; where masks are wanted, one that has annotations,
    with its class masks.
    """
    folder = Path(data.images)
    files = _image_files(folder)
    truth = _ClassMasks(Path(data.annotations)) if data.annotations else None
    with_masks = [file for file in files if truth and truth.has(file.name)]
    if data.mask_share and not with_masks:
        raise InputError(f"{data.annotations} has no annotation of any picture in {folder}.")

    def draw(rng: np.random.Generator, masked: bool) -> tuple[Image.Image, list[np.ndarray]]:
        chosen = with_masks if masked else files
        file = chosen[rng.integers(len(chosen))]
        image = load_image(file)
        return image, list(truth.of(file.name, image.size).values()) if truth and masked else []

    return draw


def _image_files(folder: Path) -> list[Path]:
    files = (
        sorted(f for f in folder.glob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if folder.is_dir()
        else []
    )
    if not files:
        raise InputError(f"{folder} is no folder with .jpg or .png pictures.")
    return files


class _ClassMasks:
    """A COCO instances file as class masks by the pictures' file names."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"The annotations {path} do not exist.")
        self._path = path
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._coco = COCO(str(path))
            self._ids = {image["file_name"]: image["id"] for image in self._coco.dataset["images"]}
            for annotation in self._coco.dataset["annotations"]:
                hash(annotation["category_id"])
        except Exception as error:  # pycocotools checks nothing: what is wrong raises many kinds.
            raise InputError(
                f"{path} is not a COCO instances file ({type(error).__name__}: {error})."
            ) from error

    def has(self, file_name: str) -> bool:
        return bool(self._coco.imgToAnns.get(self._ids.get(file_name)))

    def of(self, file_name: str, size: tuple[int, int]) -> dict[int, np.ndarray]:
        """Category id -> mask_HW, all instances in one, for the picture of `size` (width,
        height).
        """
        masks: dict[int, np.ndarray] = {}
        for annotation in self._coco.imgToAnns.get(self._ids.get(file_name), []):
            try:
                mask_HW = self._coco.annToMask(annotation).astype(bool)
            except Exception as error:
                raise InputError(
                    f"{self._path}: the segmentation of annotation {annotation.get('id')} of "
                    f"{file_name} cannot be read ({error})."
                ) from error
            if mask_HW.shape != size[::-1]:
                raise InputError(
                    f"{file_name} is {size[0]} x {size[1]} pixels, but its record in {self._path} "
                    f"says {mask_HW.shape[1]} x {mask_HW.shape[0]}."
                )
            kind = annotation["category_id"]
            masks[kind] = masks[kind] | mask_HW if kind in masks else mask_HW
        return dict(sorted(masks.items()))


def _random_crop(
    rng: np.random.Generator, size: tuple[int, int], smallest: float
) -> tuple[int, int, int, int]:
    width, height = size
    side = max(1, round(min(size) * rng.uniform(smallest, 1.0)))
    left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    return left, top, left + side, top + side


# --- Measures ---


class _Measures:
    """Gathers pictures and masks into batches and sums up what `evaluate_tokenizer` reports."""

    def __init__(self, tokenizer: VQGAN, batch_size: int) -> None:
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._pictures: list[Tensor] = []
        self._masks: list[tuple[np.ndarray, int, str]] = []
        self._use_K = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64)
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._iou: dict[str, list[float]] = {"small": [], "medium": [], "large": []}
        self._wrong: list[float] = []
        self._by_class: defaultdict[int, np.ndarray] = defaultdict(
            lambda: np.zeros(2)
        )  # pixels of intersection and of union

    def add_picture(self, pixels_3HW: Tensor) -> None:
        self._pictures.append(pixels_3HW)
        if len(self._pictures) == self._batch_size:
            self._measure_pictures()

    def add_mask(self, mask_HW: np.ndarray, category: int, area: int) -> None:
        """`area`: of the whole mask in the original picture. A mask that the crop left empty does
        not count.
        """
        if mask_HW.any():
            self._masks.append(
                (
                    mask_HW,
                    category,
                    "small" if area < 32**2 else "medium" if area < 96**2 else "large",
                )
            )
        if len(self._masks) == self._batch_size:
            self._measure_masks()

    def report(self) -> dict[str, Any]:
        if self._pictures:
            self._measure_pictures()
        if self._masks:
            self._measure_masks()
        report: dict[str, Any] = {
            "tokenizer": self._tokenizer.fingerprint,
            "pictures": len(self._psnr),
            "psnr": float(np.mean(self._psnr)),
            "ssim": float(np.mean(self._ssim)),
            "codes_used": float((self._use_K > 0).double().mean()),
            "perplexity": _perplexity(self._use_K),
        }
        if self._wrong:
            ious = [iou for group in self._iou.values() for iou in group]
            per_class = [intersection / union for intersection, union in self._by_class.values()]
            report |= {
                "masks": len(ious),
                "mask_miou": float(np.mean(per_class)),
                "mask_iou": float(np.mean(ious)),
            }
            report["mask_mae"] = float(np.mean(self._wrong))
            for name, group in self._iou.items():
                report |= {
                    f"masks_{name}": len(group),
                    f"mask_iou_{name}": float(np.mean(group)) if group else None,
                }
        return report

    def _measure_pictures(self) -> None:
        given_B3HW = torch.stack(self._pictures)
        drawn_B3HW = self._redraw(given_B3HW)
        self._psnr += _psnr_B(drawn_B3HW, given_B3HW).tolist()
        drawn, given = (drawn_B3HW.double() + 1) / 2, (given_B3HW.double() + 1) / 2
        ssim_B = structural_similarity_index_measure(drawn, given, data_range=1.0, reduction="none")
        assert isinstance(ssim_B, Tensor)
        self._ssim += ssim_B.reshape(
            -1
        ).tolist()  # one picture alone comes back without its batch axis
        self._pictures.clear()

    def _measure_masks(self) -> None:
        drawn_BHW = pixels_to_mask(
            self._redraw(torch.stack([mask_to_pixels(mask) for mask, _, _ in self._masks]))
        )
        for (mask_HW, category, size), drawn_HW in zip(self._masks, drawn_BHW, strict=True):
            pixels = np.array([(mask_HW & drawn_HW).sum(), (mask_HW | drawn_HW).sum()])
            self._by_class[category] += pixels
            self._iou[size].append(float(pixels[0] / pixels[1]))
            self._wrong.append(float((mask_HW != drawn_HW).mean()))
        self._masks.clear()

    def _redraw(self, pixels_B3HW: Tensor) -> Tensor:
        drawn_B3HW, codes_BN = _through(self._tokenizer, pixels_B3HW)
        self._use_K += torch.bincount(codes_BN.flatten(), minlength=len(self._use_K))
        return drawn_B3HW


def _through(tokenizer: VQGAN, pixels_B3HW: Tensor, at_once: int = 16) -> tuple[Tensor, Tensor]:
    """Pictures as the tokenizer draws them, clipped to [-1, 1], and their codes_BN; both on the
    CPU, a few at once for memory's sake.
    """
    device = next(tokenizer.parameters()).device
    drawn, codes = [], []
    for some in pixels_B3HW.split(at_once):
        codes.append(tokenizer.encode(some.to(device)))
        drawn.append(tokenizer.decode(codes[-1]).clamp(-1, 1).cpu())
    return torch.cat(drawn), torch.cat(codes).cpu()


def _psnr_B(drawn_B3HW: Tensor, pixels_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in decibels, of 8-bit levels: 10 log10(255^2 /
    mean squared error).
    """
    error_B = ((drawn_B3HW - pixels_B3HW) * 127.5).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error_B.clamp_min(1e-4))


def _perplexity(use_K: Tensor) -> float:
    """exp of the entropy of the codes' frequencies: how many codes it would take if all were used
    alike.
    """
    share_K = use_K.double() / use_K.sum()
    return float(torch.exp(-(share_K * share_K.clamp_min(1e-300).log()).sum()))


# --- Files ---


def _log(out: Path, row: dict[str, Any]) -> None:
    with (out / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _cut_log(out: Path, step: int) -> None:
    """Drop the rows after `step`: training goes on from there and writes them again. A row that was
    cut off is dropped too.
    """
    path = out / LOG_FILE
    if not path.is_file():
        return
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                rows.append(line)
    write_whole(path, "".join(row + "\n" for row in rows))


def _save_grid(model: VQGAN, pixels_B3HW: Tensor, path: Path, columns: int = 8) -> None:
    """Pictures above their reconstructions, two rows of them."""
    given = pixels_B3HW[: 2 * columns]
    drawn, _ = _through(model, given)
    size = given.shape[-1]
    sheet = Image.new("RGB", (columns * size, 4 * size))
    for i in range(len(given)):
        place = ((i % columns) * size, (i // columns) * 2 * size)
        sheet.paste(to_image(given[i]), place)
        sheet.paste(to_image(drawn[i]), (place[0], place[1] + size))
    sheet.save(path)
