"""F²C in a plain PyTorch loop over tensors in memory: python examples/plain_pytorch.py --data data/example"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from f2c_plugin import Margin, RecordDataset, VerificationSet, build_head
from f2c_plugin.data.dataset import normalize_faces
from f2c_plugin.models import get_model
from f2c_plugin.synthetic.dataset import write_dataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder of a pack; synthetic faces are drawn if it is missing")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.data.exists():
        write_dataset(args.data, num_identities=100, images_per_identity=20, num_pairs=1000)
    torch.manual_seed(args.seed)

    # Your own data goes here: uint8 images (n, 112, 112, 3) and int64 labels (n,) from 0.
    pack = RecordDataset(args.data)
    faces, labels = pack.faces(np.arange(len(pack)))

    loader = DataLoader(TensorDataset(faces, labels), batch_size=64, shuffle=True, drop_last=True)
    total_steps = args.epochs * len(loader)
    net = get_model("tiny", 64)
    head = build_head(net, int(labels.max()) + 1, total_steps, embedding_size=64, margin=Margin(32.0, additive=0.35),
                      pool_rate=0.7)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_steps)

    for epoch in range(args.epochs):
        for faces, identities in loader:
            images = normalize_faces(faces, flip=torch.rand(len(faces)) < 0.5)
            loss = head(net(images), identities)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    accuracy = VerificationSet(args.data / "synth.bin").evaluate(net).accuracy
    print(f"accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
