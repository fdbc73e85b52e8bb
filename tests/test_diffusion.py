"""diffusion.py against things it was not written from: the authors' arrays, enumeration, finite differences, chi-square."""
import itertools
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import train

from diffusion import (alpha_linear, categorical, commit, coupled_pair, cross_entropy, denoise, evaluate, gaussian, head_each,
                       head_loss, head_nelbo, largest_normals, loss_of, mask_step, mdlm_nelbo, mean_and_error, nelbo,
                       other_words, posterior, q_sample, reverse_step, sampling_schedule, soft_tokens,
                       stratified_times, teacher_kl, token_nll, top_p_filter, transform, write_on)
from model import DiT, DiTConfig

REFERENCE = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / 'data' / 'reference.npz').items()}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def relative(a, b):
    return ((a - b).abs() / b.abs().clamp(min=1e-300)).max().item()


def fits(counts, probs, p=1e-4):
    """Chi-square: could these counts have come from probs? Seeded, so it never flickers."""
    counts, probs = np.asarray(counts, float), np.asarray(probs, float)
    assert counts[probs == 0].sum() == 0
    keep = probs > 0
    return stats.chisquare(counts[keep], counts.sum() * probs[keep] / probs[keep].sum()).pvalue > p

# ---- schedules

def test_transform_against_scipy_and_the_published_table():
    for K in (2, 256, 50257):
        alpha, dalpha = transform(REFERENCE['transform_exact_gamma'], K)
        assert (alpha - REFERENCE[f'transform_exact_K{K}_alpha']).abs().max() < 1e-13
        assert (dalpha - REFERENCE[f'transform_exact_K{K}_dalpha_dgamma']).abs().max() < 1e-13
        assert relative(alpha, REFERENCE[f'transform_exact_K{K}_alpha']) < 1e-10
    alpha, _ = transform(REFERENCE['transform_pkl_gpt2_gamma'], 50257)
    assert (alpha - REFERENCE['transform_pkl_gpt2_alpha']).abs().max() < 1e-10


def test_transform_by_drawing_gaussians():
    gamma, K, n = torch.tensor([[-1.5]]), 50, 200_000
    a, s = gaussian(gamma)
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
    assert sorted((t * 8).long().flatten().tolist()) == list(range(8))           # one in each eighth
    halves = torch.cat([stratified_times(0.7, 0, 4, 8), stratified_times(0.7, 4, 4, 8)])
    assert torch.equal(t, halves)
    assert stratified_times(0.0, 0, 8, 8, low=0.25).min() == 0.25
    alpha, dalpha = alpha_linear(t)
    assert relative((alpha_linear(t + 1e-6)[0] - alpha) / 1e-6, dalpha) < 1e-6

# ---- noise

def test_q_sample_frequencies():
    x0 = torch.full((100_000, 1), 2)
    xt = q_sample(x0, torch.tensor(0.4), 7)
    assert fits(np.bincount(xt.flatten(), minlength=7), [0.6 / 7] * 2 + [0.4 + 0.6 / 7] + [0.6 / 7] * 4)


def test_largest_normals_are_those_of_a_sorted_draw():
    n, k = 40, 3
    mine = largest_normals((20_000,), n, k, 'cpu')
    theirs = torch.randn(20_000, n, dtype=torch.float64).sort(descending=True).values[:, :k]
    for i in range(k):
        assert stats.ks_2samp(mine[:, i], theirs[:, i]).pvalue > 1e-3
        assert stats.ks_2samp(mine[:, 0] - mine[:, i], theirs[:, 0] - theirs[:, i]).pvalue > 1e-3 or i == 0


def test_other_words_are_every_ordered_choice_equally_often():
    words = other_words(torch.full((60_000, 1), 1), 5, 3).squeeze(1)
    assert (words != 1).all() and (words[:, 0] != words[:, 1]).all() and (words[:, 1] != words[:, 2]).all()
    codes = (words * torch.tensor([25, 5, 1])).sum(-1)
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 4 * 3 * 2 and fits(counts, np.ones(24))


