"""Heads against a step by hand, stopped and continued; and the views that they are trained on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import rows
from vision_bench import features, geometric_median, heads, sae
from vision_bench.__main__ import main
from vision_bench.corruptions import seed_of
from vision_bench.data import load_images
from vision_bench.heads import HeadConfig
from vision_bench.models import projector
from vision_bench.training import ORDER, STEP, Training
from vision_bench.viewed_images import viewed
from vision_bench.views import SimCLRViews

N, D = 24, 16
VIEWS = torch.randn(3, N, D, generator=torch.Generator().manual_seed(0))
CONFIG = HeadConfig(epochs=1, batch_size=N, learning_rate=0.01, k=3, seed=5)


def fitted(folder, name, config=CONFIG, views=VIEWS):
    return heads.fit(folder, name, lambda: views, "views", config)


def info_nce_by_hand(z):
    """SimCLR's loss of 2 n views, one pair after the other."""
    z = torch.stack([row / row.norm() if row.norm() > 0 else row for row in z])
    n, losses = len(z) // 2, []
    for i in range(2 * n):
        terms = [(z[i] @ z[j] / CONFIG.temperature).exp() for j in range(2 * n) if j != i]
        losses.append(torch.stack(terms).sum().log() - z[i] @ z[(i + n) % (2 * n)] / CONFIG.temperature)
    return torch.stack(losses).mean()


def pairs_by_hand():
    """The unit features of the two views of each image that the first step draws."""
    order = np.random.default_rng((CONFIG.seed, ORDER, 0)).permutation(N)
    generator = torch.Generator().manual_seed(seed_of(CONFIG.seed, STEP, 0, 0))
    first = torch.randint(3, (N,), generator=generator)
    second = (first + torch.randint(1, 3, (N,), generator=generator)) % 3
    both = [VIEWS[view, image] for views in (first, second) for view, image in zip(views, order, strict=True)]
    return torch.stack([x / x.norm() for x in both])


@pytest.mark.parametrize("name", ["simclr_head", "ncl_head"])
def test_a_step_of_the_pair_which_differs_in_the_relu_alone(tmp_path, name):
    torch.manual_seed(CONFIG.seed)
    layers = projector(D, D, D)
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
    x = pairs_by_hand() * D**0.5
    z = layers(x)
    info_nce_by_hand(z.relu() if name == "ncl_head" else z).backward()
    optimizer.step()
    asked = torch.randn(7, D)
    expected = layers(F.normalize(asked) * D**0.5)
    expected = expected.relu() if name == "ncl_head" else expected
    torch.testing.assert_close(fitted(tmp_path, name)(asked), expected.detach(), atol=1e-5, rtol=1e-4)


def test_a_step_of_csr(tmp_path):
    model = sae.TopKAutoencoder(D, D, CONFIG.k, torch.Generator().manual_seed(CONFIG.seed))
    with torch.no_grad():
        model.pre_bias.copy_(geometric_median.geometric_median(F.normalize(VIEWS[0])))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = pairs_by_hand()
    scores = (x - model.pre_bias) @ model.encoder.T + model.latent_bias

    def codes(k):
        return torch.zeros_like(scores).scatter(1, scores.topk(k).indices, scores.topk(k).values).relu()

    def error(latents):
        return (x - latents @ model.decoder - model.pre_bias).square().sum(dim=1).mean()  # rows of x have norm 1

    (error(codes(3)) + error(codes(12)) / 8 + info_nce_by_hand(codes(3))).backward()
    model.project_decoder_gradient()
    optimizer.step()
    model.normalize_decoder()
    asked = torch.randn(7, D)
    latents = fitted(tmp_path, "csr")(asked)
    torch.testing.assert_close(latents, model.encode(F.normalize(asked)).detach(), atol=1e-5, rtol=1e-4)
    assert ((latents > 0).sum(dim=1) <= 3).all()


