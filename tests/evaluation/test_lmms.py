"""The adapter for lmms-eval: against a stand-in of its interface, and against lmms-eval itself where it is installed.

The stand-in has the names and signatures of lmms-eval 0.7.3 that the adapter meets: api/model.py, api/registry.py,
api/instance.py and models/registry_v2.py. The tests marked `real` skip without lmms-eval, as in CI.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.util
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reroute.errors import UserError
from reroute.evaluation import lmms
from reroute.evaluation.datasets import DATASETS
from reroute.runtime import Session
from reroute.runtime.bundle import Bundle
from tests.conftest import REPOSITORY
from tests.evaluation import dataset_files as d
from tests.runtime import fakes

HERE, STOP, NOW = (fakes.VOCAB - len(fakes.WORDS) + fakes.WORDS.index(word) for word in ("here", "stop", "now"))


def make_lmms_eval() -> dict[str, types.ModuleType]:
    """lmms-eval 0.7.3 as far as an adapter sees it."""

    class lmms(abc.ABC):  # noqa: N801  (its name)
        is_simple = True

        def __init__(self) -> None:
            self._rank = 0
            self._world_size = 1
            self.cache_hook: Any = types.SimpleNamespace(add_partial=lambda attr, req, res: None)
            self.task_dict: dict[str, Any] = {}

        @abc.abstractmethod
        def loglikelihood(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests: Any) -> Any: ...

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
            pairs = dict(part.split("=", 1) for part in arg_string.split(",")) if arg_string else {}
            args = {key: int(value) if value.isdigit() else value for key, value in pairs.items()}
            return cls(**args, **{k: v for k, v in (additional_config or {}).items() if v is not None})

        @property
        def rank(self) -> int:
            return self._rank

    @dataclasses.dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    registered: dict[str, type] = {}

    def register_model(*names: str) -> Any:
        def decorate(cls: type) -> type:
            assert issubclass(cls, lmms)
            registered.update(dict.fromkeys(names, cls))
            return cls

        return decorate

    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.registry": {"register_model": register_model, "MODEL_REGISTRY": registered},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, values in contents.items():
        vars(modules[name]).update(values)
    return modules


@dataclasses.dataclass
class Instance:
    """A request, as api/instance.py."""

    arguments: tuple[Any, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, types.ModuleType]]:
    modules = make_lmms_eval()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    lmms.model_class.cache_clear()
    yield modules
    lmms.model_class.cache_clear()


@dataclasses.dataclass
class Opened:
    """The model with a session of the fake backend, and how it was opened."""

    model: Any
    backend: fakes.FakeBackend
    options: dict[str, Any]
    reported: list[tuple[Any, ...]]

    def ask(self, *requests: tuple[Any, ...]) -> list[str]:
        return self.model.generate_until([Instance(request) for request in requests])


@pytest.fixture
def opened(fake: dict[str, types.ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    fakes.write_bundle(tmp_path / "bundle", max_text=60)
    bundle = Bundle.open(tmp_path / "bundle")
    backend = fakes.FakeBackend(bundle.manifest)
    options: dict[str, Any] = {}

    def open_session(path: Path, **given: Any) -> Session:
        options.update(given, path=path)
        return Session(bundle, backend)

    monkeypatch.setattr(Session, "open", open_session)
    passed = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    model = lmms.model_class().create_from_arg_string(f"bundle={tmp_path / 'bundle'},threads=3", passed)
    reported: list[tuple[Any, ...]] = []
    model.cache_hook = types.SimpleNamespace(add_partial=lambda *args: reported.append(args))
    images = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    model.task_dict = {"pope": {"test": [{"image": image} for image in images]}}
    return Opened(model=model, backend=backend, options=options, reported=reported)


def request(
    context: str = "where is the cat ?", doc_id: int = 0, visuals: Any = None, **options: Any
) -> tuple[Any, ...]:
    show = visuals if visuals is not None else lambda document: [document["image"]]
    return context, options, show, doc_id, "pope", "test"


def test_lmms_eval_finds_the_model_by_its_entry_point(fake: dict[str, types.ModuleType]):
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."lmms_eval.models"]\nreroute = "reroute.evaluation.lmms:manifest"' in text
    manifest = lmms.manifest()
    assert (manifest.model_id, manifest.chat_class_path) == ("reroute", None)
    module, _, name = manifest.simple_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert found is lmms.model_class()
    assert issubclass(found, vars(fake["lmms_eval.api.model"])["lmms"])
    assert found.is_simple
    assert vars(fake["lmms_eval.api.registry"])["MODEL_REGISTRY"] == {"reroute": found}
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = lmms.Other  # type: ignore[attr-defined]


def test_importing_the_adapter_needs_no_lmms_eval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    for name in [name for name in sys.modules if name.startswith("lmms_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    lmms.model_class.cache_clear()
    importlib.reload(lmms)
    for use in (lmms.manifest, lmms.model_class, lambda: lmms.Reroute):  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="lmms-eval is not installed") as caught:
            use()
        assert "pip install lmms-eval" in caught.value.hint


def test_what_lmms_eval_itself_lacks_is_named(fake: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'loguru'", name="loguru")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match="lmms-eval needs loguru"):
        lmms.manifest()


def test_arguments_reach_the_session(opened: Opened, tmp_path: Path):
    assert opened.options == {"path": tmp_path / "bundle", "tier": None, "threads": 3, "provider": "cpu"}
    assert (opened.model.batch_size, opened.model.batch_size_per_gpu) == (1, 1)


def test_answers_come_in_order_each_a_dialogue_of_its_own(opened: Opened):
    three = opened.ask(*(request(doc_id=number, max_new_tokens=4) for number in (0, 0, 1)))
    # The fake's next token is a hash of all rows in the cache: equal only from an empty one, with the same image.
    assert three[0] == three[1] != three[2]
    assert [len(pixels) for pixels in opened.backend.encoded] == [1, 1]  # the first two show one image
    alone = opened.ask(request(doc_id=1, max_new_tokens=4))
    assert alone == [three[2]]
    assert [(attr, key[0], answer) for attr, key, answer in opened.reported] == [
        ("generate_until", "where is the cat ?", answer) for answer in [*three, *alone]
    ]


def test_the_prompt_is_the_context_after_the_images(opened: Opened):
    opened.ask(request("where is the cat ?", max_new_tokens=1))
    plain = opened.backend.steps[0]
    for context in ("<image>\nwhere is the cat ?", "<image> where is the cat ?"):
        opened.backend.steps.clear()
        opened.ask(request(context, max_new_tokens=1))
        assert opened.backend.steps[0].input_ids.tolist() == plain.input_ids.tolist()
        assert opened.backend.steps[0].visual_slots.tolist() == plain.visual_slots.tolist()


def test_several_images_and_none(opened: Opened):
    two = [Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9), "white")]
    opened.ask(request("<image> <image>\nwhere is the cat ?", visuals=lambda document: two, max_new_tokens=1))
    assert [len(pixels) for pixels in opened.backend.encoded] == [2]
    for nothing in ([], None, [None]):
        opened.ask(request(visuals=lambda document, nothing=nothing: nothing, max_new_tokens=1))
    assert len(opened.backend.encoded) == 1


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"max_new_tokens": 2}, "here now"),
        ({"max_new_tokens": 9, "until": ["stop"]}, "here now "),
        ({"max_new_tokens": 9, "until": "stop"}, "here now "),
        ({"max_new_tokens": 9, "until": None}, "here now stop here"),
        ({"max_new_tokens": 9, "until": ["", "now"]}, "here "),
        ({"until": ["ASSISTANT:"]}, "here now stop here"),
        ({"temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}, "here now stop here"),
        ({"temperature": 0, "top_p": 0}, "here now stop here"),
        ({"temperature": 0.5, "do_sample": False}, "here now stop here"),
    ],
)
def test_generation_options(opened: Opened, options: dict[str, Any], answer: str):
    opened.backend.script = [HERE, NOW, STOP, HERE, fakes.EOS]
    given = dict(options)
    assert opened.ask(request(**given)) == [answer]
    assert given == options


def test_without_a_length_1024_tokens_are_asked_for(opened: Opened, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []
    ask = Session.ask
    monkeypatch.setattr(Session, "ask", lambda self, *a, **k: (asked.append(k), ask(self, *a, **k))[1])
    opened.backend.script = [HERE, fakes.EOS] * 3
    opened.ask(request(), request(temperature=0.7, top_p=0.9), request(temperature=0.7, do_sample=False))
    assert [options["max_new_tokens"] for options in asked] == [1024] * 3
    assert asked[0]["sampling"] is None
    assert asked[2]["sampling"] is None
    assert (asked[1]["sampling"].temperature, asked[1]["sampling"].top_p) == (0.7, 0.9)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (request(num_beams=4), ["num_beams is 4", "num_beams=1"]),
        (request(max_tokens=4), ["no generation option 'max_tokens'", "did you mean 'max_new_tokens'?"]),
        (request(visuals=lambda document: ["a.mp4"]), ["pope, test, document 0 shows a str, not an image"]),
        (request("where is <image> ?"), ["1 <image> for 1 images, or text before one"]),
        (request("<image><image> where ?"), ["2 <image> for 1 images"]),
        (request("<image> where ?", visuals=lambda document: []), ["1 <image> for 0 images"]),
    ],
)
def test_requests_that_are_refused(opened: Opened, given: tuple[Any, ...], says: list[str]):
    with pytest.raises(UserError) as caught:
        opened.ask(given)
    for text in says:
        assert text in str(caught.value)
    assert caught.value.hint


def test_other_kinds_of_requests_are_refused_by_name(opened: Opened):
    with pytest.raises(UserError, match="does not compute loglikelihoods"):
        opened.model.loglikelihood([])
    with pytest.raises(UserError, match="several rounds"):
        opened.model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", ["needs a bundle", "--model_args bundle="]),
        ("bundle=x,thread=3", ["no argument 'thread'", "did you mean 'threads'?", "bundle, provider, threads"]),
        ("bundle=x,batch_size=4", ["the batch size is 4", "--batch_size 1"]),
        ("bundle=x,batch_size=auto", ["the batch size is auto"]),
        ("bundle=/nowhere/x", ["/nowhere/x"]),
    ],
)
def test_model_arguments_that_are_refused(fake: dict[str, types.ModuleType], arguments: str, says: list[str]):
    with pytest.raises(UserError) as caught:
        lmms.model_class().create_from_arg_string(arguments, {"device": None})
    for text in says:
        assert text in str(caught.value)


# Against the package itself: pip install --no-deps lmms-eval==0.7.3 and what it imports.

HAS_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
real = pytest.mark.skipif(not HAS_LMMS_EVAL, reason="lmms-eval is not installed")


@pytest.fixture
def package() -> Iterator[Path]:
    """The folder of the installed package, with the model in its registry."""
    lmms.model_class.cache_clear()
    models = importlib.import_module("lmms_eval.models")
    models.MODEL_REGISTRY_V2.register_manifest(lmms.manifest(), overwrite=True)
    yield Path(str(models.__file__)).parent.parent
    lmms.model_class.cache_clear()


def local_task(package: Path, folder: Path, task: str, template: str, data: Path, split: str) -> Any:
    """A task of lmms-eval itself, its code unchanged, with its data from local files."""
    shutil.copytree(package / "tasks" / task, folder / task)
    text = (folder / task / template).read_text()
    lines = [
        line
        for line in text.splitlines()
        if not line.startswith(("dataset_path", "dataset_kwargs", "  token", "task:"))
    ]
    files = sorted(str(path) for path in data.glob("*.parquet"))
    (folder / "local").mkdir()
    for name in (folder / task).glob("utils*.py"):
        shutil.copy(name, folder / "local")
    header = [
        f"task: local_{task}",
        "dataset_path: parquet",
        "dataset_kwargs:",
        "  data_files:",
        f"    {split}: {files}",
    ]
    header += [f"test_split: {split}"] if "test_split" not in text else []
    (folder / "local" / "task.yaml").write_text("\n".join([*header, *lines]) + "\n")
    tasks = importlib.import_module("lmms_eval.tasks")
    return tasks.TaskManager(include_path=str(folder / "local"), include_defaults=False)


def evaluate(model: Any, task: str, manager: Any, **options: Any) -> dict[str, Any]:
    evaluator = importlib.import_module("lmms_eval.evaluator")
    done = evaluator.simple_evaluate(
        model=model, tasks=[task], batch_size=1, task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )
    assert done is not None
    return done


class Scripted:
    """A session that answers by prompt."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.manifest, self.answers, self.asked = fakes.make_manifest(files={}), answers, []

    def reset(self) -> None: ...

    def ask(self, prompt: str, image: Any, **options: Any) -> Any:
        self.asked.append((prompt, [i.size for i in image], options))
        return types.SimpleNamespace(text=self.answers[prompt])


