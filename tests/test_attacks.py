"""Attacks: what they draw against diffusers' own pipeline and algebra, what they leave untouched, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import NOISE, TINY, tiny_pipeline
from torch import Tensor, nn

from esd_lora.bases import Base, base_of, load_base
from esd_lora.bases.base import Condition
from esd_lora.compose import attach
from esd_lora.errors import BaseModelError, EsdLoraError, PatchError, RecipeError, TrainingError
from esd_lora.evaluate.attacks import (
    Attack,
    Drawing,
    Examples,
    Guard,
    Stop,
    Training,
    _denoising_loss,
    _metered,
    completion,
    inversion,
    on_simplex,
    paraphrase,
    prefix_search,
    random_embeddings,
    random_words,
    relearning,
    ring_a_bell,
    scaling,
    seed_search,
    unmerging,
)
from esd_lora.evaluate.baselines import safe_latent
from esd_lora.evaluate.drift import latents_of, noised
from esd_lora.merging import merged_denoiser
from esd_lora.patch import Patch
from esd_lora.pictures import Pictures, generate
from esd_lora.softwords import SoftWords, vocabulary_of

STEPS, SCALE = 3, 4.0
BLANKS = Drawing(["a {}", "{} in ink"], [1, 2], steps=STEPS, guidance_scale=SCALE)
CATS = BLANKS.asking("cat")
DRAWN = 2 * STEPS * len(CATS.prompts)
"""Passes of a drawing: guidance doubles them."""
SHORT = Training(steps=4, batch_size=2)


def half() -> Base:
    base = tiny()
    base.denoiser.to(torch.bfloat16)
    return base


def consistency() -> Base:
    """A latent consistency model, which takes 50 steps at most."""
    pipe = tiny_pipeline(guidance_size=16)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return base_of(pipe)


def tiny(kind: str = "sd") -> Base:
    pipe = TINY[kind]() if kind in TINY else tiny_pipeline(prediction_type=kind)
    pipe.set_progress_bar_config(disable=True)
    return base_of(pipe)


def equal(left: Pictures, right: Pictures) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def apart(left: Pictures, right: Pictures) -> int:
    """The largest difference of a pixel, of 255."""
    return max(int(np.abs(np.int16(a) - np.int16(b)).max()) for a, b in zip(left, right, strict=True))


def never(pictures: Pictures) -> list[bool]:
    return [False] * len(pictures)


def examples_of(base: Base, prompts: Sequence[str] = ("a {}", "{} in neon")) -> Examples:
    return Examples(prompts, generate(base, ["cat"] * len(prompts), range(50, 50 + len(prompts)), steps=STEPS))


def modules_of(base: Base) -> list[nn.Module]:
    return [part for part in base.pipe.components.values() if isinstance(part, nn.Module)]


def state_of(base: Base) -> list[Tensor]:
    """Copies of all weights of the pipeline."""
    return [w.clone() for part in modules_of(base) for w in part.state_dict().values()]


def unchanged(base: Base, before: list[Tensor]) -> bool:
    """Whether all weights are what they were, bit for bit, without hooks or another `forward`, and none is trainable."""
    # transformers leaves hooks of its own, but in the layers of its models
    hooked = [base.denoiser, *(m for part in modules_of(base) for m in part.modules() if isinstance(m, nn.Embedding))]
    trainable = any(p.requires_grad or p.grad is not None for part in modules_of(base) for p in part.parameters())
    now = state_of(base)
    bare = not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in hooked)
    return bare and not trainable and len(now) == len(before) and all(map(torch.equal, now, before))


@pytest.fixture
def erased(base: Base, patch: Patch) -> Base:
    """The tiny base with the patch attached."""
    attach(base, [patch])
    return base


@pytest.fixture
def merged(tiny_folder: Path, patch: Patch) -> Base:
    """A second base, with the patch in its weights."""
    pipe = load_base(str(tiny_folder), device="cpu").pipe
    pipe.unet = merged_denoiser(base_of(pipe), patch)
    return base_of(pipe)


# ---- what it costs --------------------------------------------------------------------------------------------


def test_passes_that_a_guard_adds_are_counted(erased: Base) -> None:
    """By every meter around it, whether the guard is in place before or after; against what the first layer is given."""
    given: list[int] = []
    erased.denoiser.conv_in.register_forward_hook(lambda _, args, __: given.append(len(args[0])))
    with safe_latent(erased, "cat"), _metered(erased.denoiser) as before:
        found = seed_search(erased, CATS)
    assert found.passes == before.passes == sum(given) == DRAWN * 3 // 2
    with _metered(erased.denoiser) as outer, safe_latent(erased, "cat"):
        seed_search(erased, CATS)
        one = erased.noise([1]), torch.tensor([500]), erased.encode([""])
        erased.predict(*one)
        erased.denoiser.conv_in.weight.requires_grad_(True)
        erased.predict(*one)
    assert outer.passes == sum(given) - found.passes + 2  # a backward pass counts as two
    assert "forward" not in vars(erased.denoiser)


def test_a_meter_leaves_what_was_there_before_it(base: Base) -> None:
    """As where accelerate moves a network to its device before each call."""
    own = base.denoiser.forward = partial(base.denoiser.forward)
    with pytest.raises(RecipeError), _metered(base.denoiser):
        seed_search(base, replace(CATS, resolution=17))
    assert base.denoiser.forward is own


# ---- words ----------------------------------------------------------------------------------------------------


def test_a_paraphrase_is_the_prompt_in_other_words(erased: Base) -> None:
    for form in ("cat", "kitty"):
        attack = paraphrase(erased, BLANKS, form)
        assert attack.details == {"form": form}
        how: dict[str, Any] = {"steps": STEPS, "guidance_scale": SCALE}
        assert equal(attack.pictures, generate(erased, [f"a {form}", f"{form} in ink"], [1, 2], **how))
        assert attack.passes == DRAWN
        assert attack.seconds > 0


def test_a_seed_search_is_no_attack(erased: Base) -> None:
    found = seed_search(erased, CATS)
    assert equal(found.pictures, CATS.draw(erased))
    assert (found.passes, found.details) == (DRAWN, {})


def test_random_words_are_single_tokens_of_the_vocabulary(erased: Base) -> None:
    allowed = vocabulary_of(erased).words
    found = random_words(erased, BLANKS, tokens=3, without=("x", "y"), seed=1)
    words = [phrase.split() for phrase in found.details["words"]]
    assert words[0] != words[1]
    assert all(len(w) == 3 and set(w) <= set(allowed) - {"x", "y"} for w in words)
    prompts = [p.replace("{}", phrase) for p, phrase in zip(BLANKS.prompts, found.details["words"], strict=True)]
    assert equal(found.pictures, replace(BLANKS, prompts=prompts).draw(erased))
    assert random_words(erased, BLANKS, tokens=3, seed=2).details != found.details


def test_the_vocabulary_has_what_tokenizers_give_back(base: Base) -> None:
    """Its tokenizer knows capitals too, but makes small letters of them."""
    vocabulary = vocabulary_of(base)
    tokenizer = base.pipe.tokenizer
    assert vocabulary.words == sorted("abcdefghijklmnopqrstuvwxyz")
    assert [tokenizer.decode([i]).strip() for i in vocabulary.ids[0].tolist()] == vocabulary.words


# ---- embeddings and the denoiser of the first steps -------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY)
def test_ring_a_bell_adds_a_direction_to_the_embeddings(kind: str) -> None:
    """η = 0 is plain generation, bit for bit; η = 1 on one pair's own prompt is its other prompt, but for the rounding of
    a + (b − a), which a grey level of 255 hides."""
    base = tiny(kind)
    asked = Drawing(["a dog"], [3], steps=STEPS, guidance_scale=SCALE, resolution=32)
    none, whole = (ring_a_bell(base, asked, pairs=[("cat fur", "a dog")], eta=eta) for eta in (0.0, 1.0))
    other = replace(asked, prompts=["cat fur"]).draw(base)
    assert equal(none.pictures, asked.draw(base))
    assert not equal(none.pictures, whole.pictures)
    assert apart(whole.pictures, other) <= 1
    assert (none.details, whole.details) == ({"eta": 0.0}, {"eta": 1.0})


def test_ring_a_bell_takes_the_mean_of_its_pairs(base: Base) -> None:
    """Two pairs whose directions cancel are no direction."""
    pairs = [("cat fur", "a dog"), ("a dog", "cat fur")]
    found = ring_a_bell(base, CATS, pairs=pairs, eta=2.0)
    assert equal(found.pictures, CATS.draw(base))


def test_completion_goes_from_the_erased_model_to_the_unerased_one(base: Base, patch: Patch) -> None:
    unerased = CATS.draw(base)
    attach(base, [patch])
    state, erased = state_of(base), CATS.draw(base)
    found = [completion(base, replace(CATS, batch_size=1), k=k) for k in range(STEPS + 1)]
    assert [a.details for a in found] == [{"k": k, "steps": STEPS} for k in range(STEPS + 1)]
    assert equal(found[0].pictures, erased)
    assert equal(found[-1].pictures, unerased)
    for attack in found[1:-1]:
        assert not equal(attack.pictures, erased)
        assert not equal(attack.pictures, unerased)
    assert {a.passes for a in found} == {DRAWN}
    assert unchanged(base, state)
    assert equal(CATS.draw(base), erased)


def test_completion_of_a_merged_base_takes_the_unerased_denoiser(base: Base, patch: Patch, merged: Base) -> None:
    """As with the patch attached, to the last grey level: W x + B A x is rounded otherwise than (W + B A) x."""
    own = merged.denoiser
    found = [completion(merged, CATS, k=k, unerased=base) for k in (0, 1, STEPS)]
    assert merged.denoiser is own
    assert equal(found[0].pictures, CATS.draw(merged))
    assert equal(found[2].pictures, CATS.draw(base))
    assert {a.passes for a in found} == {DRAWN}
    attach(base, [patch])
    assert apart(found[1].pictures, completion(base, CATS, k=1).pictures) <= 1


@pytest.mark.parametrize("kind", TINY)
def test_completion_asks_each_base_in_its_own_embeddings(kind: str) -> None:
    """As a base that was trained without the concept, with a text encoder of its own, goes on from another's pictures."""
    base, other = tiny(kind), tiny(kind)
    with torch.no_grad():
        for part in (p for name, p in other.pipe.components.items() if name.startswith("text_encoder")):
            for weight in part.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    asked = Drawing(["a dog", "cat fur"], [3, 4], steps=STEPS, guidance_scale=SCALE, resolution=32)
    states, own = (state_of(base), state_of(other)), [asked.draw(base), asked.draw(other)]
    assert not equal(*own)
    first, amid, last = (completion(base, asked, k=k, unerased=other).pictures for k in (0, 1, STEPS))
    assert equal(first, own[0])
    assert equal(last, own[1])
    assert not equal(amid, own[0])
    assert not equal(amid, own[1])
    assert unchanged(base, states[0])
    assert unchanged(other, states[1])


