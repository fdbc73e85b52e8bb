"""
What the curriculum is for: the variance of the gradient, summed over all parameters, with the
curriculum's noise and with the discrete one, at each checkpoint of a Duo run (--keep_last=99 keeps
all). From the project's folder:

    PYTHONPATH=. python tests/grad_variance.py out
"""
import sys
from pathlib import Path

import torch

import train
from checkpoint import STATE, load_model, read_torch, step_files
from data import epoch_rows, get_batch, load_data, num_rows
from diffusion import nelbo, stratified_times

N = 64  # micro-batches


def gradient(model, step, i, meta, stream):
    """Of micro-batch i, with the noise of a training step: (P,) float64."""
    B, T = train.batch_size, train.block_size
    rows = epoch_rows(range(i * B, i * B + B), num_rows(stream, T), train.seed)
    torch.manual_seed(i)
    x0 = get_batch(stream, rows, T, meta, 'cpu')
    u = stratified_times(torch.rand(()).item(), 0, B, B)
    loss = train.training_loss(model, x0, u, step, meta['vocab_size'], nelbo)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten().double() for g in grads])


folder = sys.argv[1]
model, info = load_model(folder)
model.requires_grad_(True)
vars(train).update(info['settings'])
meta, data = load_data(Path(train.data_dir, train.dataset))
for path in reversed(step_files(folder)):
    model.load_state_dict(read_torch(path, STATE)['weights'])  # not their average
    line = path.stem
    for name, step in (('curriculum', 0), ('discrete', train.max_iters - 1)):
        total, squares = 0, 0
        for i in range(N):
            g = gradient(model, step, i, meta, data['train'])
            total += g
            squares += g ** 2
        variance = (squares - total ** 2 / N).sum() / (N - 1)
        line += f', {name} {variance:.4f}'
    print(f'{line} ({N} x {train.batch_size} rows)', flush=True)
