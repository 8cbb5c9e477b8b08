"""The states of a decode step: eager first, captured second, replayed from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from reroute.errors import RerouteError

State = Literal["cold", "warm", "captured", "eager"]


class Stream(Protocol):
    """What capturing needs of CUDA (see `reroute.runtime.tensorrt_cuda.Cuda`)."""

    def begin_capture(self) -> None:
        """Record instead of running."""
        ...

    def end_capture(self) -> Any:
        """What was recorded."""
        ...

    def launch(self, graph: Any) -> None:
        """Run what was recorded."""
        ...


class CapturedStep:
    """A step of fixed shapes and addresses that is captured in a CUDA graph.

    TensorRT wants one ordinary run after shapes or addresses were set, because it may allocate there; only then can the
    same calls be captured. Capturing does not run anything, so the graph is launched at once. A capture that fails
    leaves the step eager for good, which is slower and just as right; `reason` says why.

    Attributes:
        state: "cold" (never run), "warm" (run once), "captured", or "eager" (capture failed).
        reason: what made the capture fail.
    """

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        """`enqueue` puts the whole step, copies included, on the stream, and never waits."""
        self._stream, self._enqueue = stream, enqueue
        self._graph: Any = None
        self.state: State = "cold"
        self.reason = ""

    def run(self) -> None:
        """Put one step on the stream."""
        if self.state == "warm":
            self._capture()
        if self.state == "captured":
            self._stream.launch(self._graph)
            return
        self._enqueue()
        if self.state == "cold":
            self.state = "warm"

    def _capture(self) -> None:
        self._stream.begin_capture()
        problem: Exception | None = None
        try:
            self._enqueue()
        except (RuntimeError, RerouteError) as error:
            problem = error
        try:
            # Also after a failure: the stream would stay in capture mode.
            self._graph = self._stream.end_capture()
        except RuntimeError as error:
            problem = problem or error
        self.state = "eager" if problem else "captured"
        self.reason = str(problem or "")
