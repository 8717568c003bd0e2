# SPDX-License-Identifier: Apache-2.0
"""Item embeddings against their definition: a patch is the mean of its titles plus the mean of its items' vectors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import memory_cases
import numpy as np
import oracle
import pytest
import search_oracle
import torch
from prompt_cases import LONG, compute, computed_rows
from safetensors.torch import save_file
from torch import Tensor, nn

import patchkern as pk
from patchkern.budget import search as memory
from patchkern.budget.search import SearchCost, SearchSize
from patchkern.search.scoring import score_items
from patchkern.search.trie import Trie
from patchkern.search.user_cache import UserCache
from patchkern.training import SETTINGS, PatchTrainer
from patchkern.training.collators import LayoutCollator, PassCollator
from recipes import train

LENGTHS = [0, 1, 23, 2, 40, 7]
TITLES = cases.make_titles(23)


class Numbered(list[int]):
    """A title that knows whose it is."""

    def __init__(self, title: oracle.Title, place: int) -> None:
        super().__init__(title)
        self.place = place


def make_batch(policy: Any, lengths: Sequence[int] = LENGTHS, with_targets: bool = True) -> cases.Batch:
    batch = cases.make_batch(policy, lengths, with_targets)
    batch.titles = {item: Numbered(title, place) for place, (item, title) in enumerate(batch.titles.items())}
    return batch


def make_model(
    titles: Any = None, family: str = "llama", prompt: pk.Prompt = search_oracle.PROMPT, seed: int | None = 0
) -> pk.PatchedCausalLM:
    """Float64, with random item embeddings; zeros where ``seed`` is None."""
    hf_model = copy.deepcopy(search_oracle.HF_MODELS[family])
    model = pk.PatchedCausalLM(hf_model, cases.make_catalog(titles or TITLES), prompt, item_embeddings=True)
    if seed is not None:
        randomise(model, seed)
    return model


def randomise(model: pk.PatchedCausalLM, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.item_embedding.normal_(generator=generator)


def without(model: pk.PatchedCausalLM) -> pk.PatchedCausalLM:
    """The same model, without item embeddings."""
    return pk.PatchedCausalLM(model.hf_model, model.catalog, model.prompt)


def with_vectors(model: pk.PatchedCausalLM) -> pk.PatchedCausalLM:
    """The same model with random item embeddings."""
    model = pk.PatchedCausalLM(model.hf_model, model.catalog, model.prompt, item_embeddings=True)
    randomise(model)
    return model


def by_definition(weight: Tensor, vectors: Tensor, rows: Sequence[oracle.Row]) -> Tensor:
    pooled = oracle.pool(weight, rows)
    for number, row in enumerate(rows):
        if isinstance(row[0], Numbered):
            pooled[number] += sum(vectors[title.place].double() for title in row) / len(row)
    return pooled


def loss_of(model: pk.PatchedCausalLM, layout: pk.PatchLayout) -> Tensor:
    """In float64, for GPT-2: losses of all models, and the norms of the others, are computed in float32."""
    return nn.functional.cross_entropy(model(layout).logits, layout.logit_labels)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------ rows and gradients


@pytest.mark.parametrize("policy", cases.POLICIES.values(), ids=cases.POLICIES.keys())
def test_rows_and_gradients_by_definition(policy: Any) -> None:
    batch, model = make_batch(policy), make_model()
    weight, vectors = model.get_input_embeddings().weight, model.item_embedding
    layout, rows = batch.layout(), batch.rows()
    got = model.embed(layout)
    torch.testing.assert_close(got, by_definition(weight, vectors.detach(), rows), rtol=0, atol=1e-12)
    literal = layout.lo < 0
    assert torch.equal(got[literal], without(model).embed(layout)[literal])
    grad_rows = torch.randn_like(got)
    expected = torch.zeros_like(vectors)
    for grad, row in zip(grad_rows, rows, strict=True):
        for title in row:
            if isinstance(title, Numbered):
                expected[title.place] += grad / len(row)
    of_weight, of_vectors = torch.autograd.grad(got, (weight, vectors), grad_rows, retain_graph=True)
    torch.testing.assert_close(of_vectors, expected, rtol=0, atol=1e-12)
    (of_weight_alone,) = torch.autograd.grad(without(model).embed(layout), weight, grad_rows)
    assert torch.equal(of_weight, of_weight_alone)
    planned = torch.autograd.grad(model.embed(layout.with_identities()), vectors, grad_rows)
    assert torch.equal(planned[0], of_vectors)


def test_gradient_by_differences() -> None:
    model = make_model(family="gpt2")
    layout = make_batch(cases.POLICIES["sessions-end"], [9, 14]).layout()
    (of_vectors,) = torch.autograd.grad(loss_of(model, layout), model.item_embedding)
    direction, step = torch.randn_like(model.item_embedding), 1e-5
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            model.item_embedding.add_(sign * step * direction)
            losses.append(loss_of(model, layout))
            model.item_embedding.sub_(sign * step * direction)
    torch.testing.assert_close((of_vectors * direction).sum(), (losses[0] - losses[1]) / (2 * step), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", ["text", "items", "sessions-end"])
def test_zeros_change_no_bit(policy: str, dtype: torch.dtype) -> None:
    model = make_model(seed=None).to(dtype)
    assert not model.item_embedding.any() and model.item_embedding.dtype == dtype
    layout = make_batch(cases.POLICIES[policy]).layout()
    plain = without(model)
    (ours, theirs), grads = (m(layout) for m in (model, plain)), []
    assert torch.equal(ours.logits, theirs.logits)
    for m, output in ((model, ours), (plain, theirs)):
        grads.append({name: grad.clone() for name, grad in gradients(m, output.loss).items() if "item" not in name})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])
    assert bool(model.item_embedding.grad.any()) == (policy != "text")


@pytest.mark.parametrize("histories", [[], [[]], [[0, 3]]], ids=["no users", "no items", "text"])
def test_batches_without_patches_have_a_zero_gradient(histories: list[list[int]]) -> None:
    """Not none: data parallel training waits for a gradient of every parameter."""
    model = make_model()
    layout = pk.build_layout(model.catalog, histories, pk.TextOnly(), model.prompt, [1] * len(histories))
    model(layout).loss.backward()
    assert model.item_embedding.grad is not None and not model.item_embedding.grad.any()


def test_frozen_vectors_are_still_added() -> None:
    model = make_model()
    layout = make_batch(cases.POLICIES["items"]).layout()
    expected = model.embed(layout).detach()
    model.item_embedding.requires_grad_(False)
    got = model.embed(layout)
    assert torch.equal(got, expected) and got.requires_grad


@pytest.mark.parametrize(
    "policy",
    [pk.ItemPatches(3, None), pk.SessionPatches(3, None), pk.SessionPatches(3, None, align="start"), pk.TextOnly(None)],
    ids=str,
)
def test_trunks_and_branches_equal_samples(policy: Any) -> None:
    batch, model = make_batch(policy, [1, 2, 20, 0, 13], with_targets=False), make_model(family="gpt2")
    catalog, histories, _, prompt, _ = batch.arguments()
    ranges = [[0, 0], [1, 1], [2, 19], [0, -1], [3, 11]]
    samples = [(h, p) for h, (first, last) in zip(histories, ranges, strict=True) for p in range(first, last + 1)]
    single = pk.build_layout(catalog, [h[:p] for h, p in samples], policy, prompt, [h[p] for h, p in samples])
    together = pk.build_training_layout(catalog, histories, policy, prompt, ranges)
    losses = [loss_of(model, layout) for layout in (single, together)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    expected = {name: grad.clone() for name, grad in gradients(model, losses[0]).items()}
    for name, grad in gradients(model, losses[1]).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_random_patches_of_joined_layouts() -> None:
    """Patch pre-training: text and patches in one batch, where the same item is among the titles of several parts."""
    model = make_model()
    batches = [make_batch(policy) for policy in (pk.TextOnly(None), pk.RandomItemPatches(0.6, 20, seed=1))]
    layout = pk.join_layouts([batch.layout(transpose=False) for batch in [*batches, batches[1]]]).with_transpose()
    assert len(set(layout.title_index.tolist())) < layout.title_index.numel()
    rows = batches[0].rows() + 2 * batches[1].rows()
    got = model.embed(layout)
    expected = by_definition(model.get_input_embeddings().weight, model.item_embedding.detach(), rows)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    grad_rows = torch.randn_like(got)
    parts = [torch.zeros_like(model.item_embedding) for _ in range(2)]
    parts[0] = torch.autograd.grad(got, model.item_embedding, grad_rows)[0]
    for grad, row in zip(grad_rows, rows, strict=True):
        for title in row:
            if isinstance(title, Numbered):
                parts[1][title.place] += grad / len(row)
    torch.testing.assert_close(*parts, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_and_called_embeddings(dtype: torch.dtype) -> None:
    """The vectors are added to what comes out of the embedding, whatever it does."""
    model = make_model(seed=1).to(dtype)
    layout = make_batch(cases.POLICIES["sessions-end"]).layout()
    plain = without(model)
    with torch.no_grad():
        added = (model.embed(layout).float() - plain.embed(layout).float()).clone()
        handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 2)
        hooked = model.embed(layout).float() - plain.embed(layout).float()
        handle.remove()
    patch = layout.lo >= 0
    assert not added[~patch].any() and added[patch].abs().min(dim=1).values.max() > 0
    torch.testing.assert_close(hooked, added, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_items_of_one_title_differ() -> None:
    assert TITLES[0] == TITLES[3]
    model = make_model()
    layout = pk.build_layout(model.catalog, [[0, 5], [3, 5]], pk.ItemPatches(1), model.prompt)
    ours, theirs = model(layout).logits, without(model)(layout).logits
    assert torch.equal(theirs[0], theirs[1]) and (ours[0] - ours[1]).abs().max() > 1e-3
    exchanged = cases.make_catalog({{0: 3, 3: 0}.get(item, item): title for item, title in TITLES.items()})
    assert exchanged.token_fingerprint == model.catalog.token_fingerprint  # and 0 and 3 have each other's vectors
    with pytest.raises(ValueError, match="layout: expected one of the model's catalog"):
        model(pk.build_layout(exchanged, [[0, 5]], pk.ItemPatches(1), model.prompt))


@pytest.mark.unpoisoned("the compiler cannot look into the stand-ins for torch.empty")
def test_compiles_whole() -> None:
    made, layout = make_model(), make_batch(cases.POLICIES["sessions-end"]).layout().with_identities()
    # as where layouts come from other processes: nothing has asked this catalogue for its fingerprint
    model = make_model(cases.make_titles(23))
    compiled = torch.compile(model.embed, fullgraph=True, backend="aot_eager")
    got, expected = compiled(layout), made.embed(layout)
    assert torch.equal(got, expected)
    grad_rows = torch.randn_like(got)
    grads = [torch.autograd.grad(x, m.item_embedding, grad_rows) for x, m in ((got, model), (expected, made))]
    assert torch.equal(grads[0][0], grads[1][0])


# ------------------------------------------------------------------ layouts


def test_identities_go_where_the_layout_goes() -> None:
    layout = make_batch(cases.POLICIES["sessions-end"]).layout()
    planned = layout.with_identities()
    assert planned.with_identities() is planned and layout.identities is None
    assert planned.identities.layout.transpose is not None
    moved = planned.to("meta").identities
    assert moved.rows.device.type == moved.layout.lo.device.type == moved.layout.transpose.rows.device.type == "meta"
    copied = pickle.loads(pickle.dumps(planned)).identities
    assert torch.equal(copied.rows, planned.identities.rows)
    assert isinstance(pk.PatchLayout(**vars(planned)).identities.layout, pk.PatchLayout)
    checked = pk.PatchLayout(**vars(planned.identities.layout))
    assert checked.num_rows == (layout.lo >= 0).sum() == planned.identities.rows.numel()


def test_a_transpose_planned_later_serves_the_identities_too() -> None:
    layout = make_batch(cases.POLICIES["sessions-end"]).layout(transpose=False).with_identities()
    assert layout.identities.layout.transpose is None
    assert layout.with_transpose().identities.layout.transpose is not None


def test_wrong_layouts() -> None:
    model = make_model()
    layout = make_batch(cases.POLICIES["sessions-end"]).layout()
    with pytest.raises(ValueError, match=r"expected one on the CPU to find its patches, got meta; .*with_identities"):
        layout.to("meta").with_identities()
    for catalog in (cases.make_catalog(cases.make_titles(23, seed=5)), None):
        fingerprint = None if catalog is None else catalog.fingerprint
        with pytest.raises(ValueError, match="layout: expected one of the model's catalog"):
            model(dataclasses.replace(layout, catalog_fingerprint=fingerprint))
    planned = layout.with_identities().identities
    rows, n = planned.rows, planned.rows.numel()
    for wrong, error, message in (
        (rows, TypeError, "identities: expected an Identities, got Tensor"),
        (dataclasses.replace(planned, layout=rows), TypeError, "identities.layout: expected a PatchLayout, got Tensor"),
        (dataclasses.replace(planned, rows=rows.int()), TypeError, "identities.rows: expected dtype torch.int64"),
        (dataclasses.replace(planned, rows=rows[1:]), ValueError, rf"identities.rows: expected {n} entries"),
        (
            dataclasses.replace(planned, rows=rows + layout.num_rows),
            ValueError,
            r"identities.rows\[0\]: expected",
        ),
        (dataclasses.replace(planned, rows=rows.flip(0)), ValueError, "identities.rows: expected ascending rows"),
        (
            dataclasses.replace(planned, layout=planned.layout.to("meta")),
            ValueError,
            "identities.layout: expected device cpu, got meta",
        ),
    ):
        with pytest.raises(error, match=message):
            dataclasses.replace(layout, identities=wrong)


def test_hashes_tell_items_of_one_title_apart() -> None:
    catalog = cases.make_catalog(TITLES)
    rows = [
        pk.build_layout(catalog, [history], pk.ItemPatches(1), search_oracle.PROMPT) for history in ([0, 5], [3, 5])
    ]
    plain, by_item = ([pk.row_hashes(x, by_item=flag) for x in rows] for flag in (False, True))
    assert np.array_equal(*plain)
    patch = (rows[0].lo >= 0).numpy()
    assert (by_item[0] != by_item[1]).tolist() == patch.tolist() and patch.sum() == 1
    # the batch around an item changes nothing
    together = pk.build_layout(catalog, [[7, 8, 0, 5], [3, 5]], pk.ItemPatches(1), search_oracle.PROMPT)
    assert np.array_equal(pk.row_hashes(together, by_item=True)[together.cu_seqlens[1] :], by_item[1])


# ------------------------------------------------------------------ recommending


def forced(model: pk.PatchedCausalLM, family: str, histories: Any, policy: Any) -> list[dict[Any, float]]:
    """Per user the log-probability of every item, from prompts made by definition in plain transformers."""
    plain = search_oracle.PLAIN[family]
    weight = plain.get_input_embeddings().weight.detach()
    titles = {item: Numbered(title, place) for place, (item, title) in enumerate(TITLES.items())}
    prompt = model.prompt
    parts = oracle.Parts(*(list(x) for x in (prompt.prefix, prompt.separator, prompt.suffix, prompt.response_end)))
    sequences = [[*title, *prompt.response_end] for title in titles.values()]
    tables = []
    for history in histories:
        entries = cases.oracle_entries(policy, len(history))
        user = oracle.user_rows([titles[item] for item in history], entries, parts)
        rows = by_definition(weight, model.item_embedding.detach(), user.rows)
        scores = search_oracle.sequence_scores(plain, rows, sequences)
        tables.append(dict(zip(titles, scores, strict=True)))
    return tables


HISTORIES = [*cases.make_histories(TITLES, [9, 1, 30, 0]), [4, 4, 4, 0, 3, 0, 3, 4, 4, 9, 9, 9, 9]]


@pytest.mark.parametrize("family", search_oracle.HF_MODELS)
@pytest.mark.parametrize("search", ["beam", "exact"])
def test_recommendations_are_those_of_forced_decoding(family: str, search: str) -> None:
    model = make_model(family=family)
    policy = pk.SessionPatches(3, None)
    tables = forced(model, family, HISTORIES, policy)
    got = model.recommend(HISTORIES, policy, k=8, num_beams=len(TITLES), search=search)
    for ranked, table in zip(got, tables, strict=True):
        search_oracle.assert_ranked(ranked, table, TITLES, 8)
    scores = score_items(model, HISTORIES, policy)
    np.testing.assert_allclose(scores, [list(table.values()) for table in tables], rtol=0, atol=1e-9)
    plain = score_items(without(model), HISTORIES, policy)
    assert np.abs(scores - plain)[[0, 2, 4]].max(axis=1).min() > 1e-3  # users with patches
    assert np.array_equal(scores[[1, 3]], plain[[1, 3]])  # without


@pytest.mark.parametrize("policy", ["items", "sessions-start"])
def test_prompts_in_chunks_and_from_a_cache(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that cut users anywhere, growing histories, and items that differ in nothing but their vectors."""
    model = make_model(prompt=LONG)
    cache = UserCache(model, 1 << 20)
    first = [history[: len(history) - 4] for history in HISTORIES]
    swapped = [[{0: 3, 3: 0}.get(item, item) for item in history] for history in HISTORIES]
    for histories in (first, HISTORIES, swapped, HISTORIES):
        whole, _ = compute(model, histories, cases.POLICIES[policy])
        for options in ({"chunk_rows": 5}, {"user_cache": cache}):
            got, _ = compute(model, histories, cases.POLICIES[policy], **options)
            torch.testing.assert_close(got.logits, whole.logits, rtol=0, atol=1e-10)
    rows = computed_rows(monkeypatch)
    compute(model, HISTORIES, cases.POLICIES[policy], user_cache=cache)
    assert sum(rows) == len(HISTORIES)
    randomise(model, seed=1)
    rows.clear()
    got, layout = compute(model, HISTORIES, cases.POLICIES[policy], user_cache=cache)
    assert sum(rows) > layout.num_rows / 2, "other vectors, other prompts"
    with model.searching():
        torch.testing.assert_close(got.logits, model(layout).logits, rtol=0, atol=1e-10)


