"""
Train Duo, a language model that denoises all its tokens at once. Without arguments, a laptop demo:

    python train.py                                           # a few minutes on two CPU cores
    python train.py config/stdlib_gpu.py                      # a larger one, on a GPU
    torchrun --nproc_per_node=8 train.py config/owt_duo.py    # the paper's OpenWebText run, 8 GPUs
    python train.py config/owt_duo.py --batch_size=8 --compile=False  # any setting below is a flag

To continue a stopped run, give the same command and --init_from=resume; --init_from=auto resumes if
there is a run to resume, and else starts one. On several nodes, start torchrun --nnodes=2
--node_rank=0 (then 1) --master_addr=IP --nproc_per_node=8 train.py ... on each of them. To see the
cost of a run first: python bench.py --plan, with the same settings.
"""
import copy
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from configurator import UserError, configure, run

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from checkpoint import (UNREADABLE, append_log, check_packages, check_resume, check_start,
                        has_state, load_model, load_state, lock_folder, open_log, save,
                        set_aside_older_run, start_wandb, write_card)
from data import (check_tokens, epoch_rows, fingerprint, get_batch, likelihood_figures, load_data,
                  loss_by_noise, loss_mask, num_rows)
from device import (catch_signals, check_memory, check_same_step, largest_of_ranks, pick_device,
                    pick_dtype, run_script, say, start_distributed)
from diffusion import (T_MIN, cast_head, consistency_pair, corrupt, cross_entropy, describe_window,
                       evaluate, head_loss, mdlm_nelbo, nelbo, noise_schedule, soft_tokens,
                       stratified_times, teacher_kl, transform)
from model import DiT, DiTConfig
from optim import Muon, clip_and_step, load_optimizer, set_lr, update_ema

# --- files and intervals, in steps
out_dir = 'out'
data_dir = 'data'
eval_interval = 500          # validate, and write a checkpoint
checkpoint_interval = 0      # steps between additional checkpoints; 0: none
checkpoint_minutes = 15.0    # also write one when the last one is older than this; 0: never
keep_last = 2                # checkpoints to keep, in case the newest is damaged
eval_iters = 64              # micro-batches in one validation
log_interval = 50
eval_only = False            # validate once and stop
init_from = 'scratch'        # 'scratch', 'resume', or a model to start from: a folder, hf:org/name;
                             # 'auto': resume if possible, else scratch; 'auto:MODEL': else MODEL
num_samples = 3              # texts to print at the end; 0: none, and none in samples.txt
gate = ''                    # 'hellaswag acc_norm', or another score that eval.py --lm_eval prints:
gate_score = 1.0             # the run ends once a validation scores this high
gate_options = ''            # options for eval.py, like '--max_rows=1000 --dtype=auto'; no quotes
# --- wandb
wandb_log = False
wandb_project = 'nanoduo'
wandb_run_name = ''          # '': the name of out_dir
# --- data
dataset = 'stdlib'           # a folder in data_dir, made by prepare.py
batch_size = 8               # the micro-batch: rows at a time on one device
gradient_accumulation_steps = 1  # micro-batches a step, over all processes together
block_size = 128             # tokens in a row
# --- model
n_layer = 3
n_head = 4
n_embd = 128
cond_dim = 128               # width of the time embedding
dropout = 0.0
# --- diffusion
objective = 'duo'            # 'dcd' distils a Duo (init_from); baselines: 'mdlm' (masked), 'ar'
curriculum_frac = 0.8        # first share of the run, on softened Gaussian latents; 0 is UDLM
tau = 1e-3                   # temperature of the curriculum's softmax
gamma_min = -3.5             # log noise-to-signal ratio of the Gaussian: the curriculum's window
gamma_max = -2.25
curriculum_k = 5             # tokens mixed at each position
dcd_rounds = 5               # distillation: the teacher is renewed at the start of each round
dcd_delta = 1 / 512          # the teacher's lead in time, in round 0; each doubles it, up to 1
dcd_ema_teacher = False      # the new teacher: the student's EMA (Algorithm 2), not the student
# --- optimiser
optimizer = 'muon'           # for attention and MLPs, AdamW for the rest; 'adamw': AdamW for all
learning_rate = 3e-3         # of AdamW
muon_lr = 2e-3               # of Muon, on AdamW's scale: its updates have the same size
max_iters = 1500
warmup_iters = 40            # linear from zero, then constant
cooldown_frac = 0.4          # last share of the run, where the rate goes linearly to zero
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0              # 0 for none
max_bad_steps = 20           # steps whose loss or gradients are not finite are skipped; if a log
                             # line finds more than this in a row, the run ends
