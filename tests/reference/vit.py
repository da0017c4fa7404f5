"""The vision transformer image by image, patch by patch and head by head, in float64 (arXiv 2010.11929, equations 1 to 8)."""

import math

import torch

PATCH = 9


def slow_embeddings(state, images, heads, seen=None):
    """Embeddings (B, D) in eval mode, of the state of a net and images (B, 3, 112, 112).

    ``seen`` lists for every image the patches that the blocks see, in order; the token that learns stands for the others.
    """
    state = {name: value.double() for name, value in state.items()}
    return torch.stack([_embedding(state, image.double(), heads, seen and seen[number]) for number, image in enumerate(images)])


def _embedding(state, image, heads, seen):
    across = image.shape[-1] // PATCH
    places = range(across ** 2) if seen is None else seen
    z = torch.stack([_patch_token(state, image, *divmod(place, across)) + state["pos_embed"][0, place] for place in places])
    block = 0
    while f"blocks.{block}.norm1.weight" in state:
        def of(name, block=block):
            return state[f"blocks.{block}.{name}"]
        z = _attention(_norm(z, of("norm1.weight"), of("norm1.bias")), of, heads) + z
        z = _mlp(_norm(z, of("norm2.weight"), of("norm2.bias")), of) + z
        block += 1
    z = _norm(z, state["norm.weight"], state["norm.bias"])
    tokens = [state["mask_token"][0, 0]] * across ** 2
    for place, token in zip(places, z, strict=True):
        tokens[place] = token
    x = torch.cat(tokens)
    for linear, norm in (0, 1), (2, 3):
        x = state[f"feature.{linear}.weight"] @ x
        mean, variance, weight, bias = (state[f"feature.{norm}.{name}"]
                                        for name in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean) / torch.sqrt(variance + 2e-5) * weight + bias
    return x


def _patch_token(state, image, row, column):
    patch = image[:, PATCH * row:PATCH * (row + 1), PATCH * column:PATCH * (column + 1)]
    return state["patch_embed.proj.weight"].flatten(1) @ patch.flatten() + state["patch_embed.proj.bias"]


def _norm(z, weight, bias):
    deviations = z - z.mean(1, keepdim=True)
    return deviations / torch.sqrt(deviations.square().mean(1, keepdim=True) + 1e-5) * weight + bias


def _attention(z, of, heads):
    q, k, v = (part.chunk(heads) for part in of("attn.qkv.weight").chunk(3))
    parts = []
    for head in range(heads):
        scores = (z @ q[head].T) @ (z @ k[head].T).T / math.sqrt(len(q[head]))
        shares = scores.exp() / scores.exp().sum(1, keepdim=True)
        parts.append(shares @ (z @ v[head].T))
    return torch.cat(parts, 1) @ of("attn.proj.weight").T + of("attn.proj.bias")


def _mlp(z, of):
    hidden = z @ of("mlp.fc1.weight").T + of("mlp.fc1.bias")
    return hidden.clamp(0, 6) @ of("mlp.fc2.weight").T + of("mlp.fc2.bias")
