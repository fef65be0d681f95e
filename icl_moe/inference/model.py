"""The public interface: from examples and a query to a mask or the caption of a region."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from icl_moe.devices import Device, find_device, find_dtype
from icl_moe.errors import InputError
from icl_moe.images import ImageLike, load_image
from icl_moe.inference.cache import KeyValueCache
from icl_moe.inference.colours import segment_colours
from icl_moe.inference.decode import (
    GREEDY,
    Request,
    Sampling,
    decode_at_once,
    decode_batch,
    read_examples,
)
from icl_moe.inference.edges import EdgeFilter
from icl_moe.inference.examples import list_pairs
from icl_moe.inference.hub import check_files, find_model, push_model
from icl_moe.inference.loading import (
    check_tokenizers,
    fingerprint_of,
    load_decoder,
)
from icl_moe.inference.region import Region
from icl_moe.inference.session import Examples, Query, Session
from icl_moe.model.decoder import InContextDecoder
from icl_moe.sequence import Episode, SequenceCodec
from icl_moe.tasks import CAPTIONING, SEGMENTATION, Task
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.tokenizers import IMAGE_TOKENIZERS
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from icl_moe.tokenizers.text import TextTokenizer

Decoding = Literal["autoregressive", "parallel", "mirrored"]
"""How a mask is decoded: one code after the other; or all codes in one forward pass, which needs a
model that was trained with mask corruption; or as in `parallel`, and once more with mirrored
examples and query, the mask being the mean of both, which needs a model that reads features.
Texts are always decoded one token after the other.
"""


class Read(NamedTuple):
    """What the decoder has read of the examples of an episode, by group; see `decode_at_once`.

    mirror: the episode with mirrored examples, where these were read too.
    """

    own: Sequence[KeyValueCache]
    mirror: Episode | None = None
    of_mirror: Sequence[KeyValueCache] = ()


class InContextModel:
    """An exported model with its tokenizers.

    model = InContextModel.from_pretrained("exported")
    mask = model.segment(examples=[("dog1.jpg", "dog1_mask.png")], query="dog2.jpg")
    example = Region("a dog on grass", "dog", (40, 60, 200, 120))
    region = model.caption(examples=[("dog1.jpg", example)], query="dog2.jpg")

    edges: how the outlines of masks follow the edges of the query, as fitted when the model was
    exported; None leaves masks as the decoder draws them, at the resolution of its cells.
    """

    def __init__(
        self,
        decoder: InContextDecoder,
        tokenizers: ImageTokenizers,
        text: TextTokenizer,
        fingerprint: str = "",
    ) -> None:
        self.decoder = decoder.eval()
        self.tokenizers = tokenizers
        self.format = decoder.sequence_format
        self.codec = SequenceCodec(self.format, text)
        self.image_size = decoder.config.image_size
        self.edges = EdgeFilter.of(decoder.config.mask_edges)
        self.fingerprint = fingerprint
        self.folder: Path | None = None
        check_tokenizers(decoder.config, self.format, tokenizers)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: Device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> "InContextModel":
        """Load a model onto `device` (by default a GPU if there is one).

        source: the folder that `icl-moe export` wrote, the name of a shipped model, or a model of
        the Hugging Face Hub, OWNER/NAME or OWNER/NAME@REVISION. dtype: float32 or bfloat16, as text
        or as torch's, for the decoder's weights; by default that of the file. Gates stay float32.
        Raises InputError if the model or device does not exist, or if a file is missing, damaged or
        inconsistent with the others.
        """
        place, precision = find_device(device), find_dtype(dtype)
        folder = find_model(source)
        check_files(folder, ("config.json", "model.safetensors", "text_tokenizer"))
        decoder = load_decoder(folder, precision)
        check_files(folder, [name for name in IMAGE_TOKENIZERS if getattr(decoder.config, name)])
        text = TextTokenizer(
            decoder.sequence_format.vocabulary.text_merges, source=str(folder / "text_tokenizer")
        )
        model = cls(
            decoder,
            ImageTokenizers.from_folders({path.name: path for path in folder.iterdir()}),
            text,
            fingerprint_of(folder),
        )
        model.folder = folder
        return model.to(place)

    def to(self, device: Device) -> "InContextModel":
        self.decoder.to(device)
        self.tokenizers.to(device)
        return self

    def push_to_hub(
        self,
        repository: str,
        metrics: str | Path | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the model to the Hugging Face Hub as `repository` (OWNER/NAME), with its model
        card, in one commit. Returns the address of the commit.

        metrics: metrics.json of an evaluation of this model, for the card. private: whether a
        repository that must be created is private; None leaves it to the owner's settings. Raises
        InputError if the model was not loaded from a folder, or if the Hub refuses the upload or
        cannot be reached.
        """
        if self.folder is None:
            raise InputError("Only a model that from_pretrained loaded can be uploaded.")
        file = None if metrics is None else Path(metrics)
        return push_model(self.folder, repository, file, private, token)

    def session(
        self,
        examples: Examples,
        category: str | None = None,
        nearest: int | None = None,
        progress: bool = False,
    ) -> Session:
        """The examples, read once for any number of queries.

        examples: (image, mask) pairs as in `segment`, (image, region) pairs as in `caption`, or
        such pairs by the name of their class. category: the class's name, needed if the model's
        format has a class prompt. nearest: each query is asked with so many of the examples, those
        whose images are the most like it; then there may be more than the model's positions hold.
        Raises InputError for examples that cannot be read or do not fit the model.
        """
        return Session(self, examples, category, nearest, progress)

    def segment(
        self,
        examples: Iterable[tuple[ImageLike, ImageLike]],
        query: ImageLike,
        category: str | None = None,
        sampling: Sampling = GREEDY,
        progress: bool = False,
        decoding: Decoding | None = None,
        windows: bool = False,
        shifts: bool = False,
    ) -> np.ndarray:
        """The mask of what the examples' masks show, boolean (H, W), in the query's size.

        examples: (image, mask) pairs; a mask has its image's size and two levels, the brighter one
        on the object (see `load_mask`). category: the class's name, needed if the model's format
        has a class prompt. decoding: see `complete`. windows, shifts: see `Session.segment`. Raises
        InputError for input that cannot be read or does not fit the model.
        """
        drawn = self.draw_mask(
            examples, query, category, sampling, progress, decoding, windows, shifts
        )
        return drawn.mask_HW

    def draw_mask(
        self,
        examples: Iterable[tuple[ImageLike, ImageLike]],
        query: ImageLike,
        category: str | None = None,
        sampling: Sampling = GREEDY,
        progress: bool = False,
        decoding: Decoding | None = None,
        windows: bool = False,
        shifts: bool = False,
    ) -> DrawnMask:
        """As `segment`, but also returns the brightness of each pixel and the model's
        confidence.
        """
        picture = load_image(query, "The query")
        session = Session(self, list_pairs(examples, "mask"), category, task=SEGMENTATION)
        return session.draw(picture, sampling, progress, decoding, windows=windows, shifts=shifts)

    def caption(
        self,
        examples: Iterable[tuple[ImageLike, Region | str | os.PathLike[str]]],
        query: ImageLike,
        category: str | None = None,
        sampling: Sampling = GREEDY,
        progress: bool = False,
    ) -> Region:
        """The query's region for the class that the examples show, with the box in the query's
        pixels.

        examples: (image, region) pairs, the region or the file that `Region.load` reads. category:
        the class's name, by default that of the examples. The category, and the examples'
        categories and boxes, are needed only if the model's format has them. Raises InputError for
        input that cannot be read or does not fit the model.
        """
        image = Query.load(query, self.image_size)
        session = Session(self, list_pairs(examples, "region"), category, task=CAPTIONING)
        return session.caption(image, sampling, progress)

    def segment_colours(
        self,
        examples: Iterable[tuple[ImageLike, ImageLike]],
        query: ImageLike,
        category: str | None = None,
        sampling: Sampling = GREEDY,
        progress: bool = False,
        decoding: Decoding | None = None,
    ) -> np.ndarray:
        """The query painted as the examples' masks are: uint8 (H, W, 3) in the query's size, one
        colour for each class and black elsewhere.

        examples: (image, painted mask) pairs; a painted mask has its image's size and, besides
        black, the same one to seven colours in all examples. category: the names of the classes,
        such as "cat + dog", needed if the model's format has a class prompt. decoding: see
        `complete`. Raises InputError for input that cannot be read or does not fit the model, and
        for a model that was not trained on several classes in one mask.
        """
        return segment_colours(self, examples, query, category, sampling, progress, decoding)

    def complete(
        self,
        requests: Sequence[Request],
        sampling: Sampling = GREEDY,
        progress: bool = False,
        decoding: Decoding | None = None,
        read: Sequence[Read] | None = None,
    ) -> list[Any]:
        """The query's pair for each request, generated by the model; all requests form one batch.

        A request is an episode whose pairs are the examples, and the query's codes (N,) from
        `encode`. decoding: of output images; by default in one pass where the model was trained for
        it and nothing is sampled, mirrored where it can be. Then an output that is one image is
        written at once, and so is the image that another output begins with; more examples than an
        episode had in training are read in groups, whose probabilities are averaged, see
        `decode_at_once`. read: what `read_examples` returned for the episode of each request.
        Raises InputError where the model cannot decode so, or cannot read so many examples.
        """
        decoding = self.decoding(decoding, sampling)
        at_once, mirrored = self._at_once, partial(self._at_once, mirrored=True)
        image_first = partial(self._image_first, progress=progress)
        in_turn = partial(self._in_turn, sampling=sampling, progress=progress)

        def way(task: Task) -> Callable[..., list[Any]]:
            if not self._image_at_once(task, decoding):
                return in_turn
            if not task.is_one_image(self.format):
                return image_first
            return mirrored if decoding == "mirrored" and task.mirrors else at_once

        numbers_of: dict[Task, list[int]] = {}
        for number, (episode, _) in enumerate(requests):
            self.check_examples(len(episode.pairs), episode.task, decoding)
            numbers_of.setdefault(episode.task, []).append(number)
        by_number: dict[int, Any] = {}
        for task, numbers in numbers_of.items():
            write = way(task)
            of_these = None if read is None else [read[n] for n in numbers]
            pairs = write([requests[n] for n in numbers], read=of_these)
            by_number |= zip(numbers, pairs, strict=True)
        return [by_number[number] for number in range(len(requests))]

    def read_examples(self, episode: Episode) -> Read:
        """What the decoder keeps of an episode's examples, for `complete`, so that any number of
        queries are asked without reading the examples again.
        """
        decoding = self.decoding()
        at_once = self._image_at_once(episode.task, decoding)
        read = partial(
            read_examples, self.decoder, self.codec, together=self._together if at_once else None
        )
        if decoding != "mirrored" or not episode.task.mirrors:
            return Read(read(episode))
        mirror = self._mirrored(episode)
        return Read(read(episode), mirror, read(mirror))

    def _mirrored(self, episode: Episode) -> Episode:
        """The examples of an episode of a task that mirrors, as if they were mirrored."""
        if not episode.pairs:
            return episode
        images_EN = self.tokenizers.mirror_inputs(np.stack([p.image for p in episode.pairs]))
        masks_EN = self.tokenizers.mirror_masks(np.stack([p.mask for p in episode.pairs]))
        return replace(episode, pairs=tuple(map(episode.task.pair_type, images_EN, masks_EN)))

    def decoding(self, asked: Decoding | None = None, sampling: Sampling = GREEDY) -> Decoding:
        """How masks are decoded if `asked` for this decoding. Raises InputError if the model does
        not support it.
        """
        if asked not in (None, *get_args(Decoding)):
            raise InputError(f"decoding must be {' or '.join(get_args(Decoding))}, not {asked!r}.")
        if not isinstance(sampling, Sampling):
            raise InputError(f"sampling must be a Sampling, not {sampling!r:.60}.")
        trained = self.decoder.config.mask_corruption
        at_once = asked in ("parallel", "mirrored")
        if at_once and not trained:
            raise InputError(
                "This model cannot decode in parallel, since it was not trained for it: train with "
                "training.mask_corruption=true, or set decoding to autoregressive."
            )
        if at_once and sampling.temperature:
            raise InputError(
                "Parallel decoding does not sample: leave the sampling out, or set decoding to "
                "autoregressive."
            )
        mirrors = self.tokenizers.can_mirror
        if asked == "mirrored" and not mirrors:
            raise InputError(
                "This model cannot decode mirrored, since it reads images with a VQ-GAN, whose "
                "codes cannot be mirrored: set decoding to parallel."
            )
        if asked is None and trained and not sampling.temperature:
            return "mirrored" if mirrors else "parallel"
        return asked or "autoregressive"

    def _image_at_once(self, task: Task, decoding: Decoding) -> bool:
        """Whether the output, or an image that it begins with, is written in one pass."""
        begins = task.is_one_image(self.format) or task.begins_with_image(self.format)
        return decoding != "autoregressive" and begins

    def _in_turn(
        self,
        requests: Sequence[Request],
        sampling: Sampling = GREEDY,
        progress: bool = False,
        openings: Sequence[Sequence[int]] | None = None,
        together: int | None = None,
        read: Sequence[Read] | None = None,
    ) -> list[Any]:
        groups = _own(read)
        if together is None and groups and any(len(group) > 1 for group in groups):
            groups = None  # It was read in groups, and now is needed in one sequence.
        outputs = decode_batch(
            self.decoder, self.codec, requests, sampling, progress, openings, together, groups
        )
        return [
            episode.task.scored(
                episode.task.read_output(self.codec, query, written.tokens),
                written.log_probabilities,
            )
            for (episode, query), written in zip(requests, outputs, strict=True)
        ]

    def _image_first(
        self,
        requests: Sequence[Request],
        progress: bool,
        read: Sequence[Read] | None = None,
    ) -> list[Any]:
        """The image that each output begins with at once, then the rest token by token."""
        _, brightness_BCHW = self._expected(requests, _own(read))
        drawn = [
            episode.task.settle(brightness_HW)
            for (episode, _), (brightness_HW,) in zip(requests, brightness_BCHW, strict=True)
        ]
        openings = [
            self.format.vocabulary.from_codes(codes).tolist() for codes in self.encode_masks(drawn)
        ]
        pairs = self._in_turn(
            requests, progress=progress, openings=openings, together=self._together, read=read
        )
        return [
            episode.task.with_image(pair, mask_HW)
            for (episode, _), pair, mask_HW in zip(requests, pairs, drawn, strict=True)
        ]

    @property
    def _together(self) -> int | None:
        """The most examples that are read in one pass where images are written at once."""
        return self.decoder.config.examples

    @torch.inference_mode()
    def _expected(
        self, requests: Sequence[Request], read: Sequence[Sequence[KeyValueCache]] | None
    ) -> tuple[torch.Tensor, np.ndarray]:
        """What the model expects of the output images of requests of one task, in one pass: how
        probable each code is in each cell (B, N, K), and the brightness of the masks (B, C, H, W),
        see `Task.expected_masks`.
        """
        probabilities_BNK = decode_at_once(self.decoder, self.codec, requests, self._together, read)
        examples = [episode.pairs for episode, _ in requests]
        task = requests[0][0].task
        brightness_BCHW = task.expected_masks(self, probabilities_BNK, examples)
        return probabilities_BNK, brightness_BCHW.cpu().numpy()

    def _at_once(
        self,
        requests: Sequence[Request],
        read: Sequence[Read] | None = None,
        mirrored: bool = False,
    ) -> list[Any]:
        groups = _own(read)
        probabilities_BNK, brightness_BCHW = self._expected(requests, groups)
        if mirrored:
            brightness_BCHW = (brightness_BCHW + self._seen_mirrored(requests, read)) / 2
        tokens_BN = self.format.vocabulary.from_codes(
            probabilities_BNK.argmax(dim=-1).cpu().numpy()
        )
        fitted = self.decoder.config.mask_threshold
        threshold = 0.0 if fitted is None else float(fitted["value"])
        return [
            episode.task.read_at_once(
                self.codec,
                query,
                tokens.tolist(),
                [DrawnMask(brightness_HW, True, threshold) for brightness_HW in brightness_CHW],
            )
            for (episode, query), tokens, brightness_CHW in zip(
                requests, tokens_BN, brightness_BCHW, strict=True
            )
        ]

    def _seen_mirrored(
        self, requests: Sequence[Request], read: Sequence[Read] | None
    ) -> np.ndarray:
        """The expected brightness (B, C, H, W) where examples and queries are read mirrored, turned
        back.
        """
        queries_BN = self.tokenizers.mirror_inputs(np.stack([query for _, query in requests]))
        if read is None:
            mirrors = [self._mirrored(episode) for episode, _ in requests]
        else:
            mirrors = [each.mirror for each in read if each.mirror is not None]
        _, brightness_BCHW = self._expected(
            list(zip(mirrors, queries_BN, strict=True)),
            None if read is None else [each.of_mirror for each in read],
        )
        return brightness_BCHW[..., ::-1]

    @torch.inference_mode()
    def encode(self, pixels: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Codes (N,) of each input image, pixels_3HW in [-1, 1] at the model's image size."""
        if not pixels:
            return []
        return list(self.tokenizers.read(torch.stack(list(pixels)).to(self.decoder.device)))

    def encode_masks(self, masks: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes (N,) of each boolean mask (H, W) at the model's image size."""
        return list(self.tokenizers.mask_writer.encode(np.stack(masks))) if masks else []

    def encode_painted(self, painted: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes (N,) of several masks in one picture, boolean (H, W, 3) at the model's image
        size.
        """
        return list(self.tokenizers.mask_writer.encode_painted(np.stack(painted)))

    def decode_masks(self, codes_BN: np.ndarray) -> torch.Tensor:
        """The brightness of the masks' pixels, (B, H, W), float32, from about -1 (outside) to 1."""
        return self.tokenizers.mask_writer.decode(codes_BN)

    def decode_painted(self, codes_BN: np.ndarray) -> torch.Tensor:
        """The pixels of several masks in one picture, (B, 3, H, W), float32, about -1 to 1."""
        return self.tokenizers.mask_writer.decode_painted(codes_BN)

    def decode_expected(self, probabilities_BNK: torch.Tensor) -> torch.Tensor:
        """The expected brightness of the masks' pixels, (B, H, W); see `MaskTokenizer`."""
        return self.tokenizers.mask_writer.decode_expected(probabilities_BNK)

    def decode_colours(
        self, probabilities_BNK: torch.Tensor, colours_C3: np.ndarray
    ) -> torch.Tensor:
        """How probable each colour is in each pixel, (B, C, H, W); see `MaskTokenizer`."""
        return self.tokenizers.mask_writer.decode_colours(probabilities_BNK, colours_C3)

    @torch.inference_mode()
    def decode(self, codes_BN: np.ndarray) -> torch.Tensor:
        """The pixels of image codes, (B, 3, H, W), float32 in [-1, 1] or a little beyond."""
        return self.tokenizers.decode(self._on_device(codes_BN))

    @torch.inference_mode()
    def show(self, codes_BN: np.ndarray) -> torch.Tensor:
        """Pixels to display for the codes of input images; see `ImageTokenizers.show`."""
        return self.tokenizers.show(self._on_device(codes_BN))

    def _on_device(self, codes_BN: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(codes_BN), device=self.decoder.device)

    def most_examples(self, task: Task, decoding: Decoding | None = None) -> int | None:
        """The most examples that the model can read before a query; None for any number, where they
        are read in groups.
        """
        if self._together and self._image_at_once(task, self.decoding(decoding)):
            return None
        positions = self.decoder.settings.positions
        return (positions - self.format.length(0)) // self.format.pair_length - 1

    def check_examples(self, count: int, task: Task, decoding: Decoding | None = None) -> None:
        """Raise InputError if the model cannot read `count` examples of a task and a query."""
        most = self.most_examples(task, decoding)
        if most is not None and count > most:
            raise InputError(
                f"{count} examples are more than this model can read: its "
                f"{self.decoder.settings.positions} positions hold {most}; give fewer, or let the "
                f"nearest {most} of them be chosen for each query (nearest)."
            )
        if count == 0 and not self.format.class_prompt:
            raise InputError(
                "This model needs at least one example; only a model trained with "
                "class_prompt=true works without examples."
            )

    def check_request(self, task: Task, examples: int, category: str | None) -> None:
        """Raise InputError if the model cannot do the task with so many examples of this class."""
        trained = self.decoder.config.classes
        if trained is not None and task.name not in trained:
            names = [name.replace("_", " ") for name in (*trained, task.name)]
            hint = f"; the recipe {task.recipe} trains one that is" if task.recipe else ""
            raise InputError(
                f"This model was trained on {' and '.join(names[:-1])}, not {names[-1]}{hint}."
            )
        self.check_examples(examples, task)
        if not category and task.needs_category(self.format):
            raise InputError("This model needs the class's name: set the category.")
        if category and task is not CAPTIONING and not task.needs_category(self.format):
            raise InputError(
                "This model reads no class names, only examples: leave the category out."
            )


def _own(read: Sequence[Read] | None) -> list[Sequence[KeyValueCache]] | None:
    """What was read of the examples as they are, for each request."""
    return None if read is None else [each.own for each in read]
