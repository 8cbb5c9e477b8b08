"""Boxes on the grid of visual tokens, against the crop that the runtime really makes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from reroute.evaluation.questions import Box
from reroute.evaluation.regions import size_of, tokens_in
from reroute.manifest import Model
from reroute.runtime.image import crop
from tests.runtime.fakes import make_manifest

MODEL: Model = make_manifest(files={}).model  # 4 x 4 tokens on a crop of 32 x 32 pixels


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 1, 1), range(16)),
        ((0.25, 0.5, 0.75, 1), [9, 10, 13, 14]),
        ((0, 0, 0.3, 0.2), [0]),
        ((0.1, 0.4, 0.9, 0.55), [4, 5, 6, 7]),  # no row's centre is inside: the row below the middle
        ((0.26, 0.26, 0.3, 0.3), [5]),
        ((0.125, 0, 0.375, 0.25), [0]),  # a centre on the left edge is inside, one on the right edge is not
    ],
)
def test_tokens_are_those_with_their_centre_in_the_box(box: Box, expected: list[int]):
    assert tokens_in(box, (384, 384), MODEL).tolist() == list(expected)


def test_what_the_crop_cuts_away_has_no_tokens():
    assert tokens_in((0, 0, 0.2, 1), (200, 100), MODEL).tolist() == []
    assert tokens_in((0.25, 0, 0.5, 1), (200, 100), MODEL).tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert tokens_in((0, 0.25, 1, 0.5), (100, 200), MODEL).tolist() == list(range(8))
    assert tokens_in((0, 0.8, 1, 1), (100, 200), MODEL).tolist() == []


@pytest.mark.parametrize("size", [(640, 427), (333, 500), (224, 224)])
def test_tokens_lie_where_the_runtime_crops(size: tuple[int, int]):
    processing = replace(MODEL.image, shortest_edge=240, crop_width=240, crop_height=240, resample=0)
    model = replace(MODEL, image=processing, vision=replace(MODEL.vision, grid=(24, 24)))
    box = (0.31, 0.22, 0.74, 0.81)
    image = Image.new("L", size)
    ImageDraw.Draw(image).rectangle(
        [round(side * edge) for side, edge in zip(box, (*size, *size), strict=True)], fill=255
    )
    centres = np.asarray(crop(image, processing))[5::10, 5::10]
    expected = np.flatnonzero(centres.ravel() > 0)
    found = tokens_in(box, size, model)
    assert len(found) > 100
    # A pixel's rounding may move one row or column of centres over an edge.
    assert len(np.setxor1d(found, expected)) <= 0.1 * len(found)
    assert found.mean() == pytest.approx(expected.mean(), abs=12)


def test_sizes():
    assert [size_of((0, 0, side, side)) for side in (0.12, 0.17, 0.22, 0.23)] == ["small", "medium", "medium", "large"]
    assert size_of((0, 0, 0.05, 0.9)) == "medium"  # a long thin object: the mean side counts
