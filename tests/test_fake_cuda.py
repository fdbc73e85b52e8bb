"""Training, evaluation and sampling on a GPU that is not there: see fake_cuda.py."""
import copy
import os

import pytest
import torch
import torch.nn.functional as F

import diffusion
import selftest
import train
from diffusion import evaluate, nelbo, stratified_times
from fake_cuda import DeviceWait, fake_cuda
from helpers import ROOT, TINY, good, one_line, project_with, run, run_here
from model import DiT, DiTConfig
from sample import Loaded, denoise

K, B, T = 20_000, 4, 256


@pytest.fixture
def gpu():
    with fake_cuda() as gpu:
        yield gpu


def small_model(kind='duo', device='cuda'):
    config = DiTConfig(K + (kind == 'mdlm'), T, 2, 2, 32, 16, 0.1, kind == 'ar')
    with torch.device(device):
        return DiT(config)


def change(monkeypatch, **settings):
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)

# --------------------------------------------------------------------------------------------------
# training

@pytest.mark.parametrize('capability, args', [
    (9, '--curriculum_frac=1 --gradient_accumulation_steps=2'),
    (9, '--curriculum_frac=0'),
    (7, '--curriculum_frac=0.1 --grad_clip=0'),          # both phases, in fp16
    (9, '--objective=mdlm'),
    (7, '--objective=ar'),
    (9, '--objective=dcd --init_from=out --dcd_rounds=6'),
    (7, '--objective=dcd --init_from=out --dcd_rounds=6 --dcd_ema_teacher')])
def test_steps_of_train_py_do_not_wait_for_the_device(work, monkeypatch, capability, args):
    """The script runs until it has taken three steps and needs their loss, to print it."""
    begun = []

    def times(*rest, **more):                            # drawn once in a micro-batch
        begun.append(len(gpu.waits))
        return stratified_times(*rest, **more)

    monkeypatch.setattr(diffusion, 'stratified_times', times)
    with fake_cuda(capability) as gpu, pytest.raises(DeviceWait):
        run_here(work, 'train.py', *TINY, *args.split(), '--device=cuda', '--out_dir=fake',
                 '--log_interval=3')
    assert len(begun) == (6 if 'accumulation' in args else 3)
    (wait,) = gpu.waits[begun[0]:]                       # before: the weights went to the device
    assert wait.startswith('mean = ') and '_local_scalar_dense' in wait


def test_a_recipe_that_waits_for_the_device_is_one_line(tmp_path):
    args = ['--gpu=h100', '--optimizer=muon', '--n_layer=1', '--block_size=32', '--vocab_size=99']
    good(run(tmp_path, 'bench.py', *args))
    waits = """
def build_optimizer(model):
    return [torch.optim.SGD(model.parameters(), lr=1e-3)]
"""
    script = project_with(tmp_path, waits).with_name('bench.py')
    (tmp_path / 'tests').symlink_to(ROOT / 'tests')
    one_line(run(tmp_path, script, *args), 'waits for the GPU', 'if can_skip or finite')


@pytest.mark.parametrize('args, gigabytes', [
    (['config/owt_duo.py', '--gpu=h100'], 45),
    (['config/tiny_t4_duo.py', '--gpu=t4'], 15),
    pytest.param(['config/owt_duo.py', '--gpu=t4', '--batch_size=8'], 15, marks=pytest.mark.skipif(
        'SLOW_TESTS' not in os.environ, reason='more of the same: set SLOW_TESTS=1'))])
def test_recipes_fit_in_their_gpus(tmp_path, args, gigabytes):
    """At their full sizes, in eager mode; both phases."""
    start = run if '--gpu=h100' in args else run_here
    said = good(start(tmp_path, 'bench.py', *args, '--gpus=8', '--gradient_accumulation_steps=8'))
    dtype = 'float16' if '--gpu=t4' in args else 'bfloat16'
    for part in ('simulated, not measured', f'cuda {dtype}', '1 micro-batches a step',
                 '\ncurriculum ', '\ndiscrete ', 'tokens/s', 'hours'):
        assert part in said
    peak = float(said.partition('peak memory ')[2].split()[0])
    weights = float(said.partition('M parameters')[0].split()[-1]) / 1e3
    assert gigabytes > peak > 20 * weights               # more than weights, EMA and Adam take