def dense_softmax(x0, gamma, tau, K):
    """The curriculum as the paper writes it: K Gaussians a position."""
    a, s = gaussian(gamma)
    w = s.unsqueeze(-1) * torch.randn(*x0.shape, K, dtype=torch.float64)
    w.scatter_add_(-1, x0.unsqueeze(-1), a.expand(x0.shape).unsqueeze(-1).contiguous())
    return (w / tau).softmax(-1), w.argmax(-1)


@pytest.mark.parametrize('K, k, tau, gamma', [(200, 5, 0.02, -2.5), (200, 3, 0.1, -1.0), (50, 50, 0.3, -1.0), (5, 5, 1.0, 0.0)])
def test_soft_tokens_against_the_dense_softmax(K, k, tau, gamma):
    x0 = torch.randint(K, (4000, 5))
    g = torch.full((4000, 1), gamma)
    ids, weights, zt = soft_tokens(x0, g, tau, K, k)
    dense, argmax = dense_softmax(x0, g, tau, K)
    assert torch.equal(zt, ids[..., 0]) and (weights[..., :-1] >= weights[..., 1:]).all()
    assert all((ids[..., i] != ids[..., j]).all() for i in range(k) for j in range(i))
    # where k < K the true word may stand in for the k-th of the noisy ones: the first k - 1 are the dense ones for sure
    n = k - 1 if k < K else k
    ours, theirs = weights[..., :n].double().flatten(0, 1), dense.sort(descending=True).values[..., :n].flatten(0, 1)
    error = ((ours.var(0) + theirs.var(0)) / len(ours)).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error + 1e-7).all()
    kept, alpha = (zt == x0).float().mean().item(), transform(g[:1], K)[0].item()
    P = alpha + (1 - alpha) / K
    assert abs(kept - P) < 4 * (P * (1 - P) / zt.numel()) ** 0.5
    mass = dense.gather(-1, x0.unsqueeze(-1)).squeeze(-1)                                  # of the true word
    own = (weights * (ids == x0.unsqueeze(-1))).sum(-1).double()
    assert abs(own.mean() - mass.mean()) < 4 * ((own.var() + mass.var()) / own.numel()).sqrt() + 1e-7


def test_soft_tokens_become_one_hot_as_tau_vanishes():
    x0 = torch.randint(1000, (50, 20))
    ids, weights, zt = soft_tokens(x0, torch.full((50, 1), -2.5), 1e-9, 1000, 4)
    assert (weights[..., 0] > 1 - 1e-6).float().mean() > 0.999 and (weights[..., 1:] < 1e-6).float().mean() > 0.999
    words = torch.bincount(zt[zt != x0], minlength=1000)
    assert words.max() < 12                                                                # the wrong words are spread out


@pytest.mark.parametrize('K', [5, 1000])
def test_coupled_pair_against_shared_gaussians(K):
    n, gammas = 20_000, (torch.tensor([[-1.0]]), torch.tensor([[-2.5]]))
    x0 = torch.randint(K, (n, 1))
    zt, zs = coupled_pair(x0, *gammas, K)
    noise = torch.randn(n, K, dtype=torch.float64)
    brute = []
    for gamma in gammas:
        a, s = gaussian(gamma)
        brute.append((s * noise).scatter_add(-1, x0, a.expand(n, 1)).argmax(-1, keepdim=True))

    def table(t, s):  # true or not, at t and at s, and whether the two agree
        return np.bincount(((t == x0) * 4 + (s == x0) * 2 + (t == s) * 1).flatten(), minlength=8)
    ours, theirs = table(zt, zs), table(*brute)
    some = ours + theirs > 0
    assert stats.chi2_contingency([ours[some], theirs[some]]).pvalue > 1e-3
    for z, gamma in ((zt, gammas[0]), (zs, gammas[1])):
        alpha = transform(gamma, K)[0].item()
        P = alpha + (1 - alpha) / K
        assert abs((z == x0).float().mean().item() - P) < 4 * (P * (1 - P) / n) ** 0.5

