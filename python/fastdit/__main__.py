"""`python -m fastdit`."""

from fastdit.cli import main

if __name__ == "__main__":
    main()
