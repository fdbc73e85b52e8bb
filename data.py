"""
Token files and tokenizers: what prepare.py writes, and train.py, sample.py and eval.py read.

A data set is a folder: train.bin and val.bin, flat streams of uint16 (uint32 for more than 65,535
tokens in the vocabulary), meta.json (the tokenizer, its size, its special ids, the counts) and, for
a tokenizer that has a file, tokenizer.json. In a packed set, eos ends every document (except in the
zero-shot sets), and rows are cut anywhere. In a padded set (pad_id is a number), every document is
a row, and train.idx and val.idx say where it begins: int64, one entry more than documents.
train.bytes, val.bytes: how many bytes of text each token of the vocabulary stands for, float64.
"""
import functools
import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from configurator import UserError

# Neither a byte-level BPE nor WordPiece merges across a newline between two words. So texts are
# encoded line by line: the tokens are the same, while a whole book at once would take `tokenizers`
# several times the time, and gigabytes.
LINE_ENDS = re.compile(r'(?<=\S\n)(?=\S)')


class Tokenizer(NamedTuple):
    encode: Callable  # text -> list of ids, no special ones added
    decode: Callable  # a list or 1-d array of ids -> text; eos is a blank line, broken bytes U+FFFD
    size: Callable    # an id -> how many bytes of text it stands for, by its spelling


def load_tokenizer(meta, folder):
    """The Tokenizer that meta names; folder is where its tokenizer.json lies, if it has one."""
    name, eos = meta['tokenizer'], meta['eos_id']
    if name == 'bytes':
        encode = lambda text: list(text.encode())
        decode = lambda ids: bytes(ids).decode('utf-8', 'replace')
        size = lambda i: 1
    elif name == 'gpt2':
        import tiktoken
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except (OSError, ValueError) as error:
            raise UserError(f'the gpt2 tokenizer could not be fetched ({type(error).__name__}): go '
                            'online once, or set TIKTOKEN_CACHE_DIR to a folder that has it')
        encode, decode = gpt2.encode_ordinary, gpt2.decode
        size = lambda i: len(gpt2.decode_single_token_bytes(i))
    else:
        encode, decode, size = load_file(Path(folder, 'tokenizer.json'),
                                         meta.get('tokenizer_sha256'))
    hidden = {meta.get('bos_id'), meta.get('pad_id')} - {eos}
    marks = {eos: '\n\n', meta.get('vocab_size'): '_'}   # without a text: eos, MDLM's mask

    def decode_with_marks(ids):
        shown = [i for i in np.asarray(ids).tolist() if i not in hidden]
        text = ''
        for mark, run in itertools.groupby(shown, marks.get):
            run = list(run)
            text += decode(run) if mark is None else mark * len(run)
        return text

    return Tokenizer(encode, decode_with_marks, size)


def guarded(message, function, *args):
    """Call a function of `tokenizers`. Any failure becomes a UserError: the library raises bare
    Exceptions, and its panics are not even Exceptions."""
    try:
        return function(*args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f'{message} ({error!s:.200})')


def load_file(path, sha256):
    """encode, decode and size from a tokenizer.json whose hash is sha256 (None: any file)."""
    import tokenizers
    call = functools.partial(guarded, f'{path} is no usable tokenizer: put the right one there')
    raw = call(path.read_bytes)
    if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
        raise UserError(f'{path} is not the one that these tokens were made with')
    tokenizer = call(tokenizers.Tokenizer.from_buffer, raw)
    tokenizer.encode_special_tokens = True  # an <|endoftext|> that stands in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text):
        found = tokenizer.encode_batch_fast(LINE_ENDS.split(text), add_special_tokens=False)
        return [i for line in found for i in line.ids]

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False)

    # in a byte-level vocabulary each character of a token is a byte
    size = lambda i: len(tokenizer.id_to_token(i) or '')
    return functools.partial(call, encode), functools.partial(call, decode), size


