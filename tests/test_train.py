"""train.py as users run it, and its functions."""
import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

import diffusion
import sample
import train
from checkpoint import load_model
from configurator import configure
from data import epoch_rows, get_rows, load_data, num_rows
from diffusion import (consistency_pair, nelbo, noise_schedule, q_sample, soft_tokens,
                       stratified_times, transform)
from helpers import (TINY, checkpoint, equal, good, log, mean_and_error, one_line, project_with,
                     rewind, run, run_here, wrapped_loss)
from literal import literal_nelbo
from model import DiT, DiTConfig
from optim import Muon, clip_and_step, orthogonalise, set_lr, update_ema
from sample import Loaded, denoise

QUICK = [*TINY, '--num_samples=0']
EVERY_STEP = ['--checkpoint_interval=1', '--keep_last=99', '--eval_interval=99']
PARTS = ('weights', 'ema', 'optimizers', 'scaler', 'step', 'counts')  # what a resume continues


def same_bits(a, b, *more):
    a, b = checkpoint(a), checkpoint(b)
    for key in (*PARTS, *more):
        assert equal(a[key], b[key]), key


def last_json(said):
    return json.loads(said.strip().splitlines()[-1])


def change(monkeypatch, **settings):
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)


def random_model(K, T=8, n=1):
    """n DiTs whose outputs depend on all their weights."""
    models = [DiT(DiTConfig(K, T, 1, 2, 16, 8, 0.0)) for _ in range(n)]
    for model in models:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return models


# --------------------------------------------------------------------------------------------------
# runs

def test_a_run_leaves_what_it_should(work):
    out, said = work / 'out', (work / 'stdout').read_text()
    assert all(part in said for part in ('val loss', 'bits per byte', 'curve.png', 'network calls'))
    assert said.count('-' * 80) == 2                                     # one text
    assert (out / 'curve.png').read_bytes()[:4] == b'\x89PNG'
    losses, vals = log(out), log(out, 'val_loss')
    assert len(losses) == 12 and len(vals) == 3
    assert all(map(math.isfinite, losses + vals))
    assert json.loads((out / 'config.json').read_text())['model']['n_embd'] == 32
    state = checkpoint(out)
    assert state['step'] == 12
    assert set(state['weights']) == set(state['ema'])
    assert not list(out.glob('*.tmp'))


def test_a_resumed_run_is_bit_for_bit_the_run(work):
    """Stopped inside the curriculum and between two lines of the log, with dropout, two
    micro-batches a step; in a new process."""
    args = [*QUICK, '--gradient_accumulation_steps=2', '--log_interval=3',
            '--checkpoint_interval=5']
    good(run_here(work, 'train.py', *args, '--out_dir=whole', '--keep_last=99'))
    rewind(work / 'whole', work / 'parts', 4)
    resume = [*args, '--out_dir=parts', '--init_from=resume']
    said = good(run(work, 'train.py', *resume, '--keep_last=98'))
    assert 'keep_last 99 -> 98' in said
    same_bits(work / 'whole', work / 'parts')
    for key in ('loss', 'val_loss', 'step'):
        assert log(work / 'whole', key) == log(work / 'parts', key)
    a, b = (torch.load(work / folder / 'step-00000005.pt') for folder in ('whole', 'parts'))
    assert equal(a['counts'], b['counts'])
    # the card's command makes this run, not the resumed part of it
    (command,) = re.findall(
        '^    python (train.py.*)', (work / 'parts/README.md').read_text(), re.M)
    settings = json.loads((work / 'parts/config.json').read_text())['settings']
    assert configure(vars(train), (), shlex.split(command)[1:]) == settings
    assert settings['init_from'] == 'scratch' and settings['keep_last'] == 98
    refused = run_here(work, 'train.py', *resume, '--n_embd=64')
    one_line(refused, 'another model', 'n_embd')


def test_an_older_run_is_set_aside_not_overwritten(work, tmp_path):
    (tmp_path / 'data').symlink_to(work / 'data')
    older = checkpoint(rewind(work / 'out', tmp_path / 'out', 8))
    said = good(run_here(tmp_path, 'train.py', *QUICK, '--max_iters=1'))
    assert 'held another run' in said
    (aside,) = tmp_path.glob('out-2*')
    assert equal(checkpoint(aside)['weights'], older['weights'])
    assert checkpoint(tmp_path / 'out')['step'] == 1