def test_memory_counts_the_vectors() -> None:
    model = make_model()
    size = SearchSize(20, 100)
    more = SearchCost(model, size).weights - SearchCost(without(model), size).weights
    assert more == model.item_embedding.nbytes == len(TITLES) * 32 * 8


@pytest.mark.parametrize("policy", ["items-all", "sessions-end"])
@pytest.mark.parametrize("chunk", [512, 4096])
def test_memory_is_predicted(chunk: int, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_vectors(memory_cases.make_model())
    histories = memory_cases.users(300, 10, 900, 300)
    monkeypatch.setattr(memory, "CHUNKS", (chunk,))
    found = memory_cases.measured(model, histories, cases.POLICIES[policy], 5)
    counts = pk.row_counts(model.catalog, histories, cases.POLICIES[policy], model.prompt)
    trie = Trie.from_catalog(model.catalog, model.prompt.response_end)
    size = SearchSize(5, trie.live_rows(5), 0, trie.num_bytes)
    assert found <= SearchCost(model, size).plan(counts, 1 << 30, 64).peak <= 1.1 * found


# ------------------------------------------------------------------ files


def test_saved_vectors_load_bit_for_bit(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "m")
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", model.catalog)
    assert torch.equal(loaded.item_embedding, model.item_embedding)
    layout = make_batch(cases.POLICIES["sessions-end"]).layout()
    assert torch.equal(loaded(layout).logits, model(layout).logits)
    half = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", model.catalog, dtype=torch.bfloat16)
    assert torch.equal(half.item_embedding, model.item_embedding.bfloat16())
    without(model).save_pretrained(tmp_path / "m")
    assert pk.PatchedCausalLM.from_pretrained(tmp_path / "m", model.catalog).item_embedding is None
    assert not list((tmp_path / "m").glob("item*"))
    added = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", model.catalog, item_embeddings=True)
    assert added.item_embedding.shape == model.item_embedding.shape and not added.item_embedding.any()


def test_state_dicts_hold_the_vectors(tmp_path: Path) -> None:
    model, other = make_model(), make_model(seed=None)
    state = model.state_dict()
    assert "item_embedding" in state
    other.load_state_dict(state)
    assert torch.equal(other.item_embedding, model.item_embedding)
    other.save_pretrained(tmp_path / "m", state_dict={name: value.clone() for name, value in state.items()})
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", model.catalog)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("ids", ["int", "gaps", "str"])
def test_vectors_follow_their_items_to_another_catalogue(ids: str, tmp_path: Path) -> None:
    titles = cases.make_titles(23, ids=ids)
    model = make_model(titles)
    model.save_pretrained(tmp_path / "m")
    names = list(titles)
    new = {"int": 1000, "gaps": 10**9, "str": "new"}[ids]
    other = {name: titles[name] for name in [names[7], *names[20:], *names[:5]]} | {new: [4, 2]}
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", cases.make_catalog(other))
    places = [7, 20, 21, 22, 0, 1, 2, 3, 4]
    assert torch.equal(loaded.item_embedding[:-1], model.item_embedding[places])
    assert not loaded.item_embedding[-1].any()
    strangers = {("x" if ids == "str" else -5): [1]}
    with pytest.raises(ValueError, match=r"catalog: expected items that .* knows, such as .*, got none"):
        pk.PatchedCausalLM.from_pretrained(tmp_path / "m", cases.make_catalog(strangers))


def test_adapters_keep_their_vectors(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    base = copy.deepcopy(search_oracle.HF_MODELS["llama"])
    adapted = peft.get_peft_model(copy.deepcopy(base), config).double()
    model = pk.PatchedCausalLM(adapted, cases.make_catalog(TITLES), search_oracle.PROMPT, item_embeddings=True)
    randomise(model)
    model.save_pretrained(tmp_path / "m")
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", model.catalog, base_model=base)
    layout = make_batch(cases.POLICIES["sessions-end"]).layout()
    assert torch.equal(loaded.item_embedding, model.item_embedding)
    torch.testing.assert_close(loaded.double().eval()(layout).logits, model.eval()(layout).logits, rtol=0, atol=1e-6)
    model(layout).loss.backward()
    assert model.item_embedding.grad.any()


def test_wrong_arguments(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(TypeError, match="item_embeddings: expected a bool, got int"):
        pk.PatchedCausalLM(model.hf_model, model.catalog, model.prompt, item_embeddings=1)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="item_embeddings: expected a model that was made with item_embeddings=True"):
        without(model).load_item_embeddings(tmp_path / "m")
    model.item_embedding = nn.Parameter(torch.zeros(23, 16))
    with pytest.raises(ValueError, match="folder: expected item embeddings of width 16, got 32"):
        model.load_item_embeddings(tmp_path / "m")
    (tmp_path / "m" / "item_embeddings.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"folder: expected item_embeddings\.safetensors in"):
        pk.PatchedCausalLM.from_pretrained(tmp_path / "m", model.catalog)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (None, None),
        ({"other": torch.zeros(23, 32)}, {"item_ids": "[]"}),
        ({"item_embedding": torch.zeros(23, 32)}, None),
        ({"item_embedding": torch.zeros(23, 32)}, {"item_ids": "no list"}),
        ({"item_embedding": torch.zeros(23, 32)}, {"item_ids": "[1, 2]"}),
        ({"item_embedding": torch.zeros(2)}, {"item_ids": "[1, 2]"}),
    ],
    ids=["no safetensors", "no tensor", "no ids", "no json", "too few ids", "one dimension"],
)
def test_malformed_item_embeddings_name_their_file(tensors: Any, metadata: Any, tmp_path: Path) -> None:
    model = make_model()
    path = tmp_path / "item_embeddings.safetensors"
    if tensors is None:
        path.write_bytes(b"torn")
    else:
        save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"item_embeddings\.safetensors: not item embeddings that this version reads"):
        model.load_item_embeddings(tmp_path)


