"""`reroute run`: folders that are not bundles, images that are not images, questions that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.bad_input import damage as d
from tests.bad_input.conftest import Refused

ASK = ("--prompt", "what is there ?")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A good image."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "good.png")
    return tmp_path / "good.png"


BUNDLES = {
    "changed graph": (d.flip("decoder.onnx"), ["decoder.onnx has sha256", "the manifest says"]),
    "changed weights": (d.flip("vision.onnx.data"), ["vision.onnx.data has sha256", "the manifest says"]),
    "truncated": (d.truncate("decoder.onnx.data"), ["decoder.onnx.data has", "bytes, the manifest says"]),
    "missing": (d.remove("vision.onnx"), ["lacks vision.onnx"]),
    "no manifest": (d.remove("reroute.json"), ["holds no reroute.json", "reroute build"]),
    "another backend": (d.set_json("reroute.json", "backend", "trt"), ["backend 'trt'", "supported: ort"]),
    "no vision part": (d.set_json("reroute.json", "parts.vision", d.ABSENT), ["no part 'vision'"]),
    "graph that does not load": (
        d.then(d.text("decoder.onnx", "not a graph"), d.rehash),
        ["cannot load decoder.onnx", "build the bundle again"],
    ),
}


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*case, id=name) for name, case in BUNDLES.items()])
def test_bundle(damage: d.Damage, says: list[str], bundle: Path, refused: Refused) -> None:
    damage(bundle)
    refused("run", bundle, *ASK, says=says)


def test_no_folder(tmp_path: Path, refused: Refused) -> None:
    refused("run", tmp_path / "nowhere", *ASK, says=["nowhere", "reroute build"])


def test_file_for_a_folder(picture: Path, refused: Refused) -> None:
    refused("run", picture, *ASK, says=["is not a folder", "reroute build"])


def test_checkpoint_for_a_bundle(checkpoint: Path, refused: Refused) -> None:
    refused("run", checkpoint, *ASK, says=["holds no reroute.json", "reroute build"])


def test_export_for_a_bundle(exported: Path, refused: Refused) -> None:
    refused("run", exported, *ASK, says=["is an export, not an engine bundle", "reroute build"])


def write(name: str, content: bytes) -> d.Damage:
    return lambda folder: (folder / name).write_bytes(content)


def half_a_jpeg(folder: Path) -> None:
    Image.linear_gradient("L").save(folder / "x.jpg")
    d.truncate("x.jpg")(folder)


IMAGES = {
    "missing": ("x.png", lambda _: None, ["there is no image", "x.png"]),
    "a folder": ("x.png", lambda folder: (folder / "x.png").mkdir(), ["cannot read the image", "x.png"]),
    "text": ("x.png", write("x.png", b"not an image"), ["x.png is not an image", "JPEG"]),
    "empty": ("x.png", write("x.png", b""), ["x.png is not an image"]),
    "truncated": ("x.jpg", half_a_jpeg, ["x.jpg is damaged", "truncated"]),
    "no pixels": ("x.png", write("x.png", d.png_header(64, 64)), ["x.png is damaged"]),
    # Nothing of these may be allocated: 60000 x 60000 x 3 bytes are 10 GiB.
    "bomb": ("x.png", write("x.png", d.png_header(60_000, 60_000)), ["x.png is too large", "64 million"]),
    "below Pillow's limit": (
        "x.png",
        write("x.png", d.png_header(9_000, 9_000)),
        ["x.png is too large", "9000 x 9000", "81 million", "64 million"],
    ),
    "a line": ("x.png", write("x.png", d.png_header(20_000, 2)), ["20000 x 2", "100 times"]),
    "one pixel float": ("x.tiff", lambda f: Image.new("F", (4, 4)).save(f / "x.tiff"), ["floating-point"]),
}


@pytest.mark.parametrize(("name", "make", "says"), [pytest.param(*case, id=key) for key, case in IMAGES.items()])
def test_image(name: str, make: d.Damage, says: list[str], tiny_bundle: Path, tmp_path: Path, refused: Refused) -> None:
    make(tmp_path)
    refusal = refused("run", tiny_bundle, *ASK, "--image", tmp_path / name, says=says)
    assert refusal.stdout == ""


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param([], ["nothing to ask", "--prompt"], id="nothing"),
        pytest.param(["--prompt", ""], ["the prompt is empty"], id="empty"),
        pytest.param(["--prompt", " \n"], ["the prompt is empty"], id="blank"),
        pytest.param(["--prompt", "a <image> b"], ["1 <image> placeholders, but 0 images"], id="placeholder"),
        pytest.param(["--prompt", "caf\udce9"], ["not valid UTF-8", "U+DCE9"], id="not utf-8"),
        pytest.param([*ASK, "--temperature", "-1"], ["temperature is -1"], id="negative temperature"),
        pytest.param([*ASK, "--temperature", "nan"], ["temperature is nan"], id="temperature nan"),
        pytest.param([*ASK, "--temperature", "inf"], ["temperature is inf"], id="temperature inf"),
        pytest.param([*ASK, "--temperature", "hot"], ["--temperature", "'hot'"], id="temperature a word"),
        pytest.param([*ASK, "--top-k", "0"], ["--top-k", "less than 1"], id="top-k"),
        pytest.param([*ASK, "--top-p", "0"], ["top_p is 0"], id="top-p zero"),
        pytest.param([*ASK, "--top-p", "1.5"], ["top_p is 1.5"], id="top-p above 1"),
        pytest.param([*ASK, "--seed", "-1"], ["seed is -1"], id="seed"),
        pytest.param([*ASK, "--max-new-tokens", "0"], ["--max-new-tokens", "less than 1"], id="no tokens"),
        pytest.param([*ASK, "--threads", "0"], ["--threads", "less than 1"], id="threads"),
        pytest.param([*ASK, "--interactive"], ["--interactive", "--prompt"], id="interactive and prompt"),
        pytest.param(["--image", "x.png"], ["x.png has no question", "--prompt"], id="image without a question"),
        pytest.param([*ASK, "--picture", "x.png"], ["--picture needs an image"], id="picture of nothing"),
        pytest.param([*ASK, "--promt", "x"], ["--promt", "--help"], id="unknown option"),
    ],
)
def test_arguments(argv: list[str], says: list[str], tiny_bundle: Path, refused: Refused) -> None:
    refusal = refused("run", tiny_bundle, *argv, says=says)
    assert refusal.stdout == ""


def test_prompt_longer_than_the_capacity(tiny_bundle: Path, picture: Path, refused: Refused) -> None:
    """Both numbers: what it needs and what is left (512 text tokens and two images of 36)."""
    long = ("run", tiny_bundle, "--prompt", "red " * 700)
    refusal = refused(*long, says=["0 visual tokens", "cache rows", "584 of 584 are left", "--max-text"])
    assert refusal.message.startswith("the prompt (70")
    refused(*long, "--image", picture, says=["36 visual tokens", "584 of 584 are left"])
    refused("run", tiny_bundle, "--prompt", "red", *["--image", picture] * 17, says=["612 visual tokens", "584"])


@pytest.mark.parametrize("name", ["route.xyz", "route.jpg", "route", "good.png/route.png", "good.png/route.html"])
def test_picture_that_cannot_be_written(name: str, tiny_bundle: Path, picture: Path, refused: Refused) -> None:
    """Found before anything is asked, not after the answer."""
    target = picture.parent / name
    refusal = refused("run", tiny_bundle, *ASK, "--image", picture, "--picture", target, says=["cannot write", name])
    assert refusal.stdout == ""
