# SPDX-License-Identifier: Apache-2.0
"""The pool of fed rows against attention over lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patchkern.search.suffixes import Suffixes, partial_softmax

HEADS, GROUPS, WIDTH, LAYERS = 2, 3, 4, 2
Row = tuple[int, Tensor, Tensor]  # parent, keys and values of all layers (LAYERS, HEADS, WIDTH)


def path_of(rows: list[Row], at: int) -> list[int]:
    path = []
    while at >= 0:
        path.append(at)
        at = rows[at][0]
    return path


@given(st.data())
def test_every_row_sees_those_on_its_way_to_the_prompt(data: st.DataObject) -> None:
    """Trees that grow by several rows at once, at any row, and lose rows now and then."""
    pool, rows = Suffixes(1000, torch.device("cpu")), list[Row]()
    for _ in range(data.draw(st.integers(1, 6))):
        count = data.draw(st.integers(1, 5))
        parents = [data.draw(st.integers(-1, len(rows) + new - 1)) for new in range(count)]
        query = torch.randn(LAYERS, count, HEADS, GROUPS, WIDTH, dtype=torch.float64)
        keys, values = torch.randn(2, LAYERS, count, HEADS, 1, WIDTH, dtype=torch.float64)
        rows += [(parent, keys[:, n, :, 0], values[:, n, :, 0]) for n, parent in enumerate(parents)]
        paths = [path_of(rows, len(rows) - count + n) for n in range(count)]
        longest = max(len(path) for path in paths)
        depth = data.draw(st.sampled_from([None, longest, longest + 2]))
        assert pool.advance(torch.tensor(parents), depth).tolist() == [len(path) for path in paths]
        assert pool.num_rows == len(rows)
        for layer in range(LAYERS):
            got = pool.partial(layer, query[layer], keys[layer], values[layer])
            if got is None:
                assert longest == 1
                continue
            out, _, total = got
            for n, path in enumerate(paths):
                if len(path) == 1:
                    assert not out[n].any() and not total[n].any()
                    continue
                seen = [torch.stack([rows[at][which][layer] for at in path[1:]], dim=1) for which in (1, 2)]
                expected = torch.nn.functional.scaled_dot_product_attention(query[layer, n], *seen, scale=1.0)
                torch.testing.assert_close(out[n] / total[n], expected, rtol=0, atol=1e-12)
        action = data.draw(st.sampled_from(["keep", "nothing", "forget"]))
        if action == "forget":
            pool.forget()
            rows = []
        elif action == "keep":
            wanted = data.draw(st.lists(st.integers(-1, len(rows) - 1), max_size=3))
            live = sorted({at for row in wanted for at in path_of(rows, row)})
            is_live = pool.live(torch.tensor(wanted, dtype=torch.int64), depth=longest + len(rows))
            assert is_live.nonzero()[:, 0].tolist() == live
            number = pool.keep(is_live, len(live))
            assert number[live].tolist() == list(range(len(live))) and int(number[-1]) == -1
            rows = [(int(number[parent]), k, v) for parent, k, v in (rows[at] for at in live)]


def test_memory_follows_what_is_kept() -> None:
    pool = Suffixes(100, torch.device("cpu"))
    row = torch.zeros(8, HEADS, 1, WIDTH)
    sizes = []
    for _ in range(6):
        pool.advance(torch.full((8,), -1), 1)
        pool.partial(0, row, row, row)
        sizes.append(pool._pool[0][0].shape[1])
    assert sizes == [8, 16, 32, 32, 64, 64]
    pool.keep(pool.live(torch.tensor([3, 40]), 1), 2)
    pool.advance(torch.full((8,), -1), 1)
    pool.partial(0, row, row, row)
    assert pool._pool[0][0].shape[1] == 10


def test_a_full_pool_is_an_error() -> None:
    pool = Suffixes(3, torch.device("cpu"))
    pool.advance(torch.tensor([-1, -1]), 1)
    with pytest.raises(ValueError, match="max_rows: expected at least 4, got 3"):
        pool.advance(torch.tensor([0, 1]), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_partial_softmax_is_at_least_single_precision(dtype: torch.dtype) -> None:
    query, keys, values = (torch.randn(2, 3, 4).to(dtype) for _ in range(3))
    out, peak, total = partial_softmax(query, keys, values, None)
    assert out.dtype == peak.dtype == total.dtype == torch.float32
    expected = torch.softmax(query.float() @ keys.float().mT, -1) @ values.float()
    torch.testing.assert_close(out / total, expected, rtol=0, atol=0.05 if dtype != torch.float32 else 1e-6)