def test_completion_takes_nothing_along_when_it_fails(base: Base, merged: Base, erased: Base) -> None:
    pictures, own = CATS.draw(erased), merged.denoiser
    broken = replace(CATS, resolution=17)
    for attempt in (
        lambda: completion(erased, broken, k=1),
        lambda: completion(merged, broken, k=1, unerased=base),
    ):
        with pytest.raises(RecipeError):
            attempt()
    assert merged.denoiser is own
    assert equal(CATS.draw(erased), pictures)


# ---- the patch as a switch --------------------------------------------------------------------------------------


def test_scaling_goes_from_the_base_to_the_patch(base: Base, patch: Patch) -> None:
    unerased = CATS.draw(base)
    attach(base, [patch], [0.5])
    half = CATS.draw(base)
    attach(base, [patch])
    none, some, whole = (scaling(base, CATS, weight=w) for w in (0, 0.5, 1))
    assert equal(none.pictures, unerased)
    assert equal(some.pictures, half)
    assert equal(whole.pictures, CATS.draw(base))
    assert len({picture.tobytes() for a in (none, some, whole) for picture in a.pictures}) == 6


def test_a_float32_merge_is_undone_to_its_rounding(base: Base, patch: Patch, merged: Base) -> None:
    """W' = fl(W + fl(B A)): W' − B A is W but for half a unit in the last place of W', and r + 1 of those of |B| |A|."""
    before, after = (dict(b.denoiser.named_parameters()) for b in (base, merged))
    for name, rank in patch.ranks.items():
        up, down = (patch.tensors[f"{name}.lora_{factor}.weight"].double() for factor in "BA")
        key = f"{name.removeprefix('unet.')}.weight"
        error = (after[key].double() - up @ down - before[key].double()).abs()
        assert (error <= 2.0**-24 * (after[key].double().abs() + (rank + 1) * up.abs() @ down.abs())).all()
        assert error.max() > 0


