"""
Muon (Keller Jordan, 2024): the optimiser of the matrices inside the blocks. Its update is the
Nesterov momentum with all directions made equally strong, so that rare ones are learnt, too.

torch.optim.Muon is the same in bfloat16, which most CPUs emulate slowly.
"""
import torch


def orthogonalise(x):
    """The matrix x (m,n) with its singular values brought near 1 (0.7 to 1.2): five steps of a
    Newton-Schulz iteration, with Jordan's coefficients."""
    if x.size(0) > x.size(1):
        return orthogonalise(x.T).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """lr is on AdamW's scale: updates get the size that AdamW's have (arXiv 2502.16982)."""

    _step_supports_amp_scaling = True    # found_inf, a tensor, skips a step, as of a fused AdamW

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
