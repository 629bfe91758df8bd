"""Words that the text-to-image model is trained with, and the tokenizer of its own small vocabulary.

The prompts are those of `synthquant.synthesize.prompts`. One in ten has the style template, whose token GenQ learns;
training uses it with the words of `STYLES`, which say something true of the image, so that the place of the style means
something before a token is learned for it.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer

from synthquant.models.zoo import CIFAR10_CLASSES
from synthquant.synthesize.prompts import STYLE_TEMPLATE, TEMPLATES

STYLES = (("dark", "medium", "bright"), ("gray", "plain", "colorful"), ("soft", "normal", "sharp"))
"""Words for the lower, middle and upper third of the training images by brightness, saturation and contrast."""

MAX_TOKENS = 16
"""Length of a prompt with its start and end."""

_COMMON = """
a about above after all an and animal any are art as at background baby back bad beautiful before behind below big
black blue boat both brown by camera car city clear close cloud cold color day deep detailed down early east face
far fast field flying focus for forest four frame from front full fur garden gold grass gray great green ground
hand happy has head high hill home horizon hot house ice image images imagenet cifar in indoor inside into is it
its jet kitten lake land landscape left leg light little long lot low machine made man many model more most
mountain near new night no north not object ocean of off old on one only open orange other out outdoor outside
over painting people person picture pink plane plant portrait puppy purple quality rain real red right river road
rock room running sand scene sea season set shadow shape short side silver single sitting sky slow snow some south
spring standing star stone street strong style summer sun sunset tall that the this three to toad top town toy
tree two under up van vehicle very view walking wall warm water wheel white wide wild wind window wing winter with
without wood world yellow young dataset texture pattern style pixel resolution blurry noisy realistic natural
synthetic sample example category class
"""


def vocabulary_words() -> list[str]:
    """Every word that is one token, sorted."""
    text = " ".join([*TEMPLATES, *CIFAR10_CLASSES, STYLE_TEMPLATE, *(word for words in STYLES for word in words)])
    words = set(text.replace("{}", " ").replace("-", " ").split()) | set(_COMMON.split())
    return sorted(words)


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, learned until every word is one token: most frequent pair first, ties in order of the pair."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of single bytes, the words above and what lies between.

    Any text can be written in it; a new token is added by `add_tokens`, its row by `resize_token_embeddings`.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges = merges_for(vocabulary_words())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def encode(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids int64 `[len(prompts), MAX_TOKENS]`, padded as the pipeline pads them."""
    ids = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True).input_ids
    return torch.tensor(ids)


def style_levels(images: Tensor) -> Tensor:
    """Which of the three words of each row of `STYLES` fits each image: int64 `[N, 3]` for uint8 `[N, 3, H, W]`."""
    pixels = images.float().div(255)
    measures = (pixels.mean((1, 2, 3)), (pixels.amax(1) - pixels.amin(1)).mean((1, 2)), pixels.mean(1).std((1, 2)))
    thirds = torch.tensor([1 / 3, 2 / 3])
    return torch.stack([torch.bucketize(m, torch.quantile(m, thirds.to(m))) for m in measures], 1)
