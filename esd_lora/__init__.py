"""esd_lora: erase concepts from text-to-image diffusion models with small, stackable LoRA patches.

The public names are imported when they are first used, so that `import esd_lora` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esd_lora.bases import Base, load_base
    from esd_lora.compose import attach, compress, stack
    from esd_lora.errors import EsdLoraError
    from esd_lora.exporting import export, import_lora
    from esd_lora.fusing import fuse
    from esd_lora.hub import pull, push
    from esd_lora.merging import merge
    from esd_lora.patch import Patch, load_patch
    from esd_lora.pictures import generate
    from esd_lora.recipe import Concept, Recipe, load_recipe
    from esd_lora.training import train
    from esd_lora.verifying import verify

__version__ = "0.1.0"
__all__ = [
    "Base",
    "Concept",
    "EsdLoraError",
    "Patch",
    "Recipe",
    "attach",
    "compress",
    "export",
    "fuse",
    "generate",
    "import_lora",
    "load_base",
    "load_patch",
    "load_recipe",
    "merge",
    "pull",
    "push",
    "stack",
    "train",
    "verify",
]

_HOMES = {
    "Base": "bases",
    "Concept": "recipe",
    "EsdLoraError": "errors",
    "Patch": "patch",
    "Recipe": "recipe",
    "attach": "compose",
    "compress": "compose",
    "export": "exporting",
    "fuse": "fusing",
    "generate": "pictures",
    "import_lora": "exporting",
    "load_base": "bases",
    "load_patch": "patch",
    "load_recipe": "recipe",
    "merge": "merging",
    "pull": "hub",
    "push": "hub",
    "stack": "compose",
    "train": "training",
    "verify": "verifying",
}


def __getattr__(name: str) -> Any:
    """A public name, imported from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = getattr(home, name)
    globals()[name] = value
    return value
