"""The words that stories are about, by kind; no word belongs to two kinds or to a template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing, place, colour or trade; `{X}` writes it bare and `{X.a}` with its article."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def a(self) -> str:
        """The word after "a" or "an"."""
        return f"{'an' if self.text[0] in 'aeiou' else 'a'} {self.text}"


@dataclass(frozen=True, slots=True)
class Name:
    """A person; `{A}` writes the name and `{A.he}`, `{A.His}` and so on the right pronoun."""

    text: str
    he: str
    him: str
    his: str

    def __str__(self) -> str:
        return self.text

    @property
    def He(self) -> str:  # noqa: N802 - reads as the word that it writes
        """The pronoun at the start of a sentence."""
        return self.he.capitalize()

    @property
    def His(self) -> str:  # noqa: N802 - reads as the word that it writes
        """The possessive at the start of a sentence."""
        return self.his.capitalize()


_WOMEN: Final = """
Agnes Alice Alma Anna Camila Clara Delia Dora Edith Elsa Emma Esther Fiona Freya Greta Helena Ida
Ingrid Irene Isolde Julia Kamala Lena Lydia Mabel Maya Miriam Nadia Nina Nora Olga Petra Ramona Ruth
Selma Stella Sylvia Thea Ursula Vera Yvonne Zelda
"""
_MEN: Final = """
Adam Albert Anton Arthur Boris Caspar Conrad Cyril Dmitri Edgar Edmund Elias Emil Felix Gustav
Hamish Harold Hector Hugo Ivan Jasper Julian Karl Kurt Leon Magnus Martin Milo Nathan Nigel Noah
Oscar Owen Paul Percy Peter Ralph Roland Rufus Silas Simon Stefan Tobias Ulrich Victor Walter
"""
_OBJECTS: Final = """
abacus almanac amulet anchor anvil apron atlas axe ball balloon bangle banner barrel basin bayonet
belt blanket bonnet boot bottle brooch broom brush bucket cabinet camera canoe carpet cart casket
chain chalice chisel cleaver cloak coin comb compass cradle crate crown crutch cushion dagger dart
diary doll easel emerald fan feather flask fork funnel globe glove goblet gong grater hammer hammock
hatchet helmet hoe hoop inkwell jar jigsaw jug kettle knife ladle lamp lantern lock locket magnet
mallet marble mat medal mirror mitten mug nail napkin needle oar opal paddle padlock pan pearl
pencil pendant pillow pin pistol pot pouch prism pulley puppet purse puzzle quilt quiver rake rattle
razor ribbon ring robe rope ruby rug ruler saddle satchel scroll sextant shovel sickle skillet sled
sledge slipper spade spatula spindle spoon statue stool sundial sword teapot tent thimble tray
trophy trowel trunk vase wagon wallet whistle wrench
"""
_PLACES: Final = """
abbey aquarium arcade armoury attic bakery balcony ballroom bank barn brewery camp canal canteen
castle cave cavern cellar cemetery chapel circus cottage dairy dockyard embassy factory farm
farmyard forest fortress foundry fountain gallery garage garden gazebo hospital inn island kennel
kitchen lake laundry library market meadow mill monument museum nursery orchard palace pantry
pavilion pharmacy pier pond quarry sawmill shed shipyard smithy stable stadium tannery tavern temple
theatre tower tunnel vineyard windmill woodshed workshop zoo
"""
_ANIMALS: Final = """
alpaca badger beaver buffalo canary chicken crab donkey falcon ferret fox gazelle goat goose gosling
hamster hare hawk heron iguana kestrel kitten lamb lizard llama magpie mule newt ostrich otter owl
panther parrot peacock pelican penguin pigeon piglet pony puffin rabbit raccoon raven rooster
sparrow stork swan toad turkey turtle weasel wolf
"""
_COLOURS: Final = """
amber beige black blue bronze brown crimson golden green grey indigo ivory lavender lilac magenta
maroon mauve olive orange pink purple red scarlet silver violet white yellow
"""
_FOODS: Final = """
almonds apricots bacon barley beetroot biscuits cabbage caramel celery cheese cherries custard figs
ginger grapes ham honey lentils macaroni marzipan mustard noodles oats olives onions oysters
pancakes parsnips pepper pickles plums porridge prunes pumpkin radishes rhubarb salmon sardines
sausages spinach toffee trout turnips waffles walnuts
"""
_TRADES: Final = """
acrobat actor baker banker barber botanist butcher butler chemist cobbler composer dentist engineer
explorer ferryman gardener glazier grocer hatter jeweller juggler lawyer magician mechanic midwife
miller miner nurse painter pilot plumber poet porter potter printer saddler sailor sculptor shepherd
sheriff soldier surgeon tailor teacher thatcher weaver
"""
_INSTRUMENTS: Final = """
banjo bassoon cello clarinet cornet dulcimer fiddle flute guitar harp lute lyre mandolin oboe organ
piano piccolo recorder sitar tabor trombone trumpet tuba viola violin zither
"""
_CITIES: Final = """
Ankara Antwerp Athens Baghdad Bangkok Bergen Berlin Bogota Bombay Boston Bremen Brussels Budapest
Cairo Chicago Damascus Delhi Dresden Dublin Florence Geneva Glasgow Hamburg Havana Helsinki Istanbul
Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila Montreal Moscow Munich Nairobi Naples Oslo
Palermo Prague Riga Rome Salzburg Seville Shanghai Sydney Tokyo Toronto Vienna Warsaw Zurich
"""


def _nouns(words: str) -> tuple[Noun, ...]:
    return tuple(Noun(word) for word in words.split())


LEXICON: Final[Mapping[str, tuple[Noun | Name, ...]]] = {
    "name": (
        *(Name(word, "she", "her", "her") for word in _WOMEN.split()),
        *(Name(word, "he", "him", "his") for word in _MEN.split()),
    ),
    "object": _nouns(_OBJECTS),
    "place": _nouns(_PLACES),
    "animal": _nouns(_ANIMALS),
    "colour": _nouns(_COLOURS),
    "food": _nouns(_FOODS),
    "trade": _nouns(_TRADES),
    "instrument": _nouns(_INSTRUMENTS),
    "city": _nouns(_CITIES),
}