@pytest.mark.parametrize('args, parts', [
    (['--dataset=owt'], ['python prepare.py owt']),
    (['--dataset=owt_t4'], ['prepare.py owt_t4', 'config file']),
    (['--device=tpu'], ['tpu']),
    (['--dtype=int8'], ['int8']),
    (['--init_from=resume', '--out_dir=nowhere'], ['nowhere']),
    (['--init_from=there'], ['there']),
    (['--init_from=resume'], ['no checkpoint in never']),
    (['--init_from=out', '--objective=ar'], ['out is a network for duo, not for ar']),
    (['--init_from=out', '--dataset=bpe'],
     ['vocab_size 256 and 300', 'bytes and bpe', 'out/tokenizer.json', '--tokenizer=bytes']),
    ([f'--seed={2**64}'], ['seed']),
    ([f'--batch_size={10**9}'], ['batch_size']),
    (['--device=cpu:abc'], ['cpu:abc']),
    (['--objective=dcd'], ['--init_from']),
    (['--objective=dcd', '--init_from=auto'], ['auto:MODEL']),
    (['--dcd_rounds=0'], ['dcd_rounds']),
    (['--dcd_rounds=2000'], ['dcd_rounds']),
    (['--objective=udlm'], ['objective', 'mdlm']),
    (['--dropout=1.5'], ['dropout']),
    (['--beta1=1'], ['beta1']),
    (['--weight_decay=-1'], ['weight_decay']),
    (['--ema_decay=2'], ['ema_decay']),
    (['--cooldown_frac=1.1'], ['cooldown_frac']),
    (['--curriculum_frac=-0.1'], ['curriculum_frac']),
    (['--curriculum_k=1'], ['curriculum_k']),
    (['--gamma_min=-1', '--gamma_max=-1'], ['gamma_min', 'gamma_max']),
    (['--gamma_min=-6'], ['gamma_min', 'alpha is 1']),            # with bytes, it is
    (['--log_interval=0'], ['log_interval']),
    (['--out_dir=tiny.txt/out'], ['tiny.txt/out']),
    (['--block_size=100000'], ['tokens', 'block_size']),
    (['--n_head=3'], ['n_embd']),
    (['--learning_rate=fast'], ['float'])])
def test_train_refuses_in_one_line(work, bpe, args, parts):
    one_line(run_here(work, 'train.py', *TINY, '--out_dir=never', *args), *parts)
    assert not (work / 'never').exists()                 # nor is an empty folder left


@pytest.fixture(scope='module')
def bpe(work):
    """The text of `work` once more, with another tokenizer."""
    good(run_here(work, 'prepare.py', 'tiny.txt', '--name=bpe', '--vocab_size=300'))


def test_a_model_of_other_sizes_is_trained_on_another_text(work):
    """Its sizes count, not those of the command; a resume needs nothing but the same command."""
    (work / 'more.txt').write_text((work / 'tiny.txt').read_text()[::-1])
    good(run_here(work, 'prepare.py', 'more.txt', '--tokenizer', 'bytes'))
    args = [*QUICK, '--dataset=more', '--out_dir=tuned', '--n_embd=64', '--n_layer=2',
            '--block_size=16', '--init_from=auto:out', '--max_iters=4', *EVERY_STEP]
    said = good(run_here(work, 'train.py', *args))
    assert '1 layers of 32' in said
    info = json.loads((work / 'tuned' / 'config.json').read_text())
    assert info['model']['n_embd'] == info['settings']['n_embd'] == 32
    assert info['model']['block_size'] == info['settings']['block_size'] == 16
    assert info['settings']['init_from'] == 'out'
    first = torch.load(work / 'tuned' / 'step-00000001.pt')
    far = {name: (w - first['weights'][name]).abs().max() for name, w in
           checkpoint(work / 'out')['ema'].items()}
    assert max(far.values()) < 2e-3                      # one step from where it began
    rewind(work / 'tuned', work / 'retuned', 2)
    good(run_here(work, 'train.py', *args, '--out_dir=retuned'))
    same_bits(work / 'tuned', work / 'retuned')


def test_a_failing_compiler_is_one_line(work, tmp_path):
    """As on a GPU that Triton does not know."""
    script = project_with(tmp_path, '''
def broken(graph, inputs):
    raise RuntimeError('this GPU is too old')


torch.compile = partial(torch.compile, backend=broken)
''')
    failed = run(work, script, *QUICK, '--out_dir=uncompilable', '--compile')
    one_line(failed, 'too old', '--compile=False')
    assert not (work / 'uncompilable').exists()


@pytest.mark.parametrize('more, n_graphs', [
    (['--curriculum_frac=0.5'], 3),                      # the trunk twice, and the loss
    (['--objective=dcd', '--init_from=out', '--dcd_rounds=2'], 3)])      # the teacher's trunk
