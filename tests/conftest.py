import pytest

from helpers import TINY, good, run


@pytest.fixture(scope='session')
def work(tmp_path_factory):
    """A folder with a small data set and a finished run of Duo in out/."""
    folder = tmp_path_factory.mktemp('work')
    lines = (f'This is line {i} of a small text, and {i * i} is its square.' for i in range(400))
    (folder / 'tiny.txt').write_text('\n\n'.join(lines))
    good(run(folder, 'prepare.py', 'tiny.txt', '--tokenizer', 'bytes'))
    (folder / 'stdout').write_text(good(run(folder, 'train.py', *TINY)))
    return folder
