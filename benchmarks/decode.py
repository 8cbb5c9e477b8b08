"""Decode: milliseconds a token behind 640 cached rows, our engine beside transformers, onnxruntime-genai and llama.cpp.

    python -m benchmarks.decode --profiles fp32,int8,int4 --peers PEERS/bin/python --builder BUILDER/bin/python

PEERS is an environment with onnxruntime-genai, llama-cpp-python, gguf and safetensors, BUILDER one with torch,
transformers and onnxruntime-genai, whose model builder needs them (see README.md here). Their models are made from the
same checkpoint's text model, once, in the work folder.

Everybody gets the same 640 words, and then the same words one by one: nobody chooses tokens. What the bits are:

* fp32: ours, transformers, genai fp32;  bf16: transformers;  f16: llama.cpp;
* int8: ours (+kernels: with the library of plugins_cpp), genai int8 (blocks of 32), llama.cpp Q8_0 (blocks of 32);
* int4: ours, genai int4 (blocks of 32, accuracy level 4), llama.cpp Q4_0 (blocks of 32), output matrix included.

In every run the rows in the cache are counted. Before the rounds each candidate's logits after the last word are
compared with transformers' float32; an engine below `LEAST_COSINE` of its bits does not compute the same model, and
ends the measurement.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared import results
from benchmarks.shared.bundles import DENSE, REPOSITORY
from benchmarks.shared.bundles import bits_of as profile_bits
from benchmarks.shared.own import OwnEngine, Prompt, compare_logits, make_prompt
from benchmarks.shared.worker import Worker
from reroute.bench.report import table
from reroute.bench.workload import Sample
from reroute.errors import RerouteError, UserError

CONTEXT = 640
PEERS = REPOSITORY / "benchmarks" / "peers"
QUANTITY = "decode_ms"
LLAMA = {"int8": "Q8_0", "int4": "Q4_0"}
# Four bits of a random model leave little: that the conversion is right is seen at f16, which the others are made from.
LEAST_COSINE = {"fp32": 0.9999, "f16": 0.999, "bfloat16": 0.99, "int8": 0.99, "int4": 0.7}
BOUNDARY = {
    "own": "`Backend.step` of one token: id on the host to logits on the host, caches bound in place",
    "transformers": "forward of one token with a DynamicCache, sdpa, logits of that row",
    "genai": "Generator.append_tokens of one token, which runs the model; past and present share a buffer as its "
    "builder's configuration says",
    "llama.cpp": "llama_decode of one token and llama_get_logits_ith",
    "excluded": "in none of them: filling the cache, choosing a token, loading, tokenizing",
}


def main() -> None:
    """Measure and write."""
    parser = results.options(__doc__, "decode", repeat=20)
    parser.add_argument("--tokens", type=int, default=16, help="decode steps of a repetition")
    work = REPOSITORY / "out" / "benchmark"
    parser.add_argument(
        "--peers", type=Path, default=work / "peers-venv/bin/python", help="Python of the other engines"
    )
    parser.add_argument(
        "--builder", type=Path, default=work / "builder-venv/bin/python", help="Python of genai's builder"
    )
    parser.add_argument(
        "--without", choices=("genai", "llama"), nargs="+", default=[], help="leave an engine out; the result says so"
    )
    args = parser.parse_args()
    if set(args.without) != {"genai", "llama"}:
        results.need([args.peers], "the environment of the other engines")
    machine = results.machine_facts()
    shop = results.workshop(args)
    bundles = {profile: shop.bundle(DENSE, profile) for profile in args.profiles}
    text = OwnEngine(bundles[args.profiles[0]], threads=args.threads).manifest.model
    prompt = make_prompt(text=CONTEXT, visual=0, hidden=text.text.hidden_size, vocab=text.text.vocab_size)
    words = np.random.default_rng(1).integers(16, text.text.vocab_size, args.tokens).tolist()
    calls: dict[str, Callable[[bool], dict[str, Any]]] = {}
    with ExitStack() as stack:
        logs = args.work / "logs"
        file = str(prompt.save(args.work / "decode.npz", text.tokens.image_token_id))
        engines = {
            profile: OwnEngine(path, threads=args.threads, spinning=args.spinning) for profile, path in bundles.items()
        }
        for profile, engine in engines.items():
            calls[f"own {profile}"] = own_call(engine, prompt, words)
        command = [sys.executable, str(PEERS / "torch_worker.py"), str(shop.model()), str(args.threads)]
        hf = stack.enter_context(
            Worker([*command, "bfloat16,float32"], log=logs / "transformers.log", threads=args.threads)
        )
        for dtype in ("bfloat16", "float32"):
            calls[f"transformers {dtype}"] = worker_call(hf, prompt=file, dtype=dtype, words=words)
        workers = {"transformers": hf.facts}
        common: dict[str, Any] = {"context": prompt.words.tolist(), "words": words}
        for name, worker, models in peer_workers(stack, args, shop.model(), rows=CONTEXT + args.tokens + 8):
            workers[name] = worker.facts
            for model in models:
                calls[f"{name} {model}"] = worker_call(worker, name=model, **common)
        agreement = agree(calls)
        runs = {(name, CONTEXT): timed(name, call, CONTEXT + args.tokens) for name, call in calls.items()}
        samples = results.run_rounds(runs, args, "decode")
        facts = {f"own {profile}": engine.facts() for profile, engine in engines.items()}
    data = results.document(
        "decode",
        args,
        machine,
        boundary=BOUNDARY,
        context_rows=CONTEXT,
        tokens=args.tokens,
        left_out=args.without,
        candidates=facts,
        workers=workers,
        agreement=agreement,
        **speedups(samples, args.profiles),
        cells=results.cells(samples),
    )
    results.write(args.output, data)
    print("\n".join(markdown(json.loads(json.dumps(data)))))


def own_call(engine: OwnEngine, prompt: Prompt, words: list[int]) -> Callable[[bool], dict[str, Any]]:
    """Fill the caches, then decode."""

    def call(logits: bool) -> dict[str, Any]:
        engine.prefill(prompt)
        ms, last = engine.decode(words)
        return {QUANTITY: ms, "rows": engine.kept[0], "logits": last}

    return call


def worker_call(worker: Worker, **arguments: Any) -> Callable[[bool], dict[str, Any]]:
    """The same of a worker; logits only when asked for."""
    return lambda logits: worker.call("decode", logits=logits, **arguments)


def timed(who: str, call: Callable[[bool], dict[str, Any]], rows: int) -> Callable[[], Sample]:
    """One repetition, its rows counted. Raises RerouteError."""

    def run() -> Sample:
        found = call(False)
        if found["rows"] != rows:
            raise RerouteError(f"{who} has {found['rows']} rows in its cache, not {rows}", hint="it ran something else")
        return {QUANTITY: found[QUANTITY]}

    return run


def bits_of(candidate: str) -> str:
    """fp32, f16, bfloat16, int8 or int4, from a candidate's name."""
    word = profile_bits(candidate.split()[-1])
    return {"float32": "fp32", **{kind: bits for bits, kind in LLAMA.items()}}.get(word, word)


