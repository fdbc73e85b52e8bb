"""diffusion.py against what it was not written from: the authors' arrays, enumeration, finite
differences, chi-square."""
import itertools
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion
import train
from diffusion import (categorical, consistency_pair, coupled_pair, cross_entropy, evaluate,
                       gaussian_scales, head_loss, largest_normals, masked_reverse_step,
                       mdlm_nelbo, nelbo, nelbo_and_grad, noise_schedule, other_tokens,
                       per_token, q_sample, reverse_step, soft_tokens, stratified_times,
                       teacher_kl, token_nll, top_p_filter, transform)
from helpers import mean_and_error, reference
from literal import posterior
from model import DiT, DiTConfig
from sample import Loaded, denoise


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def relative(a, b):
    return ((a - b).abs() / b.abs().clamp(min=1e-300)).max().item()


def fits(counts, probs, p=1e-4):
    """Chi-square: could these counts have come from probs? The seeds are fixed."""
    counts, probs = np.asarray(counts, float), np.asarray(probs, float)
    assert counts[probs == 0].sum() == 0
    keep = probs > 0
    if keep.sum() == 1:                                                  # nothing left to chance
        return True
    expected = counts.sum() * probs[keep] / probs[keep].sum()
    return stats.chisquare(counts[keep], expected).pvalue > p


