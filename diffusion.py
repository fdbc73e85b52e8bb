"""
The maths of Duo that does not depend on the training step: noise, the diffusion transformation,
losses, and reverse steps.

"The Diffusion Duality" (arXiv 2506.10892; equations are numbered as in its v3). A token is noised
by keeping it with probability alpha and else drawing one of all K tokens. The argmax of a Gaussian
process is the same process (the duality, eq. 13), so training can use its softmax instead: the
curriculum.

Shapes: B batch, T tokens, K vocabulary, C channels. Ids are int64; losses are in nats; alpha,
dalpha and gamma are (B,1), or anything that broadcasts against (B,T). Randomness is torch's default
generator: seed it to repeat a draw.
"""
from functools import partial
from math import log, pi, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch.special import log_ndtr, ndtri

from configurator import UserError, progress

T_MIN = 1e-3                 # training times are drawn from [T_MIN, 1]


def float32_at_least(x):
    return torch.promote_types(x.dtype, torch.float32)

# --------------------------------------------------------------------------------------------------
# schedules: how much of the clean text is left

def stratified_times(u, first, count, total, device='cpu'):
    """count (B,1) float64 times in [0, 1): numbers first .. first+count-1 of `total` times that
    share one offset u and are spread evenly."""
    i = torch.arange(first, first + count, dtype=torch.float64, device=device)
    return (u + i.unsqueeze(-1)) / total % 1                         # (B,1)


def noise_schedule(t, eps=1e-3):
    """alpha(t) and its time derivative, of t's shape, for float64 times: the log-linear schedule,
    alpha = 1 - (1 - eps) t."""
    return 1 - (1 - eps) * t, torch.full_like(t, eps - 1)


def transform(gamma, vocab_size):
    """The diffusion transformation operator (eq. 11): alpha of the discrete process that is the
    argmax of a Gaussian one, and d alpha / d gamma; float64, of gamma's shape. gamma is the log
    noise-to-signal ratio of the Gaussian.

    The clean token is the argmax with probability P = int phi(z - mu) Phi(z)^(K-1) dz,
    mu = exp(-gamma/2). In y = z - mu the integrand is smooth and vanishes beyond |y| = 9, so a
    plain sum is exact to ten digits or more, for any vocabulary and without a table.
    """
    K, h = vocab_size, 0.05
    gamma = gamma.double().unsqueeze(-1)
    mu = torch.exp(-gamma / 2)
    y = torch.linspace(-9, 9, 361, dtype=torch.float64, device=gamma.device)
    mass = h / sqrt(2 * pi) * torch.exp(-y * y / 2 + (K - 1) * log_ndtr(mu + y))  # (...,361)
    alpha = (K * mass.sum(-1) - 1) / (K - 1)
    dalpha = K / (K - 1) * (y * mass * (-mu / 2)).sum(-1)
    return alpha, dalpha


def describe_window(gamma_min, gamma_max, vocab_size):
    """The curriculum's window of noise in words: the same gammas mean less noise for a smaller
    vocabulary. UserError if the window is empty, or so wide that alpha is 1 or 0 as computed."""
    first, last = transform(torch.tensor([gamma_min, gamma_max]), vocab_size)[0].tolist()
    if not 0 < last < first < 1:
        raise UserError(f'--gamma_min={gamma_min} must be below --gamma_max={gamma_max}, and '
                        'neither so far out that alpha is 1 or 0')
    hint = ': little noise, try a higher --gamma_max' if last > 0.5 else ''
    return f'alpha from {first:.3f} to {last:.3f}{hint}'


def gaussian_scales(gamma):
    """The two scales of the latent w = a onehot(x0) + s eps: a^2 = sigmoid(-gamma),
    s^2 = sigmoid(gamma); float64."""
    gamma = gamma.double()
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()

# --------------------------------------------------------------------------------------------------
# noise: from clean tokens to noisy ones

