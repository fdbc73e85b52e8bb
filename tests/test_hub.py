"""Models of others in, ours out: the authors' folders and .ckpt files, the hub's cache, the card."""
import json
import os
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import load_model, write_card
from data import load_tokenizer
from helpers import ROOT, TINY, checkpoint, equal, good, log, one_line, reference, run
from model import DiT, DiTConfig

SHARED = ROOT.parent / 'shared'
THEIRS = dict(model_type='duo', vocab_size=101, model_length=24, causal=False, hidden_dim=64, cond_dim=32, n_blocks=2,
              n_heads=4, dropout=0.1, var_min=True)
INV_FREQ = torch.tensor([1 / 10000 ** (i / 16) for i in range(0, 16, 2)])


def weights_of(a):
    return {k[3:]: v for k, v in a.items() if k.startswith('sd/') and 'inv_freq' not in k}


def repository(folder, weights, **config):
    """A folder as the authors' hub repositories are."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f'backbone.{name}': w.contiguous() for name, w in weights.items()}
    save_file(state | {'backbone.rotary_emb.inv_freq': INV_FREQ}, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(THEIRS | config))
    return str(folder)


def lightning(path, weights, shadow, **more):
    """A Lightning checkpoint of theirs: the buffer in its place, the moving average a list without names."""
    state = OrderedDict((f'backbone._orig_mod.{name}', w) for name, w in weights.items())
    state['backbone._orig_mod.rotary_emb.inv_freq'] = INV_FREQ
    torch.save({'state_dict': state, 'ema': dict(decay=0.9999, num_updates=7, shadow_params=shadow),
                'loops': {'fit_loop': {'epoch_progress': {'current': {'completed': 3}}}}, **more}, path)
    return str(path)


def same(ours, theirs):
    return (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def refused(folder, *words, weights='ema'):
    with pytest.raises(SystemExit) as stop:
        load_model(str(folder), weights)
    line = str(stop.value)
    assert len(line.splitlines()) == 1 and all(word in line for word in words), line


def cache(folder, name, source):
    """source as huggingface_hub keeps name: blobs, and a snapshot of links to them. The environment that finds it."""
    repo = folder / 'hub' / f'models--{name.replace("/", "--")}'
    commit = '0123456789abcdef0123456789abcdef01234567'
    for part in ('refs', 'blobs', f'snapshots/{commit}'):
        (repo / part).mkdir(parents=True)
    (repo / 'refs' / 'main').write_text(commit)
    for i, file in enumerate(sorted(Path(source).iterdir())):
        shutil.copy(file, repo / 'blobs' / str(i))
        (repo / 'snapshots' / commit / file.name).symlink_to(f'../../blobs/{i}')
    return dict(HF_HUB_CACHE=str(folder / 'hub'), HF_HUB_OFFLINE='1')


# ---------------------------------------------------------------------------------------------------------------------
# in

@torch.no_grad()
def test_a_repository_of_theirs_is_the_published_network(tmp_path, capsys):
    a = reference('dit_')
    model, info = load_model(repository(tmp_path / 'theirs', weights_of(a)))
    assert same(model(a['x'], a['sigma']), a['logits'])
    assert 'assumed: nothing' in capsys.readouterr().out
    assert info['objective'] == 'duo' and info['model']['block_size'] == 24 and info['data']['vocab_size'] == 101
    with pytest.raises(SystemExit, match='of 101 words'):  # no text without its tokenizer
        load_tokenizer(info['data'], info['folder'])

    (tmp_path / 'theirs' / 'config.json').unlink()         # the shapes say all but the heads: 4 x 16 could be 1 x 64
    model, info = load_model(str(tmp_path / 'theirs'))
    said = capsys.readouterr().out
    assert all(word in said for word in ('n_heads 1', 'model_length 1024', 'model_type duo'))
    assert info['model']['n_layer'] == 2 and info['model']['cond_dim'] == 32 and not info['model']['causal']


@torch.no_grad()
def test_masked_and_autoregressive_ones(tmp_path):
    a = reference('dit_')
    model, info = load_model(repository(tmp_path / 'mdlm', weights_of(a), model_type='mdlm', time_conditioning=False))
    assert info['objective'] == 'mdlm' and info['model']['vocab_size'] == 101 and info['data']['vocab_size'] == 100
    assert same(model(a['x'], torch.zeros(len(a['x']))), a['logits_sigma0'])
    refused(repository(tmp_path / 'mdlm', weights_of(a), model_type='mdlm', time_conditioning=True), 'time_cond')
    a = reference('causal_')
    model, info = load_model(repository(tmp_path / 'ar', weights_of(a), causal=True))
    assert info['objective'] == 'ar' and info['model']['causal'] and same(model(a['x']), a['logits'])


@torch.no_grad()
def test_a_lightning_checkpoint(tmp_path, monkeypatch, capsys):
    a, order = reference('dit_'), list(DiT(DiTConfig(101, 24, 2, 4, 64, 32)).state_dict())
    average = weights_of(a)
    raw = OrderedDict((name, average[name] + 1) for name in order)
    # their settings, as omegaconf pickles them: it takes no such package to read them
    fake = types.ModuleType('omegaconf')
    fake.Node = type('Node', (), {'__module__': 'omegaconf', '__init__': lambda self, **kw: vars(self).update(kw)})
    monkeypatch.setitem(sys.modules, 'omegaconf', fake)
    node = lambda x: fake.Node(_content={k: node(v) for k, v in x.items()}) if type(x) is dict else fake.Node(_val=x)
    settings = node(dict(algo=dict(name='duo_base'), model=dict(n_heads=4, length=24, hidden_size=64)))
    hyper = {'config': settings, 'vocab_size': 101}
    path = lightning(tmp_path / 'a.ckpt', raw, [average[name] for name in order], hyper_parameters=hyper)
    monkeypatch.delitem(sys.modules, 'omegaconf')

    for where in (path, str(tmp_path)):
        model, info = load_model(where)
        assert same(model(a['x'], a['sigma']), a['logits']) and info['model']['n_head'] == 4
    assert 'assumed: nothing' in capsys.readouterr().out and info['model']['block_size'] == 24
    model, _ = load_model(path, 'raw')
    assert equal(dict(model.state_dict()), dict(raw))

    for names in (order[1:], order[::-1]):
        refused(lightning(tmp_path / 'b.ckpt', raw, [average[name] for name in names]), 'moving average', 'weights=raw')
    refused(tmp_path, 'or several', '.ckpt')
    (tmp_path / 'c.ckpt').write_bytes(Path(path).read_bytes()[:-1000])
    refused(tmp_path / 'c.ckpt', 'c.ckpt')


@pytest.mark.parametrize('call', [(os.system, 'touch ran'), (exec, "open('ran', 'w')"), (shutil.copy, 'it', 'ran')])
def test_a_pickle_with_a_payload_is_not_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    Path('it').touch()
    payload = type('Payload', (), {'__reduce__': lambda self: (call[0], call[1:])})
    weights = weights_of(reference('dit_'))
    lightning('a.ckpt', weights, list(weights.values()), hyper_parameters={'config': payload()})
    refused('a.ckpt', 'a.ckpt', call[0].__name__, 'not opened')
    assert not Path('ran').exists()
    torch.load('a.ckpt', weights_only=False)
    assert Path('ran').exists()                            # or this would test nothing


def test_what_does_not_fit_is_named_in_one_line(tmp_path):
    weights, name = weights_of(reference('dit_')), 'blocks.1.attn_out.weight'
    theirs = lambda weights, **config: repository(tmp_path / 'theirs', weights, **config)
    refused(theirs(weights, vocab_size=50257), 'theirs', 'vocab_size 50257', '101')
    refused(theirs(weights, n_blocks=3), 'n_blocks 3', '2')
    refused(theirs(weights, causal=True), 'causal True')
    refused(theirs(weights, n_heads=5), 'n_head')
    refused(theirs(weights, model_type='SEDD'), 'sedd')
    refused(theirs({k: v for k, v in weights.items() if k != name}), f'{name} is missing')
    refused(theirs(weights | {'noise.w': torch.ones(8), 'more': torch.ones(())}), 'noise.w is [8]', 'more is []')
    refused(theirs(weights | {name: weights[name][:3], 'output_layer.linear.bias': torch.ones(8)}),
            f'{name} is [3, 64], not [64, 64]', 'output_layer.linear.bias is [8], not [101]')
    refused(theirs({name: weights[name]}), 'vocab_embed.embedding')
    refused(theirs(weights), 'no checkpoint', weights='raw')
    file = Path(theirs(weights), 'model.safetensors')
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path / 'theirs', 'theirs')
    (tmp_path / 'theirs' / 'config.json').write_text('{')
    refused(tmp_path / 'theirs', 'theirs', 'JSON')


# ---------------------------------------------------------------------------------------------------------------------
# out, and in again

def test_export_is_their_layout_and_loses_nothing(work, tmp_path):
    a = reference('dit_')
    theirs = repository(tmp_path / 'theirs', weights_of(a))
    assert 'wrote' in good(run(tmp_path, 'sample.py', f'--init_from={theirs}', '--export_official=off'))
    before, after = (load_file(tmp_path / name / 'model.safetensors') for name in ('theirs', 'off'))
    assert before.pop('backbone.rotary_emb.inv_freq').allclose(after.pop('backbone.rotary_emb.inv_freq'), rtol=1e-6)
    assert equal(before, after)
    config = json.loads((tmp_path / 'off' / 'config.json').read_text())
    assert all(config[key] == THEIRS[key] for key in THEIRS if key not in ('dropout', 'var_min'))
    exported = load_file(tmp_path / 'off' / 'model.safetensors')
    shapes = {k[3:]: v.shape for k, v in a.items() if k.startswith('sd/')}
    assert {k.removeprefix('backbone.'): v.shape for k, v in exported.items()} == shapes
    assert exported['backbone.rotary_emb.inv_freq'].allclose(a['sd/rotary_emb.inv_freq'], rtol=1e-6)
    one_line(run(tmp_path, 'sample.py', f'--init_from={theirs}', '--export_official=off'), 'off', 'already')

    good(run(work, 'sample.py', f'--export_official={tmp_path / "ours"}'))
    ours, info = load_model(str(work / 'out'))
    again, told = load_model(str(tmp_path / 'ours'))
    assert equal(dict(ours.state_dict()), dict(again.state_dict()))
    assert all(told[key] == info[key] for key in info if key != 'folder')


def test_a_run_is_a_repository_of_the_hub(work, tmp_path):
    card, r = (work / 'out' / 'README.md').read_text(), [log(work / 'out', f'val_{x}')[-1] for x in ('loss', 'error')]
    assert card.startswith('---\n') and 'pipeline_tag: text-generation\n' in card.split('---\n')[1]
    assert f'{r[0]:.4f} +- {r[1]:.4f}' in card and 'python train.py --dataset=tiny' in card
    assert "dataset = 'tiny'" in card and 'grad_clip' not in card and '22,608 tokens' in card
    env = os.environ | cache(tmp_path, 'me/tiny', work / 'out')
    said = [good(run(work, 'sample.py', '--steps=2', '--num_samples=1', more, env=env))
            for more in ('--init_from=hf:me/tiny', '--out_dir=out')]
    assert said[0].split(': ')[:-1] == said[1].split(': ')[:-1]
    result = json.loads(good(run(work, 'eval.py', '--init_from=hf:me/tiny', '--max_rows=4', env=env)).splitlines()[-1])
    assert result['out_dir'] == 'hf:me/tiny' and result['rows'] == 4
    one_line(run(work, 'sample.py', '--init_from=hf:me/none', env=env), 'hf:me/none', 'cache')
    one_line(run(work, 'sample.py', '--init_from=hf:me', env=env), 'hf:me')


def test_a_card_keeps_what_its_owner_wrote(work, tmp_path):
    shutil.copytree(work / 'out', tmp_path / 'out')
    card = tmp_path / 'out' / 'README.md'
    again = lambda: write_card(str(tmp_path / 'out'), {'seed': 7}, ['--init_from=resume', '--out_dir=my run'], 8)
    card.write_text(card.read_text().replace('# license: mit    (it is', 'license: gpl').replace('+-', '?'))
    again()
    command = "torchrun --nproc_per_node=8 train.py --init_from=resume '--out_dir=my run'\n"
    assert all(word in card.read_text() for word in ('\nlicense: gpl', '+-', command, 'save seed = 7.'))
    card.write_text('mine')
    again()
    assert card.read_text() == 'mine'


def test_going_on_from_a_model_of_theirs(work, tmp_path):
    """GPT-2's words and one that no text has, as their Duo and their AR keep them."""
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=2, n_embd=16, cond_dim=8, block_size=32)
    for kind, causal in (('duo', False), ('ar', True)):
        theirs = DiT(DiTConfig(50258, causal=causal, **shape)).eval()
        for p in theirs.parameters():                      # or its blocks, still silent, would not hear the time
            torch.nn.init.normal_(p, std=0.3)
        repository(tmp_path / kind, theirs.state_dict(), vocab_size=50258, model_length=32, causal=causal, n_blocks=1,
                   hidden_dim=16, cond_dim=8, n_heads=2)
        model, info = load_model(str(tmp_path / kind))
        x, sigma = torch.randint(50257, (2, 32)), torch.rand(2)
        assert torch.equal(model(x, sigma), theirs(x, sigma)[..., :50257]) and info['objective'] == kind
        assert info['data']['tokenizer'] == 'gpt2' and info['data']['vocab_size'] == 50257
    one_line(run(tmp_path, 'eval.py', '--init_from=duo'), '--dataset')
    tiktoken = SHARED / 'tokenizers' / 'tiktoken_cache'
    if not tiktoken.is_dir():
        pytest.skip(f'no GPT-2 BPE files in {tiktoken}')
    env = os.environ | {'TIKTOKEN_CACHE_DIR': str(tiktoken)}
    (tmp_path / 'tiny.txt').write_text((work / 'tiny.txt').read_text())
    good(run(tmp_path, 'prepare.py', 'tiny.txt', '--tokenizer', 'gpt2', env=env))
    more = [*TINY, *(f'--{key}={value}' for key, value in shape.items()), '--curriculum_iters=0', '--init_from=duo']
    good(run(tmp_path, 'train.py', *more, '--objective=dcd', '--max_iters=2', '--out_dir=dcd', env=env))
    state, theirs = checkpoint(tmp_path / 'dcd'), dict(load_model(str(tmp_path / 'duo'))[0].state_dict())
    assert equal(dict(state['teacher']), theirs) and not equal(dict(state['weights']), theirs)
    assert '31 network calls' in good(run(tmp_path, 'sample.py', '--init_from=ar', '--num_samples=1', env=env))
    said = good(run(tmp_path, 'eval.py', '--init_from=ar', '--dataset=tiny', env=env))
    assert json.loads(said.splitlines()[-1])['objective'] == 'ar'
    one_line(run(tmp_path, 'train.py', *more, '--n_embd=32', '--out_dir=never', env=env), 'another model')
