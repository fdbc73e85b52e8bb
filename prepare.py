"""
Text -> token files: data/NAME/{train,val}.bin and meta.json (data.py says what is in them).

    python prepare.py stdlib                          # Python's own source, found on this machine: no download
    python prepare.py book.txt                        # your text: of one file, the end validates ...
    python prepare.py notes/ more.txt --name notes    # ... of many, each a document, one in twenty does

A file that you name may be any UTF-8 text; of a folder I take every .txt and .md, at any depth.
"""
import argparse
import hashlib
import json
import os
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from data import LINE_ENDS, load_tokenizer

TOKENIZER, VOCAB_SIZE = 'bpe', 4096  # unless told otherwise; a small text gets fewer tokens (see prepare)
SPECIAL = {'bytes': (256, 0), 'bpe': (None, 0), 'gpt2': (50257, 50256)}  # vocab_size, and the id that is bos and eos
FILES = {'train.bin', 'val.bin', 'meta.json', 'tokenizer.json'}
SUFFIXES = ('.txt', '.md')
# Of the standard library I want what people wrote: no tests, no generated tables, nothing of this machine alone.
LEFT_OUT = {'test', 'tests', 'idle_test', 'encodings', 'pydoc_data', 'entities.py', 'stringprep.py', '_casefix.py',
            'site-packages', 'dist-packages', 'sitecustomize.py'}


def read_text(path):
    """The text of a UTF-8 file, its line ends made \\n and its byte order mark dropped."""
    raw = Path(path).read_bytes()
    if (at := raw.find(b'\0')) >= 0:
        raise SystemExit(f'{path} is not text: it has a NUL at byte {at}')
    try:
        return raw.decode().removeprefix('\ufeff').replace('\r\n', '\n')
    except UnicodeDecodeError as error:
        raise SystemExit(f'{path} is not UTF-8 from byte {error.start} on: convert it first')


def read_stdlib():
    """{name: text} of the standard library's source."""
    root, docs = Path(sysconfig.get_paths()['stdlib']), {}
    for path in root.rglob('*.py'):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts) and not path.name.startswith('_sysconfigdata') and path.stat().st_size < 1e6:
            try:
                docs[name.as_posix()] = read_text(path)
            except SystemExit:
                pass  # not UTF-8, on purpose: Python allows it
    if len(docs) < 2:
        raise SystemExit(f'the source of the standard library is not in {root}: prepare a text of yours instead')
    return {name: text for name, text in docs.items() if text.strip()}


def read_files(paths):
    """{name: text} of files and of folders' SUFFIXES files; names are relative to the folder that holds them all."""
    docs = {}
    for path in map(Path, paths):
        if not path.exists():
            raise SystemExit(f'{path}: no such file or folder')
        files = [path]
        if path.is_dir():  # hidden files stay out: .git, .venv, and what a Mac writes beside every file
            files = [f for f in path.rglob('*') if f.suffix.lower() in SUFFIXES and f.is_file()
                     and '/.' not in '/' + f.relative_to(path).as_posix()]
        found = {os.path.abspath(file): text for file in files if (text := read_text(file)).strip()}
        if not found:
            raise SystemExit(f'{path} has no text in it' + f' ({" or ".join(SUFFIXES)} files)' * path.is_dir())
        docs |= found
    root = os.path.commonpath([os.path.dirname(file) for file in docs])
    return {Path(file).relative_to(root).as_posix(): text for file, text in docs.items()}


BUILT_IN = {'stdlib': read_stdlib}


def split(docs, val_fraction):
    """{name: text} -> training texts, validation texts; neither is empty, and every run on every machine agrees."""
    if len(docs) == 1:  # I cannot see where its parts begin: its end validates, from a new paragraph, or line, on
        (text,) = docs.values()
        goal = round(len(text) * (1 - val_fraction))
        near = round(len(text) * min(val_fraction, 1 - val_fraction) / 2)
        cut = next(at + len(end) for end in ('\n\n', '\n', '') if (at := text.rfind(end, goal - near, goal)) >= 0)
        train, val = [text[:cut]], [text[cut:]]
    else:  # a name alone decides, so that a file which comes or goes moves no other
        score = {name: int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16) / 2**32 for name in sorted(docs)}
        ranked = sorted(score.values())
        bar = min(max(val_fraction, ranked[0]), ranked[-2])  # one file at least on either side
        train, val = ([docs[name] for name in score if (score[name] <= bar) == held] for held in (False, True))
    if not (''.join(train).strip() and ''.join(val).strip()):
        raise SystemExit(f'too little text to keep {val_fraction:.0%} of it for validation: prepare more')
    return train, val