def test_unmerging_gives_the_pictures_of_the_base_back(base: Base, patch: Patch, merged: Base) -> None:
    """To the last grey level, for the weights are those of the base to some 1e-7 of themselves."""
    state, erased = state_of(merged), CATS.draw(merged)
    found = unmerging(merged, CATS, [patch])
    assert apart(found.pictures, CATS.draw(base)) <= 1
    assert apart(found.pictures, erased) > 10
    assert unchanged(merged, state)
    half = unmerging(merged, CATS, [patch], [0.5])
    attach(base, [patch], [0.5])
    assert apart(half.pictures, CATS.draw(base)) <= 1


# ---- what a denoiser is trained on ------------------------------------------------------------------------------


SCHEDULERS = {
    "epsilon": EulerDiscreteScheduler(**NOISE),
    "v_prediction": EulerDiscreteScheduler(**NOISE, prediction_type="v_prediction"),
    "sample": DPMSolverMultistepScheduler(**NOISE, prediction_type="sample"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, UniPC": UniPCMultistepScheduler(**NOISE, prediction_type="flow_prediction", use_flow_sigmas=True),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_an_attacker_trains_on_what_the_base_predicts(kind: str) -> None:
    """In float64, from the schedule's own β; for Euler too, whose `add_noise` is on another scale."""
    z, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    i = torch.tensor([0, 500, 999])
    if "flow" in kind:
        alpha, sigma, t = 1 - (i + 0.5) / 1000, (i + 0.5) / 1000, i + 0.5
    else:
        beta = torch.linspace(NOISE["beta_start"] ** 0.5, NOISE["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
        kept = (1 - beta).cumprod(0)[i]
        alpha, sigma, t = kept.sqrt(), (1 - kept).sqrt(), i
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    truths = {"epsilon": noise, "v_prediction": alpha * noise - sigma * z, "sample": z}

    def knows(x_t: Tensor, at: Tensor, _: Condition) -> Tensor:
        torch.testing.assert_close(at, t, rtol=1e-6, atol=0)
        torch.testing.assert_close(x_t.double(), (alpha * z + sigma * noise).double(), rtol=0, atol=1e-5)
        return truths.get(kind, noise - z)

    loss = _denoising_loss(knows, Condition({}), SCHEDULERS[kind], z, i, noise, dtype=torch.float32)
    assert loss < 1e-10  # squares of what float32 rounds of numbers of size 4


# ---- soft words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_soft_words_are_read_as_if_they_were_in_the_table(kind: str) -> None:
    """Bit for bit as where an encoder's table has these rows, wherever the words follow one another and nowhere else."""
    base = tiny(kind)
    vocabulary = vocabulary_of(base)
    some = [vocabulary.words.index(w) for w in ("q", "x")]
    generator = torch.Generator().manual_seed(0)
    embeddings = tuple(torch.randn(2, e.shape[1], generator=generator) for e in vocabulary.embeddings)
    soft = SoftWords("q x", tuple(ids[some] for ids in vocabulary.ids), embeddings)
    prompts = ["a q x", "q x", "cat"]
    plain = base.encode(prompts)
    with soft.active(base):
        found = base.encode([*prompts, "x q"])
    assert torch.equal(found.tensors["encoder_hidden_states"][2], plain.tensors["encoder_hidden_states"][2])
    apart = base.encode(["x q"]).tensors["encoder_hidden_states"][0]
    torch.testing.assert_close(found.tensors["encoder_hidden_states"][3], apart, rtol=0, atol=1e-6)  # another batch
    encoders = [base.pipe.text_encoder] + ([base.pipe.text_encoder_2] if kind == "xl" else [])
    for encoder, ids, rows in zip(encoders, soft.ids, embeddings, strict=True):
        encoder.get_input_embeddings().weight[ids] = rows
    assert same(dict(found[:2].tensors), dict(base.encode([*prompts, "x q"])[:2].tensors))


@pytest.mark.parametrize("kind", ["sd", "xl", "v_prediction"])
def test_inversion_lowers_its_loss_and_nothing_else(kind: str) -> None:
    """Beside a run that learns next to nothing, with the same batches and noise, for a step's loss says more of its noise.

    A random network hardly listens to its words, so that the loss falls by thousandths; float32 rounds millionths.
    """
    base = tiny(kind)
    examples, state = examples_of(base), state_of(base)
    still, found = (inversion(base, examples, BLANKS, tokens=2, training=Training(24, 4, lr=lr)) for lr in (1e-12, 0.3))
    assert sum(found.details["losses"][12:]) < 0.9995 * sum(still.details["losses"][12:])
    assert found.details["losses"][0] == still.details["losses"][0]
    assert unchanged(base, state)
    assert found.passes == 3 * 24 * 4 + DRAWN
    assert (found.details["tokens"], found.details["steps"], found.details["back"]) == (2, 24, False)
    assert not equal(found.pictures, still.pictures)


def test_inversion_follows_from_its_seed(erased: Base) -> None:
    examples = examples_of(erased)
    first, again, other = (inversion(erased, examples, BLANKS, training=replace(SHORT, seed=s)) for s in (0, 0, 1))
    assert equal(first.pictures, again.pictures)
    assert first.details == again.details
    assert other.details["losses"] != first.details["losses"]


def test_inversion_trains_through_a_guard(erased: Base) -> None:
    """Words learn what the guarded prediction wants, at two more passes of each latent of a step."""
    examples, state = examples_of(erased), state_of(erased)
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def steer(*eps: Tensor) -> Tensor:
        asked.append(eps)  # type: ignore[arg-type]
        return eps[0] + eps[2] - eps[1]

    plain, same, through = (
        inversion(erased, examples, BLANKS, training=SHORT, guard=guard)
        for guard in (None, Guard("cat", lambda eps, *_: eps), Guard("cat", steer))
    )
    assert same.details == plain.details
    assert through.details["losses"] != plain.details["losses"]
    assert not equal(through.pictures, plain.pictures)
    assert through.passes - plain.passes == 2 * SHORT.steps * SHORT.batch_size
    assert all(eps[0].requires_grad and not eps[1].requires_grad and not eps[2].requires_grad for eps in asked)
    assert unchanged(erased, state)


def test_inversion_starts_from_random_embeddings(erased: Base) -> None:
    """Where the concept is seen at the first look, nothing is trained: the pictures are the control's."""
    seen: list[int] = []

    def sees(pictures: Pictures) -> list[bool]:
        seen.append(len(pictures))
        return [True, True]

    stop = Stop(sees, replace(BLANKS, seeds=[7, 8]))
    found = inversion(erased, examples_of(erased), BLANKS, stop=stop, training=SHORT)
    control = random_embeddings(erased, BLANKS)
    assert (found.details["steps"], found.details["back"], seen) == (0, True, [2])
    assert equal(found.pictures, control.pictures)
    assert not equal(control.pictures, random_embeddings(erased, BLANKS, seed=1).pictures)


def test_inversion_works_where_gradients_are_off(erased: Base) -> None:
    """As they are inside `Base.teacher`, which makes the ceiling of a base with a patch attached."""
    examples = examples_of(erased)
    with erased.teacher():
        ceiling = inversion(erased, examples, BLANKS, training=SHORT)
    erased.remove_adapters()
    assert ceiling.details == inversion(erased, examples, BLANKS, training=SHORT).details


def test_an_interrupted_attack_leaves_the_base_as_it_was(erased: Base) -> None:
    state, pictures = state_of(erased), CATS.draw(erased)
    examples = examples_of(erased)
    looks: list[int] = []

    def interrupted(pictures: Pictures) -> list[bool]:
        looks.append(len(pictures))
        if len(looks) == 2:
            raise KeyboardInterrupt
        return never(pictures)

    attempts: list[Callable[[], Attack]] = [
        lambda: inversion(erased, examples, BLANKS, training=SHORT, stop=Stop(interrupted, BLANKS, every=2)),
        lambda: relearning(erased, examples.asking("cat"), CATS, stop=Stop(interrupted, CATS, every=2), training=SHORT),
        lambda: prefix_search(erased, CATS, pictures, sees=interrupted, times=2, steps=1),
    ]
    for attempt in attempts:
        looks.clear()
        with pytest.raises(KeyboardInterrupt):
            attempt()
        assert unchanged(erased, state)
        assert equal(CATS.draw(erased), pictures)


# ---- relearning -------------------------------------------------------------------------------------------------


def adapters_of(base: Base) -> dict[str, Tensor]:
    """Copies of the adapters' tensors by name."""
    return {n: p.detach().clone() for n, p in base.denoiser.named_parameters() if "lora_" in n}


def bare_names(base: Base) -> dict[str, Tensor]:
    """The parameters by the names that they have whether or not a layer has adapters."""
    return {n.replace(".base_layer", ""): p.detach() for n, p in base.denoiser.named_parameters()}


def test_relearning_trains_its_own_adapter_beside_the_patch(erased: Base) -> None:
    state, names = state_of(erased), set(adapters_of(erased))
    weights = {k: v.clone() for k, v in bare_names(erased).items()}
    before, moved = CATS.draw(erased), []

    def sees(pictures: Pictures) -> list[bool]:
        now = dict(erased.denoiser.named_parameters())
        moved.append(max(now[n].abs().max().item() for n in now if "lora_B.relearned" in n))
        assert all(torch.equal(bare_names(erased)[n], w) for n, w in weights.items())
        assert {n for n, p in now.items() if p.requires_grad} == {n for n in now if ".relearned." in n}
        active = [m.active_adapters for m in erased.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        assert ["patch_0", "relearned"] in active
        return never(pictures)

    examples = examples_of(erased).asking("cat")
    how: dict[str, Any] = {"stop": Stop(sees, CATS, every=1), "training": replace(SHORT, lr=0.05)}
    found = relearning(erased, examples, CATS, **how)
    assert moved[0] == 0 < moved[1]
    assert not equal(found.pictures, before)
    assert equal(CATS.draw(erased), before)
    assert unchanged(erased, state)
    assert set(adapters_of(erased)) == names
    assert found.details["losses"] == relearning(erased, examples, CATS, **how).details["losses"]
    other = relearning(erased, examples, CATS, **how | {"training": replace(SHORT, lr=0.05, seed=1)})
    assert found.details["losses"] != other.details["losses"]


def test_the_patch_is_on_while_it_is_relearned(erased: Base) -> None:
    """Before a first step the fresh adapter does nothing: what is looked at are the pictures of the patch, at its weight."""
    scale = [m for m in erased.denoiser.modules() if isinstance(m, BaseTunerLayer)]
    for module in scale:
        module.set_scale("patch_0", 0.5)
    before, shown = CATS.draw(erased), []

    def sees(pictures: Pictures) -> list[bool]:
        shown.append(pictures)
        return [True] * len(pictures)

    found = relearning(erased, examples_of(erased).asking("cat"), CATS, stop=Stop(sees, CATS), layers="esd-u")
    assert equal(shown[0], before)
    assert (found.details["steps"], found.details["back"], found.details["rank"]) == (0, True, 4)
    assert equal(CATS.draw(erased), before)


@pytest.mark.parametrize("kind", [*TINY, "v_prediction"])
def test_relearning_lowers_its_loss_on_every_family(kind: str) -> None:
    """Beside a run that learns next to nothing, with the same batches and noise."""
    base = tiny(kind)
    drawing = Drawing(["cat"], [1], steps=1, resolution=32)
    pictures = drawing.draw(base)
    examples, state, stop = Examples(["cat"], pictures), state_of(base), Stop(never, drawing, every=100)
    still, found = (
        relearning(base, examples, drawing, stop=stop, training=Training(8, 1, lr=lr)) for lr in (1e-12, 5e-2)
    )
    # after so few steps an adapter on sd has 0.96 of the loss left, and no other more
    assert sum(found.details["losses"][4:]) < 0.98 * sum(still.details["losses"][4:])
    assert unchanged(base, state)
    assert equal(drawing.draw(base), pictures)
    assert not any(isinstance(m, BaseTunerLayer) for m in base.denoiser.modules())


def test_relearning_says_after_how_many_steps_the_concept_is_back(base: Base) -> None:
    looks = []

    def sees(pictures: Pictures) -> list[bool]:
        looks.append(len(pictures))
        return [len(looks) > 1, len(looks) > 3]

    stop = Stop(sees, replace(CATS, seeds=[7, 8]), every=2)
    examples = examples_of(base).asking("cat")
    found = relearning(base, examples, CATS, stop=stop, training=replace(SHORT, steps=50))
    assert (found.details["steps"], found.details["back"], looks) == (6, True, [2] * 4)
    assert found.details["looks"] == [(0, 0), (2, 1), (4, 1), (6, 2)]
    assert found.passes == 3 * 6 * SHORT.batch_size + (4 + 1) * DRAWN
    short = relearning(base, examples, CATS, stop=replace(stop, sees=never), training=replace(SHORT, steps=3))
    assert (short.details["steps"], short.details["back"]) == (3, False)
    assert short.details["looks"] == [(0, 0), (2, 0), (3, 0)]
    looks.clear()
    sooner = relearning(base, examples, CATS, stop=replace(stop, enough=1), training=replace(SHORT, steps=50))
    assert (sooner.details["steps"], sooner.details["back"], len(looks)) == (2, True, 2)


@pytest.mark.parametrize(("counts", "kept"), [((0, 1, 0, 1, 0), 3), ((1, 0, 0, 0, 0), 0), ((0, 0, 0, 0, 0), 4)])
def test_what_an_attacker_trains_is_kept_as_it_was_at_its_best(base: Base, counts: tuple[int, ...], kept: int) -> None:
    """The pictures are those of a run that ends there: what is trained after the best look is of no use to an attacker."""
    training, examples = replace(SHORT, steps=4, lr=0.05), examples_of(base)

    def run(steps: int, look: Iterator[int]) -> list[Attack]:
        def sees(pictures: Pictures) -> list[bool]:
            return [i < n for n in [next(look)] for i in range(len(pictures))]

        how: dict[str, Any] = {"training": replace(training, steps=steps)}
        named, soft = Stop(sees, replace(CATS, seeds=[7, 8]), every=1), Stop(sees, BLANKS, every=1)
        relearned = relearning(base, examples.asking("cat"), CATS, stop=named, **how)
        return [relearned, inversion(base, examples, BLANKS, stop=soft, **how)]

    found, ended = run(4, itertools.cycle(counts)), run(kept, itertools.repeat(0)) if kept else None
    for i, attack in enumerate(found):
        assert (attack.details["steps"], attack.details["kept"], attack.details["back"]) == (4, kept, False)
        if ended:
            assert equal(attack.pictures, ended[i].pictures)
    if not ended:
        assert equal(found[0].pictures, CATS.draw(base))


# ---- words found by gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_prefix_is_made_of_words_that_come_back_from_the_tokenizer(kind: str) -> None:
    base = tiny(kind)
    state, pictures = state_of(base), CATS.draw(base)
    found = prefix_search(base, CATS, pictures, sees=never, tokens=3, times=2, steps=3)
    tokenizer, vocabulary = base.pipe.tokenizer, vocabulary_of(base)
    for words in found.details["words"]:
        ids = tokenizer(words, add_special_tokens=False).input_ids
        assert len(ids) == 3
        assert set(ids) <= set(vocabulary.ids[0].tolist())
        assert tokenizer.decode(ids).split() == words.split()
    prompts = [f"{words} {p}" for words, p in zip(found.details["words"], CATS.prompts, strict=True)]
    assert equal(found.pictures, replace(CATS, prompts=prompts, batch_size=1).draw(base))
    assert (found.details["found"], found.details["tries"]) == ([False, False], [2, 2])
    assert found.passes == 2 * (2 * 3 * 3) + 2 * DRAWN
    assert unchanged(base, state)
    again = prefix_search(base, CATS, pictures, sees=never, tokens=3, times=2, steps=3)
    assert again.details == found.details


def test_a_prefix_search_ends_with_the_first_success(erased: Base) -> None:
    shown: list[Pictures] = []

    def sees(pictures: Pictures) -> list[bool]:
        shown.append(pictures)
        return [len(shown) in (2, 3)]

    found = prefix_search(erased, CATS, CATS.draw(erased), sees=sees, tokens=1, times=3, steps=1)
    assert (found.details["found"], found.details["tries"]) == ([True, True], [2, 1])
    assert equal(found.pictures, shown[1] + shown[2])


def test_a_prefix_search_finds_words_that_lower_the_loss(base: Base) -> None:
    """Of all letters before a prompt, those found are among the better third on the average of three searches.

    The network listens to words more than a random one does, and nearly in proportion: what a gradient can follow.
    """
    base.pipe.text_encoder.get_submodule("embeddings.position_embedding").weight *= 10
    for name in base.denoiser.named_modules():
        if name[0].endswith("attn2.to_v"):
            name[1].weight *= 5
    asked = Drawing(["a cat"], [1], steps=1)
    target = generate(base, ["zebra"], [5], steps=STEPS)
    z, words = latents_of(base, target), vocabulary_of(base).words
    noise = torch.randn(64, *z.shape[1:], generator=torch.Generator().manual_seed(1))
    x_t, t, eps = noised(base.scheduler, z.expand(64, -1, -1, -1), noise, level=torch.full((64,), 0.5))
    with torch.no_grad():
        conditions = [base.encode([f"{w} a cat"]).expand(64) for w in words]
        losses = [(base.predict(x_t, t, c) - eps).square().mean().item() for c in conditions]
    best = [words[i] for i in np.argsort(losses)]
    how: dict[str, Any] = {"sees": never, "tokens": 1, "times": 1, "steps": 30}
    found = [prefix_search(base, asked, target, seed=s, **how).details["words"][0] for s in (0, 1, 2)]
    assert sum(map(best.index, found)) / 3 < len(words) / 3


def test_the_projection_on_the_simplex_is_the_nearest_point() -> None:
    """Against bisection for the θ of max(p − θ, 0), in float64."""
    p = torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = p.min(-1, keepdim=True).values - 1, p.max(-1, keepdim=True).values
    for _ in range(80):
        middle = (low + high) / 2
        over = (p - middle).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    found = on_simplex(p)
    torch.testing.assert_close(found, (p - low).clamp(min=0), rtol=0, atol=1e-12)  # float64 sums of 30 numbers
    torch.testing.assert_close(on_simplex(found), found, rtol=0, atol=1e-12)


# ---- what is refused ----------------------------------------------------------------------------------------------


def bad_inputs(base: Base, patch: Patch) -> dict[str, tuple[type[EsdLoraError], str, Callable[[], object]]]:
    """What the message must name, and the attempt; the base is bare."""
    long = "a very long prompt {}"
    pictures = CATS.draw(base)
    examples = Examples(BLANKS.prompts, pictures)
    named, stop = examples.asking("cat"), Stop(never, CATS)
    return {
        "seeds": (RecipeError, "got 1 and 2", lambda: Drawing(["a"], [1, 2])),
        "no prompts": (RecipeError, "got 0 and 0", lambda: Drawing([], [])),
        "steps": (RecipeError, "steps", lambda: replace(CATS, steps=0)),
        "pictures": (RecipeError, "got 2 and 1", lambda: Examples(["a", "b"], pictures[:1])),
        "every": (RecipeError, "every", lambda: Stop(never, CATS, every=0)),
        "enough": (RecipeError, "enough", lambda: Stop(never, CATS, enough=0)),
        "lr": (RecipeError, "lr", lambda: Training(1, lr=float("nan"))),
        "blank left": (RecipeError, "'a {}'", lambda: seed_search(base, BLANKS)),
        "blank left, ring": (RecipeError, "'a {}'", lambda: ring_a_bell(base, BLANKS, pairs=[("a", "b")], eta=1)),
        "blank left, relearning": (RecipeError, "'a {}'", lambda: relearning(base, examples, CATS, stop=stop)),
        "blank left, prefix": (RecipeError, "'a {}'", lambda: prefix_search(base, BLANKS, pictures, sees=never)),
        "no blank": (RecipeError, "'a cat'", lambda: paraphrase(base, CATS, "cat")),
        "no blank, words": (RecipeError, "'a cat'", lambda: random_words(base, CATS)),
        "no blank, inversion": (RecipeError, "'a cat'", lambda: inversion(base, named, BLANKS)),
        "words": (RecipeError, "from 1 to 26", lambda: random_words(base, BLANKS, tokens=27)),
        "tokens": (RecipeError, "tokens", lambda: random_embeddings(base, BLANKS, tokens=0)),
        "long": (RecipeError, "16 tokens", lambda: random_embeddings(base, Drawing([long], [1]))),
        "longer than a prompt": (RecipeError, "16 tokens", lambda: random_embeddings(base, BLANKS, tokens=20)),
        "long example": (
            RecipeError,
            "16 tokens",
            lambda: inversion(base, replace(examples, prompts=[long] * 2), BLANKS),
        ),
        "no pairs": (RecipeError, "pairs", lambda: ring_a_bell(base, CATS, pairs=[], eta=1)),
        "k": (RecipeError, "from 0 to the 3 steps", lambda: completion(base, CATS, k=4, unerased=base)),
        "bare, completion": (PatchError, "unerased", lambda: completion(base, CATS, k=1)),
        "family": (BaseModelError, "stable-diffusion-xl", lambda: completion(base, CATS, k=1, unerased=tiny("xl"))),
        "prediction": (
            BaseModelError,
            "has prediction_type v_prediction, and",
            lambda: completion(base, CATS, k=1, unerased=tiny("v_prediction")),
        ),
        "dtype": (
            BaseModelError,
            "has dtype torch.bfloat16, and",
            lambda: completion(base, CATS, k=1, unerased=half()),
        ),
        "more steps than there are": (
            RecipeError,
            "steps: ",
            lambda: ring_a_bell(consistency(), replace(CATS, steps=60), pairs=[("a", "b")], eta=1),
        ),
        "more steps, completion": (
            RecipeError,
            "steps: ",
            lambda: completion(consistency(), replace(CATS, steps=60), k=1, unerased=consistency()),
        ),
        "bare, scaling": (PatchError, "unmerging", lambda: scaling(base, CATS, weight=0)),
        "rank": (RecipeError, "rank", lambda: relearning(base, named, CATS, stop=stop, rank=0)),
        "rank too high": (RecipeError, "rank", lambda: relearning(base, named, CATS, stop=stop, rank=1000)),
        "unmerging weight": (PatchError, "finite", lambda: unmerging(base, CATS, [patch], [float("inf")])),
        "unmerging weights": (PatchError, "1 patches and 2", lambda: unmerging(base, CATS, [patch], [1.0, 1.0])),
        "no picture": (RecipeError, "got 2 and 1", lambda: prefix_search(base, CATS, pictures[:1], sees=never)),
        "times": (RecipeError, "times", lambda: prefix_search(base, CATS, pictures, sees=never, times=0)),
        "loss": (
            TrainingError,
            "step 2",
            lambda: inversion(base, examples, BLANKS, training=Training(3, lr=float("inf"))),
        ),
    }


def test_every_bad_input_is_one_line_and_changes_nothing(base: Base, patch: Patch) -> None:
    state = state_of(base)
    for name, (kind, told, attempt) in bad_inputs(base, patch).items():
        with pytest.raises(kind) as caught:
            attempt()
        assert told in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert unchanged(base, state), name


def test_bad_inputs_of_an_attached_patch(erased: Base, patch: Patch) -> None:
    with pytest.raises(PatchError, match="attached"):
        unmerging(erased, CATS, [patch])
    with pytest.raises(PatchError, match="finite"):
        scaling(erased, CATS, weight=float("nan"))
    assert any(isinstance(m, BaseTunerLayer) for m in erased.denoiser.modules())


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_words_of_other_families_cannot_be_soft(kind: str) -> None:
    base = tiny(kind)
    with pytest.raises(BaseModelError, match=r"Stable Diffusion 1, 2 and XL$"):
        random_embeddings(base, BLANKS)
