"""train.py and sample.py as users run them: through the command line, in a temporary directory."""
import json
import math

import pytest
import torch

import train
from diffusion import denoise, nelbo, sampling_schedule, soft_tokens, stratified_times, transform
from helpers import TINY, checkpoint, equal, good, log, one_line, run
from model import DiT, DiTConfig


def test_a_run_leaves_what_it_should(work):
    out, said = work / 'out', (work / 'stdout').read_text()
    assert 'val loss' in said and 'bits per byte' in said and said.count('-' * 80) == 1 and 'curve.png' in said
    assert (out / 'curve.png').read_bytes()[:4] == b'\x89PNG'
    losses, vals = log(out), log(out, 'val_loss')
    assert len(losses) == 12 and len(vals) == 3 and all(map(math.isfinite, losses + vals))
    assert json.loads((out / 'config.json').read_text())['model']['n_embd'] == 32
    state = checkpoint(out)
    assert state['step'] == 12 and state['best'] == pytest.approx(min(vals), abs=1e-5)
    assert state['val_loss'] == pytest.approx(vals[-1], abs=1e-5)
    assert set(state['weights']) == set(state['ema'])
    assert not list(out.glob('*.tmp'))


def test_a_resumed_run_is_bit_for_bit_the_run(work):
    # stopped inside the curriculum, with dropout on and gradients accumulated
    more = [*TINY, '--gradient_accumulation_steps=2']
    good(run(work, 'train.py', *more, '--out_dir=whole'))
    good(run(work, 'train.py', *more, '--out_dir=parts', '--max_iters=4'))
    said = good(run(work, 'train.py', *more, '--out_dir=parts', '--init_from=resume'))
    assert 'max_iters 4 -> 12' in said
    whole, parts = checkpoint(work / 'whole'), checkpoint(work / 'parts')
    for key in ('weights', 'ema', 'optimizer', 'scaler', 'step', 'best'):
        assert equal(whole[key], parts[key]), key
    assert log(work / 'whole') == log(work / 'parts') and log(work / 'whole', 'val_loss') == log(work / 'parts', 'val_loss')
    one_line(run(work, 'train.py', *more, '--out_dir=parts', '--init_from=resume', '--n_embd=64'), 'another model', 'n_embd')

    # two processes share the micro-batches of one
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    good(run(work, 'train.py', *more, '--out_dir=two', launcher=torchrun))
    for key in ('loss', 'val_loss'):
        assert log(work / 'two', key) == pytest.approx(log(work / 'whole', key), rel=1e-5)


def test_an_older_run_is_set_aside_not_overwritten(work):
    before = checkpoint(work / 'out')
    said = good(run(work, 'train.py', *TINY, '--max_iters=1'))
    assert 'held another run' in said
    (aside,) = work.glob('out-2*')
    assert equal(checkpoint(aside)['weights'], before['weights']) and checkpoint(work / 'out')['step'] == 1
    for file in (work / 'out').iterdir():
        file.unlink()
    (work / 'out').rmdir()
    aside.rename(work / 'out')


@pytest.mark.parametrize('args, words', [
    (['--dataset=owt'], ['python prepare.py owt']), (['--device=tpu'], ['tpu']), (['--dtype=int8'], ['int8']),
    (['--init_from=resume', '--out_dir=nowhere'], ['nowhere']), (['--init_from=there'], ['there']), (['--objective=dcd'], ['--init_from']), (['--dcd_kl=both'], ['dcd_kl']),
    (['--objective=dcd', '--init_from=auto'], ['auto:MODEL']), (['--objective=dcd', '--init_from=out', '--dcd_round_iters=1', '--max_iters=5000'], ['dcd_delta']),
    (['--dropout=1.5'], ['dropout']), (['--beta1=1'], ['beta1']), (['--weight_decay=-1'], ['weight_decay']), (['--ema_decay=2'], ['ema_decay']),
    (['--log_interval=0'], ['log_interval']), (['--out_dir=tiny.txt/out'], ['tiny.txt/out']), (['--curriculum_k=1'], ['curriculum_k']),
    (['--dataset=owt_t4'], ['prepare.py owt --max_docs']),
    (['--block_size=100000'], ['tokens', 'block_size']), (['--n_head=3'], ['n_embd']), (['--learning_rate=fast'], ['float'])])
