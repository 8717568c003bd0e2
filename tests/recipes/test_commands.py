# SPDX-License-Identifier: Apache-2.0
"""Flags: one form, and an answer to a mistyped one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recipes.commands import Parser, check_writable, nearest


def parser() -> Parser:
    made = Parser(prog="recipe")
    made.add_argument("folder")
    made.add_argument("--data", required=True)
    made.add_argument("--num_beams", type=int, default=20)
    made.add_argument("--shift", type=float, default=0.0)
    return made


@pytest.mark.parametrize(
    ("given", "flag", "meant"),
    [
        (["runs", "--dta", "ml-100k"], "--dta", "--data"),  # and not: --data is required
        (["runs", "--data", "x", "--num-beams", "3"], "--num-beams", "--num_beams"),
        (["runs", "--data", "x", "--numbeams=3"], "--numbeams", "--num_beams"),
        (["runs", "--data", "x", "--num_beam", "3"], "--num_beam", "--num_beams"),  # in full
        (["runs", "-data", "x"], "-data", "--data"),
        (["--NUM_BEAMS", "3", "runs"], "--NUM_BEAMS", "--num_beams"),
        (["runs", "--halp"], "--halp", "--help"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_nearest(
    given: list[str], flag: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parser().parse_args(given)
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith(f"recipe: error: {flag}: expected {meant}?\n")


def test_a_flag_like_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["runs", "--data", "x", "--quux"])
    assert capsys.readouterr().err.endswith("--quux: expected a flag that --help lists\n")
    assert nearest("--quux", ["--data"]) is None


def test_what_only_looks_like_a_flag() -> None:
    args = parser().parse_args(["--data", "x", "--shift", "-1.5", "--", "--runs"])
    assert args.shift == -1.5 and args.folder == "--runs"


@dataclass
class Arguments:
    batch_size: int = field(default=3, metadata={"help": "samples"})
    drop_last: bool = True


def test_one_parser_with_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")

    class Both(Parser, transformers.HfArgumentParser):  # type: ignore[misc, name-defined]
        pass

    both = Both([Arguments])
    both.add_argument("--data")
    listed = both.format_help()
    assert (
        "--batch_size" in listed and "--data" in listed and "--batch-size" not in listed and "--drop-last" not in listed
    )
    assert both.parse_args(["--batch_size", "4", "--data", "x"]).batch_size == 4
    with pytest.raises(SystemExit):
        both.parse_args(["--batch-size", "4"])


def test_a_place_that_cannot_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder" / "users.csv", "--output")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"--output: expected a file, got a folder, '.*'"):
        check_writable(tmp_path, "--output")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--output: expected a place for users\.csv that can be written, got '.*/file'"):
        check_writable(tmp_path / "file" / "users.csv", "--output")