def random_model(K, T=8, causal=False, std=0.4):
    torch.manual_seed(1)
    model = DiT(DiTConfig(K, T, 2, 2, 16, 8, 0.0, causal)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


# --------------------------------------------------------------------------------------------------
# schedules

def test_transform_against_scipy_and_the_published_table():
    exact, table = reference('transform_exact_'), reference('transform_pkl_gpt2_')
    for K in (2, 256, 50257):
        alpha, dalpha = transform(exact['gamma'], K)
        assert (alpha - exact[f'K{K}_alpha']).abs().max() < 1e-13
        assert (dalpha - exact[f'K{K}_dalpha_dgamma']).abs().max() < 1e-13
        assert relative(alpha, exact[f'K{K}_alpha']) < 1e-10
    alpha, _ = transform(table['gamma'], 50257)
    assert (alpha - table['alpha']).abs().max() < 1e-10


def test_transform_by_drawing_gaussians():
    gamma, K, n = torch.tensor([[-1.5]]), 50, 200_000
    a, s = gaussian_scales(gamma)
    w = s * torch.randn(n, K, dtype=torch.float64)
    w[:, 7] += a.item()
    alpha = transform(gamma, K)[0].item()
    counts = np.bincount(w.argmax(-1), minlength=K)
    probs = np.full(K, (1 - alpha) / K)
    probs[7] += alpha
    assert fits(counts, probs)


def test_transform_derivative_is_one():
    gamma, e = torch.linspace(-5, 3, 9, dtype=torch.float64), 1e-5
    slope = (transform(gamma + e, 4096)[0] - transform(gamma - e, 4096)[0]) / (2 * e)
    assert (transform(gamma, 4096)[1] - slope).abs().max() < 1e-8


def test_stratified_times_cover_the_range_whoever_draws_them():
    t = stratified_times(0.7, 0, 8, 8)
    assert sorted((t * 8).long().flatten().tolist()) == list(range(8))   # one in each eighth
    halves = torch.cat([stratified_times(0.7, 0, 4, 8), stratified_times(0.7, 4, 4, 8)])
    assert torch.equal(t, halves)


def test_noise_schedule_and_its_derivative():
    t = stratified_times(0.7, 0, 8, 8)
    alpha, dalpha = noise_schedule(t)
    assert relative((noise_schedule(t + 1e-6)[0] - alpha) / 1e-6, dalpha) < 1e-6


# --------------------------------------------------------------------------------------------------
# noise

def test_q_sample_frequencies():
    x0 = torch.full((100_000, 1), 2)
    xt = q_sample(x0, torch.tensor(0.4), 7)
    probs = np.full(7, 0.6 / 7)
    probs[2] += 0.4
    assert fits(np.bincount(xt.flatten(), minlength=7), probs)


def test_largest_normals_are_those_of_a_sorted_draw():
    n, k = 40, 3
    ours = largest_normals((20_000,), n, k, 'cpu')
    sorted_draw = torch.randn(20_000, n, dtype=torch.float64).sort(descending=True).values[:, :k]
    for i in range(k):
        assert stats.ks_2samp(ours[:, i], sorted_draw[:, i]).pvalue > 1e-3
    for i in range(1, k):
        gaps = ours[:, 0] - ours[:, i]
        assert stats.ks_2samp(gaps, sorted_draw[:, 0] - sorted_draw[:, i]).pvalue > 1e-3


def test_other_tokens_are_every_ordered_choice_equally_often():
    tokens = other_tokens(torch.full((60_000, 1), 1), 5, 3).squeeze(1)
    assert (tokens != 1).all()
    assert (tokens[:, 0] != tokens[:, 1]).all()
    assert (tokens[:, 1] != tokens[:, 2]).all()
    codes = (tokens * torch.tensor([25, 5, 1])).sum(-1)
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 4 * 3 * 2
    assert fits(counts, np.ones(24))


def dense_softmax(x0, gamma, tau, K):
    """The curriculum as the paper writes it: K Gaussians a position."""
    a, s = gaussian_scales(gamma)
    w = s.unsqueeze(-1) * torch.randn(*x0.shape, K, dtype=torch.float64)
    w.scatter_add_(-1, x0.unsqueeze(-1), a.expand(x0.shape).unsqueeze(-1).contiguous())
    return (w / tau).softmax(-1), w.argmax(-1)


@pytest.mark.parametrize('K, k, tau, gamma', [
    (200, 5, 0.02, -2.5), (200, 3, 0.1, -1.0), (50, 50, 0.3, -1.0), (5, 5, 1.0, 0.0)])
def test_soft_tokens_against_the_dense_softmax(K, k, tau, gamma):
    x0 = torch.randint(K, (4000, 5))
    g = torch.full((4000, 1), gamma)
    ids, weights, zt = soft_tokens(x0, g, tau, K, k)
    dense, _ = dense_softmax(x0, g, tau, K)
    assert torch.equal(zt, ids[..., 0])
    assert (weights[..., :-1] >= weights[..., 1:]).all()
    assert all((ids[..., i] != ids[..., j]).all() for i in range(k) for j in range(i))

    # where k < K the clean token may stand in for the k-th noisiest: only the first k - 1 are
    # surely the dense ones
    n = k - 1 if k < K else k
    ours = weights[..., :n].double().flatten(0, 1)
    exact = dense.sort(descending=True).values[..., :n].flatten(0, 1)
    error = ((ours.var(0) + exact.var(0)) / len(ours)).sqrt()
    assert ((ours.mean(0) - exact.mean(0)).abs() < 4 * error + 1e-7).all()

    kept, alpha = (zt == x0).float().mean().item(), transform(g[:1], K)[0].item()
    P = alpha + (1 - alpha) / K
    assert abs(kept - P) < 4 * (P * (1 - P) / zt.numel()) ** 0.5
    mass = dense.gather(-1, x0.unsqueeze(-1)).squeeze(-1)                # of the clean token
    own = (weights * (ids == x0.unsqueeze(-1))).sum(-1).double()
    error = ((own.var() + mass.var()) / own.numel()).sqrt()
    assert abs(own.mean() - mass.mean()) < 4 * error + 1e-7


def test_what_the_weights_lack_is_the_mass_of_all_other_tokens(K=7, k=5, tau=0.8):
    """In units of exp(noise): as many tokens as are left, each a normal below the last one
    drawn."""
    x0, gamma = torch.randint(K, (20, 6)), torch.linspace(-2, 1, 20).unsqueeze(-1)
    torch.manual_seed(5)
    ids, weights, _ = soft_tokens(x0, gamma, tau, K, k)
    torch.manual_seed(5)
    cut = largest_normals(x0.shape, K - 1, k - 1, 'cpu')[..., -1:].clone()
    last = weights.masked_fill(ids == x0.unsqueeze(-1), 2).amin(-1)      # the weight of that one
    b = gaussian_scales(gamma)[1] / tau
    ours = (1 - weights.sum(-1, dtype=torch.float64)) / last * torch.exp(b * cut.squeeze(-1))
    z = cut - torch.linspace(0, 12, 20_001, dtype=torch.float64)
    phi = torch.exp(-z * z / 2)
    exact = (K - k) * (phi * torch.exp(b.unsqueeze(-1) * z)).sum(-1) / phi.sum(-1)
    assert (ours / exact - 1).abs().max() < 1e-2


def test_soft_tokens_become_one_hot_as_tau_vanishes():
    x0 = torch.randint(1000, (50, 20))
    _, weights, zt = soft_tokens(x0, torch.full((50, 1), -2.5), 1e-9, 1000, 4)
    assert (weights[..., 0] > 1 - 1e-6).float().mean() > 0.999
    assert (weights[..., 1:] < 1e-6).float().mean() > 0.999
    wrong = torch.bincount(zt[zt != x0], minlength=1000)
    assert wrong.max() < 12                                              # they are spread out


@pytest.mark.parametrize('K', [5, 1000])
def test_coupled_pair_against_shared_gaussians(K):
    n, gammas = 20_000, (torch.tensor([[-1.0]]), torch.tensor([[-2.5]]))
    x0 = torch.randint(K, (n, 1))
    zt, zs = coupled_pair(x0, *gammas, K)
    noise = torch.randn(n, K, dtype=torch.float64)
    dense = []
    for gamma in gammas:
        a, s = gaussian_scales(gamma)
        w = (s * noise).scatter_add(-1, x0, a.expand(n, 1))
        dense.append(w.argmax(-1, keepdim=True))

    def table(t, s):  # clean or not, at t and at s, and whether the two are equal
        codes = (t == x0) * 4 + (s == x0) * 2 + (t == s) * 1
        return np.bincount(codes.flatten(), minlength=8)
    ours, exact = table(zt, zs), table(*dense)
    some = ours + exact > 0
    assert stats.chi2_contingency([ours[some], exact[some]]).pvalue > 1e-3
    for z, gamma in ((zt, gammas[0]), (zs, gammas[1])):
        alpha = transform(gamma, K)[0].item()
        P = alpha + (1 - alpha) / K
        assert abs((z == x0).float().mean().item() - P) < 4 * (P * (1 - P) / n) ** 0.5


def test_a_consistency_pair_is_delta_apart_in_time():
    K, x0, u = 30, torch.randint(30, (6, 8)), stratified_times(0.2, 0, 6, 6)
    for delta in (1 / 512, 0.25):
        torch.manual_seed(1)
        zt, zs, sigma_t, sigma_s = consistency_pair(x0, u, delta, K)
        t = (1e-3 + (1 - 1e-3) * u + delta).clamp(max=1)
        gammas = -4 + 3 * t, -4 + 3 * (t - delta)
        torch.manual_seed(1)
        assert all(map(torch.equal, (zt, zs), coupled_pair(x0, *gammas, K)))
        for sigma, gamma in zip((sigma_t, sigma_s), gammas):
            assert sigma.shape == u.shape and sigma.dtype == torch.float32
            assert relative(sigma.double(), -transform(gamma, K)[0].log()) < 1e-6


# --------------------------------------------------------------------------------------------------
# losses

def random_case(K, shape=(4, 9)):
    """x0, xt (B,T), alpha, dalpha (B,1) float64: what nelbo takes beside the logits."""
    x0 = torch.randint(K, shape)
    alpha = torch.rand(shape[0], 1, dtype=torch.float64) * 0.998 + 0.001
    dalpha = -torch.rand(shape[0], 1, dtype=torch.float64) - 0.1
    return x0, q_sample(x0, alpha, K), alpha, dalpha


@pytest.mark.parametrize('K', [5, 257])
def test_nelbo_against_the_published_code(K):
    r = reference(f'nelbo{K}_')
    x, alphas = (r['xt'], r['x0']), (r['alpha_t'], r['dalpha_t_var'])
    assert relative(nelbo(r['logits'], *x, *alphas), r['loss_dvar']) < 1e-10
    single = nelbo(r['logits'].float(), *x, *(v.float() for v in alphas))
    assert single.dtype == torch.float32
    assert relative(single.double(), r['loss_dvar']) < 1e-4


@pytest.mark.parametrize('K', [3, 7])
def test_nelbo_is_the_limit_of_the_posteriors_divergence(K):
    """KL(q(xs|xt,x0) || q(xs|xt,model)) / dt for a small dt, by enumeration of xs."""
    x0, xt, _, _ = random_case(K, shape=(6, 5))
    logits = torch.randn(6, 5, K, dtype=torch.float64)
    t, dt = torch.rand(6, 1, dtype=torch.float64) * 0.9 + 0.05, 1e-7
    alpha_t, dalpha = noise_schedule(t)
    alpha_s, _ = noise_schedule(t - dt)
    alphas = alpha_s.unsqueeze(-1), alpha_t.unsqueeze(-1)
    true = posterior(F.one_hot(x0, K).double(), xt, *alphas)
    model = posterior(logits.softmax(-1), xt, *alphas)
    kl = (true * (true / model).log()).sum(-1) / dt
    assert (nelbo(logits, xt, x0, alpha_t, dalpha) - kl).abs().max() < 1e-4 * kl.max()


def test_nelbo_is_zero_for_a_perfect_model_only():
    x0, xt, alpha, dalpha = random_case(50)
    sure = 200.0 * F.one_hot(x0, 50).double()
    assert nelbo(sure, xt, x0, alpha, dalpha).abs().max() < 1e-9
    assert (nelbo(torch.randn(4, 9, 50).double(), xt, x0, alpha, dalpha) > 1e-6).all()


def test_nelbo_in_float32_at_a_large_vocabulary():
    K = 50257
    for a in (0.001, 0.1, 0.5, 0.9, 0.999):
        x0 = torch.randint(K, (4, 4))
        alpha, dalpha = torch.full((4, 1), a), -torch.ones(4, 1)
        xt = torch.where(torch.arange(4) < 2, x0, torch.randint(K, (4, 4)))  # half of them clean
        logits = 2 * torch.randn(4, 4, K)
        exact = nelbo(logits.double(), xt, x0, alpha.double(), dalpha.double())
        assert relative(nelbo(logits, xt, x0, alpha, dalpha).double(), exact) < 1e-4


@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize('K', [2, 5, 4099])
def test_nelbo_and_grad_against_autograd_of_nelbo(K, dtype, tolerance):
    """Of the same logits in float64; noised and clean tokens, from hardly any noise to all."""
    wide = torch.promote_types(dtype, torch.float32)
    alpha = torch.tensor([[0.001], [0.1], [0.5], [0.9], [0.999]], dtype=wide)
    dalpha = -torch.rand(5, 1, dtype=wide) - 0.1
    x0 = torch.randint(K, (5, 6))
    xt = torch.where(torch.arange(6) < 3, x0, torch.randint(K, (5, 6)))
    logits, scale = (2 * torch.randn(5, 6, K)).to(dtype), torch.rand(5, 6, dtype=wide) - 0.3
    precise = logits.double().detach().clone().requires_grad_()
    exact = nelbo(precise, xt, x0, alpha.double(), dalpha.double())
    exact_grad = torch.autograd.grad((exact * scale).sum(), precise)[0]
    loss, grad = nelbo_and_grad(logits, xt, x0, alpha, dalpha, scale)
    assert grad.dtype == dtype and loss.shape == xt.shape
    assert relative(loss.double(), exact) < tolerance
    largest = exact_grad.abs().amax((1, 2), keepdim=True)                # at each alpha
    assert ((grad.double() - exact_grad).abs() / largest).max() < tolerance


@pytest.mark.parametrize('alpha', [0.5, 0.999, 0.99999])
def test_the_bound_of_a_network_that_is_sure_of_a_wrong_token(alpha):
    """There the model's rates from the other tokens are less than float32 can add to 1."""
    K, n = 50_257, 90
    xt, x0 = torch.full((n,), 3), torch.full((n,), 5)
    logits = torch.randn(n, K)
    logits[:, 3] = torch.linspace(11, 30, n)
    times = torch.full((n,), alpha, dtype=torch.float64), -torch.ones(n, dtype=torch.float64)
    exact, exact_grad = nelbo_and_grad(logits.double(), xt, x0, *times, torch.ones(n))
    loss, grad = nelbo_and_grad(logits, xt, x0, *times, torch.ones(n))
    assert relative(loss.double(), exact) < 1e-4
    assert relative(grad[:, 5].double(), exact_grad[:, 5]) < 1e-4
    assert grad.isfinite().all()


def focal(logits, x0, power):
    """A user's loss of no use: cross-entropy, less of it where the model is sure already."""
    p = logits.softmax(-1).gather(-1, x0.unsqueeze(-1)).squeeze(-1)
    return -(1 - p) ** power * p.log()


def of_head(h, weight, bias):
    """A model whose trunk puts out h, whatever it gets."""
    linear = SimpleNamespace(weight=weight, bias=bias)
    return SimpleNamespace(hidden=lambda x, sigma: h, output_layer=SimpleNamespace(linear=linear))


@pytest.mark.parametrize('loss_fn', [nelbo, focal])
@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('T, K', [(9, 4099), (32, 4099), (75, 4097)])    # chunks of 64: 36 tokens,
def test_head_loss_equals_the_loss_of_all_logits(loss_fn, dtype, tolerance, T, K):  # 128, 300
    x0, xt, alpha, dalpha = random_case(K, shape=(4, T))
    alpha = alpha * 0.9 + 0.05
    args = [xt, x0, alpha, dalpha] if loss_fn is nelbo else [x0, 1 + alpha]
    shapes = ((4, T, 16), (K, 16), (K,))
    inputs = [torch.randn(s, dtype=torch.float64).div(3).to(dtype).requires_grad_() for s in shapes]
    precise = [v.detach().double().requires_grad_() for v in inputs]
    losses = loss_fn(F.linear(*precise), *args)
    mask = (torch.rand(4, T) < 0.8).double()
    for m, exact in ((None, losses.mean()), (mask, (losses * mask).sum() / mask.sum())):
        loss = head_loss(*inputs, loss_fn, args, mask=m)
        assert relative(loss.double(), exact) < tolerance
        ours = torch.autograd.grad(2 * loss, inputs)
        for a, b in zip(ours, torch.autograd.grad(2 * exact, precise, retain_graph=True)):
            assert a.dtype == dtype
            assert (a.double() - b).abs().max() < tolerance * b.abs().max()
    each = per_token(of_head(*inputs), xt, None, loss_fn, args)
    assert (each.double() - losses).abs().max() < tolerance * losses.max()


@pytest.mark.parametrize('loss_fn', [nelbo, focal])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_a_padded_head_is_the_same_head(monkeypatch, loss_fn, dtype):
    """On a GPU the vocabulary is padded to a multiple of 64 in half precision; here anywhere."""
    K = 4099
    x0, xt, alpha, dalpha = random_case(K, shape=(2, 60))
    args = [xt, x0, alpha, dalpha] if loss_fn is nelbo else [x0, 1 + alpha]
    shapes = ((2, 60, 16), (K, 16), (K,))
    inputs = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    results = []
    for padding in (0, 61):
        monkeypatch.setattr(diffusion, 'cast_head', lambda h, weight, bias: (
            F.pad(weight, (0, 0, 0, padding)), F.pad(bias, (0, padding))))
        loss = head_loss(*inputs, loss_fn, args)
        each = per_token(of_head(*inputs), xt, None, loss_fn, args)
        results.append([loss, each, *torch.autograd.grad(loss, inputs)])
    for plain, padded in zip(*results):
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 1e-2)
        assert plain.shape == padded.shape
        assert (plain - padded).abs().max() <= tolerance * plain.abs().max()