def test_all_is_compiled_before_the_first_step(work, tmp_path, more, n_graphs):
    """The graph of the discrete noise, too, which is not needed before the curriculum ends; and
    compiling leaves no trace in the run."""
    script = project_with(tmp_path, '''
def counted(graph, inputs):
    sizes = [i for i in inputs if not isinstance(i, torch.Tensor)]      # a graph for any size
    print('a graph', sizes, flush=True)
    return graph.forward


torch.compile = partial(torch.compile, backend=counted)
''')
    args = [*QUICK, '--max_iters=4', '--eval_interval=2', '--log_interval=1', '--dropout=0.1',
            *more]
    said = good(run(work, script, *args, '--out_dir=early', '--compile'))
    before, after = said.split('step 1: ')
    assert before.count('a graph []') >= n_graphs
    assert before.count('a graph') == before.count('a graph []')
    assert 'a graph' not in after
    good(run_here(work, 'train.py', *args, '--out_dir=uncompiled'))
    assert log(work / 'early') == pytest.approx(log(work / 'uncompiled'), rel=1e-5)
    again = good(run(work, script, *args, '--out_dir=early', '--compile', '--init_from=resume'))
    assert 'a graph' not in again                        # it has ended


def test_a_clock_that_stands_still(work, tmp_path):
    script = project_with(tmp_path, '''
class time:
    monotonic = staticmethod(lambda: 7.0)
''')
    good(run_here(work, script, *QUICK, '--max_iters=2', '--out_dir=still'))
    assert all(map(math.isfinite, log(work / 'still', 'tokens_per_s')))


def test_the_window_of_the_curriculum_is_told(work, tmp_path):
    """alpha, against a simulation; a warning where hardly a token is noise."""
    args = [*QUICK, '--eval_only', '--out_dir=never']
    (line,) = re.findall('^curriculum: .*', good(run_here(work, 'train.py', *args)), re.M)
    told = [float(x) for x in re.findall(r'0\.\d+', line)]
    torch.manual_seed(0)
    noise = torch.randn(20_000, 256)
    for gamma, alpha in zip((-3.5, -2.25), told, strict=True):
        a, s = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
        stays = (a + s * noise[:, 0] > s * noise[:, 1:].amax(1)).double()
        mean, error = mean_and_error(stays)
        assert abs(mean - (alpha + (1 - alpha) / 256)) < 4 * error
    assert 'little noise' in line
    said = good(run_here(work, 'train.py', *args, '--gamma_max=-1.75'))
    assert 'curriculum: ' in said and 'little noise' not in said
    assert 'curriculum: ' not in good(run_here(work, 'train.py', *args, '--curriculum_frac=0'))


def test_a_mistake_is_one_line_on_stderr(work):
    done = run(work, 'train.py', '--dcd_rounds=0')
    assert done.returncode == 1
    assert done.stderr == '--dcd_rounds=0: must be from 1 to 99,999,999\n' and not done.stdout


def test_a_broken_loss_stops_the_run_and_keeps_the_last_good_checkpoint(work, tmp_path):
    rewind(work / 'out', tmp_path / 'wild', 8)
    done = run_here(work, 'train.py', *QUICK, f'--out_dir={tmp_path}/wild', '--init_from=resume',
                    '--learning_rate=1e30', '--warmup_iters=0')
    one_line(done, 'loss is nan')
    state = checkpoint(tmp_path / 'wild')
    assert state['step'] == 8
    assert all(torch.isfinite(w).all() for w in state['weights'].values())


def test_half_precision_with_a_scaler(work):
    said = good(run_here(work, 'train.py', *QUICK, '--dtype=float16', '--out_dir=half'))
    assert 'cpu float16' in said and 'skipped' not in said
    assert all(map(math.isfinite, log(work / 'half')))
    assert checkpoint(work / 'half')['scaler']['scale'] == 2.0 ** 16


def test_an_overflow_in_half_precision_is_skipped_and_counted(work, tmp_path):
    """The scaler starts far too high: it halves until the gradients are finite."""
    script = project_with(tmp_path, '''
from functools import partial
torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0 ** 24)
''')
    scaler = torch.amp.GradScaler
    try:
        said = good(run_here(work, script, *QUICK, '--dtype=float16', '--out_dir=overflow'))
    finally:
        torch.amp.GradScaler = scaler
    skipped, losses = log(work / 'overflow', 'skipped'), log(work / 'overflow')
    count = skipped[-1]
    assert 0 < count < 10 and f'{count} steps skipped' in said
    assert skipped == [losses[:step].count(None) for step in range(1, 13)]
    assert all(loss is None or math.isfinite(loss) for loss in losses)
    state = checkpoint(work / 'overflow')
    assert state['counts'][2] == count and state['scaler']['scale'] == 2.0 ** (24 - count)
    adamw, _ = state['optimizers']
    assert all(s['step'] == 12 - count for s in adamw.values())


PLAIN_SGD = '''
def build_optimizer(model):
    return [torch.optim.SGD(model.parameters(), lr=1e-3)]
'''


