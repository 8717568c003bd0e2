# SPDX-License-Identifier: Apache-2.0
"""Small shapes on pytest-benchmark: ``pytest bench/``. How to run, save and compare them: the docstring of `bench`."""
