# SPDX-License-Identifier: Apache-2.0
"""Span attention against masked attention written out, and against transformers' own attention in whole models."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import patchkern as pk
import patchkern.models.attention
from patchkern.batch.layout import PatchLayout
from patchkern.models.attention import NAME, DeferredMask, attention_mask, register
from patchkern.ops import span_attention_flash
from patchkern.ops.span_attention import span_attention

register()
VOCABULARY = 61


def tiny(kind: str, **overrides: Any) -> transformers.PreTrainedModel:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**shape | overrides)
    elif kind == "qwen2":
        config = transformers.Qwen2Config(**shape | overrides)
    elif kind == "qwen3":
        config = transformers.Qwen3Config(**shape | {"head_dim": 8} | overrides)
    elif kind == "mistral":
        config = transformers.MistralConfig(**shape | {"sliding_window": 5} | overrides)
    else:
        short = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = transformers.GPT2Config(**short | special | overrides)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MODELS = ["llama", "qwen2", "qwen3", "gpt2", "mistral"]


def packed(lengths: list[int]) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


def one_by_one(model: transformers.PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Logits of every sequence run alone, without padding, on transformers' SDPA."""
    model.set_attn_implementation("sdpa")
    bounds = batch["cu_seq_lens_q"].tolist()
    parts = [model(input_ids=batch["input_ids"][:, a:b], use_cache=False).logits for a, b in itertools.pairwise(bounds)]
    model.set_attn_implementation(NAME)
    return torch.cat(parts, dim=1)


# ------------------------------------------------------------------ the function


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, window: int | None
) -> Tensor:
    user = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    row = torch.arange(len(user))
    distance = row[:, None] - row[None, :]
    visible = (user[:, None] == user[None, :]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 4], ids=lambda w: f"window={w}")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=lambda h: f"heads={h[0]}/{h[1]}")
@pytest.mark.parametrize("lengths", [[7, 1, 0, 12, 5], [9], [1, 1, 1], [0, 3]], ids=str)
def test_equals_masked_attention(lengths: list[int], heads: tuple[int, int], window: int | None) -> None:
    shape = (1, heads[0], sum(lengths), 8)
    query = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, heads[1], *shape[2:], dtype=torch.float64, requires_grad=True) for _ in range(2))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    got = span_attention(query, key, value, cu_seqlens, max(lengths), scaling=0.3, sliding_window=window)
    expected = masked_attention(query, key, value, lengths, 0.3, window)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(expected)
    inputs = (query, key, value)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_empty_batch() -> None:
    empty = torch.zeros(1, 4, 0, 8)
    assert span_attention(empty, empty, empty, torch.zeros(1, dtype=torch.int32), 0).shape == (1, 0, 4, 8)


def test_dropout_is_applied() -> None:
    query = torch.randn(1, 2, 50, 8)
    cu_seqlens = torch.tensor([0, 30, 50], dtype=torch.int32)
    plain = span_attention(query, query, query, cu_seqlens)
    dropped = [span_attention(query, query, query, cu_seqlens, dropout=0.5) for _ in range(300)]
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(torch.stack(dropped).mean(0), plain, atol=0.5, rtol=0)


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("use_cache", [False, True], ids=["no cache", "default cache"])
def test_packed_batch_equals_users_alone(kind: str, use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny(kind), packed([7, 1, 12, 5])
    expected = one_by_one(model, batch)
    monkeypatch.setattr(patchkern.models.attention, "sdpa_mask", None)  # no mask may be built
    got = model(**batch | {"use_cache": use_cache}).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_packed_positions_alone_keep_users_apart(kind: str) -> None:
    """Without cu_seq_lens it is ordinary SDPA, whose packed mask comes from the positions."""
    model, batch = tiny(kind), packed([7, 1, 12, 5])
    expected = one_by_one(model, batch)
    got = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_padded_batch(kind: str, side: str) -> None:
    model = tiny(kind)
    ids = torch.randint(3, VOCABULARY, (3, 11))
    keep = torch.ones_like(ids)
    for row, padding in enumerate([0, 4, 8]):
        keep[row, slice(0, padding) if side == "left" else slice(11 - padding, 11)] = 0
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    arguments = {"input_ids": ids * keep, "attention_mask": keep, "position_ids": positions}
    outputs = []
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        outputs.append(model(**arguments).logits[keep.bool()])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["one length", "left padding"])
@pytest.mark.parametrize("kind", MODELS)
def test_generate(kind: str, padded: bool, options: dict[str, Any]) -> None:
    model = tiny(kind)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    keep = torch.ones_like(ids)
    if padded:
        keep[1, :5] = 0
    texts = []
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        options = options | {"disable_compile": True, "do_sample": False, "max_new_tokens": 8}
        texts.append(model.generate(input_ids=ids * keep, attention_mask=keep, **options))
    assert torch.equal(*texts)


