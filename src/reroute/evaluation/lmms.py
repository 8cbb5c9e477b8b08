"""The model "reroute" for lmms-eval: its tasks, asked of an engine bundle.

    python -m lmms_eval --model reroute --model_args bundle=out/engine,threads=8 --tasks pope --batch_size 1

lmms-eval finds it by the entry point `reroute` in the group `lmms_eval.models`, which names `manifest` (its
models/registry_v2.py, the same in 0.7.1 and 0.7.3). The class itself is made when it is asked for, because its base
class is lmms-eval's, which this package does not require.

A request of `generate_until` is `(context, generation_kwargs, doc_to_visual, doc_id, task, split)` (api/task.py), its
document `task_dict[task][split][doc_id]`. Each is a dialogue of its own: images first, then the context, as
models/simple/llava_hf.py asks LLaVA. Two differences from there: stop strings (`until`) end an answer, and an error
ends the run instead of counting as an empty answer.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from reroute.errors import UserError, nearest
from reroute.runtime import Sampling

if TYPE_CHECKING:
    from reroute.runtime import Session

# What models/simple/llava_hf.py generates at most when a task does not say.
MAX_NEW_TOKENS = 1024

_ARGUMENTS = ("bundle", "tier", "threads", "provider")
_KNOWN = {"until", "max_new_tokens", "temperature", "top_p", "num_beams", "do_sample"}


def manifest() -> Any:
    """lmms-eval's `ModelManifest` of this model. Raises UserError without lmms-eval."""
    registry = _import("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id="reroute", simple_class_path=f"{__name__}.Reroute")


def answer(session: Session, context: str, images: Sequence[Image.Image], options: dict[str, Any]) -> str:
    """Ask one question of its own.

    Args:
        session: anything in it is forgotten first.
        context: the task's text; image tokens at its start are left out, since the template writes them.
        images: of the question; none for a text-only one.
        options: lmms-eval's generation_kwargs.

    Raises:
        UserError: an option or an image token that is not supported, or the session refuses the question.
    """
    beams = options.get("num_beams") or 1
    if beams != 1:
        raise UserError(f"num_beams is {beams}: beam search is not supported", hint="use num_beams=1")
    if unknown := sorted(set(options) - _KNOWN):
        raise UserError(f"there is no generation option {unknown[0]!r}", hint=nearest(unknown[0], _KNOWN))
    temperature = float(options.get("temperature") or 0) if options.get("do_sample", True) else 0.0
    sampling = Sampling(temperature=temperature, top_p=float(options.get("top_p") or 1)) if temperature else None
    until = options.get("until") or ()
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    session.reset()
    return session.ask(
        _without_image_tokens(context, session.manifest.model.tokens.image_token, len(images)),
        list(images),
        max_new_tokens=int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
        sampling=sampling,
        stop=stop,
    ).text


def visuals_of(doc_to_visual: Any, document: Any, where: str) -> list[Image.Image]:
    """The images of a document. Raises UserError for videos, sounds and whatever else is no image."""
    visuals = [visual for visual in doc_to_visual(document) or [] if visual is not None]
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise UserError(
                f"{where} shows a {type(visual).__name__}, not an image", hint="tasks with images or text are supported"
            )
    return visuals


def _without_image_tokens(context: str, token: str, count: int) -> str:
    text = context
    for _ in range(count):
        if not text.lstrip().startswith(token):
            break
        text = text.lstrip().removeprefix(token)
    if token in text or (text != context and context.count(token) != count):
        raise UserError(
            f"a context has {context.count(token)} {token} for {count} images, or text before one",
            hint="images must come before the text",
        )
    return text.lstrip("\n") if text != context else context


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing.split(".")[0] == "lmms_eval":
            raise UserError("lmms-eval is not installed", hint="pip install lmms-eval==0.7.3") from error
        raise UserError(f"lmms-eval needs {missing}, which is not installed", hint=f"pip install {missing}") from error


@functools.cache
def model_class() -> type:
    """The class that lmms-eval makes an instance of. Raises UserError without lmms-eval."""
    base: type = _import("lmms_eval.api.model").lmms

    class Reroute(base):
        """An engine bundle as a model of lmms-eval. Model arguments: bundle, threads, provider."""

        is_simple = True

        def __init__(
            self,
            bundle: str | None = None,
            tier: str | None = None,
            threads: int | None = None,
            provider: str = "cpu",
            batch_size: int | str | None = 1,
            max_batch_size: int | None = None,
            device: str | None = None,
            **others: Any,
        ) -> None:
            """Open the bundle.

            Args:
                bundle: folder of `reroute build`.
                tier: of a bundle with several; None for its default.
                threads: CPU threads; None for the engine's choice.
                provider: "cpu" or "cuda".
                batch_size: 1.
                max_batch_size: lmms-eval passes it; not used.
                device: lmms-eval passes it; `provider` says where the engine runs.
                **others: refused.

            Raises:
                UserError: an unknown argument, another batch size, or whatever is wrong with the bundle.
            """
            from reroute.runtime import Session

            super().__init__()
            if others:
                name = sorted(others)[0]
                raise UserError(f"the model reroute has no argument {name!r}", hint=nearest(name, _ARGUMENTS))
            if bundle is None:
                raise UserError("the model reroute needs a bundle", hint="--model_args bundle=out/engine")
            if str(batch_size or 1) != "1":
                raise UserError(
                    f"the batch size is {batch_size}", hint="an engine answers one question: --batch_size 1"
                )
            self.batch_size_per_gpu = 1
            self.session = Session.open(Path(str(bundle)), tier=tier, threads=threads, provider=provider)

        @property
        def batch_size(self) -> int:
            """Questions answered together."""
            return 1

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Answer each request on its own; answers in the order of the requests."""
            progress = _import("tqdm").tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
            answers = []
            for request in requests:
                context, options, doc_to_visual, doc_id, task, split = request.args
                where = f"{task}, {split}, document {doc_id}"
                visuals = visuals_of(doc_to_visual, self.task_dict[task][split][doc_id], where)
                text = answer(self.session, context, visuals, dict(options))
                self.cache_hook.add_partial("generate_until", (context, options), text)
                answers.append(text)
                progress.update(1)
            progress.close()
            return answers

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Refused: an engine gives the next token's logits, not those of a text that is given."""
            raise UserError(
                "the model reroute does not compute loglikelihoods", hint="choose tasks of the type generate_until"
            )

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            """Refused."""
            raise UserError(
                "the model reroute does not run tasks of several rounds", hint="choose tasks of the type generate_until"
            )

    Reroute.__qualname__ = "Reroute"
    return _import("lmms_eval.api.registry").register_model("reroute")(Reroute)


def __getattr__(name: str) -> Any:
    if name == "Reroute":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
