# SPDX-License-Identifier: Apache-2.0
"""What a client can be told instead of an answer."""

from __future__ import annotations

from typing import Any


class Problem(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        kind: one word for programs.
        loc: the field that it is about, as a path into the request; empty for the request as a whole.
        headers: to send along.
    """

    status = 500
    kind = "internal"

    def __init__(self, message: str, loc: tuple[str | int, ...] = (), headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.loc = loc
        self.headers = headers or {}

    def content(self) -> dict[str, Any]:
        """In the form in which FastAPI reports a malformed body, so that clients need to know one."""
        return {"detail": [{"loc": list(self.loc), "msg": str(self), "type": self.kind}]}


class Invalid(Problem):
    """A field has a value that the model cannot take."""

    status, kind = 422, "invalid"


class Overloaded(Problem):
    """Too many users wait."""

    status, kind = 503, "overloaded"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class Closing(Problem):
    """The server is shutting down."""

    status, kind = 503, "closing"


class TooSlow(Problem):
    """There was no answer in time."""

    status, kind = 504, "timeout"


class Busy(Problem):
    """A reload is under way already."""

    status, kind = 409, "busy"


class NotReloaded(Problem):
    """The new model or catalogue could not be read; the old one goes on."""

    status, kind = 500, "not_reloaded"


class Forbidden(Problem):
    """Not without the administrator's token."""

    status, kind = 403, "forbidden"
