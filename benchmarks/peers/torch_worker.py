"""Worker: transformers and, on its models, the Reroute authors' code (`elmma/mllm-reroute`).

    python torch_worker.py CHECKPOINT THREADS DTYPE,DTYPE

What is timed is the forward of `LlavaForConditionalGeneration` with a cache, sdpa attention and `logits_to_keep=1`:
token ids on the host in, logits of the last row out. Image features are given: `get_image_features` is replaced by one
that returns the prompt's stored embeddings, so the vision tower is in nobody's figure, while embedding the text and
putting the features in their place are in everybody's (our graph does both).

The authors' code patches the decoder layers of a model and wants transformers 5.4.0; its patches are put on and taken
off outside of the timing. After every run the rows in each layer's cache are returned: what really ran.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.shared.worker import serve


class Models:
    """One model for each dtype, all with the same weights."""

    def __init__(self, checkpoint: Path, dtypes: list[str]) -> None:
        import torch
        import transformers

        self._torch = torch
        self._models: dict[str, Any] = {}
        for dtype in dtypes:
            model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
                checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            )
            self._models[dtype] = model.eval()
        vision = next(iter(self._models.values())).config.vision_config
        # Only its shape is read, by the authors' search for the visual tokens.
        self._pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lives as long as the process
    def prompt(self, path: str) -> tuple[Any, Any]:
        """Ids [1, S] and embeddings [N, D] that `Prompt.save` wrote."""
        data = np.load(path)
        return self._torch.from_numpy(data["ids"])[None], self._torch.from_numpy(data["embeds"])

    def prefill(
        self,
        *,
        prompt: str,
        dtype: str,
        schedule: dict[str, Any] | None = None,
        logits: bool = False,
    ) -> dict[str, Any]:
        """One prefill from an empty cache.

        Args:
            prompt: file.
            dtype: which model.
            schedule: None is dense; otherwise the authors' `action`, `layers` and `keep`, visual tokens of each
                decision.
            logits: return them too.

        Returns:
            prefill_ms, `rows` in the cache of each layer, `kept`: for each decision the places of the visual tokens.
        """
        ids, embeds = self.prompt(prompt)
        model = self._models[dtype]
        patched = self._patch(model, schedule, len(embeds)) if schedule else None
        try:
            ms, output = self._forward(model, ids, embeds)
        finally:
            if patched is not None:
                from models.patching import unpatch_model  # pyright: ignore[reportMissingImports]

                unpatch_model(model, "llava")
        cache = output.past_key_values
        layers = model.config.text_config.num_hidden_layers
        result: dict[str, Any] = {
            "prefill_ms": ms,
            "rows": [int(cache.get_seq_length(layer)) for layer in range(layers)],
            "kept": [],
        }
        if patched is not None and schedule is not None:
            log = patched.routing_log
            result["kept"] = [log[layer].selected_indices[0].tolist() for layer in schedule["layers"]]
        if logits:
            result["logits"] = output.logits[0, -1].float().tolist()
        return result

    def decode(self, *, prompt: str, dtype: str, words: list[int], logits: bool = False) -> dict[str, Any]:
        """A prefill, then one step for each word; mean milliseconds of a step."""
        torch = self._torch
        ids, embeds = self.prompt(prompt)
        model = self._models[dtype]
        _, output = self._forward(model, ids, embeds)
        cache, rows, total = output.past_key_values, ids.shape[1], 0.0
        if cache.get_seq_length() != rows:
            raise RuntimeError(f"the prompt cached {cache.get_seq_length()} rows of {rows}")
        with torch.no_grad():
            for word in words:
                token = torch.tensor([[word]])
                start = time.perf_counter()
                output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                total += time.perf_counter() - start
        result: dict[str, Any] = {"decode_ms": total * 1e3 / len(words), "rows": int(cache.get_seq_length())}
        return result | ({"logits": output.logits[0, -1].float().tolist()} if logits else {})

    def _forward(self, model: Any, ids: Any, embeds: Any) -> tuple[float, Any]:
        inputs: dict[str, Any] = {}
        if len(embeds):
            # 5.4.0 and 5.23 read the features from `pooler_output`, a sequence with an entry for each image.
            features = SimpleNamespace(pooler_output=[embeds.to(model.dtype)])
            model.model.get_image_features = lambda *_, **__: features
            inputs["pixel_values"] = self._pixels
        with self._torch.no_grad():
            start = time.perf_counter()
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **inputs)
            return (time.perf_counter() - start) * 1e3, output

    def _patch(self, model: Any, schedule: dict[str, Any], visual: int) -> Any:
        """Put the authors' patches on; returns their context."""
        from models.dispatcher import TokenDispatcher  # pyright: ignore[reportMissingImports]
        from models.patching import patch_model_for_routing  # pyright: ignore[reportMissingImports]
        from models.router import PDropRouter  # pyright: ignore[reportMissingImports]

        router = PDropRouter(
            drop_layers=schedule["layers"],
            # They keep int(N * share) tokens: half a token more, and rounding cannot lose one.
            keep_ratios=[(keep + 0.5) / visual for keep in schedule["keep"]],
            monotonic=False,
        )
        return patch_model_for_routing(model, router, TokenDispatcher(), schedule["action"], "llava")


def load() -> tuple[dict[str, Any], dict[str, Any]]:
    """Handlers and facts."""
    import torch
    import transformers

    checkpoint, threads, dtypes = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
    torch.set_num_threads(threads)
    models = Models(checkpoint, dtypes)
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    return {"prefill": models.prefill, "decode": models.decode}, facts


if __name__ == "__main__":
    serve(load)
