"""
The optimiser Muon, and what all optimisers of a run share: learning rates, clipping, skipped steps,
resuming; and the average of the weights (EMA).

Muon (Keller Jordan, 2024) is for the matrices of attention and MLPs. Its update is the Nesterov
momentum with all directions made equally strong, so that rare ones are learnt, too.
torch.optim.Muon (match_rms_adamw) is the same in bfloat16, which most CPUs emulate slowly.
"""
import math

import torch


def orthogonalise(x):
    """The matrix x (m,n) with its singular values brought near 1 (0.7 to 1.2): five steps of a
    Newton-Schulz iteration, with Jordan's coefficients."""
    if x.size(0) > x.size(1):
        return orthogonalise(x.T).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """lr is on AdamW's scale: updates get the size that AdamW's have (arXiv 2502.16982)."""

    _step_supports_amp_scaling = True    # a tensor found_inf skips a step, as in a fused AdamW

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        skip = getattr(self, 'found_inf', torch.zeros(())).bool()
        for group in self.param_groups:
            momentum, lr = group['momentum'], group['lr']
            for p in group['params']:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state['momentum_buffer'] = torch.zeros_like(p)
                average = state['momentum_buffer'].lerp(p.grad, 1 - momentum)
                update = orthogonalise(p.grad.lerp(average, momentum))
                update *= 0.2 * max(p.shape) ** 0.5
                update += group['weight_decay'] * p
                state['momentum_buffer'] = torch.where(skip, state['momentum_buffer'], average)
                p.sub_(torch.where(skip, 0, lr * update))

# --------------------------------------------------------------------------------------------------
# all optimisers of a run

def set_lr(optimizers, share):
    """Every parameter group gets this share of its own rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault('initial_lr', group['lr'])
            group['lr'] = group['initial_lr'] * share


def clip_and_step(optimizers, scaler, params, max_norm, loss=0.0):
    """Step, unless a gradient, or the loss, is not finite. Returns two tensors: the norm of all
    gradients before clipping to max_norm (0: no clipping), and whether there was a step."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm or math.inf)
    finite = (norm + loss).isfinite()
    for optimizer in optimizers:
        can_skip = getattr(optimizer, '_step_supports_amp_scaling', False)
        if can_skip:
            optimizer.found_inf = 1.0 - finite.float()   # on the device: no CPU wait
        if can_skip or finite:                           # scaler.step() checks one optimizer only
            optimizer.step()
        optimizer.zero_grad()
    scaler.update()
    return norm, finite


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, weight by weight, in place."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


STATE_PARTS = {torch.optim.AdamW: {'exp_avg', 'exp_avg_sq'}, Muon: {'momentum_buffer'}}


def load_optimizer(optimizer, saved):
    """Load a saved state, with this run's learning rates. ValueError if a part is missing, a step
    count is negative, or the shape of an AdamW's or Muon's part is not its parameter's (a fused
    step would read beyond it)."""
    needed = STATE_PARTS.get(type(optimizer), set())
    groups = optimizer.state_dict()['param_groups']
    optimizer.load_state_dict(dict(state=saved, param_groups=groups))
    for parameter, moments in optimizer.state.items():
        if not needed <= moments.keys():
            raise ValueError(f"the optimiser's state lacks {', '.join(needed - moments.keys())}")
        if any(moments[part].shape != parameter.shape for part in needed):
            raise ValueError("the optimiser's state has other shapes than the weights")
        if moments.get('step', 0) < 0:
            raise ValueError("the optimiser's state has a negative step")
