"""Training in bfloat16 and float16, on the CPU: the numbers of float32 to 1%."""
import math
import os

import pytest
import torch

import train
from optim import clip_and_step
from helpers import (TINY, checkpoint, equal, good, log, project_with, rewind, run_here, run_ranks,
                     wrapped_loss)

STEPS = 100
LONG = [*TINY, f'--max_iters={STEPS}', '--eval_interval=25', '--keep_last=99', '--num_samples=0',
        '--dropout=0', '--batch_size=16', '--ema_decay=0.9']


@pytest.fixture(scope='module')
def exact(work):
    good(run_here(work, 'train.py', *LONG, '--out_dir=half-32'))
    return work / 'half-32'


def close(folder, exact, tolerance):
    """The mean loss of the run is float32's within 1%, those of its first half (the
    curriculum) and the validations within the tolerance. Only steps that both took count: those
    that are skipped have the largest losses."""
    pairs = [(a, b) for a, b in zip(log(folder), log(exact), strict=True) if a is not None]
    for some, rel in ((pairs, 0.01), (pairs[:STEPS // 2], tolerance)):
        half, single = map(sum, zip(*some))
        assert half == pytest.approx(single, rel=rel)
    half, single = log(folder, 'val_loss'), log(exact, 'val_loss')
    assert half == pytest.approx(single, rel=tolerance) and len(single) == 4
    assert single[-1] < 0.95 * single[0]                 # it learns


@pytest.mark.parametrize('dtype, tolerance', [('bfloat16', 0.06), ('float16', 0.015)])
def test_a_run_has_the_losses_of_float32(work, exact, dtype, tolerance):
    """Through the end of the curriculum, with validations; and resumed after it, bit for bit."""
    whole, parts = work / f'half-{dtype}', work / f'half-{dtype}-resumed'
    args = [*LONG, f'--dtype={dtype}']
    said = good(run_here(work, 'train.py', *args, f'--out_dir={whole.name}'))
    assert f'cpu {dtype}' in said
    close(whole, exact, tolerance)
    rewind(whole, parts, 75)
    good(run_here(work, 'train.py', *args, f'--out_dir={parts.name}', '--init_from=resume'))
    for part in ('weights', 'ema', 'optimizers', 'scaler', 'step', 'counts'):
        assert equal(checkpoint(whole)[part], checkpoint(parts)[part]), part
    skipped = int(checkpoint(whole)['counts'][2])  # the scaler still looks for its scale
    scaler = checkpoint(whole)['scaler']
    if dtype == 'bfloat16':
        assert scaler == {} and not skipped
    else:
        assert skipped < 5 and scaler['scale'] == 2.0 ** (16 - skipped)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_step_that_overflows_is_skipped_and_counted(work, tmp_path, dtype):
    """Step 5 has finite gradients (in float16 also unscaled) whose norm is beyond float32."""
    script = project_with(tmp_path, wrapped_loss('loss * (1e25 if step == 5 else 1)'))
    args = [*TINY, f'--dtype={dtype}', '--num_samples=0', '--eval_interval=1', '--keep_last=99']
    good(run_here(work, script, *args, f'--out_dir=over-{dtype}'))
    out = work / f'over-{dtype}'
    assert log(out, 'skipped') == [0] * 5 + [1] * 7
    before, after = (torch.load(out / f'step-{step:08}.pt', weights_only=True) for step in (5, 6))
    assert equal(before['weights'], after['weights'])
    for key, moments in before['optimizers'][0].items():
        assert equal(moments, after['optimizers'][0][key])
    assert all(w.isfinite().all() for w in checkpoint(out)['weights'].values())


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('enabled', [False, True])
@pytest.mark.parametrize('size', [1e-3, 1e25, math.inf])
def test_an_optimiser_moves_if_and_only_if_the_step_counts(fused, enabled, size):
    """1e25: every gradient is finite, and their norm is not."""
    w = torch.ones(3, 3, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0, enabled=enabled)
    for factor in (1.0, size):
        before = w.detach().clone()
        scaler.scale((w * factor).sum()).backward()
        _, finite = clip_and_step([optimizer], scaler, [w], 1.0)
        assert bool(finite) == (not torch.equal(w, before))
    assert bool(finite) == (size < 1)


@pytest.mark.parametrize('args', [
    ['--dtype=bfloat16'],
    pytest.param(['--dtype=bfloat16', '--compile', '--eval_interval=99'], marks=pytest.mark.skipif(
        'SLOW_TESTS' not in os.environ, reason='minutes: set SLOW_TESTS=1'))])
def test_two_processes_are_one(work, args):
    """With gloo; compiled, too."""
    args = [*TINY, *args, '--gradient_accumulation_steps=2', '--num_samples=0', '--dropout=0']
    good(run_here(work, 'train.py', *args, '--compile=False', '--out_dir=half-one'))
    good(run_ranks(work, 'train.py', *args, '--out_dir=half-two'))
    for key in ('loss', 'val_loss'):
        two, one = log(work / 'half-two', key), log(work / 'half-one', key)
        assert len(two) == len(one) >= 1
        assert two == pytest.approx(one, rel=0.01)
