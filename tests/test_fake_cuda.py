"""Training, evaluation and sampling on a GPU that is not there: see fake_cuda.py."""
import copy

import pytest
import torch

import diffusion
import sample
import train
from device import pick_dtype
from diffusion import evaluate, nelbo, stratified_times
from fake_cuda import DeviceWait, fake_cuda
from helpers import TINY, good, run, run_here
from model import DiT, DiTConfig
from sample import Loaded, denoise

K, B, T = 4096, 4, 64


def small_model(kind='duo', device='cuda'):
    config = DiTConfig(K + (kind == 'mdlm'), T, 2, 2, 32, 16, 0.1, kind == 'ar')
    with torch.device(device):
        return DiT(config)


def batch(device='cuda'):
    return torch.randint(K, (B, T), device=device), stratified_times(0.3, 0, B, B, device=device)


@pytest.fixture
def gpu():
    with fake_cuda() as gpu:
        yield gpu

# --------------------------------------------------------------------------------------------------
# the training loop itself

LOG = 'mean = (total.double() / good).item()     # nan if no step was good'
START = ['model = DiT(config).to(here)', 'model.load_state_dict(trained.state_dict())']


@pytest.mark.parametrize('capability, args', [
    (9, '--curriculum_frac=1'),
    (9, '--curriculum_frac=0 --gradient_accumulation_steps=2'),
    (7, '--curriculum_frac=0.5 --grad_clip=0'),
    (9, '--objective=mdlm'),
    (7, '--objective=ar'),
    (9, '--objective=dcd --init_from=out --dcd_rounds=6'),
    (7, '--objective=dcd --init_from=out --dcd_rounds=6 --dcd_ema_teacher')])
def test_steps_of_train_py_do_not_wait_for_the_device(work, capability, args):
    """It runs until it writes its first line about the loss, after three steps. Before the first
    one, the weights are copied to the device."""
    with fake_cuda(capability) as gpu, pytest.raises(DeviceWait):
        run_here(work, 'train.py', *TINY, *args.split(), '--device=cuda', '--out_dir=fake',
                 '--log_interval=3')
    assert [line for line in gpu.waits if line.partition('  # ')[0] not in START] == [
        f'{LOG}  # aten._local_scalar_dense needs values of the device']
