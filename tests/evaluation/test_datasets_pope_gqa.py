"""POPE and GQA readers: layouts, splits, grading, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reroute.errors import UserError
from reroute.evaluation.datasets import DATASETS, SPLITS
from reroute.evaluation.datasets.gqa import Gqa
from reroute.evaluation.datasets.pope import Pope
from reroute.evaluation.questions import QuestionSet
from tests.evaluation import dataset_files as d

SUFFIX = "\nAnswer the question using a single word or phrase."
CATEGORIES = ("adversarial", "popular", "random")


def pope(path: Path, **options: Any) -> Pope:
    asked = DATASETS["pope"](path, **options)
    assert isinstance(asked, Pope)
    return asked


def gqa(path: Path, **options: Any) -> Gqa:
    asked = DATASETS["gqa"](path, **options)
    assert isinstance(asked, Gqa)
    return asked


def refused(name: str, path: Path, *says: str, **options: Any) -> None:
    def use() -> None:
        asked = DATASETS[name](path, **options)
        for question in asked:
            asked.image(question.image)

    with pytest.raises(UserError) as caught:
        use()
    for text in says:
        assert text in str(caught.value)
    assert caught.value.hint


@pytest.fixture
def test_split(tmp_path: Path) -> Path:
    """The hub's default configuration: all categories in the split test, here in three shards."""
    rows = d.pope_rows()
    for index in range(3):
        name = f"test-{index:05d}-of-00003.parquet"
        d.write_parquet(tmp_path / "POPE" / "data" / name, d.pope_schema(), rows[2 * index : 2 * index + 2])
    return tmp_path / "POPE"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """The hub's configuration Full: a split for each category."""
    rows = d.pope_rows()
    for index, category in enumerate(CATEGORIES):
        path = tmp_path / "POPE" / "Full" / f"{category}-00000-of-00001.parquet"
        d.write_parquet(path, d.pope_schema(), rows[2 * index : 2 * index + 2])
    return tmp_path / "POPE"


def test_names_and_default_splits():
    assert sorted(DATASETS) == ["gqa", "pope", "refcoco", "refcoco+", "refcocog"]
    assert {name: splits[0] for name, splits in SPLITS.items()} == {
        "refcoco": "val",
        "refcoco+": "val",
        "refcocog": "val",
        "pope": "test",
        "gqa": "testdev",
    }


@pytest.mark.parametrize("layout", ["test_split", "full"])
def test_pope_parquet(layout: str, request: pytest.FixtureRequest):
    asked: QuestionSet = pope(request.getfixturevalue(layout))
    questions = list(asked)
    assert (asked.name, asked.max_new_tokens, len(asked)) == ("pope/test", 128, 6)
    assert [q.image for q in questions] == [d.WIDE] * 3 + [d.TALL] * 3
    assert [q.kind for q in questions] == [*CATEGORIES, *CATEGORIES]
    assert [q.answers for q in questions] == [("yes",)] * 3 + [("no",)] * 3
    # The question is stripped before the suffix.
    assert [q.prompt for q in questions] == [f"Is there a thing {n} in the image?{SUFFIX}" for n in (0, 2, 4, 1, 3, 5)]
    assert len({q.id for q in questions}) == 6
    assert all(q.box is None and q.skill == "vqa" for q in questions)
    assert asked.image(d.TALL).size == d.SIZES[d.TALL]


@pytest.mark.parametrize("layout", ["test_split", "full"])
@pytest.mark.parametrize("split", CATEGORIES)
def test_pope_category(layout: str, split: str, request: pytest.FixtureRequest):
    path = request.getfixturevalue(layout)
    asked = pope(path, split=split)
    assert asked.name == f"pope/{split}"
    assert Counter(q.kind for q in asked) == {split: 2}


def test_pope_single_files(test_split: Path, full: Path):
    assert pope(full / "Full" / "random-00000-of-00001.parquet").name == "pope/random"
    # A shard of the default configuration can be asked for a category; this one has it.
    assert len(pope(test_split / "data" / "test-00001-of-00003.parquet", split="popular")) == 2
    refused("pope", test_split / "data" / "test-00001-of-00003.parquet", "has no questions", split="random")


