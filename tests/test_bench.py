"""bench.py from the command line, and the paper's formulas as they read against those of diffusion.py."""
import numpy as np
import pytest
import torch
from scipy import stats

import train
from diffusion import nelbo, posterior, stratified_times
from helpers import TINY, good, one_line, run
from literal import literal_distillation, literal_loss, literal_nelbo, literal_reverse
from model import DiT, DiTConfig

PLAN = [*(option for option in TINY if 'dataset' not in option), '--plan', '--repeats=1']


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize('objective', ['duo', 'dcd', 'mdlm', 'ar'])
def test_a_plan_without_data_leaves_nothing(tmp_path, objective):
    said = good(run(tmp_path, 'bench.py', *PLAN, f'--objective={objective}', '--gpus=2', '--price_per_hour=3',
                    '--gradient_accumulation_steps=6', '--max_iters=1000000'))
    assert not list(tmp_path.iterdir())
    assert '768 tokens a step' in said and '3 micro-batches' in said         # of 4 rows of 32, six times
    assert 'vocabulary 4,096 (that of stdlib, which is not here)' in said and '--gpus=2' in said
    assert '1,000,000 of them' in said and '0.768G tokens' in said and 'epochs' not in said
    assert all(part in said for part in ('M parameters', 'assumed', 'peak memory', 'ms a step', 'hours', 'price'))
    assert ('curriculum, micro-batch' in said) == (objective == 'duo')


def test_a_plan_with_data_knows_its_epochs(work):
    before = sorted(path.name for path in work.iterdir())
    said = good(run(work, 'bench.py', *PLAN, '--dataset=tiny', '--curriculum_frac=1'))
    assert 'vocabulary 256' in said and 'epochs of tiny' in said and 'price' not in said
    assert 'curriculum, micro-batch' in said and 'discrete' not in said
    assert sorted(path.name for path in work.iterdir()) == before


def test_a_plan_of_a_published_recipe_shrunk(tmp_path):
    more = ('--n_layer=1 --n_head=2 --n_embd=8 --cond_dim=8 --batch_size=1 --gradient_accumulation_steps=512 '
            '--block_size=16 --compile=False --device=cpu --repeats=1 --gpus=8').split()
    for recipe, vocab_size in (('owt_duo', '50,257'), ('lm1b_duo', '30,522'), ('owt_dcd', '50,257')):
        said = good(run(tmp_path, 'bench.py', '--plan', f'config/{recipe}.py', *more))
        assert f'vocabulary {vocab_size}' in said and '64 micro-batches' in said and '8,192 tokens a step' in said


@pytest.mark.parametrize('args, parts', [
    (['--gpus=3', '--gradient_accumulation_steps=4'], ['gpus=3', 'gradient_accumulation_steps']),
    (['--dataset=none'], ['none', '--vocab_size']), (['--repeats=0'], ['repeats', 'at least 1']),
    (['--batch_size=0'], ['batch_size']), (['--price_per_hour=-1'], ['price_per_hour'])])
def test_a_plan_refuses_in_one_line(tmp_path, args, parts):
    one_line(run(tmp_path, 'bench.py', *PLAN, *args), *parts)


def test_a_vocabulary_can_be_named(tmp_path):
    said = good(run(tmp_path, 'bench.py', *PLAN, '--dataset=none', '--vocab_size=99', '--curriculum_frac=0'))
    assert 'vocabulary 99 (--vocab_size)' in said and 'curriculum' not in said


def test_the_table_of_literal_and_ours(tmp_path):
    said = good(run(tmp_path, 'bench.py', *PLAN[:-2], '--repeats=1', '--vocab_size=64'))
    for name in ('discrete', 'curriculum', 'distillation', 'sampling'):
        assert all(f'{name}, {form}' in said for form in ('literal', 'ours')) and f'\n| {name} | ' in said

# ---- the same numbers


def test_the_literal_nelbo_is_ours():
    for K in (5, 300):
        logits, alpha = torch.randn(40, 3, K, dtype=torch.float64), torch.linspace(0.01, 0.95, 40).double()[:, None]
        xt, x0 = torch.randint(K, (2, 40, 3))
        one, other = (loss(logits, xt, x0, alpha, torch.full_like(alpha, -0.999)) for loss in (literal_nelbo, nelbo))
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_the_literal_reverse_step_draws_from_the_posterior():
    n, K, alpha_s, alpha_t = 20_000, 6, 0.6, 0.5
    logits, xt = torch.randn(K).expand(1, n, K), torch.full((1, n), 2)
    counts = np.bincount(literal_reverse(logits, xt, alpha_s, alpha_t)[0], minlength=K)
    probs = posterior(logits[:, :1].double().softmax(-1), xt[:, :1], alpha_s, alpha_t)[0, 0].numpy()
    assert stats.chisquare(counts, n * probs).pvalue > 1e-4


@pytest.mark.parametrize('phase', ['discrete', 'curriculum', 'distillation'])
def test_the_literal_losses_have_our_means(monkeypatch, phase):
    """Over the same rows and times; the noise is drawn in another way."""
    K, B, n = 12, 64, 60
    settings = dict(objective='dcd' if phase == 'distillation' else 'duo', tau=0.3, gamma_min=-3.0, gamma_max=-1.0,
                    curriculum_k=K, curriculum_frac=0.5, max_iters=2, dcd_delta=1 / 8)
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    model, teacher = (DiT(DiTConfig(K, 8, 1, 2, 16, 8, 0.0)).requires_grad_(False) for _ in range(2))
    for p in [*model.parameters(), *teacher.parameters()]:                  # the head and adaLN start at zero
        torch.nn.init.normal_(p, std=0.5)
    x0, u = torch.randint(K, (B, 8)), stratified_times(0.3, 0, B, B)
    forms = {
        'discrete': lambda: literal_loss(model, x0, u, K),
        'curriculum': lambda: literal_loss(model, x0, u, K, (-3.0, -1.0), 0.3),
        'distillation': lambda: literal_distillation(model, teacher, x0, u, K, 1 / 8)}
    loss_fn, step = train.loss_of(train.objective, K), 1 if phase == 'discrete' else 0
    ours = torch.stack([train.training_loss(model, x0, u, step, K, loss_fn, teacher) for _ in range(n)])
    literal = torch.stack([forms[phase]() for _ in range(n)])
    error = ((ours.var() + literal.var()) / n).sqrt()
    assert (ours.mean() - literal.mean()).abs() < 4 * error < 0.1 * ours.mean()
