"""Runs that are killed, pre-empted, resized and fed with bad numbers, through the command line."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from checkpoint import load_state, step_files
from configurator import UserError
from device import catch_signals, start_distributed
from helpers import (ROOT, SIGNALS, TINY, checkpoint, equal, good, log, one_line, project_with,
                     rewind, run, run_here, run_ranks, wrapped_loss)

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
QUICK = [*TINY, '--num_samples=0']
TWO_MICRO_BATCHES = ['--gradient_accumulation_steps=2', '--batch_size=2']


def same_run(a, b):
    a, b = checkpoint(a), checkpoint(b)
    return all(equal(a[key], b[key]) for key in ('weights', 'ema', 'optimizers'))


def wait_for_a_step(process):
    for line in process.stdout:
        if line.startswith('step'):
            return


def test_a_signal_ends_the_step_and_the_same_command_goes_on(work):
    """All that are caught, one after the other: each leaves a checkpoint, and the run is bit for
    bit the run."""
    args = [*QUICK, '--max_iters=300', '--eval_interval=125', '--log_interval=5',
            '--init_from=auto']
    good(run_here(work, 'train.py', *args, '--out_dir=calm'))
    for number in SIGNALS:
        train = subprocess.Popen(
            [sys.executable, ROOT / 'train.py', *args, '--out_dir=stormy'], cwd=work, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))   # or nohup's
        wait_for_a_step(train)
        train.send_signal(number)
        said = train.stdout.read()
        assert train.wait() == 128 + number, said
        assert f'{number.name}: stopped after step' in said
        assert checkpoint(work / 'stormy')['step'] < 300
    good(run_here(work, 'train.py', *args, '--out_dir=stormy'))
    assert same_run(work / 'calm', work / 'stormy')
    steps = [json.loads(line)['step'] for line in open(work / 'stormy' / 'log.jsonl')]
    assert steps == sorted([*range(5, 301, 5), 125, 250, 300])           # none twice, none lost
    assert log(work / 'calm', 'val_loss') == log(work / 'stormy', 'val_loss')


def test_a_closed_terminal_and_nohup():
    """A shell and the system each send SIGHUP, which is one reason to stop; nohup ignores it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        noted = catch_signals()
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        assert noted.caught == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        catch_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv('RANK', '2')
    monkeypatch.setenv('LOCAL_RANK', '2')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UserError, match='torch sees 2, so --nproc_per_node=2'):
        start_distributed('cuda')