def test_pope_json(tmp_path: Path):
    folder = d.write_pope_json(tmp_path / "coco")
    images = d.write_images(tmp_path / "val2014")
    asked = pope(folder, images=tmp_path, split="random")
    first, second = asked
    assert (asked.name, first.kind, first.answers, second.answers) == ("pope/random", "random", ("no",), ("yes",))
    assert first.prompt == f"Is there a random dog?{SUFFIX}"
    assert (first.id, second.id) == ("random.0", "random.1")
    assert asked.image(first.image).size == (640, 426)
    everything = pope(folder, images=images)
    assert Counter(q.kind for q in everything) == dict.fromkeys(CATEGORIES, 2)
    assert len({q.id for q in everything}) == 6
    assert pope(folder / "coco_pope_popular.json", images=images).name == "pope/popular"


@pytest.mark.parametrize(
    ("answer", "strict", "lenient"),
    [
        ("Yes", "yes", "yes"),
        (" no\n", "no", "no"),
        ("NO", "no", "yes"),
        ("Yes.", "yes.", "yes"),
        ("No, there is a dog.", "no, there is a dog.", "no"),
        ("There is not. Yes", "there is not. yes", "no"),
        ("Yes. There is no cat.", "yes. there is no cat.", "yes"),
        ("nothing", "nothing", "yes"),
        ("", "", "yes"),
    ],
)
def test_how_pope_reads_answers(test_split: Path, answer: str, strict: str, lenient: str):
    for protocol, read in (("lmms-eval", strict), ("llava", lenient)):
        asked = pope(test_split, protocol=protocol)
        for question in asked:
            assert asked.grade(question, answer).score == (read == question.answers[0])
            assert asked.grade(question, answer).iou is None


def test_pope_summary_by_hand(test_split: Path):
    asked = pope(test_split)
    questions = list(asked)  # yes, yes, yes, no, no, no
    told = ["yes", "Yes", "dog", "yes", "no", "No"]
    # 4 of 6 right; of 3 answered yes 2 are; of the 2 yes-questions that got yes or no both are.
    assert asked.summary(zip(questions, told, strict=True)) == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 1.0, "f1": 0.8, "yes_ratio": 0.5}
    )
    # POPE's own reading: "dog" is a yes.
    lenient = pope(test_split, protocol="llava")
    assert lenient.summary(zip(questions, told, strict=True)) == pytest.approx(
        {"accuracy": 5 / 6, "precision": 3 / 4, "recall": 1.0, "f1": 6 / 7, "yes_ratio": 4 / 6}
    )
    assert asked.summary([(questions[0], "no")]) == {
        "accuracy": 0.0,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "yes_ratio": 0.0,
    }
    with pytest.raises(UserError, match="no answers"):
        asked.summary([])


def test_pope_pads_in_llavas_protocol(test_split: Path):
    asked = pope(test_split, protocol="llava")
    assert (asked.name, asked.max_new_tokens) == ("pope/test (llava)", 128)
    assert asked.image(d.TALL).size == (500, 500)


def test_pope_refuses(tmp_path: Path, test_split: Path):
    refused("pope", test_split, "pope has no split 'rndom'", "did you mean 'random'?", split="rndom")
    refused("pope", tmp_path, "no files of pope", "coco_pope_test.json")
    row = d.pope_row(0, "random", answer="maybe")
    path = d.write_parquet(tmp_path / "test.parquet", d.pope_schema(), [row])
    refused("pope", path, "test.parquet, row 0: the true answer is 'maybe'", "yes and no")
    schema = d.pope_schema()
    del schema["category"]
    path = d.write_parquet(tmp_path / "test.parquet", schema, [d.pope_row(0, "random")])
    refused("pope", path, "no column 'category'", split="random")
    # LLaVA's own question file has no labels.
    unlabelled = tmp_path / "coco_pope_random.json"
    unlabelled.write_text(
        json.dumps({"question_id": 0, "image": "a.jpg", "text": "?", "category": "random"}) + "\n" * 2
    )
    refused("pope", unlabelled, "no 'label'", images=tmp_path)


def test_pope_one_question_in_json_is_still_a_list(tmp_path: Path):
    path = tmp_path / "coco_pope_random.json"
    path.write_text(json.dumps({"question_id": 0, "image": "a.jpg", "text": "?", "label": "no"}) + "\n")
    assert len(pope(path, images=tmp_path)) == 1