ema_decay = 0.99             # of the averaged weights, which are what is validated and sampled
# --- system
seed = 1337
device = 'auto'              # 'cuda', 'cpu', or the best there is
dtype = 'auto'               # 'bfloat16', 'float16', 'float32', or what suits the device
compile = False              # torch.compile takes minutes: for long runs on a GPU

CHECKS = [
    ('max_iters eval_interval log_interval keep_last dcd_rounds batch_size eval_iters '
     'gradient_accumulation_steps n_layer n_head n_embd cond_dim',
     lambda v: 1 <= v < 10**8, 'from 1 to 99,999,999'),
    ('dcd_rounds', lambda v: v <= 1000, 'at most 1,000'),
    ('seed', lambda v: 0 <= v < 2**64, 'from 0 to 2^64 - 1'),
    ('warmup_iters learning_rate muon_lr grad_clip checkpoint_interval checkpoint_minutes '
     'max_bad_steps weight_decay num_samples', lambda v: v >= 0, 'at least 0'),
    ('dropout beta1 beta2 ema_decay', lambda v: 0 <= v < 1, 'at least 0 and below 1'),
    ('curriculum_frac cooldown_frac', lambda v: 0 <= v <= 1, 'from 0 to 1'),
    ('tau dcd_delta', lambda v: v > 0, 'above 0'),
    ('curriculum_k', lambda v: v >= 2, 'at least 2'),
    ('objective', lambda v: v in ('duo', 'dcd', 'mdlm', 'ar'), 'duo, dcd, mdlm or ar'),
    ('optimizer', lambda v: v in ('adamw', 'muon'), 'adamw or muon'),
    ('gate', lambda v: not v or ' ' in v, "a task and its metric, like 'hellaswag acc_norm'"),
]

# --------------------------------------------------------------------------------------------------
# what changes with the step

def lr_share(step):
    """The share of its learning rate that every parameter group gets."""
    cooldown_iters = max(1, round(cooldown_frac * max_iters))
    return min(1.0, (step + 1) / (warmup_iters + 1), (max_iters - step) / cooldown_iters)


def ema_decay_at(step):
    return min(ema_decay, (1 + step) / (10 + step))      # the first weights are soon forgotten


def in_curriculum(step):
    return objective == 'duo' and step < round(curriculum_frac * max_iters)


def dcd_round(step):
    return step * dcd_rounds // max_iters

# --------------------------------------------------------------------------------------------------
# the training loss of one micro-batch

def loss_of(objective, vocab_size):
    """The training loss: any plain function (logits (n,K), *args) -> (n,) nats. args: xt, x0, alpha
    and dalpha; for ar the targets; for dcd the teacher's h, and its head's weight and bias by name.
    Validation and eval.py do not use it."""
    if objective == 'ar':
        return cross_entropy
    if objective == 'mdlm':
        return partial(mdlm_nelbo, mask_id=vocab_size)
    if objective == 'dcd':
        return teacher_kl
    return nelbo


