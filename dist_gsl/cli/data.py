"""`dist-gsl data`: write and check data files."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from dist_gsl.cli.common import Commands, OneLineParser


def add(commands: Commands) -> None:
    data = commands.add_parser("data", help="write and check data files", allow_abbrev=False)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=OneLineParser)
    write = actions.add_parser("write", help="write a source's splits as .beton files")
    write.add_argument(
        "source", help="chars, digits, rotated-digits, or imagefolder:PATH (PATH/train/CLASS/*.jpg, PATH/val/...)"
    )
    write.add_argument("out_dir", type=Path)
    write.add_argument("--seed", type=int, default=0, help="seed of rendered and drawn sources (%(default)s)")
    write.add_argument(
        "--max-side", type=int, default=400, help="longest side of stored colour images in pixels (%(default)s)"
    )
    write.add_argument("--jpeg-quality", type=int, default=90, help="1 to 100 (%(default)s)")
    check = actions.add_parser("check", help="is this file whole and readable?")
    check.add_argument("file", type=Path)
    data.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import data
    from dist_gsl.display import Steps

    if options.action == "check":
        info = data.check(options.file, full=True)
        console.print(
            f"{options.file}: {info.num_samples:,} samples, {info.channels} channel(s), whole", highlight=False
        )
        return 0
    with Steps(console) as steps:
        files = data.write(
            options.source, options.out_dir, seed=options.seed, max_side=options.max_side,
            jpeg_quality=options.jpeg_quality, num_workers=os.cpu_count() or 1, progress=steps,
        )  # fmt: skip
    for split, path in files.items():
        console.print(f"{split}: {path}", highlight=False)
    return 0
