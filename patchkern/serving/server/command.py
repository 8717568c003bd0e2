# SPDX-License-Identifier: Apache-2.0
"""``python -m patchkern.serving serve RUN``: a model's recommendations over HTTP, with a page to try them at ``/``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkern.budget.search import parse_bytes
from patchkern.serving.server.address import check_address
from patchkern.serving.server.limits import Limits

if TYPE_CHECKING:
    from patchkern.serving.server.service import Service

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_LIMITS = Limits()
_SWITCH_INTERVAL = 0.0005  # seconds: Python's own 5 ms is how long the thread that computes would let answers wait


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reads model and catalogue again."""
    args = _parser().parse_args(argv)
    try:
        limits = Limits(
            max_body=args.max_body,
            max_history=args.max_history,
            max_k=args.max_k,
            max_beams=args.max_beams,
            max_users=args.max_users,
            max_waiting=args.max_waiting,
            max_batch=args.max_batch,
            memory_budget=args.memory_budget,
            timeout=args.timeout,
        )
        cache_bytes = 0 if args.cache is None else parse_bytes("cache", args.cache)
        states_bytes = None if args.states_bytes is None else parse_bytes("states_bytes", args.states_bytes)
        token = None if args.admin_token_file is None else _token(args.admin_token_file)
        if limits.budget is not None and cache_bytes >= limits.budget:
            raise ValueError(f"cache: expected less than memory_budget ({limits.budget}), got {cache_bytes} bytes")
        if states_bytes is not None and args.states is None:
            raise ValueError("states_bytes: expected with states, a place where users are kept, got none")
        if args.renamed == "allow" and args.catalog is None:
            raise ValueError('renamed: expected "allow" with catalog, a file of other titles, got none')
        check_address(args.host, args.port)
    except (TypeError, ValueError, OSError) as error:
        sys.exit(f"serve: {error}")
    try:
        import uvicorn

        from patchkern.serving.server.app import create_app
        from patchkern.serving.server.kept_users import KeptUsers
        from patchkern.serving.server.priors import PriorFiles
        from patchkern.serving.server.problems import Problem
        from patchkern.serving.server.served import Source
        from patchkern.serving.server.service import Service
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in PACKAGES:
            raise
        sys.exit(f"serve needs {error.name}, which is not installed: pip install 'patchkern[serving]'")
    sys.setswitchinterval(_SWITCH_INTERVAL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    gc.freeze()  # what was imported: to look through it now and then would keep everybody waiting for 0.2 seconds
    try:
        try:
            users = None if args.states is None else KeptUsers(args.states, states_bytes)
            source = Source(
                args.run,
                args.catalog,
                args.renamed,
                args.device,
                args.dtype,
                args.search,
                cache_bytes,
                users,
                PriorFiles(args.prior, args.prior_weight),
            )
            service = Service(source.read, limits)
        except (ImportError, OSError, Problem, RuntimeError, TypeError, ValueError) as error:
            sys.exit(f"serve: {error}")
        config = uvicorn.Config(
            create_app(service, token),
            host=args.host,
            port=args.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nobody asks where a request comes from
            timeout_graceful_shutdown=int(limits.timeout) + 1,
        )
        _run(_serve(uvicorn.Server(config), service))
    finally:
        gc.unfreeze()


def _run(serving: Coroutine[Any, Any, None]) -> None:
    """On uvloop where it is installed: it spends less time on a request than asyncio does."""
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(serving)
    else:
        uvloop.run(serving)


async def _serve(server: object, service: Service) -> None:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = loop.create_task(_reload(service))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    # uvicorn raises these again when all is done: by then there is nothing to stop
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    await server.serve()  # type: ignore[attr-defined]


async def _reload(service: Service) -> None:
    from patchkern.serving.server.problems import Problem

    try:
        await service.reload()
    except Problem as problem:  # which is logged, or said to whoever asked first
        logging.getLogger(__name__).warning("SIGHUP: %s", problem)


def _token(path: Path) -> str:
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < 16:
        raise ValueError(f"admin_token_file: expected at least 16 letters in {str(path)!r}, got {len(token)}")
    return token


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m patchkern.serving serve", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a folder that patchkern saved, or a run of recipes/train.py")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: every address of this machine (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument(
        "--catalog",
        metavar="FILE",
        help="titles in place of the saved ones: parquet or JSON lines with item_id and title",
    )
    parser.add_argument(
        "--renamed",
        choices=("error", "allow"),
        default="error",
        help="allow: however many of the items have other titles",
    )
    parser.add_argument(
        "--search",
        choices=("items", "beam"),
        help="where a request does not say (default: items, if the model has an item head)",
    )
    parser.add_argument(
        "--prior",
        nargs="+",
        default=[],
        metavar="FILE",
        help="what else is known of items, of every list: as TransitionPrior.save and LinearPrior.save wrote it",
    )
    parser.add_argument(
        "--prior_weight", nargs="+", type=float, default=[], metavar="WEIGHT", help="of each prior (default: 1)"
    )
    parser.add_argument("--device", help="as of torch (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as saved)"
    )
    parser.add_argument(
        "--memory_budget", metavar="BYTES", help='for all that torch allocates, such as "40GiB" (default: no limit)'
    )
    parser.add_argument(
        "--cache", metavar="BYTES", help="of the prompts of users who give their user_id (default: none are kept)"
    )
    parser.add_argument(
        "--states",
        metavar="PLACE",
        help="keep the compressed users of a model with experts or a memory: a folder, or redis://HOST:PORT",
    )
    parser.add_argument("--states_bytes", metavar="BYTES", help="of the folder's file (default: no limit)")
    parser.add_argument(
        "--admin_token_file", type=Path, metavar="FILE", help="allows POST /admin/reload to who knows what is in it"
    )
    parser.add_argument(
        "--max_batch", type=int, default=_LIMITS.max_batch, help="users computed together (default: %(default)s)"
    )
    parser.add_argument(
        "--max_waiting",
        type=int,
        default=_LIMITS.max_waiting,
        help="users who wait; more get a 503 (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_LIMITS.timeout,
        metavar="SECONDS",
        help="from request to answer (default: %(default)s)",
    )
    parser.add_argument("--max_body", default="1MiB", metavar="BYTES", help="of a request (default: %(default)s)")
    parser.add_argument("--max_history", type=int, default=_LIMITS.max_history, help="items (default: %(default)s)")
    parser.add_argument("--max_k", type=int, default=_LIMITS.max_k, help="items asked for (default: %(default)s)")
    parser.add_argument("--max_beams", type=int, default=_LIMITS.max_beams, help="of a search (default: %(default)s)")
    parser.add_argument(
        "--max_users", type=int, default=_LIMITS.max_users, help="of one request (default: %(default)s)"
    )
    return parser