def agree(calls: dict[str, Callable[[bool], dict[str, Any]]]) -> dict[str, Any]:
    """Last logits of everybody against transformers' float32. Raises RerouteError."""
    reference = calls["transformers float32"](True)["logits"]
    found = {name: compare_logits(call(True)["logits"], reference) for name, call in calls.items()}
    for name, entry in found.items():
        least = LEAST_COSINE[bits_of(name)]
        if not entry["cosine"] >= least:
            raise RerouteError(
                f"logits of {name} have a cosine of {entry['cosine']:.4f} with transformers' float32, below {least}",
                hint="it does not compute the same model: its conversion is wrong",
            )
    return found


def peer_workers(
    stack: ExitStack, args: argparse.Namespace, checkpoint: Path, *, rows: int
) -> list[tuple[str, Worker, list[str]]]:
    """The other engines with their models, which are made if they are not there."""
    folder, logs, found = args.work / "peers" / checkpoint.name, args.work / "logs", []
    if "llama" not in args.without:
        files = {kind: gguf(args.peers, checkpoint, folder, kind) for kind in ("f16", *LLAMA.values())}
        command = [str(args.peers), str(PEERS / "llama_worker.py"), str(args.threads), str(rows)]
        command += [f"{kind}={file}" for kind, file in files.items()]
        worker = Worker(command, log=logs / "llama.log", threads=args.threads)
        found.append(("llama.cpp", stack.enter_context(worker), list(files)))
    if "genai" not in args.without:
        models = {bits: genai(args.peers, args.builder, checkpoint, folder, bits) for bits in ("fp32", "int8", "int4")}
        command = [
            str(args.peers),
            str(PEERS / "genai_worker.py"),
            str(args.threads),
            str(int(args.spinning)),
            str(rows),
        ]
        command += [f"{bits}={model}" for bits, model in models.items()]
        worker = Worker(command, log=logs / "genai.log", threads=args.threads)
        found.append(("genai", stack.enter_context(worker), list(models)))
    return found


