# SPDX-License-Identifier: Apache-2.0
"""Recommenders over item ids, trained well and ranked by the same code as patchkern's own: what it stands beside."""
