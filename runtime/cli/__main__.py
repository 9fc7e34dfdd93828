"""`python -m mergec.runtime.cli`: the party's commands alone."""

from mergec.runtime.cli import main

if __name__ == "__main__":
    main()
