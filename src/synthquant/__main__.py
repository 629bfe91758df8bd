"""`python -m synthquant`: the command line."""

from synthquant.cli import main

main()