def test_head_loss_gradcheck():
    x0, xt, alpha, dalpha = random_case(7, shape=(2, 3))
    shapes = ((2, 3, 4), (7, 4), (7,))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    loss = partial(head_loss, loss_fn=nelbo, args=[xt, x0, alpha, dalpha])
    assert torch.autograd.gradcheck(loss, inputs)


def test_teacher_kl_equals_that_of_the_full_vectors():
    h, h_teacher = (torch.randn(2, 50, 8, dtype=torch.float64) for _ in range(2))
    weight, bias, weight_teacher, bias_teacher = (
        torch.randn(s, dtype=torch.float64) for s in ((2099, 8), (2099,)) * 2)
    ours, exact = ([v.clone().requires_grad_() for v in (h, weight, bias)] for _ in range(2))
    loss_fn = partial(teacher_kl, weight=weight_teacher, bias=bias_teacher)
    loss = head_loss(*ours, loss_fn, [h_teacher])
    log_p = F.linear(*exact).log_softmax(-1)
    log_q = F.linear(h_teacher, weight_teacher, bias_teacher).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert relative(loss, kl) < 1e-10
    for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(kl, exact)):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for v in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(v):
                self.numel = max(self.numel, v.numel())
        return out


def users_loss(logits, xt, x0, alpha, dalpha):
    return focal(logits, x0, 2 - alpha)


