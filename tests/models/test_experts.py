# SPDX-License-Identifier: Apache-2.0
"""Models under `Experts`: what they compute, in spans, is what the dense mask of the rule gives, gradients included."""

from __future__ import annotations

import copy
from typing import Any

import expert_cases as cases
import model_cases
import numpy as np
import pytest
import torch
from expert_model_cases import HISTORIES, MASKED, PLACES, POLICIES, model_for, rows_of, state_of
from item_model_cases import BLOCKS
from torch import Tensor

import patchkern as pk
from patchkern.models.scratch import from_scratch


def test_the_masked_networks_are_those_of_the_other_tests() -> None:
    for block, masked in MASKED.items():
        model = model_for(POLICIES["one"], block)
        x = torch.randn(7, 8, dtype=torch.float64)
        layer = model.hf_model.layers[0]
        expected = BLOCKS[block](layer, x, model.config)
        torch.testing.assert_close(masked(layer, x, model.config, torch.ones(7, 7).tril().bool()), expected)


@pytest.mark.parametrize("block", MASKED)
@pytest.mark.parametrize("kind", POLICIES)
def test_spans_are_the_dense_mask(kind: str, block: str) -> None:
    policy = POLICIES[kind]
    model = model_for(policy, block)
    layout = pk.build_layout(model.catalog, PLACES, policy, model.prompt, head="items")
    assert layout.prefix is not None
    ours = model.item_states(layout)
    expected = torch.stack([state_of(model, rows_of(model, items, policy))[-1] for items in HISTORIES])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    parameters = [parameter for parameter in model.hf_model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad((ours * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for grad, other in zip(grads, theirs, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-12)
    experts = grads[0][list(model.prompt.experts)]
    assert experts.abs().sum(1).min() > 0, "they are learned"


@pytest.mark.parametrize("block", MASKED)
@pytest.mark.parametrize("kind", POLICIES)
def test_a_pass_is_its_samples(kind: str, block: str) -> None:
    """Each target as it is served, the others that share its rows beside it."""
    policy = POLICIES[kind]
    model = model_for(policy, block)
    ranges = np.array([(0, len(items) - 1) for items in PLACES])
    layout = pk.build_training_layout(model.catalog, PLACES, policy, model.prompt, ranges, head="items")
    targets = [(user, position) for user, items in enumerate(HISTORIES) for position in range(len(items))]
    samples = [PLACES[user][:position] for user, position in targets]
    wanted = [PLACES[user][position] for user, position in targets]
    apart = pk.build_layout(model.catalog, samples, policy, model.prompt, wanted, head="items")
    together = model.item_states(layout)
    torch.testing.assert_close(together[: len(targets)], model.item_states(apart), rtol=0, atol=1e-12)
    only = layout.item_rows[: len(targets)]
    one = pk.PatchLayout._trusted({**layout.__dict__, "item_rows": only, "item_labels": apart.item_labels})
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(model(one).loss, parameters),
        torch.autograd.grad(model(apart).loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert len(layout.item_rows) > len(targets) and torch.isfinite(model(layout).loss)


# ------------------------------------------------------------------ language models


TITLE_POLICIES: dict[str, pk.Experts] = {
    "text": pk.Experts(cases.TEXT, count=2, keep=2, block=3, boundaries=None),
    "patches and text": pk.Experts(cases.PATCH, recent=cases.TEXT, count=3, keep=2, block=4),
    "sessions": pk.Experts(cases.SESSIONS, count=2, keep=2, block=4, boundaries=None),
    "blocks": pk.Experts(cases.PATCH, count=2, block=4, parts="blocks"),
}


def dense_logits(hf_model: Any, rows: list[cases.Row], wanted: list[int]) -> Tensor:
    """By transformers alone, from the mask that the rule gives."""
    weight = hf_model.get_input_embeddings().weight
    titles = [torch.tensor(title) for title in model_cases.TITLES]

    def vector(content: tuple[Any, ...]) -> Tensor:
        if content[0] == "token":
            return weight[content[1]]
        return torch.stack([weight[titles[item]].mean(0) for item in content[1:]]).mean(0)

    mask = torch.zeros(1, 1, len(rows), len(rows), dtype=torch.bool)
    for row, (_, _, sees) in enumerate(rows):
        mask[0, 0, row, [*sees, row]] = True
    output = hf_model(
        inputs_embeds=torch.stack([vector(row.content) for row in rows])[None],
        position_ids=torch.tensor([[row.position for row in rows]]),
        attention_mask=mask,
        use_cache=False,
    )
    return output.logits[0, wanted]


@pytest.mark.parametrize("kind", TITLE_POLICIES)
def test_a_pass_of_titles_is_the_dense_mask_of_its_samples(kind: str) -> None:
    policy = TITLE_POLICIES[kind]
    ids = range(model_cases.VOCABULARY, model_cases.VOCABULARY + policy.count)
    prompt = model_cases.PROMPT.with_special(experts=ids)
    hf_model = model_cases.tiny("llama", vocab_size=90)
    histories, _ = model_cases.batch_of([11, 3])
    ranges = np.array([[0, 10], [1, 2]])
    layout = pk.build_training_layout(model_cases.CATALOG, histories, policy, prompt, ranges)
    assert layout.prefix is not None
    model = pk.PatchedCausalLM(hf_model, model_cases.CATALOG, prompt, policy)
    ours = model(layout).logits.detach()
    dense = {torch.float32: copy.deepcopy(hf_model), torch.float64: copy.deepcopy(hf_model).double()}
    for twin in dense.values():
        twin.set_attn_implementation("sdpa")
    found: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in dense}
    for user, (first, last) in enumerate(ranges):
        for position in range(first, last + 1):
            response = [*model_cases.TITLES[histories[user][position]], *prompt.response_end]
            ending = [*prompt.suffix, *response]
            rows = cases.rows_of(histories[user][:position], policy, model_cases.CATALOG, prompt, ending)
            wanted = list(range(len(rows) - len(response) - 1, len(rows) - 1))
            for dtype, twin in dense.items():
                with torch.no_grad():
                    found[dtype].append(dense_logits(twin, rows, wanted))
    exact = torch.cat(found[torch.float64])
    error = (torch.cat(found[torch.float32]).double() - exact).abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * error
    apart = model(pk.build_layout(model_cases.CATALOG, histories, policy, prompt)).logits.detach()
    assert apart.shape[0] == 2, "of every user's last row"
    for user, items in enumerate(histories):
        rows = cases.rows_of(items, policy, model_cases.CATALOG, prompt, list(prompt.suffix))
        with torch.no_grad():
            expected = dense_logits(dense[torch.float64], rows, [len(rows) - 1])[0]
        assert (apart[user].double() - expected).abs().max() <= 2 * error


def test_experts_beside_an_item_head_are_learned() -> None:
    policy = TITLE_POLICIES["patches and text"]
    prompt = model_cases.PROMPT.with_special(experts=[83, 84, 85])
    hf_model = model_cases.tiny("llama", vocab_size=90)
    model = pk.PatchedCausalLM(hf_model, model_cases.CATALOG, prompt, policy, item_head=True)
    histories, _ = model_cases.batch_of([11, 3])
    for head in ("items", "both"):
        model.zero_grad()
        layout = pk.build_training_layout(model_cases.CATALOG, histories, policy, prompt, [[0, 10], [0, 2]], head=head)
        model(layout).loss.backward()
        gradient = hf_model.get_input_embeddings().weight.grad
        assert gradient is not None and gradient[[83, 84, 85]].abs().sum(1).min() > 0
        assert gradient[86:].abs().sum() == 0


# ------------------------------------------------------------------ positions


def small_llama(positions: int) -> tuple[Any, pk.Catalog, pk.Prompt]:
    titles = {item: f"film {item}" for item in range(30)}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    hf_model, catalog, prompt = from_scratch(titles, separator=False, max_position_embeddings=positions, **sizes)
    return hf_model, catalog, prompt.with_special(experts=[200, 201])


@pytest.mark.parametrize("items", [False, True])
def test_what_to_do_where_positions_are_too_few(items: bool) -> None:
    """Positions go on behind experts, who take no ``max_items``: all that the error advises lets the user pass."""
    history = np.random.default_rng(0).integers(0, 30, 120).tolist()
    patches, sessions = pk.ItemPatches(0, None), pk.SessionPatches(5, None, align="start")

    def model_of(inner: Any, positions: int = 64) -> Any:
        policy = pk.Experts(inner, count=2, keep=5, block=10)
        if not items:
            return pk.PatchedCausalLM(*small_llama(positions), policy, item_head=True).eval()
        catalog, prompt = pk.Catalog.from_token_ids(range(30), range(31)), pk.Prompt(prefix=[30], experts=[31, 32])
        return pk.ItemModel(catalog, policy, width=8, max_positions=positions, prompt=prompt).eval()

    model = model_of(patches)
    advice = r"expected at most 64 rows per user.*Histories\.latest\), compress them more, or take a model with more"
    with pytest.raises(ValueError, match=advice):
        model.recommend([history], k=2, search="items")
    with pytest.raises(ValueError, match=advice):
        pk.UserStates(model).update([7], [history])
    with pytest.raises(ValueError, match=advice):
        ranges = np.array([[100, 119]])
        model(pk.build_training_layout(model.catalog, [history], model.policy, model.prompt, ranges, head="items"))
    with pytest.raises(ValueError, match="max_items=None, as the borders of a history that is cut off move"):
        model_of(pk.ItemPatches(0, 40))

    latest = pk.Histories.from_sequences([history]).latest(50, cut_every=20)
    assert latest.items.tolist() == history[60:]
    for able, given in ((model, latest), (model_of(sessions), [history]), (model_of(patches, 200), [history])):
        lists = able.recommend(given, k=2, search="items")
        states = pk.UserStates(able)
        states.update([7], given)
        kept = able.recommend(given, k=2, search="items", user_states=states, user_ids=[7])
        assert [item for item, _ in kept[0]] == [item for item, _ in lists[0]]
    states = pk.UserStates(model)
    made_anew = []
    for length in range(100, 121):
        grown = pk.Histories.from_sequences([history[:length]]).latest(50, cut_every=20)
        if states.update([7], grown).compressed:
            made_anew.append(length)
    assert made_anew == [100, 105, 110, 115], "at first, where a border moves, and where the cut does"
