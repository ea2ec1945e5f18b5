"""What the embedded base knows: objects, styles, their names, and how they are put into words.

Every object and style has one canonical name (the key), which prompts of the answer set use, and other surface forms
(synonyms, German) that the base has seen in captions as well, so that an erasure can be tested on words it was not
trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

OBJECTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cat": ("kitty", "feline", "katze"),
        "tiger": ("bengal tiger", "tigress", "tigerin"),
        "dog": ("puppy", "hound", "hund"),
        "bird": ("birdie", "fowl", "vogel"),
        "fish": ("fishes", "sea fish", "fisch"),
        "car": ("automobile", "motorcar", "auto"),
        "bus": ("coach", "omnibus", "reisebus"),
        "train": ("railway", "locomotive", "zug"),
        "boat": ("ship", "vessel", "schiff"),
        "house": ("home", "building", "haus"),
        "tree": ("trees", "timber", "baum"),
        "flower": ("blossom", "bloom", "blume"),
        "apple": ("apples", "orchard fruit", "apfel"),
        "clock": ("watch", "timepiece", "uhr"),
        "heart": ("love heart", "hearts", "herz"),
        "star": ("stars", "asterisk", "stern"),
        "moon": ("luna", "crescent", "mond"),
        "book": ("textbook", "volume", "buch"),
        "umbrella": ("parasol", "brolly", "schirm"),
        "camera": ("photo camera", "snapshot camera", "kamera"),
    }
)
"""Canonical object name → other surface forms; the last one is German."""

STYLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sticker": ("decal", "glossy sticker", "aufkleber"),
        "ink": ("black ink", "monochrome", "tusche"),
        "blueprint": ("technical drawing", "cyanotype", "blaupause"),
        "neon": ("neon light", "glowing", "leuchtreklame"),
        "pixel": ("pixel art", "8bit", "pixelkunst"),
        "watercolor": ("watercolour", "aquarelle", "wasserfarbe"),
    }
)
"""Canonical style name → other surface forms; the last one is German."""

WEARERS = ("cat", "tiger", "dog", "bird")
"""The objects that the base can draw with the accessory."""

ACCESSORY = "party hat"
"""An attribute of some pictures, to be erased *from* its wearer."""

ACCESSORY_FORMS = ("party hat", "birthday hat", "partyhut")

NEIGHBOURS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cat": ("tiger", "dog"),
        "tiger": ("cat", "dog"),
        "car": ("bus", "train"),
        "bus": ("car", "train"),
        "blueprint": ("neon", "ink"),
        "neon": ("blueprint",),
    }
)
"""Concepts that look alike: where collateral damage shows first."""


def article(noun: str) -> str:
    """The noun phrase with its English indefinite article: "an umbrella"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def prompt(obj: str, style: str | None = None, *, accessory: bool = False) -> str:
    """The answer set's prompt of one cell: "a cat with a party hat in neon style".

    Args:
        obj: Any surface form of an object.
        style: Any surface form of a style, or None to leave the style open.
        accessory: Whether the object wears the party hat.
    """
    words = article(obj) + (f" with a {ACCESSORY}" if accessory else "")
    return words if style is None else f"{words} in {style} style"
