"""What the doctor says of the engine libraries that are installed."""

from __future__ import annotations

import pytest

from reroute.doctor import engine_notes


@pytest.mark.parametrize(
    ("packages", "says"),
    [
        ({}, []),
        ({"tensorrt": "8.6.1"}, ["10.3 to 11.x only", "cuda-python"]),
        ({"tensorrt": "10.3.0", "cuda-python": "12.6.2"}, ["orin-jp6 (primitive operators) only"]),
        ({"tensorrt": "10.16.1.11", "cuda-python": "13.0.0"}, ["builds every target"]),
        ({"tensorrt": "12.0.0", "cuda-python": "13.0.0"}, ["10.3 to 11.x only"]),
        ({"tensorrt-llm": "1.2.1"}, ["cannot route"]),
        ({"tensorrt-llm": "1.3.0rc20"}, ["no engine backend"]),
    ],
)
def test_notes_follow_the_versions(packages: dict[str, str | None], says: list[str]) -> None:
    notes = engine_notes(packages)
    assert len(notes) == len(says)
    for note, text in zip(notes, says, strict=True):
        assert text in note
