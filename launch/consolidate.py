"""`elsewhere consolidate`: the weights of a checkpoint, whoever wrote it in however many pieces, as one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import UserError


def add_consolidate_command(commands: Any) -> None:
    """Add `consolidate` to `commands`, what `add_subparsers` returned."""
    text = "Write the weights of a checkpoint to one safetensors file."
    more = (
        "Reads runs of any engine, and folders by deepspeed's own save_checkpoint (ZeRO stages 0 to 3, of any model). "
        "Needs neither deepspeed nor a GPU, and memory for a tensor or two. Nothing is overwritten."
    )
    command = commands.add_parser("consolidate", help=text, description=f"{text} {more}")
    command.add_argument(
        "source", type=Path, help="a run (its newest undamaged checkpoint), a checkpoint folder, or one by deepspeed"
    )
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="a new file, e.g. weights.safetensors"
    )
    command.add_argument(
        "--part", choices=("teacher", "student", "predictor", "decoder", "all"),
        help="what to write; teacher and student are encoders (default: the teacher where there is one, else the "
        "student; of another project's model all)",
    )  # fmt: skip
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the numbers (%(default)s)"
    )


def run_consolidate(arguments: argparse.Namespace) -> int:
    """Run `elsewhere consolidate`; the exit status. Raises UserError for something to mend."""
    if arguments.output.suffix != ".safetensors":
        raise UserError(f"--output {arguments.output}: its name must end in .safetensors, which is what is written.")
    # Only now: torch takes seconds to import.
    import torch

    from .weights import write_part

    print(write_part(arguments.source, arguments.output, arguments.part, getattr(torch, arguments.dtype)))
    return 0
