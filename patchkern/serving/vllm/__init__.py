# SPDX-License-Identifier: Apache-2.0
"""Items as tokens of vLLM: an exported folder, the plugin that serves it there, and a client.

vLLM is imported by `models` and `masks` alone, which it imports itself.
"""

from patchkern.serving.vllm.client import ServerError, VllmClient
from patchkern.serving.vllm.export import export_model
from patchkern.serving.vllm.item_tokens import item_token_ids
from patchkern.serving.vllm.prompt_rows import PromptRows, as_prompt_embeds
from patchkern.serving.vllm.requests import request_args
from patchkern.serving.vllm.served import Served, read_served

__all__ = [
    "PromptRows",
    "Served",
    "ServerError",
    "VllmClient",
    "as_prompt_embeds",
    "export_model",
    "item_token_ids",
    "read_served",
    "request_args",
]
