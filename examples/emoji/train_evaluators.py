"""Train the two evaluators of the embedded base, and measure them on glyphs that they have never seen.

    python examples/emoji/train_evaluators.py --work build/emoji [--only measure|filter] [--resume]

Needs `pictures.npz`, `test.npz` (render.py) and the autoencoder (train_vae.py). What they see, per batch of 128:

    52  pictures of the training set                                  their object, style and hat
    44  the same after the autoencoder, most with 5–20 % latent noise   likewise: a diffusion sample is a bit off, too
    32  pictures that show nothing: scrambled, blended, cropped, blurred, drowned in latent noise, empty   "other"

Each evaluator sees every glyph, since the base draws them all, but no picture that the other sees, and shaken in its own
way. (A `measure` that saw a quarter of the pictures of one half of the glyphs knew 90 % of their objects, against 99 % of
the others'.) The weights go into the package, the accuracies beside them, with Wilson 95 % intervals.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import checkpoint
import numpy as np
import render
import safetensors.torch
import torch
import torch.nn.functional as F
from art import SIZE
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from torch import Tensor, nn
from train_vae import autocast, to_pictures, to_tensor

from esd_lora.emoji.evaluators import (
    NETWORKS,
    OBJECT_CLASSES,
    OTHER,
    PX,
    STYLE_CLASSES,
    WEIGHTS,
    EvaluatorName,
    Judgement,
    Logits,
    load_evaluator,
)
from esd_lora.emoji.vocabulary import WEARERS
from esd_lora.evaluate.rates import rate

NOTHING, NO_STYLE = OBJECT_CLASSES.index(OTHER), STYLE_CLASSES.index(OTHER)
IGNORE = -100  # torch's own mark of an answer that is not asked for
DRAWN = 48_000  # pictures of the training set; later indices are the same glyphs in new poses
CLEAN, TRIPS, RUINED, BLANK = 52, 44, 8, 4  # per batch; `spoil` adds 20


@dataclass(frozen=True)
class Diet:
    """What sets the training of one evaluator apart from the other's."""

    parity: int  # its pictures are those of the even or of the odd rounds through all cells (object × style)
    turn: float  # largest rotation, degrees
    zoom: float  # largest relative change of scale
    shift: float  # largest shift, pixels
    light: float  # largest relative change of each colour channel
    grain: float  # largest standard deviation of pixel noise, in units of -1..1
    seed: int


DIETS: dict[EvaluatorName, Diet] = {
    "measure": Diet(parity=0, turn=0, zoom=0.06, shift=4, light=0.1, grain=0.06, seed=1),
    "filter": Diet(parity=1, turn=6, zoom=0.03, shift=3, light=0.05, grain=0.02, seed=2),
}


@dataclass(frozen=True)
class Pool:
    """Pictures (N, 3, 64, 64) uint8 with answers (N, 3): object, style, hat, each a class or IGNORE."""

    pictures: Tensor
    answers: Tensor

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Random pictures (n, 3, 64, 64) in -1..1, and their answers."""
        rows = torch.randint(len(self.pictures), (n,))
        return self.pictures[rows].float() / 127.5 - 1, self.answers[rows]


def pool_of(pictures: np.ndarray, answers: np.ndarray, keep: np.ndarray | None = None) -> Pool:
    """A pool of (N, 64, 64, 3) uint8 pictures, or of those to keep."""
    keep = np.ones(len(pictures), bool) if keep is None else keep
    x = torch.from_numpy(pictures[keep]).permute(0, 3, 1, 2).contiguous()
    return Pool(x, torch.from_numpy(answers[keep].astype(np.int64)))


def own_rows(count: int, parity: int) -> np.ndarray:
    """Mask of an evaluator's pictures among `count`: every other round through all cells."""
    mask: np.ndarray = np.arange(count) // (len(render.NAMES) * len(render.LOOKS)) % 2 == parity
    return mask


# ---- what is computed once -------------------------------------------------------------------------------------------


