"""The hub where published weights and datasets lie, and what to do where it cannot be reached."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


def answers(endpoint: str) -> bool:
    """Whether the host of an address is known here; behind a proxy that cannot be told and is taken for granted."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Let libraries take what was downloaded before if the hub cannot be reached.

    Left alone they retry for a minute, with a line for each attempt, before they look there or give up.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
