# SPDX-License-Identifier: Apache-2.0
"""What there is to do where a user's prompt has more positions than a model: the same under every policy."""

TOO_MANY = (
    "keep fewer items (max_items; under Experts, which keep all, cut the histories: Histories.latest), compress them "
    "more, or take a model with more positions"
)
"""the end of an error's sentence"""