# ---- losses

def random_case(K, dtype=torch.float64, shape=(4, 9)):
    x0 = torch.randint(K, shape)
    alpha = torch.rand(shape[0], 1, dtype=torch.float64) * 0.998 + 0.001
    return x0, q_sample(x0, alpha, K), alpha, -torch.rand(shape[0], 1, dtype=torch.float64) - 0.1


@pytest.mark.parametrize('K', [5, 257])
def test_nelbo_against_the_published_code(K):
    r = lambda name: REFERENCE[f'nelbo{K}_{name}']
    loss = nelbo(r('logits'), r('xt'), r('x0'), r('alpha_t'), r('dalpha_t_var'))
    assert relative(loss, r('loss_dvar')) < 1e-10
    f32 = nelbo(r('logits').float(), r('xt'), r('x0'), r('alpha_t').float(), r('dalpha_t_var').float())
    assert f32.dtype == torch.float32 and relative(f32.double(), r('loss_dvar')) < 1e-4


@pytest.mark.parametrize('K', [3, 7])
def test_nelbo_is_the_limit_of_the_posteriors_divergence(K):
    """KL(q(xs|xt,x0) || q(xs|xt,model)) / dt for a small dt, by enumeration of xs."""
    x0, xt, _, _ = random_case(K, shape=(6, 5))
    logits = torch.randn(6, 5, K, dtype=torch.float64)
    t, dt = torch.rand(6, 1, dtype=torch.float64) * 0.9 + 0.05, 1e-7
    alpha_t, dalpha = alpha_linear(t)
    alpha_s, _ = alpha_linear(t - dt)
    true = posterior(torch.nn.functional.one_hot(x0, K).double(), xt, alpha_s, alpha_t)
    model = posterior(logits.softmax(-1), xt, alpha_s, alpha_t)
    kl = (true * (true / model).log()).sum(-1) / dt
    assert (nelbo(logits, xt, x0, alpha_t, dalpha) - kl).abs().max() < 1e-4 * kl.max()


def test_nelbo_is_zero_for_a_perfect_model_only():
    x0, xt, alpha, dalpha = random_case(50)
    sure = 200.0 * torch.nn.functional.one_hot(x0, 50).double()
    assert nelbo(sure, xt, x0, alpha, dalpha).abs().max() < 1e-9
    assert (nelbo(torch.randn(4, 9, 50).double(), xt, x0, alpha, dalpha) > 1e-6).all()


def test_nelbo_in_float32_at_a_large_vocabulary():
    K = 50257
    for a in (0.001, 0.1, 0.5, 0.9, 0.999):
        x0 = torch.randint(K, (4, 4))
        alpha, dalpha = torch.full((4, 1), a), -torch.ones(4, 1)
        xt = torch.where(torch.arange(4) < 2, x0, torch.randint(K, (4, 4)))      # half of them unnoised
        logits = 2 * torch.randn(4, 4, K)
        exact = nelbo(logits.double(), xt, x0, alpha.double(), dalpha.double())
        assert relative(nelbo(logits, xt, x0, alpha, dalpha).double(), exact) < 1e-4


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('T, K', [(9, 4099), (32, 4099), (75, 4097)])            # 64 tokens a chunk: less, twice, more
def test_head_nelbo_equals_nelbo_through_all_logits(dtype, tolerance, T, K):
    x0, xt, alpha, dalpha = random_case(K, shape=(4, T))
    alpha = alpha * 0.9 + 0.05
    h, weight, bias = (torch.randn(s, dtype=torch.float64).div(3).to(dtype).requires_grad_()
                       for s in ((4, T, 16), (K, 16), (K,)))
    mask = (torch.rand(4, T) < 0.8).double()
    wide = [v.detach().double().requires_grad_() for v in (h, weight, bias)]
    each = nelbo(wide[0] @ wide[1].T + wide[2], xt, x0, alpha, dalpha)
    for m, exact in ((None, each.mean()), (mask, (each * mask).sum() / mask.sum())):
        loss = head_nelbo(h, weight, bias, xt, x0, alpha, dalpha, mask=m)
        assert relative(loss.double(), exact) < tolerance
        ours = torch.autograd.grad(2 * loss, (h, weight, bias))
        theirs = torch.autograd.grad(2 * exact, wide, retain_graph=True)
        for a, b in zip(ours, theirs):
            assert a.dtype == dtype and (a.double() - b).abs().max() < tolerance * b.abs().max()
    assert (head_each(h, weight, bias, nelbo, (xt, x0, alpha, dalpha)).double() - each).abs().max() < tolerance * each.max()


