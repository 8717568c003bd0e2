# SPDX-License-Identifier: Apache-2.0
"""The routes."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response

import patchkern
from patchkern.serving.server.error_handlers import add_handlers
from patchkern.serving.server.jobs import Loc
from patchkern.serving.server.json_route import JsonRoute
from patchkern.serving.server.middleware import BodyLimit, Measured
from patchkern.serving.server.problems import Forbidden, Invalid
from patchkern.serving.server.schema import About, Answer, Answers, Asked, AskedForSeveral, Item, Items, Weighted
from patchkern.serving.server.service import Service

_METRICS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(service: Service, admin_token: str | None = None) -> FastAPI:
    """The application of a service; it starts the service and closes it.

    Args:
        service: not started yet.
        admin_token: with which ``/admin/reload`` is called; None: the route does not exist.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="patchkern",
        version=patchkern.__version__,
        lifespan=lifespan,
        docs_url=None,  # these two load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, max_bytes=service.limits.body_bytes, seconds=service.limits.timeout)
    app.add_middleware(Measured, metrics=service.metrics)
    add_handlers(app)
    _add_recommendations(app, service)
    _add_catalog(app, service)
    _add_operations(app, service)
    if admin_token is not None:
        _add_admin(app, service, admin_token)
    _add_page(app)
    return app


def _add_recommendations(app: FastAPI, service: Service) -> None:
    async def recommend(asked: Asked) -> Answer:
        """Items for one user, best first."""
        (answer,) = await service.answers([asked], [("body",)])
        return answer

    async def recommend_to_several(asked: AskedForSeveral) -> Answers:
        """Items for several users; if one request is wrong, all are refused."""
        most = service.limits.max_users
        if len(asked.users) > most:
            raise Invalid(f"expected at most {most}, got {len(asked.users)}", ("body", "users"))
        locs: list[Loc] = [("body", "users", place) for place in range(len(asked.users))]
        return {"users": await service.answers(asked.users, locs)}

    for path, endpoint in (("/v1/recommend", recommend), ("/v1/recommend:batch", recommend_to_several)):
        app.router.add_api_route(path, endpoint, methods=["POST"], route_class_override=JsonRoute)


def _add_catalog(app: FastAPI, service: Service) -> None:
    @app.get("/v1/items")
    def items(
        query: Annotated[str, Query(max_length=200)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 10,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> Items:
        """Items by their titles: those with all words of ``query``; without one, all in catalogue order."""
        served = service.served
        total = len(served.titles)
        if query.strip():
            places = served.index.search(query, min(offset + limit, total))[offset:]
        else:
            places = list(range(min(offset, total), min(offset + limit, total)))
        ids = served.model.catalog.item_ids
        return Items(items=[Item(item=ids.item(at), title=served.titles[at]) for at in places], total=total)

    @app.get("/v1/model")
    def model() -> About:
        """What is served, and within which limits."""
        served, limits = service.served, service.limits
        return About(
            model=served.number,
            kind=type(served.model).__name__,
            policy=str(served.policy),
            items=len(served.titles),
            catalog=served.model.catalog.fingerprint,
            searches=list(served.searches),
            search=served.search,
            priors=[
                Weighted(kind=type(prior).__name__, weight=weight) for prior, weight in zip(*served.priors, strict=True)
            ],
            max_history=limits.max_history,
            max_k=limits.max_k,
            max_beams=limits.max_beams,
            max_users=limits.max_users,
        )


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", include_in_schema=False)
    async def health() -> JSONResponse:
        """Whether the process should go on."""
        sick = service.sick
        return JSONResponse({"status": sick or "ok"}, 503 if sick else 200)

    @app.get("/ready", include_in_schema=False)
    async def ready() -> JSONResponse:
        """Whether requests should be sent here."""
        why_not = service.sick or service.full
        return JSONResponse({"status": why_not or "ok"}, 503 if why_not else 200)

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=_METRICS)


def _add_admin(app: FastAPI, service: Service, token: str) -> None:
    @app.post("/admin/reload", include_in_schema=False)
    async def reload(authorization: Annotated[str, Header()] = "") -> dict[str, Any]:
        """Read model and catalogue again."""
        if not secrets.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise Forbidden("expected the administrator's token: Authorization: Bearer TOKEN")
        served = await service.reload()
        return {"model": served.number, "items": len(served.titles), "catalog": served.model.catalog.fingerprint}


def _add_page(app: FastAPI) -> None:
    page = resources.files("patchkern.serving.server").joinpath("page.html").read_text(encoding="utf-8")
    sources = "; ".join(
        f"{kind}-src {' '.join(_hash(text) for text in re.findall(rf'<{tag}>(.*?)</{tag}>', page, re.DOTALL))}"
        for kind, tag in (("script", "script"), ("style", "style"))
    )
    policy = f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; {sources}"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        """For people."""
        return HTMLResponse(page, headers=headers)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