def tokenizer_difference(meta, other):
    """How two metas differ in numbering tokens, in words, or ''. Tokenizers are compared by the
    hash of their files or, if one has no file (as the authors' models), by name."""
    have_files = meta.get('tokenizer_sha256') and other.get('tokenizer_sha256')
    keys = ('tokenizer_sha256', 'bos_id', 'eos_id') if have_files else ('tokenizer',)
    return ', '.join(f'{key} {meta[key]!s:.16} and {other[key]!s:.16}'
                     for key in ('vocab_size', *keys) if meta[key] != other[key])


def check_meta(meta):
    """ValueError if meta, or the data of a config.json, has impossible token ids or sizes."""
    size, pad = meta['vocab_size'], meta['pad_id']
    ids = [meta['bos_id'], meta['eos_id'], meta['eos_id'] if pad is None else pad]
    ints = {type(i) for i in [size, *ids]} == {int}
    if not (ints and 0 <= min(ids) <= max(ids) < size and 2 <= size < 2**20):
        raise ValueError(f'bos_id, eos_id and pad_id cannot be {ids!r:.40} of {size!r:.40} tokens')
    if size != {'bytes': 256, 'gpt2': 50257}.get(str(meta['tokenizer']), size):
        raise ValueError(f'{meta["tokenizer"]} has not {size} tokens')


