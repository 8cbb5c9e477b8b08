"""Small files in the published layouts: columns, types and names as on the hub and in the original repositories."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

# COCO train2014 names; the parquet files of lmms-lab put the object's number behind.
WIDE, TALL, SQUARE = (f"COCO_train2014_{number:012d}" for number in (581857, 580957, 42))
SIZES = {WIDE: (640, 426), TALL: (333, 500), SQUARE: (64, 64)}

REFCOCO_ROWS = (
    {
        "question_id": "1719310",
        "image": WIDE,
        "answer": ["the lady with the blue shirt", "lady in blue"],
        "bbox": [64.0, 42.5, 320.0, 213.0],
        "file_name": f"{WIDE}_0.jpg",
    },
    {
        "question_id": "498807",
        "image": TALL,
        "answer": ["man on right"],
        "bbox": [33.25, 125.0, 166.5, 250.0],
        "file_name": f"{TALL}_4.jpg",
    },
    {
        "question_id": "1719311",
        "image": WIDE,
        "answer": ["dog"],
        "bbox": [0.0, 0.0, 640.0, 426.0],
        "file_name": f"{WIDE}_1.jpg",
    },
)


def picture(size: tuple[int, int], colour: str = "red", form: str = "PNG", **options: Any) -> bytes:
    """An encoded image whose top left pixel is white."""
    image = Image.new("RGB", size, colour)
    ImageDraw.Draw(image).point((0, 0), "white")
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_images(folder: Path, names: Mapping[str, tuple[int, int]] = SIZES, suffix: str = ".jpg") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in names.items():
        (folder / f"{name}{suffix}").write_bytes(picture(size, form="PNG"))
    return folder


def write_parquet(path: Path, schema: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], group: int = 2) -> Path:
    """A parquet file with small row groups. "image" columns hold bytes; the hub's struct is made here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in schema.items()})
    # What tells `datasets`, and so lmms-eval, which column is an image; the reader does not look at it.
    features = {name: feature(kind) for name, kind in schema.items()}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


def feature(kind: Any) -> Any:
    """A column's type as the hub's files write it into their metadata."""
    import pyarrow as pa

    if kind == image_type():
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {kind.field(index).name: feature(kind.field(index).type) for index in range(kind.num_fields)}
    if pa.types.is_list(kind):
        return {"feature": feature(kind.value_type), "_type": "Sequence"}
    names = {pa.float32(): "float32", pa.int8(): "int8", pa.bool_(): "bool", pa.binary(): "binary"}
    return {"dtype": names.get(kind, "string"), "_type": "Value"}


def image_type() -> Any:
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def refcoco_schema() -> dict[str, Any]:
    """The features on the card of lmms-lab/RefCOCOg."""
    import pyarrow as pa

    return {
        "question_id": pa.string(),
        "image": image_type(),
        "question": pa.string(),
        "answer": pa.list_(pa.string()),
        "segmentation": pa.list_(pa.float32()),
        "bbox": pa.list_(pa.float32()),
        "iscrowd": pa.int8(),
        "file_name": pa.string(),
    }


def refcoco_row(**changes: Any) -> dict[str, Any]:
    row = {**REFCOCO_ROWS[0], **changes}
    image = row["image"]
    if isinstance(image, str):
        image = {"bytes": picture(SIZES[image]), "path": f"{image}.jpg"}
    return {
        "question": "Please carefully observe the area circled in the image.",
        "segmentation": [1.0, 2.0],
        "iscrowd": 0,
        **row,
        "image": image,
    }


def write_refcoco(folder: Path, split: str = "val", shards: int = 2) -> Path:
    """`data/<split>-0000i-of-0000n.parquet` with the three rows of REFCOCO_ROWS."""
    for index in range(shards):
        rows = [refcoco_row(**row) for row in REFCOCO_ROWS[index::shards]] if shards > 1 else None
        rows = rows or [refcoco_row(**row) for row in REFCOCO_ROWS]
        write_parquet(folder / "data" / f"{split}-{index:05d}-of-{shards:05d}.parquet", refcoco_schema(), rows)
    return folder


def pope_schema() -> dict[str, Any]:
    import pyarrow as pa

    text = ("id", "question_id", "question", "answer", "image_source", "category")
    return {**{name: pa.string() for name in text}, "image": image_type()}


def pope_row(index: int, category: str, answer: str = "yes", source: str = WIDE) -> dict[str, Any]:
    return {
        "id": str(index),
        "question_id": str(index % 2 + 1),
        "question": f"Is there a thing {index} in the image? ",
        "answer": answer,
        "image_source": source,
        "category": category,
        "image": {"bytes": picture(SIZES[source]), "path": f"{source}.jpg"},
    }


def pope_rows() -> list[dict[str, Any]]:
    """Two questions of each category, in the order of the hub's file; the second is about another image."""
    rows = []
    for number, category in enumerate(("adversarial", "popular", "random")):
        rows.append(pope_row(2 * number, category))
        rows.append(pope_row(2 * number + 1, category, "no", TALL))
    return rows


def write_pope_json(folder: Path) -> Path:
    """The three files of AoiDragon/POPE: JSON lines in a .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for category in ("adversarial", "popular", "random"):
        lines = [
            {
                "question_id": 0,
                "image": f"{WIDE}.jpg",
                "image_id": 7,
                "text": f"Is there a {category} dog?",
                "label": "no",
            },
            {"question_id": 1, "image": f"{WIDE}.jpg", "image_id": 7, "text": "Is there a cat?", "label": "yes"},
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"coco_pope_{category}.json").write_text(content)
    return folder


def gqa_question(image: str = "n1", **changes: Any) -> dict[str, Any]:
    return {
        "imageId": image,
        "question": "Is it overcast?",
        "answer": "no",
        "fullAnswer": "No, it is clear.",
        "isBalanced": True,
        "types": {"semantic": "global", "structural": "verify", "detailed": "weatherVerify"},
        **changes,
    }


def gqa_questions() -> dict[str, dict[str, Any]]:
    return {
        "201307251": gqa_question("n1"),
        "201640614": gqa_question("n2", question="What is the man wearing?", answer="t-shirt"),
        "202225914": gqa_question("n1", question="Who is there?", answer="man"),
    }


def write_gqa(folder: Path, split: str = "testdev") -> Path:
    """Instructions and images as lmms-lab's two configurations."""
    import pyarrow as pa

    text = {name: pa.string() for name in ("id", "imageId", "question", "answer", "fullAnswer")}
    types = pa.struct([(name, pa.string()) for name in ("structural", "semantic", "detailed")])
    rows = [{"id": key, **entry} for key, entry in gqa_questions().items()]
    name = f"{split}-00000-of-00001.parquet"
    write_parquet(
        folder / f"{split}_balanced_instructions" / name, {**text, "isBalanced": pa.bool_(), "types": types}, rows
    )
    images = [{"id": key, "image": {"bytes": picture(size), "path": None}} for key, size in GQA_SIZES.items()]
    write_parquet(folder / f"{split}_balanced_images" / name, {"id": pa.string(), "image": image_type()}, images)
    return folder


GQA_SIZES = {"n1": (640, 480), "n2": (100, 300)}
