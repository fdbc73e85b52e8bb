"""sample.py: its samplers against enumeration, through the command line, in a notebook's eyes and
in a browser."""
import itertools
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from configurator import UserError
from diffusion import categorical, gibbs_step, noise_schedule
from helpers import good, one_line, run, run_here, run_on_terminal
from literal import posterior
from model import DiT, DiTConfig
from sample import (Loaded, choose_sampler, denoise, describe_sampler, generate,
                    load, psi_kappas, sample_prior, watched)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Spy:
    """A network whose tokens have one distribution, whatever it sees; it notes what it is told."""

    def __init__(self, logits):
        self.output_layer = self
        self.linear = torch.nn.Linear(1, logits.numel())
        self.linear.weight.data.zero_()
        self.linear.bias.data = logits.float()
        self.sigmas = []

    def hidden(self, x, sigma):
        assert sigma.shape == x.shape[:1] and (sigma == sigma[0]).all()
        self.sigmas.append(sigma[0].item())
        return torch.zeros(*x.shape, 1)


def loaded_spy(logits, objective='duo'):
    vocab_size = len(logits) - (objective == 'mdlm')
    data = dict(vocab_size=vocab_size, bos_id=0, eos_id=0)
    return Loaded(Spy(logits), None, dict(objective=objective, data=data))


def random_model(K, T=8, causal=False):
    torch.manual_seed(1)
    model = DiT(DiTConfig(K, T, 2, 2, 16, 8, 0.0, causal)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def of_model(model, objective):
    vocab_size = model.config.vocab_size - (objective == 'mdlm')
    data = dict(vocab_size=vocab_size, bos_id=0, eos_id=0)
    info = dict(objective=objective, data=data, model=dict(block_size=model.config.block_size))
    tokenizer = SimpleNamespace(encode=lambda text: [ord(c) % vocab_size for c in text],
                                decode=lambda ids: ''.join(chr(97 + i) for i in ids))
    return Loaded(model, tokenizer, info)


def fits(counts, expected, p=1e-4):
    """Chi-square: could these counts have come from what is expected? The seeds are fixed."""
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > p


def last_of(frames):
    *_, x = frames
    return x


# --------------------------------------------------------------------------------------------------
# the samplers

@pytest.mark.parametrize('psi, eta', [('rescale', 0.05), ('cap', 0.01)])
@pytest.mark.parametrize('steps', [1, 2, 3, 64])
def test_psi_schedules_number_by_number(psi, eta, steps):
    """From the published rules, in plain Python."""
    a = [1 - 0.999 * (1 + (1e-5 - 1) * i / steps) for i in range(steps + 1)]
    kappas = psi_kappas(torch.tensor(a, dtype=torch.float64), psi, eta)
    assert len(kappas) == steps and kappas[-1] == 1
    for i, kappa in enumerate(kappas[:-1].tolist()):
        capped = min(eta, (1 - a[i + 1]) / a[i])
        sigma = {'rescale': eta * capped, 'cap': capped}[psi]
        expected = min(1, max(0, 1 - sigma / (1 - a[i + 1])))
        assert kappa == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize('options', [
    dict(sampler='ancestral'), dict(sampler='ancestral', greedy=True), dict(sampler='informed'),
    dict(sampler='psi', eta=0.4)])
def test_the_network_is_told_the_noise_of_its_input(options, steps=7):
    """sigma is -log(alpha) at the time of xt, not of the xs that is drawn next."""
    loaded = loaded_spy(torch.zeros(5))
    frames = list(denoise(loaded, sample_prior(loaded.info, (2, 3)), steps=steps, **options))
    if options['sampler'] == 'informed':
        alphas = informed_alphas(steps)
    else:
        alphas = noise_schedule(torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64))[0]
    assert len(frames) == len(loaded.model.sigmas) == steps + 1
    assert loaded.model.sigmas == pytest.approx((-alphas.log()).tolist(), rel=1e-4, abs=1e-6)


