# SPDX-License-Identifier: Apache-2.0
"""Recommending: the titles of a catalogue searched with a model. Knows what a model must have, not any model."""
