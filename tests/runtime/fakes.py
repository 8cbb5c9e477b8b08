"""Stand-ins: tokenizers made on the spot, a bundle of empty graphs, a backend that hashes its rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from reroute.manifest import (
    Capacity,
    File,
    ImageProcessing,
    Manifest,
    Model,
    Part,
    TextModel,
    Tokens,
    VisionModel,
    file_table,
)
from reroute.routing import RoutingSpec
from reroute.runtime.answer import Answer, Timings
from reroute.runtime.backend import StepOutputs, require_rows
from reroute.runtime.layout import StepInputs, rows_added
from reroute.runtime.positions import VisualTokens

HIDDEN, HEAD_DIM, KV_HEADS, LAYERS, GRID = 8, 4, 2, 6, (4, 4)
VISUAL = GRID[0] * GRID[1]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
WORDS = ("USER:", "ASSISTANT:", "where", "is", "the", "cat", "dog", "?", "here", "there", "stop", "now", "a")
VOCAB = len(SPECIAL) + len(WORDS)

# LLaVA-1.5's layout, with the end token between turns.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "{{ ' ' if m['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def word_tokenizer() -> Tokenizer:
    """Word-level, with BOS added: ids follow SPECIAL, then WORDS."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_specials(tokenizer)


def sentence_tokenizer() -> Tokenizer:
    """As Llama's: a space in front of everything, byte fallback, a decoder that strips the first space."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    corpus = [f"▁{word}" for word in ["USER:", "ASSISTANT:", "where", "is", "the", "red", "cat", "?", "ab", "here"]] * 4
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *alphabet], show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    # The trainer marks the byte tokens as special; rebuilt from its vocabulary they are ordinary ones.
    state = tokenizer.to_str()
    model = models.BPE(**_bpe_of(state), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_specials(tokenizer)


def byte_tokenizer() -> Tokenizer:
    """As GPT-2's and Qwen's: byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["where is the red cat ?", "the red cat is here"], trainer)
    return _with_specials(tokenizer)