def informed_alphas(steps):
    """The last is that of the call that removes the noise."""
    return torch.linspace(0.8, 0.99, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize('sampler', ['ancestral', 'psi'])
def test_a_masked_model_is_told_no_noise(sampler):
    loaded = loaded_spy(torch.zeros(5), 'mdlm')
    list(denoise(loaded, sample_prior(loaded.info, (2, 3)), steps=3, sampler=sampler))
    assert loaded.model.sigmas == [0.0] * 4


def transition(p, alpha_s, alpha_t, kappa):
    """The reverse step's distribution as a matrix, [xt, xs]."""
    K = len(p)
    q_s, q_0 = (posterior(p.expand(K, K), torch.arange(K), a, alpha_t) for a in (alpha_s, 1.0))
    return kappa * q_s + (1 - kappa) * (alpha_s * q_0 + (1 - alpha_s) / K)


def unmasking(p, alpha_s, alpha_t, kappa):
    """Likewise of the masked process; the mask is the last id."""
    K = len(p)
    clean = torch.eye(K + 1, dtype=torch.float64)                        # [xt, x0]
    clean[K] = torch.cat([p, torch.zeros(1)])
    mask = torch.eye(K + 1, dtype=torch.float64)[K]
    stay = clean.clone()
    move = (alpha_s - alpha_t) / (1 - alpha_t)
    stay[K] = move * clean[K] + (1 - move) * mask
    return kappa * stay + (1 - kappa) * (alpha_s * clean + (1 - alpha_s) * mask)


@pytest.mark.parametrize('objective, options', [
    ('duo', dict()),
    ('duo', dict(temperature=0.5)),
    ('duo', dict(temperature=3.0, top_p=0.7)),
    ('duo', dict(sampler='psi', psi='cap', eta=0.3)),
    ('duo', dict(sampler='psi', psi='rescale', eta=0.7, temperature=2.0)),
    ('duo', dict(sampler='psi', psi='cap', eta=0.05, temperature=0.7)),
    ('duo', dict(sampler='informed', temperature=2.0, top_p=1.0, redraws=9.0)),
    ('duo', dict(sampler='informed', temperature=3.0, top_p=0.7, redraws=9.0)),
    ('mdlm', dict(temperature=0.5)),
    ('mdlm', dict(temperature=2.0, top_p=0.7)),
    ('mdlm', dict(sampler='psi', psi='cap', eta=0.3)),
    ('mdlm', dict(sampler='psi', psi='rescale', eta=0.7, temperature=2.0))])
def test_whole_runs_have_the_frequencies_of_the_matrices(objective, options, n=60_000, steps=3):
    """How often a token takes each path from noise to text: temperature, nucleus and kappa must
    all reach the draw."""
    options = dict(sampler='ancestral') | options
    o = choose_sampler(dict(objective=objective), options)
    logits = torch.tensor([0.9, 0.0, -0.6])
    p = (logits.double() / o['temperature']).softmax(-1)
    if o['top_p'] < 1:
        assert p[:2].sum() > o['top_p'] > p[0]                           # the nucleus: two tokens
        p = torch.tensor([1.0, 1.0, 0.0]) * p / p[:2].sum()
    times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64)
    alphas, kappas = noise_schedule(times)[0], torch.ones(steps)
    if o['sampler'] == 'psi':
        kappas = psi_kappas(alphas, o['psi'], o['eta'])
        assert ((0.1 < kappas) & (kappas < 0.9)).any()
    elif o['sampler'] == 'informed':
        alphas = informed_alphas(steps)
    alphas, kappas = [*alphas.tolist(), 1.0], [*kappas.tolist(), 1.0]
    pairs = list(zip(alphas[1:], alphas))
    if objective == 'mdlm':
        matrices = [unmasking(p, *pair, kappa) for pair, kappa in zip(pairs, kappas)]
        logits = torch.cat([logits, torch.tensor([5.0])])                # the mask is never drawn
        start = torch.tensor([0.0, 0.0, 0.0, 1.0])
    else:
        matrices = [transition(p, *pair, kappa) for pair, kappa in zip(pairs, kappas)]
        if o['sampler'] == 'informed':                                   # the only place: redrawn
            matrices[:-1] = [(a * p + (1 - a) / 3).expand(3, 3) for a in alphas[:-2]]
        start = torch.ones(3) / 3

    loaded = loaded_spy(logits, objective)
    prior = sample_prior(loaded.info, (n, 1))
    frames = [prior, *denoise(loaded, prior, steps=steps, **options)]
    K = len(start)
    codes = sum(x.squeeze(1) * K ** i for i, x in enumerate(frames))
    counts = np.bincount(codes, minlength=K ** len(frames))
    expected = np.zeros(K ** len(frames))
    for path in itertools.product(range(K), repeat=len(frames)):
        probability = start[path[0]].item()
        for matrix, a, b in zip(matrices, path, path[1:]):
            probability *= matrix[a, b].item()
        expected[sum(x * K ** i for i, x in enumerate(path))] = n * probability
    assert counts[expected < 1e-9].sum() == 0
    usual = expected > 5                                                 # the rest is one cell
    pool = lambda v: np.append(v[usual], v[~usual].sum() + 1e-9)
    assert fits(pool(counts), pool(expected))


