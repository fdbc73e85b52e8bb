"""python bench.py --selftest: is everything right on this device? In some minutes, training,
validation and samples in the device's number format, compiled and not, are compared with float32 in
eager mode on the CPU: a line for each check, and a verdict to paste into an issue."""
import copy
import platform
import subprocess
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import diffusion
import train
from configurator import UserError
from device import pick_dtype
from diffusion import evaluate, q_sample, soft_tokens, stratified_times, transform
from model import DiT, DiTConfig
from optim import clip_and_step, update_ema
from sample import Loaded, denoise, sample_prior

K, B, T = 1000, 16, 64
N_SAMPLES = 256
STEPS = 3
# the settings of train.py that a check changes; the first step is in the curriculum, the last not
SETTINGS = dict(curriculum_frac=0.5, tau=1e-3, gamma_min=-3.5, gamma_max=-2.25, curriculum_k=5,
                dcd_rounds=1, dcd_delta=1 / 8, learning_rate=1e-2, muon_lr=1e-2, beta1=0.9,
                beta2=0.99, weight_decay=0.0, grad_clip=1.0, max_iters=2 * STEPS)
OBJECTIVES = {'duo, curriculum': ('duo', 0, 'adamw'), 'duo, curriculum, Muon': ('duo', 0, 'muon'),
              'duo, discrete': ('duo', STEPS, 'adamw'), 'distillation': ('dcd', 0, 'adamw'),
              'mdlm': ('mdlm', 0, 'adamw'), 'ar': ('ar', 0, 'adamw')}
TOLERANCE = dict(float32=1e-3, float16=0.01, bfloat16=0.03)          # relative, of a loss
NOISE = ('soft_tokens', 'corrupt', 'consistency_pair')


def same_noise():
    """The functions that draw noise do so on the CPU, whose numbers a seed repeats everywhere."""
    def on_the_cpu(function):
        def drawn(x0, *args):
            args = [a.cpu() if torch.is_tensor(a) else a for a in args]
            return [v.to(x0.device) for v in function(x0.cpu(), *args)]
        return drawn

    stand_ins = {name: on_the_cpu(getattr(diffusion, name)) for name in NOISE}
    return mock.patch.multiple(train, **stand_ins), mock.patch.object(
        diffusion, 'corrupt', stand_ins['corrupt'])


def make_model(kind, device):
    """The same on every device; each of its outputs depends on all that it is given."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(K + (kind == 'mdlm'), T, 2, 2, 64, 32, 0.0, kind == 'ar'))
    for name, p in model.named_parameters():
        if 'adaLN' in name or 'output_layer.linear' in name:         # they start at zero
            torch.nn.init.normal_(p, std=0.1)
    return model.to(device)


def train_steps(name, device, dtype, compiled=False):
    """-> the losses of some steps and, last, the validation of the EMA after them; float64."""
    objective, first, train.optimizer = OBJECTIVES[name]
    kind = 'duo' if objective == 'dcd' else objective
    train.objective = objective
    dtype_name, autocast = pick_dtype(dtype, device)
    model = make_model(kind, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    teacher = copy.deepcopy(ema) if objective == 'dcd' else None
    optimizers = train.build_optimizer(model)
    scaler = torch.amp.GradScaler(device.split(':')[0], init_scale=2.0 ** 10,
                                  enabled=dtype_name == 'float16')
    loss_fn = train.loss_of(objective, K)
    train.compile = compiled                             # as train.py does: the loss, and the trunk
    if compiled:
        for m in filter(None, (model, teacher)):
            m.hidden = torch.compile(m.hidden, dynamic=False)
    generator = torch.Generator().manual_seed(1)
    x0 = (torch.randn(B, T, generator=generator).abs() * K / 4).long() % K   # some are frequent
    x0 = x0.to(device)
    losses = []
    for step in range(first, first + STEPS):
        torch.manual_seed(step)
        u = stratified_times(0.3, 0, B, B, device=device)
        grad_scale = scaler.scale(torch.ones((), device=device))
        with autocast:
            loss = train.training_loss(model, x0, u, step, K, loss_fn, teacher, None, grad_scale)
        scaler.scale(loss).backward()
        _, finite = clip_and_step(optimizers, scaler, model.parameters(), 1.0)
        update_ema(ema, model, 0.5)
        losses.append(torch.where(finite, loss.detach(), torch.nan))
    with autocast:
        nats = evaluate(ema, kind, K, lambda rows: x0[rows[0]:rows[-1] + 1], B, B // 2,
                        device=device)
    return torch.stack([*losses, nats.mean().to(device)]).double().cpu()


def compare_training(name, device, dtype, compiled, expected):
    """-> what was seen, in words; ValueError unless it is as on the CPU. expected: {name: ...},
    filled here."""
    if name not in expected:
        expected[name] = train_steps(name, 'cpu', 'float32')
    seen = train_steps(name, device, dtype, compiled)
    worst = (seen / expected[name] - 1).abs().max()      # or nan
    text = (f'loss {seen[0]:.4f} to {seen[-2]:.4f}, validation {seen[-1]:.4f}: {worst:.2%} from '
            'float32 on the CPU')
    if not worst < TOLERANCE[dtype]:
        raise ValueError(text)
    return text


def frequencies(device, dtype, kind, **options):
    """The share of eight groups of tokens among samples, and its standard error."""
    loaded = Loaded(make_model(kind, device).eval(), None,
                    dict(objective=kind, data=dict(vocab_size=K, bos_id=0)))
    torch.manual_seed(2)
    xt = sample_prior(loaded.info, (N_SAMPLES, 12), device)
    with pick_dtype(dtype, device)[1]:
        for xt in denoise(loaded, xt, steps=4, **options):
            pass
    groups = torch.nn.functional.one_hot(xt.cpu() * 8 // K, 8).double().mean(1)      # (n,8)
    return groups.mean(0), groups.std(0) / len(groups) ** 0.5


def compare_samples(device, dtype, kind, options):
    (seen, error), (expected, error_too) = (
        frequencies(*where, kind, **options) for where in ((device, dtype), ('cpu', 'float32')))
    z = ((seen - expected).abs() / (error ** 2 + error_too ** 2).sqrt().clamp(min=1e-3)).max()
    text = f'tokens as frequent as on the CPU, to {z:.1f} standard errors'
    if not z < 5:
        raise ValueError(text)
    return text


def compare_noise(device):
    """The device's own random numbers: how often a token is kept, against its probability."""
    n = 200_000
    x0 = torch.randint(K, (1, n), device=device)
    worst = 0
    for gamma in (-3.0, -2.0):
        alpha = transform(torch.tensor([[gamma]], dtype=torch.float64, device=device), K)[0]
        zt = soft_tokens(x0, torch.full_like(alpha, gamma), 1e-3, K, 5)[2]
        xt = q_sample(x0, alpha, K)
        p = (alpha + (1 - alpha) / K).item()
        for x in (zt, xt):
            kept = (x == x0).double().mean().item()
            worst = max(worst, abs(kept - p) / (p * (1 - p) / n) ** 0.5)
    text = f'tokens are kept as often as they should be, to {worst:.1f} standard errors'
    if not worst < 5:
        raise ValueError(text)
    return text