def test_train_refuses_in_one_line(work, args, words):
    one_line(run(work, 'train.py', *TINY, '--out_dir=never', *args), *words)
    assert not (work / 'never' / 'last.pt').exists()


def test_a_broken_loss_stops_the_run_and_keeps_the_last_good_checkpoint(work):
    (work / 'wild.py').write_text('learning_rate = 1e30\nwarmup_iters = 0\n')
    good(run(work, 'train.py', *TINY, '--out_dir=wild', '--max_iters=4'))
    one_line(run(work, 'train.py', *TINY, 'wild.py', '--out_dir=wild', '--init_from=resume'), 'loss is nan', 'step')
    state = checkpoint(work / 'wild')
    assert state['step'] == 4 and all(torch.isfinite(w).all() for w in state['weights'].values())


def test_half_precision_with_a_scaler(work):
    said = good(run(work, 'train.py', *TINY, '--dtype=float16', '--out_dir=half'))
    assert 'cpu float16' in said and all(map(math.isfinite, log(work / 'half')))
    assert checkpoint(work / 'half')['scaler']['scale'] > 1


def test_too_few_micro_batches_for_the_processes(work):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    done = run(work, 'train.py', *TINY, '--out_dir=never', launcher=torchrun)
    assert done.returncode != 0 and 'must be a multiple of the number of processes (2)' in done.stderr


def test_distillation_from_the_command_line(work):
    dcd = [*TINY, '--objective=dcd', '--init_from=out', '--dcd_round_iters=3', '--dcd_teacher=ema', '--eval_interval=5']
    good(run(work, 'train.py', *dcd, '--out_dir=dcd-whole'))
    good(run(work, 'train.py', *dcd, '--out_dir=dcd-parts', '--max_iters=5'))          # in the middle of a round
    good(run(work, 'train.py', *dcd, '--out_dir=dcd-parts', '--init_from=resume'))
    whole, parts = checkpoint(work / 'dcd-whole'), checkpoint(work / 'dcd-parts')
    for key in ('weights', 'ema', 'optimizer', 'teacher'):
        assert equal(whole[key], parts[key]), key
    assert not equal(whole['teacher'], whole['ema'])
    assert 'network calls' in good(run(work, 'sample.py', '--out_dir=dcd-whole', '--steps=2', '--num_samples=1'))


@pytest.mark.parametrize('teacher', ['student', 'ema'])
def test_the_teacher_is_renewed_where_a_round_begins(work, teacher):
    """At steps 0, 3, 6: what it is at step 5 is what the student (or its average) was at 3. Raw weights to start from."""
    dcd = [*TINY, '--objective=dcd', '--init_from=out', '--init_weights=raw', '--dcd_round_iters=3', '--dcd_kl=forward',
           f'--dcd_teacher={teacher}', '--ema_decay=0.5']
    at = {}
    for step in (2, 3, 5):
        good(run(work, 'train.py', *dcd, f'--out_dir=dcd-{teacher}', f'--max_iters={step}'))
        at[step] = checkpoint(work / f'dcd-{teacher}')
    assert equal(at[2]['teacher'], checkpoint(work / 'out')['weights'])
    assert equal(at[5]['teacher'], at[3]['weights' if teacher == 'student' else 'ema'])
    assert not equal(at[3]['weights'], at[3]['ema'])

# ---- train.py's functions

