"""`dist-gsl data`: write, check and show data files."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from rich.console import Console

from dist_gsl.cli.common import Commands, OneLineParser

WRITE = """\
Writes each split of a source as a .beton file, with dataset.json beside them. An interrupted call goes on where it was when it is
given again. What the settings cost and give, for photographs of ImageNet's size:

  --max-side 400 --jpeg-share 0.5   the default: every second image raw, half of the decoding saved
  --max-side 256 --jpeg-share 0     all raw: the fastest to read, the largest
  --as-is                           JPEG files byte for byte: nothing is lost, all of the decoding stays
"""


_DEFAULT = object()
"""Stands for a side that was not given, as none is one that may be."""


def add(commands: Commands) -> None:
    data = commands.add_parser("data", help="write, check and show data files", allow_abbrev=False)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=OneLineParser)
    write = actions.add_parser(
        "write", help="write a source's splits as .beton files", description=WRITE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    write.add_argument(
        "source", help="chars, digits, rotated-digits, or KIND:PATH with imagefolder (PATH/train/CLASS/*.jpg, PATH/val/...), imagenet, "
        "places2, icdar, parquet or webdataset; PATH may be a URI"
    )
    write.add_argument("out_dir", type=Path)
    write.add_argument("--seed", type=int, default=0, help="seed of rendered and drawn sources (%(default)s)")
    write.add_argument(
        "--max-side", type=_side, default=_DEFAULT, metavar="PIXELS",
        help="longest side of stored colour images in pixels, or none (400; with --as-is: none)",
    )
    write.add_argument("--jpeg-quality", type=int, default=90, help="of images that are stored as JPEG, 1 to 100 (%(default)s)")
    write.add_argument("--jpeg-share", type=float, help="share stored as JPEG, the others are raw (0.5; with --as-is: 1)")
    write.add_argument(
        "--grey", type=int, metavar="SIDE", help="store colour images as grey squares of this side, without loss: for characters and digits"
    )
    write.add_argument("--as-is", action="store_true", help="store JPEG files that need no change byte for byte")
    write.add_argument(
        "--on-bad", choices=("end", "skip"), default="end",
        help="an image that cannot be used ends the writing, or is left out and listed in dataset.json (%(default)s)",
    )  # fmt: skip
    write.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that write (%(default)s)")
    check = actions.add_parser("check", help="is this file whole and readable? every sample is verified against its checksum")
    check.add_argument("file", type=Path)
    check.add_argument("--decode", action="store_true", help="decode every JPEG too")
    stats = actions.add_parser("stats", help="mean and deviation of the channels, images of each class, and a sheet of samples as PNG")
    stats.add_argument("directory", type=Path, help="folder of a written data set")
    stats.add_argument("--sheet", type=Path, help="the PNG (DIRECTORY/samples.png)")
    data.set_defaults(run=run)


def _side(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is a number of pixels or none, not {text!r}") from None


def run(options: argparse.Namespace, console: Console) -> int:
    return {"write": _write, "check": _check, "stats": _stats}[options.action](options, console)


def _write(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import data
    from dist_gsl.display import Steps

    max_side = (None if options.as_is else 400) if options.max_side is _DEFAULT else options.max_side
    jpeg_share = options.jpeg_share if options.jpeg_share is not None else (1.0 if options.as_is else 0.5)
    with Steps(console) as steps:
        files = data.write(
            options.source, options.out_dir, seed=options.seed, max_side=max_side, jpeg_quality=options.jpeg_quality,
            jpeg_share=jpeg_share, as_is=options.as_is, grey=options.grey, on_bad=options.on_bad, num_workers=options.workers, progress=steps,
        )  # fmt: skip
    info = data.dataset_info(options.out_dir)
    for split, path in files.items():
        written = info.splits[split]
        console.print(f"{split}: {path}, {written.num_samples:,} samples, {written.num_bytes / 1e9:.2f} GB", highlight=False)
        for skipped in written.skipped[:10]:
            console.print(f"  left out: {skipped.name} {skipped.reason}", highlight=False)
        if len(written.skipped) > 10:
            console.print(f"  and {len(written.skipped) - 10} more, listed in {options.out_dir / 'dataset.json'}", highlight=False)
    return 0


def _check(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import data
    from dist_gsl.display import Steps

    info = data.check(options.file, full=True)
    if options.decode:
        with Steps(console) as steps:
            data.decode_all(options.file, progress=partial(steps, "decoding"))
    console.print(f"{options.file}: {info.num_samples:,} samples, {info.channels} channel(s), whole", highlight=False)
    return 0


def _stats(options: argparse.Namespace, console: Console) -> int:
    from rich.table import Table

    from dist_gsl import data, plots

    info = data.dataset_info(options.directory)
    for split in info.splits.values():
        data.check(options.directory / split.file)
    console.print(f"{info.source}: {info.task.value}, {info.channels} channel(s)", highlight=False)
    for channel, (mean, std) in enumerate(zip(info.mean, info.std, strict=True)):
        console.print(f"channel {channel}: mean {mean:.4f}, deviation {std:.4f}, of levels from 0 to 1", highlight=False)
    table = Table(box=None)
    table.add_column("split")
    for heading in ("images", "left out", "GB", "smallest class", "median", "largest"):
        table.add_column(heading, justify="right")
    for name, split in info.splits.items():
        counts = sorted(split.class_counts) or [0]
        table.add_row(
            name, f"{split.num_samples:,}", f"{len(split.skipped):,}", f"{split.num_bytes / 1e9:.2f}", f"{counts[0]:,}",
            f"{counts[len(counts) // 2]:,}", f"{counts[-1]:,}",
        )  # fmt: skip
    console.print(table)
    sheet = options.sheet or options.directory / "samples.png"
    plots.data_sheet(info, options.directory, sheet)
    console.print(f"samples: {sheet}", highlight=False)
    return 0
