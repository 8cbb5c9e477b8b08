"""Boxes as the models answer them: (x1, y1, x2, y2) with the origin at the top left, in any one unit."""

from __future__ import annotations

from collections.abc import Sequence


def area(box: Sequence[float]) -> float:
    """Area of a box; 0 for one that is empty or turned inside out."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0..1; 0 when both are empty."""
    low = [max(a, b) for a, b in zip(first[:2], second[:2], strict=True)]
    high = [min(a, b) for a, b in zip(first[2:], second[2:], strict=True)]
    common = area((*low, *high))
    union = area(first) + area(second) - common
    return common / union if union > 0 else 0.0
