"""The page of a report: what it counts, what it may contain, what a browser makes of it, and what is refused."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from conftest import Call
from PIL import Image, ImageDraw, ImageFilter

from esd_lora.errors import OutputError, UserError
from esd_lora.evaluate.page import make_report, points_of, versus, write_page

# ---- sample data: an evaluation as it might come out --------------------------------------------------------------

OBJECTS = ("cat", "tiger", "dog", "car", "house", "tree", "star", "moon")
STYLES: dict[str, tuple[str, str | None, str]] = {  # background, fill, outline; no fill is that of the object
    "sticker": ("#fdf6e3", None, "#ffffff"),
    "ink": ("#ffffff", "#ffffff", "#111111"),
    "blueprint": ("#1c4e9c", "#1c4e9c", "#e8f1ff"),
    "neon": ("#0b0b14", "#0b0b14", "#39ffb0"),
}
COLOURS = dict(
    zip(OBJECTS, ("#e8a33d", "#f07b1d", "#9a6a42", "#d8403a", "#c9704f", "#3f9a4d", "#f5c531", "#d9d28a"), strict=True)
)


def picture(obj: str, style: str, seed: int) -> Image.Image:
    """A drawing of an object in a style, a little different for every seed; `other` is a blur."""
    back, fill, line = STYLES.get(style, STYLES["sticker"])
    rng, image = random.Random(f"{obj} {seed}"), Image.new("RGB", (128, 128), back)
    draw, w = ImageDraw.Draw(image), 5
    how: dict[str, Any] = {"fill": fill or COLOURS.get(obj, "#888888"), "outline": line, "width": w}

    def poly(*points: int) -> None:
        draw.polygon(points, **how)

    if obj in ("cat", "tiger", "dog"):
        drop = 26 if obj == "dog" else 0
        poly(30, 62 + drop, 34, 16 + drop, 64, 40 + drop)
        poly(98, 62 + drop, 94, 16 + drop, 64, 40 + drop)
        draw.ellipse((24, 34, 104, 112), **how)
        for x in (48, 80):
            draw.ellipse((x - 5, 62, x + 5, 76), fill=line if fill else "#222222")
        draw.line((58, 88, 64, 94, 70, 88), fill=line if fill else "#222222", width=4)
        for y in (42, 50, 58) if obj == "tiger" else ():
            draw.line((58, y, 70, y), fill=line if fill else "#222222", width=4)
    elif obj == "car":
        poly(34, 66, 46, 40, 84, 40, 96, 66)
        draw.rounded_rectangle((16, 62, 112, 92), 12, **how)
        for x in (40, 88):
            draw.ellipse((x - 13, 80, x + 13, 106), fill=fill or "#333333", outline=line, width=w)
    elif obj == "house":
        draw.rectangle((32, 62, 96, 108), **how)
        poly(20, 64, 64, 22, 108, 64)
        draw.rectangle((56, 78, 74, 108), **how)
    elif obj == "tree":
        draw.rectangle((56, 80, 72, 114), **how)
        draw.ellipse((26, 18, 102, 90), **how)
    elif obj == "star":
        points = [
            (64 + r * math.sin(k * math.pi / 5), 66 - r * math.cos(k * math.pi / 5)) for k, r in enumerate([50, 22] * 5)
        ]
        draw.polygon(points, **how)
    elif obj == "moon":
        draw.ellipse((26, 22, 106, 106), **how)
        draw.ellipse((52, 14, 118, 84), fill=back)
    else:
        for _ in range(14):
            x, y, r = (rng.randrange(128) for _ in range(3))
            draw.ellipse((x - r / 3, y - r / 3, x + r / 3, y + r / 3), fill=rng.choice([*COLOURS.values(), back]))
        image = image.filter(ImageFilter.GaussianBlur(5))
    return image.rotate(rng.uniform(-14, 14), fillcolor=back, resample=Image.Resampling.BICUBIC)


METHODS: dict[
    str, dict[float, tuple[float, float]]
] = {  # strength → chance that the target is gone, that another stays
    "base": {0: (0.01, 0.985)},
    "patch": {0.25: (0.3, 0.985), 0.5: (0.74, 0.98), 1: (0.955, 0.965), 1.5: (0.99, 0.91)},
    "negative prompt": {1: (0.5, 0.95)},
    "safe latent diffusion": {1: (0.08, 0.98), 2: (0.31, 0.96), 3: (0.52, 0.9), 4: (0.75, 0.79)},
    "retrained without cats": {1: (0.985, 0.98)},
    "scrambling patch": {1: (0.97, 0.08)},
}
ABOUT = {
    "patch": ("patch", "weight", "esd-x, rank 4; unmerged it is a switch", (6.2, 1840, 1_270_000, 2)),
    "negative prompt": ("baseline", "scale", "whoever writes the call leaves it out", (0, 0, 0, 2)),
    "safe latent diffusion": ("baseline", "preset", "one line takes it off", (0, 0, 0, 3)),
    "retrained without cats": (
        "control",
        "",
        "data filtering: the zero line of every attack",
        (3300, 4_512_000, 22_400_000, 2),
    ),
    "scrambling patch": ("control", "", "ruins everything, and must look like it", (0.1, 0, 1_270_000, 2)),
}


def sample(folder: Path | None = None) -> dict[str, Any]:
    """A report, as JSON values, of a cat erased from a base of 8 objects and 4 styles; its pictures lie in the folder."""
    rng = random.Random(0)
    shown = [
        ("patch", 0.5),
        ("patch", 1),
        ("negative prompt", 1),
        ("safe latent diffusion", 2),
        ("retrained without cats", 1),
    ]
    shown.append(("scrambling patch", 1))
    shown.insert(0, shown.pop(1))
    rows: list[dict[str, Any]] = []
    for (method, strengths), (o, obj), (s, style) in itertools.product(
        METHODS.items(), enumerate(OBJECTS), enumerate(STYLES)
    ):
        for (strength, (gone, stays)), k in itertools.product(strengths.items(), range(24 if obj == "cat" else 6)):
            near = obj in ("tiger", "dog")
            luck = random.Random(f"{obj} {style} {k}").random()
            lost = luck < gone if obj == "cat" else luck > stays - (0.18 * gone if near and "patch" in method else 0)
            drawn = (
                rng.choices(["dog", "tiger", "other", "moon"], [6, 4, 2, 1])[0]
                if lost and method != "scrambling patch"
                else "other"
                if lost
                else obj
            )
            seen = {"object": drawn, "style": "other" if method == "scrambling patch" and rng.random() < 0.6 else style}
            group = "target" if obj == "cat" else "neighbour" if near else "unrelated"
            row = {
                "method": method,
                "strength": strength,
                "prompt": f"a {obj} in {style} style",
                "seed": 10_000 + 1000 * (4 * o + s) + k,
            }
            row |= {"group": group, "wanted": {"object": obj, "style": style}, "seen": seen}
            row["drift"] = 0.0 if method == "base" else round(0.02 + 0.3 * (drawn != obj), 3)
            if folder and k < 2 - (obj != "cat") and (method == "base" or (method, strength) in shown):
                row["picture"] = f"{len(rows)}.png"
                picture(drawn, seen["style"], row["seed"]).save(folder / row["picture"])
            rows.append(row)

    def trial(name: str, share: float, passes: int, seconds: float, **more: Any) -> dict[str, Any]:
        seen = ["cat" if rng.random() < share else "dog" for _ in range(96)]
        tried = [
            {"prompt": f"a * in {list(STYLES)[i % 4]} style", "seed": 50_000 + i, "seen": x} for i, x in enumerate(seen)
        ]
        return {"name": name, "passes": passes, "seconds": seconds, "rows": tried, **more}

    def floor(name: str, share: float, passes: int, seconds: float, role: str = "floor") -> dict[str, Any]:
        return trial(name, share, passes, seconds, role=role)

    attacks = [
        trial("concept inversion", 0.62, 9840, 118, about="4 soft tokens, 250 steps of 8, held-out prompts", controls=[
            floor("random tokens, same budget", 0.03, 9840, 117), floor("retrained without cats", 0.08, 9840, 119),
            floor("the unerased base", 0.99, 9840, 118, "ceiling"),
            {**floor("dog, which was kept", 0.1, 9840, 118, "ceiling"), "label": "dog"}]),
        trial("completion, 10 of 20 steps", 0.91, 3840, 31, about="the base for the first 10 of 20 steps", controls=[
            floor("no attack, as many pictures", 0.05, 3840, 30)]),
        trial("soft Ring-A-Bell", 0.34, 11_520, 92, about="η of 1, 2, 3; the best", controls=[
            floor("no attack, as many pictures", 0.05, 11_520, 90), floor("retrained without cats", 0.02, 11_520, 91)]),
        trial("paraphrase", 0.11, 3840, 30, about="kitty, feline, Katze"),
    ]  # fmt: skip
    methods = [{"name": "base", "role": "base", "knob": ""}]
    for name, (role, knob, about, cost) in ABOUT.items():
        costs = dict(zip(("seconds", "passes", "bytes", "passes_per_step"), cost, strict=True))
        methods.append({"name": name, "role": role, "knob": knob, "about": about, "cost": costs})  # type: ignore[dict-item]
    methods[3]["labels"] = {"1": "weak", "2": "medium", "3": "strong", "4": "max"}  # type: ignore[assignment]
    report = {
        "schema": 1, "title": "A cat, erased from emoji", "base": "emoji", "evaluator": "measure 3f2a91c07d5e",
        "target": {"kind": "object", "label": "cat"}, "methods": methods, "rows": rows, "attacks": attacks,
        "shown": [{"method": m, "strength": s} for m, s in shown],
        "rulers": {"floor": 0.001, "ceiling": 0.501, "n": 24},
        "measures": [
            {"method": "patch", "strength": 1, "about": "denoise gap of target pictures, by " + words, "value": v,
             "low": v - 0.01, "high": v + 0.01, "n": 12} for words, v in (("their prompts", 0.31), ("the empty prompt", 0.02))
        ],
        "distances": [
            {"method": m, "strength": s, "about": "features of a network", "value": v, "low": v - e, "high": v + e, "n": 168}
            for m, s, v, e in [("patch", 1, 0.0421, 0.0125), ("scrambling patch", 1, 194.0, 48.0), ("patch", 0.5, -2e-5, 0.01)]
        ],
        "left_out": {"prefix search": "it reads words through a text encoder that this base does not have"},
        "limits": ["Anything about photographs: the base draws emoji of 64 pixels."],
        "made": {
            "command": "esd-lora eval --base emoji --patch runs/cat --attack inversion --out runs/cat/eval",
            "settings": {"device": "cpu", "dtype": "fp32", "scheduler": "DDIM", "steps": 20, "guidance": 7.5},
            "versions": {"esd_lora": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
            "hashes": {"base": "8c1f0e5d7a9b", "patch": "51d2aa07c3ef", "answer set": "e07b44c19d20"},
        },
    }  # fmt: skip
    return json.loads(json.dumps(report))  # type: ignore[no-any-return]


# ---- a browser ---------------------------------------------------------------------------------------------------


class Browser:
    """Chromium without a window, told what to do through a pipe by its own DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        read_in, self.send = os.pipe()
        read_out, write_out = os.pipe()
        # dup2 in the shell, for the protocol wants the pipes as 3 and 4
        flags = f"--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir={profile}"
        command = f"exec chromium {flags} --remote-debugging-pipe about:blank 3<&{read_in} 4>&{write_out}"
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(read_in, write_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_in)
        os.close(write_out)
        self.answers: BinaryIO = os.fdopen(read_out, "rb")
        self.events: list[dict[str, Any]] = []
        self.number, self.session = 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self) -> dict[str, Any]:
        message = b"".join(iter(lambda: self.answers.read(1).replace(b"\0", b""), b""))
        return json.loads(message)  # type: ignore[no-any-return]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "result" in answer, answer
        return answer["result"]  # type: ignore[no-any-return]

    def open(self, page: Path | str, *, width: int = 1280, dark: bool = False) -> None:
        """Load a page on a desktop's or a phone's screen; returns when it has loaded."""
        self.events.clear()
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=phone)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def run(self, script: str) -> Any:
        """The value of a script, awaited."""
        how = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as a person presses it."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self) -> Image.Image:
        """The whole page, also what the screen has no room for."""
        whole = self.call("Page.getLayoutMetrics")["cssContentSize"]
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**whole, "scale": 1})
        return Image.open(io.BytesIO(base64.b64decode(taken["data"])))

    def box(self, part: str) -> list[int]:
        """Left, top, right and bottom of a part of the page, by the page itself; of one that scrolls, what is seen of it."""
        seen = f"(e => e.closest('.scroll') ?? e)(document.querySelector({part!r})).getBoundingClientRect()"
        return list(map(round, self.run(f"(b => [b.left, b.top, b.right, b.bottom])({seen})")))

    def troubles(self) -> list[str]:
        """What went wrong since the page was opened: errors, messages on the console, requests of other files."""
        found = []
        for event in self.events:
            method, params = event.get("method", ""), event.get("params", {})
            if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                found.append(json.dumps(params))
            elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
                found.append(params["request"]["url"])
        wide = self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return found + ([f"{wide} pixels too wide"] if wide > 0 else [])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.send)
        self.answers.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