def test_a_step_is_the_gradient_of_the_whole_batch(work, tmp_path):
    """Two steps of two micro-batches, the documents padded, against autograd of the literal loss:
    which rows and times are taken, what is masked, by how much is divided."""
    meta = load_data(work / 'data/tiny')[0]
    padded = work / 'data' / 'padded'
    shutil.copytree(work / 'data/tiny', padded)
    for split in ('train', 'val'):
        count = meta[f'{split}_tokens']
        np.array([*range(0, count, 23), count], np.uint64).tofile(padded / f'{split}.idx')
    (padded / 'meta.json').write_text(json.dumps(meta | dict(pad_id=1)))
    script = project_with(tmp_path, PLAIN_SGD)
    good(run_here(work, script, *QUICK, *EVERY_STEP, '--dataset=padded', '--init_from=out',
                  '--out_dir=sgd', '--max_iters=2', '--batch_size=3', '--dropout=0',
                  '--grad_clip=0', '--gradient_accumulation_steps=2', '--warmup_iters=0',
                  '--curriculum_frac=0'))

    model = load_model(work / 'out')[0].requires_grad_(True)
    stream = load_data(padded)[1]['train']
    order = np.random.default_rng([1337, 0]).permutation(len(stream[1]) - 1)
    for step in (0, 1):
        x0 = torch.from_numpy(get_rows(stream, order[6 * step:6 * step + 6], 32,
                                       meta | dict(pad_id=1)))
        offset = np.random.default_rng([1337, step]).random()
        loss = 0
        for m in (0, 1):
            rows = torch.arange(3 * m, 3 * m + 3)
            alpha = 1 - 0.999 * (0.001 + 0.999 * ((offset + rows.double()[:, None]) / 6 % 1))
            seed = np.random.SeedSequence([1337, step, m]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(seed))
            clean = x0[rows]
            xt = q_sample(clean, alpha.float(), 256)
            logits = model(xt, -alpha.float().log()).double()
            nats = literal_nelbo(logits, xt, clean, alpha, torch.full_like(alpha, -0.999))
            loss += nats[clean != 1].mean() / 2
        grads = torch.autograd.grad(loss, list(model.parameters()))
        after = torch.load(work / 'sgd' / f'step-{step + 1:08}.pt')['weights']
        for (name, w), grad in zip(model.named_parameters(), grads, strict=True):
            moved = (w.detach() - after[name]) / 1e-3
            assert (moved - grad).abs().max() < 1e-2 * grad.abs().max() + 1e-3, (step, name)
        model.load_state_dict(after)


@pytest.mark.parametrize('enabled', [False, True])
def test_gradients_are_clipped_at_their_own_scale(enabled):
    """Not at a GradScaler's."""
    w = torch.zeros(4, requires_grad=True)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, enabled=enabled)
    scaler.scale(5 * w.sum()).backward()                 # the norm of the gradient is 10
    clip_and_step([torch.optim.SGD([w], lr=1.0)], scaler, [w], 1.0)
    assert torch.allclose(w, torch.full((4,), -0.5))


# --------------------------------------------------------------------------------------------------
# what a researcher changes: one function, in a copy of the project

FOREIGN_LOSS = '''
def loss_of(objective, vocab_size):
    return lambda logits, xt, x0, alpha, dalpha: 3 + cross_entropy(logits, x0)
'''


def test_the_metric_is_untouchable(work, tmp_path):
    """A foreign loss trains differently, and changes nothing that is validated or reported."""
    script = project_with(tmp_path, FOREIGN_LOSS)
    args = [*QUICK, '--eval_interval=12', '--out_dir=foreign']
    good(run_here(work, script, *args))
    losses = log(work / 'foreign')
    assert all(abs(a - b) > 0.1 for a, b in zip(losses, log(work / 'out')))
    assert min(losses) > 3

    # given weights have one value, whatever loss_of says
    validated = log(work / 'foreign', 'val_loss')[-1]
    for folder in ('out', 'foreign'):
        args = [*QUICK, '--eval_only', f'--init_from={folder}']
        foreign, ours = (good(run_here(work, path, *args)) for path in (script, 'train.py'))
        assert foreign == ours
    assert f'val loss {validated:.4f}' in ours

    # it is the NELBO as the paper writes it
    model, info = load_model(work / 'foreign')
    meta, data = load_data(work / 'data' / 'tiny')
    rows = epoch_rows(range(8), num_rows(data['val'], 32), seed=0)
    x0 = torch.from_numpy(get_rows(data['val'], rows, 32, meta))
    nats = []
    for row in range(8):
        torch.manual_seed(row)
        t = stratified_times(0.5, row, 1, 8)
        alpha, dalpha = noise_schedule(t)
        clean = x0[row:row + 1]
        xt = q_sample(clean, alpha, 256)
        logits = model(xt, -alpha.log()).double()
        nats.append(literal_nelbo(logits, xt, clean, alpha.double(), dalpha.double()).mean(-1))
    mean, error = mean_and_error(torch.cat(nats))
    assert mean == pytest.approx(validated, rel=1e-5)

    # and what eval.py reports
    figures = last_json(good(run_here(work, 'eval.py', '--out_dir=foreign', '--draws=4')))
    assert abs(figures['nll'] - mean) < 4 * (figures['error'] + error)


