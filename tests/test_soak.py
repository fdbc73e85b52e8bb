"""A short soak, and what longer ones and the fuzz found."""
import json
import re

import pytest

from checkpoint import load_model, save
from helpers import TINY, checkpoint, good, log, run


def test_a_run_survives_what_befalls_it(tmp_path):
    said = good(run(tmp_path, 'tests/soak.py', '--minutes=0.15', '--seed=3'))
    launches, kills = map(int, re.match(r'\d+ runs of 40 steps in (\d+) launches: (\d+) kills', said).groups())
    assert launches > kills >= 1


def test_a_signal_during_validation_stops_all_ranks_at_the_same_step(work):
    """It comes to rank 0 alone, before the last step; done and stopped at once, the run is validated the next time."""
    (work / 'kick.py').write_text('''import os, signal, sys
_main = sys.modules['__main__']
_old = _main.evaluate
def _new(*args):
    if os.environ.get('RANK') == '0':
        os.kill(os.getpid(), signal.SIGUSR1)
    return _old(*args)
_main.evaluate = _new
''')
    args = [*TINY, 'kick.py', '--max_iters=5', '--gradient_accumulation_steps=2', '--out_dir=kicked',
            '--init_from=auto']
    two = run(work, 'train.py', *args, launcher=['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'])
    assert two.returncode != 0 and 'SIGUSR1: stopped after step 5' in two.stdout, two.stdout
    assert 'train.py", line' not in two.stderr and len(log(work / 'kicked', 'val_loss')) == 1, two.stderr
    good(run(work, 'train.py', *args))
    assert log(work / 'kicked', 'step') == [1, 2, 3, 4, 4, 5, 5]
    assert checkpoint(work / 'kicked')['val_loss'] == pytest.approx(log(work / 'kicked', 'val_loss')[-1], abs=1e-5)


def test_a_run_of_no_steps_and_a_log_without_a_checkpoint(work):
    """Killed before the first checkpoint, a run begins anew, and so does its log."""
    (work / 'none').mkdir()
    (work / 'none' / 'log.jsonl').write_text(json.dumps(dict(step=1, loss=9.0)) + '\n')
    good(run(work, 'train.py', *TINY, '--max_iters=0', '--out_dir=none', '--init_from=auto'))
    assert log(work / 'none', 'step') == [0] and checkpoint(work / 'none')['step'] == 0


def test_old_checkpoints_go_and_nothing_else(work, tmp_path):
    (model, info), state = load_model(str(work / 'out')), checkpoint(work / 'out')
    write = lambda step: save(tmp_path, state | {'step': step}, model, info, work / 'data/tiny')
    write(4), write(8)
    (tmp_path / 'step-best.pt').touch()                        # somebody's
    (tmp_path / 'step-00000007.pt.tmp').touch()                # of a run that was killed as it wrote
    write(5), write(6)                                         # 8 was damaged: it went on from 4
    assert sorted(path.name for path in tmp_path.glob('step-*')) == [
        'step-00000005.pt', 'step-00000006.pt', 'step-best.pt']