@pytest.mark.parametrize("name", ["ncl_head", "csr"])
def test_a_training_that_was_stopped_continues_to_the_same_bits(tmp_path, monkeypatch, name):
    config = HeadConfig(epochs=4, batch_size=8, k=3)
    whole = fitted(tmp_path / "whole", name, config)
    run, steps = Training._step, []

    def stopping(self, *arguments):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(1)
        run(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            heads.fit(tmp_path / "cut", name, lambda: VIEWS, "views", config, checkpoint_minutes=0)
    asked = torch.randn(50, D)
    assert torch.equal(fitted(tmp_path / "cut", name, config)(asked), whole(asked))
    never = heads.fit(tmp_path / "cut", name, lambda: pytest.fail("trained again"), "views", config)
    assert torch.equal(never(asked), whole(asked))
    with pytest.raises(ValueError, match=r"of another training \(source: 'views' there, 'others' now\)"):
        heads.fit(tmp_path / "cut", name, lambda: VIEWS, "others", config)


def test_what_cannot_be_trained(tmp_path):
    with pytest.raises(ValueError, match="head is 'moco'; it must be one of 'simclr_head', 'ncl_head', 'csr'"):
        fitted(tmp_path, "moco")
    with pytest.raises(ValueError, match="features are of 1 view of each image; a head is trained on pairs, give two"):
        fitted(tmp_path, "csr", views=VIEWS[:1])
    with pytest.raises(ValueError, match="epochs is 0; it must be at least 1"):
        HeadConfig(epochs=0)


def test_views_are_those_of_simclr_and_the_same_whenever_they_are_asked_for():
    images = load_images("digits", "train").subset(torch.arange(40))
    shown = viewed(images, 3)
    views = SimCLRViews(8, (0.0,) * 3, (1.0,) * 3)
    expected = views.apply(images.images, views.draw(40, 8, 8, torch.Generator().manual_seed(3)))
    assert torch.equal(shown.images[5:9], (255 * expected[5:9]).round().to(torch.uint8))
    assert torch.equal(shown.images[torch.tensor([7, 5])], shown.images[5:9][[2, 0]])
    prints = {s.fingerprint for s in (images, shown, viewed(images, 4), viewed(images, 3, flip_probability=0.0))}
    assert len(prints) == 4
    assert viewed(images, 3).fingerprint == shown.fingerprint
    with pytest.raises(ValueError, match="settings of SimCLRViews"):
        viewed(images, 3, zoom=2)


def test_the_command_measures_heads_and_learners_beside_raw(tmp_path, monkeypatch):
    arguments = ["--random_init", "small_conv", "--output_dir", str(tmp_path), "--limit", "100", "--seeds", "0"]
    arguments += ["--corruptions", "label_noise=0.4", "--probe_epochs", "2", "--head_epochs", "1", "--head_views", "2"]
    arguments += ["--features", "raw", "ncl_head", "csr", "--learners", "probe", "tree"]
    main(arguments)
    for kind in ("raw", "ncl_head", "csr"):
        (tree,) = rows(tmp_path, "tree_top1", features=kind, label_noise=0.4)
        assert (tree["config"]["learner"], tree["config"]["rotation_equivariant"]) == ("tree", False)
        assert rows(tmp_path, "offline_probe_top1", features=kind, label_noise=0.4)
    text = (tmp_path / "results.md").read_text()
    assert "Top-1 accuracy of tree (decision tree of depth 8; not equivariant under rotations, so that axes" in text
    # One more learner and head: no image is passed again, and what was measured stays.
    before = rows(tmp_path, "tree_top1")
    monkeypatch.setattr(features, "embed", lambda *_, **__: pytest.fail("a forward pass"))
    main([*arguments[:-5], "simclr_head", "--learners", "k_sparse_1", "tree", "--resume"])
    assert rows(tmp_path, "k_sparse_1_top1", features="simclr_head")
    assert rows(tmp_path, "tree_top1")[: len(before)] == before
