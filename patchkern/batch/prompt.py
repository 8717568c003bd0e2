# SPDX-License-Identifier: Apache-2.0
"""The fixed tokens around a history: ``prefix | history rows | suffix | target title | response_end``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from patchkern.batch.columns import is_sequence
from patchkern.batch.control_tokens import MARKERS, control_tokens

HISTORY_MARK = "[HISTORY_SEQUENCE]"
_RESERVED = re.compile(r"reserved_special_token_(\d+)")
_INT32_MAX = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class Prompt:
    """Token ids of the prompt's four fixed parts.

    One ``separator`` stands between two history entries, the ``suffix`` after the last one. ``response_end`` closes
    the target title. Each part is a sequence of token ids and may be empty.

    Some of these tokens steer the model: separator and ``response_end``, the last of the prefix and the first of the
    suffix, which frame the history, and those in ``control``. No title may hold one of them.

    Examples:
        Two titles of a history and one that follows, as token ids, with the prompt around them.

        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
        >>> layout = pk.build_layout(catalog, [[0, 1]], pk.TextOnly(), prompt, targets=[0])
        >>> (-1 - layout.lo).tolist()
        [1, 5, 6, 2, 7, 8, 9, 3, 5, 6, 4]
    """

    prefix: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    response_end: tuple[int, ...] = ()
    control: tuple[int, ...] = ()
    """control tokens of a chat template that stand elsewhere in the prompt"""
    experts: tuple[int, ...] = ()
    """reserved token ids whose embeddings are learned rows that compress a history, one for each such row"""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _token_tuple(field.name, getattr(self, field.name)))
        parts = (*self.prefix, *self.separator, *self.suffix, *self.response_end)
        for at, token in enumerate(self.experts):
            if token in parts or token in self.experts[:at]:
                raise ValueError(f"experts[{at}]: expected a token id that the prompt has nowhere else, got {token}")

    @property
    def max_token_id(self) -> int:
        """The largest token id of any part, -1 if all are empty."""
        return max((*self.prefix, *self.separator, *self.suffix, *self.response_end, *self.experts), default=-1)

    def with_special(self, *, experts: Sequence[int]) -> Prompt:
        """The prompt with other learned rows.

        Args:
            experts: token ids that no title holds and that stand nowhere else in the prompt, such as a tokenizer's
                reserved special tokens; the model's embedding has a row for each.

        Examples:
            >>> import patchkern as pk
            >>> pk.Prompt(prefix=[1], separator=[2]).with_special(experts=[8, 9]).experts
            (8, 9)
        """
        return replace(self, experts=_token_tuple("experts", experts))

    @cached_property
    def control_ids(self) -> dict[int, str]:
        """The token ids that no title may hold, and what each is for."""
        roles = dict.fromkeys(self.control, "a control token of the prompt")
        roles |= dict.fromkeys(self.experts, "a learned row of the prompt (experts)")
        roles |= dict.fromkeys(self.prefix[-1:], "which starts the history in the prompt")
        roles |= dict.fromkeys(self.suffix[:1], "which ends the history in the prompt")
        roles |= dict.fromkeys(self.response_end, "the prompt's response_end")
        return roles | dict.fromkeys(self.separator, "the prompt's separator")

    @property
    def is_list(self) -> bool:
        """Whether a history goes on with its target as with any other item: ``separator | title | separator``.

        A history as text then holds every target's response in place (`build_training_layout`).
        """
        return bool(self.separator) and self.separator == self.suffix == self.response_end

    @classmethod
    def from_chat_template(
        cls,
        tokenizer: Any,
        system: str | None,
        instruction: str,
        history: Literal["inside", "last"] = "inside",
        markers: Sequence[str] | None = None,
    ) -> Prompt:
        """Build a chat prompt from a tokenizer with a chat template: the paper's, or one with all words up front.

        ``history="inside"`` is the paper's: ``instruction`` contains ``[HISTORY_SEQUENCE]`` once. Three marker tokens
        frame the history: start ends the prefix, separator stands between entries, end opens the suffix. They are the
        tokenizer's first three reserved special tokens; a tokenizer with fewer than three gets new ones added, after
        which the model needs ``resize_token_embeddings(len(tokenizer))``. ``response_end`` is the tokenizer's
        end-of-sequence token.

        ``history="last"`` puts all words before the history, which is the beginning of the assistant's answer, an item
        a line: separator, suffix and ``response_end`` are the line break, so that a suffix is one row and no token is
        new to a pretrained model. A history as text then teaches all its items for no row more, see `is_list`.

        Args:
            tokenizer: of transformers, with a chat template.
            system: None for a template that knows no system message; some templates then write one of their own.
            instruction: the user's message; with ``[HISTORY_SEQUENCE]`` exactly where the history is inside.
            history: "inside" the instruction, or "last".
            markers: special tokens of the tokenizer, by name, that its template does not write: three for a history
                inside (start, separator, end), one for a history that is last (the separator, instead of the line
                break). None: as above.

        Control tokens come from the template: a text that spells one is refused.

        Raises:
            TypeError: ``tokenizer`` has no chat template method, or a text is not a string.
            ValueError: no chat template, no end-of-sequence token, a history mark too many or too few, a text that
                spells a control token, a template that refuses or drops a message, a marker that is no unused special
                token, or a line break of several tokens.

        Examples:
            >>> import patchkern as pk
            >>> from patchkern.models.scratch import fit_tokenizer  # or AutoTokenizer.from_pretrained(...)
            >>> tokenizer = fit_tokenizer(["Alien", "Aliens"])
            >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant: "
            >>> prompt = pk.Prompt.from_chat_template(tokenizer, "You know films.", "After [HISTORY_SEQUENCE], what?")
            >>> tokenizer.decode(prompt.prefix)
            'system: You know films. user: After <|history_start|>'
            >>> tokenizer.decode(prompt.suffix)
            '<|history_end|>, what? assistant: '
        """
        if not hasattr(tokenizer, "apply_chat_template"):
            raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")
        texts = {"instruction": instruction} if system is None else {"system": system, "instruction": instruction}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
        check_history(history)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("tokenizer: expected one with a chat template, got none; use Prompt(prefix=...) instead")
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected an end-of-sequence token, got none")
        check_marks(system, instruction, history)
        for name, text in texts.items():
            _check_text(tokenizer, name, text)
        rendered = _render(tokenizer, system, instruction)
        if system is not None and system.strip() and rendered == _render(tokenizer, f"{system}.", instruction):
            raise ValueError(
                "system: the tokenizer's chat template drops it; pass None and put the text into the instruction"
            )

        def ids(part: str) -> list[int]:
            return list(tokenizer(part, add_special_tokens=False)["input_ids"])

        known = control_tokens(tokenizer)
        if history == "last":
            if rendered == _render(tokenizer, system, f"{instruction}."):
                raise ValueError("tokenizer: its chat template drops the instruction")
            prefix, suffix = ids(rendered), []
            (separator,) = _line_break(ids("\n")) if markers is None else _named(tokenizer, markers, 1, known, prefix)
            between = (separator,)
            start = () if prefix[-1:] == [separator] else between
            parts = {"prefix": (*prefix, *start), "suffix": between, "response_end": between}
        else:
            before, after = _around_history(rendered)
            prefix, suffix = ids(before), ids(after)
            if markers is None:
                first, separator, end = _marker_ids(tokenizer)
            else:
                first, separator, end = _named(tokenizer, markers, 3, known, [*prefix, *suffix])
            between = (separator,)
            parts = {"prefix": (*prefix, first), "suffix": (end, *suffix), "response_end": (tokenizer.eos_token_id,)}
        return cls(separator=between, control=tuple(sorted(known.keys() & {*prefix, *suffix})), **parts)

    def to_dict(self) -> dict[str, list[int]]:
        """The parts as JSON-ready lists; ``control`` and ``experts`` only where there are some."""
        return {name: list(ids) for name, ids in asdict(self).items() if ids or name not in ("control", "experts")}

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any]) -> Prompt:
        """The inverse of `to_dict`."""
        if not isinstance(parts, Mapping):
            raise TypeError(f"parts: expected a mapping, got {type(parts).__name__}")
        unknown = sorted(set(parts) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"parts: expected {', '.join(field.name for field in fields(cls))}, got {unknown}")
        return cls(**parts)


def check_history(history: Any) -> None:
    """Raise a ValueError unless it is a place that `Prompt.from_chat_template` knows for the history."""
    if history not in ("inside", "last"):
        raise ValueError(f'history: expected "inside" or "last", got {history!r}')


def check_marks(system: str | None, instruction: str, history: str) -> None:
    """Raise a ValueError unless the history's mark is where it belongs, and nowhere else."""
    found, wanted = instruction.count(HISTORY_MARK), int(history == "inside")
    if found != wanted:
        where = "exactly once" if wanted else "nowhere, as the history comes last"
        raise ValueError(f"instruction: expected {HISTORY_MARK} {where}, got it {found} times")
    if system is not None and HISTORY_MARK in system:
        raise ValueError(f"system: expected no {HISTORY_MARK}, which belongs in the instruction")


