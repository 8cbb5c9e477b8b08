"""The command `reroute`: arguments in, exit code out. Nothing heavy is imported before a command runs.

Exit codes: 0 ok, 1 failure, 2 usage, 3 a gate failed, 130 interrupted. Data goes to stdout, everything else
to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from reroute import __version__, routing
from reroute.errors import EXIT_FAILURE, EXIT_OK, RerouteError, UserError
from reroute.report import print_error

_DESCRIPTION = "Recoverable visual-token routing inside deployed vision-language engines."
_EXAMPLE = """\
example:
  reroute export CHECKPOINT -o out/export --routing reroute@2,7,15,23:avg=1/9
  reroute build out/export -o out/bundle
  reroute run out/bundle --image photo.jpg --prompt "what is on the table ?"
"""
_PICTURE_HELP = (
    "draw where the last image's tokens ran: .png is one picture, .html a page that steps through the stages"
)
_GRIDS_HELP = (
    "for models whose images differ in shape: rows and columns of visual tokens, a graph for each (default: five "
    "shapes of at most 576 tokens)"
)
_REFERENCE_HELP = (
    "greedy tokens of the recorded torch reference (default 64). Parameters beyond 1 GiB in float32 are read again for "
    "each of them: a 7B model reads its 13 GB N + 1 times"
)
_ROUTING_HELP = (
    "dense, METHOD:avg=A, ACTION@LAYERS:keep=K,K,..., ACTION@LAYERS:avg=A, published:NAME, or a .toml file; see below"
)
_TIERS_HELP = (
    "one more budget for the same weights, to pick when the bundle runs; repeat it. --routing is then the default. "
    "Tiers differ in their budgets alone, and `dense` keeps everything"
)


class Parser(argparse.ArgumentParser):
    """argparse with this project's error format and exit code."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UserError(message, hint=f"see `{self.prog} --help`")


