"""Our own format: what save() leaves is found again; the hub's cache, the model card."""
import errno
import fcntl
import json
import math
import os
import re
import shutil
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (STATE, has_state, load_model, load_state, lock_folder, open_log, save,
                        set_aside_older_run, step_files, write_card, write_model)
from configurator import UserError
from files import hub_cache
from helpers import equal, good, log, one_line, run, run_here
from model import DiT, DiTConfig
from optim import load_optimizer

DATA = dict(tokenizer='bytes', tokenizer_sha256=None, vocab_size=256, bos_id=0, eos_id=0,
            pad_id=None)


def network(config=DiTConfig(256, 16, 1, 2, 16, 8), seed=0):
    torch.manual_seed(seed)
    model = DiT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval().requires_grad_(False)


def info_of(model, **more):
    return dict(objective='duo', model=asdict(model.config), data=DATA,
                settings={'dataset': 'tiny'}, step=0) | more


def write_step(folder, step, keep_last=2):
    """A checkpoint of that step, its weights unlike its EMA and unlike every other step's."""
    ema = network(seed=step)
    info = info_of(ema, step=step)
    state = dict(weights=network(seed=step + 1000).state_dict(), ema=ema.state_dict(),
                 optimizers=[{}], scaler={}, seconds=1.0,
                 skipped=0, fingerprint='f', **info)
    save(folder, state, ema, info, folder, keep_last)
    return state


def refused(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    line = str(error.value)
    assert len(line.splitlines()) == 1 and all(str(part) in line for part in parts), line


def rewrite(folder, **changes):
    """Change entries of config.json's 'model', or leave them out."""
    path = Path(folder, 'config.json')
    info = json.loads(path.read_text())
    info['model'] = {k: v for k, v in (info['model'] | changes).items() if v != 'leave out'}
    path.write_text(json.dumps(info))


# -------------------------------------------------------------------------------------------------
# the state of a run

def test_what_is_saved_is_loaded(tmp_path):
    assert not has_state(tmp_path)
    refused(lambda: load_state(tmp_path), 'no checkpoint', tmp_path)
    state = write_step(tmp_path, 4)
    assert has_state(tmp_path) and equal(load_state(tmp_path), state)
    model, info = load_model(tmp_path)
    assert equal(dict(model.state_dict()), dict(state['ema']))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert info == info_of(model, step=4, folder=str(tmp_path))


def test_old_step_files_go_and_nothing_else(tmp_path):
    for step in (4, 8):
        write_step(tmp_path, step)
    own = ['step-00000004.pt.kept', 'step-best.pt']
    for name in own:
        (tmp_path / name).touch()
    (tmp_path / 'unfinished.tmp').touch()        # of a run that was killed as it wrote
    for step in (5, 6):                          # 8 was damaged: the run went on from 4
        write_step(tmp_path, step)
    assert {path.name for path in tmp_path.iterdir()} == {
        'step-00000005.pt', 'step-00000006.pt', 'model.safetensors', 'config.json', *own}
    assert [path.name for path in step_files(tmp_path)] == ['step-00000006.pt', 'step-00000005.pt']
    assert load_state(tmp_path)['step'] == 6


def test_a_disk_without_links(tmp_path, monkeypatch):
    def no_link(source, path):
        raise OSError(errno.EPERM, 'no links here')

    monkeypatch.setattr(os, 'link', no_link)
    monkeypatch.setattr(os, 'symlink', no_link)
    assert equal(write_step(tmp_path, 4), load_state(tmp_path))


@pytest.mark.parametrize('damage', ['cut', 'flip', 'gone', 'empty', 'text'])
def test_the_newest_whole_state_is_found(tmp_path, damage, capsys):
    write_step(tmp_path, 4)
    tensor = write_step(tmp_path, 8)['weights']['output_layer.linear.weight']
    newest, older = step_files(tmp_path)
    whole = newest.read_bytes()
    at = whole.index(tensor.numpy().tobytes()) + 99  # there only a checksum can tell
    if damage == 'gone':
        newest.unlink()
    else:
        raw = {'cut': whole[:at], 'flip': whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:],
               'empty': b'', 'text': b'not a checkpoint'}[damage]
        newest.write_bytes(raw)
    state = load_state(tmp_path)
    said = capsys.readouterr().out
    assert state['step'] == 4 and f'going on from {older}' in said
    assert (f'{newest} cannot be used' in said) == (damage != 'gone')
    older.unlink()
    refused(lambda: load_state(tmp_path), tmp_path)


def test_a_state_of_wrong_kinds(tmp_path):
    state = write_step(tmp_path, 4)
    (path,) = step_files(tmp_path)
    for key in STATE:
        without = {k: v for k, v in state.items() if k != key}
        for change in (without, state | {key: {1}}, [state], 7):
            torch.save(change, path)
            refused(lambda: load_state(tmp_path), 'no checkpoint')


