# SPDX-License-Identifier: Apache-2.0
"""A model that is searched by several threads, trained by another one, or interrupted anywhere."""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import gc
import itertools
import pickle
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import POLICIES, make_histories, make_titles
from search_oracle import make_model

import patchkern as pk
from patchkern.models import searching
from patchkern.search import batching
from patchkern.search.user_cache import UserCache

TITLES = make_titles(23)
POLICY = POLICIES["items"]
OTHER_ATTENTION = "sdpa"


def switched_model(training: bool = True, attention: str = OTHER_ATTENTION) -> pk.PatchedCausalLM:
    """A model that a search must change, with dropout that shows where it did not."""
    model = make_model(TITLES)
    model.hf_model.set_attn_implementation(attention)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train(training)
    model.hf_model.model.layers[0].eval()
    return model


def state(model: pk.PatchedCausalLM) -> Any:
    modes = [module.training for module in model.modules()]
    return modes, model.config._attn_implementation, torch.is_grad_enabled()


def is_free(model: pk.PatchedCausalLM) -> bool:
    """Whether another thread could search now."""

    def free() -> bool:
        lock = searching.lock_of(model.config)
        got = lock.acquire(blocking=False)
        if got:
            lock.release()
        return got

    with ThreadPoolExecutor(1) as other:
        return other.submit(free).result()


# ------------------------------------------------------------------ threads


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


SEARCHES: dict[str, dict[str, Any]] = {
    "beam": {"k": 4, "num_beams": 4},
    "exact": {"k": 5, "num_beams": 5, "search": "exact"},
    "diverse": {"k": 3, "num_beams": 6, "search": "diverse"},
}
MODES = {"train, sdpa": (True, "sdpa"), "eval, eager": (False, "eager"), "train, spans": (True, "patchkern_varlen")}


@pytest.mark.parametrize(
    ("search", "mode", "cached"),
    [
        *(("beam", mode, False) for mode in MODES),
        ("exact", "train, sdpa", True),
        ("diverse", "train, spans", True),
    ],
)
def test_every_thread_gets_its_lists(search: str, mode: str, cached: bool, impatient: None) -> None:
    model = switched_model(*MODES[mode])
    users = [make_histories(TITLES, lengths) for lengths in ([9, 2, 5], [1, 7], [12, 3, 3], [4])]
    options = {"policy": POLICY, "batch_size": 2, **SEARCHES[search]}
    expected = [model.recommend(histories, **options) for histories in users]
    before = state(model)
    if cached:
        options["user_cache"] = UserCache(model, 1 << 14)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: model.recommend(users[each % 4], **options), range(8)))
    if cached:  # rows computed in another pass differ in the last bits of their scores
        assert [[[item for item, _ in row] for row in lists] for lists in found] == [
            [[item for item, _ in row] for row in expected[each % 4]] for each in range(8)
        ]
        assert all(
            abs(x[1] - y[1]) < 1e-10
            for each, lists in enumerate(found)
            for got, wanted in zip(lists, expected[each % 4], strict=True)
            for x, y in zip(got, wanted, strict=True)
        )
    else:
        assert found == [expected[each % 4] for each in range(8)]
    assert state(model) == before and is_free(model)


