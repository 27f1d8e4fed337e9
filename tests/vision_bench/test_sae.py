"""The sparse autoencoder against the plain dense program by autograd: its gradients, AuxK, and whole trainings."""

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_bench import sae, storage
from vision_bench.geometric_median import geometric_median
from vision_bench.metrics import fraction_of_variance_unexplained
from vision_bench.sae import TopKAutoencoder, evaluate, fit


def randomised(d, d_latent, k, dtype=torch.float32, seed=0):
    """An autoencoder none of whose parameters is 0 or tied to another."""
    generator = torch.Generator().manual_seed(seed)
    autoencoder = TopKAutoencoder(d, d_latent, k, generator=generator).to(dtype)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return autoencoder


def plain_latents(model, pre, k):
    """TopK, then ReLU, of dense pre-activations (b, d_latent)."""
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def plain_forward(model, x):
    """Reconstruction and latents by dense products."""
    pre = (x - model.pre_bias) @ model.encoder.T + model.latent_bias
    latents = plain_latents(model, pre, model.k)
    return latents @ model.decoder + model.pre_bias, latents


def gradients(model, loss, *others):
    return torch.autograd.grad(loss, [*model.parameters(), *others])


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 9), d=st.integers(1, 7), d_latent=st.integers(1, 40), share=st.floats(0, 1),
    seed=st.integers(0, 99), double=st.booleans(),
)  # fmt: skip
def test_gradients_equal_the_plain_dense_program(b, d, d_latent, share, seed, double):
    dtype, tolerance = (torch.float64, 1e-10) if double else (torch.float32, 1e-5)
    k = 1 + int(share**2 * (d_latent - 1))
    model = randomised(d, d_latent, k, dtype, seed)
    x = torch.randn(b, d, dtype=dtype, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    output = model(x)
    reconstruction, latents = plain_forward(model, x)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(output.reconstruction, reconstruction, **close)
    torch.testing.assert_close(output.latents, latents, **close)
    for loss in (lambda r, z: ((r - x) ** 2).sum(), lambda r, z: (r**3).mean() + (z.sin() * z).sum()):
        ours = gradients(model, loss(output.reconstruction, output.latents), x)
        output = model(x)
        for mine, plain in zip(ours, gradients(model, loss(*plain_forward(model, x)), x), strict=True):
            torch.testing.assert_close(mine, plain, **close)


def test_sparse_and_dense_products_are_both_tested():
    sparse, dense = randomised(6, 40, 5), randomised(6, 40, 6)
    x = torch.randn(4, 6)
    assert sparse(x).active.sparse
    assert not dense(x).active.sparse


@settings(max_examples=30, deadline=None)
@given(dead=st.integers(1, 40), k_aux=st.integers(1, 20), seed=st.integers(0, 99))
def test_aux_loss_equals_the_formula(dead, k_aux, seed):
    """||e - A W_dec||^2: the residual e is a constant, A are the top dead latents, and b_pre is not added again."""
    model = randomised(5, 40, 3, torch.float64, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    is_dead = torch.zeros(40, dtype=torch.bool)
    is_dead[torch.randperm(40, generator=generator)[:dead]] = True

    ours = model.auxiliary_error(x, model(x), is_dead, k_aux).square().sum()
    reconstruction, _ = plain_forward(model, x)
    pre = (x - model.pre_bias) @ model.encoder.T + model.latent_bias
    latents = plain_latents(model, pre.masked_fill(~is_dead, -torch.inf), min(k_aux, dead))
    plain = ((x - reconstruction).detach() - latents @ model.decoder).square().sum()
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    for mine, expected in zip(gradients(model, ours), gradients(model, plain), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


def test_forward_is_decode_of_encode_and_starts_as_documented():
    model = TopKAutoencoder(6, 50, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.encoder, model.decoder)
    torch.testing.assert_close(model.decoder.norm(dim=1), torch.ones(50))
    model = randomised(6, 50, 4)
    x = torch.randn(7, 6)
    output = model(x)
    assert torch.equal(output.latents, model.encode(x))
    torch.testing.assert_close(output.reconstruction, model.decode(model.encode(x)))
    assert (output.latents >= 0).all()
    assert ((output.latents > 0).sum(dim=1) <= 4).all()


def test_trains_under_another_loss_with_a_stock_optimiser():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    model = TopKAutoencoder(8, 64, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(150):
        loss = torch.nn.functional.smooth_l1_loss(model(x).reconstruction, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all((parameter != before[name]).any() for name, parameter in model.named_parameters())


def test_decoder_gradient_loses_exactly_what_is_along_the_rows():
    model = randomised(6, 600, 20, torch.float64)
    model.normalize_decoder()
    torch.testing.assert_close(model.decoder.norm(dim=1), torch.ones(600, dtype=torch.float64))
    (model(torch.randn(9, 6, dtype=torch.float64)).reconstruction ** 2).sum().backward()
    gradient, rows = model.decoder.grad.clone(), model.decoder.detach()
    model.project_decoder_gradient()
    expected = gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows
    torch.testing.assert_close(model.decoder.grad, expected, rtol=1e-10, atol=1e-10)


def planted(n=512, d=16, atoms=32, active=2, seed=0):
    """Samples that are sparse sums of unit vectors, around a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, d, generator=generator), dim=1)
    which = torch.rand(n, atoms, generator=generator).topk(active).indices
    weights = torch.zeros(n, atoms).scatter(1, which, 0.5 + torch.rand(n, active, generator=generator))
    return weights @ dictionary + 0.7


def fit_plainly(x, d_latent, k, *, epochs, batch_size, learning_rate, seed):
    """`fit` as one would write it with autograd and dense products, for d = 16."""
    n, d = x.shape
    model = TopKAutoencoder(d, d_latent, k, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    with torch.no_grad():
        model.pre_bias.copy_(geometric_median(x))
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    idle, used_aux = torch.zeros(d_latent), 0
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng([seed, 1, epoch]).permutation(n))
        for batch in order.split(batch_size):
            if len(batch) < batch_size:
                continue
            z = x[batch]
            reconstruction, latents = plain_forward(model, z)
            power = (z**2).mean(1)
            loss = (((reconstruction - z) ** 2).mean(1) / power).mean()
            dead = idle >= n
            if dead.any():
                used_aux += 1
                pre = (z - model.pre_bias) @ model.encoder.T + model.latent_bias
                aux = plain_latents(model, pre.masked_fill(~dead, -torch.inf), min(8, int(dead.sum())))
                error = (z - reconstruction).detach() - aux @ model.decoder
                loss = loss + ((error**2).mean(1) / power).mean() / 32
            optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():
                rows = model.decoder
                rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows
                optimizer.step()
                rows /= rows.norm(dim=1, keepdim=True)
            idle += batch_size
            idle[(latents > 0).any(0)] = 0
    return model, used_aux


def test_fit_equals_the_plain_program():
    x = planted().double()
    shared = {"epochs": 6, "batch_size": 100, "learning_rate": 3e-3, "seed": 3}
    ours = fit(x, 64, 2, **shared).autoencoder
    plain, used_aux = fit_plainly(x, 64, 2, **shared)
    assert used_aux > 5
    for (name, mine), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_fit_explains_sparse_data_and_logs_what_evaluate_measures():
    x = planted(2048)
    result = fit(x, 48, 2, epochs=20, batch_size=64, learning_rate=5e-3, log_every=64)
    quality = evaluate(result.autoencoder, x)
    assert quality.fvu < 0.2
    assert quality.l0 <= 2
    assert [row["step"] for row in result.log] == list(range(64, 20 * 32 + 1, 64))
    assert result.log[-1]["fvu"] == pytest.approx(quality.fvu, rel=0.2)
    assert result.log[-1]["fvu"] < result.log[0]["fvu"]
    assert not result.autoencoder.training
    torch.testing.assert_close(result.autoencoder.decoder.norm(dim=1), torch.ones(48))


def test_aux_loss_revives_latents_that_never_win(monkeypatch):
    """Three quarters of the encoder start at a twentieth of the others, so that they are positive but not kept."""
    x = planted(1024, d=32, atoms=64, active=3)

    def lame(*arguments):
        model = TopKAutoencoder(*arguments)
        with torch.no_grad():
            model.encoder[32:] *= 0.05
        return model

    monkeypatch.setattr(sae, "TopKAutoencoder", lame)
    shared = {"epochs": 10, "batch_size": 64, "learning_rate": 5e-3}
    revived = evaluate(fit(x, 128, 3, **shared).autoencoder, x)
    monkeypatch.setattr(sae, "AUX_COEFFICIENT", 0.0)
    without = evaluate(fit(x, 128, 3, **shared).autoencoder, x)
    assert without.dead_share > 0.6
    assert revived.dead_share < without.dead_share - 0.2
    assert revived.fvu < 0.8 * without.fvu


def test_a_latent_that_is_kept_with_value_zero_is_dead():
    x = planted(64)
    model = fit(x, 8, 8, epochs=1, batch_size=32).autoencoder  # k is all: each is kept in each sample
    with torch.no_grad():
        model.latent_bias[:3] = -100
    quality = evaluate(model, x)
    latents = model.encode(x)
    assert quality.dead_share == pytest.approx(((latents > 0).sum(0) == 0).double().mean().item())
    assert quality.dead_share >= 3 / 8
    assert quality.l0 == pytest.approx((latents > 0).sum().item() / 64)
    expected = fraction_of_variance_unexplained(model(x).reconstruction.detach(), x)
    assert quality.fvu == pytest.approx(expected, rel=1e-5)


def test_interrupted_training_continues_exactly(tmp_path, monkeypatch):
    x = planted(300)
    shared = {"batch_size": 50, "log_every": 5}
    straight = fit(x, 64, 2, epochs=5, **shared)
    assert straight.log[-1]["step"] == 30

    update = sae._Training.update

    def stopped(self, *arguments):
        if self.step == 17:
            raise KeyboardInterrupt
        update(self, *arguments)

    monkeypatch.setattr(sae._Training, "update", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(x, 64, 2, epochs=5, checkpoint_dir=tmp_path, checkpoint_every=7, **shared)
    monkeypatch.setattr(sae._Training, "update", update)
    continued = fit(x, 64, 2, epochs=5, checkpoint_dir=tmp_path, checkpoint_every=7, **shared)
    assert continued.log == straight.log
    for mine, expected in zip(continued.autoencoder.parameters(), straight.autoencoder.parameters(), strict=True):
        assert torch.equal(mine, expected)

    finished = fit(x, 64, 2, epochs=5, checkpoint_dir=tmp_path, **shared)  # nothing is left to do
    assert torch.equal(finished.autoencoder.decoder, straight.autoencoder.decoder)
    with pytest.raises(ValueError, match=r"epochs is 4, 24 steps, and .* was trained for 30"):
        fit(x, 64, 2, epochs=4, checkpoint_dir=tmp_path, **shared)
    with pytest.raises(ValueError, match=r"of another training \(k: 2 there, 3 now\)"):
        fit(x, 64, 3, checkpoint_dir=tmp_path, **shared)
    with pytest.raises(ValueError, match=r"of another training \(features: "):
        fit(x + 1, 64, 2, checkpoint_dir=tmp_path, **shared)


@pytest.mark.parametrize("row", [1, 150, 298])
def test_a_checkpoint_is_of_all_rows_of_its_features(row, tmp_path):
    x = planted(300)
    fit(x, 32, 2, epochs=1, batch_size=50, checkpoint_dir=tmp_path)
    fit(x.clone(), 32, 2, epochs=1, batch_size=50, checkpoint_dir=tmp_path)  # the same rows
    other = x.clone()
    other[row, 3] += 1e-3
    with pytest.raises(ValueError, match=r"of another training \(features: "):
        fit(other, 32, 2, epochs=2, batch_size=50, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"of another training \(features: "):
        fit(x[torch.randperm(300)], 32, 2, epochs=2, batch_size=50, checkpoint_dir=tmp_path)


def test_a_training_that_diverges_stops_and_its_last_whole_checkpoint_stays(tmp_path, monkeypatch):
    x, update = planted(300), sae._Training.update

    def broken(self, *arguments):
        update(self, *arguments)
        if self.step == 9:
            with torch.no_grad():
                self.autoencoder.encoder[1, 2] = torch.nan

    shared = {"epochs": 3, "batch_size": 50, "checkpoint_dir": tmp_path, "checkpoint_every": 4}
    with monkeypatch.context() as patch:
        patch.setattr(sae._Training, "update", broken)
        with pytest.raises(
            FloatingPointError, match=r"diverged before step 12: .* is NaN or infinite\. Lower learning_rate"
        ):
            fit(x, 32, 2, **shared)
    tensors, header = storage.load(tmp_path / sae.CHECKPOINT, sae.CHECKPOINT_KIND)
    assert header["step"] == 8
    assert storage.non_finite(tensors) is None
    assert fit(x, 32, 2, **shared).log[-1]["step"] == 18
    with pytest.raises(FloatingPointError, match="diverged before step"):
        fit(x, 32, 2, epochs=30, batch_size=50, learning_rate=1e30)


def test_two_processes_never_train_on_one_checkpoint(tmp_path):
    x, shared = planted(300), {"batch_size": 50, "checkpoint_dir": tmp_path}
    fit(x, 32, 2, epochs=1, **shared)
    with FileLock(tmp_path / ".lock"):
        fit(x, 32, 2, epochs=1, **shared)  # nothing is left to do
        with pytest.raises(ValueError, match="Another process is working in"):
            fit(x, 32, 2, epochs=2, **shared)


def test_rows_of_zeros_are_measured_and_not_trained_on():
    x = planted(300)
    autoencoder = fit(x, 32, 2, epochs=3, batch_size=50).autoencoder
    with_zeros = torch.cat([x[:100], torch.zeros(2, 16)])
    quality = evaluate(autoencoder, with_zeros)
    expected = fraction_of_variance_unexplained(autoencoder(with_zeros).reconstruction.detach(), with_zeros)
    assert quality.fvu == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="a row of zeros, first 100"):
        fit(with_zeros, 32, 2, epochs=1, batch_size=50)


def test_geometric_median():
    line = torch.tensor([[0.0, 0.0], [1, 0], [2, 0], [3, 0], [1000, 0]])
    torch.testing.assert_close(geometric_median(line).float(), torch.tensor([2.0, 0.0]), rtol=0, atol=1e-3)
    points = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points[:20] += 50
    median = geometric_median(points, iterations=1000, tolerance=1e-12)
    directions = torch.nn.functional.normalize(points - median, dim=1)
    torch.testing.assert_close(directions.sum(dim=0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(geometric_median(torch.ones(5, 2)), torch.ones(2, dtype=torch.float64))


NAN, ZERO = planted(64), planted(64)
NAN[40, 1] = torch.inf
ZERO[9] = 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 33}, ValueError, r"k is 33 for d_latent 32; it must be in \[1, 32\]"),
        ({"k": 0}, ValueError, "k is 0 for d_latent 32"),
        ({"d_latent": 0}, ValueError, "d_latent is 0"),
        ({"features": NAN}, ValueError, "features has NaN or infinite values, first in row 40"),
        ({"features": ZERO}, ValueError, "features has a row of zeros, first 9"),
        ({"features": torch.ones(64, 4)}, ValueError, "features has equal rows only"),
        ({"features": torch.ones(64, 4).long()}, TypeError, "features is torch.int64"),
        ({"features": torch.ones(64)}, ValueError, r"features has the shape \(64,\); it must be \(n, d\)"),
        ({"batch_size": 65}, ValueError, r"batch_size is 65 for 64 samples; it must be in \[1, 64\]"),
        ({"learning_rate": 0}, ValueError, "learning_rate is 0"),
        ({"epochs": 0}, ValueError, "epochs is 0"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        fit(**{"features": planted(64), "d_latent": 32, "k": 2, "epochs": 1, "batch_size": 32} | change)


def test_input_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"x has the shape \(3, 7\); it must be \(b, 6\)"):
        TopKAutoencoder(6, 50, 4)(torch.randn(3, 7))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_frozen_half_keeps_its_random_weights_and_all_else_is_trained(half, tmp_path):
    x = torch.nn.functional.normalize(torch.randn(400, 12, generator=torch.Generator().manual_seed(0)))
    start = TopKAutoencoder(12, 24, 4, torch.Generator().manual_seed(3))
    settings = {"epochs": 4, "batch_size": 50, "learning_rate": 1e-2, "seed": 3}
    trained = fit(x, 24, 4, frozen=half, **settings).autoencoder
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, getattr(start, name)) == (name == half)
    assert evaluate(trained, x).fvu < 0.9 * evaluate(start, x).fvu
    # one that was stopped goes on to the same bits
    fit(x, 24, 4, frozen=half, checkpoint_dir=tmp_path, **settings | {"epochs": 2})
    again = fit(x, 24, 4, frozen=half, checkpoint_dir=tmp_path, **settings).autoencoder
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, getattr(trained, name))
    with pytest.raises(ValueError, match=f"of another training .frozen: '{half}' there, None now"):
        fit(x, 24, 4, checkpoint_dir=tmp_path, **settings)


def test_an_unknown_half_is_named():
    with pytest.raises(ValueError, match="frozen is 'bias'; it must be one of 'encoder', 'decoder'"):
        fit(torch.randn(60, 4), 8, 2, frozen="bias", batch_size=20)