@pytest.mark.parametrize('objective, step, loss_fn', [
    ('duo', 0, None), ('duo', 10, None), ('mdlm', 10, None), ('ar', 10, None), ('dcd', 10, None),
    ('duo', 0, users_loss), ('duo', 10, users_loss)])
def test_no_tensor_holds_all_logits(monkeypatch, objective, step, loss_fn):
    for name, value in dict(objective=objective, curriculum_frac=0.5, max_iters=20).items():
        monkeypatch.setattr(train, name, value)
    kind = 'duo' if objective == 'dcd' else objective
    B, T, K = 4, 128, 4000
    config = DiTConfig(K + (kind == 'mdlm'), T, 1, 2, 16, 8, 0.0, kind == 'ar')
    model, teacher = DiT(config), DiT(config)
    loaded = Loaded(model, None, dict(objective=kind, data=dict(vocab_size=K)))
    x0, u = torch.randint(K, (B, T)), stratified_times(0.5, 0, B, B)
    loss_fn = loss_fn or train.loss_of(objective, K)
    with Largest() as largest:
        train.training_loss(model, x0, u, step, K, loss_fn, teacher).backward()
        token_nll(model, x0, u, K, kind, range(B))
        if kind != 'ar':
            next(denoise(loaded, x0, steps=4))
    assert K * 16 < largest.numel < B * T * K / 4
    with Largest() as largest:                                           # such a tensor is noticed
        model(x0, torch.zeros(B))
    assert largest.numel >= B * T * K


