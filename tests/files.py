"""What the tests of checkpoint.py and convert.py make files with."""
import io
import shutil
import zipfile
from pathlib import Path


def repacked(path, pickled):
    """The bytes of a file of torch.save's with another pickle in it, its checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, 'w') as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith('data.pkl') else old.read(name))
    return buffer.getvalue()


def hub_cache(folder, name, source):
    """Copy source to where huggingface_hub caches name: blobs, and a snapshot of links to them.
    Returns the environment in which it is found."""
    repo = folder / 'hub' / f'models--{name.replace("/", "--")}'
    commit = '0123456789abcdef0123456789abcdef01234567'
    for part in ('refs', 'blobs', f'snapshots/{commit}'):
        (repo / part).mkdir(parents=True)
    (repo / 'refs' / 'main').write_text(commit)
    for i, file in enumerate(sorted(Path(source).iterdir())):
        shutil.copy(file, repo / 'blobs' / str(i))
        (repo / 'snapshots' / commit / file.name).symlink_to(f'../../blobs/{i}')
    return dict(HF_HUB_CACHE=str(folder / 'hub'), HF_HUB_OFFLINE='1')
