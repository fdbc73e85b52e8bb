"""bench.py from the command line, and the literal forms that it measures against diffusion.py."""
import os
import shutil

import numpy as np
import pytest
import torch
from scipy import stats

import sample
import selftest
import train
from configurator import UserError
from diffusion import nelbo, stratified_times
from helpers import TINY, good, one_line, run, run_here
from literal import (literal_distillation, literal_loss, literal_nelbo, literal_reverse,
                     posterior)
from model import DiT, DiTConfig

QUICK = ['--repeats=1', *(option for option in TINY if 'dataset' not in option)]
PLAN = ['--plan', *QUICK]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize('objective', ['duo', 'dcd', 'mdlm', 'ar'])
def test_a_plan_without_data_leaves_nothing(tmp_path, objective):
    more = (f'--objective={objective} --gpus=2 --price_per_hour=3 --max_iters=1000000 '
            '--gradient_accumulation_steps=6').split()
    said = good(run_here(tmp_path, 'bench.py', *PLAN, *more))
    assert not list(tmp_path.iterdir())
    # 6 micro-batches of 4 rows of 32 tokens
    for part in ('M parameters', '768 tokens a step', '--gpus=2', '3 micro-batches', 'peak memory',
                 'assumed: vocabulary 4,096 (that of stdlib, which is not here)', 'ms a step',
                 '1,000,000 of them', 'hours', '0.768G tokens', 'a price of'):
        assert part in said
    assert 'epochs' not in said
    assert ('\ncurriculum ' in said) == (objective == 'duo')


def test_a_plan_with_data_knows_its_epochs(work):
    before = sorted(path.name for path in work.iterdir())
    said = good(run_here(work, 'bench.py', *PLAN, '--dataset=tiny', '--curriculum_frac=1'))
    for part in ('vocabulary 256', 'epochs of tiny', 'curriculum'):
        assert part in said
    for part in ('price', '\ndiscrete'):
        assert part not in said
    assert sorted(path.name for path in work.iterdir()) == before


@pytest.mark.parametrize('recipe, vocab_size', [
    ('owt_duo', '50,257'), ('lm1b_duo', '30,522'), ('owt_dcd', '50,257')])
def test_a_plan_of_a_recipe_with_a_smaller_network(tmp_path, recipe, vocab_size):
    more = ('--n_layer=1 --n_head=2 --n_embd=8 --cond_dim=8 --block_size=16 --batch_size=1 '
            '--gradient_accumulation_steps=512 --gpus=8 --compile=False --device=cpu --repeats=1')
    said = good(run_here(tmp_path, 'bench.py', '--plan', f'config/{recipe}.py', *more.split()))
    for part in (f'vocabulary {vocab_size}', '64 micro-batches', '8,192 tokens a step'):
        assert part in said


@pytest.mark.parametrize('args, parts', [
    ('--gpus=3 --gradient_accumulation_steps=4', ['gpus=3', 'gradient_accumulation_steps']),
    ('--dataset=none', ['none', '--vocab_size']),
    ('--vocab_size=1', ['--vocab_size', 'at least 2']),
    ('--repeats=0', ['repeats', 'at least 1']),
    ('--batch_size=0', ['batch_size', '1 to 99,999,999']),
    ('--price_per_hour=-1', ['price_per_hour', 'at least 0'])])
def test_a_plan_refuses_in_one_line(tmp_path, args, parts):
    one_line(run_here(tmp_path, 'bench.py', *PLAN, *args.split()), *parts)


def test_a_vocabulary_can_be_named(tmp_path):
    more = '--dataset=none --vocab_size=99 --curriculum_frac=0'.split()
    said = good(run_here(tmp_path, 'bench.py', *PLAN, *more))
    assert 'vocabulary 99 (--vocab_size)' in said
    assert 'curriculum' not in said


def test_the_table_of_literal_and_ours(tmp_path):
    said = good(run(tmp_path, 'bench.py', *QUICK, '--vocab_size=64'))
    for name in ('discrete', 'curriculum', 'distillation', 'sampling'):
        for part in (f'{name}, literal', f'{name}, ours', f'\n| {name} | '):
            assert part in said

# ---- the selftest

VERDICT = (f'torch {torch.__version__}, Python ', ', commit ')


@pytest.fixture
def small(monkeypatch):
    for name, value in dict(B=4, T=32, N_SAMPLES=64).items():
        monkeypatch.setattr(selftest, name, value)


def test_the_selftest_has_a_line_a_check_and_a_verdict(tmp_path, small):
    said = good(run_here(tmp_path, 'bench.py', '--selftest', '--device=cpu', '--dtype=bfloat16'))
    *lines, verdict = said.strip().splitlines()
    assert len(lines) == 14 and all(' ok: ' in line for line in lines)
    assert all(part in verdict for part in ('all 14 checks passed', 'cpu (', 'bfloat16', *VERDICT))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('broken', ['loss', 'samples', 'noise', 'error'])