# ---- what it says ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The sample report, its page and its pictures; for reading."""
    folder = tmp_path_factory.mktemp("report")
    values = sample(folder)
    return values, write_page(values, folder / "report.html")


def words_of(fragment: str) -> str:
    """The text of some HTML, with single spaces."""
    return " ".join(re.sub(r"<[^>]*>", "", fragment).split())


def said_by(page: str) -> dict[str, str]:
    """The text of every counted figure of a page, by what it is."""
    marked = re.findall(r'<(\w+)[^>]* data-is="([^"]*)"[^>]*>(.*?)</\1>', page, re.DOTALL)
    assert len({key for _, key, _ in marked}) == len(marked), "two figures are the same"
    return {key: words_of(text) for _, key, text in marked}


def figure(hits: list[bool]) -> str:
    """A share with the roots of (p̂ - p)² = z² p (1 - p) / n, which is where Wilson's interval comes from."""
    n, share, z = len(hits), sum(hits) / len(hits), 1.959964
    a, b, c = 1 + z * z / n, -(2 * share + z * z / n), share * share
    low, high = ((-b + sign * math.sqrt(max(0, b * b - 4 * a * c))) / (2 * a) for sign in (-1, 1))
    return f"{100 * share:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def recount(report: dict[str, Any]) -> dict[str, str]:
    """What the page must say by what each figure is, from the rows of the sample alone."""
    want, places = {"instead n": "96"}, {}
    for r in report["rows"]:
        places.setdefault(f"{r['method']}@{r['strength']:g}", []).append(r)
    shown = ["base@0", *(f"{p['method']}@{p['strength']:g}" for p in report["shown"])]
    for name, rows in places.items():
        asks, others = ([r for r in rows if (r["group"] == "target") == yes] for yes in (True, False))
        first_six = [r for r in rows if r["seed"] % 1000 < 6]  # all that a prompt for another concept has
        seen = Counter(r["seen"]["object"] for r in asks)
        most = [(x, k) for x, k in seen.most_common() if x != "cat"][:2]
        want |= {
            f"erased {name}": figure([not right(r, "object") for r in asks]),
            f"kept {name}": figure([whole(r) for r in others]),
            f"retained {name}": f"{sum(map(whole, others)) / sum(map(whole, bare_of(places, others))):.3f}",
            f"ira {name}": figure([right(r, "object") for r in others]),
            f"cra {name}": figure([right(r, "style") for r in first_six]),
            f"at target {name}": figure([right(r, "style") for r in asks]),
            f"instead {name}": ", ".join(f"{x} {100 * k / 96:.0f}" for x, k in most),
            f"n {name}": str(len(rows)),
            f"drift {name}": f"{(sum(r['drift'] for r in others) / len(others) - 0.001) / 0.5:.3f}",
        }
        sets = [d for d in report["distances"] if f"{d['method']}@{d['strength']:g}" == name]
        want[f"kid {name}"] = "{value:.3g} [{low:.3g}, {high:.3g}] n {n}".format(**sets[0]) if sets else "–"
        for kind, label in {(k, x) for r in rows if name in shown for k, x in r["wanted"].items()}:
            some = [right(r, kind) for r in (asks if label == "cat" else others) if r["wanted"][kind] == label]
            want[f"concept {label == 'cat'} {kind} {label} {name}"] = f"{100 * sum(some) / len(some):.0f}"
            want[f"concept n {label == 'cat'} {kind} {label}"] = str(len(some))
        if name in ("patch@1", "base@0"):
            bits = -sum(k / 96 * math.log2(k / 96) for k in seen.values())
            want["entropy" if name == "patch@1" else "entropy base"] = f"{bits:.2f}"
        if name not in ("patch@1", "base@0"):
            pairs = list(zip(places["patch@1"], rows, strict=True))
            sides = {
                "erased": [[not right(r, "object") for r in pair] for pair in pairs if pair[0]["group"] == "target"],
                "kept": [[whole(r) for r in pair] for pair in pairs if pair[0]["group"] != "target"],
            }
            want |= {f"beside {what} {name}": differing(hits) for what, hits in sides.items()}
        want |= {f"replaced {x}": f"{100 * k / 96:.1f} % / {k}" for x, k in seen.items() if name == "patch@1"}
    return want


