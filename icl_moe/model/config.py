"""The decoder's configuration, as transformers saves and loads it."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

from icl_moe.errors import InputError
from icl_moe.recipe import ModelSettings, TrainingRecipe
from icl_moe.sequence import LossOn, SequenceFormat
from icl_moe.settings import from_dict, to_dict
from icl_moe.vocabulary import Vocabulary


class DecoderConfig(PretrainedConfig):
    """The configuration of an exported model.

    model, vocabulary: the recipe's sections of those names. format, image_size, examples,
    image_tokenizer, mask_tokenizer, features_tokenizer, classes: what its training shards say
    (SequenceFormat without its vocabulary, pixels per side, examples per episode, the fingerprints
    of the VQ-GAN, the mask tokenizer and the features tokenizer, class names by task); None before
    training, and for missing tokenizers. loss_on, mask_corruption: as in the training recipe.
    mask_threshold, mask_edges: the result of `icl_moe.evaluation.fitting`; None if nothing was
    fitted. All are plain values, so that config.json can be read without this package.

    As in earlier exports, a format may also hold the vocabulary. Raises InputError if the two
    differ.
    """

    model_type = "icl_moe_decoder"

    model: dict[str, Any] | None = None
    vocabulary: dict[str, Any] | None = None
    format: dict[str, Any] | None = None
    image_size: int | None = None
    examples: int | None = None
    image_tokenizer: str | None = None
    mask_tokenizer: str | None = None
    features_tokenizer: str | None = None
    loss_on: LossOn = "all"
    mask_corruption: bool = False
    mask_threshold: dict[str, Any] | None = None
    mask_edges: dict[str, Any] | None = None
    classes: dict[str, list[str]] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **others: Any) -> None:
        if self.format is not None and "vocabulary" in self.format:
            format = dict(self.format)
            again = _vocabulary(format.pop("vocabulary"))
            if self.vocabulary is None:
                self.vocabulary = to_dict(again)
            elif again != _vocabulary(self.vocabulary):
                raise InputError("config.json: format.vocabulary differs from the vocabulary.")
            self.format = format
        super().__post_init__(**others)

    @classmethod
    def from_recipe(cls, recipe: TrainingRecipe, **data: Any) -> "DecoderConfig":
        return cls(
            model=to_dict(recipe.model),
            vocabulary=to_dict(recipe.vocabulary),
            loss_on=recipe.training.loss_on,
            mask_corruption=recipe.training.mask_corruption,
            **data,
        )

    @property
    def settings(self) -> ModelSettings:
        return from_dict(ModelSettings, self.model or {}, origin="config.json")

    @property
    def vocab_size(self) -> int:
        """transformers' name for the size of the vocabulary."""
        return self.vocabulary_size

    @property
    def vocabulary_size(self) -> int:
        return self.token_vocabulary.size

    @property
    def token_vocabulary(self) -> Vocabulary:
        return _vocabulary(self.vocabulary)

    @property
    def sequence_format(self) -> SequenceFormat:
        """The format of the model's sequences. Raises InputError if the configuration does not
        describe a format.
        """
        values = {**(self.format or {}), "vocabulary": self.vocabulary or {}}
        return from_dict(SequenceFormat, values, origin="config.json")


def joined_classes(of_each: Iterable[Mapping[str, Iterable[str]]]) -> dict[str, list[str]]:
    """The classes, by task, of several models or data sets together; in alphabetical order."""
    found: dict[str, set[str]] = {}
    for of_task in of_each:
        for task, names in of_task.items():
            found.setdefault(task, set()).update(names)
    return {task: sorted(names) for task, names in found.items()}


def _vocabulary(values: dict[str, Any] | None) -> Vocabulary:
    return from_dict(Vocabulary, values or {}, origin="config.json")
