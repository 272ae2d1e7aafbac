"""`python -m elsewhere.launch`, `torchrun -m elsewhere.launch`, `deepspeed --module elsewhere.launch`."""

import sys

from elsewhere.launch.cli import main  # pyright: ignore

if __name__ == "__main__":
    sys.exit(main())