def test_an_exact_denoiser_samples_the_data():
    """One token, K = 4: the chain ends in the data's distribution, in many steps or few. (The exact
    softmax is the token's distribution given all *other* tokens: what xt itself tells of x0 is in
    the posterior's formula already.)"""
    probs = torch.tensor([0.6, 0.1, 0.25, 0.05])
    loaded = loaded_spy(probs.log())
    for steps in (1, 16):
        x = last_of(denoise(loaded, sample_prior(loaded.info, (40_000, 1)), steps=steps,
                            sampler='ancestral'))
        assert fits(np.bincount(x[:, 0], minlength=4), probs.double().numpy())


class Exact:
    """Two tokens of three with the joint distribution `data` (3,3), and the network that the NELBO
    would end at: the logits of p(x0 at each place | the noisy token at the other)."""

    def __init__(self, data):
        self.data = data
        self.output_layer = self
        self.linear = torch.nn.Linear(3, 3)
        self.linear.weight.data = torch.eye(3)
        self.linear.bias.data.zero_()

    def noised(self, alpha):
        noise = alpha * torch.eye(3, dtype=torch.float64) + (1 - alpha) / 3
        return noise @ self.data @ noise

    def hidden(self, x, sigma):
        noise = torch.exp(-sigma[0]).item() * torch.eye(3) + (1 - torch.exp(-sigma[0]).item()) / 3
        joint = (self.data @ noise.double()), (self.data.T @ noise.double())  # [x0, other's xt]
        rows = [p.T[x[:, 1 - i]] for i, p in enumerate(joint)]                # (B,3) x 2
        return torch.stack([r.log() for r in rows], 1).float()


DATA = torch.tensor([[.30, .02, .02], [.02, .20, .02], [.22, .02, .18]], dtype=torch.float64)


def pairs_of(x):
    return np.bincount(3 * x[:, 0] + x[:, 1], minlength=9)


def distance(p, q):
    """Total variation."""
    return (p / p.sum() - q / q.sum()).abs().sum().item() / 2