def test_mask_is_deferred_only_where_a_packed_batch_may_come() -> None:
    assert isinstance(attention_mask(2, 5, 5, 0, attention_mask=None), DeferredMask)
    assert isinstance(attention_mask(2, 5, 9, 4, attention_mask=None, allow_is_causal_skip=False), Tensor)
    padding = torch.tensor([[True] * 3, [False, True, True]])
    assert isinstance(attention_mask(2, 3, 3, 0, attention_mask=padding), Tensor)


# ------------------------------------------------------------------ spans with prefixes


def literal_layout(spans: list[list[int]], prefix: list[tuple[int, int]] | None, supervised: list[int]) -> PatchLayout:
    """Tokens as they are; a span goes on where its prefix ends. The rows after ``supervised`` ones are the labels."""
    lengths = [len(tokens) for tokens in spans]
    begins = [0, *itertools.accumulate(lengths)]
    tokens = torch.tensor([token for span in spans for token in span], dtype=torch.int32)
    ranges = prefix or [(0, 0)] * len(spans)
    empty = torch.zeros(0, dtype=torch.int32)
    rows = torch.tensor(supervised)
    labels = torch.full_like(tokens, -100, dtype=torch.int64)
    labels[rows + 1] = tokens[rows + 1].long()
    return PatchLayout(
        lo=-1 - tokens,
        hi=torch.zeros_like(tokens),
        items=empty,
        token_ids=empty,
        offsets=torch.zeros(1, dtype=torch.int32),
        title_index=empty,
        cu_seqlens=torch.tensor(begins, dtype=torch.int32),
        max_seqlen=max(lengths),
        position_ids=torch.cat([torch.arange(n) + b - a for (a, b), n in zip(ranges, lengths, strict=True)]),
        max_position=max(b - a + n for (a, b), n in zip(ranges, lengths, strict=True)) - 1,
        labels=labels,
        logit_rows=rows,
        logit_labels=labels[rows + 1],
        history_tokens=0,
        history_rows=0,
        max_token_id=int(tokens.max()),
        prefix=None if prefix is None else torch.tensor(prefix, dtype=torch.int32),
        max_prefix=max(end - start for start, end in ranges),
    )


def trunks_and_branches() -> tuple[PatchLayout, PatchLayout]:
    """Two histories with three and two targets: as trunks with branches, and as a prompt for every target alone."""
    spans, prefix, shared_rows = [], [], []
    alone, alone_rows = [], []
    for trunk_length, ends in ((17, (4, 11, 17)), (9, (1, 9))):
        trunk = torch.randint(3, VOCABULARY, (trunk_length,)).tolist()
        begin = sum(map(len, spans))
        spans, prefix = [*spans, trunk], [*prefix, (0, 0)]
        for end in ends:
            branch = torch.randint(3, VOCABULARY, (6,)).tolist()
            shared_rows += [sum(map(len, spans)) + row for row in (2, 3, 4)]
            spans, prefix = [*spans, branch], [*prefix, (begin, begin + end)]
            alone_rows += [sum(map(len, alone)) + end + row for row in (2, 3, 4)]
            alone = [*alone, trunk[:end] + branch]
    return literal_layout(spans, prefix, shared_rows), literal_layout(alone, None, alone_rows)


