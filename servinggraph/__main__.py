"""`python -m servinggraph` is the `servinggraph` command."""

from servinggraph.cli import main

if __name__ == "__main__":
    main(prog_name="servinggraph")
