"""
Speed and memory, measured in one run: `literal`, the paper's formulas as they read, beside ours.

    python bench.py                              # two CPU cores will do: 4 layers x 256, 8 x 128 tokens, 50,257 words
    python bench.py config/owt_duo.py --batch_size=16 --json=bench.json
    python bench.py --grad_variance --out_dir=out       # what the curriculum is for

Takes train.py's settings and files, and the ones below. ms: the median step, and the range of all; memory: the peak
above what model and optimiser hold anyway; MFU: the model's FLOPs over what a large matrix product does in
the same precision in the same run.
"""
import copy
import ctypes
import gc
import os
import statistics
import time
from json import dump

import numpy as np
import torch
import torch.nn.functional as F

import train
from checkpoint import load_model, pick_device, pick_dtype
from configurator import configure
from data import epoch_rows, get_rows, load_data, num_rows
from diffusion import (alpha_linear, denoise, gaussian, nelbo, q_sample, reverse_step, sampling_schedule, soft_tokens,
                       stratified_times, transform, write_on)
from model import DiT, DiTConfig

vocab_size = 50257
repeats = 5                  # timed steps, after one that is not
literal = True               # measure the literal forms too; they may need more memory than there is
json = ''                    # a file to write the figures to
grad_variance = False        # instead: the gradient's variance in out_dir's run, with and without the curriculum
batch_size = 8
n_layer = 4
n_head = 4
n_embd = 256

# ---- the paper, read aloud

def literal_nelbo(logits, xt, x0, alpha, dalpha):
    """Eq. 17 term by term over whole (B,T,K) tensors."""
    K, a = logits.size(-1), alpha.unsqueeze(-1)
    x_theta = logits.float().log_softmax(-1).exp()
    xbar_theta = K * a * x_theta + 1 - a
    xbar = K * a * F.one_hot(x0, K).float() + 1 - a
    z = lambda v: v.gather(-1, xt.unsqueeze(-1))
    ratio = xbar / z(xbar)
    inside = (ratio * (torch.log(z(xbar_theta) / xbar_theta) + torch.log(ratio))).sum(-1)
    top = (K / z(xbar) - K / z(xbar_theta)).squeeze(-1)
    return dalpha / (K * alpha) * (top - inside)


def literal_noise(x0, gamma, K):
    """w (B,T,K) of the curriculum: an integer one-hot, K Gaussians."""
    a, s = (v.float().unsqueeze(-1) for v in gaussian(gamma))
    return a * F.one_hot(x0, K) + s * torch.randn(*x0.shape, K, device=x0.device)


def literal_loss(model, x0, u, step):
    if step < train.curriculum_iters:
        gamma = train.gamma_min + u * (train.gamma_max - train.gamma_min)
        alpha, dalpha = (v.float() for v in transform(gamma, vocab_size))
        w = literal_noise(x0, gamma, vocab_size)
        x, xt = (w / train.tau).softmax(-1), w.argmax(-1)
        dalpha = dalpha * (train.gamma_max - train.gamma_min)
    else:
        alpha, dalpha = (v.float() for v in alpha_linear(1e-3 + (1 - 1e-3) * u))
        x = xt = q_sample(x0, alpha, vocab_size)
    return literal_nelbo(model(x, -alpha.log()), xt, x0, alpha, dalpha).mean()


def literal_distillation(model, teacher, x0, u):
    t = (1e-3 + (1 - 1e-3) * u + 1 / 512).clamp(max=1)
    gammas, noise = [-4 + 3 * v for v in (t, t - 1 / 512)], torch.randn(*x0.shape, vocab_size, device=x0.device)
    z, sigma = [], []
    for gamma in gammas:
        a, s = (v.float().unsqueeze(-1) for v in gaussian(gamma))
        z.append((a * F.one_hot(x0, vocab_size) + s * noise).argmax(-1))
        sigma.append(-transform(gamma, vocab_size)[0].log().float())
    with torch.no_grad():
        logq = teacher(z[1], sigma[1]).float().log_softmax(-1)
    logp = model(z[0], sigma[0]).float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1).mean()