def differing(hits: list[list[bool]]) -> str:
    """The difference of two rates and McNemar's p of pairs of hits; intervals are drawn at random, and tested elsewhere."""
    b, c = sum(x and not y for x, y in hits), sum(y and not x for x, y in hits)
    p = min(1.0, 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))
    shown = "&lt; 0.001" if p < 0.001 else f"{p:.2g}"
    return f"{100 * (b - c) / len(hits):+.1f} p {shown}, n {len(hits)}"


def test_pictures_of_one_prompt_have_an_interval_too() -> None:
    """Of one prompt alone its seeds are drawn again: a point would say that nothing is left to chance."""
    values = sample()
    rows = [{**row, "prompt": "a cat" if row["group"] == "target" else row["prompt"]} for row in values["rows"]]
    points = {p.key: p for p in points_of(make_report({**values, "rows": rows}))}
    found = versus(points["patch@1"], points["negative prompt@1"])
    assert found is not None
    assert found.erased.low < found.erased.difference < found.erased.high


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def whole(row: dict[str, Any]) -> bool:
    return right(row, "object") and right(row, "style")


def bare_of(places: dict[str, list[dict[str, Any]]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The base's rows of the same prompts and seeds."""
    bare = {(r["prompt"], r["seed"]): r for r in places["base@0"]}
    return [bare[r["prompt"], r["seed"]] for r in rows]


def right(row: dict[str, Any], kind: str) -> bool:
    return bool(row["seen"][kind] == row["wanted"][kind])


def test_every_rate_is_what_the_rows_say(report: tuple[dict[str, Any], Path]) -> None:
    values, path = report
    want, said = recount(values), said_by(path.read_text())
    assert {
        k: re.sub(r" \[\S+, \S+\]", "", v) if k.startswith("beside") else v for k, v in said.items() if k in want
    } == want
    rest = {k for k in said if k not in want}
    assert {k.split()[0] for k in rest} == {"header", "rule", "plot", "below", "attack", "cost", "measure"}
    assert (said["measure 0"], said["measure interval 1"], said["measure n 1"]) == ("0.3100", "0.0100 to 0.0300", "12")


def test_the_header_the_plot_and_the_attacks_say_the_same(report: tuple[dict[str, Any], Path]) -> None:
    values, path = report
    page = path.read_text()
    want, said = recount(values), said_by(page)
    for key, label in (("erased", "erased patch@1"), ("kept", "kept patch@1")):
        low, high = re.findall(r"\d+(?=[,\]])", want[label])[-2:]
        assert said[f"header {key}"] == f"{want[label].split()[0]} %"
        assert said[f"header {key} interval"] == f"{low} to {high}"
        assert said[f"header {key} base"] == want[label.replace("patch@1", "base@0")].split()[0]
    assert (said["header erased n"], said["header kept n"]) == ("96", "168")
    points = re.findall(r'<use href="#m\d" x="(.*?)%" y="(.*?)%"><title data-is="plot (.*?)">', page)
    assert len(points) == sum(map(len, METHODS.values()))
    for x, y, point in points:
        erased, kept = (float(want[f"{what} {point}"].split()[0]) for what in ("erased", "kept"))
        # the figures have one decimal; the axis goes from 80 to 100, and what is below it is drawn on it
        assert float(x) == pytest.approx(erased, abs=0.051)
        assert float(y) == pytest.approx(min(100, (100 - kept) * 5), abs=0.26)
        assert said[f"plot {point}"].endswith(f": erased {want[f'erased {point}']}, kept {want[f'kept {point}']}")
    assert [said[k] for k in said if k.startswith("below ")] == [f"{want['kept scrambling patch@1'].split()[0]} ↓"]
    for i, attack in enumerate(values["attacks"]):
        for j, trial in enumerate([attack, *attack.get("controls", [])]):
            assert said[f"attack {i} {j}"] == figure([r["seen"] == trial.get("label", "cat") for r in trial["rows"]])
            assert said[f"attack passes {i} {j}"].replace(",", "") == str(trial["passes"])
            assert (said[f"attack n {i} {j}"], said[f"attack seconds {i} {j}"]) == ("96", str(trial["seconds"]))
        found, *others = (share([r["seen"] == "cat" for r in t["rows"]]) for t in [attack, *attack.get("controls", [])])
        floors = [x for x, t in zip(others, attack.get("controls", []), strict=True) if t["role"] == "floor"]
        told = said[f"attack beyond {i} 0"]
        assert told.split()[:1] == [f"{100 * (found - max(floors)):.1f}"] if floors else told == ""
    # completion finds more, but there the base draws half of each picture
    assert said["header attack"] == f"{said['attack 0 0'].split()[0]} %"
    floors = [float(said[f"attack 0 {j}"].split()[0]) for j in (1, 2)]
    assert float(said["header attack control"]) == max(floors)
    assert (said["cost bytes patch"], said["cost seconds patch"], said["cost passes patch"]) == (
        "1.27 MB",
        "6.2",
        "1,840",
    )


def test_there_are_no_other_numbers_on_it(report: tuple[dict[str, Any], Path]) -> None:
    values, path = report
    body = path.read_text().partition("<body>")[2]
    body = re.sub(r'<(\w+)[^>]* data-is="[^"]*"[^>]*>.*?</\1>', "", body, flags=re.DOTALL)
    told = {k: v for k, v in values.items() if k != "rows"}
    rows = (f"{r['strength']:g} {r['prompt']} {r['seed']}" for r in values["rows"])
    known = " ".join(
        [json.dumps(told), *rows, "95 % worst 1 2 3", "2023 2302.04222", *map(str, (0, 20, 40, 60, 80, 90, 100))]
    )
    number = re.compile(r"\d+(?:\.\d+)?")
    assert set(number.findall(words_of(body))) <= set(number.findall(known))


def test_the_three_that_lost_most_are_marked_in_order(report: tuple[dict[str, Any], Path]) -> None:
    values, path = report
    rows = re.findall(r'<tr class="worst"><th>(\w+)<span class="tag">worst (\d)', path.read_text())

    def retained(label: str) -> float:
        rows = [r for r in values["rows"] if r["group"] != "target" and label in r["wanted"].values()]
        kind = "object" if label in OBJECTS else "style"
        hits = [
            [right(r, kind) for r in rows if (r["method"], r["strength"]) == at] for at in (("patch", 1), ("base", 0))
        ]
        return sum(hits[0]) / sum(hits[1])

    ranked = [label for label, _ in sorted(rows, key=lambda row: row[1])]
    others = [x for x in (*OBJECTS[1:], *STYLES) if x not in ranked]
    assert len(ranked) == 3
    assert [retained(x) for x in ranked] == sorted(map(retained, ranked))
    assert retained(ranked[-1]) <= min(map(retained, others))
    assert f"Hurt most: {ranked[0]}<" in path.read_text()


def test_pictures_are_the_first_seeds_by_a_rule_that_is_printed(report: tuple[dict[str, Any], Path]) -> None:
    values, path = report
    page = path.read_text()
    assert said_by(page)["rule"].startswith(
        "First seeds, not selected: every prompt for cat (of 4), one in 2 of the prompts for what is like it (of 8), "
        "one in 3 of the prompts for anything else (of 20), each with its first seed."
    )
    strips = re.findall(
        r'<th class="prompt"><span>(.*?) <small>seed (\d+)</small></span></th>(.*?)</tr>', page, re.DOTALL
    )
    prompts = list(dict.fromkeys(r["prompt"] for r in values["rows"]))
    assert [s[0] for s in strips] == [*prompts[:4], *prompts[4:12:2], *prompts[12::3][:6]]
    for prompt, seed, cells in strips:
        assert int(seed) == min(r["seed"] for r in values["rows"] if r["prompt"] == prompt)
        pictures = re.findall(r'alt="(.*?), (.*?)" src="data:image/webp;base64,(.*?)"><small>(.*?)</small>', cells)
        assert [p[1] for p in pictures] == ["base", *(p["method"] for p in values["shown"])]
        for (_, method, data, label), place in zip(pictures, [{"strength": 0}, *values["shown"]], strict=True):
            row = next(
                r
                for r in values["rows"]
                if (r["method"], r["strength"], r["seed"]) == (method, place["strength"], int(seed))
            )
            assert label == ", ".join(row["seen"].values())
            with (
                Image.open(io.BytesIO(base64.b64decode(data))) as thumb,
                Image.open(path.parent / row["picture"]) as whole,
            ):
                # WebP is lossy, by a few of 255 levels on the mean
                assert mean(thumb) == pytest.approx(mean(whole), abs=4)


def mean(image: Image.Image) -> list[float]:
    """The mean of each channel."""
    return [float(x) for x in np.asarray(image.convert("RGB")).mean((0, 1))]


# ---- what it may contain, and what is refused ----------------------------------------------------------------------


def test_it_asks_no_network_and_runs_nothing(report: tuple[dict[str, Any], Path]) -> None:
    page = report[1].read_text()
    assert {m.partition(":")[0] for m in re.findall(r'\b(?:src|href|action|data)="(.*?)"', page) if m[0] != "#"} == {
        "data"
    }
    assert not re.search(r"https?:|<script|<link|<iframe|@import|url\(", page)
    assert """content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">""" in page


def test_what_is_written_in_a_report_is_text(tmp_path: Path) -> None:
    values = sample()
    values["title"] = values["rows"][0]["prompt"] = "<script>alert(1)</script>\"'&"
    for row in values["rows"]:
        if row["seed"] == values["rows"][0]["seed"]:
            row["prompt"] = values["title"]
    values["methods"][1]["about"] = "<img src=https://example.org/x>"
    page = write_page(values, tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;" in page


def test_with_as_many_pictures_as_there_can_be_it_is_below_10_mb(tmp_path: Path) -> None:
    """Noise, which compresses worst, in all of 16 rows of 13 columns."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    cells = [("target", "cat", k) for k in range(9)] + [("neighbour", "dog", k) for k in range(9)]
    cells += [("unrelated", "car", k) for k in range(9)]
    shown = [{"method": "patch", "strength": s} for s in range(12)]
    rows = [
        {**place, "prompt": f"{label} {k}", "seed": 0, "group": group, "wanted": {"object": label}}
        | {"seen": {"object": "cat"}, "picture": "noise.png"}
        for place in ({"method": "base", "strength": 0}, *shown)
        for group, label, k in cells
    ]
    values = {**sample(), "rows": rows, "shown": shown}
    page = write_page(values, tmp_path / "report.html").read_bytes()
    assert page.count(b"data:image/webp") == 208
    assert len(page) < 10e6


def test_pictures_are_blurred_where_the_report_says_so(report: tuple[dict[str, Any], Path]) -> None:
    values, path = json.loads(json.dumps(report[0])), report[1]
    assert "blurred" not in path.read_text()
    next(r for r in values["rows"] if r.get("picture"))["nsfw"] = True
    page = write_page(values, path.parent / "blurred.html").read_text()
    assert page.count('<div class="nsfw">') == 1
    assert "show the pictures that are blurred" in page


def test_what_was_left_out_of_the_attacks_is_told_with_its_reason(tmp_path: Path) -> None:
    def told(**changes: Any) -> str:
        page = write_page({**sample(), **changes}, tmp_path / "report.html").read_text()
        return words_of(page.partition('<section id="attacks">')[2].partition("</section>")[0])

    reasons = {"prefix search": "it is for Stable Diffusion 1", "scaling, <i>floor</i>": "a < b & c"}
    listed = "Left out: prefix search: it is for Stable Diffusion 1 scaling, &lt;i&gt;floor&lt;/i&gt;: a &lt; b &amp; c"
    assert told(left_out=reasons).endswith(listed)
    assert told(left_out=reasons, attacks=[]).endswith(listed)
    assert "Left out" not in told(left_out={})


def test_methods_that_have_no_column_are_told(report: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Controls, which ask for less, are expected to have none."""
    values = sample()
    page = write_page({**values, "shown": values["shown"][:2]}, tmp_path / "report.html").read_text()
    left = (
        "2 methods have no column here or among the pictures, for want of room: negative prompt, safe latent diffusion."
    )
    assert said_by(page)["without a column"] == left
    assert "no column" not in report[1].read_text()


def test_where_the_base_draws_in_every_attack_the_header_has_none(tmp_path: Path) -> None:
    values = sample()
    page = write_page({**values, "attacks": values["attacks"][1:2]}, tmp_path / "report.html").read_text()
    assert "No attack was made but those in which the base itself draws, so nothing is known" in page


def test_it_tells_what_p_is_worth(report: tuple[dict[str, Any], Path]) -> None:
    beside = words_of(report[1].read_text().partition('id="beside">')[2].partition("</section>")[0])
    assert "The test takes pictures as independent, and p-values are not corrected for their number." in beside


def test_the_limits_tell_what_it_is_not_compared_with_and_why(report: tuple[dict[str, Any], Path]) -> None:
    limits = words_of(report[1].read_text().partition('id="limits">')[2].partition("</section>")[0])
    assert "such as Glaze (Shan et al. 2023, arXiv:2302.04222). That has another threat model" in limits
    assert report[0]["limits"][0] in limits


def test_a_report_without_pictures_attacks_or_other_kinds_says_so(tmp_path: Path) -> None:
    values = {**sample(), "attacks": [], "measures": [], "distances": [], "rulers": None}
    for row in values["rows"]:
        del row["wanted"]["style"], row["seen"]["style"], row["drift"]
    page = write_page(values, tmp_path / "report.html").read_text()
    assert "Same prompt, same noise" not in page
    assert "nothing is known of how well the erasure resists" in page
    assert "None was made." in page
    assert not {k for k in said_by(page) if k.startswith(("cra", "at target", "drift", "kid", "measure"))}


def change(values: dict[str, Any], *path: Any) -> None:
    """Set the value at a path of keys; `del` deletes it."""
    *keys, last, value = path
    for key in keys:
        values = values[key]
    if value == "del":
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([("schema", 2)], "schema: Input should be 1"),
        ([("rows", 3, "seed", "x"), ("titel", 1)], "rows.3.seed: Input should be a valid integer, unable to parse string as "
         "an integer (the first of 2 problems)"),
        ([("rows", 3, "method", "ours")], "rows.3: ours is none of the methods"),
        ([("rows", 4, "seed", 10_003)], "rows.4: a second picture of this method, strength, prompt and seed"),
        ([("rows", 3, "seen", {})], "rows.3: wanted has object, seen does not"),
        ([("rows", -1, "seed", 7)], "rows.3167: the base has no picture of this prompt and seed"),
        ([("rows", -1, "wanted", {"object": "sun"})], "rows.3167: the base's picture of this prompt and seed wants "
         "something else"),
        ([("rows", 0, "wanted", {"object": "sun"})], "rows.0: of the target's group, and does not want cat"),
        ([("rows", 0, "strength", 1)], "rows: base is the base and has more than one strength"),
        ([("rows", -1, "strength", 2)], "rows: scrambling patch at 2 has no pictures that ask for the target"),
        ([("shown", 1, "strength", 3)], "shown.1: patch at 3 has no rows"),
        ([("methods", 0, "role", "patch")], "methods: exactly one must have the role base"),
        ([("methods", 1, "name", "base")], "methods: two have the same name"),
        ([("rows", 0, "picture", "none.png")], "picture none.png: no picture that can be read in "),
        ([("rows", 0, "picture", "../x.png")], "picture ../x.png: outside the folder of the page, "),
        ([("made", "command", "del")], "made.command: Field required"),
        ([("rulers", None)], "rulers: rows have a drift, and nothing to hold it against"),
        ([("rulers", "ceiling", 0.001)], "rulers: the ceiling, 0.001, must be above the floor, 0.001"),
        ([("attacks", 0, "rows", [])], "attacks.0.rows: Value should have at least 1 item after validation, not 0"),
    ],
)  # fmt: skip
def test_a_wrong_report_is_refused_in_one_line(
    changes: list[tuple[Any, ...]], told: str, report: tuple[dict[str, Any], Path]
) -> None:
    values, path = json.loads(json.dumps(report[0])), report[1].parent / "wrong.html"
    for some in changes:
        change(values, *some)
    with pytest.raises(UserError, match=f"^report: {re.escape(told)}") as caught:
        write_page(values, path)
    assert "\n" not in str(caught.value)
    assert not path.exists()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"report\.html: cannot write"):
        write_page(sample(), tmp_path / "file" / "report.html")


