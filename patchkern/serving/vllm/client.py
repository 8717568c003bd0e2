# SPDX-License-Identifier: Apache-2.0
"""Histories in, ranked items out: a client of vLLM's OpenAI-compatible server over an exported folder."""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.parse
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policy_kinds import AnyPolicy, check_policy
from patchkern.batch.sample_layout import build_layout
from patchkern.search.arguments import users_named
from patchkern.search.filters import ItemFilter
from patchkern.search.trie import Trie
from patchkern.serving.vllm.item_tokens import item_token_ids
from patchkern.serving.vllm.prompt_rows import PromptRows, as_prompt_embeds
from patchkern.serving.vllm.requests import LOGITS_PROCESSOR, request_args
from patchkern.serving.vllm.served import read_served
from patchkern.serving.vllm.title_beam import HostTrie, TitleBeam

_MASKED = -9999.0
"""what the server says for a log-probability of -inf"""

_CLOSED = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)
"""what a connection says that was kept, and that the server has closed"""

Int64 = NDArray[np.int64]


class ServerError(RuntimeError):
    """What a server answered in place of a result.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the server answered {status}: {message}")
        self.status = status


class VllmClient:
    """Asks a server that was started as `patchkern.serving.vllm.export_model` says.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        folder: the exported folder, or a copy of it.
        policy: how histories are compressed; the model's own where not given.
        rows: makes prompts of embeddings, for policies with sessions; the server needs ``--enable-prompt-embeds``.
        concurrency: requests at once; the server batches them.
        timeout: seconds that an answer may take.
        api_key: of a server that asks for one.

    Raises:
        TypeError, ValueError, FileNotFoundError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        url: str,
        folder: str | os.PathLike[str],
        policy: AnyPolicy | None = None,
        *,
        rows: PromptRows | None = None,
        concurrency: int = 32,
        timeout: float = 60.0,
        api_key: str | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: expected http://host:port, got {url!r}")
        check_count("concurrency", concurrency, minimum=1)
        self.served = read_served(folder)
        chosen = self.served.policy if policy is None else policy
        if chosen is None:
            raise ValueError("policy: expected one, because the model was saved without, got None")
        check_policy(chosen)
        self.policy: AnyPolicy = chosen
        self._parts, self._timeout, self._concurrency = parts, timeout, concurrency
        self._rows = rows
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connections = threading.local()
        self._model: str | None = None
        self._trie: HostTrie | None = None

    def recommend(
        self,
        histories: HistoriesLike,
        k: int = 20,
        num_beams: int = 20,
        exclude_seen: bool = False,
        allowed_items: Any = None,
        *,
        user_ids: Sequence[Hashable] | None = None,
    ) -> list[list[tuple[Any, float]]]:
        """Per user ``(item_id, log-probability)``, the ``k`` best first, as of ``PatchedCausalLM.recommend``.

        A folder for items answers with one request a user. One for titles takes a beam search, as many steps as the
        longest title has tokens with up to ``num_beams`` rows each; with ``num_beams=1`` it is one request a user for
        the one title that is most probable token by token.

        Args:
            histories: of B users.
            k: items per user.
            num_beams: of titles; below ``k`` fewer may be found.
            exclude_seen: leave out what a user's history holds.
            allowed_items: as of ``PatchedCausalLM.recommend``.
            user_ids: what errors call the users.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            ServerError: the server refused, or answered for another catalogue.
        """
        check_count("k", k, minimum=1)
        check_count("num_beams", num_beams, minimum=1)
        catalog = self.served.catalog
        names = users_named(histories, len(Histories.coerce(histories)), user_ids)
        histories = Histories.coerce(histories)
        filters = ItemFilter(catalog, histories, allowed_items, exclude_seen, names)
        filters.check(k)
        head = "items" if self.served.head == "items" else "titles"
        layout = build_layout(catalog, histories, self.policy, self.served.prompt, head=head)
        prompts = self._prompts(layout, num_beams)
        search = self._items if head == "items" else self._titles
        if head == "titles" and self._trie is None:
            self._trie = HostTrie(Trie.from_catalog(catalog, self.served.prompt.response_end))

        def one(user: int) -> list[tuple[int, float]]:
            allowed = excluded = None
            if allowed_items is not None:
                allowed = np.flatnonzero(filters.mask(np.array([user]))[0].numpy())
            elif exclude_seen:
                excluded = np.unique(catalog.index_of(histories[user]).astype(np.int64))
            return search(prompts[user], allowed, excluded, k, num_beams)

        with ThreadPoolExecutor(min(self._concurrency, max(len(histories), 1))) as pool:
            found = list(pool.map(one, range(len(histories))))
        item_ids = catalog.item_ids
        return [[(item_ids.item(item), score) for item, score in user] for user in found]

    # ------------------------------------------------------------------ one user

    def _items(
        self, prompt: dict[str, Any], allowed: Int64 | None, excluded: Int64 | None, k: int, _: int
    ) -> list[tuple[int, float]]:
        arguments = request_args(self.served, allowed=allowed, excluded=excluded)
        ((answer,),) = self._complete(prompt, arguments, logprobs=k)
        items = [(token - self.served.vocab_size, score) for token, score in answer.items()]
        found = np.array([item for item, _ in items], np.int64)
        if len(items) < k or (found < 0).any() or not _membership(allowed, excluded)(found).all():
            raise ServerError(
                200,
                f"expected {k} items that the user may get, got {found.tolist()}; is another folder served, or without "
                f"{LOGITS_PROCESSOR}?",
            )
        return sorted(items, key=lambda item: (-item[1], item[0]))[:k]

    def _titles(
        self, prompt: dict[str, Any], allowed: Int64 | None, excluded: Int64 | None, k: int, num_beams: int
    ) -> list[tuple[int, float]]:
        if self._trie is None:
            raise RuntimeError("_titles before the tree of titles")
        may = _membership(allowed, excluded)
        beam = TitleBeam(self._trie, k, num_beams)
        if num_beams == 1:
            arguments = request_args(self.served, allowed=allowed, excluded=excluded)
            (steps,) = self._complete(prompt, arguments, logprobs=1, max_tokens=self._trie.depth)
            for answer in steps:
                self._take(beam, [answer])
                if not beam.beginnings:
                    break
            return beam.items(may)
        ids = prompt["prompt"]
        arguments = request_args(self.served, allowed=allowed, excluded=excluded, title_at=len(ids))
        while beam.beginnings:
            begun = {"prompt": [[*ids, *tokens] for tokens in beam.beginnings]}
            answers = self._complete(begun, arguments, logprobs=beam.choices)
            self._take(beam, [steps[0] for steps in answers])
        return beam.items(may)

    @staticmethod
    def _take(beam: TitleBeam, answers: list[dict[int, float]]) -> None:
        try:
            beam.take(answers)
        except ValueError as error:
            raise ServerError(200, f"{error}; is another folder served, or without {LOGITS_PROCESSOR}?") from error

    def _prompts(self, layout: PatchLayout, num_beams: int) -> list[dict[str, Any]]:
        catalog, vocab_size = self.served.catalog, self.served.vocab_size
        if self._rows is None:
            return [{"prompt": ids.tolist()} for ids in item_token_ids(layout, catalog, vocab_size)]
        if self.served.head == "titles" and num_beams > 1:
            raise ValueError(
                "num_beams: expected 1 with prompts of embeddings, which a beam would send again for every hypothesis, "
                f"got {num_beams}; use item tokens, or a folder for items"
            )
        return [{"prompt_embeds": as_prompt_embeds(rows)} for rows in self._rows(layout)]

    # ------------------------------------------------------------------ HTTP

    def _complete(
        self, prompt: dict[str, Any], arguments: dict[str, Any], logprobs: int, max_tokens: int = 1
    ) -> list[list[dict[int, float]]]:
        """For each prompt and each token that it went on with, the best tokens there and their log-probabilities."""
        end = self.served.prompt.response_end
        body = {
            **prompt,
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": logprobs,
            "return_tokens_as_token_ids": True,
            "cache_salt": self.served.identity,
            "vllm_xargs": arguments,
        }
        if max_tokens > 1 and end.count(end[-1]) == 1:
            body["stop_token_ids"] = [end[-1]]
        answer = self._request("POST", "/v1/completions", body)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            [
                {int(name.removeprefix("token_id:")): score for name, score in step.items() if score > _MASKED}
                for step in choice["logprobs"]["top_logprobs"]
            ]
            for choice in choices
        ]

    @property
    def model(self) -> str:
        """What the server calls its model."""
        if self._model is None:
            self._model = str(self._request("GET", "/v1/models")["data"][0]["id"])
        return self._model

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body)
        for again in (True, False):
            connection = self._connection()
            try:
                connection.request(method, self._parts.path.rstrip("/") + path, data, self._headers)
                response = connection.getresponse()
                content = response.read()
                break
            except BaseException as error:
                connection.close()  # or what it was in the middle of would be the next request's
                if not (again and isinstance(error, _CLOSED)):
                    raise
        if response.status != 200:
            raise ServerError(response.status, content.decode("utf-8", "replace")[:1000])
        return json.loads(content)

    def _connection(self) -> http.client.HTTPConnection:
        """Of this thread."""
        kept: http.client.HTTPConnection | None = getattr(self._connections, "kept", None)
        if kept is None:
            kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
            kept = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout)
            self._connections.kept = kept
        return kept


def _membership(allowed: Int64 | None, excluded: Int64 | None) -> Callable[[Int64], NDArray[np.bool_]]:
    if allowed is not None:
        return lambda items: np.isin(items, allowed)
    if excluded is not None:
        return lambda items: ~np.isin(items, excluded)
    return lambda items: np.ones(items.size, bool)
