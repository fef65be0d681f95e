"""The mean of the weights of several models that were trained from the same weights.

Such models lie in one basin of the loss, and their mean is often better than each of them, at the
cost of one (Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models
improves accuracy without increasing inference time").
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from icl_moe.data.shards import TOKENIZER_FOLDERS
from icl_moe.errors import InputError
from icl_moe.inference.hub import check_files, find_model
from icl_moe.inference.loading import load_decoder
from icl_moe.model.config import DecoderConfig
from icl_moe.recipe import TRAINING_ONLY
from icl_moe.training.initial_model import identity_of


class OtherModel:
    """An exported model whose weights enter a mean.

    source: a folder, a shipped name or a model of the Hub. Raises InputError if there is none, or
    if it cannot be read.
    """

    def __init__(self, source: str) -> None:
        try:
            self.folder = find_model(source)
            check_files(self.folder, ("config.json", "model.safetensors"))
            self._decoder = load_decoder(self.folder, None)
        except InputError as error:
            raise InputError(f"--mean-with: {error}") from error
        self._source = source

    def check(self, config: DecoderConfig) -> None:
        """Raise InputError, naming the difference, unless the model differs from that of `config`
        in its weights alone.
        """
        theirs, ours = (_compared(each.to_dict()) for each in (self._decoder.config, config))
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise InputError(
                    f"--mean-with: {name} of {self._source} is {theirs.get(name)}, and that of the "
                    f"checkpoint is {value}; only models that differ in their weights have a mean."
                )

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self._decoder.named_parameters())

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """The classes that it was trained on, by task."""
        return self._decoder.config.classes or {}

    def record(self) -> dict[str, str]:
        """What identifies the model in the record of the mean."""
        return identity_of(self._source, self.folder)


@torch.no_grad()
def mean_weights(
    own: Mapping[str, Tensor], others: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The mean of each tensor, of `own` and of the same name in each of the others, computed in
    float32 and in the precision of `own`.
    """
    every = [own, *others]
    return {
        name: torch.stack([weights[name].float() for weights in every]).mean(dim=0).to(value.dtype)
        for name, value in own.items()
    }


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal, by its name as in a recipe."""
    model = {
        f"model.{name}": value
        for name, value in config["model"].items()
        if name not in TRAINING_ONLY
    }
    names = ("vocabulary", "format", "image_size", "mask_corruption", *TOKENIZER_FOLDERS)
    return model | {name: config[name] for name in names if name in config}