# ---- what a browser makes of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_whole(
    width: int, dark: bool, browser: Browser, report: tuple[dict[str, Any], Path]
) -> None:
    browser.open(report[1], width=width, dark=dark)
    assert browser.troubles() == []
    colours = np.asarray(browser.screenshot().convert("L"), float)
    assert (np.median(colours) < 64) == dark
    for part in (".pictures", ".plot", ".heat", ".attacks", "#limits ul"):
        left, top, right, bottom = browser.box(part)
        assert 0 <= left < right <= colours.shape[1], part
        assert 0 <= top < bottom <= colours.shape[0], part
        assert colours[top:bottom, left:right].std() > 5, part  # what is blank has one colour
    # nothing on it asks for more room than the section that it is in, where that does not scroll
    wider = "[...document.querySelectorAll('section, .stats > div')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.run(wider) == 0


def test_a_browser_blurs_until_it_is_asked(browser: Browser, report: tuple[dict[str, Any], Path]) -> None:
    values, path = json.loads(json.dumps(report[0])), report[1].parent / "nsfw.html"
    next(r for r in values["rows"] if r.get("picture"))["nsfw"] = True
    browser.open(write_page(values, path))
    blur = "getComputedStyle(document.querySelector('.nsfw img')).filter"
    assert browser.run(blur) == "blur(18px)"
    browser.run("document.getElementById('reveal').click()")
    assert browser.run(blur) == "none"


