"""
What a run leaves behind, written whole or not at all, and read without executing anything.

out_dir/step-00000600.pt    everything a resume needs
out_dir/model.safetensors   the EMA weights
out_dir/config.json         all else that sampling, evaluating or sharing needs
out_dir/tokenizer.json      where the tokenizer has a file
out_dir/log.jsonl           a line of numbers at each log and validation
out_dir/samples.txt         a text at each validation but the last
out_dir/README.md           the model card
out_dir/curve.png           the losses
out_dir/lock                locked by the run that is active here, and names it
out_dir/wandb_id            the run's id at wandb, with --wandb_log

This is nanoDuo's own format and the only one known here: convert.py reads and writes the authors'.
"""
import fcntl
import hashlib
import json
import math
import os
import pickle
import shlex
import shutil
import socket
import struct
import time
import zipfile
import zlib
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes

from configurator import UserError
from data import check_meta, tokenizer_difference
from device import say
from model import DiT, DiTConfig

# The entries, with their types, that the state of a run (STATE) and a config.json (INFO) must have.
STATE = dict(weights=dict, step=int, model=dict, settings=dict)
INFO = dict(objective=str, model=dict, data=dict, settings=dict)
# How the objectives' networks differ: tokens beyond the tokenizer's, and whether they are causal.
NETWORK_KINDS = dict(duo=(0, False), mdlm=(1, False), ar=(0, True))
# What zipfile and torch.load were seen to raise on damaged and crafted files: torch's unpickler
# executes nothing in them, but does not check operands. Caught around library calls only.
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError,
              struct.error, ValueError, RuntimeError, LookupError, TypeError, AttributeError,
              AssertionError)


def has_entries(found, kinds):
    """Is found a dict with entries of these types?"""
    return isinstance(found, dict) and all(
        isinstance(found.get(name), kind) for name, kind in kinds.items())


# --------------------------------------------------------------------------------------------------
# writing

