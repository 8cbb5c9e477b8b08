"""Ask an engine bundle about images with numpy, pillow, tokenizers, jinja2 and one engine library.

    with Session.open("bundle") as session:
        print(session.ask("where is the red circle ?", "scene.png").text)

Nothing here imports torch, transformers or onnx, and nothing imports `reroute.export` or `reroute.engines`:
what a bundle is stands in its manifest. The engine library itself is imported when a backend opens.

    bundle -> chat, image -> layout, rope -> backend (ort) -> sampling, text -> session -> picture, page
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reroute.runtime.answer import Answer as Answer
    from reroute.runtime.answer import AnswerStream as AnswerStream
    from reroute.runtime.answer import Timings as Timings
    from reroute.runtime.backend import Backend as Backend
    from reroute.runtime.backend import BackendOptions as BackendOptions
    from reroute.runtime.bundle import Bundle as Bundle
    from reroute.runtime.features import Features as Features
    from reroute.runtime.overlay import parse_box as parse_box
    from reroute.runtime.page import route_page as route_page
    from reroute.runtime.picture import route_picture as route_picture
    from reroute.runtime.prefix import Prefix as Prefix
    from reroute.runtime.sampling import Sampling as Sampling
    from reroute.runtime.session import Session as Session
    from reroute.runtime.text import Token as Token

_HOME = {
    "Answer": "answer",
    "AnswerStream": "answer",
    "Backend": "backend",
    "BackendOptions": "backend",
    "Bundle": "bundle",
    "Features": "features",
    "Prefix": "prefix",
    "Sampling": "sampling",
    "Session": "session",
    "Timings": "answer",
    "Token": "text",
    "parse_box": "overlay",
    "route_page": "page",
    "route_picture": "picture",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Loaded on first use (PEP 562): `reroute --help` must not pay for tokenizers, jinja2 and pillow.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
