# SPDX-License-Identifier: Apache-2.0
"""`PatchedCausalLM` against a padded, masked batch built row by row in Python, through the same transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import numpy as np
import oracle
import peft
import pytest
import torch
import transformers
from model_cases import ADAPTERS, CATALOG, MODELS, PARTS, POLICIES, PROMPT, TITLES, VOCABULARY, batch_of, lora, tiny
from torch import Tensor, nn

import patchkern as pk
from patchkern.models.attention import NAME
from patchkern.models.patched_lm import PatchedCausalLM

COMPOSITIONS = {
    "one user": [17],
    "one empty history": [0],
    "very different lengths": [25, 0, 1, 9, 3],
    "equal lengths": [10, 10, 10],
    "many users": [4, 11, 2, 7, 19, 1, 6, 13],
}


# ------------------------------------------------------------------ the padded, masked, loop-built batch


def entries_of(policy: pk.Policy, histories: list[list[int]]) -> list[list[oracle.Entry]]:
    """What each user's (already cut) items become."""
    is_random = isinstance(policy, pk.RandomItemPatches)
    drawn = policy.levels(pk.Histories.from_sequences(histories)).astype(bool) if is_random else ()
    left = iter(drawn)
    return [cases.oracle_entries(policy, len(history), left) for history in histories]


