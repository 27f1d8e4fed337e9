"""Two SimCLR views of each image of a batch: ours, kornia, and torchvision image by image.

    OMP_NUM_THREADS=1 python benchmarks/views.py                            # random images
    OMP_NUM_THREADS=1 python benchmarks/views.py --data cifar100 --root DIR   # also the difference from torchvision

32 pixels, the paper's settings for CIFAR with hue; blur apart. Every arm starts from uint8 and ends with normalised
float32 views in a batch; the arms are interleaved. "PIL" is torchvision's usual pipeline of transforms on PIL images.
The second part applies the same drawn parameters with torchvision's functions, which clamp after each step and turn
the hue of HSV, and reports the difference of the views in [0, 1].
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import kornia.augmentation as augment
import torch
from measuring import in_turn, machine, options_of, ratios, spread
from torchvision import transforms
from torchvision.transforms.v2 import functional

from vision_bench.data import STATISTICS, load_images
from vision_bench.views import SimCLRViews

SIZE, SCALE, JITTER = 32, (0.08, 1.0), (0.8, 0.8, 0.8, 0.2)
MEAN, STD = STATISTICS["cifar100"]


def ours(blur: bool) -> Callable[[torch.Tensor], object]:
    """Our views of a batch."""
    views, generator = SimCLRViews(SIZE, MEAN, STD, blur_probability=0.5 * blur), torch.Generator().manual_seed(0)
    return lambda images: views(images, generator)


def with_kornia(blur: bool) -> Callable[[torch.Tensor], object]:
    """The same by kornia, on whole batches too."""
    steps = [
        augment.RandomResizedCrop((SIZE, SIZE), SCALE),
        augment.ColorJitter(*JITTER, p=0.8),
        augment.RandomGrayscale(p=0.2),
        *([augment.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5)] if blur else []),
        augment.RandomHorizontalFlip(p=0.5),
        augment.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ]
    pipeline = augment.AugmentationSequential(*steps, data_keys=["input"])
    return lambda images: [pipeline(images.float() / 255) for _ in range(2)]


def with_pil(blur: bool) -> Callable[[torch.Tensor], object]:
    """The same by torchvision, image by image."""
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE),
            transforms.RandomApply([transforms.ColorJitter(*JITTER)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            *([transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], p=0.5)] if blur else []),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def make(images: torch.Tensor) -> object:
        pictures = [transforms.functional.to_pil_image(image) for image in images]
        return [torch.stack([pipeline(picture) for picture in pictures]) for _ in range(2)]

    return make


def speed(images: torch.Tensor, rounds: int, blur: bool) -> None:
    """Time the three in turn and print their speed."""
    arms = {"ours": ours(blur), "kornia": with_kornia(blur), "PIL": with_pil(blur)}
    runs = {name: partial(make, images) for name, make in arms.items()}
    times = in_turn(runs, rounds, clock=time.process_time)
    print(f"{'with' if blur else 'without'} blur, batch {len(images)}, median of {rounds} rounds:")
    for name, values in times.items():
        print(
            f"  {name:7} {2 * len(images) / median(values):8.0f} views per CPU-second, "
            f"{median(ratios(times, name, 'ours')):5.1f} times our time {spread(times, name, 'ours')}"
        )


def difference(images: torch.Tensor) -> None:
    """Mean absolute difference of views in [0, 1] from torchvision's with the same parameters."""
    views = SimCLRViews(SIZE, (0.0,) * 3, (1.0,) * 3, blur_probability=0.0, greyscale_probability=0.0)
    generator = torch.Generator().manual_seed(0)
    height, width = images.shape[-2:]
    drawn = views.draw(len(images), height, width, generator)
    neutral = {
        "crop and flip": {"brightness", "contrast", "saturation", "hue"},
        "and brightness, contrast, saturation": {"hue"},
        "and hue alone": {"brightness", "contrast", "saturation"},
        "all": set(),
    }
    for label, off in neutral.items():
        values = {name: torch.zeros(len(images)) if name == "hue" else torch.ones(len(images)) for name in off}
        parameters = drawn._replace(**values)
        applied, distances, effects = views.apply(images, parameters), [], []
        for i, image in enumerate(images.float() / 255):
            at = {name: column[i].item() for name, column in parameters._asdict().items()}
            box = [at["top"], at["left"], at["height"], at["width"]]
            plain = functional.resized_crop(image, *box, [SIZE, SIZE], antialias=False)
            plain = functional.horizontal_flip(plain) if at["flip"] else plain
            view = plain
            names = ["brightness", "contrast", "saturation", "hue"]
            for k in torch.randperm(4, generator=generator).tolist():
                view = getattr(functional, f"adjust_{names[k]}")(view, at[names[k]])
            distances.append((applied[i] - view).abs().mean())
            effects.append((view - plain).abs().mean())
        mean, effect = torch.stack(distances).mean().item(), torch.stack(effects).mean().item()
        print(f"  {label}: {mean:.4f} (the jitter itself changes values by {effect:.4f})")


def main() -> None:
    """Print the speeds and, of real images, the difference from torchvision."""
    parser = options_of(__doc__)
    parser.add_argument("--data", help="name of a data set with images of 32 pixels; else uniform noise")
    parser.add_argument("--root", help="folder of its files")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.data:
        images = load_images(options.data, "test", options.root).images[:2048]
    else:
        images = torch.randint(0, 256, (options.batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    print(machine("kornia", "torchvision"))
    for blur in (False, True):
        speed(images[: options.batch_size], options.rounds, blur)
    if options.data:
        print(f"mean absolute difference from torchvision's functions, values in [0, 1], {len(images)} images:")
        difference(images)


if __name__ == "__main__":
    main()
