# SPDX-License-Identifier: Apache-2.0
"""Items as tokens of vLLM: an exported folder, the plugin that serves it there, and a client. vLLM is never imported
but by vLLM itself."""
