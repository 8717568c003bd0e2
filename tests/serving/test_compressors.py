# SPDX-License-Identifier: Apache-2.0
"""What is kept of users under `Experts` and `PreferenceMemory`: rows of a whole pass, in the bytes of the formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import patchkern as pk
from patchkern.serving import expert_rows
from patchkern.serving.compressor import Known, Tensors
from patchkern.serving.expert_rows import ExpertRows
from patchkern.serving.memory_rows import MemoryRows

pytest.importorskip("transformers", reason="transformers is not installed")
import memory_model_cases as memories
import model_cases
import transformers
from item_model_cases import ITEM_IDS, N_ITEMS, make_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

PATCH, SESSIONS = pk.ItemPatches(0, None), pk.SessionPatches(2, None, align="start")
POLICIES = {
    "one": pk.Experts(PATCH, count=2, keep=3, block=4),
    "one, sessions": pk.Experts(SESSIONS, count=3, keep=2, block=4),
    "blocks": pk.Experts(PATCH, count=2, block=4, parts="blocks"),
    "blocks, text": pk.Experts(pk.TextOnly(None), count=1, block=3, parts="blocks"),
}
LENGTHS = (13, 7, 22, 9)
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def model_of(kind: str, policy: pk.Experts) -> Any:
    if kind == "llama":
        special = range(model_cases.VOCABULARY - policy.count, model_cases.VOCABULARY)
        titles = [[token % 60 + 9 for token in title] for title in model_cases.TITLES]
        catalog = pk.Catalog.from_token_ids(np.concatenate(titles), np.cumsum([0, *map(len, titles)]))
        prompt = model_cases.PROMPT.with_special(experts=special)
        return pk.PatchedCausalLM(model_cases.tiny("llama").double().eval(), catalog, prompt, policy)
    special = range(N_ITEMS + 1, N_ITEMS + 1 + policy.count)
    return make_model(torch.float64, policy=policy, block=kind, prompt=pk.Prompt(prefix=(N_ITEMS,), experts=special))


def histories_of(kind: str) -> pk.Histories:
    ids: Any = range(40) if kind == "llama" else ITEM_IDS
    draw = np.random.default_rng(0)
    return pk.Histories.coerce([[ids[item] for item in draw.integers(0, N_ITEMS, length)] for length in LENGTHS])


def whole_pass(model: Any, kind: str, histories: pk.Histories, policy: pk.Experts) -> list[Tensors]:
    """Keys and values of the experts' rows, layer by layer, in one pass over whole prompts."""
    layout = pk.build_layout(model.catalog, histories, policy, model.prompt)
    experts = torch.isin(-1 - layout.lo.long(), torch.tensor(model.prompt.experts))
    found: list[Tensor] = []
    if kind == "llama":
        cos, sin = model.hf_model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), layout.position_ids[None])

        def keep_key(module: Any, given: Any, out: Tensor) -> None:
            rows = out[0].unflatten(1, (-1, 8)).transpose(0, 1)[None]
            found.append(apply_rotary_pos_emb(rows, rows, cos, sin)[0][0].transpose(0, 1)[experts])

        def keep_value(module: Any, given: Any, out: Tensor) -> None:
            found.append(out[0].unflatten(1, (-1, 8))[experts])

        layers = model.hf_model.model.layers
        hooks = [layer.self_attn.k_proj.register_forward_hook(keep_key) for layer in layers]
        hooks += [layer.self_attn.v_proj.register_forward_hook(keep_value) for layer in layers]
    else:

        def keep(module: Any, given: Any, out: Tensor) -> None:
            width = model.config.hidden_size // model.config.num_attention_heads
            if kind == "sasrec":
                _, key, value = out[0].chunk(3, dim=1)
            else:
                _, value, _, key = torch.nn.functional.silu(out[0]).chunk(4, dim=1)
            found.extend(part.unflatten(1, (-1, width))[experts] for part in (key, value))

        name = "query_key_value" if kind == "sasrec" else "projection"
        hooks = [getattr(layer, name).register_forward_hook(keep) for layer in model.hf_model.layers]
    with torch.no_grad():
        model(layout)
    for hook in hooks:
        hook.remove()
    user = torch.bucketize(torch.nonzero(experts)[:, 0], layout.prompts[1:].long(), right=True)
    return [tuple(part[user == each].transpose(0, 1) for part in found) for each in range(len(histories))]