def test_a_full_disk_is_one_line_and_a_bug_is_not(tmp_path, monkeypatch):
    """A failed write keeps what was there; what is no failure to write keeps its traceback."""
    write_step(tmp_path, 4)
    (path,) = step_files(tmp_path)
    before = path.read_bytes()

    def full(state, path):
        raise RuntimeError('unexpected pos 64 vs 0\nfile write failed')  # as torch reports it

    with monkeypatch.context() as m:
        m.setattr(torch, 'save', full)
        refused(lambda: write_step(tmp_path, 5), f'cannot write {tmp_path}/step-', 'is kept')
    assert path.read_bytes() == before
    assert not list(tmp_path.glob('*.tmp'))

    def bug(*args, **kwargs):
        raise ZeroDivisionError

    for name in ('DiT', 'read_weights', 'checksum'):
        with monkeypatch.context() as m:
            m.setattr(checkpoint, name, bug)
            with pytest.raises(ZeroDivisionError):
                load_model(tmp_path)


def test_a_folder_has_one_run(tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'a' / 'out'
    lock = lock_folder(folder)
    who = [folder, f'host {socket.gethostname()}', f'process {os.getpid()}', 'since 2']
    refused(lambda: lock_folder(folder), *who)
    lock.close()
    lock_folder(folder).close()

    def no_locks(file, kind):
        raise OSError(errno.ENOLCK, 'no locks here')

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    lock_folder(folder).close()
    assert f'{folder} cannot be locked (no locks here)' in capsys.readouterr().out


def test_a_run_is_set_aside_under_its_own_name(tmp_path):
    """A name may look like a pattern of strftime."""
    folder = f'{tmp_path}/100%Y'
    lock = lock_folder(folder)
    write_step(folder, 4)
    set_aside_older_run(folder, lock).close()
    aside, new = sorted(tmp_path.iterdir(), key=has_state, reverse=True)
    assert re.fullmatch(r'100%Y-2\d{7}-\d{6}', aside.name) and new.name == '100%Y'
    assert load_state(aside)['step'] == 4 and not has_state(new)


FOREIGN = ['not JSON', '[1]', '7', '{}', '{"step": "x"}', '{"step": null}', '', 'x"}', '\0}',
           '\xff}']


@pytest.mark.parametrize('line', FOREIGN)
def test_the_log_keeps_its_own_lines(tmp_path, line):
    (tmp_path / 'log.jsonl').write_text(f'{{"step": 3}}\n{line}\n{{"step": 4}}\n{{"step": 5}}\n'
                                        '{"step": 2, "lo', 'latin1')
    open_log(tmp_path, 4).close()
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 3}\n{"step": 4}\n'


# -------------------------------------------------------------------------------------------------
# the model's folder

@dataclass
class Odd(DiTConfig):
    """The network's settings as a researcher may extend them."""
    window: int = 0
    qk_norm: bool = False
    base: float = 10000.0
    position: str = 'rotary'
    note: str = ''
    limit: int | None = None
    shift: int = -3


@pytest.mark.parametrize('fields', [
    {}, dict(window=0), dict(window=2**40), dict(qk_norm=True), dict(base=0.0), dict(base=-1e-30),
    dict(base=7), dict(position=''), dict(position='none'), dict(note='a\n"quoted" line'),
    dict(limit=5), dict(limit=None), dict(window=None), dict(shift=0), dict(dropout=0.0),
    dict(window=-1, qk_norm=True, base=float('inf'), position='x', limit=0)])
def test_any_plain_field_of_the_network_is_saved_and_loaded(tmp_path, monkeypatch, fields):
    monkeypatch.setattr(checkpoint, 'DiTConfig', Odd)
    model = network(Odd(256, 16, 1, 2, 16, 8, **fields))
    write_model(tmp_path, model.state_dict(), info_of(model), tmp_path)
    again, info = load_model(tmp_path)
    assert again.config == model.config and type(again.config) is Odd
    assert info['model'] == asdict(model.config)
    assert equal(dict(again.state_dict()), dict(model.state_dict()))
    write_model(tmp_path, model.state_dict(), info_of(network()), tmp_path)
    assert load_model(tmp_path)[0].config == Odd(256, 16, 1, 2, 16, 8)  # of before the fields


def test_tied_weights_are_saved_and_loaded(tmp_path):
    """As of a network whose head is its embedding, on a CPU."""
    model = network()
    model.output_layer.linear.weight = model.vocab_embed.embedding
    save(tmp_path, dict(step=1), model, info_of(model), tmp_path)
    loaded = load_model(tmp_path)[0]
    assert torch.equal(loaded.output_layer.linear.weight, model.vocab_embed.embedding)


