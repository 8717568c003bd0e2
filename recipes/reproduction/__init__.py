# SPDX-License-Identifier: Apache-2.0
"""The parts of recipes/reproduce.py: what a table needs, what that costs, how it is run, and what it looks like."""
