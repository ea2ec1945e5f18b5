"""The study: what readers see and must not see, how a browser keeps their answers, and what is made of them."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Call
from PIL import Image, PngImagePlugin
from test_page import Browser, browser, mean  # noqa: F401 (a fixture)

from esd_lora.errors import OutputError, UserError
from esd_lora.study import COLUMNS, Question, read_key, score_study, write_study

METHODS = ("the base model", "our patch")


def questions(n: int = 6) -> list[Question]:
    """Plain pictures, each of a colour of its own; the base's come first, and every other one has a reference."""
    grey = Image.new("RGB", (32, 32), "#808080")
    return [
        Question(
            Image.new("RGB", (48, 32), (40 * i % 256, -40 * i % 256, 128)),
            METHODS[2 * i // n],
            f"prompt {i}",
            grey if i % 2 else None,
        )
        for i in range(n)
    ]


def data_of(page: Path) -> dict[str, Any]:
    """What the script of a page is given."""
    (text,) = re.findall(r"^const study = (.*);$", page.read_text(), re.MULTILINE)
    return json.loads(text)  # type: ignore[no-any-return]


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))


# ---- the page ------------------------------------------------------------------------------------------------------


def test_the_key_tells_what_made_each_picture(tmp_path: Path) -> None:
    asked = questions()
    data = data_of(write_study(tmp_path / "study", questions=asked, seed=1, title="Styles"))
    key = read_key(tmp_path / "study" / "key.json")
    assert (key.title, key.seed, list(key.items)) == ("Styles", 1, [item["id"] for item in data["items"]])
    for item in data["items"]:
        told = key.items[item["id"]]
        question = asked[int(told.prompt.removeprefix("prompt "))]
        # WebP is lossy, by a few of 255 levels; the colours differ by 40
        assert mean(opened(item["picture"])) == pytest.approx(mean(question.picture), abs=4)
        assert told.method == question.method
        assert (item["reference"] is None) == (question.reference is None)
    assert len(data["references"]) == 1  # the same one is stored once


def test_the_page_does_not_tell_what_made_a_picture(tmp_path: Path) -> None:
    told = PngImagePlugin.PngInfo()
    told.add_text("Software", "our patch")
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0131] = "our patch"  # the tag of the program that made it
    questions()[0].picture.save(buffer, format="PNG", pnginfo=told, exif=exif)
    signed = questions()[0]._replace(picture=Image.open(buffer))
    page = write_study(tmp_path / "study", questions=[signed, *questions()[1:]], seed=1, title="Styles")
    text = page.read_text()
    assert not any(word in text for word in (*METHODS, "prompt ", "our patch"))
    for uri in re.findall(r"data:image/webp;base64,[A-Za-z0-9+/=]+", text):
        picture = opened(uri)
        assert b"patch" not in base64.b64decode(uri.partition(",")[2])
        assert not picture.getexif()
    # nor does the order: sorted by ids that are drawn, the methods mix
    key = read_key(tmp_path / "study" / "key.json")
    blocks = [method for method, _ in itertools.groupby(item.method for item in key.items.values())]
    assert len(blocks) > 2


def test_equal_seeds_write_equal_files_and_others_other_ids(tmp_path: Path) -> None:
    pages = {
        name: write_study(tmp_path / name, questions=questions(), seed=seed, title="Styles")
        for name, seed in zip("abc", (1, 1, 2), strict=True)
    }
    a, b, c = ([(p.parent / f).read_bytes() for f in ("index.html", "key.json")] for p in pages.values())
    assert a == b
    ids = [{item["id"] for item in data_of(p)["items"]} for p in pages.values()]
    assert not ids[0] & ids[2]
    assert all(i[0].isalpha() for i in ids[0])  # spreadsheets would make numbers of 00000001 and 12e45678
    assert a != c