def test_one_place_at_random_is_a_gibbs_move(n=60_000, alpha=0.6):
    """It keeps the exact distribution of noisy pairs, and leads to it from a wrong one."""
    model = Exact(DATA)
    noised = model.noised(alpha)
    sigma = torch.full((n,), -np.log(alpha))

    def move(x):
        tokens, _ = gibbs_step(model.hidden(x, sigma), x, alpha)
        here = torch.rand(n) < 0.5
        return torch.where(torch.stack([here, ~here], 1), tokens, x)
    code = torch.multinomial(noised.flatten(), n, replacement=True)
    right = torch.stack([code // 3, code % 3], 1)
    wrong = torch.zeros_like(right)
    for _ in range(12):
        right, wrong = move(right), move(wrong)
    assert fits(pairs_of(right), noised.flatten().numpy())
    assert fits(pairs_of(wrong), noised.flatten().numpy())
    assert not fits(pairs_of(right), model.noised(0.7).flatten().numpy())


@pytest.mark.parametrize('steps', [5, 20, 400])
def test_a_place_is_redrawn_so_often_and_only_if_it_is_free(steps, T=100, K=50):
    """Where no token surprises, all free places share the redraws; fixed ones take none of them."""
    loaded = loaded_spy(torch.zeros(K))
    start = sample_prior(loaded.info, (20, T))
    fixed = (torch.arange(T) % 2 == 0).expand(20, T)
    frames = [start, *denoise(loaded, start, fixed, steps=steps, sampler='informed', redraws=2.0,
                              top_p=1.0)]
    changes = sum((a != b).float() for a, b in zip(frames, frames[1:-1]))     # not the last call
    assert (changes[fixed] == 0).all()
    assert changes[~fixed].mean().item() == pytest.approx(2 * (1 - 1 / K), abs=0.03)


def test_surprise_is_that_of_the_conditional():
    logits, xt = torch.randn(50, 7), torch.randint(7, (50,))
    tokens, surprise = gibbs_step(logits, xt, 0.8)
    q = 0.8 * logits.double().softmax(-1) + 0.2 / 7
    expected = q.amax(-1).log() - q[torch.arange(50), xt].log()
    assert surprise.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    draws = torch.stack([gibbs_step(logits[:1], xt[:1], 0.8)[0] for _ in range(4000)])
    assert fits(np.bincount(draws[:, 0], minlength=7), q[0].numpy())


def test_the_bias_of_many_places_and_of_informed_choice(n=20_000):
    """Neither is exact, and with two tokens that depend on each other they are at their worst: both
    redrawn at once hardly see each other, the more surprising one alone ends at the likeliest pair.
    The distance of whole runs from the data, where ancestral sampling has almost none."""
    loaded = Loaded(Exact(DATA), None, dict(objective='duo', data=dict(vocab_size=3)))

    def bias(**options):
        x = last_of(denoise(loaded, sample_prior(loaded.info, (n, 2)), top_p=1.0, **options))
        return distance(torch.tensor(pairs_of(x)), DATA.flatten())
    both = bias(steps=16, sampler='informed', redraws=32.0)
    one = bias(steps=16, sampler='informed', redraws=4.0)
    assert bias(steps=32, sampler='ancestral') < 0.03
    assert 0.2 < both < 0.4
    assert 0.3 < one < 0.5


@pytest.mark.parametrize('objective, options', [
    ('duo', dict()),
    ('mdlm', dict()),
    ('duo', dict(sampler='psi', psi='cap', eta=1.0)),
    ('mdlm', dict(sampler='psi', psi='cap', eta=1.0))])
def test_denoise_keeps_what_is_given(objective, options):
    loaded = of_model(random_model(6), objective)
    start = sample_prior(loaded.info, (400, 8))
    start[:, 0] = 3
    fixed = torch.zeros_like(start, dtype=torch.bool)
    fixed[:, 0] = True
    frames = list(denoise(loaded, start, fixed, steps=20, **dict(sampler='ancestral') | options))
    assert len(frames) == 21 and all((frame[:, 0] == 3).all() for frame in frames)
    assert (frames[-1] < loaded.info['data']['vocab_size']).all()        # no masks are left
    assert len(frames[-1][:, 1:].unique()) == loaded.info['data']['vocab_size']


def test_a_greedy_tail_takes_the_likeliest():
    loaded = loaded_spy(torch.tensor([0.2, 0.5, 0.25, 0.05]).log())
    prior = sample_prior(loaded.info, (400, 2))
    frames = list(denoise(loaded, prior, steps=3, greedy=True, sampler='ancestral'))
    assert (frames[-1] == 1).all() and not (frames[-2] == 1).all()


@torch.no_grad()
def test_generate_ar_with_a_cache_equals_generation_without():
    model = random_model(20, causal=True)
    loaded = of_model(model, 'ar')
    start = torch.randint(20, (3, 8))
    fixed = torch.zeros(3, 8, dtype=torch.bool)
    fixed[:, 2] = True
    torch.manual_seed(3)
    ours = last_of(denoise(loaded, start, fixed, temperature=0.8))
    torch.manual_seed(3)
    x = start.clone()
    for i in range(1, 8):
        token = categorical((model(x[:, :i])[:, -1] / 0.8).softmax(-1))
        x[:, i] = torch.where(fixed[:, i], x[:, i], token)
    assert torch.equal(ours, x)
    assert torch.equal(ours[:, [0, 2]], start[:, [0, 2]])


# --------------------------------------------------------------------------------------------------
# in a notebook

def test_three_lines_in_a_notebook(work):
    model = load(work / 'out', device='cpu')
    torch.manual_seed(3)
    texts = generate(model, 'This is', num_samples=2, steps=3)
    torch.manual_seed(3)
    again = generate(model, 'This is', num_samples=2, steps=3, sampler='informed', temperature=1.0)
    assert texts == again and len(texts) == 2
    assert all(isinstance(t, str) and t.startswith('This is') for t in texts)


@pytest.mark.parametrize('given, options, parts', [
    (('x' * 40,), {}, ['prompt and suffix take 41 tokens of 32', 'length']),
    (('x' * 20, 1, 'y' * 20), {}, ['42 tokens of 32']),
    (('x' * 10 ** 7,), {}, ['of 32: shorten']),
    (('x', 10 ** 9), {}, ['1000000000 texts of 32 tokens']),
    ((), dict(tepmerature=0.5), ['tepmerature', 'temperature']),
    ((), dict(settle=0.1), ['settle']),
    ((), dict(temperature=0.0), ['temperature', 'above 1e-30']),
    ((), dict(temperature=1e-40), ['temperature']),      # zero, to float32
    ((), dict(top_p=1e-40), ['top_p']),
    ((), dict(alpha_min=1e-300), ['alpha_min']),
    ((), dict(top_p=-0.1), ['top_p']),
    ((), dict(eta=2), ['eta']),
    ((), dict(steps=0), ['steps', 'from 1']),
    ((), dict(sampler='commit'), ['commit', 'auto, ancestral, psi, informed']),
    ((), dict(redraws=0.0), ['redraws']),
    ((), dict(alpha_max=1.0), ['alpha_max', 'below 1']),
    ((), dict(eta=0.2), ['--eta', '--sampler=psi', 'informed']),
    ((), dict(sampler='ancestral', redraws=2.0), ['--redraws', '--sampler=informed', 'ancestral']),
    ((), dict(psi='constant'), ['constant', 'rescale'])])
def test_a_mistake_leaves_the_process_alive(work, given, options, parts):
    """A UserError is an ordinary Exception of one line, and the next call works."""
    model = load(work / 'out', device='cpu')
    with pytest.raises(UserError) as caught:
        generate(model, *given, **options)
    message = str(caught.value)
    assert all(part in message for part in parts) and '\n' not in message
    assert isinstance(caught.value, Exception)
    assert len(generate(model, steps=1)) == 1


def test_what_a_baseline_cannot_do():
    ar, mdlm = of_model(random_model(20, causal=True), 'ar'), of_model(random_model(6), 'mdlm')
    with pytest.raises(UserError, match='suffix'):
        generate(ar, 'a', suffix='b')
    for loaded, sampler in ((ar, 'psi'), (ar, 'informed'), (mdlm, 'informed')):
        with pytest.raises(UserError, match=f'{sampler}.*{loaded.info["objective"]}'):
            generate(loaded, sampler=sampler)
    for loaded in (ar, mdlm):
        with pytest.raises(UserError, match=f'greedy.*{loaded.info["objective"]}'):
            generate(loaded, greedy=True)
        assert len(generate(loaded, 'a', 2, steps=2)) == 2


@pytest.mark.parametrize('objective, options, words', [
    ('duo', dict(steps=9), 'informed, top_p 0.9'),
    ('duo', dict(top_p=1.0), 'informed'),
    ('duo', dict(sampler='ancestral'), 'ancestral'),
    ('duo', dict(sampler='psi', top_p=0.9), 'psi, top_p 0.9'),
    ('duo', dict(greedy=True, redraws=4.0), 'informed, top_p 0.9, greedy True, redraws 4.0'),
    ('mdlm', dict(), 'ancestral'),
    ('mdlm', dict(sampler='psi'), 'psi'),
    ('ar', dict(temperature=0.9), 'ancestral, temperature 0.9')])
def test_a_sampler_in_words(objective, options, words):
    assert describe_sampler(choose_sampler(dict(objective=objective), options)) == words


# --------------------------------------------------------------------------------------------------
# the script

def test_sample(work):
    said = good(run_here(work, 'sample.py', '--steps', '3', '--prompt', 'Ünë', '--suffix', 'end',
                         '--num_samples=2', '--top_p=0.9'))
    texts = [text.strip('\n') for text in said.split('-' * 80 + '\n')[1:-1]]
    assert len(texts) == 2
    assert all(text.startswith('Ünë') and text.endswith('end') for text in texts)
    assert '4 network calls for 2 texts of 32 tokens' in said
    first, again = (run_here(work, 'sample.py', '--steps=3').stdout for _ in range(2))
    assert first.split(': ')[:-1] == again.split(': ')[:-1]              # all but the seconds
    good(run_here(work, 'sample.py', '--steps=3', '--greedy', '--length=40', '--out=texts.jsonl'))
    assert len((work / 'texts.jsonl').read_text().splitlines()) == 3


@pytest.mark.parametrize('args, parts', [
    (['--watch', '--html=watched.html'], ['--watch', 'terminal', 'pipe']),
    (['--steps=0'], ['--steps']),
    (['--temperature=0'], ['--temperature']),
    (['--top_p=1.5'], ['--top_p']),
    (['--seed', str(2 ** 64)], ['--seed', 'below 2^64']),
    (['--batch_size', str(10 ** 20)], ['--batch_size', 'below 2^63']),
    (['--num_samples', str(10 ** 12)], ['1000000000000 texts', 'too many']),
    (['--length', str(10 ** 12)], ['tokens are too many']),
    (['--steps', str(10 ** 12)], ['--steps']),
    (['--out_dir=nowhere'], ['nowhere', 'train.py']),
    (['--device=tpu'], ['tpu']),
    (['--prompt', 'x' * 40], ['--length']),
    (['--prompts=nowhere.txt'], ['nowhere.txt']),
    (['--prompts=/dev/null'], ['/dev/null', 'lines']),
    (['--prompt=\udcff'], ['--prompt', 'UTF-8']),
    (['--prompts=tiny.txt', '--prompt=x'], ['--prompts', '--prompt']),
    (['--infill=a [[2]] b', '--suffix=c'], ['--infill', '--suffix']),
    (['--score=tiny.txt', '--out=x'], ['--score', '--out']),
    (['--infill=[[' + '9' * 5000 + ']]'], ['tokens are too many']),
    (['--out=data', '--steps=1000000'], ['data']),
    (['--infill=[[999999999999]]'], ['tokens are too many']),
    (['--out=no/such/file', '--steps=1000000'], ['no/such/file']),   # before it samples
    (['--html=no/such/file', '--steps=1000000'], ['no/such/file']),
    (['--alpha_min=0.995'], ['--alpha_min', '--alpha_max=0.99']),
    (['--sampler=commit'], ['--sampler', 'ancestral, psi, informed']),
    (['--stpes=3'], ['did you mean steps'])])
def test_sample_refuses_in_one_line(work, args, parts):
    one_line(run_here(work, 'sample.py', '--steps=1', '--num_samples=1', *args), *parts)
    assert not (work / 'watched.html').exists()


def test_a_mistake_is_one_line_on_stderr(work):
    done = run(work, 'sample.py', '--steps=1', '--length=40')
    assert good(done).startswith('-----') and len(done.stderr.splitlines()) == 1
    assert '40 tokens are more than the 32' in done.stderr
    done = run(work, 'sample.py', '--steps=0')
    assert done.returncode == 1
    assert done.stderr == '--steps=0: must be from 1 to 1,000,000\n' and not done.stdout


def test_every_sampler_ends_in_text(work):
    for args, parts in (([], ['informed']),
                        (['--sampler=ancestral', '--temperature=0.8'], ['ancestral, temp']),
                        (['--sampler=psi', '--top_p=0.9'], ['psi', 'top_p 0.9']),
                        (['--greedy'], ['greedy']),
                        (['--sampler=psi', '--psi=cap', '--eta=0.2'], ['psi cap', 'eta 0.2'])):
        said = good(run_here(work, 'sample.py', '--steps=5', '--num_samples=1', *args))
        summary = said.splitlines()[-1]
        assert summary.startswith('6 network calls') and all(part in summary for part in parts)


def test_a_file_of_prompts_becomes_json_lines(work):
    (work / 'lines.txt').write_text('This is\nÜ\u2028 \f and\n')
    good(run_here(work, 'sample.py', '--steps=2', '--prompts=lines.txt', '--num_samples=2',
                  '--batch_size=3', '--out=texts.jsonl'))
    records = [json.loads(line) for line in open(work / 'texts.jsonl', encoding='utf-8')]
    assert [r['prompt'] for r in records] == ['This is'] * 2 + ['Ü\u2028 \f and'] * 2
    assert all(r['text'].startswith(r['prompt']) for r in records)


def test_watching_marks_what_changes_and_what_is_corrected(capsys):
    """The first token settles at call 1 and is corrected at call 8; the second changes at 2."""
    tokenizer = SimpleNamespace(decode=lambda ids: ''.join('abc'[i] for i in ids))
    frames = [torch.tensor([[1, 0]])] + [torch.tensor([[1, 2]])] * 6 + [torch.tensor([[0, 2]])]
    assert list(watched(frames, torch.tensor([[0, 0]]), tokenizer)) == frames
    plain, yellow, violet = '\x1b[0m', '\x1b[33m', '\x1b[35m'
    drawn = capsys.readouterr().out.split('\x1b[H\x1b[J')[1:]
    expected = [f'{yellow}b{plain}a', f'{plain}b{yellow}c', *[f'{plain}bc'] * 5,
                f'{violet}a{plain}c']
    assert [text.split(f'{plain}\n')[0] for text in drawn] == expected


def test_the_page_shows_every_frame(work):
    """A slider moved in a real browser reads back the very texts that --watch saw."""
    args = ['--steps=6', '--num_samples=2', '--prompt=</script> <b>&', '--html=page.html',
            '--top_p=0.1']                               # no byte \x1b, which the text has not
    said = run_on_terminal(work, 'sample.py', *args, '--watch')
    before, drawn = said.split('\x1b[?1049h')
    drawn, after = drawn.split('\x1b[?1049l')            # the other screen, left behind
    assert '\x1b' not in before + after and '7 network calls' in after
    assert drawn.count('\x1b[33m') > 9                   # tokens that changed
    seen = re.sub(r'\x1b\[\d+m', '', drawn).split('\x1b[H\x1b[J')[1:]
    seen = [frame.rsplit('\n\n[call', 1)[0] for frame in seen]
    assert seen[-1].strip('\n')[:32] in after
    page = (work / 'page.html').read_text(encoding='utf-8')
    assert 'http' not in page and page.count('</script>') == 1
    browsers = map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
    browser = next(filter(None, browsers), None)
    if not browser:
        pytest.skip('no chromium to open the page with')
    probe = """<script>
      const read = [], slide = document.querySelector('input');
      for (let i = 0; i <= slide.max; i++) {
        slide.value = i; slide.dispatchEvent(new Event('input'));
        read.push(document.querySelector('pre').textContent);
      }
      document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));
      document.body.innerHTML = '<textarea></textarea>';
      const text = JSON.stringify([read, slide.value]);
      document.querySelector('textarea').textContent = text.replace(/[^ -~]/g,
        c => '\\\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
    </script></html>"""
    (work / 'probe.html').write_text(page.replace('</html>', probe), encoding='utf-8')
    command = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom']
    dom = subprocess.run([*command, f'file://{work}/probe.html'], capture_output=True, text=True,
                         timeout=120).stdout
    found = re.search(r'<textarea>(.*)</textarea>', dom, re.S).group(1)
    for entity, char in (('&lt;', '<'), ('&gt;', '>'), ('&amp;', '&')):
        found = found.replace(entity, char)
    frames, at = json.loads(found)
    # noise, six steps, noise removal; then one back
    assert len(frames) == 8 and at == '6'

    def ascii(text):  # a token may be a part of a longer character
        return ''.join(c for c in text if ' ' <= c <= '~')
    assert [ascii(f) for f in frames[-len(seen):]] == [ascii(w) for w in seen]
    assert len(ascii(frames[0])) > 12
