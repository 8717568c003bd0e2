# SPDX-License-Identifier: Apache-2.0
"""Serving: users kept compressed, and the stores that keep them."""