@pytest.mark.parametrize('forward', [False, True])
def test_teacher_kl_equals_that_of_the_full_vectors(forward):
    h, ht = torch.randn(2, 50, 8, dtype=torch.float64), torch.randn(2, 50, 8, dtype=torch.float64)
    heads = [torch.randn(s, dtype=torch.float64) for s in ((2099, 8), (2099,)) * 2]
    ours, theirs = ([v.clone().requires_grad_() for v in (h, *heads[:2])] for _ in range(2))
    loss = head_loss(*ours, partial(teacher_kl, weight=heads[2], bias=heads[3], forward=forward), (ht,))
    logp, logq = (theirs[0] @ theirs[1].T + theirs[2]).log_softmax(-1), (ht @ heads[2].T + heads[3]).log_softmax(-1)
    one, other = (logq, logp) if forward else (logp, logq)
    exact = (one.exp() * (one - other)).sum(-1).mean()
    assert relative(loss, exact) < 1e-10
    for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(exact, theirs)):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()


def test_head_nelbo_gradcheck():
    x0, xt, alpha, dalpha = random_case(7, shape=(2, 3))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (7, 4), (7,))]
    assert torch.autograd.gradcheck(lambda *a: head_nelbo(*a, xt, x0, alpha, dalpha), inputs)

class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for v in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(v):
                self.numel = max(self.numel, v.numel())
        return out


@pytest.mark.parametrize('objective, step', [('duo', 0), ('duo', 10), ('mdlm', 10), ('ar', 10)])
def test_nobody_holds_all_logits(monkeypatch, objective, step):
    monkeypatch.setattr(train, 'objective', objective)
    monkeypatch.setattr(train, 'curriculum_iters', 5)
    B, T, K = 4, 128, 4000
    model = DiT(DiTConfig(K + (objective == 'mdlm'), T, 1, 2, 16, 8, 0.0, objective == 'ar'))
    x0, u = torch.randint(K, (B, T)), stratified_times(0.5, 0, B, B)
    with Largest() as largest:
        train.training_loss(model, x0, u, step, K, loss_fn=loss_of(objective, K)).backward()
        token_nll(model, x0, u, K, objective, loss_of(objective, K))
        if objective != 'ar':
            next(denoise(model, x0, *sampling_schedule(4), mask_id=K if objective == 'mdlm' else None))
    assert K * 16 < largest.numel < B * T * K / 4
    with Largest() as largest:                                                    # the watch can see one
        model(x0, torch.zeros(B))
    assert largest.numel >= B * T * K


def test_compiled_equals_eager():
    if shutil.which('g++') is None:
        pytest.skip('torch.compile needs a C++ compiler')
    K = 301
    x0, xt, alpha, dalpha = random_case(K, shape=(2, 40))
    model = random_model(K, T=40, std=0.2)
    results = []
    for wrap in (lambda f: f, torch.compile):
        hidden, loss_fn = wrap(model.hidden), wrap(nelbo)
        linear = model.output_layer.linear
        loss = head_nelbo(hidden(xt, -alpha.log()), linear.weight, linear.bias, xt, x0, alpha, dalpha, loss_fn=loss_fn)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for eager, compiled in zip(*results):
        assert (eager - compiled).abs().max() < 1e-4 * eager.abs().max()


