# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, in two kinds over the same workloads, providers and checks. A wrong provider is timed by neither.

**Scripts** (``python bench/bench_*.py``, all: ``make bench``) take minutes to an hour and measure what is published:
every provider once per round, ratios within a round, medians and quantiles into a tidy CSV. They write to runs/bench
and replace nothing; ``--output FILE`` names another place, and that file is replaced::

    python bench/bench_layout.py                                       # runs/bench/layout.csv, then layout-2.csv, ...
    python bench/bench_layout.py --output bench/results/layout.csv     # publish

**Suites** (``pytest bench/``, two minutes on one core) are small shapes on pytest-benchmark, to see before and after a
change whether it cost something: one group per operation and shape, in it one entry per provider. The data is made up,
so that it is the same everywhere::

    pytest bench/                                              # a table per group, with factors to its fastest
    pytest bench/ -k "attention and paired"
    pytest bench/ --benchmark-save=before                      # into .benchmarks; --benchmark-json=FILE for a file
    pytest bench/ --benchmark-compare                          # the saved run's entries beside the new ones
    pytest bench/ -k paired --benchmark-compare --benchmark-compare-fail=median:25%
    pytest bench/ --benchmark-disable                          # only the checks, and one call of each

``test_paired`` of each suite is for the last but one: its rounds call patchkern and a baseline one after the other,
and its time is the quotient of the two, in baselines: 0.25 is four times as fast, and OPS is the speed-up. What slows
a machine slows both, so this can be compared with a saved run where times alone cannot: with fourteen processes on two
cores most quotients repeated within 10 % and all within 25 %. The other entries can leave out what other processes took
by ``--benchmark-timer=time.thread_time``. Memory is as glibc keeps it, so that nobody pays for fresh pages.

Under pytest-xdist nothing can be timed: ``pytest bench/ -n 2`` is refused unless benchmarks are disabled.
"""