def test_answers_to_another_study_of_the_same_seed_are_refused(tmp_path: Path) -> None:
    """Such as the same pictures under another question, or in another order of methods."""
    one, other, turned = (
        write_study(tmp_path / name, questions=some, seed=1, title=title)
        for name, some, title in [("a", questions(), "A"), ("b", questions(), "B"), ("c", questions()[::-1], "A")]
    )
    rated = {item["id"]: 3 for item in data_of(one)["items"]}
    answers = write_answers(one.parent, {"ann": rated, "bob": rated})
    assert score_study(one.parent / "key.json", answers)
    for page in (other, turned):
        with pytest.raises(UserError, match="is no item of this study"):
            score_study(page.parent / "key.json", answers)


def test_it_asks_no_network_and_words_are_text(tmp_path: Path) -> None:
    words = "</script><img src=https://example.org/x>"
    page = write_study(
        tmp_path / "s", questions=questions(), seed=1, title=words, ask=words, ends=(words, words), introduction=words
    )
    text = page.read_text()
    assert text.count("<script>") == text.count("</script>") == 1
    assert "<img src" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "content=\"default-src 'none'; img-src data:;" in text


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a study needs at least one picture, got none"):
        write_study(tmp_path / "study", questions=[], seed=0, title="Styles")
    write_study(tmp_path / "study", questions=questions(), seed=0, title="Styles")
    with pytest.raises(OutputError, match="not empty"):  # the key of a study that runs is never replaced
        write_study(tmp_path / "study", questions=questions(), seed=1, title="Styles")


# ---- in a browser ----------------------------------------------------------------------------------------------------


def start(browser: Browser, page: Path, reader: str, **screen: Any) -> None:  # noqa: F811
    browser.open("about:blank")  # another name after # alone would not load it anew
    browser.open(f"{page.resolve().as_uri()}#{reader}", **screen)
    browser.run("document.querySelector('#who button').click()")


def rate(browser: Browser, key: str) -> None:  # noqa: F811
    time.sleep(0.25)  # the page takes no answer before 0.2 s
    browser.press(key)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study", questions=questions(), seed=1, title="Styles")


def test_a_reader_answers_by_keyboard_stops_goes_on_and_saves(browser: Browser, page: Path) -> None:  # noqa: F811
    start(browser, page, "alice")
    browser.press("5")  # at once: a key that bounced
    rate(browser, "9")  # not on the scale
    for key in "42":
        rate(browser, key)
    browser.press("ArrowLeft")
    rate(browser, "1")  # instead of 2
    assert browser.run("document.getElementById('count').textContent") == "3 of 6"
    start(browser, page, "alice")  # she closed it, and goes on where she was
    assert browser.run("document.getElementById('count').textContent") == "3 of 6"
    for key in "3333":
        rate(browser, key)
    assert browser.run("document.getElementById('done').hidden") is False
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(page.parent))
    browser.run("document.querySelector('#done .save').click()")
    saved = page.parent / "answers-alice.csv"
    for _ in range(100):
        if saved.exists() and saved.stat().st_size:
            break
        time.sleep(0.05)
    lines = [line.split(",") for line in saved.read_text().splitlines()]
    assert lines[0] == COLUMNS
    assert [line[2] for line in lines[1:]] == ["4", "1", "3", "3", "3", "3"]
    assert {line[1] for line in lines[1:]} == {item["id"] for item in data_of(page)["items"]}
    assert all(line[0] == "alice" and 200 <= int(line[3]) < 60_000 for line in lines[1:])
    assert browser.troubles() == []
    start(browser, page, "bob")  # on the same machine, with answers of his own
    assert browser.run("document.getElementById('count').textContent") == "1 of 6"
    # two readers' files, the second by another hand, are what the scoring reads
    (page.parent / "answers-bob.csv").write_text(saved.read_text().replace("alice", "bob"))
    found = score_study(page.parent / "key.json", sorted(page.parent.glob("*.csv")))
    assert {(r.readers, r.pictures, r.answers) for r in found.values()} == {(2, 3, 6)}


