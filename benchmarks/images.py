"""What a fingerprint of all images costs: hashing encoded images against decoding them.

    python benchmarks/images.py --data DIR --split test               # as they are
    python benchmarks/images.py --data DIR --split test --side 500    # enlarged and written as JPEG files before

The same images are read one after another, medians of `--rounds`; the files are in the cache of the operating system
after the first round, so that the time is that of the processor, to which a disk adds its own.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from measuring import options_of
from PIL import Image

from vision_bench.data import find_images
from vision_bench.image_files import EncodedImages, ImageFiles, Reading, decode, digest, in_threads


def written_as_jpeg(source: EncodedImages, side: int, folder: Path) -> ImageFiles:
    """The images with a shorter side of `side` pixels, as JPEG files of quality 90."""
    paths = []
    for index in range(len(source)):
        image = Image.open(io.BytesIO(source.encoded(index))).convert("RGB")
        factor = side / min(image.size)
        paths.append(str(folder / f"{index}.jpg"))
        image.resize((round(image.width * factor), round(image.height * factor))).save(paths[-1], quality=90)
    return ImageFiles(paths)


def main() -> None:
    """Read the images in either way and print the speed."""
    parser = options_of(__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--side", type=int)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source = find_images(options.data, options.split, None, Reading()).encoded
    with tempfile.TemporaryDirectory() as folder:
        if options.side:
            source = written_as_jpeg(source, options.side, Path(folder))
        indices = range(min(options.count, len(source)))
        size = sum(len(source.encoded(index)) for index in indices)
        print(f"{len(indices)} images, {size / len(indices) / 1000:.1f} kB each")
        ways = {
            "hashing": lambda index: digest(source.encoded(index)),
            "decoding": lambda index: decode(source.encoded(index), source.where(index), options.image_size),
        }
        for threads in (1, torch.get_num_threads()):
            torch.set_num_threads(threads)
            for words, way in ways.items():
                times = []
                for _ in range(options.rounds):
                    wall, processor = time.perf_counter(), time.process_time()
                    for _ in in_threads(way, indices):
                        pass
                    times.append((time.perf_counter() - wall, time.process_time() - processor))
                wall, processor = (median(column) for column in zip(*times, strict=True))
                print(
                    f"{threads} threads, {words}: {len(indices) / wall:,.0f} images/s, {size / wall / 1e6:.0f} MB/s, "
                    f"{1e6 * processor / len(indices):.0f} us of processor time an image"
                )


if __name__ == "__main__":
    main()
