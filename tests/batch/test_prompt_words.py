# SPDX-License-Identifier: Apache-2.0
"""All words before the history, markers by name, and the file that a prompt's words come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import patchkern as pk

scratch = pytest.importorskip("patchkern.models.scratch", reason="fits a tokenizer")

SYSTEM, INSTRUCTION = "You know films.", "List the films of one user."
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
UNUSED = ["<file>", "<name>", "<stars>"]


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    """Of bytes, with special tokens of which the template writes some."""
    tokenizer = scratch.fit_tokenizer(["You know films", "List the films of one user", "assistant"], 300)
    special = {"additional_special_tokens": ["<|turn|>", *UNUSED]}
    tokenizer.add_special_tokens(special, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_words_before_the_history() -> None:
    tokenizer = chat_tokenizer()
    size = len(tokenizer)
    prompt = pk.Prompt.from_chat_template(tokenizer, SYSTEM, INSTRUCTION, history="last")
    words = f"<|turn|>system\n{SYSTEM}<|end|>\n<|turn|>user\n{INSTRUCTION}<|end|>\n<|turn|>assistant\n"
    assert prompt.prefix == ids(tokenizer, words), "the line break that ends it stands before the first item"
    assert prompt.separator == prompt.suffix == prompt.response_end == ids(tokenizer, "\n")
    assert prompt.is_list and len(prompt.suffix) == 1 and len(tokenizer) == size
    assert prompt.control == tuple(sorted(tokenizer.convert_tokens_to_ids(["<|turn|>", "<|end|>"])))
    assert pk.Prompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt
    titles = {1: "Alien", 2: "Aliens"}
    layout = pk.build_layout(pk.Catalog.from_titles(titles, tokenizer), [[1, 2]], pk.TextOnly(), prompt, [1])
    assert tokenizer.decode(-1 - layout.lo) == f"{words}Alien\nAliens\nAlien\n"


def test_a_template_that_ends_otherwise_is_given_a_separator() -> None:
    tokenizer = chat_tokenizer(TEMPLATE.replace("assistant\n", "assistant:"))
    prompt = pk.Prompt.from_chat_template(tokenizer, None, INSTRUCTION, history="last")
    assert tokenizer.decode(prompt.prefix).endswith("<|turn|>assistant:\n")


def test_markers_by_name() -> None:
    tokenizer = chat_tokenizer()
    file, name, stars = tokenizer.convert_tokens_to_ids(UNUSED)
    inside = pk.Prompt.from_chat_template(tokenizer, None, "Seen: [HISTORY_SEQUENCE].", markers=UNUSED)
    assert (inside.prefix[-1], *inside.separator, inside.suffix[0]) == (file, name, stars)
    last = pk.Prompt.from_chat_template(tokenizer, None, INSTRUCTION, history="last", markers=["<name>"])
    assert last.is_list and last.separator == (name,) and last.prefix[-1] == name
    assert {file, name, stars}.isdisjoint(inside.control + last.control)


@pytest.mark.parametrize(
    ("history", "markers", "error", "message"),
    [
        (
            "inside",
            UNUSED[:2],
            ValueError,
            r"markers: expected 3 of the tokenizer's special tokens .*, got <file>, <name>",
        ),
        ("inside", ["<file>", "<file>", "<name>"], ValueError, r"markers: expected 3 .*\("),
        ("inside", ["<file>", "<name>", "<|turn|>"], ValueError, r"markers: .*that its chat template does not write"),
        ("inside", ["<file>", "<name>", "film"], ValueError, r"markers: expected 3 .*, got <file>, <name>, film"),
        ("last", ["<|end|>"], ValueError, r"markers: expected 1 .*, got <\|end\|>"),
        ("last", "<file>", TypeError, r"markers: expected a sequence of tokens by name, got '<file>'"),
        ("first", None, ValueError, r"history: expected \"inside\" or \"last\", got 'first'"),
    ],
)
def test_markers_refuse(history: Any, markers: Any, error: type[Exception], message: str) -> None:
    instruction = INSTRUCTION if history == "last" else f"{INSTRUCTION} [HISTORY_SEQUENCE]"
    with pytest.raises(error, match=message):
        pk.Prompt.from_chat_template(chat_tokenizer(), SYSTEM, instruction, history, markers)


def test_words_that_come_last_refuse() -> None:
    with pytest.raises(ValueError, match=r"instruction: expected \[HISTORY_SEQUENCE\] nowhere, as the history"):
        pk.Prompt.from_chat_template(chat_tokenizer(), None, "Seen [HISTORY_SEQUENCE]", history="last")
    with pytest.raises(ValueError, match="tokenizer: its chat template drops the instruction"):
        pk.Prompt.from_chat_template(chat_tokenizer("hello\n"), None, INSTRUCTION, history="last")
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.normalizer = pytest.importorskip("tokenizers").normalizers.Replace("\n", "--")
    with pytest.raises(ValueError, match="tokenizer: expected a line break of one token, which separates items, got 2"):
        pk.Prompt.from_chat_template(tokenizer, None, INSTRUCTION, history="last")


# ------------------------------------------------------------------ the file


def test_a_file_of_words(tmp_path: Path) -> None:
    tokenizer, path = chat_tokenizer(), tmp_path / "words.json"
    words = pk.PromptWords(INSTRUCTION, SYSTEM, "last", ("<file>",))
    path.write_text(json.dumps(words.to_dict()))
    assert pk.PromptWords.read(path) == words
    assert words.prompt(tokenizer) == pk.Prompt.from_chat_template(tokenizer, SYSTEM, INSTRUCTION, "last", ["<file>"])
    path.write_text('{"instruction": "After [HISTORY_SEQUENCE], what?"}')
    assert pk.PromptWords.read(path) == pk.PromptWords("After [HISTORY_SEQUENCE], what?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"expected a prompt's words as a JSON object: Expecting property name"),
        ("[]", r"words: expected a mapping, got list"),
        ('{"system": "x"}', r"words: expected an instruction, got none"),
        ('{"instruction": "x", "histry": "last"}', r"words: expected instruction, system, .*got 'histry'"),
        ('{"instruction": 5}', r"instruction: expected a string, got int"),
        ('{"instruction": "x", "history": "first"}', r"history: expected \"inside\" or \"last\""),
        ('{"instruction": "x"}', r"instruction: expected \[HISTORY_SEQUENCE\] exactly once"),
        ('{"instruction": "x", "history": "last", "system": "[HISTORY_SEQUENCE]"}', r"system: expected no"),
        ('{"instruction": "x", "history": "last", "markers": "<s>"}', r"markers: expected a list of tokens by name"),
    ],
)
def test_files_that_are_no_words(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        pk.PromptWords.read(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="prompt: expected a file, found none"):
        pk.PromptWords.read(tmp_path / "none.json")
