"""Peak memory of one session: a process of its own opens it, answers once, and says how high its memory went.

Only a fresh process answers that: a peak never goes down again, and other bundles in the process would count.
`python -m reroute.bench.memory '{"bundle": ..., "text": ...}'` is that process.

Unit and source. On Linux VmHWM of /proc/self/status, in KiB, which starts at zero when a program starts. getrusage's
ru_maxrss (KiB on Linux, bytes on macOS) survives fork and exec on Linux: a child of a process that holds 2 GB says at
least 2 GB. It is what other systems have.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from reroute.bench.workload import Shape
from reroute.errors import UserError
from reroute.runtime.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one process measured; `start_rss_bytes` is the peak of its imports, before it opened the session."""

    peak_rss_bytes: int
    start_rss_bytes: int
    load_ms: float


def footprint(bundle: Bundle, shape: Shape, *, threads: int | None, provider: str) -> Footprint:
    """Measure one session in a fresh process. Raises UserError with the process's own words when it fails."""
    tier = bundle.manifest.tier or None
    request = {"bundle": str(bundle.path), "tier": tier, "threads": threads, "provider": provider, **asdict(shape)}
    done = subprocess.run(
        [sys.executable, "-m", "reroute.bench.memory", json.dumps(request)], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(
            f"a session of {bundle.path} could not be measured in a process of its own: {last}",
            hint="see whether `reroute run` works with it; a process that was killed had too little memory",
        )
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """The process: measure what the only argument asks for, print one line of JSON."""
    from reroute.bench.workload import Workload
    from reroute.runtime import Session

    request = json.loads(sys.argv[1])
    shape = Shape(text=request["text"], images=request["images"], tokens=request["tokens"])
    start_rss = peak_rss_bytes()
    start = time.perf_counter()
    options = {name: request[name] for name in ("tier", "threads", "provider")}
    with Session.open(request["bundle"], **options, verify=False) as session:
        load_ms = (time.perf_counter() - start) * 1e3
        Workload(session.manifest, session.backend, shape).run()
        result = Footprint(peak_rss_bytes=peak_rss_bytes(), start_rss_bytes=start_rss, load_ms=load_ms)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
