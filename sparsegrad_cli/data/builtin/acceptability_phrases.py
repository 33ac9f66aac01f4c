"""Phrases drawn from a lexicon, with the features that agreement looks at."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsegrad_cli.data.builtin.acceptability_lexicon import Lexicon, Noun, Verb

Words = list[str]


@dataclass(frozen=True)
class Phrase:
    """A noun phrase and the features that agree with it."""

    words: tuple[str, ...]
    plural: bool
    gender: str  # m, f, or n for a noun that does not say


class Maker:
    """Draws phrases from one lexicon with one random source."""

    def __init__(self, lexicon: Lexicon, rng: random.Random) -> None:
        self.lexicon, self.rng = lexicon, rng

    def noun(self, nouns: tuple[Noun, ...], plural: bool) -> str:
        """A noun in the number asked for."""
        noun = self.rng.choice(nouns)
        return noun.plural if plural else noun.singular

    def adjective(self) -> str:
        """A plain adjective."""
        return self.rng.choice(self.lexicon.adjectives)[0]

    def described(self, noun: str) -> Words:
        """The noun (a person), half the time with an adjective."""
        return [self.adjective(), noun] if self.rng.random() < 0.5 else [noun]

    def object(self, plural: bool) -> Words:
        """A thing, half the time with a quality, without a determiner."""
        noun = self.noun(self.lexicon.things, plural)
        return (
            [self.rng.choice(self.lexicon.qualities), noun] if self.rng.random() < 0.5 else [noun]
        )

    def person(self, plural: bool | None = None) -> Phrase:
        """*the (adj) teacher(s)*, or a name where the number allows it."""
        plural = self.rng.random() < 0.4 if plural is None else plural
        if not plural and self.rng.random() < 0.35:
            return self.name()
        words = ("the", *self.described(self.noun(self.lexicon.people, plural)))
        return Phrase(words, plural, "n")

    def name(self, gender: str | None = None) -> Phrase:
        """A first name."""
        gender = gender or self.rng.choice("mf")
        names = self.lexicon.men if gender == "m" else self.lexicon.women
        return Phrase((self.rng.choice(names),), False, gender)

    def thing(self, plural: bool | None = None) -> Words:
        """*the (adj) book(s)*."""
        plural = self.rng.random() < 0.4 if plural is None else plural
        return ["the", *self.object(plural)]

    def place(self) -> Words:
        """*in the garden*."""
        return [
            self.rng.choice(("in", "near", "behind")),
            "the",
            self.noun(self.lexicon.places, False),
        ]

    def adverb(self) -> str:
        """An adverb of manner."""
        return self.rng.choice(self.lexicon.adverbs)

    def tail(self) -> Words:
        """Nothing, a place or an adverb, to end a sentence with."""
        return self.rng.choice(([], self.place(), [self.adverb()]))

    def verb(self, verbs: tuple[Verb, ...]) -> Verb:
        """One of them."""
        return self.rng.choice(verbs)

    def event(self) -> tuple[Verb, Words]:
        """A verb with the object it needs, if any."""
        lexicon = self.lexicon
        kind = self.rng.randrange(3)
        if kind == 0:
            return self.verb(lexicon.transitive), self.thing()
        if kind == 1:
            return self.verb(lexicon.social), list(self.person().words)
        return self.verb(lexicon.intransitive), []


def present(verb: Verb, plural: bool) -> str:
    """The verb in the present tense: *smile* or *smiles*."""
    return verb.base if plural else verb.third
