"""The DS-Block in NumPy and float64, one function per equation: an oracle for the tests.

Written from the paper's equations alone. Maps are (B, C, H, W), tokens (B, T, C). Parameters come
as one dict ``p`` of arrays under the names of ``DSBlock.state_dict()``. BatchNorm is in its
evaluation form.
"""

import math

import numpy as np

EPS = 1e-5

erf = np.vectorize(math.erf, otypes=[np.float64])


# Layers


def per_channel(vector):
    return vector[:, None, None]


def batch_norm(x, p, name):
    """(x − mean) / √(var + ε) · weight + bias, from the running statistics."""
    mean, var = per_channel(p[f"{name}.running_mean"]), per_channel(p[f"{name}.running_var"])
    normalised = (x - mean) / np.sqrt(var + EPS)
    return normalised * per_channel(p[f"{name}.weight"]) + per_channel(p[f"{name}.bias"])


def layer_norm(x, p, name):
    """The same over the channels of each token, from the token's own mean and biased variance."""
    mean = x.mean(axis=-1, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + EPS) * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    """x·Wᵀ + b on tokens; W may have the trailing 1×1 of a convolution."""
    weight = p[f"{name}.weight"]
    return x @ weight.reshape(weight.shape[:2]).T + p[f"{name}.bias"]


def conv1x1(x, p, name):
    return to_map(linear(to_tokens(x), p, name), x.shape[2:])


def depthwise3x3(x, p, name):
    """out[i, j] = Σ_{u,v} w[u, v]·x[i+u−1, j+v−1] + b per channel; x is 0 outside the image."""
    weight, height, width = p[f"{name}.weight"], x.shape[2], x.shape[3]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros_like(x) + per_channel(p[f"{name}.bias"])
    for u in range(3):
        for v in range(3):
            out += per_channel(weight[:, 0, u, v]) * padded[:, :, u : u + height, v : v + width]
    return out


def source_coordinate(i, size_in, size_out):
    """Where output i samples the input: centres of pixels correspond (align_corners=False)."""
    return max(0.0, (i + 0.5) * size_in / size_out - 0.5)


def interpolation_matrix(size_in, size_out):
    """(size_out, size_in): each row weighs the two nearest inputs, however far apart the rows."""
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        position = source_coordinate(i, size_in, size_out)
        low = math.floor(position)
        high = min(low + 1, size_in - 1)
        matrix[i, low] += 1.0 - (position - low)
        matrix[i, high] += position - low
    return matrix


def bilinear(x, grid):
    rows = interpolation_matrix(x.shape[2], grid[0])
    columns = interpolation_matrix(x.shape[3], grid[1])
    return np.einsum("ih,bchw,jw->bcij", rows, x, columns)


def gelu(x):
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def to_tokens(x):
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]).transpose(0, 2, 1)


def to_map(tokens, grid):
    return tokens.transpose(0, 2, 1).reshape(tokens.shape[0], tokens.shape[2], *grid)


# Attention


def softmax(scores):
    """Over the keys, the last axis."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def split_heads(x, num_heads):
    """(B, T, h·d) → h arrays (B, T, d): head k owns channels k·d … (k+1)·d − 1."""
    return np.split(x, num_heads, axis=2)


def join_heads(heads):
    return np.concatenate(heads, axis=2)


def temperature(head_dim):
    return math.sqrt(head_dim)


def attention(q, k, v, num_heads):
    """Per head softmax(Q·Kᵀ/√d)·V, heads concatenated."""
    out = []
    heads = zip(*(split_heads(x, num_heads) for x in (q, k, v)), strict=True)
    for q_head, k_head, v_head in heads:
        scores = q_head @ k_head.transpose(0, 2, 1) / temperature(q_head.shape[2])
        out.append(softmax(scores) @ v_head)
    return join_heads(out)


def queries_keys_values(x, p, name):
    return np.split(linear(x, p, name), 3, axis=2)


# Steps of the block


def position(x, p):
    """x₁ = x + DW3(x)."""
    return x + depthwise3x3(x, p, "position.conv")


def split_streams(y, global_dim):
    """(y_g, y_l): the first Cg channels are the global stream, the last Cl the local one."""
    return y[:, :global_dim], y[:, global_dim:]


def local_stream(y, p):
    """f_L = y_l + DW3(BN(y_l)), the zero padding after the BN."""
    return y + depthwise3x3(batch_norm(y, p, "local_conv.norm"), p, "local_conv.conv")


def global_stream(tokens, p, num_heads):
    """g₁ = g₀ + MHSA(LN(g₀))."""
    qkv = queries_keys_values(layer_norm(tokens, p, "attention.norm"), p, "attention.qkv")
    return tokens + attention(*qkv, num_heads)


def co_attention(local, tokens, p, num_heads):
    """(f_L + Linear(h_L), g₁ + Linear(h_G)), both from the streams as they come in."""
    local_tokens = to_tokens(batch_norm(local, p, "co_attention.local_norm"))
    q_l, k_l, v_l = queries_keys_values(local_tokens, p, "co_attention.local_qkv")
    global_tokens = layer_norm(tokens, p, "co_attention.global_norm")
    q_g, k_g, v_g = queries_keys_values(global_tokens, p, "co_attention.global_qkv")
    to_local = linear(attention(q_l, k_g, v_g, num_heads), p, "co_attention.local_proj")
    to_global = linear(attention(q_g, k_l, v_l, num_heads), p, "co_attention.global_proj")
    return local + to_map(to_local, local.shape[2:]), tokens + to_global


def concatenate(local, global_):
    return np.concatenate([local, global_], axis=1)


def fuse(residual, local, global_, p):
    """x₂ = x₁ + Conv1×1(concat[f'_L, bilinear(g' → H×W)])."""
    upsampled = bilinear(global_, local.shape[2:])
    return residual + conv1x1(concatenate(local, upsampled), p, "fuse")


def mlp(x, p):
    """x₃ = x₂ + Conv1×1(GELU(Conv1×1(BN(x₂))))."""
    hidden = gelu(conv1x1(batch_norm(x, p, "mlp.norm"), p, "mlp.fc1"))
    return x + conv1x1(hidden, p, "mlp.fc2")


def ds_block(x, p, *, num_heads, global_dim, reduction, alignment):
    """The whole block: (output, local stream, global stream as a map)."""
    x1 = position(x, p)
    y_global, y_local = split_streams(conv1x1(batch_norm(x1, p, "norm"), p, "split"), global_dim)
    grid = tuple(max(1, size // reduction) for size in x.shape[2:])
    local, tokens = y_local, to_tokens(bilinear(y_global, grid))
    if local.shape[1]:
        local = local_stream(local, p)
    if tokens.shape[2]:
        tokens = global_stream(tokens, p, num_heads)
    if alignment and local.shape[1] and tokens.shape[2]:
        local, tokens = co_attention(local, tokens, p, num_heads)
    global_ = to_map(tokens, grid)
    return mlp(fuse(x1, local, global_, p), p), local, global_