def train_bpe(texts, vocab_size, path):
    """Learn a byte-level BPE whose id 0 ends a document, save it; returns its size, at most vocab_size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=['<|endoftext|>'], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # so it can spell anything
    bpe.train_from_iterator((line for text in texts for line in LINE_ENDS.split(text)), trainer)
    bpe.save(str(path))
    return bpe.get_vocab_size()


def prepare(paths, name=None, tokenizer=TOKENIZER, vocab_size=None, val_fraction=0.05, data_dir='data'):
    """Write the data set and return its meta. If anything goes wrong, an older one of that name stays as it was."""
    built_in = BUILT_IN.get(paths[0]) if len(paths) == 1 else None
    first = Path(os.path.abspath(paths[0]))
    if name is None:
        name = paths[0] if built_in else first.name if first.is_dir() else first.stem
    if not name or name[0] == '.' or name != Path(name).name or (name in BUILT_IN and not built_in):
        raise SystemExit(f'{name!r} will not do as the name of your data: choose another with --name')
    target = Path(data_dir, name)
    if target.exists() and (others := set(os.listdir(target)) - FILES):  # somebody's texts, say
        raise SystemExit(f'{target} holds {min(others)}, which is not mine to replace: choose another --name')
    if vocab_size is not None and tokenizer != 'bpe':
        raise SystemExit(f'--vocab_size is for bpe: drop it, {tokenizer} has a size of its own')
    if vocab_size is not None and not 257 <= vocab_size <= 65535:
        raise SystemExit(f'--vocab_size {vocab_size} must be 257 (every byte, and eos) to 65535 (what uint16 holds)')
    if not 0 < val_fraction < 1:
        raise SystemExit(f'--val_fraction {val_fraction} must lie between 0 and 1')

    docs = built_in() if built_in else read_files(paths)
    parts = dict(zip(('train', 'val'), split(docs, val_fraction)))

    # I write beside the target and rename at the end, so that whatever stands there is whole.
    os.makedirs(data_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.unfinished-', dir=data_dir) as scratch:
        new, digest, (size, eos) = Path(scratch, 'new'), hashlib.sha256(), SPECIAL[tokenizer]
        new.mkdir()
        meta = dict(name=name, tokenizer=tokenizer, tokenizer_sha256=None, vocab_size=size, bos_id=eos, eos_id=eos,
                    pad_id=None, dtype='uint16', documents=len(docs))
        if tokenizer == 'bpe':  # a small text cannot teach 4096 tokens: one for every 256 characters
            fits = min(VOCAB_SIZE, max(512, sum(map(len, parts['train'])) // 256))
            meta['vocab_size'] = train_bpe(parts['train'], vocab_size or fits, new / 'tokenizer.json')
            meta['tokenizer_sha256'] = hashlib.sha256((new / 'tokenizer.json').read_bytes()).hexdigest()
        encode = load_tokenizer(meta, new).encode
        for part, texts in parts.items():
            with open(new / f'{part}.bin', 'wb') as file:
                for text in texts:
                    tokens = np.array(encode(text) + [eos], dtype=np.uint16).tobytes()
                    file.write(tokens)
                    digest.update(tokens)
                meta[f'{part}_tokens'] = file.tell() // 2
            meta[f'{part}_bytes'] = sum(len(text.encode()) + 1 for text in texts)  # an eos counts as one
        meta['checksum'] = digest.hexdigest()  # of train.bin, then val.bin
        (new / 'meta.json').write_text(json.dumps(meta, indent=4) + '\n')
        if target.exists():
            target.rename(Path(scratch, 'old'))
        new.rename(target)
    return meta


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'prepare.py: {message} (see --help)\n')  # one line, like the others
    parser.add_argument('paths', nargs='+', help='stdlib, or files and folders of yours', metavar='stdlib|PATH')
    parser.add_argument('--name', help='what to call it; without it, as the first file or folder is called')
    parser.add_argument('--tokenizer', choices=SPECIAL, default=TOKENIZER, help=f'default: {TOKENIZER}')
    parser.add_argument('--vocab_size', type=int, help=f'of bpe; default: {VOCAB_SIZE}, less for under 1 MB of text')
    parser.add_argument('--val_fraction', type=float, default=0.05, help='share that validates; default: 0.05')
    parser.add_argument('--data_dir', default='data', help='where the data sets are; default: data')
    args, start = parser.parse_args(), time.perf_counter()
    try:
        meta = prepare(**vars(args))
    except KeyboardInterrupt:
        raise SystemExit('stopped: nothing was written')
    except ImportError as error:
        raise SystemExit(f'a package is missing: pip install {error.name}')
    except OSError as error:  # no permission, no space, ...
        raise SystemExit(f'nothing was written: {error}')
    tokens, size = (meta[f'train_{x}'] + meta[f'val_{x}'] for x in ('tokens', 'bytes'))
    print(f'{Path(args.data_dir, meta["name"])}: {meta["train_tokens"]:,} tokens to train on, {meta["val_tokens"]:,} to'
          f' validate; {meta["tokenizer"]}, vocabulary {meta["vocab_size"]:,}, {size / tokens:.2f} bytes per token; '
          f'documents: {meta["documents"]:,}; {time.perf_counter() - start:.1f} s')


if __name__ == '__main__':
    main()
