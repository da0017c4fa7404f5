"""The loss against explicitly built views, probe by probe and slot by slot."""

import torch

from tests.reference.margin import slow_target


def slow_loss(embeddings, labels, rows, two_keys, margin, num_hard_negatives, qualities=None):
    """The loss of a half-step, without a margin softmax over more than one probe at a time.

    Args:
        labels: slot of each probe's identity, or -1.
        rows: (2, K, D) of the pool in this half-step.
        two_keys: slots of which the second view shows row 1.
        qualities: of the probes' images, for AdaFace's margin.
    """
    second_view = rows[0].clone()
    for slot in two_keys.tolist():
        second_view[slot] = rows[1, slot]
    total = embeddings.sum() * 0
    for view in rows[0], second_view:
        positives, negatives = [], []
        for embedding, label, quality in zip(embeddings, labels.tolist(), qualities or [None] * len(labels), strict=True):
            cosines = []
            for slot, feature in enumerate(view):
                cosine = embedding @ feature / embedding.norm()
                if margin.filter_threshold and slot != label and cosine > margin.filter_threshold:
                    cosine = cosine * 0
                cosines.append(cosine)
            if label >= 0:
                cosines[label] = slow_target(cosines[label], margin, quality)
                logits = margin.scale * torch.stack(cosines)
                positives.append(torch.logsumexp(logits, 0) - logits[label])
            else:
                hardest = sorted(cosines, key=lambda cosine: cosine.item(), reverse=True)[:num_hard_negatives]
                negatives += [cosine.clamp_min(0) for cosine in hardest]
        if positives:
            total = total + sum(positives) / len(positives)
        if negatives:
            total = total + sum(negatives) / len(negatives)
    return total
