"""The paper's formulas as they read, over whole (B,T,K) tensors: tests compare diffusion.py with
them, and bench.py measures what they cost."""
import copy
import ctypes
import gc
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from diffusion import gaussian_scales, noise_schedule, q_sample, reverse_step, transform


def literal_nelbo(logits, xt, x0, alpha, dalpha):
    """Eq. 17 term by term, (B,T) nats per token."""
    K, a = logits.size(-1), alpha.unsqueeze(-1)
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    xbar_theta = K * a * p + 1 - a
    xbar = K * a * F.one_hot(x0, K) + 1 - a
    xbar_theta_t = xbar_theta.gather(-1, xt.unsqueeze(-1))
    xbar_t = xbar.gather(-1, xt.unsqueeze(-1))
    ratio = xbar / xbar_t
    inside = (ratio * (torch.log(xbar_theta_t / xbar_theta) + torch.log(ratio))).sum(-1)
    top = (K / xbar_t - K / xbar_theta_t).squeeze(-1)
    return dalpha / (K * alpha) * (top - inside)


def gaussian_latent(x0, gamma, noise):
    """w (B,T,K) = a onehot(x0) + s noise, at a log noise-to-signal ratio gamma (B,1)."""
    a, s = (scale.float().unsqueeze(-1) for scale in gaussian_scales(gamma))
    return a * F.one_hot(x0, noise.size(-1)) + s * noise


def literal_loss(model, x0, u, vocab_size, window=None, tau=1e-3):
    """A micro-batch's loss by the discrete process or, with a window of gammas, the curriculum."""
    if window is None:
        alpha, dalpha = (v.float() for v in noise_schedule(1e-3 + (1 - 1e-3) * u))
        x = xt = q_sample(x0, alpha, vocab_size)
    else:
        low, high = window
        gamma = low + u * (high - low)
        alpha, dalpha_dgamma = (v.float() for v in transform(gamma, vocab_size))
        dalpha = dalpha_dgamma * (high - low)
        noise = torch.randn(*x0.shape, vocab_size, device=x0.device)
        w = gaussian_latent(x0, gamma, noise)
        x, xt = (w / tau).softmax(-1), w.argmax(-1)
    return literal_nelbo(model(x, -alpha.log()), xt, x0, alpha, dalpha).mean()


def literal_distillation(model, teacher, x0, u, vocab_size, delta=1 / 512):
    """Algorithm 1: KL(student at t || teacher at t - delta) on one Gaussian path."""
    t = (1e-3 + (1 - 1e-3) * u + delta).clamp(max=1)
    noise = torch.randn(*x0.shape, vocab_size, device=x0.device)
    z, sigma = [], []
    for gamma in (-4 + 3 * t, -4 + 3 * (t - delta)):
        z.append(gaussian_latent(x0, gamma, noise).argmax(-1))
        sigma.append(-transform(gamma, vocab_size)[0].log().float())
    with torch.no_grad():
        logq = teacher(z[1], sigma[1]).float().log_softmax(-1)
    logp = model(z[0], sigma[0]).float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1).mean()


def posterior(probs, xt, alpha_s, alpha_t):
    """q(xs|xt, x0 ~ probs) (B,T,K), the whole reverse distribution (eq. 5); probs (B,T,K), alphas
    numbers or (B,1,1). reverse_step draws from it without making it."""
    K = probs.size(-1)
    alpha_ts = alpha_t / alpha_s
    here = F.one_hot(xt, K).to(probs.dtype)
    q = (here * (K * alpha_t * probs + alpha_ts - alpha_t)
         + (alpha_s - alpha_t) * probs
         + (1 - alpha_ts) * (1 - alpha_s) / K)
    return q / q.sum(-1, keepdim=True)


def literal_reverse(logits, xt, alpha_s, alpha_t):
    """Eq. 5: the whole posterior in float64, then Gumbel noise for all K tokens."""
    p, K, a_ts = logits.double().softmax(-1), logits.size(-1), alpha_t / alpha_s
    here = F.one_hot(xt, K)
    q = here * (K * alpha_t * p + a_ts - alpha_t) + (alpha_s - alpha_t) * p
    q = q + (1 - a_ts) * (1 - alpha_s) / K
    return (q.log() - torch.empty_like(q).exponential_().log()).argmax(-1)


def memory(device, reset=False):
    """Peak bytes since the last reset, or with reset those of now, as CUDA or, for the process,
    Linux counts them; elsewhere 0."""
    if device.startswith('cuda'):
        if not reset:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not os.path.exists('/proc/self/clear_refs'):
        return 0
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)     # give back the pages that the allocator has kept
        Path('/proc/self/clear_refs').write_text('5')
    status = Path('/proc/self/status').read_text()
    key = 'VmRSS:' if reset else 'VmHWM:'
    return int(status.split(key)[1].split()[0]) * 1024


def compare(bench, device, autocast):
    """python bench.py: measure the paper's formulas as they read (literal) and what replaces them
    (ours), without torch.compile. bench: that module, as it runs."""
    K = bench.find_vocabulary()[0]
    x0, u = bench.random_batch(K, device)
    train.objective, train.curriculum_frac = 'duo', 0.5
    model = bench.DiT(train.model_config(K)).to(device)
    teacher = copy.deepcopy(model).eval()

    def ours(objective, step):
        train.objective = objective
        return train.training_loss(model, x0, u, step, K, train.loss_of(objective, K), teacher)

    def training(loss):
        def call():
            model.zero_grad()
            with autocast:
                value = loss()
            value.backward()
        return call

    logits = torch.randn(*x0.shape, K, device=device)
    pairs = {
        'discrete': (
            training(lambda: literal_loss(model, x0, u, K)),
            training(lambda: ours('duo', train.max_iters - 1))),
        'curriculum': (
            training(lambda: literal_loss(model, x0, u, K, (train.gamma_min, train.gamma_max))),
            training(lambda: ours('duo', 0))),
        'distillation': (
            training(lambda: literal_distillation(model, teacher, x0, u, K)),
            training(lambda: ours('dcd', 0))),
        'sampling': (
            lambda: literal_reverse(logits, x0, 0.6, 0.5),
            lambda: reverse_step(logits, x0, 0.6, 0.5))
    }
    table = ['| literal / ours | time | memory |', '| --- | --- | --- |']
    for name, calls in pairs.items():
        ms, mb = [], []
        for kind, call in zip(('literal', 'ours'), calls):
            call()
            base = memory(device, reset=True)
            ms.append(bench.measure(f'{name}, {kind}', call, device, x0.numel()))
            mb.append(max(memory(device) - base, 1e6) / 1e6)
        table.append(f'| {name} | {ms[0] / ms[1]:.1f} | {mb[0]:.0f} MB / {mb[1]:.0f} MB |')
    print('\n'.join(table))
