"""The page of a route: what it says, that nothing in it can break out, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reroute.manifest import Manifest
from reroute.runtime.answer import Answer
from reroute.runtime.image import crop
from reroute.runtime.page import route_page
from tests.runtime import fakes
from tests.runtime.fakes import make_answer

ROUTES = [[0, 1, 2, 3, 4], [1, 6, 15]]
EVIL = "</script><script>alert(1)</script> \"double\" 'single' & <b>é</b> \u2028 {{ 7 * 7 }}"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Elements with their attributes, and the text inside each kind of element."""

    VOID = ("meta", "img", "input", "link", "br", "hr")

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def with_id(self, name: str) -> dict[str, str | None]:
        (found,) = [attributes for _, attributes in self.elements if attributes.get("id") == name]
        return found

    @property
    def ids(self) -> list[str | None]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    @property
    def route(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])


def picture() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def page_of(answer: Answer, manifest: Manifest, prompt: str = "where is it ?", image_index: int = 0) -> Page:
    return Page(route_page(picture(), answer, manifest, prompt=prompt, image_index=image_index))


def tokens(stage: dict[str, Any], route: dict[str, Any], *states: str) -> list[int]:
    return [index for index, digit in enumerate(stage["fates"]) if route["states"][int(digit)] in states]


def test_the_data_block_is_the_route(manifest: Manifest) -> None:
    route = page_of(make_answer("yes", ROUTES), manifest).route
    assert route["columns"] == 4
    assert [stage["index"] for stage in route["stages"]] == [0, 1, 2]
    ran = [tokens(stage, route, "ran", "back") for stage in route["stages"]]
    assert ran == [list(range(16)), *ROUTES]
    assert [tokens(stage, route, "back") for stage in route["stages"]] == [[], [], [6, 15]]
    assert [len(tokens(stage, route, "waiting")) for stage in route["stages"]] == [0, 11, 13]
    for stage in route["stages"]:
        assert stage["counts"] == [len(tokens(stage, route, state)) for state in route["states"]]


def test_the_page_tells_question_answer_routing_and_stages(manifest: Manifest) -> None:
    page = page_of(make_answer(" 25 50 75 99 ", ROUTES), manifest)
    assert page.texts["h1"] == ["Q where is it ?"]
    text = " ".join(page.texts["body"][0].split())
    for part in (manifest.routing, "A 25 50 75 99", "the others wait unchanged and compete again", "came back"):
        assert part in text
    for stage in page.route["stages"]:
        assert stage["caption"] in page.texts["td"]
        assert stage["title"] in page.texts["th"]
    assert page.with_id("box")["style"] == "left: 25%; top: 50%; right: calc(100% - 75%); bottom: calc(100% - 99%)"
    assert "gone for good" not in text


def test_removal_says_that_tokens_are_gone() -> None:
    manifest = fakes.make_manifest(files={}, routing="removal@2,4:keep=5,3")
    page = page_of(make_answer("yes", [[0, 1, 2, 3, 4], [1, 2, 3]]), manifest)
    assert [len(tokens(stage, page.route, "gone")) for stage in page.route["stages"]] == [0, 11, 13]
    text = page.texts["main"][0]
    assert "removed, gone for good" in text
    assert "came back" not in text
    assert "wait" not in text
    assert "box" not in page.ids


def test_dense_has_one_stage() -> None:
    page = page_of(make_answer("yes", []), fakes.make_manifest(files={}, routing="dense"))
    (stage,) = page.route["stages"]
    assert tokens(stage, page.route, "ran") == list(range(16))
    assert page.with_id("slider")["max"] == "0"
    assert "Every visual token runs in every layer." in page.texts["p"]


def test_tokens_dropped_before_the_decoder(manifest: Manifest) -> None:
    page = page_of(make_answer("yes", [[1, 5], [9]], entered=[1, 5, 7, 9]), manifest)
    first = page.route["stages"][0]
    assert tokens(first, page.route, "ran") == [1, 5, 7, 9]
    assert "12 were dropped before the decoder" in first["caption"]
    assert "dropped before the decoder" in page.texts["main"][0]


