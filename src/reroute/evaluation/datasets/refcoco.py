"""RefCOCO, RefCOCO+ and RefCOCOg: where is what this expression describes?

| layout | columns or keys | boxes | source |
|---|---|---|---|
| lmms-lab parquet, `data/val-00000-of-00002.parquet` | question_id, image, question, answer (list), segmentation, bbox, iscrowd, file_name | x, y, w, h in pixels | card of `lmms-lab/RefCOCOg` (val 7573, test 5023 rows) |
| `refcoco_val.jsonl` | image, sent, bbox, height, width | x1, y1, x2, y2 in pixels | `QwenLM/Qwen-VL` eval_mm/evaluate_grounding.py |
| `REC_refcoco_unc_val.jsonl` | img_path, expression, bbox | x1, y1, x2, y2 in pixels | `shikras/shikra` mllm/dataset/single_image_dataset/rec.py |
| `refcoco_val.json` | image, normal_caption, solution, height, width | x1, y1, x2, y2 in pixels | `Man-PaperRejected/Nuwa` coco_data/refcoco.json |
| `finetune_refcoco_val.json` | images: id, file_name, caption, height, width; annotations: image_id, bbox | x, y, w, h in pixels | MDETR's, as read by `open-mmlab/mmdetection` mmdet/datasets/mdetr_style_refcoco.py |

A parquet row has one object and several expressions; each expression is a question, as in lmms-eval's
tasks/refcoco/utils_rec.py. The original `refs(unc).p` is a pickle and refused.

An answer is right at an IoU of 0.5 or more with the box that was read; no box is IoU 0 (the same file).
"""  # noqa: E501  (a table)

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reroute.boxes import iou
from reroute.errors import UserError
from reroute.evaluation.datasets import json_files
from reroute.evaluation.datasets.find import find
from reroute.evaluation.datasets.local import Item, LocalSet
from reroute.evaluation.datasets.parquet import NUMBERS, TEXTS, ParquetImages, read_rows, shard_note
from reroute.evaluation.datasets.protocol import (
    LOCATE,
    REFCOCO_LONG,
    REFCOCO_SHORT,
    Protocol,
    check_protocol,
    read_box,
)
from reroute.evaluation.questions import Box, Grade, Question, Writing
from reroute.evaluation.writing import read_written

