"""The authors' folders and .ckpt files into ours, and ours into theirs."""
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

from checkpoint import load_model
from configurator import UserError
from convert import convert
from data import load_tokenizer
from files import hub_cache, repacked
from helpers import ROOT, TINY, checkpoint, equal, good, one_line, reference, run
from model import DiT, DiTConfig

SHARED = ROOT.parent / 'shared'
THEIRS = dict(model_type='duo', vocab_size=101, model_length=24, causal=False, hidden_dim=64,
              cond_dim=32, n_blocks=2, n_heads=4, dropout=0.1, var_min=True)
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
    """A Lightning checkpoint of theirs: the buffer in its place, the EMA a list without names."""
    state = OrderedDict((f'backbone._orig_mod.{name}', w) for name, w in weights.items())
    state['backbone._orig_mod.rotary_emb.inv_freq'] = INV_FREQ
    torch.save({'state_dict': state,
                'ema': dict(decay=0.9999, num_updates=7, shadow_params=shadow),
                'loops': {'fit_loop': {'epoch_progress': {'current': {'completed': 3}}}},
                **more}, path)
    return str(path)


def random_network(vocab_size, causal, **shape):
    torch.manual_seed(0)
    model = DiT(DiTConfig(vocab_size, causal=causal, **shape)).eval().requires_grad_(False)
    for p in model.parameters():  # as they begin, its blocks and its head are zero
        torch.nn.init.normal_(p, std=0.3)
    return model


