# SPDX-License-Identifier: Apache-2.0
"""What recipes share of command lines: flags have one form, and a mistyped one is answered with the nearest."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose flags are written with underscores, in full.

    A flag that it does not know is refused with the nearest one that it does, before anything is asked of the others:
    ``--dta ml-100k`` is not answered with a missing ``--data``. Of several spellings that `add_argument` is given, as
    transformers does, those with dashes are left out: ``class TrainingParser(Parser, HfArgumentParser)`` is one parser
    for a recipe's own flags and those of its dataclasses.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(*arguments, **options)

    def add_argument(self, *names: str, **options: Any) -> Any:
        return super().add_argument(*(name for name in names if not re.match("--.*-", name)), **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown(given)
        return super().parse_known_args(given, namespace)

    def _refuse_unknown(self, given: Sequence[str]) -> None:
        """Exit with an error if one of the flags is not known."""
        for argument in given:
            if argument == "--":
                return
            flag = argument.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][\w-]*", flag) and flag not in self._option_string_actions:
                near = nearest(flag, self._option_string_actions)
                self.error(f"{flag}: expected {f'{near}?' if near else 'a flag that --help lists'}")


def as_flags(chosen: Mapping[str, Any]) -> list[str]:
    """For another recipe's command line; None is not given."""
    return [part for name, value in chosen.items() if value is not None for part in (f"--{name}", str(value))]


def data_flags(args: argparse.Namespace) -> list[str]:
    """Those of `patchkern.data.preparation.add_arguments`, as they were given."""
    names = ("data", "min_rating", "min_interactions", "k_core", "split_by")
    return as_flags({name: getattr(args, name) for name in names})


def check_writable(path: Path, argument: str) -> None:
    """Raise an OSError where the file could not be written, which is better known before the work."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{argument}: expected a file, got a folder, {os.fspath(path)!r}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"{argument}: expected a place for {path.name} that can be written, got {os.fspath(path.parent)!r}"
        raise type(error)(error.errno, f"{message}: {error.strerror}") from error


def nearest(flag: str, known: Iterable[str]) -> str | None:
    """The flag that was probably meant, None where none is like it."""
    words = {name.lstrip("-"): name for name in known if name.startswith("--")}
    found = get_close_matches(flag.lstrip("-").replace("-", "_").lower(), words, n=1)
    return words[found[0]] if found else None