NEW_FIELD = '''
@dataclass
class DiTConfig(DiTConfig):
    window: int = 0
'''


def test_init_from_takes_over_a_field_that_a_researcher_adds(work, tmp_path):
    script = project_with(tmp_path, NEW_FIELD, 'model.py')
    text = script.read_text()
    for line, more in (('n_head = 4\n', 'window = 0\n'),
                       ("causal=objective == 'ar'", ', window=window')):
        assert text.count(line) == 1
        text = text.replace(line, line + more)
    script.write_text(text)
    args = [*QUICK, '--max_iters=1', '--eval_interval=9']
    good(run(work, script, *args, '--window=5', '--out_dir=field'))
    good(run(work, script, *args, '--init_from=field', '--out_dir=field-2'))
    config = json.loads((work / 'field-2/config.json').read_text())
    assert config['model']['window'] == config['settings']['window'] == 5


def test_two_optimisers_train_stop_and_resume_bit_for_bit(work, tmp_path):
    """Muon for the blocks' matrices beside AdamW; the loss of step 6 is not finite."""
    bad_loss = wrapped_loss("loss * (float('nan') if step == 6 else 1)")
    script = project_with(tmp_path, bad_loss)
    args = [*QUICK, '--optimizer=muon', '--muon_lr=0.02', '--cooldown_frac=0.5', *EVERY_STEP]
    said = good(run_here(work, script, *args, '--out_dir=muon'))
    assert '1 steps skipped' in said
    adamw, muon = checkpoint(work / 'muon')['optimizers']
    assert [set(s) for s in muon.values()] == [{'momentum_buffer'}] * 4
    assert all(s['step'] == 11 for s in adamw.values()) and len(adamw) > 8

    # both train, and the skipped step changes neither
    at = {step: torch.load(work / 'muon' / f'step-{step:08}.pt', weights_only=True)
          for step in (5, 6, 7)}
    for name, w in at[6]['weights'].items():
        assert not equal(w, at[5]['weights'][name]), name
    assert at[7]['counts'][2] == 1
    for key in ('weights', 'optimizers'):
        assert equal(at[6][key], at[7][key]), key

    rewind(work / 'muon', work / 'muon-parts', 5)
    good(run(work, script, *args, '--out_dir=muon-parts', '--init_from=resume'))
    same_bits(work / 'muon', work / 'muon-parts')


COSINE = '''
def noise_schedule(t, eps=1e-3):
    alpha = eps + (1 - eps) * torch.cos(t * pi / 2)
    dalpha = -(1 - eps) * pi / 2 * torch.sin(t * pi / 2)
    return alpha, dalpha
'''


def test_a_cosine_schedule_trains_validates_and_samples(work, tmp_path):
    """In diffusion.py alone. The bound is the same for any schedule: only its error changes."""
    script = project_with(tmp_path, COSINE, 'diffusion.py')
    good(run(work, script, *QUICK, '--curriculum_frac=0', '--out_dir=cosine'))
    assert all(map(math.isfinite, log(work / 'cosine') + log(work / 'cosine', 'val_loss')))
    ours, cosine = (last_json(good(run(work, path, '--out_dir=cosine', '--draws=20')))
                    for path in ('eval.py', tmp_path / 'eval.py'))
    assert ours['nll'] != cosine['nll']
    assert abs(ours['nll'] - cosine['nll']) < 4 * (ours['error'] + cosine['error'])
    said = good(run(work, tmp_path / 'sample.py', '--out_dir=cosine', '--sampler=psi',
                    '--steps=9'))
    assert '10 network calls' in said


def test_the_schedule_reaches_the_loss_and_the_samplers(monkeypatch):
    cosine = dict(vars(diffusion))
    exec(COSINE, cosine)
    for module in (train, sample):
        monkeypatch.setattr(module, 'noise_schedule', cosine['noise_schedule'])
    change(monkeypatch, objective='duo', curriculum_frac=0.0)
    torch.manual_seed(0)
    (model,) = random_model(50)
    x0, u = torch.randint(50, (6, 8)), stratified_times(0.2, 0, 6, 6)
    torch.manual_seed(5)
    loss = train.training_loss(model, x0, u, 0, 50, nelbo)
    alpha, dalpha = cosine['noise_schedule'](1e-3 + (1 - 1e-3) * u)
    torch.manual_seed(5)
    xt = q_sample(x0, alpha, 50)
    exact = nelbo(model(xt, -alpha.log()), xt, x0, alpha, dalpha).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)

    times = torch.linspace(1, 1e-5, 21, dtype=torch.float64)
    alphas = cosine['noise_schedule'](times)[0].tolist()
    told = []
    list(sample.ancestral(lambda xt, alpha, draw: told.append(alpha), None, 20, False))
    assert told == pytest.approx(alphas)