def test_a_wrong_field_is_named(tmp_path):
    model = network()
    for change in (dict(window=1), dict(n_layer='1'), dict(n_head=2.0),
                   dict(dropout='0'), dict(dropout=1.5), dict(vocab_size=True), dict(n_head=0),
                   dict(n_layer=2**30), dict(n_embd=-16), dict(block_size=0), dict(n_head=None),
                   dict(dropout=None), dict(vocab_size=255), dict(causal=True)):
        write_model(tmp_path, model.state_dict(), info_of(model), tmp_path)
        rewrite(tmp_path, **change)
        refused(lambda: load_model(tmp_path), tmp_path, 'config.json', *change)
    for entry, value in (('data', DATA | dict(eos_id=256)), ('data', {}), ('objective', 'ar'),
                         ('objective', 'mdlm'), ('objective', 'none')):
        write_model(tmp_path, model.state_dict(), info_of(model, **{entry: value}), tmp_path)
        refused(lambda: load_model(tmp_path), tmp_path, 'config.json')
    older = asdict(model.config)
    del older['dropout']
    write_model(tmp_path, model.state_dict(), info_of(model) | dict(model=older), tmp_path)
    assert load_model(tmp_path)[0].config.dropout == DiTConfig.dropout


def test_tensors_that_do_not_fit_are_named(tmp_path):
    model, name = network(), 'blocks.0.attn_out.weight'
    weights = dict(model.state_dict())
    for change, parts in (({'noise.w': torch.ones(8), 'more': torch.ones(())}, ['noise.w', 'more']),
                          ({name: weights[name][:3]}, [name, '[3, 16]', '[16, 16]'])):
        write_model(tmp_path, weights | change, info_of(model), tmp_path)
        refused(lambda: load_model(tmp_path), tmp_path, *parts)
    write_model(tmp_path, {k: w for k, w in weights.items() if k != name}, info_of(model), tmp_path)
    refused(lambda: load_model(tmp_path), tmp_path, 'Missing', name)


@pytest.mark.parametrize('other', [dict(model=asdict(DiTConfig(256, 16, 1, 4, 16, 8))),
                                   dict(data=DATA | dict(tokenizer='another', eos_id=1))])
