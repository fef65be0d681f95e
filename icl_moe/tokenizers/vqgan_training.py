"""Training a VQ-GAN on pictures and masks, and measuring one: fidelity, use of its codes, and how well masks survive it."""

import importlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.images import crop_and_resize, crop_and_resize_mask, load_image, mask_to_pixels, pixels_to_mask, to_image, to_pixels
from icl_moe.recipe import to_dict
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig

STATE_FILE, LOG_FILE = "training_state.pt", "log.jsonl"
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class TokenizerData:
    """images: a folder of pictures, or `synthetic` for an endless supply of drawn scenes.

    annotations: a COCO instances file of that folder's pictures, from which masks are taken.
    mask_share: the share of training samples that are masks, white on black. smallest_crop: the least side of a random
    crop, as a share of the picture's short side.
    """

    images: str = SYNTHETIC
    annotations: str | None = None
    mask_share: float = 0.0
    smallest_crop: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.mask_share <= 1 or not 0 < self.smallest_crop <= 1:
            raise InputError("data.mask_share must lie in 0..1 and data.smallest_crop in 0..1 without 0.")
        if self.mask_share and self.images != SYNTHETIC and self.annotations is None:
            raise InputError("data.mask_share needs data.annotations, a COCO instances file, to take masks from.")


@dataclass(frozen=True)
class TokenizerRecipe:
    """What `train_tokenizer` reads. Steps are optimizer steps; batch_size counts samples over all devices.

    The learning rate rises over warmup_steps and falls to zero at the last step as a half cosine. A code that took part in
    less than revive_below samples' worth of a batch (a running mean over about 100 steps) is moved onto a latent of
    the batch, every revive_every steps up to three quarters of the training.
    """

    network: VQGANConfig = field(default_factory=VQGANConfig)
    data: TokenizerData = field(default_factory=TokenizerData)
    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 4e-4
    warmup_steps: int = 100
    commitment: float = 0.25
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


def train_tokenizer(recipe: TokenizerRecipe, out: Path) -> VQGAN:
    """Train by `recipe` into the tokenizer folder `out`, and return the averaged (EMA) model that was saved there.

    Beside the tokenizer, `out` gets log.jsonl, samples/*.png and the state from which the same call goes on, exactly, after
    an interruption. Every sample and choice is a function of (seed, step, place in the batch). Under `accelerate launch`
    the batch is shared by all devices. Raises InputError where `out` holds the state of another recipe.
    """
    out = Path(out)
    accelerator = Accelerator(mixed_precision="bf16" if recipe.precision == "bf16" else "no")
    run = _Run(recipe, accelerator)
    run.resume(out)
    source = _open_source(recipe)
    unseen_B3HW, _ = source(_generator(recipe.seed, _UNSEEN), 64)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    share = recipe.batch_size // accelerator.num_processes
    if share * accelerator.num_processes != recipe.batch_size:
        raise InputError(f"batch_size {recipe.batch_size} cannot be shared evenly by {accelerator.num_processes} devices.")
    bar = tqdm(range(run.step, recipe.steps), initial=run.step, total=recipe.steps, desc="tokenizer", disable=not accelerator.is_main_process)
    for step in bar:
        batch_B3HW, _ = source(_generator(recipe.seed, step, accelerator.process_index), share)
        losses = run.train_step(batch_B3HW)
        last = step + 1 == recipe.steps
        if accelerator.is_main_process and ((step + 1) % recipe.log_every == 0 or last):
            row = {"step": step + 1, **{name: round(float(value), 5) for name, value in losses.items()}, **run.measure(unseen_B3HW)}
            _log(out, row)
            _save_grid(run.averaged, unseen_B3HW, out / "samples" / f"step_{step + 1:06d}.png")
            bar.set_postfix(psnr=f"{row['psnr']:.2f}", codes=f"{row['codes_used']:.0%}")
        if accelerator.is_main_process and ((step + 1) % recipe.save_every == 0 or last):
            run.save(out)
    accelerator.wait_for_everyone()
    return run.finished()


