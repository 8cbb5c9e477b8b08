"""The command `reroute run`: one question, several (a dialogue), or turns from the terminal.

Answers stream to stdout as they come; the table of times and memory goes to stderr when the dialogue ends.
With `--json` nothing streams, and stdout gets one object.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from reroute import report
from reroute.commands import print_json
from reroute.errors import EXIT_OK, RerouteError, UserError, nearest
from reroute.folders import write_whole

if TYPE_CHECKING:
    from reroute.runtime import Answer, Prefix, Sampling, Session

_HELP = (
    "/image PATH adds an image to the next question, /reset forgets the dialogue, /tier NAME begins one in another "
    "tier, /quit leaves"
)
PICTURES = (".png", ".html")
_PICTURE_HINT = "give a path that ends with .png (one picture) or .html (a page that steps through the stages)"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its new images."""

    prompt: str
    images: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A turn and its answer."""

    turn: Turn
    answer: Answer


def run(args: argparse.Namespace) -> int:
    """Open the bundle, ask, print, draw."""
    turns = turns_of(args.turns)
    if args.interactive and (turns or args.json):
        raise UserError("--interactive reads its own turns", hint="leave --prompt, --image and --json away")
    if not args.interactive and not turns:
        raise UserError("nothing to ask", hint='give --prompt TEXT, for example --image scene.png --prompt "..."')
    if args.picture is not None and not args.interactive and not any(turn.images for turn in turns):
        raise UserError("--picture needs an image", hint="add --image FILE")
    if args.picture is not None:
        check_picture(args.picture)
    system = system_text(args.system) if args.system is not None else None
    check_prefix(args)
    from reroute.runtime import Prefix, Sampling, Session

    prefix = Prefix.load(args.prefix) if args.prefix is not None else None
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    start = time.perf_counter()
    with Session.open(args.bundle, tier=args.tier, threads=args.threads, provider=args.provider) as session:
        load_ms = (time.perf_counter() - start) * 1000
        if system is not None:
            prefix = session.prefix(system)
            if args.save_prefix is not None:
                prefix.save(args.save_prefix)
                print(f"wrote {args.save_prefix}: {describe_prefix(prefix)}", file=sys.stderr)
        if prefix is not None:
            session.reset(prefix=prefix)
        if args.interactive:
            replies = interactive(session, sys.stdin, sampling, args.max_new_tokens, prefix=prefix)
        else:
            replies = [
                Reply(turn=turn, answer=_ask(session, turn, sampling, args.max_new_tokens, echo=not args.json))
                for turn in turns
            ]
        figures = memory(session)
        if args.picture is not None:
            save_picture(session, replies, args.picture)
        if args.json:
            tier = {"tier": session.tier} if session.tier else {}
            print_json({"turns": [to_dict(reply) for reply in replies], "load_ms": load_ms, **tier, **figures})
        elif replies:
            print_times(replies, load_ms, figures)
    return EXIT_OK


def check_prefix(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, and a file that cannot be written, before anything is loaded."""
    if args.prefix is not None and args.system is not None:
        raise UserError("--prefix has its own system text", hint="leave --system out")
    if args.save_prefix is None:
        return
    if args.system is None:
        raise UserError("--save-prefix needs a system text to run", hint="add --system TEXT, or --system @FILE")
    parent = next(folder for folder in args.save_prefix.absolute().parents if folder.exists())
    if args.save_prefix.is_dir() or not parent.is_dir():
        raise UserError(
            f"cannot write {args.save_prefix}: {args.save_prefix if parent.is_dir() else parent} is "
            f"{'a' if parent.is_dir() else 'not a'} folder",
            hint="give the path of a file, such as system.npz",
        )


def system_text(argument: str) -> str:
    """TEXT, or for @FILE the text of a file without the line end behind it. Raises UserError."""
    if not argument.startswith("@"):
        return argument
    path = Path(argument[1:])
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise UserError(f"cannot read the system text {path}: {error.strerror}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the system text {path} is not UTF-8: {error}", hint="save it as UTF-8") from error


def describe_prefix(prefix: Prefix) -> str:
    """`41 tokens, 96 KiB`, and how many were cut."""
    cut = f", {prefix.cut} cut where a question may join them" if prefix.cut else ""
    return f"{len(prefix.token_ids)} tokens{cut}, {report.format_bytes(prefix.nbytes)}"


def turns_of(items: Iterable[tuple[str, str]]) -> list[Turn]:
    """Turns from --prompt and --image in the order written.

    An image goes with the prompt before it; images in front of the first prompt go with that one. Raises
    UserError for images without a prompt.
    """
    turns: list[Turn] = []
    waiting: tuple[Path, ...] = ()
    for kind, value in items:
        if kind == "prompt":
            turns.append(Turn(prompt=value, images=waiting))
            waiting = ()
        elif turns:
            turns[-1] = Turn(prompt=turns[-1].prompt, images=(*turns[-1].images, Path(value)))
        else:
            waiting = (*waiting, Path(value))
    if waiting:
        raise UserError(f"the image {waiting[0]} has no question", hint="add --prompt TEXT")
    return turns


