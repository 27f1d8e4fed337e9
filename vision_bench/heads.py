"""Heads of frozen models, trained without labels on features of augmented views of the training images.

With x the L2-normalised features (d,) of a view, x' those of another view of the same image, and InfoNCE the loss of
SimCLR with the other images of a batch as negatives (`losses.info_nce`):

- `simclr_head`: z = W2 ReLU(W1 sqrt(d) x + b1) + b2, all of d dimensions, trained by L = InfoNCE(z, z').
- `ncl_head`: the same with ReLU(z) in the place of z. The pair has equal initial weights, batches and views, and
  differs in nothing else, so that it tells what non-negativity alone does, as SimCLR and NCL do for whole networks.
- `csr`: contrastive sparse representations (Wen et al. 2025, arXiv:2503.01776) by a top-k autoencoder with latents z,
  L = R_k + R_4k / 8 + R_aux / 32 + InfoNCE(z, z'), where R_m is the mean of |x - reconstruction of x|^2 / |x|^2 by the
  m largest latents, and R_aux that of the residual by latents that were 0 for a whole epoch (`sae`). The paper's
  negatives are the other images too; its positive pair is of one image without a second view.

The features of the views are computed once, by `features.extract` on `viewed_images.viewed`. A training that was
stopped continues to the same bits, as those of `training` do.

    import torch
    from vision_bench import heads

    views = torch.randn(3, 500, 16)  # features of 3 views of 500 images
    head = heads.fit("runs/head", "ncl_head", lambda: views, "random", heads.HeadConfig(epochs=2, k=4))
    print(head(torch.randn(10, 16)).shape)  # torch.Size([10, 16])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.scheduler import CosineLRScheduler
from torch import nn

from vision_bench import models, sae, storage, training
from vision_bench.checks import CHUNK, POSITIVE, check_counts, check_features, check_finite, check_name
from vision_bench.geometric_median import geometric_median
from vision_bench.losses import info_nce
from vision_bench.sae_kernels import Active, Decode, Encode

HEADS = ("simclr_head", "ncl_head", "csr")
KIND = "head of a frozen model"
WIDER, WIDER_WEIGHT = 4, 1 / 8  # of the second reconstruction of csr


@dataclass(frozen=True)
class HeadConfig:
    """Settings that decide a head.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    epochs: int = 20
    batch_size: int = 256  # images, over all processes, of each of which two views are drawn
    learning_rate: float = 1e-3  # of Adam, with a cosine to 0
    temperature: float = 0.2
    k: int = 32  # active latents of csr
    seed: int = 0  # of the initial weights, the order of the images and the drawn views

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs, k=self.k)
        check_counts(2, batch_size=self.batch_size)
        check_counts(0, seed=self.seed)
        POSITIVE.check(learning_rate=self.learning_rate, temperature=self.temperature)


class Head:
    """A trained head: called with features (n, d) of images it gives (n, d) float32 on the CPU."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module.eval().requires_grad_(False)

    @property
    def autoencoder(self) -> sae.TopKAutoencoder:
        """That of `csr`, whose latents the features are; the other heads have none."""
        assert isinstance(self._module, _SparseCodes)
        return self._module.autoencoder

    @torch.no_grad()
    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        if isinstance(self._module, _SparseCodes):
            return sae.normalised_latents(self._module.autoencoder, features)
        return torch.cat([self._module(F.normalize(part.float())).cpu() for part in features.split(CHUNK)])


def fit(
    folder: str | Path,
    name: str,
    load_views: Callable[[], torch.Tensor],
    source: str,
    config: HeadConfig,
    accelerator: Accelerator | None = None,
    **execution: Any,
) -> Head:
    """Train a head, or continue the training that `folder` holds, or return the head that it holds.

    Sets torch's global seed. All processes of a launch call this; each trains on its share of every batch.

    Args:
        name: of `HEADS`.
        load_views: gives the features (views, n, d) of at least two views of n images; not called if the head exists.
        source: what they are of, such as a fingerprint; a folder with a head of another is refused.
        execution: of `training.Execution`, such as checkpoint_minutes and progress.

    Raises:
        TypeError: the features are not floating.
        ValueError: no such head, fewer than two views, fewer images than a batch, features that are not finite, more
            latents than dimensions, or a folder that holds another training or in which another process is training.
        FloatingPointError: the training diverged.
    """
    check_name("head", name, HEADS)
    launch = training.Launch.of(name, folder, accelerator, execution)
    identity = {"head": name, "config": asdict(config), "source": source}
    finished = _finished(launch.folder, identity)
    if finished is not None:
        return finished
    views = check_features(load_views(), dims=(3,))
    if len(views) < 2:
        raise ValueError(f"features are of {len(views)} view of each image; a head is trained on pairs, give two.")
    check_finite("features", views)
    images = _Images(F.normalize(views.transpose(0, 1), dim=2), torch.zeros(views.shape[1], dtype=torch.int64))
    training.check(config, len(images), launch.accelerator)
    with launch.held():
        finished = _finished(launch.folder, identity)  # by a process that has just ended
        if finished is None:
            _Run(launch, identity, config, images).run()
            finished = _finished(launch.folder, identity)
    assert finished is not None, "a training that ends leaves its head"
    return finished


@dataclass(frozen=True)
class _Images:
    """What `training.Training` trains on: features (n, views, d) in the place of images, and no labels."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