def draw_kept(x0, alpha):
    """(B,T) bool, true with probability alpha. In float64: float32 is too coarse near alpha = 1."""
    return torch.rand(x0.shape, dtype=torch.float64, device=x0.device) < alpha


def q_sample(x0, alpha, vocab_size):
    """xt (B,T) ~ q(xt|x0) = alpha x0 + (1-alpha)/K (eq. 1): the uniform token may be x0 again."""
    keep = draw_kept(x0, alpha)
    return torch.where(keep, x0, torch.randint_like(x0, vocab_size))


def corrupt(x0, alpha, vocab_size, objective='duo'):
    """xt (B,T) and sigma (B,1), what the network is told of the noise. 'duo': q_sample. 'mdlm': a
    token is kept with probability alpha, else it becomes the mask, id vocab_size; sigma is 0, since
    that network can count the masks."""
    if objective == 'duo':
        return q_sample(x0, alpha, vocab_size), -alpha.log()
    keep = draw_kept(x0, alpha)
    return torch.where(keep, x0, vocab_size), torch.zeros_like(alpha)


def largest_normals(shape, n, k, device):
    """The k largest of n standard normals, descending, (*shape, k) float64, without drawing the
    other n - k: the largest of n uniforms is U^(1/n), the next U'^(1/(n-1)) times that, and so on,
    so their logarithms are sums of exponentials."""
    e = torch.empty(*shape, k, dtype=torch.float64, device=device).exponential_()
    log_u = -(e / torch.arange(n, n - k, -1, device=device)).cumsum(-1)
    return -ndtri(-torch.expm1(log_u))            # by the upper tail, where the digits are


def other_tokens(x0, vocab_size, k):
    """k distinct tokens other than x0, (B,T,k), each ordered choice equally likely."""
    taken = x0.unsqueeze(-1)
    chosen = []
    for i in range(k):
        # the r-th token that is still free: step over the taken ones in ascending order
        r = torch.randint_like(x0, vocab_size - 1 - i)
        for token in taken.unbind(-1):
            r = r + (r >= token)
        chosen.append(r)
        taken = torch.cat([taken, r.unsqueeze(-1)], -1).sort().values
    return torch.stack(chosen, -1)


def soft_tokens(x0, gamma, tau, vocab_size, k):
    """The curriculum's input (eq. 21): softmax(w / tau) of the latent w = a onehot(x0) + s eps.

    Returns ids (B,T,k) and weights (B,T,k) float32, heaviest first, and zt (B,T) = argmax w. The k
    tokens are the clean one and the k-1 that got the most noise. Their weights sum to at most 1:
    the softmax also counts all others, by their exact expected sum. No tensor of size K is made.
    With k = vocab_size it is the dense softmax. 2 <= k <= vocab_size.
    """
    n_others = vocab_size - 1
    n_drawn = k - 1
    a, s = gaussian_scales(gamma)                                             # (B,1)
    noise = largest_normals(x0.shape, n_others, n_drawn, x0.device)           # (B,T,k-1)
    clean = a + s * torch.randn_like(x0, dtype=torch.float64)
    w = torch.cat([clean.unsqueeze(-1), s.unsqueeze(-1) * noise], -1) / tau   # (B,T,k)
    w, order = w.sort(descending=True)
    ids = torch.cat([x0.unsqueeze(-1), other_tokens(x0, vocab_size, n_drawn)], -1)
    ids = ids.gather(-1, order)

    log_total = w.logsumexp(-1)                                               # (B,T)
    if n_others > n_drawn:
        # the rest are normals below the smallest one drawn: E[exp(b z) | z < cut] in closed form
        b = s / tau
        cut = noise[..., -1]
        rest = log(n_others - n_drawn) + b * b / 2 + log_ndtr(cut - b) - log_ndtr(cut)
        log_total = torch.logaddexp(log_total, rest)
    weights = torch.exp(w - log_total.unsqueeze(-1)).float()
    return ids, weights, ids[..., 0].contiguous()