class ExactNorm(nn.Module):
    """RMS norm in its input's dtype; transformers' own goes through float32, backwards too."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, rows: Tensor) -> Tensor:
        return self.weight * rows * (rows.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()


def patched(kind: str, **overrides: Any) -> pk.PatchedCausalLM:
    """In float64, all of it but the angles of the positions."""
    model = tiny(kind, **overrides).double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "variance_epsilon"):
                setattr(module, name, ExactNorm(child))
    prompt = pk.Prompt(prefix=[3], separator=[4], suffix=[5], response_end=[6])
    catalog = pk.Catalog.from_token_ids([7, 8], [0, 2])
    return pk.PatchedCausalLM(model, catalog, prompt)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_branches_equal_prompts_alone(kind: str, checkpointing: bool) -> None:
    """One trunk computed once, however many targets: the same loss and the same gradients."""
    model, results = patched(kind), []
    if checkpointing:
        model.train()
        model.activation_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    for layout in trunks_and_branches():
        model.zero_grad()
        output = model(layout)
        output.loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((output.loss, output.logits, gradients))
    (loss, logits, gradients), (loss_alone, logits_alone, gradients_alone) = results
    torch.testing.assert_close(loss, loss_alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logits, logits_alone, rtol=1e-10, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_alone[name], rtol=1e-10, atol=1e-11, msg=name)


def test_a_window_wider_than_all_that_is_seen_is_no_window() -> None:
    shared, alone = trunks_and_branches()
    model = patched("mistral", sliding_window=34)
    torch.testing.assert_close(model(shared).loss, model(alone).loss, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="sliding_window: expected None with a prefix, which is seen fully, got 33"):
        patched("mistral", sliding_window=33)(shared)


def test_other_attentions_refuse_prefixes() -> None:
    shared, alone = trunks_and_branches()
    model = pk.PatchedCausalLM(tiny("llama"), *(getattr(patched("llama"), x) for x in ("catalog", "prompt")))
    for name in ("sdpa", "eager"):
        model.hf_model.set_attn_implementation(name)
        assert model(alone).loss.isfinite()
        with pytest.raises(ValueError, match=f"layout: expected spans without prefixes for '{name}' attention"):
            model(shared)


def test_prefixes_need_spans() -> None:
    query = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match="span_prefix without cu_seq_lens_q"):
        patchkern.models.attention.attention(nn.Identity(), query, query, query, None, span_prefix=torch.zeros(1, 2))


def test_prefixes_count_as_rows_against_the_models_positions() -> None:
    shared, alone = trunks_and_branches()
    model = patched("llama", max_position_embeddings=32)
    assert model(alone).loss.isfinite()
    model.config.max_position_embeddings = 23
    assert model(shared).loss.isfinite()
    model.config.max_position_embeddings = 22
    with pytest.raises(ValueError, match=r"expected at most 22 rows .* got 23"):
        model(shared)
    model.config.max_position_embeddings = 32
    further = dataclasses.replace(shared, position_ids=shared.position_ids + 10, max_position=32)
    with pytest.raises(ValueError, match=r"expected at most 32 rows .* got 33"):  # as where rows were left out
        model(further)


def test_models_take_several_ranges() -> None:
    shared, _ = trunks_and_branches()
    assert shared.prefix is not None
    middle = shared.prefix.float().mean(dim=1).int()
    halves = torch.stack([shared.prefix[:, 0], middle, middle, shared.prefix[:, 1]], dim=1).view(-1, 2, 2)
    model, split = patched("llama"), dataclasses.replace(shared, prefix=halves)
    torch.testing.assert_close(model(split).loss, model(shared).loss, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ calls that would be silently wrong


def test_refuses_mask_with_spans() -> None:
    batch = packed([4, 3])
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match="both attention_mask and cu_seq_lens_q"):
        tiny("llama", attn_implementation=NAME)(**batch | {"attention_mask": mask})


def test_refuses_a_batch_of_packed_rows() -> None:
    batch = packed([4, 3])
    twice = {name: batch[name].expand(2, -1) for name in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="batch size is 2"):
        tiny("llama", attn_implementation=NAME)(**batch | twice)


def test_refuses_earlier_keys() -> None:
    model, batch = tiny("llama", attn_implementation=NAME), packed([4, 3])
    cache = model(**batch | {"use_cache": True}).past_key_values
    with pytest.raises(ValueError, match=r"7 queries and 14 keys.*use_cache=False"):
        model(**batch | {"past_key_values": cache, "use_cache": True})


def test_refuses_patterns_it_does_not_know() -> None:
    query = torch.randn(1, 2, 6, 4)
    arguments = {"cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32), "max_length_q": 6}
    chunked = DeferredMask(local_size=3)
    with pytest.raises(ValueError, match="asks for another pattern"):
        patchkern.models.attention.attention(nn.Identity(), query, query, query, chunked, **arguments)
    for name in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=f"does not implement `{name}`"):
            patchkern.models.attention.attention(nn.Identity(), query, query, query, None, **arguments, **{name: 1.0})
    both_ways = nn.Identity()
    both_ways.is_causal = False
    with pytest.raises(ValueError, match="bidirectional"):
        patchkern.models.attention.attention(both_ways, query, query, query, None, **arguments)


# ------------------------------------------------------------------ the seam for search


@pytest.mark.parametrize("kind", MODELS)
def test_span_cache_attends_in_every_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        """Attends to nothing but the new rows, as a fresh cache would."""

        def __init__(self) -> None:
            self.layers: list[int] = []

        def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            self.layers.append(module.layer_idx)
            assert query.shape == (3, 4, 2, 8)
            assert key.shape == value.shape == (3, 4 if kind == "gpt2" else 2, 2, 8)
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            return out.transpose(1, 2)

    model = tiny(kind, attn_implementation=NAME)
    ids, positions = torch.randint(3, VOCABULARY, (3, 2)), torch.arange(2).expand(3, -1)
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    monkeypatch.setattr(patchkern.models.attention, "sdpa_mask", None)
    cache = Recorder()
    got = model(input_ids=ids, position_ids=positions, use_cache=False, span_cache=cache).logits
    assert cache.layers == [0, 1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ CUDA kernels, their calling conventions only


def kernel_arguments() -> tuple[Any, ...]:
    query, cu_seqlens = torch.randn(10, 4, 8), torch.tensor([0, 7, 10], dtype=torch.int32)
    return query, torch.randn(10, 2, 8), torch.randn(10, 2, 8), cu_seqlens, 7, 0.3, 0.0


def standing_in(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scaling: float, window: tuple[int, int], gqa: bool
) -> Tensor:
    """What a kernel would compute, by the route this machine has."""
    assert gqa or q.shape[1] == k.shape[1]
    left, right = window
    assert right == 0
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return span_attention(q, k, v, cu, scaling=scaling, sliding_window=None if left < 0 else left + 1)[0]


@pytest.fixture(params=["torch 2.11", "torch 2.13", "flash_attn"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter around each kernel's calling convention, with a stand-in behind it."""

    def torch_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        assert cu_seq_q is cu_seq_k and max_q == max_k == 7
        return standing_in(q, k, v, cu_seq_q, scale, window_size, gqa=False)

    def torch_2_13(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        assert cu_seq_q is cu_seq_k and max_q == max_k == 7
        return standing_in(q, k, v, cu_seq_q, scale, window_size, enable_gqa)

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        assert cu_q is cu_k and max_q == max_k == 7 and causal and dropout_p == 0.0
        return standing_in(q, k, v, cu_q, softmax_scale, window_size, gqa=True)

    if request.param == "flash_attn":
        module = types.ModuleType("flash_attn")
        module.flash_attn_varlen_func = flash  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        build = span_attention_flash._flash_attn_kernel
    else:
        module = types.ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = torch_2_11 if request.param == "torch 2.11" else torch_2_13  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        build = span_attention_flash._torch_varlen_kernel
    return build.__wrapped__()  # past the cache


@pytest.mark.parametrize("window", [(-1, 0), (3, 0)], ids=str)
def test_kernel_adapters(kernel: Any, window: tuple[int, int]) -> None:
    query, key, value, *_ = arguments = kernel_arguments()
    got = kernel(*arguments, window)
    packed_form = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = masked_attention(*packed_form, [7, 3], 0.3, None if window[0] < 0 else window[0] + 1)
    torch.testing.assert_close(got[None], expected)


def test_torch_2_10_has_no_usable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    assert span_attention_flash._torch_varlen_kernel.__wrapped__() is None


def test_broken_flash_attn_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.warns(UserWarning, match="flash_attn is installed but does not load"):
        assert span_attention_flash._flash_attn_kernel.__wrapped__() is None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 16], ids=lambda w: f"window={w}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cuda_equals_masked_attention(dtype: torch.dtype, window: int | None) -> None:
    lengths = [70, 1, 300, 33]
    shapes = [(1, heads, sum(lengths), 64) for heads in (8, 2, 2)]
    exact = [torch.randn(shape, dtype=torch.float64, device="cuda").to(dtype).double() for shape in shapes]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    results = []
    for cast in (torch.float64, dtype):
        query, key, value = (x.detach().to(cast).requires_grad_() for x in exact)
        out = span_attention(query, key, value, cu_seqlens, max(lengths), sliding_window=window)
        out.double().square().sum().backward()
        results.append([out, query.grad, key.grad, value.grad])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for reference, got in zip(*results, strict=True):
        assert (reference - got).abs().max() <= tolerance * reference.abs().max()