# --------------------------------------------------------------------------------------------------
# distillation

def test_distillation_from_the_command_line(work):
    """Resumed in the middle of a round, and where one begins: 12 steps are 4 rounds of 3."""
    dcd = [*QUICK, '--objective=dcd', '--dcd_rounds=4', '--dcd_ema_teacher', *EVERY_STEP]
    said = good(run_here(work, 'train.py', *dcd, '--init_from=out', '--out_dir=dcd'))
    assert 'KL' in said
    assert not equal(checkpoint(work / 'dcd')['teacher'], checkpoint(work / 'dcd')['ema'])
    for step in (3, 5):
        parts = work / f'dcd-{step}'
        rewind(work / 'dcd', parts, step)
        resume = [*dcd, '--init_from=resume', f'--out_dir={parts.name}']
        good(run_here(work, 'train.py', *resume))
        same_bits(work / 'dcd', parts, 'teacher')
    good(run_here(work, 'sample.py', '--out_dir=dcd', '--steps=2', '--num_samples=1'))


@pytest.mark.parametrize('teacher, source', [('False', 'weights'), ('True', 'ema')])
def test_the_teacher_is_renewed_where_a_round_begins(work, teacher, source):
    """10 steps are 3 rounds: they begin at 0, 4 and 7. Each teacher is what the student, or its
    EMA, was there; the first is the model that the run starts from."""
    out = f'renewed-{source}'
    good(run_here(work, 'train.py', *QUICK, '--objective=dcd', '--init_from=out', '--max_iters=10',
                  '--dcd_rounds=3', f'--dcd_ema_teacher={teacher}',
                  '--ema_decay=0.5', f'--out_dir={out}', *EVERY_STEP))
    at = {step: torch.load(work / out / f'step-{step:08}.pt', weights_only=True)
          for step in range(1, 11)}
    for step, state in at.items():
        begin = max(b for b in (0, 4, 7) if b < step)
        expected = at[begin][source] if begin else checkpoint(work / 'out')['ema']
        assert equal(state['teacher'], expected), step
    assert not equal(at[4]['weights'], at[4]['ema'])


@pytest.mark.parametrize('max_iters, rounds', [(10, 3), (12, 4), (50_000, 5), (7, 7), (1000, 7)])
def test_rounds_share_the_run(monkeypatch, max_iters, rounds):
    change(monkeypatch, max_iters=max_iters, dcd_rounds=rounds)
    numbers = [train.dcd_round(step) for step in range(max_iters)]
    lengths = [numbers.count(i) for i in range(rounds)]
    assert numbers == sorted(numbers) and sum(lengths) == max_iters
    assert max(lengths) - min(lengths) <= 1


def test_distillation_loss(monkeypatch):
    """Against the full vectors; a gradient for the student only; nothing to learn from oneself."""
    torch.manual_seed(0)
    student, teacher = random_model(30, n=2)
    x0, u = torch.randint(30, (6, 8)), stratified_times(0.2, 0, 6, 6)
    change(monkeypatch, objective='dcd', dcd_rounds=5, max_iters=50)
    loss_fn = train.loss_of('dcd', 30)
    for step, delta in ((0, 1 / 512), (9, 1 / 512), (10, 2 / 512), (49, 16 / 512)):
        torch.manual_seed(step)
        loss = train.training_loss(student, x0, u, step, 30, loss_fn, teacher)
        torch.manual_seed(step)
        zt, zs, sigma_t, sigma_s = consistency_pair(x0, u, delta, 30)
        p, q = student(zt, sigma_t).softmax(-1), teacher(zs, sigma_s).softmax(-1)
        exact = (p * (p / q).log()).sum(-1).mean()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
        ours = torch.autograd.grad(loss, list(student.parameters()))
        for a, b in zip(ours, torch.autograd.grad(exact, list(student.parameters()))):
            assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())
    assert all(p.grad is None for p in teacher.parameters())
    change(monkeypatch, dcd_delta=1e-30)                                 # zs is zt
    assert train.training_loss(student, x0, u, 0, 30, loss_fn, student).abs() < 1e-6


# --------------------------------------------------------------------------------------------------
# functions

