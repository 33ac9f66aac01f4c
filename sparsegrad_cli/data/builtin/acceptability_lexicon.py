"""Words of the acceptability task, and the phrases that are made of them.

Training and validation have lexica without a common content word; function words are shared.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

Words = list[str]

_VOWELS = "aeiou"

# Function words: determiners, pronouns, auxiliaries, prepositions, conjunctions, quantifiers,
# negation, degree words. Both splits use them.
CLOSED_CLASS = frozenset(
    """
    a an the this that these those some no every each many much several few all both
    i he she it we they him her us them himself herself itself themselves ourselves
    nobody everybody somebody who what which whom whose
    is are was were be been being has have had do does did will would can could may must should
    not never ever any to of in on at by with near behind beside from for about under after before
    during and or but than more as very quite because when while there
    """.split()  # noqa: SIM905
)


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
    """The content words of one split.

    Attributes:
        people, things: countable nouns; places: nouns that go with *in the*.
        mass: nouns without a plural.
        men, women: first names.
        transitive: verbs that need an object (a thing); social: that take a person.
        intransitive: verbs that take none; causative: that work both ways (*break*).
        giving: verbs with two objects (*give Ann the book*); donating: verbs of the same meaning
            that have only *to* (*donate the book to Ann*).
        to_verbs: take *to* + verb; ing_verbs: take verb + *-ing*.
        saying: take a *that* clause.
        adjectives: of people, with their comparatives; qualities: of things.
        adverbs: of manner.
    """

    people: tuple[Noun, ...]
    things: tuple[Noun, ...]
    places: tuple[Noun, ...]
    mass: tuple[str, ...]
    men: tuple[str, ...]
    women: tuple[str, ...]
    transitive: tuple[Verb, ...]
    social: tuple[Verb, ...]
    intransitive: tuple[Verb, ...]
    causative: tuple[Verb, ...]
    giving: tuple[Verb, ...]
    donating: tuple[Verb, ...]
    to_verbs: tuple[Verb, ...]
    ing_verbs: tuple[Verb, ...]
    saying: tuple[Verb, ...]
    adjectives: tuple[tuple[str, str], ...]
    qualities: tuple[str, ...]
    adverbs: tuple[str, ...]

    def words(self) -> frozenset[str]:
        """Return every inflected form, in lower case."""
        found: set[str] = set()
        for entry in fields(self):
            for item in getattr(self, entry.name):
                if isinstance(item, str):
                    found.add(item.lower())
                elif isinstance(item, tuple):
                    found.update(item)
                else:
                    found.update(getattr(item, f.name) for f in fields(item))
        return frozenset(found)


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


def _lexicon(**lists: str) -> Lexicon:
    nouns = {"people", "things", "places"}
    verbs = {f.name for f in fields(Lexicon)} - nouns - {"mass", "men", "women"}
    verbs -= {"adjectives", "qualities", "adverbs"}
    built: dict[str, tuple[object, ...]] = {}
    for name, text in lists.items():
        words = text.split()
        if name in nouns:
            built[name] = tuple(_noun(word) for word in words)
        elif name in verbs:
            built[name] = tuple(_verb(word) for word in words)
        elif name == "adjectives":
            built[name] = tuple((w.split("/")[0], w.split("/")[1]) for w in words)
        else:
            built[name] = tuple(words)
    return Lexicon(**built)  # type: ignore[arg-type]


TRAIN = _lexicon(
    people="teacher doctor student farmer lawyer nurse driver singer artist waiter soldier"
    " child/children neighbor actor baker pilot tourist customer cousin writer",
    things="book letter painting window ticket chair bottle camera knife/knives basket jacket"
    " guitar mirror poem plate lamp blanket report candle hammer",
    places="garden kitchen library station park office village church museum restaurant",
    mass="water furniture advice rice music money sugar luggage",
    men="John David Robert Michael Peter Thomas Daniel Mark",
    women="Mary Susan Linda Anna Laura Helen Alice Sarah",
    transitive="buy/bought/bought admire describe wear/wore/worn/wearing clean/cleaned"
    " steal/stole/stolen hide/hid/hidden repair/repaired paint/painted find/found/found",
    social="help/helped love/loved call/called visit/visited/visited/visiting trust/trusted"
    " teach/taught/taught invite/invited hate/hated blame/blamed",
    intransitive="sleep/slept/slept laugh/laughed arrive/arrived smile/smiled disappear/disappeared"
    " cough/coughed fall/fell/fallen cry/cried",
    causative="break/broke/broken open/opened/opened/opening melt/melted boil/boiled burn/burned"
    " close/closed",
    giving="give/gave/given send/sent/sent show/showed/shown lend/lent/lent offer/offered",
    donating="donate explain/explained mention/mentioned/mentioned/mentioning",
    to_verbs="want/wanted decide/decided hope/hoped promise/promised agree/agreed",
    ing_verbs="enjoy/enjoyed avoid/avoided finish/finished/finished/finishing",
    saying="say/said/said believe/believed know/knew/known claim/claimed",
    adjectives="tall/taller old/older rich/richer young/younger strong/stronger quick/quicker"
    " smart/smarter kind/kinder loud/louder nice/nicer",
    qualities="small cheap red heavy dusty expensive wooden strange",
    adverbs="slowly carefully quietly happily suddenly badly",
)

VALIDATION = _lexicon(
    people="senator plumber sailor professor dancer gardener woman/women butcher hunter cashier"
    " librarian guard poet tailor engineer chef manager prince witness grocer",
    things="table coat hat newspaper piano cup vase spoon carpet bicycle watch shirt statue key"
    " pencil drum ladder map pillow sculpture",
    places="forest harbor castle market hotel theater prison hospital valley studio",
    mass="milk equipment homework bread traffic gold salt jewelry",
    men="James William Richard George Edward Kevin Brian Paul",
    women="Emily Karen Nancy Julia Rachel Diana Sophie Martha",
    transitive="borrow/borrowed drop/dropped/dropped/dropping carry/carried examine/examined"
    " destroy/destroyed bring/brought/brought purchase/purchased wash/washed choose/chose/chosen"
    " ignore/ignored",
    social="meet/met/met thank/thanked follow/followed respect/respected praise/praised"
    " insult/insulted greet/greeted warn/warned recognize/recognized",
    intransitive="sneeze/sneezed yawn/yawned vanish/vanished giggle/giggled faint/fainted"
    " shiver/shivered emerge/emerged weep/wept/wept",
    causative="sink/sank/sunk freeze/froze/frozen shatter/shattered"
    " roll/rolled bend/bent/bent tear/tore/torn",
    giving="hand/handed pass/passed sell/sold/sold mail/mailed serve/served",
    donating="contribute/contributed reveal/revealed deliver/delivered/delivered/delivering",
    to_verbs="plan/planned/planned/planning refuse/refused attempt/attempted intend/intended"
    " manage/managed",
    ing_verbs="resist/resisted quit/quit/quit/quitting postpone/postponed",
    saying="think/thought/thought suspect/suspected announce/announced assume/assumed",
    adjectives="short/shorter clever/cleverer poor/poorer brave/braver weak/weaker fast/faster"
    " calm/calmer wise/wiser proud/prouder sweet/sweeter",
    qualities="large costly blue light ancient plastic empty round",
    adverbs="rapidly gently silently eagerly politely calmly",
)


@dataclass(frozen=True)
class Phrase:
    """A noun phrase and the features that other words agree with."""

    words: tuple[str, ...]
    plural: bool
    gender: str  # m, f, or n for a noun without a gender


class PhraseMaker:
    """Draw phrases from one lexicon with one random generator."""

    def __init__(self, lexicon: Lexicon, rng: random.Random) -> None:
        self.lexicon, self.rng = lexicon, rng

    def noun(self, nouns: tuple[Noun, ...], plural: bool) -> str:
        """Draw a noun, singular or plural."""
        noun = self.rng.choice(nouns)
        return noun.plural if plural else noun.singular

    def adjective(self) -> str:
        """Draw an adjective."""
        return self.rng.choice(self.lexicon.adjectives)[0]

    def described(self, noun: str) -> Words:
        """Return a noun (a person), half the time with an adjective before it."""
        return [self.adjective(), noun] if self.rng.random() < 0.5 else [noun]

    def object(self, plural: bool) -> Words:
        """Draw a thing, half the time with an adjective, without a determiner."""
        noun = self.noun(self.lexicon.things, plural)
        return (
            [self.rng.choice(self.lexicon.qualities), noun] if self.rng.random() < 0.5 else [noun]
        )

    def person(self, plural: bool | None = None) -> Phrase:
        """Draw *the (adj) teacher(s)*, or a name if the phrase may be singular."""
        plural = self.rng.random() < 0.4 if plural is None else plural
        if not plural and self.rng.random() < 0.35:
            return self.name()
        words = ("the", *self.described(self.noun(self.lexicon.people, plural)))
        return Phrase(words, plural, "n")

    def name(self, gender: str | None = None) -> Phrase:
        """Draw a first name."""
        gender = gender or self.rng.choice("mf")
        names = self.lexicon.men if gender == "m" else self.lexicon.women
        return Phrase((self.rng.choice(names),), False, gender)

    def thing(self, plural: bool | None = None) -> Words:
        """Draw *the (adj) book(s)*."""
        plural = self.rng.random() < 0.4 if plural is None else plural
        return ["the", *self.object(plural)]

    def place(self) -> Words:
        """Draw a place: *in the garden*."""
        return [
            self.rng.choice(("in", "near", "behind")),
            "the",
            self.noun(self.lexicon.places, False),
        ]

    def adverb(self) -> str:
        """Draw an adverb of manner."""
        return self.rng.choice(self.lexicon.adverbs)

    def tail(self) -> Words:
        """Draw the end of a sentence: nothing, a place or an adverb."""
        return self.rng.choice(([], self.place(), [self.adverb()]))

    def verb(self, verbs: tuple[Verb, ...]) -> Verb:
        """Draw a verb."""
        return self.rng.choice(verbs)

    def event(self) -> tuple[Verb, Words]:
        """Draw a verb with the object that it needs, if any."""
        lexicon = self.lexicon
        kind = self.rng.randrange(3)
        if kind == 0:
            return self.verb(lexicon.transitive), self.thing()
        if kind == 1:
            return self.verb(lexicon.social), list(self.person().words)
        return self.verb(lexicon.intransitive), []


def present(verb: Verb, plural: bool) -> str:
    """Return a verb in the present tense: *smile* or *smiles*."""
    return verb.base if plural else verb.third
