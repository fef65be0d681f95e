"""Hugging Face's generate with our decoder's weights, and what both sides are asked: shared by the
benchmarks of decoding.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor

from icl_moe.inference.decode import Request, decode_batch
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.recipe import ModelSettings, TrainingRecipe
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat
from icl_moe.settings import load_recipe, to_dict
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.segmentation import SegmentationPair

EXAMPLES, QUERIES = 3, 16

CODES = {"ablation_128": 64, "paper_256": 256}
"""The codes of an image, by recipe."""

TOY_CODES = 24
TOY = (
    "model.layers=2",
    "model.layers_with_experts=[1]",
    "model.width=64",
    "model.heads=2",
    "model.positions=204",
    "vocabulary.text_merges=1000",
)
"""A size at which the benchmark itself can be tested."""


@dataclass(frozen=True)
class Setting:
    """A recipe's decoder with images and masks of its size, on a device in a precision."""

    recipe: TrainingRecipe
    codec: SequenceCodec
    device: str
    dtype: torch.dtype

    @classmethod
    def of(cls, recipe_name: str, device: str, dtype: torch.dtype, toy: bool = False) -> "Setting":
        mask = ("vocabulary.mask=true", "training.mask_corruption=true")
        recipe = load_recipe(TrainingRecipe, recipe_name, [*mask, *(TOY if toy else ())])
        codes = TOY_CODES if toy else CODES[recipe_name]
        format = SequenceFormat(recipe.vocabulary, codes)
        return cls(
            recipe, SequenceCodec(format, NoText(format.vocabulary.text_size)), device, dtype
        )

    @property
    def codes(self) -> int:
        return self.codec.format.codes_per_image

    @property
    def settings(self) -> ModelSettings:
        return self.recipe.model

    def decoder(self, feed_forward: str) -> InContextDecoder:
        """Our decoder with random weights."""
        recipe = replace(self.recipe, model=replace(self.recipe.model, feed_forward=feed_forward))
        decoder = InContextDecoder(
            DecoderConfig.from_recipe(recipe, format=to_dict(self.codec.format))
        )
        initialise(decoder, seed=0)
        with torch.no_grad():  # So that the choices depend on the prompt, as after training.
            for name, parameter in decoder.named_parameters():
                if "embedding" not in name:
                    parameter.mul_(3.0)
        moved: InContextDecoder = torch.nn.Module.to(decoder, self.device, self.dtype)
        return moved.eval()

    def requests(self, count: int, seed: int = 0) -> list[Request]:
        """Queries with the same random examples."""
        rng = np.random.default_rng(seed)

        def draw() -> np.ndarray:
            return rng.integers(0, self.recipe.vocabulary.image_codes, self.codes)

        episode = Episode(
            SEGMENTATION, "", tuple(SegmentationPair(draw(), draw()) for _ in range(EXAMPLES))
        )
        return [(episode, draw()) for _ in range(count)]

    def prompts(self, requests: list[Request]) -> Tensor:
        """The tokens (B, L) of the requests, which are equally long."""
        rows = [self.codec.encode_prompt(*request).unpadded().tokens_L for request in requests]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class NoText:
    """Stands for a text tokenizer where no text occurs, so that none need be installed."""

    size: int
    fingerprint: str = ""

    def encode(self, text: str) -> list[int]:
        raise AssertionError("masks have no text")

    decode = encode