SPLITS = {
    "refcoco": ("val", "testA", "testB", "test"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}
# Keys of image, expression and box (x1, y1, x2, y2) in files of one record a question.
_FORMS = (("image", "sent", "bbox"), ("img_path", "expression", "bbox"), ("image", "normal_caption", "solution"))
# The image in file names such as COCO_train2014_000000581857_16.jpg, whose end is the object.
_COCO_NAME = re.compile(r"COCO_(?:train|val)2014_\d{12}")


class RefCoco(LocalSet):
    """Grounding by referring expressions."""

    skill = "grounding"
    lengths = {"lmms-eval": 1024, "llava": 128, "qwen": 512}  # noqa: RUF012  (a constant)

    def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
        """1 at an IoU of 0.5 or more. The box is as written, so it may leave the image."""
        box = read_box(answer) if writing is None else read_written(answer, writing)
        overlap = 0.0 if box is None or question.box is None else iou(box, question.box)
        return Grade(score=float(overlap >= 0.5), iou=overlap, box=box)


def refcoco(
    path: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    protocol: str = "lmms-eval",
    dataset: str = "refcoco",
) -> RefCoco:
    """Read a split.

    Args:
        path: one of the files above, or the folder that holds them.
        images: COCO images (train2014), for the JSON layouts.
        split: see `SPLITS`; None for the one in the file's name, or val.
        limit: ask only the first questions of the files.
        protocol: "lmms-eval", "llava" or "qwen".
        dataset: "refcoco", "refcoco+" or "refcocog".

    Raises:
        UserError: whatever is wrong with the files.
    """
    chosen = check_protocol(protocol)
    name = dataset.replace("+", "p")  # VLM-R1's and Nuwa's spelling
    qualifier = "umd" if dataset == "refcocog" else "unc"
    split, layout, files = find(
        path,
        split,
        dataset=dataset,
        splits=SPLITS[dataset],
        folders=("data", ""),
        names=(
            f"{dataset}_{{split}}.jsonl",
            f"REC_{dataset}_{qualifier}_{{split}}.jsonl",
            f"finetune_{dataset}_{{split}}.json",
            f"{dataset}_{{split}}.json",
            f"{name}_{{split}}.json",
        ),
    )
    title = f"{dataset}/{split}{shard_note(files)}"
    if layout == "parquet":
        embedded(images, files[0])
        stored = ParquetImages()
        stored.check(files)
        items = _parquet_items(files, stored, split, chosen)
        return RefCoco(items, stored, name=title, protocol=chosen, limit=limit)
    folder = json_files.image_folder(images, files[0])
    items = _json_items(files[0], json_files.load(files[0]), split, chosen)
    return RefCoco(items, folder, name=title, protocol=chosen, limit=limit)


def embedded(images: Path | None, file: Path) -> None:
    """Raises UserError when an image folder is given to files that hold their images."""
    if images is not None:
        raise UserError(f"{file.name} holds its images, --images {images} would not be used", hint="leave it out")


def _prompt(expression: str, protocol: Protocol) -> str:
    if protocol == "qwen":
        return LOCATE.format(expression)
    return (REFCOCO_LONG if protocol == "lmms-eval" else REFCOCO_SHORT) + expression


def _parquet_items(files: Sequence[Path], images: ParquetImages, split: str, protocol: Protocol) -> Iterator[Item]:
    columns = {"answer": TEXTS, "bbox": NUMBERS}
    for path, row, values in read_rows(files, columns, optional=("question_id", "file_name")):
        where = f"{path}, row {row}"
        match = _COCO_NAME.match(values.get("file_name") or "")
        key = match[0] if match else f"{path.name}#{row}"
        images.add(key, path, row)
        pixels = _corners(json_files.numbers(values, "bbox", 4, where), where)
        for index, expression in enumerate(values["answer"]):
            if not isinstance(expression, str):
                raise UserError(f"{where}: expression {index} is empty", hint="download the file again")
            yield Item(
                id=f"{values.get('question_id') or row}.{index}",
                image=key,
                kind=split,
                prompt=_prompt(expression, protocol),
                pixels=pixels,
            )


def _json_items(path: Path, value: Any, split: str, protocol: Protocol) -> Iterator[Item]:
    rows = _mdetr_rows(path, value) if isinstance(value, dict) else _rows(path, value)
    for number, (image, expression, pixels, record) in enumerate(rows):
        where = f"{path}, row {number}"
        yield Item(
            id=str(number),
            image=image,
            kind=split,
            prompt=_prompt(expression, protocol),
            pixels=_checked(pixels, where),
            size=json_files.size(record, where),
        )


def _rows(path: Path, value: Any) -> Iterator[tuple[str, str, Box, dict[str, Any]]]:
    entries = json_files.records(path, value, "expression")
    form = next((form for form in _FORMS if entries and form[1] in entries[0]), None)
    if form is None and entries:
        raise UserError(
            f"{path}, row 0 has none of the keys {', '.join(form[1] for form in _FORMS)}",
            hint=f"it has {', '.join(entries[0])}; supported layouts stand in docs/evaluation.md",
        )
    for row, entry in enumerate(entries):
        where = f"{path}, row {row}"
        image, expression, box = form or _FORMS[0]
        x1, y1, x2, y2 = json_files.numbers(entry, box, 4, where)
        yield json_files.text(entry, image, where), json_files.text(entry, expression, where), (x1, y1, x2, y2), entry


def _mdetr_rows(path: Path, value: dict[str, Any]) -> Iterator[tuple[str, str, Box, dict[str, Any]]]:
    boxes: dict[Any, list[dict[str, Any]]] = {}
    found = json_files.take(value, "annotations", str(path))
    for row, entry in enumerate(json_files.records(path, found, "annotation")):
        key = json_files.text(entry, "image_id", f"{path}, annotation {row}")
        boxes.setdefault(key, []).append(entry)
    entries = json_files.records(path, json_files.take(value, "images", str(path)), "image")
    for row, entry in enumerate(entries):
        where = f"{path}, image {row}"
        own = boxes.get(json_files.text(entry, "id", where), [])
        if len(own) != 1:
            raise UserError(f"{where} has {len(own)} annotations, not 1", hint="an expression describes one object")
        pixels = _corners(json_files.numbers(own[0], "bbox", 4, where), where)
        yield json_files.text(entry, "file_name", where), json_files.text(entry, "caption", where), pixels, entry


def _corners(box: Sequence[float], where: str) -> Box:
    x, y, width, height = box
    return _checked((x, y, x + width, y + height), where)


def _checked(box: Box, where: str) -> Box:
    if box[0] >= box[2] or box[1] >= box[3]:
        raise UserError(f"{where}: the box {list(box)} has no area", hint="download the file again")
    return box