class _Run:
    """The state of one training: model, its running mean, optimizer, use of the codes."""

    def __init__(self, recipe: TokenizerRecipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator, self.step = recipe, accelerator, 0
        torch.manual_seed(recipe.seed)
        trained = VQGAN(recipe.network)
        self.averaged = VQGAN(recipe.network).to(accelerator.device).eval().requires_grad_(False)
        self.averaged.load_state_dict(trained.state_dict())
        optimizer = torch.optim.AdamW(trained.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.model, self.optimizer = accelerator.prepare(_Autoencoder(trained), optimizer)
        self.trained = trained
        self.use_K = torch.zeros(recipe.network.codebook_size, device=accelerator.device)

    def train_step(self, pixels_B3HW: Tensor) -> dict[str, Tensor]:
        recipe, device = self.recipe, self.accelerator.device
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(self.step, recipe)
        pixels_B3HW = pixels_B3HW.to(device)
        if self.step % recipe.revive_every == 0 and self.step < 0.75 * recipe.steps:
            self._revive(pixels_B3HW)
        drawn_B3HW, codebook, commitment, codes_Bhw = self.model(pixels_B3HW)
        l1 = (drawn_B3HW.float() - pixels_B3HW).abs().mean()
        loss = l1 + codebook + recipe.commitment * commitment
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.optimizer.step()
        use_K = torch.bincount(codes_Bhw.flatten(), minlength=self.use_K.numel()).float()
        use_K = self.accelerator.reduce(use_K, "sum")
        self.use_K.lerp_(use_K, 0.01 if self.step >= 100 else 1 / (self.step + 1))
        self._average()
        self.step += 1
        used = use_K / use_K.sum()
        perplexity = torch.exp(-(used * used.clamp_min(1e-10).log()).sum())
        return {"loss": loss.detach(), "l1": l1.detach(), "codebook": codebook.detach(), "batch_perplexity": perplexity}

    @torch.no_grad()
    def _average(self) -> None:
        # The mean starts short, so that the random beginning is soon forgotten.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.trained.parameters()), 1 - decay)

    @torch.no_grad()
    def _revive(self, pixels_B3HW: Tensor) -> None:
        """Move codes that are hardly used onto latents of this batch, the same on all devices; at the first step, all codes."""
        dead_D = torch.nonzero(self.use_K < self.recipe.revive_below).flatten()
        if not len(dead_D):
            return
        latents_NC = self.trained.latents(pixels_B3HW).movedim(1, -1).flatten(0, -2).float()
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        chosen = torch.randint(len(latents_NC), (len(dead_D),), generator=generator)
        vectors_DC = broadcast(latents_NC[chosen.to(latents_NC.device)].contiguous())
        self.trained.quantize.embedding.weight[dead_D] = vectors_DC
        self.averaged.quantize.embedding.weight[dead_D] = vectors_DC

    def measure(self, pixels_B3HW: Tensor) -> dict[str, float]:
        device = self.accelerator.device
        codes_BN = self.averaged.encode(pixels_B3HW.to(device))
        drawn_B3HW = self.averaged.decode(codes_BN).cpu().clamp(-1, 1)
        use_K = torch.bincount(codes_BN.flatten().cpu(), minlength=self.recipe.network.codebook_size)
        alive = float((self.use_K >= self.recipe.revive_below).float().mean())
        psnr = float(_psnr_B(drawn_B3HW, pixels_B3HW).mean())
        return {"psnr": round(psnr, 3), "perplexity": round(_perplexity(use_K), 1), "codes_used": round(alive, 4)}

    def finished(self) -> VQGAN:
        """The averaged model; its weights rounded to what float16 holds where the recipe asks for the smaller file."""
        weights = {key: value.detach().cpu() for key, value in self.averaged.state_dict().items()}
        if self.recipe.half_weights:
            weights = {key: value.half().float() for key, value in weights.items()}
        return VQGAN.from_weights(self.recipe.network, {k: v.clone() for k, v in weights.items()}, origin="the trained model")

    def save(self, out: Path) -> None:
        self.finished().save_pretrained(out)
        state = {
            "step": self.step,
            "recipe": to_dict(self.recipe),
            "trained": self.trained.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "use": self.use_K,
        }
        torch.save(state, out / (STATE_FILE + ".partial"))
        os.replace(out / (STATE_FILE + ".partial"), out / STATE_FILE)

    def resume(self, out: Path) -> None:
        path = out / STATE_FILE
        if not path.is_file():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["recipe"] != to_dict(self.recipe):
            changed = [key for key, value in to_dict(self.recipe).items() if state["recipe"].get(key) != value]
            raise InputError(f"{path} was made with another recipe ({', '.join(changed)} differ); give another folder.")
        self.trained.load_state_dict(state["trained"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.use_K.copy_(state["use"])
        self.step = state["step"]
        _cut_log(out, self.step)


class _Autoencoder(nn.Module):
    """The tokenizer as one differentiable call, so that it can be wrapped for several devices."""

    def __init__(self, tokenizer: VQGAN) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """drawn_B3HW, codebook loss, commitment loss, codes_Bhw (van den Oord et al., 2017); gradients pass straight through."""
        latents_BChw = self.tokenizer.latents(pixels_B3HW).float()
        with torch.no_grad():
            codes_Bhw = self.tokenizer.quantize.nearest(latents_BChw)
        vectors_BChw = self.tokenizer.quantize.vectors(codes_Bhw)
        codebook = F.mse_loss(vectors_BChw, latents_BChw.detach())
        commitment = F.mse_loss(latents_BChw, vectors_BChw.detach())
        passed_BChw = latents_BChw + (vectors_BChw - latents_BChw).detach()
        return self.tokenizer.pixels(passed_BChw), codebook, commitment, codes_Bhw


def _schedule(step: int, recipe: TokenizerRecipe) -> float:
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


# --- Samples ---

Source = Callable[[np.random.Generator, int], tuple[Tensor, Tensor]]
"""(generator, count) -> pixels_B3HW in [-1, 1], is_mask_B."""

_UNSEEN = 2**31  # a step number that no training reaches: its samples are drawn for the log


def _generator(seed: int, step: int, rank: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, step, rank])


def _open_source(recipe: TokenizerRecipe) -> Source:
    return _synthetic_source(recipe)


def _synthetic_source(recipe: TokenizerRecipe) -> Source:
    # The package does not depend on the offline stage; only this choice of the recipe reaches over, so it is loaded here.
    draw_scene = importlib.import_module("preprocessing.synthetic").draw_scene
    size, crops_per_scene = recipe.network.image_size, 4

    def samples(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        pictures: list[Tensor] = []
        is_mask = rng.random(count) < recipe.data.mask_share
        for i in range(count):
            if i % crops_per_scene == 0:
                scene = draw_scene(rng)
            box = _random_crop(rng, scene.image.size, recipe.data.smallest_crop)
            if is_mask[i]:
                mask_HW = scene.class_mask(scene.objects[rng.integers(len(scene.objects))].name)
                pictures.append(mask_to_pixels(crop_and_resize_mask(mask_HW, box, size)))
            else:
                pictures.append(to_pixels(crop_and_resize(scene.image, box, size)))
        return torch.stack(pictures), torch.from_numpy(is_mask)

    return samples


def _random_crop(rng: np.random.Generator, size: tuple[int, int], smallest: float) -> tuple[int, int, int, int]:
    width, height = size
    side = max(1, round(min(size) * rng.uniform(smallest, 1.0)))
    left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    return left, top, left + side, top + side


# --- Measures ---


def _psnr_B(drawn_B3HW: Tensor, pixels_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in decibels, of 8-bit levels: 10 log10(255^2 / mean squared error)."""
    error_B = ((drawn_B3HW - pixels_B3HW) * 127.5).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error_B.clamp_min(1e-4))


def _perplexity(use_K: Tensor) -> float:
    """exp of the entropy of the codes' frequencies: how many codes it would take if all were used alike."""
    share_K = use_K.double() / use_K.sum()
    return float(torch.exp(-(share_K * share_K.clamp_min(1e-300).log()).sum()))


# --- Files ---


def _log(out: Path, row: dict[str, Any]) -> None:
    with (out / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _cut_log(out: Path, step: int) -> None:
    """Drop the rows after `step`: training goes on from there and writes them again."""
    path = out / LOG_FILE
    if path.is_file():
        rows = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def _save_grid(model: VQGAN, pixels_B3HW: Tensor, path: Path, columns: int = 8) -> None:
    """Pictures above their reconstructions, two rows of them."""
    given = pixels_B3HW[: 2 * columns]
    drawn = model.decode(model.encode(given.to(next(model.parameters()).device))).cpu()
    size = given.shape[-1]
    sheet = Image.new("RGB", (columns * size, 4 * size))
    for i in range(len(given)):
        place = ((i % columns) * size, (i // columns) * 2 * size)
        sheet.paste(to_image(given[i]), place)
        sheet.paste(to_image(drawn[i]), (place[0], place[1] + size))
    sheet.save(path)
