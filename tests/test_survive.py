"""Runs that are killed, pre-empted, resized and fed with bad numbers, through the command line."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from checkpoint import load_state, milestones
from helpers import ROOT, TINY, checkpoint, equal, good, log, one_line, run

TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


def same_run(a, b):
    return all(equal(checkpoint(a)[key], checkpoint(b)[key]) for key in ('weights', 'ema', 'optimizer'))


def wrap_loss(folder, name, body):
    """An override file that puts body around train.py's training_loss: it sees loss() and step."""
    (folder / name).write_text(f'''import os, sys
_main = sys.modules['__main__']
_old = _main.training_loss
def _new(model, x0, u, step, *rest):
    loss = lambda: _old(model, x0, u, step, *rest)
    {body}
_main.training_loss = _new
''')
    return name


def test_a_signal_ends_the_step_and_the_same_command_goes_on(work):
    """SIGTERM, SIGINT, SIGUSR1, one after the other: each leaves a checkpoint, and the run is bit for bit the run."""
    args = [*TINY, '--max_iters=400', '--curriculum_iters=200', '--eval_interval=150', '--log_interval=5', '--init_from=auto',
            '--n_embd=64', '--batch_size=16']
    good(run(work, 'train.py', *args, '--out_dir=calm'))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        train = subprocess.Popen([sys.executable, ROOT / 'train.py', *args, '--out_dir=stormy'], cwd=work, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in train.stdout:                                         # as soon as it takes steps
            if line.startswith('step'):
                break
        train.send_signal(number)
        said = train.stdout.read()
        assert train.wait() == 128 + number and f'{number.name}: stopped after step' in said, said
        assert checkpoint(work / 'stormy')['step'] < 400
    good(run(work, 'train.py', *args, '--out_dir=stormy'))
    assert same_run(work / 'calm', work / 'stormy')
    assert [json.loads(s)['step'] for s in open(work / 'stormy' / 'log.jsonl')] == sorted(
        [*range(5, 401, 5), 150, 300, 400])                               # nothing twice, nothing lost
    assert log(work / 'calm', 'val_loss') == log(work / 'stormy', 'val_loss')


def test_torchrun_passes_the_signal_on(work):
    """As a scheduler does it: SIGTERM to torchrun, on two processes; then the same command again."""
    args = [*TORCHRUN, ROOT / 'train.py', *TINY, '--gradient_accumulation_steps=2', '--batch_size=2', '--max_iters=100000',
            '--eval_interval=100000', '--out_dir=pass', '--init_from=auto']
    train = subprocess.Popen([sys.executable, *args], cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in train.stdout:
        if line.startswith('step'):
            break
    train.send_signal(signal.SIGTERM)
    said = train.stdout.read()
    step = checkpoint(work / 'pass')['step']
    assert train.wait() != 0 and f'SIGTERM: stopped after step {step}' in said
    good(run(work, 'train.py', *args[len(TORCHRUN) + 1:], f'--max_iters={step + 2}'))
    assert checkpoint(work / 'pass')['step'] == step + 2


def test_checkpoints_by_step_and_the_last_few_stay(work):
    good(run(work, 'train.py', *TINY, '--out_dir=often', '--eval_interval=100', '--checkpoint_interval=3', '--keep_last=3'))
    assert [path[-11:] for path in milestones(work / 'often')] == ['00000012.pt', '00000009.pt', '00000006.pt']
    assert equal(load_state(work / 'often')['weights'], torch.load(milestones(work / 'often')[0], weights_only=True)['weights'])
    good(run(work, 'train.py', *TINY, '--out_dir=minutes', '--eval_interval=100', '--checkpoint_minutes=1e-9', '--keep_last=99'))
    assert len(milestones(work / 'minutes')) == 12


@pytest.mark.parametrize('damage', ['cut', 'flip', 'gone', 'empty', 'text'])
def test_the_newest_whole_checkpoint_is_found(work, tmp_path, damage, capsys):
    """last.pt and the newest milestone are one file: damage to it takes both, and an older one must serve."""
    shutil.copytree(work / 'out', tmp_path / 'out')
    newest, older = milestones(tmp_path / 'out')[:2]
    last = tmp_path / 'out' / 'last.pt'
    whole = last.read_bytes()
    at = len(whole) // 2                                                  # in a tensor: only a checksum can tell
    if damage == 'gone':
        last.unlink(), os.remove(newest)
    else:
        for path in (last, newest):
            with open(path, 'wb') as f:
                f.write({'cut': whole[:at], 'flip': whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], 'empty': b'',
                         'text': b'not a checkpoint'}[damage])
    state = load_state(tmp_path / 'out')
    said = capsys.readouterr().out
    assert state['step'] == int(older[-11:-3]) and older in said and ('gone' if damage == 'gone' else 'cannot be used') in said
    os.remove(older)
    with pytest.raises(SystemExit) as e:
        load_state(tmp_path / 'out')
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)


def test_a_bad_step_is_skipped_and_counted(work):
    wrap_loss(work, 'hiccup.py', "return loss() * (float('nan') if step in (2, 3, 7) else 1)")
    said = good(run(work, 'train.py', *TINY, 'hiccup.py', '--out_dir=hiccup'))
    assert log(work / 'hiccup', 'skipped')[-1] == 3 and checkpoint(work / 'hiccup')['skipped'] == 3 and 'steps skipped' in said
    state = checkpoint(work / 'hiccup')['optimizer']['state']
    assert all(s['step'] == 9 for s in state.values())                    # AdamW took no notice of the three
    good(run(work, 'train.py', *TINY, '--out_dir=smooth', '--max_iters=2'))
    good(run(work, 'train.py', *TINY, 'hiccup.py', '--out_dir=short', '--max_iters=4'))
    assert equal(checkpoint(work / 'smooth')['weights'], checkpoint(work / 'short')['weights'])