def test_schedules(monkeypatch):
    for name, value in dict(learning_rate=1.0, warmup_iters=9, max_iters=100, cooldown_iters=20, ema_decay=0.999).items():
        monkeypatch.setattr(train, name, value)
    rates = [train.learning_rate_at(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:81] == [1.0] * 72 and rates[90] == pytest.approx(0.5) and rates[99] > 0
    assert train.ema_decay_at(0) == 0.1 and train.ema_decay_at(10 ** 6) == 0.999


def test_the_average_remembers_no_gradients():
    params, average = [torch.ones(3, requires_grad=True)], [torch.zeros(3)]
    train.update_average(average, params, 0.75)
    assert average[0].tolist() == [0.25] * 3 and not average[0].requires_grad


def test_the_curriculum_is_the_nelbo_at_the_gaussians_argmax(monkeypatch):
    """As tau vanishes the network sees zt itself, and the loss is nelbo with the transformed alpha and its slope."""
    for name, value in dict(curriculum_iters=1, tau=1e-9, gamma_min=-3.0, gamma_max=-1.0, curriculum_k=4).items():
        monkeypatch.setattr(train, name, value)
    model = DiT(DiTConfig(50, 8, 1, 2, 16, 8, 0.0))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x0, u = torch.randint(50, (6, 8)), stratified_times(0.2, 0, 6, 6)
    torch.manual_seed(5)
    ours = train.training_loss(model, x0, u, 0, 50)
    gamma = -3.0 + 2.0 * u
    torch.manual_seed(5)
    zt = soft_tokens(x0, gamma, 1e-9, 50, 4)[2]
    alpha = transform(gamma, 50)[0]
    slope = (transform(gamma + 1e-6, 50)[0] - alpha) / 1e-6 * 2.0
    theirs = nelbo(model(zt, -alpha.log()), zt, x0, alpha, slope).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert train.training_loss(model, x0, u, 1, 50).item() != pytest.approx(ours.item(), rel=1e-3)


def test_distillation_loss(monkeypatch):
    """Against the full vectors; nothing to learn from oneself at the same time; a gradient for the student only."""
    torch.manual_seed(0)
    student, teacher = (DiT(DiTConfig(30, 8, 1, 2, 16, 8, 0.0)).eval() for _ in range(2))
    for p in (*student.parameters(), *teacher.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    x0, u = torch.randint(30, (6, 8)), stratified_times(0.2, 0, 6, 6)
    seen = []
    pair = train.coupled_pair
    monkeypatch.setattr(train, 'coupled_pair', lambda x0, *gammas: seen.append((gammas[:2], pair(x0, *gammas))) or seen[-1][1])
    monkeypatch.setattr(train, 'dcd_round_iters', 10)
    for step, delta in ((0, 1 / 512), (9, 1 / 512), (10, 2 / 512), (49, 16 / 512)):
        loss = train.distillation_loss(student, teacher, x0, u, step, 30)
        (gamma_t, gamma_s), (zt, zs) = seen[-1]
        assert (gamma_t - gamma_s - 3 * delta).abs().max() < 1e-12 and gamma_t.max() <= -1
        sigma = [-transform(g, 30)[0].log().float() for g in (gamma_t, gamma_s)]
        p, q = student(zt, sigma[0]).softmax(-1), teacher(zs, sigma[1]).softmax(-1)
        exact = (p * (p / q).log()).sum(-1).mean()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
        ours = torch.autograd.grad(loss, list(student.parameters()))
        for a, b in zip(ours, torch.autograd.grad(exact, list(student.parameters()))):
            assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())
    assert all(p.grad is None for p in teacher.parameters())
    monkeypatch.setattr(train, 'coupled_pair', lambda x0, gamma_t, gamma_s, K: (x0, x0))
    monkeypatch.setattr(train, 'transform', lambda gamma, K: transform(torch.full_like(gamma, -2.0), K))
    assert train.distillation_loss(student, student, x0, u, 0, 30).abs() < 1e-6


def test_eight_rows_are_learnt_by_heart(monkeypatch):
    """Overfitting, and sampling back: who has read eight rows only can write nothing else."""
    for name, value in dict(curriculum_iters=500, gamma_min=-2.5, gamma_max=-0.5).items():
        monkeypatch.setattr(train, name, value)
    torch.manual_seed(0)
    rows = torch.randint(32, (8, 12))
    model = DiT(DiTConfig(32, 12, 2, 2, 64, 32, 0.0))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(1000):
        optimizer.param_groups[0]['lr'] = 5e-3 * min(1, (1000 - step) / 600)
        u = stratified_times(torch.rand(()).item(), 0, 64, 64)
        loss = train.training_loss(model, rows.repeat(8, 1), u, step, 32)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-50:]) / 50 < 0.45                     # of 3.5 for a guess; which row it is costs ln(8)/12 = 0.17
    *_, x = denoise(model.eval(), torch.randint(32, (64, 12)), *sampling_schedule(32))
    assert (x[:, None] == rows).all(-1).any(-1).float().mean() > 0.9