class Generate:
    """Hugging Face's GPT-2 with the weights of our dense decoder, which computes the same logits:
    both are pre-norm, with learned positions, the tanh GELU and tied embeddings.
    """

    def __init__(self, decoder: InContextDecoder, setting: Setting) -> None:
        settings, vocabulary = setting.settings, setting.recipe.vocabulary
        self._setting = setting
        self._ids = vocabulary.image_range
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary.size,
                n_positions=settings.positions,
                n_embd=settings.width,
                n_layer=settings.layers,
                n_head=settings.heads,
                layer_norm_epsilon=settings.layer_norm_epsilon,
                activation_function="gelu_new",
                attn_implementation="sdpa",
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.model.load_state_dict(gpt2_weights(decoder), strict=False)
        self.model.to(setting.device, setting.dtype).eval()

    @torch.inference_mode()
    def __call__(self, requests: list[Request]) -> list[list[int]]:
        prompts_BL = self._setting.prompts(requests)
        written = self.model.generate(
            prompts_BL,
            attention_mask=torch.ones_like(prompts_BL),
            max_new_tokens=self._setting.codes,
            min_new_tokens=self._setting.codes,
            do_sample=False,
            use_cache=True,
            pad_token_id=self._setting.recipe.vocabulary.pad,
            logits_processor=[_Only(self._ids)],
        )
        codes: list[list[int]] = written[:, prompts_BL.shape[1] :].tolist()
        return codes

    @torch.inference_mode()
    def logits(self, tokens_BL: Tensor) -> Tensor:
        """The logits of the image codes at every position (B, L, K), float32."""
        found: Tensor = self.model(tokens_BL).logits
        return found[..., self._ids.start : self._ids.stop].float()

    @torch.inference_mode()
    def exact_logits(self, tokens_L: Tensor) -> tuple[Tensor, float]:
        """The logits after the last token (K,) in float64, and the greatest error of the logits
        that the model itself computes.
        """
        own_K = self.logits(tokens_L[None])[0, -1].double()
        logits = copy.deepcopy(self.model).double()(tokens_L[None]).logits
        exact_K = logits[0, -1, self._ids.start : self._ids.stop]
        return exact_K, float((own_K - exact_K).abs().max())


class _Only(LogitsProcessor):
    """Lets generate choose among the ids of a range."""

    def __init__(self, ids: range) -> None:
        self._ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, : self._ids.start] = -torch.inf
        scores[:, self._ids.stop :] = -torch.inf
        return scores


def gpt2_weights(decoder: InContextDecoder) -> dict[str, Tensor]:
    """Our weights by GPT-2's names. Its matrices are transposed."""
    parts = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    weights: dict[str, Tensor] = {}
    for name, value in decoder.state_dict().items():
        if name.startswith("layers."):
            _, layer, *path, kind = name.split(".")
            theirs = parts[".".join(path)]
            matrix = kind == "weight" and "norm" not in path[-1]
            weights[f"transformer.h.{layer}.{theirs}.{kind}"] = value.t() if matrix else value
        else:
            module, kind = name.split(".")
            theirs = {"token_embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"}[module]
            weights[f"transformer.{theirs}.{kind}"] = value
    weights["lm_head.weight"] = decoder.token_embedding.weight
    return weights


def check_same_choices(
    decoder: InContextDecoder, peer: Generate, setting: Setting, requests: list[Request]
) -> float:
    """Assert that both sides choose the same codes for all requests together and for the first one
    alone, up to a first difference between logits that are nearly equal. Returns the share of equal
    codes.

    Nearly equal: within twice the rounding errors of both sides, for which those of the peer's
    logits in this cell stand, against the same weights in float64.
    """
    equal = total = 0
    for batch in (requests, requests[:1]):
        written = decode_batch(decoder, setting.codec, batch)
        ours, theirs = [output.tokens for output in written], peer(batch)
        assert len({tuple(codes) for codes in theirs}) == len(batch), (
            "masks that do not depend on the query would prove nothing"
        )
        prompts_BL = setting.prompts(batch)
        for prompt_L, mine, other in zip(prompts_BL, ours, theirs, strict=True):
            same = [a == b for a, b in zip(mine, other, strict=True)]
            equal, total = equal + sum(same), total + len(same)
            if all(same):
                continue
            cell = same.index(False)
            read_L = torch.cat([prompt_L, prompt_L.new_tensor(other[:cell])])
            exact_K, rounding = peer.exact_logits(read_L)
            first = setting.recipe.vocabulary.image_range.start
            gap = float((exact_K[mine[cell] - first] - exact_K[other[cell] - first]).abs())
            assert gap < 4 * rounding, (
                f"different codes in cell {cell}, whose logits differ by {gap}, with rounding "
                f"errors of {rounding}"
            )
    return equal / total