def test_every_reader_has_an_order_of_their_own(browser: Browser, page: Path) -> None:  # noqa: F811
    orders = {}
    for name in ("alice", "bob", "reader-1", "reader-2", "alice"):
        start(browser, page, name)
        order = browser.run("order.map(item => item.id)")
        assert orders.setdefault(name, order) == order
    assert len({tuple(order) for order in orders.values()}) == 4
    assert {frozenset(order) for order in orders.values()} == {frozenset(read_key(page.parent / "key.json").items)}


def test_an_order_is_random(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    """For 3,000 readers with similar names each of two pictures comes first as often as if a coin were thrown.

    The square of what this is off by is then 1 on the mean of all pairs, in standard deviations; plain FNV-1a gives 8.
    """
    browser.open(write_study(tmp_path / "many", questions=questions(40), seed=1, title="Styles"))
    ids = "Array.from({length: 3000}, (_, i) => orderOf(`reader-${i}`).map(item => item.id))"
    places = np.argsort(browser.run(ids), axis=1)  # (3000, 40), of the ids in their alphabetical order
    first = np.mean([place[:, None] < place for place in places], 0)[np.triu_indices(40, 1)]
    assert np.mean((first - 0.5) ** 2) < 2 * 0.25 / 3000


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_a_desk_and_a_phone(width: int, dark: bool, browser: Browser, page: Path) -> None:  # noqa: F811
    start(browser, page, "carol", width=width, dark=dark)
    second = "order.findIndex(item => item.reference !== null)"
    browser.run(f"at = {second}; show()")
    time.sleep(0.25)  # it fades in
    assert browser.troubles() == []
    assert browser.run("document.documentElement.scrollHeight - innerHeight") <= 0
    colours = np.asarray(browser.screenshot().convert("L"), float)
    assert colours.std() > 10  # a blank page has one colour
    assert (colours[0, 0] < 64) == dark
    tall = browser.run("['picture', 'reference'].map(id => document.getElementById(id).clientHeight)")
    assert min(tall) > 150
    assert min(browser.run("Array.from(document.querySelectorAll('#scale button'), b => b.clientHeight)")) >= 44


# ---- the answers -----------------------------------------------------------------------------------------------------


def write_answers(folder: Path, answers: dict[str, dict[str, int]]) -> list[Path]:
    """A file for each reader with answers by item."""
    for reader, rated in answers.items():
        rows = [",".join(COLUMNS), *(f"{reader},{item},{answer},900" for item, answer in rated.items())]
        (folder / f"{reader}.csv").write_text("\n".join(rows) + "\n")
    return sorted(folder.glob("*.csv"))


def items_of(page: Path) -> dict[str, list[str]]:
    """The items of each method."""
    key = read_key(page.parent / "key.json").items
    return {method: [i for i, item in key.items() if item.method == method] for method in METHODS}


def test_ratings_are_means_and_intervals_are_over_readers(page: Path, tmp_path: Path) -> None:
    base, ours = items_of(page).values()
    # readers with different numbers of answers, each of whom weighs as much as they have answered
    rated = {
        "a": dict.fromkeys(base, 1) | dict.fromkeys(ours, 4),
        "b": dict.fromkeys(base[:1], 5) | dict.fromkeys(ours[:1], 1),
        "c": dict.fromkeys(base[1:2], 4) | dict.fromkeys(ours[:1], 1),
        "d": dict.fromkeys(base[:1], 5) | dict.fromkeys(ours[1:2], 2),
        "e": dict.fromkeys(base[2:], 3) | dict.fromkeys(ours[1:], 5),
    }
    found = score_study(page.parent / "key.json", write_answers(tmp_path, rated))
    for method, items in zip(METHODS, (base, ours), strict=True):
        own = [[some[i] for i in items if i in some] for some in rated.values()]
        rating = found[method]
        assert rating.mean == pytest.approx(np.mean([*itertools.chain(*own)]), rel=1e-12)
        # all 3,125 ways to draw five of them; 2,000 draws find a percentile to within a few of the means that there are
        means = [np.mean([*itertools.chain(*drawn)]) for drawn in itertools.product(own, repeat=5)]
        assert (rating.low, rating.high) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.1)
        assert (rating.answers, rating.pictures, rating.readers) == (sum(map(len, own)), 3, 5)
    assert list(found) == sorted(METHODS, key=lambda method: -found[method].mean)


