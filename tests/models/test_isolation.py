# SPDX-License-Identifier: Apache-2.0
"""Every model family that transformers has either keeps the users of a packed batch apart or is refused.

What the library says is compared with a measurement that shares nothing with its own probe: real layouts, one user's
history changed and everyone else's logits compared bit for bit, packed logits against the model's own plain forward of
each user alone, and gradients, which must not reach another user's rows.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_families as families
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from model_families import CATALOG, PROMPT, TITLES
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import patchkern as pk
from patchkern.models import isolation
from patchkern.models.attention import NAME
from patchkern.models.isolation import EVERYWHERE
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.models.probe import probe

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
PAGE_VERSION = re.search(r"^transformers (\S+):", PAGE, re.M)[1]
FAMILIES = [name for name in families.names() if families.multimodal(name) is None]

# titles of one to three tokens, by length: swapping items of one length keeps every row where it is
LENGTHS = [6, 0, 9, 3]
HISTORIES = [[(7 * user + 5 * place) % len(TITLES) for place in range(n)] for user, n in enumerate(LENGTHS)]
TARGETS = [4, 8, 15, 16]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


# ------------------------------------------------------------------ an independent measurement


def users_of(layout: pk.PatchLayout) -> Tensor:
    """(T,) whose each row is."""
    return torch.repeat_interleave(torch.arange(layout.num_users), layout.cu_seqlens.diff().long())


def packed(model: PatchedCausalLM, layout: pk.PatchLayout, rows: Tensor) -> Tensor:
    """(T, V) logits of every row."""
    batch = pk.PackedBatch(rows.clone(), layout)  # some models scale their input in place
    return model.hf_model(**batch.model_kwargs()).logits[0]


def measure(model: PatchedCausalLM) -> tuple[float, float, float]:
    """How far users move when another changes, differ from alone, and gradients reach; relative to the largest."""
    layout = pk.build_layout(CATALOG, HISTORIES, pk.ItemPatches(keep_text=2), PROMPT, TARGETS)
    layout = pk.PatchLayout._trusted({**layout.__dict__, "labels": None, "logit_rows": None, "logit_labels": None})
    users = users_of(layout)
    rows = model.embed(layout).detach()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        base = packed(model, layout, rows)
        each = [rows[users == user][None] for user in range(4)]
        alone = torch.cat([model.hf_model(inputs_embeds=own.clone(), use_cache=False).logits[0] for own in each])
        scale = base.abs().max().item()
        leak = 0.0
        for user in range(4):
            noise = torch.randn(rows.shape, generator=generator) * rows.std()
            changed = packed(model, layout, torch.where((users == user)[:, None], noise, rows))
            assert not torch.equal(changed[users == user], base[users == user])
            leak = max(leak, (changed - base)[users != user].abs().max().item())
    assert scale > 0
    leaf = rows.requires_grad_()
    (gradient,) = torch.autograd.grad(packed(model, layout, leaf)[users == 2].square().sum(), leaf)
    backward = gradient[users != 2].abs().max() / gradient[users == 2].abs().max()
    return leak / scale, (base - alone).abs().max().item() / scale, backward.item()


def branches_differ(model: PatchedCausalLM) -> float:
    """All targets in one pass against a sample of its own for each, relative to the largest logit."""
    history = [[(5 * place) % len(TITLES) for place in range(8)]]
    whole = pk.Histories.from_sequences(history)
    with torch.no_grad():
        shared = model(pk.build_training_layout(CATALOG, history, pk.TextOnly(), PROMPT, [[3, 7]])).logits
        samples = [
            model(pk.build_layout(CATALOG, whole.before([0], [p]), pk.TextOnly(), PROMPT, whole.at([0], [p]))).logits
            for p in range(3, 8)
        ]
    return (shared - torch.cat(samples)).abs().max().item() / shared.abs().max().item()


def search_differs(model: pk.PatchedCausalLM) -> float:
    """Between what a search gives a title and what a pass over the whole sample gives it."""
    targets, policy, histories = [7, 8, 9], pk.ItemPatches(1), [[0, 1, 2]] * 3
    layout = pk.build_layout(CATALOG, histories, policy, PROMPT, targets)
    with torch.no_grad():
        log_probs = model(layout).logits.float().log_softmax(-1).gather(1, layout.logit_labels[:, None])[:, 0]
    sizes = [len(TITLES[target]) + 1 for target in targets]
    whole = torch.stack([part.sum() for part in log_probs.split(sizes)])
    found = torch.from_numpy(model.score_items(histories[:1], policy, targets)[0])
    return float((found - whole).abs().max() / whole.abs().max())


def rounds_by_batch(model: nn.Module) -> bool:
    """Experts compute as many rows at a time as choose them, whoever's they are, and round accordingly."""
    return any("expert" in name or "moe" in name for name, _ in model.named_modules())


