"""
What the curriculum is for: the variance of the gradient of a micro-batch, summed over all
parameters, with the curriculum's noise and with the discrete one, at each checkpoint of a Duo run
(--keep_last=99 keeps all). Discrete noise has rare micro-batches with very large gradients, which
few micro-batches may all miss: so the error, and the median, are printed too. From the project's
folder:

    PYTHONPATH=. python tests/grad_variance.py out 1000      # micro-batches
"""
import sys
from pathlib import Path

import numpy as np
import torch

import train
from checkpoint import STATE, load_model, read_torch, step_files
from data import epoch_rows, get_batch, load_data, num_rows
from diffusion import nelbo, stratified_times


def gradient(model, step, seed, meta, stream):
    """Of a micro-batch with this seed, with the noise of a training step: (P,) float64."""
    B, T = train.batch_size, train.block_size
    rows = epoch_rows(range(seed * B, seed * B + B), num_rows(stream, T), train.seed)
    torch.manual_seed(seed)
    x0 = get_batch(stream, rows, T, meta, 'cpu')
    u = stratified_times(torch.rand(()).item(), 0, B, B)
    loss = train.training_loss(model, x0, u, step, meta['vocab_size'], nelbo)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten().double() for g in grads])


folder, n = sys.argv[1], int(sys.argv[2])
model, info = load_model(folder)
model.requires_grad_(True)
vars(train).update(info['settings'])
meta, data = load_data(Path(train.data_dir, train.dataset))
seed = 0                                                     # a new one for each micro-batch
for path in reversed(step_files(folder)):
    model.load_state_dict(read_torch(path, STATE)['weights'])  # not their average
    line = path.stem
    for name, step in (('curriculum', 0), ('discrete', train.max_iters - 1)):
        total, squares = 0, []
        for _ in range(n):
            g = gradient(model, step, seed, meta, data['train'])
            total += g
            squares.append((g @ g).item())
            seed += 1
        mean = total / n
        variance = np.mean(squares) - (mean @ mean).item()
        error = np.std(squares) / n ** 0.5
        line += f', {name} {variance:.2f} +- {error:.2f} (median of |g|^2 {np.median(squares):.2f})'
    print(f'{line} ({n} x {train.batch_size} rows)', flush=True)