def same(ours, theirs):
    return (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def converted(where, objective=None):
    """load_model of what convert() makes of it."""
    folder = Path(f'{where}-ours')
    shutil.rmtree(folder, ignore_errors=True)
    convert(where, folder, objective)
    return load_model(folder)


def refused(where, *parts, objective=None):
    """convert() ends in one line with these parts, and leaves nothing behind."""
    folder = Path(f'{where}-never')
    with pytest.raises(UserError) as error:
        convert(str(where), folder, objective)
    line = str(error.value)
    assert len(line.splitlines()) == 1 and all(part in line for part in parts), line
    assert not folder.exists()


# -------------------------------------------------------------------------------------------------
# in

@torch.no_grad()
def test_a_repository_of_theirs_is_the_published_network(tmp_path, capsys):
    a = reference('dit_')
    model, info = converted(repository(tmp_path / 'theirs', weights_of(a)))
    assert same(model(a['x'], a['sigma']), a['logits'])
    assert 'assumed: nothing' in capsys.readouterr().out
    assert info['objective'] == 'duo' and info['data']['vocab_size'] == 101
    assert model.config == DiTConfig(vocab_size=101, block_size=24, n_layer=2, n_head=4, n_embd=64,
                                     cond_dim=32, dropout=0.1, causal=False)
    with pytest.raises((UserError, SystemExit), match='tokenizer.json'):  # no tokenizer, no text
        load_tokenizer(info['data'], info['folder'])

    # the shapes tell all but the heads: 4 x 16 could be 1 x 64
    (tmp_path / 'theirs' / 'config.json').unlink()
    refused(tmp_path / 'theirs', '--objective')
    model, info = converted(str(tmp_path / 'theirs'), 'duo')
    assert 'assumed: n_heads 1, model_length 1024' in capsys.readouterr().out
    assert info['model']['n_layer'] == 2 and info['model']['cond_dim'] == 32
    assert not info['model']['causal']


@torch.no_grad()
def test_masked_and_autoregressive_ones(tmp_path):
    a = reference('dit_')
    theirs = repository(tmp_path / 'mdlm', weights_of(a), model_type='mdlm',
                        time_conditioning=False)
    model, info = converted(theirs)
    assert info['objective'] == 'mdlm'
    assert info['model']['vocab_size'] == 101 and info['data']['vocab_size'] == 100
    assert same(model(a['x'], torch.zeros(len(a['x']))), a['logits_sigma0'])
    refused(repository(tmp_path / 'mdlm', weights_of(a), model_type='mdlm', time_conditioning=True),
            'time_conditioning')
    a = reference('causal_')
    model, info = converted(repository(tmp_path / 'ar', weights_of(a), causal=True))
    assert info['objective'] == 'ar' and info['model']['causal']
    assert same(model(a['x']), a['logits'])


@torch.no_grad()
def test_the_token_that_no_text_has_is_left_out(tmp_path):
    """GPT-2's vocabulary and one token more, as in their Duo and AR; BERT's, with a mask in it."""
    shape = dict(n_layer=1, n_head=2, n_embd=16, cond_dim=8, block_size=32)
    config = dict(model_length=32, n_blocks=1, hidden_dim=16, cond_dim=8, n_heads=2)
    for kind, causal in (('duo', False), ('ar', True)):
        theirs = random_network(50258, causal, **shape)
        model, info = converted(repository(tmp_path / kind, theirs.state_dict(), vocab_size=50258,
                                           causal=causal, **config))
        x, sigma = torch.randint(50257, (2, 32)), torch.rand(2)
        assert torch.equal(model(x, sigma), theirs(x, sigma)[..., :50257])
        assert info['objective'] == kind
        assert info['data']['tokenizer'] == 'gpt2' and info['data']['vocab_size'] == 50257
    bert = random_network(30522, False, **shape).state_dict()
    _, info = converted(repository(tmp_path / 'bert', bert, vocab_size=30522, **config))
    assert info['data']['tokenizer'] == 'bert' and info['data']['pad_id'] == 0
    refused(repository(tmp_path / 'bert', bert, vocab_size=30522, model_type='mdlm', **config),
            'mdlm')


@torch.no_grad()
def test_a_lightning_checkpoint(tmp_path, monkeypatch, capsys):
    a, order = reference('dit_'), list(DiT(DiTConfig(101, 24, 2, 4, 64, 32)).state_dict())
    average = weights_of(a)
    raw = OrderedDict((name, average[name] + 1) for name in order)
    # their settings, as omegaconf pickles them: it takes no such package to pass them by
    fake = types.ModuleType('omegaconf')
    fake.Node = type('Node', (), {'__module__': 'omegaconf',
                                  '__init__': lambda self, **kw: vars(self).update(kw)})
    monkeypatch.setitem(sys.modules, 'omegaconf', fake)

    def node(x):
        if type(x) is dict:
            return fake.Node(_content={k: node(v) for k, v in x.items()})
        return fake.Node(_val=x)

    settings = node(dict(algo=dict(name='duo_base'),
                         model=dict(n_heads=4, length=24, hidden_size=64)))
    hyper = {'config': settings, 'vocab_size': 101}
    (tmp_path / 'theirs').mkdir()
    path = lightning(tmp_path / 'theirs' / 'a.ckpt', raw, [average[name] for name in order],
                     hyper_parameters=hyper)
    monkeypatch.delitem(sys.modules, 'omegaconf')

    refused(path, '--objective')
    model, info = converted(path, 'duo')
    assert equal(dict(model.state_dict()), average) and info['objective'] == 'duo'
    assert 'assumed: n_heads 1, model_length 1024' in capsys.readouterr().out
    config = tmp_path / 'theirs' / 'config.json'          # which may tell of a .ckpt, too
    config.write_text(json.dumps(dict(n_heads=4, model_length=24)))
    model, info = converted(path, 'duo')
    assert same(model(a['x'], a['sigma']), a['logits']) and info['model']['block_size'] == 24
    assert 'assumed: nothing' in capsys.readouterr().out

    for names in (order[1:], order[::-1]):
        refused(lightning(tmp_path / 'theirs' / 'b.ckpt', raw, [average[name] for name in names]),
                'moving average')
    torch.save({'state_dict': raw}, tmp_path / 'e.ckpt')
    model, _ = converted(tmp_path / 'e.ckpt', 'duo')
    assert equal(dict(model.state_dict()), dict(raw)) and 'no moving' in capsys.readouterr().out
    (tmp_path / 'c.ckpt').write_bytes(Path(path).read_bytes()[:-1000])
    refused(tmp_path / 'c.ckpt', 'c.ckpt')
    torch.save([1, 2], tmp_path / 'd.ckpt')
    refused(tmp_path / 'd.ckpt', 'd.ckpt', 'state_dict')


@pytest.mark.parametrize('call', [(os.system, 'touch ran'), (exec, "open('ran', 'w')"),
                                  (shutil.copy, 'it', 'ran')])
def test_a_pickle_with_a_payload_is_not_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    Path('it').touch()
    payload = type('Payload', (), {'__reduce__': lambda self: (call[0], call[1:])})
    weights = weights_of(reference('dit_'))
    lightning('a.ckpt', weights, list(weights.values()), hyper_parameters={'config': payload()})
    refused('a.ckpt', 'a.ckpt', call[0].__name__, 'not opened')
    if call[0] is os.system:
        one_line(run(tmp_path, 'convert.py', 'a.ckpt', 'out'), 'a.ckpt', 'system', 'not opened')
        assert not Path('out').exists()
    assert not Path('ran').exists()
    torch.load('a.ckpt', weights_only=False)
    assert Path('ran').exists()  # or this would test nothing


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('bomb', [
    b'cos\nsystem\n(S"touch ran"\ntR.', b'not a pickle', b'', b'(' * 999, b'\x80\x02h\x07.',
    b'\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.',
    b'ctransformers.defused\nThing\n)R.'])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, monkeypatch, bomb):
    """Bare, and as the pickle of a zip that torch could have written."""
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {}}, 'whole.ckpt')
    for name, raw in (('bare.ckpt', bomb), ('zip.ckpt', repacked('whole.ckpt', bomb)),
                      ('b.safetensors', bomb)):
        Path(name).write_bytes(raw)
        refused(name, name)
    assert not Path('ran').exists()