def test_fp16_gradients_are_made_at_the_scalers_scale():
    """The 170M model's vocabulary and a long row: unscaled, a mean over so many tokens underflows in fp16."""
    K, T = 50257, 96
    h = torch.randn(1, T, 16)
    weight, bias = torch.zeros(K, 16), torch.zeros(K)                              # as at the start of a training
    x0, xt, alpha, dalpha = random_case(K, shape=(1, T))
    grads = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0 ** 16)):
        inputs = [v.to(v.dtype).clone().requires_grad_() for v in (h, weight, bias)]
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = head_nelbo(*inputs, xt, x0, alpha, dalpha, grad_scale=torch.tensor(scale))
        assert torch.isfinite(loss)
        (loss * scale).backward()
        grads.append([v.grad / scale for v in inputs[1:]])
    for exact, half in zip(*grads):
        assert torch.isfinite(half).all() and (half - exact).abs().max() < 5e-3 * exact.abs().max()
        lost = (half == 0) & (exact.abs() > 1e-6 * exact.abs().max())
        assert lost.float().mean() < 0.01
    # too large a scale shows in the gradient: the scaler skips the step and goes on with half of it
    inputs = [v.clone().requires_grad_() for v in (h, weight, bias)]
    optimizer, scaler = torch.optim.AdamW(inputs, fused=True), torch.amp.GradScaler('cpu', init_scale=2.0 ** 40)
    grad_scale = scaler.scale(torch.ones(()))
    with torch.autocast('cpu', torch.float16):
        loss = head_nelbo(*inputs, xt, x0, alpha, dalpha, grad_scale=grad_scale)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0 ** 39 and all(torch.equal(v, w) for v, w in zip(inputs, (h, weight, bias)))

# ---- reverse

class Oracle:
    """A 'model' whose words have one distribution, whatever it sees."""
    def __init__(self, logits):
        self.output_layer = self
        self.linear = torch.nn.Linear(1, logits.numel())
        self.linear.weight.data.zero_()
        self.linear.bias.data = logits

    def hidden(self, x, sigma):
        return torch.zeros(*x.shape, 1)


@pytest.mark.parametrize('K', [5, 257])
def test_posterior_against_the_published_code(K):
    r = lambda name: REFERENCE[f'posterior{K}_{name}']
    alphas = REFERENCE['posterior_alpha_s'], REFERENCE['posterior_alpha_t']
    assert relative(posterior(r('logits').softmax(-1), r('xt'), *alphas), r('q_model')) < 1e-10
    x0 = torch.nn.functional.one_hot(r('x0'), K).double()
    assert (posterior(x0, r('xt'), *alphas) - r('q_true')).abs().max() < 1e-12


def test_posterior_by_bayes():
    K, a_s, a_t = 3, 0.7, 0.4
    step = lambda a: a * torch.eye(K, dtype=torch.float64) + (1 - a) / K          # [from, to]
    for x0 in range(K):
        for xt in range(K):
            joint = step(a_s)[x0] * step(a_t / a_s)[:, xt]                        # q(xs|x0) q(xt|xs)
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


def test_a_corrector_step_keeps_the_noisy_marginal():
    """kappa = 0, an exact denoiser, one token: xt ~ q(xt) gives xs ~ q(xs), by the whole vectors and by drawing."""
    data = torch.tensor([0.6, 0.1, 0.25, 0.05], dtype=torch.float64)
    for a_s, a_t in ((0.5, 0.5), (0.8, 0.3), (0.2, 0.001)):
        q_t, q_s = (a * data + (1 - a) / 4 for a in (a_t, a_s))
        q_0 = posterior(data.expand(4, 4), torch.arange(4), 1.0, a_t)                       # (xt, x0)
        assert (q_t @ (a_s * q_0 + (1 - a_s) / 4) - q_s).abs().max() < 1e-12
        xt = torch.multinomial(q_t, 60_000, replacement=True)
        xs = reverse_step(data.log().float().expand(60_000, 4), xt, a_s, a_t, 0.0)
        assert fits(np.bincount(xs, minlength=4), q_s)