def loop_built(
    hf_model: nn.Module, histories: list[list[int]], policy: pk.Policy, targets: list[int] | None
) -> tuple[Tensor | None, Tensor]:
    """Loss, and logits at the supervised (else the last) rows: right padding, a 2-D mask, full logits."""
    histories = [oracle.cut(history, policy.max_items) for history in histories]
    users = []
    for position, (history, entries) in enumerate(zip(histories, entries_of(policy, histories), strict=True)):
        target = None if targets is None else TITLES[targets[position]]
        users.append(oracle.user_rows([TITLES[item] for item in history], entries, PARTS, target))
    embedding = hf_model.get_input_embeddings()

    def embed(row: oracle.Row) -> Tensor:
        return torch.stack([embedding(torch.tensor(title)).mean(0) for title in row]).mean(0)

    longest = max(len(user.rows) for user in users)
    width = hf_model.config.hidden_size
    inputs, mask, labels = [], torch.zeros(len(users), longest, dtype=torch.long), []
    for number, user in enumerate(users):
        padding = longest - len(user.rows)
        inputs.append(torch.cat([torch.stack([embed(row) for row in user.rows]), torch.zeros(padding, width)]))
        labels.append(user.labels + [oracle.IGNORE] * padding)
        mask[number, : len(user.rows)] = 1
    supervised = torch.tensor(labels)
    before = hf_model.config._attn_implementation
    hf_model.set_attn_implementation("sdpa")
    arguments = {"labels": supervised} if targets is not None else {}
    output = hf_model(inputs_embeds=torch.stack(inputs), attention_mask=mask, use_cache=False, **arguments)
    hf_model.set_attn_implementation(before)
    if targets is None:
        return None, torch.stack([output.logits[i, len(user.rows) - 1] for i, user in enumerate(users)])
    return output.loss, output.logits[:, :-1][supervised[:, 1:] != oracle.IGNORE]


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to 1e-5 of the largest value."""
    assert got.shape == expected.shape
    error, scale = (float(x.detach().abs().max()) for x in (got - expected, expected))
    assert error <= 1e-5 * scale, f"{what}: error {error:.2e}, largest value {scale:.2e}"


def assert_equals_loop(
    hf_model: nn.Module, policy: pk.Policy, lengths: list[int], model: nn.Module | None = None
) -> None:
    histories, targets = batch_of(lengths)
    model = model or PatchedCausalLM(hf_model, CATALOG, PROMPT)
    output = model(pk.build_layout(CATALOG, histories, policy, PROMPT, targets))
    expected_loss, expected_logits = loop_built(hf_model, histories, policy, targets)
    assert_same(output.logits, expected_logits, "logits")
    assert_same(output.loss, expected_loss, "loss")
    got, expected = gradients(hf_model, output.loss), gradients(hf_model, expected_loss)
    assert got.keys() == expected.keys()
    assert got
    for name in expected:
        assert_same(got[name], expected[name], name)


@pytest.mark.parametrize("lengths", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_loss_and_gradients_equal_a_loop_built_batch(policy: pk.Policy, lengths: list[int]) -> None:
    assert_equals_loop(tiny("llama"), policy, lengths)


@pytest.mark.parametrize("policy", ["text", "sessions, end"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_model(kind: str, policy: str) -> None:
    assert_equals_loop(tiny(kind), POLICIES[policy], COMPOSITIONS["very different lengths"])


@pytest.mark.parametrize("kind", ["llama", "gpt2 tied"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_implementations(kind: str, implementation: str) -> None:
    hf_model = tiny(kind)
    model = PatchedCausalLM(hf_model, CATALOG, PROMPT, attn_implementation=implementation)
    assert hf_model.config._attn_implementation == implementation
    assert_equals_loop(hf_model, POLICIES["items"], COMPOSITIONS["very different lengths"], model)


@pytest.mark.parametrize("kind", ["llama", "gpt2 tied"])
def test_gradient_checkpointing(kind: str) -> None:
    hf_model = tiny(kind)
    model = PatchedCausalLM(hf_model, CATALOG, PROMPT)
    model.gradient_checkpointing_enable()
    assert _checkpoints(hf_model)
    assert_equals_loop(hf_model, POLICIES["sessions, end"], COMPOSITIONS["many users"], model)
    model.gradient_checkpointing_disable()
    assert not _checkpoints(hf_model)


def _checkpoints(hf_model: transformers.PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in hf_model.modules())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_without_targets_logits_of_last_rows(policy: pk.Policy) -> None:
    hf_model = tiny("llama").eval()
    histories, _ = batch_of(COMPOSITIONS["very different lengths"])
    output = PatchedCausalLM(hf_model, CATALOG, PROMPT)(pk.build_layout(CATALOG, histories, policy, PROMPT))
    assert output.loss is None
    assert_same(output.logits, loop_built(hf_model, histories, policy, None)[1])


def test_num_items_in_batch_divides_the_summed_loss() -> None:
    model = PatchedCausalLM(tiny("llama"), CATALOG, PROMPT)
    layout = pk.build_layout(CATALOG, *reversed_targets(batch_of([5, 9])))
    tokens = layout.logit_labels.numel()
    mean = model(layout).loss
    for items in (40, torch.tensor(40)):
        torch.testing.assert_close(model(layout, num_items_in_batch=items).loss, mean * tokens / 40)


def reversed_targets(batch: tuple[list[list[int]], list[int]]) -> tuple[Any, ...]:
    """Positional arguments of `build_layout` after the catalog."""
    histories, targets = batch
    return histories, pk.ItemPatches(2), PROMPT, targets


@pytest.mark.parametrize("with_targets", [False, True], ids=["without targets", "with targets"])
def test_empty_batch(with_targets: bool) -> None:
    model = PatchedCausalLM(tiny("llama"), CATALOG, PROMPT)
    output = model(pk.build_layout(CATALOG, [], pk.TextOnly(), PROMPT, [] if with_targets else None))
    assert output.logits.shape == (0, VOCABULARY)
    assert (output.loss is not None) == with_targets
    if with_targets:
        assert output.loss == 0
        output.loss.backward()


# ------------------------------------------------------------------ isolation, bit for bit


@pytest.mark.parametrize("implementation", [NAME, "sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2 tied", "gemma3"])
@pytest.mark.parametrize("changed", [0, 2, 4], ids=lambda i: f"user {i} changed")
def test_users_are_isolated_bit_for_bit(kind: str, implementation: str, changed: int) -> None:
    assert_isolated(kind, implementation, changed)


@pytest.mark.slow  # compiles
def test_users_are_isolated_bit_for_bit_under_flex_attention() -> None:
    for changed in (0, 2, 4):
        assert_isolated("llama", "flex_attention", changed)


@torch.no_grad()
def assert_isolated(kind: str, implementation: str, changed: int) -> None:
    model = PatchedCausalLM(tiny(kind).eval(), CATALOG, PROMPT, attn_implementation=implementation)
    histories, targets = batch_of([25, 2, 13, 9, 3])
    other = [list(history) for history in histories]
    # items 5 apart have titles of one length: every row stays where it is
    other[changed] = [(item + 5) % len(TITLES) for item in histories[changed]]
    other_targets = [t if user != changed else (t + 5) % len(TITLES) for user, t in enumerate(targets)]
    logits, users = [], []
    for changes in ((histories, targets), (other, other_targets)):
        layout = pk.build_layout(CATALOG, changes[0], pk.SessionPatches(3), PROMPT, changes[1])
        users.append(torch.searchsorted(layout.cu_seqlens.long(), layout.logit_rows, right=True) - 1)
        logits.append(model(layout).logits)
    assert torch.equal(*users)
    own = users[0] == changed
    assert torch.equal(logits[0][~own], logits[1][~own])
    assert not (logits[0][own] == logits[1][own]).all(1).any()


# ------------------------------------------------------------------ embeddings that are more than their weight


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize("policy", ["text", "sessions, end"])
def test_adapters(adapter: dict[str, Any], policy: str) -> None:
    hf_model = lora(tiny("llama"), **adapter)
    assert_equals_loop(hf_model, POLICIES[policy], COMPOSITIONS["many users"])


@pytest.mark.parametrize("name", ["embed_tokens", "trainable tokens", "modules to save"])
def test_adapted_embedding_differs_from_its_raw_weight(name: str) -> None:
    """The adapter must matter in these tests, or passing them would mean nothing."""
    plain = tiny("llama")
    weight = plain.get_input_embeddings().weight.detach().clone()
    model = PatchedCausalLM(lora(plain, **ADAPTERS[name]), CATALOG, PROMPT)
    layout = pk.build_layout(CATALOG, batch_of([9])[0], POLICIES["items"], PROMPT)
    assert (model.embed(layout) - pk.pool_rows(weight, layout)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaled_embeddings_are_pooled_directly(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is what the module gives, bit for bit; a patch is as close to the exact mean as one rounding allows."""
    model = PatchedCausalLM(tiny("gemma3").to(dtype), CATALOG, PROMPT)
    layout = pk.build_layout(CATALOG, batch_of([9, 4])[0], POLICIES["sessions, end"], PROMPT, [1, 2])
    tokens, compact = layout.compact()
    embedding = model.get_input_embeddings()
    module = embedding(tokens)

    def refuse(self: pk.PatchLayout) -> Any:
        raise AssertionError("the module was called on the batch's tokens")

    monkeypatch.setattr(pk.PatchLayout, "compact", refuse)
    rows = model.embed(layout)
    through_module = pk.pool_rows(module, compact)
    literal = layout.lo < 0
    assert torch.equal(rows[literal], through_module[literal])
    scale = float(embedding.embed_scale.to(dtype))
    assert scale > 5
    every_row = [row for user in oracle.decode(layout) for row in user]
    oracle.assert_pooled(rows, embedding.weight.detach(), every_row, scale=scale)
    # each of the module's own rows is rounded, which their mean inherits
    magnitude = pk.pool_rows(module.abs().double(), compact)
    error = (rows.double() - through_module.double()).abs()
    assert (error <= 3 * oracle.UNIT_ROUNDOFF[dtype] * magnitude + 3 * oracle.HALF_SMALLEST[dtype]).all()
    grad_rows = torch.randn_like(rows)
    (grad,) = torch.autograd.grad(rows, embedding.weight, grad_rows)
    oracle.assert_gradient(grad, grad_rows, every_row, VOCABULARY, scale=scale)


