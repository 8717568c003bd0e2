# SPDX-License-Identifier: Apache-2.0
"""Training: settings, passes, collators, the trainer, validation."""