def test_schedules(monkeypatch):
    change(monkeypatch, warmup_iters=9, max_iters=100, cooldown_frac=0.2, ema_decay=0.999,
           curriculum_frac=0.3, objective='duo')
    shares = [train.lr_share(i) for i in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:81] == [1.0] * 72
    assert shares[90] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(1 / 20)
    assert train.ema_decay_at(0) == 0.1 and train.ema_decay_at(10 ** 6) == 0.999
    assert [train.in_curriculum(step) for step in (0, 29, 30)] == [True, True, False]
    change(monkeypatch, max_iters=1000)                                  # alone scales a run
    assert [train.in_curriculum(step) for step in (299, 300)] == [True, False]
    assert train.lr_share(900) == pytest.approx(0.5)
    change(monkeypatch, objective='mdlm')
    assert not train.in_curriculum(0)


def test_the_ema_remembers_no_gradients():
    model, ema = random_model(5, n=2)
    ema.requires_grad_(False)
    expected = {name: 0.75 * w + 0.25 * model.state_dict()[name].clone()
                for name, w in ema.state_dict().items()}
    update_ema(ema, model, 0.75)
    for name, w in ema.named_parameters():
        assert torch.allclose(w, expected[name], atol=1e-7) and not w.requires_grad


@pytest.mark.parametrize('bad', [math.inf, math.nan, 1e30])
@pytest.mark.parametrize('enabled', [False, True])
@pytest.mark.parametrize('aware', [False, True])
def test_no_optimiser_steps_if_a_gradient_of_one_is_not_finite(bad, enabled, aware):
    """With a GradScaler, which looks at each optimiser by itself, and without. 1e30 is finite, but
    the norm of the gradients is not."""
    w, v = torch.ones(3, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizers = [torch.optim.AdamW([v], fused=aware), Muon([w], 1e-3)]
    if not aware:
        optimizers[1] = torch.optim.Muon([w])
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0, enabled=enabled)
    for step, factor in enumerate((1.0, bad, 1.0)):
        before = [p.detach().clone() for p in (v, w)]
        states = [str(optimizer.state) for optimizer in optimizers]
        scaler.scale((w * factor * torch.eye(3)).sum() + v.square().sum()).backward()
        _, finite = clip_and_step(optimizers, scaler, [w, v], 1.0)
        assert bool(finite) == (step != 1)
        for p, old, optimizer, state in zip((v, w), before, optimizers, states):
            assert p.isfinite().all() and p.grad is None
            assert torch.equal(p, old) == (step == 1)
            assert (str(optimizer.state) == state) == (step == 1)
    assert scaler.get_scale() == (1.0 if not enabled else 4.0 if bad == 1e30 else 2.0)


