"""A route as one HTML page that steps through the stages. One file: no network, no fonts, no libraries."""

from __future__ import annotations

import base64
import importlib.resources
import io

from jinja2 import Environment, StrictUndefined
from PIL import Image

from reroute import __version__
from reroute.manifest import Manifest
from reroute.runtime.answer import Answer
from reroute.runtime.image import ImageInput
from reroute.runtime.overlay import BACK_COLOUR, BOX_COLOUR, RAN_COLOUR, Fate, overlay


def route_page(image: ImageInput, answer: Answer, manifest: Manifest, *, prompt: str, image_index: int = 0) -> str:
    """Write the page. The same arguments give the same text, byte for byte.

    The page is `page.html` filled in. Its data block, the element `route`, holds for each stage that has layers a
    string `fates` with one digit for each visual token, row by row: an index into `states`.

    Args:
        image: the image that was asked about.
        answer: its answer.
        manifest: of the bundle that answered.
        prompt: the question.
        image_index: which of the answer's images `image` is.

    Returns:
        A whole HTML document.
    """
    view = overlay(image, answer, manifest, image_index=image_index)
    rows, columns = view.grid
    stages = [
        {
            "index": stage.index,
            "title": stage.title,
            "caption": stage.caption,
            "start": stage.start,
            "layers": stage.stop - stage.start,
            "ran": stage.ran,
            "share": stage.share,
            "counts": [stage.count(fate) for fate in Fate],
            "fates": "".join(map(str, stage.fates.ravel().tolist())),
        }
        for stage in view.stages
    ]
    fates_that_occur = {fate for fate in Fate if any(stage.count(fate) for stage in view.stages)}
    source = importlib.resources.files("reroute.runtime").joinpath("page.html").read_text(encoding="utf-8")
    # Everything from outside goes through autoescape or tojson, which also escapes `<` for the data block.
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(source).render(
        prompt=prompt,
        answer=answer.text.strip(),
        image=_data_uri(view.shown),
        image_number=image_index + 1,
        box=[f"{100 * side:g}" for side in view.box] if view.box else None,
        rows=rows,
        columns=columns,
        width=view.shown.width,
        height=view.shown.height,
        action=manifest.schedule.action,
        occurs={fate.name.lower(): fate in fates_that_occur for fate in Fate},
        stages=stages,
        route={"columns": columns, "states": [fate.name.lower() for fate in Fate], "stages": stages},
        colours={"ran": _css(RAN_COLOUR), "back": _css(BACK_COLOUR), "box": _css(BOX_COLOUR)},
        routing=manifest.routing,
        average=f"{manifest.average_visual_tokens:.1f}",
        model=f"{manifest.model.model_type}, {manifest.schedule.num_layers} layers, engine {manifest.backend}",
        version=__version__,
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _css(colour: tuple[int, int, int]) -> str:
    return "rgb({} {} {})".format(*colour)