def coupled_pair(x0, gamma_t, gamma_s, vocab_size):
    """zt, zs (B,T): the argmaxes of one Gaussian path at two noise levels, sharing their noise
    (Algorithm 1). Of all other tokens only the one with the most noise can win, and it is the same
    at both levels."""
    most_noise = largest_normals(x0.shape, vocab_size - 1, 1, x0.device).squeeze(-1)
    own_noise = torch.randn_like(x0, dtype=torch.float64)
    other = other_tokens(x0, vocab_size, 1).squeeze(-1)

    def argmax(gamma):
        a, s = gaussian_scales(gamma)
        return torch.where(a + s * own_noise > s * most_noise, x0, other)
    return argmax(gamma_t), argmax(gamma_s)


def consistency_pair(x0, u, delta, vocab_size):
    """What distillation compares (Algorithm 1): zt (B,T), noisy, for the student, and zs (B,T) of
    the same Gaussian path, less noisy by the time delta, for the teacher; then the sigmas (B,1) of
    both. gamma is linear in t, from -4 to -1."""
    t = (T_MIN + (1 - T_MIN) * u + delta).clamp(max=1)                        # (B,1) float64
    gammas = -4 + 3 * t, -4 + 3 * (t - delta)
    sigmas = [-transform(gamma, vocab_size)[0].log().float() for gamma in gammas]
    return *coupled_pair(x0, *gammas, vocab_size), *sigmas

# --------------------------------------------------------------------------------------------------
# losses: (logits (...,K), ids and alphas (...)) -> nats (...)

def set_tokens(x, ids, value):
    """x (...,K), overwritten with value (...,1) at ids (...,1). Compiled, columns are compared with
    ids: unlike a scatter, that fuses with what stands around it and needs no buffer of its own."""
    if torch.compiler.is_compiling():
        columns = torch.arange(x.size(-1), device=x.device)
        return torch.where(columns == ids, value, x)
    return x.scatter_(-1, ids, value)


def nelbo(logits, xt, x0, alpha, dalpha):
    """Duo's Rao-Blackwellised NELBO, nats per token (eq. 17), which validation and eval.py report.
    logits (...,K); xt, x0 (...) ids; alpha, dalpha (...), 0 < alpha < 1."""
    return nelbo_and_grad(logits, xt, x0, alpha, dalpha)[0]


