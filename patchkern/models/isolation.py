# SPDX-License-Identifier: Apache-2.0
"""Which models keep the users of a packed batch apart, and which layouts they may take.

A packed batch is right only if every row sees exactly the rows that it would see were its user alone. That takes a
model that restarts positions and masks where ``position_ids`` do, and carries nothing else from row to row. Many do
not, and none says so: recurrent and convolutional layers run on into the next user, ALiBi and learned positions count
the rows of the batch, masks made without ``position_ids`` let users see each other. So a model is asked when it is
wrapped, by what it is and by a probe (`patchkern.models.probe`), and a layout before it is computed.
"""

from __future__ import annotations

import threading
import warnings

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PretrainedConfig, PreTrainedModel

from patchkern.batch.layout import PatchLayout
from patchkern.models import attention
from patchkern.models.positions import TOO_MANY
from patchkern.models.probe import NotYet, Refused, base_of, implementation_of, is_sharded, probe

EVERYWHERE = (attention.NAME, "sdpa", "eager")
"""attention implementations that run on every device"""

# What a layer sees must not depend on where in a batch its rows lie, also beyond the few rows of a probe. Others chunk
# or block rows from the batch's beginning, or pick the best keys: rows of equal tokens tie, and their place decides.
_KNOWN_ATTENTION = {"full_attention", "sliding_attention"}
_PLACES = ("attn_temperature_tuning", "keep_window_size")  # settings of the same kind
# These carry a state, or mix no rows: a few rows show all they do.
_KNOWN_OTHERS = {"linear_attention", "mamba", "conv", "recurrent", "hybrid", "hybrid_sliding", "moe", "mlp"}

# One model at a time: a probe sets training mode and hooks aside, and puts back what it found.
_LOCK = threading.Lock()


