# SPDX-License-Identifier: Apache-2.0
"""Trained models at work: an HTTP server, users kept compressed, and engines that others keep."""