def gguf(python: Path, checkpoint: Path, folder: Path, kind: str) -> Path:
    """The model quantised for llama.cpp."""
    whole, target = folder / "f16.gguf", folder / f"{kind}.gguf"
    if not whole.exists():
        make([str(python), str(PEERS / "convert.py"), "gguf", str(checkpoint)], whole)
    if not target.exists():
        make([str(python), str(PEERS / "convert.py"), "quantise", str(whole)], target, kind)
    return target


def genai(python: Path, builder: Path, checkpoint: Path, folder: Path, bits: str) -> Path:
    """The model as onnxruntime-genai's builder makes it."""
    source, target = folder / "llama", folder / f"genai-{bits}"
    if not target.exists():
        results.need([builder], "the environment of onnxruntime-genai's model builder")
        if not source.exists():
            make([str(python), str(PEERS / "convert.py"), "llama", str(checkpoint)], source)
        module = [str(builder), "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-p", bits, "-e", "cpu"]
        more = () if bits == "fp32" else ("--extra_options", "accuracy_level=4", "block_size=32")
        make([*module, "-c", str(folder / "cache"), "-o"], target, *more)
    return target


def make(command: Sequence[str], target: Path, *more: str) -> None:
    """Run a converter whose output is `target`; what is half-written does not get that name. Raises UserError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f"partial-{target.name}")
    if staging.exists():
        raise UserError(f"{staging} is left of a conversion that did not end", hint="remove it and run again")
    print("+", *command, target, *more, file=sys.stderr, flush=True)
    log = target.with_name(f"{target.name}.log")
    with log.open("wb") as stream:
        done = subprocess.run([*command, str(staging), *more], stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode:
        raise UserError(f"the conversion ended with status {done.returncode}", hint=f"its words are in {log}")
    staging.rename(target)


def speedups(samples: results.Samples, profiles: Sequence[str]) -> dict[str, Any]:
    """How many times faster each profile of ours is: than transformers bf16, and than the others of its bits."""

    def ratios(name: Callable[[str], str]) -> dict[str, Any]:
        return {
            profile: results.ratio(samples, (name(profile), CONTEXT), (f"own {profile}", CONTEXT), QUANTITY)
            for profile in profiles
            if (name(profile), CONTEXT) in samples
        }

    return {
        "speedup_over_transformers_bf16": ratios(lambda profile: "transformers bfloat16"),
        "speedup_over_genai": ratios(lambda profile: f"genai {profile_bits(profile)}"),
        "speedup_over_llama_cpp": ratios(lambda profile: f"llama.cpp {LLAMA.get(profile_bits(profile))}"),
    }


def markdown(data: dict[str, Any]) -> list[str]:
    """Milliseconds a token, times transformers' bf16, agreement."""
    cells = {cell["candidate"]: cell["summary"][QUANTITY] for cell in data["cells"]}
    base = cells["transformers bfloat16"]["median"]
    rows = [
        (
            name,
            f"{found['median']:.1f} [{found['quartiles'][0]:.1f}-{found['quartiles'][1]:.1f}]",
            f"{base / found['median']:.2f}",
            f"{data['agreement'][name]['cosine']:.5f}",
        )
        for name, found in cells.items()
    ]
    return table(("decode", "ms/token", "times transformers bf16", "cosine of logits with float32"), rows)


if __name__ == "__main__":
    results.guarded(main)