def flush(path):
    """Force a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def write_whole(path, write):
    """write(temporary path), then flush and rename: a reader, or a restart after a power cut, finds
    the old file or the new one, never a part."""
    temporary = Path(path).with_name('unfinished.tmp')
    temporary.unlink(missing_ok=True)                   # of a write that was killed
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(temporary.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f'cannot write {path}: {error!s:.200}; what was there is kept')
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """In UTF-8; other bytes, which a path may have, are written as they are."""
    write_whole(path, lambda temporary: temporary.write_text(text, 'utf-8', 'surrogateescape'))


def step_files(out_dir):
    """The paths of its step-*.pt, the newest first."""
    return sorted(Path(out_dir).glob(f'step-{"[0-9]" * 8}.pt'), reverse=True)


def has_state(out_dir):
    """Is there anything to resume from?"""
    return bool(step_files(out_dir))


def checksum(weights, info):
    """sha256 of tensors, and of the entries of a config.json without which they mean nothing."""
    parts = [info.get('model'), info.get('data')]
    header = dict(parts=json.dumps(parts, sort_keys=True))
    return hashlib.sha256(tensor_bytes(weights, header)).hexdigest()


def all_finite(model):
    return all(w.isfinite().all() for w in model.parameters())


def write_model(folder, weights, info, tokenizer_from):
    """Write what load_model reads: model.safetensors, config.json and, where the folder
    tokenizer_from has one, tokenizer.json. weights: {name: tensor}; info: a JSON-able dict."""
    tokenizer = f'{tokenizer_from}/tokenizer.json'
    if os.path.exists(tokenizer):
        write_whole(f'{folder}/tokenizer.json', lambda path: shutil.copyfile(tokenizer, path))
    # copies, since safetensors refuses tensors that share memory, as tied weights do
    weights = {name: w.to('cpu', copy=True).contiguous() for name, w in weights.items()}
    header = dict(format='pt', sha256=checksum(weights, info))
    write_whole(f'{folder}/model.safetensors',
                lambda path: path.write_bytes(tensor_bytes(weights, header)))
    write_text(f'{folder}/config.json', json.dumps(info))


def save(out_dir, state, ema, info, data_folder, keep_last=2):
    """Write a checkpoint; the newest keep_last step files stay. state: the entries of STATE and any
    others; ema: the averaged DiT; info: config.json; data_folder: where tokenizer.json may be."""
    if not all_finite(ema):
        raise UserError(f'the weights are not finite at step {state["step"]}: {out_dir} keeps the '
                        'last good checkpoint; a lower --learning_rate may help')
    newest = Path(f'{out_dir}/step-{state["step"]:08}.pt')
    write_whole(newest, lambda path: torch.save(state, path))
    # A run that went back to an older step file leaves newer ones, no longer part of it.
    kept = [path for path in step_files(out_dir) if path <= newest][:keep_last]
    for path in step_files(out_dir):
        if path not in kept:
            path.unlink()
    # The state comes first: a scheduler may leave no time for more.
    write_model(out_dir, ema.state_dict(), info, data_folder)


# --------------------------------------------------------------------------------------------------
# reading

def read_torch(path, kinds):
    """torch.load of a dict with entries of these kinds, from a file that is whole."""
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
            if size > os.path.getsize(path):
                raise ValueError('it is compressed, which torch.save does not do')
            damaged = file.testzip()  # torch writes checksums, but does not read them
        if damaged:
            raise ValueError(f'{damaged} is damaged')
        found = torch.load(path, map_location='cpu', weights_only=True)
    except UNREADABLE as error:
        raise UserError(f'{path} cannot be used: {error!r:.200}')
    if not has_entries(found, kinds):
        raise UserError(f'{path} cannot be used: no dict with {", ".join(kinds)}')
    return found


def load_state(out_dir):
    """The state that save() was given last, from the newest undamaged file; prints which."""
    for path in step_files(out_dir):
        try:
            state = read_torch(path, STATE)
        except UserError as error:
            say(error)
        else:
            say(f'going on from {path}')
            return state
    raise UserError(f'no checkpoint in {out_dir} (step-*.pt) that can be used: train first, or '
                    'name another --out_dir')


def read_weights(path):
    """-> {name: tensor} of a .safetensors file, and its header, {str: str}."""
    try:
        with safe_open(path, 'pt') as file:  # mapped: nothing is allocated yet
            state = {name: file.get_tensor(name) for name in file.keys()}
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path} cannot be read: {error!s:.200}')
    return state, header


def fetch(where):
    """The folder `where`; for hf:ORG/NAME, its copy from the Hugging Face hub or from the cache."""
    if not str(where).startswith('hf:'):
        return Path(where)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(
            where[3:], allow_patterns=['*.json', 'model.safetensors']))
    except (OSError, ValueError) as error:  # not there, not reached, or no name of a repository
        raise UserError(f'cannot fetch {where}, and it is not in the cache: {error!s:.200}')


def read_config(folder):
    """What config.json holds; {} where there is none."""
    path = Path(f'{folder}/config.json')
    try:
        config = json.loads(path.read_text('utf-8')) if path.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError('no JSON object')
        return config
    except (OSError, ValueError, RecursionError) as error:  # not readable, not UTF-8, not JSON
        raise UserError(f'{path} cannot be read: {error!r:.200}')


def build_model(info, weights, where):
    """The DiT of info (config.json) with these weights, checked, in eval mode. A plain field that
    is added to DiTConfig needs no line here."""
    try:
        check_meta(info['data'])
        c = DiTConfig(**info['model'])  # a TypeError names a field that DiTConfig lacks
        sizes = astuple(c)[:6]          # vocab_size to cond_dim
        fine = all(type(size) is int and 0 < size < 1e6 for size in sizes)
        if not (fine and c.n_layer <= len(weights) and 0 <= c.dropout <= 1):
            raise ValueError('no network has such sizes')
        masks = c.vocab_size - info['data']['vocab_size']
        if NETWORK_KINDS.get(info['objective']) != (masks, c.causal):
            raise ValueError(f'no network for {info["objective"]!r:.40}')
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{where} has a wrong config.json: {error!s:.200}: {info["model"]}')
    with torch.device('meta'):  # no memory and no random numbers before the shapes are right
        model = DiT(c)
    try:  # torch names every tensor that is missing, unknown or of another shape
        model.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(f'{where}: the weights do not fit config.json, {info["model"]}: {error}')
    if not all_finite(model):
        raise UserError(f'{where}: the weights are not finite: its training went wrong')
    return model.eval().requires_grad_(False)


def load_model(where, device='cpu'):
    """-> model (DiT, EMA weights, eval mode) and info (config.json's dict, and the 'folder' it lies
    in). where: the folder of a run, or hf:ORG/NAME, such a folder on the Hugging Face hub."""
    folder = fetch(where)
    info = read_config(folder)
    if not has_entries(info, INFO):
        advice = 'run train.py first, or name another folder'
        if folder.exists():
            advice += ("; one in the authors' format is converted first: "
                       f'python convert.py {where} out-{Path(where).stem.removeprefix("hf:")}')
        raise UserError(f'no model of nanoDuo in {where}: {advice}')
    weights, header = read_weights(folder / 'model.safetensors')
    model = build_model(info, weights, where)
    if header.get('sha256') not in (None, checksum(weights, info)):
        raise UserError(f'{where}: config.json and model.safetensors are not of one run, or one of '
                        'them is damaged')
    return model.to(device), info | {'folder': str(folder)}


# --------------------------------------------------------------------------------------------------
# out_dir and its log

def lock_folder(folder):
    """Make the folder and lock it against other runs, until the returned file is closed or this
    process ends, in any way. UserError, naming it, if another run is active there."""
    os.makedirs(folder, exist_ok=True)
    file = open(f'{folder}/lock', 'a+')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f'{folder} is in use ({file.read()}): wait for that run to end, or name '
                        'another --out_dir')
    except OSError as error:
        say(f'{folder} cannot be locked ({error.strerror}): start no second run in it')
    file.truncate(0)
    file.write(f'host {socket.gethostname()}, process {os.getpid()}, since '
               f'{time.strftime("%Y-%m-%d %H:%M:%S")}')
    file.flush()
    return file


def set_aside_older_run(out_dir, lock):
    """An older run in out_dir is moved, not overwritten. Returns out_dir's lock."""
    if has_state(out_dir) or Path(f'{out_dir}/model.safetensors').exists():
        aside = out_dir.rstrip('/') + time.strftime('-%Y%m%d-%H%M%S')
        os.rename(out_dir, aside)
        say(f'{out_dir} held another run: it is in {aside} now')
        lock = lock_folder(out_dir)
    return lock