def interactive(
    session: Session, lines: TextIO, sampling: Sampling, max_new_tokens: int, *, prefix: Prefix | None = None
) -> list[Reply]:
    """Read turns until the end of `lines` or /quit. What cannot be asked is reported, and it goes on.

    `prefix` is what /reset goes back to.
    """
    replies: list[Reply] = []
    images: tuple[Path, ...] = ()
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print(_HELP, file=sys.stderr)
    while True:
        print(prompt, end="", file=sys.stderr, flush=True)
        line = lines.readline()
        if not line:
            return replies
        line = line.strip()
        try:
            if line == "/quit":
                return replies
            if line == "/reset":
                session.reset(prefix=prefix)
                images = ()
            elif line.startswith("/tier "):
                session.reset(tier=line.removeprefix("/tier ").strip())
                images = ()
            elif line.startswith("/image "):
                path = Path(line.removeprefix("/image ").strip()).expanduser()
                if not path.is_file():
                    raise UserError(f"there is no image {path}", hint="check the path")
                images = (*images, path)
            elif line.startswith("/"):
                raise UserError(f"unknown command {line!r}", hint=nearest(line, ("/image", "/reset", "/tier", "/quit")))
            elif line:
                turn = Turn(prompt=line, images=images)
                answer = _ask(session, turn, sampling, max_new_tokens, echo=True)
                replies.append(Reply(turn=turn, answer=answer))
                images = ()
        except RerouteError as error:
            report.print_error(error.message, error.hint)


def _ask(session: Session, turn: Turn, sampling: Sampling, max_new_tokens: int, *, echo: bool) -> Answer:
    stream = session.stream(turn.prompt, list(turn.images), max_new_tokens=max_new_tokens, sampling=sampling)
    for token in stream:
        if echo:
            print(token.text, end="", flush=True)
    if echo:
        print(flush=True)
        # Where an image was resized to one of several grids, say to which.
        for path, view in zip(turn.images, stream.answer.views, strict=False):
            if view.choices > 1:
                print(f"{path.name}: {view}", file=sys.stderr)
    return stream.answer


def check_picture(path: Path) -> None:
    """Refuse a path that no picture can be written to, before anything is asked. Raises UserError."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    problem = ""
    if path.suffix.lower() not in PICTURES:
        problem = f"{path.suffix!r} is none of {', '.join(PICTURES)}" if path.suffix else "its name has no ending"
    elif path.is_dir() or not parent.is_dir():
        problem = f"{path if path.is_dir() else parent} is {'a' if path.is_dir() else 'not a'} folder"
    if problem:
        raise UserError(f"cannot write {path}: {problem}", hint=_PICTURE_HINT)


def save_picture(session: Session, replies: list[Reply], path: Path) -> None:
    """Draw where the tokens of the last image ran: a PNG or an HTML page. Raises UserError if it cannot be written."""
    from reroute.runtime import route_page, route_picture

    check_picture(path)
    reply = next((reply for reply in reversed(replies) if reply.turn.images), None)
    if reply is None:
        return
    last = len(reply.turn.images) - 1
    turn, image = reply.turn, reply.turn.images[last]
    if path.suffix.lower() == ".html":
        page = route_page(image, reply.answer, session.manifest, prompt=turn.prompt, image_index=last)
        data = page.encode("utf-8")
    else:
        buffer = io.BytesIO()
        route_picture(image, reply.answer, session.manifest, image_index=last).save(buffer, "PNG")
        data = buffer.getvalue()
    write_whole(path, data)
    print(f"wrote {path}", file=sys.stderr)


def memory(session: Session) -> dict[str, float]:
    """Cache and process memory, in bytes."""
    return {
        "cache_bytes": session.cache_bytes,
        "cache_bytes_used": session.cache_bytes_used,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> int:
    """Peak resident memory of this process; 0 where Linux's /proc is missing."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def to_dict(reply: Reply) -> dict[str, Any]:
    """JSON form of a turn; routes as the number of visual tokens that ran in each routed stage."""
    answer = reply.answer
    return {
        "prompt": reply.turn.prompt,
        "images": [str(path) for path in reply.turn.images],
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "stop_reason": answer.stop_reason,
        "prompt_tokens": answer.prompt_tokens,
        "prefix_tokens": answer.prefix_tokens,
        "visual_tokens": answer.visual_tokens,
        "grids": [list(view.grid) for view in answer.views],
        "routes": [len(route) for route in answer.routes],
        "timings": asdict(answer.timings),
    }


def print_times(replies: list[Reply], load_ms: float, figures: dict[str, float]) -> None:
    """Times and memory, on stderr."""
    rows = []
    reused = 0
    for number, reply in enumerate(replies, start=1):
        answer, timings = reply.answer, reply.answer.timings
        step = f"{timings.decode_ms / timings.decode_tokens:.1f}" if timings.decode_tokens else "-"
        prompt = f"{answer.visual_tokens} + {answer.prompt_tokens}"
        reused += timings.images_reused
        times = (f"{ms:.1f}" for ms in (timings.image_ms, timings.vision_ms, timings.prefill_ms))
        rows.append((number, prompt, *times, len(answer.token_ids), step, answer.stop_reason))
    columns = ("turn", "visual + text", "image ms", "vision ms", "prefill ms", "tokens", "ms/token", "stop")
    report.print_table(columns, rows, sys.stderr)
    used, held = figures["cache_bytes_used"], figures["cache_bytes"]
    facts = [("load", f"{load_ms:.0f} ms")]
    if taken := sum(reply.answer.prefix_tokens for reply in replies):
        facts.append(("saved prefix", f"{taken} prompt tokens were taken from it and not run"))
    if reused:
        facts.append(("images encoded before", f"{reused}, whose features were taken again"))
    facts += [
        ("KV cache", f"{report.format_bytes(used)} used of {report.format_bytes(held)}"),
        ("peak memory of the process", report.format_bytes(figures["peak_rss_bytes"])),
    ]
    report.print_pairs(facts, sys.stderr)