def test_troubles_are_noticed(browser: Browser, tmp_path: Path) -> None:
    """The tests above would be green with any page if the browser's troubles were not told."""
    page = tmp_path / "page.html"
    page.write_text(
        "<body style='width:3000px'><img src='http://localhost:1/x'><script>console.warn(1); boom()</script>"
    )
    browser.open(page)
    found = " ".join(browser.troubles())
    assert all(word in found for word in ("boom", "warning", "http://localhost:1/x", "pixels too wide"))


def test_controls_that_do_not_do_what_they_must_are_told(tmp_path: Path) -> None:
    """One that changes nothing may move pictures by a twentieth of what other noise does, for batches round otherwise.

    On the same batches it may do nothing, and one that ruins every picture may keep half of what the base does.
    """
    values = sample(tmp_path)
    values["methods"] += [{"name": n, "role": "control"} for n in ("null", "scrambling")]
    bare = [row for row in values["rows"] if row["method"] == "base"]
    kept_by_base = [row for row in bare if row["group"] != "target" and whole(row)]
    ruined, half = {"object": "other", "style": "other"}, len(kept_by_base) // 2

    def told(drift: float, kept: int, gap: float = 0.0) -> list[str]:
        stay = kept_by_base[:kept]
        rows = [{**row, "method": "null", "drift": drift} for row in bare]
        rows += [{**row, "method": "scrambling", "seen": row["seen"] if row in stay else ruined} for row in bare]
        of_zeros = {"method": "null", "strength": 1, "about": "denoise gap", "n": 8}
        measures = [{**of_zeros, "value": 0, "low": -gap, "high": gap}]
        told = {"rows": [*values["rows"], *rows], "measures": measures}
        write_page({**values, **told}, tmp_path / "page.html")
        return re.findall(r'data-is="doubt">([^<.:]*)', (tmp_path / "page.html").read_text())

    moved = "A patch of zeros moved the pictures"
    denoised = "A patch of zeros denoises otherwise than the base, where every bit should be the same"
    kept = "A patch that ruins every picture keeps more than half of what the base does"
    assert told(0.025, half) == []
    assert told(0.03, 0) == [moved]
    assert told(0.0, half + 1) == [kept]
    assert told(0.0, 0, gap=1e-9) == [denoised]


