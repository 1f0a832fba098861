"""The mixture density head (Bishop 1994, "Mixture density networks"): a prediction that is a whole distribution.

For each time step a head describes x[t + k] by K isotropic Gaussians,

    p(x) = Σ_j w_j N(x; μ_j, σ_j² I),    w = softmax(logits),

as one vector of K (feature_dim + 2) numbers: K logits, then K log scales, then K means of feature_dim numbers each.
A model that is trained on the squared error learns the mean of what may come. At the step at which a circle may be
left, that mean lies between circles, where the process never is. Here one component can stay on the circle while
others wait on the circles that may follow.

Shapes: outputs (…, K (feature_dim + 2)) with any leading dimensions; logits and log_scales (…, K); means
(…, K, feature_dim); x (…, feature_dim).
"""

import math

import torch
from torch import distributions

# How many times smaller or larger than its bias, which is the same for all inputs, a component's scale can become.
# Unbounded, a component could collapse onto a single data point, where the likelihood has no maximum (Bishop 2006,
# Pattern Recognition and Machine Learning, section 9.2.1).
SCALE_RANGE = 20.0
STEPS_FOR_SCALE = 100_000  # enough for the mean and the scale of the data


def n_outputs(n_components, feature_dim):
    """How many numbers a head puts out: those of a mixture, or of a point prediction when n_components is 0."""
    return n_components * (feature_dim + 2) if n_components else feature_dim


def n_components(n_outputs, feature_dim):
    """How many components a head with n_outputs outputs has; 0 is a point head. Raises ValueError for other widths."""
    if n_outputs == feature_dim:
        return 0
    if n_outputs % (feature_dim + 2) or n_outputs == 0:
        raise ValueError(f"a head has {n_outputs} outputs, neither {feature_dim} (a point) nor a multiple of "
                         f"{feature_dim + 2} (a mixture)")
    return n_outputs // (feature_dim + 2)


def split(outputs, bias, feature_dim):
    """The outputs of a head as (logits, log_scales, means), in float32 at least, whatever autocast made of them.

    bias (K (feature_dim + 2),): that of the head's last layer. A log scale is its bias plus what the input adds,
    which tanh bounds to ± log(SCALE_RANGE).
    """
    K = n_components(outputs.shape[-1], feature_dim)
    outputs = outputs.float() if outputs.dtype.itemsize < 4 else outputs
    logits, log_scales, means = outputs.split([K, K, K * feature_dim], dim=-1)
    base, reach = bias[K:2 * K].to(outputs.dtype), math.log(SCALE_RANGE)
    log_scales = base + reach * torch.tanh((log_scales - base) / reach)
    return logits, log_scales, means.unflatten(-1, (K, feature_dim))


def mean(logits, means):
    """The mean of the mixture, (…, feature_dim): its best point prediction under the squared error."""
    return (logits.softmax(-1).unsqueeze(-1) * means).sum(-2)


def log_density(logits, log_scales, means, x):
    """log p(x) in nats, (…)."""
    squared = (x.unsqueeze(-2) - means).square().sum(-1)          # (…, K) squared distance to each mean
    normaliser = x.shape[-1] * (log_scales + 0.5 * math.log(2 * math.pi))
    components = -0.5 * squared * torch.exp(-2 * log_scales) - normaliser
    return torch.logsumexp(logits.log_softmax(-1) + components, dim=-1)


def distribution(logits, log_scales, means):
    """The mixture as a torch.distributions.MixtureSameFamily over x, batch shape (…)."""
    scales = torch.exp(log_scales).unsqueeze(-1).expand_as(means)
    normals = distributions.Independent(distributions.Normal(means, scales, validate_args=False), 1)
    weights = distributions.Categorical(logits=logits, validate_args=False)
    return distributions.MixtureSameFamily(weights, normals, validate_args=False)


def draw(logits, log_scales, means, temperature, uniform, normal):
    """One draw from each mixture, (…, feature_dim), from random numbers that are given: no generator is used.

    uniform (…), in [0, 1), chooses the component; normal (…, feature_dim) are standard normals, what it adds to its
    mean. temperature τ > 0 sharpens as in sketch-rnn (Ha & Eck 2017, arXiv 1704.03477, section 3.3): the weights
    become softmax(logits / τ) and the scales σ √τ. τ = 1 draws from the mixture itself; τ → 0 gives the mean of the
    likeliest component, which is not the mean of the mixture.
    """
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    cumulative = weights.cumsum(-1)                               # (…, K), its last column is the sum
    chosen = (cumulative <= uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(-1, keepdim=True)
    chosen = chosen.clamp(max=logits.shape[-1] - 1)               # (…, 1)
    scale = log_scales.gather(-1, chosen).exp() * math.sqrt(temperature)
    return means.take_along_dim(chosen.unsqueeze(-1), -2).squeeze(-2) + scale * normal


def start_at_data(heads, X):
    """`initialise` the heads of a model by the first STEPS_FOR_SCALE steps of X (n_steps, feature_dim), an array."""
    sample = X[:STEPS_FOR_SCALE].astype("float64")
    for head in heads:
        initialise(head[-1].bias, sample.mean(axis=0), math.sqrt(sample.var(axis=0).mean()))


@torch.no_grad()
def initialise(bias, data_mean, data_std):
    """Set the bias of a head's last layer, in place, so that every component starts at the data and none starts dead.

    All components become equally likely, as wide as the data and centred on their mean; the random weights of the
    layer tell them apart. data_mean (feature_dim,); data_std: one standard deviation for all features.
    """
    feature_dim = len(data_mean)
    K = n_components(len(bias), feature_dim)
    logits, log_scales, means = bias.split([K, K, K * feature_dim])
    logits.zero_()
    log_scales.fill_(math.log(data_std))
    means.copy_(torch.as_tensor(data_mean, dtype=bias.dtype, device=bias.device).repeat(K))
