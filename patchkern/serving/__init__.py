# SPDX-License-Identifier: Apache-2.0
"""Serving: engines that others keep, and what trained models need there."""