@pytest.mark.parametrize('psi, eta', [('rescale', 0.05), ('cap', 0.01), ('loop', 0.01), ('constant', 0.02), (None, 0)])
def test_schedules_number_by_number(psi, eta, steps=64):
    """From the published rules, in plain Python."""
    n, eps, t9 = steps + 1, 1e-5, 0.1 / 0.999
    ramp = lambda a, b, m: [a + (b - a) * i / max(1, m - 1) for i in range(m)]
    times, high, mid = ramp(1, eps, n), 0, n
    if psi == 'loop':
        high, mid = round(0.45 * n), round(0.5 * n)
        times = ramp(1, t9, high) + [t9] * mid + ramp(t9, eps, n - high - mid)
    a = [1 - 0.999 * t for t in times]
    alphas, kappas = sampling_schedule(steps, psi, eta)
    assert len(kappas) == steps and alphas == pytest.approx(a, rel=1e-12)
    for i in range(steps):
        most = min(eta, (1 - a[i + 1]) / a[i])
        sigma = {'rescale': eta * most, 'cap': most, 'constant': eta, 'loop': eta * (high <= i < high + mid - 1), None: 0}[psi]
        assert kappas[i] == pytest.approx(min(1, max(0, 1 - sigma / (1 - a[i + 1]))), rel=1e-12, abs=1e-15)
    assert psi is None or 0 < sum(kappa < 1 for kappa in kappas)
    for few in range(1, 9):
        alphas, kappas = sampling_schedule(few, psi, eta)
        assert len(alphas) == few + 1 and len(kappas) == few and sorted(alphas) == alphas


def test_commit_keeps_the_surest():
    entropy = torch.tensor([[0.5, 0.05, 2.0, 1.0]] * 4000)
    words = torch.full((4000, 4), 9)
    kept = lambda alpha, settle: (commit(words, entropy, alpha, 1000, settle) == 9).float().mean(0).round().tolist()
    assert kept(0.5, 0.0) == [1, 1, 0, 0] and kept(0.75, 0.0) == [1, 1, 0, 1] and kept(0.0, 0.1) == [0, 1, 0, 0]
    noise = commit(words, entropy, 0.0, 5, 0.0)[:, 2]
    assert fits(np.bincount(noise, minlength=5), torch.full((5,), 0.2))


def test_commit_stops_when_all_is_settled():
    sure, x = torch.tensor([0.0, 9.0, 0.0]), torch.randint(3, (2, 5))
    fixed = torch.arange(5) == 4
    frames = list(denoise(Oracle(sure), x, *sampling_schedule(50), fixed.expand(2, 5), settle=0.1))
    assert len(frames) == 2 and torch.equal(frames[1][:, 4], x[:, 4])                 # the first, and noise removal
    assert len(list(denoise(Oracle(sure), x, *sampling_schedule(50), settle=1e-9))) == 51


def test_categorical_draws_the_tail():
    p = torch.rand(1003)
    p[[5, 1002]] = 0
    assert fits(np.bincount(categorical(p.expand(200_000, -1)), minlength=1003), p)
    # ten thousand words of 1e-10: together 1e-6 of the mass; float32 Gumbels would never draw one
    rare = torch.full((10_001,), 1e-10)
    rare[0] = 1 - 1e-6
    draws = sum((categorical(rare.expand(2000, -1)) != 0).sum().item() for _ in range(5))
    assert draws <= 3
    rare[0] = 1e-6                                                                # now they are half of it
    draws = (categorical(rare.expand(4000, -1)) != 0).float().mean()
    assert abs(draws - 0.5) < 0.04


def test_top_p_keeps_the_smallest_nucleus():
    p = torch.tensor([0.1, 0.5, 0.15, 0.25])
    kept = lambda top_p: torch.isfinite(top_p_filter(p.log(), top_p)).tolist()
    assert kept(0.4) == [False, True, False, False]
    assert kept(0.7) == [False, True, False, True]
    assert kept(0.8) == [False, True, True, True]
    assert kept(1.0) == [True] * 4


