"""The initial embeddings of input images' codes: their tokenizer's code vectors, and how often each
code occurs in the training images.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icl_moe.data.shards import ShardSet, evenly_spaced
from icl_moe.tokenizers.features import read_centroids
from icl_moe.tokenizers.vqgan import VQGAN
from icl_moe.vocabulary import split_stages

_SAMPLES = 256
"""The number of evenly spaced episodes per task in which codes are counted: tens of thousands of
codes.
"""


@dataclass(frozen=True)
class Codebook:
    """The codebook of input images. vectors_KC: the vectors of the tokenizer's codes, float32; of a
    features tokenizer, those of its stages one below the other. frequencies_K: how often each code
    of the first stage occurs. whiten: whether to scale all channels of the vectors to the
    same variance. This is not done for k-means centres, whose channels are principal axes, the last
    of which are mostly noise. stages: the number of stages.
    """

    vectors_KC: Tensor
    frequencies_K: Tensor
    whiten: bool = True
    stages: int = 1


def read_codebook(shards: ShardSet) -> Codebook:
    """The codebook for a shard folder's input images: the VQ-GAN's, or the k-means centres of its
    features tokenizer. Frequencies are counted in the input images of 256 episodes of each task; a
    code that none of them contains counts as if seen once.
    """
    folders = {name: shards.fetch(name) for name in shards.manifest.tokenizer_folders}
    vocabulary = shards.manifest.format.vocabulary
    size, stages = vocabulary.features or vocabulary.image_codes, vocabulary.feature_stages
    counts_K = np.ones(size, dtype=np.int64)
    for task, count in shards.manifest.samples.items():
        for number in evenly_spaced(count, _SAMPLES):
            sequence = shards.sample(task, number).sequence
            for span in sequence.spans:
                if span.role == "input":
                    codes = vocabulary.to_input_codes(sequence.tokens_L[span.start : span.stop])
                    first_stage = split_stages(codes, size, stages)[0]
                    counts_K += np.bincount(first_stage, minlength=size)
    frequencies_K = torch.from_numpy(counts_K).float()
    if "features_tokenizer" in folders:
        vectors_KC = read_centroids(folders["features_tokenizer"])
        return Codebook(vectors_KC, frequencies_K, whiten=False, stages=stages)
    tokenizer = VQGAN.from_pretrained(folders["image_tokenizer"])
    return Codebook(tokenizer.codebook_KC, frequencies_K)
