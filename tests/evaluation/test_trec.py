# SPDX-License-Identifier: Apache-2.0
"""Files of TREC, line by line; with ranx, where it is installed, the same numbers from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchkern as pk
from patchkern.evaluation import evaluate, write_qrels, write_run


def test_lines(tmp_path: Path) -> None:
    write_run(tmp_path / "new" / "run", [[("b", -1.0), ("a", -1.0)], [], ["c"]], ["u1", "u2", "u3"], "mine")
    assert (tmp_path / "new" / "run").read_text() == ("u1 Q0 b 1 1 mine\nu1 Q0 a 2 0.5 mine\nu3 Q0 c 1 1 mine\n")
    write_qrels(tmp_path / "qrels", np.array([4, 5]))
    assert (tmp_path / "qrels").read_text() == "0 0 4 1\n1 0 5 1\n"
    write_qrels(tmp_path / "qrels", [["b", "c"], ["a"]], np.array([7, 8]))
    assert (tmp_path / "qrels").read_text() == "7 0 b 1\n7 0 c 1\n8 0 a 1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "qrels"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([["a b"]],), "items: expected ids without white space for a file of TREC, got 'a b'"),
        (([[" a"]],), "items: expected ids without white space"),
        (([["a"]], ["u 1"]), "queries: expected ids without white space"),
        (([["a"], ["b"]], ["u"]), "queries: expected 2 distinct ids, one per list, got 1"),
        (([["a"], ["b"]], ["u", "u"]), "queries: expected 2 distinct ids, one per list, got 1"),
        (([["a"]], ["u"], ""), "tag: expected ids without white space"),
        (
            ([["a", "b", "a"]],),
            r"recommendations\[0\]: expected distinct items, as a run ranks each once, got 'a' again",
        ),
    ],
)
def test_what_the_format_has_no_room_for(tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_run(tmp_path / "run", *arguments)
    assert not list(tmp_path.iterdir())


def test_scores_fall_in_lists_of_any_length(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [range(100_000)])
    scores = [line.split()[4] for line in (tmp_path / "run").read_text().splitlines()]
    assert (np.diff(np.array(scores, np.float32)) < 0).all()  # as narrow as some tools read them


def test_an_id_is_no_list_of_its_letters(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"recommendations\[1\]: expected a list of items, got str"):
        write_run(tmp_path / "run", [["tt1"], "tt2"])


def test_ids_are_ids(tmp_path: Path) -> None:
    write_qrels(tmp_path / "qrels", torch.tensor([4, 5]))
    assert (tmp_path / "qrels").read_text() == "0 0 4 1\n1 0 5 1\n"
    write_qrels(tmp_path / "qrels", torch.tensor([[4, 5]]))
    assert (tmp_path / "qrels").read_text() == "0 0 4 1\n0 0 5 1\n"
    for targets in ([None, "a"], [4.0], [["a"], [4]]):
        with pytest.raises(TypeError, match=r"targets.*: expected"):
            write_qrels(tmp_path / "qrels", targets)
    for lists in ([[4], torch.tensor([4])], [[4], [None]], [[4], [1.5]]):
        with pytest.raises(TypeError, match=r"recommendations\[1\]: expected all integers or all strings"):
            write_run(tmp_path / "run", lists)
    assert [path.name for path in tmp_path.iterdir()] == ["qrels"]


@pytest.mark.parametrize("several", [False, True])
def test_ranx_counts_the_same(tmp_path: Path, several: bool) -> None:
    ranx = pytest.importorskip("ranx", reason="needs ranx")
    rng = np.random.default_rng(0)
    catalog = pk.Catalog.from_token_ids(np.arange(30), np.arange(31))
    lists = [rng.permutation(30)[: rng.integers(1, 25)].tolist() for _ in range(40)]
    targets: Any = [rng.permutation(30)[: rng.integers(1, 8)].tolist() for _ in range(40)]
    if not several:
        targets = [row[0] for row in targets]
    write_run(tmp_path / "run", lists)
    write_qrels(tmp_path / "qrels", targets)
    found = evaluate(lists, targets, (5, 20), catalog=catalog)
    names = {"hit_rate": "HR", "ndcg": "NDCG", "mrr": "MRR", "recall": "Recall"}
    theirs = ranx.evaluate(
        ranx.Qrels.from_file(str(tmp_path / "qrels"), kind="trec"),
        ranx.Run.from_file(str(tmp_path / "run"), kind="trec"),
        [f"{name}@{k}" for name in names for k in (5, 20)],
        make_comparable=True,
    )
    ours = {name: value for name, value in found.as_dict().items() if not name.endswith("±")}
    ours |= {f"Recall@{k}": found.recall(k) for k in (5, 20)}
    assert ours == pytest.approx({f"{names[name.partition('@')[0]]}@{name.partition('@')[2]}": value
                                  for name, value in theirs.items()})  # fmt: skip
