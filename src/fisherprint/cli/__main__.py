"""`python -m fisherprint.cli`, as torchrun calls it."""

from fisherprint.cli import main

# Workers that are spawned import this, too.
if __name__ == "__main__":
    main()
