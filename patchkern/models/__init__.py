# SPDX-License-Identifier: Apache-2.0
"""Models that read compressed histories, their files, and their registration with transformers."""