def _around_history(rendered: str) -> tuple[str, str]:
    """What a chat template wrote before the history's mark, and after it."""
    before, found, after = rendered.partition(HISTORY_MARK)
    if not found:
        raise ValueError(f"tokenizer: its chat template dropped {HISTORY_MARK} from the instruction")
    if HISTORY_MARK in after:
        raise ValueError(f"tokenizer: its chat template repeats {HISTORY_MARK} of the instruction")
    return before, after


def _line_break(ids: list[int]) -> list[int]:
    if len(ids) != 1:
        raise ValueError(
            f"tokenizer: expected a line break of one token, which separates items, got {len(ids)}; name a special "
            "token instead (markers)"
        )
    return ids


def _named(
    tokenizer: Any, markers: Sequence[str], count: int, known: Mapping[int, str], taken: Sequence[int]
) -> list[int]:
    """The ids of markers by name: distinct special tokens that stand nowhere in what the template wrote."""
    if isinstance(markers, str) or not is_sequence(markers) or not all(isinstance(name, str) for name in markers):
        raise TypeError(f"markers: expected a sequence of tokens by name, got {markers!r}")
    free = {text: token for token, text in known.items() if token not in taken and token != tokenizer.eos_token_id}
    unknown = [name for name in markers if name not in free]
    if unknown or len(markers) != count or len(set(markers)) != count:
        some = ", ".join(list(free)[:4]) or "of which it has none"
        raise ValueError(
            f"markers: expected {count} of the tokenizer's special tokens that its chat template does not write "
            f"({some}), got {', '.join(markers) or 'none'}"
        )
    return [free[name] for name in markers]


