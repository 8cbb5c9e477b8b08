"""The accuracy figures: every point is drawn where it belongs, and a results file that lacks something is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reroute.errors import EXIT_USAGE
from tests.conftest import REPOSITORY

FILES = ("accuracy-grounding.svg", "accuracy-vqa.svg")
AVERAGES = {"1/9": 63.9, "2/9": 127.6, "1/3": 191.8}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    """`benchmarks` holds scripts, not a package."""
    spec = importlib.util.spec_from_file_location("plot_accuracy", REPOSITORY / "benchmarks" / "plot_accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def row(method: str, action: str, tier: str | None, average: float, grounding: float, vqa: float) -> dict[str, Any]:
    return {
        "method": method,
        "action": action,
        "tier": tier,
        "average_visual_tokens": average,
        "grounding": grounding,
        "grounding_interval": [grounding - 0.02, grounding + 0.01],
        "vqa": vqa,
        "vqa_interval": [vqa - 0.03, vqa + 0.02],
    }


def results() -> dict[str, Any]:
    rows = [row("dense", "dense", None, 576.0, 0.9, 0.8)]
    for place, method in enumerate(("fastv", "pdrop", "nuwa")):
        for action, more in (("removal", 0.0), ("reroute", 0.05)):
            # Not in the order of the averages.
            for tier, score in (("1/3", 0.75), ("1/9", 0.4 + 0.05 * place), ("2/9", 0.6)):
                average = AVERAGES[tier] * (1.05 if (method, action) == ("pdrop", "removal") else 1)
                rows.append(row(method, action, tier, average, score + more, score + more / 2))
    return {
        "boundary": "made up <&>",
        "engine": {"engine": "Motor", "version": "1.2", "provider": "CPU", "threads": "2"},
        "questions": {"set": "puzzles", "grounding": 1234, "vqa": 567},
        "rows": rows,
    }


@pytest.fixture
def draw(plot: ModuleType, tmp_path: Path) -> Callable[[Any], int]:
    def run(data: Any) -> int:
        source = tmp_path / "accuracy.json"
        source.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return plot.main([str(source), "-o", str(tmp_path / "docs")])

    return run


def place(element: ElementTree.Element) -> tuple[float, float]:
    """Where a marker stands, in points from the top left."""
    (use,) = element.iter(f"{SVG}use")
    return float(use.attrib["x"]), float(use.attrib["y"])


def test_every_point_is_drawn_where_it_belongs(draw: Callable[[Any], int], tmp_path: Path):
    assert draw(results()) == 0
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == sorted(FILES)
    for name, task in zip(FILES, ("grounding", "vqa"), strict=True):
        root = ElementTree.parse(tmp_path / "docs" / name).getroot()
        elements = {element.get("id", ""): element for element in root.iter(f"{SVG}g")}
        places: dict[float, float] = {}
        series = [(method, action) for method in ("fastv", "pdrop", "nuwa") for action in ("removal", "reroute")]
        for method, action in series:
            rows = [r for r in results()["rows"] if (r["method"], r["action"]) == (method, action)]
            rows.sort(key=lambda r: r["average_visual_tokens"])
            points = [place(elements[f"point-{method}-{action}-{index}"]) for index in range(3)]
            assert points == sorted(points), "averages go to the right"
            places.update({r[task]: y for r, (_, y) in zip(rows, points, strict=True)})
            for index in range(3):
                assert f"interval-{method}-{action}-{index}" in elements
        assert "point-dense-dense-0" in elements
        assert sum(identity.startswith("point-") for identity in elements) == 18 + 3  # the dense line is in each panel
        # Higher scores stand higher, in proportion, across panels.
        (low, bottom), (high, top) = min(places.items()), max(places.items())
        for score, y in places.items():
            assert y == pytest.approx(bottom + (score - low) / (high - low) * (top - bottom), abs=0.01)
        text = [element.text for element in root.iter(f"{SVG}text")]
        for said in ("FastV", "PyramidDrop", "Nüwa", "63.9", "127.6", "191.8", "67.1", "201.4"):
            assert said in text
        assert f"dense {90 if task == 'grounding' else 80:.1f}" in text
        questions = results()["questions"][task]
        assert "Made up <&>." in text
        assert f"{questions} questions (puzzles), the same ones for every point; Motor 1.2 CPU." in text


def test_the_same_results_give_the_same_bytes(draw: Callable[[Any], int], tmp_path: Path):
    written = []
    for _ in range(2):
        assert draw(results()) == 0
        written.append([(tmp_path / "docs" / name).read_bytes() for name in FILES])
    assert written[0] == written[1]


def test_colours_follow_the_reader_and_nothing_is_fetched(draw: Callable[[Any], int], tmp_path: Path):
    assert draw(results()) == 0
    svg = (tmp_path / "docs" / FILES[0]).read_text(encoding="utf-8")
    style = svg[svg.index("<style>") : svg.index("</style>")]
    assert "prefers-color-scheme: dark" in style
    names = set(re.findall(r"var\((--\w+)\)", svg))
    assert {"--ink", "--faint", "--line", "--paper", "--fastv", "--pdrop", "--nuwa"} <= names
    assert all(style.count(f"{name}:") == 2 for name in names), "a colour for light and one for dark"
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", svg), "a stand-in is left"
    assert not re.search(r"(href|src)=\"(?!#)|@import|url\((?!#)", svg)


def test_a_mean_may_differ_from_its_bound_by_rounding(draw: Callable[[Any], int]):
    assert draw(changed(grounding=1.0, grounding_interval=[0.9, 0.9999999999999998])) == 0


def test_a_method_without_rows_is_an_empty_panel(draw: Callable[[Any], int], tmp_path: Path):
    data = results()
    data["rows"] = [r for r in data["rows"] if r["method"] != "nuwa"]
    assert draw(data) == 0
    assert "point-nuwa" not in (tmp_path / "docs" / FILES[0]).read_text(encoding="utf-8")


def without(key: str) -> dict[str, Any]:
    data = results()
    del data["rows"][3][key]
    return data


def changed(**values: Any) -> dict[str, Any]:
    data = results()
    data["rows"][3].update(values)
    return data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param("{", "cannot read", id="not JSON"),
        pytest.param([], "has no 'rows'", id="not an object"),
        pytest.param({"rows": []}, "has no rows", id="no rows"),
        pytest.param({**results(), "rows": {}}, "'rows' is a dict, not a list", id="rows of another kind"),
        pytest.param({"rows": results()["rows"]}, "has no 'questions'", id="no questions"),
        pytest.param({**results(), "questions": {"set": "s", "vqa": 5}}, "no 'grounding'", id="a task without number"),
        pytest.param({**results(), "engine": "Motor"}, "'engine' is a str, not a dict", id="engine in words"),
        pytest.param({**results(), "rows": results()["rows"][1:]}, "0 dense rows", id="no dense row"),
        *(
            pytest.param(without(key), f"row 3 has no '{key}'", id=f"no {key}")
            for key in ("method", "action", "average_visual_tokens", "grounding", "grounding_interval", "vqa_interval")
        ),
        pytest.param(changed(method="fastw"), "nothing is known of fastw removal", id="unknown method"),
        pytest.param(changed(vqa="0.5"), "'vqa' is '0.5', not a number", id="a number as text"),
        pytest.param(changed(grounding=0.99), "grounding is 0.99 in the interval", id="outside its interval"),
        pytest.param(changed(vqa_interval=[0.1]), "in the interval [0.1]", id="half an interval"),
        pytest.param(changed(vqa=55, vqa_interval=[50, 60]), "vqa is 55.0 in the interval", id="percent"),
    ],
)
def test_incomplete_results_are_refused(
    data: Any, says: str, draw: Callable[[Any], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert draw(data) == EXIT_USAGE
    error, blank, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert says in error
    assert blank == ""
    assert hint.startswith("hint: ")
    assert not (tmp_path / "docs").exists()


def test_a_missing_file_is_refused(plot: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert plot.main([str(tmp_path / "none.json"), "-o", str(tmp_path)]) == EXIT_USAGE
    assert "there is no" in capsys.readouterr().err