def literal_reverse(logits, xt, alpha_s, alpha_t):
    """The whole posterior in float64, then Gumbel noise for every word of it."""
    p, K, a_ts = logits.double().softmax(-1), logits.size(-1), alpha_t / alpha_s
    here = F.one_hot(xt, K)
    q = here * (K * alpha_t * p + a_ts - alpha_t) + (alpha_s - alpha_t) * p + (1 - a_ts) * (1 - alpha_s) / K
    return (q.log() - torch.empty_like(q).exponential_().log()).argmax(-1)

# ---- the clock and the scales

def memory(reset=False):
    """Peak bytes since the last reset, or with reset those of now: CUDA's count, or the process's; None: unknown."""
    if device.startswith('cuda'):
        peak = torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)     # pages that the step before freed and the allocator kept
            open('/proc/self/clear_refs', 'w').write('5')
        lines = open('/proc/self/status').read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmRSS' if reset else 'VmHWM'))
    except (OSError, AttributeError):            # not Linux
        return None


def measure(name, fn, tokens=0, flops=0):
    """Time fn; print and return the figures."""
    wait = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    try:
        fn()
        wait()
        base, times = memory(reset=True), []
        for _ in range(repeats):
            began = time.perf_counter()
            fn()
            wait()
            times.append(1e3 * (time.perf_counter() - began))
    except torch.OutOfMemoryError:
        print(f'{name:<28} out of memory', flush=True)
        return None
    row = dict(name=name, ms=statistics.median(times), low=min(times), high=max(times))
    row['tokens_per_s'] = 1e3 * tokens / row['ms'] or None
    row['mfu'] = flops / row['ms'] * 1e3 / peak_flops if flops else None
    row['mb'] = (memory() - base) / 1e6 if base is not None else None
    print(f'{name:<28} {row["ms"]:9.2f} ms ({row["low"]:.2f} .. {row["high"]:.2f})'
          + (f'  {row["mb"]:8.0f} MB' if base is not None else '')
          + (f'  {row["tokens_per_s"]:10,.0f} tokens/s' if tokens else '')
          + (f'  MFU {row["mfu"]:.1%}' if flops else ''), flush=True)
    return row


def gradient_variance(model, loss_of, n):
    """The gradient's variance over n micro-batches, summed over all parameters, and the mean gradient's squared norm.
    loss_of(i) is micro-batch i's loss."""
    first, second = 0, 0
    for i in range(n):
        g = torch.cat([g.flatten().double() for g in torch.autograd.grad(loss_of(i), list(model.parameters()))])
        first, second = first + g, second + g ** 2
    mean = first / n
    return ((second / n - mean ** 2).sum() * n / (n - 1)).item(), (mean ** 2).sum().item()


def print_gradient_variance(n=64):
    """Of the run in out_dir, as it stands, with the curriculum's noise and with the discrete one."""
    model, info = load_model(train.out_dir, 'raw', device)
    if info['objective'] != 'duo':
        raise SystemExit(f'{train.out_dir} is a {info["objective"]} model: the curriculum is Duo\'s')
    meta, tokens = load_data(os.path.join(train.data_dir, info['settings']['dataset']))
    vars(train).update({k: info['settings'][k] for k in ('tau', 'gamma_min', 'gamma_max', 'curriculum_k')},
                       objective='duo', curriculum_iters=1)
    model.requires_grad_(True)
    B, T, K = info['settings']['batch_size'], info['model']['block_size'], meta['vocab_size']
    rows = epoch_rows(np.arange(n * B), num_rows(tokens['train'], T), train.seed).reshape(n, B)

    def loss_of(i, step):
        torch.manual_seed(i)
        x0 = torch.from_numpy(get_rows(tokens['train'], rows[i], T, meta)).to(device)
        return train.training_loss(model, x0, stratified_times(torch.rand(()).item(), 0, B, B, device=device), step, K)
    for name, step in (('curriculum', 0), ('discrete', 1)):
        variance, signal = gradient_variance(model, lambda i: loss_of(i, step), n)
        print(f'{name:<12} gradient variance {variance:10.4f}, mean gradient squared {signal:10.4f} ({n} x {B} rows, '
              f'step {info["step"]} of {train.out_dir})')


