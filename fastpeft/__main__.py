"""`python -m fastpeft` is the command line."""

from fastpeft.cli import main

main()