def test_too_many_bad_steps_end_the_run_and_say_where(work):
    wrap_loss(work, 'wild.py', "return loss() * (float('inf') if step >= 6 else 1)")
    one_line(run(work, 'train.py', *TINY, 'wild.py', '--out_dir=wild', '--max_bad_steps=3'), 'rank 0', 'by 10', "'max_bad_steps': 3")
    assert checkpoint(work / 'wild')['step'] == 8


def test_one_ranks_bad_loss_is_everyones_bad_step(work):
    wrap_loss(work, 'uneven.py', "return loss() * (float('nan') if step == 2 and os.environ['RANK'] == '1' else 1)")
    two = ['--gradient_accumulation_steps=2', '--batch_size=2', '--out_dir=uneven']
    good(run(work, 'train.py', *TINY, 'uneven.py', *two, launcher=TORCHRUN))
    assert log(work / 'uneven', 'skipped')[-1] == 1 and len(log(work / 'uneven', 'val_loss')) == 3


def test_more_or_fewer_processes_after_a_stop_are_the_same_run(work):
    """1 -> 2 -> 1 processes."""
    args = [*TINY, '--gradient_accumulation_steps=2', '--batch_size=2']
    good(run(work, 'train.py', *args, '--out_dir=steady'))
    for steps, launcher in ((4, ()), (8, TORCHRUN), (12, ())):
        good(run(work, 'train.py', *args, '--out_dir=elastic', '--init_from=auto', f'--max_iters={steps}', launcher=launcher))
    assert log(work / 'elastic') == pytest.approx(log(work / 'steady'), rel=1e-5)
    assert log(work / 'elastic', 'val_loss')[-1] == pytest.approx(log(work / 'steady', 'val_loss')[-1], rel=1e-5)


def test_a_dead_rank_ends_the_job(work):
    """Killed, so it can say nothing; the others must not wait half an hour for it."""
    wrap_loss(work, 'dies.py', "os.kill(os.getpid(), 9) if step == 3 and os.environ['RANK'] == '1' else None; return loss()")
    done = subprocess.run([sys.executable, *TORCHRUN, ROOT / 'train.py', *TINY, 'dies.py', '--gradient_accumulation_steps=2',
                           '--batch_size=2', '--out_dir=dies'], cwd=work, capture_output=True, text=True, timeout=150)
    assert done.returncode != 0 and 'SIGKILL' in done.stderr


def test_two_nodes(work):
    """Two torchrun agents that find each other by address, as on two machines."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agents = [subprocess.Popen([
        sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', f'--node_rank={node}', '--nproc_per_node=1',
        '--master_addr=127.0.0.1', f'--master_port={port}', ROOT / 'train.py', *TINY, '--gradient_accumulation_steps=2',
        '--batch_size=2', '--out_dir=nodes', '--max_iters=4'], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for node in range(2)]
    assert [agent.wait(timeout=150) for agent in agents] == [0, 0]
    assert checkpoint(work / 'nodes')['step'] == 4


def test_data_that_changed_is_noticed(work, tmp_path):
    shutil.copytree(work / 'data' / 'tiny', tmp_path / 'data' / 'tiny')
    good(run(tmp_path, 'train.py', *TINY, '--max_iters=4'))
    path = tmp_path / 'data' / 'tiny' / 'train.bin'
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[: len(tokens) // 2] = 97
    tokens.tofile(path)
    one_line(run(tmp_path, 'train.py', *TINY, '--init_from=resume'), 'token files', 'tiny')
    tokens[5] = 300
    tokens.tofile(path)
    one_line(run(tmp_path, 'train.py', *TINY, '--out_dir=new'), 'token 300 of 256')
    tokens[:-10].tofile(path)
    one_line(run(tmp_path, 'train.py', *TINY, '--out_dir=new'), 'train.bin holds')


def test_a_dry_run_leaves_nothing(work):
    said = good(run(work, 'train.py', *TINY, '--dry_run', '--out_dir=dry', '--price_per_hour=3', '--max_iters=1000000'))
    assert not (work / 'dry').exists()
    assert all(word in said for word in ('parameters', 'tokens a step', 'peak memory', '1,000,000 of them', 'hours', 'price'))


def test_an_interval_of_bad_steps_has_no_loss_and_a_stopped_run_no_curve(work):
    wrap_loss(work, 'nothing.py', "return loss() * float('nan')")
    good(run(work, 'train.py', *TINY, 'nothing.py', '--out_dir=nothing', '--max_iters=4'))
    assert log(work / 'nothing') == [None] * 4 and log(work / 'nothing', 'skipped')[-1] == 4
    (work / 'nothing' / 'log.jsonl').write_text('')
    one_line(run(work, 'plot.py', 'nothing'), 'no validation')


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(work):
    good(run(work, 'train.py', *TINY, '--out_dir=full', '--max_iters=4'))
    before = (work / 'full' / 'last.pt').read_bytes()
    done = subprocess.run(['bash', '-c', 'ulimit -f 200; exec "$@"', '-', sys.executable, ROOT / 'train.py', *TINY, '--out_dir=full',
                           '--init_from=resume'], cwd=work, capture_output=True, text=True)
    one_line(done, 'cannot write a checkpoint into full')
    assert (work / 'full' / 'last.pt').read_bytes() == before and load_state(work / 'full')['step'] == 4


def test_a_resume_of_something_else_is_refused(work):
    one_line(run(work, 'train.py', *TINY, '--init_from=resume', '--objective=dcd'), 'another kind of run')
    one_line(run(work, 'train.py', *TINY, '--init_from=resume', '--n_layer=2'), 'another model')
