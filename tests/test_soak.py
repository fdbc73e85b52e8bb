import re

from helpers import good, run


def test_a_run_survives_what_befalls_it(tmp_path):
    said = good(run(tmp_path, 'tests/soak.py', '--minutes=0.2', '--seed=0'))
    runs, launches, kills = map(int, re.match(r'(\d+) runs of 40 steps in (\d+) launches: (\d+) kills', said).groups())
    assert runs >= 2 and kills >= 2 and launches >= runs + kills