@pytest.mark.parametrize('bad', [math.inf, math.nan])
def test_no_optimiser_steps_if_the_loss_alone_is_not_finite(bad):
    """It is the mean of all processes, of which each may have finite gradients: all skip."""
    w, v = torch.ones(3, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizers = [torch.optim.AdamW([v], fused=True), Muon([w], 1e-3)]
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    for loss in (bad, 1.0):
        (w.sum() + v.square().sum()).backward()
        _, finite = clip_and_step(optimizers, scaler, [w, v], 1.0, torch.tensor(loss))
        assert bool(finite) == (loss == 1.0)
        for p in (w, v):
            assert p.isfinite().all() and torch.equal(p, torch.ones_like(p)) == (loss != 1.0)


@pytest.mark.parametrize('shape', [(12, 12), (8, 24), (24, 8)])
def test_orthogonalise_keeps_the_singular_vectors(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    made = u.T @ orthogonalise(1e3 * x) @ v.T
    assert torch.allclose(made, made.diag().diag(), atol=1e-9)
    values = made.diag()[s > 0.05 * s[0]]
    assert 0.65 < values.min() <= values.max() < 1.25
    assert not orthogonalise(0 * x).any()


def test_muon_is_torchs_with_its_own_rate():
    """To torch's bfloat16, on gradients whose singular values all are of a size."""
    torch.manual_seed(0)
    w = [torch.randn(shape) for shape in [(12, 6), (6, 12), (9, 9)]]
    ours = [p.clone().requires_grad_() for p in w]
    theirs = [p.clone().requires_grad_() for p in w]
    a = Muon(ours, lr=0.1, weight_decay=0.5)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5, adjust_lr_fn='match_rms_adamw')
    for step in range(5):
        set_lr([a, b], 1 / (1 + step))
        for p, q in zip(ours, theirs):
            p.grad = torch.nn.init.orthogonal_(torch.empty(p.shape))
            q.grad = p.grad.clone()
        a.step()
        b.step()
    assert a.param_groups[0]['lr'] == pytest.approx(0.1 / 5)
    for p, q, start in zip(ours, theirs, w):
        assert (p - q).norm() < 0.01 * (p - start).norm()


def test_the_curriculum_is_the_nelbo_at_the_gaussians_argmax(monkeypatch):
    """As tau vanishes the network sees zt itself, and the loss is nelbo with the transformed alpha
    and its slope."""
    change(monkeypatch, objective='duo', curriculum_frac=0.5, max_iters=2, tau=1e-9, gamma_min=-3.0,
           gamma_max=-1.0, curriculum_k=4)
    torch.manual_seed(0)
    (model,) = random_model(50)
    x0, u = torch.randint(50, (6, 8)), stratified_times(0.2, 0, 6, 6)
    torch.manual_seed(5)
    loss = train.training_loss(model, x0, u, 0, 50, nelbo)
    gamma = -3.0 + 2.0 * u
    torch.manual_seed(5)
    zt = soft_tokens(x0, gamma, 1e-9, 50, 4)[2]
    alpha = transform(gamma, 50)[0]
    slope = (transform(gamma + 1e-6, 50)[0] - alpha) / 1e-6 * 2.0
    exact = nelbo(model(zt, -alpha.log()), zt, x0, alpha, slope).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    discrete = train.training_loss(model, x0, u, 1, 50, nelbo)
    assert discrete.item() != pytest.approx(loss.item(), rel=1e-3)


def test_eight_rows_are_learnt_by_heart(monkeypatch):
    """Overfitting, and sampling back: a model of eight rows has nothing else to say."""
    change(monkeypatch, objective='duo', curriculum_frac=0.5, max_iters=1000, gamma_min=-2.5,
           gamma_max=-0.5)
    torch.manual_seed(0)
    rows = torch.randint(32, (8, 12))
    model = DiT(DiTConfig(32, 12, 2, 2, 64, 32, 0.0))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(1000):
        optimizer.param_groups[0]['lr'] = 5e-3 * min(1, (1000 - step) / 600)
        u = stratified_times(torch.rand(()).item(), 0, 64, 64)
        loss = train.training_loss(model, rows.repeat(8, 1), u, step, 32, nelbo)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-50:]) / 50 < 0.45     # 3.5 is a guess; which row it is costs ln(8)/12 = 0.17
    loaded = Loaded(model.eval(), None, dict(objective='duo', data=dict(vocab_size=32)))
    *_, x = denoise(loaded, torch.randint(32, (64, 12)), steps=32)
    assert (x[:, None] == rows).all(-1).any(-1).float().mean() > 0.9


def test_what_a_run_says_and_logs(work):
    said = (work / 'stdout').read_text()
    assert 'step 6: the curriculum ends' in said
    assert said.rstrip().splitlines()[-1].endswith('with --out_dir=out')
    assert all(norm > 0 for norm in log(work / 'out', 'grad_norm'))
    (loss, *_), quarters = log(work / 'out', 'val_loss'), [
        log(work / 'out', f'val_loss_q{i}')[0] for i in (1, 2, 3, 4)]
    assert loss == pytest.approx(sum(quarters) / 4, rel=1e-5) and len(set(quarters)) == 4
    samples = (work / 'out' / 'samples.txt').read_text()
    assert [line for line in samples.splitlines() if line.startswith('step ')] == [
        'step 4', 'step 8']
    assert samples.count('network calls for 1 texts') == 2


def test_wandb_is_named_after_out_dir_and_goes_on_as_the_same_run(work, tmp_path):
    script = project_with(tmp_path, '')
    args = [*QUICK, '--max_iters=2', '--log_interval=1', '--wandb_log', '--out_dir=wand']
    one_line(run(work, script, *args), 'these settings need wandb: pip install wandb')
    assert not (work / 'wand').exists()
    (tmp_path / 'wandb.py').write_text('''
import json
from types import SimpleNamespace
class Error(Exception):
    pass
def note(**values):
    print(json.dumps(values), file=open('calls.jsonl', 'a'))
def init(id=None, project=None, name=None, config=None, resume=None):
    if project == 'none':
        raise Error('no such project')
    note(id=id, name=name, resume=resume, steps=config['max_iters'])
    return SimpleNamespace(id=id or 'new-id', log=lambda record, step: note(**record))
''')
    good(run(work, script, *args))
    good(run(work, script, *args, '--init_from=resume', '--max_iters=3'))
    calls = [json.loads(line) for line in open(work / 'calls.jsonl')]
    begun = [call for call in calls if 'resume' in call]
    assert begun == [dict(id=None, name='wand', resume='allow', steps=2),
                     dict(id='new-id', name='wand', resume='allow', steps=3)]
    assert [call['step'] for call in calls if 'grad_norm' in call] == [1, 2, 3]
    one_line(run(work, script, *args, '--out_dir=wand2', '--wandb_project=none'), 'no such project')