def test_what_does_not_fit_is_named_in_one_line(tmp_path):
    weights, name = weights_of(reference('dit_')), 'blocks.1.attn_out.weight'

    def theirs(weights, **config):
        return repository(tmp_path / 'theirs', weights, **config)

    refused(theirs(weights, vocab_size=50257), 'theirs', 'vocab_size 50257', '101')
    refused(theirs(weights, vocab_size='101'), 'theirs', 'vocab_size')
    refused(theirs(weights, n_blocks=3), 'theirs', 'n_blocks 3', '2')
    refused(theirs(weights, hidden_dim=32), 'theirs', 'hidden_dim 32', '64')
    refused(theirs(weights, cond_dim=16), 'theirs', 'sigma_map.mlp.0.weight', '[32, 256]')
    refused(theirs(weights, causal=True), 'theirs', 'causal True')
    refused(theirs(weights, n_heads=5), 'n_head')
    refused(theirs(weights, n_heads='4'), "'n_head': '4'")
    refused(theirs(weights, model_type='SEDD'), 'sedd')
    refused(theirs({k: v for k, v in weights.items() if k != name}), 'Missing', name)
    refused(theirs(weights | {'noise.w': torch.ones(8), 'more': torch.ones(())}),
            'Unexpected', 'noise.w', 'more')
    refused(theirs(weights | {name: weights[name][:3], 'output_layer.linear.bias': torch.ones(8)}),
            name, '[3, 64]', '[64, 64]', 'output_layer.linear.bias', '[8]', '[101]')
    refused(theirs({name: weights[name]}), 'vocab_embed.embedding')
    file = Path(theirs(weights), 'model.safetensors')
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path / 'theirs', 'theirs')
    theirs(weights)
    (tmp_path / 'theirs' / 'config.json').write_text('{')
    refused(tmp_path / 'theirs', 'theirs', 'JSON')
    refused(tmp_path / 'nowhere', 'nowhere')


# -------------------------------------------------------------------------------------------------
# both ways

def test_there_and_back_through_the_command_line(tmp_path):
    a = reference('dit_')
    repository(tmp_path / 'theirs', weights_of(a))
    said = good(run(tmp_path, 'convert.py', 'theirs', 'ours'))
    assert 'assumed: nothing' in said and 'wrote ours' in said
    assert 'wrote off' in good(run(tmp_path, 'convert.py', '--export', 'ours', 'off'))
    before, after = (load_file(tmp_path / name / 'model.safetensors') for name in ('theirs', 'off'))
    shapes = {k.removeprefix('sd/'): v.shape for k, v in a.items() if k.startswith('sd/')}
    assert {k.removeprefix('backbone.'): v.shape for k, v in after.items()} == shapes
    freq = after.pop('backbone.rotary_emb.inv_freq')
    assert freq.allclose(a['sd/rotary_emb.inv_freq'], rtol=1e-6)
    del before['backbone.rotary_emb.inv_freq']
    assert equal(before, after)
    config = json.loads((tmp_path / 'off' / 'config.json').read_text())
    assert all(config[key] == THEIRS[key] for key in THEIRS if key not in ('dropout', 'var_min'))
    one_line(run(tmp_path, 'convert.py', '--export', 'ours', 'off'), 'off', 'already')
    one_line(run(tmp_path, 'convert.py', 'theirs', 'ours'), 'ours', 'already')