def test_gqa_parquet_joins_instructions_and_images(tmp_path: Path):
    root = d.write_gqa(tmp_path / "GQA")
    for path in (root, root / "testdev_balanced_instructions"):
        asked = gqa(path, split="testdev")
        questions = list(asked)
        assert (asked.name, asked.max_new_tokens) == ("gqa/testdev", 16)
        assert [q.id for q in questions] == ["201307251", "202225914", "201640614"]
        assert [q.image for q in questions] == ["n1", "n1", "n2"]
        assert [q.answers for q in questions] == [("no",), ("man",), ("t-shirt",)]
        assert questions[0].prompt == f"Is it overcast?{SUFFIX}"
        assert {q.kind for q in questions} == {"verify"}
        assert asked.image("n2").size == (100, 300)


def test_gqa_images_elsewhere(tmp_path: Path):
    root = d.write_gqa(tmp_path / "GQA")
    (root / "testdev_balanced_images").rename(tmp_path / "pictures")
    refused("gqa", root, "the images of", "testdev_balanced_images", "--images DIR")
    file = tmp_path / "pictures" / "testdev-00000-of-00001.parquet"
    folder = d.write_images(tmp_path / "jpg", d.GQA_SIZES)
    for images in (tmp_path / "pictures", file, folder):
        asked = gqa(root, images=images)
        assert [asked.image(q.image).size for q in asked] == [(640, 480), (640, 480), (100, 300)]
    refused("gqa", root, "no image folder", images=tmp_path / "nowhere")


def test_gqa_json(tmp_path: Path):
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(d.gqa_questions()))
    images = d.write_images(tmp_path / "images", d.GQA_SIZES)
    for folder in (images, tmp_path):
        asked = gqa(tmp_path, images=folder)
        assert [(q.id, q.image) for q in asked] == [
            ("201307251", "n1.jpg"),
            ("202225914", "n1.jpg"),
            ("201640614", "n2.jpg"),
        ]
        assert asked.image("n2.jpg").size == (100, 300)
    assert gqa(tmp_path, images=images, protocol="llava").image("n2.jpg").size == (300, 300)


def test_gqa_limit_counts_in_the_published_order(tmp_path: Path):
    assert [q.id for q in gqa(d.write_gqa(tmp_path), limit=2)] == ["201307251", "201640614"]


@pytest.mark.parametrize(
    ("answer", "strict", "llava"),
    [
        ("t-shirt", 1, 1),
        ("T-Shirt.", 1, 1),
        (" T-shirt..\n", 1, 1),
        ("tshirt", 1, 0),
        ("t shirt", 0, 0),
        ("t-shirt, red", 0, 0),
        ("a t-shirt", 0, 0),
        ("t-shirt!", 1, 0),
        ("", 0, 0),
    ],
)
def test_gqa_grade(tmp_path: Path, answer: str, strict: int, llava: int):
    root = d.write_gqa(tmp_path)
    for protocol, score in (("lmms-eval", strict), ("llava", llava)):
        asked = gqa(root, protocol=protocol)
        (question,) = (q for q in asked if q.answers == ("t-shirt",))
        assert asked.grade(question, answer).score == score


def test_gqa_refuses(tmp_path: Path):
    root = d.write_gqa(tmp_path / "GQA")
    refused("gqa", root, "gqa has no split 'testdv'", "did you mean 'testdev'?", split="testdv")
    refused("gqa", root, "no files of gqa, split 'val'", "val_balanced_instructions/val-*.parquet", split="val")
    images = root / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
    row = {"id": "n1", "image": {"bytes": d.picture((5, 5)), "path": None}}
    import pyarrow as pa

    d.write_parquet(images, {"id": pa.string(), "image": d.image_type()}, [row])
    refused("gqa", root, "row 1: there is no image 'n2'")
    other = images.with_name("val-00000-of-00001.parquet")
    images.rename(other)
    refused("gqa", root, "is of the split 'val', the questions of 'testdev'", images=other)
    path = tmp_path / "testdev_balanced_questions.json"
    for content, says in (
        ("[]", "is not an object of question ids"),
        ('{"1": 2}', "question 1 is not an object"),
        ('{"1": {"question": "?", "answer": "no"}}', "question 1 has no 'imageId'"),
        ('{"1": {"question": "?", "imageId": "n1"}}', "question 1 has no 'answer'"),
        ("{}", "gqa/testdev has no questions"),
    ):
        path.write_text(content)
        refused("gqa", path, says, images=tmp_path)