def nelbo_and_grad(logits, xt, x0, alpha, dalpha, scale=None):
    """nelbo (...) and, with a scale (...), scale times its gradient by the logits (...,K) in closed
    form: the same numbers as autograd's, in fewer passes over K.

    The bound sums, over the tokens j that xt might come from, w_j (u_j - 1 - log u_j): w_j is the
    true rate, u_j the model's rate over the true one. It is the paper's in another order: no term
    is negative, so no digits cancel in the sum.
    """
    K = logits.size(-1)
    p = logits.softmax(-1, dtype=float32_at_least(logits))
    low = 1 - alpha                      # in float64: near alpha = 1 float32 loses digits
    high = K * alpha + low               # K q(xt|x0) is high where xt is x0, else low
    alpha, dalpha, low, high, ratio = (
        v.unsqueeze(-1).to(p.dtype) for v in (alpha, dalpha, low, high, low / high))  # (...,1)
    xt, x0 = xt.unsqueeze(-1), x0.unsqueeze(-1)                      # all (...,1)
    K_alpha, same = K * alpha, xt == x0
    p_t, p_0 = p.gather(-1, xt), p.gather(-1, x0)
    rate_t, rate_0 = K_alpha * p_t + low, K_alpha * p_0 + low        # K q(xt|.) by the model

    # all tokens except xt (its u is 1) and x0: excess = u - 1. Where it rounds to -1, log u is that
    # of the smallest possible u
    true_rate = torch.where(same, ratio, 1)
    scaled = true_rate * rate_t
    offset = K_alpha / rate_t * (same.to(p.dtype) - p_t)
    excess = torch.addcmul(offset.clamp(min=-1), p, K_alpha / scaled)                # (...,K)
    excess = set_tokens(excess, xt, 0)
    excess = set_tokens(excess, x0, 0)
    log_u = torch.log1p(excess).clamp_(min=torch.log(low / rate_t))
    others = true_rate * (excess - log_u).sum(-1, keepdim=True)
    # x0, whose true rate is 1 / ratio where it is not xt
    u = ratio * rate_0 / rate_t
    clean = torch.where(same, 0, (u - 1 - torch.log(u)) / ratio)
    loss = (-dalpha / K_alpha * (others + clean)).squeeze(-1)
    if scale is None:
        return loss, None

    # share_j = rate_t / dalpha * p_j dloss/dp_j, up to one multiple of p_j, which softmax cancels
    u = torch.addcmul(low / scaled, p, K_alpha / scaled, out=excess)
    share = torch.div(p, u, out=u)
    share = set_tokens(share, x0, p_0 * rate_t / (ratio * rate_0))
    at_t = torch.where(same, (1 - p_t) / high, -p_t / low)
    share = set_tokens(share, xt, p_t + p_t * K * K_alpha / rate_t * at_t)
    grad = torch.addcmul(share, p, -share.sum(-1, keepdim=True))
    grad.mul_(dalpha / rate_t * scale.unsqueeze(-1))
    return loss, grad.to(logits.dtype)


def cross_entropy(logits, targets):
    """-log softmax(logits (n,...,K))[targets (n,...)]: the loss of an autoregressive model."""
    log_p = logits.log_softmax(-1, dtype=float32_at_least(logits))
    return F.nll_loss(log_p.movedim(-1, 1), targets, reduction='none')


def mdlm_nelbo(logits, xt, x0, alpha, dalpha, mask_id):
    """The NELBO of masked diffusion (MDLM, arXiv 2406.07524), nats per token: cross-entropy at
    masks, weighted by -dalpha / (1 - alpha). SUBS: the mask, the last id, is never predicted, and
    an unmasked token is known."""
    weights = torch.where(xt == mask_id, -dalpha / (1 - alpha), 0)
    return weights * cross_entropy(logits[..., :mask_id], x0)


def teacher_kl(logits, h, weight, bias):
    """KL(student || teacher), nats per token (eq. 23; the direction of the published code). logits
    (...,K) are the student's; the teacher's are made here, from its trunk's output h (...,C) and
    its head (see cast_head), so that they need not be kept."""
    log_p = logits.log_softmax(-1, dtype=float32_at_least(logits))
    teacher = F.linear(h.to(weight.dtype), weight, bias)[..., :logits.size(-1)]
    log_q = teacher.log_softmax(-1, dtype=log_p.dtype)
    return (log_p.exp() * (log_p - log_q)).sum(-1)

# --------------------------------------------------------------------------------------------------
# the head and the loss together, a few tokens at a time

def flatten_tokens(h, *args):
    """(B,T,...) -> (B*T,...); each arg is first broadcast over the tokens."""
    return [a.expand(h.shape[:2] + a.shape[2:]).flatten(0, 1) for a in (h, *args)]


def cast_head(h, weight, bias):
    """weight (K,C) and bias (K,) in the dtype of the products with h, cast once for all chunks:
    autocast's where it is on, else h's. In half precision on a GPU, K is padded with zeros to a
    multiple of 64: Tensor Cores want aligned rows."""
    dtype = h.dtype
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if h.is_cuda and dtype.itemsize == 2:
        padding = -len(bias) % 64
        weight, bias = F.pad(weight, (0, 0, 0, padding)), F.pad(bias, (0, padding))
    return weight, bias