def test_denoise_draws_the_models_words_and_keeps_the_prompt():
    probs = torch.tensor([0.5, 0.25, 0.2, 0.05])
    x = torch.randint(4, (4000, 2))
    fixed = torch.zeros_like(x, dtype=torch.bool)
    fixed[:, 0] = True
    frames = list(denoise(Oracle(probs.log()), x, *sampling_schedule(64), fixed))
    assert len(frames) == 65 and all(torch.equal(frame[:, 0], x[:, 0]) for frame in frames)
    greedy = list(denoise(Oracle(probs.log()), x, *sampling_schedule(3), fixed, greedy=True))[-1]
    assert (greedy[:, 1] == 0).all()


def test_an_exact_denoiser_samples_the_data():
    """One token, K = 4: the chain ends in the data's distribution, in many steps or few. (The exact softmax is the
    word's distribution given all *other* words: what xt itself tells of x0 is in the posterior's formula already.)"""
    data = torch.tensor([0.6, 0.1, 0.25, 0.05])
    for steps in (1, 16):
        *_, x = denoise(Oracle(data.log()), torch.randint(4, (40_000, 1)), *sampling_schedule(steps))
        assert fits(np.bincount(x[:, 0], minlength=4), data)

# ---- the baselines

def tabular(K, T, seed=0):
    """A 'model' of T masked words: any logits for each pattern of what shows; {shown words: logits (T,K)}."""
    torch.manual_seed(seed)
    return {xt: torch.randn(T, K + 1, dtype=torch.float64) for xt in itertools.product(range(K + 1), repeat=T)}


def test_cross_entropy_and_its_gradient():
    logits, targets, weights = torch.randn(4, 9, 33, dtype=torch.float64), torch.randint(33, (4, 9)), torch.rand(4, 9).double()
    logits.requires_grad_()
    theirs = weights * torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='none').view(4, 9)
    ours, grad = cross_entropy(logits.detach(), targets, weights, scale=torch.full((4, 9), 2.0))
    assert relative(ours, theirs) < 1e-10
    assert (grad - torch.autograd.grad(2 * theirs.sum(), logits)[0]).abs().max() < 1e-10


@pytest.mark.parametrize('K, T', [(2, 2), (2, 3), (3, 2)])
def test_mdlm_nelbo_is_the_mean_over_all_orders_of_writing(K, T):
    model, x0 = tabular(K, T), torch.arange(T) % K
    nats = 0                                                                      # of each order, as an AR model would pay
    for order in itertools.permutations(range(T)):
        xt = [K] * T
        for i in order:
            nats -= model[tuple(xt)][i, :K].log_softmax(-1)[x0[i]].item()
            xt[i] = x0[i].item()
    nats /= math.factorial(T)
    nodes, weights = np.polynomial.legendre.leggauss(16)                          # exact for these polynomials
    bound = 0
    for node, weight in zip(nodes, weights):
        alpha = torch.tensor((node + 1) / 2)
        for shown in itertools.product((0, 1), repeat=T):
            xt = torch.where(torch.tensor(shown) == 1, x0, K)
            q = alpha ** sum(shown) * (1 - alpha) ** (T - sum(shown))
            loss = mdlm_nelbo(model[tuple(xt.tolist())], xt, x0, alpha.expand(T), -torch.ones(T), K)
            bound += weight / 2 * q.item() * loss.sum().item()
    assert bound == pytest.approx(nats, rel=1e-10)


def test_mask_step_frequencies():
    logits, n = torch.randn(5), 60_000                                            # five words; the mask is number 5
    p = torch.cat([0.4 * logits.softmax(-1), torch.tensor([0.6])])                # 0.4 = (0.64 - 0.4) / (1 - 0.4)
    xs = mask_step(logits.expand(n, 5), torch.full((n,), 5), 0.64, 0.4, 5)
    assert fits(np.bincount(xs, minlength=6), p)
    assert (mask_step(logits.expand(n, 5), torch.full((n,), 2), 0.64, 0.4, 5) == 2).all()


