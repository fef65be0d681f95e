"""The exported model from whose weights a new run starts, training.init_from."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from icl_moe.data.shards import TOKENIZER_FOLDERS, ShardSet
from icl_moe.errors import InputError
from icl_moe.inference.hub import check_files, find_model
from icl_moe.inputs import read_json
from icl_moe.recipe import TRAINING_ONLY, ModelSettings, TrainingRecipe
from icl_moe.settings import from_dict, to_dict
from icl_moe.tokenizers.features import fingerprint_of_first_stages
from icl_moe.vocabulary import Vocabulary

_KEY = "training.init_from"

_FREE = (*TRAINING_ONLY, "positions", "experts_per_token")
"""Settings of a model in which a run may differ from the model that it starts from."""

_POSITIONS, _EMBEDDING = "position_embedding.weight", "token_embedding.weight"

_FEATURES = "features_tokenizer"


@dataclass(frozen=True)
class InitialModel:
    """source: as the recipe names it. config: the content of its config.json."""

    source: str
    folder: Path
    config: Mapping[str, Any]

    @classmethod
    def open(cls, source: str) -> "InitialModel":
        """The model `source`: a folder that `icl-moe export` wrote, a shipped name, or a model of
        the Hub. Raises InputError if there is none, or if its configuration cannot be read.
        """
        try:
            folder = find_model(source)
            check_files(folder, ("config.json", "model.safetensors"))
            config = read_json(folder / "config.json")
        except InputError as error:
            raise InputError(f"{_KEY}: {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise InputError(f"{_KEY}: {folder} is not an exported model.")
        return cls(source, folder, config)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return from_dict(Vocabulary, self.config.get("vocabulary") or {}, self._origin)

    @property
    def _origin(self) -> str:
        return f"{_KEY}: {self.folder / 'config.json'}"

    def is_refined_by(self, vocabulary: Vocabulary) -> bool:
        """Whether a vocabulary is the model's with more stages of features codes."""
        stages = self.vocabulary.feature_stages
        more = vocabulary.features and stages < vocabulary.feature_stages
        return bool(more) and self.vocabulary == replace(vocabulary, feature_stages=stages)

    def check(self, recipe: TrainingRecipe, shards: ShardSet) -> None:
        """Raise InputError, naming the difference, if the recipe's model or the codes of the shards
        are not those of this model. The number of positions may differ, and the shards' features
        tokenizer may have more stages.
        """
        manifest = shards.manifest
        model = to_dict(from_dict(ModelSettings, dict(self.config["model"]), self._origin))
        for name, ours in to_dict(recipe.model).items():
            if name not in _FREE:
                self._compare(f"model.{name}", model[name], "the recipe's", ours)
        is_refined = self.is_refined_by(recipe.vocabulary)
        if is_refined:
            self._check_refinement(shards)
        else:
            ours = to_dict(recipe.vocabulary)
            self._compare("vocabulary", to_dict(self.vocabulary), "the recipe's", ours)
        known = self.config.get("format") or {}
        for name, ours in to_dict(manifest.format).items():
            if name in known and name != "vocabulary":
                self._compare(f"format.{name}", known[name], "that of the shards", ours)
        for name in ("image_size", *TOKENIZER_FOLDERS):
            if name in self.config and not (is_refined and name == _FEATURES):
                ours = getattr(manifest, name)
                self._compare(name, self.config[name], "that of the shards", ours)

    def _check_refinement(self, shards: ShardSet) -> None:
        stages = self.vocabulary.feature_stages
        known = fingerprint_of_first_stages(shards.fetch(_FEATURES), stages)
        if known != self.config.get(_FEATURES):
            raise InputError(
                f"{_KEY}: the features tokenizer of the shards has more stages than that of "
                f"{self.source}, but does not begin with its codes; make it with icl-moe tokenizer "
                "features --refine."
            )

    def _compare(self, what: str, theirs: Any, whose: str, ours: Any) -> None:
        if theirs != ours:
            raise InputError(
                f"{_KEY}: {what} of {self.source} is {theirs}, and {whose} is {ours}; make them "
                "equal."
            )

    @torch.no_grad()
    def load_into(self, model: nn.Module, exported_name: Callable[[str], str]) -> None:
        """Set the parameters of this rank's part of a new model, before it is spread over tensor
        ranks. exported_name: a parameter's name in the model's file.

        Positions and features codes that this model lacks keep their new embeddings. Raises
        InputError if the file is damaged or does not hold the tensors of its configuration.
        """
        file = self.folder / "model.safetensors"
        try:
            with safe_open(file, framework="pt") as stored:
                known = set(stored.keys())
                for name, parameter in model.named_parameters():
                    name = exported_name(name)
                    value = stored.get_tensor(name) if name in known else None
                    rows = len(parameter)
                    if value is not None and name == _POSITIONS:
                        rows = min(rows, len(value))
                        value = value[:rows]
                    elif name == _EMBEDDING:
                        rows = min(rows, self.vocabulary.size)
                    if value is None or value.shape != parameter[:rows].shape:
                        raise InputError(
                            f"{_KEY}: {file} does not fit its config.json: it lacks {name} of "
                            f"{list(parameter[:rows].shape)} numbers."
                        )
                    parameter[:rows] = value
        except (SafetensorError, OSError) as error:
            raise InputError(f"{_KEY}: {file} cannot be read ({error}).") from error

    @property
    def classes(self) -> dict[str, list[str]]:
        """The classes that it was trained on, by task."""
        return dict(self.config.get("classes") or {})

    def record(self) -> dict[str, str]:
        """What identifies the model in the record of a run."""
        return identity_of(self.source, self.folder)


def identity_of(source: str, folder: Path) -> dict[str, str]:
    """What identifies the exported model `source`, which is in `folder`, in a record; of a source
    that is a folder, only its name is kept.
    """
    name = folder.resolve().name if Path(source).exists() else source
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": name, "weights_sha256": digest}
