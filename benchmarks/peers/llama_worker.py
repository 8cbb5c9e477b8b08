"""Worker: llama.cpp through llama-cpp-python, on GGUF files of one text model.

    python llama_worker.py THREADS ROWS NAME=FILE...

ROWS is the capacity of the contexts. A step is `llama_decode` of one token: token id in, logits of that row out.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

from benchmarks.shared.worker import serve


class Model:
    """A GGUF file with one context, driven through the C API."""

    def __init__(self, file: str, *, threads: int, rows: int) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._lib: Any = llama_cpp
        self._model = self._lib.llama_model_load_from_file(file.encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = rows, rows, rows
        params.n_threads = params.n_threads_batch = threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {rows} rows for {file}")
        self._memory = self._lib.llama_get_memory(self._context)
        self._vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    def start(self, words: list[int]) -> None:
        """Run a prompt from an empty cache."""
        self._lib.llama_memory_clear(self._memory, True)
        self._step(words)

    def decode(self, words: list[int]) -> float:
        """One step for each word; mean milliseconds."""
        total = 0.0
        for word in words:
            start = time.perf_counter()
            self._step([word])
            # The logits are there once this returns: llama.cpp may compute them behind llama_decode.
            self._lib.llama_get_logits_ith(self._context, -1)
            total += time.perf_counter() - start
        return total * 1e3 / len(words)

    def rows(self) -> int:
        """Rows in the cache."""
        return self._lib.llama_memory_seq_pos_max(self._memory, 0) + 1

    def logits(self) -> list[float]:
        """Of the last row."""
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return [float(pointer[index]) for index in range(self._vocab)]

    def _step(self, words: list[int]) -> None:
        tokens = (self._lib.llama_token * len(words))(*words)
        batch = self._lib.llama_batch_get_one(tokens, ctypes.c_int32(len(words)))
        if status := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode of {len(words)} tokens gave {status}")


def load() -> tuple[dict[str, Any], dict[str, Any]]:
    """Handlers and facts."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    lib: Any = llama_cpp
    threads, rows = int(sys.argv[1]), int(sys.argv[2])
    lib.llama_backend_init()
    models = {
        name: Model(file, threads=threads, rows=rows)
        for name, _, file in (word.partition("=") for word in sys.argv[3:])
    }

    def decode(*, name: str, context: list[int], words: list[int], logits: bool = False) -> dict[str, Any]:
        """Fill the cache with `context`, then one step for each word."""
        model = models[name]
        model.start(context)
        result: dict[str, Any] = {"decode_ms": model.decode(words), "rows": model.rows()}
        return result | ({"logits": model.logits()} if logits else {})

    facts = {
        "llama-cpp-python": lib.__version__,
        "llama.cpp": lib.llama_print_system_info().decode(),
        "threads": threads,
    }
    return {"decode": decode}, facts


if __name__ == "__main__":
    serve(load)
