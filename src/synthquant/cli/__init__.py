"""The command line: parse, call, print. Every command is a function of the library with options around it."""

from __future__ import annotations

from synthquant.cli.app import main

__all__ = ["main"]
