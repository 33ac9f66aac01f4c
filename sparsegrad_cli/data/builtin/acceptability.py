"""``builtin:acceptability``: synthetic English acceptability judgements, as in CoLA.

Sentences are generated from templates as minimal pairs; half of them are acceptable. The phenomena
and their labels follow the syntax literature that CoLA and BLiMP (Warstadt et al. 2019, 2020) drew
on. The two splits share no content word (acceptability_words.yaml), so a model cannot answer
validation by remembering words. The task allows real training without a download; its scores
compare with nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sparsegrad_cli.data.builtin.acceptability_phrases import LEXICA, PhraseMaker, Words, present
from sparsegrad_cli.errors import DataError

Split = Literal["train", "validation"]
# In both lexica, every phenomenon has at least LIMIT / len(PHENOMENA) distinct pairs.
LIMIT = 20_000


@dataclass(frozen=True)
class Judgement:
    """One row in CoLA's columns: phenomenon, label, ``*`` for label 0, sentence."""

    source: str
    label: int
    mark: str
    sentence: str


def generate(split: Split, size: int, seed: int = 0) -> list[Judgement]:
    """Return ``size`` distinct judgements of a split, balanced, in random order.

    Equal arguments give equal results on every platform. Both sentences of a pair are included
    (except for the last pair of an odd ``size``).

    Raises:
        DataError: ``size`` is below 2 or above ``LIMIT``.
    """
    if not 2 <= size <= LIMIT:
        raise DataError(f"{size} sentences cannot be made: 2 to {LIMIT:,}", where="task")
    rng = random.Random(f"acceptability {split} {seed}")
    maker = PhraseMaker(LEXICA[split], rng)
    rows: list[Judgement] = []
    names = tuple(PHENOMENA)
    seen: set[str] = set()
    number = 0
    while len(rows) < size:
        name = names[number % len(names)]
        good, bad = embed(maker, PHENOMENA[name](maker))
        pair = write(good), write(bad)
        if pair[0] == pair[1] or seen.intersection(pair):
            continue
        number += 1
        seen.update(pair)
        rows.append(Judgement(name, 1, "", pair[0]))
        rows.append(Judgement(name, 0, "*", pair[1]))
    rows = rows[:size]
    rng.shuffle(rows)
    return rows


Pair = tuple[Words, Words]


def agreement(m: PhraseMaker) -> Pair:
    """A verb agrees with its subject: *the nurses smile / \\*smiles*."""
    subject = m.person()
    verb, rest = m.event()
    rest = [*rest, *m.tail()]
    start = subject.words
    return (
        [*start, present(verb, subject.plural), *rest],
        [*start, present(verb, not subject.plural), *rest],
    )


def attractor(m: PhraseMaker) -> Pair:
    """A verb ignores a noun in between: *the nurse near the doctors smiles / \\*smile*."""
    plural = m.rng.random() < 0.5
    head = ["the", *m.described(m.noun("people", plural))]
    other = m.noun("people", not plural)
    if m.rng.random() < 0.5:
        between = [m.rng.choice(("near", "behind", "beside")), "the", other]
    else:
        social = present(m.verb("social"), not plural)
        between = ["that", "the", other, social]
    if m.rng.random() < 0.5:
        end = [m.adjective()]
        forms = ("are", "is") if plural else ("is", "are")
    else:
        verb, end = m.event()
        forms = (present(verb, plural), present(verb, not plural))
    start = [*head, *between]
    return [*start, forms[0], *end], [*start, forms[1], *end]


def reflexive_agreement(m: PhraseMaker) -> Pair:
    """A reflexive agrees with its antecedent: *Mary blamed herself / \\*himself*."""
    verb = m.verb("social").past
    tail = m.tail()
    if m.rng.random() < 0.5:
        subject = m.name()
        right = "himself" if subject.gender == "m" else "herself"
        wrong = m.rng.choice(["herself" if right == "himself" else "himself", "themselves"])
    else:
        subject = m.person(plural=True)
        right, wrong = "themselves", m.rng.choice(("himself", "herself"))
    start = [*subject.words, verb]
    return [*start, right, *tail], [*start, wrong, *tail]


def reflexive_domain(m: PhraseMaker) -> Pair:
    """Its antecedent is in its clause: *they said that Mary blamed herself / \\*themselves*."""
    inner = m.name()
    right = "himself" if inner.gender == "m" else "herself"
    if m.rng.random() < 0.5:
        outer, wrong = m.person(plural=True), "themselves"
    else:
        other = "f" if inner.gender == "m" else "m"
        outer, wrong = m.name(other), "herself" if right == "himself" else "himself"
    start = [*outer.words, m.verb("saying").past, "that", *inner.words]
    start.append(m.verb("social").past)
    return [*start, right], [*start, wrong]


