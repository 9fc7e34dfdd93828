"""`python -m mergec`: the command line."""

from mergec.compiler.cli import main

if __name__ == "__main__":
    main()