def test_the_bound_where_there_is_hardly_any_noise():
    """Its limit is 0.999 (1 - p) / (K p), p of the clean token, and 0.999 the schedule's slope.
    float32 would take 1 - alpha for zero."""
    torch.manual_seed(0)
    model = random_model(8)
    x0 = torch.randint(8, (2, 16))
    p = model(x0, torch.zeros(2)).softmax(-1).gather(-1, x0.unsqueeze(-1)).squeeze(-1)
    nats = token_nll(model, x0, torch.full((2, 1), 1e-9, dtype=torch.float64), 8, 'duo', range(2))
    assert torch.allclose(nats, 0.999 * (1 - p) / (8 * p), rtol=0.01)


def same(f):
    return f


@pytest.mark.parametrize('loss_fn', [nelbo, users_loss, cross_entropy])
def test_compiled_equals_eager(loss_fn):
    if shutil.which('g++') is None:
        pytest.skip('torch.compile needs a C++ compiler')
    K = 301
    x0, xt, alpha, dalpha = random_case(K, shape=(2, 40))
    model = random_model(K, T=40, std=0.2)
    linear = model.output_layer.linear
    args = [x0] if loss_fn is cross_entropy else [xt, x0, alpha, dalpha]
    results = []
    for wrap in (same, torch.compile):
        h = wrap(model.hidden)(xt, -alpha.log())
        loss = head_loss(h, linear.weight, linear.bias, loss_fn, args, compile=wrap != same)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for eager, compiled in zip(*results):
        assert (eager - compiled).abs().max() < 1e-4 * eager.abs().max()