# ------------------------------------------------------------------ all families


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_users_apart_or_is_refused(name: str) -> None:
    """With layers that see four rows, what the library accepts is measured; with layers that see all of a probe's rows,
    it must say the same, for what a probe cannot see must be refused too. That is what the page says of the family."""
    accepted, hf_model = [], families.tiny_model(name)
    for implementation in EVERYWHERE:
        verdict = families.verdict(hf_model, implementation)
        accepted.append("no" if verdict.refused else "yes")
        model = verdict.model
        if model is None:
            assert re.match(r"hf_model: expected .*|attn_implementation: expected .*", verdict.refused)
            continue
        leak, alone, backward = measure(model)
        assert leak <= (1e-5 if rounds_by_batch(hf_model) else 0.0), implementation
        assert alone <= 1e-5, implementation
        assert backward == 0, implementation
        if implementation == NAME and verdict.no_branches is None:
            assert branches_differ(model) <= 1e-5
    row = families.row(name)
    assert [row[0], *row[2:4]] == accepted
    if row[1] == "yes":
        assert search_differs(wrap(families.tiny_model(name, reach=64))) <= 1e-4
    if transformers.__version__ == PAGE_VERSION:
        assert families.rows_of(PAGE)[name] == row


def test_the_page_has_every_family() -> None:
    if transformers.__version__ != PAGE_VERSION:
        pytest.skip(f"its table is of transformers {PAGE_VERSION}, installed is {transformers.__version__}")
    rows = families.rows_of(PAGE)
    assert list(rows) != [] and sorted(rows) == sorted(FAMILIES)
    some = sum("yes" in row[:4] for row in rows.values())
    ours = sum(row[0] == "yes" for row in rows.values())
    assert f"{len(rows)} text families tried, {some} keep users apart with some attention ({ours} with" in PAGE


# ------------------------------------------------------------------ a model as it is


def llama(layers: int = 2, **overrides: Any) -> transformers.PreTrainedModel:
    shape = {
        "vocab_size": families.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | overrides)).eval()


def wrap(hf_model: Any, **options: Any) -> PatchedCausalLM:
    return PatchedCausalLM(hf_model, CATALOG, PROMPT, **options)


def some_layout(histories: Any = HISTORIES, targets: Any = TARGETS) -> pk.PatchLayout:
    return pk.build_layout(CATALOG, histories, pk.TextOnly(), PROMPT, targets)


REFUSED = "hf_model: expected a model that keeps the users of a packed batch apart"


def leak_between_rows(layer: nn.Module) -> None:
    """Every row gets something of the row before it, whoever's it is."""
    forward = layer.mlp.forward
    layer.mlp.forward = lambda hidden: forward(hidden) + 1e-3 * hidden.roll(1, dims=1)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_patched_module_is_probed_as_it_is(layer: int) -> None:
    model = llama(layers=4)
    leak_between_rows(model.model.layers[layer])
    with pytest.raises(ValueError, match=REFUSED):
        wrap(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_in_every_dtype(dtype: torch.dtype, implementation: str) -> None:
    wrap(llama().to(dtype), attn_implementation=implementation)
    for name in ("mamba2", "lfm2", "jamba", "falcon_h1"):
        with pytest.raises(ValueError, match=f"{REFUSED}|attn_implementation: expected"):
            wrap(families.tiny_model(name).to(dtype), attn_implementation=implementation)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_eager_rounds_its_softmax_to_float32(name: str) -> None:
    model = families.tiny_model(name).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # attention that is far from uniform
    wrap(model, attn_implementation="eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt2", "gemma3_text", "deepseek_v3", "olmo2", "phi3"])