def test_training_and_its_mode_wait_for_a_search() -> None:
    model = switched_model()
    layout = pk.build_layout(model.catalog, make_histories(TITLES, [3]), POLICY, model.prompt, [next(iter(TITLES))])
    seen: list[tuple[bool, str]] = []
    model.hf_model.register_forward_pre_hook(
        lambda module, inputs: seen.append((module.training, module.config._attn_implementation))
    )
    with ThreadPoolExecutor(2) as others:
        with model.searching():
            waiting = [others.submit(model, layout), others.submit(model.train)]
            time.sleep(0.05)
            assert not any(each.done() for each in waiting)
            assert not seen and not any(module.training for module in model.modules())
        loss = waiting[0].result().loss
        waiting[1].result()
    assert seen == [(True, OTHER_ATTENTION)] and loss.requires_grad
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("asked", ["item_states", "row_states", "loss"])
def test_passes_of_a_search_are_nobody_elses(asked: str) -> None:
    """Whoever waits for its own pass hears no other thread's, and goes by its own mode."""
    parts = make_model(TITLES)
    model = pk.PatchedCausalLM(
        parts.hf_model, parts.catalog, parts.prompt, item_head=True, item_embeddings=True, vector_dropout=0.5
    ).train()
    torch.nn.init.normal_(model.item_embedding)
    histories = make_histories(TITLES, [3, 9])
    layout = pk.build_layout(model.catalog, histories, POLICY, model.prompt, list(TITLES)[:2], head="items")

    def ask() -> torch.Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return model(layout).loss if asked == "loss" else getattr(model, asked)(layout)

    expected = ask()
    with ThreadPoolExecutor(1) as other:
        with model.searching():
            waiting = other.submit(ask)
            time.sleep(0.05)
            model.recommend(make_histories(TITLES, [12]), POLICY, k=2, search="items")
        assert torch.equal(waiting.result(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("enabled", ["before it is wrapped", "after"])
def test_activations_are_not_recomputed_during_a_search(reentrant: bool, enabled: str) -> None:
    """In evaluation mode they would be others: gradients of another function, or an error."""
    model = switched_model()
    how = {"use_reentrant": reentrant}
    if enabled == "after":
        model.activation_checkpointing_enable(how)
    else:
        model.hf_model.activation_checkpointing_enable(how)
        model = pk.PatchedCausalLM(model.hf_model, model.catalog, model.prompt, attn_implementation=None)
    model = copy.deepcopy(model)
    layout = pk.build_layout(model.catalog, make_histories(TITLES, [3]), POLICY, model.prompt, [next(iter(TITLES))])

    def gradients(disturbed: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(layout).loss
        if disturbed:
            with ThreadPoolExecutor(1) as other:
                with model.searching():
                    waiting = other.submit(loss.backward)
                    time.sleep(0.1)
                waiting.result()
        else:
            loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected, found = gradients(False), gradients(True)
    assert len(found) == len(expected) > 10
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_two_models_around_one_network_take_turns() -> None:
    one = switched_model()
    other = pk.PatchedCausalLM(one.hf_model, one.catalog, one.prompt, attn_implementation=None)
    with one.searching():
        assert not is_free(other) and is_free(make_model(TITLES))
    assert is_free(other)


@pytest.mark.parametrize("change", ["mode", "attention"])
def test_a_change_behind_the_models_back_is_an_error(change: str) -> None:
    model = switched_model()
    before = state(model)
    with (
        pytest.raises(RuntimeError, match="model: expected its mode and attention to stay as they are during a search"),
        model.searching(),
    ):
        if change == "mode":
            model.hf_model.model.layers[1].train()
        else:
            model.hf_model.set_attn_implementation("eager")
    assert state(model) == before and is_free(model)


def test_models_that_were_searched_can_be_copied() -> None:
    model = switched_model()
    with model.searching():
        inside = copy.deepcopy(model)
        assert is_free(inside)
    again = pickle.loads(pickle.dumps(model))
    histories = make_histories(TITLES, [5, 2])
    lists = model.recommend(histories, POLICY, 3, 3)
    assert again.recommend(histories, POLICY, 3, 3) == lists
    cache = UserCache(model, 1 << 18)
    model.recommend(histories, POLICY, 3, 3, user_cache=cache)
    copied = copy.deepcopy({"model": model, "cache": cache})
    assert len(cache) == 2 and len(copied["cache"]) == 0
    assert copied["model"].recommend(histories, POLICY, 3, 3, user_cache=copied["cache"]) == lists


def test_locks_go_with_their_models() -> None:
    gc.collect()
    before = len(searching._locks)
    model = switched_model()
    with model.searching():
        assert len(searching._locks) > before
    del model
    gc.collect()
    assert len(searching._locks) <= before


def test_attention_of_the_parts_is_restored() -> None:
    """Parts with configurations of their own may each have another attention."""
    from transformers import Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 97, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = Gemma3ForConditionalGeneration.config_class(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96
    )
    network: Any = Gemma3ForConditionalGeneration(config)
    network.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    before = [each._attn_implementation for each in (config, config.text_config, config.vision_config)]
    assert before == ["sdpa", "eager", "sdpa"]
    tiny = make_model(TITLES)
    model = pk.PatchedCausalLM(network, tiny.catalog, tiny.prompt, attn_implementation=None)
    with model.searching():
        assert model.config.get_text_config()._attn_implementation == "patchkern_varlen"
    assert [each._attn_implementation for each in (config, config.text_config, config.vision_config)] == before


@pytest.mark.parametrize("search", ["items", "beam"])
def test_two_models_that_are_each_others_priors(search: str) -> None:
    """Each asks the other before it is made ready itself: else each would hold what the other waits for."""
    parts = [make_model(TITLES) for _ in range(2)]
    models = [pk.PatchedCausalLM(x.hf_model, x.catalog, x.prompt, POLICY, item_head=True) for x in parts]
    histories = make_histories(TITLES, [3, 9])
    both_ask = threading.Barrier(2)

    def search_one(asked: int) -> list[list[tuple[Any, float]]]:
        prior = pk.ItemHeadPrior(models[1 - asked])

        def patient(users: pk.Histories) -> Any:
            both_ask.wait(10)
            other = ThreadPoolExecutor(1)  # whose time can be limited
            try:
                return other.submit(prior, users).result(5)
            finally:
                other.shutdown(wait=False)

        return models[asked].recommend(histories, k=3, search=search, prior=patient)

    for model in models:
        model.eval()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(search_one, range(2)))
    for asked, lists in enumerate(found):
        prior = pk.ItemHeadPrior(models[1 - asked])
        assert lists == models[asked].recommend(histories, k=3, search=search, prior=prior)


# ------------------------------------------------------------------ interrupts


class Interrupted(BaseException):
    pass


@functools.cache
def interruptible(code: types.CodeType) -> frozenset[int]:
    """The instructions before which CPython looks for signals: where a function begins, and after calls."""
    instructions = [each for each in dis.get_instructions(code) if each.opname != "CACHE"]
    return frozenset(
        after.offset
        for before, after in itertools.pairwise(instructions)
        if before.opname == "RESUME" or before.opname.startswith("CALL")
    )


@contextlib.contextmanager
def interrupted(number: int, files: tuple[str, ...], points: list[int]) -> Iterator[None]:
    """Raise at one of the points in these files at which a signal could; ``points`` counts them."""

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in interruptible(frame.f_code):
            points[0] += 1
            if points[0] == number:
                sys.settrace(None)
                raise Interrupted
        return trace

    sys._getframe().f_trace_opcodes = True  # Python 3.12 traces opcodes only where some frame wanted them beforehand
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="older ones look for signals in more places than can be traced")
def test_an_interrupt_anywhere_leaves_the_model_as_it_was() -> None:
    model = switched_model()
    before = state(model)
    files = (searching.__file__, batching.__file__)

    layout = pk.build_layout(model.catalog, make_histories(TITLES, [2]), POLICY, model.prompt)
    batching._searched(model, layout, 3, list)  # asks whether the model keeps users apart, once

    def work() -> int:
        return sum([1, 2])

    number, hits = 0, 0
    while True:
        number += 1
        points = [0]
        caught = None
        try:
            with interrupted(number, files, points):
                batching._searched(model, layout, 3, work)
        except Interrupted as error:
            caught = error  # its traceback keeps the frames alive, as a notebook does
        assert state(model) == before and is_free(model), f"interrupted at point {number}"
        if caught is None:
            break
        hits += 1
    assert hits > 50


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt")
def test_signals_during_a_search_leave_model_and_cache_right(impatient: None) -> None:
    model = switched_model()
    before = state(model)
    histories = make_histories(TITLES, [9, 2, 5])
    cache = UserCache(model, 1 << 14)
    options: dict[str, Any] = {"policy": POLICY, "k": 4, "num_beams": 4, "user_cache": cache}
    started = time.perf_counter()
    expected = [[item for item, _ in row] for row in model.recommend(histories, **options)]
    duration = time.perf_counter() - started

    def interrupt(*_: Any) -> None:
        raise Interrupted

    handler: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(20):
            cache.clear()
            with contextlib.suppress(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, duration * (number + 0.5) / 20)
                model.recommend(histories, **options)
                signal.setitimer(signal.ITIMER_REAL, 0)  # here, for one that comes late is suppressed too
            assert state(model) == before and is_free(model)
            assert [[item for item, _ in row] for row in model.recommend(histories, **options)] == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
