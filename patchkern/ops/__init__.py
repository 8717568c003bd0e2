# SPDX-License-Identifier: Apache-2.0
"""Ops: each is a reference, an autograd function, a dispatch and its backends."""