def training_loss(model, x0, u, step, vocab_size, loss_fn, teacher=None, mask=None, grad_scale=1.0):
    """A scalar. x0 (B,T) clean ids; u (B,1) float64 in [0,1), stratified; loss_fn: loss_of(...);
    mask (B,T) or None: the weights of the tokens.

    Duo has two ways to make the noise, the curriculum's and the discrete one, and one loss. Its
    distillation compares with the teacher instead (Algorithm 1).
    """
    # 1. NOISE: how much, and which tokens
    sigma = weights = None
    if objective == 'ar':
        x, args = x0[:, :-1], [x0[:, 1:]]
        if mask is not None:
            mask = mask[:, 1:]
    elif objective == 'dcd':
        delta = min(1, 2 ** dcd_round(step) * dcd_delta)
        x, zs, sigma, sigma_s = consistency_pair(x0, u, delta, vocab_size)    # (B,T) x 2, (B,1) x 2
        with torch.no_grad():
            args = [teacher.hidden(zs, sigma_s)]                              # (B,T,C)
        linear = teacher.output_layer.linear
        weight, bias = cast_head(args[0], linear.weight, linear.bias)
        loss_fn = partial(loss_fn, weight=weight, bias=bias)
    elif in_curriculum(step):
        width = gamma_max - gamma_min
        gamma = gamma_min + u * width
        alpha, dalpha = transform(gamma, vocab_size)
        dalpha = dalpha * width                                               # d alpha / d u, (B,1)
        k = min(curriculum_k, vocab_size)
        x, weights, xt = soft_tokens(x0, gamma, tau, vocab_size, k)           # (B,T,k) x 2, (B,T)
        sigma, args = -alpha.log(), [xt, x0, alpha, dalpha]
    else:
        alpha, dalpha = noise_schedule(T_MIN + (1 - T_MIN) * u)
        x, sigma = corrupt(x0, alpha, vocab_size, objective)                  # (B,T), (B,1)
        args = [x, x0, alpha, dalpha]
    # 2. DENOISE and 3. LOSS go together in the head, so that no (B,T,K) tensor is held
    return model(x, sigma, weights, head=partial(
        head_loss, loss_fn=loss_fn, args=args, mask=mask, grad_scale=grad_scale, compile=compile))

# --------------------------------------------------------------------------------------------------
# the model and its optimisers

def model_config(vocab_size):
    if objective == 'mdlm':
        vocab_size += 1                                  # the mask is the last id
    return DiTConfig(vocab_size, block_size, n_layer, n_head, n_embd, cond_dim, dropout,
                     causal=objective == 'ar')


def build_optimizer(model):
    """A list of optimisers, each with its own rates: warm-up, clipping, skipped steps, checkpoints
    and resuming treat all of them alike."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        in_block = name.startswith('blocks') and p.ndim == 2 and 'adaLN' not in name
        if in_block and optimizer == 'muon':
            matrices.append(p)
        else:
            others.append(p)
    optimizers = [torch.optim.AdamW(others, lr=learning_rate, betas=(beta1, beta2),
                                    weight_decay=weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay))
    return optimizers

# --------------------------------------------------------------------------------------------------
# starting

def where_to_start():
    """init_from, with 'auto' resolved."""
    start = init_from
    if start.split(':')[0] == 'auto':
        start = 'resume' if has_state(out_dir) else start[5:] or 'scratch'
    if objective == 'dcd' and start == 'scratch':
        raise UserError('distillation starts from a trained Duo: --init_from=MODEL, or auto:MODEL')
    return start


def open_data(folder, master):
    """meta and streams, checked; the built-in text is prepared if it is not there."""
    if master and dataset == 'stdlib' and not folder.exists():
        run_script('prepare.py', 'stdlib', f'--data_dir={data_dir}')
    largest_of_ranks(0)                                  # the others wait for the first process
    meta, data = load_data(folder)
    if master:
        check_tokens(data, meta['vocab_size'], folder)
    return meta, data


def run_on_model(script, *arguments, **options):
    """Start a script that reads the model in out_dir."""
    return run_script(script, f'--out_dir={out_dir}', f'--device={device}', *arguments, **options)


def append_sample(step):
    """Append a short sample to samples.txt."""
    with open(f'{out_dir}/samples.txt', 'a') as file:
        print(f'step {step}', file=file, flush=True)
        run_on_model('sample.py', '--num_samples=1', '--steps=16', stdout=file)


def score_gate():
    """The gate's score of the newest checkpoint; -inf if eval.py gives none."""
    torch.cuda.empty_cache()                             # eval.py shares the GPU
    scored = run_on_model('eval.py', f'--lm_eval={gate.partition(" ")[0]}',
                          *gate_options.split(), stdout=subprocess.PIPE, text=True)
    try:
        return float(json.loads(scored.stdout.splitlines()[-1])[gate])
    except (LookupError, TypeError, ValueError):         # eval.py failed, or gave other scores
        say(f'no score for --gate={gate}: {scored.stdout[-400:]}')
        return -math.inf