def test_one_readers_many_answers_are_not_many_readers(tmp_path: Path) -> None:
    """Two who disagree leave everything open, however many pictures they rate; answers drawn singly would hide that."""
    page = write_study(tmp_path / "study", questions=questions(60), seed=1, title="Styles")
    ids = list(read_key(page.parent / "key.json").items)
    found = score_study(
        page.parent / "key.json", write_answers(tmp_path, {"a": dict.fromkeys(ids, 1), "b": dict.fromkeys(ids, 5)})
    )
    assert {(r.low, r.mean, r.high) for r in found.values()} == {(1, 3, 5)}


GOOD = "reader,item,answer,milliseconds\nann,ITEM,3,900\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1: the columns must be reader,item,answer,milliseconds"),
        ("reader;item;answer;milliseconds\n", "line 1: the columns must be reader,item,answer,milliseconds"),
        (GOOD + "ann,ITEM,3\n", "line 3: needs 4 fields, has 3"),
        (GOOD + "\n", "line 3: needs 4 fields, has 0"),
        (GOOD + ",ITEM,3,900\n", "line 3: the reader is missing"),
        (GOOD + "ann,12345,3,900\n", "line 3: '12345' is no item of this study"),
        (GOOD + "bob,ITEM,6,900\n", "line 3: the answer must be 1 to 5, got '6'"),
        (GOOD + "bob,ITEM,3.0,900\n", "line 3: the answer must be 1 to 5, got '3.0'"),
        (GOOD + "bob,ITEM,3,-1\n", "line 3: milliseconds must be a whole number, got '-1'"),
        (GOOD + "ann,ITEM,4,900\n", "line 3: ann has rated ITEM already, in answers.csv, line 2"),
    ],
)
def test_a_malformed_line_is_named(text: str, told: str, page: Path) -> None:
    item = items_of(page)[METHODS[0]][0]
    Path("answers.csv").write_text(text.replace("ITEM", item))
    with pytest.raises(UserError) as caught:
        score_study(page.parent / "key.json", [Path("answers.csv")])
    assert str(caught.value) == f"answers.csv, {told.replace('ITEM', item)}"


def test_the_same_file_twice_is_named(page: Path, tmp_path: Path) -> None:
    (file,) = write_answers(tmp_path, {"ann": dict.fromkeys(items_of(page)[METHODS[0]], 3)})
    with pytest.raises(UserError, match=r"ann\.csv, line 2: ann has rated \w+ already, in .*ann\.csv, line 2$"):
        score_study(page.parent / "key.json", [file, file])


def test_what_a_spreadsheet_saved_is_read(page: Path, tmp_path: Path) -> None:
    rated = dict.fromkeys(read_key(page.parent / "key.json").items, 3)
    for file in write_answers(tmp_path, {"ann": rated, "bob": rated}):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert {r.mean for r in score_study(page.parent / "key.json", sorted(tmp_path.glob("*.csv"))).values()} == {3}


