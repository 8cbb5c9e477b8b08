"""RefCOCO readers: every published layout, padding by hand numbers, grading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reroute.errors import UserError
from reroute.evaluation.datasets import DATASETS
from reroute.evaluation.datasets.protocol import PADDING, Canvas, read_box
from reroute.evaluation.questions import Question
from tests.evaluation import dataset_files as d

LONG = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
    "region this sentence describes: "
)
SHORT = "Please provide the bounding box coordinate of the region this sentence describes: "
read = DATASETS["refcoco"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return d.write_refcoco(tmp_path / "RefCOCO")


def test_parquet_gives_a_question_for_each_expression_and_keeps_images_together(folder: Path):
    # Shard 0 has rows 0 and 2, shard 1 has row 1: the wide image's questions come first and stay together.
    asked = read(folder, split="val")
    questions = list(asked)
    assert asked.name == "refcoco/val"
    assert len(asked) == len(questions) == 4
    assert [q.prompt.removeprefix(LONG) for q in questions] == [
        "the lady with the blue shirt",
        "lady in blue",
        "dog",
        "man on right",
    ]
    assert all(q.prompt.startswith(LONG) for q in questions)
    assert [q.image for q in questions] == [d.WIDE, d.WIDE, d.WIDE, d.TALL]
    assert [q.id for q in questions] == ["1719310.0", "1719310.1", "1719311.0", "498807.0"]
    assert {(q.skill, q.kind, q.answers) for q in questions} == {("grounding", "val", ())}
    assert asked.max_new_tokens == 1024


def test_boxes_are_shares_of_the_image_itself_in_the_papers_protocol(folder: Path):
    first, _, whole, tall = list(read(folder, split="val"))
    # 64/640, 42.5/426, (64+320)/640, (42.5+213)/426
    assert first.box == pytest.approx((0.1, 0.0997653, 0.6, 0.5997653), abs=1e-6)
    assert whole.box == (0, 0, 1, 1)
    # 33.25/333, 125/500, (33.25+166.5)/333, (125+250)/500
    assert tall.box == pytest.approx((0.09984985, 0.25, 0.59984985, 0.75), abs=1e-6)
    shown = read(folder, split="val").image(first.image)
    assert (shown.size, shown.mode) == ((640, 426), "RGB")
    assert shown.getpixel((0, 0)) == (255, 255, 255)


def test_llavas_own_protocol_pads_to_a_square_and_maps_the_boxes(folder: Path):
    asked = read(folder, split="val", protocol="llava")
    first, _, whole, tall = list(asked)
    assert asked.name == "refcoco/val (llava)"
    assert asked.max_new_tokens == 128
    assert first.prompt == SHORT + "the lady with the blue shirt"
    # 640 x 426: (640 - 426) // 2 = 107 rows above. 42.5+107 = 149.5, /640 = .23359375; 255.5+107 = 362.5, /640
    assert first.box == pytest.approx((0.1, 0.23359375, 0.6, 0.56640625), abs=1e-7)
    assert whole.box == pytest.approx((0, 107 / 640, 1, 533 / 640))
    # 333 x 500: (500 - 333) // 2 = 83 columns on the left. 33.25+83 = 116.25, 199.75+83 = 282.75, /500
    assert tall.box == pytest.approx((0.2325, 0.25, 0.5655, 0.75), abs=1e-7)

    wide = asked.image(first.image)
    assert wide.size == (640, 640)
    assert [wide.getpixel((0, y)) for y in (106, 107, 108, 532, 533)] == [
        PADDING,
        (255, 255, 255),
        (255, 0, 0),
        (255, 0, 0),
        PADDING,
    ]
    upright = asked.image(tall.image)
    assert upright.size == (500, 500)
    assert [upright.getpixel((x, 1)) for x in (82, 83, 415, 416)] == [PADDING, (255, 0, 0), (255, 0, 0), PADDING]


def test_the_padding_is_the_mean_of_clips_processor():
    assert tuple(int(255 * mean) for mean in (0.48145466, 0.4578275, 0.40821073)) == PADDING


@pytest.mark.parametrize(
    ("size", "corner"), [((64, 64), (0, 0)), ((65, 64), (0, 0)), ((64, 67), (1, 0)), ((5, 2), (0, 1))]
)
def test_an_odd_remainder_goes_right_or_below(size: tuple[int, int], corner: tuple[int, int]):
    canvas = Canvas.of(size, "llava")
    assert (canvas.left, canvas.top) == corner
    assert canvas.width == canvas.height == max(size)


TRUTH = (0.125, 0.25, 0.625, 0.75)  # exact in binary, so that no rounding decides at the threshold


@pytest.mark.parametrize(
    ("answer", "overlap"),
    [
        ("[0.125, 0.25, 0.625, 0.75]", 1.0),
        ("The region is [0.1250,0.25, 0.625,0.75 ] here.", 1.0),
        # Half as wide: the threshold counts. A little less: not.
        ("[0.125, 0.25, 0.375, 0.75]", 0.5),
        ("[0.125, 0.25, 0.365, 0.75]", 0.48),
        # The first brackets count, not the better ones; parentheses only without brackets.
        ("[0.0, 0.0, 0.1, 0.1] or [0.125, 0.25, 0.625, 0.75]", 0.0),
        ("(0.125, 0.25, 0.625, 0.75)", 1.0),
        ("(0.125, 0.25, 0.625, 0.75) [0.8, 0.8, 0.9, 0.9]", 0.0),
        # Boxes are not clipped: as much again beyond the image, below and left.
        ("[0.125, 0.25, 0.625, 1.25]", 0.5),
        ("[-0.375, 0.25, 0.625, 0.75]", 0.5),
        ("[0.625, 0.75, 0.125, 0.25]", 0.0),
        ("[12, 25, 62, 75]", 0.0),
        ("0.125, 0.25, 0.625, 0.75", None),
        ("[0.125, 0.25, 0.625]", None),
        ("", None),
    ],
)
def test_grade(folder: Path, answer: str, overlap: float | None):
    question = Question(id="q", image=d.WIDE, skill="grounding", kind="val", prompt="", box=TRUTH)
    grade = read(folder, split="val").grade(question, answer)
    assert grade.iou == pytest.approx(overlap or 0.0, abs=1e-9)
    assert grade.score == (overlap is not None and overlap >= 0.5)
    assert grade.box == read_box(answer)
    assert (grade.box is None) == (overlap is None)


def test_limit_takes_the_first_of_the_files_and_then_groups(folder: Path):
    # The published order: row 0 (2 expressions), then row 2 of the same shard.
    asked = read(folder, split="val", limit=3)
    assert [q.id for q in asked] == ["1719310.0", "1719310.1", "1719311.0"]
    assert len(read(folder, split="val", limit=100)) == 4


def test_files_directly_in_the_folder_and_one_file(folder: Path):
    assert len(read(folder / "data", split="val")) == 4
    one = read(folder / "data" / "val-00001-of-00002.parquet")
    assert (one.name, len(one)) == ("refcoco/val[00001-of-00002]", 1)


def test_a_hash_behind_the_shard_and_a_file_without_number(tmp_path: Path):
    rows = [d.refcoco_row()]
    d.write_parquet(tmp_path / "a" / "test-00000-of-00001-0a1b2c3d4e5f6789.parquet", d.refcoco_schema(), rows)
    d.write_parquet(tmp_path / "b" / "testA.parquet", d.refcoco_schema(), rows)
    assert read(tmp_path / "a", split="test").name == "refcoco/test"
    assert read(tmp_path / "b", split="testA").name == "refcoco/testA"


def test_images_are_told_apart_without_file_names(tmp_path: Path):
    schema = d.refcoco_schema()
    del schema["file_name"]
    rows = [d.refcoco_row(**row) for row in d.REFCOCO_ROWS]
    asked = read(d.write_parquet(tmp_path / "val.parquet", schema, rows))
    assert [q.image for q in asked] == ["val.parquet#0", "val.parquet#0", "val.parquet#1", "val.parquet#2"]
    assert asked.image("val.parquet#1").size == d.SIZES[d.TALL]


def test_ids_that_repeat_are_told_apart(tmp_path: Path):
    rows = [d.refcoco_row(answer=["a"]), d.refcoco_row(answer=["b"])]
    asked = read(d.write_parquet(tmp_path / "val.parquet", d.refcoco_schema(), rows))
    assert [q.id for q in asked] == ["1719310.0", "1719310.0~2"]


def test_many_rows_in_one_group_give_each_its_own_image(tmp_path: Path):
    # More than one batch of 32 in a row group, and several groups; asked forwards and backwards.
    rows = [
        d.refcoco_row(
            answer=[f"thing {n}"],
            file_name=f"{n}.jpg",
            image={"bytes": d.picture((10 + n, 20)), "path": None},
            bbox=[0.0, 0.0, 5.0, 20.0],
        )
        for n in range(150)
    ]
    asked = read(d.write_parquet(tmp_path / "val.parquet", d.refcoco_schema(), rows, group=70))
    questions = list(asked)
    assert [q.box for q in questions] == [pytest.approx((0, 0, 5 / (10 + n), 1)) for n in range(150)]
    order = [*range(150), *reversed(range(0, 150, 7)), 149, 0, 69, 70, 31, 32]
    assert [asked.image(questions[n].image).width for n in order] == [10 + n for n in order]


def test_only_a_few_images_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = {"bytes": d.picture((8, 8)), "path": None}
    rows = [d.refcoco_row(file_name=f"{n}.jpg", image=small) for n in range(200)]
    asked = read(d.write_parquet(tmp_path / "val.parquet", d.refcoco_schema(), rows, group=100))
    images: Any = asked._images  # type: ignore[attr-defined]
    most = 0
    for question in asked:
        asked.image(question.image)
        most = max(most, sum(len(batch) for batch in images._held.values()))
    assert 0 < most <= 4 * 32


# The JSON layouts. Boxes of all: the wide image's (64, 42.5, 384, 255.5).
CORNERS = [64.0, 42.5, 384.0, 255.5]
RECORDS: dict[str, dict[str, Any]] = {
    "refcoco_val.jsonl": {"image": f"data/coco/train2014/{d.WIDE}.jpg", "sent": "dog", "bbox": CORNERS},
    "REC_refcoco_unc_val.jsonl": {"img_path": f"{d.WIDE}.jpg", "expression": "dog", "bbox": CORNERS},
    "refcoco_val.json": {
        "dataset": "refcoco_val",
        "text_type": "caption",
        "normal_caption": "dog",
        "image": f"train2014/{d.WIDE}.jpg",
        "problem": SHORT + "dog.",
        "solution": CORNERS,
        "normalized_solution": [100, 100, 600, 600],
    },
}


def write_json(path: Path, value: Any) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in value))
    else:
        path.write_text(json.dumps(value))
    return path


def mdetr(**changes: Any) -> dict[str, Any]:
    image = {"id": 0, "file_name": f"{d.WIDE}.jpg", "width": 640, "height": 426, "caption": "dog", **changes}
    box = {"id": 0, "image_id": 0, "bbox": [64.0, 42.5, 320.0, 213.0], "category_id": 1, "tokens_positive": [[0, 3]]}
    return {"info": [], "licenses": [], "images": [image], "annotations": [box], "categories": []}


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("name", RECORDS)
def test_json_layouts(tmp_path: Path, name: str, sized: bool):
    coco = d.write_images(tmp_path / "coco" / "train2014").parent
    size = {"height": 426, "width": 640} if sized else {}
    write_json(tmp_path / name, [{**RECORDS[name], **size}] * 2)
    for source in (tmp_path, tmp_path / name):
        asked = read(source, images=coco, split="val")
        (first, second) = asked
        assert first.prompt == LONG + "dog"
        assert first.box == pytest.approx((0.1, 0.0997653, 0.6, 0.5997653), abs=1e-6)
        assert first.image == second.image
        assert asked.image(first.image).size == (640, 426)


def test_mdetr_annotations(tmp_path: Path):
    coco = d.write_images(tmp_path / "train2014")
    write_json(tmp_path / "finetune_refcoco+_testA.json", mdetr())
    (question,) = DATASETS["refcoco+"](tmp_path, images=coco, split="testA")
    assert question.prompt == LONG + "dog"
    assert question.box == pytest.approx((0.1, 0.0997653, 0.6, 0.5997653), abs=1e-6)
    assert question.kind == "testA"


@pytest.mark.parametrize(
    ("dataset", "name", "split"),
    [
        ("refcoco+", "refcoco+_testB.jsonl", "testB"),
        ("refcoco+", "refcocop_val.json", "val"),
        ("refcocog", "REC_refcocog_umd_test.jsonl", "test"),
    ],
)
def test_names_of_the_other_sets(tmp_path: Path, dataset: str, name: str, split: str):
    write_json(tmp_path / name, [{**RECORDS["refcoco_val.jsonl"], "width": 640, "height": 426}])
    assert DATASETS[dataset](tmp_path, images=tmp_path, split=split).name == f"{dataset}/{split}"
    assert DATASETS[dataset](tmp_path / name, images=tmp_path).name == f"{dataset}/{split}"


@pytest.mark.parametrize(
    "place", [f"{d.WIDE}.jpg", f"train2014/{d.WIDE}.jpg", "train2017/000000581857.jpg", "000000581857.jpg"]
)
def test_where_coco_images_are_found(tmp_path: Path, place: str):
    file = tmp_path / "coco" / place
    file.parent.mkdir(parents=True)
    file.write_bytes(d.picture((640, 426)))
    asked = read(write_json(tmp_path / "refcoco_val.json", mdetr()), images=tmp_path / "coco")
    assert asked.image(f"{d.WIDE}.jpg").size == (640, 426)


def test_an_image_outside_the_folder_is_not_read(tmp_path: Path):
    d.write_images(tmp_path, {"secret": (640, 426)})
    (tmp_path / "coco").mkdir()
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg")):
        asked = read(write_json(tmp_path / "refcoco_val.json", mdetr(file_name=name)), images=tmp_path / "coco")
        with pytest.raises(UserError, match="there is no image"):
            asked.image(name)


def test_an_exif_rotation_is_not_applied(tmp_path: Path):
    from PIL import Image

    from reroute.runtime.image import open_image

    exif = Image.Exif()
    exif[0x0112] = 6
    row = d.refcoco_row(image={"bytes": d.picture((640, 426), form="JPEG", exif=exif), "path": None})
    asked = read(d.write_parquet(tmp_path / "val.parquet", d.refcoco_schema(), [row]))
    question = next(iter(asked))
    assert question.box == pytest.approx((0.1, 0.0997653, 0.6, 0.5997653), abs=1e-6)
    # What a session makes of the image must be the same: the box is in its unit.
    assert open_image(asked.image(question.image)).size == (640, 426)


# Errors: one clear sentence each, naming file and row, with what is supported.


def refused(path: Path, *says: str, **options: Any) -> None:
    def use() -> None:
        asked = read(path, **options)
        for question in asked:
            asked.image(question.image)

    with pytest.raises(UserError) as caught:
        use()
    for text in says:
        assert text in str(caught.value)
    assert caught.value.hint


def test_unknown_split_and_protocol(folder: Path):
    refused(folder, "refcoco has no split 'testa'", "did you mean 'testA'?", "test, testA, testB, val", split="testa")
    refused(folder, "no protocol 'lava'", "did you mean 'llava'?", protocol="lava")
    with pytest.raises(UserError, match="no split 'testA'"):
        DATASETS["refcocog"](folder, split="testA")


def test_a_split_that_is_not_there(folder: Path):
    refused(folder, "no files of refcoco, split 'testA'", "data/testA-*.parquet", "refcoco_testA.jsonl", split="testA")
    refused(folder / "data" / "val-00000-of-00002.parquet", "of the split 'val', 'testB' was asked for", split="testB")


def test_no_path_and_unknown_kind(tmp_path: Path):
    refused(tmp_path / "nowhere", "there is no file or folder", "nowhere")
    (tmp_path / "data.csv").write_text("a")
    refused(tmp_path / "data.csv", "data.csv is of an unknown kind", ".parquet, .json, .jsonl")


def test_a_missing_shard(folder: Path):
    (folder / "data" / "val-00001-of-00002.parquet").unlink()
    refused(folder, "has 1 of 2 files of 'val'", "val-00001-of-00002.parquet is missing")


@pytest.mark.parametrize("whole", [True, False])
def test_pickles_are_refused_by_name(tmp_path: Path, whole: bool):
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x04.")
    refused(tmp_path / "refs(unc).p" if whole else tmp_path, "refs(unc).p is a pickle", "can run code", "parquet")


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_of_nothing(folder: Path, limit: int):
    refused(folder, f"the limit is {limit}", "at least 1", limit=limit)


def test_a_missing_column(tmp_path: Path):
    for name in ("bbox", "answer", "image"):
        schema = d.refcoco_schema()
        schema[f"{name}s"] = schema.pop(name)
        path = d.write_parquet(
            tmp_path / "val.parquet", schema, [{f"{name}s": d.refcoco_row()[name], **d.refcoco_row()}]
        )
        refused(path, f"val.parquet has no column '{name}'", f"did you mean '{name}s'?", "it has:")


def test_a_column_of_another_type(tmp_path: Path):
    import pyarrow as pa

    for name, kind, value, says in (
        ("answer", pa.string(), "dog", "type string, not a list of strings"),
        ("bbox", pa.list_(pa.string()), ["1"], "string>, not a list of numbers"),
        ("image", pa.binary(), b"", "type binary, not a struct of bytes and path"),
    ):
        row = {**d.refcoco_row(), name: value}
        path = d.write_parquet(tmp_path / "val.parquet", {**d.refcoco_schema(), name: kind}, [row])
        refused(path, f"val.parquet: the column '{name}' is of", says, "as downloaded")


def test_bad_rows_are_named(tmp_path: Path):
    for row, says in (
        ({"bbox": None}, "row 1: bbox is empty"),
        ({"bbox": [1.0, 2.0, 3.0]}, "row 1: bbox is [1.0, 2.0, 3.0], not 4 numbers"),
        ({"bbox": [1.0, 2.0, float("nan"), 4.0]}, "row 1: bbox is"),
        ({"bbox": [1.0, 2.0, 0.0, 4.0]}, "row 1: the box [1.0, 2.0, 1.0, 6.0] has no area"),
        ({"answer": None}, "row 1: answer is empty"),
        ({"answer": ["a", None]}, "row 1: expression 1 is empty"),
        ({"image": {"bytes": None, "path": "a.jpg"}, "file_name": "b"}, "row 1: the image has no bytes"),
        ({"image": {"bytes": b"no image", "path": "a.jpg"}, "file_name": "b"}, "row 1 is not an image"),
    ):
        rows = [d.refcoco_row(), d.refcoco_row(**row)]
        refused(d.write_parquet(tmp_path / "val.parquet", d.refcoco_schema(), rows), "val.parquet", says)


def test_a_damaged_image(tmp_path: Path):
    cut = d.picture((200, 200), form="JPEG", quality=95)
    cut = cut[: len(cut) // 2]
    path = d.write_parquet(
        tmp_path / "val.parquet", d.refcoco_schema(), [d.refcoco_row(image={"bytes": cut, "path": None})]
    )
    refused(path, "the image at", "val.parquet, row 0", "damaged")


def test_a_damaged_file(folder: Path):
    path = folder / "data" / "val-00000-of-00002.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(folder, path.name, "damaged or not a parquet file", "download it again")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(folder, path.name, "is a Git LFS pointer", "git lfs pull")


def test_changed_bytes_inside_a_file(tmp_path: Path):
    path = d.write_parquet(tmp_path / "val.parquet", d.refcoco_schema(), [d.refcoco_row() for _ in range(4)])
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    refused(path, "val.parquet", "damaged")


def test_an_empty_file(tmp_path: Path):
    refused(d.write_parquet(tmp_path / "val.parquet", d.refcoco_schema(), []), "refcoco/val has no questions")


def test_images_given_to_files_that_hold_them(folder: Path, tmp_path: Path):
    refused(folder, "holds its images", "--images", images=tmp_path)


def test_without_pyarrow(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(folder, "needs pyarrow, which is not installed", 'pip install "reroute[eval]"')


def test_json_without_images(tmp_path: Path):
    path = write_json(tmp_path / "refcoco_val.json", mdetr())
    refused(path, "refcoco_val.json names images and holds none", "--images DIR")
    refused(path, "there is no image folder", images=tmp_path / "coco")
    refused(path, f"there is no image {d.WIDE}.jpg in", "--images", images=tmp_path)


def test_an_image_of_another_size(tmp_path: Path):
    coco = d.write_images(tmp_path / "coco", {d.WIDE: (320, 213)})
    path = write_json(tmp_path / "refcoco_val.json", mdetr())
    refused(path, f"{d.WIDE}.jpg is 320 x 213 pixels, the annotation says 640 x 426", images=coco)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"images": [', "damaged: line 1"),
        ('{"images": []}', "has no 'annotations'"),
        ('{"images": {}, "annotations": []}', "is not a list of image"),
        ("[]", "refcoco/val has no questions"),
        ("[3]", "row 0 is not an object but a number"),
        ('[{"a": 1}]', "row 0 has none of the keys sent, expression, normal_caption"),
        ('[{"sent": "a", "bbox": [1, 2, 3, 4], "imag": "b"}]', "row 0 has no 'image'"),
        ('[{"sent": 1.5, "image": "b", "bbox": [1, 2, 3, 4]}]', "row 0: sent is a number, not a text"),
        ('[{"sent": "a", "image": "b", "bbox": [1, 2, 3]}]', "row 0: bbox is [1, 2, 3], not 4 numbers"),
        ('[{"sent": "a", "image": "b", "bbox": [3, 2, 1, 4]}]', "has no area"),
        ('[{"sent": "a", "image": "b", "bbox": [1, 2, 3, 4], "width": 3}]', "row 0 has no 'height'"),
        ('[{"sent": "a", "image": "b", "bbox": [1, 2, 3, 4], "width": 0, "height": 4}]', "the size is 0 x 4"),
        (json.dumps({**mdetr(), "annotations": []}), "image 0 has 0 annotations, not 1"),
        ("\udcff", "cannot read"),
    ],
)
def test_json_that_is_not_as_published(tmp_path: Path, content: str, says: str):
    path = tmp_path / "refcoco_val.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(path, "refcoco", says, images=tmp_path)


def test_a_damaged_line_is_named(tmp_path: Path):
    path = tmp_path / "refcoco_val.jsonl"
    path.write_text(json.dumps(RECORDS["refcoco_val.jsonl"]) + '\n\n{"image": \n')
    refused(path, "refcoco_val.jsonl is damaged: line 3", images=tmp_path)
