"""`fastpeft` and `python -m fastpeft`: the command line, or one line on what it lacks."""

from __future__ import annotations

import sys
from importlib.util import find_spec

#: What the extra `compare` installs.
NEEDS = ("accelerate", "filelock", "huggingface_hub", "jinja2", "matplotlib", "rich", "typer")


def main() -> None:
    """Run the command line, where its packages are installed."""
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        print(f"fastpeft: needs {', '.join(missing)}: pip install 'fastpeft[compare]'", file=sys.stderr)
        sys.exit(2)
    from fastpeft import cli

    cli.main()


if __name__ == "__main__":
    main()
