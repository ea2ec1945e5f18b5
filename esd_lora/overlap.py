"""`overlap`: what patches share, before they are stacked: where one would act on what another erases, and on other words.

The action of a patch on a prompt is how much it changes the keys and values of cross-attention, relative to what the base
has there, over all such layers and the prompt's first 16 tokens c:

    action(ΔW, prompt) = ( Σ ‖ΔW c‖² / Σ ‖W c‖² )^½
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esd_lora.bases.base import Base
from esd_lora.compose import check_fits, concepts_of
from esd_lora.errors import PatchError
from esd_lora.keys import BATCH, LENGTH, named_words, words_of
from esd_lora.patch import Patch, write_file
from esd_lora.recipe import Concept
from esd_lora.trajectories import stems

WORDS = 5_000
"""Of a large vocabulary, as many of its first words are looked at: tokenizers have the frequent ones first."""
TOP = 10
CUT = 1e-6
"""Directions of lora_A that are smaller than this, relative to its largest, are rounding."""


@dataclass(frozen=True)
class Overlap:
    """What k patches share."""

    names: tuple[str, ...]
    """What each erases."""
    actions: tuple[tuple[float, ...], ...]
    """Row i, column j: the action of patch i on the concepts of patch j."""
    subspaces: tuple[tuple[float, ...], ...]
    """Row i, column j: mean squared cosine of the angles between the input spaces of i and j, over the layers of both."""
    leaks: tuple[tuple[tuple[str, float], ...], ...]
    """For each patch, the words of the vocabulary that it acts on most, its own left out, with the action."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@torch.no_grad()
def overlap(base: Base, patches: Sequence[Patch], *, on_words: Callable[[int, int], None] | None = None) -> Overlap:
    """What the patches share on this base.

    Args:
        base: The model that they were made for; active adapters are taken off.
        patches: At least one; each must say what it erases, and adapt k or v of cross-attention.
        on_words: Called with the number of words looked at and their total.

    Raises:
        PatchError: A patch does not fit, does not say what it erases, or leaves the text alone.
    """
    if not patches:
        raise PatchError("name at least one patch")
    base.remove_adapters()
    concepts = [concepts_of(p) for p in patches]
    text = [f"{base.prefix}.{n}" for n in base.text_layers]
    for patch in patches:
        check_fits(patch, base)
        if not set(text) & set(patch.ranks):
            raise PatchError(f"the patch that erases {patch.erases} leaves k and v of cross-attention alone")
    weights = [base.denoiser.get_submodule(n.removeprefix(f"{base.prefix}.")).weight.cpu().double() for n in text]
    whole = sum((w.T @ w for w in weights), torch.zeros(()))
    grams = [gram_of(p, text) for p in patches]

    def actions_on(prompts: Sequence[str]) -> Tensor:
        states = base.text_states(prompts, length=LENGTH).double()
        size = torch.einsum("nld,de,nle->n", states, whole, states)
        return torch.stack([torch.einsum("nld,de,nle->n", states, g, states) / size for g in grams]).clamp(min=0).sqrt()

    own = [actions_on([c.prompt for c in named]).mean(1) for named in concepts]
    ids = base.pipe.tokenizer.get_vocab()
    words = sorted(words_of(base), key=lambda w: int(ids[f"{w}</w>"]))[:WORDS]
    parts = []
    for first in range(0, len(words), BATCH):
        parts.append(actions_on([f"a {w}" for w in words[first : first + BATCH]]))
        if on_words:
            on_words(min(first + BATCH, len(words)), len(words))
    spaces = [spaces_of(p) for p in patches]
    return Overlap(
        names=tuple(p.erases for p in patches),
        actions=tuple(tuple(column[i].item() for column in own) for i in range(len(patches))),
        subspaces=tuple(tuple(_shared(left, right) for right in spaces) for left in spaces),
        leaks=tuple(_most(named, row, words) for named, row in zip(concepts, torch.cat(parts, 1), strict=True)),
    )


def gram_of(patch: Patch, layers: Sequence[str]) -> Tensor:
    """Σ ΔWᵀ ΔW over the layers that the patch adapts, (D, D) in float64."""
    total = torch.zeros(())
    for name in layers:
        if name in patch.ranks:
            up, down = (patch.tensors[f"{name}.{factor}.weight"].double() for factor in ("lora_B", "lora_A"))
            total = total + down.T @ (up.T @ up) @ down
    return total


def spaces_of(patch: Patch) -> dict[str, Tensor]:
    """By layer an orthonormal basis of what lora_A looks at, (in, directions) in float64."""
    found = {}
    for name in patch.ranks:
        _, s, vt = torch.linalg.svd(patch.tensors[f"{name}.lora_A.weight"].double(), full_matrices=False)
        found[name] = vt[s > CUT * s[0]].T
    return found


def _shared(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Mean squared cosine of the principal angles between the spaces of two patches, over the layers where both have any."""
    shared = []
    for name in sorted(left.keys() & right.keys()):
        q, r = left[name], right[name]
        if angles := min(q.shape[1], r.shape[1]):
            shared.append((q.T @ r).square().sum().item() / angles)
    return sum(shared) / len(shared) if shared else 0.0


def _most(concepts: Sequence[Concept], actions: Tensor, words: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """The words that a patch acts on most, without those that its concepts are about."""
    named = named_words(concepts)
    order = actions.argsort(descending=True).tolist()
    return tuple((words[i], actions[i].item()) for i in order if not stems(words[i]) & named)[:TOP]


def draw_overlap(found: Overlap, path: Path) -> None:
    """Draw the actions on each other's concepts, and the words that each patch leaks to."""
    from matplotlib.figure import Figure

    n = len(found.names)
    figure = Figure(figsize=(4 + 0.5 * n + 4, 1.5 + max(2.5, 0.5 * n)), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(found.actions, cmap="Blues", vmin=0)
    left.set_xticks(range(n), found.names, rotation=45, ha="right")
    left.set_yticks(range(n), found.names)
    left.set(title="action of a patch (row)\non a concept (column)")
    figure.colorbar(image, ax=left, shrink=0.8)
    for i, leak in enumerate(found.leaks):
        own = found.actions[i][i] or 1.0
        right.barh([i - 0.4 + 0.8 * k / TOP for k in range(len(leak))], [a / own for _, a in leak], height=0.07)
        right.text(1.02, i, ", ".join(w for w, _ in leak[:3]), va="center", fontsize=8)
    right.set(title="leak on other words,\nrelative to the own concept", xlim=(0, 1.6), ylim=(n - 0.5, -0.5))
    right.set_yticks(range(n), found.names)
    right.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_file(path, buffer.getvalue())