class AppendTurn(argparse.Action):
    """Keeps --prompt and --image in the order written, which says what image goes with which turn."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Any = None,
    ) -> None:
        """Append (option, value)."""
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), (str(option_string).lstrip("-"), values)])


def build_parser() -> Parser:
    """All commands and their arguments."""
    common = Parser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = Parser(
        prog="reroute",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"reroute {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary, parents=[common], allow_abbrev=False)

    export = command("export", "Turn a checkpoint into graphs with the routing inside, or print the plan.")
    export.epilog, export.formatter_class = routing.__doc__, argparse.RawDescriptionHelpFormatter
    _add_export(export)
    _add_build(command("build", "Lower an export for an engine library and check it against the reference."))
    _add_run(command("run", "Ask a bundle about images."))
    _add_check(command("check", "Compare a bundle with the torch reference; exit 3 when a gate fails."))
    _add_eval(command("eval", "Score bundles on questions with known answers, and compare them."))
    _add_bench(command("bench", "Measure latency and memory of bundles, interleaved, with raw samples."))
    _add_compare(command("compare", "Compare two measurements or two bundles; exit 3 when one got slower or larger."))
    tune = command("tune", "Find the best schedule under a latency or memory bound, on this machine.")
    tune.epilog = "Exit code 3 when no candidate keeps the bounds. Search questions are never the held-out scenes."
    _add_tune(tune)
    inspect = command("inspect", "Say what a checkpoint, an export or a bundle is.")
    inspect.add_argument("path", type=Path, metavar="PATH")
    _json(inspect)
    _json(command("doctor", "Say what this machine can do and what is missing."))
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="Hugging Face checkpoint directory")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="not needed with --dry-run")
    parser.add_argument("--routing", required=True, metavar="SPEC", help=_ROUTING_HELP)
    parser.add_argument("--tier", dest="tiers", action="append", default=[], metavar="[NAME=]SPEC", help=_TIERS_HELP)
    parser.add_argument("--max-text", type=positive, default=512, help="text tokens of a whole dialogue (default 512)")
    parser.add_argument("--max-images", type=positive, default=2, help="images of a whole dialogue (default 2)")
    parser.add_argument("--grids", metavar="RxC,...", help=_GRIDS_HELP)
    parser.add_argument("--reference-tokens", type=positive, default=64, metavar="N", help=_REFERENCE_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace the output directory")
    _json(parser)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export_dir", type=Path, metavar="DIR", help="made by `reroute export`")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="default: DIR with the backend's name added")
    parser.add_argument("--backend", default="ort", help="engine library: ort (default) or tensorrt")
    parser.add_argument(
        "--profile",
        default="fp32",
        metavar="P",
        help="weights of an ort bundle: fp32 (default), int8 or int4 (int4:0 to int4:2: ever more with 8 bits)",
    )
    parser.add_argument(
        "--kernels",
        type=Path,
        metavar="LIBRARY",
        help="with --profile: libreroute_onnxruntime.so of plugins_cpp, faster on processors with AVX-512 VNNI; "
        "the bundle gets a copy",
    )
    parser.add_argument("--no-check", action="store_true", help="do not compare with the recorded reference")
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="with --profile: ask this engine and the float32 one questions, as in `reroute eval`, and gate on the "
        "tokens kept (default: 400 questions on generated validation scenes)",
    )
    parser.add_argument("--force", action="store_true", help="replace the output directory")
    add_question_set(parser)
    group = parser.add_argument_group("with --backend tensorrt")
    group.add_argument("--target", metavar="T", help="machine: orin-jp6, orin-jp7, thor-jp7 or datacenter")
    group.add_argument(
        "--onnx-only", action="store_true", help="stop before TensorRT: graphs and a script for the device"
    )
    group.add_argument("--form", metavar="F", help="native, or plugin (default with --plugin)")
    group.add_argument("--dtype", metavar="D", help="float16 (default) or float32")
    group.add_argument("--plugin", type=Path, metavar="LIBRARY", help="the C++ plugin, for the form plugin")
    group.add_argument("--memory-gib", type=positive, metavar="N", help="of the machine; default: the target's largest")
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="measured tactics: read if it exists, and written"
    )
    group.add_argument("--workspace-mib", type=positive, metavar="N", help="scratch of one layer; default: no limit")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="made by `reroute build`")
    parser.add_argument(
        "--prompt",
        dest="turns",
        action=AppendTurn,
        default=[],
        metavar="TEXT",
        help="repeat it for a dialogue",
    )
    parser.add_argument(
        "--image",
        dest="turns",
        action=AppendTurn,
        default=[],
        metavar="FILE",
        help="goes with the prompt before it; with the next one when it comes first",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="of each answer (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=positive, default=None, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this share of the probability only")
    parser.add_argument("--seed", type=int, default=0, help="of the random draw (default 0)")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads; default: the engine decides")
    _provider(parser)
    parser.add_argument(
        "--system", metavar="TEXT|@FILE", help="instructions in front of the dialogue, run once as a prefix"
    )
    parser.add_argument(
        "--save-prefix", type=Path, metavar="FILE", help="keep the cache rows of --system in an .npz file"
    )
    parser.add_argument("--prefix", type=Path, metavar="FILE", help="start from a saved prefix; nothing of it is run")
    _tier(parser, "the default one")
    parser.add_argument("--picture", type=Path, metavar="FILE", help=_PICTURE_HELP)
    parser.add_argument("--interactive", action="store_true", help="read turns from the terminal")
    _json(parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="run the torch reference again from this")
    parser.add_argument("--image", type=Path, metavar="FILE", help="instead of the recorded input")
    parser.add_argument("--prompt", metavar="TEXT", help="instead of the recorded input")
    parser.add_argument("--tokens", type=positive, default=64, help="tokens to compare (default 64)")
    _provider(parser)
    _tier(parser, "all of them")
    _json(parser)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="made by `reroute build`")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="write eval.json and eval.md there")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads; default: the engine decides")
    _provider(parser)
    _tier(parser, "all of them")
    parser.add_argument("--force", action="store_true", help="replace the output directory")
    _json(parser)
    add_question_set(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="one of them dense, for ratios")
    add_measurement(parser, repeat=10)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="write bench.json, bench.csv and bench.md there"
    )
    parser.add_argument("--force", action="store_true", help="replace the output directory")
    _json(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Two bundles are measured here, in the same rounds. Of two bench.json files latencies are compared by their "
        "ratio to the dense bundle of the same run."
    )
    parser.add_argument(
        "base", type=Path, metavar="BASE", help="bundle, bench.json, or a folder of them by device (DEVICE.json)"
    )
    parser.add_argument("new", type=Path, metavar="NEW", help="bundle or bench.json, as BASE")
    parser.add_argument("--latency", type=share, default=0.05, metavar="P", help="may grow by this (default 5%%)")
    parser.add_argument("--memory", type=share, default=0.02, metavar="P", help="may grow by this (default 2%%)")
    files = parser.add_argument_group("files")
    files.add_argument("--baseline", metavar="NAME", help="divide latency by this candidate; default: the dense one")
    files.add_argument(
        "--confirm",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="a second run of NEW, or NEW's bundles to measure again; a regression must show there as well",
    )
    files.add_argument("--any-device", action="store_true", help="compare measurements of different devices")
    add_measurement(parser.add_argument_group("bundles"), repeat=20)
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="write compare.json and compare.md there")
    parser.add_argument("--force", action="store_true", help="replace the output directory")
    _json(parser)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="Hugging Face checkpoint directory")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="write tune.json, tune.md and routing.toml there"
    )
    bounds = parser.add_argument_group("bounds, at least one; all must hold")
    bounds.add_argument("--prefill-ms", type=float, metavar="X", help="median prefill at most this")
    bounds.add_argument("--end-to-end-ms", type=float, metavar="X", help="vision, prefill and --tokens steps at most")
    bounds.add_argument("--speedup", type=float, metavar="X", help="prefill at least X times faster than dense")
    bounds.add_argument("--kv-mib", type=float, metavar="X", help="KV bytes of the prompt at most (exact)")
    bounds.add_argument("--memory-mib", type=float, metavar="X", help="the plan's estimated peak at most")
    space = parser.add_argument_group("search space: methods x averages x layers x shapes")
    space.add_argument("--space", type=Path, metavar="FILE", help="a TOML file instead, see docs/tuning.md")
    space.add_argument("--methods", metavar="M,M,...", help="default: all by name; removal and reroute need --layers")
    space.add_argument("--averages", metavar="A,A,...", help="visual tokens per layer (default 1/9,1/6,2/9,1/3)")
    space.add_argument("--layers", metavar="L,L;L,...", help="decision layers (default own: the method's)")
    space.add_argument("--shapes", metavar="S,S", help="uniform, halving, geometric (default own: the method's)")
    search = parser.add_argument_group("search")
    limit = search.add_mutually_exclusive_group()
    limit.add_argument("--questions", type=positive, metavar="N", help="of the first round; default: to use all")
    limit.add_argument("--budget-minutes", type=minutes, metavar="M", help="fit the search into this time")
    search.add_argument("--keep-bundle", action="store_true", help="keep the winner's bundle, as DIR/bundle")
    search.add_argument("--dry-run", action="store_true", help="print the search space, build nothing")
    measure = parser.add_argument_group("measurement, as in `reroute bench`")
    measure.add_argument(
        "--text", type=positive, default=64, metavar="N", help="text tokens of the prompt (default 64)"
    )
    measure.add_argument("--tokens", type=positive, default=16, metavar="N", help="decode steps (default 16)")
    measure.add_argument("--warmup", type=count, default=3, metavar="N", help="rounds thrown away (default 3)")
    measure.add_argument("--repeat", type=positive, default=10, metavar="N", help="rounds that count (default 10)")
    measure.add_argument("--threads", type=positive, default=None, help="CPU threads; default: the engine decides")
    _provider(measure)
    parser.add_argument("--max-text", type=positive, default=512, help="text tokens of a whole dialogue (default 512)")
    parser.add_argument("--max-images", type=positive, default=2, help="images of a whole dialogue (default 2)")
    parser.add_argument("--grids", metavar="RxC,...", help=_GRIDS_HELP)
    parser.add_argument("--force", action="store_true", help="replace the output directory")
    _json(parser)
    add_question_set(
        parser,
        number=400,
        seed="of the scenes, of what is kept back, and of the measurement's order (default 0)",
        split="validation, the only one that a search may see",
    )


def add_measurement(parser: Any, *, repeat: int) -> None:
    """How to measure. Nothing has a default here: what was given can be told from what was not."""
    parser.add_argument("--text", type=grid, metavar="N,N,...", help="text tokens of the prompt (default 64,256)")
    parser.add_argument("--images", type=count, metavar="N", help="images in the prompt (default 1)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="decode steps (default 32)")
    parser.add_argument("--warmup", type=count, metavar="N", help="rounds thrown away (default 3)")
    parser.add_argument("--repeat", type=positive, metavar="N", help=f"rounds that count (default {repeat})")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads; default: the engine decides")
    parser.add_argument("--provider", metavar="P", help="where ONNX Runtime runs, as in `reroute run` (default cpu)")


def add_question_set(
    parser: argparse.ArgumentParser,
    *,
    number: int = 1000,
    seed: str = "of the scenes (default 0)",
    split: str = "heldout (default) or validation",
) -> None:
    """Which questions to ask; read by `reroute.evaluation.command.question_set`. The rest is what the help says."""
    parser.add_argument(
        "--set",
        default="scenes",
        help="scenes (generated, the default), or a dataset on disk: refcoco, refcoco+, refcocog, pope, gqa",
    )
    scenes = parser.add_argument_group("generated scenes")
    scenes.add_argument("--grounding", type=int, metavar="N", help=f"questions for a box (default {number})")
    scenes.add_argument("--vqa", type=int, metavar="N", help=f"one-word questions (default {number})")
    scenes.add_argument("--objects", metavar="LOW-HIGH", help="objects of a scene (default 3-7)")
    scenes.add_argument("--seed", type=int, help=seed)
    scenes.add_argument("--split", help=split)
    data = parser.add_argument_group("datasets on disk; nothing is downloaded")
    data.add_argument("--data", type=Path, metavar="PATH", help="annotations: a file or a folder")
    data.add_argument("--images", type=Path, metavar="DIR", help="default: where the annotations say")
    data.add_argument("--dataset-split", metavar="NAME", help="default: the first that the dataset has")
    data.add_argument(
        "--protocol", help="lmms-eval (default), llava, or qwen (Qwen-VL's default): how they are asked and graded"
    )
    data.add_argument("--limit", type=positive, metavar="N", help="ask the first N questions only")


def _provider(parser: Any) -> None:
    parser.add_argument(
        "--provider",
        default="cpu",
        metavar="P",
        help="where ONNX Runtime runs: cpu (default), cuda, or tensorrt with CUDA behind it",
    )


def _tier(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--tier", metavar="NAME", help=f"of a bundle with several budgets, which; default: {default}")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    return _at_least(1, text)


def count(text: str) -> int:
    """An argument that is a whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value