SAMPLERS = {
    'ancestral': ('duo', dict(sampler='ancestral')),
    'informed': ('duo', dict(sampler='informed')),
    'psi, nucleus': ('duo', dict(sampler='psi', top_p=0.9)),
    'greedy tail': ('duo', dict(sampler='ancestral', greedy=True, temperature=0.8)),
    'mdlm': ('mdlm', dict()),
    'mdlm, psi': ('mdlm', dict(sampler='psi', psi='cap', top_p=0.9)),
    'ar': ('ar', dict()),
}


def here_and_now(device, dtype):
    """What an issue should say: the versions and the device."""
    name = platform.processor() or platform.machine()
    if device.startswith('cuda'):
        name = torch.cuda.get_device_name(device)
    git = ['git', '-C', str(Path(__file__).parent), 'rev-parse', '--short', 'HEAD']
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:                                      # there is no git
        commit = ''
    return (f'torch {torch.__version__}, Python {platform.python_version()}, '
            f'{platform.system()}, {device} ({name}), {dtype}, commit {commit or "unknown"}')


def check_all(device, dtype):
    """Print a line a check and the verdict; UserError, the verdict, if one fails. On a CPU,
    torch.compile takes minutes and a compiler: it is checked there with --compile only."""
    compile_too = train.compile or device != 'cpu'
    expected = {}                                        # of the CPU, in float32
    for name, value in SETTINGS.items():
        setattr(train, name, value)
    checks = [('noise', partial(compare_noise, device))]
    for name in OBJECTIVES:
        for compiled in (False, True)[:1 + compile_too]:
            kind = 'compiled' if compiled else 'eager'
            checks.append((f'{name}, {kind}',
                           partial(compare_training, name, device, dtype, compiled, expected)))
    for name, (kind, options) in SAMPLERS.items():
        checks.append((f'samples, {name}',
                       partial(compare_samples, device, dtype, kind, options)))
    failed, began = [], time.time()
    for name, check in checks:
        noise, metrics_noise = same_noise()
        try:
            with noise, metrics_noise:
                line = f'{name:<28} ok: {check()}'
        except Exception as error:                       # what fails here may be anything at all
            said = ' '.join(str(error).split())[:300]
            line = f'{name:<28} FAILED: {type(error).__name__}: {said}'
            failed.append(name)
        print(line, flush=True)
    where = here_and_now(device, dtype)
    if failed:
        raise UserError(f'selftest: {len(failed)} of {len(checks)} checks FAILED '
                        f'({"; ".join(failed)}): {where}')
    print(f'selftest: all {len(checks)} checks passed in {time.time() - began:.0f} s: {where}')
