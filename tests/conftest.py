import os

import pytest
import torch

from helpers import TINY, good, run

# Tiny tensors: threads cost more than they bring, and test processes run beside each other.
os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)


@pytest.fixture(scope='session')
def work(tmp_path_factory):
    """A folder with a small data set and a finished run of Duo in out/."""
    folder = tmp_path_factory.mktemp('work')
    lines = (f'This is line {i} of a small text, and {i * i} is its square.' for i in range(400))
    (folder / 'tiny.txt').write_text('\n\n'.join(lines))
    good(run(folder, 'prepare.py', 'tiny.txt', '--tokenizer', 'bytes'))
    (folder / 'stdout').write_text(good(run(folder, 'train.py', *TINY)))
    return folder
