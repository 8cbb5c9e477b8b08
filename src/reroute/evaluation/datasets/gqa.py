"""GQA: questions about scenes, answered with a word or two. The balanced questions of a split.

| layout | columns or keys | source |
|---|---|---|
| lmms-lab parquet: `testdev_balanced_instructions/` and `testdev_balanced_images/`, each `testdev-00000-of-00001.parquet` | id, imageId, question, answer, types, ...; id, image | `EvolvingLMMs-Lab/lmms-eval` tasks/gqa/{gqa.yaml,utils.py} |
| `testdev_balanced_questions.json` and a folder of `<imageId>.jpg` | question id to imageId, question, answer, types, ... | GQA 1.2, as read by `TRI-ML/vlm-evaluation` vlm_eval/tasks/harnesses/gqa.py |

testdev has 12578 questions on 398 images (the last file asserts it).

"lmms-eval" compares without case and punctuation (gqa.yaml: exact_match with ignore_case and ignore_punctuation, in
api/metrics.py). "llava" drops dots at the end and case, and then the answer must be equal (`haotian-liu/LLaVA`
scripts/convert_gqa_for_eval.py, then GQA's eval.py).
"""  # noqa: E501  (a table)

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reroute.errors import UserError
from reroute.evaluation.datasets import json_files
from reroute.evaluation.datasets.find import find
from reroute.evaluation.datasets.local import Images, Item, LocalSet
from reroute.evaluation.datasets.parquet import TEXT, ParquetImages, read_rows, shard_note, shards, split_of
from reroute.evaluation.datasets.protocol import SHORT_ANSWER, Protocol, check_protocol
from reroute.evaluation.questions import Grade, Question, Writing

SPLITS = ("testdev", "val", "train")

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str, protocol: Protocol) -> str:
    """An answer as the protocol compares it."""
    text = text.strip().lower()
    return text.translate(_PUNCTUATION) if protocol != "llava" else text.rstrip(".")


class Gqa(LocalSet):
    """One-word questions; the kind of a question is its structural type (verify, query, choose, logical, compare)."""

    skill = "vqa"
    lengths = {"lmms-eval": 16, "llava": 128, "qwen": 16}  # noqa: RUF012  (a constant)

    def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
        """1 when the answers are equal after `normalise`."""
        truth, told = question.answers[0], normalise(answer, self.protocol)
        return Grade(score=float(told == (normalise(truth, "lmms-eval") if self.protocol != "llava" else truth)))


def gqa(
    path: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    protocol: str = "lmms-eval",
) -> Gqa:
    """Read a split.

    Args:
        path: the folder with both parquet folders, the instructions' folder or file, or the JSON file or its folder.
        images: GQA's image folder; for parquet only when the images are not next to the instructions.
        split: see `SPLITS`; None for what the file's name says, or testdev.
        limit: ask only the first questions of the files.
        protocol: "lmms-eval", "llava" or "qwen", which asks and judges as "lmms-eval" does.

    Raises:
        UserError: whatever is wrong with the files.
    """
    chosen = check_protocol(protocol)
    split, layout, files = find(
        path,
        split,
        dataset="gqa",
        splits=SPLITS,
        folders=("{split}_balanced_instructions", ""),
        names=("{split}_balanced_questions.json",),
    )
    name = f"gqa/{split}{shard_note(files)}"
    if layout == "parquet":
        stored = _parquet_images(files[0], images, split)
        return Gqa(_parquet_items(files, stored, split), stored, name=name, protocol=chosen, limit=limit)
    folder = json_files.image_folder(images, files[0])
    return Gqa(_json_items(files[0], split), folder, name=name, protocol=chosen, limit=limit)


def _parquet_images(instructions: Path, images: Path | None, split: str) -> Images:
    beside = instructions.parent.parent / f"{split}_balanced_images"
    place = images or beside
    if place.is_file():
        if place.suffix != ".parquet":
            raise UserError(f"{place} is no parquet file", hint=f"give the folder {beside.name}, or one of images")
        files = [place]
    else:
        files = shards(place, split) or shards(place / beside.name, split)
    if not files:
        if images is not None:
            return json_files.image_folder(images, instructions)
        raise UserError(
            f"the images of {instructions} are not in {beside}",
            hint=f"download {beside.name} of lmms-lab/GQA, or give a folder of images: --images DIR",
        )
    for file in files:
        if split_of(file) not in (None, split):
            raise UserError(
                f"{file} is of the split {split_of(file)!r}, the questions of {split!r}", hint="see --images"
            )
    stored = ParquetImages()
    stored.check(files)
    for file, row, values in read_rows(files, {"id": TEXT}):
        stored.add(values["id"], file, row)
    return stored


def _parquet_items(files: Sequence[Path], images: Images, split: str) -> Iterator[Item]:
    columns = {"imageId": TEXT, "question": TEXT, "answer": TEXT}
    for path, row, values in read_rows(files, columns, optional=("id", "types")):
        where = f"{path}, row {row}"
        image = values["imageId"]
        if isinstance(images, ParquetImages):
            if image not in images:
                raise UserError(f"{where}: there is no image {image!r}", hint="download the images of the same split")
        else:
            image = f"{image}.jpg"
        yield _item(str(values.get("id") or row), image, values, split, where)


def _json_items(path: Path, split: str) -> Iterator[Item]:
    questions = json_files.load(path)
    if not isinstance(questions, dict):
        raise UserError(
            f"{path} is not an object of question ids", hint="give GQA's own testdev_balanced_questions.json"
        )
    for identity, entry in questions.items():
        where = f"{path}, question {identity}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is not an object", hint="give GQA's own testdev_balanced_questions.json")
        yield _item(identity, f"{json_files.text(entry, 'imageId', where)}.jpg", entry, split, where)


def _item(identity: str, image: str, entry: dict[str, Any], split: str, where: str) -> Item:
    types = entry.get("types")
    kind = types.get("structural") if isinstance(types, dict) else None
    return Item(
        id=identity,
        image=image,
        kind=str(kind or split),
        prompt=json_files.text(entry, "question", where) + SHORT_ANSWER,
        answers=(json_files.text(entry, "answer", where),),
    )