def test_files_that_are_none_are_named(page: Path, tmp_path: Path) -> None:
    key, item = page.parent / "key.json", items_of(page)[METHODS[0]][0]
    (tmp_path / "picture.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.json").write_text("{}")
    two = write_answers(tmp_path / "study", {"ann": {item: 3}, "bob": {item: 3}})
    for arguments, told in [
        ((key, [tmp_path / "none.csv"]), r"none\.csv: cannot read the answers: No such file or directory"),
        ((key, [tmp_path / "picture.csv"]), r"picture\.csv: cannot read the answers: not a text file"),
        ((tmp_path / "none.json", two), r"none\.json: cannot read the key: No such file or directory"),
        ((tmp_path / "broken.json", two), r"broken\.json: not the key\.json of a study"),
        ((key, []), "no answers to pictures of our patch"),
        ((key, two), "no answers to pictures of our patch"),
    ]:
        with pytest.raises(UserError, match=told) as caught:
            score_study(*arguments)
        assert "\n" not in str(caught.value)
    rated = dict.fromkeys(read_key(key).items, 3)
    with pytest.raises(UserError, match="rated by ann alone; an interval over readers needs two at least"):
        score_study(key, write_answers(tmp_path / "study", {"ann": rated, "bob": {item: 3}}))


# ---- the command line ----------------------------------------------------------------------------------------------


def test_a_study_is_drawn_and_scored_by_the_command_line(call: Call, tiny_folder: Path, patch_folder: Path) -> None:
    Image.new("RGB", (8, 8)).save("reference.png")
    drawn = [
        "--base",
        tiny_folder,
        "--patch",
        patch_folder,
        "--prompt",
        "a cat",
        "-n",
        2,
        "--reference",
        "reference.png",
    ]
    told = call("study", "people", *drawn, "--quiet", "--json")
    assert (told.code, json.loads(told.out)["pictures"]) == (0, 4)
    items = read_key(Path("people/key.json")).items
    assert sorted(i.method for i in items.values()) == sorted(["base"] * 2 + [str(patch_folder)] * 2)
    ids = [item["id"] for item in data_of(Path("people/index.html"))["items"]]
    pictures = {items[item["id"]].method: item["picture"] for item in data_of(Path("people/index.html"))["items"]}
    assert len(set(pictures.values())) == 2  # the patch changes what is drawn
    for reader in "ab":
        rows = [",".join([reader, i, "5" if items[i].method == "base" else "1", "900"]) for i in ids]
        Path(f"{reader}.csv").write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    scored = call("study", "people", "--score", "a.csv", "--score", "b.csv", "--json")
    assert {k: v["mean"] for k, v in json.loads(scored.out).items()} == {"base": 5, str(patch_folder): 1}


def test_what_a_study_cannot_do_is_one_line(call: Call, tiny_folder: Path, patch_folder: Path) -> None:
    drawn = ["--base", tiny_folder, "--patch", patch_folder, "--ask", "How much?", "--prompt", "a cat", "--quiet"]
    unasked = ["--base", tiny_folder, "--patch", patch_folder, "--prompt", "a cat"]
    shutil.copytree(patch_folder, "base")
    for options, message in [
        (drawn[:-3], "name --base, --patch and --prompt to write a study, or --score to score one"),
        (unasked, "name --reference, a picture to compare with, or --ask another question"),
        ([*drawn, "--reference", "none.png"], "none.png: no such file"),
        ([*drawn, "--reference", "base"], "base: is a folder"),
        ([*drawn, "--reference", "base/recipe.yaml"], "base/recipe.yaml: not a picture that can be read"),
        (
            ["--score", "a.csv", *unasked],
            "--score: scores a study that has been drawn; leave --base, --patch, --prompt out",
        ),
        ([*drawn[:-3], "--prompt", " "], "--prompt: must not be empty"),
        (
            [*drawn, "--patch", "base"],
            "--patch base: is what a study calls the base alone; name the patch otherwise, as in ./base",
        ),
        (["--score", "a.csv"], "people/key.json: cannot read the key: No such file or directory"),
    ]:
        told = call("study", "people", *options)
        assert (told.code, told.err) == (2, f"error: {message}\n")
        assert not Path("people").exists()
