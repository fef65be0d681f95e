"""Small vision-language models of the Idefics family with random weights, with processors that are
made here, without a download.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPProcessor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

_VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)
_TEXT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def save_idefics2(folder: Path, context: int = 600) -> Path:
    """An Idefics2 whose context holds so many tokens; a picture is 4 of them and 2 marks."""
    tokenizer = _tokenizer()
    images = Idefics2ImageProcessorPil(
        size={"longest_edge": 32, "shortest_edge": 16}, do_image_splitting=False
    )
    processor = Idefics2Processor(images, tokenizer, image_seq_len=4)
    config = Idefics2Config(
        vision_config=_VISION,
        perceiver_config=dict(
            hidden_size=16,
            resampler_n_latents=4,
            resampler_depth=1,
            resampler_n_heads=2,
            resampler_head_dim=8,
            num_key_value_heads=2,
        ),
        text_config=dict(model_type="mistral", **_text_settings(tokenizer, context)),
        image_token_id=processor.image_token_id,
    )
    return _save(folder, processor, Idefics2ForConditionalGeneration, config)


def save_idefics3(folder: Path, context: int = 600) -> Path:
    """An Idefics3 whose context holds so many tokens; a picture is 4 of them and 3 marks."""
    tokenizer = _tokenizer()
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    config = Idefics3Config(
        vision_config=_VISION,
        text_config=dict(model_type="llama", **_text_settings(tokenizer, context)),
        scale_factor=2,
        image_token_id=processor.image_token_id,
    )
    return _save(folder, processor, Idefics3ForConditionalGeneration, config)


def save_clip_processor(folder: Path) -> None:
    """A processor that reads pictures and texts apart from each other."""
    for path in folder.glob("*processor_config.json"):
        path.unlink()
    CLIPProcessor(CLIPImageProcessorPil(), _tokenizer()).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the marks."""
    marks = ["<unk>", "<s>", "</s>", "<pad>", "<global-img>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*marks, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<global-img>"],
    )


def _text_settings(tokenizer: PreTrainedTokenizerFast, context: int) -> dict[str, object]:
    return _TEXT | dict(
        vocab_size=len(tokenizer) + 8,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _save(folder: Path, processor, model_type, config) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_type(config)
        with torch.no_grad():  # As large as after training, so that what it writes depends on it.
            for parameter in model.parameters():
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
