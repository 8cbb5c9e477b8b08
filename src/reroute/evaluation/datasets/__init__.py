"""Readers of published datasets from local files; nothing is downloaded.

Each reads the parquet files of lmms-lab and the JSON annotations with a folder of images; the layouts stand in the
readers' docstrings, the protocols in `protocol`. Parquet needs `pip install "reroute[eval]"`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

from reroute.evaluation.datasets.gqa import SPLITS as _GQA
from reroute.evaluation.datasets.gqa import gqa
from reroute.evaluation.datasets.pope import SPLITS as _POPE
from reroute.evaluation.datasets.pope import pope
from reroute.evaluation.datasets.protocol import PROTOCOLS
from reroute.evaluation.datasets.refcoco import SPLITS as _REFCOCO
from reroute.evaluation.datasets.refcoco import refcoco
from reroute.evaluation.questions import QuestionSet

__all__ = ["DATASETS", "PROTOCOLS", "SPLITS", "Reader"]


class Reader(Protocol):
    """Reads one split. Raises UserError."""

    def __call__(
        self,
        path: Path,
        *,
        images: Path | None = None,
        split: str | None = None,
        limit: int | None = None,
        protocol: str = "lmms-eval",
    ) -> QuestionSet:
        """See `refcoco.refcoco` for the arguments."""
        ...


DATASETS: dict[str, Reader] = {
    "refcoco": partial(refcoco, dataset="refcoco"),
    "refcoco+": partial(refcoco, dataset="refcoco+"),
    "refcocog": partial(refcoco, dataset="refcocog"),
    "pope": pope,
    "gqa": gqa,
}
SPLITS: dict[str, tuple[str, ...]] = {**_REFCOCO, "pope": _POPE, "gqa": _GQA}
