"""score, token_probs, infill and edit of sample.py: against enumeration, a spy and planted
typos."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from configurator import UserError
from diffusion import noise_schedule
from helpers import good, one_line, run, run_here
from literal import posterior
from sample import edit, infill, load, score, token_probs
from test_sample import DATA, Exact, of_model, random_model

TEXT = 'the quick brown fox jumps over the lazy dog. '


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Framed(Exact):
    """Exact for the two tokens between the edges of a row (B,4), each row at its own level. It
    notes its inputs."""

    def hidden(self, x, sigma):
        self.seen = x
        alpha = torch.exp(-sigma.double()).view(-1, 1, 1)
        noise = alpha * torch.eye(3) + (1 - alpha) / 3                             # (B,3,3)
        rows = torch.arange(len(x))
        first = (self.data @ noise)[rows, :, x[:, 2]]                              # (B,3)
        second = (self.data.T @ noise)[rows, :, x[:, 1]]
        return torch.stack([first, first, second, second], 1).log().float()


@pytest.fixture
def exact():
    loaded = of_model(random_model(3), 'duo')
    tokenizer = SimpleNamespace(encode=lambda text: list(map(int, text)))
    return loaded._replace(model=Framed(DATA), tokenizer=tokenizer)


def test_the_bound_of_an_exact_network_is_the_likelihood(exact):
    texts = [f'{i}{j}' for i, j in itertools.product(range(3), repeat=2)]
    nats, errors = score(exact, texts, draws=1000)
    p = DATA.flatten()
    assert ((nats + p.log()).abs() < 4 * errors).all()
    error = (p * errors).norm()
    assert ((nats + p.log()) * p).sum().abs() < 4 * error < 1.6


def test_a_score_leaves_the_random_numbers_alone(exact):
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    score(exact, ['01', '22'])
    assert torch.rand(()) == expected


def test_the_bound_given_a_token_is_that_of_sampling_with_it(exact, steps=2000):
    """The chain of the second token's reverse steps, the first one fixed, by its matrices."""
    nats, errors = score(exact, ['0', '1', '2'], given='1', draws=2000)
    alphas = noise_schedule(torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64))[0].tolist()
    p = torch.full((3,), 1 / 3, dtype=torch.float64)
    for alpha_t, alpha_s in zip(alphas, alphas[1:] + [1.0]):
        x = torch.tensor([[0, 1, j, 0] for j in range(3)])
        sigma = -torch.full((3, 1), alpha_t).log()
        clean = exact.model.hidden(x, sigma)[:, 2].double().softmax(-1)            # (xt, x0)
        p = p @ posterior(clean, torch.arange(3), alpha_s, alpha_t)
    assert (nats > -p.log() - 4 * errors).all()
    assert (p * (nats + p.log())).sum() < 0.2


def test_only_the_text_is_noised_and_alike_for_all_texts(exact):
    both = score(exact, ['0', '2'], given='1', draws=50)
    assert (exact.model.seen[:, [0, 1, 3]] == torch.tensor([0, 1, 0])).all()
    assert len(exact.model.seen[:, 2].unique()) == 3
    alone = [score(exact, [text], given='1', draws=50) for text in '02']
    assert torch.equal(both[0], torch.cat([nats for nats, _ in alone]))
    score(exact, ['0'], suffix='1', draws=50)
    assert (exact.model.seen[:, [0, 2, 3]] == torch.tensor([0, 1, 0])).all()


def test_an_autoregressive_score_is_exact():
    loaded = of_model(random_model(11, causal=True), 'ar')
    row = torch.tensor([[0, *loaded.tokenizer.encode('given'), *loaded.tokenizer.encode('text')]])
    log_p = loaded.model(row).double().log_softmax(-1)[0]
    exact = -sum(log_p[i - 1, row[0, i]] for i in range(6, 10))
    nats, errors = score(loaded, ['text', ''], given='given')
    assert nats.tolist() == pytest.approx([exact.item(), 0], rel=1e-5)
    assert errors.tolist() == [0, 0]
    ids, probs = token_probs(loaded, 'text')
    row = torch.tensor([[0, *ids]])
    p = loaded.model(row).softmax(-1)[0]
    assert probs == pytest.approx([p[i, token].item() for i, token in enumerate(ids)], rel=1e-4)


