"""The loss against explicitly built views, probe by probe and slot by slot."""


from tests.reference.margin import slow_image_loss


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
            cosines = [embedding @ feature / embedding.norm() for feature in view]
            if label >= 0:
                positives.append(slow_image_loss(cosines, label, margin, quality))
            else:
                threshold = margin.filter_threshold or 2
                kept = [cosine * 0 if cosine > threshold else cosine for cosine in cosines]
                hardest = sorted(kept, key=lambda cosine: cosine.item(), reverse=True)[:num_hard_negatives]
                negatives += [cosine.clamp_min(0) for cosine in hardest]
        if positives:
            total = total + sum(positives) / len(positives)
        if negatives:
            total = total + sum(negatives) / len(negatives)
    return total
