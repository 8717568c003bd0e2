# SPDX-License-Identifier: Apache-2.0
"""Whether a server could listen at an address, before it reads a model that takes minutes."""

from __future__ import annotations

import errno
import os
import socket

_TAKEN = (errno.EADDRINUSE, errno.EACCES)


def check_address(host: str, port: int) -> None:
    """Bind every address that a name stands for, and leave it again.

    Of a name with several, some may be of a kind that this machine lacks; but none may be taken.

    Args:
        host: a name or an address; empty: every address of this machine.
        port: 0: any that is free.

    Raises:
        ValueError: naming host or port, what was expected and what came.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port: expected a number from 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host: expected a name or an address of this machine, got {host!r} ({error})") from None
    failed = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                if os.name == "posix":  # as asyncio does: what waits to be forgotten takes no port
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind(address)
        except OSError as error:
            failed.append(error)
            if error.errno in _TAKEN:
                raise ValueError(f"port: expected one that is free on {host}, got {port} ({error.strerror})") from None
    if len(failed) == len(found):
        raise ValueError(f"host: expected an address of this machine, got {host!r} ({failed[0].strerror})")