def minutes(text: str) -> float:
    """An argument that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


def grid(text: str) -> tuple[int, ...]:
    """An argument such as `64,256`: whole numbers of at least 1, ascending, each once."""
    return tuple(sorted({positive(part) for part in text.split(",")}))


def share(text: str) -> float:
    """An argument such as `5%` or `0.05`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: write 5% or 0.05") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 100 %: write 5% or 0.05")
    return value


def _dispatch(args: argparse.Namespace) -> int:
    if args.command == "run":
        from reroute.dialogue import run

        return run(args)
    if args.command == "eval":
        from reroute.evaluation.command import run as evaluate

        return evaluate(args)
    if args.command == "bench":
        from reroute.bench.bench_command import run as bench

        return bench(args)
    if args.command == "compare":
        from reroute.bench.compare_command import run as compare

        return compare(args)
    if args.command == "tune":
        from reroute.tuning.command import run as tune

        return tune(args)
    from reroute import commands

    return getattr(commands, args.command)(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; only argparse's --help and --version leave by SystemExit."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    try:
        code = _dispatch(build_parser().parse_args(argv))
        sys.stdout.flush()
        return code
    except RerouteError as error:
        if debug:
            raise
        print_error(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader left (`reroute inspect DIR | head`). Python flushes stdout again on exit: give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except ModuleNotFoundError as error:
        if debug or (error.name or "").split(".")[0] == "reroute":
            raise
        print_error(
            f"this command needs {error.name}, which is not installed",
            "`reroute doctor` says what to install",
        )
        return EXIT_FAILURE
    except Exception as error:
        if debug:
            raise
        print_error(f"{type(error).__name__}: {error}", "this is a defect; `--debug` shows the traceback")
        return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
