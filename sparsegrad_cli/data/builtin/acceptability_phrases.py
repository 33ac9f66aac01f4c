"""Words and phrases of the acceptability task."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Words = list[str]

_VOWELS = "aeiou"


@dataclass(frozen=True)
class Noun:
    """A countable noun."""

    singular: str
    plural: str


@dataclass(frozen=True)
class Verb:
    """A verb with its five forms."""

    base: str
    third: str
    past: str
    participle: str
    ing: str


@dataclass(frozen=True)
class Lexicon:
    """The content words of one split, by the groups that acceptability_words.yaml explains.

    An adjective is paired with its comparative.
    """

    nouns: dict[str, list[Noun]]
    verbs: dict[str, list[Verb]]
    adjectives: list[tuple[str, str]]
    words: dict[str, list[str]]


def _noun(text: str) -> Noun:
    """``child/children``, or a singular with a regular plural."""
    singular, _, plural = text.partition("/")
    return Noun(singular, plural or _add_s(singular))


def _verb(text: str) -> Verb:
    """``admire`` regular, ``write/wrote/written``, or ``cut/cut/cut/cutting``."""
    parts = text.split("/")
    base = parts[0]
    past = parts[1] if len(parts) > 1 else _add_ed(base)
    participle = parts[2] if len(parts) > 2 else past
    ing = parts[3] if len(parts) > 3 else _add_ing(base)
    return Verb(base, _add_s(base), past, participle, ing)


def _add_s(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in _VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def _add_ed(word: str) -> str:
    if word.endswith("e"):
        return word + "d"
    if word.endswith("y") and word[-2] not in _VOWELS:
        return word[:-1] + "ied"
    return word + "ed"


def _add_ing(word: str) -> str:
    return word[:-1] + "ing" if word.endswith("e") and not word.endswith("ee") else word + "ing"


def _lexicon(texts: Any) -> Lexicon:
    pairs = [text.split("/") for text in texts["adjectives"].split()]
    return Lexicon(
        {name: [_noun(word) for word in text.split()] for name, text in texts["nouns"].items()},
        {name: [_verb(word) for word in text.split()] for name, text in texts["verbs"].items()},
        [(plain, comparative) for plain, comparative in pairs],
        {name: text.split() for name, text in texts["words"].items()},
    )


_FILE = Path(__file__).with_name("acceptability_words.yaml")
LEXICA = {
    split: _lexicon(texts)
    for split, texts in yaml.safe_load(_FILE.read_text(encoding="utf-8")).items()
}


@dataclass(frozen=True)
class Phrase:
    """A noun phrase and the features that other words agree with."""

    words: Words
    plural: bool
    gender: str  # m, f, or n for a noun without a gender


class PhraseMaker:
    """Draw phrases from one lexicon with one random generator."""

    def __init__(self, lexicon: Lexicon, rng: random.Random) -> None:
        self.lexicon, self.rng = lexicon, rng

    def word(self, group: str) -> str:
        """Draw a word that has one form."""
        return self.rng.choice(self.lexicon.words[group])

    def noun(self, group: str, plural: bool) -> str:
        """Draw a noun, singular or plural."""
        noun = self.rng.choice(self.lexicon.nouns[group])
        return noun.plural if plural else noun.singular

    def adjective(self) -> str:
        """Draw an adjective."""
        return self.rng.choice(self.lexicon.adjectives)[0]

    def described(self, noun: str) -> Words:
        """Return a noun (a person), half the time with an adjective before it."""
        return [self.adjective(), noun] if self.rng.random() < 0.5 else [noun]

    def object(self, plural: bool) -> Words:
        """Draw a thing, half the time with an adjective, without a determiner."""
        noun = self.noun("things", plural)
        return [self.word("qualities"), noun] if self.rng.random() < 0.5 else [noun]

    def person(self, plural: bool | None = None) -> Phrase:
        """Draw *the (adj) teacher(s)*, or a name if the phrase may be singular."""
        plural = self.rng.random() < 0.4 if plural is None else plural
        if not plural and self.rng.random() < 0.35:
            return self.name()
        words = ["the", *self.described(self.noun("people", plural))]
        return Phrase(words, plural, "n")

    def name(self, gender: str | None = None) -> Phrase:
        """Draw a first name."""
        gender = gender or self.rng.choice("mf")
        return Phrase([self.word("men" if gender == "m" else "women")], False, gender)

    def thing(self) -> Words:
        """Draw *the (adj) book(s)*."""
        return ["the", *self.object(self.rng.random() < 0.4)]

    def place(self) -> Words:
        """Draw a place: *in the garden*."""
        return [self.rng.choice(("in", "near", "behind")), "the", self.noun("places", False)]

    def tail(self) -> Words:
        """Draw the end of a sentence: nothing, a place or an adverb."""
        return self.rng.choice(([], self.place(), [self.word("adverbs")]))

    def verb(self, group: str) -> Verb:
        """Draw a verb."""
        return self.rng.choice(self.lexicon.verbs[group])

    def event(self) -> tuple[Verb, Words]:
        """Draw a verb with the object that it needs, if any."""
        kind = self.rng.randrange(3)
        if kind == 0:
            return self.verb("transitive"), self.thing()
        if kind == 1:
            return self.verb("social"), self.person().words
        return self.verb("intransitive"), []


def present(verb: Verb, plural: bool) -> str:
    """Return a verb in the present tense: *smile* or *smiles*."""
    return verb.base if plural else verb.third
