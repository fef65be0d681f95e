"""Trains a VQ-GAN on pictures and masks."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from icl_moe.devices import Device, computes_in_bf16
from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.images import to_image
from icl_moe.outputs import output_folder, writing
from icl_moe.processes import join_processes
from icl_moe.settings import to_dict
from icl_moe.tokenizers.folder import check_free
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig
from preprocessing.tokenizers.losses import Adversary, PerceptualLoss
from preprocessing.tokenizers.measures import perplexity, psnr_B, through
from preprocessing.tokenizers.recipe import TokenizerRecipe
from preprocessing.tokenizers.samples import UNSEEN, Source, open_source

STATE_FILE, LOG_FILE = "training_state.pt", "log.jsonl"


def train_tokenizer(recipe: TokenizerRecipe, out: Path, device: Device | None = None) -> VQGAN:
    """Train as `recipe` says and return the averaged (EMA) model, which is saved in the tokenizer
    folder `out`.

    Besides the tokenizer, `out` gets log.jsonl, samples/*.png and the state from which the same
    call resumes exactly after an interruption. Every sample and choice is a function of (seed,
    step): under `accelerate launch` all devices share the batch that one device would have. device:
    see `join_processes`. Raises InputError if `out` holds the state of another recipe, or a
    tokenizer without a state.
    """
    out = output_folder(out)
    if not (out / STATE_FILE).is_file():
        check_free(out)
    precision = recipe.precision
    place = join_processes(device).device
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(place) else "fp32"
    # The first Accelerator of a process fixes the precision of the process.
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
    run = _Run(recipe, accelerator)
    run.resume(out)
    source = open_source(recipe)
    share = recipe.batch_size // accelerator.num_processes
    if share * accelerator.num_processes != recipe.batch_size:
        raise InputError(
            f"batch_size {recipe.batch_size} cannot be shared evenly by "
            f"{accelerator.num_processes} devices."
        )
    mine = range(share * accelerator.process_index, share * (accelerator.process_index + 1))
    with writing(out):
        _train(run, source, mine, out)
        finished = run.finished()
        if accelerator.is_main_process:
            # The state is written first, so the last steps may have been taken by a process that
            # was killed before it wrote the tokenizer.
            finished.save_pretrained(out)
    accelerator.wait_for_everyone()
    return finished


def _train(run: "_Run", source: Source, mine: range, out: Path) -> None:
    """Take the remaining steps on this device's share of each batch; the main process writes to
    `out`.
    """
    recipe, accelerator = run.recipe, run.accelerator
    unseen_B3HW, _ = source((recipe.seed, UNSEEN), range(64))
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


class _Run:
    """The state of one training: model, its running mean, optimizer, and use of the codes."""

    def __init__(self, recipe: TokenizerRecipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator, self.step = recipe, accelerator, 0
        torch.manual_seed(recipe.seed)
        trained = VQGAN(recipe.network)
        self.use_K = torch.zeros(recipe.network.codebook_size, device=accelerator.device)
        if recipe.start_from is not None:
            trained.load_state_dict(_weights_to_start_from(recipe.start_from, recipe.network))
            # The codes have a meaning from the start, so none counts as dead.
            self.use_K.fill_(recipe.revive_below)
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
        """One optimizer step on this device's share of the batch. Returns the parts of the loss by
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
        """Add this batch to the running use of the codes. Returns the batch's perplexity over all
        devices.
        """
        use_K = torch.bincount(codes_Bhw.flatten(), minlength=self.use_K.numel()).float()
        use_K = self.accelerator.reduce(use_K, "sum")
        if since >= 0:
            self.use_K.lerp_(use_K, max(0.01, 1 / (since + 1)))
        return perplexity(use_K)

    @torch.no_grad()
    def _average(self) -> None:
        # The mean starts with a short memory, so that the random initialisation loses its weight
        # soon.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.averaged.parameters()), list(self.trained.parameters()), 1 - decay
        )

    @torch.no_grad()
    def _revive(self, pixels_B3HW: Tensor) -> None:
        """Move codes that are hardly used onto latents of this batch, the same on all devices. The
        first time, move all codes.
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
        # A moved code counts as used until the next call, so that it has time to be chosen.
        self.use_K[dead_K] = self.recipe.revive_below

    def measure(self, pixels_B3HW: Tensor) -> dict[str, float]:
        """Measures of the averaged model on these pictures: mean PSNR, and the perplexity and share
        of the codes that occur.
        """
        drawn_B3HW, codes_BN = through(self.averaged, pixels_B3HW)
        use_K = torch.bincount(codes_BN.flatten(), minlength=self.recipe.network.codebook_size)
        psnr = float(psnr_B(drawn_B3HW, pixels_B3HW).mean())
        used = float((use_K > 0).float().mean())
        return {
            "psnr": round(psnr, 3),
            "perplexity": round(float(perplexity(use_K)), 1),
            "codes_used": round(used, 4),
        }

    def finished(self) -> VQGAN:
        """The averaged model, with its weights rounded to float16 if the recipe asks for the
        smaller file.
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
        # torch.save would report a full disk only as an unexpected file position.
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
        except Exception as error:  # Damaged files raise many kinds of exceptions.
            raise InputError(
                f"{path} is damaged; remove it to train from the beginning."
            ) from error
        if before != to_dict(self.recipe):
            changed = [
                key for key, value in to_dict(self.recipe).items() if before.get(key) != value
            ]
            raise InputError(
                f"{path} was made with another recipe ({', '.join(changed)} differ); choose "
                "another folder."
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
            raise InputError(
                f"{path} is damaged; remove it to train from the beginning."
            ) from error
        if self.accelerator.is_main_process:
            _cut_log(out, self.step)


class _Autoencoder(nn.Module):
    """The tokenizer as one differentiable call, which can be wrapped for several devices."""

    def __init__(self, tokenizer: VQGAN) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(
        self, pixels_B3HW: Tensor, quantised: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """drawn_B3HW, codebook loss, commitment loss, codes_Bhw (van den Oord et al., 2017); with
        straight-through gradients.

        Without `quantised` the decoder reads the latents themselves, and both losses are zero.
        """
        latents_BChw = self.tokenizer.latents(pixels_B3HW).float()
        # Distances in bfloat16 would choose wrong codes.
        with (
            torch.no_grad(),
            torch.autocast(latents_BChw.device.type, enabled=False),
        ):
            codes_Bhw = self.tokenizer.quantize.nearest(latents_BChw)
        vectors_BChw = self.tokenizer.quantize.vectors(codes_Bhw)
        codebook = F.mse_loss(vectors_BChw, latents_BChw.detach())
        commitment = F.mse_loss(latents_BChw, vectors_BChw.detach())
        if not quantised:
            # The zero terms keep every parameter in the graph, which training on several devices
            # requires.
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
        raise InputError(f"start_from: {source} has another network: {differences}.")
    return tokenizer.state_dict()


def _mask_hinge(
    drawn_B3HW: Tensor, pixels_B3HW: Tensor, is_mask_B: Tensor, margin: float = 0.5
) -> Tensor:
    """Mean over the batch of relu(margin - t y), where t = +1 or -1 is the mask's colour.

    Unlike the L1 loss, it has no gradient at pixels that are clearly on the right side of the
    threshold.
    """
    lacking_B = F.relu(margin - pixels_B3HW * drawn_B3HW).flatten(1).mean(dim=1)
    return (lacking_B * is_mask_B).mean()


def _spread(latents_NC: Tensor, taken_MC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the latents, each drawn with a probability proportional to its squared distance
    from the nearest vector so far.

    This is the seeding of k-means++ (Arthur and Vassilvitskii, 2007): most latents of masks are
    alike, and with uniform draws nearly all codes would represent black. taken_MC: the vectors that
    exist already.
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


def _log(out: Path, row: dict[str, Any]) -> None:
    with (out / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _cut_log(out: Path, step: int) -> None:
    """Drop the rows after `step`, since training resumes there and writes them again, and a
    truncated row.
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
    """Write two rows of pictures, each above its reconstructions."""
    given = pixels_B3HW[: 2 * columns]
    drawn, _ = through(model, given)
    size = given.shape[-1]
    sheet = Image.new("RGB", (columns * size, 4 * size))
    for i in range(len(given)):
        place = ((i % columns) * size, (i // columns) * 2 * size)
        sheet.paste(to_image(given[i]), place)
        sheet.paste(to_image(drawn[i]), (place[0], place[1] + size))
    sheet.save(path)