# ------------------------------------------------------------------ training


def make_trainer(folder: Path, stage: str, rows_per_pass: int | None, **arguments: Any) -> PatchTrainer:
    rng = np.random.default_rng(0)
    histories = pk.Histories.from_sequences([rng.integers(0, 23, 8 + user).tolist() for user in range(8)])
    positions = [np.arange(3, length) for length in histories.lengths]
    samples = np.repeat(np.arange(8), histories.lengths - 3), np.concatenate(positions)
    model = make_model(seed=None)
    model.float()
    settings = SETTINGS["scratch"]
    defaults = {"per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    return PatchTrainer(
        model,
        settings.arguments(stage, folder, **defaults, dataloader_pin_memory=False, save_steps=2, **arguments),
        histories,
        samples,
        settings.policy(stage, max_items=20),
        pretrain=stage == "pretrain",
        rows_per_pass=rows_per_pass,
    )


@pytest.mark.parametrize("rows_per_pass", [None, 400])
@pytest.mark.parametrize("stage", ["pretrain", "items"])
def test_training_learns_them_and_resumes(stage: str, rows_per_pass: int | None, tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, stage, rows_per_pass, max_steps=4)
    batch = whole.data_collator([whole.train_dataset[3]])["layout"]
    assert isinstance(whole.data_collator, LayoutCollator if rows_per_pass is None else PassCollator)
    assert batch.identities is not None and batch.identities.layout.transpose is not None
    whole.train()
    assert whole.model.item_embedding.any()
    resumed = make_trainer(tmp_path, stage, rows_per_pass, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_recipe_hands_them_on(tmp_path: Path) -> None:
    flags = ["--data", "synthetic", "--use_cpu", "--disable_tqdm", "True", "--max_items", "12", "--max_steps", "3"]
    flags += ["--rows_per_pass", "400"]
    first = [*flags, "--model", "tiny", "--vocab_size", "300", "--item_embeddings"]
    trained = train.main(["--stage", "items", "--output_dir", str(tmp_path / "items"), *first]).model
    assert trained.item_embedding.any()
    second = [*flags, "--from", str(tmp_path / "items"), "--learning_rate", "0"]
    kept = train.main(["--stage", "sessions", "--output_dir", str(tmp_path / "sessions"), *second]).model
    assert torch.equal(kept.item_embedding, trained.item_embedding)