def _bpe_of(state: str) -> dict[str, Any]:
    model = json.loads(state)["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _with_specials(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def make_manifest(
    *,
    files: dict[str, File],
    routing: str = "reroute@2,4:keep=5,3",
    max_text: int = 40,
    max_images: int = 2,
    kind: str = "bundle",
    backend: str = "ort",
    vocab: int = VOCAB,
) -> Manifest:
    """A manifest of a 6-layer decoder with 4 x 4 visual tokens."""
    text = TextModel(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_heads=2 * KV_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    vision = VisionModel(
        image_size=32,
        patch_size=8,
        grid=GRID,
        tokens_per_image=VISUAL,
        hidden_size=8,
        intermediate_size=16,
        num_heads=2,
        num_layers=1,
        depth=1,
    )
    image = ImageProcessing(
        shortest_edge=32,
        crop_height=32,
        crop_width=32,
        resample=3,
        rescale_factor=1 / 255,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )
    tokens = Tokens(
        image_token="<image>", image_token_id=IMAGE, bos_token="<s>", eos_token="</s>", eos_token_ids=(EOS,)
    )
    model = Model(
        model_type="llava",
        text=text,
        vision=vision,
        image=image,
        tokens=tokens,
        num_parameters={},
    )
    schedule = RoutingSpec.parse(routing).resolve(num_layers=LAYERS, num_visual=VISUAL)
    capacity = Capacity(max_text=max_text, max_images=max_images)
    return Manifest(
        kind=kind,  # type: ignore[arg-type]
        backend=backend,
        dtype="float32",
        checkpoint_sha256="0" * 64,
        model=model,
        routing=routing,
        schedule=schedule,
        average_visual_tokens=schedule.average_visual_tokens(VISUAL),
        capacity=capacity,
        cache_rows=capacity.cache_rows(schedule, VISUAL),
        parts={name: Part(file=f"{name}.onnx", inputs=(), outputs=()) for name in ("decoder", "vision")},
        files=files,
        estimates={},
        versions={},
    )


def make_answer(
    text: str, routes: Sequence[Sequence[int]], *, entered: Sequence[int] | None = None, images: int = 1
) -> Answer:
    """An answer about images of 4 x 4 visual tokens, of which all entered the decoder unless `entered` says."""
    indices = np.arange(images * VISUAL) if entered is None else np.asarray(entered, dtype=np.int64)
    timings = Timings(image_ms=0, vision_ms=0, prefill_ms=0, decode_ms=0, prefill_tokens=0, decode_tokens=0)
    return Answer(
        text=text,
        token_ids=(),
        stop_reason="eos",
        routes=tuple(np.asarray(route, dtype=np.int64) for route in routes),
        entered=indices,
        prompt_tokens=5,
        visual_tokens=len(indices),
        timings=timings,
    )


def write_bundle(
    folder: Path, *, template: str = TEMPLATE, tokenizer: Tokenizer | None = None, **manifest: object
) -> None:
    """Write a bundle whose graphs are empty files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or word_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in ("decoder", "vision"):
        (folder / f"{name}.onnx").write_bytes(b"")
    options = {"vocab": tokenizer.get_vocab_size(), **manifest}
    make_manifest(files=file_table(folder), **options).save(folder)  # type: ignore[arg-type]


class FakeBackend:
    """Follows the Backend protocol without an engine.

    It stores the token and position of every row, so that `cache` shows what ran where. The next token is the
    script's next one, or, once that is used up, a hash of all rows.
    """

    def __init__(self, manifest: Manifest, script: Sequence[int] = ()) -> None:
        self.manifest = manifest
        self.script = list(script)
        self.steps: list[StepInputs] = []
        self.encoded: list[np.ndarray] = []
        self.fail = False
        self.loads = 0
        self.reset()

    def reset(self) -> None:
        self.rows: list[list[tuple[float, int]]] = [[] for _ in self.manifest.schedule.stages]

    def use(self, tier: str) -> None:
        self.manifest = self.manifest.at(tier)
        self.reset()

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([len(rows) for rows in self.rows], dtype=np.int32)

    @property
    def cache_bytes(self) -> int:
        pairs = zip(self.manifest.schedule.stages, self.manifest.cache_rows, strict=True)
        return sum(stage.num_layers * rows for stage, rows in pairs) * 2 * KV_HEADS * HEAD_DIM * 4

    def encode(self, pixel_values: np.ndarray) -> VisualTokens:
        assert pixel_values.shape[1:] == (3, 32, 32)
        assert pixel_values.dtype == np.float32
        self.encoded.append(pixel_values)
        means = pixel_values.mean(axis=(1, 2, 3))[:, None, None]
        entering = self.manifest.schedule.entering(VISUAL)
        embeds = (means + np.zeros((len(pixel_values), entering, HIDDEN))).astype(np.float32)
        # Where the tower drops tokens, every other one is left.
        places = np.tile(np.arange(entering) * 2 % VISUAL, (len(pixel_values), 1))
        return VisualTokens(embeds=embeds, places=places if entering < VISUAL else None)

    def step(self, inputs: StepInputs) -> StepOutputs:
        if self.fail:
            raise RuntimeError("the engine failed")
        num_text, num_visual = len(inputs.text_slots), len(inputs.visual_slots)
        total = num_text + num_visual
        assert inputs.input_ids.shape == (1, num_text)
        assert inputs.visual_embeds.shape == (1, num_visual, HIDDEN)
        assert inputs.rope_cos.shape == inputs.rope_sin.shape == (total, HEAD_DIM // 2)
        slots = np.concatenate([inputs.text_slots, inputs.visual_slots])
        assert sorted(slots.tolist()) == list(range(total))
        assert inputs.text_slots[-1] == total - 1
        self.steps.append(inputs)
        start = int(self.lengths[0])
        row_of = np.zeros(total)
        row_of[inputs.text_slots] = inputs.input_ids[0]
        row_of[inputs.visual_slots] = inputs.visual_embeds[0, :, 0]
        routes: list[np.ndarray] = []
        for index, stage in enumerate(self.manifest.schedule.stages):
            # Stage s runs every s-th visual token, as many as it may.
            kept = inputs.visual_slots[:: max(1, index)][: stage.visual_rows(num_visual)]
            ran = np.sort(np.concatenate([inputs.text_slots, kept]))
            self.rows[index] += [(float(row_of[slot]), start + slot) for slot in ran.tolist()]
            if index:
                routes.append(ran[None])
        expected = rows_added(self.manifest.schedule, num_text=num_text, num_visual=num_visual)
        assert [len(route[0]) for route in routes] == expected[1:].tolist()
        assert (self.lengths <= np.asarray(self.manifest.cache_rows)).all()
        return StepOutputs(logits=self._logits(), routes=tuple(routes))

    def _logits(self) -> np.ndarray:
        vocab = self.manifest.model.text.vocab_size
        if self.script:
            return np.eye(vocab, dtype=np.float32)[[self.script.pop(0)]] * 9
        digest = hashlib.sha256(repr(self.rows).encode()).digest()
        return np.random.default_rng(list(digest)).normal(size=(1, vocab)).astype(np.float32)

    def cache(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows[self.manifest.schedule.stage_of_layer(layer)]
        values = np.asarray([value for value, _ in rows], dtype=np.float32)
        array = np.broadcast_to(values[None, None, :, None], (1, KV_HEADS, len(rows), HEAD_DIM))
        return array, array

    def load(self, caches: Sequence[tuple[np.ndarray, np.ndarray]], lengths: np.ndarray) -> None:
        require_rows(
            caches,
            lengths,
            capacity=np.asarray(self.manifest.cache_rows),
            schedule=self.manifest.schedule,
            text=self.manifest.model.text,
            dtype=np.float32,
        )
        self.loads += 1
        for index, stage in enumerate(self.manifest.schedule.stages):
            first, *others = [caches[layer][0][0, 0, :, 0].tolist() for layer in range(stage.start, stage.stop)]
            assert all(rows == first for rows in others)
            self.rows[index] = [(value, position) for position, value in enumerate(first)]

    def describe(self) -> dict[str, str]:
        return {"engine": "fake"}