# --------------------------------------------------------------------------------------------------

def main():
    # ---- settings, processes, device
    defaults = dict(globals())
    settings = configure(defaults, CHECKS)
    globals().update(settings)
    dev, rank, world = start_distributed(pick_device(device))
    dtype_name, autocast = pick_dtype(dtype, dev)
    master = rank == 0
    lock = log_file = wandb_run = None
    if master and not eval_only and Path(out_dir).exists():
        lock = lock_folder(out_dir)                      # before anything there is read
    start = where_to_start()
    check_packages(wandb=wandb_log, lm_eval=gate)
    torch.set_float32_matmul_precision('high')
    if gradient_accumulation_steps % world:
        raise UserError(f'gradient_accumulation_steps ({gradient_accumulation_steps}, over all '
                        f'processes) must be a multiple of the number of processes ({world})')

    # ---- data
    folder = Path(data_dir, dataset)
    meta, data = open_data(folder, master)
    vocab_size, token_files = meta['vocab_size'], fingerprint(data)
    n_train, n_val = num_rows(data['train'], block_size), num_rows(data['val'], block_size)

    # ---- what the run starts from: a checkpoint, another run's model, or nothing
    kind = 'duo' if objective == 'dcd' else objective    # a distilled Duo is a Duo
    state = trained = None
    settings['init_from'] = start
    if start == 'resume':
        state = load_state(out_dir)
        sizes = state['model']
        settings['init_from'] = state['settings']['init_from']  # where the run began
    elif start != 'scratch':
        trained, info = load_model(start)
        check_start(start, info, kind, meta)
        sizes = info['model']
    if settings['init_from'] != 'scratch':               # its network, whatever is set here
        taken = {name: value for name, value in sizes.items()
                 if settings.get(name, value) != value and name not in ('block_size', 'dropout')}
        if taken:
            say(f'taken over from the model: {taken}')
        settings.update(taken)
        globals().update(settings)

    # ---- model, its EMA, optimisers
    config = model_config(vocab_size)
    check_memory(config, batch_size, dev)
    torch.manual_seed(seed)
    model = DiT(config).to(dev)
    if trained:
        model.load_state_dict(trained.state_dict())
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    teacher = copy.deepcopy(ema) if objective == 'dcd' else None
    optimizers = build_optimizer(model)
    scaler = torch.amp.GradScaler(dev.split(':')[0], enabled=dtype_name == 'float16')
    parts = dict(weights=model, ema=ema, scaler=scaler)
    if teacher:
        parts['teacher'] = teacher
    step, began = 0, time.monotonic()
    counts = torch.zeros(4, dtype=torch.float64, device=dev)
    total, good, skipped, in_a_row = counts              # views: sum of losses, steps by kind

    # ---- resume
    if state:
        try:
            changed = check_resume(out_dir, state, settings, config, token_files)
            for name, part in parts.items():
                if name != 'scaler' or state[name]:      # an unused scaler's is empty
                    part.load_state_dict(state[name])
            for part, saved in zip(optimizers, state['optimizers'], strict=True):
                load_optimizer(part, saved)
            step = state['step']
            began -= state['seconds']
            counts += state['counts'].to(dev)
        except UNREADABLE as error:
            raise UserError(f'{out_dir}: its checkpoint is not one of this run: {error!r:.200}')
        if changed:
            say(f'resuming with changed settings: {changed}')
        del state
    check_same_step(step)

    loss_fn = loss_of(objective, vocab_size)
    # DDP splits the trunk's compiled graph at its gradient buckets, so that some gradients are
    # exchanged while others are still computed
    train_model = DDP(model, gradient_as_bucket_view=True) if world > 1 else model

    # ---- the run in words, and what the loop calls
    rows_per_step = gradient_accumulation_steps * batch_size
    tokens_per_step = rows_per_step * block_size
    say(f'{model.num_params() / 1e6:.2f}M parameters ({n_layer} layers of {n_embd}), '
        f'{tokens_per_step:,} tokens a step, {dev} {dtype_name}\n'
        f'data: {n_train:,} rows of {block_size}, {meta["tokenizer"]} of {vocab_size:,}')
    if in_curriculum(step):
        say(f'curriculum: {describe_window(gamma_min, gamma_max, vocab_size)}')

    def log(line, **record):
        record.update(step=step, seconds=time.monotonic() - began)
        if log_file:
            append_log(log_file, record)
        if wandb_run:
            wandb_run.log(record, step=step)
        say(line)

    def validate():
        """Log the metric of the EMA weights, on the same rows with the same noise every time."""
        n = min(n_val, eval_iters * batch_size)
        rows = epoch_rows(np.arange(n), n_val, seed=0)
        get_rows = lambda i: get_batch(data['val'], rows[i], block_size, meta, dev)
        with autocast:
            nats = evaluate(ema, kind, vocab_size, get_rows, n, batch_size, meta['pad_id'], dev,
                            rank, world)
        line, figures = likelihood_figures(nats, kind, data['val'], rows, block_size, 'val')
        figures |= loss_by_noise(nats, kind)
        figures = {f'val_{name}': value for name, value in figures.items()}
        log(f'step {step}: val loss {line}', **figures)
        return figures

    def passes_gate():
        signals.doing = 'the scoring'
        score = largest_of_ranks(score_gate() if master else -math.inf)
        log(f'step {step}: {gate} {score:.4f}, gate {gate_score}', score=score)
        return score >= gate_score

    def write_checkpoint():
        info = dict(objective=kind, model=asdict(config), data=meta, settings=settings, step=step)
        state = {name: part.state_dict() for name, part in parts.items()} | info
        state.update(optimizers=[part.state_dict()['state'] for part in optimizers],
                     counts=counts.cpu(), fingerprint=token_files,
                     seconds=time.monotonic() - began)
        save(out_dir, state, ema, info, folder, keep_last)

    def accumulate_gradients(step):
        """Backward through this process's share of the step's micro-batches; returns the mean loss
        of all. A micro-batch is the unit of randomness: its noise and dropout come from (seed,
        step, m), so a run is the same on any number of processes."""
        mean = torch.zeros((), device=dev)
        offset = np.random.default_rng([seed, step]).random()            # stratifies all times
        for m in range(rank, gradient_accumulation_steps, world):
            mixed = np.random.SeedSequence([seed, step, m]).generate_state(1, np.uint64)
            torch.manual_seed(int(mixed[0]))
            first = m * batch_size
            index = step * rows_per_step + first + np.arange(batch_size)
            rows = epoch_rows(index, n_train, seed)
            x0 = get_batch(data['train'], rows, block_size, meta, dev)
            u = stratified_times(offset, first, batch_size, rows_per_step, device=dev)
            # DDP exchanges gradients in the last backward only
            train_model.require_backward_grad_sync = m + world >= gradient_accumulation_steps
            with autocast:
                loss = training_loss(train_model, x0, u, step, vocab_size, loss_fn, teacher,
                                     loss_mask(x0, meta['pad_id']),
                                     scaler.scale(torch.ones_like(mean)))
            scaler.scale(loss * world / gradient_accumulation_steps).backward()
            mean += loss.detach() / gradient_accumulation_steps
        if world > 1:
            dist.all_reduce(mean)
        return mean

    # ---- compile: the trunk is one graph; the loss, compiled by head_loss, another
    if compile and not eval_only and step < max_iters:
        say('compiling: some minutes')
        for m in filter(None, [model, teacher]):
            m.hidden = torch.compile(m.hidden, dynamic=False)
        try:                                             # now, so that it cannot fail days later
            accumulate_gradients(step)
            accumulate_gradients(max_iters - 1)          # after the curriculum
        except torch._dynamo.exc.TorchDynamoException as error:      # Triton, on an old GPU
            raise UserError(f'torch.compile fails: add --compile=False ({error!s:.200})')
        model.zero_grad()

    # ---- the run's folder and logs: only now, so that a mistake leaves none
    if master and not eval_only:
        lock = lock or lock_folder(out_dir)
        if start != 'resume':
            lock = set_aside_older_run(out_dir, lock)
        log_file = open_log(out_dir, step)
        if wandb_log:
            wandb_run = start_wandb(out_dir, settings, step)

    # ---- the loop
    signals = catch_signals()                            # a scheduler's, or Ctrl-C
    ticked = saved = time.monotonic()
    logged_step = step
    # where it starts, a run does not validate; a resumed one with a gate does: it may have passed
    first_step = 0 if gate else step
    while True:
        # 1. VALIDATE, SAVE, STOP
        stopped = largest_of_ranks(signals.caught)
        done = step >= max_iters
        paused = time.monotonic()
        moved = step > first_step
        at_eval = moved and step % eval_interval == 0
        at_interval = moved and checkpoint_interval and step % checkpoint_interval == 0
        overdue = moved and checkpoint_minutes and paused - saved > 60 * checkpoint_minutes
        if at_eval or eval_only or done and not stopped:
            signals.doing = 'the validation'
            figures = validate()
        if log_file and (at_eval or at_interval or overdue or done or stopped):
            signals.doing = 'a checkpoint'
            write_checkpoint()
            if at_eval and num_samples and not (done or stopped):
                append_sample(step)
            saved = time.monotonic()
        if gate and (at_eval or done) and not stopped:
            done |= passes_gate()
        ticked += time.monotonic() - paused              # not counted in tokens/s
        if done or eval_only or stopped:
            break

        # 2. WHAT CHANGES WITH THE STEP
        if teacher and dcd_round(step) > dcd_round(step - 1):    # also at step 0
            teacher.load_state_dict((ema if dcd_ema_teacher else model).state_dict())
        set_lr(optimizers, lr_share(step))
        if step and in_curriculum(step - 1) and not in_curriculum(step):
            say(f'step {step}: the curriculum ends; the loss jumps, as the noise is discrete now')

        # 3. GRADIENTS, STEP, EMA
        signals.doing = 'the step'
        loss = accumulate_gradients(step)
        norm, finite = clip_and_step(optimizers, scaler, model.parameters(), grad_clip, loss)
        update_ema(ema, model, ema_decay_at(step))
        total += torch.where(finite, loss, 0)
        good += finite
        skipped += ~finite
        in_a_row.add_(1).mul_(~finite)
        step += 1

        # 4. LOG: only here does the CPU wait for the device
        if step % log_interval == 0 or step == max_iters:
            mean = (total / good).item()              # nan if no step was good
            if in_a_row > max_bad_steps:
                raise UserError(
                    f'rank {rank}: no finite loss and gradient in {int(in_a_row)} steps in a row '
                    f'by {step}: {out_dir} keeps the checkpoint before; lower --learning_rate')
            per_step = max(time.monotonic() - ticked, 1e-9) / (step - logged_step)      # seconds
            speed = tokens_per_step / per_step
            line = (f'step {step}: {"KL" if teacher else "loss"} {mean:.4f}, '
                    f'{speed:,.0f} tokens/s, {(max_iters - step) * per_step / 60:.1f} min left')
            if skipped:
                line += f', {int(skipped)} steps skipped'
            log(line, loss=mean, lr=learning_rate * lr_share(step - 1), skipped=int(skipped),
                tokens_per_s=speed, grad_norm=norm.item())
            ticked, logged_step = time.monotonic(), step
            counts[:2].zero_()                        # total and good

    # ---- the picture, the card, some texts; a signal ends these
    signals.doing = ''
    if stopped:
        say(f'{signal.Signals(stopped).name}: stopped after step {step}; the same command and '
            f'--init_from=resume continues from {out_dir}')
    elif log_file:
        run_script('plot.py', '--', out_dir)
        write_card(out_dir, figures, defaults)
        if num_samples:
            run_on_model('sample.py', f'--num_samples={num_samples}')
        say(f'next: python sample.py --watch, or eval.py, with --out_dir={out_dir}')
    if world > 1:
        dist.destroy_process_group()
    if stopped:
        sys.exit(128 + stopped)


if __name__ == '__main__':
    run(main)
