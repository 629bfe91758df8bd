"""`python -m synthquant` is the command line."""

from synthquant.cli import main

if __name__ == "__main__":
    main()