class _Projector(nn.Module):
    """A projector of d dimensions whose output is non-negative or not."""

    def __init__(self, d: int, non_negative: bool) -> None:
        super().__init__()
        self.layers = models.projector(d, d, d)
        self.output = models.NON_NEGATIVE["relu" if non_negative else "none"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Unit rows (n, d) -> (n, d)."""
        return self.output(self.layers(x * x.shape[1] ** 0.5))


class _SparseCodes(nn.Module):
    """A top-k autoencoder and the reconstruction part of its loss."""

    def __init__(self, d: int, k: int, seed: int) -> None:
        super().__init__()
        self.autoencoder = sae.TopKAutoencoder(d, d, k, torch.Generator().manual_seed(seed))

    def forward(self, x: torch.Tensor, dead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents (n, d) of unit rows (n, d), and R_k + R_4k / 8 + R_aux / 32; `dead` (d,) bool are for R_aux."""
        model = self.autoencoder
        output = model(x)
        power = x.square().sum(dim=1)
        power = torch.where(power > 0, power, 1.0)  # of a row of zeros the loss is absolute

        def relative(error: torch.Tensor) -> torch.Tensor:
            return (error.square().sum(dim=1) / power).mean()

        chosen = output.preactivations.topk(min(WIDER * model.k, model.d_latent), dim=1, sorted=False).indices
        active = Active(chosen, model.d_latent)
        parameters = x, model.pre_bias, model.encoder, model.latent_bias
        values = Encode.apply(*parameters, output.preactivations, active).relu()
        wider = Decode.apply(values, model.decoder, active) + model.pre_bias
        loss = relative(x - output.reconstruction) + WIDER_WEIGHT * relative(x - wider)
        if dead.any():
            missed = model.auxiliary_error(x, output, dead, sae.auxiliary_latents(model))
            loss = loss + sae.AUX_COEFFICIENT * relative(missed)
        return output.latents, loss


class _Run(training.Training):
    """Steps of a head. Its log has the share of views whose nearest one of the other views is of the same image."""

    online_top1 = "matched_views"

    def __init__(
        self,
        launch: training.Launch,
        identity: Mapping[str, Any],
        config: HeadConfig,
        images: Any,  # _Images, which has of an ImageSet what the loop needs
    ) -> None:
        self.config = config
        self.remedy = f"Lower learning_rate (here {config.learning_rate:g})"
        d = images.images.shape[2]
        torch.manual_seed(config.seed)
        module = _module(identity["head"], d, config)
        if isinstance(module, _SparseCodes):
            with torch.no_grad():
                few = images.images[: sae.MEDIAN_ROWS, 0]
                module.autoencoder.pre_bias.copy_(geometric_median(few[few.any(dim=1)]))
        module.to(launch.accelerator.device)
        optimizer = torch.optim.Adam(module.parameters(), lr=config.learning_rate, fused=True)
        if isinstance(module, _SparseCodes):
            optimizer.register_step_pre_hook(lambda *_: module.autoencoder.project_decoder_gradient())
            optimizer.register_step_post_hook(lambda *_: module.autoencoder.normalize_decoder())
        # Of each latent the samples since it was above 0; only csr has latents.
        self.idle = torch.zeros(d, dtype=torch.int64, device=launch.accelerator.device)
        steps = config.epochs * (len(images) // config.batch_size)
        schedule = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
        super().__init__(launch, identity, config, images, module, optimizer, schedule, config.epochs)

    def step(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> None:
        n, views, _ = images.shape
        rows = torch.arange(n, device=images.device)
        first = torch.randint(views, (n,), generator=generator, device=images.device)
        other = torch.randint(1, views, (n,), generator=generator, device=images.device)
        pairs = torch.cat([images[rows, first], images[rows, (first + other) % views]])
        objective = pairs.new_zeros(())
        if isinstance(self.raw, _SparseCodes):
            z, objective = self.module(pairs, self.idle >= len(self.data))
            fired = self.accelerator.reduce((z.detach() > 0).any(dim=0).long(), "sum")
            self.idle = torch.where(fired > 0, 0, self.idle + self.batch_size)
        else:
            z = self.module(pairs)
        one, two = z.chunk(2)
        loss = info_nce(one, two, self.config.temperature)
        logits = F.normalize(one.detach()) @ F.normalize(two.detach()).T
        self.learn(objective + loss, loss, logits, rows)

    def more_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"idle": self.idle}, {}

    def set_more_state(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        self.idle.copy_(tensors["idle"])

    def measure(self, epoch: int) -> dict[str, Any]:
        """Nothing beside what the steps give."""
        return {}

    def save_model(self) -> None:
        header = {**self.identity, "dimensions": self.images.shape[2]}
        storage.save(self.folder / training.MODEL, KIND, self.raw.state_dict(), header)


def _module(name: str, d: int, config: HeadConfig) -> nn.Module:
    """The head as it begins, but for the bias of csr's reconstruction."""
    return _SparseCodes(d, config.k, config.seed) if name == "csr" else _Projector(d, name == "ncl_head")


def _finished(folder: Path, identity: Mapping[str, Any]) -> Head | None:
    """The head of a folder whose training has ended."""
    path = folder / training.MODEL
    if not path.exists():
        return None
    tensors, header = storage.load(path, KIND)
    d = header.pop("dimensions")
    storage.refuse_another(path, header, identity)
    with torch.random.fork_rng(devices=[]):
        module = _module(identity["head"], d, HeadConfig(**identity["config"]))
    module.load_state_dict(tensors)
    return Head(module)
