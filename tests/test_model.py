"""model.py against the authors' DiT (its weights copied in), and every recipe's model."""
import os

import pytest
import torch

import train
from bench import VOCAB_SIZES
from configurator import UserError, configure
from device import check_memory
from helpers import ROOT, reference
from model import DiT, DiTConfig

RECIPES = sorted(path.name for path in (ROOT / 'config').glob('*.py'))


def published(arrays, causal=False):
    model = DiT(DiTConfig(vocab_size=101, block_size=24, n_layer=2, n_head=4, n_embd=64,
                          cond_dim=32, dropout=0.0, causal=causal))
    # The names are the authors' own; RoPE's frequencies are a buffer there, computed here.
    model.load_state_dict({k[3:]: v for k, v in arrays.items()
                           if k.startswith('sd/') and 'inv_freq' not in k})
    return model.eval()


def same(ours, theirs):
    return (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_the_published_network():
    a = reference('dit_')
    model, sigma = published(a), a['sigma']
    assert same(model(a['x'], sigma), a['logits'])
    assert same(model(a['x'], torch.zeros(1, 1)), a['logits_sigma0'])
    assert same(model(a['topk_idx'], sigma, a['topk_w']), a['logits_topk'])
    assert same(model(a['x_soft'].softmax(-1), sigma), a['logits_soft'])


@torch.no_grad()
def test_the_published_causal_network_and_its_cache():
    a = reference('causal_')
    model = published(a, causal=True)
    assert same(model(a['x']), a['logits'])
    cache = [[] for _ in model.blocks]
    pieces = [model.hidden(x, cache=cache) for x in a['x'].split([5] + 19 * [1], dim=1)]
    assert same(torch.cat(pieces, 1), model.hidden(a['x']))


@torch.no_grad()
def test_a_one_hot_distribution_is_an_id():
    model = published(reference('dit_'))
    x, sigma = torch.randint(101, (3, 10)), torch.rand(3)
    as_ids = model(x, sigma)
    assert same(model(torch.nn.functional.one_hot(x, 101).float(), sigma), as_ids)
    weights = torch.zeros(3, 10, 4)
    weights[..., 2] = 1
    ids = torch.randint(101, (3, 10, 4))
    ids[..., 2] = x
    assert same(model(ids, sigma, weights), as_ids)


def test_gradients_of_the_published_network():
    a, model = reference('train_'), published(reference('dit_'))
    logits = model(a['x'], a['sigma'])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), a['target'].flatten())
    loss.backward()
    assert same(loss.detach(), a['loss'])
    gradients = {name: p.grad for name, p in model.named_parameters()}
    published_ones = {k.removeprefix('grad/'): v for k, v in a.items() if k.startswith('grad/')}
    assert len(published_ones) == 5
    for name, gradient in published_ones.items():
        assert same(gradients[name][:len(gradient)], gradient), name  # of a matrix, the first rows


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_recipe_builds_its_model(recipe):
    settings = configure(vars(train), (), [str(ROOT / 'config' / recipe)])
    mdlm, ar = settings['objective'] == 'mdlm', settings['objective'] == 'ar'
    with torch.device('meta'):
        names = ('block_size', 'n_layer', 'n_head', 'n_embd', 'cond_dim', 'dropout')
        model = DiT(DiTConfig(VOCAB_SIZES[settings['dataset']] + mdlm, causal=ar,
                              **{name: settings[name] for name in names}))
    millions = model.num_params() / 1e6
    if recipe.startswith('owt') and not ar:
        assert 169 < millions < 171
    if recipe.startswith('tiny_t4'):
        assert 32 < millions < 34
    if recipe.startswith(('owt', 'lm1b')):
        rows = 128 if settings['objective'] == 'dcd' else 512
        assert settings['batch_size'] * settings['gradient_accumulation_steps'] == rows


def test_a_width_the_heads_do_not_divide_is_one_line():
    with pytest.raises(UserError, match='n_embd'):
        DiT(DiTConfig(n_embd=100, n_head=8))


@pytest.mark.parametrize('config', [
    DiTConfig(50257, 8, 2, 2, 64, 64), DiTConfig(99, 8, 40, 2, 64, 8),
    DiTConfig(99, 8, 2, 2, 512, 8), DiTConfig(99, 8, 2, 2, 64, 4096),
    DiTConfig(99, 8, 40, 2, 64, 512)])
def test_the_memory_that_is_asked_for_first_is_the_least_that_training_takes(monkeypatch, config):
    """Weights, gradients and two moments, in float32, whichever size they come from; and of a large
    batch what the layers give."""
    with torch.device('meta'):
        n_weights = DiT(config).num_params()

    def refused(memory, batch_size=1):
        sizes = dict(SC_PAGE_SIZE=1, SC_PHYS_PAGES=memory)
        monkeypatch.setattr(os, 'sysconf', sizes.get)
        try:
            check_memory(config, batch_size, 'cpu')
        except UserError:
            return True

    outputs = 8 * config.n_layer * config.n_embd         # of one row
    assert refused(int(0.85 * 16 * n_weights))
    assert not refused(16 * n_weights + 4 * outputs)
    many = 4 * n_weights // outputs + 1
    assert refused(16 * n_weights, many) and not refused(32 * n_weights + 4 * outputs, many)
