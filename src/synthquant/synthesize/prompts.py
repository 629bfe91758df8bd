"""From classes to prompts: which class, template and seed each image of a text-to-image set has.

StableQ and GenQ (arXiv:2312.05272, ECCV 2024), section on label prompts and appendix B.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from synthquant.core.errors import InputError
from synthquant.core.rng import Rng
from synthquant.synthesize.class_names import ClassName, prompt_names

TEMPLATES = tuple(
    f"{start} {{}}"
    for start in (
        *("photo of a", "rendering of a", "cropped photo of the", "the photo of a", "photo of a clean"),
        *("photo of a dirty", "dark photo of the", "photo of my", "photo of the cool", "close-up photo of a"),
        *("bright photo of the", "cropped photo of a", "photo of the", "good photo of the", "photo of one"),
        *("close-up photo of the", "rendition of the", "photo of the clean", "rendition of a", "photo of a nice"),
        *("good photo of a", "photo of the nice", "photo of the small", "photo of the weird", "photo of the large"),
        *("photo of a cool", "photo of a small"),
    )
)
"""The 27 templates of GenQ, appendix B (the object templates of diffusers' textual inversion without the article)."""

STYLE_TEMPLATE = "a photo of a {} in the style of {}"
"""GenQ, equation 10: the class, and the token that was learned from a few real images."""

TEMPLATES_TRIED = 3
"""Templates that an image is tried with before it is given up."""

ClassOrder = Literal["balanced", "uniform"]
Wording = Literal["name", "any_name", "gloss"]


@dataclass(frozen=True)
class Slot:
    """One place in a set of images."""

    labels: tuple[int, ...]
    """Its class; with mixed-class prompts the first of its classes and then the others."""
    index: int
    """Which image of its class it is, or which of the set where classes are drawn at random."""


@dataclass(frozen=True)
class Prompt:
    """One attempt at an image: all that the generator needs."""

    text: str
    """What the generator reads."""
    template: str
    """The template, with its places for the class and the learned token still open."""
    class_names: str
    """What stands for the class; several classes are joined by " and "."""
    seed: int
    """Seed of the image's noise; it depends on run, class, template, index and attempt only."""


class PromptPlan:
    """The prompts of a set of any size; each slot is found without those before it.

    Args:
        classes: the classifier's classes in the order of its labels.
        rng: source of all draws.
        templates: with one place `{}` for the class, and a second one for the learned token where there is one.
        token: the learned token, for templates with a second place.
        only: labels that are drawn; empty: all.
        order: "balanced" draws every class once, in a random order, before any is drawn again; "uniform" draws the
            class of each image independently.
        wording: the name of a class, any of its names, or its name with a gloss.
        classes_per_prompt: how many different classes share an image (mixed-class prompts, arXiv:2507.21947).
        redraws: how often a prompt is drawn again before another template is tried.
    """

    def __init__(
        self,
        classes: Sequence[ClassName],
        rng: Rng,
        *,
        templates: Sequence[str] = TEMPLATES,
        token: str | None = None,
        only: Sequence[int] = (),
        order: ClassOrder = "balanced",
        wording: Wording = "name",
        classes_per_prompt: int = 1,
        redraws: int = 5,
    ) -> None:
        self._classes = classes
        self._names = prompt_names(classes)
        self._rng = rng
        self._templates = tuple(templates)
        self._token = token
        self._drawn = tuple(only) or tuple(range(len(classes)))
        self._order = order
        self._wording = wording
        self._mixed = classes_per_prompt
        self._redraws = redraws
        for template in self._templates:
            require_template(template, places=1 if token is None else 2)
        if wording == "gloss" and not all(classes[label].gloss for label in self._drawn):
            lacking = next(self._names[label][0] for label in self._drawn if not classes[label].gloss)
            raise InputError(
                f"class {lacking!r} has no gloss; choose another wording, or a file of classes with glosses"
            )
        if classes_per_prompt > len(self._drawn):
            raise InputError(
                f"classes_per_prompt is {classes_per_prompt} but only {len(self._drawn)} classes are drawn"
            )
        # One round of the balanced order serves as many slots as there are classes.
        self._round = lru_cache(maxsize=4)(self._shuffled)

    @property
    def attempts(self) -> int:
        """Attempts at an image after which it is given up."""
        return self.attempts_with_a_template * min(TEMPLATES_TRIED, len(self._templates))

    @property
    def attempts_with_a_template(self) -> int:
        """Attempts at an image after which it gets another template."""
        return self._redraws + 1

    def slot(self, number: int) -> Slot:
        """Return which class, and which image of it, stands at a place of the set."""
        count = len(self._drawn)
        if self._order == "balanced":
            index, place = divmod(number, count)
            first = self._round(index)[place]
        else:
            index, first = number, self._rng.seed_for(f"class of image {number}") % count
        others: list[int] = []
        if self._mixed > 1:
            order = torch.randperm(count, generator=self._rng.generator(f"classes mixed into image {number}"))
            others = [place for place in order.tolist() if place != first][: self._mixed - 1]
        return Slot(tuple(self._drawn[place] for place in (first, *others)), index)

    def prompt(self, slot: Slot, attempt: int = 0) -> Prompt:
        """Return the prompt and the seed of an attempt (0, 1, ...) at the image of a slot."""
        names = " and ".join(self._wording_of(label, slot) for label in slot.labels)
        purpose = f"{names}, image {slot.index}"
        order = torch.randperm(len(self._templates), generator=self._rng.generator(f"templates of {purpose}"))
        template = self._templates[int(order[attempt // self.attempts_with_a_template])]
        words = (names,) if self._token is None else (names, self._token)
        seed = self._rng.seed_for(f"noise of {template.format(*words)}, image {slot.index}, attempt {attempt}")
        return Prompt(template.format(*words), template, names, seed)

    def _wording_of(self, label: int, slot: Slot) -> str:
        entry = self._classes[label]
        if self._wording == "gloss":
            return entry.explained
        if self._wording == "any_name":
            names = self._names[label]
            return names[self._rng.seed_for(f"name of class {label}, image {slot.index}") % len(names)]
        return self._names[label][0]

    def _shuffled(self, number: int) -> tuple[int, ...]:
        generator = self._rng.generator(f"order of round {number}")
        return tuple(torch.randperm(len(self._drawn), generator=generator).tolist())


def require_template(template: str, places: int) -> None:
    """Raise `InputError` unless a template has so many places `{}` and no other braces."""
    what = "one place {} for the class" if places == 1 else "two places {}, for the class and the learned token"
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        fields = ["?"]
    if fields != [""] * places:
        raise InputError(f"template {template!r} must have {what}, for example {_example(places)!r}")


def _example(places: int) -> str:
    return TEMPLATES[0] if places == 1 else STYLE_TEMPLATE
