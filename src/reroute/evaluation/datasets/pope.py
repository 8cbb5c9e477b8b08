"""POPE: is this object in the image? Half of the answers are no.

| layout | columns or keys | source |
|---|---|---|
| lmms-lab parquet, `data/test-00000-of-00003.parquet` (all 9000), `Full/random-00000-of-00001.parquet` and so on | id, question_id, question, answer, image_source, image, category | `lmms-lab/POPE`, as read by `EvolvingLMMs-Lab/lmms-eval` tasks/pope/utils.py |
| `coco_pope_random.json`, JSON lines, and COCO val2014 | question_id, image, text, label | `AoiDragon/POPE` output/coco |

"lmms-eval" takes an answer that is yes or no and nothing else, whatever its case (the same utils.py). "llava" reads as
POPE's evaluate.py and LLaVA's eval/eval_pope.py do: no if the first sentence has one of the words No, no, not; else yes.
"""  # noqa: E501  (a table)

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from reroute.errors import UserError
from reroute.evaluation.datasets import json_files
from reroute.evaluation.datasets.find import find, split_in
from reroute.evaluation.datasets.local import Item, LocalSet
from reroute.evaluation.datasets.parquet import TEXT, ParquetImages, read_rows, shard_note, shards, split_of
from reroute.evaluation.datasets.protocol import SHORT_ANSWER, Protocol, check_protocol
from reroute.evaluation.datasets.refcoco import embedded
from reroute.evaluation.questions import Grade, Question, Writing

CATEGORIES = ("adversarial", "popular", "random")
SPLITS = ("test", *CATEGORIES)


def read_answer(answer: str, protocol: Protocol) -> str:
    """What an answer says: "yes", "no", or under "lmms-eval" whatever else it is."""
    if protocol != "llava":
        return answer.strip().lower()
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


class Pope(LocalSet):
    """Yes-or-no questions; the kind of a question is its category."""

    skill = "vqa"
    lengths = {"lmms-eval": 128, "llava": 128, "qwen": 128}  # noqa: RUF012  (a constant)

    def grade(self, question: Question, answer: str, writing: Writing | None = None) -> Grade:
        """1 when the answer is read as the true one."""
        return Grade(score=float(read_answer(answer, self.protocol) in question.answers))

    def summary(self, answers: Iterable[tuple[Question, str]]) -> dict[str, float]:
        """Accuracy, precision, recall and F1 of yes, and the share of yes, all 0..1, of questions and their answers.

        An answer that is neither yes nor no counts against the accuracy only, as in lmms-eval. The share of yes
        is of the answers, as in POPE's evaluate.py; lmms-eval's `pope_yes_ratio` is that of the truths.
        """
        pairs = [(question.answers[0], read_answer(answer, self.protocol)) for question, answer in answers]
        if not pairs:
            raise UserError("there are no answers to sum up", hint="ask at least one question")
        hits = pairs.count(("yes", "yes"))
        precision = _share(hits, hits + pairs.count(("no", "yes")))
        recall = _share(hits, hits + pairs.count(("yes", "no")))
        return {
            "accuracy": _share(sum(truth == told for truth, told in pairs), len(pairs)),
            "precision": precision,
            "recall": recall,
            "f1": _share(2 * precision * recall, precision + recall),
            "yes_ratio": _share(sum(told == "yes" for _, told in pairs), len(pairs)),
        }


def pope(
    path: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    protocol: str = "lmms-eval",
) -> Pope:
    """Read a split.

    Args:
        path: one of the files above, or the folder that holds them.
        images: COCO images (val2014), for the JSON layout.
        split: "test" for all, or a category; None for what the file's name says, or "test".
        limit: ask only the first questions of the files.
        protocol: "lmms-eval", "llava" or "qwen", which asks and judges as "lmms-eval" does.

    Raises:
        UserError: whatever is wrong with the files.
    """
    chosen = check_protocol(protocol)
    split, layout, files = _files(path, split)
    name = f"pope/{split}{shard_note(files)}"
    if layout == "parquet":
        embedded(images, files[0])
        stored = ParquetImages()
        stored.check(files)
        return Pope(_parquet_items(files, stored, split), stored, name=name, protocol=chosen, limit=limit)
    folder = json_files.image_folder(images, files[0])
    return Pope(_json_items(files, split), folder, name=name, protocol=chosen, limit=limit)


def _files(path: Path, split: str | None) -> tuple[str, str, list[Path]]:
    if path.is_dir():
        if split in CATEGORIES and not any(shards(path / f, split) for f in ("Full", "", "data")):
            # The default configuration has one split of all categories; rows say theirs.
            for folder in ("data", ""):
                if files := shards(path / folder, "test"):
                    return split, "parquet", files
        if split in (None, "test") and not any(shards(path / folder, "test") for folder in ("data", "")):
            parts = [shards(path / "Full", category) for category in CATEGORIES]
            if all(parts):
                return "test", "parquet", [file for part in parts for file in part]
            jsons = [path / f"coco_pope_{category}.json" for category in CATEGORIES]
            if all(file.is_file() for file in jsons):
                return "test", "json", jsons
    elif split in CATEGORIES and path.suffix == ".parquet" and split_in(path, SPLITS) == "test":
        return split, "parquet", [path]
    names = ("coco_pope_{split}.json",)
    return find(path, split, dataset="pope", splits=SPLITS, folders=("data", "Full", ""), names=names)


def _parquet_items(files: Sequence[Path], images: ParquetImages, split: str) -> Iterator[Item]:
    columns = {"question": TEXT, "answer": TEXT}
    optional = ("id", "question_id", "category", "image_source")
    for path, row, values in read_rows(files, columns, optional=optional):
        where = f"{path}, row {row}"
        category = str(values.get("category") or split_of(path) or split)
        if split in CATEGORIES:
            if "category" not in values and split_of(path) != split:
                raise UserError(
                    f"{path} has no column 'category', so there is no telling {split!r}", hint="ask for the split test"
                )
            if category != split:
                continue
        key = str(values.get("image_source") or f"{path.name}#{row}")
        images.add(key, path, row)
        yield _item(
            f"{category}.{values.get('question_id') or row}", key, category, values["question"], values["answer"], where
        )


def _json_items(files: Sequence[Path], split: str) -> Iterator[Item]:
    for path in files:
        stem = path.stem.removeprefix("coco_pope_")
        category = stem if stem in CATEGORIES else split
        value = json_files.load(path)
        lines = [value] if isinstance(value, dict) else value  # one line of JSON lines is also JSON
        for row, entry in enumerate(json_files.records(path, lines, "question")):
            where = f"{path}, row {row}"
            image, question, label = (json_files.text(entry, key, where) for key in ("image", "text", "label"))
            yield _item(f"{category}.{entry.get('question_id', row)}", image, category, question, label, where)


def _item(identity: str, image: str, category: str, question: str, answer: str, where: str) -> Item:
    truth = answer.strip().lower()
    if truth not in ("yes", "no"):
        raise UserError(f"{where}: the true answer is {answer!r}", hint="POPE's answers are yes and no")
    prompt = question.strip() + SHORT_ANSWER
    return Item(id=identity, image=image, kind=category, prompt=prompt, answers=(truth,))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
