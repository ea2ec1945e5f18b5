"""The two evaluators of the embedded base: small classifiers that say what is in a picture.

`measure` reports; `filter` is kept apart for choosing (post-filters, attacks), so that nothing is chosen by what it is
measured with. They share nothing but the question: other architectures, other pictures and other augmentations, so that
what one is fooled by need not fool the other.

    measure   3 × 3 convolutions with residuals, overlapping stem                     He et al. 2015, arXiv:1512.03385
    filter    depthwise 3 × 3 and pointwise layers, convolutional stem     Liu et al. 2022, arXiv:2201.03545; Xiao et al.
                                                                          2021, arXiv:2106.14881 (why no patch stem)

Both know a class "other" beyond the vocabulary: an erased concept may leave a scrambled picture, which shows nothing.
`examples/emoji/train_evaluators.py` trained them; their accuracies are in `weights/evaluators.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from esd_lora.emoji.vocabulary import OBJECTS, STYLES
from esd_lora.errors import BaseModelError

EvaluatorName = Literal["measure", "filter"]

PX = 64
OTHER = "other"
OBJECT_CLASSES = (*OBJECTS, OTHER)
STYLE_CLASSES = (*STYLES, OTHER)
WEIGHTS = Path(__file__).parent / "weights"


class Logits(NamedTuple):
    """Answers of the three heads to B pictures."""

    objects: Tensor  # (B, 21)
    styles: Tensor  # (B, 7)
    hats: Tensor  # (B,)


class Heads(nn.Module):
    """Three linear answers to the mean of a feature map (B, width, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.object = nn.Linear(width, len(OBJECT_CLASSES))
        self.style = nn.Linear(width, len(STYLE_CLASSES))
        self.hat = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Logits:
        """The answers, from (B, width, h, w)."""
        x = self.norm(x.mean((2, 3)))  # (B, width)
        return Logits(self.object(x), self.style(x), self.hat(x)[:, 0])


class Residual(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut; a stride halves the map."""

    def __init__(self, width_in: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity() if width == width_in else nn.Conv2d(width_in, width, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w), halved in size by a stride of two."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(h)))


class Separable(nn.Module):
    """A depthwise 3 × 3 convolution, then a pointwise layer of `wide` channels, beside the identity."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.up = nn.Conv2d(width, wide, 1)
        self.down = nn.Conv2d(wide, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x."""
        y: Tensor = self.down(F.gelu(self.up(self.norm(self.space(x)))))
        return x + y


def build_measure() -> nn.Module:
    """The untrained network of `measure`: (B, 3, 64, 64) in -1..1 → `Logits`."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),  # (B, 32, 32, 32)
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Residual(32, 64, stride=2),  # (B, 64, 16, 16)
        Residual(64, 64),
        Residual(64, 96, stride=2),  # (B, 96, 8, 8)
        Residual(96, 96),
        Heads(96),
    )


def build_filter() -> nn.Module:
    """The untrained network of `filter`: (B, 3, 64, 64) in -1..1 → `Logits`."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),  # (B, 32, 32, 32)
        nn.BatchNorm2d(32),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),  # (B, 64, 16, 16)
        nn.BatchNorm2d(64),
        *(Separable(64, 160) for _ in range(3)),
        nn.Conv2d(64, 112, 2, stride=2),  # (B, 112, 8, 8)
        *(Separable(112, 256) for _ in range(4)),
        Heads(112),
    )


NETWORKS: Mapping[EvaluatorName, Callable[[], nn.Module]] = MappingProxyType(
    {"measure": build_measure, "filter": build_filter}
)


@dataclass(frozen=True)
class Judgement:
    """What an evaluator sees in B pictures; `OTHER` is a possible object and a possible style."""

    objects: list[str]
    styles: list[str]
    hats: list[bool]
    object_probabilities: Tensor  # (B, 21) float32, in the order of OBJECT_CLASSES
    style_probabilities: Tensor  # (B, 7) float32, in the order of STYLE_CLASSES
    hat_probabilities: Tensor  # (B,) float32

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.objects)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 as (B, 3, 64, 64) float32 in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_array(pictures: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
    """Pictures of any mode and size, or an array that is checked, as (B, 64, 64, 3) uint8.

    Raises:
        ValueError: An array of another shape or dtype.
    """
    if not isinstance(pictures, np.ndarray):
        size = (PX, PX)
        rows = [p if p.size == size else p.resize(size, Image.Resampling.LANCZOS) for p in pictures]
        return np.array([np.asarray(p.convert("RGB")) for p in rows], np.uint8).reshape(-1, PX, PX, 3)
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (PX, PX, 3):
        raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}; expected uint8 (B, {PX}, {PX}, 3)")
    return pictures


class Evaluator:
    """A trained classifier of emoji pictures, on the CPU in float32.

    Args:
        network: (B, 3, 64, 64) in -1..1 → `Logits`.
        name: Which of the two it is.
        digest: SHA-256 of its weights file, in hexadecimal: what a report says it was measured with.
    """

    def __init__(self, network: nn.Module, *, name: EvaluatorName, digest: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.digest = digest

    @torch.inference_mode()
    def judge(self, pictures: Sequence[Image.Image] | np.ndarray, *, batch: int = 100) -> Judgement:
        """What is in the pictures; each is judged by itself, `batch` at a time.

        Args:
            pictures: PIL pictures (resized to 64 px), or uint8 (B, 64, 64, 3). None at all is fine.
            batch: How many go through the network together; changes nothing but the memory used.

        Raises:
            ValueError: An array of another shape or dtype.
        """
        x = to_tensor(to_array(pictures).copy())
        logits = Logits(*map(torch.cat, zip(*map(self.network, torch.split(x, batch)), strict=True)))
        objects, styles, hats = logits.objects.softmax(1), logits.styles.softmax(1), logits.hats.sigmoid()
        return Judgement(
            objects=[OBJECT_CLASSES[i] for i in objects.argmax(1).tolist()],
            styles=[STYLE_CLASSES[i] for i in styles.argmax(1).tolist()],
            hats=(hats > 0.5).tolist(),
            object_probabilities=objects,
            style_probabilities=styles,
            hat_probabilities=hats,
        )


def load_evaluator(name: EvaluatorName) -> Evaluator:
    """One of the two evaluators, with the weights that come with the package.

    Raises:
        BaseModelError: No such evaluator, or its weights are missing or broken; reinstalling the package helps.
    """
    if name not in NETWORKS:
        raise BaseModelError(f"evaluator {name}: unknown; there are {', '.join(NETWORKS)}")
    path = WEIGHTS / f"{name}.safetensors"
    network = NETWORKS[name]()
    try:
        data = path.read_bytes()
        network.load_state_dict(safetensors.torch.load(data))
    except OSError as e:
        raise BaseModelError(f"evaluator {name}: cannot read {path} ({e.strerror}); reinstall esd_lora") from e
    except (SafetensorError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise BaseModelError(f"evaluator {name}: {path} is not its weights ({reason}); reinstall esd_lora") from e
    return Evaluator(network, name=name, digest=hashlib.sha256(data).hexdigest())
