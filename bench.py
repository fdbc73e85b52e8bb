"""
Speed and memory on this machine, and the plan of a whole run. Takes train.py's settings and files:

    python bench.py --plan config/owt_duo.py --gpus=8 --price_per_hour=20  # hours, memory, price
    python bench.py config/owt_duo.py --gpu=h100       # the same, simulated: no such GPU is needed
    python bench.py --selftest                         # does everything work on this device?
    python bench.py config/owt_duo.py --batch_size=8   # the paper's formulas, literally, and ours
    python bench.py --n_layer=4 --n_embd=256 --vocab_size=50257            # the same on a laptop

Tokens are random, so no data set is needed. ms: the median of the calls, and their range.
"""
import copy
import os
import resource
import statistics
import sys
import time

from configurator import UserError, configure, run

import torch

import train
from data import load_data, num_rows
from device import pick_device, pick_dtype
from diffusion import stratified_times
from model import DiT
from optim import clip_and_step, update_ema

plan = False                 # plan the whole run, instead of timing the formulas
gpu = ''                     # a plan for an 'h100', 'a100' or 't4' that is not here: an estimate
gpus = 1                     # devices like this one that the run would have
price_per_hour = 0.0         # of all devices together
vocab_size = 0               # 0: that of the data set
repeats = 5                  # timed calls, after an untimed one
selftest = False             # a few steps of everything, compared with float32 on the CPU

GPUS = dict(                 # published: compute capability; FLOP/s, dense, half; bytes/s; bytes
    h100=(9, 989e12, 3.35e12, 80e9),                     # SXM
    a100=(8, 312e12, 2.04e12, 80e9),                     # SXM, 80 GB
    t4=(7, 65e12, 320e9, 16e9),
)
CHECKS = train.CHECKS + [
    ('gpus repeats', lambda v: v >= 1, 'at least 1'),
    ('gpu', lambda v: not v or v in GPUS, 'h100, a100 or t4'),
    ('price_per_hour', lambda v: v >= 0, 'at least 0'),
    ('vocab_size', lambda v: v == 0 or v >= 2, '0 or at least 2'),
]
VOCAB_SIZES = dict(stdlib=4096, stdlib_bytes=256, novels=4096, owt=50257, owt_t4=50257,
                   fineweb_edu=50257, lm1b=30522, lm1b_packed=30522)

# --------------------------------------------------------------------------------------------------
# measuring

def peak_memory(device):
    """Peak bytes so far: as CUDA counts them, or of the process."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == 'darwin' else 1024       # a Mac counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(name, fn, device, tokens):
    """Call fn repeatedly; print and return the median ms."""
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        fn()
        if device.startswith('cuda'):
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    ms = statistics.median(times[1:])
    print(f'{name:<24} {ms:9.2f} ms ({min(times[1:]):.2f} .. {max(times[1:]):.2f}), '
          f'{1e3 * tokens / ms:,.0f} tokens/s', flush=True)
    return ms


# --------------------------------------------------------------------------------------------------
# what is measured

def find_vocabulary():
    """-> the vocabulary's size, where that is from, and the tokens of an epoch (0: not known)."""
    folder = f'{train.data_dir}/{train.dataset}'
    if vocab_size:
        return vocab_size, '--vocab_size', 0
    if os.path.exists(folder):
        meta, data = load_data(folder)
        epoch = num_rows(data['train'], train.block_size) * train.block_size
        return meta['vocab_size'], folder, epoch
    if train.dataset not in VOCAB_SIZES:
        raise UserError(f'no data set in {folder}: say its vocabulary with --vocab_size=...')
    return VOCAB_SIZES[train.dataset], f'that of {train.dataset}, which is not here', 0


def random_batch(K, device):
    """A micro-batch: x0 (B,T), and u (B,1)."""
    B = train.batch_size
    x0 = torch.randint(K, (B, train.block_size), device=device)
    return x0, stratified_times(0.3, 0, B, B, device=device)

# --------------------------------------------------------------------------------------------------

def plan_run(device, dtype_name, autocast, measure=measure, peak_memory=peak_memory):
    """Time the recipe's micro-batches and steps, and print what the whole run takes. A simulation
    has its own measure and peak_memory."""
    micro_batches = train.gradient_accumulation_steps / gpus
    if micro_batches % 1:
        raise UserError(f'--gpus={gpus} must divide the {train.gradient_accumulation_steps} of '
                        'gradient_accumulation_steps')
    K, source, epoch = find_vocabulary()
    x0, u = random_batch(K, device)
    with torch.device(device):
        model = DiT(train.model_config(K))
    ema = copy.deepcopy(model).eval()
    teacher = copy.deepcopy(ema) if train.objective == 'dcd' else None
    optimizers = train.build_optimizer(model)
    scaler = torch.amp.GradScaler(x0.device.type, enabled=dtype_name == 'float16')
    loss_fn = train.loss_of(train.objective, K)
    tokens = x0.numel() * train.gradient_accumulation_steps
    print(f'{model.num_params() / 1e6:.2f}M parameters, {tokens:,} tokens a step, {device} '
          f'{dtype_name}\n'
          f'assumed: vocabulary {K:,} ({source}); random tokens; --gpus={gpus} like this one, with '
          f'{micro_batches:.0f} micro-batches a step on each, each timed with an optimiser step; '
          'not counted: validation, checkpoints, the exchange of gradients between GPUs')
    if train.compile:                                    # head_loss compiles the loss itself
        for m in filter(None, (model, teacher)):
            m.hidden = torch.compile(m.hidden, dynamic=False)

    def micro_batch(step):
        with autocast:
            loss = train.training_loss(model, x0, u, step, K, loss_fn, teacher)
        scaler.scale(loss).backward()
        clip_and_step(optimizers, scaler, model.parameters(), train.grad_clip)
        update_ema(ema, model, 0.999)

    is_duo = train.objective == 'duo'
    share = train.curriculum_frac if is_duo else 0
    ms = 0
    for name, part, step in [('curriculum', share, 0),
                             ('discrete' if is_duo else train.objective, 1 - share,
                              train.max_iters - 1)]:
        if part:
            ms += part * micro_batches * measure(
                name, lambda: micro_batch(step), device, x0.numel())
    hours = ms * train.max_iters / 3.6e6
    tokens *= train.max_iters
    print(f'peak memory {peak_memory(device) / 1e9:.2f} GB, {ms:.0f} ms a step. '
          f'{train.max_iters:,} of them: about {hours:.3g} hours, {tokens / 1e9:.3g}G tokens')
    if epoch:
        print(f'{tokens / epoch:.3g} epochs of {train.dataset}')
    if price_per_hour:
        print(f'a price of about {hours * price_per_hour:,.2f}')


def main():
    settings = configure(vars(train) | globals(), CHECKS)
    globals().update(settings)
    vars(train).update(settings)
    dev = pick_device(train.device)
    dtype_name, autocast = pick_dtype(train.dtype, dev)
    torch.set_float32_matmul_precision('high')
    sys.path.append(f'{os.path.dirname(__file__)}/tests')
    bench = sys.modules[__name__]
    if gpu:
        from fake_cuda import simulate
        simulate(bench)
    elif plan:
        plan_run(dev, dtype_name, autocast)
    elif selftest:
        from selftest import check_all
        check_all(dev, dtype_name)
    else:
        from literal import compare
        compare(bench, dev, autocast)


if __name__ == '__main__':
    run(main)