def test_the_second_of_two_images(manifest: Manifest) -> None:
    page = page_of(make_answer("yes", [[0, 16 + 5], [2, 31]], images=2), manifest, image_index=1)
    assert [tokens(stage, page.route, "ran", "back") for stage in page.route["stages"][1:]] == [[5], [15]]
    assert "image 2 of the question" in page.texts["body"][0]


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_nothing_breaks_out_of_its_place(where: str, manifest: Manifest) -> None:
    plain = page_of(make_answer("yes", ROUTES), manifest)
    evil = page_of(
        make_answer(EVIL if where == "answer" else "yes", ROUTES), manifest, prompt=EVIL if where == "prompt" else "?"
    )
    assert [tag for tag, _ in evil.elements] == [tag for tag, _ in plain.elements]
    assert evil.texts["script"] == plain.texts["script"]
    if where == "prompt":
        assert evil.texts["h1"] == [f"Q {EVIL}"]
        assert evil.texts["title"] == [f"Route: {EVIL}"]
    else:
        assert f"A {EVIL}" in evil.texts["p"]


def test_a_spec_with_markup_in_it_stays_text(manifest: Manifest) -> None:
    page = page_of(make_answer("yes", ROUTES), dataclasses.replace(manifest, routing="</code><script>"))
    assert page.texts["code"] == ["</code><script>"]
    assert len(page.texts["script"]) == 2


def test_the_page_needs_nothing_but_itself(manifest: Manifest) -> None:
    source = route_page(picture(), make_answer("yes", ROUTES), manifest, prompt="where is it ?")
    page = Page(source)
    assert not re.search(r"(?i)https?:|url\(|@import|//[a-z]+\.", re.sub(r'src="data:[^"]+"', "", source))
    assert "link" not in {tag for tag, _ in page.elements}
    targets = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "srcset")]
    assert len(targets) == 1
    assert (targets[0] or "").startswith("data:image/png;base64,")
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert (policy or "").startswith("default-src 'none';")


def test_the_image_is_the_crop_that_the_model_saw(manifest: Manifest) -> None:
    page = page_of(make_answer("yes", ROUTES), manifest)
    (source,) = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    shown = Image.open(io.BytesIO(base64.b64decode((source or "").partition(",")[2])))
    assert shown.tobytes() == crop(picture(), manifest.model.image).tobytes()


def test_the_page_can_be_used_without_a_pointer_and_without_seeing_it(manifest: Manifest) -> None:
    page = page_of(make_answer("yes", ROUTES), manifest)
    assert dict(page.elements)["html"]["lang"] == "en"
    assert any(attributes.get("aria-live") == "polite" for _, attributes in page.elements)
    names = [a.get("aria-label") for tag, a in page.elements if tag == "button" and a.get("id") != "play"]
    assert len(names) == 5  # previous, next, three stages
    assert all(names)
    assert page.with_id("slider")["aria-label"]
    assert page.with_id("picture")["tabindex"] == "0"
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")
    assert len(page.ids) == len(set(page.ids))


def test_the_same_answer_gives_the_same_bytes(manifest: Manifest) -> None:
    first, second = (route_page(picture(), make_answer("yes", ROUTES), manifest, prompt="?") for _ in range(2))
    assert first == second


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_stage(manifest: Manifest, tmp_path: Path) -> None:
    """The script runs under the page's own policy: it makes the tokens and fills in stage 2."""
    path = tmp_path / "a route.html"
    path.write_text(route_page(picture(), make_answer("yes", ROUTES), manifest, prompt=EVIL), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", f"{path.as_uri()}#2"], capture_output=True, text=True, timeout=120)
    page = Page(done.stdout)
    classes = [attributes.get("class") for tag, attributes in page.elements if tag == "i"]
    assert [index for index, name in enumerate(classes) if name == "back"] == [6, 15]
    assert [index for index, name in enumerate(classes) if name == "ran"] == [1]
    assert classes.count("waiting") == 13
    assert page.texts["h2"] == ["stage 2 · layers 4-5"]
