# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong is reported in one form, `patchkern.serving.server.problems.Problem.content`."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from patchkern.serving.server.problems import Problem

_KINDS = {400: "malformed", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_long"}
_SHOWN = 20  # errors of one request
_LONGEST = 80  # letters of a field's name, which a client may have made up


def add_handlers(app: FastAPI) -> None:
    """Let ``app`` report problems, malformed bodies and what has no route."""
    app.add_exception_handler(Problem, _of_problem)
    app.add_exception_handler(RequestValidationError, _of_malformed)
    app.add_exception_handler(HTTPException, _of_http)


async def _of_problem(request: Request, error: Any) -> Response:
    return _response(error.status, error.content(), error.headers)


async def _of_malformed(request: Request, error: Any) -> Response:
    """FastAPI's own answer, without what was sent: it may be long, or nothing that JSON can hold."""
    detail = [
        {
            "loc": [part if isinstance(part, int) else part[:_LONGEST] for part in x["loc"]],
            "msg": x["msg"],
            "type": x["type"],
        }
        for x in error.errors()[:_SHOWN]
    ]
    return _response(422, {"detail": detail})


async def _of_http(request: Request, error: Any) -> Response:
    detail = [{"loc": [], "msg": str(error.detail), "type": _KINDS.get(error.status_code, "http")}]
    return _response(error.status_code, {"detail": detail}, error.headers)


def _response(status: int, content: dict[str, Any], headers: Any = None) -> Response:
    """In ASCII, for names may hold half of a character."""
    return Response(json.dumps(content), status, headers, media_type="application/json")