@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_one_graph_of_the_loss_and_its_gradient(dtype, tolerance):
    if shutil.which('g++') is None:
        pytest.skip('torch.compile needs a C++ compiler')
    x0, xt, alpha, dalpha = random_case(301, shape=(1, 40))
    args = [v.flatten() for v in (xt, x0, alpha.expand_as(x0), dalpha.expand_as(x0))]
    logits, scale = torch.randn(40, 320).to(dtype), torch.rand(40, dtype=torch.float64)
    eager = diffusion.loss_and_grad(nelbo, logits, 301, args, scale)
    compiled = torch.compile(diffusion.loss_and_grad, fullgraph=True)
    for one, other in zip(eager, compiled(nelbo, logits, 301, args, scale)):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * one.abs().max()
    assert not eager[1][:, 301:].any()                   # padding has no gradient


def test_fp16_gradients_are_made_at_the_scalers_scale():
    """At a large vocabulary and a long row: a mean over so many tokens, unscaled, underflows."""
    K, T = 50257, 96
    h = torch.randn(1, T, 16)
    weight, bias = torch.zeros(K, 16), torch.zeros(K)                    # as a training starts
    x0, xt, alpha, dalpha = random_case(K, shape=(1, T))
    args = [xt, x0, alpha, dalpha]
    grads = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0 ** 16)):
        inputs = [v.clone().requires_grad_() for v in (h, weight, bias)]
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = head_loss(*inputs, nelbo, args, grad_scale=torch.tensor(scale))
        assert torch.isfinite(loss)
        (loss * scale).backward()
        grads.append([v.grad / scale for v in inputs[1:]])
    for exact, half in zip(*grads):
        assert torch.isfinite(half).all()
        assert (half - exact).abs().max() < 5e-3 * exact.abs().max()
        lost = (half == 0) & (exact.abs() > 1e-6 * exact.abs().max())
        assert lost.float().mean() < 0.01
    # a scale that is too large shows in the gradient: the scaler skips the step and halves it
    inputs = [v.clone().requires_grad_() for v in (h, weight, bias)]
    optimizer = torch.optim.AdamW(inputs, fused=True)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 40)
    grad_scale = scaler.scale(torch.ones(()))
    with torch.autocast('cpu', torch.float16):
        loss = head_loss(*inputs, nelbo, args, grad_scale=grad_scale)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0 ** 39
    assert all(map(torch.equal, inputs, (h, weight, bias)))


# --------------------------------------------------------------------------------------------------
# reverse steps

@pytest.mark.parametrize('K', [5, 257])
def test_posterior_against_the_published_code(K):
    r, alphas = reference(f'posterior{K}_'), reference('posterior_alpha_')
    alphas = alphas['s'].unsqueeze(-1), alphas['t'].unsqueeze(-1)
    assert relative(posterior(r['logits'].softmax(-1), r['xt'], *alphas), r['q_model']) < 1e-10
    x0 = F.one_hot(r['x0'], K).double()
    assert (posterior(x0, r['xt'], *alphas) - r['q_true']).abs().max() < 1e-12


def test_posterior_by_bayes():
    K, a_s, a_t = 3, 0.7, 0.4

    def forward(a):
        return a * torch.eye(K, dtype=torch.float64) + (1 - a) / K       # [from, to]
    for x0 in range(K):
        for xt in range(K):
            joint = forward(a_s)[x0] * forward(a_t / a_s)[:, xt]         # q(xs|x0) q(xt|xs)
            q = posterior(torch.eye(K, dtype=torch.float64)[x0], torch.tensor(xt), a_s, a_t)
            assert (q - joint / joint.sum()).abs().max() < 1e-12


@pytest.mark.parametrize('kappa', [1.0, 0.6, 0.0])
@pytest.mark.parametrize('a_s, a_t', [(0.7, 0.4), (1.0, 0.9), (0.05, 0.001)])
def test_reverse_step_frequencies(kappa, a_s, a_t):
    K, n = 7, 60_000
    logits, xt = torch.randn(K), 3
    p = logits.double().softmax(-1)
    q = posterior(p, torch.tensor(xt), a_s, a_t)
    q0 = posterior(p, torch.tensor(xt), 1.0, a_t)
    expected = kappa * q + (1 - kappa) * (a_s * q0 + (1 - a_s) / K)
    xs = reverse_step(logits.expand(n, K), torch.full((n,), xt), a_s, a_t, kappa)
    assert fits(np.bincount(xs, minlength=K), expected)


def test_a_step_at_alpha_1_replaces_only_a_token_without_a_probability():
    """Which a top-p may leave it: by one that has some, not by noise."""
    xt, logits = torch.full((999,), 5), torch.zeros(999, 7)
    assert (reverse_step(logits, xt, 1.0, 1.0) == 5).all()
    logits[:, [0, 1, 3, 4, 5, 6]] = -torch.inf
    assert (reverse_step(logits, xt, 1.0, 1.0) == 2).all()