def test_a_changed_scale_is_noticed() -> None:
    model = PatchedCausalLM(tiny("gemma3"), CATALOG, PROMPT)
    layout = pk.build_layout(CATALOG, batch_of([9])[0], POLICIES["items"], PROMPT)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        before = model.embed(layout)
        embedding.embed_scale.mul_(2)
        torch.testing.assert_close(model.embed(layout), before * 2)
        embedding.embed_scale = embedding.embed_scale / 4
        torch.testing.assert_close(model.embed(layout), before / 2)
        model.to(torch.bfloat16)
        assert model.embed(layout).dtype == torch.bfloat16
        embedding.embed_scale = torch.full((32,), 3.0)  # not one number: the module's business
        torch.testing.assert_close(model.embed(layout), pk.pool_rows(embedding.weight.detach() * 3, layout))


def test_only_what_scales_is_pooled_directly() -> None:
    """A class by the same kind of name that does more, and one derived from an embedding that only scales."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding as Scaled
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding as DoesMore

    from patchkern.models.embedding import _only_scales

    class Derived(Scaled):
        pass

    assert _only_scales(Scaled)
    assert not _only_scales(DoesMore) and not _only_scales(Derived) and not _only_scales(nn.Embedding)


def test_hook_on_the_embedding_is_run() -> None:
    hf_model = tiny("llama")
    hf_model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 3 + 1)
    assert_equals_loop(hf_model, POLICIES["items"], COMPOSITIONS["many users"])


def test_replaced_forward_of_the_embedding_is_run() -> None:
    hf_model = tiny("llama")
    embedding = hf_model.get_input_embeddings()
    original = embedding.forward
    embedding.forward = lambda ids: original(ids) * 2
    assert_equals_loop(hf_model, POLICIES["items"], COMPOSITIONS["many users"])


def test_padding_token_in_a_prompt_gets_no_gradient() -> None:
    hf_model = tiny("llama", pad_token_id=7)
    assert hf_model.get_input_embeddings().padding_idx == 7
    assert_equals_loop(hf_model, POLICIES["items"], COMPOSITIONS["many users"])
    assert not hf_model.get_input_embeddings().weight.grad[7].any()


def test_sparse_embedding_gets_a_sparse_gradient() -> None:
    hf_model = tiny("llama")
    dense = hf_model.get_input_embeddings()
    model = PatchedCausalLM(hf_model, CATALOG, PROMPT)
    layout = pk.build_layout(CATALOG, *reversed_targets(batch_of([9, 2])))
    model(layout).loss.backward()
    expected, dense.weight.grad, dense.sparse = dense.weight.grad, None, True
    model(layout).loss.backward()
    assert dense.weight.grad.is_sparse
    torch.testing.assert_close(dense.weight.grad.to_dense(), expected)


# ------------------------------------------------------------------ transformers.Trainer


def collate(samples: list[tuple[list[int], int]]) -> dict[str, Any]:
    histories, targets = map(list, zip(*samples, strict=True))
    layout = pk.build_layout(CATALOG, histories, pk.ItemPatches(2), PROMPT, targets)
    return {"layout": layout, "labels": layout.logit_labels}


def trainer(kind: str, folder: Path, **arguments: Any) -> transformers.Trainer:
    histories, targets = batch_of(list(np.random.default_rng(3).integers(1, 12, 24)))
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 3,
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return transformers.Trainer(
        model=PatchedCausalLM(tiny(kind), CATALOG, PROMPT),
        args=transformers.TrainingArguments(**settings | arguments),
        train_dataset=list(zip(histories, targets, strict=True)),
        eval_dataset=list(zip(histories, targets, strict=True)),
        data_collator=collate,
    )


def losses(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["llama", "gpt2 tied"])
def test_trainer_resumes_to_the_same_losses(kind: str, tmp_path: Path) -> None:
    whole = trainer(kind, tmp_path)
    whole.train()
    assert len(losses(whole)) == 6
    resumed = trainer(kind, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_trainer_accumulates_as_one_large_batch(tmp_path: Path) -> None:
    """The mean over all supervised tokens of a step, not a mean of the micro-batches' means."""
    parts = trainer("llama", tmp_path, max_steps=2, save_strategy="no")
    whole = trainer("llama", tmp_path, max_steps=2, save_strategy="no", per_device_train_batch_size=4)
    whole.args.gradient_accumulation_steps = 1
    for run in (parts, whole):
        run.train()
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-4)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_trainer_evaluates(tmp_path: Path) -> None:
    run = trainer("llama", tmp_path, prediction_loss_only=True)
    assert 0 < run.evaluate()["eval_loss"] < 20


