"""A short soak, and what longer ones found."""
import json
import re

from helpers import TINY, checkpoint, good, log, project_with, run, run_here, run_ranks

QUICK = [*TINY, '--num_samples=0']


def test_a_run_survives_what_befalls_it(tmp_path):
    said = good(run(tmp_path, 'tests/soak.py', '--minutes=0.01', '--seed=3'))
    found = re.match(r'\d+ runs of 40 steps in (\d+) launches: (\d+) kills', said)
    launches, kills = map(int, found.groups())
    assert launches > kills >= 1


def test_a_signal_during_validation_stops_all_ranks_at_the_same_step(work, tmp_path):
    """It comes to rank 0 alone, before the last step; done and stopped at once, the run is
    validated the next time."""
    script = project_with(tmp_path, '''
import os
_evaluate = evaluate


def evaluate(*args):
    if os.environ.get('RANK') == '0':
        os.kill(os.getpid(), signal.SIGUSR1)
    return _evaluate(*args)
''')
    args = [*QUICK, '--max_iters=5', '--gradient_accumulation_steps=2', '--out_dir=kicked',
            '--init_from=auto']
    two = run_ranks(work, script, *args)
    assert two.returncode != 0 and 'SIGUSR1: stopped after step 5' in two.stdout, two.stdout
    assert 'train.py", line' not in two.stderr, two.stderr
    assert len(log(work / 'kicked', 'val_loss')) == 1
    good(run_here(work, script, *args))
    assert log(work / 'kicked', 'step') == [1, 2, 3, 4, 4, 5, 5]


def test_a_log_without_a_checkpoint(work):
    """Killed before the first checkpoint, a run begins anew, and so does its log."""
    (work / 'none').mkdir()
    (work / 'none' / 'log.jsonl').write_text(json.dumps(dict(step=1, loss=9.0)) + '\n')
    good(run_here(work, 'train.py', *QUICK, '--max_iters=1', '--out_dir=none', '--init_from=auto'))
    assert log(work / 'none', 'step') == [1, 1]
    assert 9.0 not in log(work / 'none')
    assert checkpoint(work / 'none')['step'] == 1
