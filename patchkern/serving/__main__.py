# SPDX-License-Identifier: Apache-2.0
"""``python -m patchkern.serving COMMAND``: what a trained model is served by. ``COMMAND --help`` has its options."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

# Each is imported when it is asked for: what one command needs, the others do not.
COMMANDS = {
    "serve": ("patchkern.serving.server.command", "recommendations over HTTP, from a folder with a model"),
    "export": ("patchkern.serving.vllm.export", "a folder with a model as one that vLLM serves"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m patchkern.serving",
        description="\n".join(f"{name:12}{says}" for name, (_, says) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="COMMAND --help lists them")
    given = parser.parse_args(argv)
    importlib.import_module(COMMANDS[given.command][0]).main(given.arguments)


if __name__ == "__main__":
    main()
