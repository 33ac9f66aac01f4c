"""Fillers of the built-in dialogues: two lexica without a common content word."""

from __future__ import annotations

from dataclasses import dataclass, fields

# Function words inside fillers; everything else belongs to one split only.
CLOSED_CLASS = frozenset(("a", "an", "the"))


@dataclass(frozen=True)
class Lexicon:
    """The fillers of one split. Every field is a list of phrases; tools and uses form pairs.

    Attributes:
        stains, cloths, cleaners: what got onto what, and what takes it out.
        places, clothes, gear: where to go, and what to take.
        errands: things to get done, as *to* would take them.
        words: to be put in order.
        goods, containers: what is bought, in what (both plural).
        names, things: who has what of mine.
        tools, uses: what it is, and what it is for.
        rides: ways to travel.
        days: of the week.
    """

    stains: tuple[str, ...]
    cloths: tuple[str, ...]
    cleaners: tuple[str, ...]
    places: tuple[str, ...]
    clothes: tuple[str, ...]
    gear: tuple[str, ...]
    errands: tuple[str, ...]
    words: tuple[str, ...]
    goods: tuple[str, ...]
    containers: tuple[str, ...]
    names: tuple[str, ...]
    things: tuple[str, ...]
    tools: tuple[str, ...]
    uses: tuple[str, ...]
    rides: tuple[str, ...]
    days: tuple[str, ...]

    def content_words(self) -> frozenset[str]:
        """Every word of every filler, lower case, but for the closed class."""
        phrases = [phrase for field in fields(self) for phrase in getattr(self, field.name)]
        return frozenset(" ".join(phrases).lower().split()) - CLOSED_CLASS


def _lexicon(**lists: str) -> Lexicon:
    """Phrases from texts that part them with a bar."""
    return Lexicon(
        **{name: tuple(each.strip() for each in text.split("|")) for name, text in lists.items()}
    )


TRAIN = _lexicon(
    stains="red wine | grass | candle wax | ink | coffee | tomato sauce | mud | chocolate",
    cloths="linen shirt | wool rug | cotton apron | denim jacket | white napkin | canvas shoe",
    cleaners="salt | vinegar | baking soda | dish soap | lemon juice | warm milk",
    places="Lisbon | Oslo | the desert | a mountain hut | Vienna | the coast | Cairo | a farm",
    clothes="shirts | warm socks | light trousers | scarves | sweaters | vests",
    gear="a torch | a paper map | sunglasses | a thermos bottle | a pocket knife | an umbrella",
    errands="call the bank | prune the tomatoes | stamp the letters | mend the fence | "
    "bake bread | feed the hens | fetch the parcel | sweep the yard | fix the roof | "
    "oil the bicycle",
    words="apple | harbor | violin | candle | meadow | thunder | ribbon | ladder | oyster | "
    "garden | window | silver | cabin | bridge | needle",
    goods="pears | eggs | tulips | pencils | nails | candles | walnuts | oranges",
    containers="crates | boxes | baskets | trays",
    names="Anna | Peter | Maria | Thomas | Susan | Robert | Clara | Daniel",
    things="garden hose | folding chair | cookbook | guitar | tent | sewing machine | telescope",
    tools="whisk | chisel | trowel | funnel | compass | ruler | sieve | wrench",
    uses="beat cream | carve wood | plant bulbs | fill narrow jars | find north | "
    "draw straight lines | sift flour | turn bolts",
    rides="the train | the ferry | the tram | the night bus | the barge",
    days="Monday | Tuesday | Wednesday",
)

VALIDATION = _lexicon(
    stains="blueberry jam | rust | curry | lipstick | gravy | soot",
    cloths="silk blouse | velvet curtain | fleece blanket | leather glove | flannel pillowcase",
    cleaners="rubbing alcohol | glycerin | ammonia | cornstarch | chalk powder",
    places="Kyoto | Reykjavik | an island | Prague | the jungle | Nairobi | a castle",
    clothes="gloves | raincoats | shorts | pyjamas | hats",
    gear="binoculars | a whistle | insect spray | a power adapter | a rope",
    errands="walk the dog | iron the curtains | post the invitations | book a dentist | "
    "wash the car | print the photographs | return the library books | cook lentils",
    words="zebra | magnet | puzzle | feather | canyon | lantern | quartz | biscuit | tunnel | "
    "orchid | planet | hammock",
    goods="melons | envelopes | buttons | batteries | olives | lightbulbs",
    containers="packets | barrels | cartons",
    names="Julia | Marcus | Helen | Victor | Irene | Oscar",
    things="chess board | electric drill | raincape | keyboard | sledge | fishing rod",
    tools="ladle | plane | pestle | stapler | thermometer | grater",
    uses="serve soup | smooth planks | crush spices | fasten sheets | measure heat | grate cheese",
    rides="the metro | the taxi | the shuttle | the express coach",
    days="Thursday | Friday | Saturday",
)