def head_chunks(h, weight, bias, *args):
    """Yields (slice, h's rows (n,C), logits (n,K), the args' rows) for h (N,C) and args (N,...), so
    that only one chunk's logits exist at a time. weight, bias: cast_head's."""
    max_logits = 2 ** 27 if h.is_cuda else 2 ** 18       # on a CPU: about what its caches hold
    n = max(64, max_logits // len(bias))
    n = 2 ** (n.bit_length() - 1)        # a power of two divides most batches: one compiled shape
    for i in range(0, h.size(0), n):
        rows = slice(i, i + n)
        x = h[rows].to(weight.dtype)
        yield rows, x, F.linear(x, weight, bias), [a[rows] for a in args]


def loss_and_grad(loss_fn, logits, K, args, scale):
    """loss_fn(logits (n,K), *args) (n,), and scale (n,) times its gradient by the logits, in their
    shape. Columns of logits beyond K are padding. When compiled, this is one graph."""
    if loss_fn is nelbo:
        losses, grad = nelbo_and_grad(logits[:, :K], *args, scale)
        padding = logits.size(1) - K
        return losses, F.pad(grad, (0, padding)) if padding else grad
    if torch.compiler.is_compiling():
        losses, vjp = torch.func.vjp(lambda logits: loss_fn(logits[:, :K], *args), logits)
        return losses, vjp(scale)[0]
    logits = logits.detach().requires_grad_()
    with torch.enable_grad():
        losses = loss_fn(logits[:, :K], *args)
    return losses.detach(), torch.autograd.grad(losses, logits, scale)[0]


def add_product(total, a, b):
    """total += a @ b, summed in total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a @ b


class HeadLoss(torch.autograd.Function):
    """Head, loss and all gradients in one pass: a chunk's logits are made once, used, and freed."""

    @staticmethod
    def forward(ctx, h, weight, bias, differentiate, token_weights, grad_scale, *args):
        K, dtype = len(bias), weight.dtype
        weight, bias = cast_head(h, weight, bias)
        loss = token_weights.new_zeros(())
        dh = torch.empty_like(h)
        dw, db = torch.zeros_like(weight, dtype=dtype), torch.zeros_like(bias, dtype=dtype)
        for rows, x, logits, (w, *rest) in head_chunks(h, weight, bias, token_weights, *args):
            losses, grad = differentiate(logits, K, rest, w * grad_scale)
            loss += (w * losses).sum()                   # no dot product: autocast would round it
            dh[rows] = grad @ weight
            add_product(dw, grad.T, x)
            db += grad.sum(0, dtype=dtype)
        ctx.save_for_backward(dh, dw[:K], db[:K])
        ctx.grad_scale = grad_scale
        ctx.no_grads = [None] * (3 + len(args))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        g = grad / ctx.grad_scale
        return *(v * g for v in ctx.saved_tensors), *ctx.no_grads


def head_loss(h, weight, bias, loss_fn, args, mask=None, grad_scale=1.0, compile=False):
    """Mean over tokens of a loss of the logits h W^T + b, without holding all (B,T,K) of them.

    h (B,T,C), weight (K,C), bias (K,). loss_fn(logits (n,K), *args) -> (n,) nats is any plain
    function, differentiated here, a chunk at a time; args broadcast over (B,T). mask (B,T): the
    tokens' weights, 0 leaves one out. grad_scale: a GradScaler's scale, a tensor: half-precision
    gradients are made at that scale and do not vanish. compile: by torch.compile, the loss and its
    gradient in one graph.
    """
    if mask is None:
        mask = torch.ones_like(h[..., 0])
    h, weights, *args = flatten_tokens(h, mask, *args)
    weights = weights.to(float32_at_least(h))
    weights = weights / weights.sum().clamp(min=1e-9)
    differentiate = torch.compile(loss_and_grad, dynamic=False) if compile else loss_and_grad
    return HeadLoss.apply(
        h, weight, bias, partial(differentiate, loss_fn), weights, grad_scale, *args)


@torch.no_grad()
def per_token(model, x, sigma, fn, args):
    """fn(logits (n,K), *args) -> (n,) for each token of x (B,T) at noise level sigma: a loss, or a
    draw; (B,T), without a gradient. args broadcast over (B,T)."""
    linear = model.output_layer.linear
    h, *args = flatten_tokens(model.hidden(x, sigma), *args)
    found = []
    for _, _, logits, rest in head_chunks(h, *cast_head(h, linear.weight, linear.bias), *args):
        found.append(fn(logits[:, :len(linear.bias)], *rest))
    return torch.cat(found).view(x.shape)

# --------------------------------------------------------------------------------------------------
# the metric: it does not depend on what was trained on

def ar_nll(model, x0):
    """(B,T-1) nats of each token of x0 (B,T), but for the first, by an autoregressive model."""
    return per_token(model, x0[:, :-1], None, cross_entropy, [x0[:, 1:]])


def token_nll(model, x0, t, vocab_size, objective, seeds, fixed=None):
    """The metric, (B,T) nats per token: one draw of the bound at times t (B,1), with noise from one
    seed per row, whatever the training loss; for an autoregressive model ar_nll, and t, seeds and
    fixed are not used. fixed (B,T) bool: tokens that get no noise."""
    if objective == 'ar':
        return ar_nll(model, x0)
    alpha, dalpha = noise_schedule(t)
    rows = []
    for i, seed in enumerate(seeds):                     # a row's noise does not depend on the
        torch.manual_seed(seed)                          # batch that the row is in
        rows.append(corrupt(x0[i:i + 1], alpha[i:i + 1], vocab_size, objective))
    xt, sigma = map(torch.cat, zip(*rows))               # (B,T), (B,1)
    if fixed is not None:
        xt = torch.where(fixed, x0, xt)
    loss_fn = dict(duo=nelbo, mdlm=partial(mdlm_nelbo, mask_id=vocab_size))[objective]
    return per_token(model, xt, sigma, loss_fn, [xt, x0, alpha, dalpha])


@torch.no_grad()
def evaluate(model, objective, vocab_size, get_rows, n, batch_size, pad_id=None, device='cpu',
             rank=0, world=1):
    """Negative log-likelihood per token of each of n rows, nats, (n,) float64 on the CPU. The
    stratified times over [0,1] and the noise are the same on every call.

    get_rows(numbers) -> x0 (B,T) on the device. The ranks share the batches, and each returns all
    rows. Tokens equal to pad_id are not scored. With padding the metric is a ratio, the sum of all
    losses over the number of scored tokens, and the values of the rows are linearised: their mean
    is the ratio, and their standard error is that of the ratio (the delta method).
    """
    result = torch.zeros(2, n, dtype=torch.float64, device=device)
    batches = range(rank * batch_size, n, world * batch_size)
    for first in progress(batches, 'evaluation'):
        count = min(batch_size, n - first)
        x0 = get_rows(range(first, first + count))
        t = stratified_times(0.5, first, count, n, device=device)
        nats = token_nll(model, x0, t, vocab_size, objective, range(first, first + count))
        scored = (x0 != (-1 if pad_id is None else pad_id))[:, -nats.size(1):]
        sums = (nats * scored).sum(-1), scored.sum(-1)
        result[:, first:first + count] = torch.stack(sums)
    if world > 1:
        torch.distributed.all_reduce(result)
    nats, scored = result.cpu()
    mean = nats.sum() / scored.sum()
    return mean + (nats - mean * scored) / scored.mean()

# --------------------------------------------------------------------------------------------------
# reverse steps: from a noise level to a lower one; logits are float32, or wider

def categorical(p):
    """One draw (...) from each row of p (...,K), which need not sum to one. In float64: the usual
    float32 Gumbel noise cuts the tail off, tokens below 1e-7 are never drawn."""
    cdf = p.cumsum(-1, dtype=torch.float64)                                    # (...,K)
    total = cdf[..., -1:]
    return torch.searchsorted(cdf, torch.rand_like(total) * total, right=True).squeeze(-1)


def reverse_step(logits, xt, alpha_s, alpha_t, kappa=1.0):
    """xs (...) ~ kappa q(xs|xt) + (1 - kappa) [alpha_s q(x0|xt) + (1 - alpha_s)/K],
    x0 ~ softmax(logits (...,K)).

    kappa = 1 is ancestral sampling (eq. 5), less is a Psi-sampler's step (chapter II, arXiv
    2602.21185, eq. 12). Drawn as the mixture it is: stay at xt, or take a token from the softmax,
    or any token. alphas are numbers, or float64 (...): their differences are small.
    """
    K = logits.size(-1)
    p = logits.softmax(-1)
    p_t = K * alpha_t * p.gather(-1, xt.unsqueeze(-1)).squeeze(-1).double()
    total = p_t + 1 - alpha_t
    stay = kappa * (p_t + alpha_t / alpha_s - alpha_t) + (1 - kappa) * alpha_s * p_t
    predicted = kappa * (alpha_s - alpha_t) + (1 - kappa) * alpha_s * (1 - alpha_t)
    u = torch.rand_like(xt, dtype=torch.float64) * total
    uniform = torch.randint_like(xt, K)
    moved = torch.where(u <= stay + predicted, categorical(p), uniform)
    return torch.where(u < stay, xt, moved)


def gibbs_step(logits, xt, alpha):
    """Draws (...) ~ q = alpha softmax(logits (...,K)) + (1 - alpha)/K, and the surprise of xt (...)
    under q: log max q - log q(xt), nats.

    Duo's optimal network gives p(x0_i | the noisy tokens at all other places) (arXiv 2605.22765),
    so q is the distribution of the noisy token i given all others: redrawing one place from it is
    a Gibbs move.
    """
    q = alpha * logits.softmax(-1) + (1 - alpha) / logits.size(-1)
    q_t = q.gather(-1, xt.unsqueeze(-1)).squeeze(-1)
    return categorical(q), torch.log(q.amax(-1) / q_t)


def masked_reverse_step(logits, xt, alpha_s, alpha_t, kappa=1.0, *, mask_id):
    """xs (...) of masked diffusion (MDLM), ~ kappa q(xs|xt, x0) + (1 - kappa) q(xs|x0). x0 is xt
    where xt is unmasked, else a draw from softmax(logits (...,K)), which exclude the mask.

    kappa = 1 is ancestral sampling: an unmasked token stays. With less, it is masked again with
    probability (1 - kappa) (1 - alpha_s), the sigma of ReMDM (arXiv 2503.00307).
    """
    is_mask = xt == mask_id
    x0 = torch.where(is_mask, categorical(logits.softmax(-1)), xt)
    p_again = (1 - kappa) * (1 - alpha_s)
    u = torch.rand_like(xt, dtype=torch.float64)
    stays_mask = u * (1 - alpha_t) < 1 - alpha_s - p_again * alpha_t
    return torch.where(torch.where(is_mask, stays_mask, u < p_again), mask_id, x0)


def top_p_filter(logits, top_p):
    """Keep the smallest set of tokens whose probability reaches top_p (the nucleus), and those that
    are as likely as its last one; the others get -inf."""
    if logits.is_cuda:
        ordered = logits.sort().values
    else:                                                # on a CPU numpy is 20 times as fast
        ordered = torch.from_numpy(np.sort(logits.numpy()))
    outside = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    last = outside.sum(-1, keepdim=True).clamp(max=logits.size(-1) - 1)
    return logits.masked_fill(logits < ordered.gather(-1, last), -torch.inf)