class Isolation:
    """What is known of a model: per attention implementation, device and dtype, whether it also computes branches.

    Refuses a model that does not keep users apart. One that cannot run yet (meta tensors, sharded parameters, an
    attention that its device may not have) is asked at its first forward, and a warning says so.

    Args:
        hf_model: left as it is where it is refused.
        attn_implementation: set on ``hf_model``; None leaves its own.

    Raises:
        ValueError: with the reason, and the attention implementations with which it would keep them apart.
    """

    def __init__(self, hf_model: PreTrainedModel, attn_implementation: str | None = None) -> None:
        self._no_branches: dict[tuple[str, str, torch.dtype], str | None] = {}
        kept = implementation_of(hf_model)
        try:
            _check_kind(base_of(hf_model))
            if attn_implementation is not None:
                _set_attention(hf_model, attn_implementation)
            reason = _why_wait(hf_model, hf_model.device)
            if reason is None:
                self._ask(hf_model, hf_model.device)
        except NotYet as error:
            reason = str(error)
        except ValueError:
            if implementation_of(hf_model) != kept:
                hf_model.set_attn_implementation(kept)
            raise
        if reason is not None:
            name = type(base_of(hf_model)).__name__
            warnings.warn(f"whether {name} keeps users apart is asked at its first forward: {reason}", stacklevel=3)

    def check(self, hf_model: PreTrainedModel, device: torch.device) -> None:
        """Ask again where attention, device or dtype are others than before; cheap where they are not.

        Raises:
            ValueError: as the constructor.
        """
        if torch.compiler.is_compiling() or device.type == "meta" or _key(hf_model, device) in self._no_branches:
            return
        try:
            self._ask(hf_model, device)
        except NotYet:  # not a number: nothing can be seen, and nothing is hidden, for the loss is none either
            self._no_branches[_key(hf_model, device)] = None

    def check_layout(self, hf_model: PreTrainedModel, layout: PatchLayout, rows: Tensor) -> None:
        """Refuse a layout, of which ``rows`` are the embeddings, that would not be computed as its users alone are.

        Raises:
            ValueError: as the constructor; spans with prefixes where branches differ from their samples; users on both
                sides of the length at which the model's positions change.
        """
        if not isinstance(rows, FakeTensor):
            self.check(hf_model, rows.device)
        base = base_of(hf_model)
        if layout.prefix is not None:
            name = implementation_of(hf_model)
            if name != attention.NAME:
                raise ValueError(
                    f"layout: expected spans without prefixes for {name!r} attention, which would not see them; choose "
                    f"attn_implementation={attention.NAME!r}"
                )
            if reason := self._no_branches.get(_key(hf_model, rows.device)):
                raise ValueError(
                    f"layout: expected spans without prefixes for {type(base).__name__}: {reason}; give every target a "
                    "sample of its own (build_layout)"
                )
        original = _longrope(base.config.get_text_config())
        if original is None or layout.max_position < original:
            return
        lengths = _sample_lengths(layout)
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest <= original < longest:
            raise ValueError(
                f"layout: expected users who are all within or all beyond {original} rows, where the positions of "
                f"{base.config.model_type} (longrope) change for the whole batch, got {shortest} and {longest} rows; "
                "keep fewer items (max_items), or put longer users into batches of their own"
            )

    def takes_branches(self, hf_model: PreTrainedModel) -> bool:
        """Would `check_layout` let spans with prefixes pass, on the device that the model is on?"""
        self.check(hf_model, hf_model.device)
        return implementation_of(hf_model) == attention.NAME and not self._no_branches.get(
            _key(hf_model, hf_model.device)
        )

    def check_search(self, hf_model: PreTrainedModel, layout: PatchLayout, depth: int) -> None:
        """Refuse a search over the prompts of a layout and titles of up to ``depth`` tokens.

        A search keeps keys and values and feeds titles token by token, so it asks for more than a forward does.

        Raises:
            ValueError: naming what of the model or the prompts is in the way.
        """
        config = base_of(hf_model).config.get_text_config()
        if layout.num_users and int(layout.prompts.diff().min()) == 0:
            raise ValueError("histories: expected at least one row per user to predict from, got a user without rows")
        # nothing follows the last token, so it is never fed
        rows, positions = layout.max_seqlen + layout.max_prefix + depth - 1, layout.max_position + depth
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and positions > limit:
            raise ValueError(
                f"histories: expected at most {limit} rows per user and title, the positions of {config.model_type}, "
                f"got {layout.max_position + 1} rows and titles of up to {depth} tokens; {TOO_MANY}"
            )
        kinds = _layer_types(config) or {"sliding_attention"}
        if unknown := kinds - _KNOWN_ATTENTION:
            raise ValueError(f"model: search needs full attention in every layer, got {', '.join(sorted(unknown))}")
        window = getattr(config, "sliding_window", None)
        if window is not None and "sliding_attention" in kinds and rows > window:
            raise ValueError(f"model: search needs full attention, got {rows} rows and a sliding window of {window}")
        original = _longrope(config)
        if original is not None and positions > original:
            raise ValueError(
                f"model: search needs positions that mean the same in prompts of any length, got {positions} rows and "
                f"longrope beyond {original}"
            )
        self.check(hf_model, hf_model.device)
        if reason := self._no_branches.get(_key(hf_model, hf_model.device)):
            name = type(base_of(hf_model)).__name__
            raise ValueError(f"model: search needs hypotheses that share their user's prompt; with {name}, {reason}")

    def _ask(self, hf_model: PreTrainedModel, device: torch.device) -> None:
        key = _key(hf_model, device)
        with _LOCK:
            if key in self._no_branches:
                return
            try:
                self._no_branches[key] = probe(hf_model, device)
            except Refused as error:
                advice = "" if is_sharded(hf_model) else _advice(hf_model, device)
                raise ValueError(
                    "hf_model: expected a model that keeps the users of a packed batch apart, which "
                    f"{type(base_of(hf_model)).__name__} with {implementation_of(hf_model)!r} attention does not: "
                    f"{error}{advice}"
                ) from error.__cause__