# ------------------------------------------------------------------ wrong arguments


def test_wrong_constructor_arguments() -> None:
    with pytest.raises(TypeError, match="hf_model: expected a transformers causal LM, got Linear"):
        PatchedCausalLM(nn.Linear(2, 2), CATALOG, PROMPT)
    with pytest.raises(TypeError, match="catalog: expected a Catalog, got list"):
        PatchedCausalLM(tiny("llama"), TITLES, PROMPT)
    with pytest.raises(TypeError, match="prompt: expected a Prompt, got dict"):
        PatchedCausalLM(tiny("llama"), CATALOG, {})
    with pytest.raises(TypeError, match="policy: expected a policy with max_items and levels, got str"):
        PatchedCausalLM(tiny("llama"), CATALOG, PROMPT, "items")
    bare = transformers.LlamaModel(tiny("llama").config)
    with pytest.raises(ValueError, match="hf_model: expected a causal LM whose forward takes logits_to_keep"):
        PatchedCausalLM(bare, CATALOG, PROMPT)
    prefix = peft.get_peft_model(tiny("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="hf_model: expected no prompt-learning adapter"):
        PatchedCausalLM(prefix, CATALOG, PROMPT)


def test_token_ids_beyond_the_embedding() -> None:
    few = max(max(title) for title in TITLES)
    with pytest.raises(
        ValueError, match=rf"catalog: .* below {few}, .*got {few}; .*resize_token_embeddings\({few + 1}\)"
    ):
        PatchedCausalLM(tiny("llama", vocab_size=few), CATALOG, PROMPT)
    with pytest.raises(
        ValueError, match=r"prompt: expected token ids below 83.*got 90; .*resize_token_embeddings\(91\)"
    ):
        PatchedCausalLM(tiny("llama"), CATALOG, pk.Prompt(prefix=[90]))
    hf_model = tiny("llama")
    hf_model.resize_token_embeddings(91)
    PatchedCausalLM(hf_model, CATALOG, pk.Prompt(prefix=[90]))
    layout = pk.build_layout(CATALOG, [[1]], pk.TextOnly(), pk.Prompt(prefix=[90]))
    with pytest.raises(ValueError, match="layout: expected token ids below 83"):
        PatchedCausalLM(tiny("llama"), CATALOG, PROMPT)(layout)


@pytest.mark.parametrize("kind", ["llama", "gpt2 tied"])
def test_too_long_for_the_model(kind: str) -> None:
    limit = {"n_positions": 16} if kind.startswith("gpt2") else {"max_position_embeddings": 16}
    model = PatchedCausalLM(tiny(kind, **limit), CATALOG, PROMPT)
    histories, _ = batch_of([40])
    layout = pk.build_layout(CATALOG, histories, pk.TextOnly(), PROMPT)
    with pytest.raises(ValueError, match=rf"at most 16 rows per user, the positions of \w+, got {layout.max_seqlen}"):
        model(layout)


def test_user_without_rows_has_nothing_to_predict_from() -> None:
    bare = pk.Prompt()
    model = PatchedCausalLM(tiny("llama"), CATALOG, bare)
    with pytest.raises(ValueError, match="got a user without rows"):
        model(pk.build_layout(CATALOG, [[1], [], [2]], pk.TextOnly(), bare))
    for lone in ([[]], [[], []]):
        with pytest.raises(ValueError, match="got a user without rows"):
            model(pk.build_layout(CATALOG, lone, pk.TextOnly(), bare))
    assert model(pk.build_layout(CATALOG, [], pk.TextOnly(), bare)).logits.shape == (0, VOCABULARY)
    # a title of one token and nothing before it or after: there is nothing to learn, and no NaN
    alone = next(item for item, title in enumerate(TITLES) if len(title) == 1)
    output = model(pk.build_layout(CATALOG, [[]], pk.TextOnly(), bare, [alone]))
    assert output.loss.item() == 0 and output.logits.shape == (0, VOCABULARY)
    output.loss.backward()
    assert model(pk.build_layout(CATALOG, [[1], [2]], pk.TextOnly(), bare)).logits.shape == (2, VOCABULARY)


def test_wrong_call_arguments(tmp_path: Path) -> None:
    model = PatchedCausalLM(tiny("llama"), CATALOG, PROMPT)
    with pytest.raises(TypeError, match="layout: expected a PatchLayout, got list"):
        model([[1, 2]])
    with pytest.raises(ValueError, match="policy: expected one, here or when"):
        model.recommend([[1, 2]])
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="base_model: expected None"):
        PatchedCausalLM.from_pretrained(tmp_path / "m", CATALOG, base_model=tiny("llama"))
    with pytest.raises(ValueError, match=r"no_such_attention"):
        PatchedCausalLM(tiny("llama"), CATALOG, PROMPT, attn_implementation="no_such_attention")
