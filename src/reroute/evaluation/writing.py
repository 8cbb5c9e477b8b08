"""How a model writes boxes, and reading one: shares of its image, pixels of what it saw, or thousandths.

Qwen2.5-VL writes pixels of the resized image, as JSON and mostly in a code fence: `{"bbox_2d": [x1, y1, x2, y2],
"label": ...}` (`QwenLM/Qwen2.5-VL` cookbooks/spatial_understanding.ipynb, which divides by image_grid_thw times the
patch). Qwen2-VL and Qwen3-VL write thousandths, the first as `(x1,y1),(x2,y2)`. What is read is a share of the image as
it was shown: these models resize the whole image and cut nothing away.

As in the Reroute paper's evaluation (`elmma/mllm-reroute` lmms_eval_patches/refcoco_utils_rec.patch) four numbers of at
most 1 are shares whatever the model, and brackets win over parentheses. That evaluation divides pixels by the sides of
the original image, not of the resized one; here they are divided by what they are pixels of.
"""

from __future__ import annotations

import re

from reroute.evaluation.questions import Box, Writing

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR = ",".join([_NUMBER] * 4)
_TWO = ",".join([_NUMBER] * 2)
# A named box first, then any four numbers in brackets, in parentheses, then two corners.
_NAMED = re.compile(rf"bbox(?:_2d)?[\"']?\s*:\s*\[{_FOUR}\]")
_BRACKETS = re.compile(rf"\[{_FOUR}\]")
_PARENTHESES = re.compile(rf"\({_FOUR}\)")
_CORNERS = re.compile(rf"\({_TWO}\)\s*,\s*\({_TWO}\)")
_NESTED = re.compile(rf"\[{_TWO}\]\s*,\s*\[{_TWO}\]")


def read_written(answer: str, writing: Writing) -> Box | None:
    """The first box of an answer as shares of the image's sides; it may leave the image. None where there is none."""
    forms = (_NAMED, _BRACKETS, _PARENTHESES, _CORNERS, _NESTED)
    match = next(filter(None, (form.search(answer) for form in forms)), None)
    if match is None:
        return None
    values = [float(part) for part in match.groups()]
    width, height = {"shares": (1, 1), "pixels": writing.size, "thousandths": (1000, 1000)}[writing.boxes]
    if max(values) <= 1:
        width = height = 1
    return values[0] / width, values[1] / height, values[2] / width, values[3] / height
