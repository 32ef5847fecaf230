"""``python -m iexact_runner`` is ``iexact``."""

from iexact_runner.cli import main

if __name__ == "__main__":
    main()
