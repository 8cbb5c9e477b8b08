"""Word-level tokenizer of the demo model: about 150 words, the numbers 0..99 and five special tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .scenes import COLOUR_NAMES, PLURALS, SHAPES

SPECIAL: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
NUMBER_0 = 16  # token id of "0"; number n has id NUMBER_0 + n
VOCAB_SIZE = 176
_TEXT = "where is the there a an what color how many objects are which further left right or of yes no ? , . and object"


def vocabulary() -> dict[str, int]:
    """Word -> id: specials, role markers, numbers, words, reserved words up to ``VOCAB_SIZE``."""
    words = [*SPECIAL, "user:", "assistant:"]
    words += [f"<reserved_{i}>" for i in range(NUMBER_0 - len(words))]
    words += [str(n) for n in range(100)]
    words += [*COLOUR_NAMES, *SHAPES, *PLURALS.values(), *_TEXT.split(" ")]
    words += [f"<reserved_{i}>" for i in range(100, 100 + VOCAB_SIZE - len(words))]
    vocab = {w: i for i, w in enumerate(words)}
    assert len(vocab) == VOCAB_SIZE
    assert vocab["0"] == NUMBER_0
    return vocab


def build_tokenizer() -> Tokenizer:
    """Tokenizer that lowercases, reads ``colour`` as ``color``, and splits ``?``, ``,`` and ``.`` off words."""
    tok = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tok.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("colour", "color")])
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?,.]"), behavior="isolated")]
    )
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    # No decoder: the library then joins words with single spaces, which is how answers are written.
    return tok


def build_fast_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers saves and loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode_words(text: str) -> list[int]:
    """Ids of an already spaced, lower-case text: the quick path for training data."""
    return [_VOCAB[w] for w in text.split()]


_VOCAB = vocabulary()