def test_a_second_signal_stops_at_once(work, tmp_path):
    """The first says what is being finished, here a validation that takes a minute."""
    script = project_with(tmp_path, '''
def evaluate(*args):
    say('step')
    time.sleep(60)
''')
    train = subprocess.Popen(
        [sys.executable, script, *QUICK, '--eval_interval=2', '--log_interval=99',
         '--out_dir=twice'], cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_a_step(train)
    train.send_signal(signal.SIGINT)
    assert train.stdout.readline().startswith('SIGINT: finishing the validation')
    train.send_signal(signal.SIGINT)
    said = train.stdout.read()
    assert train.wait(timeout=30) == 130 and said == 'SIGINT: stopped at once\n', said
    assert not list((work / 'twice').glob('*.tmp'))


def test_a_signal_ends_the_final_samples(work, tmp_path, number=signal.SIGINT):
    script = project_with(tmp_path, '')
    (tmp_path / 'sample.py').write_text("import time\nprint('step', flush=True)\ntime.sleep(60)")
    train = subprocess.Popen(
        [sys.executable, script, *TINY, '--max_iters=2', '--log_interval=99', '--eval_interval=99',
         '--init_from=auto', '--out_dir=texts'], cwd=work, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    for line in train.stdout:                            # 'step 2: val loss', then sample.py's
        if line == 'step\n':
            break
    train.send_signal(number)
    said = train.stdout.read()                           # to its end: sample.py is gone as well
    assert train.wait(timeout=30) == 128 + number and said == f'{number.name}: stopped at once\n'
    assert checkpoint(work / 'texts')['step'] == 2


def test_a_folder_with_a_living_run_is_left_alone(work):
    """Whatever a second run would do there. The kernel unlocks it when the first is killed."""
    args = [*QUICK, '--out_dir=alive', '--max_iters=100000', '--checkpoint_interval=1']
    first = subprocess.Popen([sys.executable, ROOT / 'train.py', *args], cwd=work, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_a_step(first)
    for start in ('scratch', 'resume', 'auto'):
        done = run_here(work, 'train.py', *args, f'--init_from={start}')
        one_line(done, 'alive is in use', f'host {socket.gethostname()}', f'process {first.pid}')
    one_line(run_here(work, 'train.py', *args, '--dataset=none'), 'alive is in use')
    good(run_here(work, 'train.py', *args, '--eval_only'))
    assert first.poll() is None
    first.kill()
    first.wait()
    assert not list(work.glob('alive-*'))
    step = checkpoint(work / 'alive')['step']
    good(run_here(work, 'train.py', *args, f'--max_iters={step + 1}', '--init_from=auto'))


@pytest.mark.parametrize('console', ['| head -1', '> /dev/full', '>&-'])
def test_a_run_goes_on_without_its_console(work, console):
    out = f'mute{len(console)}'
    done = subprocess.run(
        ['bash', '-c', f'"$@" {console}; exit $PIPESTATUS', '-', sys.executable, ROOT / 'train.py',
         *(QUICK if 'head' in console else TINY), '--max_iters=4', f'--out_dir={out}'], cwd=work,
        capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert done.stdout.count('\n') == ('head' in console)
    assert log(work / out, 'step') == [1, 2, 3, 4, 4]
    assert checkpoint(work / out)['step'] == 4


def test_a_terminal_of_few_letters(work):
    """All that a script says is said, with escapes; so do those that train.py starts."""
    env = os.environ | dict(PYTHONIOENCODING='ascii')
    prepared = good(run(work, 'prepare.py', 'tiny.txt', '--tokenizer=bytes', '--name=naïve',
                        env=env))
    assert prepared.startswith('data/na\\xefve: ')
    done = run(work, 'train.py', *TINY, '--max_iters=1', '--out_dir=naïve', '--dataset=naïve',
               env=env)
    said = good(done)
    assert 'wrote na\\xefve/curve.png' in said and 'network calls' in said and not done.stderr
    assert '1 rows of na\\xefve/val' in good(
        run(work, 'eval.py', '--out_dir=naïve', '--max_rows=1', env=env))


def test_an_evaluation_goes_on_without_its_console(work):
    done = subprocess.run(['bash', '-c', '"$@" >&-', '-', sys.executable, ROOT / 'eval.py',
                           '--max_rows=1'], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '', done.stderr


def test_torchrun_passes_the_signal_on(work):
    """As a scheduler does it: SIGTERM to torchrun, on two processes; then one process goes on."""
    args = [*QUICK, *TWO_MICRO_BATCHES, '--out_dir=pass', '--init_from=auto']
    train = subprocess.Popen(
        [*TORCHRUN, '--standalone', '--nproc_per_node=2', ROOT / 'train.py', *args,
         '--max_iters=100000', '--eval_interval=100000'],
        cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_for_a_step(train)
    train.send_signal(signal.SIGTERM)
    said = train.stdout.read()
    step = checkpoint(work / 'pass')['step']
    assert train.wait() != 0 and f'SIGTERM: stopped after step {step}' in said
    good(run_here(work, 'train.py', *args, f'--max_iters={step + 2}'))
    assert checkpoint(work / 'pass')['step'] == step + 2


def test_checkpoints_by_step_and_the_last_few_stay(work):
    args = [*QUICK, '--eval_interval=100']
    good(run_here(work, 'train.py', *args, '--out_dir=often', '--checkpoint_interval=3',
                  '--keep_last=3'))
    paths = step_files(work / 'often')
    assert [path.name for path in paths] == [f'step-{step:08}.pt' for step in (12, 9, 6)]
    newest = torch.load(paths[0], weights_only=True)
    assert equal(load_state(work / 'often')['weights'], newest['weights'])
    good(run_here(work, 'train.py', *args, '--out_dir=minutes', '--checkpoint_minutes=1e-9',
                  '--keep_last=99'))
    assert len(step_files(work / 'minutes')) == 12


@pytest.mark.parametrize('damage', ['flip', 'gone'])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(work, tmp_path, damage):
    """(Kinds of damage are test_checkpoint.py's.)"""
    out = rewind(work / 'out', tmp_path / 'out', 12)
    path = out / 'step-00000012.pt'
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    if damage == 'gone':
        path.unlink()
    said = good(run_here(work, 'train.py', *QUICK, f'--out_dir={out}', '--init_from=auto'))
    assert 'step-00000008.pt' in said
    assert same_run(work / 'out', out)
    assert log(work / 'out') == log(out)


def test_a_bad_step_is_skipped_and_counted(work, tmp_path):
    bad_loss = wrapped_loss("loss * (float('nan') if step in (2, 3, 7) else 1)")
    script = project_with(tmp_path, bad_loss)
    said = good(run_here(work, script, *QUICK, '--out_dir=hiccup', '--checkpoint_interval=2',
                         '--keep_last=99'))
    assert '3 steps skipped' in said and log(work / 'hiccup', 'skipped')[-1] == 3
    state = checkpoint(work / 'hiccup')
    assert state['counts'][2] == 3
    adamw, _ = state['optimizers']
    assert all(s['step'] == 9 for s in adamw.values())          # it saw none of the three
    two, four = (torch.load(work / 'hiccup' / f'step-{step:08}.pt', weights_only=True)
                 for step in (2, 4))
    assert equal(two['weights'], four['weights'])


def test_too_many_bad_steps_end_the_run_and_say_where(work, tmp_path):
    script = project_with(tmp_path, wrapped_loss("loss * (float('inf') if step >= 6 else 1)"))
    done = run_here(work, script, *QUICK, '--out_dir=wild', '--max_bad_steps=3')
    one_line(done, 'rank 0', '4 steps in a row', 'by 10', 'wild')
    assert checkpoint(work / 'wild')['step'] == 8


def test_an_interval_of_bad_steps_has_no_loss_and_a_stopped_run_no_curve(work, tmp_path):
    script = project_with(tmp_path, wrapped_loss("loss * float('nan')"))
    good(run_here(work, script, *QUICK, '--out_dir=nothing', '--max_iters=4'))
    assert log(work / 'nothing') == [None] * 4
    assert log(work / 'nothing', 'skipped')[-1] == 4
    (work / 'nothing' / 'log.jsonl').write_text('')
    one_line(run_here(work, 'plot.py', 'nothing'), 'no validation')


def test_one_ranks_bad_loss_is_everyones_bad_step(work, tmp_path):
    """Two processes, one of them with a bad loss at step 2, are one process with a bad step 2."""
    bad = "loss * (float('nan') if step == 2 and os.environ.get('RANK', '1') == '1' else 1)"
    script = project_with(tmp_path, wrapped_loss(bad))
    args = [*QUICK, *TWO_MICRO_BATCHES]
    good(run_ranks(work, script, *args, '--out_dir=uneven'))
    good(run_here(work, script, *args, '--out_dir=alone'))
    assert log(work / 'uneven', 'skipped') == [0, 0] + [1] * 10
    for key in ('loss', 'val_loss'):
        two, one = log(work / 'uneven', key), log(work / 'alone', key)
        if key == 'loss':
            assert two.pop(2) is None and one.pop(2) is None
        assert two == pytest.approx(one, rel=1e-5)


def test_more_or_fewer_processes_after_a_stop_are_the_same_run(work):
    """1 -> 2 -> 1 processes."""
    args = [*QUICK, *TWO_MICRO_BATCHES, '--keep_last=99', '--init_from=auto']
    good(run_here(work, 'train.py', *args, '--out_dir=steady'))
    rewind(work / 'steady', work / 'two', 4)
    good(run_ranks(work, 'train.py', *args, '--out_dir=two'))
    rewind(work / 'two', work / 'elastic', 8)
    good(run_here(work, 'train.py', *args, '--out_dir=elastic'))
    for key in ('loss', 'val_loss', 'step'):
        for folder in ('two', 'elastic'):
            assert log(work / folder, key) == pytest.approx(log(work / 'steady', key), rel=1e-5)


def test_too_few_micro_batches_for_the_processes(work):
    done = run_ranks(work, 'train.py', *QUICK, '--out_dir=never')
    assert done.returncode == 1
    assert 'must be a multiple of the number of processes (2)' in done.stderr
    assert 'train.py", line' not in done.stderr


def test_a_dead_rank_ends_the_job(work, tmp_path):
    """Killed, so it can say nothing; the others must not wait half an hour for it."""
    dies = "loss if os.environ['RANK'] == '0' or step < 3 else os.kill(os.getpid(), 9)"
    script = project_with(tmp_path, wrapped_loss(dies))
    done = subprocess.run(
        [*TORCHRUN, '--standalone', '--nproc_per_node=2', script, *QUICK, *TWO_MICRO_BATCHES,
         '--out_dir=dies'], cwd=work, capture_output=True, text=True, timeout=150)
    assert done.returncode != 0 and 'SIGKILL' in done.stderr


def test_two_nodes(work):
    """Two torchrun agents that find each other by address, as on two machines."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    agents = []
    for node in range(2):
        agents.append(subprocess.Popen(
            [*TORCHRUN, '--nnodes=2', f'--node_rank={node}', '--nproc_per_node=1',
             '--master_addr=127.0.0.1', f'--master_port={port}', ROOT / 'train.py', *QUICK,
             *TWO_MICRO_BATCHES, '--out_dir=nodes', '--max_iters=4'],
            cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert [agent.wait(timeout=150) for agent in agents] == [0, 0]
    assert checkpoint(work / 'nodes')['step'] == 4


@pytest.mark.parametrize('script', ['sample.py', 'plot.py', 'convert.py'])
def test_a_config_nested_too_deep_is_one_line(work, tmp_path, script):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'config.json').write_text('[' * 200_000)
    (tmp_path / 'out' / 'log.jsonl').write_text('{"step": 1, "val_loss": 2}\n' + '[' * 200_000)
    args = ['out', 'new'] if script == 'convert.py' else ['out'] if script == 'plot.py' else []
    assert run_here(tmp_path, script, *args).returncode == 1


def test_a_compressed_checkpoint_and_a_negative_step_are_refused(work, tmp_path):
    bomb, negative = tmp_path / 'bomb', tmp_path / 'negative'
    shutil.copytree(work / 'out', bomb)
    for path in bomb.glob('*.pt'):
        path.unlink()
    with zipfile.ZipFile(bomb / 'step-00000012.pt', 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('last/data.pkl', bytes(10 ** 7))
    one_line(run_here(work, 'train.py', *QUICK, f'--out_dir={bomb}', '--init_from=resume'), 'bomb')
    shutil.copytree(work / 'out', negative)
    state = checkpoint(negative)
    torch.save(state | dict(step=-5), step_files(negative)[0])
    one_line(run_here(work, 'train.py', *QUICK, f'--out_dir={negative}', '--init_from=resume'),
             'negative')


def test_data_that_changed_is_noticed(work, tmp_path):
    folder = tmp_path / 'data' / 'tiny'
    folder.mkdir(parents=True)
    for path in (work / 'data' / 'tiny').iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rewind(work / 'out', tmp_path / 'out', 8)
    path = folder / 'train.bin'
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[: len(tokens) // 2] = 97
    tokens.tofile(path)
    resumed = run_here(tmp_path, 'train.py', *QUICK, '--init_from=resume')
    one_line(resumed, 'token files', 'tiny')
    tokens[5] = 300
    tokens.tofile(path)
    one_line(run_here(tmp_path, 'train.py', *QUICK, '--out_dir=new'), 'token 300', '256')
    tokens[:-10].tofile(path)
    one_line(run_here(tmp_path, 'train.py', *QUICK, '--out_dir=new'), 'train.bin holds')


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(work, tmp_path):
    out = rewind(work / 'out', tmp_path / 'full', 8)
    before = step_files(out)[0].read_bytes()
    done = subprocess.run(
        ['bash', '-c', 'ulimit -f 200; exec "$@"', '-', sys.executable, ROOT / 'train.py', *QUICK,
         f'--out_dir={out}', '--init_from=resume'], cwd=work, capture_output=True, text=True)
    one_line(done, 'cannot write', 'is kept')
    assert step_files(out)[0].read_bytes() == before
    assert load_state(out)['step'] == 8


def test_a_resume_of_something_else_is_refused(work):
    resume = [*QUICK, '--init_from=resume']
    one_line(run_here(work, 'train.py', *resume, '--objective=dcd'), 'another kind of run')
    one_line(run_here(work, 'train.py', *resume, '--n_layer=2'), 'another model')
