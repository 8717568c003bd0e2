# SPDX-License-Identifier: Apache-2.0
"""`compress_batch` and `PackedBatch`: the whole of compression, and what a transformers model makes of it."""

from __future__ import annotations

from typing import Any

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings

import patchkern as pk


def compress(batch: cases.Batch, weight: torch.Tensor, **options: Any) -> pk.PackedBatch:
    return pk.compress_batch(weight, *batch.arguments(), **options)


@settings(max_examples=50)
@given(batch=cases.batches(longest_history=40))
def test_compress_batch_is_the_oracle(batch: cases.Batch) -> None:
    weight = cases.make_weight(cases.VOCABULARY, 8)
    packed = compress(batch, weight)
    users = batch.users()
    lengths = [len(user.rows) for user in users]
    oracle.assert_pooled(packed.inputs_embeds, weight, batch.rows())
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [sum(lengths[:user]) for user in range(len(users) + 1)]
    assert packed.max_seqlen == max(lengths, default=0)
    assert packed.position_ids.dtype == torch.int64
    assert packed.position_ids.tolist() == [position for length in lengths for position in range(length)]
    if batch.targets is None:
        assert packed.labels is None
    else:
        assert packed.labels is not None and packed.labels.dtype == torch.int64
        assert packed.labels.tolist() == [label for user in users for label in user.labels]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("with_targets", [False, True], ids=["no-targets", "targets"])
def test_the_weight_decides_dtype_and_gradient(backend: str, dtype: torch.dtype, with_targets: bool) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1], with_targets)
    weight = cases.make_weight(cases.VOCABULARY, 16, dtype)
    frozen = compress(batch, weight, backend=backend).inputs_embeds
    assert frozen.dtype == dtype and not frozen.requires_grad
    leaf = weight.clone().requires_grad_()
    trained = compress(batch, leaf, backend=backend).inputs_embeds
    assert torch.equal(trained, frozen)
    trained.backward(torch.ones_like(trained))
    assert leaf.grad is not None
    truncates = cases.truncates(backend, dtype)
    oracle.assert_gradient(leaf.grad, torch.ones_like(frozen), batch.rows(), cases.VOCABULARY, truncates=truncates)


def test_out(backend: str) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1])
    weight = cases.make_weight(cases.VOCABULARY, 16)
    expected = compress(batch, weight, backend=backend).inputs_embeds
    out = torch.full((expected.shape[0], 40), 777.0)[:, 3:19]
    packed = compress(batch, weight, backend=backend, out=out)
    assert packed.inputs_embeds is out and torch.equal(out, expected)


def test_two_lines_say_what_it_is() -> None:
    layout = cases.make_batch(pk.ItemPatches(2), [0, 20, 5]).layout().to("meta")
    rows = torch.empty(layout.num_rows, 64, dtype=torch.bfloat16, device="meta")
    assert repr(pk.PackedBatch(rows, layout)) == f"PackedBatch(({layout.num_rows}, 64) bfloat16 of\n  {layout!r})"


def test_a_module_parameter_is_a_weight() -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1])
    embedding = torch.nn.Embedding(cases.VOCABULARY, 16)
    packed = compress(batch, embedding.weight)
    packed.inputs_embeds.sum().backward()
    assert embedding.weight.grad is not None and embedding.weight.grad.shape == (cases.VOCABULARY, 16)


# ------------------------------------------------------------------ model_kwargs


def test_model_kwargs_without_targets() -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1], with_targets=False)
    packed = compress(batch, cases.make_weight(cases.VOCABULARY, 16))
    kwargs = packed.model_kwargs()
    assert set(kwargs) == {
        *("inputs_embeds", "position_ids", "use_cache"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
    rows = packed.inputs_embeds.shape[0]
    assert kwargs["inputs_embeds"].shape == (1, rows, 16) and torch.equal(
        kwargs["inputs_embeds"][0], packed.inputs_embeds
    )
    assert kwargs["position_ids"].shape == (1, rows) and torch.equal(kwargs["position_ids"][0], packed.position_ids)
    assert torch.equal(kwargs["cu_seq_lens_q"], packed.cu_seqlens) and torch.equal(
        kwargs["cu_seq_lens_k"], packed.cu_seqlens
    )
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == packed.max_seqlen
    assert kwargs["use_cache"] is False


def test_model_kwargs_with_targets() -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1])
    packed = compress(batch, cases.make_weight(cases.VOCABULARY, 16))
    kwargs = packed.model_kwargs()
    labels = [label for user in batch.users() for label in user.labels]
    supervised = [row for row, label in enumerate(labels) if label != oracle.IGNORE]
    assert kwargs["logits_to_keep"].tolist() == [row - 1 for row in supervised]
    assert kwargs["shift_labels"].tolist() == [[labels[row] for row in supervised]]
    assert kwargs["labels"] is not None and "attention_mask" not in kwargs


def small_llama(attention: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="runs a transformers model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=cases.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_transformers_model_takes_it(attention: str) -> None:
    """Loss, gradient and logits equal one forward pass per user, with the full logits and an ordinary shift."""
    model = small_llama(attention)
    weight = model.get_input_embeddings().weight
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1, 40])
    loss = model(**compress(batch, weight).model_kwargs()).loss
    loss.backward()
    got = weight.grad.clone()
    model.zero_grad()

    losses = []
    for user in batch.users():
        embeds = oracle.torch_path(weight, user.rows)[None]
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
        labels = torch.tensor(user.labels)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="none"))
    every = torch.cat(losses)
    expected = every.sum() / every.ne(0).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_users_never_see_each_other(attention: str) -> None:
    """Changing one user leaves the logits of the others as they were, bit for bit."""
    model = small_llama(attention)
    weight = model.get_input_embeddings().weight.detach()
    one = cases.make_batch(pk.ItemPatches(2), [9, 12, 5], with_targets=False)
    changed = [one.histories[1][0] ^ 1, *one.histories[1][1:]]
    other = cases.Batch(one.titles, [one.histories[0], changed, one.histories[2]], one.policy)
    logits = []
    for batch in (one, other):
        packed = compress(batch, weight)
        with torch.no_grad():
            logits.append(model(**packed.model_kwargs()).logits[0])
    _, second, third, _ = packed.cu_seqlens.tolist()
    before, after = logits
    assert torch.equal(before[:second], after[:second])
    assert not torch.equal(before[second:third], after[second:third])
    assert torch.equal(before[third:], after[third:])
