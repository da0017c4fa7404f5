"""Resident classes step by step: a dict for the pool, one matrix of logits, autograd for every gradient."""

import torch
from torch.nn.functional import normalize, pad

from tests.reference.margin import SlowQuality, slow_image_loss


class SlowResident:
    """A full FC layer over the identities in a dict, least recently used first.

    Args:
        pool: a ResidentPool to begin with, whole, without identities.

    Attributes:
        weights: of each slot, those of its sub-centres, (c, D).
    """

    def __init__(self, pool):
        self.num_identities, self.num_slots = pool.num_identities, pool.num_slots
        self.slots = {}  # identity -> slot, least recently used first
        self.free = list(range(pool.num_slots))
        self.sub_centers = pool.sub_centers
        size = pool.embedding_size
        self.weights = [row[:size].view(1, size) for row in pool.weights_at(torch.arange(pool.num_slots))]
        self.kept = {}
        self.quality = SlowQuality()

    def step(self, embeddings, labels, margin, rate):
        """Mean loss over the batch of all ranks. The weights take their step."""
        loss = torch.stack(self.losses(embeddings, labels, margin)).mean()
        self.learn(loss, rate)
        seen = {labels[image].item() for image in self.first_images}
        for image, identity in enumerate(labels.tolist()):
            slot = self.slots[identity]
            if identity not in seen and len(self.weights[slot]) < self.sub_centers:
                self.weights[slot] = torch.cat([self.weights[slot], 0.2 * normalize(embeddings[image].detach()[None])])
            seen.add(identity)
        return loss

    def losses(self, embeddings, labels, margin, entering=None):
        """Loss of each image, after its identity has a slot. Class weights begin with ``entering`` or the embeddings."""
        probes = normalize(embeddings)
        self.first_images = self.admit(labels.tolist(), probes.detach() if entering is None else entering)
        self.leaves = [weight.detach().requires_grad_() for weight in self.weights]
        cosine = torch.stack([(probes @ normalize(weight).T).max(1).values for weight in self.leaves], 1)
        ratio = (self.num_identities - 1) / (self.num_slots - 1)
        return [slow_image_loss(list(cosine[image]), self.slots[identity], margin, quality, ratio, image in self.first_images)
                for image, (identity, quality) in enumerate(zip(labels.tolist(), self.quality(embeddings), strict=True))]

    def learn(self, loss, rate):
        gradients = torch.autograd.grad(loss, self.leaves, retain_graph=True)
        self.weights = [weight.detach() - rate * gradient for weight, gradient in zip(self.leaves, gradients, strict=True)]

    def table(self):
        """Weights of all slots, (K, C·D), with 0 for sub-centres that are not there."""
        padded = [pad(weight, (0, 0, 0, self.sub_centers - len(weight))) for weight in self.weights]
        return torch.stack(padded).flatten(1)

    def admit(self, labels, features):
        """Give every identity a slot; returns which images are the first of theirs."""
        for identity in labels:
            if identity in self.slots:  # before any is evicted
                self.slots[identity] = self.slots.pop(identity)
        first_images = []
        for image, identity in enumerate(labels):
            if identity not in self.slots:
                if not self.free:
                    evicted = next(iter(self.slots))
                    slot = self.slots.pop(evicted)
                    self.kept[evicted] = self.weights[slot]
                    self.free.append(slot)
                slot = self.free.pop(0)
                self.slots[identity] = slot
                if identity in self.kept:
                    self.weights[slot] = self.kept[identity]
                else:
                    self.weights[slot] = 0.2 * features[image][None]
                    first_images.append(image)
            else:
                self.slots[identity] = self.slots.pop(identity)
        return first_images