def test_the_command_line_renders_what_is_in_a_folder(call: Call, tmp_path: Path) -> None:
    values = sample(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(values))
    told = call("report", tmp_path)
    assert (told.code, told.err) == (0, "")
    assert (tmp_path / "report.html").read_bytes() == write_page(values, tmp_path / "again.html").read_bytes()
    attacks = [{**values["attacks"][0], "name": "found beside it"}]
    evidence: dict[str, Any] = {"schema": 1, "base": "emoji", "target": values["target"], "evaluator": "emoji, 1"}
    evidence |= {"patches": [], "settings": {}, "attacks": attacks, "left_out": {"inversion": "no room beside it"}}
    (tmp_path / "attacks.json").write_text(json.dumps(evidence))
    assert call("report", tmp_path).code == 0
    page = (tmp_path / "report.html").read_text()
    assert "found beside it" in page
    assert "<li><b>inversion</b>: no room beside it</li>" in page
    values["methods"][1]["digest"] = "a" * 64
    (tmp_path / "report.json").write_text(json.dumps(values))
    ours, other, weaker = (
        {"digest": d * 64, "weight": w, "erases": "cat"} for d, w in (("a", 1), ("b", 1), ("a", 0.5))
    )
    for patches, fits in (([ours], True), ([other], False), ([weaker], False), ([ours, other], False)):
        (tmp_path / "attacks.json").write_text(json.dumps({**evidence, "patches": patches}))
        assert call("report", tmp_path).code == 0
        page = (tmp_path / "report.html").read_text()
        assert ("found beside it" in page, "are on another patch" in page) == (fits, not fits)
    hashes = {"fingerprint": values["made"]["hashes"]["base"], "evaluator digest": "e" * 64}
    values["made"]["hashes"]["evaluator"] = "e" * 64
    (tmp_path / "report.json").write_text(json.dumps(values))
    dog = {"kind": "object", "label": "dog"}
    for more, other in [
        ({"settings": hashes, "target": values["target"]}, ""),
        ({"settings": hashes, "target": dog}, "target"),
        ({"settings": {**hashes, "fingerprint": "f" * 64}}, "base"),
        ({"settings": {**hashes, "evaluator digest": "f" * 64}}, "evaluator"),
    ]:
        (tmp_path / "attacks.json").write_text(json.dumps({**evidence, **more}))
        assert call("report", tmp_path).code == 0
        page = (tmp_path / "report.html").read_text()
        assert ("found beside it" in page, f"are on another {other}" in page) == (not other, bool(other))
    for wrong in ({"settings": []}, {"patches": ["x"]}, {"patches": 5}, {"schema": 2}):
        (tmp_path / "attacks.json").write_text(json.dumps({**evidence, **wrong}))
        told = call("report", tmp_path)
        message = "not what `attack` writes; remove it, or choose another folder"
        assert (told.code, told.err) == (2, f"error: {tmp_path}/attacks.json: {message}\n")
    for text, message in [
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "not a report, which is a JSON object"),
        ('{"schema": 1}', "title: Field required (the first of 8 problems)"),
    ]:
        (tmp_path / "report.json").write_text(text)
        told = call("report", tmp_path)
        assert (told.code, told.err) == (2, f"error: {tmp_path}/report.json: {message}\n")
    told = call("report", tmp_path / "report.json")
    assert (told.code, told.err) == (2, f"error: {tmp_path}/report.json: is a file; name the folder that it is in\n")