def same(found: list[Tensors], expected: list[Tensors]) -> bool:
    for own, other in zip(found, expected, strict=True):
        for part, whole in zip(own, other, strict=True):
            torch.testing.assert_close(part, whole, **EXACT)
    return True


def compressed(compressor: Any, histories: pk.Histories, known: list[Known | None]) -> list[Tensors]:
    with torch.no_grad(), compressor._model.searching():
        found: list[Tensors] = compressor.compress(histories, known)
    return found


@pytest.mark.parametrize("kind", ["sasrec", "hstu", "llama"])
@pytest.mark.parametrize("name", list(POLICIES))
def test_experts_are_the_rows_of_a_whole_pass(name: str, kind: str) -> None:
    policy, histories = POLICIES[name], histories_of(kind)
    model = model_of(kind, policy)
    compressor = ExpertRows(model, policy)
    found = compressed(compressor, histories, [None] * len(LENGTHS))
    assert same(found, whole_pass(model, kind, histories, policy))
    assert len(found[0]) == 4 and all(part.shape[1] > 0 and part.abs().max() > 0.1 for own in found for part in own)
    for own, old in zip(found, compressor.cuts(histories.lengths).tolist(), strict=True):
        for part, like in zip(own, compressor.like(old), strict=True):
            assert (part.shape, part.dtype, part.device.type) == (like.shape, like.dtype, "cpu")