def test_rounding_is_no_reason(name: str, dtype: torch.dtype) -> None:
    for implementation in EVERYWHERE:
        wrap(families.tiny_model(name).to(dtype), attn_implementation=implementation)


def test_adapters_and_single_precision_adapters_over_half() -> None:
    adapted = peft.get_peft_model(llama().bfloat16(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert {p.dtype for p in adapted.parameters()} == {torch.float32, torch.bfloat16}
    wrap(adapted)
    leak_between_rows(adapted.get_base_model().model.layers[1])
    with pytest.raises(ValueError, match=REFUSED):
        wrap(adapted)


def test_a_bidirectional_model_is_refused() -> None:
    config = families.tiny_config("bert")
    config.is_decoder = False
    for implementation in EVERYWHERE:
        with pytest.raises(ValueError, match=REFUSED):
            wrap(transformers.BertLMHeadModel(config).eval(), attn_implementation=implementation)


# ------------------------------------------------------------------ cost, and what is left behind


def test_only_the_first_layer_of_each_kind_is_run() -> None:
    def count(model: nn.Module, layers: nn.ModuleList) -> list[int]:
        calls = [0] * len(layers)
        for kind in {type(layer) for layer in layers}:
            forward = kind.forward

            def counted(self: Any, *args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
                calls[list(layers).index(self)] += 1
                return _forward(self, *args, **kwargs)

            monkeypatch.setattr(kind, "forward", counted)
        wrap(model)
        return calls

    with pytest.MonkeyPatch.context() as monkeypatch:
        model = llama(layers=6)
        assert count(model, model.model.layers) == [3, 0, 0, 0, 0, 0]
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = families.tiny_config("qwen3", reach=64)
        config.num_hidden_layers, config.sliding_window = 4, 64
        config.layer_types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
        model = transformers.Qwen3ForCausalLM(config)
        assert count(model, model.model.layers) == [3, 3, 3, 0]


def test_nothing_is_disturbed() -> None:
    """Random state, modes, hooks, gradients, weights and buffers are as before; no hook has run."""
    model = llama(layers=3, attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    model.register_buffer("counter", torch.zeros(3))
    seen: list[str] = []
    hooks = [m.register_forward_hook(lambda *_: seen.append("after")) for m in model.modules()]
    hooks += [m.register_forward_pre_hook(lambda *_: seen.append("before")) for m in model.modules()]
    forward = model.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        model.counter.add_(1)
        model.calls = getattr(model, "calls", 0) + 1
        return forward(*args, **kwargs)

    model.model.forward = counting
    modes = [m.training for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(buffer) for buffer in model.buffers()]
    random = torch.get_rng_state()
    wrap(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [id(buffer) for buffer in model.buffers()] == identities
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not hasattr(model, "calls") and seen == []
    model.model(inputs_embeds=torch.zeros(1, 2, 32))
    assert "before" in seen and "after" in seen
    for hook in hooks:
        hook.remove()


def test_a_refused_model_is_left_as_it_was() -> None:
    model = families.tiny_model("opt").train()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=f"{REFUSED}.*attn_implementation='patchkern_varlen' keeps users apart$"):
        wrap(model, attn_implementation="eager")
    assert model.training and model.config._attn_implementation == "sdpa"


def test_longrope_buffers_are_put_back() -> None:
    model = phi3()
    model(input_ids=torch.zeros(1, 60, dtype=torch.long))  # beyond the original length: the long factors are in use
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    wrap(model)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_a_wrapped_model_can_be_copied() -> None:
    model = wrap(llama())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(some_layout()).logits, model(some_layout()).logits)


# ------------------------------------------------------------------ asked again, or later


def on_meta(kind: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(families.tiny_config(kind)).eval()


def test_a_model_without_weights_is_asked_at_its_first_forward() -> None:
    for kind, refused in (("llama", False), ("mamba2", True)):
        with pytest.warns(UserWarning, match="apart is asked at its first forward: it has parameters on the meta"):
            model = wrap(on_meta(kind))
        model.to_empty(device="cpu")
        model.hf_model.load_state_dict(families.tiny_model(kind).state_dict(), strict=False)
        for module in model.modules():  # what to_empty leaves undefined
            if hasattr(module, "rope_type"):
                module.__init__(module.config)
        if refused:
            with pytest.raises(ValueError, match=REFUSED):
                model(some_layout())
        else:
            assert model(some_layout()).logits.isfinite().all()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo backend")
def test_a_sharded_model_is_asked_at_its_first_forward() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for kind, refused in (("llama", False), ("mamba2", True)):
            hf_model = families.tiny_model(kind)
            expected = None if refused else wrap(families.tiny_model(kind))(some_layout())
            layers = hf_model.model.layers if kind == "llama" else hf_model.backbone.layers
            for layer in layers:
                fully_shard(layer)
            with pytest.warns(UserWarning, match="apart is asked at its first forward: its parameters are sharded"):
                model = fully_shard(wrap(hf_model)).train()
            if refused:
                with pytest.raises(ValueError, match=REFUSED):
                    model(some_layout())
                continue
            for _ in range(2):  # the second asks no more
                output = model(some_layout())
                torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
                output.loss.backward()
            assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    finally:
        dist.destroy_process_group()


def test_weights_that_are_no_numbers_yet() -> None:
    hf_model = families.tiny_model("mamba2")
    state = copy.deepcopy(hf_model.state_dict())
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.fill_(float("nan"))
    with pytest.warns(UserWarning, match="first forward: its weights give numbers that are not finite"):
        model = wrap(hf_model)
    hf_model.load_state_dict(state)
    with pytest.raises(ValueError, match=REFUSED):
        model(some_layout())


def test_another_attention_is_asked_again() -> None:
    model = wrap(families.tiny_model("opt"))
    model(some_layout())
    model.hf_model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="OPTForCausalLM with 'sdpa' attention does not: other users' rows change"):
        model(some_layout())


def test_another_dtype_is_asked_again_also_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(isolation, "probe", lambda *arguments: asked.append(arguments) or probe(*arguments))
    model = wrap(llama(attention_dropout=0.3)).train()
    model(some_layout()).loss.backward()
    model.zero_grad()
    assert len(asked) == 1
    with torch.autocast("cpu", torch.bfloat16):
        model.to(torch.float16)
        random = torch.get_rng_state()
        model._isolation.check(model.hf_model, model.device)
        assert len(asked) == 2 and torch.equal(torch.get_rng_state(), random)
        model(some_layout()).loss.backward()
    assert len(asked) == 2 and model.hf_model.training
    leak_between_rows(model.hf_model.model.layers[0])
    with pytest.raises(ValueError, match=REFUSED):
        model.to(torch.bfloat16)(some_layout())


def test_a_search_asks_for_its_own_attention() -> None:
    """A search always runs on patchkern_varlen, whatever the model was wrapped with."""
    model = wrap(families.tiny_model("gemma2", reach=64), attn_implementation="eager")
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM with 'patchkern_varlen' attention does not: .*softcap"):
        model.recommend([[1, 2]], pk.TextOnly(), 2, 2)
    assert model.config._attn_implementation == "eager"


def test_a_model_that_hands_no_spans_to_attention() -> None:
    """Users are kept apart by masks, but branches would lose their prefixes, and a search its prompts."""
    model = wrap(families.tiny_model("stablelm"))
    assert measure(model)[1] <= 1e-5
    layout = pk.build_training_layout(CATALOG, [[0, 1, 2, 3]], pk.TextOnly(), PROMPT, [[1, 3]])
    with pytest.raises(ValueError, match="layout: expected spans without prefixes for StableLmForCausalLM: a branch"):
        model(layout)
    with pytest.raises(ValueError, match="model: search needs hypotheses that share their user's prompt; with St"):
        model.recommend([[1, 2]], pk.TextOnly(), 2, 2)


# ------------------------------------------------------------------ positions that change with the length of the batch


def phi3(original: int = 40) -> transformers.PreTrainedModel:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    config = families.tiny_config("phi3")
    config.original_max_position_embeddings, config.rope_parameters, config.sliding_window = original, rope, None
    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(config).eval()


def of_rows(rows: int) -> list[int]:
    """A history whose sample, target 0 included, has so many rows."""
    assert len(TITLES[0]) == 1
    fixed = 1 + 2 + 1 + 1  # prefix, suffix, title, end
    return [0] * ((rows - fixed + 1) // 2)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_longrope_takes_users_on_one_side_of_its_length(implementation: str) -> None:
    model = wrap(phi3(), attn_implementation=implementation)
    short, shortest, long, longest = ([of_rows(n)] for n in (40, 12, 42, 60))

    def logits(histories: list[list[int]]) -> Tensor:
        with torch.no_grad():
            return model(some_layout(histories, [0] * len(histories))).logits

    for pair in (short + shortest, long + longest):
        torch.testing.assert_close(logits(pair), torch.cat([logits([user]) for user in pair]), atol=1e-5, rtol=1e-5)
    for pair in (short + long, longest + shortest):
        with pytest.raises(ValueError, match="layout: expected users who are all within or all beyond 40 rows"):
            logits(pair)


def test_longrope_counts_the_rows_of_branches_with_their_trunks() -> None:
    """A short trunk that only long samples see is computed as they are; samples on both sides are refused."""
    model = wrap(phi3())
    history = [[0] * 28]  # the sample of target p has 2 p + 4 rows
    whole = pk.Histories.from_sequences(history)

    def shared(first: int, last: int) -> Tensor:
        with torch.no_grad():
            return model(pk.build_training_layout(CATALOG, history, pk.TextOnly(), PROMPT, [[first, last]])).logits

    for first, last in ((5, 18), (19, 27)):
        samples = [
            model(pk.build_layout(CATALOG, whole.before([0], [p]), pk.TextOnly(), PROMPT, whole.at([0], [p]))).logits
            for p in range(first, last + 1)
        ]
        torch.testing.assert_close(shared(first, last), torch.cat(samples), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"all within or all beyond 40 rows.*got 40 and 42 rows"):
        shared(18, 19)


def test_dynamic_rope_never_leaves_its_length() -> None:
    """Its positions change beyond max_position_embeddings, and stay changed; no layout gets there."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = wrap(llama(rope_parameters=rope, max_position_embeddings=40))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(some_layout([of_rows(40)], [0]))
    with pytest.raises(ValueError, match="layout: expected at most 40 rows per user"):
        model(some_layout([of_rows(42)], [0]))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# ------------------------------------------------------------------ advice


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gpt_oss", r"does not implement `s_aux`.*; with 'sdpa' or 'eager' users are not kept apart; docs/models\.md"),
        (
            "gemma2",
            r"`softcap`.*; attn_implementation=.*'eager' keeps users apart, without branches and without searches",
        ),
        ("gptj", r"GPTJForCausalLM keeps 'eager'; attn_implementation='eager' keeps users apart, without branches"),
        ("bloom", r"BloomForCausalLM keeps 'eager'; with 'sdpa' or 'eager' users are not"),
        ("mamba", r"\(MambaMixer carries rows of one user into the next\); with 'sdpa' or 'eager' users are not"),
        ("doge", r"got DogeForCausalLM with keep_window_size, .*depends on its place in the batch"),
        ("roberta", r"a user differs from the same user alone"),
        ("llama4_text", r"with attn_temperature_tuning, chunked_attention, where what a row sees depends"),
    ],
)
def test_a_refusal_says_why_and_what_works(name: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        wrap(families.tiny_model(name))


def test_a_model_that_never_runs_is_not_said_to_mix_users() -> None:
    model = llama().double()
    model.model.layers[0].mlp.forward = lambda hidden: hidden.float() @ hidden
    with pytest.raises(
        ValueError, match=r"a packed batch fails in it \(RuntimeError: .*; with 'sdpa' or 'eager' it fails"
    ):
        wrap(model)


def test_attentions_that_the_cpu_may_not_have_wait() -> None:
    with pytest.warns(UserWarning, match="first forward: 'flex_attention' attention may not run on the CPU"):
        wrap(llama(), attn_implementation="flex_attention")


def test_a_usual_construction_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(llama())
