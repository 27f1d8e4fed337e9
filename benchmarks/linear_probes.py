"""150 probes of a label-noise table and the extraction of their features beside one probe as the official code has it.

    OMP_NUM_THREADS=1 python benchmarks/linear_probes.py     # some minutes: a round has three passes of a ResNet-18

10 noise rates x 5 seeds on 3 kinds of features (contrastive, its sparse autoencoder, non-negative contrastive), 2048
dimensions, 100 classes, 50,000 images of 32 px, batch 256, 50 epochs. The official step passes the batch three times
through ResNet-18 (CIFAR stem) and projector 512-16384-2048, then trains one linear layer on it; its images here are
random, in memory and without augmentation. A round does one official step, one pass for extraction, one batch of
latents, and each kind's 50 probes by `fit_linear_probes` for `--steps` steps and for three times as many: the
difference gives the step, the rest the set-up. Totals are extrapolated from medians over the rounds of the CPU time,
which other programs change little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from measuring import in_turn, machine, options_of
from timm.optim import Lars
from torch import nn
from torch.nn import functional as F

from vision_bench.models import ContrastiveModel, ModelConfig
from vision_bench.probe import fit_linear_probes
from vision_bench.sae import TopKAutoencoder

RATES, SEEDS, CLASSES, BATCH, EPOCHS = 10, 5, 100, 256, 50
TRAIN, VALIDATION, KINDS, BACKBONES = 50_000, 10_000, 3, 2


def official_step(model: ContrastiveModel) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A step of the official program, which trains one linear layer on what the model makes of a batch."""
    head = nn.Linear(model.config.projector_out, CLASSES)
    groups = [{"params": [head.weight], "always_adapt": True}, {"params": [head.bias]}]
    optimizer = Lars(groups, lr=0.4, momentum=0.9, trust_coeff=0.02, trust_clip=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.no_grad():
            for _ in range(3):
                features = model(images).output
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    """Time the parts and print what the whole would take."""
    parser = options_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of the probes in a round")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = ContrastiveModel(ModelConfig(stem="cifar")).eval().requires_grad_(False)
    d = model.config.projector_out
    autoencoder = TopKAutoencoder(d, d, 256).eval().requires_grad_(False)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))
    features = F.normalize(torch.randn(options.steps * BATCH, d), dim=1)
    label_sets = torch.randint(CLASSES, (RATES * SEEDS, len(features)))
    step = official_step(model)
    seeds = [seed for _ in range(RATES) for seed in range(SEEDS)]

    def extract() -> None:
        with torch.no_grad():
            model(images)

    def probes(epochs: int) -> None:
        for _ in range(KINDS):
            fit_linear_probes(features, label_sets, CLASSES, epochs=epochs, batch_size=BATCH, seeds=seeds)

    arms: dict[str, Callable[[], object]] = {
        "official": lambda: step(images, labels),
        "extraction": extract,
        "latents": lambda: autoencoder.encode(features[:BATCH]),
        "probes": lambda: probes(1),
        "probes, longer": lambda: probes(3),
    }
    times = in_turn(arms, options.rounds, clock=time.process_time)
    second = {name: median(values) for name, values in times.items()}
    short, second["probes"] = second["probes"], (second["probes, longer"] - second["probes"]) / (2 * options.steps)
    set_up = max(short - options.steps * second["probes"], 0.0)

    steps, passes = EPOCHS * (TRAIN // BATCH), -(-(TRAIN + VALIDATION) // BATCH)
    one_official = steps * second["official"]
    extraction = passes * (BACKBONES * second["extraction"] + second["latents"])
    probing = set_up + steps * second["probes"]
    ours = probing + extraction
    count = KINDS * RATES * SEEDS
    print(
        f"{machine('timm')}, {time.strftime('%Y-%m-%d')}; medians of {options.rounds} rounds, {steps} steps of batch "
        f"{BATCH}\n"
    )
    print("| | one step, CPU s | in all, CPU h |\n|---|---:|---:|")
    print(f"| one official probe | {second['official']:.2f} | {one_official / 3600:.2f} |")
    print(f"| {count} probes | {second['probes']:.3f} | {probing / 3600:.2f} |")
    print(f"| features: {passes} passes of {BACKBONES} models, latents | {second['extraction']:.2f} | ", end="")
    print(f"{extraction / 3600:.2f} |")
    print(
        f"\n{count} probes and their features cost 1/{one_official / ours:.1f} of one official probe, "
        f"1/{count * one_official / ours:.0f} of {count}; a step of a probe 1/"
        f"{count * second['official'] / second['probes']:.0f} of an official step."
    )


if __name__ == "__main__":
    main()