def load_data(folder):
    """-> meta, {'train': stream, 'val': stream}, memory-mapped and checked against meta. A stream
    is what num_rows and get_rows take: tokens, uint16 or uint32; where each document begins, int64,
    or None for a packed set; and the bytes of text per token of the vocabulary, float64."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        check_meta(meta)
        return meta, {split: load_stream(folder, split, meta) for split in ('train', 'val')}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f'no usable data set in {folder} ({type(error).__name__}: {error}): '
                        f'python prepare.py {folder.name} makes it if --help lists it; otherwise '
                        'see the first lines of the config file, or of the one it builds on'
                        ) from None


def token_dtype(vocab_size):
    """The type of the numbers in a token file."""
    return np.uint16 if vocab_size <= 65535 else np.uint32


def load_stream(folder, split, meta):
    count = meta[f'{split}_tokens']
    dtype = token_dtype(meta['vocab_size'])
    if count == 0:  # a zero-shot set has nothing to train on
        return np.empty(0, dtype), None, None
    tokens, starts = np.memmap(folder / f'{split}.bin', dtype, 'r'), None
    if len(tokens) != count:
        raise ValueError(f'{split}.bin holds {len(tokens)} tokens, not {count!r:.40}')
    if meta['pad_id'] is not None:
        starts = np.memmap(folder / f'{split}.idx', np.int64, 'r')
        if starts[0] or starts[-1] != count or (starts[1:] < starts[:-1]).any():
            raise ValueError(f'{split}.idx does not divide the {count} tokens of {split}.bin')
    sizes = np.memmap(folder / f'{split}.bytes', float, 'r', shape=meta['vocab_size'])
    if not 0 <= sizes.min() <= sizes.max() < 2**20:
        raise ValueError(f'{split}.bytes holds no numbers of bytes')
    return tokens, starts, sizes


def check_tokens(data, vocab_size, folder):
    """UserError if a stream holds a token that the tokenizer lacks. Reads all of it, at GB/s."""
    for split, (tokens, *_) in data.items():
        largest = tokens.max(initial=0)
        if largest >= vocab_size:
            raise UserError(f'{folder}/{split}.bin holds token {largest}, and the vocabulary has '
                            f'{vocab_size}: prepare it again')


def fingerprint(data):
    """A checksum of the streams' lengths and of one to two thousand tokens of each: rewritten
    data will not have it."""
    digest = hashlib.sha256()
    for tokens, *_ in data.values():
        some = tokens[::max(1, len(tokens) // 1000)]
        digest.update(f'{len(tokens)} {some.tolist()}'.encode())
    return digest.hexdigest()


def num_rows(stream, block_size):
    """How many rows a stream gives. A padded one: its documents; a packed one: each row takes
    block_size - 2 of its tokens, the remainder is dropped."""
    tokens, starts, *_ = stream
    n = block_size - 2
    rows = len(starts) - 1 if starts is not None else len(tokens) // max(n, 1)
    if n < 1 or rows < 1:
        raise UserError(f'{len(tokens)} tokens fill no row: block_size = {block_size} takes {n} of '
                        'them. Change it, or prepare more text or, for validation, with a larger '
                        '--val_fraction')
    return rows


def spans(stream, rows, block_size):
    """Where the tokens of rows stand in their stream, bos and eos not counted: begin, length, int64
    (len(rows),)."""
    _, starts, *_ = stream
    rows, n = np.asarray(rows), block_size - 2
    if starts is None:
        return rows * n, np.full_like(rows, n)
    return starts[rows], np.minimum(starts[rows + 1] - starts[rows], n)


def get_rows(stream, rows, block_size, meta):
    """-> int64 (len(rows), T), T = block_size: bos, the row's tokens, eos. A packed row has T - 2
    tokens of the stream; a padded one at most as many, and padding after its eos."""
    begin, length = (v[:, None] for v in spans(stream, rows, block_size))  # (rows, 1)
    place = np.arange(block_size) - 1                                 # (T,): bos is at -1
    out = np.where(place < length, meta['bos_id'], meta['eos_id'])
    out[place > length] = meta['pad_id'] or 0                         # nowhere in a packed row
    inside = (place >= 0) & (place < length)
    out[inside] = stream[0][(begin + place)[inside]]
    return out


def loss_mask(x0, pad_id):
    """(B,T) 1 where a token is scored, 0 where it pads; None where nothing does. x0 (B,T)."""
    return None if pad_id is None else (x0 != pad_id).float()


@functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def permutation(n_rows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def epoch_rows(index, n_rows, seed):
    """Row numbers for int64 sample counters 0, 1, 2, ... of the whole run: every epoch visits every
    row once, in an order made from (seed, epoch) alone, so a resumed run has no loader state to
    restore."""
    epochs, places = np.divmod(index, n_rows)
    rows = [permutation(n_rows, seed, epoch)[place] for epoch, place in zip(epochs, places)]
    return np.array(rows, np.int64)


def get_batch(stream, rows, block_size, meta, device):
    """get_rows as a tensor x0 (B,T) on the device; the CPU does not wait for the copy."""
    import torch
    x0 = torch.from_numpy(get_rows(stream, rows, block_size, meta))
    if device.startswith('cuda'):
        x0 = x0.pin_memory()
    return x0.to(device, non_blocking=True)


def likelihood_figures(nats, objective, stream, rows, block_size, split):
    """The metric in words and as numbers: nats (n,) per token of each row -> text, dict. error is
    the standard error of the mean; bits per byte are of the text, not of bos and eos."""
    loss = nats.mean().item()
    if not math.isfinite(loss):
        raise UserError(f'the {split} loss is {loss}: no figures')
    error = (nats.std() / math.sqrt(len(nats))).item() if len(nats) > 1 else math.nan
    tokens, _, sizes, *_ = stream
    begin, length = spans(stream, rows, block_size)
    text_bytes = sum(sizes[tokens[i:i + n]].sum() for i, n in zip(begin, length)).item()
    edges = 1 if objective == 'ar' else 2                       # AR is given the first of a row
    bpd = loss / math.log(2)
    ppl = math.exp(min(loss, 99))
    bpb = bpd * (length + edges).sum().item() / max(text_bytes, 1)
    text = f'{loss:.4f} +- {error:.4f} nats, PPL {ppl:.2f}, {bpb:.4f} bits per byte'
    return text, dict(loss=loss, error=error, bpd=bpd, ppl=ppl, bpb=bpb)


def loss_by_noise(nats, objective):
    """A dict of the mean loss in each quarter of the times, empty for AR. nats (n,): of rows in the
    order of their times."""
    if objective == 'ar':
        return {}
    parts = nats.tensor_split(4)
    return {f'loss_q{i}': part.mean().item() for i, part in enumerate(parts, start=1)}