def test_a_run_exported_and_converted_back_loses_nothing(work, tmp_path):
    good(run(work, 'convert.py', '--export', 'out', str(tmp_path / 'theirs')))
    with pytest.raises(UserError, match=f'python convert.py {tmp_path / "theirs"} out-theirs'):
        load_model(tmp_path / 'theirs')  # its names are theirs
    convert(tmp_path / 'theirs', tmp_path / 'back')
    ours, info = load_model(work / 'out')
    again, told = load_model(tmp_path / 'back')
    assert equal(dict(ours.state_dict()), dict(again.state_dict()))
    assert all(told[key] == info[key] for key in info if key != 'folder')


def test_theirs_on_the_hub(tmp_path):
    """out_dir of theirs says to convert; convert reads what the cache has."""
    source = repository(tmp_path / 'source', weights_of(reference('dit_')))
    env = os.environ | hub_cache(tmp_path, 'them/duo', source)
    one_line(run(tmp_path, 'sample.py', '--out_dir=hf:them/duo', env=env),
             'python convert.py hf:them/duo out-duo')
    good(run(tmp_path, 'convert.py', 'hf:them/duo', 'out-duo', env=env))
    model, _ = load_model(tmp_path / 'out-duo')
    assert equal(dict(model.state_dict()), weights_of(reference('dit_')))
    one_line(run(tmp_path, 'convert.py', 'hf:them/none', 'out', env=env), 'hf:them/none', 'cache')


def test_going_on_from_a_model_of_theirs(work, tmp_path):
    tiktoken = SHARED / 'tokenizers' / 'tiktoken_cache'
    if not tiktoken.is_dir():
        pytest.skip(f'no GPT-2 BPE files in {tiktoken}')
    shape = dict(n_layer=1, n_head=2, n_embd=16, cond_dim=8, block_size=32)
    for kind, causal in (('duo', False), ('ar', True)):
        theirs = random_network(50258, causal, **shape)
        repository(tmp_path / f'their-{kind}', theirs.state_dict(), vocab_size=50258,
                   model_length=32, causal=causal, n_blocks=1, hidden_dim=16, cond_dim=8, n_heads=2)
        convert(tmp_path / f'their-{kind}', tmp_path / kind)
    one_line(run(tmp_path, 'eval.py', '--out_dir=duo'), '--dataset')
    env = os.environ | {'TIKTOKEN_CACHE_DIR': str(tiktoken)}
    (tmp_path / 'tiny.txt').write_text((work / 'tiny.txt').read_text())
    good(run(tmp_path, 'prepare.py', 'tiny.txt', '--tokenizer', 'gpt2', env=env))
    more = [*TINY, *(f'--{key}={value}' for key, value in shape.items()), '--init_from=duo']
    good(run(tmp_path, 'train.py', *more, '--objective=dcd', '--dcd_rounds=1', '--max_iters=2',
             '--out_dir=dcd', env=env))
    state, theirs = checkpoint(tmp_path / 'dcd'), dict(load_model(tmp_path / 'duo')[0].state_dict())
    assert equal(dict(state['teacher']), theirs) and not equal(dict(state['weights']), theirs)
    said = good(run(tmp_path, 'sample.py', '--out_dir=ar', '--num_samples=1', env=env))
    assert '31 network calls' in said
    said = good(run(tmp_path, 'eval.py', '--out_dir=ar', '--dataset=tiny', env=env))
    assert json.loads(said.splitlines()[-1])['objective'] == 'ar'
    one_line(run(tmp_path, 'train.py', *more, '--objective=mdlm', '--out_dir=never', env=env),
             'duo is a network for duo, not for mdlm')