def _set_attention(hf_model: PreTrainedModel, name: str) -> None:
    kept = implementation_of(hf_model)
    reason = f"{type(base_of(hf_model)).__name__} keeps {kept!r}"
    cause: Exception | None = None
    try:
        hf_model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:  # the model's own refusal
        cause = error
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
    if implementation_of(hf_model) != name:
        advice = "" if _why_wait(hf_model, hf_model.device) else _advice(hf_model, hf_model.device, refused=name)
        message = f"attn_implementation: expected one that the model takes, got {name!r}: {reason}{advice}"
        raise ValueError(message) from cause


def _advice(hf_model: PreTrainedModel, device: torch.device, refused: str | None = None) -> str:
    """The end of a refusal: with which attention implementations the model keeps users apart, each tried."""
    now = implementation_of(hf_model)
    others = [name for name in EVERYWHERE if name != (refused or now)]
    works: dict[str, bool] = {}  # whether also with branches
    fails: list[bool] = []
    for name in others:
        try:
            hf_model.set_attn_implementation(name)
            if implementation_of(hf_model) == name:
                works[name] = probe(hf_model, device) is None and name == attention.NAME
        except (Refused, NotYet, ValueError, ImportError) as error:
            fails.append(isinstance(error, Refused) and error.__cause__ is not None)
        finally:
            hf_model.set_attn_implementation(now)
    if not works:
        names = " or ".join(map(repr, others))
        if fails and all(fails):
            return f"; with {names} it fails as well"
        return f"; with {names} users are not kept apart; docs/models.md lists the model families where they are"
    less = "" if any(works.values()) else ", without branches and without searches"
    return f"; attn_implementation={' or '.join(map(repr, works))} keeps users apart{less}"


# ------------------------------------------------------------------ what a model is


def _check_kind(base: PreTrainedModel) -> None:
    config = base.config.get_text_config()
    unknown = _layer_types(config) - _KNOWN_ATTENTION - _KNOWN_OTHERS
    unknown |= {type(module).__name__ for module in base.modules() if "Indexer" in type(module).__name__}
    unknown |= {name for name in _PLACES if getattr(config, name, None)}
    if unknown:
        raise ValueError(
            f"hf_model: expected a model that keeps the users of a packed batch apart, got {type(base).__name__} with "
            f"{', '.join(sorted(unknown))}, where what a row sees depends on its place in the batch; docs/models.md "
            "lists the model families that do"
        )


def _layer_types(config: PretrainedConfig) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _longrope(config: PretrainedConfig) -> int | None:
    """The length beyond which longrope rotates all rows of a batch in another way; None without longrope."""
    rope = getattr(config, "rope_parameters", None) or {}
    per_kind = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    limits = [kind["original_max_position_embeddings"] for kind in per_kind if kind.get("rope_type") == "longrope"]
    return min(limits, default=None)


def _sample_lengths(layout: PatchLayout) -> Tensor:
    """(n,) rows of each user or sample, with those of its prefix; a trunk is no sample of its own."""
    own = layout.cu_seqlens.diff()
    if layout.ranges is None:
        return own[own > 0]
    begin, end = layout.ranges.unbind(2)
    is_trunk = torch.isin(layout.cu_seqlens[:-1], begin[begin < end])
    ends = layout.cu_seqlens[1:].long()[(own > 0) & ~is_trunk]
    return layout.position_ids[ends - 1] + 1


def _why_wait(hf_model: PreTrainedModel, device: torch.device) -> str | None:
    """Why the model cannot be probed before its first forward; None where it can."""
    if any(parameter.is_meta for parameter in hf_model.parameters()):
        return "it has parameters on the meta device"
    if is_sharded(hf_model):
        return "its parameters are sharded"
    name = implementation_of(hf_model)
    if device.type == "cpu" and name not in EVERYWHERE:
        return f"{name!r} attention may not run on the CPU"
    return None


def _key(hf_model: PreTrainedModel, device: torch.device) -> tuple[str, str, torch.dtype]:
    return implementation_of(hf_model), device.type, hf_model.dtype