def _render(tokenizer: Any, system: str | None, instruction: str) -> str:
    """What the chat template makes of the texts; its own errors as a ValueError that names the argument."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": instruction})
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text
    except Exception as error:  # templates are programs that raise whatever they like
        if system is None:
            raise ValueError(f"tokenizer: its chat template refuses the instruction: {error}") from error
        _render(tokenizer, None, instruction)
        raise ValueError(
            f"system: the tokenizer's chat template refuses it ({error}); pass None and put the text into the "
            "instruction"
        ) from error


def _check_text(tokenizer: Any, name: str, text: str) -> None:
    """Refuse a text that spells a control token, which only the template may write."""
    control = control_tokens(tokenizer)
    parts = text.split(HISTORY_MARK)
    ids = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    spelled = [control[token] for token in ids if token in control]
    spelled += [marker for marker in MARKERS if marker in text]  # which the tokenizer may learn only now
    if spelled:
        raise ValueError(
            f"{name}: expected text without control tokens, which are the chat template's to write, got {spelled[0]!r}"
        )


def _token_tuple(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    if not is_sequence(ids):
        raise TypeError(f"{name}: expected a sequence of token ids, got {type(ids).__name__}")
    tokens = []
    for position, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise TypeError(f"{name}[{position}]: expected an integer token id, got {type(token).__name__}")
        value = int(token)
        if not 0 <= value < _INT32_MAX:
            raise ValueError(f"{name}[{position}]: expected a token id in 0..{_INT32_MAX - 1}, got {value}")
        tokens.append(value)
    return tuple(tokens)


def reserved_tokens(tokenizer: Any) -> list[int]:
    """The ids of a tokenizer's reserved special tokens, such as Llama-3 has, in their order."""
    reserved = []
    for token, token_id in tokenizer.get_added_vocab().items():
        match = _RESERVED.search(token)
        if match:
            reserved.append((int(match.group(1)), token_id))
    return [token_id for _, token_id in sorted(reserved)]


def _marker_ids(tokenizer: Any) -> tuple[int, int, int]:
    reserved = reserved_tokens(tokenizer)
    if len(reserved) >= len(MARKERS):
        first, second, third = reserved[: len(MARKERS)]
        return first, second, third
    missing = [marker for marker in MARKERS if marker not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    first, second, third = (tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS)
    return first, second, third