REFCOCO_ANSWERS = (
    "[0.1, 0.1, 0.6, 0.6]",
    "There: [0.1,0.2, 0.4,0.6].",
    "[0.0, 0.0, 1.0, 1.0]",
    "no box",
)
POPE_ANSWERS = ("Yes", "yes.", "no", "yes", "No", "dog")


@real
def test_real_refcoco_asks_and_scores_as_the_reader_does(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = d.write_refcoco(tmp_path / "RefCOCO", shards=1)
    asked = DATASETS["refcoco"](data, split="val")
    questions = list(asked)
    answers = {q.prompt: text for q, text in zip(questions, REFCOCO_ANSWERS, strict=True)}
    session = Scripted(answers)
    monkeypatch.setattr(Session, "open", lambda path, **options: session)
    model = lmms.model_class().create_from_arg_string("bundle=scripted")
    manager = local_task(package, tmp_path, "refcoco", "_default_template_bbox_rec_yaml", data / "data", "val")
    results = evaluate(model, "local_refcoco", manager)["results"]["local_refcoco"]
    assert sorted(prompt for prompt, _, _ in session.asked) == sorted(answers)
    assert {options["max_new_tokens"] for _, _, options in session.asked} == {asked.max_new_tokens}
    assert sorted(sizes for _, sizes, _ in session.asked) == sorted([asked.image(q.image).size] for q in questions)
    grades = [asked.grade(q, answers[q.prompt]) for q in questions]
    assert [grade.score for grade in grades] == [1, 0, 1, 0]
    assert results["refcoco_ACC@0.5,none"] == sum(grade.score for grade in grades) / 4
    assert results["refcoco_IoU,none"] == pytest.approx(sum(grade.iou or 0 for grade in grades) / 4, abs=1e-6)


@real
def test_real_pope_asks_and_scores_as_the_reader_does(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = tmp_path / "POPE" / "data"
    d.write_parquet(data / "test-00000-of-00001.parquet", d.pope_schema(), d.pope_rows())
    asked = DATASETS["pope"](data.parent)
    questions = list(asked)
    answers = {q.prompt: text for q, text in zip(questions, POPE_ANSWERS, strict=True)}
    session = Scripted(answers)
    monkeypatch.setattr(Session, "open", lambda path, **options: session)
    model = lmms.model_class().create_from_arg_string("bundle=scripted")
    manager = local_task(package, tmp_path, "pope", "pope.yaml", data, "test")
    results = evaluate(model, "local_pope", manager)["results"]["local_pope"]
    assert sorted(prompt for prompt, _, _ in session.asked) == sorted(answers)
    assert {options["max_new_tokens"] for _, _, options in session.asked} == {asked.max_new_tokens}
    summary = asked.summary((q, answers[q.prompt]) for q in questions)  # type: ignore[attr-defined]
    ours = sum(asked.grade(q, answers[q.prompt]).score for q in questions) / 6
    assert results["pope_accuracy,none"] == pytest.approx(ours)
    for name in ("accuracy", "precision", "recall"):
        assert results[f"pope_{name},none"] == pytest.approx(summary[name])
    assert results["pope_f1_score,none"] == pytest.approx(summary["f1"])


@real
def test_real_gqa_asks_and_scores_as_the_reader_does(package: Path, tmp_path: Path):
    metrics = importlib.import_module("lmms_eval.api.metrics")
    yaml = importlib.import_module("yaml")
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[attr-defined]
    config = yaml.load((package / "tasks" / "gqa" / "gqa.yaml").read_text(), loader)
    (metric,) = config["metric_list"]
    options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation")}
    suffix = config["lmms_eval_specific_kwargs"]["default"]["post_prompt"]
    asked = DATASETS["gqa"](d.write_gqa(tmp_path))
    assert asked.max_new_tokens == config["generation_kwargs"]["max_new_tokens"]
    for question in asked:
        assert question.prompt.endswith(suffix)
        for answer in ("no", "No.", "T-shirt", "tshirt", "t shirt", "man !", " Man", "men", "", "."):
            theirs = metrics.exact_match_fn(predictions=[answer.strip()], references=[question.answers[0]], **options)
            assert asked.grade(question, answer).score == theirs["exact_match"], answer


@real
@pytest.mark.slow
def test_real_run_of_a_bundle(package: Path, tmp_path: Path, tiny_bundle: Path):
    data = tmp_path / "POPE" / "data"
    d.write_parquet(data / "test-00000-of-00001.parquet", d.pope_schema(), d.pope_rows())
    manager = local_task(package, tmp_path, "pope", "pope.yaml", data, "test")
    done = evaluate("reroute", "local_pope", manager, model_args=f"bundle={tiny_bundle},threads=1")
    samples = done["samples"]["local_pope"]
    assert len(samples) == 6
    with Session.open(tiny_bundle, threads=1) as session:
        asked = DATASETS["pope"](data.parent)
        ours = {}
        for question in asked:
            session.reset()
            ours[question.prompt] = session.ask(question.prompt, asked.image(question.image), max_new_tokens=128).text
    assert {sample["arguments"][0]: sample["resps"][0][0] for sample in samples} == ours
