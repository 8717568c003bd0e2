# SPDX-License-Identifier: Apache-2.0
"""Steam's reviews and games as UCSD ships them: a Python dictionary, or a JSON object, per line; streamed.

The dictionaries are read as literals (`ast.literal_eval`): nothing in them is run.
"""

from __future__ import annotations

from datetime import date
from os import PathLike
from pathlib import Path
from typing import Any

from patchkern.batch.columns import MAX_ID_LENGTH
from patchkern.data._objects import integer_id, read_objects
from patchkern.data._rows import Rows
from patchkern.data._text import malformed, one_file
from patchkern.data._titles import Titles
from patchkern.data.interactions import Interactions
from patchkern.data.item_text import ItemText

SYSTEM = "You recommend video games."
INSTRUCTION = (
    "A user has played [HISTORY_SEQUENCE]. Name one game for this user to play next: its title only, no explanation."
)
REVIEWS_FILES = ("steam_reviews.json", "steam_reviews.json.gz")
GAMES_FILES = ("steam_games.json", "steam_games.json.gz")

_EPOCH = date(1970, 1, 1)


def read_steam(
    path: str | PathLike[str],
    games: str | PathLike[str] | None = None,
    *,
    user_field: str = "username",
    item_text: str | None = None,
    tie_seed: int | None = 0,
) -> Interactions:
    """Read reviews, which say who played what, and the games' titles (``title``, else ``app_name``).

    Both files are streamed: memory holds some 24 bytes per review, the ids and the titles of the games that occur. Ids
    of games become integers. There are no ratings. Times are days, so many of a user's reviews share theirs: their
    order is drawn. Reviews of games without title, or that the other file lacks, are left out; how many is logged.

    Args:
        path: a folder with ``steam_reviews.json[.gz]`` and ``steam_games.json[.gz]``, or the file of reviews.
        games: the file of games; None: the one beside the reviews.
        user_field: ``username``, or ``user_id``, which some reviews lack. Reviews without are left out.
        item_text: what a model reads of a game, such as "title (developer, genres)": fields of the file of games, see
            `Interactions.texts`.
        tie_seed: of the order within one day, see `Interactions.from_columns`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a malformed line, with its file and number; several files that match.
    """
    reviews_file, games_file = _files(Path(path), games)
    rows = Rows(reviews_file, rated=False)
    anonymous = 0
    expected = f"an object with text as {user_field}, an integer product_id and a date like '2017-12-17'"
    for number, record in read_objects(reviews_file, (user_field, "product_id", "date"), python=True):
        user = record.get(user_field)
        if user is None or user == "":
            anonymous += 1
            continue
        try:
            item = integer_id("product_id", record["product_id"])
            days = (date.fromisoformat(record["date"]) - _EPOCH).days
        except (KeyError, TypeError, ValueError) as error:
            malformed(reviews_file, number, expected, f"{type(error).__name__}: {error}")
        # a name that somebody chose may begin with a space
        if not isinstance(user, str) or len(user) > MAX_ID_LENGTH:
            malformed(reviews_file, number, expected, repr(user))
        rows.add(user, item, 86_400 * days)
    titles = Titles(games_file, ItemText.parse(item_text))
    for number, record in read_objects(games_file, ("id", "title", "app_name"), python=True):
        if "id" not in record:
            continue
        try:
            game = integer_id("id", record["id"])
        except (TypeError, ValueError) as error:
            malformed(games_file, number, "an integer id", str(error))
        if game in rows.items:
            titles.add(number, game, _title(games_file, number, record), record)
    left_out = {f"without {user_field}": anonymous}
    return rows.interactions(titles, "s", tie_seed, left_out, name="steam", system=SYSTEM, instruction=INSTRUCTION)


def is_steam(path: Path) -> bool:
    """Whether a folder, or a file of reviews, is of this format."""
    if path.is_dir():
        return one_file(path, REVIEWS_FILES) is not None
    return path.name in REVIEWS_FILES


def _files(path: Path, games: str | PathLike[str] | None) -> tuple[Path, Path]:
    reviews_file = path if path.is_file() else one_file(path, REVIEWS_FILES)
    if reviews_file is None:
        raise FileNotFoundError(f"{path}: expected {' or '.join(REVIEWS_FILES)}, found none")
    games_file = Path(games) if games is not None else one_file(reviews_file.parent, GAMES_FILES)
    if games_file is None or not games_file.is_file():
        where = games_file or reviews_file.parent
        raise FileNotFoundError(f"{where}: expected the games, {' or '.join(GAMES_FILES)}, found none")
    return reviews_file, games_file


def _title(path: Path, number: int, record: dict[str, Any]) -> str:
    for name in ("title", "app_name"):
        title = record.get(name)
        if not (title is None or isinstance(title, str)):
            malformed(path, number, f"text as {name}", repr(title))
        if title and title.strip():
            return " ".join(title.split())
    return ""
