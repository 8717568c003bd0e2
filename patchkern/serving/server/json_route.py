# SPDX-License-Identifier: Apache-2.0
"""A route for what is asked most: a body is read once and checked once, and an answer is written as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.requests import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json


class JsonRoute(APIRoute):
    """Its endpoint takes one pydantic model, the body, and returns what is sent as JSON, unchecked.

    FastAPI would look for further parameters in every request, and check what the endpoint made. What is wrong with a
    body is said in the form in which FastAPI says it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As of FastAPI."""
        hints, endpoint = get_type_hints(self.endpoint), self.endpoint
        hints.pop("return")
        ((name, kind),) = hints.items()

        async def handler(request: Request) -> Response:
            asked = _checked(kind, await request.body(), request.headers.get("content-type", ""))
            return Response(to_json(await endpoint(**{name: asked})), media_type="application/json")

        return handler


def _checked(kind: type[BaseModel], body: bytes, content_type: str) -> BaseModel:
    """What a body asks for.

    Raises:
        RequestValidationError, HTTPException: what is wrong with it; it cannot be decoded.
    """
    if not _is_json(content_type):
        got = repr(content_type) if content_type else "none"
        raise _wrong("content_type", f"expected the Content-Type application/json, got {got}", "header", "content-type")
    try:
        content = json.loads(body)
    except json.JSONDecodeError as error:
        raise _wrong("json_invalid", f"expected JSON: {error.msg}", "body", error.pos) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, thousands of brackets
        raise HTTPException(400, "There was an error parsing the body") from error
    if not isinstance(content, dict):
        raise _wrong("model_type", f"expected an object, got {type(content).__name__}", "body")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([dict(x, loc=("body", *x["loc"])) for x in wrong]) from error


def _wrong(kind: str, message: str, *loc: str | int) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": loc, "msg": message}])


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
