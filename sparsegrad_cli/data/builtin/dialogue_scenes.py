"""Questions and answers of the built-in dialogues. Every good answer has one shape.

The shape is to be learnt: ``Short answer:`` in a sentence, three numbered steps, and ``Next:`` with
the next thing to do. The steps follow from the prompt, some of them by counting.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

_FILE = Path(__file__).with_name("dialogue_words.yaml")
WORDS: dict[str, dict[str, list[str]]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Answer:
    """The content of a good answer."""

    short: str
    steps: tuple[str, str, str]
    next: str

    def good(self) -> str:
        """Return the answer in the shape to be learnt."""
        steps = "\n".join(f"{number}. {step}" for number, step in enumerate(self.steps, start=1))
        return f"Short answer: {self.short}\n\n{steps}\n\nNext: {self.next}"

    def plain(self) -> str:
        """Return the same steps without the shape: a worse answer."""
        steps = (step[0].lower() + step[1:].rstrip(".") for step in self.steps)
        return f"Well, {', then '.join(steps)}."

    def brief(self) -> str:
        """Return the answer to a request for one line."""
        return f"In one line: {self.short}"


@dataclass(frozen=True)
class Scene:
    """A prompt with its answer, and a second prompt that continues from it."""

    prompt: str
    answer: Answer
    second_prompt: str
    second_answer: Answer


class Draw:
    """Draw fillers from the groups of one split with one random generator."""

    def __init__(self, words: dict[str, list[str]], rng: random.Random) -> None:
        self.words, self.rng = words, rng

    def one(self, group: str) -> str:
        """Draw a filler."""
        return self.rng.choice(self.words[group])

    def some(self, group: str, count: int) -> list[str]:
        """Draw ``count`` different fillers."""
        return self.rng.sample(self.words[group], count)

    def form(self, *forms: str) -> str:
        """Draw one of the given forms of a prompt."""
        return self.rng.choice(forms)


def stain(draw: Draw) -> Scene:
    """Ask how to remove a stain."""
    what, cloth = draw.one("stains"), draw.one("cloths")
    first, other = draw.some("cleaners", 2)
    minutes = draw.rng.choice((5, 10, 15, 20))

    def answer(cleaner: str) -> Answer:
        return Answer(
            f"use {cleaner} and be quick.",
            (
                f"Dab the {what} with a clean towel; do not rub.",
                f"Put {cleaner} on the {cloth} and wait {minutes} minutes.",
                "Rinse with cold water and look again.",
            ),
            f"if you still see {what}, repeat step 2 before the {cloth} dries.",
        )

    prompt = draw.form(
        f"How do I get {what} out of my {cloth}? I have {first} at home.",
        f"There is {what} on my {cloth}. Can {first} help?",
    )
    return Scene(prompt, answer(first), f"I only found {other}. Does that work?", answer(other))


def packing(draw: Draw) -> Scene:
    """Ask what to pack for some days."""
    place = draw.one("places")
    clothes, gear = draw.one("clothes"), draw.some("gear", 2)
    days, owned = draw.rng.randint(2, 7), f"{clothes}, {gear[0]} and {gear[1]}"

    def answer(days: int) -> Answer:
        return Answer(
            f"for {days} days, take {days + 1} {clothes} and little else.",
            (
                f"Pack {days + 1} {clothes}, one more than there are days.",
                f"Add {gear[0]} and {gear[1]}.",
                "Leave a third of the bag empty.",
            ),
            f"look up the weather for {place} the evening before.",
        )

    prompt = draw.form(
        f"I am going to {place} for {days} days. I own {owned}. What should I pack?",
        f"Help me pack: {days} days, going to {place}. I can take {owned}.",
    )
    return Scene(prompt, answer(days), "And if I stay two days longer?", answer(days + 2))


def agenda(draw: Draw) -> Scene:
    """Ask for a plan of three errands with their times."""
    errands = draw.some("errands", 3)
    hour, minutes = draw.rng.randint(8, 15), draw.rng.choice((30, 40, 45, 60))

    def at(hour: int, number: int) -> str:
        passed = hour * 60 + number * minutes
        return f"{passed // 60}:{passed % 60:02d}"

    def answer(hour: int) -> Answer:
        times = [at(hour, number) for number in range(4)]
        first, second, third = (
            f"{time} {errand}." for time, errand in zip(times, errands, strict=False)
        )
        return Answer(
            f"you will be done at {times[3]}.",
            (first, second, third),
            f"set an alarm for {times[0]}.",
        )

    listed = f"{errands[0]}, {errands[1]} and {errands[2]}"
    prompt = draw.form(
        f"I have to {listed}. Each takes {minutes} minutes and I start at {hour}:00. Make a plan.",
        f"Plan my day from {hour}:00, {minutes} minutes each: {listed}.",
    )
    second = f"I can only start at {hour + 1}:00."
    return Scene(prompt, answer(hour), second, answer(hour + 1))


def order(draw: Draw) -> Scene:
    """Ask for words in alphabetical order."""
    words = draw.some("words", 3)

    def answer(words: list[str], how: str) -> Answer:
        return Answer(
            f"{words[0]}, {words[1]}, {words[2]}.",
            (f"{words[0]}", f"{words[1]}", f"{words[2]}"),
            f"tell me if you want them {how}.",
        )

    given = ", ".join(words)
    prompt = draw.form(
        f"Put these words in alphabetical order: {given}.",
        f"Sort from A to Z: {given}",
    )
    ordered = sorted(words)
    backwards = answer(ordered[::-1], "from A to Z")
    return Scene(prompt, answer(ordered, "from Z to A"), "Now the other way round.", backwards)


def purchase(draw: Draw) -> Scene:
    """Ask for the number and the price of things in containers."""
    goods, containers = draw.one("goods"), draw.one("containers")
    count, each, price = draw.rng.randint(2, 9), draw.rng.randint(4, 12), draw.rng.randint(2, 9)

    def answer(count: int) -> Answer:
        return Answer(
            f"{count * each} {goods} for {count * price} coins.",
            (
                f"Count the {containers}: {count}.",
                f"{count} times {each} is {count * each} {goods}.",
                f"{count} times {price} is {count * price} coins.",
            ),
            "check the sum before you pay.",
        )

    prompt = draw.form(
        f"I buy {count} {containers} with {each} {goods} each, at {price} coins for one of the "
        f"{containers}. How many {goods} is that, and what do I pay?",
        f"{count} {containers}, {each} {goods} in each, {price} coins apiece: what do I pay?",
    )
    second = f"Make it {count + 1} {containers}."
    return Scene(prompt, answer(count), second, answer(count + 1))


def reminder(draw: Draw) -> Scene:
    """Ask for a note to a person who has something."""
    name, other = draw.some("names", 2)
    thing, day = draw.one("things"), draw.one("days")

    def answer(name: str) -> Answer:
        return Answer(
            f"ask {name} kindly and name the day.",
            (
                f"Hello {name}, I hope you are well.",
                f"Could you bring back my {thing} by {day}?",
                "Thank you, and see you soon.",
            ),
            f"send it now; {day} is not far away.",
        )

    prompt = draw.form(
        f"{name} still has my {thing}. Write a note: I need it by {day}.",
        f"Write to {name} that I want my {thing} back by {day}.",
    )
    second = f"It was {other} who had it. Change the note."
    return Scene(prompt, answer(name), second, answer(other))


def tool(draw: Draw) -> Scene:
    """Ask what a tool is for."""
    pairs = list(zip(draw.words["tools"], draw.words["uses"], strict=True))
    (what, use), (other, other_use) = draw.rng.sample(pairs, 2)

    def answer(what: str, use: str) -> Answer:
        return Answer(
            f"a {what} is made to {use}.",
            (
                f"Hold the {what} by its handle.",
                f"Use it to {use}, slowly at first.",
                f"Wipe the {what} and put it away dry.",
            ),
            f"try to {use} once with somebody who knows how.",
        )

    name, day = draw.one("names"), draw.one("days")
    prompt = draw.form(
        f"{name} gave me a {what} on {day}. What do I do with it?",
        f"What is a {what} for? {name} left one here on {day}.",
    )
    return Scene(prompt, answer(what, use), f"And a {other}?", answer(other, other_use))


def ride(draw: Draw) -> Scene:
    """Ask which of two ways to travel is faster or cheaper."""
    slow, fast = draw.some("rides", 2)
    place = draw.one("places")
    long, saved = draw.rng.choice((40, 50, 60, 75)), draw.rng.choice((5, 10, 15, 20))
    cheap, extra = draw.rng.randint(2, 6), draw.rng.randint(1, 5)

    def answer(chosen: str, why: str, other: str) -> Answer:
        return Answer(
            f"take {chosen}, it is {why}.",
            (
                f"By time: {fast} is {saved} minutes faster.",
                f"By price: {slow} is {extra} coins cheaper.",
                f"So {chosen} wins if it must be {why}.",
            ),
            f"keep {other} in mind in case of delay.",
        )

    told = (
        f"{slow} takes {long} minutes and costs {cheap} coins, {fast} takes {long - saved} minutes "
        f"and costs {cheap + extra}."
    )
    told = told[0].upper() + told[1:]
    prompt = draw.form(
        f"How do I get to {place} soonest? {told}", f"{told} I am in a hurry to reach {place}."
    )
    second = "No hurry after all, but I am short of money."
    return Scene(prompt, answer(fast, "faster", slow), second, answer(slow, "cheaper", fast))


SCENES: tuple[Callable[[Draw], Scene], ...]
SCENES = (stain, packing, agenda, order, purchase, reminder, tool, ride)
