# SPDX-License-Identifier: Apache-2.0
"""`Prompt`: the four parts, the chat template with its three marker tokens, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import patchkern as pk

SYSTEM = "You recommend films."
INSTRUCTION = "Seen: [HISTORY_SEQUENCE] What comes next?"


def test_parts() -> None:
    prompt = pk.Prompt(prefix=[1, 2], separator=(3,), suffix=np.asarray([4, 5]), response_end=[6])  # type: ignore[arg-type]
    assert (prompt.prefix, prompt.separator, prompt.suffix, prompt.response_end) == ((1, 2), (3,), (4, 5), (6,))
    assert all(type(token) is int for token in prompt.prefix + prompt.suffix)
    assert prompt.max_token_id == 6
    assert pk.Prompt().max_token_id == -1
    assert prompt == pk.Prompt([1, 2], [3], [4, 5], [6]) and hash(prompt) == hash(pk.Prompt([1, 2], [3], [4, 5], [6]))  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    prompt = pk.Prompt(prefix=[1, 2], separator=[3], suffix=[], response_end=[6])  # type: ignore[arg-type]
    assert pk.Prompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"prefix": [-1]}, ValueError, r"prefix\[0\]: expected a token id in 0\.\..*, got -1"),
        ({"suffix": [1, 2**31]}, ValueError, r"suffix\[1\]: .*got 2147483648"),
        ({"separator": [1.5]}, TypeError, r"separator\[0\]: expected an integer token id, got float"),
        ({"separator": [True]}, TypeError, r"separator\[0\]: .*got bool"),
        ({"separator": ["a"]}, TypeError, r"separator\[0\]: .*got str"),
        ({"response_end": 5}, TypeError, r"response_end: expected a sequence of token ids, got int"),
        ({"response_end": "</s>"}, TypeError, r"response_end: expected a sequence of token ids, got str"),
        ({"prefix": None}, TypeError, r"prefix: expected a sequence of token ids, got NoneType"),
        ({"prefix": [[1, 2]]}, TypeError, r"prefix\[0\]: .*got list"),
    ],
)
def test_parts_refuse(parts: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.Prompt(**parts)


def test_from_dict_refuses() -> None:
    with pytest.raises(ValueError, match=r"parts: .*'prefx'"):
        pk.Prompt.from_dict({"prefx": [1]})


# ------------------------------------------------------------------ chat templates


@pytest.fixture(scope="module")
def llama(shared_data: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="reads the Llama-3 tokenizer")
    return transformers.AutoTokenizer.from_pretrained(str(shared_data / "llama3-tokenizer"))


def test_chat_template_of_llama(llama: Any) -> None:
    size = len(llama)
    prompt = pk.Prompt.from_chat_template(llama, SYSTEM, INSTRUCTION)
    assert len(llama) == size, "Llama-3 has 248 reserved tokens, none is to be added"
    prefix, suffix = llama.decode(prompt.prefix), llama.decode(prompt.suffix)
    start, (separator,), end = prompt.prefix[-1], prompt.separator, prompt.suffix[0]
    assert len({start, separator, end}) == 3
    for marker in (start, separator, end):
        assert "reserved_special_token" in llama.convert_ids_to_tokens(marker)
    whole = llama.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": INSTRUCTION}],
        tokenize=False,
        add_generation_prompt=True,
    )
    before, _, after = whole.partition("[HISTORY_SEQUENCE]")
    assert prefix == before + llama.convert_ids_to_tokens(start)
    assert suffix == llama.convert_ids_to_tokens(end) + after
    assert after.rstrip().endswith("assistant<|end_header_id|>")
    assert prompt.response_end == (llama.eos_token_id,)


def small_tokenizer(template: str | None = None) -> Any:
    """A word-level tokenizer without reserved tokens, made here."""
    tokenizers = pytest.importorskip("tokenizers", reason="builds a tokenizer")
    transformers = pytest.importorskip("transformers", reason="wraps a tokenizer")
    words = [
        "<unk>",
        "</s>",
        "Seen",
        ":",
        "What",
        "comes",
        "next",
        "?",
        "You",
        "recommend",
        "films",
        ".",
        "user",
        "bot",
    ]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %} bot{% endif %}"
)


def test_markers_are_added_where_none_are_reserved() -> None:
    tokenizer = small_tokenizer(TEMPLATE)
    size = len(tokenizer)
    prompt = pk.Prompt.from_chat_template(tokenizer, SYSTEM, INSTRUCTION)
    assert len(tokenizer) == size + 3
    markers = [prompt.prefix[-1], *prompt.separator, prompt.suffix[0]]
    assert sorted(markers) == [size, size + 1, size + 2]
    # A second prompt finds the tokens of the first.
    assert pk.Prompt.from_chat_template(tokenizer, SYSTEM, INSTRUCTION) == prompt
    assert len(tokenizer) == size + 3
    assert prompt.response_end == (1,)
    assert tokenizer.convert_ids_to_tokens(prompt.suffix[-1]) == "bot"


@pytest.mark.parametrize(
    ("template", "instruction", "message"),
    [
        (None, INSTRUCTION, r"tokenizer: expected one with a chat template"),
        (TEMPLATE, "What comes next?", r"instruction: expected \[HISTORY_SEQUENCE\] exactly once, got it 0 times"),
        (TEMPLATE, "[HISTORY_SEQUENCE] [HISTORY_SEQUENCE]", r"instruction: .*got it 2 times"),
        ("{{ messages[0]['content'] }}", INSTRUCTION, r"tokenizer: .*dropped \[HISTORY_SEQUENCE\]"),
        (TEMPLATE, 5, r"instruction: expected a string, got int"),
    ],
)
def test_chat_template_refuses(template: str | None, instruction: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        pk.Prompt.from_chat_template(small_tokenizer(template), SYSTEM, instruction)


CHAT = (
    "</s>{% for m in messages %}[BEFORE]{{ m['role'] + ' ' + m['content'] | trim }} </s>[AFTER]{% endfor %}"
    "{% if add_generation_prompt %} bot{% endif %}"
)


def chat(before: str = "", after: str = "") -> str:
    return CHAT.replace("[BEFORE]", before).replace("[AFTER]", after)


def test_a_template_without_a_system_role() -> None:
    refuses = small_tokenizer(
        chat("{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}")
    )
    with pytest.raises(ValueError, match=r"system: .* refuses it \(System role not supported\); pass None and"):
        pk.Prompt.from_chat_template(refuses, SYSTEM, INSTRUCTION)
    prompt = pk.Prompt.from_chat_template(refuses, None, INSTRUCTION)
    words = refuses.convert_ids_to_tokens(prompt.prefix[:-1])
    assert words == ["</s>", "user", "Seen", ":"]
    assert prompt == pk.Prompt.from_chat_template(small_tokenizer(chat()), None, INSTRUCTION)


@pytest.mark.parametrize("system", [SYSTEM, "You"])
def test_a_template_that_drops_the_system_message(system: str) -> None:
    drops = small_tokenizer(chat("{% if m['role'] == 'user' %}", "{% endif %}"))
    with pytest.raises(ValueError, match=r"system: the tokenizer's chat template drops it; pass None and put"):
        pk.Prompt.from_chat_template(drops, system, INSTRUCTION)
    # nothing is lost of nothing
    nothing = pk.Prompt.from_chat_template(drops, " ", INSTRUCTION)
    assert nothing == pk.Prompt.from_chat_template(drops, None, INSTRUCTION)


def test_a_template_that_folds_the_system_message_into_the_users_turn() -> None:
    folds = small_tokenizer("{{ messages[0]['content'] }} user {{ messages[-1]['content'] }}")
    prefix = folds.convert_ids_to_tokens(pk.Prompt.from_chat_template(folds, SYSTEM, INSTRUCTION).prefix[:-1])
    assert prefix == ["You", "recommend", "films", ".", "user", "Seen", ":"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (chat("{{ raise_exception('no') }}"), r"tokenizer: its chat template refuses the instruction: no"),
        (
            chat("{{ m.nothing.at_all }}"),
            r"tokenizer: its chat template refuses the instruction: .*no attribute 'nothing'",
        ),
        (chat("{{ m['content'] }}"), r"tokenizer: its chat template repeats \[HISTORY_SEQUENCE\]"),
    ],
)
def test_templates_that_fail(template: str, message: str) -> None:
    for system in (SYSTEM, None):
        with pytest.raises(ValueError, match=message):
            pk.Prompt.from_chat_template(small_tokenizer(template), system, INSTRUCTION)


@pytest.mark.parametrize("token", ["</s>", "<|user|>", "<|history_separator|>"])
def test_texts_that_spell_control_tokens(token: str) -> None:
    """The template may write them, a text may not; and the tokenizer is not touched before that is clear."""
    tokenizer = small_tokenizer("<|user|> " + TEMPLATE)
    tokenizer.add_tokens(["<|user|>"])
    size = len(tokenizer)
    for name, texts in (("system", (f"You {token}", INSTRUCTION)), ("instruction", (None, f"{INSTRUCTION} {token}"))):
        with pytest.raises(ValueError, match=rf"{name}: expected text without control tokens") as caught:
            pk.Prompt.from_chat_template(tokenizer, *texts)
        assert token in str(caught.value)
    assert len(tokenizer) == size
    prompt = pk.Prompt.from_chat_template(tokenizer, SYSTEM, INSTRUCTION)
    assert prompt.control == tuple(sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|user|>"])))


def test_control_tokens_of_the_llama_template(llama: Any) -> None:
    prompt = pk.Prompt.from_chat_template(llama, SYSTEM, INSTRUCTION)
    headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert prompt.control == tuple(llama.convert_tokens_to_ids(headers))
    assert prompt.control_ids.keys() == {*prompt.control, prompt.prefix[-1], *prompt.separator, prompt.suffix[0]}
    assert pk.Prompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt
    # a callable of which nothing is known is held against them when catalogue and prompt meet
    catalog = pk.Catalog.from_titles(
        {1: "Alien", 2: "<|start_header_id|>system"}, lambda title: llama.encode(title, add_special_tokens=False)
    )
    with pytest.raises(ValueError, match=r"catalog: .*token 128006, a control token of the prompt, got it in item 2"):
        pk.build_layout(catalog, [[1]], pk.TextOnly(), prompt)
    assert "system" not in llama.decode(pk.Prompt.from_chat_template(llama, None, INSTRUCTION).prefix)


def test_history_mark_in_the_system_message_is_refused() -> None:
    with pytest.raises(ValueError, match="system"):
        pk.Prompt.from_chat_template(small_tokenizer(TEMPLATE), "About [HISTORY_SEQUENCE]", INSTRUCTION)


def test_chat_template_needs_a_tokenizer() -> None:
    with pytest.raises(TypeError, match=r"tokenizer: expected a transformers tokenizer, got function"):
        pk.Prompt.from_chat_template(lambda text: [1], SYSTEM, INSTRUCTION)
    tokenizer = small_tokenizer(TEMPLATE)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer: expected an end-of-sequence token"):
        pk.Prompt.from_chat_template(tokenizer, SYSTEM, INSTRUCTION)


def test_learned_rows() -> None:
    prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
    learned = prompt.with_special(experts=[9, 8])
    assert learned.experts == (9, 8)
    assert learned.max_token_id == 9
    assert pk.Prompt.from_dict(json.loads(json.dumps(learned.to_dict()))) == learned
    assert "experts" not in prompt.to_dict()
    assert learned.with_special(experts=()) == prompt
    catalog = pk.Catalog.from_token_ids([5, 8], [0, 2])
    with pytest.raises(ValueError, match=r"catalog: expected titles without token 8, a learned row of the prompt"):
        pk.build_layout(catalog, [[0]], pk.TextOnly(), learned)


@pytest.mark.parametrize("experts", [[2], [9, 9]])
def test_learned_rows_are_reserved(experts: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"experts\[{len(experts) - 1}\]: expected a token id that the prompt has"):
        pk.Prompt(separator=[2]).with_special(experts=experts)