def test_token_probs_are_those_given_the_other_tokens(exact, alpha=0.9):
    joint = exact.model.noised(alpha)                    # of the noisy tokens
    noise = alpha * torch.eye(3, dtype=torch.float64) + (1 - alpha) / 3
    first = DATA @ noise                                 # (clean first, noisy second)
    second = noise @ DATA                                # (noisy first, clean second)
    ids, probs = token_probs(exact, '12', alpha)
    assert ids == [1, 2]
    assert probs == pytest.approx([(first[1, 2] / joint.sum(0)[2]).item(),
                                   (second[1, 2] / joint.sum(1)[1]).item()], rel=1e-4)
    with pytest.raises(UserError, match='masked model'):
        token_probs(of_model(random_model(6), 'mdlm'), 'ab')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A Duo that knows one sentence."""
    folder = tmp_path_factory.mktemp('sentence')
    (folder / 'fox.txt').write_text(TEXT * 600)
    good(run_here(folder, 'prepare.py', 'fox.txt', '--tokenizer', 'bytes'))
    good(run_here(folder, 'train.py', '--dataset=fox', '--block_size=48', '--n_layer=2',
                  '--n_embd=64', '--cond_dim=16', '--batch_size=16', '--max_iters=300',
                  '--eval_interval=300', '--eval_iters=1', '--num_samples=0', '--gamma_min=-2.5',
                  '--gamma_max=0', '--learning_rate=4e-3', '--device=cpu'))
    return folder


def test_planted_typos_are_found(trained):
    loaded = load(trained / 'out', 'cpu')
    for place in (5, 16, 30):
        text = TEXT[:place] + 'x' + TEXT[place + 1:]
        ids, probs = token_probs(loaded, text)
        assert loaded.tokenizer.decode(ids) == text
        assert probs.index(min(probs)) == place
    nats, _ = score(loaded, [TEXT, TEXT.replace('quick', 'qxick')])
    assert nats[0] < nats[1]


def test_holes_are_filled_and_the_rest_stays(trained):
    loaded = load(trained / 'out', 'cpu')
    template = 'the [[5]] brown fox [[leaps]] over the lazy dog. '
    texts = infill(loaded, template, 4, steps=32)
    begin, middle, end = 'the ', ' brown fox ', ' over the lazy dog. '
    for text in texts:
        text = text.strip('\n')
        assert text.startswith(begin) and text[9:20] == middle and text[25:] == end
    filled = [text.strip('\n') for text in texts]
    assert filled.count(TEXT) >= 2
    for wrong in ('no hole', '[[]]', 'too long [[999999999999]]'):
        with pytest.raises(UserError):
            infill(loaded, wrong, 4)
    with pytest.raises(UserError, match='look ahead'):
        infill(of_model(random_model(6, causal=True), 'ar'), 'a[[2]]b')


def test_edit_mends_a_text_and_a_stronger_edit_changes_more(trained):
    loaded = load(trained / 'out', 'cpu')
    mended = edit(loaded, TEXT.replace('quick', 'qxick'), 0.1, 4, steps=16)
    assert sum(text.strip('\n') == TEXT for text in mended) >= 2
    changed = []
    for strength in (0.05, 0.9):
        texts = edit(loaded, 'zebra' * 8, strength, 4, steps=8, redraws=0.01)
        changed.append(sum(a != b for text in texts for a, b in zip(text.strip('\n'), 'zebra' * 8)))
    assert changed[0] < changed[1]
    with pytest.raises(UserError, match='informed'):
        edit(loaded, TEXT, 0.2, sampler='psi')
    with pytest.raises(UserError, match='informed'):
        edit(of_model(random_model(6), 'mdlm'), 'ab')


def test_scores_and_holes_from_the_command_line(trained):
    (trained / 'lines.txt').write_text(TEXT + '\n' + TEXT[::-1] + '\n')
    said = good(run(trained, 'sample.py', '--score=lines.txt')).splitlines()
    figures = [float(line.split()[0]) for line in said]
    assert len(said) == 2 and figures[0] < figures[1]
    other = good(run_here(trained, 'sample.py', '--score=lines.txt', '--seed=2')).splitlines()
    assert other[0] != said[0] and other[0].endswith(TEXT)
    bits = float(said[0].split(' nats, ')[1].split()[0])
    assert bits == pytest.approx(figures[0] / math.log(2) / len(TEXT), abs=1e-3)
    said = good(run_here(trained, 'sample.py', '--infill=the [[5]] brown', '--num_samples=2',
                         '--steps=8'))
    assert said.count('brown') == 2 and '9 network calls for 2 texts of 17 tokens' in said
    one_line(run_here(trained, 'sample.py', '--infill=nothing'), 'no hole')
    one_line(run_here(trained, 'sample.py', '--score=none.txt'), 'none.txt')