def open_log(out_dir, step):
    """log.jsonl, to append to, without the lines of steps that will be repeated."""
    path = Path(f'{out_dir}/log.jsonl')
    kept = ''
    for line in path.read_text('utf-8', 'replace').splitlines() if path.exists() else ():
        try:
            if json.loads(line)['step'] <= step:
                kept += f'{line}\n'
        except (ValueError, TypeError, LookupError, RecursionError):
            pass  # cut off by a power failure, or not a line of a run
    write_text(path, kept)
    return open(path, 'a', buffering=1)


def append_log(file, record):
    """One JSON line: a number that is not finite is null."""
    line = {name: None if type(value) is float and not math.isfinite(value) else value
            for name, value in record.items()}
    print(json.dumps(line), file=file)                   # unlike write(), allows a closed console


def check_resume(out_dir, state, settings, config, token_files):
    """The settings that changed since state was written, in words; UserError if state is not of
    this very run."""
    old = state['settings']
    changed = ', '.join(f'{name} {old.get(name)} -> {value}' for name, value in settings.items()
                        if value != old.get(name))
    if state['step'] < 0:
        raise ValueError('its step is negative')
    same = all(old.get(name) == settings[name] for name in ('objective', 'optimizer'))
    if DiTConfig(**state['model']) != config or not same:
        raise UserError(f'{out_dir} holds another model or another kind of run ({changed}): resume '
                        'it with its own command, or start a new run from it')
    if state['fingerprint'] != token_files:
        raise UserError(f'the token files of {settings["dataset"]} are not those that the run in '
                        f'{out_dir} began with: put them back, or start a new run')
    return changed


