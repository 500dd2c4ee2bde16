"""`python -m lanting` is `lanting`."""

from lanting.cli.main import run

run()