def random_model(K, T=8, causal=False, std=0.4):
    torch.manual_seed(1)
    model = DiT(DiTConfig(K, T, 2, 2, 16, 8, 0.0, causal)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


@torch.no_grad()
def test_masked_denoising_ends_without_masks_and_saves_calls_that_change_nothing(monkeypatch):
    model, calls = random_model(6), []
    hidden = model.hidden
    model.hidden = lambda *a: (calls.append(1), hidden(*a))[1]
    start = torch.full((2, 8), 5)
    start[:, 0] = 3
    torch.manual_seed(7)
    frames = list(denoise(model, start, *sampling_schedule(200), start < 5, mask_id=5))
    assert len(frames) == 201 and (frames[-1] < 5).all() and (frames[-1][:, 0] == 3).all() and len(calls) < 18
    monkeypatch.setattr(torch, 'equal', lambda *a: False)
    torch.manual_seed(7)
    again = list(denoise(model, start, *sampling_schedule(200), start < 5, mask_id=5))
    assert (torch.stack(again) == torch.stack(frames)).all()


@torch.no_grad()
def test_writing_on_with_a_cache_equals_writing_on_without():
    model = random_model(20, causal=True)
    start = torch.randint(20, (3, 8))
    fixed = torch.zeros(3, 8, dtype=torch.bool)
    fixed[:, 2] = True
    torch.manual_seed(3)
    *_, ours = write_on(model, start, fixed, temperature=0.8)
    torch.manual_seed(3)
    x = start.clone()
    for i in range(1, 8):
        word = categorical((model(x[:, :i])[:, -1] / 0.8).softmax(-1))
        x[:, i] = torch.where(fixed[:, i], x[:, i], word)
    assert torch.equal(ours, x) and torch.equal(ours[:, [0, 2]], start[:, [0, 2]])


# ---- evaluation

@pytest.mark.parametrize('objective', ['duo', 'mdlm'])
@torch.no_grad()
def test_evaluate_is_within_its_error_of_the_exact_bound(objective):
    """K = 3, T = 2: the bound by enumerating every xt, and quadrature over t."""
    K, x0 = 3, torch.tensor([[2, 0]])
    model = random_model(K + (objective == 'mdlm'), T=2, std=0.15)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    exact = 0
    for node, weight in zip(nodes, weights):
        alpha, dalpha = alpha_linear(torch.tensor([[(node + 1) / 2]]))
        for xt in itertools.product(range(K + (objective == 'mdlm')), repeat=2):
            xt = torch.tensor([xt])
            if objective == 'duo':
                q = (alpha * (xt == x0) + (1 - alpha) / K).prod()
                sigma = -alpha.log()
            else:
                q = torch.where(xt == x0, alpha, torch.where(xt == K, 1 - alpha, 0)).prod()
                sigma = torch.zeros(1)
            loss = loss_of(objective, K)(model(xt, sigma.float()).double(), xt, x0, alpha, dalpha)
            exact += weight / 2 * q.item() * loss.mean().item() if q > 0 else 0
    mean, error = mean_and_error(evaluate(lambda x, t: token_nll(model, x, t, K, objective, loss_of(objective, K)),
                                          lambda i: x0.expand(len(i), 2), 40_000, 8000))
    assert abs(mean - exact) < 4 * error and error < 0.05 * exact

def test_evaluate_shares_batches_and_repeats_itself():
    model = DiT(DiTConfig(11, 8, 1, 2, 16, 8, 0.0)).eval()
    torch.nn.init.normal_(model.output_layer.linear.weight, std=0.3)
    x0 = torch.randint(11, (10, 8))
    nll = lambda x, t: token_nll(model, x, t, 11)
    whole = evaluate(nll, lambda i: x0[list(i)], 10, 4)
    torch.manual_seed(99)
    assert torch.equal(whole, evaluate(nll, lambda i: x0[list(i)], 10, 4))
    mean, error = mean_and_error(whole)
    assert mean == pytest.approx(whole.numpy().mean()) and error == pytest.approx(stats.sem(whole.numpy()))