def polarity(m: PhraseMaker) -> Pair:
    """*ever* and *any* need a licensor: *no / \\*some nurse has ever smiled*."""
    noun = m.noun("people", False)
    if m.rng.random() < 0.5:
        verb, rest = m.event()
        end = ["has", "ever", verb.participle, *rest]
        good, bad = m.rng.choice((("no", "some"), ("no", "the"), ("no", "every")))
        if m.rng.random() < 0.3:
            return ["nobody", *end], ["somebody", *end]
        return [good, noun, *end], [bad, noun, *end]
    verb = m.verb("transitive")
    thing = ["any", m.noun("things", True), *m.tail()]
    start = ["the", *m.described(noun)]
    return [*start, "did", "not", verb.base, *thing], [*start, verb.past, *thing]


def transitivity(m: PhraseMaker) -> Pair:
    """Some verbs take no object, some need one: *Ann bought / \\*slept the book*."""
    subject = m.person().words
    if m.rng.random() < 0.5:
        thing = m.thing()
        good, bad = m.verb("transitive"), m.verb("intransitive")
        tail = m.tail()
        return [*subject, good.past, *thing, *tail], [*subject, bad.past, *thing, *tail]
    good, bad = m.verb("intransitive"), m.verb("transitive")
    tail = m.rng.choice(([], [m.word("adverbs")], m.place()))
    return [*subject, good.past, *tail], [*subject, bad.past, *tail]


def causative(m: PhraseMaker) -> Pair:
    """Only some verbs have a causative: *Ann broke / \\*vanished the vase*."""
    subject, thing = m.person().words, m.thing()
    good, bad = m.verb("causative"), m.verb("intransitive")
    if m.rng.random() < 0.5:
        have = m.rng.choice(("has", "had"))
        if any(subject[-1] == noun.plural for noun in m.lexicon.nouns["people"]):
            have = "have"
        start = [*subject, have]
        return [*start, good.participle, *thing], [*start, bad.participle, *thing]
    tail = m.tail()
    return [*subject, good.past, *thing, *tail], [*subject, bad.past, *thing, *tail]


def double_object(m: PhraseMaker) -> Pair:
    """*give* takes two objects, *donate* does not: *Ann gave / \\*donated Tom the book*."""
    giver, receiver, thing = m.person().words, m.person().words, m.thing()
    give, donate = m.verb("giving").past, m.verb("donating").past
    if m.rng.random() < 0.6:
        return [*giver, give, *receiver, *thing], [*giver, donate, *receiver, *thing]
    return [*giver, donate, *thing, "to", *receiver], [*giver, donate, "to", *receiver, *thing]


def determiner(m: PhraseMaker) -> Pair:
    """A determiner agrees with its noun: *these / \\*this books*."""
    plural = m.rng.random() < 0.5
    right, wrong = m.rng.choice(
        (("these", "this"), ("those", "that"), ("several", "every"), ("many", "each"))
    )
    if not plural:
        right, wrong = wrong, right
    subject, verb = m.person().words, m.verb("transitive").past
    end = [*m.object(plural), *m.tail()]
    return [*subject, verb, right, *end], [*subject, verb, wrong, *end]


def auxiliary(m: PhraseMaker) -> Pair:
    """An auxiliary chooses the form of its verb: *has taken / \\*take*."""
    subject = m.person()
    verb, rest = m.event()
    be, have = ("are", "have") if subject.plural else ("is", "has")
    auxiliaries: dict[str, tuple[str, list[str]]] = {
        have: (verb.participle, [verb.base, verb.ing]),
        be: (verb.ing, [verb.base, verb.third]),
        "will": (verb.base, [verb.past, verb.ing, verb.third]),
        "could": (verb.base, [verb.ing, verb.third]),
    }
    name = m.rng.choice(sorted(auxiliaries))
    right, wrong = auxiliaries[name]
    wrong = [form for form in wrong if form != right]
    start = [*subject.words, name]
    if m.rng.random() < 0.3 and name in ("will", "could"):
        start = [name, *subject.words]
        rest = [*rest, "?"]
    return [*start, right, *rest], [*start, m.rng.choice(wrong), *rest]