def test_weights_beside_another_config_are_refused(tmp_path, other):
    """As files copied from two runs: the shapes fit, and the tokenizer has as many tokens."""
    model = network()
    write_model(tmp_path, model.state_dict(), info_of(model, settings={}), tmp_path)
    mine = (tmp_path / 'model.safetensors').read_bytes()
    write_model(tmp_path, model.state_dict(), info_of(model) | other, tmp_path)
    load_model(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(mine)
    refused(lambda: load_model(tmp_path), tmp_path, 'not of one run')


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    model = network()
    write_model(tmp_path, model.state_dict(), info_of(model), tmp_path)
    model.output_layer.linear.bias[7] = bad
    refused(lambda: write_model_of(model, tmp_path), tmp_path, 'not finite')


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written(tmp_path):
    state = write_step(tmp_path, 4)
    ema = network()
    ema.output_layer.linear.bias[7] = float('nan')
    refused(lambda: save(tmp_path, state | dict(step=5), ema, info_of(ema), tmp_path),
            'not finite at step 5', tmp_path)
    assert load_state(tmp_path)['step'] == 4 and load_model(tmp_path)


def write_model_of(model, folder):
    """Written by other code, which does not look."""
    write_model(folder, model.state_dict(), info_of(model), folder)
    load_model(folder)


def test_damaged_weights_are_noticed(tmp_path):
    model = network()
    write_model(tmp_path, model.state_dict(), info_of(model), tmp_path)
    path = tmp_path / 'model.safetensors'
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(lambda: load_model(tmp_path), tmp_path, 'damaged')
    path.write_bytes(whole[:-100])
    refused(lambda: load_model(tmp_path), path)
    path.write_bytes(whole)
    weights = load_file(path)
    path.unlink()
    save_file({k: w.half() for k, w in weights.items()}, path)  # other code writes no checksum
    again, _ = load_model(tmp_path)
    assert {w.dtype for w in again.state_dict().values()} == {torch.float32}
    for text in '{', '[]', '3':
        (tmp_path / 'config.json').write_text(text)
        refused(lambda: load_model(tmp_path), 'config.json', 'JSON')


def test_what_is_not_ours_is_converted_first(tmp_path):
    """The authors' config.json, their names, tensors alone, a .ckpt; and an empty folder."""
    folder = tmp_path / 'duo'
    folder.mkdir()
    command = f'python convert.py {folder} out-duo'
    refused(lambda: load_model(folder), command, 'train.py')
    write_model(folder, network().state_dict(), dict(model_type='duo', n_blocks=1), folder)
    refused(lambda: load_model(folder), command)
    (folder / 'config.json').unlink()
    refused(lambda: load_model(folder), command)
    (folder / 'a.ckpt').touch()
    refused(lambda: load_model(folder / 'a.ckpt'), f'python convert.py {folder}/a.ckpt out-a')
    model = network()
    names = {f'backbone.{name}': w for name, w in model.state_dict().items()}
    write_model(folder, names, info_of(model), folder)  # no program writes such a folder
    refused(lambda: load_model(folder), folder, 'backbone.vocab_embed.embedding')


# -------------------------------------------------------------------------------------------------
# a run on the hub, and its card

def test_a_run_is_a_repository_of_the_hub(work, tmp_path, monkeypatch):
    card = (work / 'out' / 'README.md').read_text()
    result = [log(work / 'out', f'val_{x}')[-1] for x in ('loss', 'error')]
    assert card.startswith('---\n') and 'pipeline_tag: text-generation\n' in card.split('---\n')[1]
    assert f'{result[0]:.4f} +- {result[1]:.4f}' in card
    assert '    python train.py ' in card and '22,608 tokens' in card
    env = os.environ | hub_cache(tmp_path, 'me/tiny', work / 'out')
    sampling = ['sample.py', '--steps=2', '--num_samples=1']
    said = [good(run(work, *sampling, '--out_dir=hf:me/tiny', env=env)),
            good(run_here(work, *sampling, '--out_dir=out'))]
    assert said[0].split(': ')[:-1] == said[1].split(': ')[:-1]
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', env['HF_HUB_CACHE'])
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    said = good(run_here(work, 'eval.py', '--out_dir=hf:me/tiny', '--max_rows=4'))
    result = json.loads(said.splitlines()[-1])
    assert result['out_dir'] == 'hf:me/tiny' and result['rows'] == 4
    one_line(run_here(work, 'eval.py', '--gen_ppl=hf:me/tiny'), 'hf:me/tiny', 'autoregressive')
    one_line(run_here(work, 'sample.py', '--out_dir=hf:me/none'), 'hf:me/none', 'cache')
    one_line(run_here(work, 'sample.py', '--out_dir=hf:me'), 'hf:me')
    one_line(run_here(work, 'sample.py', '--out_dir=hf:a/b/c'), 'hf:a/b/c')


def test_a_card_keeps_what_its_owner_wrote(work, tmp_path):
    shutil.copytree(work / 'out', tmp_path / 'out')
    card = tmp_path / 'out' / 'README.md'

    figures = {f'val_{name}': 2.5 for name in ('loss', 'ppl', 'bpb')} | dict(val_error=math.nan)
    defaults = json.loads((tmp_path / 'out' / 'config.json').read_text())['settings']

    def again():
        write_card(str(tmp_path / 'out'), figures, defaults | dict(out_dir='', n_head=0))

    text = card.read_text().replace('# license: mit    (to be', 'license: gpl')
    card.write_bytes(text.replace('+-', '?').encode() + b'\xff')  # one that is no UTF-8
    again()
    parts = ('\nlicense: gpl', '2.5000 +- nan', 'python train.py --out_dir=out --n_head=2\n')
    assert all(part in card.read_text() for part in parts)
    card.write_text('of my own')
    again()
    assert card.read_text() == 'of my own'


def test_an_optimiser_may_keep_states_of_any_shape():
    """Such as the rows and columns of a factored one."""
    weights = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.Adafactor([weights])
    weights.sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()['state']
    again = torch.optim.Adafactor([weights])
    load_optimizer(again, saved)
    assert torch.equal(again.state[weights]['row_var'], saved[0]['row_var'])


def test_an_optimisers_state_of_other_shapes_is_refused():
    """A fused step would read beyond such a tensor."""
    states = []
    for size in (3, 5):
        weights = torch.nn.Parameter(torch.ones(size))
        optimizer = torch.optim.AdamW([weights], fused=True)
        weights.sum().backward()
        optimizer.step()
        states.append(optimizer.state_dict()['state'])
    load_optimizer(optimizer, states[1])
    with pytest.raises(ValueError, match='shapes'):
        load_optimizer(optimizer, states[0])
    states[1][0]['step'] -= 9
    with pytest.raises(ValueError, match='negative'):
        load_optimizer(optimizer, states[1])
    states[1][0]['step'] += 9
    with pytest.raises(ValueError, match='shapes'):
        load_optimizer(optimizer, {0: states[1][0] | {'exp_avg': torch.zeros(())}})
    for part in ('exp_avg', 'exp_avg_sq'):
        moments = {name: m for name, m in states[1][0].items() if name != part}
        with pytest.raises(ValueError, match=f'lacks {part}'):
            load_optimizer(optimizer, {0: moments})
