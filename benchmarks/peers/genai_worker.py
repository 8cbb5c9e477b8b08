"""Worker: onnxruntime-genai, on folders of its model builder.

    python genai_worker.py THREADS SPINNING ROWS NAME=FOLDER...

SPINNING is 0 or 1, ROWS the capacity of the caches. A step is `append_tokens` of one token, which runs the model:
token id in, logits of that row out. Choosing a token is not in it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from benchmarks.shared.worker import serve


class Model:
    """A folder, loaded."""

    def __init__(self, folder: str, *, threads: int, spinning: bool, rows: int) -> None:
        import onnxruntime_genai as genai  # pyright: ignore[reportMissingImports]

        self._genai: Any = genai
        self._rows = rows
        config = genai.Config(folder)
        session = {
            "intra_op_num_threads": threads,
            "session.intra_op.allow_spinning": "1",
            "session.force_spinning_stop": str(int(not spinning)),
        }
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = genai.Model(config)

    def decode(self, context: list[int], words: list[int]) -> tuple[float, Any, int]:
        """Fill a cache, then one step for each word; mean milliseconds, last logits [V], rows."""
        import numpy as np

        params = self._genai.GeneratorParams(self._model)
        # Forced tokens must never end it: no shorter than the whole.
        rows = len(context) + len(words)
        params.set_search_options(max_length=self._rows, min_length=rows + 1, do_sample=False, batch_size=1)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.asarray(context, dtype=np.int32))
        total, out = 0.0, None
        for word in words:
            token = np.asarray([word], dtype=np.int32)
            start = time.perf_counter()
            generator.append_tokens(token)
            total += time.perf_counter() - start
        out = generator.get_output("logits")
        return total * 1e3 / len(words), np.asarray(out).reshape(-1, out.shape[-1])[-1], int(generator.token_count())


def load() -> tuple[dict[str, Any], dict[str, Any]]:
    """Handlers and facts."""
    import onnxruntime
    import onnxruntime_genai as genai  # pyright: ignore[reportMissingImports]

    threads, spinning, rows = (int(word) for word in sys.argv[1:4])
    models = {
        name: Model(folder, threads=threads, spinning=bool(spinning), rows=rows)
        for name, _, folder in (word.partition("=") for word in sys.argv[4:])
    }

    def decode(*, name: str, context: list[int], words: list[int], logits: bool = False) -> dict[str, Any]:
        """Fill the cache with `context`, then one step for each word."""
        ms, last, count = models[name].decode(context, words)
        result: dict[str, Any] = {"decode_ms": ms, "rows": count}
        return result | ({"logits": [float(value) for value in last]} if logits else {})

    facts = {
        "onnxruntime-genai": genai.__version__,
        "onnxruntime": onnxruntime.__version__,
        "threads": threads,
        "spinning": bool(spinning),
    }
    return {"decode": decode}, facts


if __name__ == "__main__":
    serve(load)
