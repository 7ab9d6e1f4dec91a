"""`python -m vislora`."""

from vislora.cli import main

if __name__ == "__main__":
    main()