@pytest.mark.parametrize("kind", ["hstu", "llama"])
@pytest.mark.parametrize("name", ["one", "blocks"])
def test_a_long_past_is_read_in_passes_of_bounded_size(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, histories = POLICIES[name], histories_of(kind)
    model = model_of(kind, policy)
    expected, rows, embed = whole_pass(model, kind, histories, policy), list[int](), model.embed
    monkeypatch.setattr(expert_rows, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(model, "embed", lambda layout, *rest: rows.append(layout.num_rows) or embed(layout, *rest))
    assert same(compressed(ExpertRows(model, policy), histories, [None] * len(LENGTHS)), expected)
    assert max(rows) == 7


@pytest.mark.parametrize("kind", ["sasrec", "hstu", "llama"])
@pytest.mark.parametrize("name", ["blocks", "blocks, text"])
def test_going_on_gives_the_same_rows_and_reads_only_new_items(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, users at different blocks together, some of them new."""
    policy, histories = POLICIES[name], histories_of(kind)
    model = model_of(kind, policy)
    compressor, rows = ExpertRows(model, policy), list[int]()
    embed = model.embed

    def counted(layout: pk.PatchLayout, *vectors: Any) -> Tensor:
        rows.append(layout.num_rows)
        made: Tensor = embed(layout, *vectors)
        return made

    monkeypatch.setattr(model, "embed", counted)
    known: list[Known | None] = [None] * len(LENGTHS)
    for turn in range(1, 22 // policy.block + 1):
        cut = np.minimum(turn * policy.block + 1 + np.arange(len(LENGTHS)) % 2, histories.lengths)
        some = pk.Histories.coerce([history[:end] for history, end in zip(histories, cut, strict=True)])
        behind = compressor.cuts(some.lengths) > np.array([0 if one is None else one.cut for one in known])
        if behind.any():
            which = np.flatnonzero(behind)
            found = compressed(compressor, some.take(which), [known[user] for user in which])
            for user, own in zip(which.tolist(), found, strict=True):
                known[user] = Known(int(compressor.cuts(some.lengths)[user]), own)
    if name == "blocks" and kind != "llama":  # what starts all histories, four items and two experts
        assert rows == [1 + 6 * users for users in (4, 3, 2, 1, 1)]
    assert max(rows) < pk.build_layout(model.catalog, histories, policy, model.prompt).num_rows / 2
    assert same([one.tensors for one in known if one is not None], whole_pass(model, kind, histories, policy))


def test_other_users_change_nothing() -> None:
    policy, histories = POLICIES["blocks"], histories_of("sasrec")
    compressor = ExpertRows(model_of("sasrec", policy), policy)
    alone = compressed(compressor, histories.take([2]), [None])
    together = compressed(compressor, histories, [None] * len(LENGTHS))
    other = compressed(compressor, histories.take([1, 2, 2]), [None] * 3)
    assert same([together[2], other[1], other[2]], 3 * alone)


@pytest.mark.parametrize("mode", ["overwrite", "append"])
@pytest.mark.parametrize("one_time", [False, True])
def test_memories_are_those_that_the_model_makes(mode: str, one_time: bool) -> None:
    model = memories.make_memory("sasrec", mode, one_time=one_time)
    compressor = MemoryRows(model, model.policy)
    assert compressor.extends != one_time
    users = np.flatnonzero(compressor.cuts(memories.HISTORIES.lengths))
    histories = memories.HISTORIES.take(users)
    made = model.compress(histories)
    whole: list[Tensors] = [(made[user][0],) for user in range(len(made))]
    assert same(compressed(compressor, histories, [None] * len(users)), whole)
    earlier = pk.Histories.coerce([history[: memories.BLOCK + 1] for history in histories])
    first = compressed(compressor, earlier, [None] * len(users))
    known = [Known(memories.BLOCK, own) if user % 2 else None for user, own in enumerate(first)]
    assert same(compressed(compressor, histories, known), whole)
    for own, old in zip(whole, compressor.cuts(histories.lengths).tolist(), strict=True):
        assert own[0].shape == compressor.like(old)[0].shape and own[0].dtype == compressor.like(old)[0].dtype


def test_what_does_not_compress_is_refused() -> None:
    model = model_of("sasrec", POLICIES["one"])
    with pytest.raises(TypeError, match=r"policy: expected one that compresses what is old, Experts, or Prefer.* Text"):
        pk.UserStates(model, pk.TextOnly(None))
    with pytest.raises(TypeError, match="got PreferenceMemory for ItemModel"):
        pk.UserStates(model, pk.PreferenceMemory(PATCH, 2, 4))
    with pytest.raises(ValueError, match="prompt: expected the token ids of 5 experts"):
        pk.UserStates(model, pk.Experts(PATCH, count=5, block=4))
    with pytest.raises(TypeError, match="model: expected a PatchedCausalLM"):
        pk.UserStates(object())  # type: ignore[arg-type]


def test_without_experts_nothing_is_kept() -> None:
    policy = pk.Experts(PATCH, count=0, keep=3, block=4)
    states = pk.UserStates(model_of("sasrec", policy))
    assert states.update(None, histories_of("sasrec")) == (4, 0, 0, 0, 0) and len(states) == 0
    assert states.bytes_per_user == 64, "a header alone"


@pytest.mark.parametrize(
    ("config", "count", "expected"),
    [
        ({"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}, 4, 131_072),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}, 4, 4_096),
    ],
)
def test_bytes_are_those_of_the_formula(config: dict[str, int], count: int, expected: int) -> None:
    """Llama-3.2-1B's layers and tiny ones, in bfloat16."""
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 83}
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **config)).bfloat16()
    catalog = pk.Catalog.from_token_ids(range(9, 69), range(61))
    prompt = model_cases.PROMPT.with_special(experts=range(83 - count, 83))
    for parts, blocks in (("one", 1), ("blocks", 3)):
        policy = pk.Experts(PATCH, count=count, block=50, parts=parts)
        compressor = ExpertRows(pk.PatchedCausalLM(network, catalog, prompt, policy), policy)
        assert sum(like.nbytes for like in compressor.like(150)) == blocks * expected
