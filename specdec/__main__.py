"""`python -m specdec`, which launchers of several processes call."""

from specdec.cli import app

app(prog_name="specdec")