def test_the_selftest_fails_where_the_device_differs(monkeypatch, capsys, small, broken):
    """Here: where autocast is on, as it is not in float32 on the CPU."""
    def in_autocast(change):
        return lambda x: change(x) if torch.is_autocast_enabled('cpu') else x

    def wrap(module, name, change):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: change(function(*args, **more)))

    for name in [*selftest.SETTINGS, 'objective', 'optimizer']:
        monkeypatch.setattr(train, name, getattr(train, name))           # restored afterwards
    monkeypatch.setattr(selftest, 'OBJECTIVES', {'duo, curriculum': ('duo', 0, 'adamw')})
    monkeypatch.setattr(selftest, 'SAMPLERS', {'ancestral': ('duo', dict(sampler='ancestral'))})
    failing = {'loss': 'duo, curriculum, eager', 'error': 'duo, curriculum, eager',
               'samples': 'samples, ancestral', 'noise': 'noise'}[broken]
    if broken == 'loss':
        wrap(train, 'training_loss', in_autocast(lambda loss: 1.1 * loss))
    if broken == 'error':
        wrap(train, 'training_loss', in_autocast(lambda loss: loss.no_such_thing))
    if broken == 'samples':
        wrap(sample, 'reverse_step', in_autocast(lambda xs: (xs * 0.9).long()))
    if broken == 'noise':
        wrap(selftest, 'q_sample', lambda xt: xt.roll(1, -1))
    with pytest.raises(UserError, match='1 of 3 checks FAILED') as error:
        selftest.check_all('cpu', 'bfloat16')
    assert all(part in str(error.value) for part in (failing, 'cpu (', *VERDICT))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines if 'FAILED' in line] == [failing]
    assert sum(' ok: ' in line for line in lines) == 2


@pytest.mark.skipif('SLOW_TESTS' not in os.environ, reason='a minute: set SLOW_TESTS=1')
def test_the_selftest_compiles(monkeypatch):
    if shutil.which('g++') is None:
        pytest.skip('torch.compile needs a C++ compiler')
    for name, value in selftest.SETTINGS.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, 'objective', 'ar')
    monkeypatch.setattr(train, 'optimizer', 'adamw')
    monkeypatch.setattr(train, 'compile', False)         # the selftest sets it
    compiled = []
    wrapped = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **how: compiled.append(f) or wrapped(f, **how))
    assert 'float32 on the CPU' in selftest.compare_training('ar', 'cpu', 'bfloat16', True, {})
    assert {f.__name__ for f in compiled} == {'hidden', 'loss_and_grad'}

# ---- the literal forms have the numbers of diffusion.py

@pytest.mark.parametrize('K', [5, 300])
def test_the_literal_nelbo_is_ours(K):
    logits = torch.randn(40, 3, K, dtype=torch.float64)
    alpha = torch.linspace(0.01, 0.95, 40, dtype=torch.float64).unsqueeze(-1)
    xt, x0 = torch.randint(K, (2, 40, 3))
    args = logits, xt, x0, alpha, torch.full_like(alpha, -0.999)
    assert torch.allclose(literal_nelbo(*args), nelbo(*args), rtol=1e-9, atol=1e-12)


def test_the_literal_reverse_step_draws_from_the_posterior():
    n, K, alpha_s, alpha_t = 20_000, 6, 0.6, 0.5
    logits, xt = torch.randn(K).expand(1, n, K), torch.full((1, n), 2)
    counts = np.bincount(literal_reverse(logits, xt, alpha_s, alpha_t)[0], minlength=K)
    probs = posterior(logits[:, :1].double().softmax(-1), xt[:, :1], alpha_s, alpha_t)[0, 0]
    assert stats.chisquare(counts, n * probs.numpy()).pvalue > 1e-4


@pytest.mark.parametrize('phase', ['discrete', 'curriculum', 'distillation'])
def test_the_literal_losses_have_our_means(monkeypatch, phase):
    """Over the same rows and times; the noise is drawn in another way."""
    K, B, n = 12, 64, 60
    settings = dict(
        objective='dcd' if phase == 'distillation' else 'duo', tau=0.3, gamma_min=-3.0,
        gamma_max=-1.0, curriculum_k=K, curriculum_frac=0.5, max_iters=2, dcd_delta=1 / 8)
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    config = DiTConfig(K, block_size=8, n_layer=1, n_head=2, n_embd=16, cond_dim=8, dropout=0.0)
    model = DiT(config).requires_grad_(False)
    teacher = DiT(config).requires_grad_(False)
    for p in [*model.parameters(), *teacher.parameters()]:     # the head and adaLN start at zero
        torch.nn.init.normal_(p, std=0.5)
    x0, u = torch.randint(K, (B, 8)), stratified_times(0.3, 0, B, B)
    literal_forms = {
        'discrete': lambda: literal_loss(model, x0, u, K),
        'curriculum': lambda: literal_loss(model, x0, u, K, (-3.0, -1.0), 0.3),
        'distillation': lambda: literal_distillation(model, teacher, x0, u, K, 1 / 8),
    }
    loss_fn = train.loss_of(train.objective, K)
    step = 1 if phase == 'discrete' else 0
    ours, literal = [], []
    for _ in range(n):
        ours.append(train.training_loss(model, x0, u, step, K, loss_fn, teacher))
        literal.append(literal_forms[phase]())
    ours, literal = torch.stack(ours), torch.stack(literal)
    error = ((ours.var() + literal.var()) / n).sqrt()
    assert (ours.mean() - literal.mean()).abs() < 4 * error < 0.1 * ours.mean()
