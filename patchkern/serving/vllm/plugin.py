# SPDX-License-Identifier: Apache-2.0
"""What vLLM finds by the entry point ``vllm.general_plugins``: names of models, whose classes it imports if needed."""

from __future__ import annotations

PREFIX = "Patchkern"
"""before an architecture's name: the same with items as tokens"""

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM")


def register() -> None:
    """Tell vLLM of the models of `patchkern.serving.vllm.models`, in each of its processes."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if PREFIX + name not in known:
            ModelRegistry.register_model(PREFIX + name, f"patchkern.serving.vllm.models:{PREFIX}{name}")
