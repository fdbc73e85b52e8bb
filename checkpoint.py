"""
What a run leaves behind, written whole or not at all, and read without executing anything.

out_dir/step-00000600.pt    everything a resume needs, at some last steps; the newest is also
out_dir/last.pt
out_dir/model.safetensors   the EMA weights, and
out_dir/config.json         all else that sampling, evaluating or sharing needs, with
out_dir/tokenizer.json      where the tokenizer is our own
"""
import json
import os
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path

import torch

from model import DiT, DiTConfig


def pick_device(device):
    """'auto' -> the best there is; any other name is checked."""
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    kind = device.split(':')[0]
    if kind not in ('cuda', 'mps', 'cpu') or kind != 'cpu' and not getattr(torch, kind).is_available():
        raise SystemExit(f"--device={device}: torch sees no such device here; 'auto' takes the best there is")
    return device


def pick_dtype(dtype, device):
    """-> dtype's name, autocast context. 'auto': bf16 where the GPU has it, fp16 where not; float32 off the GPU."""
    kind = device.split(':')[0]
    if dtype == 'auto':  # a T4 only emulates bf16: I ask the hardware
        bf16 = kind == 'cuda' and torch.cuda.get_device_capability(device)[0] >= 8
        dtype = 'bfloat16' if bf16 else 'float16' if kind == 'cuda' else 'float32'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise SystemExit(f"--dtype={dtype}: it is 'float32', 'bfloat16', 'float16' or 'auto'")
    return dtype, nullcontext() if dtype == 'float32' else torch.autocast(kind, getattr(torch, dtype))


def flush(path):
    """To the disk itself, a file or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def write_whole(path, write):
    """write(temporary path), then flush and rename: whoever looks sees the old file or the new one, never half, and so
    after a power cut."""
    temporary = f'{path}.tmp'
    write(temporary)
    flush(temporary)
    os.replace(temporary, path)
    flush(os.path.dirname(path) or '.')


def milestones(out_dir):
    """The paths of its step-*.pt, the newest first."""
    return sorted(map(str, Path(out_dir).glob('step-*.pt')), reverse=True)


def has_state(out_dir):
    return os.path.exists(os.path.join(out_dir, 'last.pt')) or bool(milestones(out_dir))


def link(source, path):
    """A second name for a file, or where the disk knows no such thing, a copy."""
    Path(path).unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def save(out_dir, state, ema, info, data_folder, keep_last=2):
    """state: the resume's dict of tensors and plain values; ema: the averaged DiT; info: a JSON-able dict;
    data_folder: where the tokenizer.json is, if there is one. The newest keep_last states stay."""
    from safetensors.torch import save_file
    weights = {name: p.detach().cpu().contiguous() for name, p in ema.state_dict().items()}
    try:
        tokenizer = os.path.join(data_folder, 'tokenizer.json')
        if os.path.exists(tokenizer):
            write_whole(os.path.join(out_dir, 'tokenizer.json'), lambda path: shutil.copyfile(tokenizer, path))
        write_whole(os.path.join(out_dir, 'model.safetensors'), lambda path: save_file(weights, path))
        write_whole(os.path.join(out_dir, 'config.json'), lambda path: Path(path).write_text(json.dumps(info)))
        newest = os.path.join(out_dir, f'step-{state["step"]:08}.pt')
        write_whole(newest, lambda path: torch.save(state, path))
        write_whole(os.path.join(out_dir, 'last.pt'), lambda path: link(newest, path))
        for old in milestones(out_dir)[keep_last:]:
            os.remove(old)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        raise SystemExit(f'cannot write a checkpoint into {out_dir}: {str(e).splitlines()[0]}; the one before is kept')


def load_state(out_dir, device='cpu'):
    """The dict that save() was given last, from the newest file that is whole; if that is not last.pt, it says why."""
    broken = []
    for path in [os.path.join(out_dir, 'last.pt'), *milestones(out_dir)]:
        try:
            if bad := zipfile.ZipFile(path).testzip():               # torch writes checksums, but does not read them
                raise ValueError(f'{bad} is damaged')
            state = torch.load(path, map_location=device, weights_only=True)
            if missing := {'weights', 'ema', 'optimizer', 'scaler', 'teacher', 'step', 'model', 'settings', 'best',
                            'seconds', 'skipped', 'fingerprint'} - set(state):
                raise ValueError(f'it has no {min(missing)}')
        except FileNotFoundError:
            continue
        except Exception as e:
            broken.append(f'{path} cannot be used ({" ".join(str(e).split())[:200]})')
            continue
        if path != os.path.join(out_dir, 'last.pt'):
            print('; '.join(broken or [f'last.pt is gone from {out_dir}']) + f': going on from {path}')
        return state
    if not broken:
        raise SystemExit(f'no checkpoint in {out_dir}: train first, or name another folder with --out_dir')
    raise SystemExit('; '.join(broken))


def load_model(out_dir, weights='ema', device='cpu'):
    """model (DiT, eval mode) and info (config.json's dict) of a trained run; weights: 'ema' or 'raw'."""
    from safetensors.torch import load_file
    path = os.path.join(out_dir, 'config.json')
    if not os.path.exists(path):
        raise SystemExit(f'no trained model in {out_dir}: run train.py first, or name the folder of another run')
    try:
        info = json.loads(Path(path).read_text())
        if weights == 'ema':
            state = load_file(os.path.join(out_dir, 'model.safetensors'))
        elif weights == 'raw':
            state = load_state(out_dir)['weights']
        else:
            raise SystemExit(f"--weights is 'ema' or 'raw', not {weights!r}")
        with torch.device('meta'):           # no memory, no random numbers: the weights come from the file
            model = DiT(DiTConfig(**info['model']))
        model.load_state_dict(state, assign=True)
    except Exception as e:
        raise SystemExit(f'cannot load the model in {out_dir}: {" ".join(str(e).split())[:300]}')
    return model.to(device).eval().requires_grad_(False), info
