"""Print bits per byte of text files under PPMd, order 8 (pip install pyppmd): the yardstick beside the model's figure.

    python ppmd.py [--after TRAINING_TEXT] TEXT...

PPMd learns while it reads. Alone it starts knowing nothing; with --after it has read the training text first, as the
model has, and the figure is what the text adds to the size of the two compressed together.
"""

import argparse
import lzma
import sys
from pathlib import Path

import pyppmd

ORDER, MEMORY_BYTES = 8, 3 << 30


def size(data: bytes) -> int:
    """Bytes of the data under PPMd7 (variant H)."""
    return len(pyppmd.compress(data, max_order=ORDER, mem_size=MEMORY_BYTES, variant="H"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=Path, help="text (or .xz) to read first; cut the held-out books out of it")
    parser.add_argument("text", type=Path, nargs="+")
    args = parser.parse_args()
    before = b""
    if args.after:
        raw = args.after.read_bytes()
        before = lzma.decompress(raw) if args.after.suffix == ".xz" else raw
    base = size(before) if before else 0
    for path in args.text:
        data = path.read_bytes()
        bits = 8 * (size(before + data) - base) / len(data)
        sys.stdout.write(f"{path.name}: {bits:.4f} bits per byte after {len(before)} bytes (PPMd7 order {ORDER})\n")


if __name__ == "__main__":
    main()