def test_a_corrector_step_keeps_the_noisy_marginal():
    """kappa = 0, an exact denoiser, one token: xt ~ q(xt) gives xs ~ q(xs), by the whole vectors
    and by drawing."""
    data = torch.tensor([0.6, 0.1, 0.25, 0.05], dtype=torch.float64)
    for a_s, a_t in ((0.5, 0.5), (0.8, 0.3), (0.2, 0.001)):
        q_t, q_s = (a * data + (1 - a) / 4 for a in (a_t, a_s))
        q_0 = posterior(data.expand(4, 4), torch.arange(4), 1.0, a_t)    # (xt, x0)
        assert (q_t @ (a_s * q_0 + (1 - a_s) / 4) - q_s).abs().max() < 1e-12
        xt = torch.multinomial(q_t, 60_000, replacement=True)
        xs = reverse_step(data.log().float().expand(60_000, 4), xt, a_s, a_t, 0.0)
        assert fits(np.bincount(xs, minlength=4), q_s)


@pytest.mark.parametrize('kappa', [1.0, 0.6, 0.0])
@pytest.mark.parametrize('a_s, a_t', [(0.64, 0.4), (1.0, 0.9), (0.05, 0.001)])
def test_masked_reverse_step_frequencies(kappa, a_s, a_t):
    """Of a mask, and of a token that shows: which is x0 then."""
    logits, n = torch.randn(5), 60_000                                   # 5 tokens; id 5: the mask
    mask = torch.eye(6, dtype=torch.float64)[5]
    for xt, x0 in ((5, logits.double().softmax(-1)), (2, torch.eye(5, dtype=torch.float64)[2])):
        clean = torch.cat([x0, torch.zeros(1)])
        move = (a_s - a_t) / (1 - a_t) if xt == 5 else 1.0
        posterior = move * clean + (1 - move) * mask
        fresh = a_s * clean + (1 - a_s) * mask
        expected = kappa * posterior + (1 - kappa) * fresh
        xs = masked_reverse_step(logits.expand(n, 5), torch.full((n,), xt), a_s, a_t, kappa,
                                 mask_id=5)
        assert fits(np.bincount(xs, minlength=6), expected)


def test_categorical_draws_the_tail():
    p = torch.rand(1003)
    p[[5, 1002]] = 0
    assert fits(np.bincount(categorical(p.expand(60_000, -1)), minlength=1003), p)
    # ten thousand tokens of 1e-10, together 1e-6 of the mass: float32 Gumbels would draw none
    rare = torch.full((10_001,), 1e-10)
    rare[0] = 1 - 1e-6
    assert (categorical(rare.expand(4000, -1)) != 0).sum() <= 2
    rare[0] = 1e-6                                                       # now they are half of it
    draws = (categorical(rare.expand(4000, -1)) != 0).float().mean()
    assert abs(draws - 0.5) < 0.04


def test_categorical_finds_tokens_of_a_billionth(monkeypatch):
    """Beside a token that weighs 1, with the random number given: float32 sums would lose the tail.
    """
    p = torch.full((100,), 1e-9)
    p[0] = 1
    for token in (1, 32, 75):
        u = (1 + (token - 0.5) * 1e-9) / (1 + 99e-9)
        monkeypatch.setattr(torch, 'rand_like', lambda x: torch.full_like(x, u))
        assert categorical(p).item() == token


def test_top_p_keeps_the_smallest_nucleus():
    p = torch.tensor([0.1, 0.5, 0.15, 0.25])

    def kept(top_p):
        return torch.isfinite(top_p_filter(p.log(), top_p)).tolist()
    assert kept(0.4) == [False, True, False, False]
    assert kept(0.7) == [False, True, False, True]
    assert kept(0.8) == [False, True, True, True]
    assert kept(1.0) == [True] * 4
    assert kept(1e-30) == [False, True, False, False]
    equals = torch.tensor([[0.0, 1.0, 0.0, 1.0], [-torch.inf, 0.0, 0.0, -torch.inf]])
    assert top_p_filter(equals, 0.3).isfinite().tolist() == [
        [False, True, False, True], [False, True, True, False]]


def test_the_nucleus_of_many_tokens():
    """By a loop over the tokens from the likeliest on, row by row."""
    logits = 2 * torch.randn(20, 1000)
    for top_p in (0.3, 0.9, 0.99):
        for row, filtered in zip(logits, top_p_filter(logits, top_p)):
            p = row.double().softmax(-1)
            mass, nucleus = 0, set()
            for token in p.argsort(descending=True).tolist():
                if mass < top_p:
                    nucleus.add(token)
                mass += p[token].item()
            kept = filtered.isfinite()
            assert set(kept.nonzero().flatten().tolist()) == nucleus
            assert torch.equal(filtered[kept], row[kept])


# --------------------------------------------------------------------------------------------------
# the baselines

def tabular(K, T, seed=0):
    """A 'model' of T masked tokens: any logits (T,K+1) for each pattern of what shows."""
    torch.manual_seed(seed)
    patterns = itertools.product(range(K + 1), repeat=T)
    return {xt: torch.randn(T, K + 1, dtype=torch.float64) for xt in patterns}