@pytest.mark.parametrize('args, parts', [
    (['--gpu=t5'], ['gpu', 'h100, a100 or t4']),
    (['--gpu=t4', '--dtype=bfloat16'], ['bfloat16', '--dtype=auto']),
    (['--gpu=t4', '--n_layer=1', '--n_embd=4096', '--batch_size=512', '--vocab_size=256'],
     ['do not fit', '--batch_size'])])
def test_a_simulated_plan_refuses_in_one_line(tmp_path, args, parts):
    one_line(run_here(tmp_path, 'bench.py', *args), *parts)

# --------------------------------------------------------------------------------------------------
# evaluation and sampling

@pytest.mark.parametrize('kind', ['duo', 'mdlm', 'ar'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_an_evaluation_waits_once_at_its_end(gpu, kind, dtype):
    x0 = torch.randint(K, (10, T), device='cuda')
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        nats = evaluate(small_model(kind).eval(), kind, K, lambda rows: x0[rows[0]:rows[-1] + 1],
                        10, B, pad_id=3, device='cuda')
    assert nats.shape == (10,) and nats.device.type == 'cpu'
    (wait,) = gpu.waits
    assert 'result.cpu()' in wait


@pytest.mark.parametrize('kind, options', [
    ('duo', dict()),
    ('duo', dict(greedy=True, temperature=0.9)),
    ('duo', dict(sampler='psi', top_p=0.9)),
    ('duo', dict(sampler='psi', psi='cap')),
    ('mdlm', dict(top_p=0.9)),
    ('mdlm', dict(sampler='psi', psi='cap')),
    ('ar', dict())])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_a_sampler_does_not_wait_for_the_device(gpu, kind, options, dtype):
    loaded = Loaded(small_model(kind).eval(), None, dict(objective=kind, data=dict(vocab_size=K)))
    xt = torch.randint(K, (B, 12), device='cuda')
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        steps = list(denoise(loaded, xt, xt == 3, steps=8, **options))
    assert len(steps) == (11 if kind == 'ar' else 9)
    assert all(x.is_cuda and x.shape == xt.shape for x in steps)
    assert not gpu.waits



def test_the_selftest_runs_there(monkeypatch):
    change(monkeypatch, objective='duo', optimizer='adamw', **selftest.SETTINGS)
    monkeypatch.setattr(selftest, 'STEPS', 1)
    monkeypatch.setattr(selftest, 'B', 4)
    for name in selftest.OBJECTIVES:
        noise, metrics_noise = selftest.same_noise()
        with fake_cuda(), noise, metrics_noise:
            seen = selftest.train_steps(name, 'cuda', 'bfloat16')
        assert seen.shape == (selftest.STEPS + 1,) and seen.device.type == 'cpu'
    with fake_cuda():
        for kind, options in selftest.SAMPLERS.values():
            assert selftest.frequencies('cuda', 'bfloat16', kind, **options)[0].shape == (8,)

# --------------------------------------------------------------------------------------------------
# what must not be is noticed

MISTAKES = {
    'item': lambda losses: losses * losses.mean().item(),
    'bool': lambda losses: losses if losses.mean() > 0 else -losses,
    'a bool index': lambda losses: losses.where(losses > losses[losses > 0].mean(), 0),
    'nonzero': lambda losses: losses + losses.nonzero().size(0),
    'a masked assignment': lambda losses: losses.index_put((losses > 0,), losses),
    'a copy to the CPU': lambda losses: losses + 0 * losses.cpu().sum(),
    'a copy to the device': lambda losses: losses + torch.ones(losses.shape).to('cuda'),
    'a tensor from a list': lambda losses: losses * torch.tensor([2.0], device='cuda'),
    'a tensor of the CPU': lambda losses: losses + torch.ones(losses.shape),
    'an index of the CPU': lambda losses: losses[torch.arange(losses.size(0))],
    'nothing': lambda losses: losses + torch.zeros((), device='cuda'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_in_a_step_is_noticed(gpu, monkeypatch, mistake):
    change(monkeypatch, objective='duo', curriculum_frac=0.0)
    model = small_model()
    x0 = torch.randint(K, (B, T), device='cuda')
    u = stratified_times(0.3, 0, B, B, device='cuda')
    loss_fn = lambda logits, *args: MISTAKES[mistake](nelbo(logits, *args))
    raised = None
    try:
        train.training_loss(model, x0, u, 0, K, loss_fn).backward()
    except (DeviceWait, RuntimeError) as error:
        raised = error
    if mistake == 'nothing':
        assert raised is None and not gpu.waits
        assert all(p.grad is not None for p in model.parameters())
    elif mistake == 'a tensor of the CPU':
        assert 'two' in str(raised) and 'cuda:0' in str(raised) and 'cpu' in str(raised)
    else:
        assert any(f"'{mistake}': lambda" in wait for wait in gpu.waits)


@pytest.mark.parametrize('objective', ['duo', 'ar'])
def test_a_tensor_of_all_logits_shows_in_the_peak(gpu, monkeypatch, objective):
    """As if someone had called the network, and the loss, without the chunked head."""
    change(monkeypatch, objective=objective, curriculum_frac=0.0)
    monkeypatch.setattr(diffusion, 'head_chunks', chunks_of(64))
    model = small_model(objective)
    x0 = torch.randint(K, (B, T), device='cuda')
    u = stratified_times(0.3, 0, B, B, device='cuda')
    peaks = []
    for all_logits in (False, True):
        gpu.reset()
        before = gpu.live
        if all_logits:
            logits = model(x0, u)
            F.cross_entropy(logits.flatten(0, 1), x0.flatten()).backward()
            del logits
        else:
            train.training_loss(model, x0, u, 0, K, train.loss_of(objective, K)).backward()
        peaks.append(gpu.peak - before)
        model.zero_grad()
        assert gpu.live <= before + 1000                 # and all of it is freed
    whole = B * T * K * 4
    assert peaks[0] < 0.5 * whole < 2 * whole < peaks[1]


def chunks_of(n):
    """head_chunks with few rows at a time: on a GPU a chunk is larger than this whole batch."""
    def chunks(h, weight, bias, *args):
        for i in range(0, h.size(0), n):
            rows = slice(i, i + n)
            yield rows, h[rows], F.linear(h[rows], weight, bias), [a[rows] for a in args]
    return chunks

# --------------------------------------------------------------------------------------------------
# the stand-ins themselves

@pytest.mark.parametrize('objective, step', [('duo', 0), ('duo', 9), ('mdlm', 9), ('ar', 9)])
def test_the_stand_in_for_autograds_engine_has_its_gradients(monkeypatch, objective, step):
    """On the CPU, whose tensors have numbers."""
    change(monkeypatch, objective=objective, curriculum_frac=0.5, max_iters=10)
    model = small_model(objective, 'cpu')
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x0, u = torch.randint(K, (B, 16)), stratified_times(0.3, 0, B, B)
    grads = []

    def run_step():
        torch.manual_seed(1)
        for _ in range(2):                               # gradients add up
            with torch.autocast('cpu', torch.bfloat16, enabled=step == 9):
                loss = train.training_loss(model, x0, u, step, K, loss_fn)
            (2 * loss).backward()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()

    loss_fn = train.loss_of(objective, K)
    if objective == 'duo':                               # by autograd inside the head
        loss_fn = lambda logits, *args: 1.5 * nelbo(logits, *args)
    run_step()
    with fake_cuda():
        run_step()
    for expected, got in zip(*grads):
        assert (expected - got).abs().max() <= 1e-5 * expected.abs().max() > 0


def test_copies_and_memory_are_counted(gpu):
    a = torch.ones(1000, 1000, device='cuda')
    b = a.view(10, -1)
    assert gpu.live == gpu.peak == 4e6                   # a view takes nothing
    c = copy.deepcopy(torch.nn.Parameter(a))
    assert c.is_cuda and gpu.live == 8e6
    gpu.reset()
    with torch.no_grad():
        d = c @ a
        assert gpu.products == [(2e9, 12e6)] and gpu.peak == 12e6
        d = (d + 1) * d
    gpu.end_kernel()
    assert gpu.eager == 4e6 * 5 and gpu.fused == 8e6     # read d once, write the new one
    assert gpu.peak == 20e6 and gpu.live == 12e6
    del a
    assert gpu.live == 12e6                              # b holds it
    del b
    assert gpu.live == 8e6