def check_start(source, info, kind, meta):
    """UserError unless a run of this kind, on the tokens of meta, can start from source's model."""
    if info['objective'] != kind:
        raise UserError(f'{source} is a network for {info["objective"]}, not for {kind}')
    difference = tokenizer_difference(info['data'], meta)
    if difference:
        raise UserError(f'{source} has another tokenizer than the data ({difference}): prepare the '
                        f'text with python prepare.py TEXT --tokenizer={info["folder"]}/'
                        'tokenizer.json, or if that is not there, '
                        f'--tokenizer={info["data"]["tokenizer"]}')


def check_packages(**wanted):
    """UserError if a wanted package (its value counts as true) is not installed."""
    for name, value in wanted.items():
        # wandb leaves a folder of its name, which Python takes for a package without an origin
        if value and not getattr(find_spec(name), 'origin', None):
            raise UserError(f'these settings need {name}: pip install {name}')


def start_wandb(out_dir, settings, step):
    """A run of Weights & Biases, named after out_dir unless settings say another name. From a step
    other than 0, it continues the wandb run that out_dir began."""
    import wandb
    name = settings['wandb_run_name'] or Path(out_dir).resolve().name
    path = Path(out_dir, 'wandb_id')
    known = path.read_text() if step and path.exists() else None
    try:
        run = wandb.init(project=settings['wandb_project'], name=name, config=settings, id=known,
                         resume='allow')
    except wandb.Error as error:
        raise UserError(f'wandb does not start: {error}')
    path.write_text(run.id)
    return run


# --------------------------------------------------------------------------------------------------
# the model card

MEASURED = '<!-- train.py writes what stands below this line, anew with every run -->'


def write_card(out_dir, figures, defaults):
    """Write out_dir/README.md. What its owner put above the line MEASURED stays, and so does a file
    without that line. figures: of the validation; defaults: of train.py's settings, which the
    command leaves out."""
    card = Path(f'{out_dir}/README.md')
    head = f'''---
# license: mit    (to be chosen)
library_name: nanoduo
pipeline_tag: text-generation
---
# {Path(out_dir).resolve().name}

'''
    if card.exists():
        head, line, _ = card.read_text('utf-8', 'surrogateescape').partition(MEASURED)
        if not line:
            return
    info = read_config(out_dir)
    c = info['model']
    arguments = [f'--{name}={value}' for name, value in info['settings'].items()
                 if value != defaults[name]]
    text = f'''{head}{MEASURED}

| | |
| --- | --- |
| objective | {info['objective']} |
| network | {c['n_layer']} layers of {c['n_embd']}, {c['n_head']} heads, {c['block_size']} tokens |
| vocabulary | {info['data']['vocab_size']:,} ({info['data']['tokenizer']}) |
| trained on | {info['data']['train_tokens']:,} tokens, {info['step']:,} steps |
| validation loss | {figures['val_loss']:.4f} +- {figures['val_error']:.4f} nats per token |
| perplexity | {figures['val_ppl']:.2f} |
| bits per byte | {figures['val_bpb']:.4f} |

![The losses](curve.png)

The numbers are for the EMA weights and, except for AR, upper bounds. Trained with nanoDuo by

    python {shlex.join(['train.py', *arguments])}

All settings are in config.json. To sample from it:

    python sample.py --out_dir=hf:ORG/NAME
'''
    write_text(card, text)
