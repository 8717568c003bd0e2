# SPDX-License-Identifier: Apache-2.0
"""What goes over the wire: what is asked is checked, what is answered is made here and only described."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from typing_extensions import NotRequired, TypedDict

# Ids are checked against the catalogue, which alone knows of which kind they are.
ItemId = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]})]


class Asked(BaseModel):
    """One user."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    history: list[ItemId] | None = Field(None, description="item ids, oldest first")
    titles: list[str] | None = Field(None, description="titles of the catalogue in place of a history's ids")
    timestamps: list[float] | None = Field(None, description="seconds, one per item, for policies that go by time")
    user_id: int | Annotated[str, Field(max_length=256)] | None = Field(
        None, description="whose prompt is kept for the next request, where any are"
    )
    k: int = Field(20, ge=1, description="items to recommend")
    search: Literal["items", "beam"] | None = Field(None, description="the server's own where not given")
    num_beams: int | None = Field(None, ge=1, description="hypotheses of a beam search; 20, or k if that is more")
    exclude_seen: bool = Field(False, description="leave out the items of the history")
    allowed_items: list[ItemId] | None = Field(None, description="recommend these only")
    unknown: Literal["error", "drop"] = Field("error", description="what happens to ids that the catalogue lacks")
    explain: bool = Field(False, description="also say how the history was compressed")


class AskedForSeveral(BaseModel):
    """Several users, each with options of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    users: list[Asked] = Field(min_length=1)


class Item(TypedDict):
    """An item of the catalogue."""

    item: int | str
    title: str


class Recommended(Item):
    """An item, and the log-probability that the model gives it, with what priors add to it."""

    score: float


class Entry(BaseModel):
    """A part of a history, and what stands for it.

    Attributes:
        kind: "text", a title's tokens; "item", one row; "session", one row for several items; "memory", learned rows
            for all that is old; "dropped", none.
        rows: that the model reads.
        tokens: of the titles.
    """

    kind: Literal["text", "item", "session", "memory", "dropped"]
    rows: int
    tokens: int
    items: list[Item]


class Compressed(BaseModel):
    """How a history was compressed.

    Attributes:
        items: that were kept, of ``given``.
        tokens: of their titles.
        rows: that stand for them.
        ratio: tokens / rows.
        prompt_rows: of the whole prompt of the server's own search, with separators and what is around the history.
    """

    given: int
    items: int
    tokens: int
    rows: int
    ratio: float
    prompt_rows: int
    entries: list[Entry]


class Answer(TypedDict):
    """For one user.

    Attributes:
        items: best first; fewer than were asked for where no more are left.
        dropped: items of ``history`` and ``allowed_items`` that the catalogue lacks.
        model: number of the model that answered, which grows with every reload.
    """

    items: list[Recommended]
    dropped: int
    model: int
    history: NotRequired[Compressed]


class Answers(TypedDict):
    """For several users, in their order."""

    users: list[Answer]


class Items(BaseModel):
    """Items of the catalogue, and how many it has."""

    items: list[Item]
    total: int


class Weighted(BaseModel):
    """A prior, and how much it counts."""

    kind: str
    weight: float


class About(BaseModel):
    """What is served."""

    model: int
    kind: str
    policy: str
    items: int
    catalog: str
    searches: list[str]
    search: str
    priors: list[Weighted]
    max_history: int
    max_k: int
    max_beams: int
    max_users: int