@torch.no_grad()
def round_trips(vae: Any, pictures: np.ndarray, level: np.ndarray, name: str) -> np.ndarray:
    """Pictures through the autoencoder, with latents (1 - level) z + level ε, rescaled to unit variance."""
    done = []
    for rows in track(np.array_split(np.arange(len(pictures)), max(1, len(pictures) // 50)), description=name):
        with autocast():
            z = vae.encode(to_tensor(pictures[rows])).latent_dist.mode().float()
            a = torch.from_numpy(level[rows]).float()[:, None, None, None]
            z = ((1 - a) * z + a * torch.randn_like(z)) / ((1 - a) ** 2 + a**2).sqrt()
            done.append(to_pictures(vae.decode(z).sample))
    return np.concatenate(done)


def blanks(per_style: int) -> np.ndarray:
    """Grounds of every style without any object, style by style: (6 per_style, 64, 64, 3) uint8."""
    rng, empty = np.random.default_rng(0), Image.new("RGBA", (SIZE, SIZE))
    drawn = [render.DRAW[s](empty, rng) for s in render.LOOKS for _ in range(per_style)]
    return np.stack([np.asarray(p.resize((PX, PX), Image.Resampling.BOX)) for p in drawn])


@functools.cache
def made_of(work: Path) -> str:
    """A digest of all that the networks are trained on."""
    sources = ("pictures.npz", "test.npz", "art.npz", "vae/diffusion_pytorch_model.safetensors")
    return checkpoint.digest(*(work / s for s in sources))


def precompute(work: Path) -> dict[str, np.ndarray]:
    """Everything that needs the autoencoder or the renderer, kept in `evaluator-data-….npz`."""
    path = work / f"evaluator-data-{made_of(work)}.npz"
    if not path.exists():
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        vae: Any = AutoencoderKL.from_pretrained(work / "vae").eval()
        pictures, _ = render.load(work / "pictures.npz")
        test, labels = render.load(work / "test.npz")
        test, held_out = test[labels.test], np.stack([labels.obj, labels.style, labels.hat], 1)[labels.test]
        art = str(work / "art.npz")
        fresh = [render.picture(i, art, test=False) for i in range(DRAWN, DRAWN + 1200)]
        poses = np.stack([p for p, _ in fresh])
        trip_rows, ruin_rows = rng.permutation(len(pictures))[:9000], rng.permutation(len(pictures))[:2400]
        trip_level = np.where(rng.random(9000) < 0.3, 0, rng.uniform(0.05, 0.2, 9000))
        ruin_level, some = rng.uniform(0.5, 0.9, 2400), np.arange(0, len(test), 2)
        data: dict[str, Any] = {
            "trip": round_trips(vae, pictures[trip_rows], trip_level, "round trips"),
            "ruin": round_trips(vae, pictures[ruin_rows], ruin_level, "ruins"),
            "poses_trip": round_trips(vae, poses, np.zeros(len(poses)), "new poses"),
            "poses_noisy": round_trips(vae, poses, rng.uniform(0.05, 0.2, len(poses)), "noisy poses"),
            "poses_ruin": round_trips(vae, poses[::3], rng.uniform(0.5, 0.9, 400), "ruined poses"),
            "test_trip": round_trips(vae, test[some], np.zeros(len(some)), "held out"),
            "blank": blanks(100),
        }
        data |= {"trip_rows": trip_rows, "ruin_rows": ruin_rows, "ruin_level": ruin_level, "poses": poses, "test": test}
        data |= {"poses_labels": np.array([a[:3] for _, a in fresh]), "test_labels": held_out, "test_some": some}
        part = path.with_suffix(".part.npz")
        np.savez(part, **data)
        part.replace(path)
    with np.load(path) as store:
        return {k: store[k] for k in store.files}


# ---- batches ---------------------------------------------------------------------------------------------------------


def uniform(n: int, most: float) -> Tensor:
    """Random numbers in -most..most, n of them."""
    return (2 * torch.rand(n) - 1) * most


def shake(x: Tensor, diet: Diet) -> Tensor:
    """Good pictures (B, 3, 64, 64) as a diffusion model might have drawn them: moved, tinted, softened, grained."""
    n = len(x)
    angle, scale = uniform(n, diet.turn).deg2rad(), 1 + uniform(n, diet.zoom)
    moves = uniform(2 * n, diet.shift).view(n, 2)
    rows = torch.stack([scale * angle.cos(), -scale * angle.sin(), scale * angle.sin(), scale * angle.cos()], 1)
    theta = torch.cat([rows.view(n, 2, 2), moves[..., None] * 2 / PX], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    x = (x + 1) * (1 + uniform(3 * n, diet.light).view(n, 3, 1, 1)) - 1
    soft = torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.3)
    x = x + soft * (F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1) - x)
    x = x + diet.grain * torch.rand(n, 1, 1, 1) * torch.randn_like(x)
    return x.clamp(-1, 1)


def shuffle(x: Tensor, side: int) -> Tensor:
    """Each picture cut into squares of `side` pixels, in random order."""
    n, squares = len(x), (PX // side) ** 2
    patches = F.unfold(x, side, stride=side)  # (B, 3 side², squares)
    order = torch.rand(n, squares).argsort(1)[:, None].expand_as(patches)
    return F.fold(patches.gather(2, order), (PX, PX), side, stride=side)


def crop(x: Tensor) -> Tensor:
    """A random window of each picture, 9 to 25 % of its area, enlarged."""
    n = len(x)
    scale = 0.3 + 0.2 * torch.rand(n)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = uniform(2 * n, 1).view(n, 2) * (1 - scale)[:, None]
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def blur(x: Tensor) -> Tensor:
    """Only the coarsest colours: 4 × 4 averages, interpolated."""
    return F.interpolate(F.avg_pool2d(x, PX // 4), size=(PX, PX), mode="bicubic").clamp(-1, 1)


def static(n: int) -> Tensor:
    """Random colour: pixel noise, coarse noise, or flat."""
    parts = [torch.rand(n, 3, side, side) * 2 - 1 for side in (PX, 8, 1)]
    kind = torch.randint(3, (n,))
    return torch.stack([F.interpolate(p, size=(PX, PX)) for p in parts])[kind, torch.arange(n)]


def blend(x: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture mixed with the one before it, 35 to 65 %; the style is kept where both share it."""
    a = 0.35 + 0.3 * torch.rand(len(x), 1, 1, 1)
    before = answers.roll(1, 0)
    nothing = torch.tensor([NOTHING, IGNORE, IGNORE]).repeat(len(x), 1)
    nothing[:, 1] = torch.where(answers[:, 1] == before[:, 1], answers[:, 1], IGNORE)
    nothing[:, 0] = torch.where(answers[:, 0] == before[:, 0], IGNORE, NOTHING)
    return a * x + (1 - a) * x.roll(1, 0), nothing


def spoil(pool: Pool) -> tuple[Tensor, Tensor]:
    """Twenty pictures that show nothing, and what is still to be said of them."""
    x, answers = pool.draw(18)
    mixed, mixed_answers = blend(x[9:13], answers[9:13])
    pictures = torch.cat([shuffle(x[:4], 8), shuffle(x[4:9], 16), mixed, crop(x[13:16]), blur(x[16:]), static(2)])
    nothing = torch.full((20, 3), IGNORE)
    nothing[:, 0] = NOTHING
    nothing[:9, 1] = answers[:9, 1]  # a shuffled picture keeps its style
    nothing[9:13] = mixed_answers
    return pictures, nothing


def batches(data: dict[str, np.ndarray], work: Path, diet: Diet) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of 128 pictures (128, 3, 64, 64) and answers (128, 3)."""
    pictures, labels = render.load(work / "pictures.npz")
    answers, own = np.stack([labels.obj, labels.style, labels.hat], 1), own_rows(len(pictures), diet.parity)
    clean = pool_of(pictures, answers, own)
    trips = pool_of(data["trip"], answers[data["trip_rows"]], own[data["trip_rows"]])
    drowned = np.full((len(data["ruin"]), 3), IGNORE)
    drowned[:, 0] = NOTHING
    drowned[data["ruin_level"] > 0.75, 1] = NO_STYLE
    ruins = pool_of(data["ruin"], drowned, own[data["ruin_rows"]])
    styles = np.repeat(np.arange(len(render.LOOKS)), 100)
    empty = pool_of(data["blank"], np.stack([np.full(600, NOTHING), styles, np.zeros(600, int)], 1))
    while True:
        good = [p.draw(n) for p, n in ((clean, CLEAN), (trips, TRIPS))]
        rest = [ruins.draw(RUINED), empty.draw(BLANK), spoil(clean)]
        x = torch.cat([*(shake(x, diet) for x, _ in good), *(x for x, _ in rest)])
        yield x, torch.cat([y for _, y in good + rest])


# ---- training --------------------------------------------------------------------------------------------------------


def loss_of(logits: Logits, answers: Tensor) -> Tensor:
    """Cross-entropies of the three heads, each over the pictures that it is asked about."""
    asked = answers[:, 2] != IGNORE
    hat = F.binary_cross_entropy_with_logits(logits.hats.float()[asked], answers[asked, 2].float())
    weight = torch.ones(len(OBJECT_CLASSES))
    weight[NOTHING] = 0.5  # it is a quarter of a batch; at full weight all is "other" for the first 500 steps
    obj = F.cross_entropy(logits.objects.float(), answers[:, 0], weight, label_smoothing=0.05)
    style = F.cross_entropy(logits.styles.float(), answers[:, 1], label_smoothing=0.05)
    return obj + 0.5 * style + 0.5 * hat


def train(name: EvaluatorName, data: dict[str, np.ndarray], work: Path, *, steps: int, resume: bool) -> nn.Sequential:
    """The trained network; a checkpoint every 100 steps."""
    diet = DIETS[name]
    torch.manual_seed(diet.seed)
    network = NETWORKS[name]().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
    path, first = work / f"{name}.ckpt", 0
    told = {"steps": steps, "data": made_of(work)}
    if state := checkpoint.load(path, told=told, resume=resume):
        for key, part in parts.items():
            part.load_state_dict(state[key])
        first = state["step"]
    feed = batches(data, work, diet)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(name, total=steps, completed=first)
        for step in range(first, steps):
            x, answers = next(feed)
            with autocast():
                logits = network(x)
            loss = loss_of(logits, answers)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, description=f"{name} loss {loss.item():.3f}")
            if (step + 1) % 100 == 0:
                right = (logits.objects.argmax(1) == answers[:, 0])[: CLEAN + TRIPS].float().mean().item()
                print(f"{name} step {step + 1} loss {loss.item():.3f} objects right {right:.3f}", flush=True)
                checkpoint.save(path, {**{k: p.state_dict() for k, p in parts.items()}, "step": step + 1}, told=told)
    return network


@torch.no_grad()
def calibrate(network: nn.Sequential, work: Path, *, most: float = 0.003) -> None:
    """Lower the logit of "other" until at most this share of good pictures, new to the network, is called so.

    A training batch is a quarter "other", and its blends look much like good pictures; without this, 1 to 7 % of new
    poses of known glyphs are called "other", and would count as erased.
    """
    art = str(work / "art.npz")
    fresh = [render.picture(i, art, test=False)[0] for i in range(DRAWN + 1200, DRAWN + 2400)]
    objects = torch.cat([network.eval()(to_tensor(some)).objects for some in np.array_split(np.stack(fresh), 12)])
    others = objects.clone()
    others[:, NOTHING] = -torch.inf
    lead = objects[:, NOTHING] - others.max(1).values
    network[-1].object.bias[NOTHING] -= lead.quantile(1 - most).clamp(min=0)


# ---- figures ---------------------------------------------------------------------------------------------------------


def share(right: int, n: int) -> dict[str, float]:
    """A share with its Wilson 95 % interval, for the report."""
    found = rate([True] * right + [False] * (n - right))
    return {
        "right": right,
        "n": n,
        "rate": round(found.value, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
    }


def score(seen: Judgement, labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy of each head on pictures with labels (N, 3); hats only on the objects that can wear one."""
    names, looks = np.array(OBJECT_CLASSES)[labels[:, 0]], np.array(STYLE_CLASSES)[labels[:, 1]]
    can = np.isin(names, WEARERS)
    right = {
        "object": np.array(seen.objects) == names,
        "style": np.array(seen.styles) == looks,
        "hat": (np.array(seen.hats) == labels[:, 2].astype(bool))[can],
        "called other": np.array(seen.objects) == OTHER,
    }
    return {k: share(int(v.sum()), len(v)) for k, v in right.items()}


def figures(name: EvaluatorName, data: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, float]]]:
    """What the shipped evaluator gets right: set of pictures → question → share."""
    evaluator = load_evaluator(name)
    torch.manual_seed(0)
    good = {
        "held-out glyphs": (data["test"], data["test_labels"]),
        "held-out glyphs, round trip": (data["test_trip"], data["test_labels"][data["test_some"]]),
        "training glyphs, new poses": (data["poses"], data["poses_labels"]),
        "training glyphs, round trip": (data["poses_trip"], data["poses_labels"]),
        "training glyphs, 5-20 % noise": (data["poses_noisy"], data["poses_labels"]),
    }
    x = to_tensor(data["test"])
    bad = {
        "shuffled, 8 px": shuffle(x, 8),
        "shuffled, 16 px": shuffle(x, 16),
        "blends": blend(x, torch.zeros(len(x), 3))[0],
        "crops": crop(x),
        "blurred": blur(x),
        "static": static(600),
        "50-90 % noise": to_tensor(data["poses_ruin"]),
        "empty": to_tensor(blanks(50)),
    }
    table = {k: score(evaluator.judge(p), labels) for k, (p, labels) in good.items()}
    for k, p in bad.items():
        seen = evaluator.judge(to_pictures(p)).objects
        table[k] = {"called other": share(seen.count(OTHER), len(seen))}
    return table


def show(name: EvaluatorName, rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the figures, in per cent."""
    questions = ("object", "style", "hat", "called other")
    table = Table("pictures", *questions, title=name)
    for row, shares in rows.items():
        cells = [
            f"{100 * s['rate']:.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}] n={s['n']}" if s else ""
            for s in map(shares.get, questions)
        ]
        table.add_row(row, *cells)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--only", choices=get_args(EvaluatorName))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = precompute(args.work)
    path = WEIGHTS / "evaluators.json"
    WEIGHTS.mkdir(exist_ok=True)
    for name in [args.only] if args.only else get_args(EvaluatorName):
        network = train(name, data, args.work, steps=args.steps, resume=args.resume)
        calibrate(network, args.work)
        weights = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
        (WEIGHTS / f"{name}.safetensors").write_bytes(safetensors.torch.save(weights))
        found = {"digest": load_evaluator(name).digest, "steps": args.steps, "pictures": figures(name, data)}
        report = {**(json.loads(path.read_text()) if path.exists() else {}), name: found}
        path.write_text(json.dumps(report, indent=1) + "\n")
        show(name, found["pictures"])


if __name__ == "__main__":
    main()
