# SPDX-License-Identifier: Apache-2.0
"""The planner in use: C++ where it was built, NumPy elsewhere. Both give the same integers."""

from types import ModuleType

from patchkern.batch import planning

active: ModuleType = planning
"""`planning` or `planning_native`: ``plan_rows`` and ``transpose_rows``."""

try:
    from patchkern.batch import planning_native
except ImportError:
    pass
else:
    active = planning_native