def word_order(m: PhraseMaker) -> Pair:
    """Adjectives precede nouns, determiners precede both, objects follow verbs."""
    noun, adjective = m.noun("people", False), m.adjective()
    verb = m.verb("transitive")
    thing, tail = m.thing(), m.tail()
    good = ["the", adjective, noun, verb.past, *thing, *tail]
    kind = m.rng.randrange(3)
    if kind == 0:
        return good, ["the", noun, adjective, verb.past, *thing, *tail]
    if kind == 1:
        return good, [adjective, "the", noun, verb.past, *thing, *tail]
    return good, ["the", adjective, noun, *thing, verb.past, *tail]


def wh_gap(m: PhraseMaker) -> Pair:
    """A question word leaves a gap: *what did Ann buy (\\*the book)?*"""
    subject = m.person().words
    tail = m.rng.choice(([], m.place()))
    if m.rng.random() < 0.5:
        verb, filler, wh = m.verb("transitive"), m.thing(), "what"
    else:
        verb, filler, wh = m.verb("social"), m.person().words, "who"
    if m.rng.random() < 0.4:
        saying = m.verb("saying").base
        start = [wh, "did", *m.name().words, saying, "that", *subject, verb.past]
    else:
        start = [wh, "did", *subject, verb.base]
    return [*start, *tail, "?"], [*start, *filler, *tail, "?"]


def complement(m: PhraseMaker) -> Pair:
    """*want* takes *to* + verb, *enjoy* takes *-ing*."""
    subject = m.person().words
    verb, rest = m.event()
    if m.rng.random() < 0.5:
        start = [*subject, m.verb("to_verbs").past]
        return [*start, "to", verb.base, *rest], [*start, verb.ing, *rest]
    start = [*subject, m.verb("ing_verbs").past]
    return [*start, verb.ing, *rest], [*start, "to", verb.base, *rest]


def mass_count(m: PhraseMaker) -> Pair:
    """*much* goes with mass nouns, *many* with plurals."""
    subject, verb = m.person().words, m.verb("transitive")
    start = [*subject, "did", "not", verb.base]
    tail = m.tail()
    if m.rng.random() < 0.5:
        noun, right, wrong = m.word("mass"), "much", "many"
    else:
        noun, right, wrong = m.noun("things", True), "many", "much"
    return [*start, right, noun, *tail], [*start, wrong, noun, *tail]


def pronoun_case(m: PhraseMaker) -> Pair:
    """Subjects and objects differ: *she thanked him / \\*he*."""
    subjects = {"he": "him", "she": "her", "they": "them", "we": "us"}
    nominative = m.rng.choice(sorted(subjects))
    accusative = subjects[nominative]
    verb, tail = m.verb("social").past, m.tail()
    other = m.person().words
    if m.rng.random() < 0.5:
        return [*other, verb, accusative, *tail], [*other, verb, nominative, *tail]
    return [nominative, verb, *other, *tail], [accusative, verb, *other, *tail]


def comparison(m: PhraseMaker) -> Pair:
    """*than* needs a comparative, once: *taller / \\*tall / \\*more taller than*."""
    plain, comparative = m.rng.choice(m.lexicon.adjectives)
    subject, other = m.person(), m.person().words
    start = [*subject.words, "are" if subject.plural else "is"]
    wrong = m.rng.choice(([plain], ["more", comparative], ["very", comparative]))
    return [*start, comparative, "than", *other], [*start, *wrong, "than", *other]


PHENOMENA: dict[str, Callable[[PhraseMaker], Pair]] = {
    phenomenon.__name__.replace("_", "-"): phenomenon
    for phenomenon in (
        agreement,
        attractor,
        reflexive_agreement,
        reflexive_domain,
        polarity,
        transitivity,
        causative,
        double_object,
        determiner,
        auxiliary,
        word_order,
        wh_gap,
        complement,
        mass_count,
        pronoun_case,
        comparison,
    )
}


def embed(m: PhraseMaker, pair: Pair) -> Pair:
    """Put one statement in five under *X said that*; questions stay unchanged."""
    if pair[0][-1] == "?" or m.rng.random() >= 0.2:
        return pair
    start = [*m.name().words, m.verb("saying").past, "that"]
    return [*start, *pair[0]], [*start, *pair[1]]


def write(words: Words) -> str:
    """Write words as a sentence, with a capital letter and a closing mark."""
    mark = "."
    if words[-1] == "?":
        words, mark = words[:-1], "?"
    text = " ".join(words)
    return text[0].upper() + text[1:] + mark
