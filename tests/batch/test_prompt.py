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