if __name__ == '__main__':
    settings = configure({**vars(train), **globals()})
    globals().update(settings)
    vars(train).update(settings)
    device = pick_device(train.device)
    dtype, autocast = pick_dtype(train.dtype, device)
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(train.seed)
    if train.objective not in ('duo', 'dcd'):
        raise SystemExit('bench.py measures Duo: give it a recipe of Duo')
    if grad_variance:
        print_gradient_variance()
        raise SystemExit(0)
    B, T, K, C = batch_size, train.block_size, vocab_size, n_embd

    size, peak_flops = 2048 if device == 'cpu' else 8192, None
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    peak_flops = 2 * size ** 3 / measure(f'matrix product {size}^3 {dtype}', lambda: a @ a)['ms'] * 1e3
    print(f'{"":<28} {peak_flops / 1e12:9.2f} TFLOP/s')
    del a

    model = DiT(DiTConfig(K, T, n_layer, n_head, C, train.cond_dim, train.dropout)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device != 'mps')
    x0 = torch.randint(K, (B, T), device=device)
    u = stratified_times(0.3, 0, B, B, device=device)
    # forward and backward: 6 FLOPs for each weight and token, and attention's two products
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and 'embedding' not in name
                  and 'adaLN' not in name and 'sigma' not in name)
    flops = B * T * (6 * weights + 12 * n_layer * C * T)
    phases = {'discrete': train.curriculum_iters, 'curriculum': train.curriculum_iters - 1}

    def training_step(loss_of):
        def step():
            with autocast:
                loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step

    rows = {}
    if literal:
        for phase, step in phases.items():
            rows[phase, 'literal'] = measure(f'{phase} step, literal', training_step(
                lambda: literal_loss(model, x0, u, step)), B * T, flops)
    loss_fn = nelbo
    if train.compile:
        model.hidden, loss_fn = torch.compile(model.hidden), torch.compile(nelbo)
    for phase, step in phases.items():
        rows[phase, 'ours'] = measure(f'{phase} step, ours', training_step(
            lambda: train.training_loss(model, x0, u, step, K, loss_fn=loss_fn)), B * T, flops)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if literal:
        rows['distillation', 'literal'] = measure('distillation step, literal', training_step(
            lambda: literal_distillation(model, teacher, x0, u)), B * T, flops * 4 / 3)
    rows['distillation', 'ours'] = measure('distillation step, ours', training_step(
        lambda: train.distillation_loss(model, teacher, x0, u, 0, K)), B * T, flops * 4 / 3)
    del teacher
    with torch.no_grad():
        logits = torch.randn(B, T, K, device=device)
        if literal:
            rows['sampling', 'literal'] = measure('sampling, literal', lambda: literal_reverse(logits, x0, 0.6, 0.5),
                                                  B * T)
        rows['sampling', 'ours'] = measure('sampling, ours', lambda: reverse_step(logits, x0, 0.6, 0.5), B * T)
        del logits
        rows['texts', 'duo'] = measure(f'{B} texts, Duo in 8 steps', lambda: list(denoise(
            model, x0, *sampling_schedule(8))), B * T)
        writer = DiT(DiTConfig(K, T, n_layer, n_head, C, causal=True)).to(device).eval()
        rows['texts', 'ar'] = measure(f'{B} texts, AR with its cache', lambda: list(write_on(writer, x0)), B * T)
    gamma = train.gamma_min + u * (train.gamma_max - train.gamma_min)
    for size in (256, 4096, 50257, 128256):
        few = x0 % size
        rows['noise', size] = measure(f'curriculum noise, K = {size}', lambda: (
            transform(gamma, size), soft_tokens(few, gamma, train.tau, size, train.curriculum_k)), B * T)

    if literal:
        print('\n| literal / ours | time | memory |\n| --- | --- | --- |')
        for what in ('discrete', 'curriculum', 'distillation', 'sampling'):
            one, other = rows[what, 'literal'], rows[what, 'ours']
            if one and other:
                space = f'{one["mb"] / max(other["mb"], 1):.1f}' if one['mb'] is not None else '-'
                print(f'| {what} | {one["ms"] / other["ms"]:.1f} | {space} |')
    if json:
        with open(json, 'w') as f:
            dump([row for row in rows.values() if row], f, indent=1)