def test_cross_entropy_is_torchs():
    logits, targets = torch.randn(4, 9, 33, dtype=torch.float64), torch.randint(33, (4, 9))
    exact = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='none').view(4, 9)
    assert relative(cross_entropy(logits, targets), exact) < 1e-10
    half = cross_entropy(logits.bfloat16(), targets)
    assert half.dtype == torch.float32 and relative(half.double(), exact) < 3e-2


@pytest.mark.parametrize('K, T', [(2, 2), (2, 3), (3, 2)])
def test_mdlm_nelbo_is_the_mean_over_all_orders_of_writing(K, T):
    model, x0 = tabular(K, T), torch.arange(T) % K
    nats = 0                                     # of each order, as an AR model would pay for it
    for order in itertools.permutations(range(T)):
        xt = [K] * T
        for i in order:
            nats -= model[tuple(xt)][i, :K].log_softmax(-1)[x0[i]].item()
            xt[i] = x0[i].item()
    nats /= math.factorial(T)
    nodes, weights = np.polynomial.legendre.leggauss(16)                 # exact for polynomials
    bound = 0
    for node, weight in zip(nodes, weights):
        alpha = torch.tensor((node + 1) / 2)
        for shown in itertools.product((0, 1), repeat=T):
            xt = torch.where(torch.tensor(shown) == 1, x0, K)
            q = alpha ** sum(shown) * (1 - alpha) ** (T - sum(shown))
            logits = model[tuple(xt.tolist())]
            loss = mdlm_nelbo(logits, xt, x0, alpha.expand(T), -torch.ones(T), K)
            bound += weight / 2 * q.item() * loss.sum().item()
    assert bound == pytest.approx(nats, rel=1e-10)


# --------------------------------------------------------------------------------------------------
# evaluation

@pytest.mark.parametrize('objective', ['duo', 'mdlm'])
@torch.no_grad()
def test_evaluate_is_within_its_error_of_the_exact_bound(objective):
    """K = 3, T = 2: the bound by enumerating every xt, and quadrature over t."""
    K, x0 = 3, torch.tensor([[2, 0]])
    n_tokens = K + (objective == 'mdlm')
    model = random_model(n_tokens, T=2, std=0.15)
    loss_fn = nelbo if objective == 'duo' else partial(mdlm_nelbo, mask_id=K)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    exact = 0
    for node, weight in zip(nodes, weights):
        alpha, dalpha = noise_schedule(torch.tensor([[(node + 1) / 2]]))
        xt = torch.cartesian_prod(*[torch.arange(n_tokens)] * 2)         # all of them, (n,2)
        if objective == 'duo':
            q = (alpha * (xt == x0) + (1 - alpha) / K).prod(-1)
            sigma = -alpha.log()
        else:
            masked = torch.where(xt == K, 1 - alpha, 0)
            q = torch.where(xt == x0, alpha, masked).prod(-1)
            sigma = torch.zeros(1, 1)
        xt, q = xt[q > 0], q[q > 0]
        sigma, alphas, dalphas = (v.expand(len(xt), 1) for v in (sigma, alpha, dalpha))
        logits = model(xt, sigma.float()).double()
        losses = loss_fn(logits, xt, x0.expand_as(xt), alphas, dalphas)
        exact += weight / 2 * (q @ losses.mean(-1)).item()

    def get_rows(numbers):
        return x0.expand(len(numbers), 2)
    nats = evaluate(model, objective, K, get_rows, 4000, 4000)
    mean, error = mean_and_error(nats)
    assert abs(mean - exact) < 4 * error and error < 0.1 * exact


def test_evaluate_repeats_itself():
    model = random_model(11, std=0.3)
    x0 = torch.randint(11, (10, 8))

    def get_rows(numbers):
        return x0[list(numbers)]
    nats = evaluate(model, 'duo', 11, get_rows, 10, 4)
    torch.manual_seed(99)
    assert torch.equal(nats, evaluate(model, 'duo', 11, get_rows, 10, 4))


def test_a_rows_figure_does_not_depend_on_its_batch():
    model = random_model(11, std=0.3)
    x0 = torch.randint(11, (10, 8))
    nats = [evaluate(model, 'duo', 11, lambda numbers: x0[list(numbers)], 10, batch_size)
            for batch_size in (1, 4, 10)]
    assert (nats[0] - nats[1]).abs().max() < 1e-4 * nats[0].abs().max()
    assert (nats[0] - nats[2]).abs().max() < 1e-4 * nats[0].abs().max()


def test_evaluate_scores_no_pads():
    """Rows of unequal lengths: the mean is that over all scored tokens."""
    model, pad = random_model(11, causal=True), 10
    x0 = torch.randint(10, (6, 8))
    for row, length in enumerate((8, 3, 5, 2, 8, 6)):
        x0[row, length:] = pad
    nats = evaluate(model, 'ar', 11, lambda numbers: x0[list(numbers)], 6, 4, pad_id=pad)
    with torch.no_grad():
        losses = cross_entropy(model(x0[:, :-1]), x0[:, 1:])
    assert nats.mean().item() == pytest.approx(losses[x0[:, 1:] != pad].mean().item(), rel=1e-5)
