from __future__ import annotations

from collections import Counter

import pytest

from synthquant.core.errors import InputError
from synthquant.core.rng import Rng
from synthquant.synthesize.class_names import ClassName, class_names
from synthquant.synthesize.prompts import STYLE_TEMPLATE, TEMPLATES, PromptPlan, require_template

CIFAR = class_names("cifar10")
KITES = (
    ClassName(names=("kite", "hawk"), gloss="a bird of prey"),
    ClassName(names=("kite", "toy kite"), gloss="a toy; flies on a string"),
)


def plan(classes: tuple[ClassName, ...] = CIFAR, seed: int = 0, **options: object) -> PromptPlan:
    return PromptPlan(classes, Rng(seed), **options)  # type: ignore[arg-type]


def texts(prompts: PromptPlan, count: int) -> list[str]:
    return [prompts.prompt(prompts.slot(number)).text for number in range(count)]


def test_there_are_27_templates_and_all_are_used() -> None:
    assert len(set(TEMPLATES)) == 27
    prompts = plan()
    used = Counter(prompts.prompt(prompts.slot(number)).template for number in range(2000))
    assert set(used) == set(TEMPLATES)
    assert min(used.values()) > 40 and max(used.values()) < 120


def test_balanced_classes_differ_by_one_at_most_at_every_length() -> None:
    prompts = plan()
    labels = [prompts.slot(number).labels[0] for number in range(35)]
    for length in range(1, 36):
        counts = Counter(labels[:length])
        assert max(counts.values()) - min(counts[label] for label in range(10)) <= 1
    assert labels[:10] != labels[10:20]  # each round has an order of its own


def test_uniform_classes_are_drawn_independently() -> None:
    prompts = plan(order="uniform")
    counts = Counter(prompts.slot(number).labels[0] for number in range(2000))
    assert min(counts.values()) > 140 and max(counts.values()) < 260
    assert len({prompts.slot(number).labels[0] for number in range(10)}) < 10


def test_a_slot_is_the_same_whatever_was_asked_before() -> None:
    first, second = plan(), plan()
    ahead = [second.prompt(second.slot(number)) for number in reversed(range(40))]
    assert [first.prompt(first.slot(number)) for number in range(40)] == ahead[::-1]
    assert texts(first, 40) != texts(plan(seed=1), 40)


def test_every_image_and_every_attempt_has_a_seed_of_its_own() -> None:
    prompts = plan(redraws=2)
    drawn = [prompts.prompt(prompts.slot(number), attempt) for number in range(100) for attempt in range(9)]
    assert len({prompt.seed for prompt in drawn}) == len(drawn)
    assert all(0 <= prompt.seed < 2**63 for prompt in drawn)


def test_after_some_seeds_another_template_is_tried() -> None:
    prompts = plan(redraws=2)
    assert prompts.attempts == 9
    templates = [prompts.prompt(prompts.slot(5), attempt).template for attempt in range(9)]
    assert [len(set(templates[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
    assert len(set(templates)) == 3
    assert plan(redraws=2, templates=("a {}",)).attempts == 3


def test_wordings() -> None:
    def names(**options: object) -> set[str]:
        prompts = plan(KITES, **options)
        return {prompts.prompt(prompts.slot(number)).class_names for number in range(60)}

    assert names() == {"hawk", "toy kite"}
    assert names(wording="gloss") == {"kite, a bird of prey", "kite, a toy"}
    several = (ClassName(names=("cat", "house cat", "moggy")), ClassName(names=("dog",)))
    prompts = plan(several, wording="any_name")
    assert {prompts.prompt(prompts.slot(n)).class_names for n in range(60)} == {"cat", "house cat", "moggy", "dog"}


def test_classes_are_mixed_in_one_prompt() -> None:
    prompts = plan(classes_per_prompt=3)
    for number in range(50):
        slot = prompts.slot(number)
        assert len(set(slot.labels)) == 3
        names = " and ".join(CIFAR[label].names[0] for label in slot.labels)
        prompt = prompts.prompt(slot)
        assert prompt.class_names == names and names in prompt.text
    assert {label for number in range(50) for label in prompts.slot(number).labels[1:]} == set(range(10))
    assert Counter(prompts.slot(number).labels[0] for number in range(50)) == dict.fromkeys(range(10), 5)


def test_only_some_classes() -> None:
    prompts = plan(only=(3, 5), classes_per_prompt=2)
    assert {label for number in range(20) for label in prompts.slot(number).labels} == {3, 5}


def test_a_token_has_its_place() -> None:
    prompts = plan(templates=(STYLE_TEMPLATE,), token="<real>", only=(3,))
    assert texts(prompts, 1) == ["a photo of a cat in the style of <real>"]


@pytest.mark.parametrize("template", ["a photo", "a {} and {}", "a {name}", "a {", "a {0}"])
def test_a_template_has_one_place(template: str) -> None:
    with pytest.raises(InputError, match=r"must have one place {} for the class, for example 'photo of a {}'"):
        require_template(template, places=1)


def test_wishes_that_cannot_be_met() -> None:
    with pytest.raises(InputError, match=r"two places {}, for the class and the learned token"):
        plan(token="<real>")
    with pytest.raises(InputError, match="class 'airplane' has no gloss"):
        plan(wording="gloss")
    with pytest.raises(InputError, match="classes_per_prompt is 3 but only 2 classes are drawn"):
        plan(only=(1, 2), classes_per_prompt=3)
