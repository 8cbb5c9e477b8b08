import pytest
from tokenizers import Tokenizer

from reroute.errors import UserError
from reroute.manifest import Tokens
from reroute.runtime.chat import Chat, assistant_message, user_message
from tests.conftest import DEMO_MODEL
from tests.runtime import fakes

TOKENS = fakes.make_manifest(files={}).model.tokens

# The template of llava-hf/llava-1.5-7b-hf in form: a generation tag, and a space instead of an end token.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}"
    "{% endif %}"
    "{# Images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# then text #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WHITESPACE = """{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {% if loop.first %}
        {{ bos_token }}
    {%- endif %}
    {% if message['role'] == 'tool' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
[{{ ns.count }}|{{ message['role'] | upper }}] {{ message['content'][-1]['text'] | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt and tools is none %}
ASSISTANT:{% endif %}"""
TALK = [
    user_message("where is the cat ?", num_images=1),
    assistant_message("stop"),
    user_message("is the dog <there> ?"),
]


@pytest.mark.parametrize("template", [fakes.TEMPLATE, LLAVA, WHITESPACE], ids=["eos", "llava", "whitespace"])
@pytest.mark.parametrize("length", [1, 3])
def test_renders_and_tokenises_as_transformers(template: str, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = fakes.word_tokenizer()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fakes.word_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template,
    )
    expected = theirs.apply_chat_template(TALK[:length], tokenize=False, add_generation_prompt=True)
    chat = Chat(template, tokenizer, TOKENS)
    assert chat.render(TALK[:length]) == expected


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"], ids=["tokenizer writes bos", "template writes bos"])
def test_first_turn_as_transformers_processor_with_bos_once(start: str) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(DEMO_MODEL)
    processor.chat_template = start + processor.chat_template
    messages = [user_message("where is the red circle ?", num_images=1)]
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (50, 40))}, messages[0]["content"][1]]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    theirs = theirs[0] if isinstance(theirs[0], list) else theirs
    image = processor.image_token_id
    tokens = Tokens(image_token="<image>", image_token_id=image, bos_token="<s>", eos_token="</s>", eos_token_ids=(2,))
    ours = Chat(processor.chat_template, Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")), tokens).first_turn(
        messages
    )
    assert ours.count(tokens.eos_token_ids[0] - 1) == 1  # <s>
    at = ours.index(image)
    assert [*ours[:at], *[image] * theirs.count(image), *ours[at + 1 :]] == list(theirs)
    assert theirs.count(image) == 576


@pytest.mark.parametrize("template", [fakes.TEMPLATE, LLAVA], ids=["eos", "llava"])
@pytest.mark.parametrize("kind", ["word", "sentence", "byte"])
def test_a_later_turn_continues_what_the_whole_conversation_tokenises_to(template: str, kind: str) -> None:
    tokenizer = getattr(fakes, f"{kind}_tokenizer")()
    chat = Chat(template, tokenizer, TOKENS)
    whole = chat.first_turn(TALK)
    tail = chat.next_turn(TALK)
    assert tail == whole[-len(tail) :]
    start = len(whole) - len(tail)
    assert tokenizer.decode(whole[:start]).endswith("stop")


def test_tail_starts_with_the_end_token_where_the_template_has_one() -> None:
    chat = Chat(fakes.TEMPLATE, fakes.word_tokenizer(), TOKENS)
    assert chat.next_turn(TALK)[0] == fakes.EOS
    assert fakes.BOS not in chat.next_turn(TALK)


def test_a_new_image_in_a_later_turn() -> None:
    chat = Chat(fakes.TEMPLATE, fakes.word_tokenizer(), TOKENS)
    tail = chat.next_turn([*TALK[:2], user_message("is the dog here ?", num_images=2)])
    assert tail.count(fakes.IMAGE) == 2


def test_a_template_that_raises_is_a_user_error() -> None:
    chat = Chat("{{ raise_exception('roles must alternate') }}", fakes.word_tokenizer(), TOKENS)
    with pytest.raises(UserError, match="roles must alternate"):
        chat.render(TALK)


def test_a_template_that_does_not_compile_is_a_user_error() -> None:
    with pytest.raises(UserError, match="does not compile"):
        Chat("{% for m in messages %}", fakes.word_tokenizer(), TOKENS)


def test_a_template_without_earlier_answers_is_a_user_error() -> None:
    chat = Chat("{{ messages[-1]['content'][-1]['text'] }} ASSISTANT:", fakes.word_tokenizer(), TOKENS)
    with pytest.raises(UserError, match="earlier answers"):
        chat.next_turn(TALK)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ strftime_now.__globals__['datetime'] }}",
    ],
)
def test_templates_are_sandboxed(attack: str) -> None:
    with pytest.raises(UserError):
        Chat(attack, fakes.word_tokenizer(), TOKENS).render(TALK)


def test_strftime_now() -> None:
    import datetime

    text = Chat("{{ strftime_now('%Y') }}", fakes.word_tokenizer(), TOKENS).render(TALK)
    assert int(text) in {datetime.datetime.now().year, datetime.datetime.now().year - 1}


def test_the_demos_later_turn_equals_the_whole_conversation() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    template = (DEMO_MODEL / "chat_template.jinja").read_text(encoding="utf-8")
    chat = Chat(template, tokenizer, TOKENS)
    talk = [
        user_message("where is the red circle ?", num_images=1),
        assistant_message("10 20 30 40"),
        user_message("how many stars are there ?"),
    ]
    answer = tokenizer.encode("10 20 30 40", add_special_tokens=False).ids
    assert chat.first_turn(talk) == [*chat.first_turn(talk[:1]), *answer, *chat.next_turn(talk)]
